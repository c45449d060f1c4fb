"""Which numbers the drift tables hold, and how each follows from averages over samples.

Every measure of metrics.md sections 1 and 3 is a function of a few *statistics* averaged over the samples of a probe:
an average itself, a ratio of two, or a divergence of two. A `Family` computes its statistics by sample once; the
measures are then evaluated on the observed averages and on those of every bootstrap draw.

A third party adds measures by registering one more family in `FAMILIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from driftlens.analysis.pairs import Pair, Pass
from driftlens.metrics import (
    CoDriftTokens,
    Reason,
    js_divergence,
    mass_moved_tokens,
    responsibility_tokens,
    sample_means,
    topk_mask,
)
from driftlens.metrics.arrays import FloatArray, as_float, divide, normalise
from driftlens.metrics.codrift import codrift_from_products, expert_products
from driftlens.metrics.routing import js_of_shares
from driftlens.registry import Registry

__all__ = ["FAMILIES", "REASONS", "Composed", "Family", "Means", "Statistics"]

Means = Mapping[str, FloatArray]

REASONS: Final[dict[int, str]] = {int(reason): reason.text for reason in Reason}
"""Text of every code in a ``NAME_reason`` variable."""


class Statistics(NamedTuple):
    """What a family takes from a pair.

    Attributes:
        by_sample: arrays [S, m], or [S, E, m] for gates; NaN marks a sample that has no value.
        facts: arrays [S] that describe the pair and are not averaged.
    """

    by_sample: dict[str, FloatArray]
    facts: dict[str, FloatArray]


@dataclass(frozen=True)
class Composed:
    """Measures evaluated on averages: arrays [...] by name of the measure.

    Attributes:
        values: the measures.
        chance: chance levels of those that have one.
        reasons: uint8 codes of `Reason` of those that can be undefined.
    """

    values: dict[str, FloatArray]
    chance: dict[str, FloatArray] = field(default_factory=dict)
    reasons: dict[str, NDArray[np.uint8]] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Measures that share their statistics.

    Attributes:
        name: name in the registry.
        table: the table of `Run` that shows them: ``"drift"`` (routing) or ``"codrift"``.
        measures: names, as in metrics.md.
        statistics: takes a pair, returns its statistics by sample.
        compose: takes averages of the statistics, [..., S] or [..., S, E], and the facts [S]; returns the measures.
        floorless: measures without a noise floor: ratios of parts, and states of one checkpoint.
    """

    name: str
    table: str
    measures: tuple[str, ...]
    statistics: Callable[[Pair], Statistics]
    compose: Callable[[Means], Composed]
    floorless: frozenset[str] = frozenset()


FAMILIES: Registry[Family] = Registry("family of measures", "driftlens.families")
"""All families of measures, by name; see `Family`."""


def _codes(like: FloatArray, *cases: tuple[NDArray[np.bool_], Reason]) -> NDArray[np.uint8]:
    """Return the code of the first case that holds, else DEFINED; a NaN without a case is a broken recording."""
    codes = np.where(np.isnan(like), np.uint8(Reason.NOT_FINITE), np.uint8(Reason.DEFINED))
    for condition, reason in reversed(cases):
        codes = np.where(condition, np.uint8(reason), codes)
    return codes.astype(np.uint8)


def _by_sample(
    by_token: Mapping[str, FloatArray], sample: NDArray[np.integer], *, skip_undefined: bool = False
) -> dict[str, FloatArray]:
    """Average several arrays [S, n] within each sample, in one call."""
    means = sample_means(np.stack(list(by_token.values())), sample, skip_undefined=skip_undefined)
    return dict(zip(by_token, means, strict=True))


# --- section 1: routing --------------------------------------------------------------------------------------------


def _partners(tokens: int, seed: int = 0) -> NDArray[np.intp]:
    """Give every token one other token, along a seeded cycle through all of them (as `metrics.relative_js`)."""
    cycle = np.random.default_rng(seed).permutation(tokens)
    partner = np.empty_like(cycle)
    partner[cycle] = np.roll(cycle, 1)
    return partner


