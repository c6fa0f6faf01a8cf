"""What every exported class must do, and one case of each class to do it with.

A class that is added to the package needs one entry in `CASES`; it then passes every check of
`test_conformance.py`, or fails by name.
"""

import inspect
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import backends
import keras
import numpy as np

from keras_moe import callbacks, layers, losses, metrics, routers

D, E = 8, 4
LENGTH = 6
POLICIES = ("float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")
MODULES = (layers, routers, losses, metrics, callbacks)
ABSTRACT = (
    layers.ExpertBank,
    layers.StackedExperts,
    routers.Router,
    routers.LogitRouter,
    routers.SelectionBalancer,
    losses.RouterLoss,
)


class Case(NamedTuple):
    """One exported class.

    - `required()`: the arguments without which it cannot be made.
    - `options()`: another value than the default for every other argument.
    - `layer(instance)`: a layer from (batch, length, D) to the same shape that holds the instance,
      or None where a model cannot hold it.
    """

    required: Callable[[], dict] = dict
    options: Callable[[], dict] = dict
    layer: Callable[[Any], Any] | None = None


def moe(experts=None, **kwargs):
    """A small `MixtureOfExperts`."""
    return layers.MixtureOfExperts(experts or layers.FeedForwardExperts(E, 16), **kwargs)


def model_of(*parts, shape=(D,), optimizer="sgd", **options):
    """A sequential model that learns by a mean squared error."""
    model = keras.Sequential([keras.Input(shape), *parts])
    model.compile(optimizer, "mse", **{"jit_compile": backends.QUICK_JIT, **options})
    return model


def one_hot_router(top_k=1, **kwargs):
    """A router that sends a token to the expert of its largest feature: counts are known."""
    return routers.TopKRouter(E, top_k, kernel_initializer=wide_identity, **kwargs)


@keras.saving.register_keras_serializable("tests")
def wide_identity(shape, dtype=None):
    return 10 * keras.ops.eye(*shape, dtype=dtype)


