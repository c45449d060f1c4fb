"""What a continual-learning method is to DriftLens: options, an adapter, and the phases of a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from driftlens.adapters import MoELoraConfig
from driftlens.registry import Registry

__all__ = ["METHODS", "AdapterOptions", "Method", "MethodOptions", "TaskContext", "create_method"]


class AdapterOptions(BaseModel):
    """The adapter as the user configures it; a method turns it into a :class:`MoELoraConfig`.

    ``r`` is the rank of one expert. ``layers`` lists the adapted decoder layers (None: all).
    """

    model_config = ConfigDict(extra="forbid")

    num_experts: int = 4
    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    top_k: int = 2
    gate_temperature: float = 1.0
    router_layernorm: bool = False
    router_noise: float = 0.0
    load_balance_coef: float = 0.0
    init_std: float = 0.01
    target_modules: list[str] = ["gate_proj", "up_proj", "down_proj"]
    layers: list[int] | None = None


class MethodOptions(BaseModel):
    """Base of every method's switches; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class TaskContext:
    """What a method may see at a task boundary.

    Attributes:
        index: 1-based position of the task in the stream.
        name: the task's name.
        replay: callable that runs the model in evaluation mode over the task's training data once and yields
            each batch's token mask [batch, n] *before* that batch's forward; hooks set by the method fire meanwhile.
    """

    index: int
    name: str
    replay: Callable[[], Iterator[Tensor]]


class Method:
    """One continual-learning method. Subclasses override the phases they need.

    Phases, in order: :meth:`adapter_config` once; then per task :meth:`begin_task`; per step
    :meth:`begin_step`, forward inside :meth:`observing`, :meth:`penalty`; and :meth:`end_task`.
    :meth:`state_dict` is stored with every checkpoint and restored on resume.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[MethodOptions]] = MethodOptions
    gate: ClassVar[str] = "softmax"

    def __init__(self, options: MethodOptions) -> None:
        self.options = options

    def adapter_config(self, adapter: AdapterOptions) -> MoELoraConfig:
        """Return the PEFT configuration of this method's adapter."""
        values = adapter.model_dump()
        layers = values.pop("layers")
        return MoELoraConfig(gate=self.gate, layers_to_transform=layers, task_type="CAUSAL_LM", **values)

    def begin_task(self, model: nn.Module, task: TaskContext) -> None:
        """Prepare for a task (the model holds the previous task's weights)."""

    def begin_step(self, model: nn.Module, progress: float) -> None:
        """Prepare for an optimizer step; ``progress`` is the share of the task's steps already done, 0..1."""

    def observing(self, model: nn.Module, token_mask: Tensor) -> AbstractContextManager[None]:
        """Return the context of one training forward; ``token_mask`` [batch, n] is 1 on real tokens."""
        return nullcontext()

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return what is added to the task loss (a scalar), or None."""
        return None

    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        """Consolidate after a task's last step, before the checkpoint is written."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that this method carries from task to task."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Restore what :meth:`state_dict` returned."""


METHODS: Registry[type[Method]] = Registry("method", "driftlens.methods")


def create_method(name: str, options: dict[str, object]) -> Method:
    """Return the method called ``name`` with its validated options.

    Raises:
        UnknownNameError: no such method.
        pydantic.ValidationError: an option that the method does not have, or of the wrong type.
    """
    cls = METHODS.get(name)
    return cls(cls.Options(**options))
