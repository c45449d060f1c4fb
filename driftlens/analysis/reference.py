"""Tables of a recording with a reference: how far experts moved on one input, where a site's drift comes from."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from driftlens.analysis.datasets import attributes
from driftlens.analysis.inputs import Block, block_rows, check_aligned, read_pass, site_blocks
from driftlens.errors import FormatError, NotFoundError
from driftlens.metrics import (
    DriftOriginTokens,
    Reason,
    bootstrap,
    drift_origin,
    expert_drift,
    expert_drift_tokens,
    sample_means,
)
from driftlens.metrics.arrays import FloatArray, divide
from driftlens.store import Recording

__all__ = ["reference_drift"]

_ORIGIN: Final = {
    "codrift_divergence": "total",
    "codrift_inherited": "inherited",
    "codrift_local": "local",
    "codrift_origin_cross": "cross",
}
_EXPERT: Final = ("probe", "site", "expert")
_SITE: Final = ("probe", "site")


def reference_drift(
    current: Recording, anchor: Recording | None = None, *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> xr.Dataset:
    """Return what a recording with a reference tells beyond one without.

    Args:
        current: a recording made with a reference (``driftlens record --ckpt CKPT --reference ANCHOR``).
        anchor: the reference's own recording on the same probes; with it the drift between the two passes is split.
        draws: bootstrap draws over samples.
        level: coverage of the intervals.
        seed: seed of the draws.

    Returns:
        ``expert_drift`` [probe, site, expert], exact over all tokens, and with ``anchor`` also ``codrift_divergence``,
        ``codrift_inherited``, ``codrift_local`` and ``codrift_origin_cross`` [probe, site] over the stored tokens
        (inherited + local + 2 cross = divergence). Beside each NAME are NAME_low and NAME_high, from the stored tokens,
        and NAME_reason (codes of `driftlens.metrics.Reason`); beside expert_drift is ``load``, the expert's mean gate
        in the current pass: an expert that nobody uses may move without consequence. Sites of smaller E are padded
        with NaN, as are sites without pathways.

    Raises:
        NotFoundError: ``current`` was recorded without a reference.
        FormatError: ``anchor`` is another checkpoint than the reference.
        ProbeError: the two recordings hold other tokens.
    """
    if not current.has_reference:
        raise NotFoundError(
            f"{current.path} was recorded without a reference. Record it again with one: "
            "driftlens record --ckpt CKPT --reference ANCHOR"
        )
    if anchor is not None:
        _check_anchor(current, anchor)
    table = _Table(current, draws=draws, level=level, seed=seed)
    tokens = max(current.token_slice(probe).stop - current.token_slice(probe).start for probe in current.probes)
    for block in site_blocks(current.sites, tokens, 2):
        for row, probe in enumerate(current.probes):
            table.add(row, probe, block, anchor)
    return table.dataset(with_origin=anchor is not None)


def _check_anchor(current: Recording, anchor: Recording) -> None:
    wanted, found = current.meta.get("reference_sha256"), anchor.meta.get("checkpoint_sha256")
    if wanted != found:
        raise FormatError(
            f"{current.path} was recorded against {current.meta.get('reference')!r} ({str(wanted)[:12]}), but "
            f"{anchor.path} is of {anchor.meta.get('checkpoint')!r} ({str(found)[:12]}). Give that "
            "checkpoint's recording."
        )
    check_aligned({str(anchor.path): anchor, str(current.path): current})


class _Table:
    """Collects the numbers of one table, block by block."""

    def __init__(self, recording: Recording, *, draws: int, level: float, seed: int) -> None:
        self.recording = recording
        self._draws: dict[str, Any] = {"draws": draws, "level": level}
        self._seed = seed
        shape = (len(recording.probes), len(recording.sites))
        experts = max(site.num_experts for site in recording.sites)
        self.values: dict[str, FloatArray] = {}
        self.reasons: dict[str, NDArray[np.uint8]] = {}
        for name, extent in {"expert_drift": (*shape, experts), **dict.fromkeys(_ORIGIN, shape)}.items():
            self.values |= {f"{name}{end}": np.full(extent, np.nan) for end in ("", "_low", "_high")}
            self.reasons[name] = np.full(extent, Reason.NOT_MEASURED, dtype=np.uint8)
        self.values["load"] = np.full((*shape, experts), np.nan)

    def add(self, row: int, probe: str, block: Block, anchor: Recording | None) -> None:
        """Measure one probe at the sites of a block."""
        experts, recording = slice(0, block.num_experts), self.recording
        for index, rows, positions in block_rows(recording, block):
            group, seen = recording.groups[index], recording.groups[index].reference
            at = block.index[positions]
            self.values["load"][row, at, experts] = divide(
                group.stats["gate_sum"][rows, row], group.stats["count"][row]
            )
            if seen is None or not group.rank:
                continue
            exact = expert_drift(seen.stats["drift_sq"][rows, row], seen.stats["expert_sq"][rows, row])
            empty = group.stats["count"][row] == 0
            self.values["expert_drift"][row, at, experts] = exact.value
            self.reasons["expert_drift"][row, at, experts] = Reason.NO_TOKENS if empty else exact.reason
        grams = self._grams(block)
        if grams is None:
            return
        sample = np.asarray(recording.tokens(probe)["sample"])
        old, new = (read_pass(recording, probe, block, reference=flag) for flag in (True, False))
        assert old.middle is not None and new.middle is not None  # noqa: PT018  # the block has a rank
        if sample.size:
            self._expert_interval(row, block, expert_drift_tokens(old.middle, new.middle, *grams), sample)
        if anchor is None:
            return
        then = read_pass(anchor, probe, block)
        assert then.middle is not None  # the block has a rank
        tokens = drift_origin((then.gate, then.middle), (old.gate, old.middle), (new.gate, new.middle), *grams)
        self._origin(row, block, tokens, sample)

    def _grams(self, block: Block) -> list[FloatArray] | None:
        if not block.rank:
            return None
        flat = block.num_experts * block.rank
        result = [np.zeros((len(block.sites), flat, flat)) for _ in range(3)]
        for index, rows, positions in block_rows(self.recording, block):
            seen = self.recording.groups[index].reference
            if seen is not None:
                for array, name in zip(result, ("anchor", "cross", "current"), strict=True):
                    array[positions] = seen.gram(name)[int(rows.min()) : int(rows.max()) + 1][rows - rows.min()]
        return result

    def _expert_interval(
        self, row: int, block: Block, tokens: tuple[FloatArray, FloatArray], sample: NDArray[np.integer]
    ) -> None:
        # Sums by sample, not means: the exact value weighs tokens alike, and so must its interval.
        counts = np.bincount(np.unique(sample, return_inverse=True)[1])
        sums = [np.moveaxis(sample_means(part, sample, axis=-2), -2, -1) * counts for part in tokens]
        interval = bootstrap(lambda d, a: np.sqrt(divide(d, a)), *sums, seed=self._seed + row, **self._draws)
        for end, values in (("_low", interval.low), ("_high", interval.high)):
            self.values[f"expert_drift{end}"][row, block.index, : block.num_experts] = values

    def _origin(self, row: int, block: Block, tokens: DriftOriginTokens, sample: NDArray[np.integer]) -> None:
        by_sample = tokens.per_sample(sample) if sample.size else tokens
        parts = [getattr(by_sample, name) for name in ("inherited", "local", "cross", "u00_sq", "u11_sq")]
        observed = by_sample.reduce()
        for name, field in _ORIGIN.items():
            self.values[name][row, block.index] = getattr(observed, field)
            self.reasons[name][row, block.index] = observed.reason
            if sample.size:

                def statistic(*means: FloatArray, field: str = field) -> FloatArray:
                    # an average is a stack of one token
                    value: FloatArray = getattr(DriftOriginTokens(*(part[..., None] for part in means)).reduce(), field)
                    return value

                interval = bootstrap(statistic, *parts, seed=self._seed + row, **self._draws)
                self.values[f"{name}_low"][row, block.index] = interval.low
                self.values[f"{name}_high"][row, block.index] = interval.high

    def dataset(self, *, with_origin: bool) -> xr.Dataset:
        """Return the table."""
        flags = {"flag_values": [int(reason) for reason in Reason]}
        flags |= {"flag_meanings": "; ".join(reason.text for reason in Reason)}  # type: ignore[dict-item]
        variables: dict[str, Any] = {"load": (_EXPERT, self.values["load"], attributes("load"))}
        for name in ("expert_drift", *(_ORIGIN if with_origin else ())):
            axes = _EXPERT if name == "expert_drift" else _SITE
            variables[name] = (axes, self.values[name], attributes(name))
            variables |= {f"{name}{end}": (axes, self.values[f"{name}{end}"]) for end in ("_low", "_high")}
            variables[f"{name}_reason"] = (axes, self.reasons[name], flags)
        sites = self.recording.sites
        coords = {
            "probe": np.array(self.recording.probes, dtype=np.str_),
            "site": np.array([site.name for site in sites], dtype=np.str_),
            "layer": ("site", np.array([site.layer for site in sites])),
            "kind": ("site", np.array([site.kind for site in sites], dtype=np.str_)),
            "expert": np.arange(self.values["load"].shape[-1]),
        }
        about = {name: self.recording.meta.get(name) for name in ("checkpoint", "reference")}
        return xr.Dataset(variables, coords, about | self._draws | {"seed": self._seed})
