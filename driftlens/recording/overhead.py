"""What recording costs: recorded forwards against bare ones, alternating on the same batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from driftlens.recording.batches import Batch
from driftlens.recording.hooks import Hooks
from driftlens.recording.observer import Observer

__all__ = ["overhead_percent", "paired_ratios"]


def paired_ratios(
    root: nn.Module,
    observer: Observer,
    batches: Sequence[Batch],
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return time of a recorded forward (hooks, sums, copy to the host) over that of the bare one, pair by pair.

    Bare and recorded forwards alternate, and so does which of them comes first: a machine that becomes slower or
    faster meanwhile affects both alike. One extra round at the start only warms up.

    Args:
        root: the model, already in evaluation and inference mode.
        observer: observer of its sites.
        batches: what to run.
        repeats: rounds over ``batches``.
        clock: seconds; ``time.process_time`` is disturbed less by other work on the machine (CPU only).
    """

    def bare(batch: Batch) -> None:
        root(**batch.inputs)
        if batch.tokens.is_cuda:
            torch.cuda.synchronize(batch.tokens.device)

    def recorded(batch: Batch) -> None:
        observer.expect(batch.tokens, batch.stored)
        with Hooks(root, observer.points, observer.on_fire, observer.on_pass):
            root(**batch.inputs)
        observer.take()

    def seconds(call: Callable[[Batch], None], batch: Batch) -> float:
        start = clock()
        call(batch)
        return clock() - start

    ratios = []
    for number in range(repeats + 1):
        for index, batch in enumerate(batches):
            if (number + index) % 2:
                seconds_recorded = seconds(recorded, batch)
                seconds_bare = seconds(bare, batch)
            else:
                seconds_bare = seconds(bare, batch)
                seconds_recorded = seconds(recorded, batch)
            if number:
                ratios.append(seconds_recorded / seconds_bare)
    return ratios


def overhead_percent(ratios: Sequence[float]) -> float:
    """Return the median of ``ratios`` as percent above 1."""
    return 100.0 * (float(np.median(ratios)) - 1.0)
