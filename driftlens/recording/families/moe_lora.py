"""Our own MoE-LoRA layers: the hook on the gate sees its inputs h and z and its output pi."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from driftlens.adapters import Gate, MoELoraLinear, iter_sites
from driftlens.errors import SiteError
from driftlens.recording.hooks import HookPoint
from driftlens.recording.sites import Site, SiteWeights, layer_index
from driftlens.store import SiteInfo

__all__ = ["MoELoraFamily"]


class MoELoraFamily:
    """Our own MoE-LoRA layers: the hook on the gate sees its inputs h and z and its output pi."""

    def find(self, model: nn.Module) -> Iterator[Site]:
        """Yield the MoE-LoRA sites whose adapter is active.

        Raises:
            SiteError: several adapters are active at one site; their outputs add up and have no common gate.
        """
        for name, layer in iter_sites(model):
            if layer.disable_adapters:
                continue
            active = [adapter for adapter in layer.active_adapters if adapter in layer.moe_lora_A]
            if len(active) > 1:
                raise SiteError(
                    f"Site {name} has {len(active)} active adapters ({', '.join(active)}); a recording is of one "
                    "adapter. Choose it with model.set_adapter(...)."
                )
            if active:
                yield _moe_lora_site(name, layer, active[0])


def _moe_lora_site(name: str, layer: MoELoraLinear, adapter: str) -> Site:
    gate = cast(Gate, layer.moe_lora_gate[adapter])
    num_experts, rank = layer.num_experts[adapter], layer.r[adapter]

    def read(part: str, args: tuple[Any, ...], output: Any) -> Mapping[str, Tensor]:
        if part == "base":
            return {"base_norm": torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32)}
        return {"gate": output, "pathway": args[1], "input": args[0]}

    def respond(h: Tensor) -> Mapping[str, Tensor]:
        # past the modules' hooks: an answer is not a firing
        h = h.to(cast(Tensor, layer.moe_lora_A[adapter].weight).dtype)
        z = layer.moe_lora_A[adapter].forward(h)
        return {"gate": gate.forward(h, z), "pathway": z}

    def weights() -> SiteWeights:
        a, b = (cast(Tensor, part[adapter].weight).detach() for part in (layer.moe_lora_A, layer.moe_lora_B))
        router = getattr(gate, "weight", None)
        return SiteWeights(
            a=a.reshape(num_experts, rank, -1),
            # expert e owns columns e*r .. (e+1)*r of B
            b=b.reshape(-1, num_experts, rank).permute(1, 0, 2),
            router=None if router is None else router.detach(),
        )

    info = SiteInfo(
        name=name,
        layer=layer_index(name),
        kind=name.rsplit(".", 1)[-1],
        num_experts=num_experts,
        rank=rank,
        d_in=layer.d_in,
        d_out=layer.d_out,
        scaling=layer.scaling[adapter],
        gate=gate.kind,
        top_k=int(getattr(gate, "top_k", 0)),
    )
    points = (HookPoint(name, "gate", gate), HookPoint(name, "base", layer.base_layer))
    return Site(info, layer, points, read, weights, respond)
