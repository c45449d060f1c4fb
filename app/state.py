"""The view state: what is chosen lives in the address, so that a shared link shows the same page.

Values are strings. They are read from the address when the page opens or the reader moves through the browser's
history, checked against what exists by `options`, and written back by `publish` at the end of every run of the script.
"""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

__all__ = ["DEFAULTS", "choose", "options", "publish", "restore"]

DEFAULTS = {
    "run": "",
    "beside": "",
    "scorer": "strict",
    "task": "",
    "quantity": "codrift_divergence",
    "site": "",
    "checkpoint": "",
    "at": "",
}
"""Every key of the view state with the value that the address leaves out."""

_PUBLISHED = "_published"


def restore() -> None:
    """Take the state from the address if it is not what this session wrote there last."""
    address = {key: value for key, value in st.query_params.to_dict().items() if key in DEFAULTS}
    if address == st.session_state.get(_PUBLISHED):
        return
    for key, default in DEFAULTS.items():
        st.session_state[key] = address.get(key, default)


def options(key: str, allowed: Sequence[str], default: str | None = None) -> list[str]:
    """Return ``allowed`` as a list after making sure that the value of ``key`` is one of them.

    Args:
        key: a key of `DEFAULTS`, used as widget key.
        allowed: what exists now.
        default: the value to fall back to; the first allowed one if None.
    """
    known = list(allowed)
    if st.session_state.get(key) not in known:
        st.session_state[key] = default if default is not None else (known[0] if known else "")
    return known


def choose(**values: str) -> None:
    """Set parts of the state; only from a callback, before the widgets of this run exist."""
    for key, value in values.items():
        st.session_state[key] = value


def publish(shown_by_default: dict[str, str]) -> None:
    """Write the state to the address, without what the page would show anyway.

    Args:
        shown_by_default: values that differ from `DEFAULTS` but need no mention (the first run of the folder).
    """
    silent = {**DEFAULTS, **shown_by_default}
    address = {
        key: str(st.session_state[key]) for key in DEFAULTS if st.session_state.get(key) not in (None, "", silent[key])
    }
    st.session_state[_PUBLISHED] = address
    if {key: value for key, value in st.query_params.to_dict().items() if key in DEFAULTS} != address:
        for key in DEFAULTS:
            if key in address:
                st.query_params[key] = address[key]
            elif key in st.query_params:
                del st.query_params[key]