def _one_hot(gate: FloatArray) -> FloatArray:
    """Mark the strongest expert, ties to the lower index; slot 0 is "the site does not exist"."""
    best = np.where(gate.sum(axis=-1) == 0, -1, gate.argmax(axis=-1))
    marked: FloatArray = (best[..., None] == np.arange(-1, gate.shape[-1])).astype(np.float64)
    return marked


class _Routing(NamedTuple):
    """What routing takes from one pass: arrays by token and averages by sample."""

    share: FloatArray
    hot: FloatArray
    top: NDArray[np.bool_]
    mean: FloatArray
    mean_hot: FloatArray


def _routing_of(one: Pass, pair: Pair) -> _Routing:
    def compute() -> _Routing:
        share = normalise(as_float(one.gate))
        hot, top = _one_hot(share), np.empty(share.shape, dtype=np.bool_)
        for k in np.unique(pair.top_k):
            sites = pair.top_k == k
            top[sites] = topk_mask(share[sites], int(k))
        means = (sample_means(values, pair.sample, axis=-2) for values in (share, hot))
        return _Routing(share, hot, top, *means)

    return one.once("routing", compute)


def _routing_statistics(pair: Pair) -> Statistics:
    old, new = _routing_of(pair.anchor, pair), _routing_of(pair.current, pair)
    js = js_of_shares(old.share, new.share)

    def spread() -> FloatArray:
        partner = _partners(old.share.shape[1])
        return sample_means(js_of_shares(old.share, old.share[:, partner]), pair.sample)

    by_token = {
        "js": js,
        "js_distance": np.sqrt(js),
        "mass": mass_moved_tokens(old.share, new.share),
        "switched": (old.hot != new.hot).any(axis=-1).astype(np.float64),
        "overlap": (old.top & new.top).sum(axis=-1) / pair.top_k[:, None],
    }
    by_sample = _by_sample(by_token, pair.sample) | {
        "spread": pair.anchor.once("routing spread", spread),
        "sample_js": js_divergence(old.mean, new.mean, base=math.e),
        "gate0": np.moveaxis(old.mean, -1, -2),
        "gate1": np.moveaxis(new.mean, -1, -2),
        "top0": np.moveaxis(old.mean_hot, -1, -2),
        "top1": np.moveaxis(new.mean_hot, -1, -2),
    }
    return Statistics(by_sample, {"floor": pair.spread_floor, "overlap_chance": pair.top_k / old.share.shape[-1]})


def _routing(means: Means) -> Composed:
    alike = means["spread"] <= means["floor"]
    values = {
        "router_js": means["js"],
        "router_js_distance": means["js_distance"],
        "marginal_js": js_divergence(means["gate0"], means["gate1"]),
        "sample_js": means["sample_js"],
        "mass_moved": means["mass"],
        "top1_switch": means["switched"],
        "topk_overlap": means["overlap"],
        "relative_js": divide(means["js"], np.where(alike, 0.0, means["spread"])),
    }
    chance = {
        "top1_switch": 1.0 - (means["top0"] * means["top1"]).sum(axis=-1),
        "topk_overlap": np.broadcast_to(means["overlap_chance"], means["overlap"].shape),
        "relative_js": np.ones_like(means["js"]),
    }
    return Composed(values, chance, {"relative_js": _codes(means["js"], (alike, Reason.BELOW_NOISE_FLOOR))})


# --- section 3a: co-drift ------------------------------------------------------------------------------------------

_INNER_PRODUCTS: Final = ("rr", "ee", "re", "u00_sq", "u11_sq")
_CODRIFT: Final = {
    "codrift_divergence": "total",
    "codrift_router": "router",
    "codrift_experts": "experts",
    "codrift_cross": "cross",
    "coupling": "coupling",
    "codrift_share": "share",
}


