"""Drift of every probe at every checkpoint and site, with intervals, noise floor, chance and reasons.

The work is cut into blocks of sites, which workers measure side by side; within a block one probe at a time is read at
all checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from driftlens.analysis.families import FAMILIES, Composed, Family, Statistics
from driftlens.analysis.inputs import Block, Grams, read_pass
from driftlens.analysis.pairs import Pair, PairGrams, Pass
from driftlens.metrics import Reason, bootstrap_weights, percentile_interval, resampled_means
from driftlens.metrics.arrays import FloatArray, mean_defined
from driftlens.store import Recording

__all__ = ["DriftArrays", "Plan", "measure_block"]

_SPREAD_FLOOR = 1e-6
"""Noise floor of router_js where no second recording tells it; float16 gates alone give about 1e-7."""


@dataclass(frozen=True)
class Plan:
    """What is compared with what.

    Attributes:
        recordings: one per checkpoint, in order; proved to hold the same tokens.
        probes: names of the probes in the order of the tables.
        anchors: [P] position of each probe's anchor in ``recordings``; -1 if that checkpoint was not recorded.
        noise: a second recording of one checkpoint and that checkpoint's position, if there is one.
        draws: bootstrap draws.
        level: coverage of the intervals.
        seed: seed of the draws.
    """

    recordings: Sequence[Recording]
    probes: Sequence[str]
    anchors: NDArray[np.intp]
    noise: tuple[int, Recording] | None = None
    draws: int = 1000
    level: float = 0.95
    seed: int = 0


class DriftArrays:
    """Results by name of the measure: P probes, C checkpoints, S sites.

    Attributes:
        value: [P, C, S] and likewise ``low``, ``high``, ``chance``; ``reason`` is uint8.
        explained: names of the measures that can be undefined.
        noise: [P, S], the same measures between two recordings of one checkpoint.
        mean: [P, C] averages over sites with ``mean_low`` and ``mean_high``.
        trend: [C] averages over the old probes (anchor before the checkpoint), ``trend_low``, ``trend_high``.
    """

    def __init__(self, plan: Plan, sites: int) -> None:
        self.plan = plan
        self.names = [name for key in FAMILIES for name in FAMILIES.get(key).measures]
        shape = (len(plan.probes), len(plan.recordings), sites)

        def empty(extent: tuple[int, ...]) -> dict[str, FloatArray]:
            return {name: np.full(extent, np.nan) for name in self.names}

        self.value, self.low, self.high = empty(shape), empty(shape), empty(shape)
        self.chance: dict[str, FloatArray] = {}
        self.explained: set[str] = set()
        self.reason = {name: np.full(shape, Reason.NOT_MEASURED, dtype=np.uint8) for name in self.names}
        self.noise = empty((shape[0], sites))
        # Sums over the defined sites of every bootstrap draw: an interval of an average needs the draws themselves.
        self._sum = {name: np.zeros((*shape[:2], plan.draws)) for name in self.names}
        self._count = {name: np.zeros((*shape[:2], plan.draws), dtype=np.int32) for name in self.names}

    def add(self, name: str, at: tuple[int, int], observed: Composed, draws: Composed | None) -> None:
        """Store one measure of one pair at all sites; ``draws`` holds [draws, S], None if too few samples."""
        self.value[name][at] = observed.values[name]
        reason = observed.reasons.get(name)
        self.reason[name][at] = _plain_reason(observed.values[name]) if reason is None else reason
        if reason is not None:
            self.explained.add(name)
        if name in observed.chance:
            if name not in self.chance:
                self.chance[name] = np.full(self.value[name].shape, np.nan)
            self.chance[name][at] = observed.chance[name]
        if draws is None:
            self._count[name][at] = -1
            return
        replicates = draws.values[name]
        self.low[name][at], self.high[name][at] = percentile_interval(replicates, self.plan.level)
        defined = ~np.isnan(replicates)
        if defined.all():
            self._sum[name][at], self._count[name][at] = replicates.sum(axis=1), replicates.shape[1]
        else:
            self._sum[name][at] = np.where(defined, replicates, 0.0).sum(axis=1)
            self._count[name][at] = defined.sum(axis=1)

    def merge(self, part: DriftArrays, sites: NDArray[np.intp]) -> None:
        """Take over the results of other ``sites`` (positions here); call it in the order of the sites."""
        for mine, other in ((self.value, part.value), (self.low, part.low), (self.high, part.high)):
            for name in self.names:
                mine[name][..., sites] = other[name]
        for name in self.names:
            self.reason[name][..., sites] = part.reason[name]
            self.noise[name][..., sites] = part.noise[name]
            self._sum[name] += part._sum[name]
            self._count[name] += part._count[name]
        for name, chance in part.chance.items():
            self.chance.setdefault(name, np.full(self.value[name].shape, np.nan))[..., sites] = chance
        self.explained |= part.explained

    def averages(self, name: str) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Average a measure over sites: value, low, high, each [P, C]."""
        low, high = percentile_interval(np.moveaxis(self._draws(name), -1, 0), self.plan.level)
        return mean_defined(self.value[name]), low, high

    @property
    def old(self) -> NDArray[np.bool_]:
        """[P, C]: whether the checkpoint lies after the probe's anchor."""
        anchors = self.plan.anchors[:, None]
        result: NDArray[np.bool_] = (anchors >= 0) & (anchors < np.arange(len(self.plan.recordings)))
        return result

    def trend(self, name: str) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Average a measure over sites, then old probes: value, low, high, each [C]; NaN where no probe is old."""
        old = self.old
        value = mean_defined(np.where(old, mean_defined(self.value[name]), np.nan), axis=0)
        draws = mean_defined(np.where(old[..., None], self._draws(name), np.nan), axis=0)
        low, high = percentile_interval(np.moveaxis(draws, -1, 0), self.plan.level)
        return value, low, high

    def _draws(self, name: str) -> FloatArray:
        """[P, C, draws] averages over sites."""
        count = self._count[name]
        result = np.full(count.shape, np.nan)
        np.divide(self._sum[name], count, out=result, where=count > 0)
        return result


def _plain_reason(value: FloatArray) -> NDArray[np.uint8]:
    return np.where(np.isnan(value), np.uint8(Reason.NOT_FINITE), np.uint8(Reason.DEFINED))


def measure_block(plan: Plan, block: Block, grams: Grams | None) -> DriftArrays:
    """Return the results of a block of sites.

    Args:
        plan: what is compared.
        block: the sites.
        grams: their Gram matrices over the plan's checkpoints.
    """
    out = DriftArrays(plan, len(block.sites))
    # A gate that weighs all experts has no set of its own; half of them make the measure comparable over sites.
    top_k = np.array([site.top_k or max(1, site.num_experts // 2) for site in block.sites])
    families = [FAMILIES.get(key) for key in FAMILIES]
    for row, probe in enumerate(plan.probes):
        sample = np.asarray(plan.recordings[0].tokens(probe)["sample"])
        if sample.size == 0:
            _mark_empty(out, row)
            continue
        anchor = int(plan.anchors[row])
        if anchor < 0 and plan.noise is None:
            continue
        passes = [read_pass(recording, probe, block) for recording in plan.recordings]

        def pair_of(
            first: Pass, second: Pass, at: tuple[int, int], floor: FloatArray, sample: NDArray[np.integer] = sample
        ) -> Pair:
            inner = (
                None
                if grams is None
                else PairGrams(grams.b[at[0], at[0]], grams.b[at[0], at[1]], grams.b[at[1], at[1]])
            )
            return Pair(first, second, sample, top_k, inner, floor)

        floor = np.full(len(block.sites), _SPREAD_FLOOR)
        if plan.noise is not None:
            position, recording = plan.noise
            again = pair_of(passes[position], read_pass(recording, probe, block), (position, position), floor)
            for family in families:
                for name, value in _observe(family, again)[1].values.items():
                    if name not in family.floorless:
                        out.noise[name][row] = np.abs(value)
            floor = np.fmax(floor, out.noise["router_js"][row])
        if anchor < 0:
            continue
        weights = bootstrap_weights(len(np.unique(sample)), plan.draws, plan.seed + row)
        for current in range(len(passes)):
            pair = pair_of(passes[anchor], passes[current], (anchor, current), floor)
            for family in families:
                statistics, observed = _observe(family, pair)
                draws = _resample(family, statistics, weights)
                for name in family.measures:
                    out.add(name, (row, current), observed, draws)
    return out


def _observe(family: Family, pair: Pair) -> tuple[Statistics, Composed]:
    statistics = family.statistics(pair)
    return statistics, _compose(family, statistics, mean_defined)


def _resample(family: Family, statistics: Statistics, weights: FloatArray) -> Composed | None:
    if weights.shape[1] < 2:
        return None
    return _compose(family, statistics, lambda values: resampled_means(values, weights))


def _compose(family: Family, statistics: Statistics, average: Callable[[FloatArray], FloatArray]) -> Composed:
    means: Mapping[str, FloatArray] = {name: average(values) for name, values in statistics.by_sample.items()}
    return family.compose({**means, **statistics.facts})


def _mark_empty(out: DriftArrays, row: int) -> None:
    for name in out.names:
        out.reason[name][row] = Reason.NO_TOKENS
