"""``driftlens train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftlens.cli.common import JsonOption, QuietOption, emit, note, progress_bar
from driftlens.errors import ConfigError, NotFoundError

__all__ = ["train"]


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [key=value ...]", help="Configuration file or preset, and overrides."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run folder to write.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model: builtin, a hub id or a folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would happen and what it costs.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train one method over one stream: one checkpoint per task, every task scored after every task."""
    from driftlens.training.config import load_config

    words = list(arguments or [])
    path: str | Path | None = words.pop(0) if words and "=" not in words[0] else None
    if base is not None:
        words.append(f"base={base}")
    if path is None and resume and out is not None:
        path = out / "config.yaml"
        if not path.is_file():
            raise NotFoundError(
                f"There is no run to resume in {out}: no config.yaml. Start without --resume, or name a configuration."
            )
    config = load_config(path, words)
    if dry_run:
        from driftlens.training.costs import estimate_costs

        emit(estimate_costs(config), as_json=as_json)
        return
    if out is None:
        raise ConfigError("Where to? Give --out RUN, a folder that does not hold a run yet (or --resume to continue).")
    from driftlens.training.run import train_run

    with progress_bar(quiet) as report:
        run = train_run(config, out, resume=resume, on_progress=report)
    from driftlens.analysis import open_run

    scores = open_run(run).stream.sel(scorer="strict")
    names = ("AP", "MAA", "MFT", "BWT_T", "BWT_T-1", "forgetting_max", "FWT")
    emit([{"run": str(run), "method": config.method_name} | {n: float(scores[n]) for n in names}], as_json=as_json)
    note(f"Next: driftlens record --run {run}", quiet or as_json)
