"""PEFT LoRA on fused 3-D expert weights (``target_parameters``): one site per adapted parameter, E native experts.

PEFT packs the experts' factors in two different orders: A [E*r, in] with the expert slowest, B [out, r*E] with the
expert fastest (``ParamWrapper.get_delta_factors``). W_e becomes W_e + s B_e A_e inside the experts module.

What a site records, per token:

* gate [E]: the native router's weights as the experts module was given them, 0 for experts that did not run.
* pathway [E, r]: z_e = A_e x_e for the experts that ran, zeros for the others. x_e is the token itself for
  ``gate_up_proj`` and ``up_proj``. For ``down_proj`` it is the expert's own middle activation, which the fused
  kernels never hand out: it is computed again from the token with the module's adapted weights and its own
  activation, for the routed tokens only (the cost of a second up-projection).
* base_norm: norm of sum_e g_e (W_e x_e + bias_e), the mixture without the adapter at this parameter.

At ``down_proj`` the site's output s sum_e g_e B_e z_e is exactly what the adapter adds to the experts' output. At
``gate_up_proj`` the adapter adds s B_e z_e to each expert's own pre-activation, so that the sum weighted by the
gate describes the mixture of those changes; the model itself forms no such sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.functional import linear

from driftlens.errors import SiteError
from driftlens.recording.families.native_moe import router_kind
from driftlens.recording.families.peft_lora import Skipped, active_adapters, tuned_modules
from driftlens.recording.hooks import HookPoint
from driftlens.recording.sites import Site, SiteWeights, layer_index
from driftlens.store import SiteInfo

__all__ = ["PeftFusedFamily"]

_DOWN = "down_proj"
_PARAMETERS = ("gate_up_proj", "up_proj", _DOWN)
# Routers whose answer (logits, weights, experts) reaches the experts module as it is: the gate is a function of h.
_ROUTERS = frozenset(f"{model}TopKRouter" for model in ("GptOss", "Mixtral", "Olmoe", "Qwen2Moe", "Qwen3Moe"))


class PeftFusedFamily:
    """PEFT LoRA on the fused expert weights of native MoE layers."""

    def find(self, model: nn.Module) -> Iterator[Site]:
        """Yield a site per fused expert parameter that has an active adapter.

        Adapted parameters that are no fused experts, and experts modules of another build than that of transformers'
        own, are left out with one warning per reason.

        Raises:
            SiteError: an adapter is merged, or several are active at one parameter (they share the native gate, but
                their sum has no pathways of one rank).
        """
        skipped, modules = Skipped(), list(tuned_modules(model))
        by_name = {name: module for name, module in modules if not isinstance(module, ParamWrapper)}
        for path, wrapper in modules:
            if not isinstance(wrapper, ParamWrapper):
                continue
            name = f"{path}.{wrapper.parameter_name}"
            adapters = active_adapters(name, wrapper, list(wrapper.lora_A))
            if not adapters:
                continue
            reason = _unsupported(wrapper)
            if reason:
                skipped.add(reason, name)
                continue
            if len(adapters) > 1:
                raise SiteError(
                    f"Site {name} has {len(adapters)} active adapters ({', '.join(adapters)}); fused experts are "
                    "recorded for one at a time. Choose it with model.set_adapter(...)."
                )
            yield _FusedSite(name, wrapper, adapters[0], by_name.get(path.rpartition(".")[0])).site()
        skipped.warn()


def _unsupported(wrapper: Any) -> str | None:
    experts = wrapper.get_base_layer()
    if wrapper.get_param().dim() != 3:
        return "is an adapted parameter without an axis of experts"
    if wrapper.parameter_name not in _PARAMETERS or not hasattr(experts, "is_transposed"):
        return f"is no {' or '.join(_PARAMETERS)} of a fused experts module of transformers"
    if experts.has_post_expert_norm or getattr(experts, "_is_expert_parallel", False):
        return "normalises each expert's output or is spread over devices"
    if len(inspect.signature(type(experts).forward).parameters) < 4:
        return "belongs to experts that are not told which tokens they get (no index and weight arguments)"
    return None


def _router(block: nn.Module | None, wrapper: Any) -> nn.Module | None:
    """Return the router beside the experts: the child of their block with a weight [E, hidden]."""
    experts = wrapper.get_base_layer()
    hidden = experts.down_proj.shape[2 if experts.is_transposed else 1]
    for child in () if block is None else block.children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and tuple(weight.shape) == (wrapper.num_experts, hidden):
            return child
    return None


class _FusedSite:
    """One adapted parameter of one experts module."""

    def __init__(self, name: str, wrapper: Any, adapter: str, block: nn.Module | None) -> None:
        self.name, self.wrapper, self.adapter, self.block = name, wrapper, adapter, block
        self.router = _router(block, wrapper)
        self.experts = wrapper.get_base_layer()
        self.is_down = wrapper.parameter_name == _DOWN
        self.num_experts, self.rank = int(wrapper.num_experts), int(wrapper.r[adapter])
        self.scaling = float(wrapper.scaling[adapter])

    def site(self) -> Site:
        kind = None if self.router is None else router_kind(self.router)
        gate, top_k, normalised = "topk", int(getattr(self.experts.config, "num_experts_per_tok", 0) or 0), False
        if kind is not None and self.router is not None and self.block is not None:
            gate, top_k = kind.describe(self.router, self.block), kind.top_k(self.router, self.block)
            normalised = kind.normalised(self.router, self.block)
        straight = kind is not None and type(self.router).__name__ in _ROUTERS
        info = SiteInfo(
            name=self.name,
            layer=layer_index(self.name),
            kind=self.wrapper.parameter_name,
            num_experts=self.num_experts,
            rank=self.rank,
            d_in=int(self.wrapper.in_features),
            d_out=int(self.wrapper.out_features),
            scaling=self.scaling,
            gate=gate,
            top_k=top_k,
            family="peft-fused",
            # other blocks may scale the weights on their way from the router to the experts
            normalised=straight and normalised,
        )
        points = (HookPoint(self.name, "experts", self.experts),)
        # At down_proj every expert sees an input of its own: there is no one h to answer.
        respond = self.respond if straight and not self.is_down else None
        return Site(info, self.wrapper, points, self.read, self.weights, respond)

    def weights(self) -> SiteWeights:
        a, b = self._factors()
        router = None if self.router is None or self.is_down else cast(Tensor, self.router.weight).detach()
        return SiteWeights(a=a, b=b, router=router)

    @torch.no_grad()
    def respond(self, h: Float[Tensor, "n d_in"]) -> Mapping[str, Tensor]:
        router = cast(Any, self.router)
        _, weight, index = router.forward(h.to(router.weight.dtype))
        gate, ran = self._gate(index, weight)
        return {"gate": gate, "pathway": self._pathway(h) * ran.unsqueeze(-1)}

    @torch.no_grad()
    def read(self, part: str, args: tuple[Any, ...], output: Any) -> Mapping[str, Tensor]:
        h, index, weight = self._routing(args)
        gate, ran = self._gate(index, weight)
        if not self.is_down:
            base = torch.zeros(len(h), self.wrapper.out_features, device=h.device)
            for expert, tokens in self._routed(index):
                out = self._project(self.wrapper.parameter_name, expert, h[tokens], adapted=False)
                base.index_add_(0, tokens, out.float() * gate[tokens, expert, None].float())
            pathway = self._pathway(h) * ran.unsqueeze(-1)
            return {"gate": gate, "pathway": pathway, "base_norm": torch.linalg.vector_norm(base, dim=-1), "input": h}
        a, b = self._factors()
        pathway = torch.zeros(len(h), self.num_experts, self.rank, dtype=a.dtype, device=h.device)
        for expert, tokens in self._routed(index):
            pathway[tokens, expert] = linear(self._middle(expert, h[tokens]).to(a.dtype), a[expert])
        added = self.scaling * torch.einsum("ne,eor,ner->no", gate.to(a.dtype), b, pathway)
        norm = torch.linalg.vector_norm(output.reshape(added.shape) - added, dim=-1, dtype=torch.float32)
        return {"gate": gate, "pathway": pathway, "base_norm": norm}

    def _routing(self, args: tuple[Any, ...]) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n k"], Float[Tensor, "n k"]]:
        h, index, weight = args[:3]
        if index.is_floating_point() or not weight.is_floating_point() or index.shape != weight.shape:
            raise SiteError(
                f"The experts of site {self.name} were not called with tokens, expert indices and weights of the same "
                f"shape (found {index.dtype} {tuple(index.shape)} and {weight.dtype} {tuple(weight.shape)}). "
                "This experts module cannot be recorded; leave the family peft-fused out."
            )
        return h.reshape(-1, h.shape[-1]), index.flatten(0, -2), weight.flatten(0, -2)

    def _gate(
        self, index: Int[Tensor, "n k"], weight: Float[Tensor, "n k"]
    ) -> tuple[Float[Tensor, "n E"], Bool[Tensor, "n E"]]:
        gate = torch.zeros(len(index), self.num_experts, dtype=weight.dtype, device=weight.device)
        return gate.scatter(1, index, weight), torch.zeros_like(gate, dtype=torch.bool).scatter(1, index, value=True)

    def _routed(self, index: Int[Tensor, "n k"]) -> Iterator[tuple[int, Int[Tensor, " m"]]]:
        """Yield each expert that runs with the positions of its tokens (one synchronisation per call)."""
        order = index.flatten().argsort(stable=True)
        counts = torch.bincount(index.flatten(), minlength=self.num_experts).tolist()
        for expert, tokens in enumerate(torch.split(order // index.shape[1], counts)):
            if len(tokens):
                yield expert, tokens

    def _factors(self) -> tuple[Float[Tensor, "E r d_in"], Float[Tensor, "E d_out r"]]:
        a, b = (cast(Tensor, part[self.adapter].weight).detach() for part in (self.wrapper.lora_A, self.wrapper.lora_B))
        # A: expert slowest; B: expert fastest
        a_by_expert = a.reshape(self.num_experts, self.rank, -1)
        return a_by_expert, b.reshape(-1, self.rank, self.num_experts).permute(2, 0, 1)

    def _pathway(self, h: Float[Tensor, "n d_in"]) -> Float[Tensor, "n E r"]:
        a = cast(Tensor, self.wrapper.lora_A[self.adapter].weight)
        return linear(h.to(a.dtype), a).reshape(-1, self.num_experts, self.rank)

    def _middle(self, expert: int, h: Float[Tensor, "m d_in"]) -> Float[Tensor, "m d_middle"]:
        """Return the input of ``down_proj`` as the experts module computes it, adapters included."""
        if not self.experts.has_gate:
            return cast(Tensor, self.experts.act_fn(self._project("up_proj", expert, h, adapted=True)))
        return cast(Tensor, self.experts._apply_gate(self._project("gate_up_proj", expert, h, adapted=True)))

    def _project(
        self, parameter: str, expert: int, h: Float[Tensor, "m d_in"], *, adapted: bool
    ) -> Float[Tensor, "m d_out"]:
        # While the wrapper's forward runs, PEFT keeps the adapted weight as a parametrization of the plain one.
        plain = getattr(self.experts, "parametrizations", {})
        fused = plain[parameter].original if not adapted and parameter in plain else getattr(self.experts, parameter)
        bias = getattr(self.experts, f"{parameter}_bias")[expert] if self.experts.has_bias else None
        return linear(h, fused[expert].T if self.experts.is_transposed else fused[expert], bias)
