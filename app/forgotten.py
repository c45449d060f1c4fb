"""First part of the page: what was forgotten."""

from __future__ import annotations

import streamlit as st

from app import state
from app.parts import chart, guard, theme
from app.sources import Loaded
from driftlens.figures import SCORERS, accuracy_curves, accuracy_matrix, accuracy_table

__all__ = ["show"]

_LABELS = {"strict": "Exact", "lenient": "Form forgiven", "nll": "Surprise (nats)"}


def show(runs: dict[str, Loaded]) -> None:
    """Draw the accuracy matrix and the accuracy curves of every run."""
    st.header("What was forgotten", anchor="forgotten")
    chosen = st.segmented_control(
        "How answers are scored",
        state.options("scorer", list(SCORERS)),
        key="scorer",
        format_func=lambda name: _LABELS[name],
        required=True,
        help="Exact: letter by letter. Form forgiven: case, punctuation, articles and number words do not count. "
        "Surprise: how unlikely the right answer was to the model; lower is better.",
    )
    scorer = chosen or "strict"
    most = None
    if scorer == "nll":
        with guard("Scores"):
            most = max(float(opened.run.scores["nll"].max()) for opened in runs.values())
    if len(runs) == 1:
        [(name, opened)] = runs.items()
        left, right = st.columns(2, gap="large")
        with left:
            _matrix(name, opened, scorer, most, 0)
        with right:
            _curves(name, opened, scorer, most, 0)
        return
    for draw in (_matrix, _curves):
        for place, ((name, opened), column) in enumerate(
            zip(runs.items(), st.columns(len(runs), gap="large"), strict=True)
        ):
            with column:
                draw(name, opened, scorer, most, place)


def _matrix(name: str, opened: Loaded, scorer: str, most: float | None, place: int) -> None:
    with guard(f"Accuracy matrix of {name}"):
        figure = accuracy_matrix(opened.run, scorer=scorer, theme=theme(), most=most)
        chart(figure, accuracy_table(opened.run, scorer), f"accuracy_matrix_{place}", run=name)


def _curves(name: str, opened: Loaded, scorer: str, most: float | None, place: int) -> None:
    with guard(f"Accuracy curves of {name}"):
        figure = accuracy_curves(opened.run, scorer=scorer, theme=theme(), most=most)
        chart(figure, accuracy_table(opened.run, scorer), f"accuracy_curves_{place}", run=name)
