"""The forgetting ledger: every unit of lost likelihood booked to a site, and there to router or experts.

All sites go together along the straight line from the anchor's update to the current one, on live inputs:
u_alpha(h) = (1 - alpha) u_old(h) + alpha u_new(h). With L the mean answer NLL of a sample, the chain rule gives

    L(1) - L(0) = integral_0^1 sum_sites sum_i < dL/dy_i , u_new(h_i) - u_old(h_i) > d alpha

with nothing left over, and on one input u_new - u_old = R + E splits exactly into what the gates and what the experts
changed (docs/metrics.md, sections 3a and 4b). The integral is a Gauss-Legendre sum; one forward and one backward per
node serve all sites. What the sum misses, the *residual*, is always reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from driftlens.attribution.intervene import Switchboard
from driftlens.attribution.pairs import Answers, LoadedPair, SitePair
from driftlens.backbones import Encoded, decoder_layers
from driftlens.backbones.encoding import IGNORED_LABEL
from driftlens.backbones.prefix import FrozenPrefix
from driftlens.errors import ConfigError, ProbeError
from driftlens.recording.sites import base_module, forward_context
from driftlens.streams import Sample
from driftlens.training.data import EncodedTask, TrainingCollator

__all__ = ["PARTS", "AnswerBatches", "Ledger", "TokenEntries", "book_ledger", "site_entries"]

PARTS = ("router", "experts")
"""The two accounts of every site."""


@dataclass(frozen=True)
class _Batch:
    """One padded batch: ``rows`` are the samples' numbers, ``lengths`` their tokens, which end together."""

    inputs: dict[str, Any]
    labels: Tensor
    rows: Tensor
    lengths: NDArray[np.int64]


class AnswerBatches:
    """Samples whose answers a model is asked for, encoded, batched and put on the device once.

    Args:
        loaded: the model; its lowest site says which layers below need to run only once.
        samples: questions with answers; or ready-made tokens.
        batch_size: samples per forward.
        prefix_cache: compute the layers below the lowest site once and keep their states.

    Attributes:
        samples: ids of the samples.
        encoded: their tokens.

    Raises:
        ProbeError: no samples, or one without an answer.
    """

    def __init__(
        self,
        loaded: LoadedPair,
        samples: Sequence[Sample] | Sequence[Encoded],
        *,
        batch_size: int = 16,
        prefix_cache: bool = True,
    ) -> None:
        self._loaded = loaded
        encoder = loaded.backbone.encoder
        self.encoded = [s if isinstance(s, Encoded) else loaded.backbone.need_encoder().encode(s) for s in samples]
        self.samples = tuple(sample.sample_id for sample in self.encoded)
        if not self.encoded:
            raise ProbeError("There are no samples, so there is no loss to book. Give a task with at least one.")
        mute = [sample.sample_id for sample in self.encoded if len(sample.input_ids) <= sample.n_prompt]
        if mute:
            raise ProbeError(
                f"{len(mute)} of {len(self.encoded)} samples have no answer (for example {mute[0]!r}). Forgetting is a "
                "loss on reference answers: give probes with answers."
            )
        pad = 0 if encoder is None else encoder.pad_token_id
        self.prefix = self._frozen_prefix(pad) if prefix_cache else None
        states = None if self.prefix is None else self.prefix.compute(self.encoded, batch_size, loaded.device)
        # Samples of like length share a batch.
        order = sorted(range(len(self.encoded)), key=lambda i: len(self.encoded[i].input_ids))
        data, collate = EncodedTask(self.encoded, states), TrainingCollator(pad)
        chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.batches = [self._batch(data, collate, chunk) for chunk in chunks]

    def _frozen_prefix(self, pad: int) -> FrozenPrefix | None:
        """Return the layers below the lowest site; None where the model has no stack of decoder layers."""
        root = base_module(self._loaded.model)
        try:
            layers = decoder_layers(root)
        except ConfigError:
            return None
        sites = {id(pair.current.module) for pair in self._loaded.pairs}
        depths = [i for i, layer in enumerate(layers) if any(id(module) in sites for module in layer.modules())]
        inside = sum(1 for layer in layers for module in layer.modules() if id(module) in sites)
        if not depths or inside < len(sites):  # a site elsewhere may come before the layers
            return None
        return FrozenPrefix(root, depths[0], pad)

    def _batch(self, data: EncodedTask, collate: TrainingCollator, chunk: Sequence[int]) -> _Batch:
        inputs = collate([data[i] for i in chunk])
        device = self._loaded.device
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        lengths = np.array([len(self.encoded[i].input_ids) for i in chunk])
        return _Batch(moved, moved.pop("labels"), torch.tensor(chunk, device=device), lengths)

    def losses(self, batch: _Batch) -> Float[Tensor, " batch"]:
        """Return the mean answer NLL of every sample of one batch, in nats, with whatever is switched in the model."""
        model = self._loaded.model
        context = nullcontext() if self.prefix is None else self.prefix.skipping()
        with context, forward_context(model):
            logits = base_module(model)(**batch.inputs, use_cache=False).logits.float()
        labels = batch.labels[:, 1:]
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=IGNORED_LABEL)
        answer = labels != IGNORED_LABEL
        means: Tensor = losses.sum(dim=1) / answer.sum(dim=1)
        return means

    @torch.inference_mode()
    def nll(self) -> NDArray[np.float64]:
        """Return the mean answer NLL of every sample, [samples] in nats, with whatever is switched in the model."""
        found = torch.zeros(len(self.samples), dtype=torch.float64, device=self._loaded.device)
        for batch in self.batches:
            found[batch.rows] = self.losses(batch).double()
        values: NDArray[np.float64] = found.cpu().numpy()
        return values


