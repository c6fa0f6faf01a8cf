"""Arguments that one looks for on the layer, and that belong to its bank or its router."""

_BANK = "bank of experts"
# Arguments that one may look for on the layer, and where they are.
_PLACES = {
    "num_experts": (_BANK, "layers.FeedForwardExperts(num_experts={!r}, hidden_dim=...)"),
    "hidden_dim": (_BANK, "layers.FeedForwardExperts(num_experts=..., hidden_dim={!r})"),
    "activation": (_BANK, "layers.FeedForwardExperts(..., activation={!r})"),
    "use_bias": (_BANK, "layers.FeedForwardExperts(..., use_bias={!r})"),
    "kernel_initializer": (_BANK, "layers.FeedForwardExperts(..., kernel_initializer={!r})"),
    "top_k": ("router", "router=routers.TopKRouter(top_k={!r})"),
    "score": ("router", "router=routers.TopKRouter(score={!r})"),
    "balancer": ("router", "router=routers.TopKRouter(balancer={!r})"),
    "aux_loss": (
        "layer by the name `router_losses`",
        "router_losses=[losses.LoadBalance(weight={!r})]",
    ),
    "capacity": ("layer by the name `capacity_factor`", "capacity_factor={!r}"),
}


def check_place(arguments):
    """Refuse arguments of the bank or the router.

    Args:
        arguments: dict of the further arguments of the layer.

    Raises:
        TypeError: If there is such an argument.
    """
    for name, value in arguments.items():
        if name in _PLACES:
            place, example = _PLACES[name]
            raise TypeError(
                f"`{name}` is an argument of the {place}. Received: "
                f"MixtureOfExperts(..., {name}={value!r}). Pass `{example.format(value)}`."
            )
