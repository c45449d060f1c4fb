"""Which expert of one run plays the part of which expert of another (metrics.md section 6, on the shares of 3b).

Experts of independent runs carry arbitrary labels. Their profiles, the share of the update that each supplies token by
token, do not depend on the gauge and can be correlated. The best one-to-one matching of any two runs looks good, since
it is the best of E! many, so it is never given without its null: the same search after one run's units changed places.

Units of a profile are tokens or samples. Tokens of a sample and samples of a probe are alike, so what changes places
are whole probes and the samples in them; shuffling single tokens would call any two runs alike. The same word is alike
wherever it stands, and two random functions of few inputs correlate, which no change of places respects; so there is a
second null, from experts that cannot be partners on the very same tokens: those of other sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Float64, Int, Integer
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from driftlens.errors import ConfigError, ProbeError
from driftlens.metrics.arrays import FloatArray, as_float, divide, mean_defined
from driftlens.metrics.resample import percentile_interval
from driftlens.metrics.shapes import PerSite

__all__ = [
    "Exchange",
    "Matching",
    "ProfileMatching",
    "best_matching",
    "match_profiles",
    "null_pairings",
    "other_site_scores",
    "profile_similarity",
]

Exchange = Literal["probes", "samples", "within_probes"]
Profile0 = Float[np.ndarray, "*site unit expert0"]
Profile1 = Float[np.ndarray, "*site unit expert1"]
Similarity = Float[np.ndarray, "*site expert0 expert1"]
PerExpert0 = Float64[np.ndarray, "*site expert0"]
Pairings = Integer[np.ndarray, "draw unit"]
Units = Integer[np.ndarray, " unit"]

_FLAT: Final = 1e-9
"""Standard deviation at or below which a profile of shares counts as constant: an expert without a part of its own."""
_TIE: Final = 1e-12


class Matching(NamedTuple):
    """A one-to-one matching of the experts of two runs.

    Attributes:
        partner: [..., E0] expert of the second run, -1 where an expert has none.
        score: [..., E0] similarity of the pair, NaN where there is no partner.
        total: [...] mean score over the pairs, NaN where there is none.
    """

    partner: Int[np.ndarray, "*site expert0"]
    score: PerExpert0
    total: PerSite


@dataclass(frozen=True)
class ProfileMatching:
    """A matching beside its permutation null: per site [...], per expert [..., E0], and for all sites together.

    ``p`` is (1 + draws whose best matching scores at least as high) / (1 + draws); ``z`` the distance of the score
    from the null's mean in its standard deviations; ``null_high`` the upper end of its central interval. ``expert_*``
    compare an expert's score with what the best matchings of the null gave the same expert. All sites change places
    together, so ``overall_p`` holds however much sites resemble each other. NaN where no expert has a partner, or
    (``z``) where every draw gives the same score.
    """

    matching: Matching
    null_mean: PerSite
    null_high: PerSite
    z: PerSite
    p: PerSite
    expert_null_mean: PerExpert0
    expert_null_high: PerExpert0
    expert_p: PerExpert0
    overall: float
    overall_null_mean: float
    overall_p: float


def profile_similarity(profile0: Profile0, profile1: Profile1) -> Float64[np.ndarray, "*site expert0 expert1"]:
    """Pearson correlation over units of every pair of profiles.

    A unit that is undefined (NaN) in one run is left out of that run's mean and standard deviation, and adds nothing to
    the product.

    Returns:
        [..., E0, E1] in -1..1; NaN where one of the two profiles is constant.

    Raises:
        ProbeError: the profiles have different numbers of units.
    """
    first, second = as_float(profile0), as_float(profile1)
    _check_units(first, second)
    return _correlate(_standardised(first), _standardised(second))


def _check_units(first: FloatArray, second: FloatArray) -> None:
    if min(first.ndim, second.ndim) < 2:
        raise ConfigError(
            f"Profiles have shapes {first.shape} and {second.shape}; expected [..., units, experts] of both runs."
        )
    if first.shape[-2] != second.shape[-2]:
        raise ProbeError(
            f"The profiles of the two runs have {first.shape[-2]} and {second.shape[-2]} units (tokens or samples); "
            "experts are matched by what they do on the same ones. Record both runs on one probe set."
        )


def _centred(profile: FloatArray) -> FloatArray:
    """Centre over units; an undefined unit is put at the mean, where it adds nothing."""
    mean = mean_defined(profile, axis=-2)
    return np.where(np.isnan(profile), 0.0, profile - mean[..., None, :])


def _standardised(profile: FloatArray) -> FloatArray:
    """Centre over units and scale to length 1; constant profiles are NaN."""
    centred = _centred(profile)
    return divide(centred, _length((centred**2).sum(axis=-2), profile.shape[-2])[..., None, :])


def _length(squares: FloatArray, units: int) -> FloatArray:
    length = np.sqrt(np.maximum(squares, 0.0))
    return np.where(length <= _FLAT * np.sqrt(max(units, 1)), np.nan, length)


def _correlate(first: FloatArray, second: FloatArray) -> FloatArray:
    product: FloatArray = np.swapaxes(first, -1, -2) @ second
    return np.clip(product, -1.0, 1.0)


def _null_similarities(first: FloatArray, second: FloatArray, pairings: NDArray[np.integer]) -> FloatArray:
    """Correlations of standardised ``first`` with ``second`` in every draw: [draws, ..., E0, E1].

    Standardised anew in every draw: where samples differ in length a stand-in repeats some units and drops others.
    """
    centred, units = _centred(second), second.shape[-2]
    squared, shape = centred**2, (*first.shape[:-2], first.shape[-1], second.shape[-1])
    result = np.empty((len(pairings), *shape))
    for draw, order in enumerate(pairings):
        times = np.bincount(order, minlength=units).astype(np.float64)
        mean = times @ centred / max(units, 1)
        length = _length(times @ squared - units * mean**2, units)
        product = np.swapaxes(first, -1, -2) @ centred[..., order, :]  # first is centred: the mean drops out
        result[draw] = np.clip(product / length[..., None, :], -1.0, 1.0)
    return result


def best_matching(similarity: Similarity) -> Matching:
    """Hungarian matching: the one-to-one pairing of experts with the highest sum of similarities.

    With unequal numbers of experts the surplus stays without a partner. Undefined similarities (NaN) count as 0 in the
    search, and a pair that has one is no pair.

    Args:
        similarity: [..., E0, E1].
    """
    values = as_float(similarity)
    if values.ndim < 2 or 0 in values.shape[-2:]:
        raise ConfigError(f"similarity has shape {values.shape}; expected [..., experts, experts], at least one each.")
    costs = -np.nan_to_num(values, nan=0.0).reshape(-1, *values.shape[-2:])
    chosen = np.full(costs.shape[:2], -1, dtype=np.intp)
    for number, cost in enumerate(costs):  # scipy has no batched solver; a 4 x 4 takes some microseconds
        rows, columns = linear_sum_assignment(cost)
        chosen[number, rows] = columns
    partner = chosen.reshape(values.shape[:-1])
    score = np.take_along_axis(values, np.maximum(partner, 0)[..., None], axis=-1)[..., 0]
    score = np.where(partner < 0, np.nan, score)
    partner = np.where(np.isnan(score), -1, partner)
    return Matching(partner, score, mean_defined(score))


def null_pairings(
    probe: Units,
    sample: Units,
    *,
    draws: int = 1000,
    seed: int = 0,
    exchange: Exchange = "probes",
) -> Int[np.ndarray, "draw unit"]:
    """Return which unit of the second run stands in for each unit in every draw of the null.

    Args:
        probe: [U] probe of each unit; units of a probe are neighbours.
        sample: [U] sample of each unit, in any numbering; units of a sample are neighbours in their order.
        draws: number of draws.
        seed: seed of the draws.
        exchange: what is alike under the null. ``"probes"``: whole probes change places, and samples within them, so
            that two runs whose experts took tasks at random are not called alike. ``"within_probes"``: samples within
            their probe: are profiles alike beyond what tasks explain? ``"samples"``: samples of all probes: are they
            alike in anything, tasks included?

    Returns:
        [draws, U]. Where lengths differ the stand-in is stretched: first tokens stand in for first tokens, last ones
        for last ones.

    Raises:
        ConfigError: an unknown exchange or no draw.
        ProbeError: ``probe`` and ``sample`` do not fit.
    """
    if exchange not in get_args(Exchange):
        raise ConfigError(f"Unknown exchange {exchange!r}; choose one of {', '.join(get_args(Exchange))}.")
    if draws < 1:
        raise ConfigError(f"A null of {draws} draws was asked for; at least 1 is needed, 1000 is usual.")
    probes, samples = np.asarray(probe), np.asarray(sample)
    if probes.ndim != 1 or probes.shape != samples.shape:
        raise ProbeError(
            f"probe and sample have shapes {probes.shape} and {samples.shape}; expected one entry per unit."
        )
    if probes.size == 0:
        return np.zeros((draws, 0), dtype=np.intp)
    start = np.flatnonzero(np.r_[True, (probes[1:] != probes[:-1]) | (samples[1:] != samples[:-1])])
    length = np.diff(np.r_[start, probes.size])
    first = np.flatnonzero(np.r_[True, np.diff(probes[start]) != 0])  # first sample of every probe
    count = np.diff(np.r_[first, start.size])
    own = np.repeat(np.arange(first.size), count)  # probe of every sample
    within = np.arange(start.size) - first[own]
    target = np.repeat(np.arange(start.size), length)  # sample of every unit
    position = np.arange(probes.size) - start[target]
    rng, result = np.random.default_rng(seed), np.empty((draws, probes.size), dtype=np.intp)
    for draw in range(draws):
        if exchange == "samples":
            source = rng.permutation(start.size)
        else:
            moved = rng.permutation(first.size) if exchange == "probes" else np.arange(first.size)
            shuffled = np.lexsort((rng.random(start.size), own))  # samples of every probe in random order
            source = shuffled[first[moved[own]] + within * count[moved[own]] // count[own]]
        last, reach = length[target] - 1, length[source][target] - 1
        result[draw] = start[source][target] + (2 * position * reach + last) // np.maximum(2 * last, 1)  # rounded
    return result


def match_profiles(
    profile0: Profile0, profile1: Profile1, pairings: Pairings, *, level: float = 0.95
) -> ProfileMatching:
    """Match the experts of two runs by their profiles, beside the null of the same search.

    Args:
        profile0: [..., U, E0] of the first run, for example `responsibility` of every token.
        profile1: [..., U, E1] of the second run on the same units; sites in the same order.
        pairings: [draws, U], as `null_pairings` returns them.
        level: coverage of the null's central interval, whose upper end is given.

    Raises:
        ProbeError: numbers of units that differ.
        ConfigError: ``level`` is not strictly between 0 and 1.
    """
    first, second = as_float(profile0), as_float(profile1)
    _check_units(first, second)
    index = np.asarray(pairings)
    if index.ndim != 2 or index.shape[1] != first.shape[-2]:
        raise ProbeError(f"pairings has shape {index.shape} for {first.shape[-2]} units; expected [draws, units].")
    fixed = _standardised(first)
    matching = best_matching(_correlate(fixed, _standardised(second)))
    drawn = best_matching(_null_similarities(fixed, second, index))
    overall, overall_null = mean_defined(matching.total.ravel()), mean_defined(drawn.total.reshape(len(index), -1))
    spread = drawn.total.std(axis=0)
    return ProfileMatching(
        matching=matching,
        null_mean=mean_defined(drawn.total, axis=0),
        null_high=percentile_interval(drawn.total, level)[1],
        z=divide(matching.total - mean_defined(drawn.total, axis=0), np.where(spread <= _TIE, 0.0, spread)),
        p=_p_value(matching.total, drawn.total),
        expert_null_mean=_known(matching, mean_defined(drawn.score, axis=0)),
        expert_null_high=_known(matching, percentile_interval(drawn.score, level)[1]),
        expert_p=_p_value(matching.score, drawn.score),
        overall=float(overall),
        overall_null_mean=float(mean_defined(overall_null)),
        overall_p=float(_p_value(overall, overall_null)),
    )


def other_site_scores(
    profile0: Float[np.ndarray, "site unit expert0"], profile1: Float[np.ndarray, "site unit expert1"], most: int = 64
) -> Float64[np.ndarray, "other site"]:
    """Total score of each site of the first run matched with other sites of the second: a null on the same tokens.

    An expert of another site cannot be a partner, yet it sees the same words in the same places. A matching that is no
    better than these says that both runs send tokens somewhere by the same habits, not which expert is which.

    Args:
        profile0: [S, U, E0] of the first run.
        profile1: [S, U, E1] of the second run, sites in the same order.
        most: largest number of other sites, spread evenly over the model.

    Returns:
        [others, S]; no row where there is one site.
    """
    first, second = as_float(profile0), as_float(profile1)
    _check_units(first, second)
    sites = len(second)
    steps = np.linspace(1, sites - 1, min(most, sites - 1)).astype(int).tolist() if sites > 1 else []
    first, second = _standardised(first), _standardised(second)
    totals = [best_matching(_correlate(first, np.roll(second, step, axis=0))).total for step in steps]
    return np.stack(totals) if totals else np.zeros((0, sites))


def _known(matching: Matching, values: FloatArray) -> FloatArray:
    return np.where(matching.partner < 0, np.nan, values)


def _p_value(observed: FloatArray, null: FloatArray) -> FloatArray:
    """Share of draws, the observed one included, that reach the observed value; a draw without a pair does not."""
    reached = (null >= observed - _TIE).sum(axis=0)
    result: FloatArray = np.where(np.isnan(observed), np.nan, (1 + reached) / (1 + len(null)))
    return result
