"""Conversion of KerasHub models to sparse experts, and back: its MoE blocks and ours."""

import gc
import inspect
import operator
from typing import Any

import keras
from keras import ops

from keras_moe import losses, routers
from keras_moe._internal.keras_internals import (
    forget_old_weights,
    names_below,
    own_layers,
    unlocked,
)
from keras_moe._internal.serialization import PACKAGE, Configured, load_draws, register, save_draws
from keras_moe.convert.families import FAMILIES, Config
from keras_moe.convert.weights import check_plain, floats_of
from keras_moe.layers import GatedExperts, MixtureOfExperts
from keras_moe.layers.replacement import backbones, record_converters, replace
from keras_moe.ops import GroupedPlan

# Families by the class of their block.
BLOCKS = {family.block.cls: family for family in FAMILIES.values() if family.block}


@keras.saving.register_keras_serializable(PACKAGE, "sparsify")
def use_sparse_experts(model: keras.Model) -> keras.Model:
    """Make the MoE blocks of a KerasHub model compute only the chosen experts.

    Returns the same model, with the same outputs and weight files; its optimizer is reset.
    Each block has a `layers.MixtureOfExperts`, on which all tools of this package work. A saved
    model is sparse when it is loaded, in a process that has imported `keras_moe`.

    Args:
        model: Keras model. The outermost that contains a `CausalLM` or `Backbone` of KerasHub. It
            must have a MoE block known here, none quantized or with LoRA, else a ValueError is
            raised.

    Example:

    >>> model = keras_hub.models.MixtralCausalLM.from_preset(preset)  # doctest: +SKIP
    >>> keras_moe.convert.use_sparse_experts(model).generate("Keras is")  # doctest: +SKIP
    """
    dense = [
        (owner, block)
        for owner in model._flatten_layers()
        for block in own_layers(owner)
        if family_of(block) and not any(map(is_sparse, own_layers(block)))
    ]
    if not dense and not any(map(is_sparse, model._flatten_layers())):
        rule = f"`model` must have a MoE block of KerasHub: {', '.join(BLOCKS)}"
        raise ValueError(f"{rule}. Received: model={model!r}")
    for _, block in dense:
        check_plain(block)
    while dense:
        owner, block = dense.pop()
        model, _ = replace(model, sparse_layers(owner, block, family_of(block)))
        forget_old_weights(model)
        # A device may not hold the experts of all blocks twice.
        del block
        gc.collect()
    for backbone in backbones(model):
        record_converters(backbone, [use_sparse_experts])
    return model


def restore(model: keras.Model) -> keras.Model:
    """Undo `use_sparse_experts`, and return the same model with the blocks of KerasHub.

    A ValueError is raised if no block was converted, or a router is quantized or has LoRA.

    Example:

    >>> keras_moe.convert.restore(model).save_to_preset("preset")  # doctest: +SKIP
    """
    sparse = list(filter(is_sparse, model._flatten_layers()))
    if not sparse:
        rule = "`model` must be one that `use_sparse_experts` converted"
        raise ValueError(f"{rule}. Received: {model!r}")
    for layer in sparse:
        # KerasHub gets the floats of experts, with their LoRA.
        check_plain(layer._sparse_mixture, but=layer._sparse_mixture.experts)
    replacements = {old: new for layer in sparse for old, new in layer.make_dense().items()}
    model, _ = replace(model, replacements)
    forget_old_weights(model)
    for backbone in backbones(model):
        record_converters(backbone, [])
    return model


def layout_map(mesh: keras.distribution.DeviceMesh) -> keras.distribution.LayoutMap:
    """Layouts of KerasHub's MoE models for `distribution.expert_parallel`, on JAX.

    Heads of attention are split over the axis "model" of the mesh, experts over "expert". Set the
    distribution, make or load the model, then convert.

    Args:
        mesh: `keras.distribution.DeviceMesh` with axes "data", "expert" and "model", whose size
            divides the number of query heads.

    Example:

    >>> layouts = keras_moe.convert.layout_map(mesh)  # doctest: +SKIP
    >>> distribution = keras_moe.distribution.expert_parallel(layout_map=layouts)  # doctest: +SKIP
    """
    # By paths of KerasHub's weights: heads of attention, and experts before `use_sparse_experts`.
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[r".*attention/query/kernel"] = (None, "model", None)
    layouts[r".*attention/query/bias"] = ("model", None)
    layouts[r".*attention/attention_output/kernel"] = ("model", None, None)
    layouts[r".*experts/expert_feedforward_\w+_dense"] = ("expert", None, None)
    return layouts


@register
class SparseBackbone(Configured):
    """Reads backbones that version 0.2 converted and saved."""

    @classmethod
    def from_config(cls, config):
        import keras_hub  # noqa: F401 registers its classes

        config = dict(config)
        original = keras.saving.get_registered_object(config.pop("sparsified"))
        return use_sparse_experts(original.from_config(config))


class BareRouter(routers.TopKRouter):
    """A router that saves weights and no random state, as the `Dense` layer that it replaces."""

    def save_own_variables(self, store):
        keras.Layer.save_own_variables(self, store)


