"""Recording one model on a probe set: forward passes under hooks, rows and sums into one HDF5 file."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from driftlens.backbones.encoding import Encoder
from driftlens.errors import ConfigError
from driftlens.recording.accumulators import ProbeSums
from driftlens.recording.batches import PaddingSide, Plan, ProbePrefix
from driftlens.recording.hooks import Hooks
from driftlens.recording.observer import Observer
from driftlens.recording.overhead import overhead_percent, paired_ratios
from driftlens.recording.probes import ProbeSet
from driftlens.recording.reference import Reference, reference_grams
from driftlens.recording.sites import Site, base_module, find_sites, forward_context
from driftlens.store import RecordingWriter

__all__ = ["Progress", "RecordingSummary", "inference", "record", "recording_settings"]

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


def record(
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
        progress: called after every batch.

    Raises:
        ProbeError: the probes do not fit the model.
        SiteError: no observable site, or one that did not fire once per forward, or whose gate rows do not sum to 1.
        ConfigError: a batch size below 1 or an unknown padding side.
        StorageError: the target exists, or the disk refuses.
    """
    started = time.perf_counter()
    out, root, name = Path(out), base_module(model), str(checkpoint_meta.get("checkpoint", Path(out).stem))
    settings = recording_settings(probes, batch_size, padding_side, tokens_per_sample, seed)
    sites = find_sites(model)
    encoded = probes.check_fits(root, encoder)
    first = next(root.parameters())
    target = first.device if device is None else torch.device(device)
    plan = Plan(
        probes,
        encoded,
        limit=settings["tokens_per_sample"] or None,
        seed=settings["seed"],
        batch_size=batch_size,
        padding_side=padding_side,
        # padded positions are masked, so without a tokenizer any id serves
        pad_token_id=0 if encoder is None else encoder.pad_token_id,
        device=target,
        dtype=first.dtype,
        prefix=prefix,
        options=_forward_options(root),
    )
    writer = RecordingWriter(
        out,
        sites=[site.info for site in sites],
        probes=probes.tasks,
        sample_ids={task: [row.id for row in rows] for task, rows in probes.samples.items()},
        meta={**checkpoint_meta, "checkpoint": name, **_environment(first.dtype, target), **settings}
        | ({} if reference is None else reference.meta),
        n_tokens=plan.stored_tokens,
        reference=reference is not None,
        overwrite=overwrite,
    )
    overhead = None
    skipping = nullcontext() if prefix is None else prefix.prefix.skipping()
    with writer, inference(root, target), skipping, forward_context(model):
        observer = Observer(sites, reference)
        if overhead_batches:
            timed = list(itertools.islice(plan.batches(), overhead_batches))
            overhead = overhead_percent(paired_ratios(root, observer, timed))
        _run(root, observer, plan, writer, lambda task, done: _report(progress, f"{name} on {task}", done, len(probes)))
        _write_weights(writer, sites)
        if reference is not None:
            for number, grams in enumerate(reference_grams(sites, reference)):
                writer.set_reference_grams(number, grams)
    return RecordingSummary(
        path=out,
        checkpoint=name,
        sites=len(sites),
        probes=len(probes.tasks),
        samples=len(probes),
        stored_tokens=plan.stored_tokens,
        tokens=plan.tokens,
        bytes=out.stat().st_size,
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
def inference(root: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation and inference mode on ``device``; the training mode of every module is restored at the end."""
    root.to(device)
    training = [module for module in root.modules() if module.training]
    root.eval()
    # Saturated gates give denormal products, which slow some CPUs down; training does the same.
    torch.set_flush_denormal(True)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_flush_denormal(False)
        for module in training:
            module.training = True


def _run(
    root: nn.Module, observer: Observer, plan: Plan, writer: RecordingWriter, report: Callable[[str, int], None]
) -> None:
    sums = {task: [ProbeSums() for _ in observer.groups] for task in plan.probes.tasks}
    done = 0
    with Hooks(root, observer.points, observer.on_fire, observer.on_pass):
        for batch in plan.batches():
            observer.expect(batch.tokens, batch.stored)
            root(**batch.inputs)
            seen = observer.take()
            for accumulated, group in zip(sums[batch.task], seen, strict=True):
                accumulated.update(len(batch.tokens), group.sums)
            writer.append(batch.task, **batch.columns, values=[group.values for group in seen])
            done += len(batch.samples)
            report(batch.task, done)
    for number in range(len(observer.groups)):
        by_probe = [sums[task][number] for task in plan.probes.tasks]
        results = [probe.result() for probe in by_probe]
        stats = {name: np.stack([result[name] for result in results], axis=1) for name in results[0]}
        stats["count"] = np.array([probe.count for probe in by_probe], dtype=np.float64)
        writer.set_stats(number, stats)


def _report(progress: Callable[[Progress], None] | None, message: str, done: int, total: int) -> None:
    if progress is not None:
        progress(Progress(f"recording {message}", done, total))


def _write_weights(writer: RecordingWriter, sites: Sequence[Site]) -> None:
    for index, site in enumerate(sites):
        weights = site.weights()
        a, b, router = (None if part is None else _host(part) for part in (weights.a, weights.b, weights.router))
        writer.set_weights(index, a, b, router)


def _host(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array


def _environment(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {
        "versions": {name: version(name) for name in _LIBRARIES},
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


def _forward_options(root: nn.Module) -> dict[str, Any]:
    # Nothing is generated: neither a cache nor the logits of more than one position are of use.
    accepted = inspect.signature(root.forward).parameters
    return {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in accepted}
