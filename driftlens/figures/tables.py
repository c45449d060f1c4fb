"""The rows behind every figure: one tidy frame per figure, drawn from it and offered as its CSV.

Figures read nothing but these frames, so what is downloaded is exactly what is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from driftlens.analysis import REASONS
from driftlens.analysis.csvtext import csv_text
from driftlens.errors import UnknownNameError
from driftlens.metrics import MEASURES

if TYPE_CHECKING:
    from driftlens.analysis import Run

__all__ = [
    "LINE_METRICS",
    "MAP_METRICS",
    "SCORERS",
    "accuracy_table",
    "cell_table",
    "codrift_table",
    "csv_text",
    "drift_table",
    "routing_table",
]

SCORERS = {"strict": "exact answers", "lenient": "answers right but for form", "nll": "answer surprise"}
"""What the accuracy figures can show, with a short label."""

MAP_METRICS = {
    name: MEASURES[name].title
    for name in ("codrift_divergence", "codrift_router", "codrift_experts", "codrift_cross", "impact", "router_js")
}
"""What the co-drift map can show, with its title."""

LINE_METRICS = {
    name: MEASURES[name].title
    for name in (
        "router_js",
        "codrift_divergence",
        "mass_moved",
        "top1_switch",
        "responsibility_divergence",
        "impact",
    )
}
"""What the drift lines can show, with its title."""

_DETAIL = (
    "codrift_divergence",
    "codrift_router",
    "codrift_experts",
    "codrift_cross",
    "coupling",
    "impact",
    "router_js",
    "mass_moved",
    "top1_switch",
    "responsibility_divergence",
    "retained",
    "alignment",
)


def _known(kind: str, name: str, allowed: Sequence[str]) -> None:
    if name not in allowed:
        raise UnknownNameError(kind, name, allowed)


def _dataset(run: Run, metric: str) -> xr.Dataset:
    """Return the per-site table that holds ``metric``."""
    return run.drift if metric in run.drift.data_vars else run.codrift


def _like(data: xr.Dataset, metric: str, suffix: str, dtype: Any = np.float64) -> np.ndarray:
    """Return the companion ``metric_suffix`` spread to the metric's shape; NaN (0 for codes) if the table has none."""
    name = f"{metric}_{suffix}"
    if name not in data:
        fill = np.nan if dtype is np.float64 else 0
        return np.full(data[metric].shape, fill, dtype=dtype)
    return data[name].broadcast_like(data[metric]).transpose(*data[metric].dims).to_numpy().astype(dtype)


def accuracy_table(run: Run, scorer: str = "strict") -> pd.DataFrame:
    """Return one row per (checkpoint, task): what the run answered after every task.

    Args:
        run: the run.
        scorer: a key of `SCORERS`.

    Returns:
        Columns checkpoint, checkpoint_name, task, task_index, value (accuracy 0..1, or nats), n (samples) and state:
        ``"not learned yet"``, ``"just learned"`` or ``"old"``. Rows that were not scored have a NaN value.
    """
    _known("scorer", scorer, list(SCORERS))
    scores = run.scores
    grid = scores[scorer].transpose("checkpoint", "task")
    checkpoints, tasks = grid.shape
    frame = pd.DataFrame(
        {
            "checkpoint": np.repeat(scores["checkpoint"].to_numpy(), tasks),
            "checkpoint_name": np.repeat(scores["checkpoint_name"].to_numpy().astype(str), tasks),
            "task": np.tile(scores["task"].to_numpy().astype(str), checkpoints),
            "task_index": np.tile(scores["task_index"].to_numpy(), checkpoints),
            "scorer": scorer,
            "value": grid.to_numpy().ravel(),
            "n": scores["n"].transpose("checkpoint", "task").to_numpy().ravel(),
        }
    )
    age = (frame["checkpoint"] - frame["task_index"]).to_numpy()
    frame["state"] = np.select([age < 0, age == 0], ["not learned yet", "just learned"], "old")
    return frame


