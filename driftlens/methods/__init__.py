"""Continual-learning methods, one file each, in one registry."""

from driftlens.methods.base import METHODS, AdapterOptions, Method, MethodOptions, TaskContext, create_method
from driftlens.methods.moe_lora import MoELora, MoELoraTopK, SequentialLora
from driftlens.methods.pass_moe import PassMoE, PassMoEOptions

__all__ = [
    "METHODS",
    "AdapterOptions",
    "Method",
    "MethodOptions",
    "MoELora",
    "MoELoraTopK",
    "PassMoE",
    "PassMoEOptions",
    "SequentialLora",
    "TaskContext",
    "create_method",
]