@dataclass(frozen=True)
class TokenEntries:
    """The ledger by token, tokens of a sample in order, samples in the order in which they were given.

    Attributes:
        entries: [tokens, 2] nats booked to router and experts of all sites at this token, per sample's loss.
        sample: [tokens] number of the sample.
        position: [tokens] position in the sample.
        token_id: [tokens].
        role: [tokens] index into `ROLES`.
    """

    entries: NDArray[np.float64]
    sample: NDArray[np.int64]
    position: NDArray[np.int64]
    token_id: NDArray[np.int64]
    role: NDArray[np.uint8]


@dataclass(frozen=True)
class Ledger:
    """The rise of a task's answer NLL, booked.

    Attributes:
        samples: ids of the samples.
        sites: names of the sites.
        entries: [samples, sites, 2, E] nats: how much of the sample's rise is booked to router (0) and experts (1) of
            a site, by expert. Positive entries raised the loss. Experts that a site does not have are 0.
        nll_anchor: [samples] answer NLL with the anchor's updates, L(0).
        nll_current: [samples] answer NLL of the current checkpoint, L(1).
        tokens: the same sums by token.
        panels: ends of the panels of the path, from 0 to 1.
        nodes: Gauss-Legendre nodes of each panel.
        evaluations: nodes evaluated in all, those of refined panels included.
        panel_residuals: what each panel's sum misses, mean over samples in nats.
    """

    samples: tuple[str, ...]
    sites: tuple[str, ...]
    entries: Float[NDArray[np.float64], "samples sites 2 E"]
    nll_anchor: NDArray[np.float64]
    nll_current: NDArray[np.float64]
    tokens: TokenEntries
    panels: tuple[float, ...]
    nodes: int
    evaluations: int
    panel_residuals: tuple[float, ...]

    @property
    def rise(self) -> float:
        """Mean rise of the answer NLL over samples, in nats."""
        return float((self.nll_current - self.nll_anchor).mean())

    @property
    def router(self) -> float:
        """Nats booked to routers, mean over samples."""
        return float(self.entries[:, :, 0].sum(axis=(1, 2)).mean())

    @property
    def experts(self) -> float:
        """Nats booked to experts, mean over samples."""
        return float(self.entries[:, :, 1].sum(axis=(1, 2)).mean())

    @property
    def residuals(self) -> NDArray[np.float64]:
        """[samples] rise minus ledger, in nats: what numerical integration and jumps of top-k gates leave over."""
        missed: NDArray[np.float64] = self.nll_current - self.nll_anchor - self.entries.sum(axis=(1, 2, 3))
        return missed

    @property
    def residual(self) -> float:
        """Mean rise minus ledger, in nats."""
        return float(self.residuals.mean())


