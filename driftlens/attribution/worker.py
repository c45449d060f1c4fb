"""Attributing one cell: an old task at a later checkpoint, everything that one file holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from driftlens.analysis.attribution_files import SCORES, read_cell
from driftlens.attribution.depth import RESTORED, depth_players, depth_shapley, most_evaluations, single_restores
from driftlens.attribution.estimate import AttributionEstimate, estimate_cell, measure_speed
from driftlens.attribution.intervene import Switchboard
from driftlens.attribution.ledger import AnswerBatches, book_ledger
from driftlens.attribution.options import AttributionOptions, covers
from driftlens.attribution.pairs import LoadedPair, load_pair
from driftlens.attribution.results import (
    depth_table,
    ledger_tables,
    restores_table,
    scores_table,
    swaps_table,
    write_cell,
)
from driftlens.attribution.swaps import ANCHOR, COMBINATIONS, SwapScores, swap_scores
from driftlens.backbones import Backbone, Encoded, load_backbone
from driftlens.errors import ConfigError
from driftlens.recording.checkpoints import ADAPTER_WEIGHTS, checkpoint_sha256
from driftlens.recording.recorder import Progress
from driftlens.store import sha256_file
from driftlens.streams import Sample
from driftlens.training.config import EvaluationOptions
from driftlens.training.run import versions

__all__ = ["Cell", "CellSummary", "Report", "Samples", "Worker", "finished_cell"]

Report = Callable[[Progress], None]
Samples = Sequence[Sample] | Sequence[Encoded]

_SCORING = 3.0
"""Cost of scoring all samples, answers generated, in forwards; only the ETA depends on it."""


@dataclass(frozen=True)
class CellSummary:
    """One finished cell.

    Attributes:
        path: its file.
        task: the old task.
        anchor: name of the anchor checkpoint.
        checkpoint: name of the current one.
        samples: number of samples.
        bytes: size of the file.
        seconds: time of each phase.
        skipped: whether it was there already.
    """

    path: Path
    task: str
    anchor: str
    checkpoint: str
    samples: int
    bytes: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    skipped: bool = False


@dataclass(frozen=True)
class Cell:
    """What is to be attributed."""

    task: str
    anchor: Path
    current: Path
    indices: tuple[int, int]
    path: Path
    samples: Callable[[LoadedPair], Samples]
    samples_sha256: str
    scores: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    @property
    def blank(self) -> AttributionEstimate:
        """An estimate without numbers."""
        return AttributionEstimate(self.path, self.task, self.anchor.name, self.current.name, 0)


class Worker:
    """Attributes cells one after another; the base model stays loaded."""

    def __init__(
        self,
        base: str | None,
        options: AttributionOptions,
        evaluation: EvaluationOptions,
        *,
        settings: Mapping[str, Any],
        device: torch.device,
        progress: Report | None,
        semantics: str | None = None,
        base_sha256: str | None = None,
    ) -> None:
        self.base, self.options, self.evaluation, self.settings = base, options, evaluation, dict(settings)
        self.device, self.semantics, self.base_sha256 = device, semantics, base_sha256
        self._progress = progress
        self._backbone: Backbone | None = None
        self._done = self._total = 0.0

    @contextmanager
    def load(self, cell: Cell) -> Iterator[LoadedPair]:
        """Put both adapters of a cell on the base model."""
        if self._backbone is None and self.base is not None:
            self._backbone = load_backbone(self.base, device=self.device)
        loaded = load_pair(
            cell.anchor, cell.current, backbone=self._backbone, device=self.device, semantics=self.semantics
        )
        try:
            self._backbone = loaded.backbone
            found = loaded.backbone.sha256
            if self.base_sha256 is not None and found != self.base_sha256:
                raise ConfigError(
                    f"The run was trained on a base model with hash {self.base_sha256[:12]}, and "
                    f"{loaded.backbone.name!r} has {found[:12]}. Give the one that it was trained on."
                )
            yield loaded
        finally:
            loaded.unload()

    def estimates(self, cells: Sequence[Cell]) -> list[AttributionEstimate]:
        """Say what every cell will take, from the speed on a few samples of the first."""
        if not cells:
            return []
        with self.load(cells[0]) as loaded:
            evaluation = self.evaluation if self.options.swaps else None
            speed = measure_speed(loaded, cells[0].samples(loaded), self.options, evaluation)
            return [estimate_cell(cell.blank, loaded, cell.samples(loaded), self.options, speed) for cell in cells]

    def run(self, cells: Sequence[Cell], finished: Callable[[CellSummary], None]) -> list[CellSummary]:
        """Attribute cells in order; ``finished`` is told of each before the next begins."""
        summaries = []
        for number, cell in enumerate(cells):
            self._done, self._total = float(number), float(len(cells))
            summaries.append(self._attribute(cell))
            finished(summaries[-1])
        self._done = self._total
        self._report("done", 0.0)
        return summaries

    def _attribute(self, cell: Cell) -> CellSummary:
        clock = _Clock()
        self._report(f"{cell.task}: loading", 0.0)
        with self.load(cell) as loaded:
            samples = cell.samples(loaded)
            batches = AnswerBatches(loaded, samples, batch_size=self.options.batch_size)
            clock.lap("load")
            tables = self._tables(cell, loaded, samples, batches, clock)
            about = self._about(cell, loaded)
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        write_cell(cell.path, tables, about)
        clock.lap("write")
        return CellSummary(
            path=cell.path,
            task=cell.task,
            anchor=cell.anchor.name,
            checkpoint=cell.current.name,
            samples=len(samples),
            bytes=cell.path.stat().st_size,
            seconds=clock.laps,
        )

    def _tables(
        self, cell: Cell, loaded: LoadedPair, samples: Samples, batches: AnswerBatches, clock: _Clock
    ) -> dict[str, xr.Dataset]:
        options, counter = self.options, self._counter(cell, loaded, batches)
        booked = book_ledger(
            loaded,
            batches,
            nodes=options.nodes,
            tolerance=options.tolerance,
            max_nodes=options.max_nodes,
            on_step=counter.steps("the ledger", 3.0 / len(batches.batches)),
        )
        tables = ledger_tables(booked, [pair.info for pair in loaded.pairs])
        clock.lap("ledger")
        anchor, current = cell.scores or (None, None)
        if options.swaps:
            swapped, alone = self._swaps(loaded, samples, batches, counter.steps("swaps", _SCORING))
            tables["swaps"] = swaps_table(batches.samples, swapped, alone)
            anchor, current = cell.scores or (alone, swapped["cc"])
            clock.lap("swaps")
        tables = {"scores": scores_table(batches.samples, anchor, current), **tables}
        if options.depth:
            depth = depth_shapley(
                loaded,
                batches,
                groups=options.depth,
                by_part=options.depth_parts,
                permutations=options.permutations,
                on_step=counter.steps("depth", 1.0),
            )
            tables["depth"] = depth_table(depth)
            clock.lap("depth")
        if options.restores:
            restored = single_restores(loaded, batches, on_step=counter.steps("single sites", 1.0))
            tables["restores"] = restores_table(restored)
            clock.lap("restores")
        return tables

    def _swaps(
        self, loaded: LoadedPair, samples: Samples, batches: AnswerBatches, on_step: Callable[[], None]
    ) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64] | None]:
        """Return scores by combination, and those of the anchor by itself; ready-made tokens have an NLL alone."""
        answered = [sample for sample in samples if isinstance(sample, Sample)]
        if len(answered) == len(samples):
            found = swap_scores(loaded, answered, self.evaluation, prefix=batches.prefix, on_step=on_step)
            alone = _matrix(found, ANCHOR) if ANCHOR in found.outcomes else None
            return {key: _matrix(found, key) for key in COMBINATIONS}, alone
        scores = {}
        with Switchboard(loaded) as board:
            for key in COMBINATIONS:
                board.swap(router=key[0] == "a", experts=key[1] == "a")
                scores[key] = _nll_only(batches.nll())
                on_step()
        if not loaded.runs_anchor:
            return scores, None
        with loaded.anchor_alone():
            # anew: the anchor may have saved other layers below the sites
            own = AnswerBatches(loaded, batches.encoded, batch_size=self.options.batch_size).nll()
        on_step()
        return scores, _nll_only(own)

    def _about(self, cell: Cell, loaded: LoadedPair) -> dict[str, Any]:
        return {
            "task": cell.task,
            "anchor": cell.anchor.name,
            "anchor_index": cell.indices[0],
            "anchor_sha256": loaded.reference.sha256,
            "current": cell.current.name,
            "current_index": cell.indices[1],
            "current_sha256": loaded.loaded.sha256,
            **{f"{end}_weights_sha256": _weights_sha256(getattr(cell, end)) for end in ("anchor", "current")},
            "base": loaded.backbone.name,
            "base_sha256": loaded.backbone.sha256,
            "samples_sha256": cell.samples_sha256,
            "settings": self.settings,
            "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
            "device": loaded.device.type,
            "versions": versions(),
        }

    def _counter(self, cell: Cell, loaded: LoadedPair, batches: AnswerBatches) -> _Counter:
        options, sites = self.options, len(loaded.pairs)
        total = 3.0 * options.nodes + _SCORING * options.swaps * (len(COMBINATIONS) + loaded.runs_anchor)
        if options.depth:
            players = depth_players(loaded.pairs, options.depth, by_part=options.depth_parts)
            total += most_evaluations(len(players), options.permutations)
        total += options.restores * (1 + sites * len(RESTORED))
        return _Counter(lambda what, share: self._report(f"{cell.task}: {what}", share), total)

    def _report(self, message: str, share: float) -> None:
        if self._progress is not None:
            self._progress(Progress(message, self._done + share, self._total))


class _Clock:
    """Seconds of one phase after another."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


