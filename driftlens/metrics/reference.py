"""What needs the anchor's parameters on the current pass's inputs (metrics.md sections 2 and 3a).

A site moves for two reasons: its own parameters changed, or the layers below changed what arrives. With u(p, h) what
a site adds with parameters p on input h (0 anchor, 1 current)::

    u(1, h1) - u(0, h0) = [u(0, h1) - u(0, h0)] + [u(1, h1) - u(0, h1)]
                            inherited               local

The middle term u(0, h1) comes from a recording with a reference. As in `driftlens.metrics.codrift`, all inner products
are quadratic forms in Gram matrices of B; vectors of length d_out are never formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from driftlens.errors import ConfigError
from driftlens.metrics.arrays import FloatArray, as_float, as_weights, check_same_tokens, divide
from driftlens.metrics.resample import probe_mean, sample_means
from driftlens.metrics.shapes import (
    Gates0,
    Gates1,
    Paths0,
    Paths1,
    PerSite,
    PerToken,
    Reasons,
    Sample,
    SiteGram00,
    SiteGram01,
    SiteGram11,
)
from driftlens.metrics.undefined import Measured, Reason

__all__ = [
    "DriftOrigin",
    "DriftOriginTokens",
    "ExpertDriftTokens",
    "drift_origin",
    "expert_drift",
    "expert_drift_tokens",
]


class ExpertDriftTokens(NamedTuple):
    """Squared norms behind `expert_drift`, each [..., n, E]: of o^1 - o^0, and of the anchor's o^0, on one input."""

    drift_sq: Float64[np.ndarray, "*site token expert"]
    anchor_sq: Float64[np.ndarray, "*site token expert"]


def expert_drift(drift_sq: Float[np.ndarray, "*expert"], anchor_sq: Float[np.ndarray, "*expert"]) -> Measured:
    """How far each expert moved as a function: sqrt( sum norm(o^1 - o^0)^2 / sum norm(o^0)^2 ) on the same inputs.

    Args:
        drift_sq: [...] sums or means over tokens of norm(o^1 - o^0)^2 (``drift_sq`` of a recording's reference).
        anchor_sq: [...] the same of norm(o^0)^2 (``expert_sq`` of the reference).

    Returns:
        [...] >= 0, gauge-invariant; NaN where the anchor's expert gives no output (``NO_OUTPUT_ANCHOR``; an expert that
        did not exist gives none), or where the sums are not finite.
    """
    moved, scale = as_float(drift_sq), as_float(anchor_sq)
    with np.errstate(invalid="ignore"):
        value = np.sqrt(divide(moved, scale))
    reason = np.where(np.isfinite(value), np.uint8(Reason.DEFINED), np.uint8(Reason.NOT_FINITE))
    return Measured(value, np.where(scale == 0, np.uint8(Reason.NO_OUTPUT_ANCHOR), reason).astype(np.uint8))


def expert_drift_tokens(z0: Paths1, z1: Paths1, G00: SiteGram11, G01: SiteGram11, G11: SiteGram11) -> ExpertDriftTokens:
    """Squared change and size of every expert's output for every token, for intervals over samples.

    Args:
        z0: what enters the anchor's B on the current inputs [..., n, E, r] (pathways of the reference).
        z1: what enters the current B on the same inputs, of the same shape.
        G00: s0^2 B0^T B0, [..., E r, E r], expert-slowest, the scaling s included.
        G01: s0 s1 B0^T B1, likewise.
        G11: s1^2 B1^T B1, likewise.

    Raises:
        ConfigError: shapes that do not fit each other.
    """
    old, new = as_float(z0), as_float(z1)
    if old.shape != new.shape or old.ndim < 3:
        raise ConfigError(f"Pathways have shapes {old.shape} and {new.shape}; expected [..., n, E, r], twice the same.")
    blocks = [_own_blocks(as_float(gram), *old.shape[-2:]) for gram in (G00, G01, G11)]
    sq00, sq01, sq11 = (
        np.einsum("...nei,...eij,...nej->...ne", first, block, second, optimize=True)
        for first, block, second in zip((old, old, new), blocks, (old, new, new), strict=True)
    )
    return ExpertDriftTokens(np.maximum(sq11 - 2 * sq01 + sq00, 0.0), np.maximum(sq00, 0.0))


def _own_blocks(gram: FloatArray, experts: int, rank: int) -> FloatArray:
    """[..., E r, E r] -> [..., E, r, r]: products of every expert's columns among themselves."""
    flat = experts * rank
    if gram.shape[-2:] != (flat, flat):
        raise ConfigError(f"A Gram matrix has shape {gram.shape}; expected [..., {flat}, {flat}] for E r columns.")
    split = gram.reshape(*gram.shape[:-2], experts, rank, experts, rank)
    return np.moveaxis(np.diagonal(split, axis1=-4, axis2=-2), -1, -3)


@dataclass(frozen=True)
class DriftOrigin:
    """Where Phi comes from, each [...] float64: total = inherited + local + 2 cross.

    Attributes:
        total: Phi, as `driftlens.metrics.codrift` gives it; NaN with ``reason``.
        inherited: the part that arrives: the anchor's parameters on new and old inputs.
        local: the site's own part: new and old parameters on the new inputs.
        cross: their inner product, may be negative (the site makes up for what it is given).
        reason: uint8 codes of `Reason`.
    """

    total: PerSite
    inherited: PerSite
    local: PerSite
    cross: PerSite
    reason: Reasons


