"""Checks of tensors that belong together: those of a routing, of a plan, of a bank of experts.

Shapes and dtypes are known without the device. What is None or symbolic in a shape fits any size.
"""

from keras_moe._internal.tensor_checks import check_is_float, check_tensor, is_of
from keras_moe._internal.validation import check_routing, check_top_k, dtype_of, is_whole, shortened

# Axes, and what kind of dtype it is.
_OF_ROUTINGS = {
    "indices": ("TK", "int"),
    "weights": ("TK", "float"),
    "probs": ("TE", "float"),
    "logits": ("TE", "float"),
    "mask": ("T", "mask"),
    "counts": ("E", "number"),
    "load": ("E", "float"),
}
_OF_GROUPS = {
    # `ops.Groups`
    "sizes": ("E", "int"),
    "assignment_of_row": ("R", "int"),
    "rows_of_token": ("TK", "int"),
    # `ops.ChosenGroups`
    "choice_of_row": ("R", "int"),
    "row_of_choice": ("R", "int"),
    "token_of_choice": ("R", "int"),
    "mask": ("T", "mask"),
    # `ops.Assignments`
    "experts": ("TK", "int"),
    # `ops.Choices`
    "place": ("BEC", "int"),
    "is_valid": ("BEC", "mask"),
}
# The weights of a plan, by the first field of its groups that says how many there are.
_OF_WEIGHTS = {"rows_of_token": "TK", "row_of_choice": "R", "experts": "TK", "place": "BEC"}
# What a routing has for the plan of the function that made it.
_OF_DETAILS = {
    "expert_choice_routing": (("BEC", "int"), ("BEC", "mask")),
    "soft_routing": (("BSM", "float"), ("BSM", "float")),
}
_KINDS = {"float": "floats", "int": "integers", "mask": "bools or integers", "number": "numbers"}


def check_shapes(tensors, **sizes):
    """Tensors that share axes: each has its rank, and an axis has one size in all of them.

    Args:
        tensors: dict from a name to a tensor and its axes, a letter for each, and perhaps a kind of
            dtype: "float", "int", "mask" or "number".
        **sizes: sizes of axes that are known from elsewhere, by their letters.
    """
    for name, (tensor, axes, *kind) in tensors.items():
        if not hasattr(tensor, "shape") or not hasattr(tensor, "dtype"):
            check_tensor(name, tensor)
        shape = tensor.shape
        if len(shape) != len(axes):
            _refuse_shape(name, shape, axes, sizes)
        for axis, size in zip(axes, shape):
            if isinstance(size, int):
                if sizes.setdefault(axis, size) != size:
                    _refuse_shape(name, shape, axes, sizes)
        if kind and not is_of(kind[0], tensor):
            raise TypeError(
                f"`{name}` must hold {_KINDS[kind[0]]}. Received: {name}.dtype={dtype_of(tensor)}. "
                "Cast it, or pass another tensor."
            )


def _refuse_shape(name, shape, axes, sizes):
    here = [f"{axis}={sizes[axis]}" for axis in axes if axis in sizes]
    raise ValueError(
        f"`{name}` must have the shape ({', '.join(axes)}{',' * (len(axes) == 1)}). "
        f"Received: {name}.shape={tuple(shape)}{' with ' * bool(here)}{', '.join(here)}. "
        "Change one of them: what belongs together has the same sizes."
    )


def check_scores(name, scores, axes="TE"):
    """Scores or logits of experts, one at least."""
    check_shapes({name: (scores, axes, "float")})
    if scores.shape[-1] == 0:
        raise ValueError(
            f"`{name}` must have a column for each expert. Received: {name}.shape="
            f"{tuple(scores.shape)}. Pass those of one expert at least."
        )


