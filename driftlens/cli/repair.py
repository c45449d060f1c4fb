"""``driftlens repair``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from driftlens.cli.common import JsonOption, QuietOption, emit, note
from driftlens.errors import FormatError

if TYPE_CHECKING:
    from driftlens.store.repair import RunIdentity

__all__ = ["repair"]


def repair(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done; change nothing.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Bring a run folder in order: left-overs removed, damaged files set aside, sound ones listed. Loses no good file.

    What is damaged goes to RUN/.repair-DATE. Exit code 4 if something can only be restored from a copy.
    """
    from driftlens.store.repair import repair_run

    steps = repair_run(run, dry_run=dry_run, describe=_identity)
    emit([{"action": s.action, "path": s.path, "why": s.why} for s in steps], as_json=as_json)
    unsolved = sum(step.unsolved for step in steps)
    if unsolved:
        raise FormatError(
            f"{unsolved} part(s) of {run} can only be restored from a copy; the list above names them. "
            "Everything else was put in order."
            if not dry_run
            else f"{unsolved} part(s) of {run} could only be restored from a copy; nothing was changed."
        )
    if dry_run:
        note("Nothing was changed (--dry-run).", quiet or as_json)
    else:
        # a run that was collected from recordings has no checkpoints to record
        following = "record --run" if (run / "checkpoints").is_dir() else "analyze"
        note(f"{run} is in order. Next: driftlens {following} {run}", quiet or as_json)


def _identity(run: Path) -> RunIdentity:
    # Needs the configuration's schema and the stream, and with them torch: only where a manifest is rebuilt.
    from driftlens.store.repair import RunIdentity
    from driftlens.training.config import load_config
    from driftlens.training.run import build_stream

    config = load_config(run / "config.yaml")
    stream = build_stream(config)
    return RunIdentity(
        config_hash=config.digest(),
        stream_sha256=stream.sha256,
        base=config.base,
        seed=config.training.seed,
        threads=config.training.threads or 0,
        tasks=len(stream.tasks),
    )
