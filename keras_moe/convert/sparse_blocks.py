"""The layers that take the place of a MoE block of KerasHub, and the exchange of the two."""

import functools
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_moe import losses
from keras_moe._internal.keras_internals import (
    names_below,
    open_to_state,
    remove_sublayers,
    set_state,
)
from keras_moe._internal.serialization import load_draws, save_draws
from keras_moe.convert.keras_hub_families import Family
from keras_moe.layers import GatedExperts, MixtureOfExperts
from keras_moe.ops import GroupedPlan


class ConvertedBlock:
    """Mixed into the class of a block, which then computes with `_sparse_mixture`.

    The block remains the same object in the same place, now of a subclass of its class, for which
    decoders of KerasHub look. Its router and its experts are replaced by those of our layer under
    their old names, so files of weights are those of KerasHub.
    """

    family: Family
    replaced: type
    num_experts: int
    _sparse_mixture: MixtureOfExperts
    # Of a decoder: functions that make its router and its experts.
    _makers: list


class SparseBlock(ConvertedBlock):
    """A block that consists of router and experts only."""

    def call(self, hidden_states, attention_mask=None, training=None):
        mask = token_mask(attention_mask, hidden_states.shape[:-1])
        outputs, routing = self._sparse_mixture(hidden_states, mask=mask, return_routing=True)
        if not self.family.returns_weights:
            return outputs, routing.logits
        chosen = ops.one_hot(routing.indices, self.num_experts, dtype="float32")
        return outputs, ops.sum(chosen * ops.expand_dims(routing.weights, -1), axis=1)


def token_mask(attention_mask, leading):
    """Which tokens are real, a bool tensor of the shape `leading`, (batch, length), or None.

    An attention mask is (batch, length), or (batch, length, keys) for a causal attention, or None.
    """
    if attention_mask is None:
        return None
    if len(attention_mask.shape) == 3:
        _, length, keys = attention_mask.shape
        if not _fit(length, keys):
            return None  # keys from a cache: tokens are those that are generated
        # A causal attention lets each token see itself, unless it is padding.
        attention_mask = ops.diagonal(attention_mask, axis1=1, axis2=2)
    fits = all(map(_fit, attention_mask.shape, leading))
    return ops.cast(attention_mask, "bool") if fits else None


def _fit(size, other):
    return size is None or other is None or size == other


class RelaidExperts(GatedExperts):
    """Gated experts whose weights are laid out in files as those of another bank."""

    def __init__(self, num_experts, *args, rules, **kwargs):
        super().__init__(num_experts, *args, **kwargs)
        self._rules = rules

    def save_own_variables(self, store):
        for index, rule in enumerate(self._rules):
            store[str(index)] = rule.join([self._floats(name) for name in rule.ours])

    def _floats(self, weight):
        """A weight as an array: files of KerasHub have no place for scales and factors."""
        name, _, part = weight.partition("_")
        if part == "kernel":
            return self.projection(name).merged_kernel()
        return ops.convert_to_numpy(getattr(self, weight))

    def load_own_variables(self, store):
        own: dict = {}
        for index, rule in enumerate(self._rules):
            own.update(zip(rule.ours, rule.split(store[str(index)])))
        values: list = []
        for projection in self.projections:
            values += projection.stored(own[f"{projection.name}_kernel"])
            values += [own[f"{projection.name}_bias"]] if self.use_bias else []
        super().load_own_variables({str(i): value for i, value in enumerate(values)})


class SparseRouter:
    """Mixed into the class of a router that a decoder calls before its experts.

    It returns what its projection, now our router, is to see.
    """

    rms_norm: Any
    per_dim_scale: Any
    _scalar_root_size: float

    def call(self, x):
        normed = self.rms_norm(ops.reshape(x, (-1, x.shape[-1])))
        normed = normed * ops.cast(self._scalar_root_size, normed.dtype)
        return normed * ops.cast(self.per_dim_scale, normed.dtype)


