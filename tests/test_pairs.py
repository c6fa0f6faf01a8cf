"""Random pairs and triples of tools: after any of them a model does what a fresh copy of it does.

A model is called, changed and called again. Where a change left something behind, such as a
compiled function, it would differ from its copy, which is saved and loaded. The environment
variables are those of `test_combinations.py`.
"""

import contextlib
import copy
import pathlib
import pickle
import tempfile
import warnings
from typing import NamedTuple

import keras
import numpy as np
import pytest
from backends import BACKEND, QUICK_JIT, assert_close, saved_and_loaded
from hypothesis import strategies as st
from layer_checks import array
from test_combinations import (
    CHOOSING,
    IS_COMPILED,
    NAMES,
    SEED,
    TIMES,
    Case,
    check_draws,
    code,
    draw_bank,
    draw_router,
    pick_from,
)

import keras_moe
from keras_moe import inspection, layers, surgery

V, D, E, LENGTH = 11, 8, 4, 5
DEVICES = keras.distribution.list_devices() if BACKEND == "jax" else []
BANKS = ["feed-forward", "gated", "linear", "low-rank", "own", "zero", "layers"]


class Pair(NamedTuple):
    """A mixture as text, and what is done with a decoder around it."""

    layer: str
    uses: tuple  # names in `USES`: before the changes, and after each
    changes: tuple  # names in `CHANGES`
    compiles: bool  # whether the model is compiled again after each change
    scope: str = ""
    subclass: bool = False  # whether the model is a subclass of `keras.Model`
    policy: str = "float32"
    seed: int = 0
    mesh: str | None = None  # "1x4" splits experts over four devices

    program = Case.program


class Data(NamedTuple):
    """What a model is called with."""

    rng: np.random.Generator
    ids: np.ndarray
    targets: np.ndarray


@keras.saving.register_keras_serializable()
class Decoder(keras.Model):
    """What `keras.Sequential` computes, written as users write models of their own."""

    def __init__(self, parts, **kwargs):
        super().__init__(**kwargs)
        self.parts = parts

    def build(self, shape):
        for part in self.parts:
            part.build(shape)
            shape = part.compute_output_shape(shape)

    def call(self, inputs):
        for part in self.parts:
            inputs = part(inputs)
        return inputs

    def get_config(self):
        parts = [keras.saving.serialize_keras_object(part) for part in self.parts]
        return {**super().get_config(), "parts": parts}

    @classmethod
    def from_config(cls, config):
        parts = [keras.saving.deserialize_keras_object(part) for part in config.pop("parts")]
        return cls(parts, **config)


def make(pair):
    keras.utils.set_random_seed(pair.seed)
    rng = np.random.default_rng(pair.seed)
    with keras.RematScope("full") if "remat" in pair.scope else contextlib.nullcontext():
        moe = eval(pair.layer, dict(NAMES))
        block = layers.TransformerDecoderBlock(2, moe)
    parts = [keras.layers.Embedding(V, D), block, keras.layers.Dense(V)]
    if pair.subclass:
        model = Decoder(parts)
        model.build((None, None))
    else:
        model = keras.Sequential([keras.Input((None,), dtype="int32"), *parts])
    for variable in model.trainable_variables:
        variable.assign(array(variable) + 0.4 * rng.normal(size=variable.shape))
    ids = rng.integers(0, V, (4, LENGTH)).astype("int32")
    return model, moe, Data(rng, ids, np.roll(ids, -1, axis=1))


def compile_model(model, steps=None):
    model.compile(
        keras.optimizers.SGD(0.05, gradient_accumulation_steps=steps),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=QUICK_JIT,
        steps_per_execution=steps if steps and IS_COMPILED else 1,
    )


# Changes


def enable_lora(model, moe, data):
    if not hasattr(moe.experts, "enable_lora"):
        raise NotImplementedError
    moe.experts.enable_lora(2)
    for variable in moe.trainable_variables:
        if "_lora_" in variable.name:
            variable.assign(array(variable) + 0.3 * data.rng.normal(size=variable.shape))


def fit(model, moe, data):
    if model.trainable_variables:
        compile_model(model, steps=2)
        model.fit(data.ids, data.targets, batch_size=1, verbose=0)


def freeze(model, moe, data):
    part = (moe.router, moe.experts, moe)[data.rng.integers(3)]
    part.trainable = not part.trainable


def load(model, moe, data):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "other.weights.h5"
        model.save_weights(path)
        for variable in model.trainable_variables:
            variable.assign(array(variable) + 1)
        model.load_weights(path)


def surgeon(function, **arguments):
    def change(model, moe, data):
        given = {"data": [data.ids]} if function is surgery.merge_experts else {}
        function(model, **arguments, **given)

    return change


