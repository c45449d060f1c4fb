"""Entry of the dashboard: ``streamlit run app/main.py [-- RUNS_FOLDER]``; without a folder it shows sample_runs/."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    # Streamlit puts only the script's own folder on the path; a fresh clone is not installed yet.
    sys.path.insert(0, str(ROOT))

import streamlit as st  # noqa: E402 - needs the path above

from app import overview  # noqa: E402

st.set_page_config(page_title="DriftLens", page_icon=str(ROOT / "app" / "icon.png"), layout="wide")
overview.show(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "sample_runs")
