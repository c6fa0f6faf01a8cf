"""Sparse layers that replace MoE blocks of KerasHub."""

import inspect
import operator
from collections.abc import Callable

import keras
from keras import ops

from keras_moe import losses
from keras_moe._internal.keras_internals import names_below
from keras_moe._internal.serialization import load_draws, save_draws
from keras_moe.convert.weights import check_plain, floats_of
from keras_moe.layers import GatedExperts, MixtureOfExperts
from keras_moe.ops import GroupedPlan


class SparseBlock:
    """A block that computes with a mixture; mixed with the class that KerasHub's decoders expect.

    Its router and experts also have KerasHub's names, which files of weights use.
    """

    def __init__(self, block, family, mixture):
        keras.Layer.__init__(self, name=block.name, dtype=block.dtype_policy)
        self._returns_weights = family.returns_weights
        holder, (*holders, router) = self, family.router.split(".")
        for name in holders:
            setattr(holder, name, keras.Layer(name=name))
            holder = getattr(holder, name)
            holder.built = True
        setattr(holder, router, mixture.router)
        setattr(self, family.experts, mixture.experts)
        if family.shared:
            setattr(self, family.shared, mixture.shared_expert)
            setattr(self, family.shared_gate, mixture.shared_gate)
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

    def __init__(self, num_experts, *args, rules, **kwargs):
        super().__init__(num_experts, *args, **kwargs)
        self._rules = rules

    def save_own_variables(self, store):
        for index, rule in enumerate(self._rules):
            # Files of KerasHub have no place for scales and factors.
            store[str(index)] = rule.join([floats_of(self, name) for name in rule.ours])

    def load_own_variables(self, store):
        own: dict = {}
        for index, rule in enumerate(self._rules):
            own.update(zip(rule.ours, rule.split(store[str(index)])))
        values: list = []
        for projection in self.projections:
            values += projection.stored(own[f"{projection.name}_kernel"])
            values += [own[f"{projection.name}_bias"]] if self.use_bias else []
        super().load_own_variables({str(i): value for i, value in enumerate(values)})


class SparseRouter(keras.Layer):
    """A router that a decoder calls before its experts; it returns the inputs of its mixture's."""

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
    """Experts that a decoder calls with inputs of the router, and the mixture with a plan.

    A learned scale, the last weight, multiplies the outputs of each.
    """

    run_mixture: Callable

    def build(self, tokens_shape):
        super().build(tokens_shape)
        self.output_scale = self.add_weight(
            name="output_scale", shape=(self.num_experts,), initializer="ones"
        )

    def __call__(self, tokens, plan=None, **kwargs):
        if plan is None or isinstance(plan, GroupedPlan):
            return super().__call__(tokens, plan, **kwargs)
        return self.run_mixture(tokens, plan)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store[str(len(self._rules))] = ops.convert_to_numpy(self.output_scale)

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self.output_scale.assign(store[str(len(self._rules))])


class BareMixture(MixtureOfExperts):
    """A mixture that saves its layers and the random state of its router, but no counters."""

    has_own_config = False

    def save_own_variables(self, store):
        save_draws(self.router, store)

    def load_own_variables(self, store):
        load_draws(self.router, store)


class ScaledMixture(BareMixture):
    """A mixture whose routing weights include the scales of `CalledExperts`."""

    def _plan(self, routing, sequence_length, training):
        experts = ops.maximum(routing.indices, 0)
        scale = ops.cast(ops.take(self.experts.output_scale, experts), "float32")
        scaled = routing._replace(weights=routing.weights * scale)
        return super()._plan(scaled, sequence_length, training)


