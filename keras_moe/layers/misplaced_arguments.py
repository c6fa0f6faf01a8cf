"""Arguments that one looks for on the layer, and that belong to its bank or its router."""

from keras_moe._internal.validation import shortened

_BANK = "bank of experts"
# Arguments that one may look for on the layer, and where they are.
PLACES = {
    "num_experts": (_BANK, "layers.FeedForwardExperts(num_experts={}, hidden_dim=...)"),
    "hidden_dim": (_BANK, "layers.FeedForwardExperts(num_experts=..., hidden_dim={})"),
    "activation": (_BANK, "layers.FeedForwardExperts(..., activation={})"),
    "use_bias": (_BANK, "layers.FeedForwardExperts(..., use_bias={})"),
    "kernel_initializer": (_BANK, "layers.FeedForwardExperts(..., kernel_initializer={})"),
    "top_k": ("router", "router=routers.TopKRouter(top_k={})"),
    "score": ("router", "router=routers.TopKRouter(score={})"),
    "balancer": ("router", "router=routers.TopKRouter(balancer={})"),
    "aux_loss": (
        "layer by the name `router_losses`",
        "router_losses=[losses.LoadBalance(weight={})]",
    ),
    "capacity": ("layer by the name `capacity_factor`", "capacity_factor={}"),
}


def check_place(arguments):
    """Refuse arguments of the bank or the router.

    Args:
        arguments: dict of the further arguments of the layer.

    Raises:
        TypeError: If there is such an argument.
    """
    for name, value in arguments.items():
        if name in PLACES:
            place, example = PLACES[name]
            shown = shortened(value)
            raise TypeError(
                f"`{name}` is an argument of the {place}. Received: "
                f"MixtureOfExperts(..., {name}={shown}). Pass `{example.format(shown)}`."
            )