def family_of(layer):
    cls = type(layer)
    own = isinstance(layer, keras.Layer) and cls.__module__.startswith("keras_hub.")
    # Of Gemma 4 there are dense models as well.
    has_experts = getattr(layer, "enable_moe_block", True)
    return BLOCKS.get(cls.__name__) if own and has_experts else None


class SparseBlock:
    """A block that computes with a mixture; mixed with the class that KerasHub's decoders expect.

    Its router and experts also have KerasHub's names, which files of weights use.
    """

    def __init__(self, block, names, mixture):
        keras.Layer.__init__(self, name=block.name, dtype=block.dtype_policy)
        self._returns_weights = names.returns_weights
        holder, (*holders, router) = self, names.router.split(".")
        for name in holders:
            setattr(holder, name, keras.Layer(name=name))
            holder = getattr(holder, name)
            holder.built = True
        setattr(holder, router, mixture.router)
        setattr(self, names.experts, mixture.experts)
        if names.shared:
            setattr(self, names.shared, mixture.shared_expert)
            setattr(self, names.shared_gate, mixture.shared_gate)
        # Keras saves a layer under its first name, and names with an underscore come last.
        self._sparse_mixture = mixture
        self.built = True

    def call(self, hidden_states, attention_mask=None, training=None):
        mask = token_mask(attention_mask, hidden_states.shape[:-1])
        outputs, routing = self._sparse_mixture(hidden_states, mask=mask, return_routing=True)
        if not self._returns_weights:
            return outputs, routing.logits
        num_experts = self._sparse_mixture.experts.num_experts
        chosen = ops.one_hot(routing.indices, num_experts, dtype="float32")
        return outputs, ops.sum(chosen * ops.expand_dims(routing.weights, -1), axis=1)


def token_mask(attention_mask, leading):
    """Which tokens (batch, length) are real, or None, by the attention mask of a block."""
    if attention_mask is None:
        return None
    if len(attention_mask.shape) == 3:  # of a causal attention
        _, length, keys = attention_mask.shape
        if None not in (length, keys) and length != keys:
            return None  # keys from a cache: tokens are those that are generated
        # Each token sees itself, unless it is padding.
        attention_mask = ops.diagonal(attention_mask, axis1=1, axis2=2)
    fits = all(None in pair or len({*pair}) == 1 for pair in zip(attention_mask.shape, leading))
    return ops.cast(attention_mask, "bool") if fits else None


class RelaidExperts(GatedExperts):
    """Gated experts whose files have the layout of another bank."""

    fixed_arguments = ("rules", "run_mixture")  # These are not in saved configs.

    def __init__(self, num_experts, *args, rules, **kwargs):
        super().__init__(num_experts, *args, **kwargs)
        self.rules = rules

    def get_config(self):
        return {**super().get_config(), "rules": self.rules}

    def save_own_variables(self, store):
        for index, rule in enumerate(self.rules):
            # Files of KerasHub have no place for scales and factors.
            store[str(index)] = rule.join([floats_of(self, name) for name in rule.ours])

    def load_own_variables(self, store):
        own: dict = {}
        for index, rule in enumerate(self.rules):
            own.update(zip(rule.ours, rule.split(store[str(index)])))
        values: list = []
        for projection in self.projections:
            values += projection.stored(own[f"{projection.name}_kernel"])
            values += [own[f"{projection.name}_bias"]] if self.use_bias else []
        super().load_own_variables({str(i): value for i, value in enumerate(values)})
        if "output_scale" in own:
            self.output_scale.assign(own["output_scale"])


class SparseRouter(keras.Layer):
    """The router that a decoder calls; it returns the inputs of the router of the mixture."""

    def __init__(self, router, mixture):
        super().__init__(name=router.name, dtype=router.dtype_policy)
        self.rms_norm = router.rms_norm
        self.proj = mixture.router
        self.per_dim_scale = router.per_dim_scale
        self._sparse_mixture = mixture
        self.built = True

    def call(self, x):
        normed = self.rms_norm(ops.reshape(x, (-1, x.shape[-1])))
        normed = normed * ops.cast(x.shape[-1] ** -0.5, normed.dtype)
        return normed * ops.cast(self.per_dim_scale, normed.dtype)


