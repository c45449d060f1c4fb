"""``driftlens sites``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftlens.cli.common import JsonOption, emit

__all__ = ["sites"]

_SHOWN = ["name", "family", "layer", "kind", "gate", "num_experts", "rank", "d_in", "d_out", "scaling"]


def sites(
    target: Annotated[str, typer.Argument(help="A checkpoint folder (adapter), or a base model.")],
    base: Annotated[str | None, typer.Option("--base", help="Base model of the checkpoint.")] = None,
    semantics: Annotated[
        str | None, typer.Option("--semantics", help="Forward of a CoIN, MCITlib or Prism folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the sites of a model or checkpoint: the modules where routing or pathways can be observed."""
    from dataclasses import asdict

    from driftlens.backbones import load_backbone
    from driftlens.recording import find_sites, load_checkpoint

    is_adapter = (Path(target) / "adapter_config.json").is_file()
    model = load_checkpoint(target, base, semantics=semantics).model if is_adapter else load_backbone(target).model
    emit([asdict(site.info) for site in find_sites(model)], as_json=as_json, columns=_SHOWN)
