"""From arrays to labelled tables: names, axes, coordinates and attributes of everything `Run` offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from driftlens.analysis.engine import DriftArrays, Plan
from driftlens.analysis.families import FAMILIES, REASONS
from driftlens.analysis.state import StateArrays
from driftlens.metrics import MEASURES
from driftlens.metrics.arrays import mean_defined
from driftlens.store import SiteInfo

__all__ = ["TABLES", "Labels", "attributes", "build_tables"]

TABLES = ("drift", "codrift", "summary", "trend", "subspaces", "importance")
"""Names of the tables of a run's analysis."""

_CELL = ("probe", "checkpoint", "site")
_EXPERT = (*_CELL, "expert")
_PATHWAY = (*_EXPERT, "rank_index")
_CONTEXT = ("gate_entropy", "load_entropy")

# Names that are parts or companions of a measure that metrics.md defines under another name.
_DEFINED_AS = {
    "impact_router": "impact",
    "impact_experts": "impact",
    "impact_cross": "impact",
    "responsibility_router_alone": "responsibility_divergence",
    "responsibility_experts_alone": "responsibility_divergence",
    "alignment_loss": "alignment",
    "importance_gini": "importance_concentration",
    "rank_update_a": "rank_update",
    "rank_update_b": "rank_update",
    "rank_update_a_correlation": "rank_update",
    "rank_update_b_correlation": "rank_update",
}
_TITLES = {
    "impact_router": "Impact, router part",
    "impact_experts": "Impact, expert part",
    "impact_cross": "Impact, cross term",
    "responsibility_router_alone": "Responsibility drift with the new gate alone (D_R)",
    "responsibility_experts_alone": "Responsibility drift with the new experts alone (D_E)",
    "alignment_loss": "Alignment lost since the anchor",
    "importance_gini": "Gini coefficient of importance",
    "rank_update_a": "Update of the rows of A",
    "rank_update_b": "Update of the columns of B",
    "rank_update_a_correlation": "Rank correlation of the update of A with the anchor's importance",
    "rank_update_b_correlation": "Rank correlation of the update of B with the anchor's importance",
    "load": "Mean gate",
}
_UNITS = {"sample_js": "nats", "principal_angles": "rad", "grassmann_distance": "rad"}


def attributes(name: str) -> dict[str, Any]:
    """Return a variable's attributes: long_name, units, section of metrics.md, within_run (0/1), undefined, range."""
    entry = MEASURES.get(_DEFINED_AS.get(name, name))
    title = _TITLES.get(name) or (entry.title if entry else name.replace("_", " "))
    result: dict[str, Any] = {"long_name": title, "units": _UNITS.get(name, "1")}
    if entry is not None:
        result |= {"section": entry.section, "within_run": int(entry.within_run), "undefined": entry.undefined}
        if name == entry.name:
            result |= {"range": entry.range, "definition": entry.formula, "caveat": entry.caveat}
    return result


@dataclass(frozen=True)
class Labels:
    """Coordinates of the tables.

    Attributes:
        checkpoints: indices of the recorded checkpoints.
        checkpoint_names: their names.
        probe_index: 1-based position of each probe's task in the stream, 0 for a probe of no task.
        anchors: checkpoint index of each probe's anchor, -1 where it was not recorded.
        sites: the sites.
    """

    checkpoints: Sequence[int]
    checkpoint_names: Sequence[str]
    probe_index: Sequence[int]
    anchors: Sequence[int]
    sites: Sequence[SiteInfo]

    def coordinates(self, plan: Plan) -> dict[str, Any]:
        """Return the xarray coordinates, without ``expert`` and ``rank_index``."""
        checkpoints, probes, sites = np.asarray(self.checkpoints, np.int64), list(plan.probes), self.sites
        coords: dict[str, Any] = {
            "probe": np.array(probes, dtype=np.str_),
            "probe_index": ("probe", np.asarray(self.probe_index, np.int64)),
            "anchor": ("probe", np.asarray(self.anchors, np.int64)),
            "checkpoint": checkpoints,
            "checkpoint_name": ("checkpoint", np.array(self.checkpoint_names, dtype=np.str_)),
            "site": np.array([site.name for site in sites], dtype=np.str_),
        }
        for field in ("kind", "gate"):
            key = "gate_kind" if field == "gate" else field
            coords[key] = ("site", np.array([getattr(site, field) for site in sites], dtype=np.str_))
        for field in ("layer", "num_experts", "rank", "d_in", "d_out", "top_k"):
            coords[field] = ("site", np.array([getattr(site, field) for site in sites], dtype=np.int64))
        return coords