class _Counter:
    """Turns steps of unequal cost into a share of one cell."""

    def __init__(self, report: Callable[[str, float], None], total: float) -> None:
        self._report, self._total, self._spent = report, total, 0.0

    def steps(self, what: str, cost: float) -> Callable[[], None]:
        """Return what is to be called after each step."""

        def step() -> None:
            self._spent = min(self._spent + cost, self._total)
            self._report(what, self._spent / self._total)

        return step


def _weights_sha256(folder: Path) -> str:
    """Return the hash that a run's manifest lists for the weights, so that readers can tell which these were."""
    path = folder / ADAPTER_WEIGHTS
    return sha256_file(path) if path.is_file() else ""


def _matrix(found: SwapScores, key: str) -> NDArray[np.float64]:
    return np.stack([found.values(key, measure) for measure in SCORES])


def _nll_only(nll: NDArray[np.float64]) -> NDArray[np.float64]:
    values = np.full((len(SCORES), len(nll)), np.nan)
    values[SCORES.index("nll")] = nll
    return values


def finished_cell(cell: Cell, path: Path, settings: Mapping[str, Any], base_sha256: str | None) -> CellSummary | None:
    """Return the summary of a finished file that was made from the same content in the same way; None for any other.

    Args:
        cell: what is wanted.
        path: the file, which the caller trusts.
        settings: as it would be made now.
        base_sha256: hash of the base model, if known before it is loaded.

    Raises:
        NotFoundError, FormatError: there is no file, or it is damaged.
    """
    found = read_cell(path)
    now = {
        "task": cell.task,
        "anchor_sha256": checkpoint_sha256(cell.anchor),
        "current_sha256": checkpoint_sha256(cell.current),
        "samples_sha256": cell.samples_sha256,
        "base_sha256": base_sha256 or found.about.get("base_sha256"),
    }
    if any(found.about.get(key) != value for key, value in now.items()):
        return None
    if not covers(found.about.get("settings") or {}, settings):
        return None
    return CellSummary(
        path=path,
        task=cell.task,
        anchor=cell.anchor.name,
        checkpoint=cell.current.name,
        samples=found.tables["ledger"].sizes["sample"],
        bytes=path.stat().st_size,
        skipped=True,
    )
