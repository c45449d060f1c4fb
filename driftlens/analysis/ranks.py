"""Rank correlation under a cluster bootstrap: whole runs are drawn again, for all draws at once.

A draw is a vector of weights, how often every row occurs in it. The rank of a row in a drawn sample follows from
the weights of the rows below it, so no sample is ever formed; weight 0 leaves a row out.

Values that differ by rounding alone are ties: 2/3 - 1/3 and 1 - 2/3 are the same loss, and a router that did not move
has no order among its 1e-17.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from driftlens.metrics import bootstrap_weights
from driftlens.metrics.arrays import FloatArray, as_float, divide

__all__ = ["cluster_weights", "partial_rank_correlation", "rank_correlation", "weighted_ranks"]

_CONSTANT = 1e-10
"""A residual variance below this share of the variance of the ranks is rounding."""

Rows = Float[np.ndarray, " row"]
Draws = Float[np.ndarray, "draw row"]
PerDraw = Float[np.ndarray, " draw"]


def cluster_weights(clusters: ArrayLike, draws: int = 2000, seed: int = 0) -> Draws:
    """Return how often every row occurs when whole clusters are drawn with replacement.

    Args:
        clusters: [n] label of each row's cluster; rows of one cluster are not independent.
        draws: number of draws.
        seed: seed of the draws.

    Returns:
        [draws, n] float64.

    Raises:
        ConfigError: fewer than one draw.
    """
    labels, member = np.unique(np.asarray(clusters), return_inverse=True)
    return bootstrap_weights(len(labels), draws, seed)[:, member]


def weighted_ranks(values: Rows, weights: Draws) -> Draws:
    """Return the mid-rank of every row in samples in which it occurs ``weights`` times.

    Args:
        values: [n], finite.
        weights: [draws, n] >= 0.

    Returns:
        [draws, n]; with all weights 1 these are ordinary ranks 1..n, ties by mean rank.
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.ones(len(order), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    start, group = np.flatnonzero(first), np.cumsum(first) - 1
    size = np.add.reduceat(weights[:, order], start, axis=1)
    below = np.cumsum(size, axis=1) - size
    result = np.empty(weights.shape)
    result[:, order] = (below + (size + 1) / 2)[:, group]
    return result


def rank_correlation(x: ArrayLike, y: ArrayLike, weights: Draws | None = None) -> PerDraw:
    """Spearman correlation of two columns in every draw.

    Args:
        x: [n]; NaN leaves a row out.
        y: [n], likewise.
        weights: [draws, n]; None for the rows as they are, in one draw.

    Returns:
        [draws] in -1..1; NaN where a side is constant.
    """
    return partial_rank_correlation(x, y, [], weights)


def partial_rank_correlation(
    x: ArrayLike, y: ArrayLike, given: Sequence[ArrayLike], weights: Draws | None = None
) -> PerDraw:
    """Partial Spearman correlation: of the ranks of x and y after linear regression on the ranks of ``given``.

    The same as the partial correlation of the rank vectors, (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2)(1 - r_yz^2))
    for one covariate. A constant covariate explains nothing and is harmless.

    Args:
        x: [n]; NaN leaves a row out.
        y: [n], likewise.
        given: covariates, [n] each, likewise.
        weights: [draws, n]; None for the rows as they are, in one draw.

    Returns:
        [draws] in -1..1; NaN where nothing of x or y is left to correlate.
    """
    columns = np.stack([as_float(column) for column in (x, y, *given)])
    defined = np.isfinite(columns).all(axis=0)
    used = np.ones((1, int(defined.sum()))) if weights is None else weights[:, defined]
    if used.shape[1] == 0:
        return np.full(used.shape[0], np.nan)
    covariance = _rank_covariance(np.stack([_settled(column[defined]) for column in columns]), used)
    inner = covariance[:, :2, :2]
    if given:
        # A pseudo-inverse: a covariate that is constant in a draw must not undo the draw.
        cross, own = covariance[:, :2, 2:], covariance[:, 2:, 2:]
        inner = inner - cross @ np.linalg.pinv(own, rcond=_CONSTANT, hermitian=True) @ np.swapaxes(cross, -1, -2)
    variance: FloatArray = np.diagonal(inner, axis1=-2, axis2=-1)
    whole = np.diagonal(covariance[:, :2, :2], axis1=-2, axis2=-1)
    left: NDArray[np.bool_] = (variance > _CONSTANT * np.maximum(whole, 1.0)).all(axis=-1)
    scale = np.sqrt(np.where(left, variance.prod(axis=-1), 0.0))
    return np.clip(divide(inner[:, 0, 1], scale), -1.0, 1.0)


def _settled(values: Rows) -> Rows:
    """Values to twelve significant digits, and 0 where they are below 1e-12 of the largest."""
    size = np.abs(values)
    digits = 10.0 ** (11 - np.floor(np.log10(np.where(size > 0, size, 1.0))))
    result: FloatArray = np.where(size <= 1e-12 * size.max(initial=0.0), 0.0, np.round(values * digits) / digits)
    return result


def _rank_covariance(
    columns: Float[np.ndarray, "column row"], weights: Draws
) -> Float[np.ndarray, "draw column column"]:
    """Covariance of the ranks of some columns in every draw."""
    total = weights.sum(axis=1)
    ranks = np.stack([weighted_ranks(column, weights) for column in columns], axis=1)
    mean = divide((ranks * weights[:, None]).sum(axis=-1), total[:, None])
    centred = np.where(total[:, None, None] > 0, ranks - mean[..., None], 0.0)
    share = weights / np.maximum(total, 1.0)[:, None]
    result: FloatArray = (centred * share[:, None]) @ np.swapaxes(centred, -1, -2)
    return result
