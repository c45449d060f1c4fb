"""Routing over time: which experts an old task's tokens were sent to after every checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from driftlens.figures.axes import bottom_room, checkpoint_axis, mark_anchor
from driftlens.figures.registry import FIGURES, FigureKind
from driftlens.figures.tables import routing_table
from driftlens.figures.text import finish, percent, plain, short_site
from driftlens.figures.theme import Theme, expert_colour, theme_of

if TYPE_CHECKING:
    from driftlens.analysis import Run

__all__ = ["routing_flow", "routing_multiples"]

_AID = (
    "Height of a band: share of the task's gate mass that an expert gets. Level bands to the right of the dashed line: "
    "still routed as when it was learned. Means over sites can hide opposite moves: choose one site."
)


def routing_flow(run: Run, *, probe: str | None = None, site: str | None = None, theme: str = "light") -> go.Figure:
    """Draw each expert's share of one task over the checkpoints, as stacked areas.

    Args:
        run: the run.
        probe: the task; default the first of the stream that was recorded.
        site: a site, or None for the mean over sites.
        theme: ``"light"`` or ``"dark"``.
    """
    look = theme_of(theme)
    probe = probe if probe is not None else _first_probe(run)
    frame = routing_table(run, probe, site)
    figure = go.Figure()
    for trace in _areas(frame, look, legend=True):
        figure.add_trace(trace)
    axis = _flow_axis(frame)
    figure.update_xaxes(**axis)
    figure.update_yaxes(title_text="share of gate mass", range=[0, 1], tickformat=".0%", nticks=6, showgrid=False)
    anchor = int(frame["anchor"].iloc[0]) if len(frame) else -1
    if anchor >= 0:
        mark_anchor(figure, look, anchor)
    figure.update_layout(hovermode="x unified", legend=_legend())
    where = "all sites" if site is None else _label(run, site)
    return finish(
        figure,
        look,
        name="routing_flow",
        title=f"Which experts {plain(probe, 20)} was sent to, {where}",
        reading_aid=_AID,
        metric="load",
        height=250,
        bottom=bottom_room(axis, -(-frame["expert"].nunique() // 5)),
        top=16,
    )


def routing_multiples(run: Run, *, site: str | None = None, theme: str = "light", columns: int = 2) -> go.Figure:
    """Draw `routing_flow` for every task side by side.

    Args:
        run: the run.
        site: a site, or None for the mean over sites.
        theme: ``"light"`` or ``"dark"``.
        columns: panels in a row.
    """
    look = theme_of(theme)
    frame = routing_table(run, None, site)
    probes = list(dict.fromkeys(frame["probe"])) or [_first_probe(run)]
    columns = max(1, min(columns, len(probes)))
    lines = -(-len(probes) // columns)
    height = 118 * lines
    figure = make_subplots(
        rows=lines,
        cols=columns,
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=[plain(name, 20) for name in probes],
        horizontal_spacing=0.04,
        vertical_spacing=30 / height,
    )
    figure.update_annotations(font={"size": 12, "color": look.ink})
    for number, probe in enumerate(probes):
        row, column = number // columns + 1, number % columns + 1
        part = frame[frame["probe"] == probe]
        for trace in _areas(part, look, legend=number == 0):
            trace.stackgroup = f"task {number}"
            figure.add_trace(trace, row=row, col=column)
        anchor = int(part["anchor"].iloc[0]) if len(part) else -1
        if anchor >= 0:
            figure.add_vline(x=anchor, line={"color": look.ink, "width": 1.2, "dash": "dash"}, row=row, col=column)
    axis = _flow_axis(frame, short=True)
    title = "checkpoint"
    axis.pop("title_text")
    figure.update_xaxes(**axis, tickfont={"size": 10.5, "color": look.muted})
    figure.update_xaxes(title_text=title, row=lines)
    axis["title_text"] = title
    figure.update_yaxes(range=[0, 1], tickformat=".0%", tickvals=[0, 0.5, 1], showgrid=False)
    figure.update_layout(hovermode="x unified", legend=_legend())
    where = "mean of all sites" if site is None else _label(run, site)
    return finish(
        figure,
        look,
        name="routing_multiples",
        title=f"Routing of every task, {where}",
        reading_aid=_AID,
        metric="load",
        height=height,
        bottom=bottom_room(axis, -(-frame["expert"].nunique() // 5)),
        top=20,
    )


def _label(run: Run, site: str) -> str:
    place = run.drift.sel(site=site)
    return short_site(site, int(place["layer"]), str(place["kind"].item()))


def _first_probe(run: Run) -> str:
    return str(run.drift["probe"].to_numpy()[0])


def _flow_axis(frame: pd.DataFrame, *, short: bool = False) -> dict[str, object]:
    axis = checkpoint_axis(frame)
    low, high = axis["range"]
    # Areas end at the first and last checkpoint: no half step of nothing at either side.
    axis["range"] = [low + 0.5, high - 0.5] if high - low > 1 else [low, high]
    axis["showgrid"] = False
    if short:
        axis["ticktext"] = [str(value) for value in axis["tickvals"]]
        axis["tickangle"] = 0
    return axis


def _legend() -> dict[str, object]:
    return {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "traceorder": "normal"}


def _areas(frame: pd.DataFrame, look: Theme, *, legend: bool) -> list[go.Scatter]:
    alone = len(set(frame["checkpoint"])) == 1
    traces = []
    for expert in sorted(int(value) for value in frame["expert"].unique()):
        part, colour = frame[frame["expert"] == expert], expert_colour(look, expert)
        traces.append(
            go.Scatter(
                name=f"expert {expert}",
                legendgroup=f"expert {expert}",
                showlegend=legend,
                x=part["checkpoint"].tolist(),
                y=part["share"].tolist(),
                text=[percent(value) for value in part["share"]],
                stackgroup="experts",
                mode="lines+markers" if alone else "lines",
                line={"width": 0.8, "color": look.background},
                marker={"color": colour},
                fillcolor=colour,
                hovertemplate="%{text}",
            )
        )
    return traces


FIGURES.register("routing_flow", FigureKind(routing_flow, routing_table))
FIGURES.register("routing_multiples", FigureKind(routing_multiples, routing_table))
