"""What each router costs: its routing alone, and the share of it in the layer's training step.

    KERAS_BACKEND=jax python -m benchmarks.routers --experts 64

Routing is the call of the router and its plan, the step is that of a MoE layer with this router,
both forward and backward. A router has the K of `--top-k`, if it takes one and its name does not
say another.
"""

import keras
from keras import ops

from benchmarks.contestants import mixture_of, tokens
from benchmarks.measure import BACKEND, interleave, publish, summarise
from benchmarks.options import describe, parse, parser
from benchmarks.steps import compiled_step
from keras_moe import routers


def main(arguments=None):
    options = parser(__doc__, experts=[64])
    names = sorted(routers.BY_NAME)
    options.add_argument("--routers", nargs="+", default=names, choices=names)
    options = parse(options, arguments)
    rows = []
    for num_experts in options.experts:
        for num_tokens in options.tokens:
            inputs = tokens(num_tokens, options)
            for name in options.routers:
                row = race(router_by_name(name, num_experts, options), inputs, options)
                about = {"name": name, "experts": num_experts, "tokens": num_tokens}
                rows.append({**about, **row})
    return publish(f"routers-{BACKEND}", describe(options), options, rows)


def race(router, inputs, options):
    layer = mixture_of(router, options)
    steps = {
        name: compiled_step(contestant, inputs, jit=options.xla)
        for name, contestant in {"routing": RoutingAlone(router), "step": layer}.items()
    }
    routing, step = summarise(*interleave(steps, options.rounds), "step")
    return {
        "top_k": router.max_top_k,
        "routing_ms": routing["ms"],
        "step_ms": step["ms"],
        "share_%": round(100 * routing["ratio"], 1),
        "share_low_%": round(100 * routing["ratio_low"], 1),
        "share_high_%": round(100 * routing["ratio_high"], 1),
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
