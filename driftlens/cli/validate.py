"""``driftlens validate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from driftlens.cli.common import JsonOption, QuietOption, emit, note
from driftlens.errors import ConfigError

if TYPE_CHECKING:
    from driftlens.analysis import Validity

__all__ = ["validate"]

_TARGETS = {"strict": "lost_strict", "lenient": "lost_lenient", "nll": "nll_rise"}
_SHOWN = (
    "measure",
    "kind",
    "rho",
    "low",
    "high",
    "predicts",
    "partial",
    "within_method",
    "within_run",
    "without_method",
    "beats",
    "rows",
    "above_noise",
)
_ENDINGS = (".csv", ".parquet", ".json", ".nc")


def validate(
    runs: Annotated[list[Path], typer.Argument(help="Scored and recorded runs over one stream and probe set.")],
    target: Annotated[
        Literal["strict", "lenient", "nll"],
        typer.Option(help="The forgetting that the table is about: accuracy lost (strict, lenient) or rise in NLL."),
    ] = "strict",
    cluster: Annotated[
        Literal["run", "task"],
        typer.Option(help="What the bootstrap draws: whole runs, or tasks of runs (for a single run)."),
    ] = "run",
    given: Annotated[
        str, typer.Option(help="What the partial correlation holds fixed, by commas: learned, initial_nll, since.")
    ] = "learned,initial_nll,since",
    draws: Annotated[int, typer.Option(min=1, help="Bootstrap draws.")] = 2000,
    every: Annotated[
        bool, typer.Option("--all-variants", help="Add every variant of co-drift and impact: tokens, sites, scale.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write all targets to a .csv, .parquet, .json or .nc file.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Pool runs although streams or probes differ.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Test which drift measures predict the forgetting that happened, over tasks, methods and seeds."""
    if out is not None and out.suffix not in _ENDINGS:
        raise ConfigError(f"Cannot tell the format of {out.name!r}. Allowed endings: {', '.join(_ENDINGS)}.")
    from driftlens.analysis import validity
    from driftlens.analysis.variants import VARIANTS, variant_names

    study = validity(
        runs,
        cluster=cluster,
        given=[name.strip() for name in given.split(",") if name.strip()],
        variants=variant_names() if every else VARIANTS,
        strict=not force,
        draws=draws,
    )
    if out is not None:
        _write(study, out)
        note(f"Wrote {len(study.table)} rows to {out}.", quiet)
    rows = _rows(study, _TARGETS[target])
    if as_json:
        emit(rows, as_json=True)
        return
    emit(rows, as_json=False, columns=_SHOWN)
    for line in _closing(study, _TARGETS[target]):
        note(line, quiet)


def _rows(study: Validity, target: str) -> list[dict[str, Any]]:
    """One row per measure, sorted by |rho|, with its differences to the simple measures as a mapping."""
    against = study.differences[study.differences["target"] == target] if len(study.differences) else study.differences
    rows = []
    for row in study.table[study.table["target"] == target].to_dict(orient="records"):
        own = against[against["measure"] == row["measure"]] if len(against) else against
        difference = {
            entry["simple"]: {key: entry[key] for key in ("difference", "low", "high", "rows")}
            for entry in own.to_dict(orient="records")
        }
        rows.append({str(key): value for key, value in row.items()} | {"against_simple": difference})
    return rows


def _closing(study: Validity, target: str) -> list[str]:
    about = study.about
    table = study.table[study.table["target"] == target]
    lost = table.loc[~table["predicts"], "measure"].to_list()
    drawn = "whole runs" if about["cluster"] == "run" else "tasks of runs (rows of one run are not independent)"
    lines = [
        f"{about['rows']} rows of {about['runs']} runs; {100 * about['level']:.0f} % intervals from drawing {drawn} "
        f"again, {about['clusters']} of them. partial: given {', '.join(about['given']) or 'nothing'}. beats: how many "
        "of the simple measures it beats with a paired interval above 0.",
        f"{len(table)} measures were tried; the best of many looks better than it is.",
    ]
    if lost:
        lines.append(f"Do not predict this forgetting (their interval holds 0): {', '.join(lost)}.")
    missing = table.dropna(subset=["undefined"])
    lines += [f"Undefined in some runs: {row.measure}: {row.undefined}." for row in missing.itertuples()]
    return lines


def _write(study: Validity, out: Path) -> None:
    from driftlens.figures import csv_text
    from driftlens.store import atomic_file

    with atomic_file(out) as partial:
        if out.suffix == ".nc":
            study.dataset.to_netcdf(partial, engine="h5netcdf")
        elif out.suffix == ".parquet":
            study.table.to_parquet(partial, index=False)
        elif out.suffix == ".json":
            study.table.to_json(partial, orient="records", indent=1)
        else:
            partial.write_text(csv_text(study.table), encoding="utf-8")
