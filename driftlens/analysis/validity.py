"""Does a drift measure predict the forgetting that really happened? (metrics.md section 6)

One row per run, old task and later checkpoint: what the task lost since its anchor, from scores, and every drift
measure, from recordings. A measure is valid where its rank correlation with the loss is high over all methods, its
interval does not hold 0, and it says more than the simple measures that others use.

Rows of one run are not independent: they share weights, and a task that is lost stays lost. So intervals come from
drawing whole runs (or tasks of runs) again, never rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from driftlens.analysis.comparison import stream_difference
from driftlens.analysis.datasets import attributes
from driftlens.analysis.frames import metric_names
from driftlens.analysis.ranks import cluster_weights, partial_rank_correlation, rank_correlation
from driftlens.analysis.run import Run, open_run
from driftlens.analysis.simple import SIMPLE
from driftlens.analysis.study import ATTRIBUTED, DIFFICULTY, TARGETS, validity_rows
from driftlens.analysis.variants import VARIANTS, variant_definition, variant_names
from driftlens.errors import ConfigError, NotFoundError, ProbeError, UnknownNameError
from driftlens.metrics import percentile_interval
from driftlens.metrics.arrays import FloatArray, as_float

__all__ = ["GIVEN", "Validity", "correlate", "validity"]

Cluster = Literal["run", "task"]
Mask = NDArray[np.bool_]

GIVEN: Final = tuple(DIFFICULTY)

_LABELS: Final = ("run", "method", "seed", "task", "anchor", "checkpoint", "checkpoint_name", "samples")

_SIMILARITY: Final = frozenset(
    {
        "retained",
        "topk_overlap",
        "alignment",
        "alignment_energy",
        "subspace_overlap",
        "subspace_overlap_adjusted",
        "active_overlap",
        "output_overlap",
    }
)
"""Measures that fall as drift grows: they predict forgetting with a negative correlation."""

_STATE: Final = frozenset(
    {
        "coupling",
        "codrift_share",
        "active_rank",
        "rank_importance",
        "importance_concentration",
        "importance_gini",
        "rank_update_a_correlation",
        "rank_update_b_correlation",
    }
)
"""Measures of which no direction was expected: the sign that is found counts."""

_DIFFERENCE: Final = ("measure", "simple", "target", "difference", "low", "high", "rows")
_FEWEST: Final = 5
"""Rows below which a rank correlation is not formed."""


@dataclass(frozen=True)
class Validity:
    """What `validity` found.

    Attributes:
        rows: one row per (run, old task, checkpoint): labels, `TARGETS`, `DIFFICULTY`, near_uniform_share, measures.
        table: one row per (measure, target), see `correlate`.
        differences: one row per (measure, simple, target): |rho| of the measure minus that of the simple one, both in
            the expected direction, on the rows that have both, with its paired bootstrap interval.
        groups: one row per (measure, target, grouping, group): rho within one method or one run, and over all methods
            but one (``without_method``).
        about: cluster, draws, level, seed, given, rows, runs, clusters.
    """

    rows: pd.DataFrame
    table: pd.DataFrame
    differences: pd.DataFrame
    groups: pd.DataFrame
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dataset(self) -> xr.Dataset:
        """All numbers by (measure, target), differences by simple as well, and groups by group."""
        labels = ["kind", "within_run_only", "undefined", "definition"]
        by_measure = self.table.drop_duplicates("measure").set_index("measure")[labels]
        numbers = self.table.drop(columns=labels).set_index(["measure", "target"])
        result = numbers.to_xarray()
        against = self.differences.set_index(["measure", "simple", "target"]).to_xarray()
        result = result.merge(against.rename({name: f"difference_{name}" for name in against.data_vars}))
        keys = self.groups["grouping"] + ":" + self.groups["group"]
        flat = self.groups.assign(group=keys).drop(columns="grouping")
        apart = flat.set_index(["measure", "target", "group"]).to_xarray()
        result = result.merge(apart.rename({name: f"group_{name}" for name in apart.data_vars}))
        order = self.table["measure"].drop_duplicates().to_list()
        result = result.reindex(measure=order)
        for name in labels:
            values = by_measure.loc[order, name]
            plain = values.to_numpy(bool) if name == "within_run_only" else values.fillna("").to_numpy(np.str_)
            result[name] = ("measure", plain)
        for name in ("measure", "target", "simple", "group"):
            result[name] = result[name].astype(np.str_)
        return result.assign_attrs({key: _attribute(value) for key, value in self.about.items()})


def _attribute(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, (list, tuple)) else value


def validity(
    runs: Iterable[Run | str | os.PathLike[str]],
    *,
    cluster: Cluster = "run",
    given: Sequence[str] = GIVEN,
    variants: Iterable[str] = VARIANTS,
    strict: bool = True,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Validity:
    """Correlate every drift measure with the forgetting that happened, over tasks, methods and seeds.

    Args:
        runs: scored and recorded runs, or paths of their folders.
        cluster: what the bootstrap draws: whole runs, or tasks of runs (which makes intervals narrower than they
            should be, as tasks of one run share its weights; needed for a single run).
        given: names in `DIFFICULTY` that the partial correlation holds fixed.
        variants: names of variants of co-drift and impact to add (`driftlens.analysis.variants.variant_names`).
        strict: False accepts runs over different streams or probes.
        draws: bootstrap draws.
        level: coverage of the intervals.
        seed: seed of the draws.

    Returns:
        Rows, correlations, differences and groups.

    Raises:
        ConfigError: no run, one run where runs are drawn, a run given twice, an unknown name in ``given``.
        NotFoundError: a run without scores or recordings, or too few old tasks in all.
        ProbeError: different streams or probes, with ``strict``.
    """
    opened = [entry if isinstance(entry, Run) else open_run(entry) for entry in runs]
    _check(opened, cluster, given, strict)
    parts: list[pd.DataFrame] = []
    about: dict[str, dict[str, list[str]]] = {}
    wanted = list(variants)
    names = [run.name for run in opened]
    for run in opened:
        frame, facts = validity_rows(run, wanted)
        if names.count(run.name) > 1:
            frame["run"] = str(run.path)
        parts.append(frame)
        for name, fact in facts.items():
            about.setdefault(name, {}).setdefault(fact, []).append(run.name)
    rows = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    if len(rows) < _FEWEST:
        raise NotFoundError(
            f"{len(rows)} rows (old task at a later checkpoint, scored and recorded) in {len(opened)} runs; a rank "
            f"correlation needs at least {_FEWEST}. Give more runs, or runs over longer streams."
        )
    return correlate(rows, cluster=cluster, given=given, draws=draws, level=level, seed=seed, undefined=_texts(about))


def _texts(found: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, str]:
    """Join the reasons of a measure over runs."""
    return {
        name: "; ".join(f"{reason} ({', '.join(runs)})" for reason, runs in reasons.items())
        for name, reasons in found.items()
    }


def _check(runs: Sequence[Run], cluster: str, given: Sequence[str], strict: bool) -> None:
    if not runs:
        raise ConfigError("No run was given. Name at least two: `driftlens validate RUN RUN...`.")
    if cluster not in ("run", "task"):
        raise UnknownNameError("cluster", cluster, ("run", "task"))
    for name in given:
        if name not in DIFFICULTY:
            raise UnknownNameError("covariate", name, DIFFICULTY)
    seen: set[Any] = set()
    for run in runs:
        place = run.path.resolve()
        if place in seen:
            raise ConfigError(f"{run.path} was given twice; its rows would count double. Name every run once.")
        seen.add(place)
    if len(runs) == 1 and cluster == "run":
        raise ConfigError(
            f"One run ({runs[0].path}) was given, and its rows are not independent: an interval over runs needs at "
            "least two. Name more runs, or draw tasks instead (`--cluster task`), which says nothing of other runs."
        )
    for run in runs[1:]:
        difference = stream_difference(runs[0], run)
        if difference and strict:
            raise ProbeError(
                f"{runs[0].path} and {run.path} cannot be put into one study: {difference}. Use runs over one stream "
                "and one probe set, or ask for it anyway (strict=False, `--force`)."
            )


# --- correlations -----------------------------------------------------------------------------------------------------


def correlate(
    rows: pd.DataFrame,
    *,
    cluster: Cluster = "run",
    given: Sequence[str] = GIVEN,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    undefined: Mapping[str, str] | None = None,
) -> Validity:
    """Correlate the measures of rows with their forgetting.

    Args:
        rows: columns as `validity_rows` returns them, of any runs; columns that are none of its labels, targets or
            covariates are measures.
        cluster: "run" or "task": what the bootstrap draws.
        given: covariates of the partial correlation.
        draws: bootstrap draws.
        level: coverage of the intervals.
        seed: seed of the draws.
        undefined: why measures are undefined, by name.

    Returns:
        ``table`` has one row per (measure, target): kind (drift, variant, simple, attribution), rho with low and high,
        partial (given ``given``) with its interval, within_method and within_run (means of rho over methods and over
        runs that have one), without_method (the lowest |rho| when one method is left out), beats (number of simple
        measures that it beats with an interval above 0) of simple, predicts (the interval does not hold 0, in the
        expected direction), expected (+1, -1, 0 for either), rows, above_noise (share of rows above the noise floor),
        near_uniform (share of rows with most gates near uniform), within_run_only, definition, undefined. Sorted by
        |rho| within a target.
    """
    study = _Study(rows, cluster, given, draws, level, seed)
    table, against, groups = [], [], []
    for target in TARGETS:
        for measure in study.measures:
            parts = study.groups(measure, target)
            groups += parts
            differences = study.differences(measure, target)
            against += differences
            row = study.row(measure, target) | _summary(parts)
            row |= {"beats": sum(part["low"] > 0 for part in differences), "of_simple": len(differences)}
            row["undefined"] = (undefined or {}).get(measure)
            table.append(row)
    frame = pd.DataFrame(table)
    order = frame["target"].map({name: number for number, name in enumerate(TARGETS)})
    frame = frame.assign(_order=order, _size=-frame["rho"].abs()).sort_values(["_order", "_size"], kind="stable")
    frame = frame.drop(columns=["_order", "_size"]).reset_index(drop=True)
    about = {
        "cluster": cluster,
        "given": list(given),
        "draws": draws,
        "level": level,
        "seed": seed,
        "rows": len(rows),
        "runs": int(rows["run"].nunique()),
        "clusters": study.clusters,
    }
    return Validity(rows, frame, pd.DataFrame(against, columns=list(_DIFFERENCE)), pd.DataFrame(groups), about)


def _summary(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    by_kind = {
        kind: [part["rho"] for part in parts if part["grouping"] == kind]
        for kind in ("method", "run", "without_method")
    }
    result = {f"within_{kind}": _mean(by_kind[kind]) for kind in ("method", "run")}
    others = [abs(rho) for rho in by_kind["without_method"] if not np.isnan(rho)]
    return result | {"without_method": min(others, default=np.nan)}


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else np.nan


class _Study:
    """Rows, draws, and correlations that were formed already."""

    def __init__(
        self, rows: pd.DataFrame, cluster: str, given: Sequence[str], draws: int, level: float, seed: int
    ) -> None:
        self.rows = rows
        self.level = level
        self.given = list(given)
        known = {*_LABELS, *TARGETS, *DIFFICULTY, "near_uniform_share"}
        self.measures = [str(name) for name in rows.columns if name not in known and not str(name).endswith("_noise")]
        label = rows["run"].astype(str) if cluster == "run" else rows["run"].astype(str) + "/" + rows["task"]
        self.clusters = int(label.nunique())
        self.weights = cluster_weights(label, draws, seed)
        self._columns = {name: as_float(rows[name]) for name in (*self.measures, *TARGETS, *DIFFICULTY)}
        self._defined = {name: np.isfinite(values) for name, values in self._columns.items()}
        self._masks = _groups(rows)
        self._found: dict[tuple[str, str, bytes], tuple[float, FloatArray]] = {}

    def values(self, name: str) -> FloatArray:
        return self._columns[name]

    def both(self, measure: str, target: str) -> Mask:
        return self._defined[measure] & self._defined[target]

    def rho(self, measure: str, target: str, kept: Mask) -> tuple[float, FloatArray]:
        """Spearman on the rows ``kept``, and in every draw."""
        key = (measure, target, kept.tobytes())
        if key not in self._found:
            x, y = self.values(measure)[kept], self.values(target)[kept]
            enough = len(x) >= _FEWEST
            drawn = rank_correlation(x, y, self.weights[:, kept]) if enough else np.full(len(self.weights), np.nan)
            self._found[key] = (float(rank_correlation(x, y)[0]) if enough else np.nan, drawn)
        return self._found[key]

    def interval(self, draws: FloatArray) -> tuple[float, float]:
        if self.clusters < 2 or np.isnan(draws).all():
            return np.nan, np.nan
        low, high = percentile_interval(draws, self.level)
        return float(low), float(high)

    def row(self, measure: str, target: str) -> dict[str, Any]:
        kept = self.both(measure, target)
        value, draws = self.rho(measure, target, kept)
        low, high = self.interval(draws)
        given = [self.values(name)[kept] for name in self.given]
        x, y = self.values(measure)[kept], self.values(target)[kept]
        partial, partial_low, partial_high = np.nan, np.nan, np.nan
        if len(x) >= _FEWEST + len(given):
            partial = float(partial_rank_correlation(x, y, given)[0])
            partial_low, partial_high = self.interval(partial_rank_correlation(x, y, given, self.weights[:, kept]))
        expected = _expected(measure)
        # A similarity of two recordings of one checkpoint is near 1: no floor for how far it fell.
        floor = None if measure in _SIMILARITY else self.rows.get(f"{measure}_noise")
        above = np.nan if floor is None else float((np.abs(x) > as_float(floor)[kept]).mean()) if len(x) else np.nan
        uniform = as_float(self.rows["near_uniform_share"])[kept] if "near_uniform_share" in self.rows else np.zeros(0)
        return {
            "measure": measure,
            "target": target,
            "kind": _kind(measure),
            "rho": value,
            "low": low,
            "high": high,
            "predicts": bool((expected >= 0 and low > 0) or (expected <= 0 and high < 0)),
            "expected": expected,
            "partial": partial,
            "partial_low": partial_low,
            "partial_high": partial_high,
            "rows": int(kept.sum()),
            "above_noise": above,
            "near_uniform": float((uniform > 0.5).mean()) if uniform.size else np.nan,
            "within_run_only": bool(_about(measure).get("within_run", 0)),
            "definition": _definition(measure),
        }

    def differences(self, measure: str, target: str) -> list[dict[str, Any]]:
        """The measure against every simple one, on the rows that have both, in the same draws."""
        result = []
        for simple in SIMPLE:
            if simple == measure or simple not in self.measures:
                continue
            kept = self.both(measure, target) & self.both(simple, target)
            (value, draws), (bar, bar_draws) = self.rho(measure, target, kept), self.rho(simple, target, kept)
            sign = _expected(measure) or (-1 if value < 0 else 1)
            low, high = self.interval(sign * draws - bar_draws)
            difference = sign * value - bar
            labels = {"measure": measure, "simple": simple, "target": target}
            result.append(labels | {"difference": difference, "low": low, "high": high, "rows": int(kept.sum())})
        return result

    def groups(self, measure: str, target: str) -> list[dict[str, Any]]:
        kept = self.both(measure, target)
        x, y = self.values(measure), self.values(target)
        result = []
        for kind, name, mask in self._masks:
            inside = mask & kept
            rho = float(rank_correlation(x[inside], y[inside])[0]) if inside.sum() >= _FEWEST else np.nan
            labels = {"measure": measure, "target": target, "grouping": kind, "group": name}
            result.append(labels | {"rho": rho, "rows": int(inside.sum())})
        return result


def _groups(rows: pd.DataFrame) -> list[tuple[str, str, Mask]]:
    """(grouping, group, its rows): every method, every run, and all methods but one."""
    methods = rows["method"].to_numpy()
    result = [
        (kind, str(name), (rows[kind] == name).to_numpy()) for kind in ("method", "run") for name in rows[kind].unique()
    ]
    if len(set(methods)) > 1:
        result += [("without_method", str(name), methods != name) for name in rows["method"].unique()]
    return result


def _kind(measure: str) -> str:
    if measure in SIMPLE:
        return "simple"
    if measure in ATTRIBUTED:
        return "attribution"
    return "drift" if measure in metric_names() else "variant"


def _expected(measure: str) -> int:
    return -1 if measure in _SIMILARITY else 0 if measure in _STATE else 1


def _about(measure: str) -> dict[str, Any]:
    return attributes(measure) if measure in metric_names() else {}


def _definition(measure: str) -> str:
    if measure in SIMPLE:
        return SIMPLE[measure]
    if measure in ATTRIBUTED:
        return (
            "part of the forgetting that attribution books (metrics.md section 4); from the model, not from recordings"
        )
    if measure in variant_names():
        return variant_definition(measure)
    about = _about(measure)
    return str(about.get("definition") or about.get("long_name") or "")
