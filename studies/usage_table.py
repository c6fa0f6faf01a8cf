"""How much of the work each expert does, as text."""

import expert_heat_maps


def print_usage(usage):
    """Print the share of the tokens that each expert serves, one line a layer.

    Args:
        usage: dict from the name of a layer to (groups of tokens, experts) counts.
    """
    num_experts = max(counts.shape[1] for counts in usage.values())
    width = max(map(len, usage))
    print(
        f"\nShare of the tokens each expert serves; all would serve {1 / num_experts:.1%} of them"
    )
    print(f"{'expert':<{width}}", *(f"{expert:>6}" for expert in range(num_experts)))
    for name, counts in usage.items():
        shares = expert_heat_maps.shares(counts.sum(axis=0))
        idle = int((shares == 0).sum())
        print(
            f"{name:<{width}}",
            *(f"{share:6.1%}" for share in shares),
            *([f" {idle} of them idle"] if idle else []),
        )
