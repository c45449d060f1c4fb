"""DriftLens: where and why a continually trained mixture-of-experts LoRA model forgets.

``import driftlens as dl`` loads nothing else; every name is loaded on first use, so that looking at recorded runs
never waits for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from driftlens import figures
    from driftlens.analysis import Run, align_experts, compare, comparison_dataset, export_run, match_experts, validity
    from driftlens.analysis import open_run as open  # noqa: A004 - `dl.open(path)` is the documented name
    from driftlens.recording import RecordCallback, record
    from driftlens.recording.weight_drift import weight_drift
    from driftlens.store import Recording, open_recording

__version__ = "0.1.0"

__all__ = [
    "RecordCallback",
    "Recording",
    "Run",
    "__version__",
    "align_experts",
    "compare",
    "comparison_dataset",
    "export_run",
    "figures",
    "match_experts",
    "open",
    "open_recording",
    "record",
    "validity",
    "weight_drift",
]

_HOMES = {
    "Recording": ("driftlens.store", "Recording"),
    "Run": ("driftlens.analysis", "Run"),
    "align_experts": ("driftlens.analysis", "align_experts"),
    "compare": ("driftlens.analysis", "compare"),
    "comparison_dataset": ("driftlens.analysis", "comparison_dataset"),
    "export_run": ("driftlens.analysis", "export_run"),
    "match_experts": ("driftlens.analysis", "match_experts"),
    "open": ("driftlens.analysis", "open_run"),
    "open_recording": ("driftlens.store", "open_recording"),
    "RecordCallback": ("driftlens.recording", "RecordCallback"),
    "record": ("driftlens.recording", "record"),
    "validity": ("driftlens.analysis", "validity"),
    "weight_drift": ("driftlens.recording.weight_drift", "weight_drift"),
}


def __getattr__(name: str) -> Any:
    if name == "figures":
        return importlib.import_module("driftlens.figures")
    if name not in _HOMES:
        raise AttributeError(f"module 'driftlens' has no attribute {name!r}")
    home, attribute = _HOMES[name]
    value = getattr(importlib.import_module(home), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
