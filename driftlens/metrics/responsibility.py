"""Responsibility: which expert supplies how much of a site's update (metrics.md section 3b).

rho_{i,e} = pi_e norm(o_e) / sum_f pi_f norm(o_f). It says who acts, not what they do: an expert may be overwritten
while its share stays, so this is never shown without the co-drift divergence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from driftlens.metrics.arrays import FloatArray, as_float, as_weights, check_same_tokens, divide, pad_experts
from driftlens.metrics.resample import probe_mean, sample_means
from driftlens.metrics.routing import js_divergence, js_of_shares
from driftlens.metrics.shapes import (
    Gates,
    Gates0,
    Gates1,
    Norms,
    Norms0,
    Norms1,
    Paths,
    PerSite,
    PerToken,
    Reasons,
    Sample,
)
from driftlens.metrics.undefined import Reason

__all__ = [
    "ResponsibilityDrift",
    "ResponsibilityTokens",
    "alignment",
    "alignment_energy",
    "responsibility",
    "responsibility_drift",
    "responsibility_tokens",
]


class _Parts(NamedTuple):
    total: PerSite
    router: PerSite
    experts: PerSite
    phi_router: PerSite
    phi_experts: PerSite
    synergy: PerSite
    retained: PerSite


class ResponsibilityDrift(_Parts):
    """Seven arrays [...] in the order of the fields, and their ``reason`` beside the tuple.

    ``total`` is D = mean JS(rho^00, rho^11), ``router`` D_R = mean JS(rho^00, rho^10), ``experts`` D_E = mean
    JS(rho^00, rho^01), all base 2 and 0..1; ``phi_router`` + ``phi_experts`` = D are its Shapley parts, ``synergy`` =
    D - D_R - D_E, ``retained`` the responsibility still with its early owner, 0..1. ``reason`` [...] holds uint8 codes
    of `Reason` for ``total``.
    """

    reason: Reasons


@dataclass(frozen=True)
class ResponsibilityTokens:
    """The same quantities per token, [..., n], NaN for tokens without output at one of the checkpoints.

    ``router`` and ``experts`` are also NaN for tokens for which a mixed update (new gate, old experts, or the reverse)
    is 0, as when the new gate picks only experts that did not exist at the anchor.
    """

    total: PerToken
    router: PerToken
    experts: PerToken
    retained: PerToken
    reason: Reasons

    def per_sample(self, sample: Sample) -> ResponsibilityTokens:
        """Average the defined tokens of each sample: [..., m]."""
        total, router, experts, retained = (
            sample_means(part, sample, skip_undefined=True)
            for part in (self.total, self.router, self.experts, self.retained)
        )
        return ResponsibilityTokens(total, router, experts, retained, self.reason)

    def reduce(self, sample: Sample | None = None) -> ResponsibilityDrift:
        """Average defined tokens in a sample, then samples.

        The Shapley parts and the synergy are means over the tokens that have all four shares; they sum to ``total``
        exactly when these are all defined tokens.
        """
        total, router, experts, retained = (
            probe_mean(part, sample, skip_undefined=True)
            for part in (self.total, self.router, self.experts, self.retained)
        )
        # Tokens without the mixed shares are dropped from D as well here, or the parts would not belong together.
        whole = probe_mean(np.where(np.isnan(self.router), np.nan, self.total), sample, skip_undefined=True)
        return compose_responsibility(total, router, experts, retained, whole, self.reason)


def compose_responsibility(
    total: PerSite, router: PerSite, experts: PerSite, retained: PerSite, whole: PerSite, reason: Reasons
) -> ResponsibilityDrift:
    """Form the Shapley parts and the synergy from means [...]; ``whole`` is D over the tokens with all four shares."""
    phi_router, phi_experts = (router + whole - experts) / 2, (experts + whole - router) / 2
    result = ResponsibilityDrift(total, router, experts, phi_router, phi_experts, whole - router - experts, retained)
    result.reason = reason
    return result


def responsibility(gate: Gates, norm: Norms) -> Float64[np.ndarray, "*site token expert"]:
    """Share of the update's magnitude by expert: gates and output norms [..., n, E] give [..., n, E], rows sum to 1.

    Rows without any output are NaN.
    """
    with np.errstate(invalid="ignore"):  # an infinite norm under a gate of 0 is NaN, as documented
        magnitude = as_weights(gate) * as_weights(norm, "expert norms")
    return divide(magnitude, magnitude.sum(axis=-1, keepdims=True))


def responsibility_tokens(gate0: Gates0, gate1: Gates1, norm0: Norms0, norm1: Norms1) -> ResponsibilityTokens:
    """Responsibility drift of every token; arguments as in `responsibility_drift`."""
    pi0, pi1 = as_weights(gate0, "gate0"), as_weights(gate1, "gate1")
    o0, o1 = as_weights(norm0, "norm0"), as_weights(norm1, "norm1")
    check_same_tokens(pi0, pi1)
    check_same_tokens(pi0, o0, what="gates and expert norms")
    check_same_tokens(pi1, o1, what="gates and expert norms")
    pi0, pi1 = pad_experts(pi0, pi1)
    o0, o1 = pad_experts(o0, o1)
    rho00, rho11, rho10, rho01 = (responsibility(pi, o) for pi, o in ((pi0, o0), (pi1, o1), (pi1, o0), (pi0, o1)))
    with np.errstate(invalid="ignore"):  # as in `responsibility`
        magnitude0, magnitude1 = pi0 * o0, pi1 * o1
    whole = _whole(magnitude0) & _whole(magnitude1)
    total = np.where(whole[..., None], js_of_shares(rho00, rho11), np.nan)
    router, experts = js_of_shares(rho00, rho10), js_of_shares(rho00, rho01)
    complete = ~(np.isnan(total) | np.isnan(router) | np.isnan(experts))
    return ResponsibilityTokens(
        total=total,
        router=np.where(complete, router, np.nan),
        experts=np.where(complete, experts, np.nan),
        retained=np.where(np.isnan(total), np.nan, np.minimum(rho00, rho11).sum(axis=-1)),
        reason=_reasons(magnitude0, magnitude1, total, whole),
    )


def _whole(magnitude: FloatArray) -> NDArray[np.bool_]:
    """Sites [...] without NaN or infinity: a broken token must not pass for a silent one, which is left out."""
    return np.asarray(np.isfinite(magnitude).all(axis=(-1, -2)))


def _reasons(
    magnitude0: FloatArray, magnitude1: FloatArray, total: FloatArray, whole: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Why no token of a site has a defined drift; only where none has."""
    reason = np.full(total.shape[:-1], Reason.DEFINED, dtype=np.uint8)
    undefined = np.isnan(total).all(axis=-1)
    silent0, silent1 = (~(magnitude > 0).any(axis=(-1, -2)) for magnitude in (magnitude0, magnitude1))
    # Without a token that has output at both ends it is still undefined: the anchor's silence is named.
    reason[undefined] = Reason.NO_OUTPUT_ANCHOR
    reason[undefined & silent1] = Reason.NO_OUTPUT_CURRENT
    reason[undefined & silent1 & silent0] = Reason.NO_OUTPUT
    reason[~whole] = Reason.NOT_FINITE
    if total.shape[-1] == 0:
        reason[...] = Reason.NO_TOKENS
    return reason


