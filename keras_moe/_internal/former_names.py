"""Public names of earlier versions: each warns once, and still works."""

import importlib
import sys
import warnings

# Former names, and the present ones. Modules such as `ops.routing` are private.
FORMER = {
    "convert.save_as_mixtral": "convert.save_to_transformers",
    "convert.sparsify": "convert.use_sparse_experts",
    "inspection.LayerDescription": "inspection.LayerSummary",
    "inspection.describe": "inspection.summarize",
    "inspection.health.judge_weak_loss": "inspection.health.weak_loss",
    "inspection.summary": "inspection.summaries.summary",
    "losses.BY_NAME": "losses.IDENTIFIERS",
    "ops.agreement": "ops.balance.load_importance_product",
    "ops.balanced_assignment": "ops.transport.balanced_assignment",
    "ops.clean_logits": "ops.routing.clean_logits",
    "ops.expert_choice_routing": "ops.expert_choice.expert_choice_routing",
    "ops.group_limited_scores": "ops.selection.group_limited_scores",
    "ops.noisy_load": "ops.balance.noisy_load",
    "ops.plan_expert_choice": "ops.expert_choice.plan_expert_choice",
    "ops.router_entropy": "ops.balance.router_entropy",
    "ops.sinkhorn_plan": "ops.transport.sinkhorn_plan",
    "ops.soft_routing": "ops.soft.soft_routing",
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
        place, _, present = FORMER[former].rpartition(".")
        value = getattr(importlib.import_module(f"keras_moe.{place}"), present)
        setattr(sys.modules[module], name, value)
        return value

    return __getattr__
