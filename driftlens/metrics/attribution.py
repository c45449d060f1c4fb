"""Who lost the score: attribution of forgetting to router and experts, and to any players (metrics.md section 4a).

Scores are larger where the model is better: accuracies as they are, a loss (answer NLL) with its sign turned. Then
every part below is positive for what was lost, and in nats where the score is a negated NLL. All functions are linear
in the scores, so that per-sample scores give per-sample parts whose mean is the part of the mean.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Integer
from numpy.typing import ArrayLike

from driftlens.errors import ConfigError
from driftlens.metrics.arrays import FloatArray, as_float
from driftlens.metrics.resample import Interval, bootstrap_mean

__all__ = [
    "ForgettingAttribution",
    "ForgettingIntervals",
    "PermutationShapley",
    "bootstrap_attribution",
    "forgetting_attribution",
    "permutation_shapley",
    "player_orders",
]


class ForgettingAttribution(NamedTuple):
    """Parts of S_aa - S_cc, each of the broadcast shape of the scores and in their unit.

    ``phi_router`` + ``phi_experts`` = S_aa - S_cc; ``interaction`` = S_aa - S_ca - S_ac + S_cc is what neither part
    explains alone (0: the two losses add up), and each part holds half of it.
    """

    phi_router: FloatArray
    phi_experts: FloatArray
    interaction: FloatArray


class ForgettingIntervals(NamedTuple):
    """`ForgettingAttribution` of the mean over samples, and the forgetting itself, with bootstrap intervals [...]."""

    forgetting: Interval
    phi_router: Interval
    phi_experts: Interval
    interaction: Interval


class PermutationShapley(NamedTuple):
    """Result of `permutation_shapley`.

    Attributes:
        value: [..., K] each player's part; the parts sum to the score of all players minus that of none.
        error: [..., K] standard error of sampling permutations (not samples); NaN for fewer than two independent ones.
    """

    value: Float64[np.ndarray, "*site player"]
    error: Float64[np.ndarray, "*site player"]


def forgetting_attribution(s_aa: ArrayLike, s_ca: ArrayLike, s_ac: ArrayLike, s_cc: ArrayLike) -> ForgettingAttribution:
    """Split the forgetting of a task between router and experts by exact swaps: Shapley values of two players.

    First letter router, second experts: a is the anchor's, c the current one. Scores are larger where the model is
    better; pass a loss with its sign turned (``-nll``).

    Args:
        s_aa: score with the anchor's router and experts.
        s_ca: score with the current router and the anchor's experts.
        s_ac: score with the anchor's router and the current experts.
        s_cc: score of the current model.

    Returns:
        Arrays of the broadcast shape; per-sample scores give per-sample parts. Source: own, generalises the re-routing
        of SAME (arXiv 2602.01990).
    """
    aa, ca, ac, cc = np.broadcast_arrays(*(as_float(score) for score in (s_aa, s_ca, s_ac, s_cc)))
    return ForgettingAttribution(
        phi_router=((aa - ca) + (ac - cc)) / 2,
        phi_experts=((aa - ac) + (ca - cc)) / 2,
        interaction=(aa - ca) - (ac - cc),
    )


def bootstrap_attribution(
    s_aa: ArrayLike,
    s_ca: ArrayLike,
    s_ac: ArrayLike,
    s_cc: ArrayLike,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> ForgettingIntervals:
    """Attribute the forgetting of the mean score, with intervals over samples; a sample is drawn with all its scores.

    Args:
        s_aa: per-sample scores [..., m], and so on as in `forgetting_attribution`.
        s_ca: likewise.
        s_ac: likewise.
        s_cc: likewise.
        draws: number of resamples.
        seed: seed of the draws.
        level: coverage of the percentile interval.

    Returns:
        Intervals [...]; the two parts' values sum to that of the forgetting.
    """
    aa, ca, ac, cc = np.broadcast_arrays(*(as_float(score) for score in (s_aa, s_ca, s_ac, s_cc)))
    # A sample that lacks one score lacks all parts, or parts and whole would be means over different samples.
    parts = np.stack([aa - cc, *forgetting_attribution(aa, ca, ac, cc)]) + 0 * (ca + ac)
    found = bootstrap_mean(parts, draws=draws, seed=seed, level=level)
    return ForgettingIntervals(*(Interval(*(bound[i] for bound in found)) for i in range(len(parts))))


def player_orders(
    players: int, permutations: int, seed: int = 0, *, antithetic: bool = True
) -> Integer[np.ndarray, "permutation player"]:
    """Return seeded random orders of ``players``, one per row.

    Args:
        players: number of players.
        permutations: number of orders.
        seed: seed of the draws.
        antithetic: let every second order be the one before it read backwards. In the pair each player joins once
            early and once late, so that interactions between two players cancel from the error.

    Raises:
        ConfigError: no players, no permutations, or an odd number of antithetic ones.
    """
    if players < 1 or permutations < 1 or (antithetic and permutations % 2):
        raise ConfigError(
            f"{permutations} orders of {players} players were asked for; give at least one player and one order, and "
            "an even number of antithetic orders, such as 16."
        )
    drawn = permutations // 2 if antithetic else permutations
    orders = np.random.default_rng(seed).permuted(np.tile(np.arange(players), (drawn, 1)), axis=1)
    return np.stack([orders, orders[:, ::-1]], axis=1).reshape(permutations, players) if antithetic else orders


def permutation_shapley(
    orders: Integer[np.ndarray, "permutation player"],
    scores: Float[np.ndarray, "*site permutation steps"],
    *,
    antithetic: bool = True,
) -> PermutationShapley:
    """Estimate Shapley values from sampled permutations: each player's mean gain on joining those before it.

    Args:
        orders: [P, K] orders in which the players join, each row a permutation of 0..K-1.
        scores: [..., P, K+1] score with the first 0, 1, ..., K players of each order in; leading axes (samples, say)
            are kept.
        antithetic: the orders came in pairs (see `player_orders`). A pair is then one independent draw of the error.

    Returns:
        Values and standard errors [..., K]. Within every permutation, and so in the mean, the gains telescope: their
        sum is the score of all players minus that of none. Source: Castro et al. 2009; antithetic pairs after
        Mitchell et al. 2022 (arXiv 2104.12199).

    Raises:
        ConfigError: rows that are no permutations, shapes that do not fit, or an odd number of antithetic orders.
    """
    rows, values = np.asarray(orders), as_float(scores)
    if rows.ndim != 2 or not np.array_equal(np.sort(rows, axis=1), np.tile(np.arange(rows.shape[-1]), (len(rows), 1))):
        raise ConfigError(f"Orders of shape {rows.shape} must hold a permutation of 0..K-1 in every row [P, K].")
    count, players = rows.shape
    if values.shape[-2:] != (count, players + 1):
        raise ConfigError(
            f"Scores have shape {values.shape}; {count} orders of {players} players need [..., {count}, {players + 1}]."
        )
    if not count or (antithetic and count % 2):
        raise ConfigError(f"{count} orders cannot be antithetic pairs; give an even number, or antithetic=False.")
    joined = np.diff(values, axis=-1)
    gains = np.take_along_axis(joined, np.broadcast_to(np.argsort(rows, axis=1), joined.shape), axis=-1)
    independent = gains
    if antithetic:
        independent = gains.reshape(*gains.shape[:-2], count // 2, 2, players).mean(axis=-2)
    drawn = independent.shape[-2]
    value: FloatArray = independent.mean(axis=-2)
    if drawn < 2:
        return PermutationShapley(value, np.full_like(value, np.nan))
    return PermutationShapley(value, independent.std(axis=-2, ddof=1) / np.sqrt(drawn))
