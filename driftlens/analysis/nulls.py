"""Drift of every old probe beside what chance gives (metrics.md section 6): unrelated routers, relabelled experts,
random subspaces.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import xarray as xr

from driftlens.analysis.run import Run
from driftlens.analysis.walk import OldPair, measure_pairs
from driftlens.metrics import pair_from_grams, permuted_experts, permuted_tokens, random_overlap, router_js
from driftlens.metrics.arrays import FloatArray, divide, mean_defined

__all__ = ["NULLS", "null_table"]

NULLS: Final = {
    "router_js": "mean JS between the gates of the same token, base 2",
    "router_js_unrelated": "mean of the same after tokens were paired at random: a router that knows nothing of them",
    "router_js_unrelated_low": "2.5 % quantile of the same",
    "router_js_unrelated_p": "share of random pairings, the true one included, with a drift as small",
    "router_js_relabelled": "mean of router_js after the current experts were renumbered at random",
    "router_js_relabelled_p": "share of random numberings, the true one included, with a drift as small",
    "subspace_overlap": "mean over experts of the overlap of row spaces of A",
    "subspace_overlap_random": "exact mean of the same for random subspaces of the same ranks",
    "subspace_overlap_random_spread": "exact standard deviation of the same, experts independent",
}
"""What each variable of `null_table` is."""


def null_table(run: Run, *, draws: int = 99, seed: int = 0) -> xr.Dataset:
    """Place the drift of every old probe among what chance gives.

    Args:
        run: a recorded run.
        draws: random pairings and numberings; no p-value is below 1/(draws + 1).
        seed: their seed.

    Returns:
        `NULLS` by (probe, checkpoint, site); NaN for pairs that are not old, and where factors were not recorded.
        A drift near ``router_js_unrelated`` is that of a router that lost all it knew of the tokens; a p-value of
        ``router_js_relabelled`` above 1/2 says that experts would fit as well under other numbers.

    Raises:
        NotFoundError: no recordings.
        FormatError: a damaged recording.
        ConfigError: fewer than one draw.
    """

    def measure(pair: OldPair) -> dict[str, FloatArray]:
        return _routing(pair, draws, seed) | _subspaces(pair)

    found, _ = measure_pairs(run, list(NULLS), measure)
    table = found[list(NULLS)]
    for name, text in NULLS.items():
        table[name].attrs = {"definition": text, "units": "1", "section": "6"}
    table.attrs = {"draws": draws, "seed": seed}
    return table


def _routing(pair: OldPair, draws: int, seed: int) -> dict[str, FloatArray]:
    old, new, sample = pair.anchor.gate, pair.current.gate, pair.sample

    def drift(gate: FloatArray) -> FloatArray:
        return router_js(old, gate, sample)

    unrelated = permuted_tokens(drift, new, draws=draws, seed=seed)
    relabelled = permuted_experts(drift, new, site_axes=1, draws=draws, seed=seed)
    return {
        "router_js": unrelated.observed,
        "router_js_unrelated": unrelated.mean,
        "router_js_unrelated_low": unrelated.low,
        "router_js_unrelated_p": unrelated.p_value,
        "router_js_relabelled": relabelled.mean,
        "router_js_relabelled_p": relabelled.p_value,
    }


def _subspaces(pair: OldPair) -> dict[str, FloatArray]:
    names = [name for name in NULLS if name.startswith("subspace")]
    result = {name: np.full(len(pair.block.sites), np.nan) for name in names}
    if pair.gram_a is None:
        return result
    widths = np.array([site.d_in for site in pair.block.sites])
    for width in np.unique(widths):
        sites = np.flatnonzero(widths == width)
        own, between, current = (gram[sites] for gram in pair.gram_a)
        spaces = pair_from_grams(own, between, current, dim=int(width))
        known = np.minimum(spaces.rank0, spaces.rank1) > 0
        chance = random_overlap(np.maximum(spaces.rank0, 1), np.maximum(spaces.rank1, 1), width)
        mean, variance = (np.where(known, value, np.nan) for value in (chance.mean, chance.spread**2))
        result["subspace_overlap"][sites] = mean_defined(spaces.overlap())
        result["subspace_overlap_random"][sites] = mean_defined(mean)
        result["subspace_overlap_random_spread"][sites] = np.sqrt(divide(mean_defined(variance), known.sum(axis=-1)))
    return result
