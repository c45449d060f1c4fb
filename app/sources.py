"""Runs below the folder that the page was given: listing, opening, and what is wrong with them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from driftlens.analysis import Run, RunEntry, list_runs, open_run
from driftlens.errors import DriftLensError

__all__ = ["Loaded", "entries", "load"]


@dataclass(frozen=True)
class Loaded:
    """An opened run.

    Attributes:
        run: the run, without the recordings that cannot be read.
        problems: what is wrong with single recordings, one message each.
        drift_error: why no drift can be shown at all; None if it can.
        left_out: names of the recordings that were left out.
    """

    run: Run
    problems: tuple[str, ...]
    drift_error: str | None
    left_out: tuple[str, ...]


@st.cache_data(ttl=5, show_spinner=False)
def _listed(folder: str) -> list[RunEntry]:
    return list_runs(folder)


def entries(folder: Path) -> dict[str, RunEntry]:
    """Return the runs below ``folder`` by their path relative to it, in the order of their names.

    Raises:
        NotFoundError: no such folder.
    """
    return {entry.path.relative_to(folder).as_posix(): entry for entry in _listed(str(folder))}


def load(path: Path) -> Loaded:
    """Open a run and measure its drift, once for every content that its files have had.

    Raises:
        DriftLensError: the run cannot be opened at all.
    """
    return _load(str(path), _content(path))


def _content(path: Path) -> str:
    """Return a key of the run's content: its manifest, which lists a hash per file, and the files' stamps."""
    digest = hashlib.sha256()
    manifest = path / "manifest.json"
    if manifest.is_file():
        digest.update(manifest.read_bytes())
    for file in sorted([*path.glob("*.*"), *path.glob("recordings/*")]):
        if file.name != "analysis.h5" and file.is_file():
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@st.cache_resource(max_entries=8, show_spinner="Measuring drift (only the first time a run is opened) …")
def _load(path: str, content: str) -> Loaded:
    run = open_run(path)
    try:
        _ = run.drift
    except DriftLensError as error:
        return _without_damaged(run, str(error))
    return Loaded(run, (), None, ())


def _without_damaged(run: Run, first_error: str) -> Loaded:
    """Leave out the recordings that cannot be opened and try once more."""
    problems, damaged = [], []
    for checkpoint in run.checkpoints:
        if checkpoint.index not in run.recorded:
            continue
        try:
            run.recording(checkpoint.index).close()
        except (DriftLensError, OSError) as error:
            problems.append(str(error))
            damaged.append(checkpoint.name)
    if not damaged:
        # Nothing wrong with the recordings themselves: the second recording, which gives the noise floor, may be.
        problems.append(first_error)
        damaged = [f"{c.name}.noise" for c in run.checkpoints if f"recordings/{c.name}.noise.h5" in run.manifest.files]
    if not damaged:
        return Loaded(run, (), first_error, ())
    rest = run.without(*damaged)
    try:
        _ = rest.drift
    except DriftLensError as error:
        return Loaded(run, tuple(problems), str(error), tuple(damaged))
    return Loaded(rest, tuple(problems), None, tuple(damaged))
