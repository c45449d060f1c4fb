"""PASs-MoE's Figure 3 on any runs: routing drift of old tasks by method, with what its form leaves out beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from driftlens.errors import ConfigError
from driftlens.figures.axes import bottom_room, checkpoint_axis
from driftlens.figures.registry import FIGURES, FigureKind
from driftlens.figures.text import finish, number, percent, plain
from driftlens.figures.theme import Theme, method_colour, theme_of, with_alpha
from driftlens.metrics.arrays import mean_defined

if TYPE_CHECKING:
    from driftlens.analysis import Run

__all__ = ["sample_js_lines", "sample_js_table"]

_AID = (
    "A line is the mean over a method's runs, its band their range. Hollow marks: most gates of the method are nearly "
    "uniform, so a line near 0 says that they hardly route, not that they stayed. Dotted: the sites that do route."
)
_VALUES = ("value", "routed")


def sample_js_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return one row per (run, old task, checkpoint after its anchor): drift averaged over sites.

    Args:
        runs: runs of any methods and seeds over one stream.

    Returns:
        Columns run, method, seed, probe, probe_index, checkpoint, checkpoint_name, value (`sample_js`, nats), low,
        high, noise_floor, routed (the mean over sites whose gate is not near uniform at both anchor and checkpoint; NaN
        where there is none), router_js (bits, token by token), gate_entropy, near_uniform_share, specialisation, and
        undefined (why ``value`` is NaN, or None): with one expert there is nothing to route.

    Raises:
        ConfigError: no run.
    """
    if not runs:
        raise ConfigError("No run was given; name at least one run that was recorded.")
    return pd.concat([_rows(run) for run in runs], ignore_index=True)


def _rows(run: Run) -> pd.DataFrame:
    drift, summary = run.drift, run.summary.transpose("probe", "checkpoint", ...)
    values = drift["sample_js"].transpose("probe", "checkpoint", "site").to_numpy()
    flat = drift["near_uniform"].transpose("probe", "checkpoint", "site").to_numpy().astype(bool)
    anchors, checkpoints = summary["anchor"].to_numpy(), summary["checkpoint"].to_numpy()
    experts = drift["num_experts"].to_numpy()
    names = summary["checkpoint_name"].to_numpy().astype(str)
    rows: list[dict[str, Any]] = []
    for probe, (task, anchor) in enumerate(zip(summary["probe"].to_numpy().astype(str), anchors, strict=True)):
        if anchor < 0:
            continue
        first = int(np.flatnonzero(checkpoints == anchor)[0])
        for point in np.flatnonzero(checkpoints > anchor):
            idle = flat[probe, first] & flat[probe, point]
            cell = summary.isel(probe=probe, checkpoint=point)
            lone = bool((experts == 1).all())
            row = {"run": run.name, "method": run.method, "seed": -1 if run.seed is None else run.seed}
            row |= {"probe": task, "probe_index": int(cell["probe_index"])}
            row |= {"checkpoint": int(checkpoints[point]), "checkpoint_name": names[point]}
            row |= {"value": np.nan if lone else float(cell["sample_js"])}
            row |= {end: np.nan if lone else float(cell[f"sample_js_{end}"]) for end in ("low", "high")}
            row |= {"noise_floor": float(summary["sample_js_noise"][probe])}
            row |= {"routed": float(mean_defined(np.where(idle | (experts == 1), np.nan, values[probe, point])))}
            row |= {name: float(cell[name]) for name in ("router_js", "gate_entropy", "near_uniform_share")}
            row |= {"specialisation": float(summary["specialisation"][point])}
            rows.append(row | {"undefined": "one expert: there is nothing to route" if lone else None})
    columns = ["run", "method", "seed", "probe", "probe_index", "checkpoint", "checkpoint_name", "value", "low", "high"]
    columns += [
        "noise_floor",
        "routed",
        "router_js",
        "gate_entropy",
        "near_uniform_share",
        "specialisation",
        "undefined",
    ]
    return pd.DataFrame(rows, columns=columns)


