"""Tables that need no pairs of tokens: use of experts, subspaces and importance, from exact sums and Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftlens.analysis.engine import Plan
from driftlens.analysis.inputs import Block, Grams, block_rows, factor_grams
from driftlens.analysis.pairs import Floats
from driftlens.metrics import (
    SubspacePair,
    dead_experts,
    expert_blocks,
    importance_concentration,
    load_entropy,
    near_uniform,
    normalised_entropy,
    rank_update_from_grams,
    spearman,
    specialisation,
)
from driftlens.metrics.arrays import FloatArray, divide
from driftlens.metrics.subspaces import Whitening, active_rank_of_whitening, distance_of_angles, whitening
from driftlens.store import Recording, SiteInfo

__all__ = ["StateArrays", "state_block"]

_BY_SITE = (
    "gate_entropy",
    "load_entropy",
    "dead_experts",
    "importance_concentration",
    "importance_gini",
    "rank_update_a_correlation",
    "rank_update_b_correlation",
)
_BY_EXPERT = (
    "load",
    "subspace_overlap",
    "subspace_overlap_adjusted",
    "subspace_overlap_chance",
    "grassmann_distance",
    "active_overlap",
    "active_rank",
    "output_overlap",
    "output_overlap_chance",
)
_BY_PATHWAY = ("principal_angles", "rank_importance", "rank_update_a", "rank_update_b")


class StateArrays:
    """Results by name: P probes, C checkpoints, S sites, E experts, r ranks (the largest; NaN where a site has fewer).

    Attributes:
        values: [P, C, S], [P, C, S, E] or [P, C, S, E, r].
        specialisation: [C, S].
        near_uniform: [P, C, S] bool.
    """

    def __init__(self, plan: Plan, sites: Sequence[SiteInfo]) -> None:
        shape = (len(plan.probes), len(plan.recordings), len(sites))
        experts = max(site.num_experts for site in sites)
        rank = max(site.rank for site in sites)
        extents = dict.fromkeys(_BY_SITE, shape)
        by_expert, by_pathway = (*shape, experts), (*shape, experts, rank)
        extra = dict.fromkeys(_BY_EXPERT, by_expert) | dict.fromkeys(_BY_PATHWAY, by_pathway)
        self.values = {name: np.full(extent, np.nan) for name, extent in {**extents, **extra}.items()}
        self.specialisation = np.full(shape[1:], np.nan)
        self.near_uniform = np.zeros(shape, dtype=np.bool_)

    def put(self, name: str, block: Block, values: FloatArray) -> None:
        """Store [P, C, S of the block, ...]; expert and rank axes may be shorter than the table's."""
        where: tuple[Any, ...] = (slice(None), slice(None), block.index, *map(slice, values.shape[3:]))
        self.values[name][where] = values


def state_block(plan: Plan, block: Block, grams: Grams | None, out: StateArrays) -> None:
    """Fill ``out`` for a block of sites; arguments as in `driftlens.analysis.engine.measure_block`."""
    count = np.stack(
        [_probe_order(recording, plan, recording.groups[0].stats["count"]) for recording in plan.recordings], 1
    )
    gates = _sums(plan, block, "gate_sum", (block.num_experts,))
    entropy = _sums(plan, block, "entropy", (), missing=np.nan)
    share = divide(gates, count[..., None, None])
    gate_entropy = np.minimum(normalised_entropy(divide(entropy, count[..., None]), block.num_experts), 1.0)
    out.put("load", block, share)
    out.put("gate_entropy", block, gate_entropy)
    out.put("load_entropy", block, load_entropy(gates[..., None, :]))
    out.put("dead_experts", block, np.where(share.sum(axis=-1) > 0, dead_experts(gates[..., None, :]), np.nan))
    out.near_uniform[:, :, block.index] = near_uniform(gate_entropy)
    # [P, C, S, E] -> [C, S, P, E]: the probes are the tasks that the experts may specialise in.
    loads, counts = (
        np.moveaxis(share, 0, -2),
        np.broadcast_to(np.moveaxis(count, 0, -1)[:, None], (*share.shape[1:3], len(count))),
    )
    out.specialisation[:, block.index] = specialisation(loads, counts).value
    if not block.rank:
        return
    pathways = (block.num_experts, block.rank)
    importance = divide(_sums(plan, block, "gated_energy", pathways), count[..., None, None, None])
    out.put("rank_importance", block, importance)
    concentration = importance_concentration(importance)
    out.put("importance_concentration", block, concentration.top_share)
    out.put("importance_gini", block, concentration.gini)
    if grams is not None:
        moment = _sums(plan, block, "second_moment", (*pathways, block.rank))
        _subspaces(plan, block, grams, moment, out)
        _updates(plan, block, grams, importance, out)


def _probe_order(recording: Recording, plan: Plan, values: NDArray[np.float64], axis: int = 0) -> NDArray[np.float64]:
    order = [recording.probes.index(probe) for probe in plan.probes]
    result: NDArray[np.float64] = np.take(values, order, axis=axis)
    return result


