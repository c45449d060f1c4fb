"""The PEFT tuner that puts MoE-LoRA layers into a model, and the look-ups that the other rooms use."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar, cast

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from driftlens.adapters.config import MoELoraConfig
from driftlens.adapters.gates import Gate
from driftlens.adapters.layer import MERGE_REFUSED, MoELoraLinear
from driftlens.errors import ConfigError, UnknownNameError, nearest_name

__all__ = ["MoELoraModel", "iter_sites", "load_balance_loss", "set_gate_temperature"]

# Wrappers of torch.compile, FSDP and activation checkpointing show up in module paths.
_WRAPPER_NAMES = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class MoELoraModel(BaseTuner):
    """Injects ``MoELoraLinear`` into the target modules of a model; made by ``peft.get_peft_model``."""

    prefix = "moe_lora_"
    tuner_layer_cls = MoELoraLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {  # type: ignore[misc]  # peft declares no ClassVar
        kind: list(names) for kind, names in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()
    }

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to every target module, as in PEFT.

        Raises:
            ConfigError: no module matches; the message lists the linear modules that exist.
        """
        config = cast(MoELoraConfig, self.peft_config[adapter_name])
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise ConfigError(_no_target_message(model, config)) from error

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        if cast(MoELoraConfig, peft_config).target_modules is None:
            kind = model_config.get("model_type")
            if kind not in self.target_module_mapping:
                raise ConfigError(
                    f"No default target_modules are known for model type {kind!r}: "
                    "name them in MoELoraConfig, for example target_modules=['q_proj', 'v_proj']."
                )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(MoELoraConfig, peft_config)
        if isinstance(target, MoELoraLinear):
            target.update_layer(adapter_name, config)
            return
        if not isinstance(target, nn.Linear):
            raise ConfigError(
                f"MoE-LoRA adapts torch.nn.Linear modules; {current_key!r} is a {type(target).__name__}. Leave it out "
                "of target_modules, or name it in exclude_modules. Of quantised bases those work whose modules are "
                "subclasses of torch.nn.Linear (bitsandbytes); load others unquantised."
            )
        self._replace_module(parent, target_name, MoELoraLinear(target, adapter_name, config), target)

    def _check_merge_allowed(self) -> None:
        raise ConfigError(MERGE_REFUSED)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT expects the adapter name in the last or second-last place; a gate may hold nested submodules.
        return re.sub(rf"(\.{cls.prefix}\w+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key)


def iter_sites(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, MoELoraLinear]]:
    """Yield every MoE-LoRA site of a model in module order.

    Args:
        model: a PEFT model, a model with injected adapters, or a wrapper (DDP, ``torch.compile``) of one.
        adapter: only sites that hold this adapter; None yields all sites.

    Yields:
        The module path inside the base model, for example ``"model.layers.20.mlp.down_proj"``, and the layer.

    Raises:
        UnknownNameError: the model has sites, but none with an adapter of that name.
    """
    root = next((module.model for module in model.modules() if isinstance(module, MoELoraModel)), model)
    known: set[str] = set()
    found = False
    for name, module in root.named_modules():
        if not isinstance(module, MoELoraLinear):
            continue
        if adapter is None or adapter in module.moe_lora_A:
            found = True
            yield _WRAPPER_NAMES.sub("", name), module
        known.update(module.moe_lora_A)
    if known and not found:
        raise UnknownNameError("adapter", str(adapter), known)


def set_gate_temperature(model: nn.Module, tau: float, adapter: str | None = None) -> None:
    """Set the gate temperature in the layers and in the configuration that ``save_pretrained`` writes.

    Args:
        model: a model with MoE-LoRA sites.
        tau: the new temperature, > 0.
        adapter: name of one adapter; None means all adapters.

    Raises:
        ConfigError: tau is not a number above 0.
        UnknownNameError: no site has an adapter of that name.
    """
    if not (math.isfinite(tau) and tau > 0):
        raise ConfigError(f"gate_temperature={tau!r} must be a number above 0.")
    for gate in _gates(model, adapter):
        gate.temperature = float(tau)
    for module in model.modules():
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, dict):
            for name, config in configs.items():
                if isinstance(config, MoELoraConfig) and adapter in (None, name):
                    config.gate_temperature = float(tau)


def load_balance_loss(model: nn.Module, adapter: str | None = None) -> Tensor | None:
    """Return ``load_balance_coef`` times the load-balance loss of the last training forward, a mean over sites.

    Call it once after each forward and add it to the loss. Every token counts, padding too. A forward that gradient
    checkpointing runs again overwrites the stored values and is not counted twice.

    Args:
        model: a model with MoE-LoRA sites.
        adapter: name of one adapter; None means all adapters.

    Returns:
        A scalar with gradient, or None if ``load_balance_coef`` is 0 everywhere.

    Raises:
        UnknownNameError: no site has an adapter of that name.
    """
    losses = [
        (gate.balance_coef * gate.balance_loss).float()
        for gate in _gates(model, adapter)
        if gate.balance_loss is not None
    ]
    return sum(losses[1:], losses[0]) / len(losses) if losses else None


def _gates(model: nn.Module, adapter: str | None) -> Iterator[Gate]:
    for _, layer in iter_sites(model, adapter):
        for name, gate in layer.moe_lora_gate.items():
            if adapter in (None, name):
                yield cast(Gate, gate)


def _no_target_message(model: nn.Module, config: MoELoraConfig) -> str:
    endings = sorted(
        {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    )
    asked = config.target_modules
    limits = [
        f"{setting}={getattr(config, setting)!r}"
        for setting in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        if getattr(config, setting) is not None
    ]
    text = f"No module of {type(model).__name__} matches target_modules={asked!r}"
    text += f" with {', '.join(limits)}." if limits else "."
    unknown = [name for name in asked if name not in endings] if isinstance(asked, list) else []
    guesses = [repr(guess) for name in unknown if (guess := nearest_name(name, endings))]
    if guesses:
        text += f" Did you mean {', '.join(guesses)}?"
    return f"{text} Linear modules of this model end in: {', '.join(endings) or 'none'}."
