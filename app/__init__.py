"""The Streamlit dashboard: state, layout and words. Every number and figure comes from `driftlens`."""
