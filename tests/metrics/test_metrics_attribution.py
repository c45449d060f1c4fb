"""Attribution of forgetting to router and experts, and Shapley values from permutations: metrics.md section 4a."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from driftlens import metrics as m
from driftlens.errors import ConfigError

fast = settings(max_examples=60, deadline=None)
scores = arrays(np.float64, (4, 5), elements=st.floats(-20, 20, width=32))


def game(players: int, seed: int = 0, samples: tuple[int, ...] = ()) -> dict[frozenset[int], np.ndarray]:
    """A random score for every coalition."""
    generator = np.random.default_rng(seed)
    subsets = itertools.chain.from_iterable(itertools.combinations(range(players), k) for k in range(players + 1))
    return {frozenset(subset): generator.normal(size=samples) for subset in subsets}


def along(orders: np.ndarray, value: dict[frozenset[int], np.ndarray]) -> np.ndarray:
    """Scores [..., P, K+1] of the growing coalitions of each order."""
    rows = [[value[frozenset(order[:k].tolist())] for k in range(orders.shape[1] + 1)] for order in orders]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def exact_shapley(players: int, value: dict[frozenset[int], np.ndarray]) -> np.ndarray:
    """The definition: a weighted sum over the coalitions without the player."""
    found = []
    for player in range(players):
        total = 0.0
        for coalition, score in value.items():
            if player not in coalition:
                size = len(coalition)
                weight = math.factorial(size) * math.factorial(players - size - 1) / math.factorial(players)
                total = total + weight * (value[coalition | {player}] - score)
        found.append(total)
    return np.stack(found, axis=-1)


def test_first_letter_is_the_router_and_second_the_experts() -> None:
    # only the experts moved: whatever the router, the anchor's experts give .9 and the current ones .2
    found = m.forgetting_attribution(s_aa=0.9, s_ca=0.9, s_ac=0.2, s_cc=0.2)
    np.testing.assert_allclose(found, (0.0, 0.7, 0.0), atol=1e-15)
    # only the router moved
    found = m.forgetting_attribution(s_aa=0.9, s_ca=0.2, s_ac=0.9, s_cc=0.2)
    np.testing.assert_allclose(found, (0.7, 0.0, 0.0), atol=1e-15)


def test_closed_forms_of_joint_losses() -> None:
    # either change alone destroys everything: half each, and the interaction says that they overlap
    np.testing.assert_allclose(m.forgetting_attribution(1, 0, 0, 0), (0.5, 0.5, 1.0))
    # only the two together destroy it
    np.testing.assert_allclose(m.forgetting_attribution(1, 1, 1, 0), (0.5, 0.5, -1.0))
    # two losses that add up
    np.testing.assert_allclose(m.forgetting_attribution(1.0, 0.75, 0.5, 0.25), (0.25, 0.5, 0.0))
    # nothing forgotten, though each part alone would hurt: they moved together
    np.testing.assert_allclose(m.forgetting_attribution(1, 0, 0.5, 1), (0.25, -0.25, 1.5))
    np.testing.assert_allclose(m.forgetting_attribution(0.4, 0.4, 0.4, 0.4), (0.0, 0.0, 0.0))


@fast
@given(scores)
def test_parts_sum_to_the_forgetting(table: np.ndarray) -> None:
    aa, ca, ac, cc = table
    router, experts, interaction = m.forgetting_attribution(aa, ca, ac, cc)
    np.testing.assert_allclose(router + experts, aa - cc, atol=1e-13)
    np.testing.assert_allclose(interaction, aa - ca - ac + cc, atol=1e-13)
    # each part is its effect alone, less half of what the two share
    np.testing.assert_allclose(router, (aa - ca) - interaction / 2, atol=1e-13)
    np.testing.assert_allclose(experts, (aa - ac) - interaction / 2, atol=1e-13)


@fast
@given(scores)
def test_exchanging_router_and_experts_exchanges_their_parts(table: np.ndarray) -> None:
    aa, ca, ac, cc = table
    router, experts, interaction = m.forgetting_attribution(aa, ca, ac, cc)
    swapped = m.forgetting_attribution(aa, ac, ca, cc)
    np.testing.assert_array_equal(swapped.phi_router, experts)
    np.testing.assert_array_equal(swapped.phi_experts, router)
    np.testing.assert_allclose(swapped.interaction, interaction, atol=1e-13)
    # looked at from the current checkpoint, everything has the other sign
    back = m.forgetting_attribution(cc, ac, ca, aa)
    np.testing.assert_allclose(back.phi_router, -router, atol=1e-13)
    np.testing.assert_allclose(back.phi_experts, -experts, atol=1e-13)
    np.testing.assert_allclose(back.interaction, interaction, atol=1e-13)


@fast
@given(scores)
def test_parts_of_samples_average_to_the_parts_of_the_average(table: np.ndarray) -> None:
    of_samples = m.forgetting_attribution(*table)
    of_means = m.forgetting_attribution(*table.mean(axis=1))
    for part, whole in zip(of_samples, of_means, strict=True):
        np.testing.assert_allclose(part.mean(), whole, atol=1e-12)


def test_scores_broadcast_and_integers_are_no_integers() -> None:
    router, experts, interaction = m.forgetting_attribution(np.ones((3, 1)), np.zeros(2), 1, [[0, 1]])
    assert router.shape == experts.shape == interaction.shape == (3, 2)
    assert router.dtype == np.float64
    np.testing.assert_array_equal(router, [[1.0, 0.5]] * 3)
    flags = np.array([True, False])
    np.testing.assert_array_equal(m.forgetting_attribution(flags, flags, False, False).phi_experts, [1.0, 0.0])


def test_two_players_of_permutation_shapley_are_router_and_experts() -> None:
    aa, ca, ac, cc = np.random.default_rng(0).normal(size=(4, 6))
    value = {frozenset(): cc, frozenset({0}): ac, frozenset({1}): ca, frozenset({0, 1}): aa}
    orders = m.player_orders(2, 2)
    found = m.permutation_shapley(orders, along(orders, value))
    router, experts, _ = m.forgetting_attribution(aa, ca, ac, cc)
    np.testing.assert_allclose(found.value, np.stack([router, experts], axis=-1), atol=1e-14)


def test_intervals_hold_the_parts_and_draw_samples_whole() -> None:
    table = np.random.default_rng(1).normal(size=(4, 40)) + np.array([[2.0], [1.0], [0.5], [0.0]])
    found = m.bootstrap_attribution(*table, draws=300, seed=3)
    parts = m.forgetting_attribution(*table)
    for name in ("phi_router", "phi_experts", "interaction"):
        value, low, high = getattr(found, name)
        np.testing.assert_allclose(value, getattr(parts, name).mean(), rtol=1e-12)
        assert low < value < high
        expected = m.bootstrap_mean(getattr(parts, name), draws=300, seed=3)
        np.testing.assert_allclose((low, high), (expected.low, expected.high))
    np.testing.assert_allclose(found.phi_router.value + found.phi_experts.value, found.forgetting.value, rtol=1e-12)
    # the same samples, shifted by what all four scores share: nothing changes
    shift = 10 * np.random.default_rng(2).normal(size=40)
    moved = m.bootstrap_attribution(*(table + shift), draws=300, seed=3)
    np.testing.assert_allclose(moved.phi_router, found.phi_router, atol=1e-12)


def test_interval_level_seed_and_leading_axes() -> None:
    table = np.random.default_rng(1).normal(size=(4, 3, 25))
    wide, narrow = (m.bootstrap_attribution(*table, level=level, draws=200).phi_router for level in (0.95, 0.5))
    assert wide.value.shape == (3,)
    assert (wide.low < narrow.low).all()
    assert (narrow.high < wide.high).all()
    other = m.bootstrap_attribution(*table, draws=200, seed=1).phi_router
    assert (other.low != wide.low).all()
    single = m.bootstrap_attribution(*table[:, 0, :1])
    assert np.isnan([single.phi_router.low, single.phi_router.high]).all()


def test_a_sample_that_lacks_one_score_counts_for_no_part() -> None:
    table = np.random.default_rng(1).normal(size=(4, 10))
    for row in range(4):
        broken = table.copy()
        broken[row, 4] = np.nan
        found, kept = (m.bootstrap_attribution(*t, draws=50) for t in (broken, np.delete(table, 4, axis=1)))
        for part, expected in zip(found, kept, strict=True):
            np.testing.assert_allclose(part.value, expected.value)


def test_orders_are_seeded_permutations_in_mirrored_pairs() -> None:
    orders = m.player_orders(5, 40, seed=1)
    assert orders.shape == (40, 5)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(5), (40, 1)))
    np.testing.assert_array_equal(orders[1::2], orders[::2, ::-1])
    np.testing.assert_array_equal(orders, m.player_orders(5, 40, seed=1))
    assert (orders != m.player_orders(5, 40, seed=2)).any()
    assert len({tuple(row) for row in orders[::2].tolist()}) > 10
    free = m.player_orders(5, 7, antithetic=False)
    assert free.shape == (7, 5)
    assert not np.array_equal(free[1], free[0, ::-1])
    # every player is as often first as any other, to chance
    first = m.player_orders(4, 4000, antithetic=False)[:, 0]
    np.testing.assert_allclose(np.bincount(first) / 4000, 0.25, atol=0.04)


@pytest.mark.parametrize(("players", "permutations", "antithetic"), [(0, 2, True), (2, 0, True), (3, 5, True)])
def test_impossible_orders_are_refused(players: int, permutations: int, antithetic: bool) -> None:
    with pytest.raises(ConfigError, match=f"{permutations} orders of {players} players.*even number"):
        m.player_orders(players, permutations, antithetic=antithetic)


def test_all_permutations_give_the_definition() -> None:
    value = game(4, samples=(3,))
    orders = np.array(list(itertools.permutations(range(4))))
    found = m.permutation_shapley(orders, along(orders, value), antithetic=False)
    np.testing.assert_allclose(found.value, exact_shapley(4, value), atol=1e-13)


def test_closed_form_games() -> None:
    orders = m.player_orders(3, 8, seed=4)
    # gains that add up: each player gets its own, without error
    gains = np.array([0.5, -2.0, 3.0])
    additive = {c: np.array(sum(gains[i] for i in c)) for c in game(3)}
    found = m.permutation_shapley(orders, along(orders, additive))
    np.testing.assert_allclose(found.value, gains, atol=1e-15)
    np.testing.assert_allclose(found.error, 0.0, atol=1e-15)
    # players 0 and 2 are worth 1 together only: half each by any mirrored pair, and nothing for player 1
    pair = {c: np.array(float({0, 2} <= c)) for c in game(3)}
    found = m.permutation_shapley(orders, along(orders, pair))
    np.testing.assert_allclose(found.value, [0.5, 0.0, 0.5], atol=1e-15)
    np.testing.assert_allclose(found.error, 0.0, atol=1e-15)
    # without pairing the same orders look as uncertain as they are
    assert m.permutation_shapley(orders, along(orders, pair), antithetic=False).error[0] > 0.1


@fast
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10_000))
def test_every_permutation_pays_out_everything(players: int, pairs: int, seed: int) -> None:
    value = game(players, seed, samples=(2,))
    orders = m.player_orders(players, 2 * pairs, seed)
    along_orders = along(orders, value)
    lost = value[frozenset(range(players))] - value[frozenset()]
    np.testing.assert_allclose(m.permutation_shapley(orders, along_orders).value.sum(axis=-1), lost, atol=1e-12)
    for order, row in zip(orders, np.moveaxis(along_orders, -2, 0), strict=True):
        single = m.permutation_shapley(order[None], row[..., None, :], antithetic=False)
        np.testing.assert_allclose(single.value.sum(axis=-1), lost, atol=1e-12)


def test_standard_error_is_that_of_the_pairs() -> None:
    value = game(5, seed=7)
    orders = m.player_orders(5, 12, seed=0)
    found = m.permutation_shapley(orders, along(orders, value))
    pairs = [m.permutation_shapley(orders[i : i + 2], along(orders[i : i + 2], value)).value for i in range(0, 12, 2)]
    np.testing.assert_allclose(found.value, np.mean(pairs, axis=0), atol=1e-14)
    np.testing.assert_allclose(found.error, np.std(pairs, axis=0, ddof=1) / np.sqrt(6), rtol=1e-10)
    assert np.isnan(m.permutation_shapley(orders[:2], along(orders[:2], value)).error).all()


def test_standard_error_covers_the_truth() -> None:
    value = game(5, seed=11)
    truth, inside = exact_shapley(5, value), []
    for seed in range(60):
        orders = m.player_orders(5, 40, seed=seed)
        found = m.permutation_shapley(orders, along(orders, value))
        inside.append(np.abs(found.value - truth) < 2 * found.error)
    # two standard errors hold about 95 %; 300 trials
    assert 0.88 < np.mean(inside) <= 1.0


@pytest.mark.parametrize(
    ("orders", "shape", "antithetic", "message"),
    [
        ([[0, 0]], (1, 3), False, "permutation of 0..K-1"),
        ([[1, 2]], (1, 3), False, "permutation of 0..K-1"),
        ([0, 1], (1, 3), False, "permutation of 0..K-1"),
        ([[0, 1], [1, 0]], (2, 2), True, r"need \[..., 2, 3\]"),
        ([[0, 1], [1, 0]], (1, 3), True, r"need \[..., 2, 3\]"),
        ([[0, 1]], (1, 3), True, "1 orders cannot be antithetic pairs"),
        (np.zeros((0, 2), int), (0, 3), False, "0 orders cannot"),
    ],
)
def test_permutations_that_do_not_fit_are_refused(
    orders: list[list[int]], shape: tuple[int, ...], antithetic: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        m.permutation_shapley(np.array(orders), np.zeros(shape), antithetic=antithetic)
