"""``driftlens verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftlens.cli.common import JsonOption, emit, note
from driftlens.errors import FormatError, NotFoundError

__all__ = ["verify"]


def verify(
    path: Annotated[Path, typer.Argument(help="A run folder or a recording (.h5).")],
    as_json: JsonOption = False,
) -> None:
    """Check every file of a run, or one recording, against what was written; exit code 4 if anything is wrong."""
    from driftlens.store import Manifest, verify_recording

    if not path.exists():
        raise NotFoundError(f"Nothing at {path}. Give a run folder (with manifest.json) or a recording (.h5).")
    problems = Manifest.load(path).verify() if path.is_dir() else []
    recordings = sorted((path / "recordings").glob("*.h5")) if path.is_dir() else [path]
    damaged = {problem.path for problem in problems}
    for recording in recordings:
        if str(recording) not in damaged:
            problems += verify_recording(recording)
    emit([{"path": problem.path, "what": problem.what} for problem in problems], as_json=as_json)
    if problems:
        raise FormatError(f"{len(problems)} problem(s) in {path}; the list above names the files.")
    note(f"{path}: everything is as it was written ({len(recordings)} recording(s) read).", as_json)
