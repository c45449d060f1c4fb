"""Recording the checkpoints of a run, or one lone checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml

from driftlens.backbones import Backbone, decoder_layers, load_backbone
from driftlens.backbones.prefix import FrozenPrefix
from driftlens.errors import ConfigError, DriftLensError, FormatError, NotFoundError, ProbeError
from driftlens.recording.batches import PaddingSide, ProbePrefix
from driftlens.recording.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LoadedCheckpoint,
    checkpoint_sha256,
    load_checkpoint,
)
from driftlens.recording.distributed import Ranks
from driftlens.recording.estimate import RecordingEstimate, estimate_probes
from driftlens.recording.probe_files import load_probes
from driftlens.recording.probes import ProbeSet
from driftlens.recording.recorder import Progress, RecordingSummary, inference, record_probes, recording_settings
from driftlens.recording.reference import load_reference
from driftlens.recording.sites import base_module, find_sites
from driftlens.store import RunLock, open_recording, verify_recording
from driftlens.store.manifest import Manifest, sha256_file
from driftlens.streams import load_stream

__all__ = ["NOISE_SUFFIX", "estimate_checkpoint", "estimate_run", "record_checkpoint", "record_run"]

NOISE_SUFFIX = ".noise.h5"
"""Ending of the second recording of the last checkpoint, made with another batch size and padding side."""

Report = Callable[[Progress], None]


def record_checkpoint(
    ckpt_folder: Path | str,
    base: str | None = None,
    probes: Path | str | ProbeSet | None = None,
    out: Path | str | None = None,
    *,
    semantics: str | None = None,
    reference: Path | str | None = None,
    batch_size: int = 16,
    tokens_per_sample: int | None = None,
    device: torch.device | str | None = None,
    overwrite: bool = False,
    overhead_batches: int = 0,
    max_buffer_mb: float | None = None,
    progress: Report | None = None,
) -> RecordingSummary:
    """Record one checkpoint: an adapter folder of PEFT, CoIN, MCITlib or Prism.

    Args:
        ckpt_folder: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: base model; None takes the one that the adapter names.
        probes: probe set or its folder; None takes the probes of the built-in stream.
        out: the file to write; None for ``NAME.h5`` in the current folder.
        semantics: how the experts of a CoIN, MCITlib or Prism folder combine, see `load_checkpoint`.
        reference: folder of an anchor checkpoint whose parameters are applied to the inputs of this pass too.
        batch_size: samples per forward.
        tokens_per_sample: stored rows per sample (None: what the probe set says).
        device: where to run; None takes a GPU if there is one.
        overwrite: replace an existing file at the end.
        overhead_batches: see ``record_probes``.
        max_buffer_mb: see ``record_probes``.
        progress: called after every batch.

    Under `accelerate launch` or `torchrun` the processes share the work and the first one writes the file.

    Raises:
        NotFoundError: no such checkpoint, base model or probe set.
        FormatError: the checkpoint is damaged or does not fit the base model.
        ProbeError, SiteError, StorageError: see ``record_probes``.
    """
    folder, chosen = Path(ckpt_folder), _lone_probes(probes)
    loaded = load_checkpoint(folder, base, device=_device(device), semantics=semantics)
    return record_probes(
        loaded.model,
        chosen,
        Path(f"{folder.name}.h5") if out is None else Path(out),
        encoder=loaded.backbone.encoder,
        checkpoint_meta=loaded.meta,
        reference=None if reference is None else load_reference(loaded, reference),
        batch_size=batch_size,
        tokens_per_sample=tokens_per_sample,
        overwrite=overwrite,
        overhead_batches=overhead_batches,
        max_buffer_mb=max_buffer_mb,
        ranks=Ranks.joined(),
        progress=progress,
    )


def estimate_checkpoint(
    ckpt_folder: Path | str,
    base: str | None = None,
    probes: Path | str | ProbeSet | None = None,
    out: Path | str | None = None,
    *,
    semantics: str | None = None,
    reference: Path | str | None = None,
    batch_size: int = 16,
    tokens_per_sample: int | None = None,
    device: torch.device | str | None = None,
) -> RecordingEstimate:
    """Say what `record_checkpoint` would take with these arguments; writes nothing.

    A checkpoint or base model that cannot be loaded is no error: the estimate then says why it does not know.
    """
    folder = Path(ckpt_folder)
    path = Path(f"{folder.name}.h5") if out is None else Path(out)
    try:
        loaded = load_checkpoint(folder, base, device=_device(device), semantics=semantics)
        return estimate_probes(
            loaded.model,
            _lone_probes(probes),
            path,
            encoder=loaded.backbone.encoder,
            checkpoint=folder.name,
            batch_size=batch_size,
            tokens_per_sample=tokens_per_sample,
            reference=None if reference is None else load_reference(loaded, reference),
        )
    except DriftLensError as error:
        return RecordingEstimate(path, folder.name, note=f"not measured, and recording would fail: {error}")


def estimate_run(
    run_folder: Path | str,
    probes: Path | str | ProbeSet | None = None,
    base: str | None = None,
    *,
    batch_size: int | None = None,
    tokens_per_sample: int | None = None,
    noise_floor: bool = True,
    device: torch.device | str | None = None,
) -> list[RecordingEstimate]:
    """Say what `record_run` would take with these arguments, one estimate per recording; writes nothing.

    All are estimated from the last checkpoint, without cached lower layers, which only make recording faster.

    Raises:
        NotFoundError, FormatError: no such run, or none that could be read.
    """
    manifest = Manifest.load(Path(run_folder))
    config = _read_config(manifest)
    options = config.get("recording") or {}
    targets = _targets(manifest, int(batch_size or options.get("batch_size") or 16), noise_floor)
    last = targets[-1].checkpoint
    try:
        chosen = _choose_probes(probes, config, manifest)
        folder = manifest.run / "checkpoints" / last
        loaded = load_checkpoint(folder, base if base is not None else config.get("base"), device=_device(device))
        measured = estimate_probes(
            loaded.model,
            chosen,
            targets[-1].path,
            encoder=loaded.backbone.encoder,
            checkpoint=last,
            batch_size=targets[0].batch_size,
            tokens_per_sample=tokens_per_sample or options.get("tokens_per_sample"),
        )
    except DriftLensError as error:
        measured = RecordingEstimate(manifest.run, last, note=f"not measured, and recording would fail: {error}")
    return [
        replace(
            measured,
            path=target.path,
            checkpoint=target.checkpoint,
            note=measured.note if measured.sites is None else _already(target.path),
        )
        for target in targets
    ]


def _already(path: Path) -> str:
    if not path.is_file():
        return ""
    damaged = verify_recording(path)
    return "there already, but damaged: made anew" if damaged else "there already: kept if it was made in the same way"


def _lone_probes(probes: Path | str | ProbeSet | None) -> ProbeSet:
    if isinstance(probes, ProbeSet):
        return probes
    return ProbeSet.from_stream(load_stream("builtin")) if probes is None else load_probes(Path(str(probes)))


def record_run(
    run_folder: Path | str,
    probes: Path | str | ProbeSet | None = None,
    base: str | None = None,
    *,
    resume: bool = True,
    batch_size: int | None = None,
    tokens_per_sample: int | None = None,
    noise_floor: bool = True,
    prefix_cache: bool = True,
    device: torch.device | str | None = None,
    progress: Report | None = None,
) -> list[RecordingSummary]:
    """Record every checkpoint that a run's manifest lists, then the last one a second time for the noise floor.

    Each finished recording is entered in the manifest at once, so an interrupted call loses at most the checkpoint
    it was working on; calling it again ends with the same bytes.

    Args:
        run_folder: the run.
        probes: probe set or its folder; None takes the run's configuration, and there by default its stream's probes.
        base: base model; None takes the run's.
        resume: keep recordings that are finished, verify and were made in the same way; False makes all anew.
        batch_size: samples per forward (None: the run's configuration).
        tokens_per_sample: stored rows per sample (None: the run's configuration, then the probe set).
        noise_floor: also record the last checkpoint with another batch size, the other padding side and without
            cached layers, as ``NAME.noise.h5``.
        prefix_cache: compute the frozen layers below the first adapted one once for all checkpoints.
        device: where to run; None takes a GPU if there is one.
        progress: called after every batch, with samples done over all checkpoints.

    Returns:
        One summary per recording, in checkpoint order; the noise floor's last.

    Raises:
        NotFoundError: no run, or a run without a finished checkpoint.
        FormatError: a checkpoint's files differ from what the manifest lists.
        ConfigError: a finished recording was made in another way (other batch size, rows, ...).
        ProbeError: the run's stream has changed, the probes do not fit the model, or recordings were made on others.
        SiteError, StorageError, LockedError: see ``record_probes``.
    """
    run = Path(run_folder)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "A whole run is recorded by one process, and several were launched. Launch the checkpoints one by one: "
            "driftlens record --ckpt RUN/checkpoints/NAME --out RUN/recordings/NAME.h5"
        )
    Manifest.load(run)  # before the lock, which would create the folder of a run that does not exist
    with RunLock(run):
        manifest = Manifest.load(run)
        config = _read_config(manifest)
        options = config.get("recording") or {}
        job = _RunRecorder(
            manifest,
            _choose_probes(probes, config, manifest),
            base=base if base is not None else config.get("base"),
            batch_size=int(batch_size or options.get("batch_size") or 16),
            tokens_per_sample=tokens_per_sample or options.get("tokens_per_sample"),
            resume=resume,
            prefix_cache=prefix_cache,
            device=_device(device),
            progress=progress,
        )
        return job.record_all(noise_floor)


@dataclass(frozen=True)
class _Target:
    """One recording to make."""

    checkpoint: str
    path: Path
    batch_size: int
    padding_side: PaddingSide
    noise: bool


class _RunRecorder:
    """State of one ``record_run``: the base model and the cached layers are shared by all checkpoints."""

    def __init__(
        self,
        manifest: Manifest,
        probes: ProbeSet,
        *,
        base: str | None,
        batch_size: int,
        tokens_per_sample: int | None,
        resume: bool,
        prefix_cache: bool,
        device: torch.device,
        progress: Report | None,
    ) -> None:
        self.run, self.manifest, self.probes, self.base = manifest.run, manifest, probes, base
        self.batch_size, self.tokens_per_sample = batch_size, tokens_per_sample
        self.resume, self.prefix_cache, self.device = resume, prefix_cache, device
        self._progress = progress
        self._backbone: Backbone | None = None
        self._prefix: ProbePrefix | None = None
        self._done = self._total = 0

    def record_all(self, noise_floor: bool) -> list[RecordingSummary]:
        """Make what is missing, in order."""
        folder = self.run / "recordings"
        folder.mkdir(exist_ok=True)
        targets = _targets(self.manifest, self.batch_size, noise_floor)
        self._total = len(targets) * len(self.probes)
        summaries = []
        for target in targets:
            summaries.append(self._kept(target) or self._make(target))
            self._done += len(self.probes)
            self.manifest.probes_sha256 = self.probes.sha256
            self.manifest.add(target.path.relative_to(self.run))
            self.manifest.save()
        return summaries

    def _kept(self, target: _Target) -> RecordingSummary | None:
        """Return the summary of a finished recording that stays, or None if it must be made."""
        if not self.resume or not target.path.is_file() or verify_recording(target.path):
            return None
        expected = recording_settings(self.probes, target.batch_size, target.padding_side, self.tokens_per_sample)
        expected["checkpoint_sha256"] = self._checked_sha256(target.checkpoint)
        with open_recording(target.path) as recording:
            meta = recording.meta
            differing = [name for name, value in expected.items() if meta.get(name) != value]
            if differing:
                found = ", ".join(f"{name} {meta.get(name)!r} (now {expected[name]!r})" for name in differing)
                raise (ProbeError if "probes_sha256" in differing else ConfigError)(
                    f"{target.path} was recorded in another way: {found}. Recordings of a run must agree. Use the same "
                    f"settings, or record the whole run anew with --fresh (resume=False); nothing was changed."
                )
            summary = RecordingSummary(
                path=target.path,
                checkpoint=target.checkpoint,
                sites=len(recording.sites),
                probes=len(recording.probes),
                samples=len(self.probes),
                stored_tokens=recording.n_tokens,
                tokens=int(recording.groups[0].stats["count"].sum()),
                bytes=target.path.stat().st_size,
                seconds=0.0,
                skipped=True,
            )
        self._report(Progress(f"kept {target.path.name}", len(self.probes), len(self.probes)))
        return summary

    def _make(self, target: _Target) -> RecordingSummary:
        self._checked_sha256(target.checkpoint)
        if self._backbone is None and self.base is not None:
            self._backbone = load_backbone(self.base, device=self.device)
        folder = self.run / "checkpoints" / target.checkpoint
        loaded = load_checkpoint(folder, backbone=self._backbone, device=self.device)
        self._backbone = loaded.backbone
        try:
            return record_probes(
                loaded.model,
                self.probes,
                target.path,
                encoder=loaded.backbone.encoder,
                checkpoint_meta=loaded.meta | {"noise_floor": target.noise},
                batch_size=target.batch_size,
                padding_side=target.padding_side,
                tokens_per_sample=self.tokens_per_sample,
                # The noise floor covers the cached layers too: its pass computes them afresh.
                prefix=None if target.noise else self._cached_layers(loaded),
                overwrite=True,
                progress=self._report,
            )
        finally:
            loaded.unload()

    def _cached_layers(self, loaded: LoadedCheckpoint) -> ProbePrefix | None:
        depth = _frozen_depth(loaded) if self.prefix_cache else None
        if depth is None:
            return None
        if self._prefix is None:
            root, encoder = base_module(loaded.model), loaded.backbone.encoder
            encoded = self.probes.check_fits(root, encoder)
            prefix = FrozenPrefix(root, depth, 0 if encoder is None else encoder.pad_token_id)
            states = {}
            with inference(root, self.device):
                for task, rows in encoded.items():
                    self._report(Progress(f"lower layers on {task}", 0, len(self.probes)))
                    states[task] = prefix.compute(rows, self.batch_size, self.device)
            self._prefix = ProbePrefix(prefix, states)
        return self._prefix if depth >= self._prefix.prefix.depth else None

    def _checked_sha256(self, name: str) -> str:
        folder = self.run / "checkpoints" / name
        digest = checkpoint_sha256(folder)
        for path in (folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS):
            listed = self.manifest.files.get(path.relative_to(self.run).as_posix())
            if listed is None or listed.sha256 != sha256_file(path):
                raise FormatError(
                    f"{path} differs from what {self.manifest.path} lists: the checkpoint was changed or damaged after "
                    "it was written. Restore it; `driftlens verify` lists everything that differs."
                )
        return digest

    def _report(self, step: Progress) -> None:
        if self._progress is not None:
            self._progress(Progress(step.message, self._done + step.done, self._total))


def _targets(manifest: Manifest, batch_size: int, noise_floor: bool) -> list[_Target]:
    folder, names = manifest.run / "recordings", _checkpoints(manifest)
    targets = [_Target(name, folder / f"{name}.h5", batch_size, "left", False) for name in names]
    if noise_floor:
        path = folder / f"{names[-1]}{NOISE_SUFFIX}"
        targets.append(_Target(names[-1], path, batch_size // 2 or 2, "right", True))
    return targets


def _checkpoints(manifest: Manifest) -> list[str]:
    found = [PurePosixPath(path).parts for path in manifest.files]
    names = sorted({parts[1] for parts in found if len(parts) == 3 and parts[::2] == ("checkpoints", ADAPTER_WEIGHTS)})
    if not names and manifest.complete and manifest.lists("recordings"):
        raise NotFoundError(
            f"{manifest.run} was collected from recordings and has no checkpoints. Record a checkpoint anew with "
            "`driftlens record --ckpt CKPT --out FILE.h5`, then collect the files again."
        )
    if not names:
        raise NotFoundError(
            f"{manifest.run} has no finished checkpoint to record. Continue its training first: "
            f"driftlens train {manifest.run / 'config.yaml'} --out {manifest.run} --resume"
        )
    return names


def _frozen_depth(loaded: LoadedCheckpoint) -> int | None:
    """Return the lowest decoder layer with a site, or None if something else differs between checkpoints."""
    if any(getattr(config, "modules_to_save", None) for config in loaded.peft.peft_config.values()):
        return None
    owner = {id(m): i for i, layer in enumerate(decoder_layers(loaded.model)) for m in layer.modules()}
    layers = [owner.get(id(site.module)) for site in find_sites(loaded.model)]
    return None if None in layers else min(layer for layer in layers if layer is not None)


def _read_config(manifest: Manifest) -> dict[str, Any]:
    path = manifest.run / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist. Restore it, or record checkpoint by checkpoint.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not valid YAML: {error}. Restore it.") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path} must hold sections; found {type(config).__name__}. Restore it.")
    return config


def _choose_probes(probes: Path | str | ProbeSet | None, config: dict[str, Any], manifest: Manifest) -> ProbeSet:
    if isinstance(probes, ProbeSet):
        return probes
    folder = probes or (config.get("recording") or {}).get("probes")
    if folder is not None:
        return load_probes(Path(str(folder)))
    section = config.get("stream") or {}
    # The same selection that training made, so that the stream's hash can be compared.
    keys = {"tasks": "tasks", "train": "train_samples", "test": "test_samples"}
    options = {option: section[key] for option, key in keys.items() if section.get(key) is not None}
    stream = load_stream(str(section.get("name", "builtin")), **options)
    if stream.sha256 != manifest.stream_sha256:
        raise ProbeError(
            f"The stream {stream.name!r} of {manifest.run} has changed since it was trained on (recorded "
            f"{manifest.stream_sha256[:12]}, now {stream.sha256[:12]}), so its probes are not the ones of then. "
            "Use the version of driftlens that trained the run, or give a probe set with --probes."
        )
    return ProbeSet.from_stream(stream)


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
