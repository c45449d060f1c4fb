"""Loading a checkpoint: a PEFT adapter folder on the base model that it belongs to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from torch import nn

import driftlens.adapters  # noqa: F401  # makes the type MOE_LORA known to PEFT
from driftlens.backbones import Backbone, load_backbone
from driftlens.errors import FormatError, NotFoundError, nearest_name
from driftlens.store.manifest import sha256_file

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "LoadedCheckpoint",
    "check_keys",
    "checkpoint_sha256",
    "load_checkpoint",
    "read_config",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass
class LoadedCheckpoint:
    """An adapted model that is ready to be recorded.

    Attributes:
        folder: the adapter folder.
        sha256: hash of its configuration and weights.
        backbone: the base model and its encoder.
        model: the base model with the adapter.
    """

    folder: Path
    sha256: str
    backbone: Backbone
    model: PeftModel

    @property
    def meta(self) -> dict[str, Any]:
        """What a recording says about the checkpoint and its base model."""
        return {
            "checkpoint": self.folder.name,
            "checkpoint_sha256": self.sha256,
            "base": self.backbone.name,
            "base_sha256": self.backbone.sha256,
        }

    def unload(self) -> None:
        """Take the adapter off the base model, so that another checkpoint can be loaded on it."""
        base: nn.Module = self.model.unload()
        self.backbone.model = base  # type: ignore[assignment]  # the same PreTrainedModel that was wrapped


def checkpoint_sha256(folder: Path) -> str:
    """Return the hash of an adapter folder's configuration and weights.

    Raises:
        NotFoundError: no such folder, or no adapter in it.
    """
    _check_folder(folder)
    parts = [sha256_file(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_checkpoint(
    folder: Path | str,
    base: str | None = None,
    *,
    backbone: Backbone | None = None,
    device: torch.device | str = "cpu",
) -> LoadedCheckpoint:
    """Load an adapter folder on its base model, in evaluation mode.

    Args:
        folder: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: base model; None takes the one that the adapter names.
        backbone: an already loaded base model to use instead; the adapter is put on it.
        device: where the model goes.

    Raises:
        NotFoundError: no such folder, no adapter in it, or no such base model.
        FormatError: the adapter's files cannot be read, or do not fit the base model.
    """
    folder = Path(folder)
    digest = checkpoint_sha256(folder)
    config = read_config(folder)
    if backbone is None:
        name = base if base is not None else config.get("base_model_name_or_path")
        if not name:
            raise NotFoundError(
                f"{folder / ADAPTER_CONFIG} names no base model. Give it with --base: builtin, a hub id or a folder."
            )
        backbone = load_backbone(str(name), device=device)
    try:
        model = PeftModel.from_pretrained(backbone.model, str(folder))
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [""])[-1].strip()
        raise FormatError(
            f"The adapter in {folder} cannot be loaded on {backbone.name!r} ({type(error).__name__}: {first:.300}). "
            "It is damaged, or it belongs to another base model: restore it, or give the right one with --base."
        ) from error
    check_keys(folder, model)
    return LoadedCheckpoint(folder, digest, backbone, model.to(device).eval())


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        near = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        listing = f" {folder.parent} has: {', '.join(near[:12])}." if near else ""
        raise NotFoundError(f"No checkpoint at {folder}.{listing} Give the folder that holds {ADAPTER_CONFIG}.")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
            raise NotFoundError(
                f"{folder} is not a checkpoint: it has no {name} (found: {found}). Give a folder that PEFT's "
                "save_pretrained wrote, with safetensors weights."
            )


def check_keys(folder: Path, model: PeftModel, adapter: str = "default") -> None:
    """Raise FormatError if the weights in ``folder`` are not exactly those of ``adapter``, loaded from it."""
    # PEFT only warns when weights are missing; what it leaves at their random start must not be recorded.
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as stored:
        found = set(stored.keys())
    # without this argument PEFT would look on the hub whether the vocabulary was resized
    expected = set(get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))
    prefix = str(model.base_model.prefix)
    missing, unknown = sorted(expected - found), sorted(k for k in found - expected if prefix in k)
    if missing or unknown:
        named = (("missing", missing), ("unknown", unknown))
        parts = [f"{len(keys)} {what} (for example {keys[0]})" for what, keys in named if keys]
        raise FormatError(
            f"The weights in {folder / ADAPTER_WEIGHTS} do not match {ADAPTER_CONFIG}: of {len(expected)} tensors "
            f"{' and '.join(parts)}. The folder mixes two checkpoints, or the base model is another one."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Return an adapter folder's configuration; FormatError if it is damaged or of a type that PEFT does not know."""
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}. The checkpoint is damaged; save it again.") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path} must hold an object; found {type(config).__name__}. Save the checkpoint again.")
    kind = config.get("peft_type")
    known = sorted(getattr(name, "value", str(name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING)
    if kind not in known:
        guess = nearest_name(str(kind), known)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise FormatError(f"{path} has peft_type {kind!r}, which PEFT does not know.{hint} Our own is 'MOE_LORA'.")
    return config
