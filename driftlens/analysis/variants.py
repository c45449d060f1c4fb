"""Variants of co-drift and impact: on which tokens, over which sites, relative to what.

The tables of a run average over all tokens and all sites. A variant is one quantity on some tokens, brought together
over sites in one way; its name is QUANTITY, then ``_scored`` if not all tokens count, then ``_late``,
``_residual``, ``_max`` or ``_pooled`` if it is not the mean over sites. The validity study asks which of them ranks
forgetting.

Tokens: all, or **scored**: tokens whose next token is of the answer. Only there is the model's output compared with
the reference, by the likelihood and by the first step of generation alike.
Sites: the mean; those in the last third of the adapted layers (**late**); those that write into the residual stream
(**residual**: down and output projections, by their names); the largest (**max**); sums over sites divided by sums
over sites (**pooled**).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from driftlens.analysis.run import Run
from driftlens.analysis.walk import OldPair, measure_pairs
from driftlens.errors import UnknownNameError
from driftlens.metrics import js_divergence, sample_means
from driftlens.metrics.arrays import FloatArray, as_float, divide, mean_defined, normalise
from driftlens.store import SiteInfo

__all__ = [
    "QUANTITIES",
    "SITES",
    "TOKENS",
    "VARIANTS",
    "Quantity",
    "average_variants",
    "raw_names",
    "variant_definition",
    "variant_measures",
    "variant_names",
    "variants_of_sites",
]

TOKENS: Final = ("all", "scored")
SITES: Final = ("mean", "late", "residual", "max", "pooled")
WRITERS: Final = frozenset({"down_proj", "o_proj", "out_proj", "c_proj", "fc2", "fc_out", "w2", "wo", "dense_4h_to_h"})
"""Names of modules that write into the residual stream: what the others change acts through these."""

VARIANTS: Final = (
    "codrift_divergence_scored",
    "codrift_cross_scored",
    "codrift_divergence_late",
    "codrift_divergence_max",
    "codrift_divergence_pooled",
    "impact_scored",
    "impact_late",
    "impact_experts_scored",
    "impact_cross_scored",
    "impact_root_scored",
    "impact_root_scored_residual",
    "update_share_scored",
    "base_change",
)
"""The variants that `validity` shows unless others are asked for."""

Means = Mapping[str, FloatArray]


class Quantity(NamedTuple):
    """What is measured at a site.

    Attributes:
        formula: in the symbols of metrics.md.
        top: numerator from averages over tokens.
        bottom: denominator; None where the average itself is the quantity (it cannot be pooled).
    """

    formula: str
    top: Callable[[Means], FloatArray]
    bottom: Callable[[Means], FloatArray] | None


def _scale(m: Means) -> FloatArray:
    return 2 * (m["u00"] + m["u11"])


def _base(m: Means) -> FloatArray:
    return m["base"]


QUANTITIES: Final[Mapping[str, Quantity]] = MappingProxyType(
    {
        "codrift_divergence": Quantity("mean_i norm(u11 - u00)^2 / n", lambda m: m["change"], _scale),
        "codrift_experts": Quantity("mean_i norm(E_i)^2 / n", lambda m: m["ee"], _scale),
        "codrift_cross": Quantity("mean_i <R_i, E_i> / n", lambda m: m["re"], _scale),
        "impact": Quantity("mean_i norm(u11 - u00)^2 / mean_i norm(y)^2", lambda m: m["change"], _base),
        "impact_experts": Quantity("mean_i norm(E_i)^2 / mean_i norm(y)^2", lambda m: m["ee"], _base),
        "impact_router": Quantity("mean_i norm(R_i)^2 / mean_i norm(y)^2", lambda m: m["rr"], _base),
        "impact_cross": Quantity("mean_i <R_i, E_i> / mean_i norm(y)^2", lambda m: m["re"], _base),
        "impact_root": Quantity("mean_i norm(u11 - u00) / norm(y)", lambda m: m["root"], None),
        "update_share": Quantity("mean_i norm(u11)^2 / mean_i norm(y)^2", lambda m: m["u11"], _base),
        "update_growth": Quantity("mean_i norm(u11)^2 / mean_i norm(u00)^2", lambda m: m["u11"], lambda m: m["u00"]),
        "router_js": Quantity("mean_i JS(pi0, pi1), base 2", lambda m: m["js"], None),
        "u_cosine_distance": Quantity("mean_i 1 - cos(u00, u11)", lambda m: m["cosine"], None),
        "base_change": Quantity("mean_i abs(norm(y1) - norm(y0)) / norm(y0)", lambda m: m["base_step"], None),
    }
)
"""Quantities by name; y is the base module's output at the current checkpoint, n as in metrics.md 3a."""

_STATES: Final = frozenset({"update_share", "update_growth"})
_AVERAGES: Final = ("change", "rr", "ee", "re", "u00", "u11", "base", "root", "js", "cosine", "base_step")


def _split(name: str) -> tuple[str, str, str]:
    rest, sites = name, "mean"
    for ending in SITES[1:]:
        if rest.endswith(f"_{ending}"):
            rest, sites = rest.removesuffix(f"_{ending}"), ending
    tokens = "scored" if rest.endswith("_scored") else "all"
    return rest.removesuffix("_scored"), tokens, sites


def variant_names() -> list[str]:
    """Return the names of all variants: each quantity, on all or scored tokens, over sites in each way it can."""
    result = []
    for name, quantity in QUANTITIES.items():
        for tokens in TOKENS:
            for sites in SITES:
                if sites != "pooled" or quantity.bottom is not None:
                    middle = "_scored" if tokens == "scored" else ""
                    result.append(f"{name}{middle}" + ("" if sites == "mean" else f"_{sites}"))
    return result


