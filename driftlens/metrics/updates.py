"""What the weights alone tell: norms and change of the updates s B_e A_e, and of router rows (docs/weights_only.md).

An update is d_out x d_in and is never formed: its norms follow from the r x r Gram matrices of the factors, its
singular values from the factors in orthonormal bases of their own spaces. Everything runs over leading axes (sites,
experts) at once. All measures of the update are gauge-invariant: (A, B) and (G A, B G^-1) give the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int
from numpy.typing import ArrayLike
from scipy.special import entr

from driftlens.errors import ConfigError
from driftlens.metrics.arrays import FloatArray, as_float, divide, finite_matrices, normalise
from driftlens.metrics.shapes import PerSite, Rows0, Rows1, Ups0, Ups1
from driftlens.metrics.subspaces import RANK_TOLERANCE, Basis

__all__ = [
    "RowDrift",
    "UpdateChange",
    "effective_rank",
    "numerical_rank",
    "row_drift",
    "silent_experts",
    "update_change",
    "update_norm",
    "update_spectrum",
]


class UpdateChange(NamedTuple):
    """Result of `update_change`, each [...]: norm of the difference, the same over the anchor's norm, and cosine."""

    difference: PerSite
    relative: PerSite
    cosine: PerSite


class RowDrift(NamedTuple):
    """Result of `row_drift`, each [...]: cosine with the anchor's row, and norm of the change over the row's norm."""

    cosine: PerSite
    relative: PerSite


def update_norm(A: Rows0, B: Ups0, scaling: ArrayLike = 1.0) -> PerSite:
    """Frobenius norm of s B A: [...] >= 0.

    Args:
        A: [..., r, d_in].
        B: [..., d_out, r], without the scaling.
        scaling: s, [...] or one number.
    """
    rows, columns = as_float(A), as_float(B)
    squared = (_gram(rows, rows) * _gram_of_columns(columns, columns)).sum(axis=(-1, -2))
    norm: FloatArray = np.abs(as_float(scaling)) * np.sqrt(np.maximum(squared, 0.0))
    return norm


def update_change(
    A0: Rows0, B0: Ups0, A1: Rows1, B1: Ups1, scaling0: ArrayLike = 1.0, scaling1: ArrayLike = 1.0
) -> UpdateChange:
    """How far the update s B A moved from the anchor (0) to the current checkpoint (1), factors of equal shape.

    The difference is taken as s1 B1 A1 - s0 B0 A0 = D A1 + s0 B0 (A1 - A0) with D = s1 B1 - s0 B0: no small number
    comes out of two large ones, so equal factors give exactly 0 and small changes keep their digits.

    Args:
        A0: [..., r, d_in].
        B0: [..., d_out, r].
        A1: as A0.
        B1: as B0.
        scaling0: s at the anchor, [...] or one number.
        scaling1: s at the current checkpoint.

    Returns:
        ``difference`` >= 0; ``relative`` to the anchor's norm, NaN where that is 0 (B before the first task);
        ``cosine`` of the two updates in -1..1, NaN where either is 0.

    Raises:
        ConfigError: factors of different shape.
    """
    a0, a1, b0, b1 = as_float(A0), as_float(A1), as_float(B0), as_float(B1)
    if a0.shape != a1.shape or b0.shape != b1.shape:
        raise ConfigError(
            f"The factors have shapes {a0.shape}, {b0.shape} and {a1.shape}, {b1.shape}; the change of an update "
            "needs factors of the same shape at both checkpoints."
        )
    b0, b1 = as_float(scaling0)[..., None, None] * b0, as_float(scaling1)[..., None, None] * b1
    move_a, move_b = a1 - a0, b1 - b0
    squared = (
        (_gram_of_columns(move_b, move_b) * _gram(a1, a1)).sum(axis=(-1, -2))
        + 2 * (_gram_of_columns(move_b, b0) * _gram(a1, move_a)).sum(axis=(-1, -2))
        + (_gram_of_columns(b0, b0) * _gram(move_a, move_a)).sum(axis=(-1, -2))
    )
    difference = np.sqrt(np.maximum(squared, 0.0))
    norm0, norm1 = update_norm(a0, b0), update_norm(a1, b1)
    inner = (_gram_of_columns(b0, b1) * _gram(a0, a1)).sum(axis=(-1, -2))
    return UpdateChange(difference, divide(difference, norm0), np.clip(divide(inner, norm0 * norm1), -1.0, 1.0))