def _sums(plan: Plan, block: Block, name: str, inner: tuple[int, ...], missing: float = 0.0) -> FloatArray:
    """Read one of the exact sums: [P, C, S, *inner]; ``missing`` where a site or expert did not exist."""
    result = np.full((len(plan.recordings), len(block.sites), len(plan.probes), *inner), missing)
    for number, recording in enumerate(plan.recordings):
        for index, rows, positions in block_rows(recording, block):
            values = _probe_order(recording, plan, recording.groups[index].stats[name][rows], axis=1)
            where: tuple[Any, ...] = (number, positions, slice(None), *map(slice, values.shape[2:]))
            result[where] = values
    return np.moveaxis(result, 2, 0)


def _pairs(plan: Plan, grams: FloatArray, anchored: NDArray[np.intp]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Pick (anchor, anchor), (anchor, current), (current, current) for the probes ``anchored``: [P', C, ...] each."""
    anchors = plan.anchors[anchored]
    number = np.arange(len(plan.recordings))
    shape = (len(anchors), *grams.shape[1:])
    own = np.broadcast_to(grams[anchors, anchors][:, None], shape)
    current = np.broadcast_to(grams[number, number][None], shape)
    return own, grams[anchors], current


def _subspaces(plan: Plan, block: Block, grams: Grams, moment: FloatArray, out: StateArrays) -> None:
    anchored = np.flatnonzero(plan.anchors >= 0)
    number = np.arange(len(plan.recordings))
    anchors = plan.anchors[anchored]
    white_a = whitening(grams.a[number, number])
    out.put("active_rank", block, active_rank_of_whitening(white_a, moment))
    shape = (len(plan.probes), *moment.shape[1:-2])
    found = {name: np.full(shape, np.nan) for name in _BY_EXPERT if name not in ("load", "active_rank")}
    found["principal_angles"] = np.full((*shape, block.rank), np.nan)
    pair = _anchored_pairs(white_a, grams.a, anchors, [site.d_in for site in block.sites])
    found["subspace_overlap"][anchored] = pair.overlap()
    found["subspace_overlap_adjusted"][anchored] = pair.adjusted()
    found["subspace_overlap_chance"][anchored] = pair.chance()
    angles = pair.angles()
    found["principal_angles"][anchored] = angles
    found["grassmann_distance"][anchored] = distance_of_angles(angles)
    found["active_overlap"][anchored] = pair.active_overlap(moment[anchored, anchors][:, None])
    blocks = expert_blocks(grams.b, block.num_experts)
    pair = _anchored_pairs(whitening(blocks[number, number]), blocks, anchors, [site.d_out for site in block.sites])
    found["output_overlap"][anchored] = pair.overlap()
    found["output_overlap_chance"][anchored] = pair.chance()
    for name, values in found.items():
        out.put(name, block, values)


def _anchored_pairs(
    white: Whitening, grams: FloatArray, anchors: NDArray[np.intp], widths: Sequence[int]
) -> SubspacePair:
    """Compare every anchor with every checkpoint, [P', C, S, E]; each subspace was whitened once."""
    first, rank = white.matrix[anchors][:, None], white.rank[anchors][:, None]
    cross = first @ grams[anchors] @ np.swapaxes(white.matrix, -1, -2)[None]
    shape = cross.shape[:-2]
    return SubspacePair(
        cross=cross,
        rank0=np.broadcast_to(rank, shape),
        rank1=np.broadcast_to(white.rank[None], shape),
        matrix0=first,
        dim=np.asarray(widths)[:, None],
    )


def angle_table(factors: Floats) -> FloatArray:
    """Principal angles between all pairs of C checkpoints of a site, as `state_block` finds them.

    Args:
        factors: [C, E, r, d].

    Returns:
        [C, C, E, r], ascending, in radians; see `SubspacePair.angles`.
    """
    grams = factor_grams(factors)[:, :, None]
    number = np.arange(len(factors))
    white = whitening(grams[number, number])
    return _anchored_pairs(white, grams, number, [factors.shape[-1]]).angles()[:, :, 0]


def _updates(plan: Plan, block: Block, grams: Grams, importance: FloatArray, out: StateArrays) -> None:
    anchored = np.flatnonzero(plan.anchors >= 0)
    anchor_importance = importance[anchored, plan.anchors[anchored]][:, None]
    for factor, matrices in (("a", grams.a), ("b", expert_blocks(grams.b, block.num_experts))):
        update = rank_update_from_grams(*_pairs(plan, matrices, anchored))
        whole = np.full(importance.shape, np.nan)
        whole[anchored] = update
        out.put(f"rank_update_{factor}", block, whole)
        flat = (*update.shape[:3], -1)
        correlation = np.full(importance.shape[:3], np.nan)
        correlation[anchored] = spearman(
            update.reshape(flat), np.broadcast_to(anchor_importance, update.shape).reshape(flat)
        )
        out.put(f"rank_update_{factor}_correlation", block, correlation)
