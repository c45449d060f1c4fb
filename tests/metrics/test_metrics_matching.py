"""Matching of experts between runs: exact where labels changed, and no more than chance where nothing ties them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.stats import kstest

from driftlens import metrics as m
from driftlens.errors import ConfigError, ProbeError

fast = settings(max_examples=30, deadline=None)


def shares(*shape: int, seed: int = 0) -> np.ndarray:
    """Profiles [*site, unit, expert] whose rows sum to 1, as responsibilities do."""
    return np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.8), size=shape[:-1])


def units(probes: int, samples: int, length: int = 1) -> tuple[np.ndarray, np.ndarray]:
    sample = np.repeat(np.arange(probes * samples), length)
    return sample // samples, sample


def test_relabelled_experts_are_found_exactly_at_every_site() -> None:
    first = shares(3, 2, 40, 5)
    rng = np.random.default_rng(1)
    order = np.array([[rng.permutation(5) for _ in range(2)] for _ in range(3)])
    second = np.take_along_axis(first, order[:, :, None, :], axis=-1)
    found = m.match_profiles(first, second, m.null_pairings(*units(4, 10), draws=99))
    np.testing.assert_array_equal(found.matching.partner, order.argsort(axis=-1))
    np.testing.assert_allclose(found.matching.score, 1.0)
    np.testing.assert_allclose([found.p.max(), found.expert_p.max(), found.overall_p], 0.01)
    assert found.z.min() > 5
    assert (found.null_high < 1).all()


@pytest.mark.parametrize(("left", "right"), [(2, 2), (3, 3), (4, 4), (4, 2), (2, 4)])
def test_brute_force_over_all_pairings(left: int, right: int) -> None:
    similarity = np.random.default_rng(left + 10 * right).normal(size=(20, left, right))
    found = m.best_matching(similarity)
    size = max(left, right)
    for site, values in enumerate(similarity):
        padded = np.zeros((size, size))
        padded[:left, :right] = values
        best = max(itertools.permutations(range(size)), key=lambda p: sum(padded[e, f] for e, f in enumerate(p)))
        expected = [f if f < right else -1 for f in best[:left]]
        assert found.partner[site].tolist() == expected
        pairs = [values[e, f] for e, f in enumerate(expected) if f >= 0]
        assert found.total[site] == pytest.approx(np.mean(pairs))
        assert np.isnan(found.score[site][np.array(expected) < 0]).all()


def test_similarity_is_numpys_correlation() -> None:
    first, second = shares(2, 30, 3), shares(2, 30, 4, seed=1)
    found = m.profile_similarity(first, second)
    assert found.shape == (2, 3, 4)
    for site in range(2):
        whole = np.corrcoef(first[site].T, second[site].T)
        np.testing.assert_allclose(found[site], whole[:3, 3:], atol=1e-12)


def test_the_null_is_the_same_search_on_stand_ins() -> None:
    first, second = shares(2, 30, 3), shares(2, 30, 3, seed=1)
    probe = np.repeat([0, 1, 2], [8, 10, 12])
    sample = np.repeat(np.arange(12), [2, 3, 3, 2, 2, 2, 2, 2, 3, 3, 3, 3])
    pairings = m.null_pairings(probe, sample, draws=40, seed=3)
    assert any(len(set(order)) < 30 for order in pairings)  # lengths differ, so stand-ins repeat units
    found = m.match_profiles(first, second, pairings)
    for site in range(2):
        totals, scores = [], []
        for order in pairings:
            values = np.corrcoef(first[site].T, second[site][order].T)[:3, 3:]
            rows, columns = linear_sum_assignment(-values)
            scores.append(values[rows, columns])
            totals.append(values[rows, columns].mean())
        observed = found.matching.total[site]
        assert found.null_mean[site] == pytest.approx(np.mean(totals))
        assert found.p[site] == (1 + sum(t >= observed for t in totals)) / 41
        assert found.z[site] == pytest.approx((observed - np.mean(totals)) / np.std(totals))
        np.testing.assert_allclose(found.expert_null_mean[site], np.mean(scores, axis=0))
        np.testing.assert_allclose(found.expert_null_high[site], np.quantile(scores, 0.975, axis=0))
        own = found.matching.score[site]
        np.testing.assert_allclose(found.expert_p[site], (1 + (np.array(scores) >= own).sum(axis=0)) / 41)


def test_independent_profiles_are_as_often_significant_as_chance_says() -> None:
    first, second = shares(200, 60, 4), shares(200, 60, 4, seed=1)
    found = m.match_profiles(first, second, m.null_pairings(*units(6, 10), draws=99))
    assert kstest(found.p, "uniform").pvalue > 0.05
    assert np.mean(found.p <= 0.05) < 0.1
    assert abs(found.overall - found.overall_null_mean) < 0.01
    assert (found.matching.total > 0).all()  # the best of 24 pairings always looks like something


def test_experts_that_took_tasks_at_random_are_not_called_counterparts() -> None:
    rng = np.random.default_rng(2)
    probe, sample = units(6, 8)

    def clustered() -> np.ndarray:  # every run gives each task to an expert of its own choice
        taste = 3 * rng.normal(size=(150, 6, 4))[:, probe] + 0.5 * rng.normal(size=(150, 48, 4))
        weights = np.exp(taste)
        return weights / weights.sum(axis=-1, keepdims=True)

    first, second = clustered(), clustered()
    share = {
        exchange: np.mean(
            m.match_profiles(first, second, m.null_pairings(probe, sample, draws=99, exchange=exchange)).p <= 0.05
        )
        for exchange in ("probes", "samples", "within_probes")
    }
    assert share["probes"] < 0.1
    assert share["within_probes"] < 0.1
    assert share["samples"] > 0.8


def test_tokens_of_a_sample_change_places_together() -> None:
    rng = np.random.default_rng(4)
    probe, sample = units(4, 6, length=5)

    def sticky() -> np.ndarray:
        weights = np.exp(2 * rng.normal(size=(150, 24, 3)))[:, sample]
        return weights / weights.sum(axis=-1, keepdims=True)

    first, second = sticky(), sticky()
    honest = m.match_profiles(first, second, m.null_pairings(probe, sample, draws=99))
    naive = m.match_profiles(first, second, m.null_pairings(probe, np.arange(120), draws=99, exchange="samples"))
    assert np.mean(honest.p <= 0.05) < 0.1
    assert np.mean(naive.p <= 0.05) > 0.5


def test_other_sites_expose_habits_that_no_change_of_places_respects() -> None:
    rng = np.random.default_rng(5)
    probe, sample = units(4, 6, length=10)
    word = rng.integers(0, 4, 240)  # every run treats a word alike wherever it stands

    def habitual() -> np.ndarray:
        weights = np.exp(2 * rng.normal(size=(40, 4, 3)))[:, word]
        return weights / weights.sum(axis=-1, keepdims=True)

    first, second = habitual(), habitual()
    found = m.match_profiles(first, second, m.null_pairings(probe, sample, draws=99))
    others = m.other_site_scores(first, second)
    other_p = (1 + (others >= found.matching.total).sum(axis=0)) / (1 + len(others))
    assert others.shape == (39, 40)
    assert np.mean(found.p <= 0.05) > 0.8
    assert np.mean(other_p <= 0.05) < 0.15
    assert m.other_site_scores(first[:1], second[:1]).shape == (0, 1)
    assert m.other_site_scores(first, second, most=5).shape == (5, 40)
    expected = m.best_matching(m.profile_similarity(first, np.roll(second, 1, axis=0))).total
    np.testing.assert_allclose(others[0], expected)


@pytest.mark.parametrize("exchange", ["probes", "samples", "within_probes"])
def test_stand_ins_come_from_where_they_should(exchange: str) -> None:
    probe, sample = units(5, 4, length=3)
    pairings = m.null_pairings(probe, sample, draws=50, seed=1, exchange=exchange)  # type: ignore[arg-type]
    position = np.tile(np.arange(3), 20)
    mixed = 0
    for order in pairings:
        assert sorted(order) == list(range(60))
        np.testing.assert_array_equal(position[order], position)
        assert all(len(set(sample[order][sample == number])) == 1 for number in range(20))
        origins = [set(probe[order][probe == number]) for number in range(5)]
        mixed += any(len(origin) > 1 for origin in origins)
        if exchange == "within_probes":
            np.testing.assert_array_equal(probe[order], probe)
    assert (mixed > 0) == (exchange == "samples")
    assert len({tuple(order) for order in pairings}) == 50
    again = m.null_pairings(probe, sample, draws=50, seed=1, exchange=exchange)  # type: ignore[arg-type]
    np.testing.assert_array_equal(pairings, again)


def test_stand_ins_of_another_length_keep_first_and_last() -> None:
    probe, sample = np.zeros(9, dtype=int), np.repeat([0, 1, 2], [1, 3, 5])
    seen = {tuple(order) for order in m.null_pairings(probe, sample, draws=200)}
    assert len(seen) == 6
    swapped = next(order for order in seen if order[1:4] == (4, 6, 8))
    assert swapped[4:] in ((1, 2, 2, 3, 3), (0, 0, 0, 0, 0))
    assert all(order[1] in (0, 1, 4) and order[3] in (0, 3, 8) for order in seen)


def test_an_expert_without_a_part_of_its_own_has_no_partner() -> None:
    first, second = shares(2, 20, 3), shares(2, 20, 3, seed=1)
    first[0, :, 1] = 0.25
    found = m.match_profiles(first, second, m.null_pairings(*units(4, 5), draws=19))
    assert found.matching.partner[0, 1] == -1
    assert np.isnan([found.matching.score[0, 1], found.expert_p[0, 1], found.expert_null_mean[0, 1]]).all()
    assert (found.matching.partner[1] >= 0).all()
    assert found.matching.total[0] == pytest.approx(np.nanmean(found.matching.score[0]))
    uniform = m.match_profiles(np.full((1, 20, 3), 1 / 3), second[:1], m.null_pairings(*units(4, 5), draws=19))
    assert (uniform.matching.partner == -1).all()
    assert np.isnan([uniform.matching.total[0], uniform.p[0], uniform.z[0], uniform.overall_p]).all()


def test_surplus_experts_stay_alone() -> None:
    first = shares(1, 30, 5)
    found = m.match_profiles(first, first[..., [3, 1]], m.null_pairings(*units(5, 6), draws=19))
    assert found.matching.partner[0].tolist() == [-1, 1, -1, 0, -1]
    assert found.matching.total[0] == pytest.approx(1)


def test_undefined_units_add_nothing() -> None:
    first, second = shares(1, 30, 3), shares(1, 30, 3, seed=1)
    gap = first.copy()
    gap[0, :4] = np.nan
    filled = first.copy()
    filled[0, :4] = first[0, 4:].mean(axis=0)  # at the mean of the others
    np.testing.assert_allclose(m.profile_similarity(gap, second), m.profile_similarity(filled, second))


@fast
@given(seed=st.integers(0, 10_000), experts=st.integers(2, 5))
def test_labels_scales_and_order_of_units_do_not_matter(seed: int, experts: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = shares(2, 24, experts, seed=seed), shares(2, 24, experts, seed=seed + 1)
    base = m.best_matching(m.profile_similarity(first, second))
    order = rng.permutation(experts)
    renamed = m.best_matching(m.profile_similarity(first, second[..., order]))
    np.testing.assert_allclose(renamed.score, base.score)
    np.testing.assert_array_equal(order[renamed.partner], base.partner)
    stretched = m.profile_similarity(first * rng.uniform(0.1, 9, experts) + rng.normal(size=experts), second)
    np.testing.assert_allclose(stretched, m.profile_similarity(first, second), atol=1e-10)
    moved = rng.permutation(24)
    np.testing.assert_allclose(
        m.profile_similarity(first[:, moved], second[:, moved]), m.profile_similarity(first, second), atol=1e-12
    )
    np.testing.assert_allclose(m.best_matching(m.profile_similarity(second, first)).total, base.total)


@fast
@given(seed=st.integers(0, 10_000))
def test_p_values_lie_between_one_draw_and_one(seed: int) -> None:
    first, second = shares(3, 12, 3, seed=seed), shares(3, 12, 3, seed=seed + 1)
    found = m.match_profiles(first, second, m.null_pairings(*units(3, 4), draws=9, seed=seed))
    for p in (found.p, found.expert_p, np.array(found.overall_p)):
        assert (p >= 0.1).all()
        assert (p <= 1).all()
    assert (np.abs(found.matching.score) <= 1).all()


def test_requests_that_make_no_sense_are_refused() -> None:
    probe, sample = units(2, 3)
    with pytest.raises(ConfigError, match="Unknown exchange 'tokens'; choose one of probes, samples"):
        m.null_pairings(probe, sample, exchange="tokens")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="null of 0 draws"):
        m.null_pairings(probe, sample, draws=0)
    with pytest.raises(ProbeError, match="one entry per unit"):
        m.null_pairings(probe, sample[1:])
    with pytest.raises(ProbeError, match="have 6 and 5 units"):
        m.profile_similarity(shares(6, 3), shares(5, 3))
    with pytest.raises(ProbeError, match=r"shape \(1, 6\) for 5 units"):
        m.match_profiles(shares(5, 3), shares(5, 3), np.arange(6)[None])
    with pytest.raises(ConfigError, match="units, experts"):
        m.profile_similarity(np.ones(3), np.ones(3))
    with pytest.raises(ConfigError, match="at least one each"):
        m.best_matching(np.zeros((2, 0, 3)))
    assert m.null_pairings(probe[:0], sample[:0], draws=3).shape == (3, 0)