def _codrift_statistics(pair: Pair) -> Statistics:
    base = pair.current.once("base_sq", lambda: sample_means(as_float(pair.current.base_norm) ** 2, pair.sample))
    old, new, grams = pair.anchor.middle, pair.current.middle, pair.grams
    if grams is None or old is None or new is None:
        unknown = np.full_like(base, np.nan)
        return Statistics({"base": base} | dict.fromkeys(_INNER_PRODUCTS, unknown), {"measured": np.zeros(len(base))})
    # Site by site: the products of one site stay in the cache.
    own0 = pair.anchor.once("codrift", lambda: [expert_products(z, z, g) for z, g in zip(old, grams.g00, strict=True)])
    own1 = pair.current.once("codrift", lambda: [expert_products(z, z, g) for z, g in zip(new, grams.g11, strict=True)])
    parts = np.empty((len(_INNER_PRODUCTS), *pair.current.base_norm.shape))
    for site in range(len(base)):
        between = expert_products(old[site], new[site], grams.g01[site])
        tokens = codrift_from_products(pair.anchor.gate[site], pair.current.gate[site], own0[site], between, own1[site])
        parts[:, site] = [getattr(tokens, name) for name in _INNER_PRODUCTS]
    by_sample = dict(zip(_INNER_PRODUCTS, sample_means(parts, pair.sample), strict=True))
    return Statistics(by_sample | {"base": base}, {"measured": np.ones(len(base))})


def _codrift(means: Means) -> Composed:
    # An average is a stack of one token: the same code that makes Phi from tokens makes it from averages.
    tokens = CoDriftTokens(*(means[name][..., None] for name in _INNER_PRODUCTS))
    phi, impact = tokens.reduce(), tokens.impact(means["base"][..., None])
    values = {name: getattr(phi, field) for name, field in _CODRIFT.items()}
    values |= {
        "impact": impact.total,
        "impact_router": impact.router,
        "impact_experts": impact.experts,
        "impact_cross": impact.cross,
    }
    measured = np.broadcast_to(means["measured"] == 1, phi.reason.shape)
    reasons = dict.fromkeys(_CODRIFT, phi.reason)
    reasons["coupling"] = phi.coupling_reason
    still = (phi.reason == Reason.DEFINED) & np.isnan(phi.share)
    reasons["codrift_share"] = np.where(still, np.uint8(Reason.NOTHING_MOVED), phi.reason)
    no_base = _codes(impact.total, (means["base"] == 0, Reason.NOT_MEASURED))
    reasons |= dict.fromkeys(("impact", "impact_router", "impact_experts", "impact_cross"), no_base)
    reasons = {name: np.where(measured, code, np.uint8(Reason.NOT_MEASURED)) for name, code in reasons.items()}
    # Two unrelated functions of equal strength have Phi = 1/2.
    return Composed(values, {"codrift_divergence": np.full_like(phi.total, 0.5)}, reasons)


# --- section 3b: responsibility ------------------------------------------------------------------------------------

_RESPONSIBILITY: Final = (
    "responsibility_divergence",
    "responsibility_router",
    "responsibility_experts",
    "responsibility_router_alone",
    "responsibility_experts_alone",
    "responsibility_synergy",
    "retained",
)
_ALIGNMENT: Final = ("alignment", "alignment_energy", "alignment_loss")


def _alignment(one: Pass, sample: NDArray[np.integer]) -> FloatArray:
    def compute() -> FloatArray:
        return _agreement(as_float(one.gate), as_float(one.expert_norm), sample)

    return one.once("alignment", compute)


def _agreement(gate: FloatArray, strength: FloatArray, sample: NDArray[np.integer]) -> FloatArray:
    share = divide(strength, strength.sum(axis=-1, keepdims=True))
    return 1.0 - sample_means(js_of_shares(normalise(gate), share), sample, skip_undefined=True)


def _energy_alignment(one: Pass, sample: NDArray[np.integer]) -> FloatArray:
    def compute() -> FloatArray:
        if one.pathway is None:
            return np.full_like(_alignment(one, sample), np.nan)
        energy = (as_float(one.pathway) ** 2).mean(axis=-1)
        return _agreement(as_float(one.gate), energy, sample)

    return one.once("alignment_energy", compute)


