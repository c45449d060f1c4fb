"""PASs-MoE (arXiv 2601.13020): pathway-energy gates and importance-weighted stabilisation of ranks.

Two halves. *PAS-guided reweighting*: the gate of expert e is softmax_e(||A_e h||^2 / r), no router. *PAS-aware
rank stabilisation*: after each task the importance of every pathway (e, k) is added up, and while later tasks are
learnt, moving row a_{e,k} or column b_{e,k} away from a reference costs

    lambda_A sum w_{e,k} ||a - a_ref||^2 + lambda_B sum w_{e,k} ||b - b_ref||^2.

The paper and the code that its first author released for a related benchmark differ; both are switches here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from driftlens.adapters import iter_sites, set_gate_temperature
from driftlens.methods.base import METHODS, Method, MethodOptions, TaskContext

__all__ = ["PassMoE", "PassMoEOptions", "pathway_importance", "pathway_weights", "stabilisation_penalty"]

_RELEASE_DECAY = 0.9
"""EMA factor over batches of the released importance estimate."""


@dataclass(frozen=True)
class _Preset:
    importance: Literal["mean_of_product", "product_of_means"]
    reference: Literal["previous", "importance_weighted"]
    reduction: Literal["sum", "mean"]
    top_fraction: float
    ramp: float
    temperature: tuple[float, float] | None


_PRESETS = {
    "paper": _Preset("mean_of_product", "previous", "sum", 1.0, 0.0, None),
    "release": _Preset("product_of_means", "importance_weighted", "mean", 0.4, 0.2, (1.5, 0.7)),
}


class PassMoEOptions(MethodOptions):
    """Switches of PASs-MoE. A switch left at None takes the value of ``variant``.

    Attributes:
        variant: ``paper`` or ``release``; presets of every switch below that is None.
        lambda_a: weight of the row penalty (paper: 5e-4). 0 together with ``lambda_b`` = 0 is reweighting alone.
        lambda_b: weight of the column penalty (paper's main table: 5e-5).
        importance: ``mean_of_product`` is Eq. 9, E[pi z^2] over the finished task's data; ``product_of_means`` is
            E_batch[z^2] E_batch[pi], averaged over training batches with decay 0.9.
        reference: ``previous`` checkpoint's values, or their ``importance_weighted`` running average.
        reduction: ``sum`` over pathways (paper) or ``mean`` over all pathways of all sites (release).
        top_fraction: share of a site's pathways that is stabilised, the most important ones.
        clip: upper bound of w after division by the site's mean importance.
        ramp: share of a task's steps over which the penalty grows linearly from 0.
        temperature_start, temperature_end: cosine schedule of the gate temperature inside each task.
        random_importance: permute importances within each site (the paper's control, Appendix A.3).
    """

    variant: Literal["paper", "release"] = "paper"
    lambda_a: float = Field(default=5e-4, ge=0)
    lambda_b: float = Field(default=5e-5, ge=0)
    importance: Literal["mean_of_product", "product_of_means"] | None = None
    reference: Literal["previous", "importance_weighted"] | None = None
    reduction: Literal["sum", "mean"] | None = None
    top_fraction: float | None = Field(default=None, gt=0, le=1)
    clip: float = Field(default=10.0, gt=0)
    ramp: float | None = Field(default=None, ge=0, le=1)
    temperature_start: float | None = Field(default=None, gt=0)
    temperature_end: float | None = Field(default=None, gt=0)
    random_importance: bool = False


def pathway_importance(
    gate: Float[Tensor, "tokens experts"], pathway: Float[Tensor, "tokens experts rank"]
) -> Float[Tensor, "experts rank"]:
    """Return I_{e,k} = mean_i pi_{i,e} z_{i,e,k}^2 (PASs-MoE Eq. 9, the mean of the product); range 0.. ."""
    return torch.einsum("ne,ner->er", gate, pathway.square()) / gate.shape[0]


def pathway_weights(
    importance: Float[Tensor, "experts rank"], clip: float, top_fraction: float
) -> Float[Tensor, "experts rank"]:
    """Return w: importance over its site mean, clipped, zero outside the ``top_fraction`` most important pathways."""
    flat = importance.flatten()
    mean = flat.mean()
    weights = (flat / mean.clamp_min(torch.finfo(flat.dtype).tiny)).clamp_max(clip)
    keep = max(1, math.ceil(top_fraction * flat.numel() - 1e-9))
    kept = torch.zeros_like(weights)
    chosen = torch.topk(flat, keep).indices
    kept[chosen] = weights[chosen]
    return kept.reshape(importance.shape)


def stabilisation_penalty(
    A: Float[Tensor, "paths d_in"],
    B: Float[Tensor, "d_out paths"],
    a_ref: Float[Tensor, "paths d_in"],
    b_ref: Float[Tensor, "d_out paths"],
    weights: Float[Tensor, "experts rank"],
    lambda_a: float,
    lambda_b: float,
) -> Float[Tensor, ""]:
    """Return the site's lambda_A sum w ||a - a_ref||^2 + lambda_B sum w ||b - b_ref||^2 (PASs-MoE Eq. 11)."""
    w = weights.flatten()
    rows = (A - a_ref).square().sum(dim=1)
    columns = (B - b_ref).square().sum(dim=0)
    return lambda_a * (w * rows).sum() + lambda_b * (w * columns).sum()


class PassMoE(Method):
    """PASs-MoE in full: PAS-guided reweighting and PAS-aware rank stabilisation."""

    name = "pass-moe"
    title = "PASs-MoE"
    source = "arXiv 2601.13020 (ACL 2026)"
    summary = "Gate from pathway energy, no router; important ranks are held near their old values."
    gate = "energy"
    Options: ClassVar[type[MethodOptions]] = PassMoEOptions
    options: PassMoEOptions

    def __init__(self, options: PassMoEOptions) -> None:
        super().__init__(options)
        preset = _PRESETS[options.variant]
        self.importance = options.importance or preset.importance
        self.reference = options.reference or preset.reference
        self.reduction = options.reduction or preset.reduction
        self.top_fraction = options.top_fraction if options.top_fraction is not None else preset.top_fraction
        self.ramp = options.ramp if options.ramp is not None else preset.ramp
        start, end = options.temperature_start, options.temperature_end
        if start is None and end is None:
            self.temperature = preset.temperature
        else:
            self.temperature = (start if start is not None else 1.0, end if end is not None else 1.0)
        self._state: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._running: dict[str, Tensor] = {}
        self._progress = 0.0

    def begin_task(self, model: nn.Module, task: TaskContext) -> None:
        """Turn the importance aggregated so far into this task's weights w."""
        self._running = {}
        self._weights = {}
        for name in (key.removesuffix(".importance") for key in self._state if key.endswith(".importance")):
            total = self._state[f"{name}.importance"]
            if self.options.random_importance:
                generator = torch.Generator().manual_seed(task.index)
                order = torch.randperm(total.numel(), generator=generator).to(total.device)
                total = total.flatten()[order].reshape(total.shape)
            self._weights[name] = pathway_weights(total, self.options.clip, self.top_fraction)

    def begin_step(self, model: nn.Module, progress: float) -> None:
        """Set the gate temperature of this step."""
        self._progress = progress
        if self.temperature is not None:
            start, end = self.temperature
            set_gate_temperature(model, end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress)))

    @contextmanager
    def observing(self, model: nn.Module, token_mask: Tensor) -> Iterator[None]:
        """Follow the release's running importance during training; the paper's estimate needs no observation."""
        if self.importance != "product_of_means":
            yield
            return

        def update(name: str, gate: Tensor, pathway: Tensor) -> None:
            value = pathway.square().mean(dim=0) * gate.mean(dim=0)[:, None]
            old = self._running.get(name)
            self._running[name] = value if old is None else _RELEASE_DECAY * old + (1 - _RELEASE_DECAY) * value

        with _watch_sites(model, lambda: token_mask, update):
            yield

    def penalty(self, model: nn.Module) -> Tensor | None:
        """Return the stabilisation penalty of all sites, or None before the second task and for lambda = 0."""
        lambda_a, lambda_b = self.options.lambda_a, self.options.lambda_b
        if not self._weights or (lambda_a == 0 and lambda_b == 0):
            return None
        scale = min(1.0, self._progress / self.ramp) if self.ramp > 0 else 1.0
        parts = []
        for name, A, B in _factors(model):
            a_ref, b_ref = self._state[f"{name}.a_ref"], self._state[f"{name}.b_ref"]
            parts.append(stabilisation_penalty(A, B, a_ref, b_ref, self._weights[name], lambda_a, lambda_b))
        total = torch.stack(parts).sum()
        if self.reduction == "mean":
            total = total / sum(weights.numel() for weights in self._weights.values())
        return scale * total

    @torch.no_grad()
    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        """Measure this task's importance, aggregate it, and move the references."""
        if self.temperature is not None:
            set_gate_temperature(model, self.temperature[1])
        current = self._running if self.importance == "product_of_means" else _measure_importance(model, task)
        for name, A, B in _factors(model):
            new = current[name]
            old = self._state.get(f"{name}.importance")
            if old is None or self.reference == "previous":
                a_ref, b_ref = A.detach().clone(), B.detach().clone()
            else:
                share = (new / (old + new).clamp_min(torch.finfo(new.dtype).tiny)).flatten()
                a_ref = torch.lerp(self._state[f"{name}.a_ref"], A.detach(), share[:, None])
                b_ref = torch.lerp(self._state[f"{name}.b_ref"], B.detach(), share[None, :])
            self._state[f"{name}.importance"] = new if old is None else old + new
            self._state[f"{name}.a_ref"], self._state[f"{name}.b_ref"] = a_ref, b_ref

    def state_dict(self) -> dict[str, Tensor]:
        """Return, per site, the aggregated importance and the reference factors."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Restore importances and references."""
        self._state = {name: value.to(device) for name, value in state.items()}


