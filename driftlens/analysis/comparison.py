"""Runs side by side: performance over the stream and drift of what had been learned."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import pandas as pd

from driftlens.analysis.inputs import token_table_hash
from driftlens.analysis.run import Run, open_run
from driftlens.errors import ConfigError, NotFoundError, ProbeError

__all__ = ["DRIFT_COLUMNS", "SCORE_COLUMNS", "compare", "stream_difference"]

SCORE_COLUMNS: Final = ("AP", "MAA", "MFT", "BWT_T", "BWT_T-1", "forgetting_max", "FWT")
"""Strict scores; those of the lenient scorer follow for AP and BWT_T."""

DRIFT_COLUMNS: Final = (
    "router_js",
    "mass_moved",
    "top1_switch",
    "relative_js",
    "codrift_divergence",
    "codrift_router",
    "codrift_experts",
    "codrift_cross",
    "coupling",
    "codrift_share",
    "impact",
    "responsibility_divergence",
    "retained",
    "alignment",
    "alignment_loss",
)
"""Measures that mean the same in independent runs; those that depend on the gauge are left out on purpose."""

_WITH_INTERVAL: Final = ("router_js", "codrift_divergence", "impact", "responsibility_divergence")
_CONTEXT: Final = ("gate_entropy", "load_entropy", "specialisation", "near_uniform_share")


def compare(runs: Iterable[Run | str | os.PathLike[str]], *, strict: bool = True) -> pd.DataFrame:
    """Return one row per run.

    Drift columns are means over sites and over the old probes at the last recorded checkpoint, with 95 % bootstrap
    intervals over samples (``_low``, ``_high``) and the noise floor (``_noise``) beside the main ones.

    Args:
        runs: runs, or paths of run folders.
        strict: False returns a frame even if streams or probes differ; ``comparable`` and ``note`` say so.

    Returns:
        Columns run, method, seed, tasks, complete, `SCORE_COLUMNS`, AP_lenient, BWT_T_lenient, format_share,
        `DRIFT_COLUMNS`, gate_entropy, load_entropy, specialisation, near_uniform_share, comparable, note, path. NaN
        where a run has no scores, no recordings or no old task.

    Raises:
        ProbeError: different streams or probes, with ``strict``.
        ConfigError: no run.
    """
    opened = [entry if isinstance(entry, Run) else open_run(entry) for entry in runs]
    if not opened:
        raise ConfigError("No run was given. Name at least one run folder: `driftlens compare RUN RUN...`.")
    rows = []
    for run in opened:
        difference = stream_difference(opened[0], run)
        if difference and strict:
            raise ProbeError(
                f"{opened[0].path} and {run.path} cannot be compared: {difference}. Compare runs over one stream "
                "and one probe set, or ask for the table anyway (strict=False, `--force`)."
            )
        notes = [difference] if difference else []
        row: dict[str, Any] = {"run": run.name, "method": run.method, "seed": -1 if run.seed is None else run.seed}
        row |= {"tasks": len(run.tasks), "complete": run.complete}
        row |= _scores(run, notes) | _drift(run, notes)
        rows.append(row | {"comparable": not difference, "note": "; ".join(notes), "path": str(run.path)})
    return pd.DataFrame(rows)


def _scores(run: Run, notes: list[str]) -> dict[str, float]:
    names = [*SCORE_COLUMNS, "AP_lenient", "BWT_T_lenient", "format_share"]
    if not run.manifest.lists("scores.parquet"):
        notes.append("not scored")
        return dict.fromkeys(names, np.nan)
    stream = run.stream
    learned = int(stream["tasks_learned"])
    if learned < len(run.tasks):
        notes.append(f"{learned} of {len(run.tasks)} tasks learned")
    result = {name: float(stream[name].sel(scorer="strict")) for name in SCORE_COLUMNS}
    result |= {f"{name}_lenient": float(stream[name].sel(scorer="lenient")) for name in ("AP", "BWT_T")}
    return result | {"format_share": float(stream["format_share"])}


def _drift(run: Run, notes: list[str]) -> dict[str, float]:
    names = []
    for name in DRIFT_COLUMNS:
        names += [name, *([f"{name}_low", f"{name}_high", f"{name}_noise"] if name in _WITH_INTERVAL else [])]
    names += _CONTEXT
    if not run.recorded:
        notes.append("not recorded")
        return dict.fromkeys(names, np.nan)
    last = run.trend.isel(checkpoint=-1)
    if int(last["n_old"]) == 0:
        notes.append("no task is old at the last recorded checkpoint")
    elif int(last["checkpoint"]) != run.checkpoints[-1].index:
        notes.append(f"drift at checkpoint {last['checkpoint_name'].item()}, the last recorded one")
    result = {name: float(last[name]) for name in names}
    if result["near_uniform_share"] > 0.5:
        notes.append("most gates hardly route: their small routing drift says nothing")
    return result


def stream_difference(first: Run, other: Run) -> str:
    """Say why two runs cannot be compared (other tasks or other tokens); empty if they can."""
    if other is first:
        return ""
    if first.manifest.stream_sha256 != other.manifest.stream_sha256:
        return (
            f"their streams differ ({_short(first.manifest.stream_sha256)} and {_short(other.manifest.stream_sha256)})"
        )
    if first.recorded and other.recorded:
        probes = [_probes_hash(run) for run in (first, other)]
        if probes[0] != probes[1]:
            return f"their probes differ ({_short(probes[0])} and {_short(probes[1])})"
    return ""


def _short(digest: str) -> str:
    return digest[:12] or "none stated"


def _probes_hash(run: Run) -> str:
    """Return the probe set's hash as the recordings state it, else that of their tokens."""
    if run.manifest.probes_sha256:
        return run.manifest.probes_sha256
    try:
        with run.recording(run.recorded[0]) as recording:
            stated = recording.meta.get("probes_sha256")
            return str(stated) if stated else "".join(token_table_hash(recording, probe) for probe in recording.probes)
    except NotFoundError:
        return ""