def responsibility_drift(
    gate0: Gates0, gate1: Gates1, norm0: Norms0, norm1: Norms1, sample: Sample | None = None
) -> ResponsibilityDrift:
    """Drift of responsibility between two checkpoints, with its router and expert parts.

    Args:
        gate0: anchor gates [..., n, E].
        gate1: current gates [..., n, E'].
        norm0: norms of the anchor's expert outputs before the gate, [..., n, E].
        norm1: the current ones, [..., n, E'].
        sample: [n] sample of each token.

    Returns:
        `ResponsibilityDrift`; NaN, with the reason, where the experts give no output (B = 0).

    Raises:
        ProbeError: different numbers of tokens.
        ConfigError: negative entries.
    """
    return responsibility_tokens(gate0, gate1, norm0, norm1).reduce(sample)


def alignment(gate: Gates, norm: Norms, sample: Sample | None = None) -> PerSite:
    """Agreement of the gate with the experts' own output: 1 - mean_i JS(pi_i, norm(o_i) / sum), [...] in 0..1.

    Args:
        gate: [..., n, E].
        norm: norms of expert outputs before the gate, [..., n, E].
        sample: [n] sample of each token.

    Returns:
        NaN where no token has any expert output. ``alignment_loss`` is the anchor's value minus the current one.
    """
    weights, magnitude = as_weights(gate), as_weights(norm, "expert norms")
    check_same_tokens(weights, magnitude, what="gates and expert norms")
    share = divide(magnitude, magnitude.sum(axis=-1, keepdims=True))
    agreement = 1.0 - probe_mean(js_divergence(weights, share), sample, skip_undefined=True)
    return np.where(_whole(weights) & _whole(magnitude), agreement, np.nan)


def alignment_energy(gate: Gates, z: Paths, sample: Sample | None = None) -> PerSite:
    """PASs-MoE's own view: `alignment` with the pathway energy norm(A_e h)^2 / r in place of the output norm.

    Args:
        gate: [..., n, E].
        z: pathway activations [..., n, E, r].
        sample: [n] sample of each token.

    Returns:
        [...] in 0..1, meaningful within one run.
    """
    return alignment(gate, (as_float(z) ** 2).mean(axis=-1), sample)