CHANGES = {
    "LoRA": enable_lora,
    "merge LoRA": lambda model, moe, data: keras_moe.merge_lora(model),
    "int8": lambda model, moe, data: moe.experts.quantize("int8"),
    "int4": lambda model, moe, data: moe.experts.quantize("int4"),
    "merge": surgeon(surgery.merge_experts, keep=3),
    "prune": lambda model, moe, data: surgery.prune_experts(
        model, by=data.rng.permutation(moe.router.num_experts).astype("float32"), keep=3
    ),
    "add": surgeon(surgery.add_experts, factor=2),
    "top k": surgeon(surgery.set_top_k, top_k=1),
    "freeze": freeze,
    "load": load,
    "fit": fit,
}
# Of these Keras's compiled functions learn only when the model is compiled again.
UNTOLD = {"LoRA", "int8", "int4", "freeze"}


# Uses: functions of a model that return arrays


def predict(model, data):
    return model.predict(data.ids, batch_size=2, verbose=0)


def evaluate(model, data):
    return model.evaluate(data.ids, data.targets, verbose=0)


def replay(model, data):
    """What a model predicts with the choices of its mixtures replayed."""
    recorded = inspection.record_routings(model, [data.ids])
    routings = {name: calls[0] for name, calls in recorded.items()}
    if not all(moe.router.replays_indices for moe in inspection.moe_layers(model).values()):
        return model.predict(data.ids, verbose=0)
    with inspection.replay_routings(model, routings):
        return model.predict(data.ids, batch_size=len(data.ids), verbose=0)


def record(model, data):
    ((routing,),) = inspection.record_routings(model, [data.ids]).values()
    return [routing.weights, routing.probs]


def count(model, data):
    (moe,) = inspection.moe_layers(model).values()
    before = moe.read_counts(evaluation=True)
    with inspection.count_in_evaluation(model):
        model.evaluate(data.ids, data.targets, verbose=0)
    return moe.read_counts(evaluation=True).since(before).assignments


def report(model, data):
    with tempfile.TemporaryDirectory() as folder:
        page = pathlib.Path(folder) / "page.html"
        keras_moe.report(model, data.ids, path=page)
        return np.array(page.stat().st_size > 1000)


def copied(function):
    def use(model, data):
        again = function(model)
        return array(again(data.ids))

    return use


def jacobian(model, data):
    """Derivatives of a sum by the embedding, which has few rows."""
    table = model.layers[0].embeddings
    if BACKEND == "tensorflow":
        import tensorflow as tf

        if model.layers[-1].compute_dtype == "bfloat16":
            return np.zeros(())  # That of Keras's own attention is NaN, by chance.
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(model(data.ids[:1])[:, :, :2], (0, 1))
        return tape.jacobian(value, table.value)
    if BACKEND == "jax":
        import jax

        trained = [variable.value for variable in model.trainable_variables]
        others = [variable.value for variable in model.non_trainable_variables]

        def function(trained):
            outputs = model.stateless_call(trained, others, data.ids[:1])[0]
            return outputs[:, :, :2].sum((0, 1))

        return jax.jacrev(function)(trained)[0] if trained else np.zeros(())
    import torch

    values = model(data.ids[:1])[:, :, :2].sum((0, 1))
    slopes = [torch.autograd.grad(each, [table.value], retain_graph=True)[0] for each in values]
    return torch.stack(slopes).detach()


def export(model, data):
    """What an exported program returns."""
    model(data.ids)  # Keras exports what was called.
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tempfile.TemporaryDirectory() as folder:
            model.export(folder, verbose=False)
            program = tf.saved_model.load(folder)
            return array(program.serve(data.ids))
    if BACKEND == "jax":
        import jax

        # A function of its own, as JAX keeps what it traced of a function.
        program = jax.export.export(jax.jit(lambda ids: model(ids)))(data.ids)
        return array(program.call(data.ids))
    import torch

    ids = torch.tensor(data.ids)
    return torch.export.export(model.eval(), (ids,), strict=False).module()(ids).detach()


def compiled(model, data):
    """What `torch.compile` makes of a model. Dynamo keeps what it traced from use to use."""
    import torch

    return torch.compile(model, backend="eager")(torch.tensor(data.ids)).detach()


def text(model, data):
    return keras_moe.generate(model, [data.ids[0, :3], data.ids[1, :2]], 3)


USES = {
    "predict": predict,
    "evaluate": evaluate,
    "generate": text,
    "replay": replay,
    "record": record,
    "count": count,
    "report": report,
    "deepcopy": copied(copy.deepcopy),
    "pickle": copied(lambda model: pickle.loads(pickle.dumps(model))),
    "jacobian": jacobian,
}
# These take seconds, and are drawn with other seeds than that of the suite.
SLOW_USES = {"export": export} | ({"torch.compile": compiled} if BACKEND == "torch" else {})


