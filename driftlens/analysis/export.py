"""All tables of a run as files for other tools: parquet, CSV or netCDF, with what every number means.

netCDF: one file ``NAME.nc`` with a group per table; ``xarray.open_datatree(path, engine="h5netcdf")`` gives back the
arrays of `Run`. parquet and CSV: one tidy file per table. Beside them ``export.json``: which run, which versions, every
file with its columns and their definitions, and what could not be exported and why.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import pandas as pd
import xarray as xr

from driftlens.analysis.attribution import attribution_rows
from driftlens.analysis.cache import write_table
from driftlens.analysis.comparison import compare
from driftlens.analysis.csvtext import csv_text
from driftlens.analysis.datasets import attributes
from driftlens.analysis.frames import Level, check_level
from driftlens.analysis.frames import table as drift_table
from driftlens.analysis.run import Run, open_run
from driftlens.errors import ConfigError, NotFoundError, StorageError, UnknownNameError
from driftlens.store import atomic_folder

__all__ = ["FORMATS", "comparison_dataset", "export_frames", "export_run", "export_tree"]

FORMATS: Final = ("parquet", "netcdf", "csv")

_BY_SITE: Final = ("drift", "codrift", "subspaces", "importance")
_BY_PROBE: Final = ("summary", "trend")
_VERSIONS: Final = ("driftlens", "numpy", "pandas", "xarray", "h5py", "h5netcdf", "pyarrow")
_LABELS: Final[Mapping[str, str]] = {
    "run": "name of the run",
    "method": "name of the continual-learning method",
    "seed": "training seed, -1 if unknown",
    "probe": "probe, by its task",
    "task": "task of the stream",
    "task_index": "position of the task in the stream, from 1",
    "anchor": "checkpoint that drift is measured from; -1 if it was not recorded",
    "checkpoint": "checkpoint index: 0 before the first task, t after task t",
    "checkpoint_name": "folder name of the checkpoint",
    "old": "the checkpoint lies after the probe's anchor",
    "site": "module where routing and pathways were observed",
    "metric": "name of the measure; the columns value, low, high, noise_floor and chance are of it",
    "value": "value of the measure, in its units",
    "low": "lower end of the 95 % bootstrap interval over samples",
    "high": "upper end of it",
    "noise_floor": "the same measure between two recordings of one checkpoint",
    "chance": "value under chance, where there is one",
    "undefined": "why the value is undefined",
    "within_run": "comparable along one training run only",
    "near_uniform": "the gate hardly routes, so its small drift says nothing",
    "strict": "exact answer",
    "lenient": "right but for case, punctuation or articles",
    "nll": "negative log-likelihood per answer token, nats",
}


def export_run(
    run: Run | str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "parquet",
    *,
    level: Level = "probe",
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Write all tables of a run into a folder, completely or not at all.

    Args:
        run: the run, or its folder.
        out: the folder; its parent must exist, and it may not lie in the run's own.
        to: "parquet", "netcdf" or "csv".
        level: "probe" leaves out the tables by site, expert and pathway; "site" has everything.
        overwrite: replace an existing folder.

    Returns:
        One row per file: file, rows (0 for netCDF), columns (variables for netCDF), bytes.

    Raises:
        ConfigError: another format or level, or a folder inside the run.
        NotFoundError: neither scores nor recordings.
        StorageError: the folder exists, or with ``overwrite`` is not one that an export wrote; or the disk refuses.
    """
    if to not in FORMATS:
        raise UnknownNameError("format", to, FORMATS)
    check_level(level)
    run = run if isinstance(run, Run) else open_run(run)
    target = Path(out)
    if target.resolve().is_relative_to(run.path.resolve()):
        raise ConfigError(
            f"{target} lies inside the run {run.path}, whose files are those that its manifest lists. "
            "Choose a folder elsewhere."
        )
    if overwrite:
        _check_replaceable(target)
    missing: dict[str, str] = {}
    about: dict[str, Any] = {"run": _identity(run), "format": to, "level": level, "versions": _versions()}
    if to == "netcdf":
        tree = export_tree(run, level=level, missing=missing)
    else:
        frames = export_frames(run, level=level, missing=missing)
    rows: list[dict[str, Any]] = []
    with atomic_folder(target, overwrite=overwrite) as partial:
        if to == "netcdf":
            name = f"{_file_name(run)}.nc"
            _write_tree(tree, partial / name, {**about["run"], "versions": about["versions"]})
            columns: dict[str, Any] = {
                f"{group}/{variable}": dict(array.attrs)
                for group, node in tree.children.items()
                for variable, array in node.data_vars.items()
            }
            rows.append({"file": name, "rows": 0, "columns": len(columns)})
            about["files"] = {name: {"columns": columns}}
        else:
            about["files"] = {}
            for table, frame in frames.items():
                name = f"{table}.{to}"
                columns = {str(column): _describe(str(column)) for column in frame.columns}
                about["files"][name] = {"rows": len(frame), "columns": columns}
                _write_frame(frame, partial / name, {**about["run"], "columns": columns})
                rows.append({"file": name, "rows": len(frame), "columns": len(columns)})
            about["measures"] = {name: _plain_attributes(name) for name in sorted(_measures(frames))}
        about["missing"] = missing
        (partial / "export.json").write_text(
            json.dumps(about, indent=1, ensure_ascii=False, default=str) + "\n", "utf-8"
        )
        for row in rows:
            row["bytes"] = (partial / row["file"]).stat().st_size
    return rows


