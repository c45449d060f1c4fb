"""What a measure reads where there is nothing to find (metrics.md section 6): null distributions and p-values.

Three nulls, all seeded:

* `permuted_tokens`: every token is compared with another token's current value. The gates are then those of a router
  with the same loads that knows nothing of the token, which is what an unrelated, re-initialised router is at best.
* `permuted_experts`: the current experts are relabelled at random, site by site: no expert has its anchor's identity.
* `random_overlap` and `random_overlap_null`: subspaces of the same ranks, drawn uniformly; mean and spread are exact.

A drift near its null means "as far as unrelated"; far below it, "still related". The p-value is that of a permutation
test: it counts the observed value among the draws, so it is never 0 and is valid for any number of draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import wishart

from driftlens.errors import ConfigError
from driftlens.metrics.arrays import FloatArray, as_float, divide, mean_defined
from driftlens.metrics.resample import percentile_interval

__all__ = [
    "Null",
    "RandomOverlap",
    "null_test",
    "permuted_experts",
    "permuted_tokens",
    "random_overlap",
    "random_overlap_null",
]

Tail = Literal["low", "high"]


class Null(NamedTuple):
    """An observed value beside its null distribution, each [...] float64; NaN where the observed value is NaN.

    Attributes:
        observed: the value.
        mean: mean of the null.
        spread: its standard deviation (of one draw, not of the mean); NaN for a single draw.
        low: 2.5 % quantile of the null.
        high: 97.5 % quantile.
        percentile: share of the null below the observed value, ties counted half, 0..1.
        p_value: chance of a value at least as far out on the side that was asked for, above 0 and at most 1.
    """

    observed: FloatArray
    mean: FloatArray
    spread: FloatArray
    low: FloatArray
    high: FloatArray
    percentile: FloatArray
    p_value: FloatArray


class RandomOverlap(NamedTuple):
    """Exact mean and standard deviation of `subspace_overlap` between uniformly random subspaces, each [...]."""

    mean: FloatArray
    spread: FloatArray


def null_test(observed: ArrayLike, draws: ArrayLike, tail: Tail = "low") -> Null:
    """Place an observed value in a null distribution.

    Args:
        observed: [...].
        draws: [D, ...] values under the null; NaN draws are left out.
        tail: ``"low"`` asks how often chance gives a value as small (a drift that should be below it), ``"high"`` one
            as large (an overlap that should be above it).

    Raises:
        ConfigError: no draws, shapes that do not fit, or another tail.
    """
    value, null = as_float(observed), as_float(draws)
    if tail not in ("low", "high"):
        raise ConfigError(f'The tail is {tail!r}; expected "low" (small values are unusual) or "high".')
    if null.ndim != value.ndim + 1 or null.shape[1:] != value.shape or not len(null):
        raise ConfigError(f"Draws of shape {null.shape} for values of shape {value.shape}; expected [D, ...], D >= 1.")
    null = np.where(np.isnan(value), np.nan, null)
    count = (~np.isnan(null)).sum(axis=0)
    mean = mean_defined(null, axis=0)
    # Rounding differs between permutations of the same numbers: what is equal to 1e-12 is a tie.
    near = 1e-12 * (1.0 + np.abs(value))
    below, ties = null < value - near, np.abs(null - value) <= near
    outside = (below if tail == "low" else null > value + near) | ties
    low, high = percentile_interval(null)
    return Null(
        observed=value,
        mean=mean,
        spread=np.sqrt(divide(np.nansum((null - mean) ** 2, axis=0), np.where(count > 1, count - 1, 0))),
        low=low,
        high=high,
        percentile=divide(below.sum(axis=0) + ties.sum(axis=0) / 2, count),
        p_value=np.where(count > 0, (1 + outside.sum(axis=0)) / (1 + count), np.nan),
    )


def permuted_tokens(
    statistic: Callable[[FloatArray], FloatArray],
    current: ArrayLike,
    *,
    axis: int = -2,
    draws: int = 200,
    seed: int = 0,
    tail: Tail = "low",
) -> Null:
    """Null of an unrelated router: each token is compared with the current value of another token.

    All sites share a permutation, so that an average over sites keeps the correlation between them.

    Args:
        statistic: takes the current array and returns [...], for instance ``lambda gate: router_js(gate0, gate)``.
        current: the current checkpoint's values; gates [..., n, E].
        axis: the token axis; -3 for pathways [..., n, E, r].
        draws: number of permutations.
        seed: seed of the permutations.
        tail: as in `null_test`; ``"high"`` for similarities such as `cka`.

    Raises:
        ConfigError: fewer than one draw.
    """
    values = as_float(current)
    generator = _generator(draws, seed)
    tokens = values.shape[axis]
    observed = statistic(values)
    null = [statistic(np.take(values, generator.permutation(tokens), axis=axis)) for _ in range(draws)]
    return null_test(observed, np.stack(null), tail)


def permuted_experts(
    statistic: Callable[[FloatArray], FloatArray],
    current: ArrayLike,
    *,
    axis: int = -1,
    site_axes: int = 0,
    draws: int = 200,
    seed: int = 0,
    tail: Tail = "low",
) -> Null:
    """Null of lost identity: the current experts are relabelled at random, independently at every site.

    With E experts the p-value cannot fall much below 1/E! for a single site.

    Args:
        statistic: takes the relabelled current array and returns [...], for instance
            ``lambda A: subspace_overlap(A0, A)`` for factors [..., E, r, d] with ``axis=-3`` and ``tail="high"``.
        current: the current checkpoint's values; gates [..., n, E].
        axis: the expert axis, counted from the end.
        site_axes: number of leading axes that are sites.
        draws: number of relabellings.
        seed: seed of the relabellings.
        tail: as in `null_test`.

    Raises:
        ConfigError: fewer than one draw, or an axis that is not behind the site axes.
    """
    values = as_float(current)
    if not site_axes - values.ndim <= axis < 0:
        raise ConfigError(
            f"axis is {axis} and site_axes {site_axes} for an array of shape {values.shape}; count the expert axis "
            "from the end (-1 is the last), behind the site axes."
        )
    generator = _generator(draws, seed)
    experts = values.shape[axis]
    extent = [*values.shape[:site_axes], *(1,) * (values.ndim - site_axes)]
    extent[axis] = experts
    labels = np.broadcast_to(np.arange(experts), (*values.shape[:site_axes], experts))

    def relabelled() -> FloatArray:
        order = generator.permuted(labels, axis=-1).reshape(extent)
        return np.take_along_axis(values, order, axis=axis)

    return null_test(statistic(values), np.stack([statistic(relabelled()) for _ in range(draws)]), tail)


def random_overlap(rank0: ArrayLike, rank1: ArrayLike, dim: ArrayLike) -> RandomOverlap:
    """Mean and spread of the overlap of two uniformly random subspaces, exact for any ranks.

    norm_F(Q0 Q1^T)^2 = tr(P0 P1) has mean r0 r1 / d and variance 2 r0 r1 (d - r0)(d - r1) / (d^2 (d - 1)(d + 2));
    the overlap is that over min(r0, r1).

    Args:
        rank0: ranks [...], at least 1.
        rank1: likewise.
        dim: dimension d of the space.

    Raises:
        ConfigError: a rank below 1 or above d.
    """
    r0, r1, d = (as_float(value) for value in np.broadcast_arrays(rank0, rank1, dim))
    if (np.minimum(r0, r1) < 1).any() or (np.maximum(r0, r1) > d).any():
        raise ConfigError(f"Ranks {r0} and {r1} in dimension {d}; expected 1 <= rank <= dimension.")
    smaller, larger = np.minimum(r0, r1), np.maximum(r0, r1)
    variance = divide(2 * larger * (d - r0) * (d - r1), smaller * d**2 * (d - 1) * (d + 2))
    return RandomOverlap(larger / d, np.sqrt(np.where(d == 1, 0.0, variance)))


def random_overlap_null(
    observed: ArrayLike, rank0: int, rank1: int, dim: int, *, draws: int = 1000, seed: int = 0
) -> Null:
    """Place observed overlaps among those of uniformly random subspaces of the same ranks; p-value for larger ones.

    Args:
        observed: [...] overlaps, as `subspace_overlap` gives them.
        rank0: rank of one subspace.
        rank1: rank of the other.
        dim: dimension d of the space.
        draws: number of random pairs.
        seed: their seed.

    Raises:
        ConfigError: a rank below 1 or above d, or fewer than one draw.
    """
    random_overlap(rank0, rank1, dim)  # checks the ranks
    generator = _generator(draws, seed)
    value = as_float(observed)
    overlaps = _overlap_sums(min(rank0, rank1), max(rank0, rank1), dim, draws, generator) / min(rank0, rank1)
    null = np.broadcast_to(overlaps.reshape(draws, *(1,) * value.ndim), (draws, *value.shape))
    return null_test(value, null, "high")


def _overlap_sums(smaller: int, larger: int, dim: int, draws: int, generator: np.random.Generator) -> FloatArray:
    """Draw tr(P0 P1), [draws], from r x r matrices; vectors of length d are never drawn.

    The first r0 and the other d - r0 coordinates of r1 Gaussian vectors have Wishart Gram matrices W and V, and
    tr(P0 P1) = tr(W (W + V)^-1).
    """
    rest = dim - larger
    if rest == 0:
        return np.full(draws, float(smaller))
    if rest < smaller:  # V is singular: the overlap with the complement, which is the smaller one now, is drawn
        return smaller - _overlap_sums(rest, smaller, dim, draws, generator)
    scale = np.eye(smaller)
    inside, outside = (
        np.asarray(wishart.rvs(degrees, scale, size=draws, random_state=generator)).reshape(draws, smaller, smaller)
        for degrees in (larger, rest)
    )
    sums: FloatArray = np.trace(np.linalg.solve(inside + outside, inside), axis1=-2, axis2=-1)
    return sums


def _generator(draws: int, seed: int) -> np.random.Generator:
    if draws < 1:
        raise ConfigError(f"A null of {draws} draws was asked for; at least 1 is needed, 200 is usual.")
    return np.random.default_rng(seed)