@contextlib.contextmanager
def split_experts():
    """A mesh of four devices. It does not split the batch, as pairs have batches of one."""
    mesh = keras.distribution.DeviceMesh((1, 4), ("batch", "experts"), DEVICES[:4])
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map[".*(up|gate|down)_kernel"] = ("experts", None, None)
    layout_map[".*(up|gate|down)_bias"] = ("experts", None)
    keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout_map))
    try:
        yield
    finally:
        keras.distribution.set_distribution(None)


@contextlib.contextmanager
def scope_of(pair):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(pair.policy)
    try:
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if pair.mesh:
                stack.enter_context(split_experts())
            if pair.scope == "autocast":
                import torch

                stack.enter_context(torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
            yield
    finally:
        keras.config.set_dtype_policy(before)


def check_pair(pair):
    """After each change every use gives what it gives of a copy that was saved and loaded."""
    functions = USES | SLOW_USES
    with scope_of(pair), tempfile.TemporaryDirectory() as folder:
        model, moe, data = make(pair)
        compile_model(model)
        for name in pair.uses:
            functions[name](model, data)
        for change in pair.changes:
            try:
                CHANGES[change](model, moe, data)
            except NotImplementedError:
                continue
            except ValueError as error:
                if "Received: " not in str(error):  # What cannot be combined says so.
                    raise
            if pair.compiles or change in UNTOLD:
                compile_model(model)
            experts = moe.experts
            is_quantized = any(each.dtype in ("int8", "uint8") for each in experts.weights)
            has_lora = any("_lora_" in each.name for each in moe.weights)
            is_rough = pair.policy != "float32" or pair.scope == "autocast"
            again = saved_and_loaded(model, pathlib.Path(folder))
            if has_lora and (is_quantized or is_rough):
                # A file has the sum of kernel and factors, which is rounded otherwise than these.
                if any(isinstance(each, keras.layers.Dense) for each in moe._flatten_layers()):
                    continue
                copy_weights(moe, *inspection.moe_layers(again).values())
            compile_model(again)
            for name in pair.uses:
                same(
                    name,
                    functions[name](model, data),
                    functions[name](again, data),
                    again,
                    is_rough,
                )


def copy_weights(moe, again):
    """Give a loaded mixture kernels and factors of LoRA each by itself."""
    for part, other in ((moe.experts, again.experts), (moe.router, again.router)):
        values = {variable.name: variable for variable in part.weights}
        for variable in other.weights:
            variable.assign(array(values[variable.name]))


def same(name, found, expected, again, is_rough):
    if name == "generate" and not is_rough:
        for one in found:  # Each word is the likeliest, or as good as that, in a whole pass.
            logits = array(again(np.resize(one, (1, len(one)))))[0, -4:-1].astype("float64")
            chosen = np.take_along_axis(logits, one[-3:, None], axis=-1)[:, 0]
            assert (logits.max(axis=-1) - chosen < 1e-4 * np.ptp(logits)).all()
        return
    if name == "generate":
        return
    flat = [[*map(array, keras.tree.flatten(each))] for each in (found, expected)]
    for one, other in zip(*flat, strict=True):
        scale = max(1.0, np.max(np.abs(other), initial=0))
        assert_close(one, other, scale, 3e-2 if is_rough else 3e-5)


@st.composite
def pairs(draw):
    pick = pick_from(draw)
    is_split = len(DEVICES) > 1
    banks = ["feed-forward", "gated", "linear"] if is_split else BANKS
    experts = draw_bank(pick, E, D, D, [pick(*banks)])
    router = draw_router(pick, E, False, CHOOSING)
    options = dict(capacity_factor=8.0 if pick(True, False, False) else None)
    scopes = ["", "", "remat"] + (["autocast"] if BACKEND == "torch" else [])
    few = 1 if IS_COMPILED else 2
    # Three experts cannot be split over four devices.
    changes = sorted(CHANGES.keys() - ({"prune", "merge"} if is_split else set()))
    uses = draw(st.permutations(sorted(USES)))[: few + 1]
    if SEED and not is_split and pick(*[False] * 7, True):
        uses[0] = pick(*sorted(SLOW_USES))
    return Pair(
        layer=str(code("layers.MixtureOfExperts", experts, router=router, **options)),
        scope=pick(*scopes),
        uses=tuple(uses),
        changes=tuple(pick(*changes) for _ in range(pick(1, few))),
        compiles=pick(True, False),
        subclass=pick(False, False, True),
        policy=pick("float32", "float32", "float32", "mixed_bfloat16"),
        seed=draw(st.integers(0, 2**16)),
        mesh="1x4" if is_split else None,
    )


@pytest.mark.backends("tensorflow", "jax", "torch")
def test_drawn_pairs():
    check_draws(check_pair, pairs(), TIMES * dict(torch=8, tensorflow=2, jax=1)[BACKEND])
