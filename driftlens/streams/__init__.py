"""Streams of tasks: the data a continual learner sees, in order, and how its answers are scored."""

from __future__ import annotations

from driftlens.streams.builtin import builtin_stream
from driftlens.streams.registry import STREAMS, load_stream
from driftlens.streams.scoring import lenient_match, strict_match
from driftlens.streams.toy import toy_stream
from driftlens.streams.types import SPLITS, Sample, Stream, Task, constant_answer_accuracy

__all__ = [
    "SPLITS",
    "STREAMS",
    "Sample",
    "Stream",
    "Task",
    "constant_answer_accuracy",
    "lenient_match",
    "load_stream",
    "strict_match",
]

STREAMS.register("builtin", builtin_stream)
STREAMS.register("toy", toy_stream)
