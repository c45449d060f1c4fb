"""The co-drift divergence Phi and its exact split into router, experts and both together (metrics.md section 3a).

With u^{ab}_i = sum_e pi^a_{i,e} o^b_{i,e} (gate of checkpoint a, experts of b; 0 anchor, 1 current) the midpoint
identity splits the change of what a site adds for token i, with nothing left over::

    u^11 - u^00 = R + E,    R = sum_e (pi^1 - pi^0)_e (o^0 + o^1)_e / 2,    E = sum_e (pi^0 + pi^1)_e / 2 (o^1 - o^0)_e

R and E are B^0 and B^1 times short vectors of gated activations, so all their inner products are quadratic forms in
the [E r, E r] Gram matrices of B^0, B^1 and between them; vectors of length d_out are never formed. Per-token results
(`CoDriftTokens`) are kept apart from their average so that callers can average tokens in samples and bootstrap.

Memory: about 4 E r numbers of 8 bytes per site and token at the peak; pass a few sites at a time for large models.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from driftlens.errors import ConfigError
from driftlens.metrics.arrays import FloatArray, as_float, as_weights, check_same_tokens, divide, pad_experts
from driftlens.metrics.resample import Interval, bootstrap, probe_mean, sample_means
from driftlens.metrics.shapes import (
    ExpertFactors0,
    ExpertFactors1,
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
from driftlens.metrics.undefined import Reason

__all__ = [
    "CoDrift",
    "CoDriftTokens",
    "Impact",
    "codrift",
    "codrift_from_grams",
    "codrift_from_products",
    "expert_grams",
    "expert_products",
]

_CACHED_BYTES = 1 << 18
"""Size of the arrays that products of expert outputs go through: several of them fit in a second-level cache."""

_STILL = 1e-12
"""Parts of Phi at or below this are rounding of float64 sums: that side did not move."""


@dataclass(frozen=True)
class CoDrift:
    """Phi and its parts, each [...] float64: total = router + experts + 2 cross.

    Attributes:
        total: Phi, 0..1 (0 the same function, 1/2 unrelated, 1 reversed); NaN with ``reason``.
        router: Phi_R.
        experts: Phi_E.
        cross: Phi_x, may be negative.
        coupling: Phi_x / sqrt(Phi_R Phi_E), -1..1: above 0 router and experts push the output the same way, below 0
            one repairs what the other did; NaN with ``coupling_reason`` if one of them did not move.
        share: 2 Phi_x / Phi, how much of the drift is co-drift; NaN if nothing moved.
        reason: uint8 codes of `Reason` for total, router, experts, cross.
        coupling_reason: uint8 codes of `Reason` for coupling.
    """

    total: PerSite
    router: PerSite
    experts: PerSite
    cross: PerSite
    coupling: PerSite
    share: PerSite
    reason: Reasons
    coupling_reason: Reasons


class Impact(NamedTuple):
    """Squared drift over the squared base output, each [...]: total = router + experts + 2 cross."""

    total: PerSite
    router: PerSite
    experts: PerSite
    cross: PerSite


@dataclass(frozen=True)
class CoDriftTokens:
    """Inner products behind Phi, each [..., n] over tokens (or [..., m] over samples after `per_sample`).

    Attributes:
        rr: norm(R_i)^2.
        ee: norm(E_i)^2.
        re: <R_i, E_i>.
        u00_sq: norm(u^00_i)^2.
        u11_sq: norm(u^11_i)^2.
    """

    rr: PerToken
    ee: PerToken
    re: PerToken
    u00_sq: PerToken
    u11_sq: PerToken

    @property
    def change_sq(self) -> PerToken:
        """norm(u^11_i - u^00_i)^2, [..., n]."""
        change: FloatArray = np.maximum(self.rr + self.ee + 2 * self.re, 0.0)
        return change

    def per_sample(self, sample: Sample) -> CoDriftTokens:
        """Average tokens in each sample; ``sample`` [n] gives [..., m]."""
        return CoDriftTokens(*(sample_means(part, sample) for part in self._parts()))

    def reduce(self, sample: Sample | None = None, still: float = _STILL) -> CoDrift:
        """Average (tokens in a sample, then samples; all tokens alike without ``sample``) and form Phi.

        Args:
            sample: [n] sample of each token.
            still: parts of Phi at or below this count as not moved; pass the noise floor of Phi to be stricter.
        """
        result = _compose(*(probe_mean(part, sample) for part in self._parts()), still=still)
        if self.rr.shape[-1] == 0:
            for reason in (result.reason, result.coupling_reason):
                reason[...] = Reason.NO_TOKENS
        return result

    def impact(self, base_sq: Float[np.ndarray, "*site token"], sample: Sample | None = None) -> Impact:
        """Drift relative to what the base module puts out: does it matter here?

        Args:
            base_sq: [..., n] norm(y_i)^2 of the base module's output.
            sample: [n] sample of each token.

        Returns:
            mean_i norm(u^11_i - u^00_i)^2 / mean_i norm(y_i)^2 and its parts, [...] >= 0 (cross of either sign); NaN
            where the base module's output is 0.
        """
        base = as_float(base_sq)
        check_same_tokens(self.rr, base, axis=-1, what="drift and base outputs")
        scale = probe_mean(base, sample)
        rr, ee, re = (probe_mean(part, sample) for part in (self.rr, self.ee, self.re))
        return Impact(divide(rr + ee + 2 * re, scale), divide(rr, scale), divide(ee, scale), divide(re, scale))

    def interval(
        self,
        field: str,
        sample: Sample | None = None,
        *,
        draws: int = 1000,
        seed: int = 0,
        level: float = 0.95,
        average_over: int | tuple[int, ...] = (),
    ) -> Interval:
        """Bootstrap one field of `CoDrift` over samples; arguments as in `driftlens.metrics.bootstrap`.

        Raises:
            ConfigError: no such field.
        """
        known = [entry.name for entry in fields(CoDrift) if not entry.name.endswith("reason")]
        if field not in known:
            raise ConfigError(f"No interval for {field!r}; the fields are {', '.join(known)}.")
        samples = self if sample is None else self.per_sample(sample)

        def statistic(*means: FloatArray) -> FloatArray:
            value: FloatArray = getattr(_compose(*means, still=_STILL), field)
            return value

        return bootstrap(statistic, *samples._parts(), draws=draws, seed=seed, level=level, average_over=average_over)

    def _parts(self) -> tuple[FloatArray, ...]:
        return self.rr, self.ee, self.re, self.u00_sq, self.u11_sq


def _compose(
    rr: FloatArray, ee: FloatArray, re: FloatArray, u00_sq: FloatArray, u11_sq: FloatArray, *, still: float
) -> CoDrift:
    """Form Phi from means over tokens."""
    scale = 2 * (u00_sq + u11_sq)
    router, experts, cross = divide(rr, scale), divide(ee, scale), divide(re, scale)
    total = np.clip(router + experts + 2 * cross, 0.0, 1.0)
    reason = np.full(np.shape(total), Reason.DEFINED, dtype=np.uint8)
    reason[~np.isfinite(total)] = Reason.NOT_FINITE
    reason[scale == 0] = Reason.NO_OUTPUT
    moved_router, moved_experts = router > still, experts > still
    coupling = np.clip(divide(cross, np.sqrt(router * experts)), -1.0, 1.0)
    coupling_reason = reason.copy()
    defined = reason == Reason.DEFINED
    coupling_reason[defined & ~moved_router] = Reason.ROUTER_DID_NOT_MOVE
    coupling_reason[defined & ~moved_experts] = Reason.EXPERTS_DID_NOT_MOVE
    coupling_reason[defined & ~moved_router & ~moved_experts] = Reason.NOTHING_MOVED
    return CoDrift(
        total=total,
        router=router,
        experts=experts,
        cross=cross,
        coupling=np.where(moved_router & moved_experts, coupling, np.nan),
        share=np.where(total > still, divide(2 * cross, total), np.nan),
        reason=reason,
        coupling_reason=coupling_reason,
    )


def expert_grams(B0: ExpertFactors0, B1: ExpertFactors1) -> tuple[SiteGram00, SiteGram01, SiteGram11]:
    """Gram matrices of expert outputs: B [..., E, d_out, r] with the scaling give three [..., E r, E' r'].

    Returns:
        B0^T B0, B0^T B1, B1^T B1, expert-slowest.

    Raises:
        ConfigError: the factors have different output dimensions.
    """
    old, new = as_float(B0), as_float(B1)
    if min(old.ndim, new.ndim) < 3 or old.shape[-2] != new.shape[-2]:
        raise ConfigError(f"B has shapes {old.shape} and {new.shape}; expected [..., E, d_out, r] with one d_out.")
    old, new = (_flat_columns(factor) for factor in (old, new))
    old_rows, new_rows = np.swapaxes(old, -1, -2), np.swapaxes(new, -1, -2)
    return old_rows @ old, old_rows @ new, new_rows @ new


def _flat_columns(factor: FloatArray) -> FloatArray:
    """[..., E, d, r] -> [..., d, E r]."""
    moved = np.moveaxis(factor, -3, -2)
    return moved.reshape(*moved.shape[:-2], factor.shape[-3] * factor.shape[-1])


def codrift_from_grams(
    gate0: Gates0,
    gate1: Gates1,
    z0: Paths0,
    z1: Paths1,
    G00: SiteGram00,
    G01: SiteGram01,
    G11: SiteGram11,
) -> CoDriftTokens:
    """Inner products of R and E for every token.

    Args:
        gate0: anchor gates [..., n, E] as used (not normalised here: the function is what it is).
        gate1: current gates [..., n, E']; a method may have grown.
        z0: anchor pathway activations [..., n, E, r], before the scaling.
        z1: current ones [..., n, E', r'].
        G00: s0^2 B0^T B0, [..., E r, E r], expert-slowest, the scaling s included.
        G01: s0 s1 B0^T B1, [..., E r, E' r'].
        G11: s1^2 B1^T B1, [..., E' r', E' r'].

    Returns:
        Per-token results; call ``.reduce(sample)`` for Phi.

    Raises:
        ProbeError: different numbers of tokens.
        ConfigError: shapes that do not fit each other.
    """
    first, second = as_weights(gate0, "gate0"), as_weights(gate1, "gate1")
    check_same_tokens(first, second)
    path0, path1 = as_float(z0), as_float(z1)
    grams = as_float(G00), as_float(G01), as_float(G11)
    _check_shapes(first, second, path0, path1, *grams)
    old, new = path0.shape[-2], path1.shape[-2]
    first, second = pad_experts(first, second)
    step, middle = (second - first) / 2, (second + first) / 2

    def gated(gate: FloatArray, path: FloatArray, experts: int) -> FloatArray:
        product = gate[..., :experts, None] * path
        return product.reshape(*product.shape[:-2], path.shape[-2] * path.shape[-1])

    # R = B0 r0 + B1 r1 and E = B1 e1 - B0 e0; then u00 = B0 (e0 - r0) and u11 = B1 (e1 + r1) cost no further product.
    r0, e0 = gated(step, path0, old), gated(middle, path0, old)
    r1, e1 = gated(step, path1, new), gated(middle, path1, new)
    with np.errstate(invalid="ignore", over="ignore"):  # infinite activations end as NaN with their reason
        g00_r0, g00_e0 = _images(grams[0], r0, e0)
        g01_r1, g01_e1 = _images(np.swapaxes(grams[1], -1, -2), r1, e1)
        g11_r1, g11_e1 = _images(grams[2], r1, e1)
        rr0, re0, ee0 = _dot(r0, g00_r0), _dot(r0, g00_e0), _dot(e0, g00_e0)
        rr1, re1, ee1 = _dot(r1, g11_r1), _dot(r1, g11_e1), _dot(e1, g11_e1)
        return CoDriftTokens(
            rr=np.maximum(rr0 + 2 * _dot(r0, g01_r1) + rr1, 0.0),
            ee=np.maximum(ee0 - 2 * _dot(e0, g01_e1) + ee1, 0.0),
            re=_dot(r0, g01_e1) - re0 + re1 - _dot(e0, g01_r1),
            u00_sq=np.maximum(ee0 - 2 * re0 + rr0, 0.0),
            u11_sq=np.maximum(ee1 + 2 * re1 + rr1, 0.0),
        )


def expert_products(z0: Paths0, z1: Paths1, gram: SiteGram01) -> Float64[np.ndarray, "*site token expert0 expert1"]:
    """Inner products <o_e, o'_f> between the outputs of all experts for every token.

    Computed once per pass and pair of passes, they give `codrift_from_products` for any gates. Fast where tokens are
    last in memory (``moveaxis`` of [..., E, r, n]).

    Args:
        z0: pathway activations [..., n, E, r], before the scaling.
        z1: others of the same tokens, [..., n, E', r']; pass the same array for products within one pass.
        gram: B^T B' with both scalings, [..., E r, E' r'], expert-slowest; symmetric for products within one pass.

    Returns:
        [..., n, E, E'], tokens last in memory.

    Raises:
        ProbeError: different numbers of tokens.
        ConfigError: a Gram matrix that does not fit.
    """
    path0, path1, inner = as_float(z0), as_float(z1), as_float(gram)
    check_same_tokens(path0, path1, axis=-3, what="pathways")
    first, second = (np.moveaxis(path, -3, -1) for path in (path0, path1))
    (old, rank), (new, width), tokens = first.shape[-3:-1], second.shape[-3:-1], first.shape[-1]
    if inner.shape[-2:] != (old * rank, new * width):
        raise ConfigError(
            f"The Gram matrix has shape {inner.shape}; expected [..., {old * rank}, {new * width}] for E r columns."
        )
    flat = second.reshape(*second.shape[:-3], new * width, tokens)
    result = np.empty((*np.broadcast_shapes(first.shape[:-3], flat.shape[:-2], inner.shape[:-2]), old, new, tokens))
    step = min(max(64, _CACHED_BYTES // (8 * new * width)), tokens)
    room = np.empty((*result.shape[:-3], new * width, step))
    for begin, expert in itertools.product(range(0, tokens, step or 1), range(old)):
        part, start = slice(begin, begin + step), expert if z0 is z1 else 0
        rows = np.swapaxes(inner[..., expert * rank : (expert + 1) * rank, start * width :], -1, -2)
        image = room[..., start * width :, : tokens - begin]
        np.matmul(rows, first[..., expert, :, part], out=image)
        image *= flat[..., start * width :, part]
        split = image.reshape(*image.shape[:-2], new - start, width, image.shape[-1])
        np.sum(split, axis=-2, out=result[..., expert, start:, part])
        if start:
            result[..., expert, :start, part] = result[..., :start, expert, part]
    return np.moveaxis(result, -1, -3)


def codrift_from_products(
    gate0: Gates0,
    gate1: Gates1,
    own0: Float[np.ndarray, "*site token expert expert"],
    between: Float[np.ndarray, "*site token expert expert"],
    own1: Float[np.ndarray, "*site token expert expert"],
) -> CoDriftTokens:
    """As `codrift_from_grams`, from the products of expert outputs: quadratic forms in the gates alone.

    Args:
        gate0: anchor gates [..., n, E] as used.
        gate1: current gates [..., n, E].
        own0: `expert_products` of the anchor's outputs with each other, [..., n, E, E].
        between: of the anchor's outputs (rows) with the current ones (columns).
        own1: of the current outputs with each other.
    """
    first, second = as_float(gate0), as_float(gate1)
    tokens, experts = first.shape[-2:]
    size = max(64, _CACHED_BYTES // (16 * experts**2))
    cuts = [slice(begin, begin + size) for begin in range(0, max(tokens, 1), size)]
    with np.errstate(invalid="ignore", over="ignore"):  # infinite activations end as NaN with their reason
        parts = [
            _forms(first[..., cut, :], second[..., cut, :], *(each[..., cut, :, :] for each in (own0, between, own1)))
            for cut in cuts
        ]
    return CoDriftTokens(*(np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)))


def _forms(
    first: FloatArray, second: FloatArray, own0: FloatArray, between: FloatArray, own1: FloatArray
) -> tuple[FloatArray, ...]:
    step, middle = (second - first) / 2, (second + first) / 2
    turned = np.swapaxes(between, -1, -2)
    own, both = own0 + own1, between + turned
    kept = own + both
    own -= both
    return (
        np.maximum(_form(step, kept, step), 0.0),
        np.maximum(_form(middle, own, middle), 0.0),
        _form(step, between - turned + own1 - own0, middle),
        np.maximum(_form(first, own0, first), 0.0),
        np.maximum(_form(second, own1, second), 0.0),
    )


def _form(left: FloatArray, matrix: FloatArray, right: FloatArray) -> FloatArray:
    """sum_ef left_e matrix_ef right_f for every token."""
    image = (matrix * right[..., None, :]).sum(axis=-1)
    form: FloatArray = (left * image).sum(axis=-1)
    return form


def _images(gram: FloatArray, first: FloatArray, second: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Products of two sets of row vectors with a Gram matrix, in one call."""
    both = np.concatenate([first, second], axis=-2) @ gram
    return both[..., : first.shape[-2], :], both[..., first.shape[-2] :, :]


def _dot(first: FloatArray, second: FloatArray) -> FloatArray:
    product: FloatArray = np.einsum("...k,...k->...", first, second)
    return product


def _check_shapes(
    gate0: FloatArray,
    gate1: FloatArray,
    z0: FloatArray,
    z1: FloatArray,
    G00: FloatArray,
    G01: FloatArray,
    G11: FloatArray,
) -> None:
    for name, gate, path in (("anchor", gate0, z0), ("current", gate1, z1)):
        if path.ndim < 3 or path.shape[-3:-1] != gate.shape[-2:]:
            raise ConfigError(
                f"The {name}'s gates have shape {gate.shape} and its pathways {path.shape}; expected [..., n, E] and "
                "[..., n, E, r]."
            )
    old, new = z0.shape[-2] * z0.shape[-1], z1.shape[-2] * z1.shape[-1]
    for name, gram, wanted in (("G00", G00, (old, old)), ("G01", G01, (old, new)), ("G11", G11, (new, new))):
        if gram.shape[-2:] != wanted:
            raise ConfigError(
                f"{name} has shape {gram.shape}; expected [..., {wanted[0]}, {wanted[1]}] for E r columns."
            )


def codrift(
    gate0: Gates0,
    gate1: Gates1,
    z0: Paths0,
    z1: Paths1,
    B0: ExpertFactors0,
    B1: ExpertFactors1,
    sample: Sample | None = None,
) -> CoDrift:
    """Co-drift divergence of a site (or a stack of sites) between two checkpoints.

    Args:
        gate0: anchor gates [..., n, E].
        gate1: current gates [..., n, E'].
        z0: anchor pathway activations [..., n, E, r], before the scaling.
        z1: current ones [..., n, E', r'].
        B0: anchor factors [..., E, d_out, r] with the scaling in them.
        B1: current factors [..., E', d_out, r'].
        sample: [n] sample of each token; None weighs all tokens alike.

    Returns:
        Phi and its parts, each [...]; see `CoDrift`.
    """
    return codrift_from_grams(gate0, gate1, z0, z1, *expert_grams(B0, B1)).reduce(sample)
