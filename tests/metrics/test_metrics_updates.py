"""What the weights alone tell, on small factors whose products can be formed."""

import math

import numpy as np
import pytest

from driftlens import metrics as m
from driftlens.errors import ConfigError

S, R, D_IN, D_OUT = 3, 2, 7, 5


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


A0, B0, A1, B1 = normal(0, S, R, D_IN), normal(1, S, D_OUT, R), normal(2, S, R, D_IN), normal(3, S, D_OUT, R)
SCALE0, SCALE1 = np.array([2.0, -0.5, 1.5]), np.array([0.25, 3.0, -1.0])


def norms(matrices: np.ndarray) -> np.ndarray:
    return np.linalg.norm(matrices, axis=(-2, -1))


def spectrum(A: np.ndarray, B: np.ndarray, **options: object) -> np.ndarray:
    return m.update_spectrum(A, B, m.orthonormal_rows(A), m.orthonormal_rows(B.swapaxes(-1, -2)), **options)  # type: ignore[arg-type]


def test_norms_are_those_of_the_product_with_its_scaling() -> None:
    np.testing.assert_allclose(m.update_norm(A0, B0), norms(B0 @ A0), rtol=1e-12)
    np.testing.assert_allclose(m.update_norm(A0, B0, SCALE0), np.abs(SCALE0) * norms(B0 @ A0), rtol=1e-12)
    assert m.update_norm(1e-3 * A0[0], 1e-3 * B0[0]) == pytest.approx(1e-6 * norms(B0[0] @ A0[0]))
    assert (m.update_norm(A0, 0 * B0) == 0).all()


def test_changes_are_those_of_the_products_with_their_scalings() -> None:
    before, after = SCALE0[:, None, None] * B0 @ A0, SCALE1[:, None, None] * B1 @ A1
    found = m.update_change(A0, B0, A1, B1, SCALE0, SCALE1)
    np.testing.assert_allclose(found.difference, norms(after - before), rtol=1e-12)
    np.testing.assert_allclose(found.relative, norms(after - before) / norms(before), rtol=1e-12)
    cosine = (before * after).sum((-2, -1)) / norms(before) / norms(after)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-12)
    plain = m.update_change(A0, B0, A1, B1)
    np.testing.assert_allclose(plain.difference, norms(B1 @ A1 - B0 @ A0), rtol=1e-12)
    alone = m.update_change(A0[0], B0[0], A1[0], B1[0])
    assert alone.relative == pytest.approx(plain.relative[0], rel=1e-12)


def test_a_scaled_update_has_a_closed_form_and_small_changes_keep_their_digits() -> None:
    found = m.update_change(A0, B0, A0, 3 * B0)
    np.testing.assert_allclose(found.relative, 2.0, rtol=1e-12)
    np.testing.assert_allclose(m.update_change(A0, B0, A0, B0, 1.0, -1.0).cosine, -1.0, rtol=1e-12)
    barely = m.update_change(A0, B0, A0 + 1e-9 * A1, B0)
    np.testing.assert_allclose(barely.difference, norms(B0 @ ((A0 + 1e-9 * A1) - A0)), rtol=1e-6)
    still = m.update_change(A0, B0, A0, B0)
    assert (still.difference == 0).all()
    assert (still.relative == 0).all()


def test_cosines_of_parallel_updates_and_rows_stay_within_one() -> None:
    A, B = normal(4, 400, R, D_IN), normal(5, 400, D_OUT, R)
    factor = np.random.default_rng(6).uniform(-3, 3, size=(400, 1, 1))
    sign = np.sign(factor[:, 0, 0])
    for cosine in (m.update_change(A, B, A, factor * B).cosine, m.row_drift(A[:, 0], factor[:, 0] * A[:, 0]).cosine):
        np.testing.assert_allclose(cosine, sign, rtol=1e-12)
        assert (np.abs(cosine) <= 1).all()