def _factors(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (site name, A [E r, d_in], B [d_out, E r]) of the active adapter."""
    for name, site in iter_sites(model):
        adapter = site.active_adapters[0]
        A: Any = site.moe_lora_A[adapter]
        B: Any = site.moe_lora_B[adapter]
        yield name, A.weight, B.weight


def _measure_importance(model: nn.Module, task: TaskContext) -> dict[str, Tensor]:
    """Return the mean of pi z^2 over every real token of the task's training data, by site."""
    sums: dict[str, Tensor] = {}
    count: list[Tensor] = []
    mask: list[Tensor] = []

    def add(name: str, gate: Tensor, pathway: Tensor) -> None:
        value = torch.einsum("ne,ner->er", gate.double(), pathway.double().square())
        sums[name] = sums[name] + value if name in sums else value

    # The mask of the coming forward is known only once the batch is drawn, hence the one-element list.
    with _watch_sites(model, lambda: mask[0], add) as new_forward:
        for token_mask in task.replay():
            mask[:] = [token_mask]
            count.append(token_mask.sum())
            new_forward()
    total = torch.stack(count).sum()
    return {name: (value / total).float() for name, value in sums.items()}


@contextmanager
def _watch_sites(model: nn.Module, token_mask: Any, update: Any) -> Iterator[Any]:
    """Call ``update(name, gate [tokens, E], pathway [tokens, E, r])`` once per site and forward, padding removed.

    A second call of the same site before ``new_forward()`` is gradient checkpointing re-running it: not counted.
    """
    seen: set[str] = set()
    handles = []

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, Tensor], gate: Tensor) -> None:
            if name in seen:
                return
            seen.add(name)
            # Flat, because some decoders (OPT) hand [batch * n, d] to their feed-forward layers.
            keep = token_mask().bool().flatten()
            with torch.no_grad():
                update(name, gate.detach().flatten(0, -2)[keep].float(), args[1].detach().flatten(0, -3)[keep].float())

        return hook

    try:
        for name, site in iter_sites(model):
            handles.append(site.moe_lora_gate[site.active_adapters[0]].register_forward_hook(hook_of(name)))
        yield seen.clear
    finally:
        for handle in handles:
            handle.remove()


METHODS.register(PassMoE.name, PassMoE)
