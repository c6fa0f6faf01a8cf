"""What each router costs: its routing alone, and the share of it in the layer's training step.

    KERAS_BACKEND=jax python -m benchmarks.routers --experts 64

Routing is the call of the router and its plan, the step is that of a MoE layer with this router,
both forward and backward. A router has the K of `--top-k`, if it takes one and its name does not
say another.
"""

import keras
from keras import ops

from benchmarks.contestants import mixture_of, tokens
from benchmarks.measure import interleave, print_table, summarise, write_json
from benchmarks.options import describe, parse, parser
from benchmarks.steps import compiled_step
from keras_moe import routers


def main(arguments=None):
    options = parse(_parser(), arguments)
    rows = []
    for num_experts in options.experts:
        for num_tokens in options.tokens:
            inputs = tokens(num_tokens, options)
            table = [race(name, num_experts, inputs, options) for name in options.routers]
            print_table(table, f"{describe(options)} E={num_experts} T={num_tokens}")
            rows += [{**row, "experts": num_experts, "tokens": num_tokens} for row in table]
    write_json(f"routers-{keras.backend.backend()}{options.tag}", options, rows)
    return rows


def _parser():
    options = parser(__doc__, experts=[64])
    names = sorted(routers.BY_NAME)
    options.add_argument("--routers", nargs="+", default=names, choices=names)
    return options


def race(name, num_experts, inputs, options):
    router = router_by_name(name, num_experts, options)
    layer = mixture_of(router, options)
    contestants = {"routing": RoutingAlone(router), "step": layer}
    steps = {
        key: compiled_step(contestant, inputs, jit=not options.no_xla)
        for key, contestant in contestants.items()
    }
    routing, step = summarise(*interleave(steps, options.rounds), "step")
    return {
        "name": name,
        "top_k": router.max_top_k,
        "routing_ms": routing["ms"],
        "step_ms": step["ms"],
        **{
            f"share{end}_%": round(100 * routing[f"ratio{end}"], 1) for end in ("", "_low", "_high")
        },
    }


def router_by_name(name, num_experts, options):
    router = routers.get(name, num_experts)
    config = router.get_config()
    if "top_k" not in config or name == "switch":
        return router
    return type(router).from_config({**config, "top_k": options.top_k})


class RoutingAlone(keras.layers.Layer):
    """The call of a router and its plan, as one number that depends on all they compute."""

    def __init__(self, router):
        super().__init__()
        self.router = router
        self.built = True

    def call(self, x, training=None):
        plan = self.router.plan(self.router(x, training=training))
        return sum(ops.sum(ops.cast(leaf, "float32")) for leaf in keras.tree.flatten(plan))

    def compute_output_shape(self, shape):
        return ()


if __name__ == "__main__":
    main()
