"""Importance of single pathways and how far they were rewritten (metrics.md section 2).

All of these are meaningful along one training run only (``within_run``): a change of basis inside an expert leaves
the model the same and changes them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from driftlens.errors import ConfigError
from driftlens.metrics.arrays import FloatArray, as_float, as_weights, divide
from driftlens.metrics.resample import probe_mean
from driftlens.metrics.shapes import Gates, Importance, Paths, PathwayGram, PerPathway, PerSite, Sample

__all__ = [
    "Concentration",
    "importance_concentration",
    "rank_importance",
    "rank_update",
    "rank_update_from_grams",
    "spearman",
]


class Concentration(NamedTuple):
    """Result of `importance_concentration`, each [...]."""

    top_share: PerSite
    gini: PerSite


def rank_importance(gate: Gates, z: Paths, sample: Sample | None = None) -> Importance:
    """Importance of each pathway, mean_i pi_{i,e} z_{i,e,k}^2 (PASs-MoE Eq. 9, the mean of the product).

    Args:
        gate: [..., n, E] as used in the forward pass, not normalised here.
        z: [..., n, E, r] pathway activations before the scaling.
        sample: [n] sample of each token.

    Returns:
        [..., E, r] >= 0. From exact sums: ``gated_energy / count``.
    """
    return probe_mean(as_weights(gate)[..., None] * as_float(z) ** 2, sample, axis=-3)


def importance_concentration(importance: Importance, top: float = 0.4) -> Concentration:
    """How unequally importance is spread over all pathways of a site.

    Args:
        importance: [..., E, r] >= 0.
        top: share of the pathways that counts as the top; fractions of a pathway count in proportion, so equal
            importance gives exactly ``top``.

    Returns:
        ``top_share`` in top..1 and the Gini coefficient in 0..1 (0 equal, 1 - 1/(E r) all in one pathway); NaN
        where no pathway has importance.

    Raises:
        ConfigError: ``top`` is not in 0..1.
    """
    if not 0 < top <= 1:
        raise ConfigError(f"The top share of pathways is {top}; expected a number above 0 and at most 1.")
    values = as_weights(importance, "importance")
    values = np.sort(values.reshape(*values.shape[:-2], values.shape[-2] * values.shape[-1]), axis=-1)[..., ::-1]
    size = values.shape[-1]
    total = values.sum(axis=-1)
    covered = np.clip(top * size - np.arange(size), 0.0, 1.0)
    weights = size - 1 - 2.0 * np.arange(size)
    gini = divide((values * weights).sum(axis=-1), size * total)
    return Concentration(divide((values * covered).sum(axis=-1), total), gini)


def rank_update(anchor: ArrayLike, current: ArrayLike, axis: int = -1) -> FloatArray:
    """Relative change of each pathway's vector, norm(a1 - a0) / norm(a0).

    Args:
        anchor: A [..., E, r, d_in] with ``axis=-1``, or B [..., E, d_out, r] with ``axis=-2``.
        current: same shape.
        axis: the axis of the vector's components.

    Returns:
        [..., E, r] >= 0; NaN where the anchor's vector is 0 (B before the first task).
    """
    old, new = as_float(anchor), as_float(current)
    if old.shape != new.shape:
        raise ConfigError(
            f"The factors have shapes {old.shape} and {new.shape}; the update of a pathway needs the same pathways at "
            "both checkpoints."
        )
    return divide(np.linalg.norm(new - old, axis=axis), np.linalg.norm(old, axis=axis))


def rank_update_from_grams(gram00: PathwayGram, gram01: PathwayGram, gram11: PathwayGram) -> PerPathway:
    """As `rank_update`, from Gram matrices [..., r, r] of the pathways; resolves changes above about 1e-8."""
    own, between, new = (np.diagonal(as_float(gram), axis1=-2, axis2=-1) for gram in (gram00, gram01, gram11))
    return np.sqrt(divide(np.maximum(own - 2 * between + new, 0.0), own))


def spearman(x: Float[np.ndarray, "*site item"], y: Float[np.ndarray, "*#site item"]) -> PerSite:
    """Spearman correlation along the last axis, ties by mean rank: [..., m] x [..., m] gives [...] in -1..1.

    NaN where a side is constant or holds NaN. For pathways of a site flatten [E, r] to one axis first.
    """
    first, second = np.broadcast_arrays(as_float(x), as_float(y))
    if first.shape[-1] == 0:
        return np.full(first.shape[:-1], np.nan)
    ranks = [rankdata(values, axis=-1, nan_policy="propagate") for values in (first, second)]
    centred = [rank - rank.mean(axis=-1, keepdims=True) for rank in ranks]
    product = (centred[0] * centred[1]).sum(axis=-1)
    norms = np.sqrt((centred[0] ** 2).sum(axis=-1) * (centred[1] ** 2).sum(axis=-1))
    return np.clip(divide(product, norms), -1.0, 1.0)
