"""The overview page: one run, or two side by side, from what was forgotten to how routing moved."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from app import compared, drifted, forgotten, headline, health, routed, sources, state, style
from app.parts import complain, safe
from app.sources import Loaded
from driftlens.analysis import RunEntry
from driftlens.errors import DriftLensError

__all__ = ["show"]

_NONE = "– none –"
_GUIDE = """
Time runs to the right in every figure: one step per **checkpoint**, taken after each task of the stream.

An **old task** is one learned before the checkpoint. Its **anchor** is the checkpoint that learned it. Drift compares
the same token at the anchor and now.

A **site** is one adapted module. Its **experts** are low-rank updates, and the **gate** says how much of each a token
gets.

Click a cell of the co-drift map to open it. The address keeps what you chose: copy it to share the view.
"""


def show(folder: Path) -> None:
    """Draw the page for the runs below ``folder``."""
    style.apply()
    state.restore()
    try:
        found = sources.entries(folder)
    except (DriftLensError, OSError) as error:
        _welcome(folder, str(error))
        return
    if not found:
        _welcome(folder, f"{folder} holds no run.")
        return
    chosen = _choose(folder, found)
    loaded = {name: _open(folder, found[name]) for name in chosen}
    _title(found, chosen, loaded)
    runs = {name: opened for name, opened in loaded.items() if opened is not None}
    if runs:
        _sections(runs)
    state.publish({"run": next(iter(found))})


def _welcome(folder: Path, problem: str) -> None:
    st.title("DriftLens")
    st.info(safe(problem), icon=":material/folder_open:")
    st.markdown("Make runs, then open the page on their folder:")
    st.code(f"driftlens demo\nstreamlit run app/main.py -- {folder.name}", language="bash")


def _choose(folder: Path, found: dict[str, RunEntry]) -> list[str]:
    """Draw the side bar; return the chosen runs, one or two."""

    def label(name: str) -> str:
        entry = found.get(name)
        if entry is None:
            return _NONE
        seed = "" if entry.seed is None else f" · seed {entry.seed}"
        return f"{name} · {entry.method}{seed}" if entry.method not in name else f"{name}{seed}"

    with st.sidebar:
        st.markdown("### DriftLens")
        st.caption("Where and why a continually trained mixture-of-experts LoRA model forgets.")
        run = st.selectbox("Run", state.options("run", list(found)), key="run", format_func=label)
        others = ["", *(name for name in found if name != run)]
        beside = st.selectbox("Compare with", state.options("beside", others), key="beside", format_func=label)
        st.caption(f"{len(found)} {'run' if len(found) == 1 else 'runs'} in {safe(folder.name)}/")
        with st.expander("How to read this page", icon=":material/help:"):
            st.markdown(_GUIDE)
    return [run, beside] if beside else [run]


def _open(folder: Path, entry: RunEntry) -> Loaded | None:
    """Open a run; show what is wrong in its place and return None if it cannot be read."""
    try:
        return sources.load(entry.path)
    except (DriftLensError, OSError) as error:
        complain(f"{entry.path.relative_to(folder).as_posix()} cannot be read", error)
        return None


def _title(found: dict[str, RunEntry], chosen: list[str], loaded: dict[str, Loaded | None]) -> None:
    columns = st.columns(len(chosen), gap="large")
    for name, column in zip(chosen, columns, strict=True):
        with column:
            entry = found[name]
            st.title(safe(name), anchor=False)
            tasks = " → ".join(entry.tasks) or "no task learned yet"
            st.markdown(f"**{safe(entry.method)}** on {len(entry.tasks)} tasks: {safe(tasks)}")
            opened = loaded[name]
            if opened is not None:
                health.strip(opened, entry)


def _sections(runs: dict[str, Loaded]) -> None:
    headline.show(runs)
    forgotten.show(runs)
    measured = {name: opened for name, opened in runs.items() if opened.drift_error is None}
    for name, opened in runs.items():
        if opened.drift_error is not None:
            complain(f"No drift to show for {name}", opened.drift_error)
    if measured:
        drifted.show(measured)
        routed.show(measured)
    if len(runs) > 1:
        compared.show(runs)
