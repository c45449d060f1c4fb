"""Why a number is undefined.

Convention of the whole package: an undefined number is NaN, never 0. Where more than one cause is possible the
result carries an array ``reason`` of the same shape with the codes of `Reason`; where only one is possible, the
`driftlens.metrics.definitions` table names it under ``undefined``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from driftlens.metrics.shapes import PerSite, Reasons

__all__ = ["Measured", "Reason"]


class Reason(IntEnum):
    """Code of the cause of a NaN; ``DEFINED`` (0) stands beside every number that is one."""

    DEFINED = 0
    NO_TOKENS = 1
    NOT_FINITE = 2
    NO_OUTPUT = 3
    NO_OUTPUT_ANCHOR = 4
    NO_OUTPUT_CURRENT = 5
    ROUTER_DID_NOT_MOVE = 6
    EXPERTS_DID_NOT_MOVE = 7
    NOTHING_MOVED = 8
    BELOW_NOISE_FLOOR = 9
    TOO_FEW_TOKENS = 10
    ONE_EXPERT = 11
    ONE_TASK = 12
    NOT_MEASURED = 13

    @property
    def text(self) -> str:
        """One clause for people: what made the number undefined."""
        return _TEXTS[self]


_TEXTS = {
    Reason.DEFINED: "defined",
    Reason.NO_TOKENS: "no token was recorded",
    Reason.NOT_FINITE: "the recording holds NaN or infinite values",
    Reason.NO_OUTPUT: "the experts give no output at either checkpoint (B = 0)",
    Reason.NO_OUTPUT_ANCHOR: "the experts give no output at the anchor (B = 0)",
    Reason.NO_OUTPUT_CURRENT: "the experts give no output at the current checkpoint",
    Reason.ROUTER_DID_NOT_MOVE: "the router did not move",
    Reason.EXPERTS_DID_NOT_MOVE: "the experts did not move",
    Reason.NOTHING_MOVED: "neither router nor experts moved",
    Reason.BELOW_NOISE_FLOOR: "different tokens are routed alike, to within the noise floor",
    Reason.TOO_FEW_TOKENS: "fewer than two tokens were recorded",
    Reason.ONE_EXPERT: "there is only one expert",
    Reason.ONE_TASK: "there is only one task",
    Reason.NOT_MEASURED: "a quantity that it needs was not recorded",
}


class Measured(NamedTuple):
    """Values with the reason of every NaN among them.

    Attributes:
        value: float64 array, NaN where undefined.
        reason: uint8 array of the same shape, codes of `Reason`.
    """

    value: PerSite
    reason: Reasons
