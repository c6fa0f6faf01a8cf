"""Other MoE blocks with the weights of one of ours, a `MixtureOfExperts` of gated experts."""

from functools import partial

import keras
from keras import ops


class Rival(keras.layers.Layer):
    """A layer from (T, D) to (T, D) that is `run(block, x, training)`."""

    def __init__(self, block, run):
        super().__init__()
        self.block, self.run = block, run
        self.built = True

    def call(self, x, training=None):
        return self.run(self.block, x, training)

    def compute_output_shape(self, shape):
        return shape


def keras_hub_mixtral(mixture):
    from keras_hub.src.models.mixtral.mixtral_decoder import MixtralSparseMoeBlock

    bank = mixture.experts
    block = _keras_hub(MixtralSparseMoeBlock, mixture, intermediate_dim=bank.hidden_dim)
    theirs = block.expert_bank
    theirs._expert_feedforward_gate_dense.assign(bank.gate_kernel)
    theirs._expert_feedforward_intermediate_dense.assign(bank.up_kernel)
    theirs._expert_feedforward_output_dense.assign(bank.down_kernel)
    return Rival(block, _as_one_sequence)


def keras_hub_qwen3_moe(mixture):
    from keras_hub.src.models.qwen3_moe.qwen3_moe_decoder import Qwen3SparseMoeBlock

    bank = mixture.experts
    widths = {"moe_intermediate_dim": bank.hidden_dim, "norm_top_k_prob": True}
    block = _keras_hub(Qwen3SparseMoeBlock, mixture, **widths)
    theirs = block.expert_bank
    gate_up = ops.concatenate([bank.gate_kernel, bank.up_kernel], axis=-1)
    theirs._expert_feedforward_gate_dense.assign(gate_up)
    theirs._expert_feedforward_output_dense.assign(bank.down_kernel)
    return Rival(block, _as_one_sequence)


def _keras_hub(block, mixture, **widths):
    """A block of KerasHub with the weights of our router."""
    num_experts, features, _ = mixture.experts.up_kernel.shape
    top_k = mixture.router.top_k
    block = block(hidden_dim=features, num_experts=num_experts, top_k=top_k, **widths)
    block.build((1, None, features))
    block._sparse_feedforward_gate_dense.kernel.assign(mixture.router.kernel)
    return block


def _as_one_sequence(block, x, training):
    return ops.squeeze(block(ops.expand_dims(x, 0), training=training)[0], 0)


def transformers_qwen3_moe(implementation, mixture):
    """The block of Hugging Face, whose experts have several implementations."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    bank = mixture.experts
    block = Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=bank.up_kernel.shape[1],
            moe_intermediate_size=bank.hidden_dim,
            num_experts=bank.num_experts,
            num_experts_per_tok=mixture.router.top_k,
            norm_topk_prob=True,
            experts_implementation=implementation,
        )
    )
    gate_up = ops.concatenate([bank.gate_kernel, bank.up_kernel], axis=-1)
    with torch.no_grad():
        block.gate.weight.copy_(mixture.router.kernel.value.T)
        block.experts.gate_up_proj.copy_(gate_up.transpose(1, 2))
        block.experts.down_proj.copy_(bank.down_kernel.value.transpose(1, 2))
    return Rival(keras.layers.TorchModuleWrapper(block), lambda block, x, _: block(x[None])[0])


def sorted_rows(mixture):
    """Sorted rows and `jax.lax.ragged_dot`, with our router and our weights."""
    from jax.lax import ragged_dot

    def run(mixture, x, training):
        routing = mixture.router(x, training=training)
        bank, top_k = mixture.experts, mixture.router.top_k
        order = ops.argsort(ops.reshape(routing.indices, (-1,)))
        rows = ops.take(x, order // top_k, axis=0)
        gate, up, down = (
            kernel.value for kernel in (bank.gate_kernel, bank.up_kernel, bank.down_kernel)
        )
        hidden = bank.activation(ragged_dot(rows, gate, routing.counts))
        hidden = hidden * ragged_dot(rows, up, routing.counts)
        outputs = ops.take(ragged_dot(hidden, down, routing.counts), ops.argsort(order), axis=0)
        outputs = ops.reshape(outputs, (-1, top_k, outputs.shape[-1]))
        return ops.sum(outputs * ops.expand_dims(routing.weights, -1), axis=1)

    return Rival(mixture, run)


ANY = ("tensorflow", "jax", "torch")
# By name, the backends, and a function from our layer to theirs.
RIVALS = {
    "KerasHub Mixtral": (ANY, keras_hub_mixtral),
    "KerasHub Qwen3-MoE": (ANY, keras_hub_qwen3_moe),
    "Transformers, eager": (("torch",), partial(transformers_qwen3_moe, "eager")),
    "Transformers, grouped_mm": (("torch",), partial(transformers_qwen3_moe, "grouped_mm")),
    "jax.lax.ragged_dot": (("jax",), sorted_rows),
}
