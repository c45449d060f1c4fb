"""``driftlens record``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from driftlens.cli.common import JsonOption, QuietOption, emit, note, progress_bar
from driftlens.errors import ConfigError

__all__ = ["record"]


def record(
    run: Annotated[Path | None, typer.Option("--run", help="Record every checkpoint of this run; resumable.")] = None,
    ckpt: Annotated[Path | None, typer.Option("--ckpt", help="Record one checkpoint (an adapter folder).")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model: builtin, a hub id or a folder.")] = None,
    probes: Annotated[
        Path | None, typer.Option("--probes", help="Probe set folder (default: the run's, or the built-in stream's).")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="With --ckpt: the file to write.")] = None,
    semantics: Annotated[
        str | None, typer.Option("--semantics", help="With --ckpt: forward of a CoIN, MCITlib or Prism folder.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="With --ckpt: an anchor to apply to the same inputs.")
    ] = None,
    tokens_per_sample: Annotated[
        int | None, typer.Option("--tokens-per-sample", min=1, help="Keep this many token rows of each sample.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Samples per forward.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make recordings anew that are there already.")] = False,
    overhead: Annotated[
        int, typer.Option("--overhead", min=0, help="With --ckpt: batches to measure overhead on.")
    ] = 0,
    max_buffer_mb: Annotated[
        float | None, typer.Option("--max-buffer-mb", help="With --ckpt: megabytes between model and file at most.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it takes in tokens, bytes and time; write nothing.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write router distributions and pathway activations of checkpoints on fixed probes to HDF5."""
    if (run is None) == (ckpt is None):
        raise ConfigError("Give exactly one of --run RUN (every checkpoint of a run) and --ckpt CKPT (one of them).")
    from driftlens.recording import estimate_checkpoint, record_checkpoint

    if run is not None:
        if out is not None:
            raise ConfigError("--out belongs to --ckpt; recordings of a run go into the run folder.")
        if semantics is not None:
            raise ConfigError("--semantics belongs to --ckpt; a run holds checkpoints of our own.")
        if reference is not None:
            raise ConfigError(
                "--reference belongs to --ckpt: in a run every probe has an anchor of its own. Record one "
                "checkpoint: driftlens record --ckpt RUN/checkpoints/NAME --reference RUN/checkpoints/ANCHOR"
            )
        if max_buffer_mb is not None:
            raise ConfigError("--max-buffer-mb belongs to --ckpt.")
        options = {"probes": probes, "base": base, "batch_size": batch_size, "tokens_per_sample": tokens_per_sample}
        _record_run(run, options, fresh=fresh, dry_run=dry_run, as_json=as_json, quiet=quiet)
        return
    assert ckpt is not None  # exactly one of the two is given
    given: dict[str, Any] = {
        "base": base,
        "probes": probes,
        "out": out,
        "semantics": semantics,
        "reference": reference,
        "batch_size": batch_size or 16,
        "tokens_per_sample": tokens_per_sample,
    }
    if dry_run:
        emit([estimate_checkpoint(ckpt, **given).row()], as_json=as_json)
        return
    with progress_bar(quiet) as report:
        summary = record_checkpoint(
            ckpt,
            **given,
            overwrite=fresh,
            overhead_batches=overhead,
            max_buffer_mb=max_buffer_mb,
            progress=report,
        )
    if os.environ.get("RANK", "0") == "0":  # of several launched processes one speaks
        emit([summary.row()], as_json=as_json)


def _record_run(run: Path, options: dict[str, Any], *, fresh: bool, dry_run: bool, as_json: bool, quiet: bool) -> None:
    from driftlens.recording import estimate_run, record_run

    if dry_run:
        emit([estimate.row() for estimate in estimate_run(run, **options)], as_json=as_json)
        return
    with progress_bar(quiet) as report:
        summaries = record_run(run, **options, resume=not fresh, progress=report)
    emit([summary.row() for summary in summaries], as_json=as_json)
    note(f"Next: driftlens analyze {run}", quiet or as_json)
