"""Cutting a probe set into batches: which tokens count, which rows are stored, what the model is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from driftlens.backbones.encoding import ROLES, Encoded, collate
from driftlens.backbones.prefix import FrozenPrefix, PrefixStates
from driftlens.recording.probes import ProbeSet, token_subset

__all__ = ["Batch", "PaddingSide", "Plan", "ProbePrefix"]

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class ProbePrefix:
    """Frozen lower layers computed once for all checkpoints of a run.

    Attributes:
        prefix: the layers that are skipped; it must belong to the model that is recorded.
        states: task -> hidden states that enter the first adapted layer, samples in the probe set's order.
    """

    prefix: FrozenPrefix
    states: Mapping[str, PrefixStates]


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward and which of its tokens count.

    Attributes:
        task: the probe; a batch never mixes two.
        samples: indices of its samples within the probe.
        inputs: keyword arguments of the model's forward, on the device.
        tokens: flat positions (row * width + column) of the recorded tokens, in sample order, on the device.
        stored: ranks within ``tokens`` of those whose rows are stored, on the device.
        columns: ``sample``, ``position``, ``token_id`` and ``role`` of the stored tokens.
    """

    task: str
    samples: Sequence[int]
    inputs: Mapping[str, Any]
    tokens: Int[Tensor, " n"]
    stored: Int[Tensor, " m"]
    columns: Mapping[str, NDArray[np.int64]]


class Plan:
    """The batches of a probe set. Padding, batch size and order never change which tokens count.

    Args:
        probes: the probe set.
        encoded: its samples as tokens, by task.
        limit: stored rows per sample; None for all.
        seed: seed of the draw of stored rows.
        batch_size: samples per batch.
        padding_side: where short samples are padded.
        pad_token_id: what they are padded with.
        device: where the batches go.
        dtype: floating-point type of the model's inputs.
        prefix: cached lower layers, or None.
        options: further keyword arguments of the model's forward.
    """

    def __init__(
        self,
        probes: ProbeSet,
        encoded: Mapping[str, Sequence[Encoded]],
        *,
        limit: int | None,
        seed: int,
        batch_size: int,
        padding_side: PaddingSide,
        pad_token_id: int,
        device: torch.device,
        dtype: torch.dtype,
        prefix: ProbePrefix | None,
        options: Mapping[str, Any],
    ) -> None:
        self.probes, self.encoded, self.batch_size, self.padding_side = probes, encoded, batch_size, padding_side
        self.pad_token_id, self.device, self.dtype = pad_token_id, device, dtype
        self.prefix, self.options = prefix, options
        recorded = np.array([role in probes.roles for role in ROLES])
        self._kept = {task: [recorded[row.roles] for row in rows] for task, rows in encoded.items()}
        self._chosen = {
            task: [
                token_subset(row.roles, keep, limit, seed, f"{task}/{row.sample_id}")
                for row, keep in zip(rows, self._kept[task], strict=True)
            ]
            for task, rows in encoded.items()
        }
        self.tokens = sum(int(keep.sum()) for rows in self._kept.values() for keep in rows)
        self.stored_tokens = sum(len(chosen) for rows in self._chosen.values() for chosen in rows)

    @property
    def cuts(self) -> list[tuple[str, list[int]]]:
        """Task and samples of every batch, in order."""
        found = []
        for task in self.encoded:
            # a sample without any token to record would only cost time
            useful = [i for i, keep in enumerate(self._kept[task]) if keep.any()]
            found += [(task, useful[at : at + self.batch_size]) for at in range(0, len(useful), self.batch_size)]
        return found

    @property
    def largest(self) -> int:
        """The most rows that one batch stores."""
        return max((sum(len(self._chosen[task][i]) for i in samples) for task, samples in self.cuts), default=0)

    def batches(self, first: int = 0, step: int = 1) -> Iterator[Batch]:
        """Yield the batches of all tasks in order, or every ``step``-th of them from number ``first``."""
        for task, samples in self.cuts[first::step]:
            yield self._batch(task, samples)

    def _batch(self, task: str, samples: Sequence[int]) -> Batch:
        rows = [self.encoded[task][i] for i in samples]
        chosen = [self._chosen[task][i] for i in samples]
        collated = collate(rows, padding_side=self.padding_side, pad_token_id=self.pad_token_id)
        width = collated["input_ids"].shape[1]
        tokens, stored, before = [], [], 0
        for line, (row, i) in enumerate(zip(rows, samples, strict=True)):
            keep = self._kept[task][i]
            shift = width - len(row.input_ids) if self.padding_side == "left" else 0
            tokens.append(np.flatnonzero(keep) + line * width + shift)
            # chosen rows are positions in the sample; `stored` wants their ranks among the recorded tokens
            stored.append(before + np.cumsum(keep)[chosen[line]] - 1)
            before += int(keep.sum())
        columns = {
            "sample": np.repeat(np.asarray(samples, dtype=np.int64), [len(c) for c in chosen]),
            "position": np.concatenate(chosen),
            "token_id": np.concatenate([row.input_ids[c] for row, c in zip(rows, chosen, strict=True)]),
            "role": np.concatenate([row.roles[c] for row, c in zip(rows, chosen, strict=True)]).astype(np.int64),
        }
        return Batch(
            task,
            samples,
            self._inputs(task, samples, collated),
            torch.from_numpy(np.concatenate(tokens)).to(self.device),
            torch.from_numpy(np.concatenate(stored)).to(self.device),
            columns,
        )

    def _inputs(self, task: str, samples: Sequence[int], collated: Mapping[str, Tensor]) -> dict[str, Any]:
        inputs: dict[str, Any] = {name: collated[name].to(self.device) for name in ("attention_mask", "position_ids")}
        if self.prefix is not None:
            states = [self.prefix.states[task][i] for i in samples]
            inputs["inputs_embeds"] = pad_sequence(states, batch_first=True, padding_side=self.padding_side)
        else:
            inputs["input_ids"] = collated["input_ids"].to(self.device)
            if "pixel_values" in collated:
                inputs["pixel_values"] = collated["pixel_values"].to(self.device, self.dtype)
        return {**inputs, **self.options}
