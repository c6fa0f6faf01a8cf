"""How many slots an expert has, and which tokens get them first."""

from functools import partial

import keras
from keras import ops as keras_ops

from keras_moe import ops
from keras_moe._internal.named_arguments import check_is_made
from keras_moe._internal.serialization import Configured, register
from keras_moe._internal.shape_checks import check_fields
from keras_moe._internal.tensor_checks import check_divides
from keras_moe._internal.validation import (
    check_choice,
    check_flag,
    check_has_draws,
    check_method,
    check_positive_integer,
    check_positive_number,
    check_training,
    optional,
)
from keras_moe.backend import backend
from keras_moe.ops.assignments import at_least
from keras_moe.ops.plans import MOST_ROWS

PRIORITIES = ("position", "probability", "random")


@register
class Capacity(Configured):
    """Gives each expert `ceil(factor * T * K / E)` slots for a batch of T tokens.

    First choices are served before second ones. An assignment without a slot contributes zero, so
    that a residual connection passes the token on unchanged; the weights of the others stay.
    Padding takes no slot, but counts in T, so that the shape of a batch and not its content sets
    the capacity.

    Where `keras.distribution` spreads a batch over devices, T counts the tokens of one device. They
    compete among themselves only, as in GShard's groups.

    A language model should have no capacity, or one expert per token and the priority "position":
    otherwise later tokens take slots from earlier ones, and so leak to them in training.

    Args:
        factor: 1.0 is enough for exactly balanced experts. Positive. With `routers.ReLURouter` and
            `routers.TopPRouter` K is `max_top_k`, more than serve most tokens: multiply the factor
            by the mean number of experts of a token over K, `top_k / max_top_k` for ReLU.
        minimum: least number of slots of an expert.
        multiple_of: the number of slots is rounded up to a multiple of this.
        evaluation_factor: the factor outside of training. None: no limit, so that what a token
            gets does not depend on what else is evaluated.
        priority: who is served first among equal choices: "position", earlier tokens;
            "probability", tokens with a larger best probability (batch-prioritised routing,
            arXiv:2106.05974, section 4.2); "random", so that late tokens fare as well as others.
        per_sequence: whether T is a sequence and its tokens compete among themselves only. False:
            T is the whole batch.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> layer = keras_moe.layers.MixtureOfExperts(
    ...     keras_moe.layers.FeedForwardExperts(num_experts=8, hidden_dim=32),
    ...     capacity_factor=keras_moe.layers.Capacity(1.25, priority="probability"),
    ... )

    References: Lepikhin et al. 2020 (arXiv:2006.16668), algorithm 1; Fedus et al. 2021
    (arXiv:2101.03961), eq. 3.
    """

    _attribute_checks = {
        # By the name that it has as an argument of a layer.
        "factor": lambda name, value: check_positive_number("capacity_factor", value),
        "minimum": check_positive_integer,
        "multiple_of": check_positive_integer,
        "evaluation_factor": optional(check_positive_number),
        "priority": partial(check_choice, choices=PRIORITIES),
        "per_sequence": check_flag,
    }

    def __init__(
        self,
        factor,
        minimum=1,
        multiple_of=1,
        evaluation_factor=None,
        priority="position",
        per_sequence=False,
    ):
        self.factor = factor
        self.minimum = minimum
        self.multiple_of = multiple_of
        self.evaluation_factor = evaluation_factor
        self.priority = priority
        self.per_sequence = per_sequence

    @classmethod
    def get(cls, identifier):
        """A `Capacity` from one, a config, a number, which is its factor, or None for no limit."""
        if isinstance(identifier, dict):
            identifier = keras.saving.deserialize_keras_object(identifier)
        if identifier is None:
            return None
        if isinstance(identifier, cls):
            check_is_made(identifier)
            check_method(identifier, "limits", "routing", "sequence_length", "training", "seed")
            return identifier
        return cls(identifier)

    def is_causal(self, top_k):
        """Whether no later token can take a slot from an earlier one.

        With two choices it can: all first choices stand before all second ones.
        """
        check_positive_integer("top_k", top_k)
        return self.priority == "position" and top_k == 1

    def limits(self, routing, sequence_length, training, seed):
        """The arguments that `ops.plan_groups` needs for this capacity.

        Args:
            routing: an `ops.Routing`.
            sequence_length: tokens of a sequence, or None.
            training: whether the factor is that of training.
            seed: `keras.random.SeedGenerator` that the layer keeps, for a random priority.
        """
        check_fields(routing, "indices", "probs", "mask", "counts")
        check_training(training)
        check_divides("sequence_length", sequence_length, routing.mask.shape[0])
        factor = self.factor if training else self.evaluation_factor
        if factor is None:
            return {}
        num_tokens, top_k = keras_ops.shape(routing.indices)
        shards = backend.token_shards()
        if shards is not None:
            num_tokens = -(-num_tokens // shards.number)
        sequence_length = sequence_length if self.per_sequence else None
        length = num_tokens if sequence_length is None else sequence_length
        rows = ops.expert_capacity(length, routing.counts.shape[0], top_k, factor)
        rows = at_least(min(self.minimum, MOST_ROWS), rows)
        multiple_of = min(self.multiple_of, MOST_ROWS)
        return {
            "capacity": -(-rows // multiple_of) * multiple_of,
            "first": self._urgency(routing, seed),
            "sequence_length": sequence_length,
        }

    def _urgency(self, routing, seed):
        if self.priority == "probability":
            best = ops.top_k_indices(routing.probs, 1)
            return ops.take_scores(routing.probs, best)[:, 0]
        if self.priority == "random":
            check_has_draws("A random priority", seed)
            return keras.random.uniform(keras_ops.shape(routing.mask), seed=seed)
        return None

    def get_config(self):
        return {
            **super().get_config(),
            "factor": self.factor,
            "minimum": self.minimum,
            "multiple_of": self.multiple_of,
            "evaluation_factor": self.evaluation_factor,
            "priority": self.priority,
            "per_sequence": self.per_sequence,
        }
