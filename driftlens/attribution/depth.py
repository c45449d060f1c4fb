"""Which depth forgot: sites restored one at a time, and groups of sites shared out by Shapley values.

Both are exact interventions on the answer NLL of an old task (docs/metrics.md, section 4a). A restore asks what comes
back when one site alone is the anchor's again; restores of different sites overlap and do not add up. Shapley values
do: every nat that the task lost is shared out among groups of sites (and there between router and experts), averaged
over orders in which the groups are restored. They are sampled (`driftlens.metrics.permutation_shapley`), with a
standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from jaxtyping import Bool, Float64
from numpy.typing import NDArray

from driftlens.attribution.intervene import Switchboard
from driftlens.attribution.ledger import AnswerBatches
from driftlens.attribution.pairs import LoadedPair, SitePair
from driftlens.errors import ConfigError
from driftlens.metrics import permutation_shapley, player_orders

__all__ = [
    "RESTORED",
    "DepthShapley",
    "Player",
    "Restores",
    "depth_players",
    "depth_shapley",
    "most_evaluations",
    "single_restores",
]

RESTORED: Final = ("router", "experts", "both")
"""What of a site is put back to the anchor's."""


@dataclass(frozen=True)
class Restores:
    """One site at a time put back to the anchor's, everything else current.

    Attributes:
        samples: ids of the samples.
        sites: names of the sites.
        nll_current: [samples] answer NLL of the current checkpoint, nats.
        nll: [sites, 3, samples] answer NLL with the router, the experts or both of a site restored (`RESTORED`).
        evaluations: how often the samples were run.
    """

    samples: tuple[str, ...]
    sites: tuple[str, ...]
    nll_current: Float64[NDArray[np.float64], " sample"]
    nll: Float64[NDArray[np.float64], "site 3 sample"]
    evaluations: int

    @property
    def gain(self) -> Float64[NDArray[np.float64], "site 3 sample"]:
        """Nats that come back; negative where the current site has become better for the task."""
        return self.nll_current - self.nll


@dataclass(frozen=True)
class Player:
    """A group of sites, or one part of it, that is restored as a whole.

    Attributes:
        first: lowest decoder layer of the group.
        last: highest.
        part: ``router``, ``experts`` or ``both``.
        sites: numbers of its sites.
    """

    first: int
    last: int
    part: str
    sites: tuple[int, ...]

    @property
    def name(self) -> str:
        """For example ``layers 20-21 router``."""
        layers = f"layer {self.first}" if self.first == self.last else f"layers {self.first}-{self.last}"
        return f"{layers} {self.part}"


@dataclass(frozen=True)
class DepthShapley:
    """What a task lost, shared out over depth.

    Attributes:
        samples: ids of the samples.
        players: the groups and parts.
        value: [players, samples] Shapley value in nats: what the player's drift cost. Their sum over players is
            ``nll_current`` - ``nll_anchor``, exactly and for every sample. Intervals over samples:
            `driftlens.metrics.bootstrap_mean`.
        error: [players] standard error of the mean over samples from sampling permutations alone.
        nll_anchor: [samples] answer NLL with every site restored.
        nll_current: [samples] answer NLL with none.
        permutations: orders that were sampled, in antithetic pairs.
        seed: their seed.
        evaluations: different coalitions that were run.
    """

    samples: tuple[str, ...]
    players: tuple[Player, ...]
    value: Float64[NDArray[np.float64], "player sample"]
    error: Float64[NDArray[np.float64], " player"]
    nll_anchor: Float64[NDArray[np.float64], " sample"]
    nll_current: Float64[NDArray[np.float64], " sample"]
    permutations: int
    seed: int
    evaluations: int


