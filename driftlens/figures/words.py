"""Plain words for the numbers on figures, beside their exact definitions."""

from __future__ import annotations

from driftlens.errors import UnknownNameError
from driftlens.metrics import MEASURES, Definition

__all__ = ["CAPTIONS", "definition_of"]

CAPTIONS = {
    "AP": "Mean accuracy over all tasks at the end of the stream. Higher is better.",
    "BWT_T": "Mean change of a task's accuracy since it was learned. Below 0: forgotten.",
    "BWT_T-1": "The same without the last task, which cannot be forgotten yet.",
    "router_js": "How differently tokens of old tasks are routed now. 0 as when learned, 1 entirely elsewhere.",
    "codrift_divergence": "How far the adapters' output on old tasks moved. 0 unchanged, 0.5 as if unrelated.",
    "gate_entropy": "How undecided the gates are. 0: one expert per token, 1: never routed.",
}
"""One plain sentence per headline number."""

_SCORES = {
    "accuracy": Definition(
        name="accuracy",
        title="Accuracy",
        formula="a[t, j]: share of task j's test samples answered right after task t (strict or lenient scorer)",
        range="0..1",
        caveat="The lenient scorer forgives case, punctuation, articles and number words; the strict one nothing.",
        undefined="the task was not scored at that checkpoint",
        section="5",
    ),
    "nll": Definition(
        name="nll",
        title="Answer surprise",
        formula="mean over samples of the mean negative log-likelihood of the reference answer's tokens, nats",
        range="0..",
        caveat="Less noisy than accuracy: it also moves while the answer is still right.",
        undefined="the task was not scored at that checkpoint",
        section="5",
    ),
    "load": Definition(
        name="load",
        title="Expert load",
        formula="mean_i pi_{i,e}: mean gate of expert e over the task's tokens",
        range="0..1, sums to 1 over experts",
        chance="1/E",
        invariance="gauge",
        caveat="Equal loads can hide tokens that swapped experts; router_js follows each token.",
    ),
}


def definition_of(metric: str) -> Definition:
    """Return the definition of ``metric``: a measure of metrics.md, or ``"accuracy"``, ``"nll"``, ``"load"``.

    Raises:
        UnknownNameError: no such number; the message names the nearest one.
    """
    known = {**MEASURES, **_SCORES}
    if metric not in known:
        raise UnknownNameError("measure", metric, known)
    return known[metric]
