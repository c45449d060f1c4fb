"""Pathway activation subspaces: row spaces of A_e and column spaces of B_e (metrics.md section 2).

Everything runs over leading axes (sites, experts) at once, and everything is available by two routes: from the
factors, and from their Gram matrices (A0 A0^T, A0 A1^T, A1 A1^T), which is all that a thinned recording keeps. Both
start from a whitening W of the Gram matrix, W A A^T W^T = I on the numerical rank: Q = W A is an orthonormal basis of
the row space, and q = W z are the coordinates of a token in it.

The numerical rank counts singular values above ``rtol`` times the largest. The default 1e-6 lies above float32
rounding of the stored weights and above what squaring in the Gram route loses, so both routes agree on the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int
from numpy.typing import NDArray
from scipy.special import entr

from driftlens.errors import ConfigError
from driftlens.metrics.arrays import FloatArray, as_float, divide, finite_matrices, normalise, pad_experts
from driftlens.metrics.shapes import Columns0, Columns1, Gram0, Gram1, GramCross, PerSite, Rows0, Rows1

__all__ = [
    "RANK_TOLERANCE",
    "Basis",
    "SubspacePair",
    "Whitening",
    "active_overlap",
    "active_rank",
    "active_rank_from_gram",
    "expert_blocks",
    "grassmann_distance",
    "orthonormal_rows",
    "output_overlap",
    "pair_from_bases",
    "pair_from_factors",
    "pair_from_grams",
    "principal_angles",
    "subspace_overlap",
    "subspace_overlap_adjusted",
    "whitening",
]

RANK_TOLERANCE = 1e-6
"""Singular values at or below this share of the largest count as zero."""


class Whitening(NamedTuple):
    """``matrix`` [..., r, r] whose first ``rank`` rows whiten a Gram matrix (the others are 0); ``rank`` [...]."""

    matrix: Gram0
    rank: Int[np.ndarray, "*site"]


class Basis(NamedTuple):
    """Orthonormal rows ``vectors`` [..., r, d] (0 beyond ``rank`` [...]) and the ``matrix`` with vectors = matrix A."""

    vectors: Rows0
    matrix: Gram0
    rank: Int[np.ndarray, "*site"]


def whitening(gram: Gram0, rtol: float = RANK_TOLERANCE) -> Whitening:
    """Whiten Gram matrices.

    Args:
        gram: [..., r, r] symmetric, positive semi-definite.
        rtol: see the module's text.

    Returns:
        Matrix and rank; a Gram matrix with NaN or infinite entries gives a NaN matrix of rank 0.

    Raises:
        ConfigError: not square.
    """
    matrix = as_float(gram)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ConfigError(f"A Gram matrix of shape {matrix.shape} was passed; expected [..., r, r].")
    clean, finite = finite_matrices(matrix)
    values, vectors = np.linalg.eigh(clean)
    values, vectors = values[..., ::-1], vectors[..., ::-1]
    kept = (values > values[..., :1] * rtol**2) & (values > 0)
    scale = np.where(kept, 1.0 / np.sqrt(np.where(kept, values, 1.0)), 0.0)
    white = np.swapaxes(vectors * scale[..., None, :], -1, -2)
    return Whitening(np.where(finite[..., None, None], white, np.nan), kept.sum(axis=-1))


def orthonormal_rows(A: Rows0, rtol: float = RANK_TOLERANCE) -> Basis:
    """Orthonormal basis of the row space of each A_e: [..., r, d].

    Whitened twice: the second pass removes what the squared condition number of the first left of non-orthogonality.
    """
    rows = as_float(A)
    if rows.ndim < 2:
        raise ConfigError(f"A factor of shape {rows.shape} was passed; expected [..., r, d].")
    first, rank = whitening(rows @ np.swapaxes(rows, -1, -2), rtol)
    rough = first @ rows
    second, _ = whitening(rough @ np.swapaxes(rough, -1, -2), 1e-3)
    return Basis(second @ rough, second @ first, rank)


@dataclass(frozen=True)
class SubspacePair:
    """Two subspaces by the inner products of their bases; every measure below needs nothing else.

    Attributes:
        cross: [..., r0, r1], Q0 Q1^T.
        rank0: [...] numerical rank at the anchor.
        rank1: [...] numerical rank at the current checkpoint.
        matrix0: [..., r0, r0] whitening of the anchor (q = matrix0 z).
        dim: dimension d of the space both live in, one number or [...].
        sines: [..., min(r0, r1)] sines of the principal angles in ascending order if known better than from ``cross``.
    """

    cross: GramCross
    rank0: Int[np.ndarray, "*site"]
    rank1: Int[np.ndarray, "*site"]
    matrix0: Gram0
    dim: int | NDArray[np.integer]
    sines: Float64[np.ndarray, "*site angle"] | None = None

    def overlap(self) -> PerSite:
        """norm_F(Q0 Q1^T)^2 / min(rank): [...] in 0..1; NaN if a subspace is empty (a factor of zeros)."""
        squared = (self.cross**2).sum(axis=(-1, -2))
        return np.minimum(divide(squared, np.minimum(self.rank0, self.rank1)), 1.0)

    def chance(self) -> PerSite:
        """Expected overlap of random subspaces of these ranks: larger rank / d, [...]."""
        chance: FloatArray = np.maximum(self.rank0, self.rank1) / self.dim
        return chance

    def adjusted(self) -> PerSite:
        """(overlap - chance) / (1 - chance): [...] at most 1, 0 for random subspaces; NaN if one fills the space."""
        return divide(self.overlap() - self.chance(), 1.0 - self.chance())

    def angles(self) -> Float64[np.ndarray, "*site angle"]:
        """Principal angles, [..., min(r0, r1)] in 0..pi/2, ascending; NaN beyond the smaller rank."""
        clean, finite = finite_matrices(self.cross)
        cosines = np.linalg.svdvals(clean)
        angles = np.arccos(np.clip(cosines, 0.0, 1.0))
        if self.sines is not None:  # arccos cannot resolve angles below 1e-8
            angles = np.where(cosines**2 >= 0.5, np.arcsin(np.clip(self.sines, 0.0, 1.0)), angles)
        size = np.where(finite, np.minimum(self.rank0, self.rank1), 0)
        return np.where(np.arange(angles.shape[-1]) < size[..., None], angles, np.nan)

    def distance(self) -> PerSite:
        """Geodesic distance per dimension, norm_2(angles)/sqrt(rank): [...] in 0..pi/2."""
        return distance_of_angles(self.angles())

    def active_overlap(self, moment: Gram0) -> PerSite:
        """Overlap weighted by the directions a probe uses at the anchor: [...] in 0..1.

        Args:
            moment: [..., r0, r0] sum or mean of z z^T over the probe at the anchor.

        Returns:
            sum_k lambda_k norm(Q1 v_k)^2 / sum_k lambda_k, as the trace of C (Q0 Q1^T)(Q0 Q1^T)^T over the trace of C;
            NaN if the probe does not reach the subspace at all.
        """
        used = _coordinates_moment(self.matrix0, moment)
        reached = (used * (self.cross @ np.swapaxes(self.cross, -1, -2))).sum(axis=(-1, -2))
        total = np.trace(used, axis1=-2, axis2=-1)
        empty = np.minimum(self.rank0, self.rank1) == 0
        return np.clip(divide(np.where(empty, np.nan, reached), total), 0.0, 1.0)


def distance_of_angles(angles: Float64[np.ndarray, "*site angle"]) -> PerSite:
    """Root mean square of the defined angles [..., r]: [...]; NaN where none is."""
    count = (~np.isnan(angles)).sum(axis=-1)
    return np.sqrt(divide(np.nansum(angles**2, axis=-1), count))


def pair_from_bases(basis0: Basis, basis1: Basis) -> SubspacePair:
    """Compare bases made once per checkpoint with `orthonormal_rows`; refined angles included.

    Raises:
        ConfigError: the bases live in spaces of different dimension.
    """
    if basis0.vectors.shape[-1] != basis1.vectors.shape[-1]:
        raise ConfigError(
            f"The subspaces live in dimensions {basis0.vectors.shape[-1]} and {basis1.vectors.shape[-1]}; only factors "
            "of the same site can be compared."
        )
    rows0, rows1 = pad_experts(basis0.vectors, basis1.vectors, axis=-2)
    smaller = (basis0.rank <= basis1.rank)[..., None, None]
    inner, outer = np.where(smaller, rows0, rows1), np.where(smaller, rows1, rows0)
    residual = inner - (inner @ np.swapaxes(outer, -1, -2)) @ outer
    gram = residual @ np.swapaxes(residual, -1, -2)
    # Rows beyond the rank would read as angle 0: push them behind every true squared sine.
    beyond = np.arange(gram.shape[-1]) >= np.minimum(basis0.rank, basis1.rank)[..., None]
    gram = gram + np.eye(gram.shape[-1]) * (4.0 * beyond[..., None])
    squared = np.linalg.eigvalsh(finite_matrices(gram)[0])
    width = min(basis0.vectors.shape[-2], basis1.vectors.shape[-2])
    sines = np.sqrt(np.clip(squared, 0.0, 1.0))[..., :width]
    cross = basis0.vectors @ np.swapaxes(basis1.vectors, -1, -2)
    return SubspacePair(cross, basis0.rank, basis1.rank, basis0.matrix, basis0.vectors.shape[-1], sines)


def pair_from_factors(A0: Rows0, A1: Rows1, rtol: float = RANK_TOLERANCE) -> SubspacePair:
    """Compare the row spaces of A0 [..., r0, d] and A1 [..., r1, d]."""
    return pair_from_bases(orthonormal_rows(A0, rtol), orthonormal_rows(A1, rtol))


def pair_from_grams(
    gram00: Gram0, gram01: GramCross, gram11: Gram1, dim: int, rtol: float = RANK_TOLERANCE
) -> SubspacePair:
    """Compare row spaces from A0 A0^T, A0 A1^T and A1 A1^T (for B: B0^T B0, B0^T B1, B1^T B1).

    Args:
        gram00: [..., r0, r0] anchor with itself.
        gram01: [..., r0, r1] anchor with current.
        gram11: [..., r1, r1] current with itself.
        dim: d_in (d_out for B).
        rtol: see the module's text.

    Returns:
        The pair; its angles resolve about 1e-7 rather than 1e-15.
    """
    white0, white1 = whitening(gram00, rtol), whitening(gram11, rtol)
    cross = white0.matrix @ as_float(gram01) @ np.swapaxes(white1.matrix, -1, -2)
    return SubspacePair(cross, white0.rank, white1.rank, white0.matrix, dim)


def expert_blocks(
    gram: Float[np.ndarray, "*site rows columns"], experts: int
) -> Float64[np.ndarray, "*site expert rank0 rank1"]:
    """Cut the blocks of one expert with itself out of [..., E r, E r'] (expert-slowest): [..., E, r, r'].

    Raises:
        ConfigError: a side that is no multiple of the number of experts.
    """
    matrix = as_float(gram)
    rows, columns = matrix.shape[-2:]
    if rows % experts or columns % experts:
        raise ConfigError(f"A Gram matrix of {rows} x {columns} cannot be cut into blocks of {experts} experts.")
    blocks = matrix.reshape(*matrix.shape[:-2], experts, rows // experts, experts, columns // experts)
    return np.moveaxis(np.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)


def subspace_overlap(A0: Rows0, A1: Rows1) -> PerSite:
    """Overlap of the row spaces of A0 [..., r0, d] and A1 [..., r1, d]: [...] in 0..1; see `SubspacePair.overlap`."""
    return pair_from_factors(A0, A1).overlap()


def subspace_overlap_adjusted(A0: Rows0, A1: Rows1) -> PerSite:
    """Overlap above chance: [...] at most 1; see `SubspacePair.adjusted`."""
    return pair_from_factors(A0, A1).adjusted()


def principal_angles(A0: Rows0, A1: Rows1) -> Float64[np.ndarray, "*site angle"]:
    """Principal angles between row spaces, [..., min(r0, r1)], ascending; see `SubspacePair.angles`."""
    return pair_from_factors(A0, A1).angles()


def grassmann_distance(A0: Rows0, A1: Rows1) -> PerSite:
    """Root mean square principal angle, [...] in 0..pi/2; see `SubspacePair.distance`."""
    return pair_from_factors(A0, A1).distance()


def output_overlap(B0: Columns0, B1: Columns1) -> PerSite:
    """Overlap of the column spaces of B0 [..., d_out, r0] and B1 [..., d_out, r1]: [...] in 0..1."""
    return subspace_overlap(np.swapaxes(as_float(B0), -1, -2), np.swapaxes(as_float(B1), -1, -2))


def active_overlap(A0: Rows0, A1: Rows1, moment: Gram0) -> PerSite:
    """Overlap weighted by the anchor's use, ``moment`` [..., r0, r0]: [...]; see `SubspacePair.active_overlap`."""
    return pair_from_factors(A0, A1).active_overlap(moment)


