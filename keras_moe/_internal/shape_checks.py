"""Checks of tensors that belong together: those of a routing, of a plan, of a bank of experts.

Shapes are known without the device. What is None or symbolic in them fits any size.
"""

from keras_moe._internal.validation import check_tensor, check_top_k, fits

_OF_ROUTINGS = {
    "indices": "TK",
    "weights": "TK",
    "probs": "TE",
    "logits": "TE",
    "mask": "T",
    "counts": "E",
    "load": "E",
}


def check_shapes(tensors, **sizes):
    """Tensors that share axes: each has its rank, and an axis has one size in all of them.

    Args:
        tensors: dict from a name to a tensor and its axes, a letter for each.
        **sizes: sizes of axes that are known from elsewhere, by their letters.
    """
    for name, (tensor, axes) in tensors.items():
        check_tensor(name, tensor)
        shape = tuple(tensor.shape)
        if not fits(shape, [sizes.get(axis) for axis in axes]):
            here = [f"{axis}={sizes[axis]}" for axis in axes if sizes.get(axis) is not None]
            raise ValueError(
                f"`{name}` must have the shape ({', '.join(axes)}{',' * (len(axes) == 1)}). "
                f"Received: {name}.shape={shape}{' with ' * bool(here)}{', '.join(here)}. "
                "Change one of them: what belongs together has the same tokens and experts."
            )
        for axis, size in zip(axes, shape):
            if isinstance(size, int):
                sizes.setdefault(axis, size)


def check_fields(routing, *names, **sizes):
    """Fields of a routing, or all of them, against each other and against known sizes."""
    optional = () if names else ("counts", "load")  # What is left out is counted.
    check_shapes(
        {
            f"routing.{name}": (getattr(routing, name), _OF_ROUTINGS[name])
            for name in names or _OF_ROUTINGS
            if name not in optional or getattr(routing, name) is not None
        },
        **known(**sizes),
    )


def check_inputs_shape(shape):
    """The shape of the inputs of a layer of tokens, (batch, ..., D)."""
    # Of TensorFlow's own type, where users pass on what a tensor says.
    is_list = isinstance(shape, (list, tuple)) or type(shape).__name__ == "TensorShape"
    is_one = is_list and not any(isinstance(size, tuple) for size in shape)
    if not is_one or len(shape) < 2 or not shape[-1]:
        raise ValueError(
            "`inputs` must have a batch axis and a last axis of known size. Received: "
            f"inputs.shape={tuple(shape) if is_one else shape}. Pass (batch, ..., features), for "
            "example `keras.Input((None, 64))`."
        )


def check_selected(indices, num_tokens, top_k):
    """What a function of the user's own selected."""
    check_shapes({"select(scores)": (indices, "TK")}, **known(T=num_tokens, K=top_k))


def check_bank_call(bank, tokens, plan):
    """What a bank of experts is called with: tokens (T, D), and a plan for them and its experts."""
    if not hasattr(plan, "dispatch"):
        received = "no plan" if plan is None else f"an object of type {type(plan).__name__}"
        raise TypeError(
            f"A bank of experts needs a plan, which says whom each expert serves. Received: "
            f"{received}. Put the bank into a `MixtureOfExperts` and call that, or pass "
            "`plan=router.plan(router(tokens))`."
        )
    groups = getattr(plan, "groups", None)
    if groups is None:
        return  # a plan of the user's own
    check_shapes({"tokens": (tokens, "TD")}, **known(T=num_tokens_of(groups)))
    num_experts = num_experts_of(groups)
    if isinstance(num_experts, int) and num_experts != bank.num_experts:
        raise ValueError(
            "A plan must have the experts of the bank that follows it. Received: a plan for "
            f"{num_experts} experts, and a bank with num_experts={bank.num_experts}. "
            "Give router and bank the same number."
        )


def check_is_bank(experts):
    """What a plan is run with."""
    if not callable(experts) or not hasattr(experts, "num_experts"):
        raise TypeError(
            "`experts` must be a bank of experts. Received: an object of type "
            f"{type(experts).__name__}. Pass, for example, "
            "`layers.FeedForwardExperts(num_experts=8, hidden_dim=256)`."
        )


def check_noise(clean, noisy, deviation, top_k, mask):
    """The arguments of `ops.noisy_load`."""
    check_shapes({"clean": (clean, "TE"), "noisy": (noisy, "TE"), "mask": (mask, "T")})
    check_top_k(top_k, noisy.shape[-1])
    if hasattr(deviation, "shape"):
        check_shapes({"noisy": (noisy, "TE"), "deviation": (deviation, "TE")})


def num_tokens_of(groups):
    """The tokens of a plan's groups, an integer where that is known."""
    for name in ("rows_of_token", "experts", "mask"):
        if hasattr(groups, name):
            return getattr(groups, name).shape[0]
    return None


def num_experts_of(groups):
    """The experts of a plan's groups, an integer where that is known."""
    if hasattr(groups, "num_experts"):
        return groups.num_experts
    return groups.sizes.shape[0]


def known(**sizes):
    """Those of the sizes that are known, for `check_shapes`."""
    return {axis: size for axis, size in sizes.items() if isinstance(size, int)}
