"""Scores of a run as labelled arrays: accuracy and likelihood of every task after every task (metrics.md section 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr

from driftlens.errors import FormatError, NotFoundError
from driftlens.metrics import MEASURES, format_share, stream_scores

__all__ = ["SCORE_COLUMNS", "read_scores", "read_train_log", "score_arrays", "stream_summary"]

SCORE_COLUMNS: Final = (
    "checkpoint",
    "checkpoint_name",
    "task",
    "task_index",
    "sample",
    "prediction",
    "reference",
    "strict",
    "lenient",
    "nll",
)
"""Columns of scores.parquet, one row per (checkpoint, task, sample)."""

_SCORERS: Final = ("strict", "lenient")
_STREAM_NAMES: Final = ("AP", "MAA", "MFT", "BWT_T", "BWT_T-1", "forgetting_max", "FWT")


def _read_parquet(path: Path, needed: tuple[str, ...]) -> pd.DataFrame:
    if not path.is_file():
        raise NotFoundError(
            f"{path} does not exist: the run has not been scored. Finish it with `driftlens train ... --resume`."
        )
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these two
        raise FormatError(
            f"{path} is not a readable parquet file ({error}). Restore it or train with --resume."
        ) from error
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise FormatError(
            f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}."
        )
    return frame


def read_scores(path: Path) -> pd.DataFrame:
    """Read scores.parquet: one row per (checkpoint, task, sample), columns `SCORE_COLUMNS`.

    Raises:
        NotFoundError: no such file.
        FormatError: no parquet file, or columns missing.
    """
    return _read_parquet(path, SCORE_COLUMNS)


def read_train_log(path: Path) -> pd.DataFrame:
    """Read train_log.parquet: one row per logged step; raises as `read_scores`."""
    return _read_parquet(path, ("task_index", "task", "step", "loss"))


def score_arrays(frame: pd.DataFrame) -> xr.Dataset:
    """Average samples: dims (checkpoint, task), tasks in stream order.

    Args:
        frame: as `read_scores` returns it.

    Returns:
        ``strict`` and ``lenient`` (accuracy, 0..1), ``nll`` (mean answer-token negative log-likelihood, nats) and
        ``n`` (number of samples); NaN (n = 0) where a task was not scored at a checkpoint.
    """
    order = frame[["task_index", "task"]].drop_duplicates().sort_values("task_index")
    names = frame[["checkpoint", "checkpoint_name"]].drop_duplicates("checkpoint").sort_values("checkpoint")
    variables: dict[str, Any] = {}
    for column, title, units in (
        ("strict", "share of exact answers", "1"),
        ("lenient", "share of answers that are right but for case, punctuation or articles", "1"),
        ("nll", "mean negative log-likelihood per answer token", "nats"),
    ):
        table = frame.assign(value=frame[column].astype(float)).pivot_table(
            values="value", index="checkpoint", columns="task", aggfunc="mean"
        )
        values = table.reindex(index=names["checkpoint"], columns=order["task"]).to_numpy(np.float64)
        variables[column] = (("checkpoint", "task"), values, {"long_name": title, "units": units, "section": "5"})
    count = frame.pivot_table(values="strict", index="checkpoint", columns="task", aggfunc="count")
    count = count.reindex(index=names["checkpoint"], columns=order["task"]).fillna(0)
    variables["n"] = (("checkpoint", "task"), count.to_numpy(np.int64), {"long_name": "samples", "units": "1"})
    return xr.Dataset(
        variables,
        coords={
            "checkpoint": names["checkpoint"].to_numpy(np.int64),
            "checkpoint_name": ("checkpoint", names["checkpoint_name"].to_numpy(np.str_)),
            "task": order["task"].to_numpy(np.str_),
            "task_index": ("task", order["task_index"].to_numpy(np.int64)),
        },
    )


def stream_summary(scores: xr.Dataset) -> xr.Dataset:
    """Summarise a stream under the strict and the lenient scorer.

    A stream that was stopped early is summarised over the tasks it has learned; their number is ``tasks_learned``.

    Args:
        scores: as `score_arrays` returns it.

    Returns:
        ``AP``, ``MAA``, ``MFT``, ``BWT_T``, ``BWT_T-1``, ``forgetting_max``, ``FWT`` along ``scorer``;
        ``task_forgetting`` (scorer, task) = a[j,j] - a[T,j]; ``format_share`` = the part of the strict forgetting (mean
        over tasks that have a successor) that the lenient scorer does not see, and ``format_share_by_task``. NaN
        where nothing was forgotten, or where a definition needs more tasks than were learned.
    """
    tasks = scores.sizes["task"]
    done = set(scores["checkpoint"].to_numpy().tolist())
    learned = next(count for count in range(tasks + 1) if count == tasks or count + 1 not in done)
    table = scores.reindex(checkpoint=np.arange(learned + 1)).isel(task=slice(0, learned))
    matrices = [table[scorer].to_numpy() for scorer in _SCORERS]
    columns = [stream_scores(matrix) if learned else dict.fromkeys(_STREAM_NAMES, np.nan) for matrix in matrices]
    forgetting, by_task = np.full((len(_SCORERS), tasks), np.nan), np.full(tasks, np.nan)
    overall, index = np.nan, np.arange(learned)
    if learned:
        for row, matrix in enumerate(matrices):
            forgetting[row, :learned] = matrix[index + 1, index] - matrix[learned, index]
        lost = format_share(*matrices)
        by_task[:learned], overall = lost.per_task, lost.overall
    return xr.Dataset(
        {
            **{name: (("scorer",), [column[name] for column in columns], _about(name)) for name in _STREAM_NAMES},
            "task_forgetting": (("scorer", "task"), forgetting, {"long_name": "a[j,j] - a[T,j]", "units": "1"}),
            "format_share": ((), overall, _about("format_share")),
            "format_share_by_task": (("task",), by_task, _about("format_share")),
            "tasks_learned": ((), learned, {"units": "1"}),
        },
        coords={"scorer": list(_SCORERS), "task": scores["task"], "task_index": scores["task_index"]},
    )


def _about(name: str) -> dict[str, str]:
    entry = MEASURES[name]
    return {"long_name": entry.title, "definition": entry.formula, "units": "1", "section": entry.section}
