"""What a stream is made of: samples, tasks and their order. Plain data, no model, no file."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from driftlens.errors import ConfigError, UnknownNameError

__all__ = ["SPLITS", "Modality", "Sample", "Stream", "Task", "constant_answer_accuracy"]

Modality = Literal["image", "text", "image+text"]

SPLITS = ("train", "probe", "test")
"""The three disjoint parts of a task: learned from, recorded on, scored on."""


@dataclass(frozen=True)
class Sample:
    """One question with its answer.

    Attributes:
        id: unique within the stream.
        task: name of the task that the sample belongs to.
        prompt: the question as text, without any template.
        answer: the reference answer, a short word or phrase.
        image: an encoded PNG file, or None for text-only samples.
        aliases: other answers that the lenient scorer accepts.
    """

    id: str
    task: str
    prompt: str
    answer: str
    image: bytes | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A named task with its three disjoint splits.

    Attributes:
        name: kebab-case name, unique within the stream.
        title: name for people, used on figures.
        modality: ``"image"`` (the prompt is the same for all samples), ``"text"`` or ``"image+text"``.
        answer_format: what an answer looks like, in words.
        chance: accuracy of the best constant answer on the test split, in [0, 1].
        licence: licence of the data (SPDX identifier where one exists).
        source: where the data come from.
        train: samples to learn from.
        probe: fixed samples that recordings are made on.
        test: samples that scores are computed on.
    """

    name: str
    title: str
    modality: Modality
    answer_format: str
    chance: float
    licence: str
    source: str
    train: tuple[Sample, ...]
    probe: tuple[Sample, ...]
    test: tuple[Sample, ...]

    def split(self, name: str) -> tuple[Sample, ...]:
        """Return the samples of ``"train"``, ``"probe"`` or ``"test"``.

        Raises:
            UnknownNameError: no such split.
        """
        if name not in SPLITS:
            raise UnknownNameError("split", name, SPLITS)
        samples: tuple[Sample, ...] = getattr(self, name)
        return samples

    def head(self, samples: int | Mapping[str, int]) -> Task:
        """Return the task with at most ``samples`` samples in each split.

        Args:
            samples: one cap for every split, or a cap by split name; splits that are not named stay whole.

        Raises:
            ConfigError: a cap is below 1.
            UnknownNameError: a split name is unknown.
        """
        caps = dict.fromkeys(SPLITS, samples) if isinstance(samples, int) else dict(samples)
        kept: dict[str, tuple[Sample, ...]] = {}
        for split, cap in caps.items():
            if cap < 1:
                raise ConfigError(f"Cannot keep {cap} samples of split {split!r}: the number must be at least 1.")
            kept[split] = self.split(split)[:cap]
        return replace(self, **kept)  # type: ignore[arg-type]  # the keys are SPLITS, checked by self.split


@dataclass(frozen=True)
class Stream:
    """An ordered sequence of tasks.

    Attributes:
        name: name of the stream, used in manifests.
        tasks: the tasks in the order in which they are learned.
    """

    name: str
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        doubles = [name for name, count in Counter(self.names).items() if count > 1]
        if doubles:
            raise ConfigError(
                f"Stream {self.name!r} names the task {doubles[0]!r} more than once; each task may occur once."
            )

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    @property
    def names(self) -> tuple[str, ...]:
        """Task names in stream order."""
        return tuple(task.name for task in self.tasks)

    @cached_property
    def sha256(self) -> str:
        """Hash of everything a run can depend on: task order, splits, and every sample's content in order."""
        digest = hashlib.sha256()
        for task in self.tasks:
            for split in SPLITS:
                for sample in task.split(split):
                    _feed(digest, (task.name, split, sample.id, sample.prompt, sample.answer, *sample.aliases))
                    # The length prefix of `_feed` keeps "no image" apart from an empty one.
                    _feed(digest, ("image",) if sample.image is None else ("image", sample.image))
        return digest.hexdigest()

    def task(self, name: str) -> Task:
        """Return the task called ``name``.

        Raises:
            UnknownNameError: the stream has no such task; the message names the nearest one.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise UnknownNameError("task", name, self.names)

    def subset(
        self, tasks: Sequence[str] | int | None = None, samples: int | Mapping[str, int] | None = None
    ) -> Stream:
        """Return a smaller or re-ordered stream.

        Args:
            tasks: names in the wanted order, or the number of leading tasks to keep; None keeps all.
            samples: see :meth:`Task.head`; None keeps all samples.

        Raises:
            UnknownNameError: a task name is unknown.
            ConfigError: the selection is empty or larger than the stream.
        """
        if tasks is None:
            chosen = self.tasks
        elif isinstance(tasks, int):
            if not 1 <= tasks <= len(self.tasks):
                raise ConfigError(
                    f"Cannot take the first {tasks} tasks of stream {self.name!r}: it has {len(self.tasks)}."
                )
            chosen = self.tasks[:tasks]
        else:
            chosen = tuple(self.task(name) for name in tasks)
        if not chosen:
            raise ConfigError(f"The selection of tasks is empty; stream {self.name!r} has {', '.join(self.names)}.")
        if samples is not None:
            chosen = tuple(task.head(samples) for task in chosen)
        return Stream(self.name, chosen)


def constant_answer_accuracy(samples: Iterable[Sample]) -> float:
    """Return the accuracy of always giving the most frequent answer, in [0, 1] (0 for no samples)."""
    counts = Counter(sample.answer for sample in samples)
    return max(counts.values()) / counts.total() if counts else 0.0


def _feed(digest: hashlib._Hash, fields: Iterable[str | bytes]) -> None:
    # Length-prefixed, so that ("ab", "c") and ("a", "bc") hash differently.
    for field in fields:
        raw = field.encode() if isinstance(field, str) else field
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    digest.update(b"\xff" * 8)
