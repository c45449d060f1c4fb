"""The few rules that Streamlit's own settings cannot express: card grid, tighter page, small captions."""

from __future__ import annotations

import streamlit as st

__all__ = ["apply"]

_RULES = """
<style>
  .stMainBlockContainer { padding: 2.2rem 2.4rem 4rem; max-width: 1560px; }
  h1 { font-size: 1.9rem !important; padding: 0 0 .1rem !important; overflow-wrap: anywhere; }
  h3 { font-size: 1.1rem !important; padding: .4rem 0 .1rem !important; }
  h2 { font-size: 1.35rem !important; padding: 1.6rem 0 .1rem !important; }
  div[class*="st-key-cards"] { display: grid; gap: .8rem;
    grid-template-columns: repeat(auto-fit, minmax(9.6rem, 1fr)); }
  div[class*="st-key-cards"] > * { width: auto !important; height: 100%; }
  div[class*="st-key-cards"] [data-testid="stMetricValue"] { font-size: 1.7rem; line-height: 1.25; }
  div[class*="st-key-cards"] [data-testid="stCaptionContainer"] code { padding: 0; background: none; }
  div[class*="st-key-cards"] [data-testid="stCaptionContainer"] { line-height: 1.3; }
  @media (max-width: 640px) {
    .stMainBlockContainer { padding: 3.4rem 1rem 3rem; }
    h1 { font-size: 1.5rem !important; }
    div[class*="st-key-cards"] { gap: .5rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
  }
</style>
"""


def apply() -> None:
    """Put the rules on the page."""
    st.html(_RULES)
