"""Public names of earlier versions: each warns once, and still works."""

import functools
import sys
import warnings

import keras

# Former names, and present expressions for them. Modules such as `ops.routing` are private.
FORMER = {
    "convert.save_as_mixtral": "convert.save_to_transformers",
    "convert.sparsify": "convert.use_sparse_experts",
    "inspection.LayerDescription": "inspection.LayerSummary",
    "inspection.describe": "inspection.summarize",
    "inspection.health.judge_heavy_losses": (
        "lambda losses, weights, total, values=None: None if total is None or values is None "
        "else health.heavy_losses(losses, weights, total, values)"
    ),
    "inspection.health.judge_weak_loss": "health.weak_loss",
    "inspection.summary": "summary",
    "losses.BY_NAME": "losses.IDENTIFIERS",
    "metrics.DeadExperts": "functools.partial(metrics.UsageMetric, metrics.dead_experts)",
    "metrics.ExpertShare": "functools.partial(metrics.UsageMetric, metrics.expert_share)",
    "metrics.LoadEntropy": "functools.partial(metrics.UsageMetric, metrics.load_entropy)",
    "metrics.LoadImbalance": "functools.partial(metrics.UsageMetric, metrics.load_imbalance)",
    "metrics.active_fraction": "lambda counts: 1 - metrics.dead_experts(counts) / len(counts)",
    "metrics.dead_experts_over_window": (
        "lambda counts, window=100: (len(counts) >= window) * sum(map(all, zip(*("
        "metrics.is_dead(batch) for batch in counts[-window:]))))"
    ),
    "metrics.dropped_fraction": (
        "lambda dropped, counts: dropped / keras.ops.maximum(keras.ops.sum(keras.ops.array("
        "counts, 'float32')), 1.0)"
    ),
    "metrics.load_variation": (
        "lambda counts: keras.ops.std(metrics.expert_share(counts)) * len(counts)"
    ),
    "metrics.max_share": "lambda counts: keras.ops.max(metrics.expert_share(counts))",
    "metrics.router_confidence": (
        "lambda routing: ops.balance.masked_mean(keras.ops.sort(routing.probs)[:, -1], "
        "routing.mask)"
    ),
    "metrics.utilization_quantiles": (
        "lambda counts, quantiles=(0, 0.25, 0.5, 0.75, 1): keras.ops.quantile("
        "metrics.expert_share(counts) * len(counts), keras.ops.array(quantiles, 'float32'))"
    ),
    "ops.agreement": "ops.balance.load_importance_product",
    "ops.balanced_assignment": "ops.transport.balanced_assignment",
    "ops.clean_logits": "ops.routing.clean_logits",
    "ops.expert_choice_routing": "ops.expert_choice.expert_choice_routing",
    "ops.group_limited_scores": "ops.selection.group_limited_scores",
    "ops.load_balance": "losses.LoadBalance(1.0)",
    "ops.noisy_load": "ops.balance.noisy_load",
    "ops.plan_expert_choice": "ops.expert_choice.plan_expert_choice",
    "ops.plan_soft": "lambda routing: ops.SoftPlan(*routing.details)",
    "ops.router_entropy": "ops.balance.router_entropy",
    "ops.router_z": "losses.RouterZ(1.0)",
    "ops.sequence_load_balance": "losses.SequenceLoadBalance(1.0)",
    "ops.sinkhorn_plan": "ops.transport.sinkhorn_plan",
    "ops.soft_routing": "ops.soft.soft_routing",
    "ops.squared_importance_variation": "losses.ImportanceVariation(1.0)",
    "ops.squared_load_variation": "losses.LoadVariation(1.0)",
    "ops.take_scores": "ops.selection.take_scores",
    "routers.BY_NAME": "routers.IDENTIFIERS",
    "routers.ForcedRouter": "routers.fixed.ForcedRouter",
    "routers.SelectionRouter": "routers.TopKRouter",
}


def former_names(module):
    """The `__getattr__` of a public module: a former name warns at its first use."""

    def __getattr__(name):
        former = f"{module}.{name}".removeprefix("keras_moe.")
        if former not in FORMER:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"`{former}` is deprecated. Use `{FORMER[former]}`."
        warnings.warn(message, FutureWarning, stacklevel=2)
        names = {**vars(sys.modules["keras_moe"]), "keras": keras, "functools": functools}
        value = eval(FORMER[former], names)
        setattr(sys.modules[module], name, value)
        return value

    return __getattr__
