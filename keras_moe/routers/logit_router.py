"""What routers with a learned map from tokens to logits have in common."""

import keras
from keras import ops

from keras_moe._internal.initializers import Checked
from keras_moe._internal.keras_internals import own_variables
from keras_moe._internal.keras_objects import CheckedRegularizer, get_initializer, get_regularizer
from keras_moe._internal.lora import (
    Adaptable,
    adaptable_from_config,
    corrected,
    factors_for,
    forget_corrections,
)
from keras_moe._internal.saved_state import load_draws, save_draws
from keras_moe._internal.shape_checks import (
    check_inputs_shape,
    check_kernel_shape,
    check_logits,
    check_shapes,
    known,
)
from keras_moe._internal.validation import (
    check_fraction,
    check_method,
    check_not_negative,
    check_seed,
    overrides,
)
from keras_moe.ops import clean_logits, draws
from keras_moe.routers.router import Router


class LogitRouter(Adaptable, Router):
    """Abstract: a router whose logits are learned; linear, unless a subclass overrides `project`.

    Args:
        num_experts: number of experts, E.
        input_jitter: in training the router, not the experts, sees its inputs multiplied by noise
            uniform in `[1 - input_jitter, 1 + input_jitter]` (Switch uses 0.01). From 0 to below 1.
        logit_noise: in training, standard deviation of normal noise added to the logits.
        kernel_initializer: of the kernel (D, E). The default is normal with standard deviation
            0.02; zeros would send every token to the same experts.
        kernel_regularizer: of the kernel, or None.
        seed: integer seed of the noise, or None.
    """

    # Whether a `project` that is overridden multiplies by `times_kernel`, and so has LoRA.
    projects_by_times_kernel = False
    _attribute_checks = {
        "input_jitter": check_fraction,
        "logit_noise": check_not_negative,
        "kernel_initializer": get_initializer,
        "kernel_regularizer": get_regularizer,
        "seed": check_seed,
    }
    _fixed_attributes: tuple[str, ...] = ("kernel_initializer", "kernel_regularizer", "seed")

    def __init__(
        self,
        num_experts=None,
        input_jitter=0.0,
        logit_noise=0.0,
        kernel_initializer=None,
        kernel_regularizer=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        check_method(self, "project", "tokens")
        check_method(self, "logits", "tokens", "mask", "training")
        check_method(self, "kernel_shape", "features")
        self.seed = seed
        self.input_jitter = input_jitter
        self.logit_noise = logit_noise
        if kernel_initializer is None:
            kernel_initializer = keras.initializers.RandomNormal(stddev=0.02, seed=self.seed)
        self.kernel_initializer = kernel_initializer
        self.kernel_regularizer = kernel_regularizer
        self._noise_seed = keras.random.SeedGenerator(self.seed)

    def build(self, tokens_shape):
        check_inputs_shape(tokens_shape)
        self.input_spec = keras.layers.InputSpec(axes={-1: tokens_shape[-1]})
        features = tokens_shape[-1]
        height = None if self._overrides_project() else features
        shape = check_kernel_shape(self, self.kernel_shape(features), features, height)
        self.kernel = self._add_kernel("kernel", shape)

    def _post_build(self):
        # Behind all that subclasses build, as where LoRA is enabled later: optimizers go by order.
        if self.lora_rank and not self.lora_enabled:
            self.add_factors()
        super()._post_build()

    def _made_by_build(self):
        has_kernel = not self._projects_otherwise()
        return [*super()._made_by_build(), *(["kernel"] if has_kernel else [])]

    def kernel_shape(self, features):
        return features, self.num_experts

    def project(self, tokens):
        """Logits (T, E) of tokens (T, D), without noise."""
        return self.times_kernel(tokens)

    def times_kernel(self, tokens):
        """Tokens (T, D) times the kernel, with what LoRA has learned."""
        products = ops.matmul(tokens, self.kernel)
        if not self.lora_enabled:
            return products
        correction = ops.matmul(ops.matmul(tokens, self.kernel_lora_a), self.kernel_lora_b)
        return products + self.lora_scale() * correction

    def check_takes_lora(self):
        if self._projects_otherwise():
            raise NotImplementedError(
                "LoRA corrects products with the kernel, and this router computes its logits in "
                f"another way. Received: a `{type(self).__name__}`. Train its kernel: it is small."
            )

    def _projects_otherwise(self):
        """Whether the logits are no products with the kernel."""
        return self._overrides_project() and not self.projects_by_times_kernel

    def _overrides_project(self):
        return overrides(self, "project", LogitRouter)

    def add_factors(self, a_initializer="he_uniform", b_initializer="zeros"):
        self.kernel_lora_a, self.kernel_lora_b = factors_for(
            self, "kernel", self.kernel.shape, a_initializer, b_initializer
        )
        self.lora_enabled = True

    def _factors(self):
        return self.kernel_lora_a, self.kernel_lora_b

    def _saved_variables(self):
        """The variables that a file has: all but the factors, which the kernel there includes."""
        factors = {id(factor) for factor in self._factors()}
        return [variable for variable in own_variables(self) if id(variable) not in factors]

    def save_own_variables(self, store):
        if not self.lora_enabled:
            super().save_own_variables(store)
            return
        for index, variable in enumerate(self._saved_variables()):
            value = ops.convert_to_numpy(variable)
            if variable is self.kernel:
                a, b = map(ops.convert_to_numpy, self._factors())
                value = corrected(value, a, b, self.lora_scale())
            store[str(index)] = value
        save_draws(self, store)

    def load_own_variables(self, store):
        if not self.lora_enabled:
            super().load_own_variables(store)
            return
        entries, variables = load_draws(self, store), self._saved_variables()
        if len(entries) != len(variables):
            raise ValueError(
                f"`{self.name}` has {len(variables)} weights to load, besides its LoRA. Received: "
                f"{len(entries)} in the file. Build the router with the arguments of the one that "
                "was saved."
            )
        for index, variable in enumerate(variables):
            variable.assign(entries[str(index)])
        forget_corrections([self._factors()])

    def logits(self, tokens, mask, training):
        """Logits (T, E) of tokens (T, D) with the noise of training, and a mask: `clean_logits`."""
        if training and self.input_jitter:
            noise = 2 * self._noise(draws.uniform, tokens) - 1
            tokens = tokens * (1 + self.input_jitter * noise)
        logits = self.project(tokens)
        if self._overrides_project():
            sizes = known(T=tokens.shape[0])
            check_shapes({"project(tokens)": (logits, "TE", "float")}, **sizes)
        if training and self.logit_noise:
            logits = logits + self.logit_noise * self._noise(draws.normal, logits)
        return clean_logits(logits, mask)

    def checked_logits(self, tokens, mask, training):
        """What `logits` returns, for the routes of this package."""
        returned = self.logits(tokens, mask, training)
        if self._overrides_project() or overrides(self, "logits", LogitRouter):
            check_logits(self, returned, tokens.shape[0], self._num_logits())
        return returned

    def _num_logits(self):
        """Logits of a token."""
        return self.num_experts

    def _add_kernel(self, name, shape, initializer=None):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=Checked(initializer or self.kernel_initializer),
            regularizer=CheckedRegularizer.of(self.kernel_regularizer),
        )

    def _noise(self, draw, like):
        """Noise of the shape (R, C) of a tensor, from one of `ops.draws`."""
        return draw(ops.shape(like), self._noise_seed)

    def get_config(self):
        return {
            **super().get_config(),
            "input_jitter": self.input_jitter,
            "logit_noise": self.logit_noise,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "seed": self.seed,
            **self.lora_config(),
        }

    @classmethod
    def from_config(cls, config):
        return adaptable_from_config(cls, super().from_config, config)
