"""Shared handling of array arguments: precision, checks, padding of growing methods, means that know NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from driftlens.errors import ConfigError, ProbeError

__all__ = [
    "FloatArray",
    "as_float",
    "as_weights",
    "check_same_tokens",
    "divide",
    "finite_matrices",
    "mean_defined",
    "normalise",
    "pad_experts",
]

FloatArray = NDArray[np.float64]


def as_float(values: ArrayLike) -> FloatArray:
    """Return ``values`` as float64; recordings hold float16, whose sums and squares would overflow or vanish.

    Large inputs (A and B of a 7B model) should be passed a few sites at a time: the copy is twice float32's size.
    """
    return np.asarray(values, dtype=np.float64)


def as_weights(values: ArrayLike, name: str = "gate") -> FloatArray:
    """Return ``values`` as float64 after checking that no entry is negative. NaN passes, and stays NaN.

    Raises:
        ConfigError: a negative entry (logits instead of weights), or a scalar.
    """
    weights = as_float(values)
    if weights.ndim == 0:
        raise ConfigError(f"{name} is a single number; expected an array [..., tokens, experts].")
    if (weights < 0).any():
        raise ConfigError(
            f"{name} holds negative entries (lowest {np.nanmin(weights):.3g}); expected non-negative weights. "
            "If these are router logits, apply the model's own gate function first."
        )
    return weights


def check_same_tokens(first: FloatArray, second: FloatArray, axis: int = -2, what: str = "gates") -> None:
    """Refuse arrays whose token axes differ: drift is computed between the same token at two checkpoints.

    Raises:
        ProbeError: the numbers of tokens differ.
    """
    if min(first.ndim, second.ndim) < -axis:
        raise ConfigError(
            f"The {what} have shapes {first.shape} and {second.shape}; expected at least {-axis} axes (tokens first)."
        )
    if first.shape[axis] != second.shape[axis]:
        raise ProbeError(
            f"The {what} of the two checkpoints hold {first.shape[axis]} and {second.shape[axis]} tokens; drift pairs "
            "the same token at both. Record both checkpoints on the same probe set."
        )


def pad_experts(first: FloatArray, second: FloatArray, axis: int = -1) -> tuple[FloatArray, FloatArray]:
    """Append zeros along ``axis`` until both arrays have the same number of experts.

    An expert that did not exist at one checkpoint has gate 0 and output 0 there, so measures stay defined for
    methods that grow.
    """
    size = max(first.shape[axis], second.shape[axis])
    return _pad_to(first, size, axis), _pad_to(second, size, axis)


def _pad_to(values: FloatArray, size: int, axis: int) -> FloatArray:
    missing = size - values.shape[axis]
    if missing == 0:
        return values
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, missing)
    return np.pad(values, widths)


def divide(numerator: Any, denominator: Any) -> FloatArray:
    """Return the quotient with NaN, and no warning, where the denominator is 0 or the quotient is undefined."""
    top, bottom = as_float(numerator), as_float(denominator)
    with np.errstate(divide="ignore", invalid="ignore"):  # infinity over infinity is NaN, as documented
        result: FloatArray = np.asarray(top / bottom)
    np.copyto(result, np.nan, where=bottom == 0)
    return result


def normalise(weights: FloatArray) -> FloatArray:
    """Scale rows (last axis) to sum to 1; rows of zeros stay zeros, rows with NaN or infinity hold NaN.

    Needed because some methods use unnormalised gates, and because float16 rows sum to 1 only to about 1e-3.
    """
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        scaled: FloatArray = weights / np.where(total == 0, 1.0, total)
    return scaled


def finite_matrices(matrices: FloatArray) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Replace matrices [..., a, b] that hold NaN or infinity by zeros, and say which were finite, [...].

    LAPACK stops the whole batch at the first NaN; callers put the NaN back into the results of those matrices.
    """
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(matrices).all(axis=(-1, -2)))
    return np.where(finite[..., None, None], matrices, 0.0), finite


def mean_defined(values: FloatArray, axis: int | tuple[int, ...] = -1) -> FloatArray:
    """Return the mean of the entries that are not NaN; NaN where none is."""
    defined = ~np.isnan(values)
    return divide(np.where(defined, values, 0.0).sum(axis=axis), defined.sum(axis=axis))
