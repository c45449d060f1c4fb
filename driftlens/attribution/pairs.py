"""Two checkpoints in one loaded model: what each site answers to the same input with either one's parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.functional import pad

from driftlens.backbones import Backbone
from driftlens.errors import ConfigError, SiteError
from driftlens.recording.checkpoints import LoadedCheckpoint, is_whole_model, load_checkpoint
from driftlens.recording.reference import REFERENCE_ADAPTER, Reference, load_reference, match_sites, padded_outputs
from driftlens.recording.sites import Site, find_sites
from driftlens.store import SiteInfo

__all__ = ["Answers", "LoadedPair", "SitePair", "load_pair", "pair_sites"]


class Answers(NamedTuple):
    """Gates and pathways of both checkpoints on the same n inputs; 0 is the anchor, 1 the current checkpoint."""

    gate0: Float[Tensor, "n E"]
    gate1: Float[Tensor, "n E"]
    z0: Float[Tensor, "n E r"]
    z1: Float[Tensor, "n E r"]

    def gated(self, gate: int, experts: int, product: bool) -> Float[Tensor, "n E r"]:
        """Return what enters B_e with the gate of one checkpoint and the pathways of the other.

        Args:
            gate: whose gate.
            experts: whose A.
            product: whether the site multiplies sums: B_e then gets pi_e sum_f pi_f z_f instead of pi_e z_e.
        """
        pi, z = (self.gate0, self.gate1)[gate], (self.z0, self.z1)[experts]
        middle = torch.einsum("ne,ner->nr", pi, z)[:, None] if product else z
        return pi[..., None] * middle


@dataclass(frozen=True)
class SitePair:
    """One site with the parameters of both checkpoints.

    Attributes:
        current: the site that runs in the model.
        anchor: the anchor's site of the same name; None where it did not exist (gate 0 and output 0 there).
    """

    current: Site
    anchor: Site | None

    @property
    def info(self) -> SiteInfo:
        """The current site's description."""
        return self.current.info

    @property
    def product(self) -> bool:
        """Whether the site multiplies sums of its experts instead of summing their products."""
        return self.info.semantics == "product_of_sums"

    @property
    def routes(self) -> bool:
        """Whether the gate can be anything but 1; if not, exchanging it changes nothing."""
        sites = (self.current, self.anchor)
        return any(site is None or site.info.num_experts > 1 or not site.info.normalised for site in sites)

    @cached_property
    def outputs(self) -> Float[Tensor, "d_out two_E_r"]:
        """B of the anchor and of the current checkpoint side by side, scalings included, experts slowest, float32."""
        old, new = padded_outputs(self.anchor, self.info), padded_outputs(self.current, self.info)
        assert new is not None  # the current site is there
        old = torch.zeros_like(new) if old is None else old.to(new.device)
        return torch.cat([b.permute(1, 0, 2).flatten(1) for b in (old, new)], dim=1).contiguous()

    def answers(self, h: Float[Tensor, "n d_in"]) -> Answers:
        """Return gates and pathways of both checkpoints on ``h``, differentiable in it."""
        gate1, z1 = self._answer(self.current, h)
        if self.anchor is None:
            return Answers(torch.zeros_like(gate1), gate1, torch.zeros_like(z1), z1)
        gate0, z0 = self._answer(self.anchor, h)
        experts, rank = gate1.shape[-1] - gate0.shape[-1], z1.shape[-1] - z0.shape[-1]
        return Answers(pad(gate0, (0, experts)), gate1, pad(z0, (0, rank, 0, experts)), z1)

    @staticmethod
    def _answer(site: Site, h: Tensor) -> tuple[Tensor, Tensor]:
        assert site.respond is not None  # checked when the pair was made
        answer = site.respond(h)
        return answer["gate"].float(), answer["pathway"].float()


