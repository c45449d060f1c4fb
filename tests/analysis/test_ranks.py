"""Rank correlations under a cluster bootstrap, against scipy on samples that are really drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from driftlens.analysis.ranks import cluster_weights, partial_rank_correlation, rank_correlation, weighted_ranks


def sample(rng, size=30):
    """Three dependent columns with ties."""
    z = rng.normal(size=size)
    x, y = z + rng.normal(size=size), z + rng.normal(size=size)
    return np.round(x, 1), np.round(y, 1), np.round(z, 1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=12))
def test_weighted_ranks_are_those_of_the_repeated_sample(rows):
    values, weights = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    ranks = weighted_ranks(values, weights[None])[0]
    repeated = np.repeat(np.arange(len(values)), weights.astype(int))
    if repeated.size:
        np.testing.assert_allclose(ranks[repeated], rankdata(values[repeated]))


def test_spearman_is_scipys_with_ties():
    x, y, _ = sample(np.random.default_rng(0))
    assert rank_correlation(x, y)[0] == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_every_draw_is_scipys_spearman_of_that_sample():
    x, y, _ = sample(np.random.default_rng(1))
    weights = cluster_weights(np.repeat(np.arange(6), 5), draws=25, seed=3)
    found = rank_correlation(x, y, weights)
    for draw, value in zip(weights, found, strict=True):
        rows = np.repeat(np.arange(30), draw.astype(int))
        assert value == pytest.approx(spearmanr(x[rows], y[rows]).statistic, abs=1e-10)


def test_partial_correlation_has_the_closed_form_of_one_covariate():
    x, y, z = sample(np.random.default_rng(2))
    xy, xz, yz = (spearmanr(*pair).statistic for pair in ((x, y), (x, z), (y, z)))
    wanted = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert partial_rank_correlation(x, y, [z])[0] == pytest.approx(wanted, abs=1e-12)


def test_partial_correlation_of_several_covariates_is_that_of_the_residuals():
    rng = np.random.default_rng(3)
    x, y, z = sample(rng)
    other = rng.normal(size=30) + x
    ranks = np.stack([rankdata(column) for column in (x, y, z, other)])
    design = np.column_stack([np.ones(30), ranks[2], ranks[3]])
    left = [rank - design @ np.linalg.lstsq(design, rank, rcond=None)[0] for rank in ranks[:2]]
    assert partial_rank_correlation(x, y, [z, other])[0] == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-10)


def test_a_constant_covariate_changes_nothing():
    x, y, z = sample(np.random.default_rng(4))
    wanted = partial_rank_correlation(x, y, [z])[0]
    assert partial_rank_correlation(x, y, [z, np.ones(30)])[0] == pytest.approx(wanted, abs=1e-10)


def test_rows_without_a_value_are_left_out():
    x, y, z = sample(np.random.default_rng(5))
    gap = x.copy()
    gap[[2, 7]] = np.nan
    kept = np.isfinite(gap)
    assert rank_correlation(gap, y)[0] == pytest.approx(spearmanr(x[kept], y[kept]).statistic, abs=1e-12)
    weights = cluster_weights(np.arange(30), draws=4)
    np.testing.assert_allclose(
        partial_rank_correlation(gap, y, [z], weights),
        partial_rank_correlation(x[kept], y[kept], [z[kept]], weights[:, kept]),
    )


def test_what_is_constant_or_explained_has_no_correlation():
    x, y, _ = sample(np.random.default_rng(6))
    assert np.isnan(rank_correlation(np.ones(30), y)[0])
    assert np.isnan(partial_rank_correlation(x, y, [x])[0])
    assert np.isnan(rank_correlation(np.full(3, np.nan), np.arange(3.0))[0])


def test_whole_clusters_are_drawn():
    clusters = np.repeat(["a", "b", "c"], [2, 3, 4])
    weights = cluster_weights(clusters, draws=50)
    assert weights.shape == (50, 9)
    for name in "abc":
        assert (weights[:, clusters == name] == weights[:, clusters == name][:, :1]).all()
    np.testing.assert_array_equal(weights[:, [0, 2, 5]].sum(axis=1), 3)


def test_what_differs_by_rounding_is_a_tie():
    thirds = [2 / 3 - 1 / 3, 1 - 2 / 3, 1 / 3, 0.0, 1.0]
    assert len(set(thirds)) > 3
    assert rank_correlation(thirds, [5, 1, 3, 0, 9])[0] == pytest.approx(
        spearmanr([1, 1, 1, 0, 2], [5, 1, 3, 0, 9]).statistic, abs=1e-12
    )
    still = [1e-17, -1e-18, 0.0, 0.5, 0.7]
    assert rank_correlation(still, [5, 1, 3, 7, 9])[0] == pytest.approx(
        spearmanr([0, 0, 0, 1, 2], [5, 1, 3, 7, 9]).statistic, abs=1e-12
    )
