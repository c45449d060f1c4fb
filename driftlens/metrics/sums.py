"""Sums of statistics over tokens, plain and by sample, that batches and shards add up in any order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from driftlens.errors import ConfigError, ProbeError
from driftlens.metrics.arrays import FloatArray, as_float, divide

__all__ = ["ProbeSums", "SampleSums"]


@dataclass
class ProbeSums:
    """Plain sums over the tokens of one probe, of any statistics.

    Attributes:
        count: tokens summed so far.
        sums: statistic name -> float64 array [S, ...]; empty until the first ``update``.
    """

    count: int = 0
    sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def update(self, count: int, batch: Mapping[str, NDArray[np.floating]]) -> None:
        """Add the sums of one batch of ``count`` tokens (float32 or float64 host arrays)."""
        self.count += count
        for name, value in batch.items():
            value64 = value.astype(np.float64)
            self.sums[name] = self.sums[name] + value64 if name in self.sums else value64

    def merge(self, other: ProbeSums) -> ProbeSums:
        """Return the sums over both token sets (neither operand changes)."""
        merged = ProbeSums(self.count, dict(self.sums))
        merged.update(other.count, other.sums)
        return merged

    def result(self) -> dict[str, NDArray[np.float64]]:
        """Return the sums by name (float64 copies)."""
        return {name: value.copy() for name, value in self.sums.items()}


@dataclass
class SampleSums:
    """Sums over the tokens of every sample, of any statistics.

    Attributes:
        sample: [m] samples seen so far, ascending.
        sums: statistic name -> float64 [m, ...].
        counts: statistic name -> tokens behind each sum, float64 [m, ...]; the undefined ones are not counted.
    """

    sample: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    sums: dict[str, FloatArray] = field(default_factory=dict)
    counts: dict[str, FloatArray] = field(default_factory=dict)

    def update(
        self, sample: NDArray[np.integer], values: Mapping[str, ArrayLike], *, skip_undefined: bool = False
    ) -> None:
        """Add one batch of tokens.

        Args:
            sample: [n] integer sample of each token, in any order.
            values: statistic name -> [n, ...], tokens first. The names and the shapes behind n are those of the
                first batch.
            skip_undefined: leave NaN out, as in `driftlens.metrics.sample_means`.

        Raises:
            ProbeError: not one sample per token.
            ConfigError: statistics or shapes that are not those of the first batch.
        """
        ids, place = np.unique(np.asarray(sample, dtype=np.int64), return_inverse=True)
        order = np.argsort(place, kind="stable")
        starts = np.searchsorted(place[order], np.arange(len(ids)))
        batch = SampleSums(ids)
        for name, value in values.items():
            tokens = as_float(value)
            if tokens.ndim == 0 or len(tokens) != len(place):
                raise ProbeError(
                    f"{name} has shape {tokens.shape} for {len(place)} samples; expected one sample per token."
                )
            known = ~np.isnan(tokens) if skip_undefined else np.ones((len(tokens), *(1,) * (tokens.ndim - 1)))
            filled = np.where(known, tokens, 0.0) if skip_undefined else tokens
            batch.sums[name], batch.counts[name] = (
                np.add.reduceat(part[order], starts, axis=0) if len(ids) else part
                for part in (filled, known.astype(np.float64))
            )
        merged = self.merge(batch)
        self.sample, self.sums, self.counts = merged.sample, merged.sums, merged.counts

    def merge(self, other: SampleSums) -> SampleSums:
        """Return the sums over both token sets (neither operand changes).

        Raises:
            ConfigError: the two hold different statistics, or the same of different shape.
        """
        if not self.sums or not other.sums:
            full = self if self.sums else other
            return SampleSums(full.sample, dict(full.sums), dict(full.counts))
        shapes = [{name: value.shape[1:] for name, value in part.sums.items()} for part in (self, other)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"Sums of {shapes[0]} and of {shapes[1]} cannot be added; shards need the same sites, experts and "
                "statistics. Pad the experts of a method that grew, or use one accumulator for each group of sites."
            )
        ids = np.union1d(self.sample, other.sample)
        places = [np.searchsorted(ids, part.sample) for part in (self, other)]

        def added(first: FloatArray, second: FloatArray) -> FloatArray:
            total = np.zeros((len(ids), *first.shape[1:]))
            total[places[0]] = first
            total[places[1]] += second
            return total

        return SampleSums(
            ids,
            {name: added(value, other.sums[name]) for name, value in self.sums.items()},
            {name: added(value, other.counts[name]) for name, value in self.counts.items()},
        )

    def result(self) -> dict[str, FloatArray]:
        """Return the mean over the tokens of every sample, by name: [m, ...]; NaN where no token was defined.

        Raises:
            ProbeError: nothing was added yet.
        """
        if not self.sums:
            raise ProbeError("Nothing was accumulated; call update with at least one batch first.")
        return {name: divide(value, self.counts[name]) for name, value in self.sums.items()}
