"""Axes and marks that several figures share: time runs to the right, one step per checkpoint."""

from __future__ import annotations

import html
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from driftlens.figures.text import plain, ticks
from driftlens.figures.theme import Theme

__all__ = ["bottom_room", "checkpoint_axis", "checkpoint_label", "mark_anchor"]


def checkpoint_label(name: str) -> str:
    """Return an escaped axis label: ``"03-digit"`` becomes ``"3 digit"``, ``"00-start"`` becomes ``"start"``."""
    number, dash, task = name.partition("-")
    if not dash or not number.isdigit():
        return plain(name, 18)
    return plain(task, 16) if int(number) == 0 else f"{int(number)} {plain(task, 14)}"


def checkpoint_axis(frame: pd.DataFrame, *, most: int = 32) -> dict[str, Any]:
    """Return settings of a checkpoint axis for the rows of ``frame`` (columns checkpoint, checkpoint_name)."""
    steps = frame.drop_duplicates("checkpoint").sort_values("checkpoint")
    numbers = [int(value) for value in steps["checkpoint"]]
    labels = [checkpoint_label(str(name)) for name in steps["checkpoint_name"]]
    low, high = (min(numbers), max(numbers)) if numbers else (0, 1)
    # A fixed angle: left to itself Plotly may turn labels after it has reserved the room for level ones.
    angle = -40 if len(labels) > 3 else 0
    return {
        "title_text": "checkpoint: after learning …",
        "range": [low - 0.5, high + 0.5],
        "tickangle": angle,
        **ticks(numbers, labels, most),
    }


def bottom_room(axis: dict[str, Any], legend_rows: int = 0) -> int:
    """Return the pixels that the labels and title of ``axis`` and a legend of ``legend_rows`` rows take below a plot.

    Plotly would make room by shrinking the plot; reserving it here keeps rows of a map equally high in every figure.
    """
    longest = max((len(html.unescape(str(label))) for label in axis["ticktext"]), default=0)
    labels = 18 + int(4.2 * longest) if axis.get("tickangle") else 22
    return labels + (26 if axis.get("title_text") else 0) + (22 * legend_rows + 14 if legend_rows else 4)


def mark_anchor(figure: go.Figure, theme: Theme, checkpoint: int, text: str = "learned", **where: Any) -> None:
    """Draw a dashed, labelled vertical line at the anchor ``checkpoint``; ``where`` may name a subplot (row, col)."""
    figure.add_vline(x=checkpoint, line={"color": theme.ink, "width": 1.2, "dash": "dash"}, **where)
    figure.add_annotation(
        x=checkpoint,
        y=1,
        yref="y domain",
        text=text,
        showarrow=False,
        yanchor="bottom",
        font={"size": 11, "color": theme.muted},
        **where,
    )
