"""What is to be attributed, and how."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from driftlens.errors import ConfigError

__all__ = ["AttributionOptions"]


@dataclass(frozen=True)
class AttributionOptions:
    """What is made of one old task at one later checkpoint, and how.

    Attributes:
        nodes: Gauss-Legendre nodes of the ledger's path.
        tolerance: largest residual of the ledger as a share of the rise; panels of the path are halved until it holds
            or ``max_nodes`` are spent. None keeps one panel.
        max_nodes: most nodes of the ledger.
        swaps: also score exact swaps of router and experts.
        depth: groups of neighbouring layers that share out the rise by Shapley values; 0 leaves them out.
        depth_parts: router and experts of each group are players of their own.
        permutations: sampled orders of the groups; an even number.
        restores: also put every site back alone.
        batch_size: samples per forward of ledger, depth and restores; scoring keeps the run's own.

    Raises:
        ConfigError: values out of range, all of them in one message.
    """

    nodes: int = 8
    tolerance: float | None = None
    max_nodes: int = 64
    swaps: bool = True
    depth: int = 4
    depth_parts: bool = False
    permutations: int = 16
    restores: bool = False
    batch_size: int = 16

    def __post_init__(self) -> None:
        problems = []
        if self.nodes < 1:
            problems.append(f"nodes is {self.nodes}; the path needs at least 1, usually 8")
        if self.max_nodes < self.nodes:
            problems.append(f"max_nodes is {self.max_nodes}, less than nodes ({self.nodes})")
        if self.tolerance is not None and not (self.tolerance > 0 and math.isfinite(self.tolerance)):
            problems.append(f"tolerance is {self.tolerance:g}; give a positive share of the rise, for example 0.01")
        if self.depth < 0:
            problems.append(f"depth is {self.depth}; give a number of groups, or 0 to leave them out")
        if self.permutations < 2 or self.permutations % 2:
            problems.append(f"permutations is {self.permutations}; give an even number, for example 16")
        if self.batch_size < 1:
            problems.append(f"batch_size is {self.batch_size}; give at least 1")
        if problems:
            raise ConfigError("Forgetting cannot be attributed like this: " + "; ".join(problems) + ".")

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return what a file says about how it was made, as JSON gives it back."""
        depth = {"groups": self.depth, "parts": self.depth_parts, "permutations": self.permutations, "seed": 0}
        own = asdict(self) | {"depth": depth if self.depth else None}
        for name in ("depth_parts", "permutations"):
            del own[name]
        if self.tolerance is None:
            del own["max_nodes"]
        back: dict[str, Any] = json.loads(json.dumps(own | more))
        return back


def covers(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a file that was made with the settings ``found`` holds all that ``wanted`` asks for.

    Swaps, depth and restores that nobody asks for now do no harm; all else must be equal.
    """
    return all(
        found.get(key) == value or (key in ("swaps", "depth", "restores") and not value)
        for key, value in wanted.items()
    )