def sparse_layers(owner, block, family):
    """From KerasHub layers, a block or its parts, to replacements with a function `make_dense`."""
    layer = block if family.is_decoder else owner
    mixture = _mixture_like(block, family, name=f"{layer.name}_mixture")
    with names_below(block.path):
        mixture.build((None, None, block.hidden_dim))
    if not family.is_decoder:
        cls = type(block)
        # Under the old name: files of weights use it for layers in a list.
        sparse_class = type(cls.__name__, (SparseBlock, cls), {"__module__": __name__})
        sparse = sparse_class(block, family, mixture)
        names = (family.router, family.experts, family.shared, family.shared_gate)
        return {block: _exchanged(block, sparse, block.hidden_dim, filter(None, names))}
    # A function, where Keras would save an attribute that is a layer.
    mixture.experts.run_mixture = lambda tokens, seen: mixture(tokens, router_inputs=seen)
    router, experts = block.moe_router, block.moe_expert_bank
    sparse = SparseRouter(router, mixture)
    return {
        router: _exchanged(router, sparse, block.hidden_dim, ["rms_norm", "proj"]),
        experts: _exchanged(experts, mixture.experts, block.hidden_dim),
    }


def is_sparse(layer):
    return hasattr(layer, "make_dense")


def dense_layers(model):
    """A dict from sparse layers of a model to KerasHub's own, with the same weights."""
    sparse = list(filter(is_sparse, model._flatten_layers()))
    for mixture in (each._sparse_mixture for each in sparse if hasattr(each, "_sparse_mixture")):
        # KerasHub gets the floats of experts, with their LoRA.
        check_plain(mixture, but=mixture.experts)
    return {layer: layer.make_dense() for layer in sparse}


def _exchanged(dense, sparse, features, names=()):
    """The sparse layer, with the weights of a dense one and a function that makes the dense one."""
    names = list(names)
    _give_weights(dense, sparse, names)
    unbuilt, folder = _unbuilt_like(dense), dense.path.rpartition("/")[0]

    def make_dense():
        with names_below(folder):
            unbuilt.build((None, None, features))
        _give_weights(sparse, unbuilt, names)
        return unbuilt

    sparse.make_dense = make_dense
    return sparse


def _give_weights(source, target, names):
    pairs = [(source, target)]
    for get in map(operator.attrgetter, names):
        pairs += zip(get(source)._flatten_layers(), get(target)._flatten_layers())
    for each, other in pairs:
        weights: dict = {}
        each.save_own_variables(weights)
        other.load_own_variables(weights)
        if other.trainable != each.trainable:  # It is handed to all sublayers.
            other.trainable = each.trainable


# Arguments of blocks that are attributes of another name.
_ATTRIBUTES = {
    "moe_intermediate_dim": "intermediate_dim",
    "shared_expert_intermediate_dim": "intermediate_dim_shared",
}


def _unbuilt_like(layer):
    """A KerasHub layer from the same constructor arguments; its config lacks some."""
    cls, names = type(layer), inspect.getfullargspec(type(layer).__init__).args[1:]
    attributes = {name: name if hasattr(layer, name) else _ATTRIBUTES[name] for name in names}
    arguments = {name: getattr(layer, attribute) for name, attribute in attributes.items()}
    return cls(**arguments, name=layer.name, dtype=layer.dtype_policy)


def _mixture_like(block, family, name):
    arguments = {"dtype": block.dtype_policy, "rules": family.weights, **family.gated}
    (down,) = (rule.theirs for rule in family.weights if rule.ours == ("down_kernel",))
    width = getattr(getattr(block, family.experts), down).shape[1]
    experts = (CalledExperts if family.is_decoder else RelaidExperts)(
        block.num_experts, width, kernel_initializer="zeros", name="experts", **arguments
    )
    return (ScaledMixture if family.is_decoder else BareMixture)(
        experts,
        family.make_router(block),
        [losses.LoadBalance(getattr(block, family.balance))] if family.balance else [],
        shared_expert=getattr(block, family.shared) if family.shared else None,
        gated_shared_expert=family.shared_gate is not None,
        dtype=block.dtype_policy,
        name=name,
    )
