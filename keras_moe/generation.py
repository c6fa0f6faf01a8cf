"""Autoregressive sampling with a key-value cache.

Axes: B texts, L length of the longest prompt, V words of the vocabulary.
"""

import keras
import numpy as np
from keras import ops

from keras_moe._internal import Tensor
from keras_moe._internal.checks import check_integer, check_number, shortened
from keras_moe._internal.keras_internals import state_of_compilation
from keras_moe.layers.transformer_decoder_block import Decoding, TransformerDecoderBlock

# Tokens that are written between two updates of the progress bar, fewer if the random numbers for
# them would take more memory than so many.
TOKENS_AT_ONCE = 64
DRAWS_AT_ONCE = 2**22


def generate(
    model: keras.Model,
    prompts: list | Tensor,
    num_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    seed: int | None = None,
    verbose: str | int = "auto",
) -> list:
    """Continue prompts with a model of `layers.TransformerDecoderBlock`s.

    The loop is compiled once for each combination of number of prompts, longest prompt and number
    of tokens. On PyTorch it runs eagerly. Returns a list of B integer arrays: each prompt and its
    continuation, up to the stop token.

    Args:
        model: Keras model from token ids (B, length), of any length, to logits (B, length, V).
        prompts: List of lists of ids, or an integer array (B, L). Their lengths may differ.
        num_tokens: Integer. Tokens to write after each prompt, at most.
        temperature: Float. 0 takes the likeliest token, others sample by `logits / temperature`.
        top_k: Integer or None. Sample among the K likeliest tokens.
        top_p: Float or None. Sample among the fewest whose probabilities sum to at least P.
        stop_token: Integer or None. A text ends with this token.
        seed: Integer or None. Seed of the sampling.
        verbose: "auto", 0 or 1. Whether a progress bar is shown; "auto" shows it for long texts.

    Raises:
        ValueError: If an argument is out of its range, the model has no decoder blocks or one with
            cross-attention, or another layer depends on positions or on other tokens.

    Example:

    >>> block = keras_moe.layers.TransformerDecoderBlock(2, keras.layers.Dense(16))
    >>> layers = [keras.layers.Embedding(100, 16), block, keras.layers.Dense(100)]
    >>> model = keras.Sequential([keras.Input((None,), dtype="int32"), *layers])
    >>> [len(text) for text in keras_moe.generate(model, [[5, 6, 7], [8]], num_tokens=4)]
    [7, 5]

    References: Fan et al. 2018 (arXiv:1805.04833), section 5.4, for `top_k`; Holtzman et al. 2020
    (arXiv:1904.09751), section 3.1, for `top_p`.
    """
    num_tokens = check_integer("num_tokens", num_tokens)
    temperature = check_number("temperature", temperature)
    top_k = None if top_k is None else check_integer("top_k", top_k)
    top_p = None if top_p is None else check_number("top_p", top_p, above=0)
    if top_p is not None and top_p > 1:
        raise ValueError(f"`top_p` must be at most 1. Received: top_p={top_p}")
    is_limited = top_k is not None or top_p is not None
    if is_limited and not temperature:
        raise ValueError("`top_k` and `top_p` need a `temperature` above 0. Received: 0")
    stop_token = -1 if stop_token is None else check_integer("stop_token", stop_token, minimum=0)
    given, prompts = prompts, [np.asarray(ops.convert_to_numpy(prompt)) for prompt in prompts]
    are_ids = [each.ndim == 1 and each.size and each.dtype.kind in "iu" for each in prompts]
    if not prompts or not all(are_ids):
        rule = "`prompts` must be a list of lists of integers, each of at least one"
        raise ValueError(f"{rule}. Received: {shortened(given)}")
    parts = model._flatten_layers()
    crossed = [each.cross_attention for each in parts if isinstance(each, TransformerDecoderBlock)]
    if not crossed or any(crossed):
        rule = "`model` must have `layers.TransformerDecoderBlock`s, all without `cross_attention`"
        raise ValueError(f"{rule}. Received: {len(crossed)} blocks, {sum(crossed)} with it")
    shape = getattr(model, "input_shape", None)  # which a `Sequential` does not check
    is_fixed = isinstance(shape, tuple) and None not in shape[1:]
    if is_fixed and not isinstance(model, keras.Sequential):
        rule = '`model` must take texts of any length: `keras.Input((None,), dtype="int32")`'
        raise ValueError(f"{rule}. Received: a model of inputs {shape}")
    ids = np.concatenate(prompts)  # The ids in `text` are cut to 32 bits.
    if getattr(model, "output_shape", None):
        _check_ids(ids, model.output_shape[-1])
    start = max(map(len, prompts))
    text: np.ndarray = np.zeros((len(prompts), start + num_tokens), "int32")
    real: np.ndarray = np.zeros(text.shape, bool)
    for row, prompt in enumerate(prompts):
        # Padding goes in front, so that all texts continue at one position.
        text[row, start - len(prompt) : start] = prompt
        real[row, start - len(prompt) :] = True

    writer = _writer_of(model)
    state = writer.predict_on_batch({"ids": text[:, :start], "real": real[:, :start], "room": text})
    num_words = state["logits"].shape[-1]
    _check_ids(ids, num_words)
    if stop_token >= num_words:
        rule = f"`stop_token` must be an id from 0 to {num_words - 1}, as the model has scores"
        raise ValueError(f"{rule}. Received: stop_token={stop_token}")
    sums = np.sum(state["logits"], axis=-1)
    if temperature and np.all(state["logits"] >= 0) and np.allclose(sums, 1, atol=1e-3):
        raise ValueError("`model` must return logits. Received: probabilities, as of a softmax")
    state |= {"text": text, "stopped": np.zeros(len(text), bool), "position": np.int32(start)}
    rng = np.random.default_rng(seed)
    progress = keras.utils.Progbar(num_tokens, unit_name="token")
    shown = num_tokens > TOKENS_AT_ONCE if verbose == "auto" else verbose
    at_once = TOKENS_AT_ONCE
    if temperature:
        at_once = min(at_once, max(DRAWS_AT_ONCE // (len(text) * num_words), 1))
    while state["position"] < text.shape[1] and not np.all(state["stopped"]):
        inputs = {"state": state, "stop_token": np.int32(stop_token)}
        inputs["end"] = np.int32(min(state["position"] + at_once, text.shape[1]))
        if temperature:
            draws = rng.standard_exponential((at_once, len(text), num_words))
            inputs["noise"] = -np.log(draws.astype("float32"))
            inputs["temperature"] = np.float32(temperature)
        if is_limited:
            inputs["top_k"] = np.int32(top_k or num_words)
            inputs["top_p"] = np.float32(top_p or 1.0)
        state = writer.predict_on_batch(inputs)
        if not writer.was_compared:
            _compare_with_whole_text(writer, state, prompts)
            writer.was_compared = True
        if shown:
            progress.update(int(state["position"]) - start)
    texts = []
    for row, prompt in zip(state["text"], prompts):
        stops = np.flatnonzero(row[start:] == stop_token)
        end = start + stops[0] + 1 if len(stops) else state["position"]
        texts.append(row[start - len(prompt) : end])
    return texts


def _writer_of(model):
    """The model's writer, which holds compiled functions; a new one if these would be stale."""
    now = state_of_compilation(model)
    writer, before = vars(model).get("_text_writer", lambda: (None, []))()
    # A copied model has the writer of the first.
    if writer is None or writer.model is not model or [*map(id, now)] != [*map(id, before)]:
        writer = _Writer(model)
        # In a function: Keras would save and load an attribute that is a layer.
        vars(model)["_text_writer"] = lambda: (writer, now)
    return writer


def _check_ids(ids, num_words):
    if ids.min() < 0 or ids.max() >= num_words:
        rule = f"`prompts` must have ids from 0 to {num_words - 1}, as the model has scores"
        raise ValueError(f"{rule}. Received: ids from {ids.min()} to {ids.max()}")


class _Writer(keras.Model):
    """Reads prompts into caches; then writes tokens, from one state to the next."""

    def __init__(self, model):
        super().__init__(name="writer", dtype="float32", autocast=False)
        self.model = model
        self.was_compared = False
        self.built = True

    def call(self, inputs):
        if "state" in inputs:
            return self._write(**inputs)
        length = ops.shape(inputs["room"])[1]
        logits, caches = self._step(inputs["ids"], Decoding(0, inputs["real"], length))
        return {"logits": logits, "caches": caches}

    def _step(self, ids, decoding):
        with decoding:
            logits = self.model(ids, training=False)
        return ops.cast(logits[:, -1], "float32"), decoding.caches

    def _write(self, state, end, stop_token, noise=None, **sampling):
        begin = state["position"]

        def is_unfinished(state):
            unfinished = ops.logical_not(ops.all(state["stopped"]))
            return ops.logical_and(state["position"] < end, unfinished)

        def write(state):
            position, logits = state["position"], state["logits"]
            token = ops.argmax(logits, axis=-1)
            if noise is not None:
                of_token = ops.take(noise, position - begin, axis=0)
                token = _draw(logits, of_token, **sampling)
            token = ops.where(state["stopped"], stop_token, ops.cast(token, "int32"))[:, None]
            real = ops.ones_like(token, "bool")
            logits, caches = self._step(token, Decoding(position, real, caches=state["caches"]))
            return {
                "text": ops.slice_update(state["text"], (0, position), token),
                "stopped": ops.logical_or(state["stopped"], token[:, 0] == stop_token),
                "position": position + 1,
                "logits": logits,
                "caches": caches,
            }

        return ops.while_loop(is_unfinished, lambda state: (write(state),), (state,))[0]


def _draw(logits, noise, temperature, top_k=None, top_p=None):
    """Words (B,) from the softmax of logits (B, V), by Gumbel noise (B, V)."""
    if top_k is None:
        return ops.argmax(logits + temperature * noise, axis=-1)
    order = ops.argsort(-logits, axis=-1)
    logits = ops.take_along_axis(logits, order, axis=-1)
    is_among = ops.arange(logits.shape[-1], dtype="int32") < top_k
    probs = ops.softmax(ops.where(is_among, logits / temperature, -np.inf), axis=-1)
    is_among = ops.logical_and(is_among, ops.cumsum(probs, axis=-1) - probs < top_p)
    place = ops.argmax(ops.where(is_among, logits, -np.inf) + temperature * noise, axis=-1)
    return ops.take_along_axis(order, ops.expand_dims(place, -1), axis=-1)[:, 0]


def _compare_with_whole_text(writer, state, prompts):
    """Refuse a model whose logits differ between a whole text and single tokens."""
    row = max(range(len(prompts)), key=lambda row: len(prompts[row]))  # it has no padding
    whole = state["text"][row : row + 1, : state["position"]]
    inputs = {"ids": whole, "real": np.ones(whole.shape, bool), "room": whole}
    expected = writer.predict_on_batch(inputs)["logits"][0]
    difference = float(np.max(np.abs(state["logits"][row] - expected)))
    if difference > 0.05 * np.ptp(expected):
        rule = "Layers between decoder blocks must treat each position alone and alike"
        received = f"logits that differ by {difference:.2g} from the whole text's"
        raise ValueError(f"{rule}, unlike an embedding of positions. Received: {received}")
