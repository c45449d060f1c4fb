"""The live door: recording a model's own forwards, whoever runs them.

    with dl.record(model, "task-a", out="x.h5") as rec:
        evaluate(model, task_a)
        rec.probe("task-b")
        evaluate(model, task_b)

Nothing about the model changes: no evaluation mode, no gradient kept alive, outputs and gradients the same bit for bit.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import torch
from torch import nn

from driftlens.backbones.encoding import ROLES
from driftlens.errors import ConfigError, ProbeError, SiteError
from driftlens.recording.hooks import Hooks
from driftlens.recording.observer import Observer
from driftlens.recording.passes import LivePasses, LiveTokens
from driftlens.recording.probes import ProbeSet
from driftlens.recording.queue import WriteQueue
from driftlens.recording.recorder import Observed, RecordingSummary, Sink, environment, record_probes, write_weights
from driftlens.recording.sites import base_module, find_sites
from driftlens.store import RecordingWriter

__all__ = ["LiveRecording", "record"]


@overload
def record(model: nn.Module, probes: ProbeSet, out: Path | str, **options: Any) -> RecordingSummary: ...


@overload
def record(model: nn.Module, probes: str | None = None, out: Path | str = ..., **options: Any) -> LiveRecording: ...


def record(
    model: nn.Module, probes: ProbeSet | str | None = None, out: Path | str = "", **options: Any
) -> RecordingSummary | LiveRecording:
    """Record ``model``: on a probe set at once, or the forwards of a ``with`` block.

    Args:
        model: model with observable sites, PEFT-wrapped or not.
        probes: a probe set is recorded at once (see `driftlens.recording.recorder.record_probes`, which takes
            ``options``). A name, or None, gives a context manager: what the model computes inside the block is recorded
            as the probe of this name (see `LiveRecording`, which takes ``options``).
        out: path of the recording; its folder must exist.
        options: keyword arguments of the one or the other.

    Raises:
        ConfigError: no ``out``, or neither a probe set nor a name.
        Further errors: see there.
    """
    if not str(out):
        raise ConfigError('A recording needs a file: dl.record(model, probes, out="x.h5").')
    if isinstance(probes, ProbeSet):
        return record_probes(model, probes, out, **options)
    if probes is not None and not isinstance(probes, str):
        raise ConfigError(
            f"Cannot record on {type(probes).__name__}. Give a ProbeSet (load_probes reads its folder) to record it at "
            "once, or the name of a probe to record your own forwards inside `with dl.record(model, name, out=...)`."
        )
    return (
        LiveRecording(model, out, **options) if probes is None else LiveRecording(model, out, probe=probes, **options)
    )


@dataclass(frozen=True)
class _LiveBatch:
    """One observed forward: its values, how many samples its probe has by now, and what identifies its tokens."""

    observed: Observed
    samples: int
    identity: bytes


class LiveRecording:
    """Observes the forwards of a ``with`` block and writes them to one file, complete or not at all.

    Every forward of the model is recorded as it is: in training or evaluation mode, with gradients or without, under
    autocast, with gradient checkpointing (a layer that runs again in backward is not counted again). Tokens are those
    that ``attention_mask`` [batch, length] says are real, all where none is given. `generate` with a key-value cache
    counts every token once; what it generates are further tokens of the same samples. Refused, with the reason:
    `generate` without a cache, beam search, four-dimensional masks, compiled models, replicas in other threads.

    Samples get running numbers within their probe, a row of a batch is a sample. The role of a token is image (the
    model's image token), answer (its label is not -100, or it was generated) or prompt. The parameters that are stored
    are those at the end of the block; if they changed inside, the file says so (attribute ``parameters_changed``).

    Several processes: give each a file of its own.

    Args:
        model: model with observable sites, PEFT-wrapped or not.
        out: path of the recording; its folder must exist.
        probe: name of the first probe.
        checkpoint_meta: what the file says about the model: ``checkpoint`` (its name; default: the file's), hashes.
        tokens_per_sample: how many rows of a sample are stored of one forward (None: all); sums cover all tokens.
        seed: decides which.
        max_buffer_mb: megabytes that may be in flight between model and file, see `record_probes`.
        drop: throw away a forward's values where the file does not keep up, instead of making the model wait. What was
            dropped is counted (attribute ``dropped_tokens``). By default nothing is dropped.
        overwrite: replace an existing file at the end; otherwise an existing file is an error.

    Attributes:
        summary: what was written; None until the block was left normally.
        dropped_tokens: tokens dropped so far.

    Raises:
        SiteError: no observable site, or a forward that cannot be recorded exactly.
        ProbeError: on leaving, if no token was observed.
        ConfigError: impossible settings, or a batch that does not fit ``max_buffer_mb``.
        StorageError: the target exists, or the disk refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        out: Path | str,
        *,
        probe: str = "live",
        checkpoint_meta: Mapping[str, Any] | None = None,
        tokens_per_sample: int | None = None,
        seed: int = 0,
        max_buffer_mb: float | None = None,
        drop: bool = False,
        overwrite: bool = False,
    ) -> None:
        if tokens_per_sample is not None and tokens_per_sample < 1:
            raise ConfigError(f"tokens_per_sample is {tokens_per_sample}; it must be at least 1, or None for all.")
        self.out, self.dropped_tokens = Path(out), 0
        self.summary: RecordingSummary | None = None
        self._model, self._root = model, base_module(model)
        self._settings = {"roles": list(ROLES), "tokens_per_sample": tokens_per_sample or 0, "seed": seed, "live": True}
        self._meta = {"checkpoint": self.out.stem, **(checkpoint_meta or {})}
        self._max_bytes = None if max_buffer_mb is None else max(1, int(max_buffer_mb * 1e6))
        self._drop, self._overwrite = drop, overwrite
        self._passes = LivePasses(self._root, tokens_per_sample, seed)
        self._probe, self._past_probes = probe, [probe]
        self._digest = hashlib.sha256()
        self._tokens = self._stored = 0
        self._changed = self._paused = False
        self._current: LiveTokens | None = None
        self._hooks: Hooks | None = None
        self._stack = ExitStack()

    def __enter__(self) -> LiveRecording:
        if self._hooks is not None:
            raise ConfigError(f"The recording {self.out} was begun before; make a new one with dl.record(...).")
        self._started, self._thread = time.perf_counter(), threading.get_ident()
        sites = find_sites(self._model)
        first = next(self._root.parameters())
        self._observer = Observer(sites)
        self._parameters = [p for site in sites for p in site.module.parameters()]
        self._version = self._versions()
        self._device = first.device.type
        self._writer = RecordingWriter(
            self.out,
            sites=[site.info for site in sites],
            probes=(),
            sample_ids={},
            meta={**environment(first.dtype, first.device), **self._settings, **self._meta},
            overwrite=self._overwrite,
            grows=True,
        )
        self._sink = Sink(self._observer, (), self._writer)
        with ExitStack() as stack:
            stack.enter_context(self._writer)
            stack.push(self._finish)
            self._queue = stack.enter_context(WriteQueue(self._write, max_bytes=self._max_bytes, drop=self._drop))
            stack.callback(self._passes.close)
            # before the hooks of the sites, so that it is known which tokens count
            handle = self._root.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(handle.remove)
            self._hooks = stack.enter_context(Hooks(self._root, self._observer.points, self._on_fire, self._on_pass))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is None:
            self.summary = RecordingSummary(
                path=self.out,
                checkpoint=str(self._meta["checkpoint"]),
                sites=len(self._observer.sites),
                probes=len(self._writer.probes),
                samples=sum(len(ids) for ids in self._writer.sample_ids.values()),
                stored_tokens=self._stored,
                tokens=self._tokens,
                bytes=self.out.stat().st_size,
                seconds=time.perf_counter() - self._started,
            )

    def probe(self, name: str) -> None:
        """Say that what follows is the probe ``name``.

        Raises:
            ConfigError: this probe was recorded earlier and closed; the rows of a probe lie together in the file.
        """
        if name == self._probe:
            return
        if name in self._past_probes:
            raise ConfigError(
                f"The probe {name!r} of {self.out} ended when {self._probe!r} began. Run everything of one probe in a "
                "row, or record it into a second file."
            )
        self._probe = name
        self._past_probes.append(name)
        self._passes.restart()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside: for forwards that are not meant (a reference model's, another adapter's)."""
        if self._hooks is None:
            raise ConfigError("Only a recording that has begun can be paused.")
        self._hooks.__exit__(None, None, None)
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            self._hooks.__enter__()

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._current = None
        if self._paused:
            return
        if threading.get_ident() != self._thread:
            raise SiteError(
                "A forward ran in another thread than the one that began the recording (replicas of DataParallel do). "
                "Run the model in one thread, or one process per device."
            )
        self._current = self._passes.read(args, kwargs, self._probe)
        self._observer.expect(self._current.tokens, self._current.stored)

    def _on_fire(self, index: int, args: tuple[Any, ...], output: Any) -> None:
        if self._current is not None:
            with torch.no_grad():
                self._observer.on_fire(index, args, output)

    def _on_pass(self) -> None:
        now, self._current = self._current, None
        if now is None or not len(now.tokens):
            return
        # Sums are taken in float32 whatever precision the caller computes in.
        with torch.no_grad(), torch.autocast(self._device, enabled=False):
            version = self._versions()
            if version != self._version:
                self._version, self._changed = version, True
                self._observer.refresh()
            self._observer.on_pass()
            pending = self._observer.pending()
        observed = Observed(self._probe, now.columns, len(now.tokens), now.rows, pending)
        batch = _LiveBatch(observed, now.samples, f"{self._probe}\n".encode() + now.identity)
        if self._queue.put(batch, pending.copy.nbytes):
            self._tokens += len(now.tokens)
            self._stored += len(now.stored)
        else:
            self.dropped_tokens += len(now.tokens)

    def _write(self, batch: _LiveBatch) -> None:
        task = batch.observed.task
        known = len(self._writer.sample_ids.get(task, ()))
        self._writer.grow(task, [str(number) for number in range(known, batch.samples)])
        self._digest.update(batch.identity)
        self._sink(batch.observed)

    def _finish(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        if not self._tokens:
            raise ProbeError(
                f"Nothing was recorded into {self.out}: the model ran no forward with a real token inside the block"
                + (f" that could be kept ({self.dropped_tokens} tokens were dropped)." if self._drop else ".")
                + " Call the model that was given, inside the block."
            )
        self._changed = self._changed or self._versions() != self._version
        self._writer.set_meta(
            probes_sha256=self._digest.hexdigest(),
            dropped_tokens=self.dropped_tokens,
            parameters_changed=self._changed,
        )
        self._sink.finish()
        write_weights(self._writer, self._observer.sites)

    def _versions(self) -> int:
        # torch counts every change in place; tensors made in inference mode are never counted
        return sum(p._version for p in self._parameters if not p.is_inference())
