"""Third part of the page: how the routing of old tasks moved, and how far."""

from __future__ import annotations

import streamlit as st

from app import state
from app.parts import chart, guard, theme
from app.sources import Loaded
from driftlens.analysis import Run
from driftlens.figures import (
    depth_order,
    drift_lines,
    drift_table,
    line_top,
    routing_flow,
    routing_multiples,
    routing_table,
)

__all__ = ["show"]


def show(runs: dict[str, Loaded]) -> None:
    """Draw routing over time and the drift lines of every run."""
    st.header("How routing moved", anchor="routed")
    task = st.session_state["task"]
    sites = depth_order(next(iter(runs.values())).run)
    labels = dict(zip(sites["site"], sites["label"], strict=True))
    left, _ = st.columns([1, 2], gap="medium")
    at = left.selectbox(
        "Routing at",
        state.options("at", ["", *sites["site"]]),
        key="at",
        format_func=lambda name: labels.get(name, "All sites (mean)"),
        help="Expert numbers mean nothing across sites, and means level out: look at single sites too.",
    )
    site = at or None
    if len(runs) == 1:
        [(name, opened)] = runs.items()
        if task:
            left, right = st.columns(2, gap="large")
            with left:
                _flow(name, opened.run, task, site, 0)
            with right:
                _multiples(name, opened.run, site, 0, 2)
        else:
            _multiples(name, opened.run, site, 0, 3)
    else:
        for place, ((name, opened), column) in enumerate(zip(runs.items(), st.columns(2, gap="large"), strict=True)):
            with column:
                if task:
                    _flow(name, opened.run, task, site, place)
                _multiples(name, opened.run, site, place, 2)
    st.header("How far it went", anchor="far")
    everyone = [opened.run for opened in runs.values()]
    metrics = ("router_js", "codrift_divergence")
    if len(runs) == 1:
        [(name, opened)] = runs.items()
        for metric, column in zip(metrics, st.columns(2, gap="large"), strict=True):
            with column:
                _lines(name, opened.run, everyone, metric, 0)
        return
    for metric in metrics:
        for place, ((name, opened), column) in enumerate(zip(runs.items(), st.columns(2, gap="large"), strict=True)):
            with column:
                _lines(name, opened.run, everyone, metric, place)


def _flow(name: str, run: Run, task: str, site: str | None, place: int) -> None:
    with guard(f"Routing of {task} in {name}"):
        figure = routing_flow(run, probe=task, site=site, theme=theme())
        chart(figure, routing_table(run, task, site), f"routing_flow_{place}", run=name)


def _multiples(name: str, run: Run, site: str | None, place: int, columns: int) -> None:
    with guard(f"Routing in {name}"):
        figure = routing_multiples(run, site=site, theme=theme(), columns=columns)
        chart(figure, routing_table(run, None, site), f"routing_multiples_{place}", run=name)


def _lines(name: str, run: Run, everyone: list[Run], metric: str, place: int) -> None:
    with guard(f"Drift lines of {name}"):
        top = line_top([drift_table(other, metric) for other in everyone])
        figure = drift_lines(run, metric=metric, theme=theme(), most=top)
        chart(figure, drift_table(run, metric), f"drift_lines_{metric}_{place}", run=name)