def variant_definition(name: str) -> str:
    """Return the formula of a variant, and its tokens and sites where they are not all."""
    key, tokens, sites = _split(name)
    where = {
        "mean": "",
        "late": "last third of the layers",
        "residual": "sites that write into the residual stream",
        "max": "largest site",
        "pooled": "sums over sites",
    }[sites]
    return "; ".join(part for part in (QUANTITIES[key].formula, "scored tokens" * (tokens == "scored"), where) if part)


def raw_names() -> list[str]:
    """Return the names of the averages that `variants_of_sites` returns."""
    return [f"{tokens}.{part}" for tokens in TOKENS for part in _AVERAGES]


def variants_of_sites(pair: OldPair) -> dict[str, FloatArray]:
    """Return the averages over tokens that all variants follow from, [S] each, by ``TOKENS.AVERAGE``.

    Args:
        pair: an old probe at two checkpoints.
    """
    base0, base = (as_float(part.base_norm) for part in (pair.anchor, pair.current))
    by_token = {
        "base": base**2,
        "base_step": divide(np.abs(base - base0), base0),
        "js": js_divergence(normalise(as_float(pair.anchor.gate)), normalise(as_float(pair.current.gate))),
    }
    if pair.moved is not None:
        moved = pair.moved
        inner = (moved.u00_sq + moved.u11_sq - moved.change_sq) / 2
        by_token |= {
            "change": moved.change_sq,
            "rr": moved.rr,
            "ee": moved.ee,
            "re": moved.re,
            "u00": moved.u00_sq,
            "u11": moved.u11_sq,
            "root": divide(np.sqrt(moved.change_sq), base),
            "cosine": 1.0 - np.clip(divide(inner, np.sqrt(moved.u00_sq * moved.u11_sq)), -1.0, 1.0),
        }
    result = {}
    unknown = np.full(base.shape[0], np.nan)
    for tokens in TOKENS:
        kept = pair.scored if tokens == "scored" else np.ones(len(pair.sample), dtype=np.bool_)
        for name in _AVERAGES:
            if name not in by_token or not kept.any():
                result[f"{tokens}.{name}"] = unknown
                continue
            by_sample = sample_means(by_token[name][:, kept], pair.sample[kept], skip_undefined=True)
            result[f"{tokens}.{name}"] = mean_defined(by_sample)
    return result


def average_variants(table: xr.Dataset, sites: Sequence[SiteInfo], names: Iterable[str] | None = None) -> xr.Dataset:
    """Bring the averages of `variants_of_sites` together over sites.

    Args:
        table: NAME (probe, checkpoint, site) and NAME_noise (probe, site), as `measure_pairs` returns them.
        sites: the sites, in the table's order.
        names: names of variants; None for all.

    Returns:
        The variants by (probe, checkpoint), and NAME_noise by probe.

    Raises:
        UnknownNameError: no such variant.
    """
    known = variant_names()
    chosen = known if names is None else list(names)
    depth = np.array([site.layer for site in sites])
    last = np.unique(depth)
    kept = {
        "late": np.isin(depth, last[len(last) - math.ceil(len(last) / 3) :]),
        "residual": np.array([site.kind in WRITERS for site in sites], dtype=np.bool_),
    }
    result = xr.Dataset(coords={axis: table[axis] for axis in ("probe", "checkpoint")})
    for name in chosen:
        if name not in known:
            raise UnknownNameError("variant", name, known)
        key, tokens, how = _split(name)
        for end, axes in (("", ("probe", "checkpoint")), ("_noise", ("probe",))):
            means = {part: table[f"{tokens}.{part}{end}"].transpose(*axes, "site").to_numpy() for part in _AVERAGES}
            value = _over_sites(QUANTITIES[key], means, how, kept)
            # The state of one checkpoint has no noise floor at 0.
            result[f"{name}{end}"] = (axes, np.full_like(value, np.nan) if end and key in _STATES else value)
        result[name].attrs = {"definition": QUANTITIES[key].formula, "tokens": tokens, "sites": how, "units": "1"}
        if not result[name].notnull().any():
            missing = "the tokens before answers were not stored" if tokens == "scored" else "factors were not recorded"
            if how == "residual" and not kept["residual"].any():
                missing = f"no site is one of {', '.join(sorted(WRITERS))}"
            result[name].attrs["undefined"] = missing
    return result


def _over_sites(quantity: Quantity, means: Means, sites: str, kept: Mapping[str, NDArray[np.bool_]]) -> FloatArray:
    top = quantity.top(means)
    if quantity.bottom is None:
        by_site = top
    elif sites == "pooled":
        bottom = quantity.bottom(means)
        whole = ~np.isnan(top) & ~np.isnan(bottom)
        return divide(*(np.where(whole, part, 0.0).sum(axis=-1) for part in (top, bottom)))
    else:
        by_site = divide(top, quantity.bottom(means))
    if sites in kept:
        return mean_defined(by_site[..., kept[sites]])
    if sites == "max":
        highest: FloatArray = np.where(np.isnan(by_site), -np.inf, by_site).max(axis=-1)
        return np.where(np.isfinite(highest), highest, np.nan)
    return mean_defined(by_site)


def variant_measures(run: Run, names: Iterable[str] | None = None) -> xr.Dataset:
    """Return variants of a recorded run by (probe, checkpoint); see `average_variants`.

    Raises:
        NotFoundError: no recordings.
        UnknownNameError: no such variant.
    """
    table, sites = measure_pairs(run, raw_names(), variants_of_sites)
    return average_variants(table, sites, names)
