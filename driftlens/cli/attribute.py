"""``driftlens attribute``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from driftlens.cli.common import JsonOption, QuietOption, console, emit, note, printable, progress_bar
from driftlens.errors import ConfigError

if TYPE_CHECKING:
    from driftlens.attribution import AttributionEstimate, CellSummary

__all__ = ["attribute", "parse_at"]


def attribute(
    run: Annotated[Path | None, typer.Argument(help="A run with the weights of its checkpoints.")] = None,
    task: Annotated[list[str] | None, typer.Option("--task", help="An old task (repeatable; default: all).")] = None,
    at: Annotated[str, typer.Option("--at", help="Current checkpoints: last, all, or indices such as 4,6.")] = "last",
    nodes: Annotated[int, typer.Option("--nodes", help="Nodes of the ledger's path.")] = 8,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="Refine until the residual is below this share of the rise.")
    ] = None,
    no_swaps: Annotated[bool, typer.Option("--no-swaps", help="Leave the exact swaps out.")] = False,
    depth: Annotated[int, typer.Option("--depth", help="Groups of layers that share out the rise; 0: none.")] = 4,
    depth_parts: Annotated[
        bool, typer.Option("--depth-parts", help="Router and experts of each group apart (many more forwards).")
    ] = False,
    restores: Annotated[bool, typer.Option("--restores", help="Also put every site back alone.")] = False,
    anchor: Annotated[
        Path | None, typer.Option("--anchor", help="Without a run: the earlier of two adapter folders.")
    ] = None,
    current: Annotated[Path | None, typer.Option("--current", help="Without a run: the later one.")] = None,
    probes: Annotated[Path | None, typer.Option("--probes", help="Without a run: probe set with answers.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Without a run: the file to write (.h5).")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model: builtin, a hub id or a folder.")] = None,
    semantics: Annotated[
        str | None, typer.Option("--semantics", help="Without a run: forward of a CoIN, MCITlib or Prism folder.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples per forward.")] = 16,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make anew what is there already.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it takes in forwards, time and bytes; write nothing.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Book every unit of lost likelihood to a site, and there to router or experts; exact swaps beside it."""
    between = {"--anchor": anchor, "--current": current, "--probes": probes, "--out": out}
    _check(run, at, between, semantics)
    from driftlens.attribution import (
        AttributionOptions,
        attribute_pair,
        attribute_run,
        estimate_pair,
        estimate_run_attribution,
    )

    options = AttributionOptions(
        nodes=nodes,
        tolerance=tolerance,
        max_nodes=max(64, nodes),
        swaps=not no_swaps,
        depth=depth,
        depth_parts=depth_parts,
        restores=restores,
        batch_size=batch_size,
    )
    wanted: dict[str, Any] = {"options": options, "tasks": task or None, "base": base}
    if run is not None:
        wanted |= {"run": run, "at": parse_at(at)}
    else:
        wanted |= {"anchor": anchor, "current": current, "probes": probes, "out": out, "semantics": semantics}
    if dry_run:
        estimates = (estimate_pair if run is None else estimate_run_attribution)(**wanted)
        emit([estimate.row() for estimate in estimates], as_json=as_json)
        return

    def say(estimates: Sequence[AttributionEstimate]) -> None:
        note(_cost(estimates), quiet or as_json)

    with progress_bar(quiet) as report:
        work = attribute_pair if run is None else attribute_run
        summaries = work(**wanted, resume=not fresh, progress=report, on_estimate=say)
    rows = _rows(run, summaries)
    if as_json:
        emit(rows, as_json=True)
        return
    _print(rows)
    python = "" if run is None else f" In Python: dl.open({str(run)!r}).attribution"
    note(f"Kept in {', '.join(str(summary.path) for summary in summaries)}.{python}", quiet)


