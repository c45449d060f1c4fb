"""The data-health strip: what the numbers below rest on."""

from __future__ import annotations

import math

import streamlit as st

from app.parts import guard, safe
from app.sources import Loaded
from driftlens.analysis import RunEntry
from driftlens.figures import number

__all__ = ["strip"]


def strip(opened: Loaded, entry: RunEntry) -> None:
    """Draw the badges of one run and, below them, what is wrong with its files."""
    run = opened.run
    with st.container(horizontal=True, gap="small"):
        if not entry.complete:
            st.badge("still training", icon=":material/hourglass_top:", color="orange")
        recorded, known = len(run.recorded), len(run.checkpoints)
        st.badge(
            f"{recorded} of {known} checkpoints recorded",
            icon=":material/database:",
            color="green" if recorded == known else "orange",
            help="Drift needs a recording of the checkpoint that learned a task and of the later one.",
        )
        if opened.problems:
            st.badge(
                f"{len(opened.left_out)} unreadable, left out",
                icon=":material/broken_image:",
                color="red",
                help="The files named below are left out; everything else is shown.",
            )
        if opened.drift_error is None:
            with guard("Data health"):
                _drift_badges(opened)
    for problem in opened.problems:
        st.warning(safe(problem), icon=":material/warning:")


def _drift_badges(opened: Loaded) -> None:
    last = opened.run.trend.isel(checkpoint=-1)
    floor = float(last["router_js_noise"])
    if math.isnan(floor):
        st.badge(
            "noise floor not recorded",
            icon=":material/graphic_eq:",
            color="orange",
            help="Without a second recording of a checkpoint, no one can say which differences are mere noise.",
        )
    else:
        st.badge(
            f"noise floor {number(floor)}",
            icon=":material/graphic_eq:",
            color="gray",
            help="Routing drift between two recordings of the same checkpoint: smaller differences mean nothing.",
        )
    share = float(last["near_uniform_share"])
    if not math.isnan(share):
        st.badge(
            f"near-uniform gates {100 * share:.0f} %",
            icon=":material/balance:",
            color="green" if share == 0 else "orange" if share < 1 else "red",
            help="Share of sites with a gate entropy above 0.99 at the last checkpoint: such gates cannot drift.",
        )
