"""Training batches: with or without the frozen-prefix cache, the same shapes and the same loss."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from driftlens.backbones import Backbone, Encoded, collate, default_cache_dir
from driftlens.backbones.prefix import FrozenPrefix, PrefixStates
from driftlens.store import atomic_file
from driftlens.streams import Sample
from driftlens.training.config import TrainingOptions

__all__ = ["EncodedTask", "TrainingCollator", "cached_states", "disk_errors", "encode_task", "last_positions"]


@dataclass(frozen=True)
class EncodedTask(Dataset[dict[str, Any]]):
    """The encoded training samples of a task, with their prefix states if these are cached."""

    samples: Sequence[Encoded]
    states: PrefixStates | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"encoded": self.samples[index], "hidden": None if self.states is None else self.states[index]}


@dataclass(frozen=True)
class TrainingCollator:
    """Pads samples on the left, so that answers end together and logits are needed for the last positions only."""

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return model inputs; ``labels`` [B, K] belong to the last K positions, which ``logits_to_keep`` [K] lists."""
        encoded = [item["encoded"] for item in items]
        batch = collate(encoded, pad_token_id=self.pad_token_id)
        longest = max(len(sample.input_ids) - sample.n_prompt for sample in encoded)
        keep = longest + 1  # the position before the first answer token predicts it
        inputs = {
            "attention_mask": batch["attention_mask"],
            "position_ids": batch["position_ids"],
            "labels": batch["labels"][:, -keep:],
            "logits_to_keep": last_positions(batch["attention_mask"].shape[1], keep),
        }
        if items[0]["hidden"] is None:
            inputs |= {key: batch[key] for key in ("input_ids", "pixel_values") if key in batch}
        else:
            inputs["inputs_embeds"] = pad_left([item["hidden"] for item in items])
        return inputs


def last_positions(length: int, keep: int) -> Tensor:
    """Return the indices of the last ``keep`` of ``length`` positions.

    Given as indices rather than as a number, the model gathers the states instead of slicing them: the head's matrix
    product on a strided slice runs as one product per sample, up to forty times slower on a CPU.
    """
    return torch.arange(length - keep, length)


def pad_left(rows: Sequence[Tensor]) -> Tensor:
    """Return [B, longest, ...] from rows of different lengths, zeros on the left."""
    return pad_sequence(list(rows), batch_first=True, padding_side="left")


def encode_task(
    samples: Sequence[Sample],
    backbone: Backbone,
    prefix: FrozenPrefix | None,
    *,
    options: TrainingOptions,
    device: torch.device,
) -> EncodedTask:
    """Encode training samples; with ``prefix`` their states are added, kept where ``options.prefix_cache`` says."""
    encoded = [backbone.need_encoder().encode(sample) for sample in samples]
    if prefix is None:
        return EncodedTask(encoded)
    states = cached_states(
        prefix,
        encoded,
        backbone_sha256=backbone.sha256,
        batch_size=2 * options.batch_size,
        device=device,
        folder=default_cache_dir() / "prefix" if options.prefix_cache == "disk" else None,
    )
    return EncodedTask(encoded, states)


def cached_states(
    prefix: FrozenPrefix,
    samples: Sequence[Encoded],
    *,
    backbone_sha256: str,
    batch_size: int,
    device: torch.device,
    folder: Path | None,
    progress: Callable[[], None] | None = None,
) -> PrefixStates:
    """Return the prefix states of ``samples``, from ``folder`` if they were computed before.

    An entry's name is the hash of everything its values depend on, so a stale entry cannot be read.
    """
    path = None if folder is None else folder / f"{prefix.key(backbone_sha256, samples, batch_size)}.safetensors"
    if path is not None and path.is_file():
        return _read(path, device)
    states = prefix.compute(samples, batch_size, device)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial, disk_errors():
            save_file({"hidden": states.hidden.cpu(), "offsets": torch.tensor(states.offsets)}, partial)
    if progress is not None:
        progress()
    return states


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what safetensors says of a disk that refuses into the operating system's own error."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _read(path: Path, device: torch.device) -> PrefixStates:
    with safe_open(path, framework="pt", device=str(device)) as stored:
        hidden, offsets = stored.get_tensor("hidden"), stored.get_tensor("offsets")
    return PrefixStates(hidden, tuple(offsets.tolist()))
