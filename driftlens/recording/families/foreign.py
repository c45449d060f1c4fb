"""MoE-LoRA layers of CoIN, MCITlib and Prism folders, as `driftlens.recording.foreign` builds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from driftlens.recording.foreign.layers import ForeignLinear
from driftlens.recording.hooks import HookPoint
from driftlens.recording.sites import Site, SiteWeights, layer_index
from driftlens.store import SiteInfo

__all__ = ["ForeignFamily", "foreign_site"]


class ForeignFamily:
    """Layers of CoIN, MCITlib and Prism: the gate sees h and z, the base layer gives its norm."""

    def find(self, model: nn.Module) -> Iterator[Site]:
        """Yield the adapted layers."""
        for name, module in model.named_modules():
            if isinstance(module, ForeignLinear):
                yield foreign_site(name, module)


def foreign_site(name: str, layer: ForeignLinear) -> Site:
    """Return the site of one adapted layer, which need not be part of a model."""
    gate = layer.gate

    def read(part: str, args: tuple[Any, ...], output: Any) -> Mapping[str, Tensor]:
        if part == "base":
            return {"base_norm": torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32)}
        return {"gate": output, "pathway": args[1], "input": args[0]}

    def respond(h: Tensor) -> Mapping[str, Tensor]:
        # past the modules' hooks: an answer is not a firing
        h = h.to(layer.lora_a.dtype)
        z = layer.pathway(h)
        return {"gate": gate.forward(h, z), "pathway": z}

    def weights() -> SiteWeights:
        router = gate.router
        return SiteWeights(layer.a.detach(), layer.b.detach(), None if router is None else router.detach())

    info = SiteInfo(
        name=name,
        layer=layer_index(name),
        kind=name.rsplit(".", 1)[-1],
        num_experts=layer.num_experts,
        rank=layer.rank,
        d_in=layer.in_features,
        d_out=layer.out_features,
        scaling=layer.scaling,
        gate=gate.kind,
        top_k=gate.top_k,
        family="foreign",
        semantics="product_of_sums" if layer.product else "sum_gBA",
        normalised=gate.normalised,
    )
    points = (HookPoint(name, "gate", gate), HookPoint(name, "base", layer.base_layer))
    return Site(info, layer, points, read, weights, respond if gate.per_token else None)
