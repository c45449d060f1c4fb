"""The whole analysis of a set of recordings, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from driftlens.analysis.datasets import Labels, build_tables
from driftlens.analysis.engine import DriftArrays, Plan, measure_block
from driftlens.analysis.inputs import Block, check_aligned, read_grams, site_blocks, site_union
from driftlens.analysis.state import StateArrays, state_block
from driftlens.analysis.threads import in_order
from driftlens.errors import UnknownNameError
from driftlens.store import Recording

__all__ = ["analyse"]


def analyse(
    recordings: Sequence[Recording],
    *,
    indices: Sequence[int],
    names: Sequence[str],
    tasks: Sequence[str],
    anchors: int | Mapping[str, int] | None = None,
    noise: tuple[str, Recording] | None = None,
    draws: int = 1000,
) -> dict[str, xr.Dataset]:
    """Compute every table of a run's analysis.

    Args:
        recordings: one per recorded checkpoint, in order.
        indices: their checkpoint indices.
        names: their checkpoint names.
        tasks: the stream's tasks in order.
        anchors: checkpoint index for all probes, or by probe; by default each probe's own task's checkpoint, and the
            first one after a task for a probe of no task.
        noise: a second recording of one checkpoint, with that checkpoint's name.
        draws: bootstrap draws.

    Returns:
        Datasets by name; see `driftlens.analysis.datasets.TABLES`.

    Raises:
        ProbeError: the recordings do not hold the same tokens.
        UnknownNameError: an anchor for a probe that does not exist.
    """
    by_name = dict(zip(names, recordings, strict=True))
    check_aligned(by_name if noise is None else by_name | {f"{noise[0]}.noise": noise[1]})
    position = {task: number for number, task in enumerate(tasks, start=1)}
    probes = sorted(recordings[0].probes, key=lambda probe: position.get(probe, len(position) + 1))
    anchor_of = {probe: position.get(probe, 1) for probe in probes}
    if isinstance(anchors, int):
        anchor_of = dict.fromkeys(probes, anchors)
    elif anchors is not None:
        for probe in anchors:
            if probe not in anchor_of:
                raise UnknownNameError("probe", probe, probes)
        anchor_of |= anchors
    where = {index: number for number, index in enumerate(indices)}
    plan = Plan(
        recordings=recordings,
        probes=probes,
        anchors=np.array([where.get(anchor_of[probe], -1) for probe in probes], dtype=np.intp),
        noise=None if noise is None else (list(names).index(noise[0]), noise[1]),
        draws=draws,
    )
    sites = site_union(recordings)
    drift, state = DriftArrays(plan, len(sites)), StateArrays(plan, sites)
    spans = [recordings[0].token_slice(probe) for probe in probes]
    blocks = list(site_blocks(sites, max(span.stop - span.start for span in spans), len(recordings)))

    def measure(block: Block) -> DriftArrays:
        grams = read_grams(recordings, names, block)
        state_block(plan, block, grams, state)
        return measure_block(plan, block, grams)

    # In the order of the sites, whoever finishes first: sums over sites are the same on any number of cores.
    for block, part in zip(blocks, in_order(measure, blocks), strict=True):
        drift.merge(part, block.index)
    labels = Labels(
        checkpoints=indices,
        checkpoint_names=names,
        probe_index=[position.get(probe, 0) for probe in probes],
        anchors=[anchor_of[probe] if anchor_of[probe] in where else -1 for probe in probes],
        sites=sites,
    )
    return build_tables(plan, labels, drift, state)