def codrift_table(run: Run, metric: str = "codrift_divergence", probe: str | None = None) -> pd.DataFrame:
    """Return one row per (site, checkpoint) of the co-drift map.

    Args:
        run: the run.
        metric: a key of `MAP_METRICS`.
        probe: an old task, or None for the mean over the tasks that are old at each checkpoint.

    Returns:
        Columns site, layer, kind, checkpoint, checkpoint_name, probe, metric, value, low, high, noise_floor, chance,
        specialisation, near_uniform (for the mean: at least half of the averaged gates), undefined (reason or None)
        and old_tasks (how many tasks the value averages). Only checkpoints from the anchor on have rows; for the mean
        only those with an old task. The mean has no interval of its own.
    """
    _known("map quantity", metric, list(MAP_METRICS))
    data = _dataset(run, metric)
    if probe is None:
        return _mean_map(run, data, metric)
    _known("task", probe, data["probe"].to_numpy().astype(str).tolist())
    chosen = data.sel(probe=probe)
    drift = run.drift.sel(probe=probe)
    anchor = int(chosen["anchor"])
    rows = []
    for number, checkpoint in enumerate(chosen["checkpoint"].to_numpy()):
        if anchor < 0 or checkpoint < anchor:
            continue
        part = chosen.isel(checkpoint=[number])
        frame = _site_frame(part, int(checkpoint), str(part["checkpoint_name"].item()))
        codes = _like(part, metric, "reason", np.int64).ravel()
        frame = frame.assign(
            probe=probe,
            metric=metric,
            value=part[metric].to_numpy().ravel(),
            low=_like(part, metric, "low").ravel(),
            high=_like(part, metric, "high").ravel(),
            noise_floor=_like(part, metric, "noise").ravel(),
            chance=_like(part, metric, "chance").ravel(),
            specialisation=run.drift["specialisation"].sel(checkpoint=checkpoint).to_numpy(),
            near_uniform=drift["near_uniform"].sel(checkpoint=checkpoint).to_numpy().astype(bool),
            undefined=_texts([None if code == 0 else REASONS[int(code)] for code in codes]),
            old_tasks=1,
        )
        rows.append(frame)
    return _concat(rows)


def _mean_map(run: Run, data: xr.Dataset, metric: str) -> pd.DataFrame:
    rows = []
    anchors = data["anchor"].to_numpy()
    for checkpoint in data["checkpoint"].to_numpy():
        old = np.flatnonzero((anchors >= 0) & (anchors < checkpoint))
        if not old.size:
            continue
        part = data.sel(checkpoint=[checkpoint]).isel(probe=old)
        values = part[metric].transpose("probe", "checkpoint", "site").to_numpy()[:, 0]
        codes = _like(part.transpose("probe", "checkpoint", "site", ...), metric, "reason", np.int64)[:, 0]
        undefined = np.isnan(values).all(axis=0)
        averaged = (~np.isnan(values)).sum(axis=0)
        uniform = run.drift["near_uniform"].isel(probe=old).sel(checkpoint=checkpoint).transpose("probe", "site")
        frame = _site_frame(part, int(checkpoint), str(part["checkpoint_name"].item()))
        frame = frame.assign(
            probe="mean of old tasks",
            metric=metric,
            value=np.where(
                undefined, np.nan, np.nansum(values, axis=0) / np.maximum((~np.isnan(values)).sum(axis=0), 1)
            ),
            low=np.nan,
            high=np.nan,
            noise_floor=_nanmax(_like(part.transpose("probe", "checkpoint", "site", ...), metric, "noise")[:, 0]),
            chance=np.nan,
            specialisation=run.drift["specialisation"].sel(checkpoint=checkpoint).to_numpy(),
            near_uniform=uniform.to_numpy().mean(axis=0) >= 0.5,
            undefined=_texts([REASONS[int(c)] if gone else None for c, gone in zip(codes[0], undefined, strict=True)]),
            old_tasks=averaged,
        )
        rows.append(frame)
    return _concat(rows)


def _texts(values: list[str | None]) -> pd.Series[Any]:
    return pd.Series(values, dtype=object)


def _nanmax(values: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.where(np.isnan(values).all(axis=0), np.nan, np.nan_to_num(values, nan=-np.inf).max(axis=0))
    return result


def _site_frame(part: xr.Dataset, checkpoint: int, name: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "site": part["site"].to_numpy().astype(str),
            "layer": part["layer"].to_numpy(),
            "kind": part["kind"].to_numpy().astype(str),
            "checkpoint": checkpoint,
            "checkpoint_name": name,
        }
    )


def _concat(frames: list[pd.DataFrame]) -> pd.DataFrame:
    columns = ["site", "layer", "kind", "checkpoint", "checkpoint_name", "probe", "metric", "value", "low", "high"]
    columns += ["noise_floor", "chance", "specialisation", "near_uniform", "undefined", "old_tasks"]
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def drift_table(run: Run, metric: str = "router_js") -> pd.DataFrame:
    """Return one row per (old task, checkpoint from its anchor on): drift averaged over sites.

    Args:
        run: the run.
        metric: a key of `LINE_METRICS`.

    Returns:
        Columns probe, probe_index, anchor, checkpoint, checkpoint_name, metric, value, low, high, noise_floor, chance
        and near_uniform_share (share of sites whose gate is near uniform).
    """
    _known("drift quantity", metric, list(LINE_METRICS))
    data = run.summary.transpose("probe", "checkpoint", ...)
    probes, checkpoints = data[metric].shape
    uniform = data["near_uniform_share"].broadcast_like(data[metric]).transpose("probe", "checkpoint")
    frame = pd.DataFrame(
        {
            "probe": np.repeat(data["probe"].to_numpy().astype(str), checkpoints),
            "probe_index": np.repeat(data["probe_index"].to_numpy(), checkpoints),
            "anchor": np.repeat(data["anchor"].to_numpy(), checkpoints),
            "checkpoint": np.tile(data["checkpoint"].to_numpy(), probes),
            "checkpoint_name": np.tile(data["checkpoint_name"].to_numpy().astype(str), probes),
            "metric": metric,
            "value": data[metric].to_numpy().ravel(),
            "low": _like(data, metric, "low").ravel(),
            "high": _like(data, metric, "high").ravel(),
            "noise_floor": _like(data, metric, "noise").ravel(),
            "chance": _like(data, metric, "chance").ravel(),
            "near_uniform_share": uniform.to_numpy().ravel(),
        }
    )
    return frame[(frame["anchor"] >= 0) & (frame["checkpoint"] >= frame["anchor"])].reset_index(drop=True)


