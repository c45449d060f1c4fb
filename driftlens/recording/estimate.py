"""What a recording will take, before it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence

from driftlens.store import SiteInfo, group_sites
from driftlens.store.schema import stats_shapes, value_shapes

__all__ = ["batch_bytes"]


def batch_bytes(sites: Sequence[SiteInfo], rows: int, reference: bool = False) -> int:
    """Return the bytes of one batch between model and file: float32 values of stored rows, and the batch's sums.

    Args:
        sites: the sites.
        rows: stored tokens of the batch.
        reference: whether an anchor answers to the same inputs.
    """
    numbers = 0
    for members in group_sites(sites):
        first = sites[members[0]]
        values = value_shapes(len(members), rows, first.num_experts, first.rank)
        sums = stats_shapes(len(members), 1, first.num_experts, first.rank)
        own = sum(math.prod(shape) for shape in (*values.values(), *sums.values()))
        numbers += own + (own - math.prod(values["base_norm"]) if reference else 0)
    return 4 * numbers