@dataclass
class _Coalitions:
    """Answer NLL by what is restored; what is equal by construction is run once."""

    board: Switchboard
    batches: AnswerBatches
    pairs: Sequence[SitePair]
    on_step: Callable[[], None]
    known: dict[bytes, NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._routed = np.array([pair.routes for pair in self.pairs])

    def nll(self, router: NDArray[np.bool_], experts: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return [samples] with router and experts of the chosen sites [sites] restored."""
        router = router & self._routed
        key = np.packbits([router, experts]).tobytes()
        if key not in self.known:
            self.board.swap(router, experts)
            self.known[key] = self.batches.nll()
            self.on_step()
        return self.known[key]


def single_restores(
    loaded: LoadedPair,
    batches: AnswerBatches,
    *,
    sites: Sequence[int] | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Restores:
    """Put one site at a time back to the anchor's and measure the answer NLL: three runs of the samples per site.

    Args:
        loaded: the two checkpoints.
        batches: the samples of an old task.
        sites: numbers of the sites; None for all.
        on_step: called after each run of the samples.

    Raises:
        ConfigError: no such site.
    """
    total = len(loaded.pairs)
    chosen = list(range(total)) if sites is None else [int(site) for site in sites]
    wrong = [site for site in chosen if not 0 <= site < total]
    if wrong:
        raise ConfigError(f"There is no site number {wrong[0]}: the model has {total}, numbered from 0.")
    none = np.zeros(total, dtype=np.bool_)
    with Switchboard(loaded) as board:
        coalitions = _Coalitions(board, batches, loaded.pairs, on_step)
        current = coalitions.nll(none, none)
        found = []
        for site in chosen:
            one = none.copy()
            one[site] = True
            found.append([coalitions.nll(*masks) for masks in ((one, none), (none, one), (one, one))])
    return Restores(
        samples=batches.samples,
        sites=tuple(loaded.pairs[site].info.name for site in chosen),
        nll_current=current,
        nll=np.array(found).reshape(len(chosen), len(RESTORED), len(current)),
        evaluations=len(coalitions.known),
    )


def depth_players(pairs: Sequence[SitePair], groups: int = 5, *, by_part: bool = True) -> tuple[Player, ...]:
    """Return the players of `depth_shapley`, from the lowest layers up.

    Args:
        pairs: the sites.
        groups: how many groups of neighbouring layers, at most; as many layers in each as possible.
        by_part: router and experts of a group are two players rather than one.

    Raises:
        ConfigError: fewer than one group.
    """
    if groups < 1:
        raise ConfigError(f"{groups} groups of layers were asked for; give at least 1, usually 5.")
    layers = sorted({pair.info.layer for pair in pairs})
    parts = RESTORED[:2] if by_part else RESTORED[2:]
    players = []
    for chunk in np.array_split(layers, min(groups, len(layers))):
        inside = tuple(number for number, pair in enumerate(pairs) if chunk[0] <= pair.info.layer <= chunk[-1])
        players += [Player(int(chunk[0]), int(chunk[-1]), part, inside) for part in parts]
    return tuple(players)


def most_evaluations(players: int, permutations: int) -> int:
    """Return how many coalitions `depth_shapley` runs at most: every order shares its first and its last."""
    return int(min(2**players, 2 + permutations * (players - 1)))


def depth_shapley(
    loaded: LoadedPair,
    batches: AnswerBatches,
    *,
    groups: int = 5,
    by_part: bool = True,
    permutations: int = 16,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> DepthShapley:
    """Share out a task's rise in answer NLL over groups of sites by depth, with sampled Shapley values.

    A coalition of players is the current model with the players' sites (or their routers, or their experts) put back
    to the anchor's; its score is the negative answer NLL.

    Args:
        loaded: the two checkpoints.
        batches: the samples of an old task.
        groups: see `depth_players`.
        by_part: see `depth_players`.
        permutations: sampled orders, an even number: every second is the one before it read backwards.
        seed: their seed.
        on_step: called after each run of the samples; `most_evaluations` says how many there may be.

    Raises:
        ConfigError: groups or permutations out of range.
    """
    players = depth_players(loaded.pairs, groups, by_part=by_part)
    orders = player_orders(len(players), permutations, seed)
    membership = np.array([_masks(player, len(loaded.pairs)) for player in players])
    with Switchboard(loaded) as board:
        coalitions = _Coalitions(board, batches, loaded.pairs, on_step)

        def restored(members: NDArray[np.intp]) -> NDArray[np.float64]:
            masks = np.asarray(membership[members].any(axis=0))
            return coalitions.nll(masks[0], masks[1])

        steps = range(len(players) + 1)
        nll = np.array([[restored(order[:step]) for step in steps] for order in orders])
    scores = np.moveaxis(-nll, -1, 0)
    return DepthShapley(
        samples=batches.samples,
        players=players,
        value=permutation_shapley(orders, scores).value.T,
        error=permutation_shapley(orders, scores.mean(axis=0)).error,
        nll_anchor=nll[0, -1],
        nll_current=nll[0, 0],
        permutations=permutations,
        seed=seed,
        evaluations=len(coalitions.known),
    )


def _masks(player: Player, sites: int) -> Bool[NDArray[np.bool_], "2 site"]:
    """Return which routers and which experts a player restores."""
    masks = np.zeros((2, sites), dtype=np.bool_)
    for row, part in enumerate(RESTORED[:2]):
        masks[row, list(player.sites)] = player.part in (part, "both")
    return masks
