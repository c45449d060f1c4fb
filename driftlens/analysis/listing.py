"""Which runs a folder holds, from manifests and the first lines of configurations alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from driftlens.errors import ConfigError, FormatError, NotFoundError
from driftlens.store.manifest import MANIFEST_NAME, Manifest

__all__ = ["RunEntry", "file_stamp", "list_runs", "read_config"]

RUN_FILES: Final = re.compile(
    r"(?:checkpoints/(?P<folder>\d+-[^/]+)/.+|recordings/(?P<file>\d+-[^/]+?)(?P<noise>\.noise)?\.h5)"
)
"""Files of a checkpoint and its recording, as paths in a manifest."""

_MAX_DEPTH: Final = 3


@dataclass(frozen=True)
class RunEntry:
    """A run in a folder.

    Attributes:
        path: its folder.
        name: name from the configuration, else the folder's.
        method: name of the method.
        seed: training seed; None if not stated.
        tasks: tasks learned so far, in order.
        checkpoints: number of checkpoints, the one before the first task included.
        recordings: number of recordings.
        size_bytes: bytes of all files of the manifest.
        complete: whether the run has finished.
        created: UTC time of its start, ISO 8601.
        problem: why the run cannot be read; None for a sound one.
    """

    path: Path
    name: str
    method: str
    seed: int | None
    tasks: tuple[str, ...]
    checkpoints: int
    recordings: int
    size_bytes: int
    complete: bool
    created: str
    problem: str | None = None


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's resolved configuration; an empty one where there is no file.

    Raises:
        FormatError: not readable, or not YAML.
        ConfigError: no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FormatError(f"{path} cannot be read ({error}). Restore it from a copy of the run.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, expected keys such as method and stream.")
    return data


def method_name(config: dict[str, Any]) -> str:
    """Return the method that a configuration names, or ``"unknown"``."""
    method = config.get("method")
    return str(method.get("name", "unknown") if isinstance(method, dict) else method or "unknown")


def training_seed(config: dict[str, Any], manifest: Manifest) -> int | None:
    """Return the configuration's seed, else the manifest's."""
    training = config.get("training")
    seed = training.get("seed") if isinstance(training, dict) else None
    return seed if isinstance(seed, int) else manifest.seed


def file_stamp(path: Path) -> tuple[int, int]:
    """Return size and time of change: while they stay, a file that was hashed once is not hashed again."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / MANIFEST_NAME).is_file():
        yield folder
        return
    if depth == 0:
        return
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        )
    for name in names:
        yield from _run_folders(folder / name, depth - 1)


def list_runs(folder: str | os.PathLike[str]) -> list[RunEntry]:
    """Return the runs in a folder and its subfolders (three levels), sorted by path.

    Recordings are not opened. A damaged run is listed with its ``problem``, so that it hides no other.

    Raises:
        NotFoundError: no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotFoundError(f"{root} is not a folder. Give a folder that holds runs, for example `runs`.")
    return [_entry(path) for path in _run_folders(root, _MAX_DEPTH)]


def _entry(path: Path) -> RunEntry:
    try:
        manifest = Manifest.load(path)
        config = read_config(path / "config.yaml")
    except (FormatError, ConfigError, NotFoundError) as error:
        return RunEntry(path, path.name, "unknown", None, (), 0, 0, 0, False, "", problem=str(error))
    checkpoints: set[str] = set()
    recordings: set[str] = set()
    for file in manifest.files:
        match = RUN_FILES.fullmatch(file)
        if match is not None:
            checkpoints.add(match["folder"] or match["file"])
            if match["file"] and not match["noise"]:
                recordings.add(match["file"])
    ordered = sorted(checkpoints, key=lambda text: (int(text.split("-")[0]), text))
    return RunEntry(
        path=path,
        name=str(config.get("name") or path.resolve().name),
        method=method_name(config),
        seed=training_seed(config, manifest),
        tasks=tuple(name.split("-", 1)[1] for name in ordered if int(name.split("-")[0])),
        checkpoints=len(ordered),
        recordings=len(recordings),
        size_bytes=sum(entry.size for entry in manifest.files.values()),
        complete=manifest.complete,
        created=manifest.created,
    )
