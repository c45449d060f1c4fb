"""``driftlens analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from driftlens.cli.common import JsonOption, QuietOption, emit, note
from driftlens.errors import ConfigError

__all__ = ["analyze"]

_SHOWN = [
    "probe",
    "checkpoint_name",
    "router_js",
    "router_js_low",
    "router_js_high",
    "router_js_noise",
    "codrift_divergence",
    "codrift_router",
    "codrift_experts",
    "coupling",
    "gate_entropy",
    "specialisation",
    "near_uniform_share",
]


def analyze(
    run: Annotated[Path, typer.Argument(help="A recorded run.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the rows to a .csv, .parquet or .json file.")] = None,
    level: Annotated[Literal["probe", "site"], typer.Option(help="One row per old task, or per site.")] = "probe",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compute the drift tables of a run: one row per old task and checkpoint."""
    from driftlens.analysis import open_run, summarise

    if out is not None and out.suffix not in (".csv", ".parquet", ".json"):
        raise ConfigError(f"Cannot tell the format of {out.name!r}. Allowed endings: .csv, .parquet, .json.")
    rows = summarise(open_run(run), level=level)
    if out is not None:
        import pandas as pd

        from driftlens.figures import csv_text
        from driftlens.store import atomic_file

        frame = pd.DataFrame(rows)
        with atomic_file(out) as partial:
            if out.suffix == ".csv":
                partial.write_text(csv_text(frame), encoding="utf-8")
            elif out.suffix == ".parquet":
                frame.to_parquet(partial, index=False)
            else:
                frame.to_json(partial, orient="records", indent=1)
        note(f"Wrote {len(frame)} rows to {out}.", quiet)
        if not as_json:
            return
    shown = [column for column in _SHOWN if rows and column in rows[0]]
    emit(rows, as_json=as_json, columns=shown or None)