@keras.saving.register_keras_serializable("tests")
class Holding(keras.layers.Layer):
    """A layer around another one, of the same shape."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        if isinstance(layer, dict):
            layer = keras.saving.deserialize_keras_object(layer)
        self.layer = layer
        self.supports_masking = True

    def build(self, inputs_shape):
        if not self.layer.built:
            self.layer.build(inputs_shape)

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def get_config(self):
        layer = keras.saving.serialize_keras_object(self.layer)
        return {**super().get_config(), "layer": layer}


@keras.saving.register_keras_serializable("tests")
class SumOfTasks(Holding):
    """The sum of what a layer of several tasks returns."""

    def call(self, inputs, mask=None, training=None):
        return sum(self.layer(inputs, mask=mask, training=training))


@keras.saving.register_keras_serializable("tests")
class RoutedByFirstFeature(Holding):
    """A MoE layer whose router sees the whole part of the first feature as the id of a token."""

    def call(self, inputs, mask=None, training=None):
        ids = keras.ops.cast(keras.ops.nan_to_num(inputs[..., 0]), "int32")
        return self.layer(inputs, mask=mask, training=training, token_ids=ids)


def _bank_options(without=None):
    options = dict(
        activation="tanh",
        kernel_initializer="he_normal",
        bias_initializer="ones",
        kernel_regularizer="l2",
        bias_regularizer="l1",
    )
    return {name: value for name, value in options.items() if name != without}


def _router_loss(router="top_k", **options):
    return Case(
        options=lambda: {"weight": 0.5, **options},
        layer=lambda loss: moe(router=router, router_losses=[loss, "router_z"]),
    )


def _logit_router(required=lambda: {"num_experts": E}, **options):
    return Case(
        required,
        lambda: dict(
            input_jitter=0.1,
            logit_noise=0.2,
            kernel_initializer="he_normal",
            kernel_regularizer="l2",
            seed=7,
            hidden_dim=5,
            temperature=2.0,
            **options,
        ),
        lambda router: moe(router=router, router_losses=()),
    )


def _selection_router(required=lambda: {"num_experts": E}, **options):
    options = (
        dict(
            top_k=1,
            score="sigmoid",
            renormalize=True,
            scaling_factor=2.5,
            balancer=routers.LossFreeBias(0.1),
            use_bias=True,
            updates_selection_bias=False,
        )
        | options
    )
    return _logit_router(required, **options)


def _balancer(**options):
    return Case(
        options=lambda: {"accumulation_steps": 2, **options},
        layer=lambda balancer: moe(router=routers.TopKRouter(E, balancer=balancer)),
    )


CASES = {
    layers.FeedForwardExperts: Case(
        lambda: dict(num_experts=E, hidden_dim=16),
        lambda: dict(_bank_options(), use_bias=False, output_dim=D, dropout=0.25),
        moe,
    ),
    layers.GatedExperts: Case(
        lambda: dict(num_experts=E, hidden_dim=16),
        lambda: dict(
            _bank_options(), use_bias=True, clip=0.5, up_shift=1.0, output_dim=D, dropout=0.25
        ),
        moe,
    ),
    layers.GatedFeedForward: Case(
        lambda: dict(hidden_dim=16),
        lambda: dict(activation="tanh", use_bias=True),
        lambda layer: moe(shared_expert=layer),
    ),
    layers.LayerExperts: Case(
        lambda: dict(layers=[keras.layers.Dense(D), keras.layers.Dense(D, "tanh")]),
        layer=lambda bank: moe(bank, router_losses=()),
    ),
    layers.LinearExperts: Case(
        lambda: dict(num_experts=E, output_dim=D),
        lambda: {**_bank_options(without="activation"), "use_bias": False},
        moe,
    ),
    layers.LowRankExperts: Case(
        # With B of zeros the first step leaves A as it is.
        lambda: dict(
            base=layers.GatedExperts(1, 16), num_experts=E, rank=2, b_initializer="he_normal"
        ),
        lambda: dict(alpha=3.0, a_initializer="he_normal"),
        moe,
    ),
    layers.MultiGateMixtureOfExperts: Case(
        lambda: dict(experts=layers.FeedForwardExperts(E, 16), num_tasks=2),
        lambda: dict(
            router=routers.TopKRouter(top_k=1, balancer="loss_free", logit_noise=0.5, seed=7),
            task_experts=[layers.LinearExperts(2, D), layers.LinearExperts(1, D)],
            router_losses=["router_z"],
            shared_output=True,
            task_names=["like", "rating"],
        ),
        SumOfTasks,
    ),
    layers.MixtureOfExperts: Case(
        lambda: dict(experts=layers.FeedForwardExperts(E, 16)),
        lambda: dict(
            router=routers.TopKRouter(E, top_k=3, balancer="loss_free", logit_noise=0.5, seed=7),
            router_losses=[losses.LoadBalance(0.5)],
            shared_expert=keras.layers.Dense(D),
            gated_shared_expert=True,
            capacity_factor=1.5,
            token_axes=2,
            top_k=3,
        ),
        lambda layer: layer,
    ),
    layers.TransformerDecoderBlock: Case(
        lambda: dict(num_heads=2, feedforward=moe()),
        lambda: dict(dropout=0.25, cross_attention=True, rotary=False),
        lambda block: (lambda x: block(x, context=x)) if block.cross_attention else block,
    ),
    layers.TransformerEncoderBlock: Case(
        lambda: dict(num_heads=2, feedforward=moe()),
        lambda: dict(dropout=0.25),
        lambda layer: layer,
    ),
    layers.ZeroComputationExperts: Case(
        lambda: dict(experts=layers.FeedForwardExperts(E, 16), num_identity=1),
        lambda: dict(num_zero=1, num_constant=2),
        moe,
    ),
    layers.Capacity: Case(
        lambda: dict(factor=1.5),
        lambda: dict(
            minimum=2, multiple_of=2, evaluation_factor=2.0, priority="random", per_sequence=True
        ),
        lambda capacity: moe(capacity_factor=capacity),
    ),
    routers.TopKRouter: _selection_router(),
    routers.CosineRouter: _selection_router(projection_dim=3),
    routers.GroupLimitedRouter: _selection_router(
        required=lambda: dict(num_experts=E, num_groups=2, top_groups=1), score="softmax"
    ),
    routers.BalancedAssignmentRouter: _logit_router(),
    routers.DenseRouter: _logit_router(),
    routers.DSelectKRouter: Case(
        lambda: dict(num_experts=E),
        lambda: dict(top_k=3, per_example=False, gamma=0.5, seed=7),
        lambda router: moe(router=router),
    ),
    routers.ExpertChoiceRouter: _logit_router(capacity_factor=1.5),
    routers.GShardRouter: _logit_router(threshold=0.3),
    routers.NoisyTopKRouter: _logit_router(top_k=3),
    routers.ReLURouter: _logit_router(
        top_k=1, max_top_k=3, growth=1.5, initial_strength=1e-3, accumulation_steps=2
    ),
    routers.SinkhornRouter: _logit_router(top_k=2, iterations=3),
    routers.SoftRouter: _logit_router(slots=2),
    routers.TopPRouter: _logit_router(threshold=0.7, max_top_k=2),
    routers.VMoERouter: _logit_router(top_k=3, noise_std=0.5),
    routers.HashRouter: Case(
        lambda: dict(num_experts=E, vocabulary_size=10),
        lambda: dict(top_k=3, seed=7),
        lambda router: RoutedByFirstFeature(moe(router=router)),
    ),
    routers.LossFreeBias: _balancer(rate=0.1),
    routers.QuantileBias: _balancer(momentum=0.5),
    losses.LoadBalance: _router_loss(scope="global", accumulation_steps=3),
    losses.ImportanceVariation: _router_loss(),
    losses.LoadVariation: _router_loss("noisy_top_k"),
    losses.RouterEntropy: _router_loss(),
    losses.RouterZ: _router_loss(),
    losses.SelectorEntropy: _router_loss(),
    losses.MixtureNegativeLogLikelihood: Case(
        options=lambda: dict(
            distribution="categorical",
            scale=0.5,
            normalized=False,
            name="mine",
        )
    ),
    callbacks.ExpertHealth: Case(options=lambda: {"every": 5, "patience": 2, "stop": True}),
    callbacks.RouterLossSchedule: Case(
        lambda: {"schedule": lambda epoch: 1e-3}, lambda: {"loss": "router_z"}
    ),
    callbacks.ExpertMonitor: Case(
        options=lambda: {
            "metrics": [np.sum],
            "per_layer": True,
        }
    ),
}


OF_LAYERS = [
    cls
    for cls in CASES
    if issubclass(cls, keras.Layer) and cls.__module__.startswith(layers.__name__)
]


def exported_classes():
    """The public classes of the public modules."""
    for module in MODULES:
        for name, member in vars(module).items():
            own = inspect.isclass(member) and member.__module__.startswith(module.__name__)
            if own and not name.startswith("_"):
                yield member


def with_config():
    return [cls for cls in CASES if hasattr(cls, "get_config")]


def held_by_models():
    return [cls for cls, case in CASES.items() if case.layer is not None]


def plain(cls, **kwargs):
    """An instance with defaults."""
    return cls(**CASES[cls].required(), **kwargs)


def configured(cls, **kwargs):
    """An instance all of whose options differ from their defaults."""
    return cls(**CASES[cls].required(), **CASES[cls].options(), **kwargs)


def constructor_arguments(cls):
    """Own arguments of a class, and the optional ones it hands to its bases in the package."""
    own = _parameters(cls)
    for base in cls.__mro__[1:]:
        if base.__module__.startswith("keras_moe") and "__init__" in vars(base):
            optional = _parameters(base).items()
            own.update({name: p for name, p in optional if p.default is not p.empty})
    for name in getattr(cls, "fixed_arguments", ()):
        own.pop(name, None)
    return {name: p for name, p in own.items() if name in _parameters(cls) or _takes(cls, name)}


def _takes(cls, name):
    """Whether a class does not set an argument of its bases itself."""
    try:
        plain(cls, **{name: None})
    except TypeError as error:
        return "multiple values" not in str(error)
    except ValueError:
        pass
    return True


# Of Keras itself, which tests them.
OF_KERAS = ("trainable", "dtype", "name")


def _parameters(cls):
    parameters = inspect.signature(cls.__init__).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name != "self"
        and parameter.kind in named
        and not (name in OF_KERAS and parameter.kind is parameter.KEYWORD_ONLY)
    }


def through_json(config):
    return json.loads(json.dumps(config))


def holding_model(cls, instance):
    """A functional model over sequences of any length that holds `instance`."""
    inputs = keras.Input((None, D))
    return keras.Model(inputs, CASES[cls].layer(instance)(inputs))


def every_output(layer, inputs):
    """All outputs of a layer by name."""
    if isinstance(layer, SumOfTasks):
        return dict(zip(layer.layer.task_names + ["shared"], layer.layer(inputs)))
    if not isinstance(layer, layers.MixtureOfExperts):
        return {"outputs": layer(inputs)}
    if isinstance(layer.router, routers.SoftRouter):  # Its experts mix tokens.
        outputs, routing = layer(inputs, return_routing=True)
        return {"outputs": outputs, "logits": routing.logits}
    returned = layer(inputs, return_routing=True, return_expert_outputs=True)
    outputs, routing, single = returned
    fields = {name: getattr(routing, name) for name in ("indices", "weights", "probs", "logits")}
    return {"outputs": outputs, "single": single, **fields}


def learning_model(cls, instance):
    """A model of ids, zero for padding, that ends in every output that has a row for each."""
    ids = keras.Input((LENGTH,), dtype="int32")
    hidden = keras.layers.Embedding(20, D, mask_zero=True)(ids)
    outputs = every_output(CASES[cls].layer(instance), hidden)
    return keras.Model(ids, {k: v for k, v in outputs.items() if len(v.shape) > 2})


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def one_hot(*experts):
    """Tokens for `one_hot_router`, (T, E)."""
    return np.eye(E, dtype="float32")[list(experts)]


def array(tensor):
    """NumPy values of a tensor or variable; bfloat16 comes as float32."""
    tensor = keras.ops.convert_to_tensor(tensor)
    if keras.backend.standardize_dtype(tensor.dtype) == "bfloat16":
        tensor = keras.ops.cast(tensor, "float32")
    return keras.ops.convert_to_numpy(tensor)


def gradients(layer, inputs, mode=backends.FAST_MODE, **kwargs):
    """Gradients of a weighted sum of a layer's outputs and of its losses: inputs, then weights.

    None where a gradient does not exist.
    """
    state = [variable.value for variable in layer.non_trainable_variables]

    def objective(inputs, *weights):
        weights = [keras.ops.cast(w, v.dtype) for w, v in zip(weights, layer.trainable_variables)]
        outputs, _, losses = layer.stateless_call(
            weights, state, inputs, **kwargs, return_losses=True
        )
        outputs = keras.ops.cast(outputs, "float32")
        ramp = keras.ops.linspace(0.5, 1.5, int(np.prod(outputs.shape)))
        ramp = keras.ops.reshape(ramp, outputs.shape)
        return keras.ops.sum(outputs * ramp) + sum(losses, 0.0)

    weights = layer.trainable_variables
    values = [inputs, *(array(weight) for weight in weights)]
    values = backends.gradients(objective, values, mode)
    return dict(zip(["inputs", *(weight.path for weight in weights)], values))
