"""The numbers that sum a run up, each with its interval and one plain sentence."""

from __future__ import annotations

import math

import streamlit as st

from app.parts import definition, guard, safe
from app.sources import Loaded
from driftlens.figures import CAPTIONS, number

__all__ = ["show"]

_SCORES = {"AP": "Final accuracy", "BWT_T": "Backward transfer", "BWT_T-1": "… of old tasks"}
_DRIFT = {
    "router_js": "Routing drift",
    "codrift_divergence": "Co-drift divergence",
    "gate_entropy": "Gate entropy",
}


def show(runs: dict[str, Loaded]) -> None:
    """Draw the cards of one run, or of two runs side by side."""
    columns = st.columns(len(runs), gap="large")
    for (name, opened), column in zip(runs.items(), columns, strict=True):
        with column, st.container(key=f"cards_{list(runs).index(name)}"):
            _cards(opened)
    with st.popover("What these numbers mean", icon=":material/menu_book:", type="tertiary"):
        for metric in CAPTIONS:
            definition(metric)


def _cards(opened: Loaded) -> None:
    with guard("Scores"):
        stream = opened.run.stream.sel(scorer="strict")
        for metric, label in _SCORES.items():
            value = float(stream[metric])
            _card(metric, label, _points(value, signed=metric != "AP"), "exact answers")
    if opened.drift_error is not None:
        return
    with guard("Drift"):
        last = opened.run.trend.isel(checkpoint=-1)
        nothing_old = int(last["n_old"]) == 0
        for metric, label in _DRIFT.items():
            value = float(last[metric])
            note = ""
            if nothing_old:
                note = "no old task yet"
            elif f"{metric}_low" in last:
                note = f"95 % [{number(float(last[f'{metric}_low']))}, {number(float(last[f'{metric}_high']))}]"
            _card(metric, label, "–" if math.isnan(value) else number(value), note or "mean over old tasks")


def _points(value: float, *, signed: bool) -> str:
    if math.isnan(value):
        return "–"
    return f"{100 * value:+.1f} pts" if signed else f"{100 * value:.1f} %"


def _card(metric: str, label: str, value: str, note: str) -> None:
    with st.container(border=True, gap="xsmall"):
        st.metric(safe(label), value)
        st.caption(f"`{metric}`  \n{safe(note)}")
        st.caption(safe(CAPTIONS[metric]))