def update_spectrum(
    A: Rows0, B: Ups0, basis_a: Basis, basis_b: Basis, scaling: ArrayLike = 1.0
) -> Float64[np.ndarray, "*site rank"]:
    """Singular values of s B A, [..., r], descending; zeros beyond the rank, NaN where a factor is not finite.

    Args:
        A: [..., r, d_in].
        B: [..., d_out, r].
        basis_a: orthonormal rows of A (`orthonormal_rows`).
        basis_b: orthonormal rows of B^T.
        scaling: s, [...] or one number.
    """
    core = (basis_b.vectors @ as_float(B)) @ (as_float(A) @ np.swapaxes(basis_a.vectors, -1, -2))
    clean, finite = finite_matrices(core)
    values = np.abs(as_float(scaling))[..., None] * np.linalg.svdvals(clean)
    return np.where(finite[..., None], values, np.nan)


def numerical_rank(spectrum: Float[np.ndarray, "*site rank"], rtol: float = RANK_TOLERANCE) -> Int[np.ndarray, "*site"]:
    """Count singular values [..., r] above ``rtol`` times the largest: [...] in 0..r."""
    values = as_float(spectrum)
    largest = values.max(axis=-1, keepdims=True, initial=0.0)
    rank: Int[np.ndarray, "*site"] = ((values > rtol * largest) & (values > 0)).sum(axis=-1)
    return rank


def effective_rank(spectrum: Float[np.ndarray, "*site rank"]) -> PerSite:
    """Effective rank exp(H(sigma / sum sigma)) of singular values [..., r]: [...] in 1..r; NaN if all are 0.

    Roy and Vetterli (2007), "The effective rank: a measure of effective dimensionality".
    """
    values = as_float(spectrum)
    entropy = entr(normalise(values)).sum(axis=-1)
    return np.where(values.sum(axis=-1) > 0, np.exp(entropy), np.nan)


def silent_experts(norm: Float[np.ndarray, "*site expert"]) -> Int[np.ndarray, "*site"]:
    """Count experts whose update is exactly 0 (`update_norm` [..., E]): [...] in 0..E.

    Such an expert adds nothing on any input, whatever its gate. `dead_experts` asks the opposite question: which
    experts get no gate on a probe, whatever they would add.
    """
    silent: Int[np.ndarray, "*site"] = (as_float(norm) == 0).sum(axis=-1)
    return silent


def row_drift(anchor: ArrayLike, current: ArrayLike) -> RowDrift:
    """Cosine and relative change along the last axis of [..., d] and [..., d]; NaN where a row is 0.

    Rows of a router. For a whole router pass it as one row, [..., E * d_in]. A softmax ignores a vector that is added
    to all rows: subtract the mean row first to see only what gates see.

    Raises:
        ConfigError: different shapes.
    """
    old, new = as_float(anchor), as_float(current)
    if old.shape != new.shape:
        raise ConfigError(f"The rows have shapes {old.shape} and {new.shape}; drift needs the same rows at both.")
    norm0, norm1 = np.linalg.norm(old, axis=-1), np.linalg.norm(new, axis=-1)
    cosine = np.clip(divide((old * new).sum(axis=-1), norm0 * norm1), -1.0, 1.0)
    return RowDrift(cosine, divide(np.linalg.norm(new - old, axis=-1), norm0))


def _gram(first: FloatArray, second: FloatArray) -> FloatArray:
    """A A'^T."""
    product: FloatArray = first @ np.swapaxes(second, -1, -2)
    return product


def _gram_of_columns(first: FloatArray, second: FloatArray) -> FloatArray:
    """B^T B'."""
    product: FloatArray = np.swapaxes(first, -1, -2) @ second
    return product
