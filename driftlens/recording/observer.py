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

from driftlens.errors import SiteError
from driftlens.recording.accumulators import STATISTICS, batch_sums, expert_input
from driftlens.recording.hooks import HookPoint
from driftlens.recording.sites import Site, output_roots
from driftlens.store.schema import GATE_SUM_TOLERANCE, group_sites

__all__ = ["GroupBatch", "Observer"]

_ROWS = ("gate", "pathway", "expert_norm", "base_norm")
_TRAILING = {"gate": 1, "pathway": 2, "base_norm": 0}
"""Axes of each value after the tokens."""


@dataclass(frozen=True)
class GroupBatch:
    """What one batch gives for one group of sites, on the host.

    Attributes:
        values: ``gate`` [S, m, E], ``pathway`` [S, m, E, r], ``expert_norm`` [S, m, E], ``base_norm`` [S, m] of the
            m tokens whose rows are stored; ``pathway`` and ``expert_norm`` only where the rank is above 0.
        sums: sums over all recorded tokens of the batch, see ``batch_sums``.
    """

    values: dict[str, NDArray[np.float32]]
    sums: dict[str, NDArray[np.float32]]


class Observer:
    """Collects what the hooks of ``sites`` see during one forward.

    Use: ``expect(...)``, run the forward inside ``Hooks(root, observer.points, observer.on_fire,
    observer.on_pass)``, then ``take()``.

    Args:
        sites: the observed sites, in model order.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = list(sites)
        self.groups = group_sites([site.info for site in sites])
        self.points: list[HookPoint] = []
        self._owners: list[tuple[int, str]] = []
        for index, site in enumerate(sites):
            self.points.extend(site.points)
            self._owners.extend((index, point.part) for point in site.points)
        self._ranks = [sites[group[0]].info.rank for group in self.groups]
        self._roots = [
            output_roots([self.sites[i] for i in group]) if rank else None
            for group, rank in zip(self.groups, self._ranks, strict=True)
        ]
        product = [[sites[i].info.semantics == "product_of_sums" for i in group] for group in self.groups]
        device = next(sites[0].module.parameters()).device
        self._product = [torch.tensor(row, device=device) if any(row) else None for row in product]
        self._seen: list[dict[str, Tensor]] = [{} for _ in sites]
        self._layout: list[tuple[str, list[int]]] = []
        self._flat: Tensor | None = None

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
            if name not in _TRAILING:
                continue
            by_token = value.detach().flatten(0, value.dim() - _TRAILING[name] - 1)
            self._seen[owner][name] = by_token.index_select(0, self._tokens)

    def on_pass(self) -> None:
        """Reduce what was gathered to one flat tensor on the device (called by ``Hooks``)."""
        parts: list[Tensor] = []
        self._layout = []
        for group, roots, product in zip(self.groups, self._roots, self._product, strict=True):
            names = ("gate", "base_norm") if roots is None else ("gate", "base_norm", "pathway")
            seen = {name: torch.stack([self._seen[i][name] for i in group]).float() for name in names}
            gate, base_norm, pathway = seen["gate"], seen["base_norm"], seen.get("pathway")
            rows = {name: value.index_select(1, self._stored) for name, value in seen.items()}
            if pathway is None or roots is None:
                sums = batch_sums(gate, None, base_norm, None)
            else:
                # ||o_e|| through the r x r root; needed for stored rows only, sums come from the second moments
                middle = None if product is None else expert_input(gate, pathway, product)
                stored = rows["pathway"] if middle is None else middle.index_select(1, self._stored)
                output = torch.einsum("seij,snej->snei", roots, stored)
                rows["expert_norm"] = torch.linalg.vector_norm(output, dim=-1)
                sums = batch_sums(gate, pathway, base_norm, roots, middle)
            error = (gate.sum(-1) - 1.0).abs().amax(1)
            for name, value in [*rows.items(), *sums.items(), ("gate_error", error)]:
                parts.append(value.flatten())
                self._layout.append((name, list(value.shape)))
        self._flat = torch.cat(parts)
        self._seen = [{} for _ in self.sites]

    def take(self) -> list[GroupBatch]:
        """Copy the batch to the host (the only synchronisation of a batch) and return it by group.

        Raises:
            SiteError: a gate row does not sum to 1, or a value is not finite; names the site.
        """
        if self._flat is None:
            raise SiteError("No forward was observed since `expect`; run the model inside the hooks first.")
        flat = self._flat.cpu().numpy()
        arrays, start = [], 0
        for name, shape in self._layout:
            size = int(np.prod(shape))
            arrays.append((name, flat[start : start + size].reshape(shape)))
            start += size
        # every group ends with its gate error
        ends = [i + 1 for i, (name, _) in enumerate(arrays) if name == "gate_error"]
        named = [dict(arrays[first:last]) for first, last in zip([0, *ends], ends, strict=False)]
        self._check_finite(named)
        self._check_gates(named)
        return [GroupBatch({n: g[n] for n in _ROWS if n in g}, {n: g[n] for n in STATISTICS if n in g}) for g in named]

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
            off = np.where([self.sites[i].info.normalised for i in group], arrays["gate_error"], 0.0)
            row = int(np.argmax(off))
            error = float(off[row])
            if error > GATE_SUM_TOLERANCE:
                raise SiteError(
                    f"Gate rows of site {self.sites[group[row]].info.name} do not sum to 1 (off by up to {error:.3g}). "
                    "What the site family reads are not the weights that the layer uses."
                )