def _responsibility_statistics(pair: Pair) -> Statistics:
    norm0, norm1 = as_float(pair.anchor.expert_norm), as_float(pair.current.expert_norm)
    gate0, gate1 = as_float(pair.anchor.gate), as_float(pair.current.gate)
    tokens = responsibility_tokens(gate0, gate1, norm0, norm1)
    # As in `ResponsibilityTokens.reduce`: D over the tokens that have all four shares, so that the parts sum to it.
    whole = np.where(np.isnan(tokens.router), np.nan, tokens.total)
    by_token = {
        "total": tokens.total,
        "router": tokens.router,
        "experts": tokens.experts,
        "retained": tokens.retained,
        "whole": whole,
    }
    result = _by_sample(by_token, pair.sample, skip_undefined=True)
    result |= {
        "align0": _alignment(pair.anchor, pair.sample),
        "align1": _alignment(pair.current, pair.sample),
        "energy1": _energy_alignment(pair.current, pair.sample),
    }
    reason = tokens.reason.astype(np.float64)
    if pair.anchor.pathway is None or pair.current.pathway is None:
        # native experts: the gate was seen, single outputs were not
        reason[np.isnan(norm0).all(axis=(1, 2)) | np.isnan(norm1).all(axis=(1, 2))] = Reason.NOT_MEASURED
    return Statistics(result, {"reason": reason})


def _responsibility(means: Means) -> Composed:
    router, experts, whole = means["router"], means["experts"], means["whole"]
    values = {
        "responsibility_divergence": means["total"],
        "responsibility_router": (router + whole - experts) / 2,
        "responsibility_experts": (experts + whole - router) / 2,
        "responsibility_router_alone": router,
        "responsibility_experts_alone": experts,
        "responsibility_synergy": whole - router - experts,
        "retained": means["retained"],
        "alignment": means["align1"],
        "alignment_energy": means["energy1"],
        "alignment_loss": means["align0"] - means["align1"],
    }
    given = np.broadcast_to(means["reason"].astype(np.uint8), means["total"].shape)
    reasons = {
        name: np.where(np.isnan(values[name]) & (given == Reason.DEFINED), np.uint8(Reason.NO_OUTPUT), given)
        for name in _RESPONSIBILITY
    }
    silent = np.isnan(means["align1"])
    unseen = given == Reason.NOT_MEASURED
    reasons["alignment"] = _codes(
        values["alignment"], (unseen, Reason.NOT_MEASURED), (silent, Reason.NO_OUTPUT_CURRENT)
    )
    reasons["alignment_energy"] = _codes(
        values["alignment_energy"], (np.isnan(values["alignment_energy"]), Reason.NOT_MEASURED)
    )
    reasons["alignment_loss"] = _codes(
        values["alignment_loss"],
        (unseen, Reason.NOT_MEASURED),
        (silent & np.isnan(means["align0"]), Reason.NO_OUTPUT),
        (silent, Reason.NO_OUTPUT_CURRENT),
        (np.isnan(means["align0"]), Reason.NO_OUTPUT_ANCHOR),
    )
    return Composed(values, {}, reasons)


FAMILIES.register(
    "routing",
    Family(
        "routing",
        "drift",
        (
            "router_js",
            "router_js_distance",
            "marginal_js",
            "sample_js",
            "mass_moved",
            "top1_switch",
            "topk_overlap",
            "relative_js",
        ),
        _routing_statistics,
        _routing,
    ),
)
FAMILIES.register(
    "codrift",
    Family(
        "codrift",
        "codrift",
        (*_CODRIFT, "impact", "impact_router", "impact_experts", "impact_cross"),
        _codrift_statistics,
        _codrift,
        floorless=frozenset({"coupling", "codrift_share"}),
    ),
)
FAMILIES.register(
    "responsibility",
    Family(
        "responsibility",
        "codrift",
        (*_RESPONSIBILITY, *_ALIGNMENT),
        _responsibility_statistics,
        _responsibility,
        floorless=frozenset({"alignment", "alignment_energy"}),
    ),
)
