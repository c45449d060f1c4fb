"""Runs as labelled tables: opening, aligning, measuring, comparing and thinning them.

Names are loaded on first use, so that listing a folder of runs does not wait for xarray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from driftlens.analysis.comparison import compare
    from driftlens.analysis.export import comparison_dataset, export_run
    from driftlens.analysis.families import FAMILIES, REASONS, Composed, Family, Statistics
    from driftlens.analysis.frames import metric_names, summarise, table
    from driftlens.analysis.inputs import token_table_hash
    from driftlens.analysis.listing import RunEntry, list_runs
    from driftlens.analysis.matching import align_experts, match_experts
    from driftlens.analysis.nulls import null_table
    from driftlens.analysis.pairs import Pair, PairGrams, Pass
    from driftlens.analysis.reference import reference_drift
    from driftlens.analysis.run import Checkpoint, Run, open_run
    from driftlens.analysis.thin import thin_run
    from driftlens.analysis.validity import Validity, validity

__all__ = [
    "FAMILIES",
    "REASONS",
    "Checkpoint",
    "Composed",
    "Family",
    "Pair",
    "PairGrams",
    "Pass",
    "Run",
    "RunEntry",
    "Statistics",
    "Validity",
    "align_experts",
    "compare",
    "comparison_dataset",
    "export_run",
    "list_runs",
    "match_experts",
    "metric_names",
    "null_table",
    "open_run",
    "reference_drift",
    "summarise",
    "table",
    "thin_run",
    "token_table_hash",
    "validity",
]

_HOMES = {
    "compare": "comparison",
    "comparison_dataset": "export",
    "export_run": "export",
    "FAMILIES": "families",
    "REASONS": "families",
    "Composed": "families",
    "Family": "families",
    "Statistics": "families",
    "metric_names": "frames",
    "summarise": "frames",
    "table": "frames",
    "token_table_hash": "inputs",
    "RunEntry": "listing",
    "list_runs": "listing",
    "align_experts": "matching",
    "match_experts": "matching",
    "null_table": "nulls",
    "Pair": "pairs",
    "PairGrams": "pairs",
    "Pass": "pairs",
    "reference_drift": "reference",
    "Checkpoint": "run",
    "Run": "run",
    "open_run": "run",
    "thin_run": "thin",
    "Validity": "validity",
    "validity": "validity",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