class CalledExperts(RelaidExperts):
    """Experts that a decoder calls, with what the router is to see, and the mixture, with a plan.

    The output of each is multiplied by a learned scale, which is the last of their weights.
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
    """A mixture that saves its layers and the draws of its router, and no counts."""

    has_own_config = False

    def save_own_variables(self, store):
        save_draws(self.router, store)

    def load_own_variables(self, store):
        load_draws(self.router, store)


class ScaledMixture(BareMixture):
    """A mixture of `CalledExperts`, whose scales multiply the weights of a token."""

    def _plan(self, routing, sequence_length, training):
        experts = ops.maximum(routing.indices, 0)
        scale = ops.cast(ops.take(self.experts.output_scale, experts), "float32")
        scaled = routing._replace(weights=routing.weights * scale)
        return super()._plan(scaled, sequence_length, training)


def make_sparse(owner, block, family):
    """Turn a block of a family of KerasHub, a sublayer of `owner`, into a `ConvertedBlock`."""
    layer = block if family.is_decoder else owner
    mixture = _mixture_like(block, family, name=f"{layer.name}_mixture")
    router_owner, router_name = _router_place(block, family)
    router, bank = getattr(router_owner, router_name), getattr(block, family.experts)
    with names_below(block.path):
        mixture.build((None, None, block.hidden_dim))
    _assign(mixture.router, router)
    weights: dict = {}
    bank.save_own_variables(weights)
    mixture.experts.load_own_variables(weights)
    mixture.experts.trainable = bank.trainable
    if not block.trainable:  # the other value would be handed to all sublayers
        mixture.trainable = False
    if family.is_decoder:
        makers = [_maker_of(router), _maker_of(bank)]
        object.__setattr__(block, "_makers", makers)  # There is nothing to track.
        # A function, where Keras would save an attribute that is a layer.
        object.__setattr__(
            mixture.experts, "run_mixture", lambda tokens, seen: mixture(tokens, router_inputs=seen)
        )
        change_class(router_owner, SparseRouter)
    set_state(router_owner, router_name, mixture.router)
    set_state(block, family.experts, mixture.experts)
    if family.shared_gate:
        _assign(mixture.shared_gate, getattr(block, family.shared_gate))
        set_state(block, family.shared_gate, mixture.shared_gate)
    with open_to_state(block):
        # Keras comes to names with an underscore last, and saves a layer of two names by the first.
        block._sparse_mixture = mixture
    change_class(block, ConvertedBlock if family.is_decoder else SparseBlock, family=family)


def make_dense(block):
    """Turn a `ConvertedBlock` back into the block of KerasHub that it was."""
    family, mixture = block.family, block._sparse_mixture
    router_owner, router_name = _router_place(block, family)
    weights: dict = {}
    mixture.experts.save_own_variables(weights)
    shared = getattr(block, family.shared) if family.shared else None
    if family.is_decoder:
        remove_sublayers(block, ["_sparse_mixture"])
        make_router, make_bank = block._makers
        object.__delattr__(block, "_makers")
        change_class_back(router_owner)
        set_state(router_owner, router_name, make_router())
        set_state(block, family.experts, make_bank())
        change_class_back(block)
    else:
        names = [name for name in (family.experts, family.shared, family.shared_gate) if name]
        remove_sublayers(block, [*names, family.router.partition(".")[0], "_sparse_mixture"])
        change_class_back(block)
        with open_to_state(block):
            block.build((None, None, block.hidden_dim))
    _assign(getattr(*_router_place(block, family)), mixture.router)
    bank = getattr(block, family.experts)
    bank.load_own_variables(weights)
    bank.trainable = mixture.experts.trainable
    if family.shared_gate:
        _assign(getattr(block, family.shared_gate), mixture.shared_gate)
    if family.shared:
        _assign(getattr(block, family.shared), shared)


def _mixture_like(block, family, name):
    dtype = block.dtype_policy
    make_experts = CalledExperts if family.is_decoder else RelaidExperts
    make_mixture = ScaledMixture if family.is_decoder else BareMixture
    (down,) = (rule.theirs for rule in family.weights if rule.ours == ("down_kernel",))
    experts = make_experts(
        block.num_experts,
        getattr(getattr(block, family.experts), down).shape[1],
        rules=family.weights,
        kernel_initializer="zeros",
        dtype=dtype,
        name="experts",
        **family.gated,
    )
    balance = [losses.LoadBalance(getattr(block, family.balance))] if family.balance else []
    return make_mixture(
        experts,
        router=family.make_router(block),
        router_losses=balance,
        shared_expert=getattr(block, family.shared) if family.shared else None,
        gated_shared_expert=family.shared_gate is not None,
        dtype=dtype,
        name=name,
    )


def _router_place(block, family):
    """The layer that holds the router, and the name it has there."""
    *owners, name = family.router.split(".")
    return functools.reduce(getattr, owners, block), name


def _assign(layer, other):
    """Give a layer the weights of another that has as many, and its freezing."""
    for weight, value in zip(layer.weights, other.weights):
        weight.assign(value)
    layer.trainable = other.trainable


def _maker_of(layer):
    """A function that makes a built layer like this one, which it does not keep."""
    cls, config, build_config = type(layer), layer.get_config(), layer.get_build_config()
    folder = layer.path.rpartition("/")[0]

    def make():
        with names_below(folder):
            made = cls.from_config(config)
            made.build_from_config(build_config)
        return made

    return make


def change_class(layer, mixed_in, **members):
    """Give a layer a subclass of its class, which it keeps as `replaced`."""
    cls = type(layer)
    members = {**members, "replaced": cls, "__module__": __name__}
    # Under the old name: files of weights use it for layers in a list.
    changed = type(cls.__name__, (mixed_in, cls), members)
    object.__setattr__(layer, "__class__", changed)


def change_class_back(layer):
    object.__setattr__(layer, "__class__", layer.replaced)