def active_rank(A: Rows0, moment: Gram0) -> PerSite:
    """Number of directions of the PAS that a probe uses: exp(entropy of lambda / sum lambda), [...] in 1..r.

    Args:
        A: [..., r, d].
        moment: [..., r, r] sum or mean of z z^T over the probe.
    """
    return _active_rank(orthonormal_rows(A).matrix, moment)


def active_rank_from_gram(gram: Gram0, moment: Gram0) -> PerSite:
    """As `active_rank`, from A A^T [..., r, r]."""
    return active_rank_of_whitening(whitening(gram), moment)


def active_rank_of_whitening(white: Whitening, moment: Gram0) -> PerSite:
    """As `active_rank`, where A A^T was whitened already."""
    return _active_rank(white.matrix, moment)


def _active_rank(matrix: FloatArray, moment: Gram0) -> PerSite:
    used = _coordinates_moment(matrix, moment)
    clean, finite = finite_matrices(used)
    spectrum = np.clip(np.linalg.eigvalsh(clean), 0.0, None)
    rank = np.exp(entr(normalise(spectrum)).sum(axis=-1))
    defined = finite & (spectrum.sum(axis=-1) > 0)
    return np.where(defined, rank, np.nan)


def _coordinates_moment(matrix: FloatArray, moment: Gram0) -> FloatArray:
    """Second moment of q = W z."""
    used: FloatArray = matrix @ as_float(moment) @ np.swapaxes(matrix, -1, -2)
    return used