def test_an_update_that_was_nothing_has_no_relative_change() -> None:
    found = m.update_change(A0, 0 * B0, A1, B1)
    np.testing.assert_allclose(found.difference, norms(B1 @ A1), rtol=1e-12)
    assert np.isnan(found.relative).all()
    assert np.isnan(found.cosine).all()
    gone = m.update_change(A0, B0, A1, 0 * B1)
    np.testing.assert_allclose(gone.relative, 1.0, rtol=1e-12)
    assert np.isnan(gone.cosine).all()


@pytest.mark.parametrize("changed", [(A1[:, :1], B1), (A1, B1[:, :4])])
def test_factors_of_different_shape_are_refused_with_all_shapes(changed: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ConfigError) as caught:
        m.update_change(A0, B0, *changed)
    assert str(caught.value) == (
        f"The factors have shapes (3, 2, 7), (3, 5, 2) and {changed[0].shape}, {changed[1].shape}; the change of an "
        "update needs factors of the same shape at both checkpoints."
    )


def test_spectra_are_the_singular_values_of_the_product() -> None:
    expected = np.linalg.svd(B0 @ A0, compute_uv=False)[:, :R]
    np.testing.assert_allclose(spectrum(A0, B0), expected, rtol=1e-10)
    np.testing.assert_allclose(spectrum(A0, B0, scaling=SCALE0), np.abs(SCALE0)[:, None] * expected, rtol=1e-10)
    np.testing.assert_allclose(spectrum(A0[1], B0[1], scaling=-2.0), 2 * expected[1], rtol=1e-10)


def test_a_factor_that_is_not_finite_has_no_spectrum_and_its_neighbours_do() -> None:
    broken = A0.copy()
    broken[1, 0, 0] = np.nan
    found = spectrum(broken, B0)
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[[0, 2]], spectrum(A0, B0)[[0, 2]], rtol=1e-12)


def test_ranks_count_what_stands_above_the_tolerance() -> None:
    values = np.array([[4.0, 2.0, 1e-5], [4.0, 2.0, 1e-7], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1e-9, 1e-10, 1e-16]])
    assert m.numerical_rank(values).tolist() == [3, 2, 1, 0, 2]
    assert m.numerical_rank(values, rtol=0.5).tolist() == [1, 1, 1, 0, 1]  # exactly half of the largest does not count
    assert m.numerical_rank(values, rtol=0.4).tolist() == [2, 2, 1, 0, 1]
    assert m.numerical_rank(values[0]) == 3
    assert m.numerical_rank(np.zeros((2, 0))).tolist() == [0, 0]


def test_effective_ranks_by_hand() -> None:
    values = np.array([[3.0, 3.0, 3.0], [5.0, 0.0, 0.0], [2.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    half = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    np.testing.assert_allclose(m.effective_rank(values), [3, 1, math.exp(half), np.nan], rtol=1e-12)
    assert m.effective_rank(values[2]) == pytest.approx(math.exp(half))
    assert m.effective_rank(0.1 * values[2]) == pytest.approx(math.exp(half))
    assert math.isnan(m.effective_rank(values[3]))


def test_silent_experts_are_those_of_norm_zero() -> None:
    assert m.silent_experts(np.array([[0.0, 1.0, 0.0], [1e-30, 2.0, 1.0]])).tolist() == [2, 0]
    assert m.silent_experts(np.array([0.0, 1.0])) == 1


def test_rows_drift_by_angle_and_by_length() -> None:
    old = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    new = np.array([[6.0, 8.0], [0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    found = m.row_drift(old, new)
    np.testing.assert_allclose(found.cosine, [1, 0, np.nan, np.nan], atol=1e-15)
    np.testing.assert_allclose(found.relative, [1, math.sqrt(5), np.nan, 1], rtol=1e-12)
    alone = m.row_drift(old[0], -old[0])
    assert alone.cosine == pytest.approx(-1)
    assert alone.relative == pytest.approx(2)
    with pytest.raises(ConfigError) as caught:
        m.row_drift(old, new[:3])
    assert str(caught.value) == "The rows have shapes (4, 2) and (3, 2); drift needs the same rows at both."
