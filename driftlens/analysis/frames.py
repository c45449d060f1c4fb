"""Tables as data frames and as plain rows: every number with its interval, noise floor, chance and context."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import pandas as pd
import xarray as xr

from driftlens.analysis.datasets import attributes
from driftlens.analysis.families import FAMILIES, REASONS
from driftlens.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from driftlens.analysis.run import Run

__all__ = ["STATIC", "check_level", "metric_names", "summarise", "table"]

Level = Literal["probe", "site"]

STATIC: Final = (
    "subspace_overlap",
    "subspace_overlap_adjusted",
    "grassmann_distance",
    "active_overlap",
    "active_rank",
    "output_overlap",
    "rank_importance",
    "importance_concentration",
    "importance_gini",
    "rank_update_a",
    "rank_update_b",
    "rank_update_a_correlation",
    "rank_update_b_correlation",
)
"""Measures of section 2, averaged over experts and pathways here; from weights and exact sums, so without interval."""

_COMPANIONS: Final = ("low", "high", "noise", "chance")


def metric_names() -> list[str]:
    """Return the names of all measures that the tables hold, in their order."""
    families = sorted((FAMILIES.get(key) for key in FAMILIES), key=lambda family: family.table != "drift")
    return [name for family in families for name in family.measures] + list(STATIC)


def _static(run: Run) -> xr.Dataset:
    """Return the measures of section 2 by probe, checkpoint and site."""
    merged = run.subspaces.merge(run.importance, compat="override")
    chosen = [*STATIC, "subspace_overlap_chance", "output_overlap_chance"]
    inner = [axis for axis in ("expert", "rank_index") if axis in merged.dims]
    return merged[chosen].mean(inner, keep_attrs=True) if inner else merged[chosen]


def _cells(run: Run, level: Level) -> xr.Dataset:
    """Return every measure, companion and context by probe and checkpoint, and by site for that level."""
    static = _static(run)
    if level == "site":
        # What differs between the tables is variables, not coordinates.
        return run.drift.drop_dims("expert").merge(run.codrift, compat="override").merge(static, compat="override")
    merged = run.summary.merge(static.mean("site", keep_attrs=True), compat="override")
    reasons = run.drift.drop_dims("expert").merge(run.codrift, compat="override")
    for name in metric_names():
        if f"{name}_reason" in reasons:
            merged[f"{name}_reason"] = (("probe", "checkpoint"), _commonest(reasons[f"{name}_reason"]))
    return merged


def _commonest(codes: xr.DataArray) -> np.ndarray:
    """Return the most frequent reason over sites; DEFINED where any site is defined, as the mean is then."""
    values = codes.transpose("probe", "checkpoint", "site").to_numpy()
    counts = (values[..., None] == np.array(list(REASONS))).sum(axis=-2)
    chosen: np.ndarray = np.array(list(REASONS))[counts.argmax(axis=-1)]
    return np.where((values == 0).any(axis=-1), 0, chosen).astype(np.uint8)


def _flat(data: xr.Dataset, name: str, dims: Sequence[str], fill: Any = np.nan) -> np.ndarray:
    """Return a variable as a flat array over ``dims``; ``fill`` where the table does not have it."""
    sizes = [data.sizes[axis] for axis in dims]
    if name not in data:
        return np.full(int(np.prod(sizes)), fill)
    array = data[name]
    missing = {axis: data.sizes[axis] for axis in dims if axis not in array.dims}
    return array.expand_dims(missing).transpose(*dims).to_numpy().ravel()


def _labels(run: Run, data: xr.Dataset, dims: Sequence[str]) -> dict[str, np.ndarray]:
    size = int(np.prod([data.sizes[axis] for axis in dims]))
    seed = -1 if run.seed is None else run.seed
    columns = {
        "run": np.full(size, run.name, dtype=object),
        "method": np.full(size, run.method, dtype=object),
        "seed": np.full(size, seed),
    }
    names = ["probe", "anchor", "checkpoint", "checkpoint_name"]
    for name in [*names, "site", "layer", "kind"] if "site" in dims else names:
        values = _flat(data.reset_coords(), name, dims) if name not in dims else _flat(data, name, dims)
        columns[name] = values.astype(object) if values.dtype.kind in "UST" else values
    columns["old"] = (columns["anchor"] >= 0) & (columns["checkpoint"] > columns["anchor"])
    return columns


def _near_uniform(data: xr.Dataset, dims: Sequence[str]) -> np.ndarray:
    if "site" in dims:
        return _flat(data, "near_uniform", dims).astype(bool)
    return _flat(data, "near_uniform_share", dims) > 0.5


def check_level(level: str) -> None:
    """Refuse another level than "probe" and "site" with a ConfigError."""
    if level not in ("probe", "site"):
        raise ConfigError(f"Unknown level {level!r}; choose 'probe' (averaged over sites) or 'site'.")


def _check(level: str, metrics: Iterable[str] | None) -> list[str]:
    check_level(level)
    known = metric_names()
    chosen = known if metrics is None else list(metrics)
    for name in chosen:
        if name not in known:
            raise UnknownNameError("measure", name, known)
    return chosen


def table(run: Run, level: Level = "probe", metrics: Iterable[str] | None = None) -> pd.DataFrame:
    """Return one row per (probe, checkpoint, measure), or per (probe, checkpoint, site, measure).

    Args:
        run: the run.
        level: ``"probe"`` averages over sites.
        metrics: names of measures; None for all.

    Returns:
        Columns run, method, seed (-1 if unknown), probe, anchor, checkpoint, checkpoint_name, (site, layer, kind,) old
        (the checkpoint lies after the anchor), metric, value, low, high, noise_floor, chance, specialisation,
        gate_entropy, near_uniform (at probe level: of most sites), undefined (the reason, or None) and within_run
        (comparable along this run only).

    Raises:
        ConfigError: another level.
        UnknownNameError: no such measure.
    """
    chosen = _check(level, metrics)
    data = _cells(run, level)
    dims = ("probe", "checkpoint", "site") if level == "site" else ("probe", "checkpoint")
    shared = _labels(run, data, dims)
    context = {name: _flat(data, name, dims) for name in ("specialisation", "gate_entropy")}
    context["near_uniform"] = _near_uniform(data, dims)
    frames = []
    for name in chosen:
        value = _flat(data, name, dims)
        columns = dict(shared) | {"metric": np.full(value.size, name, dtype=object), "value": value}
        columns |= {key: _flat(data, f"{name}_{key}", dims) for key in _COMPANIONS}
        columns["noise_floor"] = columns.pop("noise")
        columns["chance"] = columns.pop("chance")
        columns |= context
        columns["undefined"] = _reasons(data, name, dims, value)
        columns["within_run"] = np.full(value.size, bool(attributes(name).get("within_run", 0)))
        frames.append(pd.DataFrame(columns))
    whole = pd.concat(frames, ignore_index=True)
    # pandas would turn the absent reasons into NaN.
    whole["undefined"] = pd.Series([None if pd.isna(text) else text for text in whole["undefined"]], dtype=object)
    return whole


def _reasons(data: xr.Dataset, name: str, dims: Sequence[str], value: np.ndarray) -> np.ndarray:
    codes = _flat(data, f"{name}_reason", dims, fill=0).astype(int)
    texts = [
        (REASONS[code] if code else _static_reason(name)) if math.isnan(number) else None
        for code, number in zip(codes.tolist(), value.tolist(), strict=True)
    ]
    return np.array(texts, dtype=object)


def _static_reason(name: str) -> str:
    if name.endswith("_correlation"):
        return "no pathway was updated, or all by the same share"
    return str(attributes(name).get("undefined", "a quantity that it needs was not recorded"))


def summarise(run: Run, level: Level = "probe", metrics: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Return one plain row per (probe, checkpoint), or per (probe, checkpoint, site), ready for JSON.

    Args:
        run: the run.
        level: ``"probe"`` averages over sites.
        metrics: names of measures; None for all.

    Returns:
        Dicts with the labels of `table`, then for every measure NAME, NAME_low, NAME_high, NAME_noise and (where one
        exists) NAME_chance, the context gate_entropy, load_entropy, specialisation, near_uniform(_share), and the lists
        ``undefined`` ("NAME: reason") and ``within_run`` (names). Undefined numbers are None.
    """
    chosen = _check(level, metrics)
    data = _cells(run, level)
    dims = ("probe", "checkpoint", "site") if level == "site" else ("probe", "checkpoint")
    columns: dict[str, np.ndarray] = _labels(run, data, dims)
    reasons = []
    for name in chosen:
        columns[name] = _flat(data, name, dims)
        keys = [key for key in _COMPANIONS if f"{name}_{key}" in data]
        columns |= {f"{name}_{key}": _flat(data, f"{name}_{key}", dims) for key in keys}
        reasons.append((name, _reasons(data, name, dims, columns[name])))
    context = ["gate_entropy", "load_entropy", "specialisation"]
    for name in [*context, "near_uniform" if level == "site" else "near_uniform_share"]:
        columns[name] = _flat(data, name, dims)
    within = [name for name in chosen if attributes(name).get("within_run", 0)]
    rows = []
    for number in range(len(columns["run"])):
        row: dict[str, Any] = {name: _plain(values[number]) for name, values in columns.items()}
        row["undefined"] = [f"{name}: {texts[number]}" for name, texts in reasons if texts[number] is not None]
        rows.append(row | {"within_run": within})
    return rows


def _plain(value: Any) -> Any:
    """Turn a numpy scalar into what JSON knows; NaN and infinity have no place there."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
