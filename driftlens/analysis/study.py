"""What happened to every old task, and every drift measure beside it: the rows of the validity study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr

from driftlens.analysis.attribution import attribution_rows
from driftlens.analysis.frames import metric_names
from driftlens.analysis.frames import table as drift_table
from driftlens.analysis.run import Run
from driftlens.analysis.simple import SIMPLE_BY_SITE, average_simple, simple_of_sites
from driftlens.analysis.variants import VARIANTS, average_variants, raw_names, variants_of_sites
from driftlens.analysis.walk import OldPair, measure_pairs
from driftlens.errors import NotFoundError
from driftlens.metrics.arrays import FloatArray, as_float

__all__ = ["ATTRIBUTED", "DIFFICULTY", "TARGETS", "validity_rows"]

TARGETS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "lost_strict": "strict accuracy at the anchor minus now",
        "lost_lenient": "lenient accuracy at the anchor minus now",
        "nll_rise": "answer NLL now minus at the anchor, nats per token",
    }
)
"""Forgetting, three times; positive where the task got worse."""

DIFFICULTY: Final[Mapping[str, str]] = MappingProxyType(
    {
        "learned": "strict accuracy of the task at its anchor, a[j,j]: what there was to lose",
        "initial_nll": "answer NLL of the task before the first task: how far it was from what the base model knew",
        "since": "number of tasks learned since the anchor",
    }
)
"""What a correlation may be held against; all known without any drift measure."""

ATTRIBUTED: Final = tuple(
    [f"ledger_{part}" for part in ("router", "experts")]
    + [f"phi_{part}_{score}" for score in ("strict", "lenient", "nll") for part in ("router", "experts")]
)
"""Parts of the forgetting that attribution books, named as in `attribution_rows`."""


def validity_rows(run: Run, variants: Iterable[str] = VARIANTS) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return what one run adds to the study.

    Args:
        run: a scored and recorded run.
        variants: names of variants of co-drift and impact to add.

    Returns:
        One row per old task and later checkpoint that were scored and recorded: run, method, seed, task, anchor,
        checkpoint, checkpoint_name, samples, `TARGETS`, `DIFFICULTY`, near_uniform_share, then every measure and
        ``MEASURE_noise``, its noise floor, where there is one; and why measures are undefined in all rows, by name.

    Raises:
        NotFoundError: no scores, or no recordings.
    """
    scores = run.scores
    tidy = drift_table(run, "probe")
    tidy = tidy[tidy["old"]]
    labels = ["run", "method", "seed", "probe", "anchor", "checkpoint", "checkpoint_name"]
    wide = tidy.pivot_table(index=labels, columns="metric", values=["value", "noise_floor"], dropna=False, sort=False)
    rows = tidy[labels].drop_duplicates(ignore_index=True)
    by_pair = rows.set_index(labels).index
    values = {name: wide["value"][name].reindex(by_pair).to_numpy() for name in metric_names() if name in wide["value"]}
    floors = {
        name: wide["noise_floor"][name].reindex(by_pair).to_numpy() for name in values if name in wide["noise_floor"]
    }
    undefined = {
        str(name): str(part["undefined"].iloc[0])
        for name, part in tidy.groupby("metric", sort=False)
        if len(part) and part["value"].isna().all()
    }
    rows["near_uniform_share"] = _at(run.summary["near_uniform_share"], rows)
    for table in _beside(run, list(variants)):
        for name in table.data_vars:
            if str(name).endswith("_noise"):
                floors[str(name).removesuffix("_noise")] = table[name].sel(probe=xr.DataArray(rows["probe"])).to_numpy()
            else:
                values[str(name)] = _at(table[name], rows)
                if "undefined" in table[name].attrs:
                    undefined[str(name)] = table[name].attrs["undefined"]
    rows = rows.rename(columns={"probe": "task"})
    scored = _forgetting(scores, rows)
    context = rows.pop("near_uniform_share")
    rows = pd.concat([rows, scored, context], axis=1)
    known = {f"{name}_noise": floor for name, floor in floors.items() if name in values and np.isfinite(floor).any()}
    measured = pd.DataFrame({**values, **_attributed(run, rows), **known}, index=rows.index)
    whole = pd.concat([rows, measured], axis=1)
    return whole[whole["samples"] > 0].reset_index(drop=True), undefined


def _at(array: xr.DataArray, rows: pd.DataFrame) -> FloatArray:
    """Pick (probe, checkpoint) of every row; NaN where the table does not have it."""
    where = {axis: xr.DataArray(rows[axis].to_numpy(), dims="row") for axis in ("probe", "checkpoint")}
    return as_float(array.sel(where).to_numpy())


def _beside(run: Run, variants: Sequence[str]) -> tuple[xr.Dataset, xr.Dataset]:
    """Measure simple measures and variants in one walk through the recordings."""

    def both(pair: OldPair) -> dict[str, FloatArray]:
        return simple_of_sites(pair) | variants_of_sites(pair)

    table, sites = measure_pairs(run, [*SIMPLE_BY_SITE, *raw_names()], both)
    return average_simple(run, table), average_variants(table, sites, variants)


def _forgetting(scores: xr.Dataset, rows: pd.DataFrame) -> pd.DataFrame:
    """`TARGETS`, `DIFFICULTY` and samples of every row; NaN, and 0 samples, where a score is missing."""
    full = scores.reindex(
        task=sorted({*scores["task"].to_numpy().tolist(), *rows["task"]}),
        checkpoint=sorted({0, *scores["checkpoint"].to_numpy().tolist(), *rows["checkpoint"], *rows["anchor"]}),
    )

    def pick(name: str, checkpoint: Any) -> FloatArray:
        points = xr.DataArray(np.broadcast_to(np.asarray(checkpoint), len(rows)), dims="row")
        return as_float(full[name].sel(task=xr.DataArray(rows["task"].to_numpy(), dims="row"), checkpoint=points))

    anchor, now = rows["anchor"].to_numpy(), rows["checkpoint"].to_numpy()
    samples = np.nan_to_num(np.minimum(pick("n", anchor), pick("n", now)))
    return pd.DataFrame(
        {
            "samples": samples.astype(np.int64),
            "lost_strict": pick("strict", anchor) - pick("strict", now),
            "lost_lenient": pick("lenient", anchor) - pick("lenient", now),
            "nll_rise": pick("nll", now) - pick("nll", anchor),
            "learned": pick("strict", anchor),
            "initial_nll": pick("nll", 0),
            "since": as_float(now - anchor),
        },
        index=rows.index,
    )


def _attributed(run: Run, rows: pd.DataFrame) -> dict[str, FloatArray]:
    """The ledger's and the swaps' parts where the run was attributed: they need the model, so they are no drift."""
    try:
        found = {(row["task"], row["checkpoint"]): row for row in attribution_rows(run.attribution)}
    except NotFoundError:
        return {}
    cells = [found.get(key, {}) for key in zip(rows["task"], rows["checkpoint"], strict=True)]
    result = {name: as_float([np.nan if (v := cell.get(name)) is None else v for cell in cells]) for name in ATTRIBUTED}
    return {name: values for name, values in result.items() if np.isfinite(values).any()}
