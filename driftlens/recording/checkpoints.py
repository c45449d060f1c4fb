"""Loading a checkpoint: an adapter folder of PEFT, CoIN, MCITlib or Prism on its base model, or a whole model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
from driftlens.errors import ConfigError, FormatError, NotFoundError, SiteError, nearest_name
from driftlens.recording.foreign import STATE_FILES, ForeignAdapter, apply_foreign, looks_foreign
from driftlens.store.manifest import sha256_file

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "LoadedCheckpoint",
    "check_keys",
    "checkpoint_sha256",
    "is_whole_model",
    "load_checkpoint",
    "read_config",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
_PICKLED_WEIGHTS = "adapter_model.bin"


@dataclass
class LoadedCheckpoint:
    """An adapted model that is ready to be recorded.

    Attributes:
        folder: the adapter folder, or that of a whole model.
        sha256: hash of its configuration and weights.
        backbone: the base model and its encoder.
        model: the base model with the adapter: PEFT's wrapper, or for a foreign folder or a whole model the base model
            itself.
        foreign: the adapter of a CoIN, MCITlib or Prism folder; None for PEFT's.
    """

    folder: Path
    sha256: str
    backbone: Backbone
    model: nn.Module
    foreign: ForeignAdapter | None = None

    @property
    def meta(self) -> dict[str, Any]:
        """What a recording says about the checkpoint and its base model."""
        # a whole model has no base that other checkpoints share but its kind
        whole = is_whole_model(self.folder)
        return {
            "checkpoint": self.folder.name,
            "checkpoint_sha256": self.sha256,
            "base": str(self.backbone.model.config.model_type) if whole else self.backbone.name,
            "base_sha256": "" if whole else self.backbone.sha256,
            **({} if self.foreign is None else self.foreign.meta),
        }

    @property
    def peft(self) -> PeftModel:
        """PEFT's wrapper.

        Raises:
            SiteError: the adapter is not one of PEFT's.
        """
        if not isinstance(self.model, PeftModel):
            raise SiteError(
                f"{self.folder} is a checkpoint of CoIN, MCITlib or Prism; what was asked for works with PEFT adapters "
                "alone. Record it by itself: driftlens record --ckpt FOLDER."
            )
        return self.model

    def unload(self) -> None:
        """Take the adapter off the base model, so that another checkpoint can be loaded on it."""
        if is_whole_model(self.folder):
            return
        if self.foreign is not None:
            self.foreign.remove()
            return
        base: nn.Module = self.peft.unload()
        self.backbone.model = base  # type: ignore[assignment]  # the same PreTrainedModel that was wrapped


def is_whole_model(folder: Path) -> bool:
    """Whether a folder holds a transformers model of its own rather than an adapter."""
    return (folder / MODEL_CONFIG).is_file() and not (folder / ADAPTER_CONFIG).is_file()


def checkpoint_sha256(folder: Path) -> str:
    """Return the hash of an adapter folder's configuration, weights, and what else changes a foreign model.

    Raises:
        NotFoundError: no such folder, or no adapter in it.
    """
    weights = _check_folder(folder)
    parts = [sha256_file(folder / name) for name in (ADAPTER_CONFIG, weights)]
    parts += [f"{name} {sha256_file(folder / name)}" for name in STATE_FILES if (folder / name).is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_checkpoint(
    folder: Path | str,
    base: str | None = None,
    *,
    backbone: Backbone | None = None,
    device: torch.device | str = "cpu",
    semantics: str | None = None,
    expert_weights: Sequence[float] | None = None,
) -> LoadedCheckpoint:
    """Load an adapter folder on its base model, in evaluation mode.

    Args:
        folder: folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or of CoIN, MCITlib or Prism, or
            a whole transformers model (``config.json``), which needs no base.
        base: base model; None takes the one that the adapter names.
        backbone: an already loaded base model to use instead; the adapter is put on it.
        device: where the model goes.
        semantics: which forward a foreign folder is for, a key of ``FOREIGN_SEMANTICS``; None infers it, with a
            warning where that is a guess.
        expert_weights: see `apply_foreign`.

    Raises:
        NotFoundError: no such folder, no adapter in it, or no such base model.
        FormatError: the adapter's files cannot be read, or do not fit the base model.
        ConfigError: semantics for a folder of PEFT's, or that are unknown or not to be inferred.
    """
    folder = Path(folder)
    if is_whole_model(folder):
        if base is not None or backbone is not None or semantics is not None or expert_weights is not None:
            raise ConfigError(
                f"{folder} holds a whole model, not an adapter: it takes no base model and no semantics. Leave them "
                f"out, or give the folder that holds {ADAPTER_CONFIG}."
            )
        whole = load_backbone(str(folder), device=device)
        return LoadedCheckpoint(folder, whole.sha256, whole, whole.model)
    digest = checkpoint_sha256(folder)
    config = read_config(folder, any_type=True)
    foreign = _is_foreign(folder, config)
    if not foreign:
        read_config(folder)
        _check_peft(folder, semantics is not None or expert_weights is not None)
    if backbone is None:
        name = base if base is not None else config.get("base_model_name_or_path")
        if not name:
            raise NotFoundError(
                f"{folder / ADAPTER_CONFIG} names no base model. Give it with --base: builtin, a hub id or a folder. "
                f"What the factors alone tell: driftlens weights {folder}"
            )
        try:
            backbone = load_backbone(str(name), device=device)
        except NotFoundError as error:
            raise NotFoundError(f"{error} What the factors alone tell: driftlens weights {folder}") from error
    if foreign:
        adapter = apply_foreign(backbone.model, folder, semantics, expert_weights)
        moved: nn.Module = backbone.model
        return LoadedCheckpoint(folder, digest, backbone, moved.to(device).eval(), adapter)
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


def _check_folder(folder: Path) -> str:
    if not folder.is_dir():
        near = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        listing = f" {folder.parent} has: {', '.join(near[:12])}." if near else ""
        raise NotFoundError(f"No checkpoint at {folder}.{listing} Give the folder that holds {ADAPTER_CONFIG}.")
    weights = next((name for name in (ADAPTER_WEIGHTS, _PICKLED_WEIGHTS) if (folder / name).is_file()), None)
    if weights is None or not (folder / ADAPTER_CONFIG).is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        raise NotFoundError(
            f"{folder} is not a checkpoint: it has no {ADAPTER_CONFIG if weights else ADAPTER_WEIGHTS} (found: "
            f"{found}). Give a folder that PEFT's save_pretrained wrote, or one of CoIN, MCITlib or Prism."
        )
    return weights


def _is_foreign(folder: Path, config: Mapping[str, Any]) -> bool:
    try:
        return looks_foreign(folder)
    except FormatError:
        if config.get("peft_type") in _peft_types():
            return False  # PEFT's own loading says what is wrong
        raise


def _peft_types() -> list[str]:
    return sorted(getattr(name, "value", str(name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING)


def _check_peft(folder: Path, has_options: bool) -> None:
    if has_options:
        raise ConfigError(
            f"Semantics and expert weights say how CoIN, MCITlib and Prism combine their experts, but {folder} is an "
            "adapter of PEFT, which says it itself. Leave them out."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise NotFoundError(
            f"{folder} is not a checkpoint of PEFT that can be read: it has no {ADAPTER_WEIGHTS}. {_PICKLED_WEIGHTS} "
            "is read for CoIN, MCITlib and Prism alone; save the adapter anew with PEFT's save_pretrained."
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


def read_config(folder: Path, *, any_type: bool = False) -> dict[str, Any]:
    """Return an adapter folder's configuration.

    Raises:
        FormatError: it is damaged, or (unless ``any_type``) of a type that PEFT does not know.
    """
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}. The checkpoint is damaged; save it again.") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path} must hold an object; found {type(config).__name__}. Save the checkpoint again.")
    kind = config.get("peft_type")
    known = _peft_types()
    if kind not in known and not any_type:
        guess = nearest_name(str(kind), known)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise FormatError(f"{path} has peft_type {kind!r}, which PEFT does not know.{hint} Our own is 'MOE_LORA'.")
    return config