def sample_js_lines(runs: Sequence[Run], *, theme: str = "light") -> go.Figure:
    """Draw the drift of old tasks over the whole stream (left, negated as PASs-MoE prints it) and on the way (right).

    Args:
        runs: runs of any methods and seeds over one stream.
        theme: ``"light"`` or ``"dark"``.

    Returns:
        The figure: per method the traces ``"METHOD"`` and ``"METHOD along the stream"``, their ``"... range"`` bands
        where there are several runs, and ``"METHOD, sites that route"`` where some sites do not.

    Raises:
        ConfigError: no run.
    """
    look, frame = theme_of(theme), sample_js_table(runs)
    methods = list(dict.fromkeys(run.method for run in runs))
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.5, 0.5],
        horizontal_spacing=0.1,
        subplot_titles=["over the whole stream, by old task", "on the way, mean of the old tasks"],
    )
    figure.update_annotations(font={"size": 12.5, "color": look.ink})
    last = frame[frame["checkpoint"] == frame.groupby(["run", "method", "seed"])["checkpoint"].transform("max")]
    by_task = last.assign(**{name: -last[name] for name in _VALUES}, at=last["probe_index"])
    along = _mean_of_tasks(frame)
    for method in methods:
        colour = method_colour(look, method, methods)
        for column, part in ((1, by_task), (2, along)):
            for trace in _lines(part[part["method"] == method], method, colour, look, first=column == 1):
                figure.add_trace(trace, row=1, col=column)
    tasks = last.drop_duplicates("probe_index").sort_values("probe_index")
    figure.update_xaxes(
        tickvals=tasks["probe_index"].tolist(),
        ticktext=[plain(name, 14) for name in tasks["probe"]],
        tickangle=-40,
        title_text="old task, in stream order",
        showgrid=False,
        row=1,
        col=1,
    )
    axis = checkpoint_axis(frame) if len(frame) else {"ticktext": []}
    figure.update_xaxes(**axis, showgrid=False, row=1, col=2)
    for column, part, title in ((1, by_task, "- sample_js (nats)"), (2, along, "sample_js (nats)")):
        figure.update_yaxes(title_text=title, range=_range(part), nticks=7, row=1, col=column)
    _note_lone(figure, frame, look)
    figure.update_layout(
        hovermode="closest",
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
    )
    return finish(
        figure,
        look,
        name="sample_js_lines",
        title="Routing drift of old tasks, by method",
        reading_aid=_AID,
        metric="sample_js",
        height=270,
        bottom=bottom_room(axis, 1 + len(methods) // 4),
        top=24,
    )


def _range(part: pd.DataFrame) -> list[float]:
    values = part[list(_VALUES)].to_numpy(np.float64)
    most = float(np.nanmax(np.abs(values), initial=0.0)) or 0.1
    sign = -1 if np.nanmin(values, initial=0.0) < 0 else 1
    return sorted((1.1 * sign * most, -0.08 * sign * most))


def _mean_of_tasks(frame: pd.DataFrame) -> pd.DataFrame:
    keys = ["run", "method", "seed", "checkpoint", "checkpoint_name"]
    means = frame.groupby(keys, sort=False)[[*_VALUES, "router_js", "gate_entropy", "near_uniform_share"]].mean()
    table: pd.DataFrame = means.reset_index()
    return table.assign(at=table["checkpoint"])


def _lines(part: pd.DataFrame, method: str, colour: str, look: Theme, *, first: bool) -> list[go.Scatter]:
    if part["value"].isna().all():
        return []
    name, suffix = plain(method, 24), "" if first else " along the stream"
    grouped = part.groupby("at", sort=True)
    middle, runs = grouped.mean(numeric_only=True), grouped["value"].count()
    at = middle.index.tolist()
    shared = {"legendgroup": name, "mode": "lines+markers"}
    traces = []
    if runs.max() > 1:
        low, high = grouped["value"].min(), grouped["value"].max()
        traces.append(
            go.Scatter(
                name=f"{name}{suffix} range",
                legendgroup=name,
                showlegend=False,
                x=[*at, *at[::-1]],
                y=[*high, *low[::-1]],
                fill="toself",
                fillcolor=with_alpha(colour, 0.15),
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
            )
        )
    uniform = (middle["near_uniform_share"] > 0.5).tolist()
    hover = [
        f"<b>{name}</b><br>{number(abs(row['value']))} nats, mean of {count} runs<br>token by token (router_js) "
        f"{number(row['router_js'])} bits<br>gate entropy {number(row['gate_entropy'])}<br>near-uniform gates "
        f"{percent(row['near_uniform_share'])}"
        for row, count in zip(middle.to_dict("records"), runs, strict=True)
    ]
    marker = {"size": 8, "color": [look.background if flag else colour for flag in uniform]}
    traces.append(
        go.Scatter(
            name=f"{name}{suffix}",
            showlegend=first,
            x=at,
            y=middle["value"].tolist(),
            line={"color": colour, "width": 2.2},
            marker=marker | {"line": {"color": colour, "width": 1.8}},
            hovertext=hover,
            hoverinfo="text",
            **shared,
        )
    )
    if any(uniform) and part["routed"].notna().any():
        traces.append(
            go.Scatter(
                name=f"{name}{suffix}, sites that route",
                showlegend=first,
                x=at,
                y=middle["routed"].tolist(),
                line={"color": colour, "width": 1.6, "dash": "dot"},
                marker={"size": 6, "color": colour, "symbol": "diamond"},
                hovertemplate=f"<b>{name}</b>, sites that route<br>%{{y:.4f}} nats<extra></extra>",
                **shared,
            )
        )
    return traces


def _note_lone(figure: go.Figure, frame: pd.DataFrame, look: Theme) -> None:
    lone = frame.loc[frame["undefined"].notna(), "method"].unique().tolist()
    if lone:
        figure.add_annotation(
            x=1,
            xref="x domain",
            xanchor="right",
            y=0,
            yref="y domain",
            yanchor="bottom",
            text=f"{plain(', '.join(lone), 40)}: one expert, nothing to route",
            showarrow=False,
            font={"size": 11, "color": look.muted},
        )


FIGURES.register("sample_js_lines", FigureKind(sample_js_lines, sample_js_table, subject="runs"))
