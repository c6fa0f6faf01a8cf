"""Callbacks that make expert usage visible while a model trains."""

from keras_moe.callbacks.expert_health import ExpertHealth
from keras_moe.callbacks.expert_monitor import ExpertMonitor
from keras_moe.callbacks.router_loss_schedule import RouterLossSchedule

__all__ = ["ExpertHealth", "ExpertMonitor", "RouterLossSchedule"]
__dir__ = __all__.copy
