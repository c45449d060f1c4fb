"""Second part of the page: where in the network the old tasks drifted, and one cell of the map in detail."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd
import streamlit as st

from app import state
from app.parts import chart, guard, safe, theme
from app.sources import Loaded
from driftlens.analysis import Run
from driftlens.figures import (
    MAP_METRICS,
    cell_table,
    codrift_map,
    codrift_table,
    definition_of,
    depth_order,
    interval,
    map_range,
    number,
    routing_flow,
    routing_table,
)

__all__ = ["show"]

_ALL = "All old tasks (mean)"


def show(runs: dict[str, Loaded]) -> None:
    """Draw the co-drift map of every run, the controls above it, and the chosen cell below it."""
    st.header("Where it drifted", anchor="drifted")
    first = next(iter(runs.values())).run
    left, middle, _ = st.columns([1, 1, 1], gap="medium")
    tasks = [str(name) for name in first.drift["probe"].to_numpy()]
    task = left.selectbox(
        "Old task", state.options("task", ["", *tasks]), key="task", format_func=lambda name: name or _ALL
    )
    quantity = middle.selectbox(
        "Quantity",
        state.options("quantity", list(MAP_METRICS)),
        key="quantity",
        format_func=lambda name: MAP_METRICS[name],
    )
    _cell_options(first)
    if len(runs) == 1:
        [(name, opened)] = runs.items()
        wide, narrow = st.columns([4, 3], gap="large")
        with wide:
            _map(name, opened.run, [opened.run], task, quantity, 0)
        with narrow:
            _detail(runs, task)
        return
    everyone = [opened.run for opened in runs.values()]
    for place, ((name, opened), column) in enumerate(zip(runs.items(), st.columns(2, gap="large"), strict=True)):
        with column:
            _map(name, opened.run, everyone, task, quantity, place)
    _detail(runs, task)


def _cell_options(run: Run) -> None:
    """Make the chosen cell one that exists; none is chosen where there is none."""
    state.options("site", ["", *depth_order(run)["site"]])
    state.options("checkpoint", ["", *(str(value) for value in run.drift["checkpoint"].to_numpy())])


def _map(name: str, run: Run, everyone: list[Run], task: str, quantity: str, place: int) -> None:
    key = f"codrift_map_{place}"
    sites = depth_order(run)["site"].tolist()

    def clicked() -> None:
        points = st.session_state[key]["selection"]["points"]
        if points:
            row, checkpoint = points[-1]["customdata"][:2]
            state.choose(site=sites[int(row)], checkpoint=str(int(checkpoint)))

    with guard(f"Co-drift map of {name}"):
        cell = st.session_state["site"], st.session_state["checkpoint"]
        figure = codrift_map(
            run,
            metric=quantity,
            probe=task or None,
            theme=theme(),
            most=map_range(everyone, quantity, task or None),
            selected=(cell[0], int(cell[1])) if all(cell) else None,
        )
        chart(figure, codrift_table(run, quantity, task or None), key, run=name, on_select=clicked)


def _detail(runs: dict[str, Loaded], task: str) -> None:
    """Draw the chosen cell: select boxes as a second way in, then its numbers and its routing."""
    first = next(iter(runs.values())).run
    sites = depth_order(first)
    labels = dict(zip(sites["site"], sites["label"], strict=True))
    names = dict(
        zip(first.drift["checkpoint"].to_numpy().astype(str), first.drift["checkpoint_name"].to_numpy(), strict=True)
    )
    st.subheader("One cell of the map", anchor="cell")
    left, right = st.columns(2, gap="small")
    site = left.selectbox(
        "Site", ["", *sites["site"]], key="site", format_func=lambda name: labels.get(name, "choose, or click the map")
    )
    checkpoint = right.selectbox(
        "Checkpoint", ["", *names], key="checkpoint", format_func=lambda value: str(names.get(value, "choose"))
    )
    if not site or not checkpoint:
        st.info("Click a cell of the map, or choose a site and a checkpoint, to see everything measured there.")
        return
    columns = st.columns(len(runs), gap="large")
    for place, ((name, opened), column) in enumerate(zip(runs.items(), columns, strict=True)):
        with column:
            if len(runs) > 1:
                st.markdown(f"**{safe(name)}**")
            with guard(f"Cell of {name}"):
                rows = cell_table(opened.run, int(checkpoint), site, task or None)
                _numbers(rows, task, f"cell_{place}")
                if task:
                    figure = routing_flow(opened.run, probe=task, site=site, theme=theme())
                    chart(figure, routing_table(opened.run, task, site), f"cell_routing_{place}", run=name)


def _blank(value: float) -> str:
    return "" if math.isnan(value) else number(value)


def _value(row: Mapping[Hashable, Any]) -> str:
    return row["undefined"] or f"{number(row['value'])} {interval(row['low'], row['high'])}".rstrip()


def _numbers(rows: pd.DataFrame, task: str, key: str) -> None:
    if not len(rows):
        st.info("No task is old at this checkpoint.")
        return
    rows = rows.assign(quantity=[definition_of(metric).title for metric in rows["metric"]])
    if rows["near_uniform"].any():
        st.warning("The gate is nearly uniform here: it never routed, so its drift says nothing.")
    if task:
        shown = pd.DataFrame(
            {
                "quantity": rows["quantity"],
                "value [95 %]": [_value(row) for row in rows.to_dict("records")],
                "unchanged": [_blank(value) for value in rows["noise_floor"]],
                "chance": [_blank(value) for value in rows["chance"]],
            }
        )
    else:
        shown = rows.pivot_table(index="quantity", columns="probe", values="value", dropna=False)
        shown = shown.loc[list(dict.fromkeys(rows["quantity"])), list(dict.fromkeys(rows["probe"]))].reset_index()
        shown[shown.columns[1:]] = shown[shown.columns[1:]].map(number)
    st.dataframe(
        shown,
        hide_index=True,
        key=key,
        height="content",
        column_config={"quantity": st.column_config.TextColumn(width=150)},
        alt="Everything measured in the chosen cell",
    )
    if task:
        st.caption("Unchanged: what the number reads between two recordings of one checkpoint (its noise floor).")