def _check_replaceable(target: Path) -> None:
    """Raise StorageError unless ``target`` is absent, empty, or holds an export and nothing else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    found = sorted(path.name for path in target.iterdir()) if target.is_dir() else [target.name]
    listing = target / "export.json"
    known = {listing.name}
    if target.is_dir() and listing.is_file():
        with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            known |= set(json.loads(listing.read_text("utf-8"))["files"])
    foreign = [name for name in found if name not in known]
    if foreign or not listing.is_file():
        raise StorageError(
            f"{target} is not replaced: it holds what no export wrote ({', '.join((foreign or found)[:5])}). Only a "
            "folder of an earlier export is replaced; choose another --out, or delete it yourself."
        )


def export_frames(
    run: Run, *, level: Level = "probe", missing: dict[str, str] | None = None
) -> dict[str, pd.DataFrame]:
    """Return the tables of a run as tidy frames by name.

    Args:
        run: the run.
        level: as in `export_run`.
        missing: filled with what there is not, and why.

    Returns:
        ``drift`` (one row per probe, checkpoint and measure), ``trend``, ``scores``, ``samples`` (every answer),
        ``train_log``, ``stream_...``, ``attribution``; at level "site" ``drift_site`` and ``subspaces_by_...``,
        ``importance_by_...``, ``load`` as well. Only those that the run has.

    Raises:
        NotFoundError: neither scores nor recordings.
    """
    absent = {} if missing is None else missing
    result: dict[str, pd.DataFrame] = {}
    if _has(run, "scores", absent):
        result["scores"] = _wide(run.scores)
        result["samples"] = run.score_table.reset_index(drop=True)
        result |= _by_dims("stream", run.stream)
    if run.manifest.lists("train_log.parquet"):
        result["train_log"] = run.train_log.reset_index(drop=True)
    else:
        absent["train_log"] = "the run has no train_log.parquet"
    if _has(run, "recordings", absent):
        result["drift"] = drift_table(run, "probe")
        result["trend"] = _wide(run.trend)
        if level == "site":
            result["drift_site"] = drift_table(run, "site")
            result["load"] = _wide(run.drift[["load"]])
            result |= _by_dims("subspaces", run.subspaces) | _by_dims("importance", run.importance)
    if _has(run, "attribution", absent):
        result["attribution"] = pd.DataFrame(attribution_rows(run.attribution))
    _refuse_nothing(run, result)
    return result


def export_tree(run: Run, *, level: Level = "probe", missing: dict[str, str] | None = None) -> xr.DataTree:
    """Return the tables of a run as one tree of datasets; arguments and errors as in `export_frames`.

    Returns:
        Groups ``scores``, ``stream``, ``summary``, ``trend``, ``attribution``, at level "site" also ``drift``,
        ``codrift``, ``subspaces``, ``importance``. Only those that the run has.
    """
    absent = {} if missing is None else missing
    result: dict[str, xr.Dataset] = {}
    if _has(run, "scores", absent):
        result |= {"scores": run.scores, "stream": run.stream}
    if _has(run, "recordings", absent):
        names = (*_BY_PROBE, *(_BY_SITE if level == "site" else ()))
        result |= {name: getattr(run, name) for name in names}
    if _has(run, "attribution", absent):
        result["attribution"] = run.attribution
    _refuse_nothing(run, result)
    return xr.DataTree.from_dict(result)


def comparison_dataset(runs: Iterable[Run | str | os.PathLike[str]], *, strict: bool = True) -> xr.Dataset:
    """Return `compare` as labelled arrays, with the scores of every task and the drift of every probe beside it.

    Args:
        runs: runs, or paths of run folders.
        strict: as in `compare`.

    Returns:
        Along ``run``: every column of `compare`. ``strict``, ``lenient``, ``nll`` (run, checkpoint, task), where runs
        were scored; ``NAME_by_probe`` (run, probe, checkpoint) of every measure of `Run.summary`, where they were
        recorded. NaN where a run has no such cell. Coordinates method, seed, path by run.

    Raises:
        ProbeError: different streams or probes, with ``strict``.
        ConfigError: no run.
    """
    opened = [entry if isinstance(entry, Run) else open_run(entry) for entry in runs]
    frame = compare(opened, strict=strict)
    label = pd.Index(frame["run"] if frame["run"].is_unique else frame["path"], name="run")
    variables: dict[str, Any] = {}
    for name in frame.columns.drop("run"):
        values = frame[name].to_numpy()
        values = values.astype(np.str_) if values.dtype.kind in "OUT" else values
        variables[str(name)] = (("run",), values, _plain_attributes(str(name)))
    result = xr.Dataset(variables, {"run": label.to_numpy().astype(np.str_)})
    result = result.set_coords(["method", "seed", "path"])
    scored = [
        run.scores[["strict", "lenient", "nll"]] if run.manifest.lists("scores.parquet") else None for run in opened
    ]
    drifted = [run.summary if run.recorded else None for run in opened]
    for tables, suffix in ((scored, ""), (drifted, "_by_probe")):
        present = [
            (name, table) for name, table in zip(result["run"].to_numpy(), tables, strict=True) if table is not None
        ]
        if not present:
            continue
        along = pd.Index([name for name, _ in present], name="run")
        merged = xr.concat([table.reset_coords(drop=True) for _, table in present], dim=along, join="outer")
        result = result.merge(merged.rename({name: f"{name}{suffix}" for name in merged.data_vars}), join="left")
    return result


def _has(run: Run, what: str, absent: dict[str, str]) -> bool:
    if what == "attribution":
        try:
            return bool(run.attribution.sizes)
        except NotFoundError as error:
            absent[what] = str(error)
            return False
    there = bool(run.recorded) if what == "recordings" else run.manifest.lists("scores.parquet")
    if not there:
        absent[what] = "the run was not recorded" if what == "recordings" else "the run was not scored"
    return there


def _refuse_nothing(run: Run, tables: Mapping[str, Any]) -> None:
    if not set(tables) - {"train_log"}:
        raise NotFoundError(
            f"{run.path} has neither scores nor recordings: there is nothing to export. Train it with "
            f"`driftlens train ... --resume`, or record it with `driftlens record --run {run.path}`."
        )


def _wide(table: xr.Dataset) -> pd.DataFrame:
    """One row per cell, labels first; text as text."""
    if not table.sizes:
        return pd.DataFrame({str(name): [array.item()] for name, array in table.data_vars.items()})
    frame = table.to_dataframe().reset_index()
    labels = [str(name) for name in (*table.sizes, *table.coords) if name in frame]
    order = list(dict.fromkeys(labels))
    return frame[[*order, *(name for name in frame.columns if name not in order)]]


def _by_dims(name: str, table: xr.Dataset) -> dict[str, pd.DataFrame]:
    """One frame per set of axes: a table that mixed them would repeat numbers."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for variable, array in table.data_vars.items():
        groups.setdefault(tuple(str(dim) for dim in array.dims), []).append(str(variable))
    return {
        "_".join([name, *(["by"] if dims else []), *dims]): _wide(table[variables])
        for dims, variables in groups.items()
    }


