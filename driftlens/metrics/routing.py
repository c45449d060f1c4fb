"""Drift of the gate between two checkpoints (metrics.md section 1).

Gates are [..., n, E]: any leading axes (sites), tokens, experts. ``sample`` [n] names each token's sample; the
averages run over tokens in a sample, then samples. Divergences normalise rows first, because some methods use
unnormalised gates. A row of zeros means that the site did not exist; it is treated as all its mass on "nobody", so
that a site's birth is a full change (divergence 1) and absence at both checkpoints none.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import ArrayLike, NDArray

from driftlens.errors import ConfigError
from driftlens.metrics.arrays import FloatArray, as_float, as_weights, check_same_tokens, normalise, pad_experts
from driftlens.metrics.resample import probe_mean, sample_means
from driftlens.metrics.shapes import Gates, Gates0, Gates1, PerSite, PerToken, Sample
from driftlens.metrics.undefined import Measured, Reason

__all__ = [
    "Top1Switch",
    "Top1Tokens",
    "TopKOverlap",
    "js_divergence",
    "marginal_js",
    "mass_moved",
    "mass_moved_tokens",
    "relative_js",
    "router_js",
    "router_js_distance",
    "sample_js",
    "top1_switch",
    "top1_tokens",
    "topk_mask",
    "topk_overlap",
    "topk_overlap_tokens",
]


class Top1Switch(NamedTuple):
    """Result of `top1_switch`, each [...]."""

    switched: PerSite
    chance: PerSite
    ties: PerSite


class Top1Tokens(NamedTuple):
    """Result of `top1_tokens`, NaN for tokens whose gates hold NaN.

    Attributes:
        switched: [..., n] 1 where the strongest expert changed, else 0.
        tied: [..., n] 1 where two experts share the first place at either checkpoint, else 0.
        best0: [..., n, E+1] one-hot strongest expert at the anchor; slot 0 is "the site did not exist".
        best1: the same at the current checkpoint.
    """

    switched: PerToken
    tied: PerToken
    best0: FloatArray
    best1: FloatArray


class TopKOverlap(NamedTuple):
    """Result of `topk_overlap`: the overlap [...] and its chance level k/E."""

    overlap: PerSite
    chance: float


def js_divergence(p: ArrayLike, q: ArrayLike, base: float = 2) -> FloatArray:
    """Jensen-Shannon divergence of paired rows.

    Args:
        p: [..., E] non-negative weights; rows are normalised here.
        q: [..., E'] likewise, broadcast against ``p``; the shorter one is padded with zeros.
        base: base of the logarithm; 2 gives the range 0..1, e gives 0..ln 2.

    Returns:
        [...] float64, NaN where a row holds NaN. A row of zeros counts as all mass on "nobody".

    Raises:
        ConfigError: negative entries, or a base not above 1.
    """
    if not base > 1:
        raise ConfigError(
            f"The base of the logarithm is {base}; expected a number above 1, such as 2 (bits) or e (nats)."
        )
    first, second = pad_experts(as_weights(p, "p"), as_weights(q, "q"))
    return js_of_shares(normalise(first), normalise(second), base)


def js_of_shares(first: FloatArray, second: FloatArray, base: float = 2) -> FloatArray:
    """`js_divergence` of rows [..., E] that are known to be shares: non-negative, of sum 1 (or 0: "nobody"), or NaN."""
    middle = (first + second) / 2
    nats = (_relative_entropy(first, middle) + _relative_entropy(second, middle)) / 2
    one_absent = (first.sum(axis=-1) == 0) != (second.sum(axis=-1) == 0)
    one_absent &= ~np.isnan(nats)  # "nobody" against a broken row is not known to be a change
    clipped: FloatArray = np.clip(np.where(one_absent, math.log(2), nats), 0.0, math.log(2)) / math.log(base)
    return clipped


def _relative_entropy(share: FloatArray, middle: FloatArray) -> FloatArray:
    """Sum over the last axis of share log(share / middle), 0 where share is 0; numpy's vectorised logarithm."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.asarray(share / middle)
    np.copyto(terms, 1.0, where=~(share > 0))  # log 1 = 0; a NaN returns with the product
    np.log(terms, out=terms)
    terms *= share
    total: FloatArray = terms.sum(axis=-1)
    return total


def _gates(gate0: Gates0, gate1: Gates1) -> tuple[FloatArray, FloatArray]:
    first, second = as_weights(gate0, "gate0"), as_weights(gate1, "gate1")
    check_same_tokens(first, second)
    return pad_experts(first, second)


def router_js(gate0: Gates0, gate1: Gates1, sample: Sample | None = None) -> PerSite:
    """Mean Jensen-Shannon divergence between the gates of the same token, base 2: [...] in 0..1.

    The per-token values are ``js_divergence(gate0, gate1)``.
    """
    return probe_mean(js_divergence(*_gates(gate0, gate1)), sample)


def router_js_distance(gate0: Gates0, gate1: Gates1, sample: Sample | None = None) -> PerSite:
    """Mean over tokens of the square root of the divergence, which is a metric: [...] in 0..1."""
    return probe_mean(np.sqrt(js_divergence(*_gates(gate0, gate1))), sample)


def marginal_js(gate0: Gates0, gate1: Gates1, sample: Sample | None = None) -> PerSite:
    """Divergence of the two probe-mean gates, base 2: [...] in 0..1, never above `router_js`.

    With exact sums in place of token rows pass them as a single token: ``gate_sum[..., None, :]``.
    """
    first, second = (normalise(gate) for gate in _gates(gate0, gate1))
    return js_divergence(probe_mean(first, sample, axis=-2), probe_mean(second, sample, axis=-2))


def sample_js(gate0: Gates0, gate1: Gates1, sample: Sample) -> PerSite:
    """PASs-MoE Fig. 3: gates averaged over each sample's tokens, divergence in nats, mean over samples: 0..ln 2."""
    first, second = (normalise(gate) for gate in _gates(gate0, gate1))
    per_sample = js_divergence(sample_means(first, sample, axis=-2), sample_means(second, sample, axis=-2), base=math.e)
    return probe_mean(per_sample)


def mass_moved_tokens(gate0: Gates0, gate1: Gates1) -> PerToken:
    """Total variation between the gates of each token: [..., n] in 0..1."""
    first, second = (normalise(gate) for gate in _gates(gate0, gate1))
    one_absent = (first.sum(axis=-1) == 0) != (second.sum(axis=-1) == 0)
    distance: FloatArray = np.abs(first - second).sum(axis=-1) / 2
    return np.where(one_absent & ~np.isnan(distance), 1.0, distance)


def mass_moved(gate0: Gates0, gate1: Gates1, sample: Sample | None = None) -> PerSite:
    """Share of the gate's mass that went to another expert (mean total variation): [...] in 0..1."""
    return probe_mean(mass_moved_tokens(gate0, gate1), sample)


def top1_switch(gate0: Gates0, gate1: Gates1, sample: Sample | None = None) -> Top1Switch:
    """Share of tokens whose strongest expert changed.

    Ties go to the lower index and are counted: ``ties`` is the share of tokens with a tie at either checkpoint.

    Returns:
        ``switched`` [...] 0..1; ``chance`` = 1 - sum_e p_e q_e with the two top-1 distributions, the switch rate of
        two independent routers with these loads; ``ties``. NaN where gates hold NaN.
    """
    tokens = top1_tokens(gate0, gate1)
    switched = probe_mean(tokens.switched, sample)
    shares = [probe_mean(best, sample, axis=-2) for best in (tokens.best0, tokens.best1)]
    chance = 1.0 - (shares[0] * shares[1]).sum(axis=-1)
    return Top1Switch(switched, chance, probe_mean(tokens.tied, sample))


def top1_tokens(gate0: Gates0, gate1: Gates1) -> Top1Tokens:
    """The strongest expert of every token at both checkpoints; what `top1_switch` averages."""
    gates = _gates(gate0, gate1)
    broken: NDArray[np.bool_] = np.asarray(np.isnan(gates[0]).any(axis=-1) | np.isnan(gates[1]).any(axis=-1))
    marked, tied = [], []
    for gate in gates:  # the two checkpoints
        absent = gate.sum(axis=-1) == 0
        index = np.where(absent, -1, gate.argmax(axis=-1))
        one_hot = (index[..., None] == np.arange(-1, gate.shape[-1])).astype(np.float64)
        marked.append(np.where(broken[..., None], np.nan, one_hot))
        tied.append(((gate == gate.max(axis=-1, keepdims=True)).sum(axis=-1) > 1) & ~absent)
    switched = np.where(broken, np.nan, np.not_equal(*marked).any(axis=-1))
    return Top1Tokens(switched, np.where(broken, np.nan, tied[0] | tied[1]), *marked)


def topk_mask(gate: Gates, k: int) -> Bool[np.ndarray, "*site token expert"]:
    """Mark the k strongest experts of each token, ties to the lower index: [..., n, E] bool.

    Rows of zeros (no site) mark nothing.

    Raises:
        ConfigError: k is not in 1..E.
    """
    weights = as_weights(gate)
    experts = weights.shape[-1]
    if not 1 <= k <= experts:
        raise ConfigError(f"k is {k} for gates over {experts} experts; expected 1 <= k <= {experts}.")
    order = np.argsort(-weights, axis=-1, kind="stable")[..., :k]
    mask = np.zeros(weights.shape, dtype=np.bool_)
    np.put_along_axis(mask, order, True, axis=-1)
    present: NDArray[np.bool_] = mask & (weights.sum(axis=-1, keepdims=True) != 0)
    return present


def topk_overlap(gate0: Gates0, gate1: Gates1, k: int, sample: Sample | None = None) -> TopKOverlap:
    """Mean share of the top-k set that both checkpoints have in common (OLMoE's router saturation).

    Returns:
        ``overlap`` [...] 0..1 and ``chance`` k/E, E the larger number of experts.
    """
    experts = max(np.shape(gate0)[-1], np.shape(gate1)[-1])
    return TopKOverlap(probe_mean(topk_overlap_tokens(gate0, gate1, k), sample), k / experts)


def topk_overlap_tokens(gate0: Gates0, gate1: Gates1, k: int) -> PerToken:
    """Share of each token's top-k set that both checkpoints have in common: [..., n] in 0..1; see `topk_overlap`."""
    first, second = _gates(gate0, gate1)
    common = (topk_mask(first, k) & topk_mask(second, k)).sum(axis=-1) / k
    broken = np.isnan(first).any(axis=-1) | np.isnan(second).any(axis=-1)
    return np.where(broken, np.nan, common)


def relative_js(
    gate0: Gates0,
    gate1: Gates1,
    sample: Sample | None = None,
    *,
    noise_floor: ArrayLike = 1e-6,
    seed: int = 0,
) -> Measured:
    """Router divergence in units of the divergence between different tokens at the anchor.

    1 means: the gate moved as far as to that of an unrelated input. Each token is paired with one other token along
    a seeded cycle through all tokens.

    Args:
        gate0: anchor gates [..., n, E].
        gate1: current gates [..., n, E'].
        sample: [n] sample of each token.
        noise_floor: denominators at or below it are undefined; float16 gates alone give about 1e-7.
        seed: seed of the pairing.

    Returns:
        Values [...] >= 0 and reasons.
    """
    first, second = _gates(gate0, gate1)
    drift = probe_mean(js_divergence(first, second), sample)
    tokens = first.shape[-2]
    reason = np.full(drift.shape, Reason.DEFINED, dtype=np.uint8)
    if tokens < 2:
        reason[...] = Reason.TOO_FEW_TOKENS if tokens else Reason.NO_TOKENS
        return Measured(np.full(drift.shape, np.nan), reason)
    cycle = np.random.default_rng(seed).permutation(tokens)
    partner = np.empty_like(cycle)
    partner[cycle] = np.roll(cycle, 1)
    spread = probe_mean(js_divergence(first, first[..., partner, :]), sample)
    alike = spread <= as_float(noise_floor)
    reason[alike] = Reason.BELOW_NOISE_FLOOR
    reason[np.isnan(drift) | np.isnan(spread)] = Reason.NOT_FINITE
    return Measured(np.where(alike, np.nan, drift / np.where(alike, 1.0, spread)), reason)