def site_entries(pair: SitePair, answers: Answers, grad: Float[Tensor, "n d_out"]) -> Float[Tensor, "n 2 E"]:
    """Return < dL/dy_i, R_{i,e} > and < dL/dy_i, E_{i,e} > of one site.

    With u^{ab} the update with gate a and experts b, R = ((u^10 - u^00) + (u^11 - u^01)) / 2 and
    E = ((u^01 - u^00) + (u^11 - u^10)) / 2, which is the midpoint identity of section 3a. Only products with
    B^T dL/dy are formed, never outputs of single experts.
    """
    experts, rank = answers.z1.shape[-2:]
    pulled = (grad.float() @ pair.outputs).reshape(-1, 2, experts, rank)

    def value(gate: int, by: int) -> Float[Tensor, "n E"]:
        return (answers.gated(gate, by, pair.product) * pulled[:, by]).sum(dim=-1)

    u00, u01, u10, u11 = value(0, 0), value(0, 1), value(1, 0), value(1, 1)
    return torch.stack([(u10 - u00) + (u11 - u01), (u01 - u00) + (u11 - u10)], dim=1) / 2


class _Sums:
    """What is accumulated on the device over one panel of the path."""

    def __init__(self, pairs: Sequence[SitePair], batches: AnswerBatches, device: torch.device) -> None:
        self._pairs = pairs
        # Sums of many small products of both signs: float64 where the device has it.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        widest = max(pair.info.num_experts for pair in pairs)
        self.entries = torch.zeros(len(batches.samples), len(pairs), 2, widest, dtype=dtype, device=device)
        self.tokens = [
            torch.zeros(*batch.inputs["attention_mask"].shape, 2, dtype=dtype, device=device)
            for batch in batches.batches
        ]

    def book_into(self, number: int, batch: _Batch, weight: float) -> Callable[[int, Answers, Tensor], None]:
        """Return the function that books the gradients of batch ``number`` at a node of this weight."""
        mask = batch.inputs["attention_mask"]

        @torch.no_grad()
        def book(site: int, answers: Answers, grad: Tensor) -> None:
            values = site_entries(self._pairs[site], answers, grad)
            values = values.reshape(*mask.shape, *values.shape[1:]).to(self.entries.dtype)
            values = values * (weight * mask[..., None, None])
            self.entries[batch.rows, site, :, : values.shape[-1]] += values.sum(dim=1)
            self.tokens[number] += values.sum(dim=-1)

        return book


def _panel(
    loaded: LoadedPair,
    board: Switchboard,
    batches: AnswerBatches,
    ends: tuple[float, float],
    nodes: int,
    on_step: Callable[[], None],
) -> _Sums:
    """Integrate over one panel of the path."""
    sums = _Sums(loaded.pairs, batches, loaded.device)
    at, weights = np.polynomial.legendre.leggauss(nodes)
    half = (ends[1] - ends[0]) / 2
    for x, w in zip(at.tolist(), weights.tolist(), strict=True):
        alpha = ends[0] + half * (1 + x)
        for number, batch in enumerate(batches.batches):
            board.path(alpha, sums.book_into(number, batch, half * w))
            with torch.enable_grad():
                # Samples of a batch do not see each other, so one backward of the sum gives each its own gradient.
                batches.losses(batch).sum().backward()  # type: ignore[no-untyped-call]
            on_step()
    return sums


@dataclass
class _Piece:
    """One panel with what was booked there and the losses at its ends."""

    ends: tuple[float, float]
    nll: tuple[NDArray[np.float64], NDArray[np.float64]]
    sums: _Sums
    residual: float = field(init=False)

    def __post_init__(self) -> None:
        booked = float(self.sums.entries.sum()) / len(self.nll[0])
        self.residual = float((self.nll[1] - self.nll[0]).mean()) - booked


