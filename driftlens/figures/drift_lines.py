"""Drift of every old task over the checkpoints, with its uncertainty and what counts as nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from driftlens.figures.axes import bottom_room, checkpoint_axis
from driftlens.figures.registry import FIGURES, FigureKind
from driftlens.figures.tables import LINE_METRICS, drift_table
from driftlens.figures.text import finish, interval, number, percent, plain
from driftlens.figures.theme import Theme, task_style, theme_of, with_alpha

if TYPE_CHECKING:
    from driftlens.analysis import Run

__all__ = ["drift_lines"]

_TITLES = {
    "router_js": "How far the routing of old tasks moved",
    "codrift_divergence": "How far outputs on old tasks moved",
    "mass_moved": "Gate mass of old tasks that changed expert",
    "top1_switch": "Tokens of old tasks whose first expert changed",
    "responsibility_divergence": "How far the responsibility for old tasks moved",
    "impact": "How much the drift of old tasks matters",
}
_AID = (
    "One line per task, from the checkpoint that learned it (0 by definition) to the right; the band is the 95 % "
    "bootstrap interval over samples. The grey strip is the noise floor: what recording twice already changes."
)


def drift_lines(run: Run, *, metric: str = "router_js", theme: str = "light", most: float | None = None) -> go.Figure:
    """Draw one line per old task: drift averaged over sites, from its anchor on.

    Args:
        run: the run.
        metric: a key of `driftlens.figures.LINE_METRICS`.
        theme: ``"light"`` or ``"dark"``.
        most: top of the value axis, to share it between runs; default fitted to the intervals.

    Returns:
        The figure: traces ``"TASK"`` (line), ``"TASK interval"`` (band), ``"noise floor"``, and the chance
        level where the quantity has one (a note where it lies above the axis).
    """
    look = theme_of(theme)
    frame = drift_table(run, metric)
    figure = go.Figure()
    _add_floor(figure, frame, look)
    for _, part in frame.groupby("probe_index", sort=True):
        _add_task(figure, part.sort_values("checkpoint"), look)
    top = most if most is not None else line_top([frame])
    axis = checkpoint_axis(frame)
    figure.update_xaxes(**axis, showgrid=False)
    figure.update_yaxes(title_text=f"{LINE_METRICS[metric].lower()} (1)", range=[-0.02 * top, top], nticks=6)
    _add_chance(figure, frame, look, top)
    figure.update_layout(
        hovermode="closest",
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
    )
    return finish(
        figure,
        look,
        name="drift_lines",
        title=_TITLES[metric],
        reading_aid=_AID,
        metric=metric,
        height=250,
        bottom=bottom_room(axis, 1 + frame["probe"].nunique() // 4),
    )


def line_top(frames: list[pd.DataFrame]) -> float:
    """Return the top of a value axis that holds every line and band of ``frames`` (as `drift_table` returns them)."""
    values = np.concatenate([frame[["value", "high"]].to_numpy(np.float64).ravel() for frame in frames])
    finite = values[np.isfinite(values)]
    return 1.08 * float(finite.max()) if finite.size and finite.max() > 0 else 0.1


def _add_floor(figure: go.Figure, frame: pd.DataFrame, look: Theme) -> None:
    floor = frame["noise_floor"].max()
    if not len(frame) or np.isnan(floor):
        return
    ends = [float(frame["checkpoint"].min()) - 0.5, float(frame["checkpoint"].max()) + 0.5]
    figure.add_trace(
        go.Scatter(
            name="noise floor",
            x=ends,
            y=[floor, floor],
            mode="lines",
            line={"color": look.muted, "width": 1, "dash": "dot"},
            fill="tozeroy",
            fillcolor=with_alpha(look.muted, 0.18),
            hovertemplate=f"noise floor {number(float(floor))} (largest over the tasks)<extra></extra>",
        )
    )


def _add_chance(figure: go.Figure, frame: pd.DataFrame, look: Theme, top: float) -> None:
    """Draw the chance level: one line where all tasks share it, else one per task; say so where it lies higher."""
    levels = frame["chance"].dropna()
    if not len(levels):
        return
    shared = float(levels.max() - levels.min()) < 1e-12
    label = f"chance {number(float(levels.iloc[0]), 2)}" if shared else "dotted: chance of each task"
    if float(levels.min()) > top:
        label = f"chance lies above: {number(float(levels.min()), 2)}" + ("" if shared else " and more")
    elif shared:
        figure.add_hline(y=float(levels.iloc[0]), line={"color": look.muted, "width": 1, "dash": "dash"}, name="chance")
    else:
        for _, part in frame[frame["chance"].notna()].groupby("probe_index", sort=True):
            name, position = plain(part["probe"].iloc[0], 20), max(int(part["probe_index"].iloc[0]) - 1, 0)
            figure.add_trace(
                go.Scatter(
                    name=f"{name} chance",
                    legendgroup=name,
                    showlegend=False,
                    x=part["checkpoint"].tolist(),
                    y=part["chance"].tolist(),
                    mode="lines",
                    line={"color": task_style(look, position)[0], "width": 1, "dash": "dot"},
                    hovertemplate=f"{name}: chance %{{y:.3f}}<extra></extra>",
                )
            )
    inside = shared and float(levels.iloc[0]) <= top
    figure.add_annotation(
        x=0,
        xref="x domain",
        xanchor="left",
        y=float(levels.iloc[0]) if inside else 1,
        yref="y" if inside else "y domain",
        yanchor="top",
        text=label,
        showarrow=False,
        font={"size": 11, "color": look.muted},
    )


def _add_task(figure: go.Figure, part: pd.DataFrame, look: Theme) -> None:
    first = part.iloc[0]
    name, (colour, dash, symbol) = plain(first["probe"], 20), task_style(look, max(int(first["probe_index"]) - 1, 0))
    band = part[part["low"].notna() & part["high"].notna()]
    if len(band) > 1:
        figure.add_trace(
            go.Scatter(
                name=f"{name} interval",
                legendgroup=name,
                showlegend=False,
                x=[*band["checkpoint"], *band["checkpoint"][::-1]],
                y=[*band["high"], *band["low"][::-1]],
                fill="toself",
                fillcolor=with_alpha(colour, 0.16),
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
            )
        )
    hover = [
        f"<b>{name}</b><br>{number(row['value'])} {interval(row['low'], row['high'])}".rstrip()
        + f"<br>after {plain(row['checkpoint_name'])}<br>near-uniform sites {percent(row['near_uniform_share'])}"
        for row in part.to_dict("records")
    ]
    figure.add_trace(
        go.Scatter(
            name=name,
            legendgroup=name,
            x=part["checkpoint"].tolist(),
            y=part["value"].tolist(),
            mode="lines+markers",
            line={"color": colour, "width": 2.2, "dash": dash},
            marker={"color": colour, "size": 7, "symbol": symbol},
            hovertext=hover,
            hoverinfo="text",
        )
    )


FIGURES.register("drift_lines", FigureKind(drift_lines, drift_table))
