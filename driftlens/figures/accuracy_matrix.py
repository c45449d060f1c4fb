"""The accuracy matrix: how well every task is answered after every task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from driftlens.figures.axes import bottom_room, checkpoint_axis
from driftlens.figures.registry import FIGURES, FigureKind
from driftlens.figures.tables import accuracy_table
from driftlens.figures.text import finish, number, plain, ticks
from driftlens.figures.theme import ink_on, ramp_colour, theme_of

if TYPE_CHECKING:
    from driftlens.analysis import Run

__all__ = ["accuracy_matrix"]

_TITLES = {
    "strict": "Exact answers of every task after every task",
    "lenient": "Right answers (form forgiven) after every task",
    "nll": "Surprise at the right answer after every task",
}
_AIDS = {
    "strict": "Read along a row: the outlined cell is the task just learned; paler to its right means forgotten. "
    "Grey cells come before the task was learned.",
    "lenient": "As the strict matrix, but case, punctuation and wording of the right answer are forgiven. "
    "What is better here than there was lost in form only.",
    "nll": "Mean surprise (nats per answer token) at the right answer; stronger colour is worse. "
    "Read along a row from the outlined cell: stronger to its right means forgotten.",
}


def accuracy_matrix(run: Run, *, scorer: str = "strict", theme: str = "light", most: float | None = None) -> go.Figure:
    """Draw the accuracy matrix, tasks down and checkpoints to the right.

    Args:
        run: the run.
        scorer: ``"strict"``, ``"lenient"`` (accuracy) or ``"nll"`` (nats).
        theme: ``"light"`` or ``"dark"``.
        most: top of the colour scale for ``"nll"``, to share it between runs; default the largest value.

    Returns:
        The figure: trace ``"learned"`` holds cells from the diagonal on, ``"not learned yet"`` those before it, and
        the diagonal is outlined. Cells without a score stay empty.
    """
    look = theme_of(theme)
    frame = accuracy_table(run, scorer)
    checkpoints, tasks = _unique(frame, "checkpoint"), _unique(frame, "task_index")
    names = frame.drop_duplicates("task_index").sort_values("task_index")["task"].tolist()
    share = scorer != "nll"
    top = 1.0 if share else most or float(np.nanmax(frame["value"].fillna(0.0).to_numpy(), initial=1e-9))
    figure = go.Figure()
    for old, state_name in ((False, "not learned yet"), (True, "learned")):
        part = frame[(frame["state"] != "not learned yet") == old]
        ramp = look.unlearned if not old else look.scores if share else look.drift
        figure.add_trace(_cells(part, checkpoints, tasks, ramp, scorer, top, state_name))
        figure.add_trace(_values(part[part["value"].notna()], ramp, share, top, state_name))
    for checkpoint in checkpoints:
        if checkpoint in tasks:
            figure.add_shape(
                type="rect",
                x0=checkpoint - 0.47,
                x1=checkpoint + 0.47,
                y0=checkpoint - 0.46,
                y1=checkpoint + 0.46,
                line={"color": look.ink, "width": 2},
                name="just learned",
            )
    axis = checkpoint_axis(frame)
    figure.update_xaxes(**axis, showgrid=False)
    figure.update_yaxes(
        title_text="task",
        range=[max(tasks) + 0.5, min(tasks) - 0.5],
        showgrid=False,
        **ticks(tasks, [plain(n, 18) for n in names]),
    )
    return finish(
        figure,
        look,
        name="accuracy_matrix",
        title=_TITLES[scorer],
        reading_aid=_AIDS[scorer],
        metric="accuracy" if share else "nll",
        height=int(len(tasks) * min(44.0, max(24.0, 300 / len(tasks)))),
        bottom=bottom_room(axis),
    )


def _unique(frame: pd.DataFrame, column: str) -> list[int]:
    return [int(value) for value in sorted(frame[column].unique())]


def _cells(
    part: pd.DataFrame,
    checkpoints: list[int],
    tasks: list[int],
    ramp: Sequence[str],
    scorer: str,
    top: float,
    name: str,
) -> go.Heatmap:
    share = scorer != "nll"
    grid = part.pivot_table(index="task_index", columns="checkpoint", values="value", dropna=False)
    grid = grid.reindex(index=tasks, columns=checkpoints)
    counts = part.pivot_table(index="task_index", columns="checkpoint", values="n", dropna=False)
    counts = counts.reindex(index=tasks, columns=checkpoints)
    titles = part.drop_duplicates("task_index").set_index("task_index")["task"].to_dict()
    stages = part.drop_duplicates("checkpoint").set_index("checkpoint")["checkpoint_name"].to_dict()
    hover = [
        [
            f"<b>{plain(titles.get(t, ''))}</b> after {plain(stages.get(c, ''))}<br>"
            + (f"{100 * v:.1f} % of " if share else f"{number(v)} nats over ")
            + f"{0 if np.isnan(n) else int(n)} samples<br>{name}"
            for c, v, n in zip(checkpoints, row, ns, strict=True)
        ]
        for t, row, ns in zip(tasks, grid.to_numpy(), counts.to_numpy(), strict=True)
    ]
    return go.Heatmap(
        name=name,
        x=checkpoints,
        y=tasks,
        z=grid.to_numpy().tolist(),
        zmin=0,
        zmax=top,
        colorscale=[[i / (len(ramp) - 1), colour] for i, colour in enumerate(ramp)],
        showscale=False,
        hovertext=hover,
        hoverinfo="text",
        hoverongaps=False,
        xgap=3,
        ygap=3,
    )


def _values(part: pd.DataFrame, ramp: Sequence[str], share: bool, top: float, name: str) -> go.Scatter:
    """Return the printed values, each in the ink that can be read on its cell."""
    return go.Scatter(
        name=f"{name}: values",
        x=part["checkpoint"].tolist(),
        y=part["task_index"].tolist(),
        text=[f"{100 * value:.0f}" if share else f"{value:.2f}" for value in part["value"]],
        mode="text",
        textfont={"size": 12.5, "color": [ink_on(ramp_colour(ramp, value / top)) for value in part["value"]]},
        hoverinfo="skip",
        showlegend=False,
    )


FIGURES.register("accuracy_matrix", FigureKind(accuracy_matrix, accuracy_table))
