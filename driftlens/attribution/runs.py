"""Attributing what a run forgot, old task by old task; or what lies between any two adapters of one base.

Each cell (an old task at a later checkpoint) is one file, written when it is finished and listed in the run's manifest
at once. An interrupted call loses at most the cell it was working on; calling it again keeps what was made from the
same checkpoints in the same way, and ends with the same bytes in every dataset.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from driftlens.analysis.attribution_files import SCORES
from driftlens.analysis.run import Checkpoint, Run, open_run
from driftlens.attribution.estimate import AttributionEstimate
from driftlens.attribution.options import AttributionOptions
from driftlens.attribution.pairs import LoadedPair
from driftlens.attribution.worker import Cell, CellSummary, Report, Samples, Worker, finished_cell
from driftlens.errors import ConfigError, DriftLensError, FormatError, NotFoundError, ProbeError, UnknownNameError
from driftlens.recording.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from driftlens.recording.probe_files import load_probes
from driftlens.recording.probes import ProbeSet
from driftlens.recording.sites import base_module
from driftlens.store import RunLock
from driftlens.streams import Sample, Stream
from driftlens.training.config import EvaluationOptions, RunConfig, parse_config
from driftlens.training.run import build_stream, numerics

__all__ = [
    "attribute_pair",
    "attribute_run",
    "choose_cells",
    "estimate_pair",
    "estimate_run_attribution",
    "run_config",
    "run_stream",
]

OnEstimate = Callable[[Sequence[AttributionEstimate]], None]
At = Literal["last", "all"] | int | Sequence[int]


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _samples_sha256(content: str, task: str) -> str:
    return hashlib.sha256(f"{content}\n{task}".encode()).hexdigest()


def attribute_run(
    run: Run | str | os.PathLike[str],
    options: AttributionOptions | None = None,
    *,
    tasks: Sequence[str] | None = None,
    at: At = "last",
    base: str | None = None,
    resume: bool = True,
    device: torch.device | str | None = None,
    progress: Report | None = None,
    on_estimate: OnEstimate | None = None,
) -> list[CellSummary]:
    """Attribute what a run forgot of its old tasks, on their test samples; the anchor is the checkpoint of the task.

    Args:
        run: a run of ours, with the weights of its checkpoints.
        options: what is made and how; None for the defaults.
        tasks: old tasks; None for all that are older than the checkpoints.
        at: current checkpoints: ``"last"``, ``"all"``, or indices.
        base: base model; None takes the run's.
        resume: keep finished cells that were made from the same checkpoints in the same way; False makes all anew.
        device: where to run; None takes a GPU if there is one.
        progress: called after every step.
        on_estimate: told what the cells that must be made will take, before the first of them.

    Returns:
        One summary per cell, by checkpoint and task.

    Raises:
        NotFoundError: no run, or one without weights (unfinished, thinned or collected).
        UnknownNameError: no such task or checkpoint.
        ConfigError: a task that is not old at any of the checkpoints; several launched processes; another base.
        FormatError: a checkpoint differs from what the manifest lists.
        ProbeError: the run's stream has changed since.
        SiteError: a site whose update cannot be exchanged, see `load_pair`.
        LockedError, StorageError: see `record_run`.
    """
    options = options or AttributionOptions()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("Forgetting is attributed by one process, and several were launched. Launch one.")
    folder = run.path if isinstance(run, Run) else Path(run)
    open_run(folder)  # before the lock, which would create the folder of a run that does not exist
    with RunLock(folder):
        job = _RunJob(open_run(folder), options, tasks, at, base, _device(device), progress)
        with job.numerics():
            return _make(job.worker, job.cells, job.kept if resume else _none, on_estimate, job.list_file)


def estimate_run_attribution(
    run: Run | str | os.PathLike[str],
    options: AttributionOptions | None = None,
    *,
    tasks: Sequence[str] | None = None,
    at: At = "last",
    base: str | None = None,
    device: torch.device | str | None = None,
) -> list[AttributionEstimate]:
    """Say what `attribute_run` would take with these arguments; a few samples are run, nothing is written.

    Raises:
        The errors of `attribute_run` about the run, its tasks and its checkpoints. Where only the model cannot be
        run, the estimates say why instead.
    """
    path = run.path if isinstance(run, Run) else Path(run)
    job = _RunJob(open_run(path), options or AttributionOptions(), tasks, at, base, _device(device), None)
    with job.numerics():
        return _estimates(job.worker, job.cells, {cell.path for cell in job.cells if job.kept(cell)})


def _none(_: object) -> None:
    """Keep no cell, tell nobody."""


def _make(
    worker: Worker,
    cells: Sequence[Cell],
    kept: Callable[[Cell], CellSummary | None],
    on_estimate: OnEstimate | None,
    finished: Callable[[CellSummary], None] = _none,
) -> list[CellSummary]:
    """Attribute the cells that are not there yet; return the summaries of all, in order."""
    summaries = {cell.path: kept(cell) for cell in cells}
    missing = [cell for cell in cells if summaries[cell.path] is None]
    if on_estimate is not None and missing:
        on_estimate([_replacing(one) for one in worker.estimates(missing)])
    summaries |= {summary.path: summary for summary in worker.run(missing, finished)}
    return [summary for summary in summaries.values() if summary is not None]


def _estimates(worker: Worker, cells: Sequence[Cell], kept: set[Path]) -> list[AttributionEstimate]:
    try:
        found = worker.estimates(cells)
    except DriftLensError as error:
        found = [replace(cell.blank, note=f"not measured, and attributing would fail: {error}") for cell in cells]
    return [replace(one, note="there already: kept") if one.path in kept else _replacing(one) for one in found]


def _replacing(estimate: AttributionEstimate) -> AttributionEstimate:
    """Say of a cell that its file will be replaced; a longer note of its own comes first."""
    if not estimate.path.is_file() or estimate.note:
        return estimate
    return replace(estimate, note="there already with other settings or checkpoints: is replaced")


class _RunJob:
    """A run with what is to be attributed of it."""

    def __init__(
        self,
        run: Run,
        options: AttributionOptions,
        tasks: Sequence[str] | None,
        at: At,
        base: str | None,
        device: torch.device,
        progress: Report | None,
    ) -> None:
        self.run, self.options = run, options
        chosen = choose_cells(run, tasks, at)
        self.config = run_config(run)
        self.stream = run_stream(run, self.config)
        training = self.config.training
        self.threads = run.manifest.threads or torch.get_num_threads()
        settings = options.settings(
            evaluation=self.config.evaluation.model_dump(mode="json"),
            threads=self.threads,
            matmul_precision=training.matmul_precision,
        )
        self.worker = Worker(
            base if base is not None else self.config.base,
            options,
            self.config.evaluation,
            settings=settings,
            device=device,
            progress=progress,
            base_sha256=run.manifest.base.get("sha256"),
        )
        self.cells = [self._cell(anchor, current) for current, anchor in chosen]

    def numerics(self) -> AbstractContextManager[None]:
        """Set the numerics that the run was trained and scored with."""
        return numerics(self.threads, self.config.training.matmul_precision)

    def _cell(self, anchor: Checkpoint, current: Checkpoint) -> Cell:
        for point in (anchor, current):
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                self.run.trusted(f"checkpoints/{point.name}/{name}")
        assert anchor.task is not None  # chosen among learned tasks
        test = self.stream.task(anchor.task).test
        checkpoints = self.run.path / "checkpoints"
        return Cell(
            task=anchor.task,
            anchor=checkpoints / anchor.name,
            current=checkpoints / current.name,
            indices=(anchor.index, current.index),
            path=self.run.path / "attribution" / current.name / f"{anchor.name}.h5",
            samples=lambda _: test,
            samples_sha256=_samples_sha256(self.stream.sha256, anchor.task),
            scores=(self._scores(anchor, anchor.task, test), self._scores(current, anchor.task, test)),
        )

    def _scores(self, point: Checkpoint, task: str, test: Sequence[Sample]) -> NDArray[np.float64]:
        """Return [strict, lenient, nll] x [samples] of scores.parquet."""
        frame = self.run.score_table
        rows = frame[(frame["checkpoint"] == point.index) & (frame["task"] == task)].set_index("sample")
        wanted = [sample.id for sample in test]
        if sorted(rows.index) != sorted(wanted):
            raise FormatError(
                f"{self.run.path / 'scores.parquet'} holds {len(rows)} scores of {task} after {point.name}; expected "
                f"one for each of its {len(wanted)} test samples. Restore the file from a copy of the run."
            )
        return np.stack([rows.loc[wanted, score].to_numpy(np.float64) for score in SCORES])

    def kept(self, cell: Cell) -> CellSummary | None:
        """Return the summary of a finished cell that stays, or None if it must be made."""
        try:
            path = self.run.trusted(cell.path.relative_to(self.run.path).as_posix())
            return finished_cell(cell, path, self.worker.settings, self.run.manifest.base.get("sha256"))
        except (NotFoundError, FormatError):
            return None

    def list_file(self, summary: CellSummary) -> None:
        """Enter a finished cell in the manifest."""
        self.run.manifest.add(summary.path.relative_to(self.run.path))
        self.run.manifest.save()


def run_config(run: Run) -> RunConfig:
    """Return the configuration that a run was trained with; NotFoundError if it is missing."""
    if not run.config:
        raise NotFoundError(f"{run.path / 'config.yaml'} does not exist. Restore it from a copy of the run.")
    return parse_config(run.config, str(run.path / "config.yaml"))


def run_stream(run: Run, config: RunConfig) -> Stream:
    """Return the stream of a run; ProbeError if it is no longer the one that was trained on."""
    stream = build_stream(config)
    if stream.sha256 != run.manifest.stream_sha256:
        raise ProbeError(
            f"The stream {stream.name!r} of {run.path} has changed since it was trained on (recorded "
            f"{run.manifest.stream_sha256[:12]}, now {stream.sha256[:12]}), so its test samples are not the ones that "
            "were scored. Use the version of driftlens that trained the run."
        )
    return stream


def choose_cells(run: Run, tasks: Sequence[str] | None, at: At) -> list[tuple[Checkpoint, Checkpoint]]:
    """Return (current, anchor) pairs by checkpoint and task."""
    weighted = [p for p in run.checkpoints if run.manifest.lists(f"checkpoints/{p.name}/{ADAPTER_WEIGHTS}")]
    if not weighted:
        raise NotFoundError(
            f"{run.path} holds no weights of its checkpoints: it was thinned, collected from recordings, or has not "
            "finished one. Forgetting is attributed by running the checkpoints; give the full run."
        )
    by_index, by_task = {p.index: p for p in weighted}, {p.task: p for p in weighted if p.task is not None}
    last = max(by_index)
    if at == "all":
        currents = [index for index in by_index if index > 0]
    else:
        currents = [last] if at == "last" else [at] if isinstance(at, int) else [int(index) for index in at]
    for index in currents:
        if index not in by_index:
            raise UnknownNameError("checkpoint", str(index), [str(known) for known in by_index])
    for task in tasks or ():
        if task not in by_task:
            raise UnknownNameError("task", task, [str(name) for name in by_task])
    anchors = [by_task[task] for task in (by_task if tasks is None else dict.fromkeys(tasks))]
    for point in anchors if tasks is not None else ():
        if not any(index > point.index for index in currents):
            raise ConfigError(
                f"The task {point.task!r} was learned at checkpoint {point.index}, and nothing can be forgotten before "
                f"or at it (asked for: {', '.join(map(str, currents))}). Give a later checkpoint with --at; the last "
                f"one is {last}."
            )
    pairs = [
        (by_index[current], anchor)
        for current in sorted(set(currents))
        for anchor in sorted(anchors, key=lambda point: point.index)
        if current > anchor.index
    ]
    if not pairs:
        raise ConfigError(
            f"No task of {run.path} is old at checkpoint {', '.join(map(str, currents))}: there is nothing that could "
            f"have been forgotten. Give a later checkpoint with --at; the last one is {last}."
        )
    return pairs


# --- any two adapters of one base ---------------------------------------------------------------------------------


def attribute_pair(
    anchor: Path | str,
    current: Path | str,
    probes: Path | str | ProbeSet,
    out: Path | str,
    options: AttributionOptions | None = None,
    *,
    base: str | None = None,
    tasks: Sequence[str] | None = None,
    semantics: str | None = None,
    max_new_tokens: int = 32,
    resume: bool = True,
    device: torch.device | str | None = None,
    progress: Report | None = None,
    on_estimate: OnEstimate | None = None,
) -> list[CellSummary]:
    """Attribute what lies between two adapters of one base model, on probes with answers; no run is needed.

    Args:
        anchor: folder of the earlier adapter.
        current: folder of the later one.
        probes: probe set or its folder. Samples given as text are also answered and scored; of those given as tokens
            or conversations the answer NLL is measured alone.
        out: the file to write; with several tasks ``NAME-TASK.h5`` for each.
        options: what is made and how; None for the defaults.
        base: base model; None takes the one that ``current`` names.
        tasks: tasks of the probe set; None for all.
        semantics: forward of CoIN, MCITlib or Prism folders, see `load_checkpoint`.
        max_new_tokens: longest generated answer.
        resume: keep a finished file that was made from the same content in the same way; False makes it anew.
        device: where to run; None takes a GPU if there is one.
        progress: called after every step.
        on_estimate: told what the cells that must be made will take, before the first of them.

    Returns:
        One summary per task.

    Raises:
        NotFoundError: no such checkpoint or probe set.
        ConfigError: the two folders are one, or a whole model.
        FormatError: a checkpoint is damaged or does not fit the base.
        ProbeError: the probes do not fit the model, or a sample has no answer.
        SiteError: a site whose update cannot be exchanged, see `load_pair`.
        LockedError, StorageError: ``out`` is being written, or the disk refuses.
    """
    worker, cells = _pair_job(
        anchor, current, probes, out, options, base, tasks, semantics, max_new_tokens, device, progress
    )
    with RunLock(Path(out), file=True):
        return _make(worker, cells, (lambda cell: _kept(cell, worker)) if resume else _none, on_estimate)


def estimate_pair(
    anchor: Path | str,
    current: Path | str,
    probes: Path | str | ProbeSet,
    out: Path | str,
    options: AttributionOptions | None = None,
    *,
    base: str | None = None,
    tasks: Sequence[str] | None = None,
    semantics: str | None = None,
    max_new_tokens: int = 32,
    device: torch.device | str | None = None,
) -> list[AttributionEstimate]:
    """Say what `attribute_pair` would take with these arguments; a few samples are run, nothing is written."""
    worker, cells = _pair_job(anchor, current, probes, out, options, base, tasks, semantics, max_new_tokens, device)
    return _estimates(worker, cells, {cell.path for cell in cells if _kept(cell, worker)})


def _kept(cell: Cell, worker: Worker) -> CellSummary | None:
    try:
        return finished_cell(cell, cell.path, worker.settings, None)
    except (NotFoundError, FormatError):
        return None


def _pair_job(
    anchor: Path | str,
    current: Path | str,
    probes: Path | str | ProbeSet,
    out: Path | str,
    options: AttributionOptions | None,
    base: str | None,
    tasks: Sequence[str] | None,
    semantics: str | None,
    max_new_tokens: int,
    device: torch.device | str | None,
    progress: Report | None = None,
) -> tuple[Worker, list[Cell]]:
    earlier, later, target = Path(anchor), Path(current), Path(out)
    if earlier.resolve() == later.resolve():
        raise ConfigError(f"Anchor and current are one folder, {earlier}: nothing lies between them. Give two.")
    options, evaluation = (
        options or AttributionOptions(),
        EvaluationOptions(batch_size=16, max_new_tokens=max_new_tokens),
    )
    given = probes if isinstance(probes, ProbeSet) else load_probes(probes)
    chosen = given if tasks is None else given.select(tasks)
    settings = options.settings(evaluation=evaluation.model_dump(mode="json"), semantics=semantics)
    worker = Worker(
        base, options, evaluation, settings=settings, device=_device(device), progress=progress, semantics=semantics
    )
    several = len(chosen.tasks) > 1
    cells = [
        Cell(
            task=task,
            anchor=earlier,
            current=later,
            indices=(0, 1),
            path=target.with_name(f"{target.stem}-{task}{target.suffix}") if several else target,
            samples=_probe_samples(chosen.select([task]), task),
            samples_sha256=_samples_sha256(given.sha256, task),
        )
        for task in chosen.tasks
    ]
    return worker, cells


def _probe_samples(probes: ProbeSet, task: str) -> Callable[[LoadedPair], Samples]:
    rows = probes.task(task)

    def samples(loaded: LoadedPair) -> Samples:
        encoded = probes.check_fits(base_module(loaded.model), loaded.backbone.encoder)[task]
        if any(row.prompt is None or row.answer is None for row in rows):
            return encoded
        return [Sample(row.id, task, row.prompt or "", row.answer or "", row.image) for row in rows]

    return samples
