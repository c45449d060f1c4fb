"""``weight_drift``: weights-only tables of checkpoint folders and runs, without the base model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pandas as pd

from driftlens.analysis.weights import Comparison, Level, weight_table
from driftlens.errors import ConfigError, FormatError, NotFoundError
from driftlens.recording.factor_files import WEIGHT_NAMES
from driftlens.recording.factors import FactorFolder
from driftlens.store import Manifest
from driftlens.store.manifest import MANIFEST_NAME

__all__ = ["weight_drift"]

Folder = str | os.PathLike[str]


def weight_drift(
    anchor: Folder, current: Folder | Sequence[Folder] | None = None, *, level: Level = "site"
) -> pd.DataFrame:
    """Measure what the factors and routers of checkpoints tell without the base model and without any input.

    Args:
        anchor: a checkpoint folder: ours, PEFT's (LoRA, rsLoRA, DoRA, LoRA on fused experts), or one of CoIN, MCITlib
            or Prism. A run folder compares all of its checkpoints: the one after each task with every later one.
        current: later checkpoints, each compared with the anchor; None gives the facts of the anchor alone.
        level: rows per ``"expert"``, ``"site"``, ``"layer"`` or ``"kind"`` of module.

    Returns:
        The table of `driftlens.analysis.weights.weight_table`; ``frame.attrs`` also holds ``next``, the command that
        measures what is missing here.

    Raises:
        NotFoundError: no such folder, or no weights in it.
        FormatError: damaged weights, or checkpoints whose sites or shapes differ.
        ConfigError: unknown level, or a run folder among several arguments.
    """
    first = Path(anchor)
    later = [] if current is None else [current] if isinstance(current, str | os.PathLike) else list(current)
    paths = [first, *map(Path, later)]
    runs = [path for path in paths if (path / MANIFEST_NAME).is_file()]
    if runs and len(paths) > 1:
        raise ConfigError(
            f"{runs[0]} is a run, which is compared within itself: give it alone, or give checkpoint folders, for "
            f"example {runs[0] / 'checkpoints' / '01-...'}."
        )
    if runs:
        folders, comparisons = _run_checkpoints(first)
        command = f"driftlens record --run {first}"
    else:
        names = _names(paths)
        folders = [FactorFolder(path, name) for path, name in zip(paths, names, strict=True)]
        comparisons = [Comparison(0, number) for number in range(1, len(paths))] or [Comparison(0, 0)]
        base = folders[-1].base
        command = f"driftlens record --ckpt {paths[-1]}" + ("" if base else " --base BASE_MODEL")
    _check_scalings(folders)
    frame = weight_table(folders, comparisons, level)
    frame.attrs["notes"] = [*frame.attrs["notes"], *dict.fromkeys(note for folder in folders for note in folder.notes)]
    frame.attrs["next"] = command
    return frame


def _run_checkpoints(run: Path) -> tuple[list[FactorFolder], list[Comparison]]:
    listed = [PurePosixPath(file).parts for file in Manifest.load(run).files]
    names = sorted(
        {part[1] for part in listed if len(part) == 3 and part[0] == "checkpoints" and part[2] in WEIGHT_NAMES}
    )
    if not names:
        raise NotFoundError(
            f"{run} holds no checkpoint's weights. A run that was thinned to its recordings is measured by "
            f"`driftlens analyze {run}`."
        )
    folders = [FactorFolder(run / "checkpoints" / name) for name in names]
    task = [name.split("-", 1)[1] if name.split("-")[0].strip("0") else None for name in names]
    comparisons = [
        Comparison(old, new, task[old])
        for old in range(len(names))
        if task[old] is not None
        for new in range(old + 1, len(names))
    ]
    return folders, comparisons or [Comparison(len(names) - 1, len(names) - 1)]


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest endings of the paths that tell them apart."""
    whole = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            return names
    return [str(path) for path in paths]


def _check_scalings(folders: Sequence[FactorFolder]) -> None:
    without = [folder.name for folder in folders if not folder.has_scaling]
    if without and len(without) < len(folders):
        raise FormatError(
            f"{', '.join(without)} states no lora_alpha while the others do, so the sizes of their updates cannot be "
            "compared. Put its adapter_config.json beside its weights."
        )
