"""SAME's Figure 1 on any run: the histogram of an old task's routing when it was learned and later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from driftlens.errors import NotFoundError, UnknownNameError
from driftlens.figures.axes import checkpoint_label
from driftlens.figures.registry import FIGURES, FigureKind
from driftlens.figures.text import finish, number, percent, plain
from driftlens.figures.theme import Theme, theme_of, with_alpha
from driftlens.metrics.arrays import mean_defined

if TYPE_CHECKING:
    from driftlens.analysis import Run

__all__ = ["routing_histogram", "routing_histogram_table"]

_AID = (
    "Bars: share of the task's gate mass by expert, in each site from the one most used when the task was learned to "
    "the least; outline: as it was then. Equal bars may hide tokens that swapped experts: router_js follows each token."
)


def routing_histogram_table(
    run: Run, *, probe: str | None = None, checkpoints: Sequence[int] | None = None, groups: int = 3
) -> pd.DataFrame:
    """Return one row per (group of sites, checkpoint, expert in the anchor's order).

    Args:
        run: the run.
        probe: an old task; default the first of the stream that was recorded at its anchor.
        checkpoints: indices from the anchor on; default the anchor, the one halfway and the last.
        groups: number of groups of sites by depth.

    Returns:
        Columns group (``"layers 20-23"``), sites, probe, anchor, checkpoint, checkpoint_name, rank (0: the expert that
        the site used most at the anchor), share (mean over the group's sites, 0..1), anchor_share, chance (1/E), and of
        group and checkpoint: marginal_js and router_js (bits), gate_entropy, near_uniform_share. Labels of experts mean
        nothing across sites, hence the order.

    Raises:
        UnknownNameError: the task, or a checkpoint from its anchor on, is not in the tables.
        NotFoundError: no task was recorded at its anchor.
    """
    drift = run.drift.transpose("probe", "checkpoint", "site", "expert", ...)
    probes, anchors = drift["probe"].to_numpy().astype(str).tolist(), drift["anchor"].to_numpy()
    if probe is None:
        if not (anchors >= 0).any():
            raise NotFoundError(
                f"{run.path} has no recording at any task's anchor. `driftlens record --run {run.path}`."
            )
        probe = probes[int(np.flatnonzero(anchors >= 0)[0])]
    if probe not in probes:
        raise UnknownNameError("task", probe, probes)
    data = drift.sel(probe=probe)
    anchor, known = int(data["anchor"]), data["checkpoint"].to_numpy().tolist()
    later = [point for point in known if point >= anchor >= 0]
    chosen = (
        sorted({later[0], later[len(later) // 2], later[-1]}) if checkpoints is None and later else checkpoints or []
    )
    for point in chosen:
        if point not in later:
            raise UnknownNameError(f"checkpoint from the anchor of {probe} on", str(point), map(str, later))
    load = data["load"].to_numpy()
    first = load[known.index(anchor)] if later else load[0]
    order = np.argsort(-np.nan_to_num(first, nan=-1.0), axis=-1, kind="stable")
    rows = []
    for name, members in _groups(data["layer"].to_numpy(), groups):
        before = mean_defined(np.take_along_axis(first, order, axis=-1)[members], axis=0)
        experts = data["num_experts"].to_numpy()[members]
        for point in chosen:
            at = known.index(point)
            share = mean_defined(np.take_along_axis(load[at], order, axis=-1)[members], axis=0)
            shared = {"group": name, "sites": len(members), "probe": probe, "anchor": anchor, "checkpoint": point}
            shared |= {"checkpoint_name": str(data["checkpoint_name"].to_numpy()[at])}
            context = {
                key: float(mean_defined(data[key].to_numpy()[at][members].astype(np.float64)))
                for key in ("marginal_js", "router_js", "gate_entropy", "near_uniform")
            }
            context["near_uniform_share"] = context.pop("near_uniform")
            for rank in range(int(experts.max())):
                value = {"rank": rank, "share": float(share[rank]), "anchor_share": float(before[rank])}
                rows.append(shared | value | {"chance": float((1 / experts).mean())} | context)
    return pd.DataFrame(rows)


def _groups(layers: np.ndarray, count: int) -> list[tuple[str, np.ndarray]]:
    """Cut the sites into ``count`` groups of neighbouring layers."""
    parts = np.array_split(np.unique(layers), max(1, min(count, len(np.unique(layers)))))
    return [
        (
            f"layers {part[0]}-{part[-1]}" if part[0] != part[-1] else f"layer {part[0]}",
            np.flatnonzero(np.isin(layers, part)),
        )
        for part in parts
    ]


def routing_histogram(
    run: Run,
    *,
    probe: str | None = None,
    checkpoints: Sequence[int] | None = None,
    groups: int = 3,
    theme: str = "light",
) -> go.Figure:
    """Draw one histogram per group of sites (rows) and checkpoint (columns), over that of the anchor.

    Args:
        run: the run.
        probe: an old task; default the first of the stream.
        checkpoints: indices from the anchor on; default the anchor, the one halfway and the last.
        groups: number of groups of sites by depth.
        theme: ``"light"`` or ``"dark"``.

    Returns:
        The figure: traces ``"GROUP, checkpoint N"`` and ``"GROUP, when learned"``.

    Raises:
        UnknownNameError: the task, or a checkpoint from its anchor on, is not in the tables.
        NotFoundError: no task was recorded at its anchor.
    """
    look = theme_of(theme)
    frame = routing_histogram_table(run, probe=probe, checkpoints=checkpoints, groups=groups)
    names, points = list(dict.fromkeys(frame["group"])), list(dict.fromkeys(frame["checkpoint"]))
    labels = frame.drop_duplicates("checkpoint")["checkpoint_name"]
    height = 128 * len(names)
    figure = make_subplots(
        rows=len(names),
        cols=len(points),
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=34 / height if len(names) > 1 else 0,
        column_titles=[f"after {checkpoint_label(label)}" for label in labels],
    )
    figure.update_annotations(font={"size": 12.5, "color": look.ink})
    for row, name in enumerate(names, start=1):
        for column, point in enumerate(points, start=1):
            part = frame[(frame["group"] == name) & (frame["checkpoint"] == point)]
            _panel(figure, part, look, row, column)
        figure.update_yaxes(title_text=name, row=row, col=1)
    top = 1.45 * float(frame[["share", "anchor_share"]].max().max())
    ranks = sorted(frame["rank"].unique())
    figure.update_yaxes(range=[0, top], tickformat=".0%", nticks=4)
    figure.update_xaxes(tickvals=ranks, ticktext=[str(rank + 1) for rank in ranks], showgrid=False)
    figure.update_xaxes(title_text="expert, by use when learned", row=len(names))
    figure.update_layout(hovermode="closest", showlegend=False, bargap=0.3, barmode="overlay")
    return finish(
        figure,
        look,
        name="routing_histogram",
        title=f"Routing of {plain(frame['probe'].iloc[0], 20)} when learned and later",
        reading_aid=_AID,
        metric="load",
        height=height,
        bottom=52,
        top=26,
    )


def _panel(figure: go.Figure, part: pd.DataFrame, look: Theme, row: int, column: int) -> None:
    first = part.iloc[0]
    uniform = bool(first["near_uniform_share"] > 0.5)
    colour = look.muted if uniform else look.experts[0]
    hover = [
        f"expert {entry['rank'] + 1} by use when learned<br>now {percent(entry['share'])}, then "
        f"{percent(entry['anchor_share'])}, chance {percent(entry['chance'])}<br>near-uniform gates "
        f"{percent(entry['near_uniform_share'])}"
        for entry in part.to_dict("records")
    ]
    shared = {"x": part["rank"].tolist(), "width": 0.7}
    figure.add_trace(
        go.Bar(
            name=f"{plain(first['group'])}, checkpoint {first['checkpoint']}",
            y=part["share"].tolist(),
            marker={"color": with_alpha(colour, 0.75)},
            hovertext=hover,
            hoverinfo="text",
            **shared,
        ),
        row=row,
        col=column,
    )
    figure.add_trace(
        go.Bar(
            name=f"{plain(first['group'])}, when learned",
            y=part["anchor_share"].tolist(),
            marker={"color": "rgba(0,0,0,0)", "line": {"color": look.ink, "width": 1.6}},
            hoverinfo="skip",
            **shared,
        ),
        row=row,
        col=column,
    )
    figure.add_hline(
        y=float(first["chance"]), line={"color": look.muted, "width": 1, "dash": "dot"}, row=row, col=column
    )
    text = f"marginal_js {number(first['marginal_js'])}, router_js {number(first['router_js'])}"
    if first["near_uniform_share"] > 0:
        text += f"<br>{percent(first['near_uniform_share'])} of the gates nearly uniform"
    figure.add_annotation(
        x=1,
        xref="x domain",
        xanchor="right",
        y=1,
        yref="y domain",
        yanchor="top",
        align="right",
        text=text,
        showarrow=False,
        font={"size": 11, "color": look.muted},
        bgcolor=look.background,  # grid lines end at the words
        borderpad=0,
        row=row,
        col=column,
    )


FIGURES.register("routing_histogram", FigureKind(routing_histogram, routing_histogram_table))
