"""Compiled programs as `benchmarks.ahead` reads them, and the bounds that follow."""

import argparse
import itertools
import math
import platform
import sys

import keras
import numpy as np
import pytest

from benchmarks import ahead, chips, contestants, gemma, measure, program, roofline, topologies
from benchmarks.products import Product, products

TPU, GPU = chips.CHIPS["v5e"], chips.CHIPS["h100"]
pytestmark = pytest.mark.backends("jax")
needs_libtpu = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="libtpu is for Linux alone"
)


def whole(*lines, others=""):
    """The text of a program with these instructions in its entry."""
    body = "".join(f"  {line}\n" for line in lines)
    return f"HloModule m\n\n{others}\nENTRY %main (a: f32[2]) -> f32[2] {{\n{body}}}\n"


def product(line, *operands):
    """The product of an instruction, after `operands` that are named %a, %b, ..."""
    named = (f"%{name} = {shape} parameter(0)" for name, shape in zip("abcdefg", operands))
    computations, entry = program.read(whole(*named, line))
    found = products(computations[entry].root, computations[entry], computations)
    return found[0] if found else None


def test_products_of_all_compilers():
    dot = "ROOT %p = f32[3,7,4] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}"
    expected = Product(2 * 3 * 7 * 4 * 5, "bf16", (3, 7, 4, 5), exact=False)
    assert product(dot, "bf16[3,7,5]", "bf16[3,5,4]") == expected
    # A TPU writes a batched product as a convolution over gaps, nearly all of whose taps are void.
    convolution = (
        "ROOT %p = bf16[3,7,4] convolution(%a, %b), window={size=3 stride=2 lhs_dilate=3}, "
        "dim_labels=0bf_0io->0bf, operand_precision={highest,highest}"
    )
    both = ("bf16[3,7,5]", "bf16[3,5,4]")
    assert product(convolution, *both) == expected._replace(exact=True)
    library = (
        'ROOT %p = (bf16[7,4], s8[99]) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
        'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}'
    )
    assert product(library, "f32[7,5]", "f32[5,4]") == Product(280, "f32", (7, 4, 5), False)


def test_a_program_of_the_real_compiler():
    import jax
    import jax.numpy as jnp

    def function(x, w):
        step = lambda _, x: jnp.tanh(x @ w)  # noqa: E731
        return jax.lax.fori_loop(0, 3, step, x).sum()

    def dynamic(x, w, trips):
        return jax.lax.fori_loop(0, trips, lambda _, x: x @ w, x)

    x, w = jax.ShapeDtypeStruct((32, 48), "float32"), jax.ShapeDtypeStruct((48, 48), "float32")
    done = roofline.work(jax.jit(function).lower(x, w).compile().as_text(), TPU)
    assert done.flops == 3 * 2 * 32 * 48 * 48 and done.loops == 0
    assert {product.dtype for product in done.products} == {"f32"}
    once = 4 * (32 * 48 + 48 * 48 + 32 * 48)
    assert 3 * once <= done.bytes <= 9 * once
    trips = jax.ShapeDtypeStruct((), "int32")
    text = jax.jit(dynamic).lower(x, w, trips).compile().as_text()
    done = roofline.work(text, GPU)
    assert (done.loops, done.flops, done.waits) == (1, 0, 1)


