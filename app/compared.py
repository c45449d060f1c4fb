"""Last part of the page, for two runs: the same numbers side by side."""

from __future__ import annotations

import streamlit as st

from app.parts import chart, guard, safe, theme
from app.sources import Loaded
from driftlens.analysis import compare
from driftlens.figures import BAR_METRICS, method_bars
from driftlens.figures.method_bars import bar_rows

__all__ = ["show"]


def show(runs: dict[str, Loaded]) -> None:
    """Draw the comparison of the chosen runs; say so where they cannot be compared."""
    st.header("Side by side", anchor="compared")
    with guard("Comparison"):
        frame = compare([opened.run for opened in runs.values()], strict=False)
        for note in frame.loc[~frame["comparable"].astype(bool), "note"]:
            st.warning(safe(note), icon=":material/warning:")
        left, right = st.columns([3, 2], gap="large")
        with left:
            chart(method_bars(frame, theme=theme()), bar_rows(frame), "method_bars")
        with right:
            table = frame.set_index("run")[[*BAR_METRICS, "BWT_T-1", "gate_entropy"]].T.round(3)
            st.dataframe(table, key="comparison", height="content", alt="Headline numbers of both runs")
