"""``driftlens export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from driftlens.cli.common import JsonOption, QuietOption, emit, note

__all__ = ["export"]


def export(
    run: Annotated[Path, typer.Argument(help="A scored or recorded run.")],
    to: Annotated[Literal["parquet", "netcdf", "csv"], typer.Option("--to", help="Format of the files.")] = "parquet",
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder to make (default: RUN's name and the format).")
    ] = None,
    level: Annotated[
        Literal["probe", "site"], typer.Option(help="probe: without the tables by site, expert and pathway.")
    ] = "probe",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder of an earlier export.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write all tables of a run as tidy files or as netCDF, with the definition of every number."""
    from driftlens.analysis import export_run

    folder = out if out is not None else Path(f"{run.resolve().name}-{to}")
    rows = export_run(run, folder, to, level=level, overwrite=overwrite)
    emit(rows, as_json=as_json)
    note(f"Wrote {len(rows)} files and export.json, which says what they hold, to {folder}.", quiet)
