"""Averages over tokens, samples and sites, and bootstrap intervals over samples.

Tokens of one sample are not independent, so a sample, not a token, is what is drawn again. The order of averaging
is fixed: tokens in a sample, samples in a probe, then sites. One set of draws serves all sites, so that the
interval of an average over sites keeps their correlation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from driftlens.errors import ConfigError, ProbeError
from driftlens.metrics.arrays import FloatArray, as_float, divide, mean_defined

__all__ = [
    "Interval",
    "bootstrap",
    "bootstrap_mean",
    "bootstrap_ratio",
    "bootstrap_weights",
    "exceeds_noise",
    "percentile_interval",
    "probe_mean",
    "resampled_means",
    "sample_means",
]


class Interval(NamedTuple):
    """A value with its percentile bootstrap interval; low and high are NaN for fewer than two samples."""

    value: FloatArray
    low: FloatArray
    high: FloatArray


def sample_means(
    values: ArrayLike, sample: NDArray[np.integer], *, skip_undefined: bool = False, axis: int = -1
) -> FloatArray:
    """Average tokens within each sample.

    Args:
        values: [..., n], tokens on ``axis``.
        sample: [n] integer sample of each token, in any order.
        skip_undefined: leave NaN tokens out (for measures that some tokens do not have) instead of passing NaN on,
            which is right where NaN means a broken recording.
        axis: the token axis.

    Returns:
        [..., m] float64 with samples in ascending order on ``axis``; NaN where ``skip_undefined`` leaves no token.

    Raises:
        ProbeError: ``sample`` does not have one entry per token.
    """
    tokens = np.moveaxis(as_float(values), axis, -1)
    ids = np.asarray(sample)
    if ids.ndim != 1 or ids.shape[0] != tokens.shape[-1]:
        raise ProbeError(
            f"The sample index has shape {ids.shape} for {tokens.shape[-1]} tokens; expected one sample per token."
        )
    if ids.size == 0:
        return np.moveaxis(tokens, -1, axis)
    if np.any(ids[1:] < ids[:-1]):
        order = np.argsort(ids, kind="stable")
        ids, tokens = ids[order], tokens[..., order]
    first = np.ones(ids.size, dtype=np.bool_)
    np.not_equal(ids[1:], ids[:-1], out=first[1:])
    starts = np.flatnonzero(first)
    if skip_undefined and not (defined := ~np.isnan(tokens)).all():
        sums = np.add.reduceat(np.where(defined, tokens, 0.0), starts, axis=-1)
        means = divide(sums, np.add.reduceat(defined.astype(np.float64), starts, axis=-1))
    else:
        means = np.add.reduceat(tokens, starts, axis=-1) / np.diff(starts, append=ids.size)
    return np.moveaxis(means, -1, axis)


def probe_mean(
    values: ArrayLike, sample: NDArray[np.integer] | None = None, *, skip_undefined: bool = False, axis: int = -1
) -> FloatArray:
    """Average tokens in a sample, then samples in a probe: the ``mean_i`` of every definition.

    Args:
        values: [..., n], tokens on ``axis``.
        sample: [n] sample of each token; None weighs all tokens alike.
        skip_undefined: as in `sample_means`.
        axis: the token axis.

    Returns:
        ``values`` without ``axis``; NaN for a probe without tokens.
    """
    array = as_float(values)
    if sample is not None:
        array = sample_means(array, sample, skip_undefined=skip_undefined, axis=axis)
    if skip_undefined:
        return mean_defined(array, axis=axis)
    return divide(array.sum(axis=axis), array.shape[axis])


def bootstrap_weights(samples: int, draws: int = 1000, seed: int = 0) -> FloatArray:
    """Return [draws, samples]: how often each sample occurs in each seeded draw with replacement.

    Raises:
        ConfigError: fewer than one draw.
    """
    if draws < 1:
        raise ConfigError(f"A bootstrap of {draws} draws was asked for; at least 1 is needed, 1000 is usual.")
    if samples == 0:
        return np.zeros((draws, 0))
    generator = np.random.default_rng(seed)
    return generator.multinomial(samples, np.full(samples, 1 / samples), size=draws).astype(np.float64)


def resampled_means(values: ArrayLike, weights: FloatArray) -> FloatArray:
    """Return the mean over samples in every draw: [..., m] and [draws, m] give [draws, ...].

    Undefined samples (NaN) are left out of a draw; a draw without a defined sample is NaN.
    """
    array = as_float(values)
    rows = array.reshape(
        math.prod(array.shape[:-1]), array.shape[-1]
    )  # one large product is faster than a stack of small ones
    defined = ~np.isnan(rows)
    if defined.all():
        means = divide(rows @ weights.T, weights.sum(axis=1))
    else:
        means = divide(np.where(defined, rows, 0.0) @ weights.T, defined.astype(np.float64) @ weights.T)
    return np.moveaxis(means.reshape(*array.shape[:-1], len(weights)), -1, 0)


def percentile_interval(replicates: FloatArray, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """Return the central percentile interval over axis 0, with NaN replicates left out.

    Args:
        replicates: [draws, ...].
        level: coverage, between 0 and 1.

    Raises:
        ConfigError: ``level`` is not strictly between 0 and 1.
    """
    if not 0 < level < 1:
        raise ConfigError(f"The interval level is {level}; expected a number between 0 and 1, such as 0.95.")
    ordered = np.sort(replicates, axis=0)  # NaN last
    count = (~np.isnan(replicates)).sum(axis=0)

    def quantile(share: float) -> FloatArray:
        position = share * np.maximum(count - 1, 0)
        lower = np.floor(position).astype(np.intp)
        upper = np.minimum(lower + 1, np.maximum(count - 1, 0))
        below, above = (np.take_along_axis(ordered, index[None], axis=0)[0] for index in (lower, upper))
        mixed: FloatArray = below + (position - lower) * (above - below)
        return mixed

    return quantile((1 - level) / 2), quantile((1 + level) / 2)


def bootstrap(
    statistic: Callable[..., FloatArray],
    *parts: ArrayLike,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    average_over: int | tuple[int, ...] = (),
) -> Interval:
    """Bootstrap a function of means over samples, for all sites at once.

    Args:
        statistic: takes one array [...] of means per part (any number of leading axes) and returns an array [...].
        *parts: sample means [..., m]; NaN marks a sample without a defined value.
        draws: number of resamples.
        seed: seed of the draws; the same for every call, so that tables of one run share their draws.
        level: coverage of the percentile interval.
        average_over: negative axes of the statistic's result (sites, say) to average before the interval is taken.

    Returns:
        The statistic of the observed means and its interval.
    """
    arrays = [as_float(part) for part in parts]
    samples = arrays[0].shape[-1]
    axes = (average_over,) if isinstance(average_over, int) else average_over
    if any(axis >= 0 for axis in axes):
        raise ConfigError(f"average_over is {average_over}; count axes from the end (-1 is the last).")

    def averaged(values: FloatArray) -> FloatArray:
        return mean_defined(values, axis=axes) if axes else values

    value = averaged(statistic(*(mean_defined(array) for array in arrays)))
    if samples < 2:
        unknown = np.full_like(value, np.nan)
        return Interval(value, unknown, unknown.copy())
    weights = bootstrap_weights(samples, draws, seed)
    low, high = percentile_interval(averaged(statistic(*(resampled_means(array, weights) for array in arrays))), level)
    return Interval(value, low, high)


def bootstrap_mean(
    values: ArrayLike,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    average_over: int | tuple[int, ...] = (),
) -> Interval:
    """Bootstrap a mean over samples: [..., m] gives an interval [...]; arguments as in `bootstrap`."""
    return bootstrap(lambda mean: mean, values, draws=draws, seed=seed, level=level, average_over=average_over)


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    average_over: int | tuple[int, ...] = (),
) -> Interval:
    """Bootstrap a ratio of two means over the same samples (Phi, impact): numerator and denominator drawn together."""
    return bootstrap(divide, numerator, denominator, draws=draws, seed=seed, level=level, average_over=average_over)


def exceeds_noise(low: ArrayLike, noise_floor: ArrayLike) -> NDArray[np.bool_]:
    """Say where an interval's lower end lies above the noise floor.

    The noise floor of a drift is the same measure between two recordings of one checkpoint (another batch size and
    padding side). NaN on either side gives False.
    """
    return as_float(low) > as_float(noise_floor)