@needs_libtpu
@pytest.mark.usefixtures("programs_not_kept")
def test_a_step_is_compiled_for_a_tpu(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    twin, mixture = ahead.main(["--smoke"])["v5e"]
    assert (tmp_path / "ahead-v5e-smoke.json").exists()
    assert (twin["name"], mixture["name"]) == ("dense twin", "E=4")
    products = 3 * 2  # of two kernels, forward and twice backward
    assert twin["product_tflops"] == pytest.approx(products * 2 * 32 * 8 * 32 / 1e12)
    assert twin["dynamic_loops"] == 0 and twin["ratio"] == 1
    assert 0 < twin["bound_ms"] < mixture["bound_ms"]
    assert 0 < twin["kernels"] < mixture["kernels"]
    assert 0 < twin["traffic_gb"] < mixture["traffic_gb"] < 1e-3
    assert twin["float32_products"] == mixture["float32_products"] == 0
    assert mixture["dynamic_loops"] == 0


@needs_libtpu
@pytest.mark.usefixtures("programs_not_kept")
def test_a_layer_is_compiled_for_several_tpus(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    wide = ["--tokens", "1024", "--features", "256", "--hidden", "256"]  # worth an overlap
    (row,) = topologies.main(["--smoke", "--top-k", "2", "--overlap", *wide])
    keras.utils.clear_session()  # Keras's seeds are on the chips that are not there.
    assert (tmp_path / "topologies-smoke.json").exists()
    assert (row["name"], row["chips"], row["experts"]) == ("v5e:2x2", 4, 4)
    # Rows go to the chips of their experts; nothing is gathered.
    assert row["to_all_mb"] > 0 and row["gather_mb"] == 0
    # Products run while rows are on their way: of the shared expert, or of rows that have arrived.
    assert int(row["meanwhile"].split()[-1]) > 0


@needs_libtpu
@pytest.mark.usefixtures("programs_not_kept")
def test_gemma_is_compiled_for_several_tpus(monkeypatch, tmp_path):
    pytest.importorskip("keras_hub")
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    theirs, row = gemma.main(["--smoke", "--tokens", "128"])
    keras.utils.clear_session()  # Keras's seeds are on the chips that are not there.
    assert (tmp_path / "gemma-smoke.json").exists()
    assert (row["name"], row["tokens"], row["longest_remat"]) == ("keras_moe", 128, 128)
    assert 0 < row["weights_gb"] < row["remat_gb"]
    assert row["weights_gb"] == pytest.approx(theirs["weights_gb"], rel=0.1)  # both split experts
    (lora,) = gemma.main(["--smoke", "--tokens", "128", "--blocks", "keras_moe", "--lora-experts"])
    keras.utils.clear_session()
    assert row["weights_gb"] < lora["weights_gb"] < lora["remat_gb"]


def test_the_longest_sequence_lies_between_compiled_lengths():
    rows = [{"tokens": 128, "gb": 8.0}, {"tokens": 1024, "gb": 24.0}, {"tokens": 4096}]
    assert gemma.longest(rows, "gb") == 576
    assert gemma.longest([{"tokens": 128, "gb": 17.0}], "gb") == 0


@pytest.mark.parametrize("sizes", [[200, 0, 41], [0, 0, 0]])
@pytest.mark.parametrize("dtype, depth, width", [("float32", 4200, 20), ("bfloat16", 3, 1100)])
def test_products_on_a_tpu_do_not_read_what_is_no_row_of_the_group(dtype, sizes, depth, width):
    """Tiles that groups share, tiles past the end of each axis, and rows after the last group."""
    import jax.numpy as jnp

    from keras_moe.backend import jax_tpu

    rng = np.random.default_rng(0)
    num_rows, served = 300, sum(sizes)
    left, right = rng.standard_normal((300, depth)), rng.standard_normal((300, width))
    kernels = rng.standard_normal((3, depth, width)).astype("float32")
    left[served:] = right[served:] = np.nan
    left, right = jnp.asarray(left, dtype), jnp.asarray(right, dtype)
    outputs = jax_tpu.product(left, kernels, np.int32(sizes), transposed=False, interpret=True)
    sums = jax_tpu.outer(left, right, np.int32(sizes), dtype="float32", interpret=True)
    assert outputs.shape == (num_rows, width) and outputs.dtype == left.dtype
    ends = np.cumsum([0, *sizes])
    left, right = np.array(left, "float64"), np.array(right, "float64")
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype] * depth**0.5
    for expert, group in enumerate(map(slice, ends[:-1], ends[1:])):
        used = np.array(jnp.asarray(kernels[expert], dtype), "float64")
        np.testing.assert_allclose(
            np.array(outputs[group], "float64"), left[group] @ used, atol=tolerance, rtol=tolerance
        )
        np.testing.assert_allclose(sums[expert], left[group].T @ right[group], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_kernels_whose_axes_are_swapped_on_a_tpu(transposed):
    from keras_moe.backend import jax_tpu

    rng = np.random.default_rng(0)
    kernels = rng.standard_normal((2, 128, 24)).astype("float32")
    rows = rng.standard_normal((16, 24 if transposed else 128)).astype("float32")
    sizes = np.array([5, 11], "int32")
    outputs = jax_tpu.product(rows, kernels, sizes, transposed=transposed, interpret=True)
    used = kernels.swapaxes(1, 2) if transposed else kernels
    expected = np.concatenate([rows[:5] @ used[0], rows[5:] @ used[1]])
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


@needs_libtpu
@pytest.mark.usefixtures("programs_not_kept")
def test_no_kernel_is_copied_for_a_product():
    import jax

    from keras_moe.backend import jax_tpu

    on_chip = chips.sharding("v5e")
    shapes = (("bfloat16", (64, 256)), ("bfloat16", (4, 256, 72)), ("int32", (4,)))
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=on_chip) for dtype, shape in shapes]
    compiled = jax.jit(lambda *each: jax_tpu.product(*each, transposed=False)).lower(*arrays)
    computations, entry = program.read(compiled.compile().as_text())
    # Those to fast memory, "copy-start", keep the layout.
    copied = [each for each in computations[entry].values() if each.opcode == "copy"]
    assert not any(math.prod(array.shape) == 4 * 256 * 72 for e in copied for array in e.results)


TPUS = [name for name, chip in chips.CHIPS.items() if chip.platform == "tpu"]

# T, D, H, E, K: odd widths, widths that no tile divides, a wide network, fewer rows than experts.
SHAPES = (
    (1, 16, 24, 4, 2),
    (7, 3, 5, 2, 1),
    (33, 48, 96, 8, 2),
    (100, 130, 70, 5, 3),
    (257, 384, 1000, 16, 2),
    (16, 1024, 4096, 64, 2),
    (1000, 200, 14336, 3, 1),
)
# A policy, whether gated, a capacity factor.
VARIANTS = tuple(itertools.product(("float32", "mixed_bfloat16"), (False, True), (None, 1.25)))


# Every chip meets two cases; together they meet every shape and every combination of dtype, gate
# and capacity.
@needs_libtpu
@pytest.mark.usefixtures("programs_not_kept")
@pytest.mark.parametrize(
    "chip, shape, variant",
    [
        (chip, SHAPES[place % len(SHAPES)], VARIANTS[3 * place % len(VARIANTS)])
        for number, chip in enumerate(TPUS)
        for place in (3 * number, 3 * number + 1)
    ],
)
def test_a_training_step_compiles(chip, shape, variant):
    (num_tokens, features, hidden, num_experts, top_k), (policy, gated, factor) = shape, variant
    options = argparse.Namespace(
        tokens=[num_tokens],
        features=features,
        hidden=hidden,
        top_k=top_k,
        gated=gated,
        activation="silu" if gated else "gelu",
    )

    def build():
        router = contestants.skewed_router(num_experts, options)
        return contestants.mixture_of(router, options, capacity_factor=factor)

    keras.config.set_dtype_policy(policy)
    chips.compile_step(build, options, chips.sharding(chip))