def _check(run: Path | None, at: str, between: Mapping[str, Path | None], semantics: str | None) -> None:
    given = [name for name, value in between.items() if value is not None]
    if run is None and not given:
        raise ConfigError(
            "Give a RUN, or two adapters of one base: --anchor CKPT --current CKPT --probes DIR --out FILE."
        )
    if run is not None and (given or semantics is not None):
        named = given[0] if given else "--semantics"
        raise ConfigError(f"{named} belongs to two adapters without a run; a RUN has its own. Leave one of them out.")
    missing = [name for name, value in between.items() if value is None]
    if run is None and missing:
        raise ConfigError(f"{', '.join(missing)} is missing: two adapters need {', '.join(between)}.")
    if run is None and at != "last":
        raise ConfigError("--at belongs to a RUN; two adapters are compared with each other alone.")


def parse_at(at: str) -> Any:
    """Return what ``--at`` says: ``last``, ``all`` or a list of indices; ConfigError if it says neither."""
    if at in ("last", "all"):
        return at
    try:
        return [int(index) for index in at.split(",")]
    except ValueError:
        raise ConfigError(f"--at is {at!r}; give last, all, or indices of checkpoints such as 4 or 4,6.") from None


def _rows(run: Path | None, summaries: Sequence[CellSummary]) -> list[dict[str, Any]]:
    from driftlens.analysis import open_run
    from driftlens.analysis.attribution import attribution_rows, open_attribution

    if run is None:
        return attribution_rows(open_attribution(*(summary.path for summary in summaries)))
    asked = {(summary.task, summary.checkpoint) for summary in summaries}
    rows = attribution_rows(open_run(run).attribution)
    return [row for row in rows if (row["task"], row["checkpoint_name"]) in asked]


def _cost(found: Sequence[AttributionEstimate]) -> str:
    seconds = sum(estimate.seconds or 0.0 for estimate in found)
    about = f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.0f} s"
    each = found[0]
    replaced = sum(estimate.note.startswith("there already") for estimate in found)
    also = f" {replaced} of them replace a file made with other settings or checkpoints." if replaced else ""
    return (
        f"{len(found)} old task(s), each {each.forwards} forwards, {each.backwards} backwards and {each.scorings} "
        f"scorings of all samples: about {about}, {sum(e.bytes or 0 for e in found) / 1e6:.1f} MB before compression."
        f"{also}"
    )


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a line per task, then its largest sites and what is to be said about it."""
    shown = [
        {
            "task": row["task"],
            "at": row["checkpoint_name"],
            "forgetting": row["forgetting_lenient"],
            "rise": row["rise"],
            "ledger router": row["ledger_router"],
            "ledger experts": row["ledger_experts"],
            "residual": row["residual"],
            **{
                f"{name} ({score})": _between(row, f"{name}_{score}")
                for score in ("lenient", "nll")
                for name in ("phi_router", "phi_experts")
                if f"{name}_{score}" in row
            },
        }
        for row in rows
    ]
    emit(shown, as_json=False)
    out = console()
    out.print("\nSites with the largest entries, nats booked to router and experts:", markup=False)
    for row in rows:
        out.print(f"  {printable(row['task'])} at {printable(row['checkpoint_name'])}", markup=False)
        if row["depth"]:
            parts = [
                f"{group['layers'].removesuffix(' both')} {group['value']:+.3f} (se {group['error']:.3f})"
                for group in row["depth"]
            ]
            out.print(f"    shared out by depth: {', '.join(parts)}", markup=False)
        for entry in row["largest"]:
            out.print(
                f"    {printable(entry['site'])}  router {entry['router']:+.3f}  experts {entry['experts']:+.3f}",
                markup=False,
            )
    for row in rows:
        for remark in row["notes"]:
            out.print(f"{printable(row['task'])}: {remark}.", markup=False)


def _between(row: Mapping[str, Any], name: str) -> str:
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return "-" if value != value else f"{value:.3f} [{low:.3f}, {high:.3f}]"
