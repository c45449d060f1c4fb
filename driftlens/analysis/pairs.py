"""What is measured on: the same tokens of one probe at two checkpoints, for a block of sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from driftlens.metrics.arrays import FloatArray

__all__ = ["Floats", "Pair", "PairGrams", "Pass"]

Floats = NDArray[np.floating]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Pass:
    """Stored tokens of one probe at one checkpoint, for S sites of equal shape.

    Attributes:
        gate: [S, n, E] weights as used.
        pathway: [S, n, E, r] activations before the scaling; None where sites have no low-rank pathways.
        middle: [S, n, E, r] what enters B_e: ``pathway``, or sum_i g_i z_i for every e at sites that multiply sums.
        expert_norm: [S, n, E] norms of expert outputs before the gate; NaN where they were not recorded.
        base_norm: [S, n] norms of the base modules' outputs.
    """

    gate: Floats
    pathway: Floats | None
    middle: Floats | None
    expert_norm: Floats
    base_norm: Floats
    _kept: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: str, compute: Callable[[], _T]) -> _T:
        """Return what ``compute`` makes of this pass alone, computed once: a pass is compared with many others.

        Args:
            key: name of the result, with the family's name before it.
            compute: called the first time.
        """
        if key not in self._kept:
            self._kept[key] = compute()
        return cast("_T", self._kept[key])


class PairGrams(NamedTuple):
    """Gram matrices of B between anchor (0) and current (1), scalings included: [S, E r, E r] each."""

    g00: FloatArray
    g01: FloatArray
    g11: FloatArray


@dataclass(frozen=True)
class Pair:
    """One probe at the anchor and at the current checkpoint.

    Attributes:
        anchor: the anchor's pass.
        current: the current pass; the same tokens in the same order.
        sample: [n] sample of each token, 0..m-1.
        top_k: [S] size of the sets compared by ``topk_overlap``.
        grams: None where factors were not recorded.
        spread_floor: [S] noise floor of router_js, below which tokens count as routed alike.
    """

    anchor: Pass
    current: Pass
    sample: NDArray[np.integer]
    top_k: NDArray[np.integer]
    grams: PairGrams | None
    spread_floor: FloatArray
