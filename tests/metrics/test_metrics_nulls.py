"""Null distributions: exact moments, uniform p-values where there is nothing, small ones where there is something."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftlens import metrics as m
from driftlens.errors import ConfigError


def gates(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.5), size=shape[:-1])


def bases(seed: int, draws: int, rank: int, dim: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(draws, dim, rank)))[0].swapaxes(-1, -2)


def test_a_value_is_placed_by_hand() -> None:
    null = m.null_test([2.0, 5.0, np.nan], np.array([[1.0, 2.0, 3.0, 4.0]] * 3).T)
    np.testing.assert_allclose(null.mean, [2.5, 2.5, np.nan])
    np.testing.assert_allclose(null.spread, [np.sqrt(5 / 3)] * 2 + [np.nan])
    np.testing.assert_allclose(null.percentile, [1.5 / 4, 1.0, np.nan])
    np.testing.assert_allclose(null.p_value, [3 / 5, 5 / 5, np.nan])
    np.testing.assert_allclose(null.low[:2], np.quantile([1, 2, 3, 4], 0.025))
    np.testing.assert_allclose(null.high[:2], np.quantile([1, 2, 3, 4], 0.975))
    high = m.null_test([2.0, 5.0], np.array([[1.0, 2.0, 3.0, 4.0]] * 2).T, "high")
    np.testing.assert_allclose(high.p_value, [4 / 5, 1 / 5])
    np.testing.assert_allclose(high.percentile, null.percentile[:2])


def test_undefined_draws_are_left_out_and_one_draw_has_no_spread() -> None:
    null = m.null_test(2.0, [np.nan, 1.0, 3.0])
    assert (null.mean, null.p_value, null.percentile) == (2.0, 2 / 3, 0.5)
    assert np.isnan(m.null_test(2.0, [1.0]).spread)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_the_exact_mean_is_the_chance_level_and_a_line_has_the_beta_distribution(r0: int, r1: int, dim: int) -> None:
    dim = max(dim, r0, r1)
    found = m.random_overlap(r0, r1, dim)
    pair = m.pair_from_factors(np.eye(dim)[:r0], np.eye(dim)[:r1])
    assert found.mean == pytest.approx(float(pair.chance()))
    np.testing.assert_allclose(m.random_overlap(r1, r0, dim), found)
    if r0 == r1 == 1 and dim > 1:  # cos^2 of a random angle is Beta(1/2, (d - 1)/2)
        a, b = 0.5, (dim - 1) / 2
        assert found.spread**2 == pytest.approx(a * b / ((a + b) ** 2 * (a + b + 1)))
    if max(r0, r1) == dim:  # the whole space: no other overlap than 1
        assert (found.mean, found.spread) == (1.0, pytest.approx(0.0))


@pytest.mark.parametrize(("r0", "r1", "dim"), [(1, 1, 6), (2, 5, 12), (3, 3, 9), (4, 3, 6), (5, 5, 6)])
def test_drawn_overlaps_have_the_exact_moments_and_the_distribution_of_real_subspaces(
    r0: int, r1: int, dim: int
) -> None:
    draws = 4000
    exact = m.random_overlap(r0, r1, dim)
    real = m.subspace_overlap(bases(0, draws, r0, dim), bases(1, draws, r1, dim))
    null = m.random_overlap_null(real, r0, r1, dim, draws=draws, seed=2)
    error = float(exact.spread) / np.sqrt(draws)
    assert null.mean[0] == pytest.approx(float(exact.mean), abs=4 * error)
    assert real.mean() == pytest.approx(float(exact.mean), abs=4 * error)
    assert null.spread[0] == pytest.approx(float(exact.spread), rel=0.06)
    assert real.std() == pytest.approx(float(exact.spread), rel=0.06)
    # p-values of random subspaces are uniform
    grid = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(null.p_value, grid), grid, atol=0.05)


def test_an_overlap_above_chance_has_a_small_p_value() -> None:
    A0 = bases(0, 1, 4, 64)[0]
    A1 = np.concatenate([A0[:2], bases(1, 1, 2, 64)[0]])
    null = m.random_overlap_null(m.subspace_overlap(A0, A1), 4, 4, 64)
    assert null.p_value == pytest.approx(1 / 1001)
    assert null.percentile == 1.0
    assert (null.observed - null.mean) / m.random_overlap(4, 4, 64).spread > 10


def test_identical_routers_stay_far_below_the_null_and_unrelated_ones_lie_in_it() -> None:
    gate0 = gates(0, 2, 60, 4)
    noisy = 0.9 * gate0 + 0.1 * gates(1, 2, 60, 4)
    related = m.permuted_tokens(lambda gate: m.router_js(gate0, gate), noisy, draws=99)
    np.testing.assert_allclose(related.p_value, 0.01)
    assert (related.percentile == 0).all()
    assert (related.observed < 0.2 * related.mean).all()
    unrelated = [
        m.permuted_tokens(lambda gate: m.router_js(gate0, gate), gates(seed, 2, 60, 4), draws=19, seed=seed).p_value
        for seed in range(2, 42)
    ]
    assert 0.3 < np.mean(unrelated) < 0.75  # uniform on 0..1 without the 0


def test_the_mean_of_the_token_null_is_the_mean_over_all_pairs() -> None:
    gate0, gate1 = gates(0, 8, 3), gates(1, 8, 3)
    null = m.permuted_tokens(lambda gate: m.router_js(gate0, gate), gate1, draws=3000)
    assert null.mean == pytest.approx(float(m.js_divergence(gate0[:, None], gate1).mean()), abs=0.005)


def test_the_token_null_serves_similarities_of_outputs() -> None:
    rng = np.random.default_rng(0)
    z0 = rng.normal(size=(20, 30, 2, 3))  # at 20 sites expert 0 stays and expert 1 becomes unrelated
    B = rng.normal(size=(20, 2, 5, 3))
    z1 = np.stack([z0[..., 0, :], rng.normal(size=(20, 30, 3))], axis=-2)
    null = m.permuted_tokens(lambda z: m.cka(z0, z, B, B), z1, axis=-3, draws=99, tail="high")
    np.testing.assert_allclose(null.p_value[:, 0], 0.01)
    assert 0.3 < null.p_value[:, 1].mean() < 0.7
    np.testing.assert_allclose(null.mean, 0.0, atol=0.03)


def test_relabelled_experts_are_all_relabellings() -> None:
    gate0, gate1 = gates(3, 5, 3), gates(4, 5, 3)
    null = m.permuted_experts(lambda gate: m.router_js(gate0, gate), gate1, draws=2000)
    every = [float(m.router_js(gate0, gate1[:, list(order)])) for order in itertools.permutations(range(3))]
    assert null.mean == pytest.approx(np.mean(every), abs=0.02)
    assert null.p_value == pytest.approx(np.mean(np.array(every) <= every[0] + 1e-12), abs=0.04)


def test_experts_keep_their_identity_at_more_than_chance() -> None:
    rng = np.random.default_rng(0)
    A0 = rng.normal(size=(6, 4, 2, 20))
    A1 = A0 + 0.1 * rng.normal(size=A0.shape)

    def overlap(A: np.ndarray) -> np.ndarray:
        return m.subspace_overlap(A0, A).mean(axis=(-1, -2))

    kept = m.permuted_experts(overlap, A1, axis=-3, site_axes=1, draws=199, tail="high")
    assert kept.p_value == pytest.approx(1 / 200)
    # independent relabelling at six sites: a quarter of the experts keep their place, 0.25 * 1 + 0.75 * chance
    assert kept.mean == pytest.approx(0.25 * float(kept.observed) + 0.75 * 0.1, abs=0.03)
    lost = m.permuted_experts(overlap, A1[:, [1, 2, 3, 0]], axis=-3, site_axes=1, draws=199, tail="high")
    assert lost.p_value > 0.9


def test_sites_are_relabelled_independently_and_tokens_together() -> None:
    seen: list[np.ndarray] = []

    def watch(values: np.ndarray) -> np.ndarray:
        seen.append(values)
        return np.zeros(())

    m.permuted_experts(watch, np.tile(np.arange(5.0), (40, 3, 1)), site_axes=1, draws=1)
    assert (seen[1] == seen[1][:, :1]).all()  # one relabelling for all tokens of a site
    assert len({tuple(row) for row in seen[1][:, 0]}) > 20
    assert (np.sort(seen[1], axis=-1) == np.arange(5.0)).all()
    seen.clear()
    m.permuted_tokens(watch, np.tile(np.arange(50.0)[:, None], (3, 1, 2)), draws=1)
    assert (seen[1] == seen[1][:1]).all()
    assert not (seen[1][0, :, 0] == np.arange(50)).all()


def test_seeds_decide() -> None:
    gate0, gate1 = gates(0, 20, 4), gates(1, 20, 4)

    def run(seed: int) -> float:
        return float(m.permuted_tokens(lambda gate: m.router_js(gate0, gate), gate1, draws=10, seed=seed).mean)

    assert run(0) == run(0) != run(1)
    first, second, other = (m.random_overlap_null(0.5, 2, 2, 6, draws=10, seed=seed).mean for seed in (0, 0, 1))
    assert first == second != other


def test_unless_told_otherwise_drift_is_asked_whether_it_is_small_in_200_draws_of_seed_0() -> None:
    gate0, gate1 = gates(0, 9, 3), gates(1, 9, 3)

    def drift(gate: np.ndarray) -> np.ndarray:
        return m.router_js(gate0, gate)

    for null in (m.permuted_tokens, m.permuted_experts):
        assert null(drift, gate1) == null(drift, gate1, draws=200, seed=0, tail="low")
        assert null(drift, gate1) != null(drift, gate1, draws=199)
    assert m.random_overlap_null(0.3, 2, 2, 9) == m.random_overlap_null(0.3, 2, 2, 9, draws=1000, seed=0)
    assert m.null_test(1.0, [0.0, 2.0, 3.0]) == m.null_test(1.0, [0.0, 2.0, 3.0], "low")


def test_impossible_requests_are_named() -> None:
    with pytest.raises(ConfigError, match="at least 1 is needed"):
        m.permuted_tokens(lambda gate: gate, gates(0, 4, 2), draws=0)
    with pytest.raises(ConfigError, match="count the expert axis"):
        m.permuted_experts(lambda gate: gate, gates(0, 4, 2), axis=1)
    with pytest.raises(ConfigError, match="count the expert axis"):
        m.permuted_experts(lambda gate: gate, gates(0, 4, 2), axis=-2, site_axes=1)
    with pytest.raises(ConfigError, match="1 <= rank <= dimension"):
        m.random_overlap(3, 1, 2)
    with pytest.raises(ConfigError, match="1 <= rank <= dimension"):
        m.random_overlap_null(0.5, 0, 1, 2)
    with pytest.raises(ConfigError, match='expected "low"'):
        m.null_test(1.0, [1.0], "left")  # type: ignore[arg-type]  # a caller without types
    with pytest.raises(ConfigError, match="D >= 1"):
        m.null_test([1.0], [1.0])


def test_few_draws_and_large_values_are_placed_too() -> None:
    one = m.null_test(2.0, [1.0])
    assert (one.p_value, m.null_test(2.0, [1.0], "high").p_value) == (1.0, 0.5)
    assert m.null_test(2.0, [1.0, 4.0]).spread == pytest.approx(np.sqrt(4.5))
    ties = m.null_test(1e6, [1e6 + 1e-7, 1e6 - 1e-7], "high")  # equal to rounding, whatever their size
    assert (ties.percentile, ties.p_value) == (0.5, 1.0)


def test_the_whole_space_overlaps_with_everything_and_its_neighbour_is_seeded() -> None:
    whole = m.random_overlap_null([1.0, 1.0], 2, 3, 3, draws=7)
    np.testing.assert_array_equal(whole.mean, 1.0)
    np.testing.assert_array_equal(whole.spread, 0.0)
    np.testing.assert_array_equal(whole.p_value, 1.0)
    first, second = (m.random_overlap_null(0.9, 4, 4, 5, draws=20, seed=3) for _ in range(2))
    assert first == second
