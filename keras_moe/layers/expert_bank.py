"""The interface every bank of experts has."""

import keras
from keras import ops

from keras_moe._internal.misplaced_arguments import ON_BANK, check_place
from keras_moe._internal.named_arguments import Saved
from keras_moe._internal.serialization import resolve
from keras_moe._internal.shape_checks import check_bank_call, check_served
from keras_moe._internal.validation import (
    check_choice,
    check_computes_in_floats,
    check_flag,
    check_instance,
    check_method,
    check_positive_integer,
    overrides,
    shortened,
)
from keras_moe.backend import backend
from keras_moe.layers.sublayers import width_of
from keras_moe.ops.platforms import PLATFORMS


class ExpertBank(Saved, keras.layers.Layer):
    """Abstract: E experts that serve the rows a plan gives them.

    A subclass implements `call(tokens, plan)`: tokens (T, D) in, each token's weighted and summed
    expert outputs (T, D') out, with a row of zeros where no expert serves the token.

    Args:
        num_experts: number of experts, E.
    """

    _refused_arguments = tuple(ON_BANK)

    _attribute_checks = {"num_experts": check_positive_integer}
    _fixed_attributes: tuple[str, ...] = ("num_experts",)

    def __init__(self, num_experts, **kwargs):
        check_place(self, ON_BANK, kwargs)
        # Keras would cast the float32 combine weights inside the plan to the compute dtype. Banks
        # cast what they want cast.
        super().__init__(autocast=False, **kwargs)
        self.has_own_policy = kwargs.get("dtype") is not None
        check_computes_in_floats(self)
        backend.separate_losses(self)
        self.num_experts = num_experts
        check_method(self, "call", "tokens", "plan")

    def __call__(self, tokens, plan=None, **kwargs):
        check_bank_call(self, tokens, plan)
        outputs = super().__call__(tokens, plan, **kwargs)
        width, features = None, tokens.shape[-1]
        # The number of tokens may be a symbol, and where PyTorch traces all sizes are tensors.
        if isinstance(features, int) and overrides(self, "compute_output_shape", keras.Layer):
            width = width_of(self, (None, features))
        check_served(self, tokens, outputs, width)
        return outputs

    def call(self, tokens, plan):
        raise NotImplementedError(f"{type(self).__name__} must implement `call(tokens, plan)`.")

    def compute_output_spec(self, tokens, plan):
        return keras.KerasTensor(self.compute_output_shape(tokens.shape), self.compute_dtype)

    def rematerialized_call(self, call, *args, **kwargs):
        """The call itself: the layer around the bank computes it again with itself."""
        return call

    def engine_on(self, platform, static_shapes):
        """What computes a built bank, a string for people to read; empty where it is not known.

        Args:
            platform: "cpu", "gpu" or "tpu".
            static_shapes: whether all shapes are fixed at compile time, as under XLA.
        """
        return ""

    def take_policy(self, policy):
        """Take the `dtype` that the layer around the bank was made with, if it is for the bank."""

    @property
    def num_limited(self):
        """How many experts, of the first ones, a capacity limits."""
        return self.num_experts

    def _compute(self, tensor):
        return ops.cast(tensor, self.compute_dtype)


def get(identifier):
    """A bank of experts from an instance or a config.

    Raises:
        TypeError: If `identifier` is nothing that one may take for a bank.
        ValueError: If it is, but no instance of one: a class, or a list of layers.
    """
    if not isinstance(identifier, (ExpertBank, dict, list, tuple, type)):
        received = "none" if identifier is None else f"experts={shortened(identifier)}"
        raise TypeError(
            f"`experts` must be a bank of experts. Received: {received}. Pass, for example, "
            "`layers.FeedForwardExperts(num_experts=8, hidden_dim=256)`, or Keras layers in "
            "`layers.LayerExperts([...])`."
        )
    return resolve("experts", identifier, ExpertBank)


def in_floats(policy):
    """The policy that a quantized one was made from; any other itself."""
    if policy.quantization_mode is None:
        return policy
    return keras.dtype_policies.get(policy.name.rpartition("_from_")[2])


def check_shared(bank, inputs_shape):
    """A bank of which another layer may have made the weights, of another width."""
    if not bank.weights:
        return
    width = ((bank.get_build_config() or {}).get("input_shape") or (None,))[-1]
    if width not in (None, inputs_shape[-1]):
        raise ValueError(
            "Layers that share a bank of experts must have inputs of one width. Received: "
            f"inputs.shape={tuple(inputs_shape)} for `{bank.name}`, which was built "
            f"for {width} features. Make a new bank for each layer."
        )


def check_engine_question(bank, platform, static_shapes):
    """The arguments of `ExpertBank.engine_on`."""
    check_choice("platform", platform, PLATFORMS)
    check_flag("static_shapes", static_shapes)
    check_is_built(bank)


def check_is_built(bank):
    """A bank that is asked about its weights."""
    if not bank.built:
        raise ValueError(
            "A bank must be built before it is asked about its weights or what computes them. "
            f"Received: `{bank.name}`, which is not. Call it, or `build`, first."
        )


def check_is_layer_of_tokens(name, value):
    """What serves tokens by itself: a Keras layer that is no bank of experts."""
    check_instance(keras.Layer)(name, value)
    check_takes_tokens(name, value)
    return value


def check_takes_tokens(name, layer):
    """Refuse a bank of experts where a layer is wanted that is called with tokens alone."""
    if isinstance(layer, ExpertBank):
        raise ValueError(
            f"`{name}` must be a layer of tokens: a bank of experts needs a router. "
            f"Received: {name}=`{type(layer).__name__}`. Wrap it: `MixtureOfExperts(experts)`."
        )
    check_method(layer, "call", "inputs")
