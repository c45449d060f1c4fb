"""Debiased linear CKA between an expert's outputs at two checkpoints (metrics.md section 2).

For tokens i, j with outputs x at one checkpoint and y at the other, K_ij = <x_i, x_j> and L_ij = <y_i, y_j>. With
their diagonals set to zero, the unbiased HSIC of Song et al. (2012), as used for CKA by Nguyen et al. (2021), is::

    n (n - 3) HSIC = tr(K L) + (1'K 1)(1'L 1) / ((n - 1)(n - 2)) - 2 / (n - 2) 1'K L 1

It does not change when a constant is added to all outputs, so they are centred first. Then every row of the full K
sums to zero, which leaves, with a_i = norm(x_i)^2 and b_i = norm(y_i)^2::

    n (n - 3) HSIC = norm_F(X'Y)^2 - n / (n - 2) sum_i a_i b_i + sum_i a_i sum_i b_i / ((n - 1)(n - 2))

X'Y and the norms follow from z and the r x r Gram matrices of B: neither the n x n Gram nor a vector of length d_out
is formed. HSIC is also an inner product (of U-centred Gram matrices), so its quotient, CKA, lies in -1..1, is 1 for
equal outputs, and its expectation on unrelated tokens is about 0. The biased form, with the diagonals kept, has no
such zero: it reads about d / (n + d) on independent data of d dimensions. `biased_cka` is there to compare with what
others print, and for nothing else.

Memory: z in float64 as given and centred, at both checkpoints, and one product of the same size: at most 5 E r numbers
of 8 bytes per site and token at the peak (100 MB for a site of 8 experts of rank 16 and 20 000 tokens); pass a few
sites at a time for large models.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from driftlens.errors import ConfigError
from driftlens.metrics.arrays import FloatArray, as_float, check_same_tokens, divide, pad_experts
from driftlens.metrics.shapes import ExpertFactors0, ExpertFactors1, Paths0, Paths1, PerExpert

__all__ = ["biased_cka", "biased_cka_from_grams", "cka", "cka_from_grams"]

_MIN_TOKENS = 4
"""HSIC divides by n - 3, and its numerator is identically zero for three tokens."""

_RESOLVED = 1e-12
"""A difference below this share of its terms keeps fewer than four digits in float64: it counts as zero."""


def cka(z0: Paths0, z1: Paths1, B0: ExpertFactors0, B1: ExpertFactors1) -> PerExpert:
    """Debiased linear CKA over tokens between each expert's outputs at the anchor and at the current checkpoint.

    Invariant to the gauge, to a rotation, shift or scaling of the outputs (so B with or without the module's scaling)
    at either checkpoint. All tokens weigh alike: a mean over samples is not defined for it.

    Args:
        z0: anchor pathway activations [..., n, E, r].
        z1: current ones [..., n, E', r'], the same tokens.
        B0: anchor factors [..., E, d_out, r].
        B1: current factors [..., E', d_out, r'].

    Returns:
        [..., max(E, E')] float64 in -1..1, about 0 for unrelated outputs. NaN where fewer than 4 tokens were
        recorded, where the outputs of an expert do not vary between tokens at one of the checkpoints (B = 0, or the
        expert did not exist), or where they vary in one token only; NaN for the whole site if it holds NaN or
        infinite values.

    Raises:
        ProbeError: different numbers of tokens.
        ConfigError: shapes that do not fit each other.
    """
    return cka_from_grams(z0, z1, *_grams(B0, B1))


def cka_from_grams(
    z0: Paths0,
    z1: Paths1,
    G00: Float[np.ndarray, "*site expert0 rank0 rank0"],
    G11: Float[np.ndarray, "*site expert1 rank1 rank1"],
) -> PerExpert:
    """`cka` from the Gram matrices of each expert's B, which is what a thinned recording keeps.

    Args:
        z0: anchor pathway activations [..., n, E, r].
        z1: current ones [..., n, E', r'], the same tokens.
        G00: B0_e^T B0_e of every expert, [..., E, r, r]; `expert_blocks` cuts them out of a site's Gram matrix.
        G11: B1_e^T B1_e, [..., E', r', r'].

    Returns:
        As `cka`.

    Raises:
        ProbeError: different numbers of tokens.
        ConfigError: shapes that do not fit each other.
    """
    path0, path1, gram0, gram1 = _checked(z0, z1, G00, G11)
    if path0.shape[-3] < _MIN_TOKENS:
        return np.full(np.broadcast_shapes(path0.shape[:-3], path1.shape[:-3]) + path0.shape[-2:-1], np.nan)
    with np.errstate(invalid="ignore", over="ignore"):  # infinite activations end as NaN
        x, y = _centred(path0), _centred(path1)
        a, b = _squared_norms(x, gram0), _squared_norms(y, gram1)
        between = _hsic(a, b, _moment(x, y, gram0, gram1))
        same0, same1 = _self_hsic(a, _moment(x, x, gram0, gram0)), _self_hsic(b, _moment(y, y, gram1, gram1))
        return _quotient(between, same0, same1)


def biased_cka(z0: Paths0, z1: Paths1, B0: ExpertFactors0, B1: ExpertFactors1) -> PerExpert:
    """Linear CKA with the biased HSIC, norm_F(X'Y)^2 / (norm_F(X'X) norm_F(Y'Y)) of centred outputs X, Y [n, d_out].

    Only to compare with numbers that others print: on unrelated outputs of d dimensions it reads about d / (n + d), and
    1 wherever both are of dimension n - 1. `cka` has a zero.

    Args:
        z0: anchor pathway activations [..., n, E, r].
        z1: current ones [..., n, E', r'], the same tokens.
        B0: anchor factors [..., E, d_out, r].
        B1: current factors [..., E', d_out, r'].

    Returns:
        [..., max(E, E')] float64 in 0..1. NaN for no token, where the outputs of an expert do not vary between tokens
        at one of the checkpoints, and for the whole site if it holds NaN or infinite values.

    Raises:
        ProbeError: different numbers of tokens.
        ConfigError: shapes that do not fit each other.
    """
    return biased_cka_from_grams(z0, z1, *_grams(B0, B1))


def biased_cka_from_grams(
    z0: Paths0,
    z1: Paths1,
    G00: Float[np.ndarray, "*site expert0 rank0 rank0"],
    G11: Float[np.ndarray, "*site expert1 rank1 rank1"],
) -> PerExpert:
    """`biased_cka` from the Gram matrices of each expert's B; arguments as in `cka_from_grams`."""
    path0, path1, gram0, gram1 = _checked(z0, z1, G00, G11)
    if path0.shape[-3] == 0:
        return np.full(np.broadcast_shapes(path0.shape[:-3], path1.shape[:-3]) + path0.shape[-2:-1], np.nan)
    with np.errstate(invalid="ignore", over="ignore"):  # infinite activations end as NaN
        x, y = _centred(path0), _centred(path1)
        varies = [_squared_norms(*side).sum(axis=-1) > 0 for side in ((x, gram0), (y, gram1))]
        same0, same1 = (
            np.where(moves | ~np.isfinite(moment), moment, 0.0)
            for moves, moment in zip(varies, (_moment(x, x, gram0, gram0), _moment(y, y, gram1, gram1)), strict=True)
        )
        return _quotient(_moment(x, y, gram0, gram1), same0, same1)


def _grams(B0: ExpertFactors0, B1: ExpertFactors1) -> tuple[FloatArray, FloatArray]:
    """B^T B of every expert at both checkpoints, [..., E, r, r]."""
    old, new = as_float(B0), as_float(B1)
    if min(old.ndim, new.ndim) < 3 or old.shape[-2] != new.shape[-2]:
        raise ConfigError(f"B has shapes {old.shape} and {new.shape}; expected [..., E, d_out, r] with one d_out.")
    with np.errstate(invalid="ignore", over="ignore"):  # infinite weights end as NaN
        return np.swapaxes(old, -1, -2) @ old, np.swapaxes(new, -1, -2) @ new


def _checked(
    z0: Paths0, z1: Paths1, G00: FloatArray, G11: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Pathways and Gram matrices in float64, experts padded to the same number."""
    path0, path1, gram0, gram1 = as_float(z0), as_float(z1), as_float(G00), as_float(G11)
    check_same_tokens(path0, path1, axis=-3, what="pathways")
    _check_shapes("anchor", "G00", path0, gram0)
    _check_shapes("current", "G11", path1, gram1)
    path0, path1 = pad_experts(path0, path1, axis=-2)  # an expert that does not exist gives no output
    return path0, path1, *pad_experts(gram0, gram1, axis=-3)


def _quotient(between: FloatArray, same0: FloatArray, same1: FloatArray) -> FloatArray:
    """CKA, [..., E]; NaN for an expert without variation, and for the whole site if a number of it is not finite."""
    broken = ~np.isfinite(same0 + same1 + between).all(axis=-1, keepdims=True)
    value = np.clip(divide(divide(between, np.sqrt(same0)), np.sqrt(same1)), -1.0, 1.0)
    return np.where(broken, np.nan, value)


def _centred(path: FloatArray) -> FloatArray:
    """[..., n, E, r] -> [..., E, n, r] less the mean over tokens.

    The first token goes first: equal tokens are then exactly 0, not the rounding of their mean.
    """
    tokens = np.swapaxes(path, -3, -2)
    result: FloatArray = tokens - tokens[..., :1, :]
    result -= result.mean(axis=-2, keepdims=True)
    return result


def _squared_norms(path: FloatArray, gram: FloatArray) -> FloatArray:
    """Squared output norm of every token, [..., E, n]; 0 for an expert whose outputs do not vary.

    Activations may vary where B is blind, and then rounding is all that is left. It is at most a few float64 steps
    of sum (sum_k norm(b_k) |z_k|)^2, a bound that, like CKA, does not change when a pathway is rescaled.
    """
    norms = np.maximum(np.einsum("...nk,...nk->...n", path @ gram, path), 0.0)
    columns = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    energy = np.sqrt(np.einsum("...nk,...nk->...k", path, path))
    bound = (columns * energy).sum(axis=-1) ** 2
    still = norms.sum(axis=-1) <= _RESOLVED * bound
    return np.where(still[..., None], 0.0, norms)


def _moment(x: FloatArray, y: FloatArray, gram_x: FloatArray, gram_y: FloatArray) -> FloatArray:
    """norm_F(X'Y)^2 of the outputs, [..., E]."""
    between = np.swapaxes(x, -1, -2) @ y
    result: FloatArray = np.einsum("...kl,...kl->...", gram_x @ between @ gram_y, between)
    return result


def _hsic(a: FloatArray, b: FloatArray, moment: FloatArray) -> FloatArray:
    """n (n - 3) HSIC by the last line of the module's text, [..., E]."""
    n = a.shape[-1]
    diagonal: FloatArray = np.einsum("...n,...n->...", a, b) * (n / (n - 2))
    result: FloatArray = moment - diagonal + a.sum(axis=-1) * b.sum(axis=-1) / ((n - 1) * (n - 2))
    return result


def _self_hsic(norms: FloatArray, moment: FloatArray) -> FloatArray:
    """n (n - 3) HSIC of the outputs with themselves, [..., E]; 0 where it cannot be told from 0."""
    result = _hsic(norms, norms, moment)
    nothing = (norms.sum(axis=-1) == 0) | (result <= _RESOLVED * moment)
    return np.where(nothing, 0.0, result)


def _check_shapes(checkpoint: str, name: str, path: FloatArray, gram: FloatArray) -> None:
    wanted = (path.shape[-2], path.shape[-1], path.shape[-1])
    if gram.shape[-3:] != wanted:
        raise ConfigError(
            f"The {checkpoint}'s pathways have shape {path.shape} and {name} has {gram.shape}; expected [..., n, E, r] "
            f"and [..., {', '.join(map(str, wanted))}]."
        )
