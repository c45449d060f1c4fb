"""CKA against formulas written independently, and what both forms read on unrelated data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftlens import metrics as m

seeds = st.integers(0, 2**20)


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al. 2019, Eq. 4 with linear kernels, by centred n x n Gram matrices."""
    centre = np.eye(len(x)) - 1 / len(x)
    gram, other = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
    return float((gram * other).sum() / np.sqrt((gram**2).sum() * (other**2).sum()))


def u_centred(x: np.ndarray) -> np.ndarray:
    """Szekely and Rizzo 2014, Eq. 2.8: the Gram matrix with what makes its inner product unbiased taken off."""
    g, n = x @ x.T, len(x)
    np.fill_diagonal(g, 0)
    rows = g.sum(1) / (n - 2)
    g = g - rows[:, None] - rows + g.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(g, 0)
    return g


def debiased_cka(x: np.ndarray, y: np.ndarray) -> float:
    gram, other = u_centred(x), u_centred(y)
    return float((gram * other).sum() / np.sqrt((gram**2).sum() * (other**2).sum()))


def experts(seed: int, tokens: int, dims: int, out: int, noise: float = 1.0) -> tuple[np.ndarray, ...]:
    """Pathways [n, 2, r] and B [2, out, r] at two checkpoints that share some of their variation."""
    rng = np.random.default_rng(seed)
    z0 = rng.normal(size=(tokens, 2, dims))
    z1 = z0 + noise * rng.normal(size=z0.shape)
    return z0, z1, rng.normal(size=(2, out, dims)), rng.normal(size=(2, out, dims))


@given(seed=seeds, tokens=st.integers(5, 40), dims=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_both_forms_equal_formulas_on_explicit_outputs(seed: int, tokens: int, dims: int) -> None:
    z0, z1, B0, B1 = experts(seed, tokens, dims, 6)
    debiased, biased = m.cka(z0, z1, B0, B1), m.biased_cka(z0, z1, B0, B1)
    for e in range(2):
        x, y = z0[:, e] @ B0[e].T, z1[:, e] @ B1[e].T
        assert debiased[e] == pytest.approx(debiased_cka(x, y), abs=1e-8)
        assert biased[e] == pytest.approx(linear_cka(x, y), abs=1e-10)


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_the_biased_form_is_blind_to_gauge_rotation_shift_and_scale(seed: int) -> None:
    z0, z1, B0, B1 = experts(seed, 12, 3, 5)
    rng = np.random.default_rng(seed)
    gauge = np.eye(3) + 0.3 * rng.normal(size=(2, 3, 3))
    turned = np.einsum("ekl,nel->nek", gauge, z1)
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    other = 7.0 * rotation @ B1 @ np.linalg.inv(gauge)
    want = m.biased_cka(z0, z1, B0, B1)
    np.testing.assert_allclose(m.biased_cka(z0, turned + 3.0, B0, other), want, atol=1e-8)
    np.testing.assert_allclose(m.biased_cka(z1, z0, B1, B0), want, atol=1e-10)
    np.testing.assert_allclose(m.biased_cka(z0, z0, B0, B0), 1.0)
    assert ((want >= 0) & (want <= 1)).all()


def test_on_unrelated_outputs_the_debiased_form_averages_to_zero_and_the_biased_one_to_d_over_n_plus_d() -> None:
    rng = np.random.default_rng(0)
    sites, n, d = 400, 40, 10
    z0, z1 = rng.normal(size=(2, sites, n, 1, d))
    B = np.broadcast_to(np.eye(d), (sites, 1, d, d))
    debiased, biased = m.cka(z0, z1, B, B)[:, 0], m.biased_cka(z0, z1, B, B)[:, 0]
    error = debiased.std() / np.sqrt(sites)
    assert abs(debiased.mean()) < 4 * error
    assert error < 0.003
    # X'X and Y'Y are about (n - 1) (I + noise): tr XX'YY' = (n-1) d^2 over (n-1)(n-1+d) d
    assert biased.mean() == pytest.approx(d / (n - 1 + d), rel=0.03)


def test_the_biased_form_reads_one_third_where_the_page_says_so() -> None:
    rng = np.random.default_rng(1)
    z0, z1 = rng.normal(size=(2, 1000, 1, 512))
    B = np.eye(512)[None]
    assert m.biased_cka(z0, z1, B, B)[0] == pytest.approx(0.34, abs=0.01)
    assert abs(m.cka(z0, z1, B, B)[0]) < 0.01


def test_what_the_biased_form_does_not_have() -> None:
    z0, z1, B0, B1 = experts(3, 6, 2, 4)
    assert np.isnan(m.biased_cka(z0[:0], z1[:0], B0, B1)).all()
    still = z1.copy()
    still[:, 1] = still[0, 1]
    assert np.isnan(m.biased_cka(z0, still, B0, B1)).tolist() == [False, True]
    assert np.isnan(m.biased_cka(z0, z1, B0, np.stack([B1[0], 0 * B1[1]]))).tolist() == [False, True]
    broken = z1.copy()
    broken[2, 0, 0] = np.nan
    assert np.isnan(m.biased_cka(z0, broken, B0, B1)).all()
    assert np.isnan(m.biased_cka(z0, z1[:, :1], B0, B1[:1])).tolist() == [False, True]
