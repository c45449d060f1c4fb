"""SAME's Figure 1d on re-routed runs: what an old task's score is when only the routers are trained again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from driftlens.errors import FormatError, NotFoundError, UnknownNameError
from driftlens.figures.registry import FIGURES, FigureKind
from driftlens.figures.text import finish, interval, number, plain
from driftlens.figures.theme import Theme, theme_of, with_alpha
from driftlens.metrics import bootstrap_mean

if TYPE_CHECKING:
    from driftlens.analysis import Run

__all__ = ["reroute_bars", "reroute_table"]

Measure = Literal["strict", "lenient", "nll"]
_FILES: Final = re.compile(r"reroute/(?P<current>\d+-[^/]+)/(?P<anchor>\d+-[^/]+)\.json")
_STATES: Final = {"anchor": "anchor", "cc": "current", "rerouted": "rerouted", "ac": "old_router"}
"""States of a result file by the column that holds them here; ``ac``: the old router before the current experts."""
_BARS: Final = {"anchor": "when learned", "current": "now", "rerouted": "now, routers retrained on it"}
_TITLES: Final = {"strict": "accuracy", "lenient": "accuracy, lenient", "nll": "answer NLL (nats)"}
_AID = (
    "Three bars per old task: when learned, now, and now with the routers retrained on it before frozen experts. The "
    "rise from the second to the third came back by routing alone; it can exceed what routing lost."
)


def reroute_table(runs: Sequence[Run], *, measure: Measure = "strict") -> pd.DataFrame:
    """Return one row per (run, old task, checkpoint) that ``driftlens reroute`` has finished.

    Args:
        runs: runs with results of ``driftlens reroute``; those without are left out.
        measure: ``"strict"`` or ``"lenient"`` accuracy (0..1), or ``"nll"`` (nats).

    Returns:
        Columns run, method, seed, task, task_index, checkpoint, checkpoint_name, steps, samples, and the means over
        test samples anchor, current, rerouted and old_router (the anchor's router before the current experts, without
        training) with ``_low`` and ``_high``, 95 % bootstrap intervals.

    Raises:
        UnknownNameError: another measure.
        NotFoundError: no run has a result.
        FormatError: a damaged result.
    """
    if measure not in get_args(Measure):
        raise UnknownNameError("measure of re-routing", measure, get_args(Measure))
    rows = [_row(run, file, measure) for run in runs for file in sorted(run.manifest.files) if _FILES.fullmatch(file)]
    if not rows:
        names = ", ".join(str(run.path) for run in runs) or "no run"
        raise NotFoundError(f"No old task was re-routed in {names}. Make results with `driftlens reroute RUN`.")
    return pd.DataFrame(rows)


def _row(run: Run, file: str, measure: Measure) -> dict[str, Any]:
    path, match = run.trusted(file), _FILES.fullmatch(file)
    try:
        content = json.loads(path.read_text("utf-8"))
        values = {column: np.array(content["values"][state][measure], float) for state, column in _STATES.items()}
        steps, task = int(content["settings"]["training"]["steps_per_task"]), str(content["task"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path} is not a result of re-routing that this version reads ({type(error).__name__}: {error}). Make it "
            f"again: `driftlens reroute {run.path} --fresh`."
        ) from error
    assert match is not None  # chosen by this pattern
    current, anchor = match["current"], match["anchor"]
    row: dict[str, Any] = {"run": run.name, "method": run.method, "seed": -1 if run.seed is None else run.seed}
    row |= {"task": task, "task_index": int(anchor.split("-")[0])}
    row |= {"checkpoint": int(current.split("-")[0]), "checkpoint_name": current, "steps": steps}
    row["samples"] = len(values["anchor"])
    for column, scores in values.items():
        mean = bootstrap_mean(scores)
        row |= {column: float(mean.value), f"{column}_low": float(mean.low), f"{column}_high": float(mean.high)}
    return row


def reroute_bars(runs: Sequence[Run], *, measure: Measure = "strict", theme: str = "light") -> go.Figure:
    """Draw one panel per method with three bars per old task, at the last checkpoint that was re-routed.

    Args:
        runs: runs of any methods and seeds over one stream; those without results are named in a note.
        measure: ``"strict"`` or ``"lenient"`` accuracy (0..1), or ``"nll"`` (nats).
        theme: ``"light"`` or ``"dark"``.

    Returns:
        The figure: traces ``"when learned"``, ``"now"``, ``"now, routers retrained on it"`` and ``"old routers put
        back"`` (a mark: the exact swap, without training), behind ``"METHOD, "`` from the second panel on. Bars are
        means over runs; whiskers the range over runs, or the bootstrap interval over samples of a single run.

    Raises:
        UnknownNameError: another measure.
        NotFoundError: no run has a result.
        FormatError: a damaged result.
    """
    look, frame = theme_of(theme), reroute_table(runs, measure=measure)
    frame = frame[frame["checkpoint"] == frame["checkpoint"].max()]
    methods = list(dict.fromkeys(frame["method"]))
    tasks = frame.drop_duplicates("task_index").sort_values("task_index")
    figure = make_subplots(
        rows=1,
        cols=len(methods),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[plain(method, 24) for method in methods],
    )
    figure.update_annotations(font={"size": 12.5, "color": look.ink})
    for column, method in enumerate(methods, start=1):
        for trace in _bars(frame[frame["method"] == method], plain(method, 24), look, first=column == 1):
            figure.add_trace(trace, row=1, col=column)
    figure.update_xaxes(
        tickvals=tasks["task_index"].tolist(),
        ticktext=[plain(name, 14) for name in tasks["task"]],
        tickangle=-40,
        showgrid=False,
    )
    figure.update_yaxes(title_text=_TITLES[measure], rangemode="tozero", nticks=6, col=1)
    if measure != "nll":
        figure.update_yaxes(range=[0, 1.04], tickformat=".0%")
    absent = plain(", ".join(sorted({run.method for run in runs} - set(methods))), 48)
    figure.update_layout(
        barmode="group",
        bargap=0.25,
        bargroupgap=0.06,
        hovermode="closest",
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
    )
    return finish(
        figure,
        look,
        name="reroute_bars",
        title="Old tasks re-routed" + (f" (not: {absent})" if absent else ""),
        reading_aid=_AID,
        metric="nll" if measure == "nll" else "accuracy",
        height=240,
        bottom=18 + 64 + 22 + 14,
        top=24,
    )


def _bars(part: pd.DataFrame, method: str, look: Theme, *, first: bool) -> list[go.Bar | go.Scatter]:
    grouped = part.groupby("task_index", sort=True)
    middle, runs = grouped.mean(numeric_only=True), grouped["run"].count()
    at = middle.index.tolist()
    fills = {"anchor": with_alpha(look.muted, 0.35), "current": look.experts[0], "rerouted": look.experts[1]}
    traces: list[go.Bar | go.Scatter] = []
    for column, label in _BARS.items():
        several = runs.to_numpy() > 1
        low = np.where(several, grouped[column].min(), middle[f"{column}_low"])
        high = np.where(several, grouped[column].max(), middle[f"{column}_high"])
        value = middle[column].to_numpy(np.float64)
        hover = [
            f"<b>{method}</b>, {label}<br>{number(v)} {interval(lo, hi)}<br>mean of {count} runs, {steps:.0f} steps"
            for v, lo, hi, count, steps in zip(value, low, high, runs, middle["steps"], strict=True)
        ]
        traces.append(
            go.Bar(
                name=label if first else f"{method}, {label}",
                legendgroup=column,
                showlegend=first,
                x=at,
                y=value.tolist(),
                marker={"color": fills[column]},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": np.nan_to_num(high - value).tolist(),
                    "arrayminus": np.nan_to_num(value - low).tolist(),
                    "color": look.ink,
                    "thickness": 1,
                    "width": 2,
                },
                hovertext=hover,
                hoverinfo="text",
            )
        )
    traces.append(
        go.Scatter(
            name="old routers put back" if first else f"{method}, old routers put back",
            legendgroup="old_router",
            showlegend=first,
            x=at,
            y=middle["old_router"].tolist(),
            mode="markers",
            marker={"symbol": "diamond-open", "size": 9, "color": look.ink, "line": {"width": 1.6}},
            hovertemplate=f"<b>{method}</b>, old routers before the current experts<br>%{{y:.3f}}<extra></extra>",
        )
    )
    return traces


FIGURES.register("reroute_bars", FigureKind(reroute_bars, reroute_table, subject="runs"))
