"""A tiny stream made in memory from a seed: for tests, dry runs and examples."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from driftlens.errors import ConfigError
from driftlens.streams.types import Modality, Sample, Stream, Task, constant_answer_accuracy

__all__ = ["toy_stream"]

_SIDE = 32
_COLOURS = {"red": (208, 48, 48), "green": (40, 160, 72), "blue": (48, 80, 208), "yellow": (228, 196, 40)}

Draft = tuple[str, str, bytes | None]


def toy_stream(
    seed: int = 0, tasks: Sequence[str] | int | None = None, train: int = 24, probe: int = 8, test: int = 8
) -> Stream:
    """Return a stream of three tasks: ``colour`` (image), ``parity`` (text) and ``shape`` (image and text).

    Args:
        seed: seed of every draw; the same seed gives the same bytes.
        tasks: names in the wanted order, or how many leading tasks; None for all three.
        train: training samples per task.
        probe: probe samples per task.
        test: test samples per task.

    Returns:
        A stream whose three splits share no image and no text.

    Raises:
        ConfigError: a split is empty, or more than 900 samples of one task are asked for.
        UnknownNameError: a task name is unknown.
    """
    sizes = {"train": train, "probe": probe, "test": test}
    total = sum(sizes.values())
    if min(sizes.values()) < 1 or total > 900:
        raise ConfigError(
            f"The toy stream got train={train}, probe={probe}, test={test}: "
            "each must be at least 1 and their sum at most 900."
        )
    made = tuple(
        _task(name, title, modality, answers, sizes, _distinct(draw, np.random.default_rng((seed, index)), total))
        for index, (name, title, modality, answers, draw) in enumerate(_TASKS)
    )
    return Stream("toy", made).subset(tasks)


def _task(name: str, title: str, modality: Modality, answers: str, sizes: dict[str, int], drafts: list[Draft]) -> Task:
    splits: dict[str, tuple[Sample, ...]] = {}
    start = 0
    for split, size in sizes.items():
        splits[split] = tuple(
            Sample(f"{name}-{split}-{i:04d}", name, prompt, answer, image)
            for i, (prompt, answer, image) in enumerate(drafts[start : start + size])
        )
        start += size
    chance = constant_answer_accuracy(splits["test"])
    source = "generated in memory"
    return Task(
        name, title, modality, answers, chance, "Apache-2.0", source, splits["train"], splits["probe"], splits["test"]
    )


def _distinct(draw: Callable[[np.random.Generator], Draft], rng: np.random.Generator, count: int) -> list[Draft]:
    # Repeats would leak between splits; each task can draw far more than 900 different contents.
    seen: dict[str | bytes, Draft] = {}
    while len(seen) < count:
        draft = draw(rng)
        seen.setdefault(draft[0] if draft[2] is None else draft[2], draft)
    return list(seen.values())


def _png(rng: np.random.Generator, fill: tuple[int, int, int], shape: str) -> bytes:
    image = Image.new("RGB", (_SIDE, _SIDE), (245, 245, 245))
    size = int(rng.integers(8, 20))
    x, y = (int(v) for v in rng.integers(0, _SIDE - size, 2))
    box = (x, y, x + size, y + size)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle(box, fill=fill)
    else:
        pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=fill)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _draw_colour(rng: np.random.Generator) -> Draft:
    name = str(rng.choice(list(_COLOURS)))
    return "Which colour?", name, _png(rng, _COLOURS[name], "square")


def _draw_parity(rng: np.random.Generator) -> Draft:
    number = int(rng.integers(10, 10_000))
    return f"Is {number} odd or even?", ("even", "odd")[number % 2], None


def _draw_shape(rng: np.random.Generator) -> Draft:
    shape = str(rng.choice(["circle", "square", "triangle"]))
    asked = str(rng.choice(["circle", "square", "triangle"]))
    colour = _COLOURS[str(rng.choice(list(_COLOURS)))]
    return f"Is this a {asked}?", "yes" if asked == shape else "no", _png(rng, colour, shape)


_TASKS: tuple[tuple[str, str, Modality, str, Callable[[np.random.Generator], Draft]], ...] = (
    ("colour", "Colour", "image", "one of four colours", _draw_colour),
    ("parity", "Odd or even", "text", "odd or even", _draw_parity),
    ("shape", "Shape", "image+text", "yes or no", _draw_shape),
)