def routing_table(run: Run, probe: str | None = None, site: str | None = None) -> pd.DataFrame:
    """Return one row per (task, checkpoint, expert): which share of the task's tokens each expert gets.

    Args:
        run: the run.
        probe: a task, or None for all.
        site: a site, or None for the mean over sites (an expert that a site lacks counts as share 0 there).

    Returns:
        Columns probe, anchor, checkpoint, checkpoint_name, site, expert, share (0..1; sums to 1 over experts).
    """
    drift = run.drift
    sites, probes = drift["site"].to_numpy().astype(str), drift["probe"].to_numpy().astype(str)
    if site is not None:
        _known("site", site, sites.tolist())
    if probe is not None:
        _known("task", probe, probes.tolist())
    load = drift["load"].transpose("probe", "checkpoint", "site", "expert")
    if site is not None:
        values = load.sel(site=site).to_numpy()
    else:
        array = load.to_numpy()
        recorded = ~np.isnan(array).all(axis=-1, keepdims=True)
        weight = np.where(recorded, 1.0, np.nan)
        values = np.nansum(np.nan_to_num(array), axis=2) / np.nansum(weight, axis=2)
    count, checkpoints, experts = values.shape
    frame = pd.DataFrame(
        {
            "probe": np.repeat(probes, checkpoints * experts),
            "anchor": np.repeat(drift["anchor"].to_numpy(), checkpoints * experts),
            "checkpoint": np.tile(np.repeat(drift["checkpoint"].to_numpy(), experts), count),
            "checkpoint_name": np.tile(np.repeat(drift["checkpoint_name"].to_numpy().astype(str), experts), count),
            "site": site or "mean of sites",
            "expert": np.tile(drift["expert"].to_numpy(), count * checkpoints),
            "share": values.ravel(),
        }
    )
    frame = frame[frame["share"].notna()]
    return (frame if probe is None else frame[frame["probe"] == probe]).reset_index(drop=True)


def cell_table(run: Run, checkpoint: int, site: str, probe: str | None = None) -> pd.DataFrame:
    """Return everything measured in one cell of the co-drift map, one row per (task, quantity).

    Args:
        run: the run.
        checkpoint: a recorded checkpoint.
        site: a site.
        probe: a task, or None for every task that is old at ``checkpoint``.

    Returns:
        Columns probe, metric, value, low, high, noise_floor, chance, undefined (reason or None), near_uniform.

    Raises:
        UnknownNameError: the task, checkpoint or site is not in the tables.
    """
    drift = run.drift
    probes = drift["probe"].to_numpy().astype(str)
    _known("site", site, drift["site"].to_numpy().astype(str).tolist())
    _known("checkpoint", str(checkpoint), [str(c) for c in drift["checkpoint"].to_numpy()])
    if probe is None:
        anchors = drift["anchor"].to_numpy()
        chosen = probes[(anchors >= 0) & (anchors < checkpoint)].tolist()
    else:
        _known("task", probe, probes.tolist())
        chosen = [probe]
    columns = ["probe", "metric", "value", "low", "high", "noise_floor", "chance", "undefined", "near_uniform"]
    rows = [_cell(run, name, checkpoint, site, metric) for name in chosen for metric in _DETAIL]
    return pd.DataFrame(rows, columns=columns)


def _cell(run: Run, probe: str, checkpoint: int, site: str, metric: str) -> dict[str, Any]:
    where = {"probe": [probe], "checkpoint": [checkpoint], "site": [site]}
    cell = _dataset(run, metric).sel(where)
    code = int(_like(cell, metric, "reason", np.int64).item())
    return {
        "probe": probe,
        "metric": metric,
        "value": float(cell[metric].item()),
        "low": float(_like(cell, metric, "low").item()),
        "high": float(_like(cell, metric, "high").item()),
        "noise_floor": float(_like(cell, metric, "noise").item()),
        "chance": float(_like(cell, metric, "chance").item()),
        "undefined": REASONS[code] if code else None,
        "near_uniform": bool(run.drift["near_uniform"].sel(where).item()),
    }
