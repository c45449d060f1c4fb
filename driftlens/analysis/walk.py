"""Every old probe at every later checkpoint, read from the recordings: for measures beside those of `Run`'s tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from driftlens.analysis.inputs import Block, Grams, read_grams, read_pass, site_blocks, site_union
from driftlens.analysis.pairs import Pass
from driftlens.analysis.run import Run
from driftlens.metrics import CoDriftTokens, codrift_from_grams
from driftlens.metrics.arrays import FloatArray
from driftlens.store import Recording, SiteInfo

__all__ = ["OldPair", "SiteMeasure", "measure_pairs"]

_ANSWER = 2
"""Code of the role "answer" in token tables."""


@dataclass(frozen=True)
class OldPair:
    """An old probe at its anchor (0) and at a later checkpoint (1), for a block of S sites.

    Attributes:
        recordings: of the two checkpoints.
        block: the sites.
        anchor: the anchor's pass.
        current: the current pass, the same tokens.
        gram_a: A0 A0^T, A0 A1^T, A1 A1^T by expert, [S, E, r, r] each; None where factors were not recorded.
        gram_b: the same of B with the scaling, [S, E r, E r] each.
        moved: inner products of co-drift by token, [S, n]; None likewise.
        sample: [n] sample of each token.
        scored: [n] whether the next token is of the answer: here the model's output is scored.
    """

    recordings: tuple[Recording, Recording]
    block: Block
    anchor: Pass
    current: Pass
    gram_a: tuple[FloatArray, FloatArray, FloatArray] | None
    gram_b: tuple[FloatArray, FloatArray, FloatArray] | None
    moved: CoDriftTokens | None
    sample: NDArray[np.integer]
    scored: NDArray[np.bool_]


SiteMeasure = Callable[[OldPair], Mapping[str, FloatArray]]
"""Takes a pair, returns measures by name, [S] each; NaN where undefined."""


def measure_pairs(run: Run, names: Sequence[str], measure: SiteMeasure) -> tuple[xr.Dataset, list[SiteInfo]]:
    """Evaluate measures of single sites on every pair of a run.

    Args:
        run: the run; its anchors are those of its tables.
        names: what ``measure`` returns.
        measure: see `SiteMeasure`.

    Returns:
        NAME (probe, checkpoint, site) and NAME_noise (probe, site), the same between two recordings of one
        checkpoint; NaN for pairs that are not old and where it was not recorded. And the sites.

    Raises:
        NotFoundError: no recordings.
        FormatError: a damaged recording.
    """
    summary = run.summary
    probes = summary["probe"].to_numpy().tolist()
    points = summary["checkpoint"].to_numpy().tolist()
    anchors = [points.index(anchor) if anchor in points else -1 for anchor in summary["anchor"].to_numpy().tolist()]
    with run.open_recordings() as (recordings, noise):
        sites = site_union(recordings)
        value = {name: np.full((len(probes), len(points), len(sites)), np.nan) for name in names}
        floor = {name: np.full((len(probes), len(sites)), np.nan) for name in names}
        labels = summary["checkpoint_name"].to_numpy().tolist()
        again = None if noise is None else (labels.index(noise[0]), noise[1])
        spans = [recordings[0].token_slice(probe) for probe in probes]
        for block in site_blocks(sites, max(span.stop - span.start for span in spans), len(recordings)):
            grams = read_grams(recordings, labels, block)
            for row, probe in enumerate(probes):
                for current, pair in _pairs(recordings, probe, anchors[row], block, grams, again):
                    for name, values in measure(pair).items():
                        if current < 0:
                            floor[name][row, block.index] = np.abs(values)
                        else:
                            value[name][row, current, block.index] = values
    coords = {"probe": probes, "checkpoint": points, "site": [site.name for site in sites]}
    variables: dict[str, tuple[tuple[str, ...], FloatArray]] = {
        name: (("probe", "checkpoint", "site"), values) for name, values in value.items()
    }
    variables |= {f"{name}_noise": (("probe", "site"), values) for name, values in floor.items()}
    return xr.Dataset(variables, coords), sites


def _pairs(
    recordings: Sequence[Recording],
    probe: str,
    anchor: int,
    block: Block,
    grams: Grams | None,
    noise: tuple[int, Recording] | None,
) -> Iterator[tuple[int, OldPair]]:
    """Yield (position of the current checkpoint, pair) for the later ones, and -1 with the pair of two recordings."""
    tokens = recordings[0].tokens(probe)
    if not len(tokens["sample"]):
        return
    scored = _before_answers(tokens)

    def pair(old: int, new: int, other: Recording, first: Pass, second: Pass) -> OldPair:
        gram_a = None if grams is None else (grams.a[old, old], grams.a[old, new], grams.a[new, new])
        gram_b = None if grams is None else (grams.b[old, old], grams.b[old, new], grams.b[new, new])
        moved = None
        if gram_b is not None and first.middle is not None and second.middle is not None:
            moved = codrift_from_grams(first.gate, second.gate, first.middle, second.middle, *gram_b)
        ends = (recordings[old], other)
        return OldPair(ends, block, first, second, gram_a, gram_b, moved, np.asarray(tokens["sample"]), scored)

    if noise is not None:
        at, other = noise
        passes = (read_pass(part, probe, block) for part in (recordings[at], other))
        yield -1, pair(at, at, other, *passes)
    if anchor < 0 or anchor + 1 == len(recordings):
        return
    first = read_pass(recordings[anchor], probe, block)
    for current in range(anchor + 1, len(recordings)):
        second = read_pass(recordings[current], probe, block)
        yield current, pair(anchor, current, recordings[current], first, second)


def _before_answers(tokens: Mapping[str, NDArray[np.integer]]) -> NDArray[np.bool_]:
    sample, position = (np.asarray(tokens[name], dtype=np.int64) for name in ("sample", "position"))
    answer = np.asarray(tokens["role"]) == _ANSWER
    stride = int(position.max(initial=0)) + 2
    place = sample * stride + position
    found: NDArray[np.bool_] = np.isin(place + 1, place[answer])
    return found
