"""The co-drift map: where in the network, and when, an old task's computation drifted."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from driftlens.errors import UnknownNameError
from driftlens.figures.axes import bottom_room, checkpoint_axis, checkpoint_label
from driftlens.figures.registry import FIGURES, FigureKind
from driftlens.figures.tables import MAP_METRICS, codrift_table
from driftlens.figures.text import finish, interval, number, plain, short_site, ticks
from driftlens.figures.theme import Theme, theme_of

if TYPE_CHECKING:
    from driftlens.analysis import Run

__all__ = ["HIT_LAYER", "codrift_map", "map_range"]

HIT_LAYER = "cells"
"""Name of the invisible scatter layer; its custom data are (site number in depth order, checkpoint)."""

_TITLES = {
    "codrift_divergence": "Where {who} drifted: router and experts",
    "codrift_router": "Where the router moved {who}",
    "codrift_experts": "Where the experts changed under {who}",
    "codrift_cross": "Where both pushed {who} the same way",
    "impact": "Where the drift of {who} matters for the module",
    "router_js": "Where {who} was sent to other experts",
}
_AIDS = {
    "codrift_divergence": "0: the module still adds what it added when the task was learned; "
    "0.5: as different as something unrelated.",
    "codrift_router": "The part of the drift that the new gates alone would cause.",
    "codrift_experts": "The part of the drift that the changed experts alone would cause.",
    "codrift_cross": "Above 0: router and experts push the output the same way; "
    "below 0: one repairs what the other did.",
    "impact": "Change of the module's added output, relative to the frozen module's own output.",
    "router_js": "0: every token goes where it went when the task was learned; 1: entirely elsewhere.",
}
_COMMON = (
    " Rows are sites (first layers at the bottom), time runs right. "
    "╱ gate nearly uniform, × undefined, empty: not old yet."
)


def map_range(runs: list[Run], metric: str, probe: str | None = None) -> float:
    """Return the largest absolute value that the maps of ``runs`` show: one colour scale for all of them."""
    tables = [codrift_table(run, metric, probe) for run in runs]
    values = np.concatenate([np.abs(t["value"].to_numpy(np.float64)) for t in tables] or [np.zeros(1)])
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else 0.0


def codrift_map(
    run: Run,
    *,
    metric: str = "codrift_divergence",
    probe: str | None = None,
    theme: str = "light",
    most: float | None = None,
    selected: tuple[str, int] | None = None,
) -> go.Figure:
    """Draw sites by depth against checkpoints.

    Args:
        run: the run.
        metric: a key of `driftlens.figures.MAP_METRICS`.
        probe: an old task, or None for the mean over the tasks that are old at each checkpoint.
        theme: ``"light"`` or ``"dark"``.
        most: top of the colour scale (for the cross term: of its absolute value); default the largest value shown.
        selected: (site, checkpoint) of a cell to outline.

    Returns:
        The figure. Trace 0 is the heat map, the trace named `HIT_LAYER` an invisible marker per cell that carries the
        hover text and can be selected (heat maps report no selection in Streamlit). Undefined cells are empty and
        marked ×, near-uniform ones are struck through.

    Raises:
        UnknownNameError: an unknown quantity or task.
    """
    look = theme_of(theme)
    if metric not in MAP_METRICS:
        raise UnknownNameError("map quantity", metric, MAP_METRICS)
    frame = codrift_table(run, metric, probe)
    sites = depth_order(run)
    rows = {site: row for row, site in enumerate(sites["site"])}
    frame = frame.assign(row=frame["site"].map(rows))
    signed = metric == "codrift_cross"
    top = most or float(frame["value"].abs().max() if len(frame) else 0.0)
    top = top if top > 0 and math.isfinite(top) else 1.0
    per_row = min(34.0, max(3.0, 540 / len(sites)))
    figure = go.Figure(_heat(frame, len(sites), look, top, signed, metric))
    _add_marks(figure, frame, look, per_row)
    figure.add_trace(_hits(frame, per_row))
    if selected is not None and selected[0] in rows:
        _outline(figure, look, rows[selected[0]], selected[1])
    every = _all_checkpoints(run)
    anchor = int(run.drift["anchor"].sel(probe=probe)) if probe is not None else None
    _shade_before(figure, look, every, frame, len(sites), anchor)
    axis = checkpoint_axis(every)
    figure.update_xaxes(**axis, showgrid=False)
    figure.update_yaxes(
        title_text="site, by depth",
        range=[-0.5, len(sites) - 0.5],
        showgrid=False,
        **ticks(list(range(len(sites))), sites["label"].tolist(), most=36),
    )
    figure.update_layout(hovermode="closest", hoverdistance=90, showlegend=False, dragmode="zoom")
    who = "old tasks" if probe is None else plain(probe, 20)
    return finish(
        figure,
        look,
        name="codrift_map",
        title=_TITLES[metric].format(who=who),
        reading_aid=_AIDS[metric] + _COMMON,
        metric=metric,
        height=max(int(per_row * len(sites)), 90),
        bottom=bottom_room(axis),
        top=16 if anchor is not None else 0,
    )


def depth_order(run: Run) -> pd.DataFrame:
    """Return the run's sites from the first layer to the last: columns site, layer, kind, label (escaped)."""
    drift = run.drift
    frame = pd.DataFrame(
        {
            "site": drift["site"].to_numpy().astype(str),
            "layer": drift["layer"].to_numpy(),
            "kind": drift["kind"].to_numpy().astype(str),
        }
    ).sort_values("layer", kind="stable")
    frame["label"] = [
        short_site(s, int(n), k) for s, n, k in zip(frame["site"], frame["layer"], frame["kind"], strict=True)
    ]
    return frame.reset_index(drop=True)


