"""The interface every router loss has."""

from keras_moe.validation import check_not_negative


class RouterLoss:
    """Abstract: a weighted scalar of a routing.

    A subclass implements `compute(routing)`, which returns the loss before its weight. One that
    judges sequences sets `per_sequence` and implements `compute(routing, sequence_length)`.

    Args:
        weight: what the loss is multiplied by, at least 0. A layer copies it into a variable of its
            own, which `callbacks.RouterLossSchedule` changes in training.
    """

    per_sequence = False

    def __init__(self, weight):
        weight = check_not_negative("weight", weight)
        self.weight = weight

    def __call__(self, routing, **kwargs):
        return self.weight * self.compute(routing, **kwargs)

    def compute(self, routing):
        raise NotImplementedError(f"{type(self).__name__} must implement `compute(routing)`.")

    def evaluate(self, routing, **kwargs):
        """The loss outside of training: nothing is remembered."""
        return self.compute(routing, **kwargs)

    def build(self, layer):
        """The loss for a layer: this one, or one that remembers batches in weights of `layer`."""
        return self

    def get_config(self):
        return {"weight": self.weight}

    @classmethod
    def from_config(cls, config):
        return cls(**config)
