"""Sites: where in a model routing and pathways can be observed.

A *site family* knows one kind of module. It finds the sites of a model, names the submodules to hook, and turns
what their hooks see into gates, pathways and norms. A new family is one file in ``families`` and one registration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from driftlens.errors import SiteError
from driftlens.recording.hooks import HookPoint
from driftlens.registry import Registry
from driftlens.store import SiteInfo

__all__ = [
    "SITE_FAMILIES",
    "Site",
    "SiteFamily",
    "SiteWeights",
    "base_module",
    "find_sites",
    "forward_context",
    "layer_index",
    "output_roots",
]


@dataclass(frozen=True)
class SiteWeights:
    """The parameters of a site.

    Attributes:
        a: down-projections of the experts; None where the site has no low-rank pathways.
        b: up-projections, without the scaling; likewise.
        router: weight of the gate, None for gates that own none.
    """

    a: Float[Tensor, "E r d_in"] | None
    b: Float[Tensor, "E d_out r"] | None
    router: Float[Tensor, "E d_in"] | None


@dataclass(frozen=True)
class Site:
    """One observable module.

    Attributes:
        info: what the recording file says about the site.
        module: the module that hosts it.
        points: submodules to hook; each must run exactly once per forward.
        read: turns one firing, ``read(part, args, output)``, into tensors by name: ``"gate"`` [..., E],
            ``"pathway"`` [..., E, r] where the rank is above 0, and ``"base_norm"`` [...]; together the points must
            give all of them, and with ``respond`` also ``"input"`` [..., d_in], the h that gate and pathways see.
            The leading axes are [batch, length] or one flat axis. ``args`` are as in `Hooks`.
        weights: returns the parameters as they are now.
        respond: gives ``"gate"`` [n, E] and ``"pathway"`` [n, E, r] of the site's present parameters on any input
            [n, d_in]; None where the gate does not follow from the site's input alone.
    """

    info: SiteInfo
    module: nn.Module = field(repr=False)
    points: tuple[HookPoint, ...] = field(repr=False)
    read: Callable[[str, tuple[Any, ...], Any], Mapping[str, Tensor]] = field(repr=False)
    weights: Callable[[], SiteWeights] = field(repr=False)
    respond: Callable[[Float[Tensor, "n d_in"]], Mapping[str, Tensor]] | None = field(default=None, repr=False)


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


def forward_context(model: nn.Module) -> AbstractContextManager[object]:
    """Return the context in which a call of ``base_module(model)`` computes what a call of ``model`` does.

    PEFT's wrapper sets hooks on the base model around each forward; for X-LoRA it is they that compute the gates.
    """
    hooks = getattr(model, "_enable_peft_forward_hooks", None)
    context: AbstractContextManager[object] = hooks() if callable(hooks) else nullcontext()
    return context


def find_sites(model: nn.Module, families: Sequence[str] | None = None) -> list[Site]:
    """Return all observable sites of ``model``, in module order.

    Args:
        model: the model, PEFT-wrapped or not.
        families: names of the families to look for; None for all.

    Raises:
        SiteError: the model has none, or two families claim one name; the message says which.
        UnknownNameError: no such family.
    """
    _refuse_wrapped(model)
    names = SITE_FAMILIES.names() if families is None else list(families)
    sites = [site for name in names for site in SITE_FAMILIES.get(name).find(model)]
    if not sites:
        raise SiteError(
            f"{type(base_module(model)).__name__} has no site where routing could be observed "
            f"(looked for: {', '.join(names)}). Record a model with routers of its own or an adapter that is switched "
            "on, or register a site family for this kind of module."
        )
    claimed: dict[str, str] = {}
    for site in sites:
        if site.info.name in claimed:
            raise SiteError(
                f"Site {site.info.name} is claimed by the families {claimed[site.info.name]} and {site.info.family}. "
                f"Choose one: find_sites(model, families=[...]) with names among {', '.join(names)}."
            )
        claimed[site.info.name] = site.info.family
    order = {id(module): number for number, module in enumerate(base_module(model).modules())}
    return sorted(sites, key=lambda site: order.get(id(site.module), len(order)))


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"{type(module).__name__} {name}".rstrip()
        # By name, because importing the compiler costs seconds. Compiled code ignores hooks that are set later.
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise SiteError(
                f"{where} is compiled (torch.compile), and compiled code does not run hooks that are set afterwards. "
                "Record the model before it is compiled: `compiled._orig_mod` of a `torch.compile(model)`, or the "
                "model loaded again after a `model.compile()`."
            )
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise SiteError(
                f"{where} runs copies of the model, whose hooks would fire once per copy. Record the model inside it: "
                "`model.module`."
            )


def layer_index(name: str) -> int:
    """Return the first number in a module path (the decoder layer), or -1 if there is none."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match[1]) if match else -1


def output_roots(sites: Sequence[Site]) -> Float[Tensor, "S E r r"]:
    """Return R_e with ||R_e z|| = scaling ||B_e z|| for sites of equal E and r.

    R_e is the triangular factor of B_e = Q R: a square root of the Gram matrix B_e^T B_e that is better
    conditioned than the Gram matrix itself. Expert outputs, d_out long, are never formed.
    """
    roots = []
    for site in sites:
        b = site.weights().b
        if b is None:
            raise SiteError(f"Site {site.info.name} of family {site.info.family} has a rank but gives no B.")
        factor = torch.linalg.qr(b.float(), mode="r").R
        # d_out < r gives a flat factor; rows of zeros make it square and change no norm
        factor = nn.functional.pad(factor, (0, 0, 0, site.info.rank - factor.shape[-2]))
        roots.append(factor * site.info.scaling)
    return torch.stack(roots)
