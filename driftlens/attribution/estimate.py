"""What an attribution will take, said before it is made. Nothing is written, and nothing is refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from driftlens.attribution.depth import RESTORED, depth_players, most_evaluations
from driftlens.attribution.intervene import Switchboard
from driftlens.attribution.ledger import PARTS, AnswerBatches, book_ledger
from driftlens.attribution.options import AttributionOptions
from driftlens.attribution.pairs import LoadedPair
from driftlens.attribution.swaps import COMBINATIONS, swap_scores
from driftlens.backbones import Encoded
from driftlens.streams import Sample
from driftlens.training.config import EvaluationOptions

__all__ = ["AttributionEstimate", "Speed", "estimate_cell", "measure_speed"]

_TIMED_SAMPLES = 16


@dataclass(frozen=True)
class Speed:
    """Seconds that were measured on a few samples.

    Attributes:
        tokens: tokens of these samples, prompts and answers.
        prefix: computing the layers below the lowest site.
        forward: one forward with exchanged sites.
        node: one forward and backward of the ledger, entries booked.
        scoring: one scoring of all, answers generated, states below the sites not included; 0 if not wanted.
    """

    tokens: int
    prefix: float
    forward: float
    node: float
    scoring: float


@dataclass(frozen=True)
class AttributionEstimate:
    """What one old task will take; None where the model would have to run to know, and cannot.

    Attributes:
        path: the file.
        task: the old task.
        anchor: name of the anchor checkpoint.
        checkpoint: name of the current one.
        samples: number of samples.
        tokens: their tokens.
        forwards: forwards over all samples, those of the ledger included; refinement by ``tolerance`` is not.
        backwards: backwards over all samples.
        scorings: times that all samples are answered and scored.
        seconds: estimated from the speed on a few samples.
        bytes: size of the file's arrays before compression.
        note: what else is to be said, for example why something is not known.
    """

    path: Path
    task: str
    anchor: str
    checkpoint: str
    samples: int
    tokens: int | None = None
    forwards: int | None = None
    backwards: int | None = None
    scorings: int | None = None
    seconds: float | None = None
    bytes: int | None = None
    note: str = ""

    def row(self) -> dict[str, object]:
        """Return the estimate as plain values for tables and JSON."""
        return asdict(self) | {"path": str(self.path)}


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure_speed(
    loaded: LoadedPair,
    samples: Sequence[Sample] | Sequence[Encoded],
    options: AttributionOptions,
    evaluation: EvaluationOptions | None,
) -> Speed:
    """Time every kind of step on at most 16 samples; each runs once before, to warm up.

    Args:
        loaded: the two checkpoints.
        samples: samples of an old task.
        options: what will be made.
        evaluation: how answers are scored; None leaves scoring out.
    """
    few = samples[:_TIMED_SAMPLES]
    batches = AnswerBatches(loaded, few, batch_size=options.batch_size)
    prefix = _seconds(lambda: AnswerBatches(loaded, few, batch_size=options.batch_size))
    with Switchboard(loaded) as board:
        board.path(0.5)
        batches.nll()
        forward = _seconds(batches.nll)
    # the ledger runs both ends of the path besides its nodes
    node = max(_seconds(lambda: book_ledger(loaded, batches, nodes=1)) - 2 * forward, forward)
    scoring = 0.0
    answered = [sample for sample in few if isinstance(sample, Sample)]
    if evaluation is not None and len(answered) == len(few):
        total = _seconds(lambda: swap_scores(loaded, answered, evaluation, prefix=batches.prefix))
        scoring = max(total - prefix, 0.0) / (len(COMBINATIONS) + loaded.runs_anchor)
    tokens = sum(len(one.input_ids) for one in batches.encoded)
    return Speed(tokens, prefix, forward, node, scoring)


def encoded(loaded: LoadedPair, sample: Sample | Encoded) -> Encoded:
    """Return a sample as tokens."""
    return sample if isinstance(sample, Encoded) else loaded.backbone.need_encoder().encode(sample)


def estimate_cell(
    blank: AttributionEstimate,
    loaded: LoadedPair,
    samples: Sequence[Sample] | Sequence[Encoded],
    options: AttributionOptions,
    speed: Speed,
) -> AttributionEstimate:
    """Fill in what one cell will take.

    Args:
        blank: the cell, without numbers.
        loaded: any pair of the same sites.
        samples: the cell's samples.
        options: what will be made.
        speed: as `measure_speed` found it.
    """
    tokens = sum(len(encoded(loaded, sample).input_ids) for sample in samples)
    share = tokens / speed.tokens
    sites, widest = len(loaded.pairs), max(pair.info.num_experts for pair in loaded.pairs)
    plain = 2 + options.restores * (1 + sites * len(RESTORED))
    players = 0
    if options.depth:
        players = len(depth_players(loaded.pairs, options.depth, by_part=options.depth_parts))
        plain += most_evaluations(players, options.permutations)
    scorings = (len(COMBINATIONS) + loaded.runs_anchor) * options.swaps
    seconds = speed.prefix * (1 + options.swaps) + speed.forward * plain + speed.node * options.nodes
    values = len(samples) * (sites * len(PARTS) * widest + 2 + 3 * (2 + len(COMBINATIONS) * options.swaps) + players)
    values += tokens * (len(PARTS) + 3) + options.restores * sites * len(RESTORED) * len(samples)
    return replace(
        blank,
        samples=len(samples),
        tokens=tokens,
        forwards=plain + options.nodes,
        backwards=options.nodes,
        scorings=scorings,
        seconds=round(share * (seconds + speed.scoring * scorings), 1),
        bytes=8 * values,
    )
