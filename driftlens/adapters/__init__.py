"""MoE-LoRA as a PEFT method: importing this package makes ``peft`` know the type ``"MOE_LORA"``.

Example::

    from peft import get_peft_model
    from driftlens.adapters import MoELoraConfig

    model = get_peft_model(base, MoELoraConfig(num_experts=6, r=8, gate="energy", target_modules=["down_proj"]))
"""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from driftlens.adapters.config import MoELoraConfig, MoELoraType
from driftlens.adapters.gates import GATES, EnergyGate, Gate, SoftmaxGate, TopKGate
from driftlens.adapters.layer import Experts, MoELoraLinear, Pathways
from driftlens.adapters.model import MoELoraModel, iter_sites, load_balance_loss, set_gate_temperature
from driftlens.errors import ConfigError

__all__ = [
    "GATES",
    "EnergyGate",
    "Experts",
    "Gate",
    "MoELoraConfig",
    "MoELoraLinear",
    "MoELoraModel",
    "MoELoraType",
    "Pathways",
    "SoftmaxGate",
    "TopKGate",
    "iter_sites",
    "load_balance_loss",
    "register_with_peft",
    "set_gate_temperature",
]


def register_with_peft() -> None:
    """Enter MoE-LoRA in PEFT's tables of configurations, tuners and prefixes; calling it again changes nothing.

    ``peft.utils.register_peft_method`` accepts only names of PEFT's own enum, so the tables are filled here.

    Raises:
        ConfigError: another package (or PEFT itself) already owns the name.
    """
    tables: list[tuple[dict[Any, Any], object]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, MoELoraConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, MoELoraModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, MoELoraModel.prefix),
    ]
    for table, item in tables:
        owner = table.setdefault(MoELoraType.MOE_LORA, item)
        if owner is not item and owner != item:
            raise ConfigError(
                f"PEFT type {MoELoraType.MOE_LORA.value!r} is already registered for {owner!r}: driftlens.adapters "
                "cannot be used beside that package in one process; import one of the two only."
            )


register_with_peft()
