"""Recording while `transformers.Trainer` trains: one file every so many steps, and the training none the wiser."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from driftlens.backbones.encoding import Encoder
from driftlens.errors import ConfigError
from driftlens.recording.distributed import Ranks
from driftlens.recording.probe_files import load_probes
from driftlens.recording.probes import ProbeSet
from driftlens.recording.recorder import RecordingSummary, record_probes, recording_settings, sites_sha256
from driftlens.recording.sites import base_module, find_sites
from driftlens.store import open_recording, verify_recording

__all__ = ["RecordCallback"]


class RecordCallback(TrainerCallback):
    """Records the model that a `transformers.Trainer` trains into ``out_folder/step-000100.h5`` and so on.

    The training is the same bit for bit with and without it: parameters, gradients, training modes and the states of
    all random generators are as before. A recording that is there, verifies and shows the very same parameters (a
    resumed training comes by them again) is kept. With several processes each records its share of the probes.

    Args:
        probes: a probe set, or its folder.
        out_folder: where the recordings go; made if missing.
        every_steps: record after every so many optimizer steps.
        encoder: tokenizer and image processor; None if the probes hold token ids.
        at_start: also record before the first step, as ``step-000000.h5``.
        at_end: also record when the training ends.
        checkpoint_meta: further attributes of every file, for example the base model's name.
        batch_size: samples per forward.
        tokens_per_sample: stored rows per sample (None: what the probe set says).
        timeout_seconds: how long processes wait for one another, see `Ranks.joined`.

    Attributes:
        summaries: what was recorded or kept, in order.

    Raises:
        ConfigError: impossible settings; on the begin of a training whose parameters are sharded over processes.
        ProbeError, SiteError, StorageError: on recording; the training stops with them.
    """

    def __init__(
        self,
        probes: ProbeSet | Path | str,
        out_folder: Path | str,
        *,
        every_steps: int,
        encoder: Encoder | None = None,
        at_start: bool = False,
        at_end: bool = False,
        checkpoint_meta: Mapping[str, Any] | None = None,
        batch_size: int = 16,
        tokens_per_sample: int | None = None,
        timeout_seconds: float = 1800.0,
    ) -> None:
        if every_steps < 1:
            raise ConfigError(f"every_steps is {every_steps}; record after at least 1 step, for example 100.")
        self.probes = probes if isinstance(probes, ProbeSet) else load_probes(Path(probes))
        self._settings = recording_settings(self.probes, batch_size, "left", tokens_per_sample)
        self.out_folder, self.every_steps, self.encoder = Path(out_folder), every_steps, encoder
        self.at_start, self.at_end = at_start, at_end
        self.checkpoint_meta = dict(checkpoint_meta or {})
        self.batch_size, self.tokens_per_sample, self.timeout_seconds = batch_size, tokens_per_sample, timeout_seconds
        self.summaries: list[RecordingSummary] = []
        self._ranks: Ranks | None = None
        self._last = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot work before any step is paid for, and record the start if asked."""
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise ConfigError(
                "RecordCallback cannot record parameters that FSDP or DeepSpeed shard over processes. Save checkpoints "
                "and record them afterwards: driftlens record --ckpt CKPT."
            )
        self._ranks = Ranks.joined(self.timeout_seconds)
        self._ranks.from_main("making the folder", lambda: self.out_folder.mkdir(parents=True, exist_ok=True))
        self._last = -1
        self.probes.check_fits(base_module(kwargs["model"]), self.encoder)
        if self.at_start and state.global_step == 0:
            self._record(kwargs["model"], 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record if it is time."""
        if state.global_step % self.every_steps == 0:
            self._record(kwargs["model"], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the end if asked."""
        if self.at_end and state.global_step != self._last:
            self._record(kwargs["model"], state.global_step)

    def _record(self, model: nn.Module, step: int) -> None:
        assert self._ranks is not None  # on_train_begin came first
        name = f"step-{step:06d}"
        path = self.out_folder / f"{name}.h5"
        meta = self.checkpoint_meta | {
            "checkpoint": name,
            "step": step,
            "sites_sha256": sites_sha256(find_sites(model)),
        }
        kept = self._ranks.from_main("looking for an earlier recording", lambda: self._kept(path, meta))
        if kept is None:
            with _untouched_generators():
                kept = record_probes(
                    model,
                    self.probes,
                    path,
                    encoder=self.encoder,
                    checkpoint_meta=meta,
                    batch_size=self.batch_size,
                    tokens_per_sample=self.tokens_per_sample,
                    overwrite=True,
                    ranks=self._ranks,
                )
        self.summaries.append(kept)
        self._last = step

    def _kept(self, path: Path, meta: Mapping[str, Any]) -> RecordingSummary | None:
        if not path.is_file() or verify_recording(path):
            return None
        with open_recording(path) as recording:
            expected = {**self._settings, **meta}
            if any(recording.meta.get(key) != value for key, value in expected.items()):
                return None
            return RecordingSummary(
                path=path,
                checkpoint=str(meta["checkpoint"]),
                sites=len(recording.sites),
                probes=len(recording.probes),
                samples=len(self.probes),
                stored_tokens=recording.n_tokens,
                tokens=int(recording.groups[0].stats["count"].sum()),
                bytes=path.stat().st_size,
                seconds=0.0,
                skipped=True,
            )


@contextmanager
def _untouched_generators() -> Iterator[None]:
    """Give every random generator its state back: a gate with noise, say, must not shift what training draws."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is what trainers use
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
