"""Native MoE blocks of transformers: gates of the model's own routers, rank 0.

Routers are found through what each model class itself declares recordable as ``router_logits``
(``_can_record_outputs``), and through the table of router classes, which says how each one defines its gate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from driftlens.recording.families.native_gates import ROUTERS, UNREADABLE, RouterKind
from driftlens.recording.hooks import HookPoint
from driftlens.recording.sites import Site, SiteWeights, base_module, layer_index
from driftlens.store import SiteInfo

__all__ = ["NativeMoEFamily", "declared_routers", "router_kind"]

_SHARED = ("shared_experts", "shared_expert", "shared_mlp")
_SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
_COVERED = ("JetMoeAttention",)
"""Declared modules that only pass on the logits of a router inside them."""


class NativeMoEFamily:
    """The MoE blocks that transformers models bring along.

    ``gate`` [..., E] holds the weights that the forward really used, zero outside the chosen experts, without the
    model's routed scaling factor (``SiteInfo.scaling``); ``base_norm`` is the norm of the whole block's output, shared
    experts included. Rank is 0 and the stored weights are the router's alone.
    """

    def find(self, model: nn.Module) -> Iterator[Site]:
        """Yield one site per router of a known class, in module order; warns of routers that cannot be read."""
        root = base_module(model)
        modules = dict(root.named_modules())
        declared = declared_routers(root)
        for name, module in modules.items():
            kind, wrapped = router_kind(module), _in_use(name, modules)
            if wrapped is None:
                continue
            if kind is not None:
                yield _site(wrapped, module, kind, modules)
            elif type(module).__name__ in UNREADABLE or (
                isinstance(module, declared) and type(module).__name__ not in _COVERED
            ):
                reason = UNREADABLE.get(type(module).__name__, "it is not in the table of known router classes")
                warnings.warn(f"Router {name} ({type(module).__name__}) is not recorded: {reason}.", stacklevel=2)


def router_kind(module: nn.Module) -> RouterKind | None:
    """Return how ``module`` defines its gate, or None if it is no router of a known class.

    Subclasses count while they keep the forward of the known class; classes of the same name that do not come from
    transformers (code shipped with a checkpoint) do not.
    """
    for base in type(module).__mro__:
        if base.__name__ in ROUTERS and base.__module__.startswith("transformers."):
            same = getattr(type(module), "forward", None) is getattr(base, "forward", None)
            return ROUTERS[base.__name__] if same else None
    return None


def declared_routers(root: nn.Module) -> tuple[type[nn.Module], ...]:
    """Return the module classes whose outputs the model's classes declare as ``router_logits``."""
    found: list[type[nn.Module]] = []
    for module in root.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        entry = (getattr(type(module), "_can_record_outputs", None) or {}).get("router_logits", [])
        for item in entry if isinstance(entry, list) else [entry]:
            target = item.target_class if isinstance(item, OutputRecorder) else item
            if isinstance(target, type) and target not in found:
                found.append(target)
    return tuple(found)


