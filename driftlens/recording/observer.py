"""What happens in the hooks: gather on the device, reduce per group of sites, copy to the host once per batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from driftlens.errors import SiteError
from driftlens.recording.accumulators import REFERENCE_STATISTICS, STATISTICS, batch_sums, expert_input, reference_sums
from driftlens.recording.hooks import HookPoint
from driftlens.recording.reference import Reference, drift_roots, match_sites
from driftlens.recording.sites import Site, output_roots
from driftlens.recording.transfer import HostCopy
from driftlens.store.schema import GATE_SUM_TOLERANCE, REFERENCE_PREFIX, REFERENCE_VALUES, group_sites

__all__ = ["GroupBatch", "Observer", "PendingBatch"]

_ROWS = ("gate", "pathway", "expert_norm", "base_norm", *(REFERENCE_PREFIX + name for name in REFERENCE_VALUES))
_SUMS = (*STATISTICS, *REFERENCE_STATISTICS)
_REFERENCE_GATE, _REFERENCE_PATHWAY = REFERENCE_PREFIX + "gate", REFERENCE_PREFIX + "pathway"
_TRAILING = {"gate": 1, "pathway": 2, "base_norm": 0}
"""Axes of each value after the tokens."""


@dataclass(frozen=True)
class GroupBatch:
    """What one batch gives for one group of sites, on the host.

    Attributes:
        values: ``gate`` [S, m, E], ``pathway`` [S, m, E, r], ``expert_norm`` [S, m, E], ``base_norm`` [S, m] of the
            m tokens whose rows are stored; ``pathway`` and ``expert_norm`` only where the rank is above 0. With a
            reference also ``reference/gate``, ``reference/pathway`` and ``reference/expert_norm``: the anchor's.
        sums: sums over all recorded tokens of the batch, see ``batch_sums`` and ``reference_sums``.
    """

    values: dict[str, NDArray[np.float32]]
    sums: dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class PendingBatch:
    """One batch on its way to the host; see `Observer.result`.

    Attributes:
        copy: the values of all groups, flat.
        layout: their names and shapes.
    """

    copy: HostCopy
    layout: Sequence[tuple[str, list[int]]]


class Observer:
    """Collects what the hooks of ``sites`` see during one forward.

    Use: ``expect(...)``, run the forward inside ``Hooks(root, observer.points, observer.on_fire,
    observer.on_pass)``, then ``take()``.

    Args:
        sites: the observed sites, in model order.
        reference: the anchor that answers to the same inputs, if there is one.

    Raises:
        SiteError: the reference does not fit the sites.
    """

    def __init__(self, sites: Sequence[Site], reference: Reference | None = None) -> None:
        self.sites = list(sites)
        self.groups = group_sites([site.info for site in sites])
        self.points: list[HookPoint] = []
        self._owners: list[tuple[int, str]] = []
        for index, site in enumerate(sites):
            self.points.extend(site.points)
            self._owners.extend((index, point.part) for point in site.points)
        self._ranks = [sites[group[0]].info.rank for group in self.groups]
        self._roots: list[Tensor | None] = []
        self._anchors = None if reference is None else match_sites(sites, reference)
        self._change: list[tuple[Tensor, Tensor] | None] = []
        self.refresh()
        product = [[sites[i].info.semantics == "product_of_sums" for i in group] for group in self.groups]
        device = next(sites[0].module.parameters()).device
        self._product = [torch.tensor(row, device=device) if any(row) else None for row in product]
        self._seen: list[dict[str, Tensor]] = [{} for _ in sites]
        self._layout: list[tuple[str, list[int]]] = []
        self._flat: Tensor | None = None

    def refresh(self) -> None:
        """Read the up-projections anew; needed where they change between the observed forwards."""
        self._roots = [
            output_roots([self.sites[i] for i in group]) if rank else None
            for group, rank in zip(self.groups, self._ranks, strict=True)
        ]
        anchors = self._anchors
        self._change = [
            None
            if anchors is None or not rank
            else drift_roots([self.sites[i] for i in group], [anchors[i] for i in group])
            for group, rank in zip(self.groups, self._ranks, strict=True)
        ]

    def expect(self, tokens: Int[Tensor, " n"], stored: Int[Tensor, " m"]) -> None:
        """Say which tokens of the coming batch count.

        Args:
            tokens: flat positions (batch * length) of all recorded tokens, padding excluded, in storage order.
            stored: positions within ``tokens`` of those whose rows are kept.
        """
        self._tokens, self._stored = tokens, stored
        self._flat = None

    def on_fire(self, index: int, args: tuple[Any, ...], output: Any) -> None:
        """Keep what point ``index`` saw, recorded tokens only (called by ``Hooks``)."""
        owner, part = self._owners[index]
        site = self.sites[owner]
        for name, value in site.read(part, args, output).items():
            if name == "input" and self._anchors is not None:
                self._ask(owner, value)
            if name not in _TRAILING:
                continue
            by_token = value.detach().flatten(0, value.dim() - _TRAILING[name] - 1)
            self._seen[owner][name] = by_token.index_select(0, self._tokens)

    def _ask(self, owner: int, inputs: Tensor) -> None:
        """Let the anchor answer to what site ``owner`` was given; the input itself is not kept."""
        anchor = self._anchors[owner] if self._anchors is not None else None
        if anchor is None or anchor.respond is None:
            return
        info = self.sites[owner].info
        answer = anchor.respond(inputs.detach().flatten(0, -2).index_select(0, self._tokens))
        fewer = info.num_experts - anchor.info.num_experts, info.rank - anchor.info.rank
        seen = self._seen[owner]
        seen[_REFERENCE_GATE] = pad(answer["gate"].detach(), (0, fewer[0]))
        if info.rank:
            seen[_REFERENCE_PATHWAY] = pad(answer["pathway"].detach(), (0, fewer[1], 0, fewer[0]))

    def on_pass(self) -> None:
        """Reduce what was gathered to one flat tensor on the device (called by ``Hooks``)."""
        parts: list[Tensor] = []
        self._layout = []
        for number, (group, roots, product) in enumerate(zip(self.groups, self._roots, self._product, strict=True)):
            names = ("gate", "base_norm") if roots is None else ("gate", "base_norm", "pathway")
            seen = {name: torch.stack([self._seen[i][name] for i in group]).float() for name in names}
            gate, base_norm, pathway = seen["gate"], seen["base_norm"], seen.get("pathway")
            rows = {name: value.index_select(1, self._stored) for name, value in seen.items()}
            middle = None
            if pathway is None or roots is None:
                sums = batch_sums(gate, None, base_norm, None)
            else:
                # ||o_e|| through the r x r root; needed for stored rows only, sums come from the second moments
                middle = None if product is None else expert_input(gate, pathway, product)
                stored = rows["pathway"] if middle is None else middle.index_select(1, self._stored)
                rows["expert_norm"] = _norms(roots, stored)
                sums = batch_sums(gate, pathway, base_norm, roots, middle)
            if self._anchors is not None:
                self._compare(number, gate, pathway if middle is None else middle, rows, sums)
            error = (gate.sum(-1) - 1.0).abs().amax(1)
            for name, value in [*rows.items(), *sums.items(), ("gate_error", error)]:
                parts.append(value.flatten())
                self._layout.append((name, list(value.shape)))
        self._flat = torch.cat(parts)
        self._seen = [{} for _ in self.sites]

    def _compare(
        self, number: int, gate: Tensor, middle: Tensor | None, rows: dict[str, Tensor], sums: dict[str, Tensor]
    ) -> None:
        """Add the anchor's rows and sums of one group; sites that it lacks have gate 0 and output 0."""
        members, change, product = self.groups[number], self._change[number], self._product[number]

        def stacked(name: str, like: Tensor) -> Tensor:
            return torch.stack([self._seen[i].get(name, torch.zeros_like(like[0])) for i in members]).float()

        old_gate = stacked(_REFERENCE_GATE, gate)
        rows[_REFERENCE_GATE] = old_gate.index_select(1, self._stored)
        old_pathway = old_middle = old_roots = change_roots = None
        if middle is not None and change is not None:
            old_pathway = stacked(_REFERENCE_PATHWAY, middle)
            rows[_REFERENCE_PATHWAY] = old_pathway.index_select(1, self._stored)
            old_middle = None if product is None else expert_input(old_gate, old_pathway, product)
            old_roots, change_roots = change
            entering = old_pathway if old_middle is None else old_middle
            rows[REFERENCE_PREFIX + "expert_norm"] = _norms(old_roots, entering.index_select(1, self._stored))
        sums |= reference_sums(old_gate, old_pathway, old_middle, old_roots, middle, change_roots)
        # a gate row of zeros is an absent site
        total = old_gate.sum(-1)
        sums["reference_gate_error"] = torch.minimum((total - 1.0).abs(), total.abs()).amax(1)

    def take(self) -> list[GroupBatch]:
        """Copy the batch to the host and return it by group; waits for the device.

        Raises:
            SiteError: a gate row does not sum to 1, or a value is not finite; names the site.
        """
        return self.result(self.pending())

    def pending(self) -> PendingBatch:
        """Begin the copy of the batch to the host, without waiting for it."""
        if self._flat is None:
            raise SiteError("No forward was observed since `expect`; run the model inside the hooks first.")
        pending = PendingBatch(HostCopy(self._flat), self._layout)
        self._flat = None
        return pending

    def result(self, pending: PendingBatch) -> list[GroupBatch]:
        """Wait for a batch, check it and return it by group; may run in another thread, beside the next forward.

        Raises:
            SiteError: see `take`.
        """
        flat = pending.copy.wait()
        arrays, start = [], 0
        for name, shape in pending.layout:
            size = int(np.prod(shape))
            arrays.append((name, flat[start : start + size].reshape(shape)))
            start += size
        # every group ends with its gate error
        ends = [i + 1 for i, (name, _) in enumerate(arrays) if name == "gate_error"]
        named = [dict(arrays[first:last]) for first, last in zip([0, *ends], ends, strict=False)]
        self._check_finite(named)
        self._check_gates(named)
        return [GroupBatch({n: g[n] for n in _ROWS if n in g}, {n: g[n] for n in _SUMS if n in g}) for g in named]

    def _check_finite(self, named: Sequence[Mapping[str, NDArray[np.float32]]]) -> None:
        broken: list[tuple[int, str]] = []
        for group, arrays in zip(self.groups, named, strict=True):
            for name, value in arrays.items():
                finite = np.isfinite(value).reshape(len(group), -1).all(1)
                broken += [(group[row], name) for row in np.flatnonzero(~finite)]
        if broken:
            # Later sites only inherit what the first one broke.
            first = min(index for index, _ in broken)
            names = ", ".join(name for index, name in broken if index == first)
            raise SiteError(
                f"Site {self.sites[first].info.name} gave values that are not finite ({names}). The checkpoint or its "
                "precision is broken there: check the training log, or record in float32."
            )

    def _check_gates(self, named: Sequence[Mapping[str, NDArray[np.float32]]]) -> None:
        for group, arrays in zip(self.groups, named, strict=True):
            normalised = [self.sites[i].info.normalised for i in group]
            for name, whose in (("gate_error", ""), ("reference_gate_error", ", with the reference's parameters,")):
                off = np.where(normalised, arrays.get(name, 0.0), 0.0)
                row = int(np.argmax(off))
                error = float(off[row])
                if error > GATE_SUM_TOLERANCE:
                    raise SiteError(
                        f"Gate rows of site {self.sites[group[row]].info.name}{whose} do not sum to 1 (off by up to "
                        f"{error:.3g}). What the site family reads are not the weights that the layer uses."
                    )


def _norms(roots: Tensor, middle: Tensor) -> Tensor:
    """Return ||R_e m_e|| [S, n, E]: norms of expert outputs that are never formed."""
    norms: Tensor = torch.linalg.vector_norm(torch.einsum("seij,snej->snei", roots, middle), dim=-1)
    return norms