def book_ledger(
    loaded: LoadedPair,
    batches: AnswerBatches,
    *,
    nodes: int = 8,
    tolerance: float | None = None,
    max_nodes: int = 64,
    on_step: Callable[[], None] = lambda: None,
) -> Ledger:
    """Book the rise of the answer NLL between two checkpoints to sites, routers and experts (metrics.md 4b).

    Args:
        loaded: the two checkpoints.
        batches: the samples of an old task.
        nodes: Gauss-Legendre nodes per panel; the path is one panel unless ``tolerance`` asks for more.
        tolerance: largest residual, as a share of the rise. The panel with the largest residual is halved until the
            whole stays below it. A sparse gate jumps as its inputs move along the path, which no number of nodes
            resolves; ``max_nodes`` ends the search, and the residual says what is left.
        max_nodes: most nodes that may be evaluated.
        on_step: called after each batch.

    Raises:
        ConfigError: nodes, tolerance or max_nodes out of range.
    """
    if nodes < 1 or max_nodes < nodes:
        raise ConfigError(f"nodes={nodes} and max_nodes={max_nodes}: give 1 <= nodes <= max_nodes.")
    if tolerance is not None and not tolerance > 0:
        raise ConfigError(f"tolerance={tolerance}: give a positive share of the rise, for example 0.01.")
    with Switchboard(loaded) as board:

        def loss(alpha: float) -> NDArray[np.float64]:
            board.path(alpha)
            return batches.nll()

        def piece(ends: tuple[float, float], nll: tuple[NDArray[np.float64], NDArray[np.float64]]) -> _Piece:
            return _Piece(ends, nll, _panel(loaded, board, batches, ends, nodes, on_step))

        pieces = [piece((0.0, 1.0), (loss(0.0), loss(1.0)))]
        rise, used = pieces[0].nll[1] - pieces[0].nll[0], nodes
        allowed = np.inf if tolerance is None else tolerance * abs(float(rise.mean()))
        while abs(sum(part.residual for part in pieces)) > allowed and used + 2 * nodes <= max_nodes:
            worst = max(pieces, key=lambda part: abs(part.residual))
            middle = (worst.ends[0] + worst.ends[1]) / 2
            between = loss(middle)
            halves = [
                piece((worst.ends[0], middle), (worst.nll[0], between)),
                piece((middle, worst.ends[1]), (between, worst.nll[1])),
            ]
            at = pieces.index(worst)
            pieces[at : at + 1] = halves
            used += 2 * nodes
    return Ledger(
        samples=batches.samples,
        sites=tuple(pair.info.name for pair in loaded.pairs),
        entries=_total([part.sums.entries for part in pieces]),
        nll_anchor=pieces[0].nll[0],
        nll_current=pieces[-1].nll[1],
        tokens=_by_token(batches, [part.sums.tokens for part in pieces]),
        panels=(0.0, *(part.ends[1] for part in pieces)),
        nodes=nodes,
        evaluations=used,
        panel_residuals=tuple(part.residual for part in pieces),
    )


def _total(parts: Sequence[Tensor]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = torch.stack(list(parts)).sum(dim=0).double().cpu().numpy()
    return total


def _by_token(batches: AnswerBatches, panels: Sequence[Sequence[Tensor]]) -> TokenEntries:
    """Take the padding off and put the samples back into their order."""
    found: dict[int, NDArray[np.float64]] = {}
    for number, batch in enumerate(batches.batches):
        values = _total([panel[number] for panel in panels])
        for row, sample in enumerate(batch.rows.tolist()):
            found[sample] = values[row, values.shape[1] - batch.lengths[row] :]
    encoded = batches.encoded
    lengths = [len(sample.input_ids) for sample in encoded]
    return TokenEntries(
        entries=np.concatenate([found[i] for i in range(len(encoded))]),
        sample=np.repeat(np.arange(len(encoded)), lengths),
        position=np.concatenate([np.arange(length) for length in lengths]),
        token_id=np.concatenate([sample.input_ids for sample in encoded]),
        role=np.concatenate([sample.roles for sample in encoded]),
    )