class CalledExperts(RelaidExperts):
    """Experts with a learned scale of the outputs of each.

    A decoder calls them with inputs of the router, and the mixture with a plan.
    """

    def __init__(self, *args, run_mixture=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.run_mixture = run_mixture

    def get_config(self):
        return {**super().get_config(), "run_mixture": self.run_mixture}

    def build(self, tokens_shape):
        super().build(tokens_shape)
        self.output_scale = self.add_weight((self.num_experts,), "ones", name="output_scale")

    def call(self, tokens, plan, training=None):
        scale = ops.take(self.output_scale, ops.maximum(plan.experts, 0))
        weights = plan.weights * ops.cast(scale, "float32")
        return super().call(tokens, plan._replace(weights=weights), training)

    def __call__(self, tokens, plan=None, **kwargs):
        if plan is None or isinstance(plan, GroupedPlan):
            return super().__call__(tokens, plan, **kwargs)
        return self.run_mixture(tokens, plan)


class BareMixture(MixtureOfExperts):
    """A mixture that saves its layers and the random state of its router, but no counters."""

    has_own_config = False

    def save_own_variables(self, store):
        save_draws(self.router, store)

    def load_own_variables(self, store):
        load_draws(self.router, store)


def sparse_layers(owner, block, family):
    """A dict from KerasHub layers, a block or its parts, to the layers that replace them."""
    theirs, features = family.block, block.hidden_dim
    holder = block if theirs.is_decoder else owner
    mixture = _mixture_like(block, family, name=f"{holder.name}_mixture")
    with names_below(block.path):
        mixture.build((None, None, features))
    if not theirs.is_decoder:
        cls = type(block)
        # Under the old name: files of weights use it for layers in a list.
        sparse_class = type(cls.__name__, (SparseBlock, cls), {"__module__": __name__})
        sparse = sparse_class(block, theirs, mixture)
        names = [theirs.router, theirs.experts]
        names += [theirs.shared, theirs.shared_gate] if theirs.shared else []
        dense_like = _exchange(block, sparse, features, names)
        sparse.make_dense = lambda: {sparse: dense_like(sparse, mixture)}
        return {block: sparse}
    # A function, as Keras would save an attribute that is a layer.
    with unlocked(mixture.experts):
        mixture.experts.run_mixture = lambda tokens, seen: mixture(tokens, router_inputs=seen)
    router, experts = block.moe_router, block.moe_expert_bank
    sparse = SparseRouter(router, mixture)
    router_like = _exchange(router, sparse, features, ["rms_norm", "proj"])
    experts_like = _exchange(experts, mixture.experts, features)
    sparse.make_dense = lambda: {
        sparse: router_like(sparse, mixture),
        mixture.experts: experts_like(mixture.experts, mixture),
    }
    return {router: sparse, experts: mixture.experts}


def is_sparse(layer):
    return hasattr(layer, "make_dense")


# Arguments of blocks that are attributes of another name.
_ATTRIBUTES = {
    "moe_intermediate_dim": "intermediate_dim",
    "shared_expert_intermediate_dim": "intermediate_dim_shared",
}


def _exchange(dense, sparse, features, names=()):
    """Give a sparse layer the weights of a dense one; return a function that makes that again."""
    _give_weights(dense, sparse, names)
    cls, folder = type(dense), dense.path.rpartition("/")[0]
    arguments = {"name": dense.name, "dtype": dense.dtype_policy}
    for name in inspect.getfullargspec(cls.__init__).args[1:]:  # Configs lack some.
        arguments[name] = getattr(dense, name if hasattr(dense, name) else _ATTRIBUTES[name])

    def dense_like(sparse, mixture):
        num_experts, top_k = mixture.experts.num_experts, mixture.router.top_k
        numbers = dict(num_experts=num_experts, top_k=top_k, num_experts_per_token=top_k)
        made = cls(**{name: numbers.get(name, value) for name, value in arguments.items()})
        with names_below(folder):
            made.build((None, None, features))
        _give_weights(sparse, made, names)
        return made

    return dense_like


def _give_weights(source, target, names):
    pairs = [(source, target)]
    for get in map(operator.attrgetter, names):
        pairs += zip(get(source)._flatten_layers(), get(target)._flatten_layers())
    for each, other in pairs:
        weights: dict = {}
        each.save_own_variables(weights)
        other.load_own_variables(weights)
        if other.trainable != each.trainable:  # Setting it sets all sublayers.
            other.trainable = each.trainable


def _mixture_like(block, family, name):
    theirs, dtype = family.block, block.dtype_policy
    config = Config(
        norm_topk_prob=getattr(block, "norm_top_k_prob", None),
        router_jitter_noise=getattr(block, "router_jitter_noise", 0.0),
    )
    (down,) = (rule.theirs for rule in theirs.weights if rule.ours == ("down_kernel",))
    width = getattr(getattr(block, theirs.experts), down).shape[1]
    top_k = block.num_experts_per_token if theirs.is_decoder else block.top_k
    # All weights are assigned later; drawing them would take long.
    zeros: Any = {"kernel_initializer": "zeros"}
    bank = CalledExperts if theirs.is_decoder else RelaidExperts
    named = {"rules": theirs.weights, "name": "experts", "dtype": dtype}
    coefficients = ("router_aux_loss_coef", "router_aux_loss_coefficient")
    return BareMixture(
        bank(block.num_experts, width, **named, **zeros, **family.experts(config)),
        BareRouter(block.num_experts, top_k, name="router", **zeros, **family.router(config)),
        [losses.LoadBalance(getattr(block, each)) for each in coefficients if hasattr(block, each)],
        shared_expert=getattr(block, theirs.shared) if theirs.shared else None,
        gated_shared_expert=theirs.shared_gate is not None,
        dtype=dtype,
        name=name,
    )
