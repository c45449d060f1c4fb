"""``driftlens sites``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftlens.cli.common import JsonOption, emit

__all__ = ["sites"]


def sites(
    target: Annotated[str, typer.Argument(help="A checkpoint folder (PEFT adapter), or a base model.")],
    base: Annotated[str | None, typer.Option("--base", help="Base model of the checkpoint.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the sites of a model or checkpoint: the modules where routing or pathways can be observed."""
    from driftlens.recording import find_sites, load_checkpoint

    model = load_checkpoint(Path(target), base).model
    emit([vars(site) for site in find_sites(model)], as_json=as_json)