def _write_tree(tree: xr.DataTree, path: Path, about: Mapping[str, Any]) -> None:
    # As the analysis is cached: hundreds of small variables take ten times longer through xarray's own writer.
    with h5py.File(path, "x", libver=("v110", "v110"), locking=False) as file:
        for name, node in tree.children.items():
            group = file.create_group(name)
            table = node.to_dataset()
            write_table(group, table)
            group.attrs.update({str(key): _attribute(value) for key, value in table.attrs.items()})
        file.attrs.update({key: _attribute(value) for key, value in about.items()})


def _attribute(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if value is None:
        return ""
    return value if isinstance(value, (str, int, float, np.ndarray, np.generic)) else json.dumps(value)


def _write_frame(frame: pd.DataFrame, path: Path, about: Mapping[str, Any]) -> None:
    plain = frame.copy()
    plain.attrs = {}
    for name in plain.columns:
        if plain[name].dtype == object and any(isinstance(value, (list, dict)) for value in plain[name]):
            plain[name] = [json.dumps(value, default=str) for value in plain[name]]
    if path.suffix == ".csv":
        path.write_text(csv_text(plain), encoding="utf-8")
        return
    plain.attrs = {"driftlens": json.dumps(about, default=str)}
    plain.to_parquet(path, index=False)


def _measures(frames: Mapping[str, pd.DataFrame]) -> set[str]:
    found = {str(name) for frame in frames.values() for name in frame.columns}
    for frame in frames.values():
        if "metric" in frame:
            found |= {str(name) for name in frame["metric"].unique()}
    return {name for name in found if "definition" in attributes(name)}


def _plain_attributes(name: str) -> dict[str, Any]:
    return {key: value for key, value in attributes(name).items() if value not in ("", None)}


def _describe(name: str) -> str:
    if name in _LABELS:
        return _LABELS[name]
    for ending in ("low", "high", "noise", "chance"):
        if name.endswith(f"_{ending}"):
            column = "noise_floor" if ending == "noise" else ending
            return f"{attributes(name.removesuffix(f'_{ending}'))['long_name']}: {_LABELS[column]}"
    return str(attributes(name)["long_name"])


def _identity(run: Run) -> dict[str, Any]:
    manifest = run.manifest
    return {
        "name": run.name,
        "method": run.method,
        "seed": run.seed,
        "tasks": list(run.tasks),
        "complete": run.complete,
        "checkpoints": [point.name for point in run.checkpoints],
        "stream_sha256": manifest.stream_sha256,
        "probes_sha256": manifest.probes_sha256,
        "config_hash": manifest.config_hash,
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _VERSIONS}


def _file_name(run: Run) -> str:
    kept = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in run.name)
    return kept.lstrip(".") or "run"
