"""Simple drift measures that others use, as the bar that ours have to clear in the validity study.

All from recordings alone: from weights or, in thinned runs, from their Gram matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import xarray as xr

from driftlens.analysis.run import Run
from driftlens.analysis.walk import OldPair, measure_pairs
from driftlens.metrics import expert_blocks, row_drift, sample_means
from driftlens.metrics.arrays import FloatArray, as_float, divide, mean_defined
from driftlens.metrics.cka import biased_cka_from_grams

__all__ = ["SIMPLE", "SIMPLE_BY_SITE", "average_simple", "simple_measures", "simple_of_sites"]

SIMPLE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "marginal_js": "JS of the two probe-mean gates, base 2 (SAME's histogram view)",
        "weight_distance": "norm of the change of all A and B of a site over their norm at the anchor",
        "update_distance": "norm_F of the change of s B A over all experts of a site, over its norm at the anchor",
        "router_row_distance": "1 - cosine of a router's rows, mean over rows",
        "cka_biased_distance": "1 - biased linear CKA of the site's update u over tokens",
        "u_cosine_distance": "1 - cosine of u at the two checkpoints, mean over tokens",
        "tasks_since_anchor": "number of tasks learned since the anchor",
    }
)
"""Formula of every simple measure; each is a mean over sites, and grows with drift."""

SIMPLE_BY_SITE: Final = (
    "weight_distance",
    "update_distance",
    "router_row_distance",
    "cka_biased_distance",
    "u_cosine_distance",
)
"""Those of `SIMPLE` that `simple_of_sites` measures."""


def simple_measures(run: Run) -> xr.Dataset:
    """Return the simple measures of a run.

    Args:
        run: a recorded run.

    Returns:
        `SIMPLE` by (probe, checkpoint), means over sites, NaN for pairs that are not old; ``NAME_noise`` by probe;
        ``NAME.attrs["undefined"]`` says why a measure is NaN in all pairs.

    Raises:
        NotFoundError: no recordings.
        FormatError: a damaged recording.
    """
    table, _ = measure_pairs(run, SIMPLE_BY_SITE, simple_of_sites)
    return average_simple(run, table)


def average_simple(run: Run, table: xr.Dataset) -> xr.Dataset:
    """Average `simple_of_sites` over sites, and add the measures that need no pass; as `simple_measures`."""
    summary = run.summary
    axes = ("probe", "checkpoint")
    result = xr.Dataset(coords={axis: table[axis] for axis in axes})
    for name in SIMPLE_BY_SITE:
        result[name] = (axes, mean_defined(table[name].transpose(*axes, "site").to_numpy()))
        result[f"{name}_noise"] = (
            ("probe",),
            mean_defined(table[f"{name}_noise"].transpose("probe", "site").to_numpy()),
        )
    old = (summary["checkpoint"] > summary["anchor"]) & (summary["anchor"] >= 0)
    for name in ("marginal_js", "marginal_js_noise"):
        result[name] = (summary[name].dims, summary[name].to_numpy())
    result["marginal_js"] = result["marginal_js"].where(old)
    since = (summary["checkpoint"] - summary["anchor"]).where(old)
    result["tasks_since_anchor"] = (axes, since.transpose(*axes).to_numpy())
    for name, formula in SIMPLE.items():
        result[name].attrs = {"definition": formula, "units": "1"}
        if not result[name].notnull().any():
            result[name].attrs["undefined"] = _why(run, name)
    return result


def _why(run: Run, name: str) -> str:
    with run.recording(run.recorded[-1]) as recording:
        if name != "router_row_distance":
            return "its factors were not recorded, or give no output"
        if not recording.has_weights:
            return "the recordings were thinned: they keep Gram matrices in place of router weights"
        return "its sites have no router of their own"


def simple_of_sites(pair: OldPair) -> dict[str, FloatArray]:
    """Return weight_distance, update_distance, router_row_distance, cka_biased_distance, u_cosine_distance, [S] each.

    Args:
        pair: an old probe at two checkpoints.
    """
    result = {"router_row_distance": _router_rows(pair)}
    unknown = np.full(len(pair.block.sites), np.nan)
    result |= dict.fromkeys(("weight_distance", "update_distance", "cka_biased_distance", "u_cosine_distance"), unknown)
    if pair.gram_a is None or pair.gram_b is None or pair.moved is None:
        return result
    experts = pair.block.num_experts
    blocks = tuple(expert_blocks(gram, experts) for gram in pair.gram_b)
    a00, a01, a11 = (np.einsum("serr->s", gram) for gram in pair.gram_a)
    old, new = _scalings(pair)
    b00, b01, b11 = (
        divide(np.einsum("serr->s", gram), scale)
        for gram, scale in zip(blocks, (old * old, old * new, new * new), strict=True)
    )
    result["weight_distance"] = _relative(a00 + b00, a01 + b01, a11 + b11)
    inner = [(b * a).sum(axis=(1, 2, 3)) for a, b in zip(pair.gram_a, blocks, strict=True)]
    result["update_distance"] = _relative(*inner)
    result["cka_biased_distance"] = _cka_biased_distance(pair)
    result["u_cosine_distance"] = _u_cosine_distance(pair)
    return result


def _relative(own: FloatArray, between: FloatArray, new: FloatArray) -> FloatArray:
    """norm(x1 - x0) / norm(x0) from inner products."""
    return np.sqrt(divide(np.maximum(own - 2 * between + new, 0.0), own))


def _scalings(pair: OldPair) -> tuple[FloatArray, FloatArray]:
    both = []
    for recording in pair.recordings:
        known = {site.name: site.scaling for site in recording.sites}
        both.append(np.array([known.get(site.name, np.nan) for site in pair.block.sites]))
    return both[0], both[1]


def _router_rows(pair: OldPair) -> FloatArray:
    result = np.full(len(pair.block.sites), np.nan)
    if not all(recording.has_weights for recording in pair.recordings):
        return result
    known = [{site.name for site in recording.sites} for recording in pair.recordings]
    for position, site in enumerate(pair.block.sites):
        if site.name not in known[0] or site.name not in known[1]:
            continue
        old, new = (recording.weights(site.name)["router"] for recording in pair.recordings)
        if old is None or new is None:
            continue
        rows = min(len(old), len(new))  # rows of experts that came later have no anchor
        cosine = row_drift(old[:rows], new[:rows]).cosine
        result[position] = mean_defined(1.0 - cosine)
    return result


def _u_cosine_distance(pair: OldPair) -> FloatArray:
    """Mean over tokens of 1 - cosine of a site's update at the two checkpoints, [S] in 0..2; NaN without output."""
    moved = pair.moved
    if moved is None:
        return np.full(len(pair.block.sites), np.nan)
    inner = (moved.u00_sq + moved.u11_sq - moved.change_sq) / 2
    cosine = np.clip(divide(inner, np.sqrt(moved.u00_sq * moved.u11_sq)), -1.0, 1.0)
    return mean_defined(sample_means(1.0 - cosine, pair.sample, skip_undefined=True))


def _cka_biased_distance(pair: OldPair) -> FloatArray:
    """1 - biased linear CKA of u over tokens, [S] in 0..1."""
    gated = []
    for part in (pair.anchor, pair.current):
        assert part.middle is not None  # the caller has asked
        # One expert as wide as all of them: its output is u.
        product = as_float(part.gate)[..., None] * as_float(part.middle)
        gated.append(product.reshape(*product.shape[:2], 1, -1))
    assert pair.gram_b is not None
    own, _, new = (gram[:, None] for gram in pair.gram_b)
    return 1.0 - biased_cka_from_grams(gated[0], gated[1], own, new)[:, 0]
