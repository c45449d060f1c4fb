"""Sites: where in a model routing and pathways can be observed.

A *site family* knows one kind of module. It finds the sites of a model, names the submodules to hook, and turns
what their hooks see into gates, pathways and norms. A new family is one file with one ``SITE_FAMILIES.register``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from driftlens.adapters import Gate, MoELoraLinear, iter_sites
from driftlens.errors import SiteError
from driftlens.recording.hooks import HookPoint
from driftlens.registry import Registry
from driftlens.store import SiteInfo

__all__ = [
    "SITE_FAMILIES",
    "MoELoraFamily",
    "Site",
    "SiteFamily",
    "SiteWeights",
    "base_module",
    "find_sites",
    "layer_index",
    "output_roots",
]


@dataclass(frozen=True)
class SiteWeights:
    """The parameters of a site.

    Attributes:
        a: down-projections of the experts.
        b: up-projections, without the scaling.
        router: weight of the gate, None for gates that own none.
    """

    a: Float[Tensor, "E r d_in"]
    b: Float[Tensor, "E d_out r"]
    router: Float[Tensor, "E d_in"] | None


@dataclass(frozen=True)
class Site:
    """One observable module.

    Attributes:
        info: what the recording file says about the site.
        module: the module that hosts it.
        points: submodules to hook; each must run exactly once per forward.
        read: turns one firing, ``read(part, args, output)``, into tensors by name: ``"gate"`` [..., E],
            ``"pathway"`` [..., E, r] and ``"base_norm"`` [...]; together the points must give all three.
        weights: returns the parameters as they are now.
    """

    info: SiteInfo
    module: nn.Module = field(repr=False)
    points: tuple[HookPoint, ...] = field(repr=False)
    read: Callable[[str, tuple[Any, ...], Any], Mapping[str, Tensor]] = field(repr=False)
    weights: Callable[[], SiteWeights] = field(repr=False)


class SiteFamily(Protocol):
    """Finds the sites of one kind."""

    def find(self, model: nn.Module) -> Iterator[Site]:
        """Yield the sites of ``model`` in module order; nothing if it has none of this kind."""
        ...


SITE_FAMILIES: Registry[SiteFamily] = Registry("site family", "driftlens.site_families")
"""Site families by name; third parties add theirs through the entry-point group ``driftlens.site_families``."""


def base_module(model: nn.Module) -> nn.Module:
    """Return the module inside a PEFT wrapper, whose call is one forward (PEFT itself calls past its hooks)."""
    inner = getattr(model, "get_base_model", None)
    module: nn.Module = inner() if callable(inner) else model
    return module


def find_sites(model: nn.Module, families: Sequence[str] | None = None) -> list[Site]:
    """Return all observable sites of ``model``.

    Args:
        model: the model, PEFT-wrapped or not.
        families: names of the families to look for; None for all.

    Raises:
        SiteError: the model has none; the message says which families were tried.
        UnknownNameError: no such family.
    """
    names = SITE_FAMILIES.names() if families is None else list(families)
    sites = [site for name in names for site in SITE_FAMILIES.get(name).find(model)]
    if not sites:
        raise SiteError(
            f"{type(base_module(model)).__name__} has no site where routing could be observed "
            f"(looked for: {', '.join(names)}). Record a model with a MoE-LoRA adapter that is switched on, "
            "or register a site family for this kind of module."
        )
    return sites


def layer_index(name: str) -> int:
    """Return the first number in a module path (the decoder layer), or -1 if there is none."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match[1]) if match else -1


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
        return {"gate": output, "pathway": args[1]}

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
    return Site(info, layer, points, read, weights)


def output_roots(sites: Sequence[Site]) -> Float[Tensor, "S E r r"]:
    """Return R_e with ||R_e z|| = scaling ||B_e z|| for sites of equal E and r.

    R_e is the triangular factor of B_e = Q R: a square root of the Gram matrix B_e^T B_e that is better
    conditioned than the Gram matrix itself. Expert outputs, d_out long, are never formed.
    """
    roots = []
    for site in sites:
        factor = torch.linalg.qr(site.weights().b.float(), mode="r").R
        # d_out < r gives a flat factor; rows of zeros make it square and change no norm
        factor = nn.functional.pad(factor, (0, 0, 0, site.info.rank - factor.shape[-2]))
        roots.append(factor * site.info.scaling)
    return torch.stack(roots)


SITE_FAMILIES.register("moe-lora", MoELoraFamily())
