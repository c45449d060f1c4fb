"""Parts that every section is made of: a figure with its words, a safe text, an error in its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from driftlens.errors import DriftLensError
from driftlens.figures import CONFIG, csv_text, definition_of, name_run

__all__ = ["chart", "complain", "definition", "guard", "safe", "theme"]

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>$~:&^=])")


def safe(text: object) -> str:
    """Return ``text`` for Streamlit's Markdown so that it is shown letter by letter."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))


def theme() -> Literal["light", "dark"]:
    """Return the look that the reader's browser shows."""
    return "dark" if st.context.theme.type == "dark" else "light"


@contextmanager
def guard(what: str) -> Iterator[None]:
    """Show an error of the block as a message in its place; the rest of the page goes on."""
    try:
        yield
    except (DriftLensError, OSError) as error:
        complain(what, error)


def complain(what: str, error: object) -> None:
    """Show that ``what`` failed, and why, where it would have stood."""
    st.error(f"**{safe(what)}**  \n{safe(error)}", icon=":material/error:")


def definition(metric: str) -> None:
    """Write the exact definition of ``metric``."""
    entry = definition_of(metric)
    st.markdown(f"**{safe(entry.title)}** `{entry.name}`")
    st.code(entry.formula, language=None, wrap_lines=True)
    facts = [f"Range {entry.range}"]
    if entry.chance:
        facts.append(f"chance {entry.chance}")
    if entry.within_run:
        facts.append("comparable within one run only")
    st.markdown(safe("; ".join(facts) + "."))
    if entry.caveat:
        st.markdown(safe(entry.caveat))
    st.caption(
        safe(f"Undefined when: {entry.undefined}. Source: {entry.source}; docs/metrics.md, section {entry.section}.")
    )


def chart(
    figure: go.Figure,
    rows: pd.DataFrame,
    key: str,
    *,
    run: str = "",
    on_select: Callable[[], None] | None = None,
) -> None:
    """Show a figure with its reading aid, its definition one click away and its rows as CSV.

    Args:
        figure: as `driftlens.figures` draws it.
        rows: exactly what it shows.
        key: unique on the page; also the name of the file.
        run: name of the run, written under the title where two runs stand side by side.
        on_select: called when the reader selects a point.
    """
    if run and st.session_state["beside"]:
        name_run(figure, run)
    with st.container(gap="xsmall"):
        _chart(figure, rows, key, on_select)


def _chart(figure: go.Figure, rows: pd.DataFrame, key: str, on_select: Callable[[], None] | None) -> None:
    words = figure.layout.meta
    title = re.sub(r"<[^>]+>", " ", figure.layout.title.text)
    st.plotly_chart(
        figure,
        key=key,
        theme=None,
        config=CONFIG,
        alt=f"{title}. {words['reading_aid']}",
        on_select=on_select or "ignore",
        selection_mode="points",
    )
    st.caption(safe(words["reading_aid"]))
    with st.container(horizontal=True, gap="small"):
        with st.popover("Definition", icon=":material/menu_book:", type="tertiary"):
            definition(words["metric"])
        st.download_button(
            "CSV",
            csv_text(rows),
            file_name=f"{key}.csv",
            mime="text/csv",
            key=f"{key}_csv",
            icon=":material/download:",
            type="tertiary",
            on_click="ignore",
        )
