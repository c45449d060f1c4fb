"""``driftlens weights``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from driftlens.cli.common import JsonOption, QuietOption, console, emit, note
from driftlens.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["weights"]

_MEASURES = [
    "subspace_overlap",
    "subspace_overlap_chance",
    "grassmann_distance",
    "output_overlap",
    "update_norm",
    "update_change",
    "update_cosine",
    "effective_rank",
    "silent_experts",
    "silent",
    "router_cosine",
    "router_change_centred",
    "router_row_cosine",
    "router_row_change",
    "rank_update_a",
    "rank_update_b",
    "magnitude_change",
]
_LABELS = ["task", "anchor", "checkpoint", "site", "layer", "kind", "expert", "sites", "experts"]


def weights(
    anchor: Annotated[Path, typer.Argument(help="The anchor's folder; or one run, compared within itself.")],
    current: Annotated[
        list[Path] | None, typer.Argument(help="Later checkpoints. None: the facts of the anchor alone.")
    ] = None,
    level: Annotated[
        Literal["kind", "layer", "site", "expert"] | None,
        typer.Option(help="Rows per kind of module, layer, site or expert (default: kind; site for --json and --out)."),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=0, help="How many of the most moved sites the table lists.")] = 8,
    out: Annotated[Path | None, typer.Option("--out", help="Write the rows to a .csv or .parquet file.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare LoRA factors and routers of checkpoints without their base model: overlaps, updates, router drift."""
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"Cannot tell the format of {out.name!r}. Allowed endings: .csv, .parquet.")
    from driftlens.recording.weight_drift import weight_drift

    table = not as_json and out is None
    # The list of the most moved sites and the rows above it come from one reading of the weights.
    frame = weight_drift(anchor, current or None, level="site" if table and level is None else level or "site")
    if out is not None:
        _write(frame, out)
        note(f"Wrote {len(frame)} rows to {out}.", quiet)
    if as_json:
        within = frame.attrs["within_run"]
        emit([{**row, "within_run": within} for row in frame.to_dict(orient="records")], as_json=True)
    if not table:
        for line in _closing(frame):
            note(line, quiet)
        return
    _print(frame, summarised=level is None, top=top)
    for line in _closing(frame):
        console().print(line, markup=False)


def _print(frame: pd.DataFrame, *, summarised: bool, top: int) -> None:
    from driftlens.analysis.weights import most_moved, summarise_weights

    whole = summarise_weights(frame, "kind") if summarised else frame
    _emit(whole)
    if summarised and top and len(frame) > len(whole):
        moved = "update_change" in frame
        console().print(
            f"\nThe {min(top, len(frame))} {'most moved' if moved else 'largest'} of {len(frame)} rows by site:"
        )
        _emit(most_moved(frame, top))


def _emit(frame: pd.DataFrame) -> None:
    hidden = {"experts"} if "site" in frame else set()
    if "router_cosine" in frame:  # means over rows, which the whole router's numbers already tell
        hidden |= {"router_row_cosine", "router_row_change"}
    shown = [name for name in (*_LABELS, *_MEASURES) if name in frame and name not in hidden]
    emit(frame.to_dict(orient="records"), as_json=False, columns=shown)


def _closing(frame: pd.DataFrame) -> list[str]:
    lines = [f"Note: {text}" for text in frame.attrs["notes"]]
    within = [name for name in frame.attrs["within_run"] if name in (*_MEASURES, "router_change")]
    if within:
        lines.append(f"Comparable along one training run only (within_run): {', '.join(within)}.")
    lines.append("Missing here, for want of the base model and a recording:")
    lines += [f"  {name}: {why}" for name, why in frame.attrs["missing"].items()]
    lines.append(f"Next, where the base model is at hand: {frame.attrs['next']}")
    return lines


def _write(frame: pd.DataFrame, out: Path) -> None:
    import json

    from driftlens.figures import csv_text
    from driftlens.store import atomic_file

    plain = frame.copy()
    plain.attrs = {}
    with atomic_file(out) as partial:
        if out.suffix == ".parquet":
            plain.to_parquet(partial, index=False)
            return
        for name in plain.select_dtypes("object").columns:
            plain[name] = [json.dumps(value) if isinstance(value, list) else value for value in plain[name]]
        partial.write_text(csv_text(plain), encoding="utf-8")