def check_fields(routing, *names, **sizes):
    """Fields of a routing, or all of them, against each other and against known sizes."""
    check_routing(routing)
    optional = () if names else ("counts", "load")  # What is left out is counted.
    tensors = {}
    for name in names or _OF_ROUTINGS:
        field = getattr(routing, name)
        if field is not None or name not in optional:
            tensors[f"routing.{name}"] = (field, *_OF_ROUTINGS[name])
    check_shapes(tensors, **known(**sizes))


def check_details(routing, made_by):
    """Refuse a routing without the details that the plan of some function needs."""
    check_routing(routing)
    needed = _OF_DETAILS[made_by]
    fit = len(routing.details) == len(needed) and all(
        len(tensor.shape) == len(axes) and is_of(kind, tensor)
        for tensor, (axes, kind) in zip(routing.details, needed)
    )
    if not fit:
        raise ValueError(
            f"The plan needs the details of a routing that `ops.{made_by}` made. Received: "
            f"{len(routing.details)} others. Use the plan of the router that made it."
        )


def check_groups(groups, *weights, **others):
    """The fields of groups against each other, and with the weights of a plan and other tensors.

    Args:
        groups: one of the kinds of groups in `ops`.
        *weights: those of the plan, where they are used.
        **others: tensors and their axes, as for `check_shapes`.
    """
    axes = _axes_of_weights(groups)
    tensors = {}
    for name, field in zip(groups._fields, groups):
        tensors[f"groups.{name}"] = (field, *_OF_GROUPS[name])
    for given in weights:
        tensors["weights"] = (given, axes, "float")
    check_shapes({**tensors, **others})


def check_inputs_shape(shape):
    """The shape of the inputs of a layer of tokens, (batch, ..., D)."""
    # Of TensorFlow's own type, where users pass on what a tensor says.
    is_list = isinstance(shape, (list, tuple)) or type(shape).__name__ == "TensorShape"
    is_one = is_list and not any(isinstance(size, tuple) for size in shape)
    if not is_one or len(shape) < 2 or not is_whole(shape[-1]) or shape[-1] < 1:
        raise ValueError(
            "`inputs` must have a batch axis and a last axis of known size. Received: "
            f"inputs.shape={tuple(shape) if is_one else shape}. Pass (batch, ..., features), for "
            "example `keras.Input((None, 64))`."
        )


def check_selected(indices, num_tokens, top_k):
    """What a function of the user's own selected."""
    check_shapes({"select(scores)": (indices, "TK", "int")}, **known(T=num_tokens, K=top_k))


def check_activated(activated, values):
    """What an activation made of a tensor."""
    if not hasattr(activated, "shape") or tuple(activated.shape) != tuple(values.shape):
        made = shortened(activated)
        if hasattr(activated, "shape"):
            made = f"the shape {tuple(activated.shape)}"
        raise ValueError(
            "An activation must keep the shape of its input. Received: one that made "
            f"{made} of {tuple(values.shape)}. Put layers that change shapes into `LayerExperts`."
        )
    if activated.dtype != values.dtype:
        check_is_float("activation(x)", activated)


def check_bank_call(bank, tokens, plan):
    """What a bank of experts is called with: tokens (T, D), and a plan for them and its experts."""
    if not hasattr(plan, "dispatch"):
        received = "no plan" if plan is None else f"an object of type {type(plan).__name__}"
        raise TypeError(
            "A bank of experts needs a plan, which says which tokens each expert serves. Received: "
            f"{received}. Put the bank into a `MixtureOfExperts` and call that, or pass "
            "`plan=router.plan(router(tokens))`."
        )
    if not hasattr(plan, "groups"):
        return  # a plan of the user's own
    groups = plan.groups
    check_groups(groups, plan.weights, tokens=(tokens, "TD", "float"))
    num_experts = num_experts_of(groups)
    if isinstance(num_experts, int) and num_experts != bank.num_experts:
        raise ValueError(
            "A plan must have the experts of the bank that follows it. Received: a plan for "
            f"{num_experts} experts, and a bank with num_experts={bank.num_experts}. "
            "Give router and bank the same number."
        )