@dataclass(frozen=True)
class DriftOriginTokens:
    """Inner products behind `DriftOrigin`, each [..., n] over tokens (or samples after `per_sample`).

    Attributes:
        inherited: norm(u(0, h1) - u(0, h0))^2.
        local: norm(u(1, h1) - u(0, h1))^2.
        cross: the inner product of the two.
        u00_sq: norm(u(0, h0))^2.
        u11_sq: norm(u(1, h1))^2.
    """

    inherited: PerToken
    local: PerToken
    cross: PerToken
    u00_sq: PerToken
    u11_sq: PerToken

    @property
    def change_sq(self) -> PerToken:
        """norm(u(1, h1) - u(0, h0))^2, [..., n]."""
        change: FloatArray = np.maximum(self.inherited + self.local + 2 * self.cross, 0.0)
        return change

    def per_sample(self, sample: Sample) -> DriftOriginTokens:
        """Average tokens in each sample; ``sample`` [n] gives [..., m]."""
        return DriftOriginTokens(*(sample_means(part, sample) for part in self._parts()))

    def reduce(self, sample: Sample | None = None) -> DriftOrigin:
        """Average (tokens in a sample, then samples; all tokens alike without ``sample``) and form the parts."""
        means = [probe_mean(part, sample) for part in self._parts()]
        scale = 2 * (means[3] + means[4])
        inherited, local, cross = (divide(part, scale) for part in means[:3])
        total = np.clip(inherited + local + 2 * cross, 0.0, 1.0)
        reason = np.where(np.isfinite(total), np.uint8(Reason.DEFINED), np.uint8(Reason.NOT_FINITE))
        reason = np.where(scale == 0, np.uint8(Reason.NO_OUTPUT), reason).astype(np.uint8)
        if self.local.shape[-1] == 0:
            reason = np.full_like(reason, Reason.NO_TOKENS)
        return DriftOrigin(total, inherited, local, cross, reason)

    def _parts(self) -> tuple[FloatArray, ...]:
        return self.inherited, self.local, self.cross, self.u00_sq, self.u11_sq


def drift_origin(
    anchor: tuple[Gates0, Paths0],
    reference: tuple[Gates0, Paths0],
    current: tuple[Gates1, Paths1],
    G00: SiteGram00,
    G01: SiteGram01,
    G11: SiteGram11,
) -> DriftOriginTokens:
    """Split the drift of every token into what it inherited from the layers below and what the site did itself.

    Args:
        anchor: gates [..., n, E] and pathways [..., n, E, r] of the anchor's own pass.
        reference: the same parameters on the current pass's inputs.
        current: gates [..., n, E'] and pathways [..., n, E', r'] of the current pass; the same tokens.
        G00: s0^2 B0^T B0, [..., E r, E r], expert-slowest, the scaling s included.
        G01: s0 s1 B0^T B1, [..., E r, E' r'].
        G11: s1^2 B1^T B1, [..., E' r', E' r'].

    Returns:
        Per-token results; call ``.reduce(sample)``. Their `change_sq` is that of `codrift_from_grams`.

    Raises:
        ProbeError: different numbers of tokens.
        ConfigError: shapes that do not fit each other.
    """
    old, moved, new = (_gated(*side) for side in (anchor, reference, current))
    for other in (moved, new):
        check_same_tokens(old, other)
    g00, g01, g11 = (as_float(gram) for gram in (G00, G01, G11))
    wanted = ((old, moved), (old, new), (new, new))
    for name, gram, (rows, columns) in zip(("G00", "G01", "G11"), (g00, g01, g11), wanted, strict=True):
        if gram.shape[-2:] != (rows.shape[-1], columns.shape[-1]):
            raise ConfigError(
                f"{name} has shape {gram.shape}; expected [..., {rows.shape[-1]}, {columns.shape[-1]}] for E r columns."
            )
    with np.errstate(invalid="ignore", over="ignore"):  # infinite activations end as NaN with their reason
        step = moved - old
        from_old, from_new, new_on_new = moved @ g00, moved @ g01, new @ g11
        u11 = _dot(new_on_new, new)
        return DriftOriginTokens(
            inherited=np.maximum(_dot(step @ g00, step), 0.0),
            local=np.maximum(u11 - 2 * _dot(from_new, new) + _dot(from_old, moved), 0.0),
            cross=_dot(step @ g01, new) - _dot(from_old, step),
            u00_sq=np.maximum(_dot(old @ g00, old), 0.0),
            u11_sq=np.maximum(u11, 0.0),
        )


def _gated(gate: FloatArray, path: FloatArray) -> FloatArray:
    """[..., n, E] and [..., n, E, r] -> [..., n, E r]: what B is applied to."""
    weights, values = as_weights(gate), as_float(path)
    if values.ndim < 3 or values.shape[:-1] != weights.shape:
        raise ConfigError(
            f"Gates have shape {weights.shape} and pathways {values.shape}; expected [..., n, E] and [..., n, E, r]."
        )
    product = weights[..., None] * values
    flat: FloatArray = product.reshape(*product.shape[:-2], product.shape[-2] * product.shape[-1])
    return flat


def _dot(first: FloatArray, second: FloatArray) -> FloatArray:
    product: FloatArray = np.einsum("...k,...k->...", first, second)
    return product
