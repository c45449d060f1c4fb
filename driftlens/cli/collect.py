"""``driftlens collect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftlens.cli.common import JsonOption, QuietOption, emit, note

__all__ = ["collect"]


def collect(
    recordings: Annotated[
        list[Path], typer.Argument(help="Recordings (.h5), one per task checkpoint, in the order of the tasks.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The run folder to make.")],
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="Tasks learned before each recording: a,b,c (default: the probes').")
    ] = None,
    start: Annotated[Path | None, typer.Option("--start", help="Recording of the model before the first task.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="Name of the method.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a run of recordings that were made one by one with `record --ckpt`, ready to analyze and compare."""
    from driftlens.analysis.collect import collect as make

    names = None if tasks is None else [name.strip() for name in tasks.split(",")]
    run = make(recordings, out, tasks=names, start=start, method=method)
    rows = [{"run": str(run.path), "checkpoint": point.name, "task": point.task} for point in run.checkpoints]
    emit(rows, as_json=as_json)
    note(f"Next: driftlens analyze {out}", quiet or as_json)
