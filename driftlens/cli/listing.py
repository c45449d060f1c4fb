"""``driftlens methods``, ``driftlens streams`` and ``driftlens ls``: what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftlens.cli.common import JsonOption, emit

__all__ = ["ls", "methods", "streams"]


def methods(as_json: JsonOption = False) -> None:
    """List the continual-learning methods and their switches."""
    from driftlens.methods import METHODS

    rows = []
    for name in METHODS.names():
        method = METHODS.get(name)
        options = {key: field.default for key, field in method.Options.model_fields.items()}
        rows.append(
            {
                "name": name,
                "title": method.title,
                "gate": method.gate,
                "summary": method.summary,
                "source": method.source,
                "options": options if as_json else [f"{key}={value}" for key, value in options.items()],
            }
        )
    emit(rows, as_json=as_json, columns=["name", "title", "gate", "summary", "options"])


def streams(as_json: JsonOption = False) -> None:
    """List the streams and their tasks, in order."""
    from driftlens.streams import STREAMS, load_stream

    rows = []
    for name in STREAMS.names():
        for index, task in enumerate(load_stream(name), start=1):
            rows.append(
                {
                    "stream": name,
                    "position": index,
                    "task": task.name,
                    "modality": task.modality,
                    "answer": task.answer_format,
                    "chance": task.chance,
                    "train": len(task.train),
                    "probe": len(task.probe),
                    "test": len(task.test),
                    "licence": task.licence,
                    "source": task.source,
                }
            )
    shown = ["stream", "position", "task", "modality", "answer", "chance", "train", "probe", "test", "licence"]
    emit(rows, as_json=as_json, columns=shown)


def ls(
    folder: Annotated[Path, typer.Argument(help="A folder that holds runs.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """List the runs in a folder."""
    from driftlens.analysis import list_runs

    rows = [
        {
            "name": entry.name,
            "method": entry.method,
            "seed": entry.seed,
            "tasks": list(entry.tasks) if as_json else len(entry.tasks),
            "checkpoints": entry.checkpoints,
            "recordings": entry.recordings,
            "megabytes": round(entry.size_bytes / 1e6, 1),
            "complete": entry.complete,
            "path": str(entry.path),
        }
        for entry in list_runs(folder)
    ]
    emit(rows, as_json=as_json)