def build_tables(plan: Plan, labels: Labels, drift: DriftArrays, state: StateArrays) -> dict[str, xr.Dataset]:
    """Return the tables `TABLES` by name."""
    coords = labels.coordinates(plan)
    experts, rank = state.values["principal_angles"].shape[-2:]
    by_expert = coords | {"expert": np.arange(experts)}
    by_pathway = by_expert | {"rank_index": np.arange(rank)}
    shared = {
        "draws": plan.draws,
        "level": plan.level,
        "seed": plan.seed,
        "noise_recorded": int(plan.noise is not None),
    }
    variables = _drift_variables(drift)
    context: dict[str, Any] = {
        name: (_CELL, state.values[name], attributes(name)) for name in ("gate_entropy", "load_entropy", "dead_experts")
    }
    context |= {
        "load": (_EXPERT, state.values["load"], attributes("load")),
        "near_uniform": (_CELL, state.near_uniform, {"long_name": "gate that hardly routes (gate_entropy above 0.99)"}),
        "specialisation": (("checkpoint", "site"), state.specialisation, attributes("specialisation")),
    }
    subspaces: dict[str, Any] = {
        name: (_EXPERT, state.values[name], attributes(name))
        for name in (
            "subspace_overlap",
            "subspace_overlap_adjusted",
            "grassmann_distance",
            "active_overlap",
            "active_rank",
            "output_overlap",
            "subspace_overlap_chance",
            "output_overlap_chance",
        )
    }
    subspaces["principal_angles"] = (_PATHWAY, state.values["principal_angles"], attributes("principal_angles"))
    names = ("importance_concentration", "importance_gini", "rank_update_a_correlation", "rank_update_b_correlation")
    importance: dict[str, Any] = {name: (_CELL, state.values[name], attributes(name)) for name in names}
    for name in ("rank_importance", "rank_update_a", "rank_update_b"):
        importance[name] = (_PATHWAY, state.values[name], attributes(name))
    outer = {key: value for key, value in coords.items() if _axis(key, value) != "site"}
    alone = {key: value for key, value in outer.items() if _axis(key, value) == "checkpoint"}
    return {
        "drift": xr.Dataset({**variables["drift"], **context}, by_expert, shared),
        "codrift": xr.Dataset(variables["codrift"], coords, shared),
        "summary": xr.Dataset(_summary(drift, state), outer, shared),
        "trend": xr.Dataset(_trend(plan, drift, state), alone, shared),
        "subspaces": xr.Dataset(subspaces, by_pathway, shared),
        "importance": xr.Dataset(importance, by_pathway, shared),
    }


def _axis(key: str, value: Any) -> str:
    return value[0] if isinstance(value, tuple) else key


def _drift_variables(drift: DriftArrays) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {"drift": {}, "codrift": {}}
    flags = {"flag_values": list(REASONS), "flag_meanings": "; ".join(REASONS.values())}
    for key in FAMILIES:
        family = FAMILIES.get(key)
        table = tables[family.table]
        for name in family.measures:
            about = attributes(name)
            title = about["long_name"]
            table[name] = (_CELL, drift.value[name], about)
            table[f"{name}_low"] = (_CELL, drift.low[name], {"long_name": f"{title}, lower end of the interval"})
            table[f"{name}_high"] = (_CELL, drift.high[name], {"long_name": f"{title}, upper end of the interval"})
            table[f"{name}_noise"] = (("probe", "site"), drift.noise[name], {"long_name": f"{title}, noise floor"})
            if name in drift.explained or drift.reason[name].any():
                table[f"{name}_reason"] = (_CELL, drift.reason[name], {"long_name": f"{title}, why undefined", **flags})
            if name in drift.chance:
                table[f"{name}_chance"] = (_CELL, drift.chance[name], {"long_name": f"{title}, chance level"})
    return tables


def _summary(drift: DriftArrays, state: StateArrays) -> dict[str, Any]:
    axes = ("probe", "checkpoint")
    result: dict[str, Any] = {}
    for name in drift.names:
        value, low, high = drift.averages(name)
        result[name] = (axes, value, attributes(name))
        result[f"{name}_low"], result[f"{name}_high"] = (axes, low), (axes, high)
        result[f"{name}_noise"] = (("probe",), mean_defined(drift.noise[name]))
        if name in drift.chance:
            result[f"{name}_chance"] = (axes, mean_defined(drift.chance[name]))
    for name in _CONTEXT:
        result[name] = (axes, mean_defined(state.values[name]), attributes(name))
    result["near_uniform_share"] = (
        axes,
        state.near_uniform.mean(axis=-1),
        {"long_name": "share of near uniform gates"},
    )
    result["specialisation"] = (("checkpoint",), mean_defined(state.specialisation), attributes("specialisation"))
    return result


def _trend(plan: Plan, drift: DriftArrays, state: StateArrays) -> dict[str, Any]:
    axes = ("checkpoint",)
    result: dict[str, Any] = {}
    old = drift.old
    for name in drift.names:
        value, low, high = drift.trend(name)
        result[name] = (axes, value, attributes(name))
        result[f"{name}_low"], result[f"{name}_high"] = (axes, low), (axes, high)
        noise = mean_defined(drift.noise[name])
        result[f"{name}_noise"] = (axes, mean_defined(np.where(old, noise[:, None], np.nan), axis=0))
        if name in drift.chance:
            chance = np.where(old, mean_defined(drift.chance[name]), np.nan)
            result[f"{name}_chance"] = (axes, mean_defined(chance, axis=0))
    averages: Mapping[str, Any] = {
        **{name: mean_defined(state.values[name]) for name in _CONTEXT},
        "near_uniform_share": state.near_uniform.mean(axis=-1),
    }
    for name, values in averages.items():
        result[name] = (axes, mean_defined(np.where(old, values, np.nan), axis=0), attributes(name))
    result["specialisation"] = (axes, mean_defined(state.specialisation), attributes("specialisation"))
    result["n_old"] = (axes, old.sum(axis=0).astype(np.int64), {"long_name": "number of old probes"})
    return result
