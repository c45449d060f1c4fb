"""Configuration of a MoE-LoRA adapter, stored by PEFT as ``adapter_config.json``."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from driftlens.adapters.gates import GATES
from driftlens.errors import ConfigError, UnknownNameError

__all__ = ["MoELoraConfig", "MoELoraType"]


class MoELoraType(str, enum.Enum):  # noqa: UP042  # same kind as peft's, which prints names as 'Enum.NAME'
    """Our member beside PEFT's own ``PeftType``, an enum that cannot be extended."""

    MOE_LORA = "MOE_LORA"


@dataclass
class MoELoraConfig(PeftConfig):
    """Settings of one MoE-LoRA adapter.

    The layer computes ``base(h) + scaling * sum_e pi_e(h) B_e A_e h`` with ``scaling = lora_alpha / r``.

    Args:
        num_experts: experts E per site, >= 1.
        r: rank of ONE expert, >= 1; a site holds E * r pathways.
        lora_alpha: numerator of the scaling, > 0.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead.
        lora_dropout: dropout in 0..1 on the input of A, in training only; the gate sees the undropped input.
        gate: name of a registered gate: ``"softmax"``, ``"topk"``, ``"energy"``, ...
        top_k: experts per token of the ``topk`` gate, 1..E.
        gate_temperature: tau > 0, divides the gate's scores.
        router_layernorm: normalise the router's input (LayerNorm without learned parameters).
        router_noise: standard deviation >= 0 of Gaussian noise on the scores, in training only.
        load_balance_coef: weight >= 0 of ``driftlens.adapters.load_balance_loss``.
        init_std: A ~ N(0, init_std^2), > 0; B starts at 0.
        target_modules: names or name endings of the linear modules to adapt (list), a regular expression, or
            ``"all-linear"``; None takes PEFT's choice for the architecture.
        exclude_modules: names, name endings or a regular expression of modules to leave out.
        layers_to_transform: index or indices of the layers to adapt; needs ``target_modules`` as a list.
        layers_pattern: name of the list of layers, needed only if it cannot be told from the module names.
        modules_to_save: further modules to train in full and to save.
        bias: only ``"none"``.

    Raises:
        ConfigError: settings that cannot work; all of them are listed.
        UnknownNameError: the gate is not registered (and nothing else is wrong).
    """

    num_experts: int = 4
    r: int = 8
    lora_alpha: float = 16
    use_rslora: bool = False
    lora_dropout: float = 0.0
    gate: str = "softmax"
    top_k: int = 2
    gate_temperature: float = 1.0
    router_layernorm: bool = False
    router_noise: float = 0.0
    load_balance_coef: float = 0.0
    init_std: float = 0.01
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # peft annotates its functions only in part
        self.peft_type = MoELoraType.MOE_LORA
        # Lists, not sets as in PEFT's own configurations: the saved file must not depend on Python's string hashes.
        self.target_modules = _names(self.target_modules)
        self.exclude_modules = _names(self.exclude_modules)
        problems = [*self._number_problems(), *self._target_problems()]
        try:
            problems += GATES.get(self.gate).problems(self)
        except UnknownNameError as error:
            if not problems:
                raise
            problems.append(str(error))
        if problems:
            raise ConfigError("MoELoraConfig cannot be used:\n" + "\n".join(f"  - {text}" for text in problems))

    @property
    def scaling(self) -> float:
        """The factor on the adapter's output: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dictionary with sorted lists of names."""
        values: dict[str, Any] = super().to_dict()
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    def _number_problems(self) -> list[str]:
        checks: list[tuple[str, bool, str]] = [
            ("num_experts", _is_int(self.num_experts) and self.num_experts >= 1, "a whole number of at least 1"),
            ("r", _is_int(self.r) and self.r >= 1, "a whole number of at least 1 (the rank of one expert)"),
            ("lora_alpha", _is_real(self.lora_alpha) and self.lora_alpha > 0, "a number above 0"),
            ("lora_dropout", _is_real(self.lora_dropout) and 0 <= self.lora_dropout < 1, "in 0..1, 1 excluded"),
            ("top_k", _is_int(self.top_k) and self.top_k >= 1, "a whole number of at least 1"),
            ("gate_temperature", _is_real(self.gate_temperature) and self.gate_temperature > 0, "a number above 0"),
            ("router_noise", _is_real(self.router_noise) and self.router_noise >= 0, "0 or above"),
            ("load_balance_coef", _is_real(self.load_balance_coef) and self.load_balance_coef >= 0, "0 or above"),
            ("init_std", _is_real(self.init_std) and self.init_std > 0, "a number above 0"),
            ("bias", self.bias == "none", "'none': MoE-LoRA trains no biases"),
        ]
        return [f"{name}={getattr(self, name)!r} must be {allowed}." for name, good, allowed in checks if not good]

    def _target_problems(self) -> list[str]:
        problems = []
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            problems.append(
                f"layers_to_transform={self.layers_to_transform!r} needs target_modules as a list of names, for "
                f"example ['gate_proj', 'up_proj', 'down_proj'], not the string {self.target_modules!r}; or name the "
                "layers in the regular expression and leave layers_to_transform out."
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            problems.append(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform: "
                "name the layers there, or leave layers_pattern out."
            )
        return problems


def _names(value: Any) -> Any:
    """Return collections of names as a sorted list without repeats; leave anything else as it is."""
    return sorted(set(value)) if isinstance(value, list | set | tuple | frozenset) else value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
