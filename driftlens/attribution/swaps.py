"""Exact swaps: an old task scored with router and experts taken independently from anchor and current checkpoint.

Everything else, for instance a trained projector, stays the current checkpoint's. What that costs is the *remainder*:
the anchor's own score minus the score with the anchor's router and experts in the current model. So

    anchor's own score - current score = phi_router + phi_experts + remainder       (docs/metrics.md, section 4a)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
from jaxtyping import Float64
from peft.utils.other import AuxiliaryTrainingWrapper

from driftlens.attribution.intervene import Switchboard
from driftlens.attribution.pairs import LoadedPair
from driftlens.backbones.prefix import FrozenPrefix
from driftlens.errors import ProbeError
from driftlens.metrics import (
    ForgettingAttribution,
    Interval,
    bootstrap_attribution,
    bootstrap_mean,
    forgetting_attribution,
)
from driftlens.streams import Sample
from driftlens.training.config import EvaluationOptions
from driftlens.training.evaluate import ScoredAnswer, TaskScorer

__all__ = ["ANCHOR", "COMBINATIONS", "MEASURES", "Measure", "SwapIntervals", "SwapScores", "swap_scores", "task_scorer"]

COMBINATIONS: Final = ("aa", "ca", "ac", "cc")
"""Router (first letter) and experts (second) of the anchor (a) or the current checkpoint (c)."""

ANCHOR: Final = "anchor"
"""Key of the anchor checkpoint by itself, with everything that it saved."""

Measure = Literal["strict", "lenient", "nll"]

MEASURES: Final[tuple[Measure, ...]] = ("strict", "lenient", "nll")


class SwapIntervals(NamedTuple):
    """What a task lost, mean over samples, with bootstrap intervals; in accuracy, or in nats of answer NLL.

    Attributes:
        forgetting: S_aa - S_cc = ``phi_router`` + ``phi_experts``.
        phi_router: the router's part.
        phi_experts: the experts' part.
        interaction: S_aa - S_ca - S_ac + S_cc.
        remainder: the anchor's own score - S_aa; NaN where the anchor cannot run by itself (foreign folders).
    """

    forgetting: Interval
    phi_router: Interval
    phi_experts: Interval
    interaction: Interval
    remainder: Interval


@dataclass(frozen=True)
class SwapScores:
    """One old task under every combination of router and experts.

    Attributes:
        anchor: name of the anchor checkpoint.
        current: name of the current one.
        outcomes: by key of `COMBINATIONS`, one outcome per sample in the order in which they were given; and under
            `ANCHOR` those of the anchor by itself, absent where it cannot run by itself.
    """

    anchor: str
    current: str
    outcomes: Mapping[str, Sequence[ScoredAnswer]]

    @property
    def samples(self) -> tuple[str, ...]:
        """Ids of the samples."""
        return tuple(outcome.sample for outcome in self.outcomes["cc"])

    def values(self, key: str, measure: Measure) -> Float64[np.ndarray, " sample"]:
        """Return 0 or 1 per sample for an accuracy, nats for ``nll``; NaN under `ANCHOR` if it could not run."""
        if key not in self.outcomes:
            return np.full(len(self.samples), np.nan)
        return np.array([getattr(outcome, measure) for outcome in self.outcomes[key]], dtype=np.float64)

    def scores(self, key: str, measure: Measure) -> Float64[np.ndarray, " sample"]:
        """Return the same with larger being better: a NLL with its sign turned."""
        sign = -1.0 if measure == "nll" else 1.0
        return sign * self.values(key, measure)

    def parts(self, measure: Measure) -> ForgettingAttribution:
        """Return ``phi_router``, ``phi_experts`` and ``interaction`` of every sample, [samples]."""
        return forgetting_attribution(*(self.scores(key, measure) for key in COMBINATIONS))

    def intervals(self, measure: Measure, *, draws: int = 1000, seed: int = 0, level: float = 0.95) -> SwapIntervals:
        """Return the parts of the mean over samples; arguments as in `driftlens.metrics.bootstrap`."""
        scores = [self.scores(key, measure) for key in COMBINATIONS]
        remainder = self.scores(ANCHOR, measure) - scores[0]
        return SwapIntervals(
            *bootstrap_attribution(*scores, draws=draws, seed=seed, level=level),
            bootstrap_mean(remainder, draws=draws, seed=seed, level=level),
        )


def swap_scores(
    loaded: LoadedPair,
    samples: Sequence[Sample],
    evaluation: EvaluationOptions,
    *,
    prefix: FrozenPrefix | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> SwapScores:
    """Score an old task's samples with router and experts swapped independently.

    Scoring is that of training: greedy answers, judged strictly and leniently, and the mean NLL of the reference. With
    the run's evaluation options, prefix, threads and matrix precision (`driftlens.training.run.numerics`) the
    combination ``cc`` gives the numbers of the run's scores.parquet.

    Args:
        loaded: the anchor (the checkpoint just after the task, usually) and the current checkpoint.
        samples: test samples of the old task.
        evaluation: how answers are generated and scored.
        prefix: the layers below the lowest site, as in `AnswerBatches.prefix`; None runs the whole model each time.
        on_step: called after each of the five scorings.

    Raises:
        ProbeError: there are no samples.
    """
    scorer = task_scorer(loaded, samples, evaluation, prefix)
    outcomes: dict[str, Sequence[ScoredAnswer]] = {}
    routed = any(pair.routes for pair in loaded.pairs)
    with Switchboard(loaded) as board:
        for key in ("cc", "aa", "ca", "ac"):
            same = None if routed else outcomes.get(key[1] * 2)  # gates of 1: the experts alone tell
            board.swap(router=key[0] == "a", experts=key[1] == "a")
            outcomes[key] = scorer.score(loaded.model) if same is None else same
            on_step()
    if loaded.runs_anchor:
        with loaded.anchor_alone():
            if _saves_more_than_sites(loaded):  # the states below the sites may then be others
                scorer = task_scorer(loaded, samples, evaluation, prefix)
            outcomes[ANCHOR] = scorer.score(loaded.model)
        on_step()
    return SwapScores(loaded.anchor, loaded.current, outcomes)


def task_scorer(
    loaded: LoadedPair, samples: Sequence[Sample], evaluation: EvaluationOptions, prefix: FrozenPrefix | None
) -> TaskScorer:
    """Return the scorer of a task's samples; the states below the sites are computed with what is active now.

    Raises:
        ProbeError: there are no samples.
    """
    if not samples:
        raise ProbeError("There are no samples to score. Give a task with at least one test sample.")
    return TaskScorer(
        samples,
        loaded.backbone.need_encoder(),
        prefix=prefix,
        batch_size=evaluation.batch_size,
        max_new_tokens=evaluation.max_new_tokens,
        device=loaded.device,
    )


def _saves_more_than_sites(loaded: LoadedPair) -> bool:
    """Whether the adapters hold whole modules (``modules_to_save``) or token rows beside their sites."""
    return any(isinstance(module, AuxiliaryTrainingWrapper) for module in loaded.model.modules())
