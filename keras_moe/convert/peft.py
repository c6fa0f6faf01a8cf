"""LoRA adapters of PEFT for the experts of a layer.

PEFT adapts a stack of kernels (E, D, H) by two matrices, `lora_A` (E r, D) and `lora_B` (H, r E).
Hugging Face keeps gate and up kernels in one stack, so there they share a `lora_A`. In files from
before Transformers 5 each kernel of each expert has factors of its own, (r, D) and (H, r).
"""

import collections
import math
import os
import re

import numpy as np

from keras_moe._internal.keras_internals import float_array
from keras_moe.convert.families import IN_FILES
from keras_moe.convert.hugging_face import layout_of
from keras_moe.convert.weights import read_config, tensor_reader
from keras_moe.layers import MixtureOfExperts

# The first weights in rules for kernels of experts.
_KERNELS = ("experts.gate_kernel", "experts.down_kernel")
_BASE = "base_model.model."


def from_peft(
    source: str | os.PathLike, mixture: MixtureOfExperts, layer: int, family: str
) -> MixtureOfExperts:
    """Give the experts of a MoE layer the low-rank factors of a PEFT adapter, and return the layer.

    Weights outside this block are not read. Experts without factors keep their kernels. A
    ValueError is raised if the layer is no block of the family, or the adapter has no factors of
    its experts, or others of the block, or of other shapes, or uses DoRA.

    Args:
        source: Path. Folder of an adapter, with `adapter_config.json` and `.safetensors` files.
        mixture, layer, family: As in `to_hugging_face`: a layer without LoRA, as it was adapted.

    Example:

    >>> keras_moe.convert.from_peft("adapter", mixture, 0, "mixtral")  # doctest: +SKIP
    """
    settings = read_config(source, "adapter_config.json")
    read, names = tensor_reader(source)
    bank = mixture.experts
    stacked, rules = _experts_of(mixture, layer, family)
    block, in_files = IN_FILES[family].layouts[0]
    block = block.format(layer=layer)
    # Kernels of single experts by the start of the names of their factors.
    single = {
        f"{_BASE}{block}{rule.theirs.format(expert=expert).removesuffix('weight')}": (rule, expert)
        for rule in in_files
        for expert in range(bank.num_experts if "{expert}" in rule.theirs else 0)
    }
    blocks = (_BASE + block, stacked.removesuffix("experts."))
    own = {name for name in names if name.startswith(blocks)}
    starts = {name.removesuffix("lora_A.weight") for name in own if name.endswith("lora_A.weight")}
    odd = own ^ {start + f"lora_{letter}.weight" for start in starts for letter in "AB"}
    is_stacked = {start.replace("base_layer.", "") for start in starts} == {stacked}
    if odd or settings.get("use_dora") or not (is_stacked or starts and starts <= {*single}):
        wanted = "An adapter must be of experts and nothing else of their block, without DoRA"
        received = f"{sorted(own)}, use_dora={settings.get('use_dora')}, layer={layer}"
        raise ValueError(f"{wanted}. Received: {received}")

    def expected(rule, parameter, copies=1):
        """The shapes of factors, and the rule with the rank and the scale that PEFT gives them."""

        def setting(pattern, default):
            for key, value in (settings.get(pattern) or {}).items():
                if re.match(rf"(.*\.)?({key})$", parameter.removeprefix(_BASE)):
                    return value
            return settings[default]

        rank = setting("rank_pattern", "r")
        scale = setting("alpha_pattern", "lora_alpha")
        scale /= math.sqrt(rank) if settings.get("use_rslora") else rank
        _, fan_in, fan_out = _projections(bank, rule)[0].shape
        shapes = (copies * rank, fan_in), (fan_out * len(rule.ours), copies * rank)
        return shapes, (rule, rank, scale)

    # Wrappers in each other do not say which kernel they adapt: its shape does.
    by_shape = dict(expected(rule, blocks[1] + rule.theirs, bank.num_experts) for rule in rules)
    # For each projection: experts, their A (e, D, r) and B (e, r, H), and the scale.
    found = collections.defaultdict(list)
    for start in sorted(starts):
        a, b = (read(f"{start}lora_{letter}.weight") for letter in "AB")
        experts = slice(None)
        if not is_stacked:
            rule, expert = single[start]
            experts = slice(expert, expert + 1)
            by_shape = dict([expected(rule._replace(transposed=False), start.removesuffix("."))])
        if (a.shape, b.shape) not in by_shape:
            fits = f"The factors of an adapter must have the shapes {[*by_shape]}"
            raise ValueError(f"{fits}. Received: {a.shape}, {b.shape} of {start}")
        rule, rank, scale = by_shape[a.shape, b.shape]
        a = a.reshape(-1, rank, a.shape[1]).swapaxes(1, 2)
        b = b.reshape(len(b), rank, -1).transpose(2, 1, 0)
        for projection, part in zip(_projections(bank, rule), rule.split(b)):
            found[projection].append((experts, a, part, scale))
    # The kernels of a bank have one rank and one scale: the last that was read.
    rank = max(a.shape[-1] for parts in found.values() for _, a, *_ in parts)
    bank.enable_lora(rank, rank * scale)
    for projection, parts in found.items():
        # Further columns of A begin at random, so that they can train.
        all_a, all_b = float_array(projection.lora_a), float_array(projection.lora_b)
        for experts, a, b, own_scale in parts:
            own_rank = a.shape[-1]
            all_a[experts, :, :own_rank], all_b[experts, :own_rank] = a, b * (own_scale / scale)
        projection.lora_a.assign(all_a)
        projection.lora_b.assign(all_b)
    return mixture


