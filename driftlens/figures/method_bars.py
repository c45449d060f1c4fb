"""Methods side by side: the headline numbers of several runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from driftlens.errors import UnknownNameError
from driftlens.figures.registry import FIGURES, FigureKind
from driftlens.figures.text import finish, interval, number, plain
from driftlens.figures.theme import Theme, method_colour, theme_of

__all__ = ["BAR_METRICS", "method_bars"]

BAR_METRICS = {
    "AP": "AP, final accuracy",
    "BWT_T": "BWT_T, backward transfer",
    "router_js": "routing drift",
    "codrift_divergence": "co-drift divergence",
}
"""What the bars show by default, with panel titles (any numeric column of `driftlens.compare` may be asked for)."""

_AID = (
    "One panel per number. A bar is the mean of a method's runs, a dot is one run, a whisker its 95 % interval where "
    "there is one. Numbers come from the last checkpoint; drift is the mean over the old tasks."
)


def method_bars(frame: pd.DataFrame, *, metrics: Sequence[str] = tuple(BAR_METRICS), theme: str = "light") -> go.Figure:
    """Draw one panel per number with one bar per method.

    Args:
        frame: as `driftlens.compare` returns it, one row per run.
        metrics: numeric columns to show.
        theme: ``"light"`` or ``"dark"``.

    Raises:
        UnknownNameError: a column that the frame does not have.
    """
    look = theme_of(theme)
    for metric in metrics:
        if metric not in frame.columns:
            raise UnknownNameError("comparison column", metric, [str(c) for c in frame.columns])
    methods = list(dict.fromkeys(frame["method"].astype(str)))
    columns = 2 if len(metrics) > 1 else 1
    lines = -(-len(metrics) // columns)
    per_panel = 26 * len(methods) + 34
    figure = make_subplots(
        rows=lines,
        cols=columns,
        shared_yaxes=True,
        subplot_titles=[plain(BAR_METRICS.get(m, m), 40) for m in metrics],
        horizontal_spacing=0.06,
        vertical_spacing=min(0.3, 52 / (per_panel * lines)) if lines > 1 else 0,
    )
    figure.update_annotations(font={"size": 12, "color": look.ink})
    for place, metric in enumerate(metrics):
        row, column = place // columns + 1, place % columns + 1
        for position, method in enumerate(methods):
            part = frame[frame["method"].astype(str) == method]
            for trace in _bar(part, metric, position, method_colour(look, method, methods), look):
                figure.add_trace(trace, row=row, col=column)
        figure.add_vline(x=0, line={"color": look.muted, "width": 1}, row=row, col=column)
    figure.update_yaxes(
        tickvals=list(range(len(methods))),
        ticktext=[plain(m, 18) for m in methods],
        range=[len(methods) - 0.4, -0.6],
        showgrid=False,
    )
    figure.update_xaxes(nticks=4)
    figure.update_layout(hovermode="closest", showlegend=False, bargap=0.35)
    return finish(
        figure,
        look,
        name="method_bars",
        title="Methods side by side",
        reading_aid=_AID,
        metric=metrics[0] if metrics else "",
        height=per_panel * lines,
        bottom=34,
        top=22,
    )


def _bar(part: pd.DataFrame, metric: str, position: int, colour: str, look: Theme) -> list[go.Bar | go.Scatter]:
    values = part[metric].to_numpy(np.float64)
    defined = values[~np.isnan(values)]
    mean = float(defined.mean()) if defined.size else float("nan")
    method = plain(part["method"].iloc[0])
    bar = go.Bar(
        name=method,
        x=[None if np.isnan(mean) else mean],
        y=[position],
        orientation="h",
        width=0.6,
        marker={"color": colour, "opacity": 0.85},
        hovertext=f"<b>{method}</b><br>{plain(metric)} {number(mean)}<br>mean of {defined.size} runs",
        hoverinfo="text",
    )
    low, high = _bounds(part, metric)
    dots = go.Scatter(
        name=f"{method} runs",
        x=values.tolist(),
        y=[position] * len(values),
        mode="markers",
        marker={"color": look.ink, "size": 6},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": np.nan_to_num(high - values).tolist(),
            "arrayminus": np.nan_to_num(values - low).tolist(),
            "color": look.ink,
            "thickness": 1.2,
            "width": 4,
        },
        hovertext=[
            f"<b>{plain(run)}</b><br>{plain(metric)} {number(v)} {interval(lo, hi)}".rstrip()
            for run, v, lo, hi in zip(part["run"], values, low, high, strict=True)
        ],
        hoverinfo="text",
    )
    return [bar, dots]


def _bounds(part: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray]:
    empty = np.full(len(part), np.nan)
    low, high = f"{metric}_low", f"{metric}_high"
    if low not in part.columns or high not in part.columns:
        return empty, empty
    return part[low].to_numpy(np.float64), part[high].to_numpy(np.float64)


def bar_rows(frame: pd.DataFrame, *, metrics: Sequence[str] = tuple(BAR_METRICS)) -> pd.DataFrame:
    """Return the columns of ``frame`` that the bars show, one row per run."""
    bounds = [f"{metric}_{end}" for metric in metrics for end in ("low", "high")]
    return frame[["run", "method", *(c for c in (*metrics, *bounds) if c in frame.columns)]]


FIGURES.register("method_bars", FigureKind(method_bars, bar_rows, subject="comparison"))
