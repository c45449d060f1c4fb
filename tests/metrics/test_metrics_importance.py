"""Pathway importance, its concentration, pathway updates and rank correlation."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from driftlens import metrics as m
from driftlens.errors import ConfigError


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_importance_is_the_mean_of_the_product() -> None:
    gate, z = np.random.default_rng(0).random((2, 6, 3)), normal(1, 2, 6, 3, 4)
    sample = np.array([0, 0, 0, 0, 1, 1])
    value = m.rank_importance(gate, z)
    weighted = m.rank_importance(gate, z, sample)
    for site, e, k in np.ndindex(2, 3, 4):
        products = [gate[site, i, e] * z[site, i, e, k] ** 2 for i in range(6)]
        assert value[site, e, k] == pytest.approx(sum(products) / 6)
        assert weighted[site, e, k] == pytest.approx((sum(products[:4]) / 4 + sum(products[4:]) / 2) / 2)
    of_means = gate.mean(1)[..., None] * (z**2).mean(1)
    assert not np.allclose(value, of_means)


def test_equal_importance_is_not_concentrated() -> None:
    for shape in ((2, 3, 4), (2, 1, 7), (2, 8, 16)):  # 40 % is a whole number of pathways in none of them
        result = m.importance_concentration(np.full(shape, 0.3))
        np.testing.assert_allclose(result.top_share, 0.4, rtol=1e-12)
        np.testing.assert_allclose(result.gini, 0.0, atol=1e-12)


def test_one_pathway_with_all_importance() -> None:
    importance = np.zeros((2, 5))
    importance[1, 3] = 2.0
    result = m.importance_concentration(importance)
    assert result.top_share == 1.0
    assert result.gini == pytest.approx(0.9)


def test_concentration_matches_loops() -> None:
    importance = np.random.default_rng(2).exponential(size=(4, 2, 5))
    result = m.importance_concentration(importance)
    for site in range(4):
        values = sorted(importance[site].ravel(), reverse=True)
        assert result.top_share[site] == pytest.approx(sum(values[:4]) / sum(values))
        differences = sum(abs(a - b) for a in values for b in values)
        assert result.gini[site] == pytest.approx(differences / (2 * 10 * sum(values)))


def test_no_importance_is_undefined() -> None:
    result = m.importance_concentration(np.zeros((3, 2, 2)))
    assert np.isnan(result.top_share).all()
    assert np.isnan(result.gini).all()
    with pytest.raises(ConfigError, match="top share of pathways is 0; expected a number above 0 and at most 1"):
        m.importance_concentration(np.ones((2, 2)), top=0)


def test_rank_update_by_row_and_by_column() -> None:
    A0, A1 = normal(3, 2, 3, 4, 9), normal(4, 2, 3, 4, 9)
    B0, B1 = A0.swapaxes(-1, -2), A1.swapaxes(-1, -2)
    value = m.rank_update(A0, A1)
    for index in np.ndindex(2, 3, 4):
        expected = np.linalg.norm(A1[index] - A0[index]) / np.linalg.norm(A0[index])
        assert value[index] == pytest.approx(expected)
    np.testing.assert_array_equal(m.rank_update(B0, B1, axis=-2), value)
    np.testing.assert_allclose(m.rank_update(A0, 1.25 * A0), 0.25)
    grams = (A0 @ B0, A0 @ B1, A1 @ B1)
    np.testing.assert_allclose(m.rank_update_from_grams(*grams), value, rtol=1e-10)


def test_rank_update_from_zero_is_undefined() -> None:
    B0 = np.zeros((2, 5, 3))
    assert np.isnan(m.rank_update(B0, normal(5, 2, 5, 3), axis=-2)).all()
    assert np.isnan(m.rank_update_from_grams(np.zeros((3, 3)), np.zeros((3, 3)), np.eye(3))).all()
    with pytest.raises(
        ConfigError, match=r"shapes \(2, 5, 3\) and \(2, 5, 4\); the update of a pathway needs the same"
    ):
        m.rank_update(B0, np.zeros((2, 5, 4)))


def test_spearman_matches_scipy_with_ties() -> None:
    x, y = np.round(normal(6, 5, 40), 1), np.round(normal(7, 5, 40), 0)
    expected = [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(m.spearman(x, y), expected, rtol=1e-12)
    assert m.spearman(x[0], np.exp(x[0])) == pytest.approx(1.0)
    assert m.spearman(x[0], -x[0]) == pytest.approx(-1.0)


def test_spearman_is_undefined_for_constants_nan_and_nothing() -> None:
    x = np.stack([np.arange(5.0), np.full(5, 2.0), np.array([1, 2, np.nan, 4, 5])])
    assert np.isnan(m.spearman(x, np.arange(5.0))).tolist() == [False, True, True]
    assert np.isnan(m.spearman(np.zeros((2, 0)), np.zeros((2, 0)))).all()


def test_the_top_share_may_be_everything_and_no_more() -> None:
    importance = np.random.default_rng(3).exponential(size=(4, 5))
    assert m.importance_concentration(importance, top=1).top_share == pytest.approx(1.0)
    for top in (-0.1, 1.01, 2):
        with pytest.raises(ConfigError) as caught:
            m.importance_concentration(importance, top=top)
        assert str(caught.value) == (f"The top share of pathways is {top}; expected a number above 0 and at most 1.")


def test_small_updates_are_read_from_grams_too() -> None:
    A0 = normal(3, 2, 4, 9)
    A1 = A0 * np.array([1.001, 0.99, 1.0, 1.1])[:, None]
    grams = (A0 @ A0.swapaxes(-1, -2), A0 @ A1.swapaxes(-1, -2), A1 @ A1.swapaxes(-1, -2))
    np.testing.assert_allclose(m.rank_update_from_grams(*grams), [[0.001, 0.01, 0.0, 0.1]] * 2, atol=1e-7)


def test_pathways_that_do_not_pair_are_refused_in_full() -> None:
    with pytest.raises(ConfigError) as caught:
        m.rank_update(np.zeros((2, 5)), np.zeros((3, 5)))
    assert str(caught.value) == (
        "The factors have shapes (2, 5) and (3, 5); the update of a pathway needs the same pathways at both "
        "checkpoints."
    )


@pytest.mark.filterwarnings("error")
def test_spearman_without_items_is_undefined_in_the_shape_of_the_sites() -> None:
    result = m.spearman(np.zeros((2, 3, 0)), np.zeros((2, 3, 0)))
    assert result.shape == (2, 3)
    assert np.isnan(result).all()
    assert np.isnan(m.spearman(np.ones((2, 1)), np.ones((2, 1)))).all()


def test_spearman_of_equal_and_reversed_orders_stays_within_one() -> None:
    generator = np.random.default_rng(8)
    for items in range(2, 60):
        x = np.round(generator.normal(size=(20, items)), 1)
        x[:, 0] += 10  # never constant
        for sign in (1, -1):
            result = m.spearman(x, sign * x**3)
            np.testing.assert_allclose(result, sign, rtol=1e-9)
            assert (np.abs(result) <= 1).all()