def _in_use(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the path that a module has without PEFT's wrappers, None for the copy of a wrapper that does not run."""
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    if path.endswith(".original_module"):
        outer = path.removesuffix(".original_module")
        wrapper: Any = modules[outer]
        return outer if wrapper.disable_adapters or not wrapper.active_adapters else None
    outer, _, adapter = path.rpartition(".")
    if outer.endswith(".modules_to_save"):
        outer = outer.removesuffix(".modules_to_save")
        wrapper = modules[outer]
        return outer if not wrapper.disable_adapters and adapter in wrapper.active_adapters else None
    return path


def _adapted(weight: Tensor, router: nn.Module, wrapper: nn.Module) -> Tensor:
    """Return the router's weight with what adapters on that parameter add to it in a forward."""
    layer: Any = wrapper
    while layer is not router and hasattr(layer, "base_layer"):
        if not (layer.disable_adapters or layer.merged):
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    weight = weight + layer.get_delta_weight(adapter).detach().to(weight.dtype)
        layer = layer.base_layer
    return weight


def _site(path: str, router: nn.Module, kind: RouterKind, modules: Mapping[str, nn.Module]) -> Site:
    host = path if kind.within else path.rpartition(".")[0]
    block = modules[host]
    if kind.output == "experts":
        # router and experts sit in the decoder layer itself, whose output is more than theirs
        name, output = path, modules[f"{host}.experts"]
    elif type(block).__name__ == "JetMoeMoA":
        # never called as a module: the attention around it returns its output
        name, output = host, modules[host.rpartition(".")[0]]
    else:
        name, output = host, block
    # PEFT's wrapper of the router, or the router itself
    outermost = modules[path]
    weight = kind.router_weight(router)
    num_experts = kind.experts(router, block)
    config = _config(path, modules)
    width = int(config.hidden_size) if weight is None else int(weight.shape[1])

    def gate(args: tuple[Any, ...], value: Any) -> Tensor:
        return kind.gate(router, block, args, value)

    def read(part: str, args: tuple[Any, ...], value: Any) -> Mapping[str, Tensor]:
        seen: dict[str, Tensor] = {}
        if part != "block":
            # some blocks flatten before their router and some do not: rows are tokens either way
            seen["gate"] = gate(args, value).reshape(-1, num_experts)
            if kind.follows_input:
                seen["input"] = args[0].reshape(-1, args[0].shape[-1])
        if part != "router":
            tensor = value[0] if isinstance(value, tuple) else value
            norm = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32)
            seen["base_norm"] = norm.reshape(-1)
        return seen

    def weights() -> SiteWeights:
        now = kind.router_weight(router)
        if now is not None and outermost is not router:
            now = _adapted(now, router, outermost)
        return SiteWeights(a=None, b=None, router=None if now is None else now[:num_experts])

    info = SiteInfo(
        name=name,
        layer=layer_index(name),
        kind=name.rsplit(".", 1)[-1],
        num_experts=num_experts,
        rank=0,
        d_in=width,
        d_out=width,
        scaling=float(kind.inner(router, block)) * float(kind.outer(router, block)),
        gate=kind.describe(router, block),
        top_k=kind.top_k(router, block),
        shared_experts=_shared_experts(path, block, kind, config, modules),
        family="native-moe",
        normalised=kind.normalised(router, block),
    )
    points = (
        (HookPoint(name, "all", router),)
        if kind.within
        else (HookPoint(name, "router", router), HookPoint(name, "block", output))
    )
    # an adapter on the router's parameter is there only while its wrapper runs: no answer beside a forward
    respond = None if hasattr(outermost, "base_layer") else _responder(router, block, kind, weight)
    return Site(info, block, points, read, weights, respond)


def _responder(
    router: nn.Module, block: nn.Module, kind: RouterKind, weight: Tensor | None
) -> Callable[[Tensor], Mapping[str, Tensor]] | None:
    if not kind.follows_input:
        return None

    def respond(h: Tensor) -> Mapping[str, Tensor]:
        h = h if weight is None else h.to(weight.dtype)
        # past the router's hooks: an answer is not a firing
        output = router.forward(h.unsqueeze(0) if kind.batched else h, *kind.args(block))
        return {"gate": kind.gate(router, block, (), output)}

    return respond


def _config(path: str, modules: Mapping[str, nn.Module]) -> Any:
    """Return the configuration of the innermost model around ``path``."""
    while path:
        path = path.rpartition(".")[0]
        module = modules[path]
        if isinstance(module, PreTrainedModel):
            return module.config
    return None


def _shared_experts(
    path: str, block: nn.Module, kind: RouterKind, config: Any, modules: Mapping[str, nn.Module]
) -> int:
    """Return the number of experts outside the routing: a fused MLP counts as many as its configuration says."""
    if kind.beside:
        return 1 if getattr(block, kind.beside, None) is not None else 0
    layer = modules[path.rpartition(".")[0].rpartition(".")[0]]
    if not any(getattr(owner, name, None) is not None for owner in (block, layer) for name in _SHARED):
        return 0
    counts = (getattr(config, name, None) for name in _SHARED_COUNTS)
    return next((count for count in counts if isinstance(count, int) and count > 0), 1)
