"""Other MoE blocks, each as a Keras layer from (T, D) to (T, D) with the weights of one of ours."""

import keras
from keras import ops


class Rival(keras.layers.Layer):
    """Abstract: another block.

    A subclass imports its package in `adopt`, which takes over the weights of `mixture`, a
    `MixtureOfExperts` of gated experts without biases, and computes in `call`.
    """

    backends: tuple[str, ...] = ("tensorflow", "jax", "torch")

    def __init__(self, mixture):
        backend = keras.backend.backend()
        if backend not in self.backends:
            raise NotImplementedError(f"runs on {', '.join(self.backends)}, not on {backend}")
        super().__init__()
        self.adopt(mixture)
        self.built = True

    def adopt(self, mixture):
        raise NotImplementedError(f"{type(self).__name__} must implement `adopt(mixture)`.")

    def check(self, num_tokens):
        """Raise an error if so many tokens are too many."""

    def compute_output_shape(self, shape):
        return shape


class KerasHubMixtral(Rival):
    def adopt(self, mixture):
        from keras_hub.src.models.mixtral.mixtral_decoder import MixtralSparseMoeBlock

        bank = mixture.experts
        self.block = MixtralSparseMoeBlock(
            hidden_dim=bank.up_kernel.shape[1],
            intermediate_dim=bank.hidden_dim,
            num_experts=bank.num_experts,
            top_k=mixture.router.top_k,
        )
        self.block.build((1, None, bank.up_kernel.shape[1]))
        self.block._sparse_feedforward_gate_dense.kernel.assign(mixture.router.kernel)
        theirs = self.block.expert_bank
        theirs._expert_feedforward_gate_dense.assign(bank.gate_kernel)
        theirs._expert_feedforward_intermediate_dense.assign(bank.up_kernel)
        theirs._expert_feedforward_output_dense.assign(bank.down_kernel)

    def call(self, x, training=None):
        return ops.squeeze(self.block(ops.expand_dims(x, 0), training=training)[0], 0)


class KerasHubQwen3Moe(KerasHubMixtral):
    def adopt(self, mixture):
        from keras_hub.src.models.qwen3_moe.qwen3_moe_decoder import Qwen3SparseMoeBlock

        bank = mixture.experts
        self.block = Qwen3SparseMoeBlock(
            hidden_dim=bank.up_kernel.shape[1],
            moe_intermediate_dim=bank.hidden_dim,
            num_experts=bank.num_experts,
            top_k=mixture.router.top_k,
            norm_top_k_prob=True,
        )
        self.block.build((1, None, bank.up_kernel.shape[1]))
        self.block._sparse_feedforward_gate_dense.kernel.assign(mixture.router.kernel)
        theirs = self.block.expert_bank
        gate_up = ops.concatenate([bank.gate_kernel, bank.up_kernel], axis=-1)
        theirs._expert_feedforward_gate_dense.assign(gate_up)
        theirs._expert_feedforward_output_dense.assign(bank.down_kernel)


class TransformersQwen3Moe(Rival):
    """The block of Hugging Face, whose experts have several implementations."""

    backends = ("torch",)
    implementation = "eager"

    def adopt(self, mixture):
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
                experts_implementation=self.implementation,
            )
        )
        gate_up = ops.concatenate([bank.gate_kernel, bank.up_kernel], axis=-1)
        with torch.no_grad():
            block.gate.weight.copy_(mixture.router.kernel.value.T)
            block.experts.gate_up_proj.copy_(gate_up.transpose(1, 2))
            block.experts.down_proj.copy_(bank.down_kernel.value.transpose(1, 2))
        self.block = keras.layers.TorchModuleWrapper(block)

    def call(self, x, training=None):
        return self.block(x[None], training=training)[0]


class TransformersQwen3MoeGrouped(TransformersQwen3Moe):
    implementation = "grouped_mm"


class TransformersQwen3MoeBatched(TransformersQwen3Moe):
    """Copies the kernels of its expert for every row."""

    implementation = "batched_mm"
    most_bytes = 2e9

    def check(self, num_tokens):
        config = self.block.module.experts.config
        rows = num_tokens * config.num_experts_per_tok
        copied = 4 * rows * 3 * config.hidden_size * config.moe_intermediate_size
        if copied > self.most_bytes:
            raise MemoryError(f"would copy {copied / 1e9:.0f} GB of kernels")


class RaggedDot(Rival):
    """Sorted rows and `jax.lax.ragged_dot`, with our router and our weights."""

    backends = ("jax",)

    def adopt(self, mixture):
        self.mixture = mixture

    def call(self, x, training=None):
        from jax.lax import ragged_dot

        routing = self.mixture.router(x, training=training)
        bank, top_k = self.mixture.experts, self.mixture.router.top_k
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


RIVALS = {
    "KerasHub Mixtral": KerasHubMixtral,
    "KerasHub Qwen3-MoE": KerasHubQwen3Moe,
    "Transformers Qwen3-MoE, eager": TransformersQwen3Moe,
    "Transformers Qwen3-MoE, grouped_mm": TransformersQwen3MoeGrouped,
    "Transformers Qwen3-MoE, batched_mm": TransformersQwen3MoeBatched,
    "jax.lax.ragged_dot": RaggedDot,
}
