"""The weights of experts, made from those of a dense feed-forward network.

Axes: D features, H hidden width of the network, E experts, G experts that share a copy of it.
"""

import numpy as np
from keras import ops


def expert_weights(feed_forward, num_experts, granularity, reinitialized, rng):
    """Stacked weights of experts, by the names of a bank's.

    Expert `c * G + g` has the g-th of G equal parts of the hidden features of copy c. The bias of
    the output is divided among the parts, so the sum of G parts is the whole network.

    Args:
        feed_forward: a `FeedForward`.
        num_experts: E, divisible by G.
        granularity: G, divides H.
        reinitialized: share of the hidden features of each expert that is drawn anew, with the mean
            and the standard deviation of what it replaces. Drop-Upcycling (arXiv:2502.19261),
            section 3.2.
        rng: NumPy generator.

    Returns:
        Dict of float32 arrays: `up_kernel` (E, D, H / G), `down_kernel` (E, H / G, D), and so on.
    """
    weights = {}
    for name in ("gate", "up"):
        dense = getattr(feed_forward, name)
        if dense is not None:
            weights[f"{name}_kernel"] = _parts(_kernel(dense), granularity, axis=1)
            weights[f"{name}_bias"] = _parts(_bias(dense), granularity, axis=0)
    down = feed_forward.down
    weights["down_kernel"] = _parts(_kernel(down), granularity, axis=0)
    weights["down_bias"] = np.stack([_bias(down) / granularity] * granularity)
    copies = num_experts // granularity
    weights = {
        name: np.tile(value, (copies, *[1] * (value.ndim - 1))) for name, value in weights.items()
    }
    if reinitialized:
        _draw_anew(weights, reinitialized, rng)
    return weights


def _draw_anew(weights, share, rng):
    """Draw a share of the hidden features of each expert anew, others in each."""
    num_experts, width, _ = weights["down_kernel"].shape
    for expert in range(num_experts):
        chosen = rng.permutation(width)[: round(share * width)]
        for name, value in weights.items():
            if name.endswith("kernel") and len(chosen):
                # Hidden features are the rows of the kernel that leads back, columns elsewhere.
                kernel = value[expert] if name == "down_kernel" else value[expert].T
                old = kernel[chosen]
                kernel[chosen] = rng.normal(old.mean(), old.std(), old.shape)


def _parts(value, number, axis):
    return np.stack(np.split(value, number, axis))


def _kernel(dense):
    return _float32(dense.kernel)


def _bias(dense):
    return _float32(dense.bias) if dense.use_bias else np.zeros(dense.units, "float32")


def _float32(variable):
    return ops.convert_to_numpy(ops.cast(variable.value, "float32"))
