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
from driftlens.recording.accumulators import STATISTICS, batch_sums
from driftlens.recording.hooks import HookPoint
from driftlens.recording.sites import Site, output_roots
from driftlens.store.schema import GATE_SUM_TOLERANCE, group_sites

__all__ = ["GroupBatch", "Observer"]

_ROWS = ("gate", "pathway", "expert_norm", "base_norm")


@dataclass(frozen=True)
class GroupBatch:
    """What one batch gives for one group of sites, on the host.

    Attributes:
        values: ``gate`` [S, m, E], ``pathway`` [S, m, E, r], ``expert_norm`` [S, m, E], ``base_norm`` [S, m] of the
            m tokens whose rows are stored.
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
        self._roots = [output_roots([self.sites[i] for i in group]) for group in self.groups]
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
        leading = {"gate": 1, "pathway": 2, "base_norm": 0}
        for name, value in site.read(part, args, output).items():
            by_token = value.detach().flatten(0, value.dim() - leading[name] - 1)
            self._seen[owner][name] = by_token.index_select(0, self._tokens)

    def on_pass(self) -> None:
        """Reduce what was gathered to one flat tensor on the device (called by ``Hooks``)."""
        parts: list[Tensor] = []
        self._layout = []
        for group, roots in zip(self.groups, self._roots, strict=True):
            gate, pathway, base_norm = (
                torch.stack([self._seen[i][name] for i in group]).float() for name in ("gate", "pathway", "base_norm")
            )
            rows = {
                "gate": gate.index_select(1, self._stored),
                "pathway": pathway.index_select(1, self._stored),
                "base_norm": base_norm.index_select(1, self._stored),
            }
            # ||o_e|| through the r x r root; needed for stored rows only, sums come from the second moments
            output = torch.einsum("seij,snej->snei", roots, rows["pathway"])
            rows["expert_norm"] = torch.linalg.vector_norm(output, dim=-1)
            sums = batch_sums(gate, pathway, base_norm, roots)
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
        per_group = len(arrays) // len(self.groups)
        named = [dict(arrays[i * per_group : (i + 1) * per_group]) for i in range(len(self.groups))]
        self._check_finite(named)
        self._check_gates(named)
        return [GroupBatch({n: g[n] for n in _ROWS}, {n: g[n] for n in STATISTICS}) for g in named]

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
            row = int(np.argmax(arrays["gate_error"]))
            error = float(arrays["gate_error"][row])
            if error > GATE_SUM_TOLERANCE:
                raise SiteError(
                    f"Gate rows of site {self.sites[group[row]].info.name} do not sum to 1 (off by up to {error:.3g}). "
                    "What the site family reads are not the weights that the layer uses."
                )
