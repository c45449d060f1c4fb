"""A run on disk as labelled tables: scores, drift, co-drift, subspaces, importance."""

from __future__ import annotations

import contextlib
import html
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from driftlens.analysis.listing import RUN_FILES, file_stamp, method_name, read_config, training_seed
from driftlens.analysis.threads import in_order
from driftlens.errors import FormatError, NotFoundError, UnknownNameError
from driftlens.store import Manifest, Recording, open_recording
from driftlens.store.manifest import sha256_file

# Opening reads a manifest; xarray, pandas and scipy, which take a second to import, wait until a table is asked for.
if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["Checkpoint", "Run", "open_run"]

_ADVICE: Final = (
    "Restore it, or record it again with `driftlens record --run`; to analyse without it: run.without({name!r})."
)


@dataclass(frozen=True)
class Checkpoint:
    """A state of the model after a task.

    Attributes:
        index: 0 before the first task, t just after task t.
        name: folder name, for example ``03-digit``.
        task: the task learned last; None for checkpoint 0.
    """

    index: int
    name: str
    task: str | None


class Run:
    """One method over one stream, read from its folder. Opening reads the manifest and the configuration only.

    Attributes:
        path: the folder.
        manifest: its manifest.
        config: the resolved configuration.
        checkpoints: all checkpoints that the manifest knows, in order.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        anchors: int | Mapping[str, int] | None = None,
        excluded: frozenset[str] = frozenset(),
    ) -> None:
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        self.config = read_config(self.path / "config.yaml")
        self._anchors, self._excluded = anchors, excluded
        self._tables: dict[str, xr.Dataset] = {}
        self._hashed: dict[str, tuple[int, int]] = {}
        names: set[str] = set()
        self._recordings: dict[str, str] = {}
        self._noise: dict[str, str] = {}
        for file in self.manifest.files:
            match = RUN_FILES.fullmatch(file)
            if match is None:
                continue
            name = match["folder"] or match["file"]
            names.add(name)
            recording = name + (match["noise"] or "")
            if match["file"] and recording not in excluded:
                (self._noise if match["noise"] else self._recordings)[name] = file
        self.checkpoints = tuple(
            Checkpoint(int(name.split("-")[0]), name, name.split("-", 1)[1] if int(name.split("-")[0]) else None)
            for name in sorted(names, key=lambda text: (int(text.split("-")[0]), text))
        )
        self._check_anchors()

    # --- what the run is -------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name given in the configuration, else the folder's name."""
        return str(self.config.get("name") or self.path.resolve().name)

    @property
    def method(self) -> str:
        """Name of the method; ``"unknown"`` where the run has no configuration."""
        return method_name(self.config)

    @property
    def seed(self) -> int | None:
        """Training seed."""
        return training_seed(self.config, self.manifest)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in stream order; those learned so far where the configuration does not list them."""
        stream = self.config.get("stream")
        listed = stream.get("tasks") if isinstance(stream, dict) else None
        learned = tuple(point.task for point in self.checkpoints if point.task is not None)
        if isinstance(listed, list) and len(listed) >= len(learned):
            return tuple(str(task) for task in listed)
        return learned

    @property
    def stream_tasks(self) -> tuple[str, ...]:
        """All tasks of the stream in order, those still to come included if the configuration or the scores tell."""
        if self.complete or not self.manifest.lists("scores.parquet"):
            return self.tasks
        scored = tuple(self.scores["task"].to_numpy().tolist())
        return scored if len(scored) > len(self.tasks) else self.tasks

    @property
    def complete(self) -> bool:
        """Whether the run has finished."""
        return self.manifest.complete

    @property
    def size_bytes(self) -> int:
        """Bytes of all files of the manifest."""
        return sum(entry.size for entry in self.manifest.files.values())

    @property
    def recorded(self) -> tuple[int, ...]:
        """Indices of the checkpoints that have a recording."""
        return tuple(point.index for point in self.checkpoints if point.name in self._recordings)

    def __repr__(self) -> str:
        facts = ", ".join(value if key == "method" else f"{value} {key}" for key, value in self._facts())
        return f"Run({str(self.path)!r}: {facts})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in self._facts()
        )
        return f"<table><caption>Run {html.escape(self.name)}</caption>{rows}</table>"

    def _facts(self) -> list[tuple[str, str]]:
        tasks = f"{len(self.tasks)} ({', '.join(self.tasks)})"
        size = self.size_bytes / 1e6
        facts = [("method", self.method), ("tasks", tasks), ("checkpoints", str(len(self.checkpoints)))]
        facts += [("recordings", str(len(self._recordings))), ("MB", f"{size:.1f}")]
        return facts if self.complete else [*facts, ("finished", "not")]

    # --- choosing --------------------------------------------------------------------------------------------------

    def anchored(self, anchors: int | Mapping[str, int]) -> Run:
        """Return the run with other anchors.

        Args:
            anchors: one checkpoint index for all probes, or one per probe; probes that are left out keep their own
                task's checkpoint.

        Raises:
            UnknownNameError: no such checkpoint.
        """
        return Run(self.path, anchors=anchors, excluded=self._excluded)

    def without(self, *checkpoints: int | str) -> Run:
        """Return the run without the recordings of some checkpoints, for example a damaged one.

        Args:
            checkpoints: indices or names; ``"03-digit.noise"`` leaves out a second recording.
        """
        names = {self._name(point) for point in checkpoints}
        return Run(self.path, anchors=self._anchors, excluded=self._excluded | names)

    def _name(self, checkpoint: int | str) -> str:
        by_index = {point.index: point.name for point in self.checkpoints}
        if isinstance(checkpoint, str):
            known = [*by_index.values(), *(f"{name}.noise" for name in by_index.values())]
            if checkpoint not in known:
                raise UnknownNameError("checkpoint", checkpoint, by_index.values())
            return checkpoint
        if checkpoint not in by_index:
            raise UnknownNameError("checkpoint", str(checkpoint), map(str, by_index))
        return by_index[checkpoint]

    def _check_anchors(self) -> None:
        if self._anchors is not None:
            for index in [self._anchors] if isinstance(self._anchors, int) else self._anchors.values():
                self._name(index)

    # --- files -----------------------------------------------------------------------------------------------------

    def trusted(self, file: str) -> Path:
        """Return the path of a listed file after comparing it with the manifest.

        Raises:
            NotFoundError: not listed, or missing.
            FormatError: its size or SHA-256 is not the listed one.
        """
        path, entry = self.path / file, self.manifest.files.get(file)
        if entry is None or not path.is_file():
            state = "is not listed in the manifest" if entry is None else "is listed in the manifest but missing"
            advice = (
                "A run that was collected from recordings has none; restore the file if this run was trained here."
                if self.complete
                else "Finish the run with `driftlens train ... --resume`."
            )
            raise NotFoundError(f"{path} {state}. {advice}")
        stamp = file_stamp(path)
        if self._hashed.get(file) == stamp:
            return path
        name = Path(file).stem
        if stamp[0] != entry.size:
            raise FormatError(
                f"{path} has {stamp[0]:,} bytes, the manifest lists {entry.size:,}. {_ADVICE.format(name=name)}"
            )
        digest = sha256_file(path)
        if digest != entry.sha256:
            raise FormatError(
                f"{path} has the SHA-256 {digest[:16]}..., the manifest lists {entry.sha256[:16]}...: it was changed "
                f"or damaged after it was finished. {_ADVICE.format(name=name)}"
            )
        self._hashed[file] = stamp
        return path

    def recording(self, checkpoint: int | str) -> Recording:
        """Open the recording of a checkpoint.

        Args:
            checkpoint: index or name.

        Raises:
            UnknownNameError: no such checkpoint.
            NotFoundError: it was not recorded.
            FormatError: the file is damaged or is not the one that the manifest lists.
        """
        name = self._name(checkpoint)
        if name not in self._recordings:
            raise NotFoundError(
                f"{self.path} has no recording of {name}. Make it with `driftlens record --run {self.path}`."
            )
        return open_recording(self.trusted(self._recordings[name]))

    def open_tokens(
        self, *checkpoints: int | str, group: int = 0, chunks: Mapping[str, int] | None = None
    ) -> xr.Dataset:
        """Return gates, pathways and norms of the stored tokens as lazily read arrays; see `lazy.open_tokens`.

        Args:
            checkpoints: indices or names; all recorded ones by default.
            group: which sites: those of one E and r, as in ``Recording.groups``.
            chunks: numbers of ``site`` and ``token`` per chunk.

        Returns:
            A dataset over dask arrays; use it in a ``with`` block, or close it.

        Raises:
            ConfigError: dask is not installed.
            NotFoundError: no recordings.
            FormatError: a damaged recording, or checkpoints whose sites differ.
        """
        from driftlens.analysis.lazy import open_tokens

        chosen = {self._name(point) for point in checkpoints} or set(self._recordings)
        points = [point for point in self.checkpoints if point.name in chosen]
        if not self._recordings:
            raise NotFoundError(f"{self.path} has no recordings. Make them with `driftlens record --run {self.path}`.")
        with contextlib.ExitStack() as stack:
            opened = {point.index: stack.enter_context(self.recording(point.name)) for point in points}
            dataset = open_tokens(opened, [point.name for point in points], group=group, chunks=chunks)
            stack.pop_all()
            return dataset

    # --- scores ----------------------------------------------------------------------------------------------------

    @cached_property
    def score_table(self) -> pd.DataFrame:
        """scores.parquet: one row per (checkpoint, task, sample) with prediction, reference, strict, lenient, nll."""
        from driftlens.analysis.scores import read_scores

        return read_scores(self.trusted("scores.parquet"))

    @cached_property
    def scores(self) -> xr.Dataset:
        """``strict``, ``lenient``, ``nll`` and ``n`` by checkpoint and task; see `score_arrays`."""
        from driftlens.analysis.scores import score_arrays

        return score_arrays(self.score_table)

    @cached_property
    def stream(self) -> xr.Dataset:
        """AP, MAA, MFT, BWT_T, BWT_T-1, forgetting_max, FWT by scorer, and format_share; see `stream_summary`."""
        from driftlens.analysis.scores import stream_summary

        return stream_summary(self.scores)

    @cached_property
    def train_log(self) -> pd.DataFrame:
        """train_log.parquet: one row per logged training step."""
        from driftlens.analysis.scores import read_train_log

        return read_train_log(self.trusted("train_log.parquet"))

    # --- attribution -----------------------------------------------------------------------------------------------

    @cached_property
    def attribution(self) -> xr.Dataset:
        """Forgetting booked to sites, routers and experts, and exact swaps (metrics.md section 4); see `tabulate`.

        What was attributed before a checkpoint was trained again counts as not attributed.

        Raises:
            NotFoundError: `driftlens attribute` has not been run.
            FormatError: a file of it is damaged or is not the one that the manifest lists.
        """
        from driftlens.analysis.attribution import tabulate
        from driftlens.analysis.attribution_files import ATTRIBUTION_FILES, read_cell

        files = [file for file in self.manifest.files if ATTRIBUTION_FILES.fullmatch(file)]
        known = {point.index: point.name for point in self.checkpoints}
        if not files:
            raise NotFoundError(
                f"The forgetting of {self.path} has not been attributed. Do it with `driftlens attribute {self.path}`; "
                "it needs the weights of the checkpoints."
            )
        weights = {
            name: entry.sha256
            for name in known.values()
            if (entry := self.manifest.files.get(f"checkpoints/{name}/adapter_model.safetensors")) is not None
        }
        cells = [read_cell(self.trusted(file)) for file in sorted(files)]
        return tabulate([cell for cell in cells if cell.belongs(known, weights)], self.tasks, known)

    # --- analysis --------------------------------------------------------------------------------------------------

    @property
    def drift(self) -> xr.Dataset:
        """Routing drift and context by probe, checkpoint and site (metrics.md section 1)."""
        return self._table("drift")

    @property
    def codrift(self) -> xr.Dataset:
        """Co-drift and responsibility by probe, checkpoint and site (metrics.md section 3)."""
        return self._table("codrift")

    @property
    def summary(self) -> xr.Dataset:
        """The measures of `drift` and `codrift` averaged over sites, by probe and checkpoint."""
        return self._table("summary")

    @property
    def trend(self) -> xr.Dataset:
        """The measures of `summary` averaged over the probes that are old at each checkpoint."""
        return self._table("trend")

    @property
    def subspaces(self) -> xr.Dataset:
        """Overlap, angles and use of pathway activation subspaces by expert (metrics.md section 2)."""
        return self._table("subspaces")

    @property
    def importance(self) -> xr.Dataset:
        """Importance and update of single pathways (metrics.md section 2); meaningful within this run only."""
        return self._table("importance")

    def _table(self, name: str) -> xr.Dataset:
        from driftlens.analysis.cache import ANALYSIS_NAME, open_cache, read_table, write_cache

        if name in self._tables:
            return self._tables[name]
        if not self._recordings:
            raise NotFoundError(
                f"{self.path} has no recordings, so there is no drift to show. "
                f"Make them with `driftlens record --run {self.path}`."
            )
        cache, key = self.path / ANALYSIS_NAME, self.analysis_key
        if self.is_plain and (stamps := open_cache(cache, key)) is not None:
            known = {file: stamp for file, stamp in stamps.items() if file in self.manifest.files}
            self._hashed = known | self._hashed
            self._check_recordings()
            table = read_table(cache, name)
            if table is not None:
                self._tables[name] = table
                return table
        self._tables |= self._analyse()
        if self.is_plain:
            write_cache(cache, key, {file: self._hashed[file] for file in self.used_files}, self._tables)
        return self._tables[name]

    @property
    def is_plain(self) -> bool:
        """Whether anchors are the default ones and no checkpoint is left out; only then is the analysis cached."""
        return self._anchors is None and not self._excluded

    def tables(self) -> dict[str, xr.Dataset]:
        """Return all tables by name: drift, codrift, summary, trend, subspaces, importance."""
        from driftlens.analysis.datasets import TABLES

        return {name: self._table(name) for name in TABLES}

    @property
    def used_files(self) -> list[str]:
        """Recordings that the analysis is made from, as paths in the manifest."""
        return [*self._recordings.values(), *self._noise.values()]

    @property
    def analysis_key(self) -> str:
        """SHA-256 of what the analysis depends on: the listed recordings and the anchors."""
        from driftlens.analysis.cache import cache_key

        return cache_key(
            recordings={file: self.manifest.files[file].sha256 for file in self.used_files},
            tasks=list(self.stream_tasks),
        )

    def _check_recordings(self) -> None:
        for _ in in_order(self.trusted, self.used_files):
            pass

    def _analyse(self) -> dict[str, xr.Dataset]:
        from driftlens.analysis.analyse import analyse

        with self.open_recordings() as (recordings, noise):
            points = [point for point in self.checkpoints if point.name in self._recordings]
            return analyse(
                recordings,
                indices=[point.index for point in points],
                names=[point.name for point in points],
                tasks=self.stream_tasks,
                anchors=self._anchors,
                noise=noise,
            )

    @contextlib.contextmanager
    def open_recordings(self) -> Iterator[tuple[list[Recording], tuple[str, Recording] | None]]:
        """Open every recording, and the second recording of a checkpoint with that checkpoint's name if there is one.

        Raises:
            FormatError: a damaged recording; the message names it.
        """
        self._check_recordings()
        with contextlib.ExitStack() as stack:
            recordings = [
                stack.enter_context(open_recording(self.trusted(self._recordings[point.name])))
                for point in self.checkpoints
                if point.name in self._recordings
            ]
            noise = None
            for name in sorted(set(self._noise) & set(self._recordings), reverse=True)[:1]:
                noise = (name, stack.enter_context(open_recording(self.trusted(self._noise[name]))))
            yield recordings, noise


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run folder; reads its manifest and configuration only.

    Raises:
        NotFoundError: no run there.
        FormatError: a damaged manifest or configuration.
    """
    return Run(path)
