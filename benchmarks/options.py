"""Command lines of the programs: shared options, each program with defaults of its own."""

import argparse

import keras

_SMOKE = {
    "tokens": [32],
    "features": 8,
    "hidden": 16,
    "experts": [4],
    "rounds": 2,
    "tag": "-smoke",
}


def parser(description, **defaults):
    """A parser with the options all programs have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192], help="T")
    parser.add_argument("--features", type=int, default=256, help="D")
    parser.add_argument("--hidden", type=int, default=1024, help="H")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64], help="E")
    parser.add_argument("--top-k", type=int, default=2, help="K")
    parser.add_argument("--gated", action="store_true", help="gated experts and twin")
    parser.add_argument("--activation", default=None, help="default: gelu, or silu when gated")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--no-xla", action="store_true", help="TensorFlow graph without XLA")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tag", default="", help="ending of the name of the JSON file")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, only to see it run")
    parser.set_defaults(**defaults)
    return parser


def parse(parser, arguments, **smoke):
    """The options, with the seed and the dtype policy set.

    `smoke` holds what `--smoke` changes besides the shared options.
    """
    if parser.parse_known_args(arguments)[0].smoke:
        parser.set_defaults(**{**_SMOKE, **smoke})
    options = parser.parse_args(arguments)
    options.activation = options.activation or ("silu" if options.gated else "gelu")
    options.xla = keras.backend.backend() != "torch" and not options.no_xla
    keras.utils.set_random_seed(0)
    mixed = options.dtype != "float32"
    keras.config.set_dtype_policy(f"mixed_{options.dtype}" if mixed else "float32")
    return options


def describe(options):
    return (
        f"{keras.backend.backend()}, D={options.features} H={options.hidden} K={options.top_k} "
        f"{options.dtype}{' gated' if options.gated else ''}"
        f"{' without XLA' if options.no_xla else ''}"
    )
