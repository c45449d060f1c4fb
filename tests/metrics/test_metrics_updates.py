"""Measures of updates and rows against the dense matrices that they never form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftlens import metrics as m
from driftlens.errors import ConfigError

seeds, ranks = st.integers(0, 2**20), st.integers(1, 4)


def factors(rng: np.random.Generator, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A [3, r, 7], B [3, 6, r] and scalings [3]."""
    return rng.normal(size=(3, rank, 7)), rng.normal(size=(3, 6, rank)), rng.normal(size=3)


def dense(A: np.ndarray, B: np.ndarray, scaling: np.ndarray) -> np.ndarray:
    return scaling[:, None, None] * (B @ A)


@given(seeds, ranks)
@settings(max_examples=30, deadline=None)
def test_norms_changes_and_cosines_are_those_of_dense_updates(seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = factors(rng, rank), factors(rng, rank)
    old, new = dense(*first), dense(*second)
    norms = [np.linalg.norm(update, axis=(1, 2)) for update in (old, new)]
    np.testing.assert_allclose(m.update_norm(*first), norms[0])
    change = m.update_change(*first[:2], *second[:2], first[2], second[2])
    np.testing.assert_allclose(change.difference, np.linalg.norm(new - old, axis=(1, 2)))
    np.testing.assert_allclose(change.relative, np.linalg.norm(new - old, axis=(1, 2)) / norms[0])
    np.testing.assert_allclose(change.cosine, (old * new).sum(axis=(1, 2)) / norms[0] / norms[1], atol=1e-12)


@given(seeds, ranks)
@settings(max_examples=30, deadline=None)
def test_singular_values_and_ranks_are_those_of_dense_updates(seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    A, B, scaling = factors(rng, rank)
    B[0, :, 0] = 0.0  # an update of lower rank
    bases = m.orthonormal_rows(A), m.orthonormal_rows(B.swapaxes(-1, -2))
    spectrum = m.update_spectrum(A, B, *bases, scaling)
    values = np.linalg.svd(dense(A, B, scaling), compute_uv=False)[:, :rank]
    np.testing.assert_allclose(spectrum, values, atol=1e-10)
    np.testing.assert_array_equal(m.numerical_rank(spectrum), np.linalg.matrix_rank(dense(A, B, scaling), rtol=1e-6))
    for site in range(1, 3):
        share = values[site] / values[site].sum()
        assert m.effective_rank(spectrum)[site] == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_a_small_change_keeps_its_digits() -> None:
    rng = np.random.default_rng(0)
    A, B, _ = factors(rng, 2)
    step = 1e-12 * rng.normal(size=B.shape)
    change = m.update_change(A, B, A, B + step)
    np.testing.assert_allclose(change.difference, np.linalg.norm(step @ A, axis=(1, 2)), rtol=1e-3)
    assert (m.update_change(A, B, A, B).difference == 0).all()


def test_undefined_values_are_nan_and_stay_where_they_are() -> None:
    rng = np.random.default_rng(0)
    A, B, _ = factors(rng, 2)
    silent = B.copy()
    silent[0] = 0.0
    change = m.update_change(A, silent, A, B)
    assert np.isnan(change.relative).tolist() == np.isnan(change.cosine).tolist() == [True, False, False]
    assert change.difference[0] == pytest.approx(np.linalg.norm(B[0] @ A[0]))
    assert m.silent_experts(m.update_norm(A, silent)) == 1
    broken = B.copy()
    broken[1, 0, 0] = np.inf
    spectrum = m.update_spectrum(A, broken, m.orthonormal_rows(A), m.orthonormal_rows(B.swapaxes(-1, -2)))
    assert np.isnan(spectrum).all(axis=-1).tolist() == [False, True, False]
    assert np.isnan(m.effective_rank(np.zeros(3)))
    assert m.numerical_rank(np.zeros(3)) == 0


def test_row_drift_against_loops() -> None:
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(2, 4, 5))
    old[1] = 0.0
    drift = m.row_drift(old, new)
    assert np.isnan(drift.cosine).tolist() == np.isnan(drift.relative).tolist() == [False, True, False, False]
    for row in (0, 2, 3):
        size = np.linalg.norm(old[row])
        assert drift.cosine[row] == pytest.approx(old[row] @ new[row] / size / np.linalg.norm(new[row]))
        assert drift.relative[row] == pytest.approx(np.linalg.norm(new[row] - old[row]) / size)


def test_factors_and_rows_of_other_shapes_are_refused() -> None:
    rng = np.random.default_rng(0)
    A, B, _ = factors(rng, 2)
    with pytest.raises(ConfigError, match="same shape at both checkpoints"):
        m.update_change(A, B, A[:, :1], B)
    with pytest.raises(ConfigError, match="same rows at both"):
        m.row_drift(A, A[:, :1])
