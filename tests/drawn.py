"""What property tests draw: logits whose loads differ, and masks."""

import numpy as np

# The first is what a test takes that has time for one.
SKEWS = ("zipf", "balanced", "all-to-one")
MASKS = ("most", "all", "few", "none")


def draw_logits(rng, num_tokens, num_experts, skew, preference=10.0):
    """Logits whose largest entries wander over the experts as `skew` says."""
    logits = rng.normal(size=(num_tokens, num_experts))
    if skew == "balanced":
        rows = np.arange(num_tokens)
        logits[rows, rows % num_experts] += preference
    elif skew == "zipf":
        logits -= 2.0 * np.log(np.arange(num_experts) + 1.0)
    else:
        logits[:, 0] += preference
    return logits.astype("float32")


def draw_mask(rng, num_tokens, kind):
    share = {"all": 2.0, "most": 0.8, "few": 0.2, "none": 0.0}[kind]
    return rng.random(num_tokens) < share
