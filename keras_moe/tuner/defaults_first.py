"""A search that begins with what was picked by hand."""

import keras_tuner


class DefaultsFirst(keras_tuner.Oracle):
    """Abstract: a mixin for an oracle, whose first trial then has the default values.

    So the best trial is never worse than what was picked by hand.

    Example:

    >>> import keras_tuner
    >>> class Oracle(keras_moe.tuner.DefaultsFirst, keras_tuner.oracles.RandomSearchOracle):
    ...     pass
    >>> # search = keras_tuner.Tuner(Oracle(objective, max_trials=10), build_model)
    """

    def __new__(cls, *args, **kwargs):
        if super().populate_space is keras_tuner.Oracle.populate_space:
            bases = ", ".join(base.__name__ for base in cls.__bases__)
            raise TypeError(
                "`DefaultsFirst` must stand before an oracle that makes trials. Received: "
                f"`class {cls.__name__}({bases})`. Write, for example, `class "
                f"{cls.__name__}(DefaultsFirst, keras_tuner.oracles.RandomSearchOracle)`."
            )
        return super().__new__(cls)

    def populate_space(self, trial_id):
        if not hasattr(self, "hyperparameters"):
            raise TypeError(
                f"`__init__` of `{type(self).__name__}` must call that of its base class. "
                "Received: an oracle without hyperparameters. Call "
                "`super().__init__(objective, ...)` in it."
            )
        answer = super().populate_space(trial_id)
        if self.trials or answer["status"] != "RUNNING":
            return answer
        first = keras_tuner.HyperParameters()
        first.merge(self.get_space())
        # Hyperband stores its own state among the hyperparameters.
        own = {key: value for key, value in answer["values"].items() if key.startswith("tuner/")}
        return {**answer, "values": {**first.values, **own}}
