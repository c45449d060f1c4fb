"""Performance over a stream of tasks (metrics.md section 5). Every name states its definition."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from driftlens.errors import ConfigError
from driftlens.metrics.arrays import FloatArray, as_float, divide
from driftlens.metrics.shapes import PerTask, ScoreMatrix

__all__ = ["FOREIGN_SCORES", "FormatShare", "foreign_scores", "format_share", "stream_scores"]

FOREIGN_SCORES: dict[str, str] = {
    "avalanche StreamForgetting": "mean_{j<T} (a[j, j] - a[T, j]) = -BWT_T-1",
    "avalanche StreamBWT": "-StreamForgetting = BWT_T-1",
    "avalanche StreamForwardTransfer": "mean_{j>1} (a[j-1, j] - a[0, j]) = FWT; baseline: the same network before any "
    "training",
    "mammoth backward_transfer": "mean_{j<T} (a[T, j] - a[j, j]) = BWT_T-1",
    "mammoth forward_transfer": "mean_{j>1} (a[j-1, j] - random_j), random_j from a network that was never trained",
    "mammoth forgetting": "mean_{j<T} (max_l a[l, j] - a[T, j]) with the last row in the maximum and 0 for tasks not "
    "yet seen: never negative",
    "Chaudhry forgetting": "mean_{j<T} (max_{1<=l<T} a[l, j] - a[T, j])",
}
"""What other code prints under which name, in the symbols of `stream_scores`."""


class FormatShare(NamedTuple):
    """Result of `format_share`: ``per_task`` [T] and ``overall`` for the whole stream."""

    per_task: PerTask
    overall: float


def _score_matrix(matrix: ScoreMatrix) -> FloatArray:
    scores = as_float(matrix)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] + 1 or scores.shape[1] == 0:
        raise ConfigError(
            f"The score matrix has shape {scores.shape}; expected [T+1, T]: one row per checkpoint (row 0 before the "
            "first task) and one column per task."
        )
    return scores


def stream_scores(matrix: ScoreMatrix) -> dict[str, float]:
    """Summarise scores a[t, j], the score on task j after task t (row 0: before the first task).

    Args:
        matrix: [T+1, T]; the unit (share or points) is kept.

    Returns:
        ``AP``: mean_j a[T, j].
        ``MAA``: mean over t >= 1 of mean over j <= t of a[t, j].
        ``MFT``: mean_j a[j, j].
        ``BWT_T``: (1/T) sum over j <= T of a[T, j] - a[j, j]; the last task adds 0 (CoIN, PASs-MoE).
        ``BWT_T-1``: the same sum over j < T divided by T - 1 (GEM).
        ``forgetting_max``: mean over j < T of max over l < T of a[l, j], minus a[T, j]. The maximum includes checkpoint
        0 (a skill that the base model had counts) and not the last row, so it can be negative.
        ``FWT``: mean over j > 1 of a[j-1, j] - a[0, j].
        NaN where a needed score is NaN, and for the last three with a single task.

    Raises:
        ConfigError: not of shape [T+1, T].
    """
    scores = _score_matrix(matrix)
    tasks = scores.shape[1]
    final, index = scores[tasks], np.arange(tasks)
    learnt = scores[index + 1, index]
    change = final - learnt
    seen = np.tril(np.ones((tasks, tasks), dtype=bool))
    running = np.where(seen, scores[1:], 0.0).sum(axis=1) / seen.sum(axis=1)
    several = tasks > 1
    return {
        "AP": float(final.mean()),
        "MAA": float(running.mean()),
        "MFT": float(learnt.mean()),
        "BWT_T": float(change.mean()),
        "BWT_T-1": float(change[:-1].mean()) if several else float("nan"),
        "forgetting_max": float((scores[:tasks].max(axis=0) - final)[:-1].mean()) if several else float("nan"),
        "FWT": float((scores[index, index] - scores[0])[1:].mean()) if several else float("nan"),
    }


def foreign_scores(matrix: ScoreMatrix, random: PerTask | None = None) -> dict[str, float]:
    """Summarise a stream as other libraries do, whose definitions differ under like names (`FOREIGN_SCORES`).

    Args:
        matrix: [T+1, T] as for `stream_scores`.
        random: [T] scores of a network that was never trained, mammoth's baseline of forward transfer; the scores
            before the first task if left out.

    Returns:
        The scores of `FOREIGN_SCORES` by name; all NaN with a single task, and where a needed score is NaN.

    Raises:
        ConfigError: not of shape [T+1, T], or ``random`` not of shape [T].
    """
    scores = _score_matrix(matrix)
    tasks = scores.shape[1]
    baseline = scores[0] if random is None else as_float(random)
    if baseline.shape != (tasks,):
        raise ConfigError(f"random has shape {baseline.shape}; expected one score for each of the {tasks} tasks.")
    if tasks < 2:
        return dict.fromkeys(FOREIGN_SCORES, float("nan"))
    final, index = scores[tasks], np.arange(tasks)
    learnt, before = scores[index + 1, index], scores[index, index]
    backward = float((final - learnt)[:-1].mean())
    padded = np.where(np.tri(tasks, dtype=bool), scores[1:], 0.0)  # rows of mammoth hold the tasks seen so far
    values = (
        -backward,
        backward,
        float((before - scores[0])[1:].mean()),
        backward,
        float((before - baseline)[1:].mean()),
        float((padded.max(axis=0) - final)[:-1].mean()),
        float((scores[1:tasks].max(axis=0) - final)[:-1].mean()),
    )
    return dict(zip(FOREIGN_SCORES, values, strict=True))


def format_share(strict: ScoreMatrix, lenient: ScoreMatrix) -> FormatShare:
    """Part of the strict forgetting that disappears under the lenient scorer: answers right in substance.

    Args:
        strict: [T+1, T] scores by exact match.
        lenient: [T+1, T] scores that forgive case, punctuation and form.

    Returns:
        Per task and overall 1 - lenient forgetting / strict forgetting, with forgetting a[j, j] - a[T, j]; overall
        relates the sums over tasks. NaN where strict forgetting is not positive. Above 1 when the lenient score rose.
    """
    losses = []
    for matrix in (strict, lenient):
        scores = _score_matrix(matrix)
        index = np.arange(scores.shape[1])
        losses.append(scores[index + 1, index] - scores[-1])
    if losses[0].shape != losses[1].shape:
        raise ConfigError(f"The strict scores have {losses[0].size} tasks and the lenient ones {losses[1].size}.")
    lost = np.where(losses[0] > 0, losses[0], np.nan)
    total = losses[0].sum()
    overall = divide(total - losses[1].sum(), np.where(total > 0, total, np.nan))
    return FormatShare(divide(losses[0] - losses[1], lost), float(overall))
