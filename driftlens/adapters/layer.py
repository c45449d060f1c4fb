"""The MoE-LoRA layer: all experts of a site in two stacked matrices, with a gate between them.

``y = base(h) + scaling * sum_e pi_e(h) B_e A_e h``. Expert e owns rows ``e*r .. (e+1)*r`` of A and the same columns
of B, so two matrix products serve all experts and nothing loops over them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from driftlens.adapters.config import MoELoraConfig
from driftlens.adapters.gates import GATES
from driftlens.errors import ConfigError

__all__ = ["Experts", "MoELoraLinear", "Pathways"]

MERGE_REFUSED = (
    "A MoE-LoRA adapter cannot be merged into the base weights: its update depends on the input through the gate, so "
    "no single weight matrix equals it. Keep the adapter beside the base model (save_pretrained stores it alone), or "
    "drop it with unload()."
)


class Pathways(nn.Module):
    """The stacked down-projection A of a site; its output is the pathway record.

    ``weight [E * r, d_in]``, drawn from N(0, init_std^2).
    """

    def __init__(self, d_in: int, config: MoELoraConfig) -> None:
        super().__init__()
        self.num_experts, self.r = config.num_experts, config.r
        self.weight = nn.Parameter(torch.empty(config.num_experts * config.r, d_in))
        nn.init.normal_(self.weight, std=config.init_std)

    def forward(self, h: Tensor) -> Tensor:
        """Return the activations ``A_e h``, ``[..., E, r]``, of the input ``h [..., d_in]``, before scaling."""
        z = linear(h, self.weight)
        return z.view(*z.shape[:-1], self.num_experts, self.r)

    def extra_repr(self) -> str:
        """Describe the module in the printed module tree."""
        return f"num_experts={self.num_experts}, r={self.r}, d_in={self.weight.shape[1]}"


class Experts(nn.Module):
    """The stacked up-projection B of a site: ``weight [d_out, E * r]``, starting at 0."""

    def __init__(self, d_out: int, config: MoELoraConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_out, config.num_experts * config.r))

    def forward(self, gated: Tensor) -> Tensor:
        """Return ``sum_e B_e gated_e``, ``[..., d_out]``, of ``gated [..., E, r]``."""
        return linear(gated.flatten(-2), self.weight)

    def extra_repr(self) -> str:
        """Describe the module in the printed module tree."""
        return f"pathways={self.weight.shape[1]}, d_out={self.weight.shape[0]}"


class MoELoraLinear(nn.Module, BaseTunerLayer):
    """A linear module with MoE-LoRA adapters beside it.

    For every adapter name there are three submodules, so that ordinary forward hooks see everything:
    ``moe_lora_A[name]`` (``Pathways``: h -> z ``[..., E, r]``), ``moe_lora_gate[name]`` (``Gate``: h, z -> float32
    weights ``[..., E]``) and ``moe_lora_B[name]`` (``Experts``). What enters ``moe_lora_B`` is
    ``scaling * pi_e * z_e``: the scaling rides on the smallest tensor. Several active adapters add up.

    Args:
        base_layer: the linear module that is adapted.
        adapter_name: name of the first adapter.
        config: its configuration.
    """

    adapter_layer_names = ("moe_lora_A", "moe_lora_gate", "moe_lora_B")
    other_param_names = ("num_experts", "r", "scaling", "moe_lora_dropout")

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: MoELoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.d_in, self.d_out = base_layer.in_features, base_layer.out_features
        self.num_experts: dict[str, int] = {}
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.moe_lora_dropout = nn.ModuleDict()
        self.moe_lora_A = nn.ModuleDict()
        self.moe_lora_gate = nn.ModuleDict()
        self.moe_lora_B = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MoELoraConfig) -> None:
        """Add, or replace, the adapter called ``adapter_name`` with fresh parameters."""
        self.num_experts[adapter_name] = config.num_experts
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.scaling
        self.moe_lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.moe_lora_A[adapter_name] = Pathways(self.d_in, config)
        self.moe_lora_gate[adapter_name] = GATES.get(config.gate)(self.d_in, config)
        self.moe_lora_B[adapter_name] = Experts(self.d_out, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapter_output(self, h: Tensor, adapter_name: str) -> Tensor:
        """Return what one adapter adds to the base output, ``[..., d_out]``, for the input ``h [..., d_in]``."""
        pathways = cast(Pathways, self.moe_lora_A[adapter_name])
        h = self._cast_input_dtype(h, pathways.weight.dtype)
        z: Tensor = pathways(self.moe_lora_dropout[adapter_name](h))
        weights = self.moe_lora_gate[adapter_name](h, z) * self.scaling[adapter_name]
        output: Tensor = self.moe_lora_B[adapter_name](z * weights.to(z.dtype).unsqueeze(-1))
        return output

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base output plus that of every active adapter, in the dtype of the base output."""
        result: Tensor = self.base_layer(h, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.moe_lora_A:
                result = result + self.adapter_output(h, name)
        return result.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge.

        Raises:
            ConfigError: always; the update depends on the input.
        """
        raise ConfigError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Do nothing: no adapter is ever merged."""
