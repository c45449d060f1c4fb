"""``driftlens compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftlens.cli.common import JsonOption, emit

__all__ = ["COMPARED", "compare"]

COMPARED = [
    "run",
    "method",
    "seed",
    "AP",
    "BWT_T",
    "BWT_T-1",
    "router_js",
    "router_js_low",
    "router_js_high",
    "codrift_divergence",
    "gate_entropy",
    "near_uniform_share",
]


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more runs over the same stream and probes.")],
    force: Annotated[bool, typer.Option("--force", help="Compare although streams or probes differ.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put runs side by side: performance over the stream and drift of the old tasks."""
    from driftlens.analysis import compare as compare_runs

    frame = compare_runs(runs, strict=not force)
    rows = frame.to_dict(orient="records")
    shown = COMPARED if not force else [*COMPARED, "comparable", "note"]
    emit(rows, as_json=as_json, columns=shown)
