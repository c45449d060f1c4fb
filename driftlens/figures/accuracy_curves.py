"""Accuracy curves: every task over the checkpoints, before and after it was learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from driftlens.figures.axes import bottom_room, checkpoint_axis
from driftlens.figures.registry import FIGURES, FigureKind
from driftlens.figures.tables import accuracy_table
from driftlens.figures.text import finish, number, percent, plain
from driftlens.figures.theme import Theme, task_style, theme_of, with_alpha

if TYPE_CHECKING:
    from driftlens.analysis import Run

__all__ = ["accuracy_curves"]

_TITLES = {
    "strict": "Exact answers over the stream",
    "lenient": "Right answers (form forgiven) over the stream",
    "nll": "Surprise at the right answer over the stream",
}
_AID = (
    "One line per task; the large marker is the checkpoint that learned it, the faint part lies before. "
    "The thick line is the mean over the tasks learned so far."
)


def accuracy_curves(run: Run, *, scorer: str = "strict", theme: str = "light", most: float | None = None) -> go.Figure:
    """Draw accuracy (or nats) against checkpoints, one line per task and the mean of the learned tasks.

    Args:
        run: the run.
        scorer: ``"strict"``, ``"lenient"`` or ``"nll"``.
        theme: ``"light"`` or ``"dark"``.
        most: top of the value axis for ``"nll"``, to share it between runs.
    """
    look = theme_of(theme)
    frame = accuracy_table(run, scorer)
    share = scorer != "nll"
    figure = go.Figure()
    for _, part in frame.groupby("task_index", sort=True):
        _add_task(figure, part.sort_values("checkpoint"), look, share)
    learned = frame[frame["state"] != "not learned yet"].groupby("checkpoint")["value"].mean()
    figure.add_trace(
        go.Scatter(
            name="mean of learned tasks",
            x=learned.index.tolist(),
            y=learned.tolist(),
            mode="lines",
            line={"color": look.ink, "width": 3.5},
            hovertext=[f"<b>mean of learned tasks</b><br>{_words(value, share)}" for value in learned],
            hoverinfo="text",
        )
    )
    top = 1.03 if share else 1.05 * (most or float(np.nanmax(frame["value"].fillna(0.0).to_numpy(), initial=1e-9)))
    axis = checkpoint_axis(frame)
    figure.update_xaxes(**axis, showgrid=False)
    if share:
        figure.update_yaxes(title_text="answers right", range=[-0.03, top], tickformat=".0%", nticks=6)
    else:
        figure.update_yaxes(title_text="nats per answer token", range=[-0.02 * top, top], nticks=6)
    figure.update_layout(
        hovermode="closest",
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
    )
    return finish(
        figure,
        look,
        name="accuracy_curves",
        title=_TITLES[scorer],
        reading_aid=_AID,
        metric="accuracy" if share else "nll",
        height=250,
        bottom=bottom_room(axis, 1 + frame["task"].nunique() // 3),
    )


def _words(value: float, share: bool) -> str:
    return percent(value) if share else f"{number(value)} nats"


def _add_task(figure: go.Figure, part: pd.DataFrame, look: Theme, share: bool) -> None:
    first = part.iloc[0]
    name, (colour, dash, symbol) = plain(first["task"], 20), task_style(look, int(first["task_index"]) - 1)
    before = part[part["checkpoint"] <= first["task_index"]]
    after = part[part["checkpoint"] >= first["task_index"]]
    if len(before) > 1:
        figure.add_trace(
            go.Scatter(
                name=f"{name} before",
                legendgroup=name,
                showlegend=False,
                x=before["checkpoint"].tolist(),
                y=before["value"].tolist(),
                mode="lines",
                line={"color": with_alpha(colour, 0.35), "width": 1.2, "dash": "dot"},
                hoverinfo="skip",
            )
        )
    sizes = [10 if checkpoint == first["task_index"] else 6 for checkpoint in after["checkpoint"]]
    hover = [
        f"<b>{name}</b><br>{_words(row['value'], share)} of {row['n']} samples<br>after {plain(row['checkpoint_name'])}"
        for row in after.to_dict("records")
    ]
    figure.add_trace(
        go.Scatter(
            name=name,
            legendgroup=name,
            x=after["checkpoint"].tolist(),
            y=after["value"].tolist(),
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": dash},
            marker={"color": colour, "size": sizes, "symbol": symbol},
            hovertext=hover,
            hoverinfo="text",
        )
    )


FIGURES.register("accuracy_curves", FigureKind(accuracy_curves, accuracy_table))