def to_peft(
    mixture: MixtureOfExperts, layer: int, family: str
) -> tuple[dict[str, np.ndarray], dict]:
    """The low-rank factors of the experts of a MoE layer as a PEFT adapter.

    Returns a dict of names to arrays, for a file `adapter_model.safetensors`; and a dict for
    `adapter_config.json`, which is the same for layers of one rank. Where the gate and up kernels
    have different factors `A`, the adapter has twice the rank.

    Args:
        mixture, layer, family: As in `to_hugging_face`: a layer whose experts have LoRA, else a
            ValueError is raised.

    Example:

    >>> arrays, config = keras_moe.convert.to_peft(mixture, 0, "mixtral")  # doctest: +SKIP
    """
    prefix, rules = _experts_of(mixture, layer, family)
    bank = mixture.experts
    if not bank.lora_enabled:
        raise ValueError(f"The experts must have LoRA. Received: `{bank.name}` without")
    factors = [_joined(_projections(bank, rule)) for rule in rules]
    rank = max(a.shape[2] for a, _ in factors)
    arrays, start = {}, prefix + "base_layer." * (len(rules) - 1)
    for rule, (a, b) in zip(rules, factors):
        more = rank - a.shape[2]
        a = np.pad(a, [(0, 0), (0, 0), (0, more)])
        b = rule.join([np.pad(each, [(0, 0), (0, more), (0, 0)]) for each in b])
        arrays[f"{start}lora_A.weight"] = np.reshape(a.swapaxes(1, 2), (-1, a.shape[1]))
        arrays[f"{start}lora_B.weight"] = np.reshape(b.transpose(2, 1, 0), (b.shape[2], -1))
        start = start.removesuffix("base_layer.")
    block = IN_FILES[family].layouts[-1][0].split(".")[-2]
    return arrays, {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": bank.lora_scale() * rank,
        "target_parameters": [f"{block}.{rule.theirs}" for rule in rules],
    }


def _experts_of(mixture, layer, family):
    """The prefix of PEFT's names for the experts of a model in memory, and rules for (D, H)."""
    prefix, rules, _ = layout_of(mixture, layer, family, -1)
    kernels = [rule._replace(transposed=False) for rule in rules if rule.ours[0] in _KERNELS]
    return f"{_BASE}{prefix}experts.", kernels


def _projections(bank, rule):
    names = (name.removeprefix("experts.").removesuffix("_kernel") for name in rule.ours)
    return [bank.projection(name) for name in names]


def _joined(projections):
    """One A (E, D, r') for all projections, and a B (E, r', H) for each."""
    a = [float_array(each.lora_a) for each in projections]
    b = [float_array(each.lora_b) for each in projections]
    if all(np.array_equal(each, a[0]) for each in a):
        return a[0], b
    empty = np.zeros_like(b[0])
    blocks = [[each if i == j else empty for j in range(len(b))] for i, each in enumerate(b)]
    return np.concatenate(a, axis=2), [np.concatenate(block, axis=1) for block in blocks]
