"""``driftlens reroute``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftlens.cli.attribute import parse_at
from driftlens.cli.common import JsonOption, QuietOption, emit, note, progress_bar

__all__ = ["reroute"]

_SHOWN = (
    "task", "checkpoint", "measure", "anchor", "current", "old_router", "rerouted",
    "forgetting", "recovered", "remaining", "phi_router", "phi_experts",
)  # fmt: skip


def reroute(
    run: Annotated[Path, typer.Argument(help="A run folder with its checkpoints.")],
    task: Annotated[list[str] | None, typer.Option("--task", help="Only this old task; may be repeated.")] = None,
    at: Annotated[str, typer.Option("--at", help="Checkpoints: last, all, or indices such as 4,6.")] = "last",
    steps: Annotated[int | None, typer.Option("--steps", help="Training steps (default: the run's).")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model, if it lies elsewhere now.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make results anew that are there already.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would happen and what it costs.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Freeze the experts, retrain the routers on old tasks, score: what comes back was lost by the routers."""
    from driftlens.attribution.reroute import estimate_reroute, reroute_run
    from driftlens.attribution.swaps import MEASURES

    where = parse_at(at)
    if dry_run:
        emit(estimate_reroute(run, tasks=task, at=where, steps=steps), as_json=as_json)
        return
    with progress_bar(quiet) as report:
        found = reroute_run(run, tasks=task, at=where, steps=steps, base=base, resume=not fresh, progress=report)
    rows = [result.row(measure) for result in found for measure in MEASURES]
    emit(rows, as_json=as_json, columns=_SHOWN)
    note(
        "recovered: rerouted - current (a router retrained on the task, up to the best one for these experts). "
        "phi_router: exact swap with the task's own old router. Both in accuracy, or nats for nll; positive: lost.",
        quiet or as_json,
    )
