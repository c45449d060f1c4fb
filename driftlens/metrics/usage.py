"""How one checkpoint uses its experts (metrics.md section 1): the context that every drift is shown with.

Gates are [..., n, E]. Exact sums over all tokens can stand in for token rows where a measure depends only on the
mean gate (`load_entropy`, `dead_experts`): pass ``gate_sum[..., None, :]`` as a single token.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Float64, Int, Num
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr

from driftlens.errors import ConfigError
from driftlens.metrics.arrays import FloatArray, as_float, as_weights, divide, normalise
from driftlens.metrics.resample import probe_mean
from driftlens.metrics.routing import topk_mask
from driftlens.metrics.shapes import Flags, Gates, PerExpert, PerSite, PerToken, Sample
from driftlens.metrics.undefined import Measured, Reason

__all__ = [
    "NEAR_UNIFORM_ENTROPY",
    "coactivation",
    "coactivation_chance",
    "dead_experts",
    "gate_entropy",
    "gate_entropy_tokens",
    "load",
    "load_entropy",
    "near_uniform",
    "normalised_entropy",
    "specialisation",
]

NEAR_UNIFORM_ENTROPY = 0.99
"""Normalised gate entropy above which a gate is said never to have routed."""


def load(gate: Gates, sample: Sample | None = None) -> PerExpert:
    """Mean normalised gate, [..., E]: the share of the work each expert gets."""
    return probe_mean(normalise(as_weights(gate)), sample, axis=-2)


def normalised_entropy(nats: ArrayLike, experts: int) -> FloatArray:
    """Divide an entropy in nats by ln E; NaN with one expert, which has nothing to choose."""
    return divide(nats, math.log(experts) if experts > 1 else 0.0)


def gate_entropy_tokens(gate: Gates) -> PerToken:
    """Entropy of each token's gate over ln E: [..., n] in 0..1; NaN with one expert and for rows of zeros."""
    weights = as_weights(gate)
    nats = np.where(weights.sum(axis=-1) == 0, np.nan, entr(normalise(weights)).sum(axis=-1))
    return np.minimum(normalised_entropy(nats, weights.shape[-1]), 1.0)


def gate_entropy(gate: Gates, sample: Sample | None = None) -> PerSite:
    """Mean over tokens of the gate's normalised entropy, [...] in 0..1: 0 one-hot, 1 never routed."""
    return probe_mean(gate_entropy_tokens(gate), sample)


def load_entropy(gate: Gates, sample: Sample | None = None) -> PerSite:
    """Normalised entropy of the mean gate, [...] in 0..1: 1 balanced load, 0 one expert does all the work."""
    share = load(gate, sample)
    nats = np.where(share.sum(axis=-1) == 0, np.nan, entr(normalise(share)).sum(axis=-1))
    return np.minimum(normalised_entropy(nats, share.shape[-1]), 1.0)


def near_uniform(entropy: PerSite) -> Flags:
    """Flag normalised gate entropies above 0.99: a gate that never routed cannot drift."""
    return as_float(entropy) > NEAR_UNIFORM_ENTROPY


def dead_experts(gate: Gates, sample: Sample | None = None) -> Int[np.ndarray, "*site"]:
    """Count experts whose load is below 1/(10 E), [...] in 0..E."""
    share = normalise(load(gate, sample))
    dead: NDArray[np.intp] = (share < 1 / (10 * share.shape[-1])).sum(axis=-1)
    return dead


def coactivation(gate: Gates, k: int, sample: Sample | None = None) -> Float64[np.ndarray, "*site expert expert"]:
    """Probability that expert f is in the top-k set given that e is, for all pairs.

    Returns:
        [..., E, E] with e on rows; the diagonal is 1; NaN rows for experts that are never active. The level of
        independent choices is `coactivation_chance`.
    """
    active = topk_mask(gate, k).astype(np.float64)
    if sample is not None:
        # Weight of each token in the two-stage mean, so that pairs are counted with a single matrix product.
        _, inverse, count = np.unique(np.asarray(sample), return_inverse=True, return_counts=True)
        weight = 1.0 / (count[inverse] * count.size)
    else:
        weight = np.full(active.shape[-2], 1.0 / max(active.shape[-2], 1))
    together = np.swapaxes(active * weight[:, None], -1, -2) @ active
    own = np.diagonal(together, axis1=-2, axis2=-1)
    return divide(together, own[..., None])


def coactivation_chance(k: int, experts: int) -> float:
    """Off-diagonal `coactivation` of a router that picks its k experts at random; NaN with one expert."""
    return (k - 1) / (experts - 1) if experts > 1 else math.nan


def specialisation(loads: Float[np.ndarray, "*site probe expert"], counts: Num[np.ndarray, "*#site probe"]) -> Measured:
    """Mutual information of expert and task over the probes, equal weight per task, over ln min(E, tasks).

    Expert given task is drawn from the task's mean gate; both entropies are corrected for finite samples (Miller and
    Madow: plus (occupied - 1)/(2 N) nats), and the result is clipped to 0..1, so 0 is chance.

    Args:
        loads: [..., P, E] mean gate of each probe; rows are normalised here.
        counts: [..., P] or [P], the number of tokens behind each mean.

    Returns:
        Values [...] in 0..1 and reasons; undefined with one expert, one task or an empty probe.

    Raises:
        ConfigError: shapes that do not fit.
    """
    share = as_weights(loads, "loads")
    if share.ndim < 2:
        raise ConfigError(f"loads has shape {share.shape}; expected [..., probes, experts].")
    tasks, experts = share.shape[-2:]
    number = as_float(counts)
    if number.shape[-1:] != (tasks,):
        raise ConfigError(f"counts has shape {number.shape} for {tasks} probes; expected one count per probe.")
    share = normalise(share)
    number = np.broadcast_to(number, share.shape[:-1])
    reason = np.full(share.shape[:-2], Reason.DEFINED, dtype=np.uint8)
    reason[np.isnan(share).any(axis=(-1, -2))] = Reason.NOT_FINITE
    reason[(number <= 0).any(axis=-1) | (share.sum(axis=-1) == 0).any(axis=-1)] = Reason.NO_TOKENS
    if experts < 2 or tasks < 2:
        reason[...] = Reason.ONE_EXPERT if experts < 2 else Reason.ONE_TASK
        return Measured(np.full(reason.shape, np.nan), reason)
    mixture = share.mean(axis=-2)
    given = entr(share).sum(axis=-1) + divide((share > 0).sum(axis=-1) - 1, 2 * number)
    whole = entr(mixture).sum(axis=-1) + divide((mixture > 0).sum(axis=-1) - 1, 2 * number.sum(axis=-1))
    value = np.clip((whole - given.mean(axis=-1)) / math.log(min(experts, tasks)), 0.0, 1.0)
    return Measured(np.where(reason == Reason.DEFINED, value, np.nan), reason)