@dataclass
class LoadedPair:
    """A model that computes as the current checkpoint, with the anchor's parameters beside it.

    Attributes:
        loaded: the current checkpoint on its base model; every parameter is frozen.
        reference: the anchor.
        pairs: the sites, in module order.
    """

    loaded: LoadedCheckpoint
    reference: Reference
    pairs: tuple[SitePair, ...]

    @property
    def model(self) -> nn.Module:
        """The model, in evaluation mode."""
        return self.loaded.model

    @property
    def backbone(self) -> Backbone:
        """The base model and its encoder."""
        return self.loaded.backbone

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @property
    def anchor(self) -> str:
        """Name of the anchor checkpoint."""
        return self.reference.name

    @property
    def current(self) -> str:
        """Name of the current checkpoint."""
        return self.loaded.folder.name

    @property
    def runs_anchor(self) -> bool:
        """Whether `anchor_alone` is possible: with PEFT's adapters, but not with foreign folders."""
        return isinstance(self.model, PeftModel)

    @contextmanager
    def anchor_alone(self) -> Iterator[None]:
        """Let the model compute as the anchor: its sites, and whatever else it saved (`modules_to_save`).

        Raises:
            SiteError: the checkpoints are foreign folders, which cannot be switched as a whole.
        """
        model = self.loaded.peft
        active = model.active_adapter
        try:
            model.set_adapter(REFERENCE_ADAPTER)
            model.requires_grad_(False)
            yield
        finally:
            model.set_adapter(active)
            model.requires_grad_(False)

    def unload(self) -> None:
        """Take both adapters off the base model."""
        self.loaded.unload()


def load_pair(
    anchor: Path | str,
    current: Path | str,
    base: str | None = None,
    *,
    backbone: Backbone | None = None,
    device: torch.device | str = "cpu",
    semantics: str | None = None,
) -> LoadedPair:
    """Load two adapters of one base model into one model.

    Args:
        anchor: folder of the earlier checkpoint.
        current: folder of the later one.
        base: base model; None takes the one that ``current`` names.
        backbone: an already loaded base model to use instead.
        device: where the model goes.
        semantics: forward of a CoIN, MCITlib or Prism folder, see `load_checkpoint`.

    Raises:
        ConfigError: one of the two is a whole model.
        NotFoundError, FormatError: see `load_checkpoint` and `load_reference`.
        SiteError: a site whose update cannot be exchanged; the message names it and says why.
    """
    for folder in (Path(anchor), Path(current)):
        if is_whole_model(folder):
            raise ConfigError(
                f"{folder} is a whole model. Forgetting is attributed between two adapters of one base model: give "
                "adapter folders."
            )
    loaded = load_checkpoint(Path(current), base, backbone=backbone, device=device, semantics=semantics)
    try:
        reference = load_reference(loaded, anchor)
        pairs = pair_sites(find_sites(loaded.model), reference)
    except BaseException:
        loaded.unload()
        raise
    loaded.model.requires_grad_(False).eval()
    return LoadedPair(loaded, reference, pairs)


def pair_sites(sites: Sequence[Site], reference: Reference) -> tuple[SitePair, ...]:
    """Pair every site with the anchor's, after checking that their updates can be exchanged.

    Raises:
        SiteError: see `load_pair`.
    """
    for site in sites:
        reason = _obstacle(site)
        if reason:
            raise SiteError(
                f"Forgetting cannot be attributed at site {site.info.name} (family {site.info.family}): {reason}."
            )
    anchors = match_sites(sites, reference)
    for anchor in anchors:
        if anchor is not None and (reason := _obstacle(anchor)):
            raise SiteError(f"The anchor {reference.name!r} cannot be used at site {anchor.info.name}: {reason}.")
    pairs = tuple(SitePair(site, anchor) for site, anchor in zip(sites, anchors, strict=True))
    for pair in pairs:
        _ = pair.outputs  # made now: a tensor made in inference mode could not be differentiated through later
    return pairs


def _obstacle(site: Site) -> str | None:
    """Return why what a site adds to its base output is not sum_e pi_e(h) B_e A_e h alone, or None if it is."""
    if site.info.rank == 0:
        return "its experts are whole networks that belong to the base model, not adapters that can be exchanged"
    if site.respond is None:
        return "its gate does not follow from the site's input alone, so the anchor's cannot be computed on it"
    if all(point.part != "base" for point in site.points):
        return "its base module cannot be run apart from the adapter"
    module: Any = site.module  # LoraLayer is a mixin beside nn.Module
    if isinstance(module, ParamWrapper):
        return "it adapts fused weights inside a native mixture of experts, not a module with an output of its own"
    for name in module.active_adapters if isinstance(module, LoraLayer) else ():
        variant = module.lora_variant.get(name)
        if variant is not None:
            return f"{type(variant).__name__} rescales the base module's output; what it changes is no sum over experts"
        if name in module.lora_B and getattr(module.lora_B[name], "bias", None) is not None:
            return "it adds a bias (lora_bias), which belongs to neither router nor experts"
    return None