def _all_checkpoints(run: Run) -> pd.DataFrame:
    drift = run.drift
    return pd.DataFrame(
        {
            "checkpoint": drift["checkpoint"].to_numpy(),
            "checkpoint_name": drift["checkpoint_name"].to_numpy().astype(str),
        }
    )


def _heat(frame: pd.DataFrame, sites: int, look: Theme, top: float, signed: bool, metric: str) -> go.Heatmap:
    grid = frame.pivot_table(index="row", columns="checkpoint", values="value", dropna=False).reindex(
        index=range(sites)
    )
    ramp = look.signed if signed else look.drift
    return go.Heatmap(
        name=metric,
        x=[int(c) for c in grid.columns],
        y=list(range(sites)),
        z=grid.to_numpy(np.float64).tolist(),
        zmin=-top if signed else 0,
        zmax=top,
        colorscale=[[i / (len(ramp) - 1), colour] for i, colour in enumerate(ramp)],
        colorbar={
            "thickness": 9,
            "outlinewidth": 0,
            "len": 1,
            "y": 0.5,
            "xpad": 6,
            "nticks": 5,
            "tickfont": {"size": 11, "color": look.muted},
        },
        hoverinfo="skip",
        xgap=2,
        ygap=1 if sites > 40 else 2,
    )


def _add_marks(figure: go.Figure, frame: pd.DataFrame, look: Theme, per_row: float) -> None:
    size = min(11.0, max(4.0, 0.5 * per_row))
    marks = (
        ("undefined", frame["value"].isna(), "x-thin", look.muted),
        ("gate nearly uniform", frame["near_uniform"].astype(bool) & frame["value"].notna(), "line-ne", look.ink),
    )
    for name, chosen, symbol, colour in marks:
        part = frame[chosen]
        figure.add_trace(
            go.Scatter(
                name=name,
                x=part["checkpoint"].tolist(),
                y=part["row"].tolist(),
                mode="markers",
                marker={"symbol": symbol, "size": size, "line": {"width": 1.3, "color": colour}, "color": colour},
                unselected={"marker": {"opacity": 1}},
                hoverinfo="skip",
            )
        )


def _hits(frame: pd.DataFrame, per_row: float) -> go.Scatter:
    return go.Scatter(
        name=HIT_LAYER,
        x=frame["checkpoint"].tolist(),
        y=frame["row"].tolist(),
        customdata=frame[["row", "checkpoint"]].to_numpy(np.int64).tolist(),
        mode="markers",
        marker={"symbol": "square", "size": max(6.0, per_row), "opacity": 0},
        selected={"marker": {"opacity": 0}},
        unselected={"marker": {"opacity": 0}},
        hovertext=[_hover(row) for row in frame.to_dict("records")],
        hoverinfo="text",
    )


def _hover(row: Mapping[Hashable, Any]) -> str:
    lines = [
        f"<b>{plain(row['site'], 60)}</b>",
        f"{plain(row['probe'])} after {checkpoint_label(str(row['checkpoint_name']))}",
        f"{MAP_METRICS[row['metric']]}: <b>{number(row['value'])}</b> {interval(row['low'], row['high'])}".rstrip(),
    ]
    if row["undefined"] is not None:
        lines[-1] = f"undefined: {plain(row['undefined'], 90)}"
    for label, key in (("noise floor", "noise_floor"), ("chance", "chance"), ("specialisation", "specialisation")):
        if not math.isnan(row[key]):
            lines.append(f"{label} {number(row[key])}")
    if row["probe"] == "mean of old tasks":
        lines.append(f"mean of {row['old_tasks']} old tasks; choose one task for its interval")
    if row["near_uniform"]:
        lines.append("gate nearly uniform: it never routed, so it cannot drift")
    return "<br>".join(lines)


def _outline(figure: go.Figure, look: Theme, row: int, checkpoint: int) -> None:
    figure.add_shape(
        type="rect",
        x0=checkpoint - 0.48,
        x1=checkpoint + 0.48,
        y0=row - 0.48,
        y1=row + 0.48,
        line={"color": look.ink, "width": 2.5},
        name="selected",
    )


def _nothing(anchor: int | None) -> str:
    if anchor is None:
        return "no old task yet"
    return "not learned yet" if anchor >= 0 else "no recorded anchor: not learned yet, or left out"


def _shade_before(
    figure: go.Figure, look: Theme, every: pd.DataFrame, frame: pd.DataFrame, sites: int, anchor: int | None
) -> None:
    """Shade the checkpoints at which nothing is old yet, and name the anchor."""
    if not len(every):
        return
    first = int(every["checkpoint"].min())
    start = int(frame["checkpoint"].min()) if len(frame) else int(every["checkpoint"].max()) + 1
    if start > first:
        figure.add_shape(
            type="rect",
            x0=first - 0.5,
            x1=start - 0.5,
            y0=-0.5,
            y1=sites - 0.5,
            fillcolor=look.void,
            line={"width": 0},
            layer="below",
            name="not old yet",
        )
        figure.add_annotation(
            x=(first + start - 1) / 2,
            y=(sites - 1) / 2,
            text=_nothing(anchor),
            textangle=-90 if start - first < 2 or sites > 6 else 0,
            showarrow=False,
            font={"size": 11.5, "color": look.muted},
        )
    if anchor is not None and anchor >= 0:
        figure.add_annotation(
            x=anchor,
            y=1,
            yref="y domain",
            text="anchor",
            showarrow=False,
            yanchor="bottom",
            font={"size": 11, "color": look.muted},
        )


FIGURES.register("codrift_map", FigureKind(codrift_map, codrift_table))
