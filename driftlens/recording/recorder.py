"""Recording one model on a probe set: forward passes under hooks, rows and sums into one HDF5 file."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from driftlens.backbones.encoding import Encoded, Encoder
from driftlens.errors import ConfigError
from driftlens.recording.accumulators import ProbeSums
from driftlens.recording.batches import PaddingSide, Plan, ProbePrefix
from driftlens.recording.distributed import ALONE, Ranks
from driftlens.recording.hooks import Hooks
from driftlens.recording.observer import Observer, PendingBatch
from driftlens.recording.overhead import overhead_percent, paired_ratios
from driftlens.recording.probes import ProbeSet
from driftlens.recording.queue import WriteQueue, check_fits_buffer
from driftlens.recording.reference import Reference, reference_grams
from driftlens.recording.sites import Site, base_module, find_sites, forward_context
from driftlens.recording.transfer import batch_bytes
from driftlens.store import RecordingWriter

__all__ = [
    "Observed",
    "Progress",
    "RecordingSummary",
    "Sink",
    "environment",
    "inference",
    "make_plan",
    "record_probes",
    "recording_settings",
    "sites_sha256",
    "write_weights",
]

_LIBRARIES = ("torch", "transformers", "peft", "h5py", "numpy")


@dataclass(frozen=True)
class Progress:
    """How far a recording is: a message, and samples done out of all."""

    message: str
    done: float
    total: float


@dataclass(frozen=True)
class RecordingSummary:
    """What a finished recording is.

    Attributes:
        path: the file.
        checkpoint: name of the recorded checkpoint.
        sites: number of sites.
        probes: number of probe tasks.
        samples: number of samples.
        stored_tokens: tokens whose rows are stored.
        tokens: tokens that went into the sums.
        bytes: size of the file.
        seconds: wall-clock time; 0 for a recording that was there already.
        overhead_percent: time of the recorded forward over the bare one, minus 1, in percent; None if not measured.
        skipped: whether a verified recording of the same inputs was there already and was kept.
    """

    path: Path
    checkpoint: str
    sites: int
    probes: int
    samples: int
    stored_tokens: int
    tokens: int
    bytes: int
    seconds: float
    overhead_percent: float | None = None
    skipped: bool = False

    def row(self) -> dict[str, object]:
        """Return the summary as plain values for tables and JSON."""
        return asdict(self) | {"path": str(self.path)}


def record_probes(
    model: nn.Module,
    probes: ProbeSet,
    out: Path | str,
    *,
    encoder: Encoder | None,
    checkpoint_meta: Mapping[str, Any],
    batch_size: int = 16,
    padding_side: PaddingSide = "left",
    tokens_per_sample: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    prefix: ProbePrefix | None = None,
    reference: Reference | None = None,
    overwrite: bool = False,
    overhead_batches: int = 0,
    max_buffer_mb: float | None = None,
    ranks: Ranks = ALONE,
    progress: Callable[[Progress], None] | None = None,
) -> RecordingSummary:
    """Record ``model`` on ``probes``, teacher-forced over prompt and answer, into the HDF5 file ``out``.

    The model runs in evaluation and inference mode, its outputs are the same bit for bit as without recording, and
    its training mode is restored. The file appears complete and verified, or not at all. Same inputs, same bytes.

    Args:
        model: model with observable sites, PEFT-wrapped or not.
        probes: the fixed inputs.
        out: path of the recording; its folder must exist.
        encoder: tokenizer and image processor; None if the probes hold token ids.
        checkpoint_meta: what the file says about the checkpoint: ``checkpoint`` (its name), hashes, base model.
        batch_size: samples per forward, >= 1.
        padding_side: where short samples of a batch are padded; padding is never recorded.
        tokens_per_sample: stored rows per sample (None: what the probe set says); sums cover all tokens anyway.
        seed: added to the probe set's seed for the draw of stored rows.
        device: where to run; None leaves the model where it is.
        prefix: cached lower layers; they are skipped in every forward.
        reference: an anchor whose parameters are applied to the inputs of this pass too; see `Reference`.
        overwrite: replace an existing file at the end; otherwise an existing file is an error.
        overhead_batches: on how many batches to time the recorded forward against the bare one (0: not measured).
            The figure goes into the summary only: a file with a time in it could not be the same byte for byte.
        max_buffer_mb: megabytes of recorded values that may be in flight between model and file; None for no limit but
            that of `driftlens.recording.queue.DEPTH` batches. The model waits for room; nothing is ever dropped.
        ranks: the processes that share the work (every one must call this, with the same arguments); the first one
            writes the file, all return its summary.
        progress: called after every batch.

    Raises:
        ProbeError: the probes do not fit the model.
        SiteError: no observable site, or one that did not fire once per forward, or whose gate rows do not sum to 1.
        ConfigError: a batch size below 1, an unknown padding side, a batch that does not fit ``max_buffer_mb``, or
            processes that do not record the same.
        StorageError: the target exists, or the disk refuses.
        DriftLensError: another of the ``ranks`` failed; nothing was written.
    """
    started = time.perf_counter()
    out, root, name = Path(out), base_module(model), str(checkpoint_meta.get("checkpoint", Path(out).stem))
    settings = recording_settings(probes, batch_size, padding_side, tokens_per_sample, seed)
    sites = find_sites(model)
    encoded = probes.check_fits(root, encoder)
    first = next(root.parameters())
    target = first.device if device is None else torch.device(device)
    plan = make_plan(root, probes, encoded, encoder, settings, device=target, prefix=prefix)
    max_bytes = None if max_buffer_mb is None else max(1, int(max_buffer_mb * 1e6))
    check_fits_buffer(batch_bytes([site.info for site in sites], plan.largest, reference is not None), max_bytes)
    writer = RecordingWriter(
        out,
        sites=[site.info for site in sites],
        probes=probes.tasks,
        sample_ids={task: [row.id for row in rows] for task, rows in probes.samples.items()},
        meta={**checkpoint_meta, "checkpoint": name, **environment(first.dtype, target), **settings}
        | ({} if reference is None else reference.meta),
        n_tokens=plan.stored_tokens,
        reference=reference is not None,
        overwrite=overwrite,
    )
    skipping = nullcontext() if prefix is None else prefix.prefix.skipping()
    if ranks.size > 1:
        ranks.agree("what is recorded", repr((settings, plan.tokens, [site.info for site in sites])))
        ranks.agree("the weights", sites_sha256(sites))
    with ExitStack() as opened:

        def start() -> None:
            opened.enter_context(writer)

        ranks.step(f"opening {out}", start if ranks.main else _nothing)
        with inference(model, target), skipping, forward_context(model):
            observer = Observer(sites, reference)
            overhead = _measure(root, observer, plan, overhead_batches)
            sink = Sink(observer, plan.probes.tasks, writer) if ranks.main else None
            _run(
                root,
                observer,
                plan,
                sink,
                ranks,
                max_bytes,
                lambda message, done: _report(progress, f"{name} on {message}", done, len(probes)),
            )

        def finish() -> int:
            if sink is None:
                return 0
            sink.finish()
            write_weights(writer, sites)
            if reference is not None:
                for number, grams in enumerate(reference_grams(sites, reference)):
                    writer.set_reference_grams(number, grams)
            opened.pop_all().close()
            return out.stat().st_size

        size = ranks.from_main(f"finishing {out}", finish)
    return RecordingSummary(
        path=out,
        checkpoint=name,
        sites=len(sites),
        probes=len(probes.tasks),
        samples=len(probes),
        stored_tokens=plan.stored_tokens,
        tokens=plan.tokens,
        bytes=size,
        seconds=time.perf_counter() - started,
        overhead_percent=overhead,
    )


def recording_settings(
    probes: ProbeSet, batch_size: int, padding_side: str, tokens_per_sample: int | None, seed: int = 0
) -> dict[str, Any]:
    """Return the attributes that say how a recording is made; two recordings that agree in them can be compared.

    Raises:
        ConfigError: a batch size or a number of rows below 1, or an unknown padding side.
    """
    limit = probes.tokens_per_sample if tokens_per_sample is None else tokens_per_sample
    if batch_size < 1 or padding_side not in ("left", "right") or (limit is not None and limit < 1):
        raise ConfigError(
            f"Cannot record with batch_size={batch_size!r}, padding_side={padding_side!r} and "
            f"tokens_per_sample={limit!r}: the numbers must be at least 1 and the side 'left' or 'right'."
        )
    return {
        "probes_sha256": probes.sha256,
        "roles": list(probes.roles),
        "tokens_per_sample": 0 if limit is None else limit,
        "seed": probes.seed + seed,
        "batch_size": batch_size,
        "padding_side": padding_side,
    }


@contextmanager
def inference(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation and inference mode on ``device``; the training mode of every module is restored at the end."""
    model.to(device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    # Saturated gates give denormal products, which slow some CPUs down; training does the same.
    flushed = float(torch.tensor(2.0**-126) * 0.5) == 0.0
    torch.set_flush_denormal(True)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_flush_denormal(flushed)
        for module in training:
            module.training = True


def make_plan(
    root: nn.Module,
    probes: ProbeSet,
    encoded: Mapping[str, Sequence[Encoded]],
    encoder: Encoder | None,
    settings: Mapping[str, Any],
    *,
    device: torch.device,
    prefix: ProbePrefix | None = None,
) -> Plan:
    """Return the batches of ``probes`` for the model ``root``, cut as ``settings`` (`recording_settings`) say."""
    return Plan(
        probes,
        encoded,
        limit=settings["tokens_per_sample"] or None,
        seed=settings["seed"],
        batch_size=settings["batch_size"],
        padding_side=settings["padding_side"],
        # padded positions are masked, so without a tokenizer any id serves
        pad_token_id=0 if encoder is None else encoder.pad_token_id,
        device=device,
        dtype=next(root.parameters()).dtype,
        prefix=prefix,
        options=_forward_options(root),
    )


@dataclass(frozen=True)
class Observed:
    """One recorded batch on its way into the file.

    Attributes:
        task: the probe.
        columns: see `Batch.columns`.
        tokens: how many tokens went into the sums.
        samples: how many samples it had.
        pending: its values.
    """

    task: str
    columns: Mapping[str, NDArray[np.int64]]
    tokens: int
    samples: int
    pending: PendingBatch


class Sink:
    """Takes recorded batches in order: checks them, adds up their sums and appends their rows.

    Args:
        observer: the observer that saw them.
        tasks: probes in order; names that come up later are added behind.
        writer: the open file.
    """

    def __init__(self, observer: Observer, tasks: Sequence[str], writer: RecordingWriter) -> None:
        self._observer, self._writer = observer, writer
        self._sums = {task: [ProbeSums() for _ in observer.groups] for task in tasks}

    def __call__(self, batch: Observed) -> None:
        """Take one batch (called in the writer thread)."""
        seen = self._observer.result(batch.pending)
        sums = self._sums.setdefault(batch.task, [ProbeSums() for _ in seen])
        for accumulated, group in zip(sums, seen, strict=True):
            accumulated.update(batch.tokens, group.sums)
        self._writer.append(batch.task, **batch.columns, values=[group.values for group in seen])

    def finish(self) -> None:
        """Give the writer the sums over everything."""
        for number in range(len(self._observer.groups)):
            by_probe = [groups[number] for groups in self._sums.values()]
            results = [probe.result() for probe in by_probe]
            stats = {name: np.stack([result[name] for result in results], axis=1) for name in results[0]}
            stats["count"] = np.array([probe.count for probe in by_probe], dtype=np.float64)
            self._writer.set_stats(number, stats)


def _run(
    root: nn.Module,
    observer: Observer,
    plan: Plan,
    sink: Sink | None,
    ranks: Ranks,
    max_bytes: int | None,
    report: Callable[[str, int], None],
) -> None:
    """Run this process's share of the batches; the process with a ``sink`` hands all of them to it, in order."""
    mine = plan.batches(ranks.rank, ranks.size)
    arrived: list[Observed] = []
    done = 0
    with (
        Hooks(root, observer.points, observer.on_fire, observer.on_pass),
        nullcontext() if sink is None else WriteQueue(sink, max_bytes=max_bytes) as queue,
    ):

        def hand_over() -> None:
            for batch in arrived:
                assert queue is not None  # batches arrive only where they are written
                queue.put(batch, batch.pending.copy.nbytes)

        def turn() -> Observed | None:
            hand_over()
            batch = next(mine, None)
            if batch is None:
                return None
            observer.expect(batch.tokens, batch.stored)
            root(**batch.inputs)
            return Observed(batch.task, batch.columns, len(batch.tokens), len(batch.samples), observer.pending())

        for _ in range(-(-len(plan.cuts) // ranks.size)):
            arrived = [batch for batch in ranks.step("recording", turn) if batch is not None]
            done += sum(batch.samples for batch in arrived)
            if arrived:
                report(arrived[-1].task, done)
        ranks.step("recording", hand_over)


def _measure(root: nn.Module, observer: Observer, plan: Plan, batches: int) -> float | None:
    if not batches:
        return None
    return overhead_percent(paired_ratios(root, observer, list(itertools.islice(plan.batches(), batches))))


def _nothing() -> None:
    pass


def _report(progress: Callable[[Progress], None] | None, message: str, done: int, total: int) -> None:
    if progress is not None:
        progress(Progress(f"recording {message}", done, total))


def write_weights(writer: RecordingWriter, sites: Sequence[Site]) -> None:
    """Store the parameters of all sites as they are now."""
    for index, site in enumerate(sites):
        weights = site.weights()
        a, b, router = (None if part is None else _host(part) for part in (weights.a, weights.b, weights.router))
        writer.set_weights(index, a, b, router)


def sites_sha256(sites: Sequence[Site]) -> str:
    """Return a hash of the sites' names and parameters: two models with equal hashes hold the same experts."""
    digest = hashlib.sha256()
    for site in sites:
        weights = site.weights()
        digest.update(repr(site.info).encode())
        for part in (weights.a, weights.b, weights.router):
            digest.update(b"-" if part is None else np.ascontiguousarray(_host(part)).tobytes())
    return digest.hexdigest()


def _host(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array


def environment(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return what a recording says about the process that made it; nothing dropped unless said otherwise later."""
    return {
        "versions": {name: version(name) for name in _LIBRARIES},
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "dropped_tokens": 0,
    }


def _forward_options(root: nn.Module) -> dict[str, Any]:
    # Nothing is generated: neither a cache nor the logits of more than one position are of use.
    accepted = inspect.signature(root.forward).parameters
    return {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in accepted}
