"""Tables that need no pairs of tokens: use of experts, subspaces and importance, from exact sums and Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftlens.analysis.engine import Plan
from driftlens.analysis.inputs import Block, Grams, block_rows
from driftlens.metrics import (
    SubspacePair,
    active_rank_from_gram,
    dead_experts,
    expert_blocks,
    importance_concentration,
    load_entropy,
    near_uniform,
    normalised_entropy,
    pair_from_grams,
    rank_update_from_grams,
    spearman,
    specialisation,
)
from driftlens.metrics.arrays import FloatArray, divide
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
    a_pairs = _pairs(plan, grams.a, anchored)
    b_pairs = _pairs(plan, expert_blocks(grams.b, block.num_experts), anchored)
    number = np.arange(len(plan.recordings))
    own_rank = active_rank_from_gram(np.broadcast_to(grams.a[number, number][None], moment.shape), moment)
    out.put("active_rank", block, own_rank)
    shape = (len(plan.probes), *own_rank.shape[1:])
    found = {name: np.full(shape, np.nan) for name in _BY_EXPERT if name not in ("load", "active_rank")}
    angles = np.full((*shape, block.rank), np.nan)
    anchor_moment = moment[anchored, plan.anchors[anchored]][:, None]
    for field, pairs in (("d_in", a_pairs), ("d_out", b_pairs)):
        widths = np.array([getattr(site, field) for site in block.sites])
        for width in np.unique(widths):
            sites = np.flatnonzero(widths == width)
            own, between, current = (part[:, :, sites] for part in pairs)
            pair = pair_from_grams(own, between, current, dim=int(width))
            at = (anchored[:, None, None], number[None, :, None], sites[None, None, :])
            if field == "d_in":
                _row_space(found, angles, at, pair, anchor_moment[:, :, sites])
            else:
                found["output_overlap"][at] = pair.overlap()
                found["output_overlap_chance"][at] = pair.chance()
    for name, values in found.items():
        out.put(name, block, values)
    out.put("principal_angles", block, angles)


def _row_space(
    found: dict[str, FloatArray],
    angles: FloatArray,
    at: tuple[NDArray[np.intp], ...],
    pair: SubspacePair,
    anchor_moment: FloatArray,
) -> None:
    found["subspace_overlap"][at] = pair.overlap()
    found["subspace_overlap_adjusted"][at] = pair.adjusted()
    found["subspace_overlap_chance"][at] = pair.chance()
    found["grassmann_distance"][at] = pair.distance()
    found["active_overlap"][at] = pair.active_overlap(anchor_moment)
    angles[at] = pair.angles()


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
