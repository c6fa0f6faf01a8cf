"""Regularizers of a bank that add to the loss what those of the dense layers did."""

import keras

from keras_moe._internal.validation import listed

# Sums over the elements: with E / G copies of the dense layers E / G times as large.
_SUMS = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)


def bank_regularizer(denses, kind, copies):
    """One whose loss of all copies of the dense layers is that of the layers, or None.

    Args:
        denses: `Dense` layers with the same regularizers.
        kind: "kernel" or "bias".
        copies: number of copies, E / G.
    """
    l1, l2 = next(map(_factors, _regularizers(denses, kind)), (0.0, 0.0))
    return keras.regularizers.L1L2(l1 / copies, l2 / copies) if l1 or l2 else None


def check_penalties(feed_forward, granularity):
    """Refuse what a bank cannot have: it would be lost, or change the loss.

    Raises:
        ValueError: If a dense layer has such a regularizer or constraint.
    """
    received = next(_obstacles(feed_forward, granularity), None)
    if received is not None:
        raise ValueError(
            "The `Dense` layers must have one `kernel_regularizer` and one `bias_regularizer`, "
            "`L1`, `L2` or `L1L2` of Keras, as a bank of experts has them for all its weights, and "
            f"no constraint or `activity_regularizer`. Received: {received} in "
            f"{feed_forward.name!r}. Make the dense model so, or choose other layers with `select`."
        )


def _obstacles(feed_forward, granularity):
    for part in feed_forward.layers:
        for layer in part._flatten_layers():
            if layer.activity_regularizer is not None:
                yield f"an `activity_regularizer` of `{layer.name}`"
    for dense in feed_forward.denses:
        for name in ("kernel_constraint", "bias_constraint"):
            if getattr(dense, name) is not None:
                yield f"a `{name}` of `{dense.name}`"
    for kind in ("kernel", "bias"):
        regularizers = _regularizers(feed_forward.denses, kind)
        for regularizer in regularizers:
            if regularizer is not None and type(regularizer) not in _SUMS:
                name = getattr(regularizer, "__name__", type(regularizer).__name__)
                yield f"`{name}` as `{kind}_regularizer`"
        factors = list(map(_factors, regularizers))
        if len(set(factors)) > 1:
            yield f"`{kind}_regularizer`s with the l1 and l2 {listed(factors)}"
    if granularity > 1 and bank_regularizer(feed_forward.denses, "bias", copies=1):
        # The squares of the parts' shares of the last bias do not add up to its square.
        yield f"a `bias_regularizer`, which parts cannot share, with granularity={granularity}"


def _regularizers(denses, kind):
    if kind == "bias":
        denses = [dense for dense in denses if dense.use_bias]
    return [getattr(dense, f"{kind}_regularizer") for dense in denses]


def _factors(regularizer):
    """Those of the L1 norm and of the squared L2 norm."""
    return tuple(float(getattr(regularizer, name, 0.0)) for name in ("l1", "l2"))
