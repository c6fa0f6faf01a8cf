"""Arguments that one looks for on a layer, a bank or a router, and that belong to another."""

from keras_moe._internal.validation import shortened

_BANK, _ROUTER, _LAYER = "bank of experts", "router", "layer"

_OF_BANK = {
    "num_experts": (_BANK, "layers.FeedForwardExperts(num_experts={}, hidden_dim=...)"),
    "hidden_dim": (_BANK, "layers.FeedForwardExperts(num_experts=..., hidden_dim={})"),
    "activation": (_BANK, "layers.FeedForwardExperts(..., activation={})"),
    "use_bias": (_BANK, "layers.FeedForwardExperts(..., use_bias={})"),
    "kernel_initializer": (_BANK, "layers.FeedForwardExperts(..., kernel_initializer={})"),
}
_OF_ROUTER = {
    "top_k": (_ROUTER, "router=routers.TopKRouter(top_k={})"),
    "score": (_ROUTER, "router=routers.TopKRouter(score={})"),
    "balancer": (_ROUTER, "router=routers.TopKRouter(balancer={})"),
}
_OF_LAYER = {
    "router_losses": (_LAYER, "layers.MixtureOfExperts(..., router_losses={})"),
    "capacity_factor": (_LAYER, "layers.MixtureOfExperts(..., capacity_factor={})"),
}

# By the class that one tries: names of arguments, whose they are, and how they are passed.
ON_LAYER = {
    **_OF_BANK,
    **_OF_ROUTER,
    "aux_loss": (
        "layer by the name `router_losses`",
        "router_losses=[losses.LoadBalance(weight=...)]",
    ),
    "capacity": ("layer by the name `capacity_factor`", "capacity_factor={}"),
}
ON_BANK = {
    **{
        name: (_ROUTER, f"layers.MixtureOfExperts(..., {how})")
        for name, (_, how) in _OF_ROUTER.items()
    },
    **_OF_LAYER,
    "router": (_LAYER, "layers.MixtureOfExperts(..., router={})"),
}
ON_ROUTER = {
    "hidden_dim": _OF_BANK["hidden_dim"],
    "activation": _OF_BANK["activation"],
    **_OF_LAYER,
}


def check_place(owner, places, arguments):
    """Refuse arguments of another part.

    Args:
        owner: what is constructed.
        places: `ON_LAYER`, `ON_BANK` or `ON_ROUTER`.
        arguments: dict of its further arguments.

    Raises:
        TypeError: If one of these belongs to another part.
    """
    for name, value in arguments.items():
        if name in places:
            place, example = places[name]
            shown = shortened(value)
            raise TypeError(
                f"`{name}` is an argument of the {place}. Received: "
                f"{type(owner).__name__}(..., {name}={shown}). Pass `{example.format(shown)}`."
            )
