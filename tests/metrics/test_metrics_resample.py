"""Two-stage means and bootstrap intervals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap as scipy_bootstrap

from driftlens import metrics as m
from driftlens.errors import ConfigError, ProbeError


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 20), st.booleans())
def test_sample_means_match_a_loop(seed: int, tokens: int, holes: bool) -> None:
    generator = np.random.default_rng(seed)
    values, sample = generator.normal(size=(2, tokens)), generator.integers(-2, 5, tokens)
    if holes:
        values[generator.random(values.shape) < 0.4] = np.nan
    result = m.sample_means(values, sample, skip_undefined=holes)
    for column, name in enumerate(sorted(set(sample.tolist()))):
        for row in range(2):
            members = [v for v, s in zip(values[row], sample, strict=True) if s == name and not np.isnan(v)]
            expected = sum(members) / len(members) if members else np.nan
            np.testing.assert_allclose(result[row, column], expected, rtol=1e-9, atol=1e-12)
    assert result.shape == (2, len(set(sample.tolist())))


def test_nan_passes_unless_it_means_undefined() -> None:
    values, sample = np.array([1.0, np.nan, 4.0]), np.array([0, 0, 1])
    assert np.isnan(m.sample_means(values, sample)).tolist() == [True, False]
    assert np.isnan(m.probe_mean(values, sample))
    assert m.probe_mean(values, sample, skip_undefined=True) == 2.5
    assert np.isnan(m.probe_mean(np.full(3, np.nan), sample, skip_undefined=True))


def test_samples_weigh_alike_whatever_their_length() -> None:
    values, sample = np.array([1.0, 1.0, 1.0, 5.0]), np.array([7, 7, 7, 3])
    assert m.probe_mean(values, sample) == 3.0
    assert m.probe_mean(values) == 2.0


def test_any_axis_can_hold_the_tokens() -> None:
    values, sample = np.random.default_rng(0).normal(size=(2, 6, 3)), np.array([0, 1, 0, 1, 2, 2])
    by_axis = m.probe_mean(values, sample, axis=-2)
    np.testing.assert_allclose(by_axis, m.probe_mean(values.swapaxes(-1, -2), sample), rtol=1e-14)


def test_no_tokens() -> None:
    assert m.sample_means(np.zeros((2, 0)), np.zeros(0, dtype=int)).shape == (2, 0)
    assert np.isnan(m.probe_mean(np.zeros((2, 0)), np.zeros(0, dtype=int))).all()
    assert np.isnan(m.bootstrap_mean(np.zeros((2, 0))).value).all()


def test_a_sample_index_of_another_probe_is_refused() -> None:
    with pytest.raises(ProbeError, match=r"shape \(3,\) for 4 tokens; expected one sample per token"):
        m.sample_means(np.zeros(4), np.zeros(3, dtype=int))


def test_weights_are_counts_of_draws_with_replacement() -> None:
    weights = m.bootstrap_weights(7, draws=500, seed=3)
    assert weights.shape == (500, 7)
    np.testing.assert_array_equal(weights.sum(1), 7)
    np.testing.assert_allclose(weights.mean(0), 1.0, atol=0.15)
    np.testing.assert_array_equal(weights, m.bootstrap_weights(7, draws=500, seed=3))
    assert not np.array_equal(weights, m.bootstrap_weights(7, draws=500, seed=4))


def test_resampled_means_match_repetition() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5))
    weights = m.bootstrap_weights(5, draws=20)
    result = m.resampled_means(values, weights)
    assert result.shape == (20, 3)
    for draw in range(20):
        expected = np.repeat(values, weights[draw].astype(int), axis=-1).mean(-1)
        np.testing.assert_allclose(result[draw], expected, rtol=1e-12)


def test_undefined_samples_are_left_out_of_draws() -> None:
    values, weights = np.array([1.0, np.nan, 3.0]), np.array([[1.0, 1, 1], [0, 3, 0], [2, 1, 0]])
    np.testing.assert_array_equal(m.resampled_means(values, weights), [2.0, np.nan, 1.0])


def test_interval_matches_numpy_and_skips_nan() -> None:
    replicates = np.random.default_rng(0).normal(size=(101, 4))
    replicates[:30, 1] = np.nan
    replicates[:, 2] = np.nan
    low, high = m.percentile_interval(replicates, 0.9)
    expected = [np.quantile(column[~np.isnan(column)], [0.05, 0.95]) for column in replicates.T[[0, 1, 3]]]
    np.testing.assert_allclose(np.stack([low, high], -1)[[0, 1, 3]], expected, rtol=1e-12)
    assert np.isnan(low[2])
    assert np.isnan(high[2])


def test_bootstrap_mean_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).exponential(size=40)
    ours = m.bootstrap_mean(values, draws=5000, seed=0)
    theirs = scipy_bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=0).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.03)
    assert ours.high == pytest.approx(theirs.high, abs=0.03)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    values = np.random.default_rng(2).normal(size=(600, 40))
    result = m.bootstrap_mean(values, draws=400)
    covered = ((result.low <= 0) & (result.high >= 0)).mean()
    assert 0.90 <= covered <= 0.97


def test_ratio_draws_both_sides_together() -> None:
    denominator = np.random.default_rng(3).exponential(size=(2, 30)) + 0.1
    result = m.bootstrap_ratio(3 * denominator, denominator)
    for part in result:
        np.testing.assert_allclose(part, 3.0, rtol=1e-12)
    numerator = np.random.default_rng(4).exponential(size=(2, 30))
    np.testing.assert_allclose(m.bootstrap_ratio(numerator, denominator).value, numerator.mean(1) / denominator.mean(1))


def test_sites_are_averaged_inside_each_draw() -> None:
    # Two sites that err in opposite directions: their mean is certain, which only common draws can see.
    noise = np.random.default_rng(5).normal(size=30)
    result = m.bootstrap_mean(np.stack([1 + noise, 1 - noise]), average_over=-1)
    assert result.value == pytest.approx(1.0)
    assert result.low == pytest.approx(1.0)
    assert result.high == pytest.approx(1.0)


def test_undefined_sites_are_left_out_of_their_mean() -> None:
    values = np.stack([np.full(10, 2.0), np.full(10, np.nan)])
    assert m.bootstrap_mean(values, average_over=-1).value == 2.0


def test_one_sample_has_a_value_but_no_interval() -> None:
    result = m.bootstrap_mean(np.array([[2.0], [3.0]]))
    np.testing.assert_array_equal(result.value, [2.0, 3.0])
    assert np.isnan(result.low).all()
    assert np.isnan(result.high).all()


def test_exceeds_noise_needs_the_lower_end_above_the_floor() -> None:
    assert m.exceeds_noise([0.2, 0.05, np.nan], [0.1, 0.1, 0.1]).tolist() == [True, False, False]


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="A bootstrap of 0 draws was asked for; at least 1 is needed"):
        m.bootstrap_weights(5, draws=0)
    with pytest.raises(ConfigError, match="The interval level is 95; expected a number between 0 and 1"):
        m.percentile_interval(np.zeros((3, 1)), level=95)
    with pytest.raises(ConfigError, match="average_over is 0; count axes from the end"):
        m.bootstrap_mean(np.zeros((2, 3)), average_over=0)


def test_no_tokens_leave_the_other_axes_as_they_are() -> None:
    empty = np.zeros(0, dtype=int)
    assert m.sample_means(np.zeros((2, 0, 3)), empty, axis=-2).shape == (2, 0, 3)
    assert m.sample_means(np.zeros((0, 2, 3)), empty, axis=0).shape == (0, 2, 3)


def test_one_draw_one_sample_and_none_are_possible() -> None:
    assert m.bootstrap_weights(5, draws=1).sum() == 5
    np.testing.assert_array_equal(m.bootstrap_weights(1, draws=3), np.ones((3, 1)))
    assert m.bootstrap_weights(0, draws=3).shape == (3, 0)
    assert m.bootstrap_weights(4).shape == (1000, 4)


@pytest.mark.parametrize("level", [0, 1, 1.5, -0.1])
def test_levels_that_are_no_coverage_are_refused(level: float) -> None:
    with pytest.raises(ConfigError) as caught:
        m.percentile_interval(np.zeros((3, 1)), level=level)
    assert str(caught.value) == (f"The interval level is {level}; expected a number between 0 and 1, such as 0.95.")


@pytest.mark.parametrize("defined", [1, 2, 3, 5])
def test_intervals_of_few_replicates_are_numpys(defined: int) -> None:
    replicates = np.full((6, 2), np.nan)
    replicates[-defined:] = np.random.default_rng(6).normal(size=(defined, 2))
    for level in (0.5, 0.9, 0.99):
        wanted = np.quantile(replicates[-defined:], [(1 - level) / 2, (1 + level) / 2], axis=0)
        np.testing.assert_allclose(m.percentile_interval(replicates, level), wanted, rtol=1e-12)


def test_two_samples_have_an_interval() -> None:
    result = m.bootstrap_mean([[1.0, 3.0]])
    assert result.value == 2.0
    assert (result.low, result.high) == (1.0, 3.0)


@pytest.mark.parametrize("axes", [-1, -2, (-1, -2)])
def test_any_sites_can_be_averaged(axes: int | tuple[int, ...]) -> None:
    values = np.random.default_rng(7).random((3, 4, 9))
    whole = m.bootstrap_mean(values, draws=50)
    for result in (
        m.bootstrap_mean(values, draws=50, average_over=axes),
        m.bootstrap_ratio(values, np.ones_like(values), draws=50, average_over=axes),
    ):
        np.testing.assert_allclose(result.value, whole.value.mean(axis=axes), rtol=1e-12)
        assert result.low.shape == result.value.shape
    for wrong in (0, (-1, 1)):
        with pytest.raises(ConfigError, match="count axes from the end"):
            m.bootstrap_mean(values, average_over=wrong)


def test_a_drift_at_the_noise_floor_does_not_exceed_it() -> None:
    assert m.exceeds_noise([0.1, np.nan, 0.2], [0.1, 0.1, np.nan]).tolist() == [False, False, False]