def check_limits(capacity, limits):
    """What the `limits` of a capacity returned, which may be one of the user's own."""
    if not isinstance(limits, dict):
        raise TypeError(
            "`limits` of a capacity must return a dict of arguments of `ops.plan_groups`. "
            f"Received: an object of type {type(limits).__name__} from "
            f"`{type(capacity).__name__}`. Return, for example, `{{'capacity': 4}}`."
        )


def check_planned(router, plan):
    """What the `plan` of a router returned, which may be one of the user's own."""
    if not hasattr(plan, "dropped_fraction"):
        raise TypeError(
            "`plan` of a router must return a plan, such as `ops.plan_groups` makes. Received: "
            f"an object of type {type(plan).__name__} from `{type(router).__name__}`. "
            "Return `super().plan(routing, **limits)`."
        )


def check_served(bank, tokens, outputs, width):
    """What the `call` of a bank returned, which may be one of the user's own.

    Args:
        bank: the bank.
        tokens: what it was called with.
        outputs: what it returned.
        width: features that its `compute_output_shape` tells, None where it does not.
    """
    name = f"{type(bank).__name__}.call(...)"
    check_shapes({name: (outputs, "TD", "float")}, **known(T=tokens.shape[0], D=width))


def check_returned(name, outputs, shape):
    """What a layer of the user's inside of ours returned: floats of the shape that it told."""
    check_is_float(f"{name}(inputs)", outputs)
    if getattr(outputs.shape, "rank", 0) is None:  # TensorFlow does not know it
        return
    pairs = [(a, b) for a, b in zip(outputs.shape, shape) if type(a) is type(b) is int]
    if len(outputs.shape) != len(shape) or any(a != b for a, b in pairs):
        raise ValueError(
            f"`{name}` must return what it was built for. Received: {name}(inputs).shape="
            f"{tuple(outputs.shape)}, not {tuple(shape)}. Let its `compute_output_shape` tell the "
            "shape that its `call` returns."
        )


def check_kernel_shape(router, shape, features, height):
    """What the `kernel_shape` of a router returned, which may be one of the user's own.

    Args:
        height: the first size that it must have, or None for any.
    """
    is_shape = isinstance(shape, (tuple, list)) and len(shape) == 2
    is_shape = is_shape and all(is_whole(size) and size > 0 for size in shape)
    if not is_shape or height not in (None, shape[0]):
        raise ValueError(
            "`kernel_shape(features)` must be two positive integers, of which the first is "
            f"`features`, unless `project` is overridden. Received: {shortened(shape)} from "
            f"`{type(router).__name__}` for {features} features. Return, for example, "
            "`features, self.num_experts`."
        )
    return tuple(shape)


def check_logits(router, returned, num_tokens, num_logits):
    """What the `logits` of a router returned, or its `project`, which may be the user's own."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(
            "`logits` of a router must return a pair, logits (T, E) and a mask (T,). Received: an "
            f"object of type {type(returned).__name__} from `{type(router).__name__}`. Return "
            "`ops.clean_logits(logits, mask)`."
        )
    tensors = {"logits": (returned[0], "TE", "float"), "mask": (returned[1], "T", "mask")}
    check_shapes(tensors, **known(T=num_tokens, E=num_logits))


def _axes_of_weights(groups):
    for name in getattr(groups, "_fields", ()):
        if name in _OF_WEIGHTS:
            return _OF_WEIGHTS[name]
    raise TypeError(
        "`groups` must be `ops.Groups` or another kind of groups. Received: an object of type "
        f"{type(groups).__name__}. Pass `plan.groups` of an `ops.GroupedPlan`."
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
    tensors = {"clean": (clean, "TE", "float"), "noisy": (noisy, "TE", "float")}
    if hasattr(deviation, "shape"):
        tensors["deviation"] = (deviation, "TE", "float")
    check_shapes({**tensors, "mask": (mask, "T", "mask")})
    check_top_k(top_k, noisy.shape[-1])


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
