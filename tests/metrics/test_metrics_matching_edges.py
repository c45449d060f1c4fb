"""Matching and its stand-ins at their limits: what changes places, what counts as constant, undefined or perfect."""

import numpy as np
import pytest

from driftlens import metrics as m

PROBE, SAMPLE = np.repeat([0, 1, 2], 4), np.repeat(np.arange(6), 2)


def test_whole_probes_change_places_and_samples_stay_with_theirs() -> None:
    probes = PROBE[m.null_pairings(PROBE, SAMPLE, draws=300)]
    for drawn in probes.reshape(300, 3, 4):
        assert (drawn == drawn[:, :1]).all()  # all units of a probe come from one probe
        assert sorted(drawn[:, 0]) == [0, 1, 2]
    orders = {tuple(drawn) for drawn in probes[:, ::4].tolist()}
    assert len(orders) == 6  # in every order
    within = m.null_pairings(PROBE, SAMPLE, draws=300, exchange="within_probes")
    np.testing.assert_array_equal(PROBE[within], np.broadcast_to(PROBE, within.shape))
    assert len({tuple(drawn) for drawn in within.tolist()}) == 2**3  # two samples in each of three probes
    anywhere = m.null_pairings(PROBE, SAMPLE, draws=300, exchange="samples")
    assert (PROBE[anywhere].reshape(300, 3, 4) != PROBE[anywhere][:, ::4, None]).any()


def test_one_draw_is_possible() -> None:
    assert m.null_pairings(PROBE, SAMPLE, draws=1).shape == (1, 12)
    assert m.null_pairings(PROBE[:0], SAMPLE[:0], draws=2).dtype == np.intp


@pytest.mark.parametrize("units", [4, 400])
def test_what_is_constant_does_not_depend_on_the_number_of_units(units: int) -> None:
    sign = np.resize([1.0, -1.0], units)
    other = np.stack([0.5 + 0.1 * sign, 0.5 - 0.1 * sign], axis=-1)
    for deviation, constant in ((0.5e-9, True), (2e-9, False)):
        profile = np.stack([0.5 + deviation * sign, 0.5 - deviation * sign], axis=-1)
        assert np.isnan(m.profile_similarity(profile, other)).all() == constant


def test_perfect_and_reversed_profiles_read_one_and_no_more() -> None:
    first = np.random.default_rng(0).random((400, 9, 1))
    factor = np.random.default_rng(1).uniform(0.1, 0.9, size=(400, 1, 1))
    for sign in (1, -1):
        found = m.profile_similarity(first, sign * factor * first)
        np.testing.assert_allclose(found, sign, rtol=1e-12)
        assert (np.abs(found) <= 1).all()
        pairings = np.arange(9)[None]  # a draw in which nothing changes places
        drawn = m.match_profiles(first, sign * factor * first, pairings)
        assert (np.abs(drawn.null_mean) <= 1).all()
        np.testing.assert_allclose(drawn.null_mean, sign, rtol=1e-12)


def test_undefined_similarities_count_as_nothing_in_the_search() -> None:
    similarity = np.array([[0.5, np.nan], [0.4, 0.3]])
    found = m.best_matching(similarity)  # 0.5 + 0.3, not 0.4 and what is not known
    assert found.partner.tolist() == [0, 1]
    avoided = m.best_matching(np.array([[-0.5, np.nan], [np.nan, -0.5]]))
    assert avoided.partner.tolist() == [-1, -1]  # nothing is better than -1/2, and no pair
    assert np.isnan(avoided.score).all()
    assert np.isnan(avoided.total)


def test_no_sites_have_no_matching() -> None:
    found = m.best_matching(np.zeros((0, 3, 2)))
    assert found.partner.shape == found.score.shape == (0, 3)
    assert found.total.shape == (0,)


def test_other_sites_are_spread_evenly_and_never_the_own() -> None:
    profiles = np.random.default_rng(2).dirichlet(np.ones(3), size=(2, 5, 12))
    every = [
        m.best_matching(m.profile_similarity(profiles[0], np.roll(profiles[1], step, axis=0))).total
        for step in range(1, 5)
    ]
    np.testing.assert_allclose(m.other_site_scores(*profiles), every)
    np.testing.assert_allclose(m.other_site_scores(*profiles, most=2), [every[0], every[3]])
    np.testing.assert_allclose(m.other_site_scores(*profiles[:, :2]).shape, (1, 2))
    assert m.other_site_scores(*profiles[:, :1]).shape == (0, 1)


@pytest.mark.filterwarnings("error")
def test_draws_that_all_agree_have_no_z_and_the_surplus_has_no_null() -> None:
    profiles = np.random.default_rng(3).dirichlet(np.ones(3), size=(2, 12))
    same = np.tile(np.random.default_rng(4).permutation(12), (5, 1))
    assert np.isnan(m.match_profiles(*profiles, same).z)
    found = m.match_profiles(profiles[0], profiles[1][:, :2], m.null_pairings(PROBE, SAMPLE, draws=50))
    alone = found.matching.partner < 0
    assert alone.sum() == 1
    for value in (found.expert_null_mean, found.expert_null_high, found.expert_p):
        np.testing.assert_array_equal(np.isnan(value), alone)
    other = m.null_pairings(PROBE, SAMPLE, draws=50)
    totals = [m.best_matching(m.profile_similarity(profiles[0], profiles[1][order])).total for order in other]
    wanted = (m.match_profiles(*profiles, other).matching.total - np.mean(totals)) / np.std(totals)
    np.testing.assert_allclose(m.match_profiles(*profiles, other).z, wanted, rtol=1e-8)


def test_draws_that_agree_but_for_rounding_are_ties() -> None:
    rng = np.random.default_rng(5)
    profiles = np.repeat(rng.dirichlet(np.ones(3), size=(2, 8, 40)), 3, axis=2)  # every unit three times
    orders = np.arange(120).reshape(40, 3)[None] + np.zeros((30, 1, 1), dtype=int)
    alike = rng.permuted(orders, axis=2).reshape(30, 120)  # draws exchange equal units only
    found = m.match_profiles(*profiles, alike)
    assert np.isnan(found.z).all()
    np.testing.assert_array_equal(found.p, 1.0)
    np.testing.assert_array_equal(found.expert_p, 1.0)
    assert found.overall_p == 1.0


def test_the_level_is_that_of_both_intervals() -> None:
    profiles = np.random.default_rng(6).dirichlet(np.ones(3), size=(2, 12))
    pairings = m.null_pairings(PROBE, SAMPLE, draws=200)
    wide, narrow = (m.match_profiles(*profiles, pairings, level=level) for level in (0.95, 0.1))
    assert narrow.null_high < wide.null_high
    assert (narrow.expert_null_high < wide.expert_null_high).all()


def test_an_expert_without_a_part_has_no_partner_in_any_draw() -> None:
    profiles = np.random.default_rng(7).dirichlet(np.ones(3), size=(2, 12))
    profiles[1][:, 0] = 0.2
    found = m.match_profiles(*profiles, m.null_pairings(PROBE, SAMPLE, draws=40))
    assert 0 not in found.matching.partner.tolist()
    assert (found.matching.partner < 0).sum() == 1
    assert np.isfinite(found.overall_null_mean)
