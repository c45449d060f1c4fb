"""Debiased CKA: the definition with n x n Gram matrices and loops, invariances, chance, and what has no CKA."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftlens import metrics as m
from driftlens.errors import ConfigError, ProbeError

fast = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)


def pair(
    seed: int = 0, tokens: int = 9, experts: int = 3, ranks: tuple[int, int] = (4, 5), sites: tuple[int, ...] = (2,)
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two checkpoints whose outputs are related but not equal, both with a mean far from 0."""
    generator = np.random.default_rng(seed)
    old, new = ranks
    z0 = generator.normal(size=(*sites, tokens, experts, old)) + 3
    z1 = z0 @ generator.normal(size=(old, new)) + generator.normal(size=(*sites, tokens, experts, new))
    factors = [generator.normal(size=(*sites, experts, 11, r)) for r in ranks]
    return z0, z1, *factors


def outputs(z: np.ndarray, B: np.ndarray) -> np.ndarray:
    return np.einsum("...nek,...edk->...end", z, B)


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator on n x n Gram matrices with zeroed diagonals, x and y [n, d_out] as they are."""
    n = len(x)
    K, L = (o @ o.T * (1 - np.eye(n)) for o in (x, y))
    return (np.trace(K @ L) + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (K @ L).sum()) / (n * (n - 3))


def hsic_over_quadruples(x: np.ndarray, y: np.ndarray) -> float:
    """The same as a mean over ordered quadruples of different tokens: what makes it unbiased."""
    K, L = x @ x.T, y @ y.T
    terms = [K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q]) for i, j, q, r in permutations(range(len(x)), 4)]
    return float(np.mean(terms))


def biased_cka(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float(((x.T @ y) ** 2).sum() / np.sqrt(((x.T @ x) ** 2).sum() * ((y.T @ y) ** 2).sum()))


@pytest.mark.parametrize("statistic", [hsic, hsic_over_quadruples])
def test_equals_the_definition_with_explicit_outputs(statistic) -> None:
    z0, z1, B0, B1 = pair(tokens=7)
    result = m.cka(z0, z1, B0, B1)
    assert result.shape == (2, 3)
    for site in range(2):
        for e in range(3):
            x, y = outputs(z0, B0)[site, e], outputs(z1, B1)[site, e]
            wanted = statistic(x, y) / np.sqrt(statistic(x, x) * statistic(y, y))
            assert result[site, e] == pytest.approx(wanted, rel=1e-9)
            assert abs(wanted - biased_cka(x, y)) > 1e-3


@given(seed=seeds, tokens=st.integers(4, 40), experts=st.integers(1, 3), old=st.integers(1, 5), new=st.integers(1, 5))
@fast
def test_equals_the_definition_at_any_size(seed: int, tokens: int, experts: int, old: int, new: int) -> None:
    z0, z1, B0, B1 = pair(seed, tokens, experts, (old, new), sites=())
    x, y = outputs(z0, B0), outputs(z1, B1)
    wanted = [hsic(x[e], y[e]) / np.sqrt(hsic(x[e], x[e]) * hsic(y[e], y[e])) for e in range(experts)]
    np.testing.assert_allclose(m.cka(z0, z1, B0, B1), wanted, rtol=1e-6, atol=1e-8)


@given(seed=seeds)
@fast
def test_any_gauge_on_either_checkpoint(seed: int) -> None:
    z0, z1, B0, B1 = pair(seed)
    generator = np.random.default_rng(seed + 1)
    before = m.cka(z0, z1, B0, B1)
    for _ in range(2):
        gauge = np.linalg.qr(generator.normal(size=(2, 3, 5, 5)))[0] * np.exp(generator.uniform(-3, 3, (2, 3, 1, 5)))
        moved = np.einsum("sekl,snel->snek", gauge, z1)
        np.testing.assert_allclose(m.cka(z0, moved, B0, B1 @ np.linalg.inv(gauge)), before, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(m.cka(moved, z0, B1 @ np.linalg.inv(gauge), B0), before, rtol=1e-8, atol=1e-9)


@given(seed=seeds, power=st.integers(-6, 6))
@fast
def test_rotation_shift_and_scale_of_the_outputs(seed: int, power: int) -> None:
    z0, z1, B0, B1 = pair(seed)
    generator = np.random.default_rng(seed + 1)
    before = m.cka(z0, z1, B0, B1)
    turn = np.linalg.qr(generator.normal(size=(11, 11)))[0]
    np.testing.assert_allclose(m.cka(z0, z1, B0, turn @ B1), before, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(m.cka(z0, z1, turn @ B0, B1), before, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(m.cka(z0, z1 - 7, B0, B1), before, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(m.cka(z0, z1, B0 * 10.0**power, B1), before, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(m.cka(z0, z1 * -(10.0**power), B0, B1), before, rtol=1e-9, atol=1e-10)


@given(seed=seeds, tokens=st.integers(4, 30))
@fast
def test_identity_gives_one_and_order_of_checkpoints_and_tokens_does_not_matter(seed: int, tokens: int) -> None:
    z0, z1, B0, B1 = pair(seed, tokens)
    np.testing.assert_allclose(m.cka(z0, z0, B0, B0), 1.0, rtol=1e-12)
    result = m.cka(z0, z1, B0, B1)
    np.testing.assert_allclose(m.cka(z1, z0, B1, B0), result, rtol=1e-9, atol=1e-10)
    order = np.random.default_rng(seed).permutation(tokens)
    np.testing.assert_allclose(m.cka(z0[:, order], z1[:, order], B0, B1), result, rtol=1e-8, atol=1e-9)
    assert (np.abs(result) <= 1).all()


def test_unrelated_outputs_read_zero_where_the_biased_form_reads_a_third() -> None:
    generator = np.random.default_rng(0)
    z0, z1 = generator.normal(size=(2, 40, 125, 1, 64))  # n : d as 1000 : 512, forty times
    B = np.eye(64)[None]
    debiased = m.cka(z0, z1, B, B)
    biased = [biased_cka(x, y) for x, y in zip(z0[:, :, 0], z1[:, :, 0], strict=True)]
    assert debiased.shape == (40, 1)
    assert abs(debiased.mean()) < 3 * debiased.std() / np.sqrt(40)
    assert np.abs(debiased).max() < 0.06
    assert min(biased) > 0.3


def test_a_mixture_reads_the_share_it_has_in_common() -> None:
    generator = np.random.default_rng(1)
    shared, own = generator.normal(size=(2, 4000, 1, 8))
    B = np.eye(8)[None]
    # x = s and y = s + w of equal variance: E K_ij^2 = d, E L_ij^2 = 4 d, E K_ij L_ij = d
    assert m.cka(shared, shared + own, B, B)[0] == pytest.approx(0.5, abs=0.03)


def test_grams_stand_in_for_factors_and_half_precision_is_read() -> None:
    z0, z1, B0, B1 = pair(ranks=(4, 4))
    G00, _, G11 = m.expert_grams(B0, B1)
    by_grams = m.cka_from_grams(z0, z1, m.expert_blocks(G00, 3), m.expert_blocks(G11, 3))
    np.testing.assert_allclose(by_grams, m.cka(z0, z1, B0, B1), rtol=1e-10)
    half = m.cka(z0.astype(np.float16), z1.astype(np.float16), B0, B1)
    assert half.dtype == np.float64
    np.testing.assert_allclose(half, m.cka(z0, z1, B0, B1), atol=0.01)


def test_sites_and_experts_are_independent_of_each_other() -> None:
    z0, z1, B0, B1 = pair(sites=(2, 3), experts=4)
    together = m.cka(z0, z1, B0, B1)
    assert together.shape == (2, 3, 4)
    alone = m.cka(z0[1, 2][:, 1:2], z1[1, 2][:, 1:2], B0[1, 2, 1:2], B1[1, 2, 1:2])
    np.testing.assert_allclose(together[1, 2, 1:2], alone, rtol=1e-10)


def test_fewer_than_four_tokens_have_none() -> None:
    for tokens in range(4):
        result = m.cka(*pair(tokens=tokens))
        assert result.shape == (2, 3)
        assert np.isnan(result).all()
    assert np.isfinite(m.cka(*pair(tokens=4))).all()


@pytest.mark.parametrize("at", ["anchor", "current"])
def test_outputs_that_do_not_vary_have_none(at: str) -> None:
    z, other, B, C = pair(experts=6, ranks=(4, 4))
    B, z = B.copy(), z.copy()
    B[:, 0] = 0  # before the first task
    z[:, :, 1] = 0.1 * np.arange(1, 5)  # constant, and no round number in binary
    B[:, 2] = B[:, 2, :, :1] * np.array([1, 3, 0.1, 0.7])  # varies only where B is blind
    z[:, :, 2] = 0.3 + z[:, :, 2, :1] * np.array([3, -1, 0.7, -0.1])
    z[:, :, 3] = 0
    z[:, 5, 3] = 1.7  # one token only: no second one to agree with
    B[:, 4, :, 2] = 0  # a blind pathway beside others that speak
    result = m.cka(z, other, B, C) if at == "anchor" else m.cka(other, z, C, B)
    assert np.isnan(result[:, :4]).all()
    assert np.isfinite(result[:, 4:]).all()


def test_an_expert_that_was_born_later_has_none() -> None:
    z0, z1, B0, B1 = pair(experts=4)
    result = m.cka(z0[:, :, :3], z1, B0[:, :3], B1)
    np.testing.assert_array_equal(result[:, :3], m.cka(z0, z1, B0, B1)[:, :3])
    assert np.isnan(result[:, 3]).all()
    assert result.shape == (2, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", range(4))
def test_broken_data_makes_its_site_nan_and_no_other(bad: float, which: int) -> None:
    values = list(pair())
    whole = m.cka(*values)
    values[which] = values[which].copy()
    values[which][1, 0, 2, 0] = bad
    result = m.cka(*values)
    assert np.isnan(result[1]).all()
    np.testing.assert_array_equal(result[0], whole[0])


def test_a_few_huge_tokens_keep_their_digits() -> None:
    z0, z1, B0, B1 = pair(tokens=50)
    z0[:, 0] *= 1e3
    z1[:, 0] *= 1e3
    x, y = outputs(z0, B0)[0, 0], outputs(z1, B1)[0, 0]
    wanted = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert m.cka(z0, z1, B0, B1)[0, 0] == pytest.approx(wanted, rel=1e-6)


def test_arguments_that_do_not_fit_are_refused() -> None:
    z0, z1, B0, B1 = pair()
    with pytest.raises(ProbeError, match="hold 9 and 8 tokens; drift pairs the same token"):
        m.cka(z0, z1[:, 1:], B0, B1)
    with pytest.raises(ConfigError, match=r"current's pathways have shape \(2, 9, 3, 5\) and G11 has \(2, 3, 4, 4\)"):
        m.cka(z0, z1, B0, B0)
    with pytest.raises(ConfigError, match=r"and \[\.\.\., 3, 4, 4\]"):
        m.cka(z0, z1, B0[:, :2], B1)
    with pytest.raises(ConfigError, match="with one d_out"):
        m.cka(z0, z1, B0[:, :, 1:], B1)
    with pytest.raises(ConfigError, match="expected at least 3 axes"):
        m.cka(z0[0, 0], z1, B0, B1)


def test_one_anchor_serves_several_current_checkpoints_and_the_reverse() -> None:
    z0, z1, B0, B1 = pair()
    for tokens in (3, 9):
        one = m.cka(z0[0, :tokens], z1[:, :tokens], B0[0], B1)
        other = m.cka(z1[:, :tokens], z0[0, :tokens], B1, B0[0])
        assert one.shape == other.shape == (2, 3)
        for site in range(2):
            alone = m.cka(z0[0, :tokens], z1[site, :tokens], B0[0], B1[site])
            assert alone.shape == (3,)
            np.testing.assert_allclose(one[site], alone, rtol=1e-12)
            np.testing.assert_allclose(other[site], alone, rtol=1e-9)


def test_equal_and_opposite_outputs_read_one_and_minus_one_and_never_beyond() -> None:
    generator = np.random.default_rng(2)
    shape, B = (500, 1, 1), generator.normal(size=(500, 1, 5, 2))
    alike = generator.normal(size=(500, 6, 1, 2))
    result = m.cka(alike, alike * generator.uniform(0.1, 10, size=(500, 1, 1, 1)), B, B)
    np.testing.assert_allclose(result, 1.0, rtol=1e-9)
    assert (result <= 1).all()
    # Four tokens have pairs 12|34, 13|24 and 14|23; the first side sets 12|34 apart, the second puts them together.
    first = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])[:, None]
    second = np.array([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])[:, None]
    scale = generator.uniform(0.1, 10, size=(2, *shape, 1))
    flat = np.eye(2)[None]
    result = m.cka(first * scale[0], second * scale[1], flat, flat)
    np.testing.assert_allclose(result, -1.0, rtol=1e-9)
    assert (result >= -1).all()


@pytest.mark.parametrize("measure", [m.cka, m.biased_cka])
@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_what_counts_as_no_variation_does_not_depend_on_the_unit(measure, scale: float) -> None:
    z, other, B, C = pair(experts=2, ranks=(4, 4))
    B, z = B.copy(), z.copy()
    B[:, 0] = B[:, 0, :, :1] * np.array([1, 3, 0.1, 0.7])  # varies only where B is blind
    z[:, :, 0] = 0.3 + z[:, :, 0, :1] * np.array([3, -1, 0.7, -0.1])
    for blind in ((z, B * scale), (z * scale, B)):
        result = measure(blind[0], other, blind[1], C)
        assert np.isnan(result[:, 0]).all()
        np.testing.assert_allclose(result[:, 1], measure(z, other, B, C)[:, 1], rtol=1e-8)


def test_every_gram_matrix_that_does_not_fit_is_named() -> None:
    z0, z1, B0, B1 = pair()
    G00, G11 = B0.swapaxes(-1, -2) @ B0, B1.swapaxes(-1, -2) @ B1
    for name, checkpoint, path, grams in (
        ("G00", "anchor", z0, (G00[..., :3], G11)),
        ("G11", "current", z1, (G00, G11[..., :3])),
    ):
        gram = grams[0] if name == "G00" else grams[1]
        rank = path.shape[-1]
        for measure in (m.cka_from_grams, m.biased_cka_from_grams):
            with pytest.raises(ConfigError) as caught:
                measure(z0, z1, *grams)
            assert str(caught.value) == (
                f"The {checkpoint}'s pathways have shape {path.shape} and {name} has {gram.shape}; expected "
                f"[..., n, E, r] and [..., 3, {rank}, {rank}]."
            )


@pytest.mark.filterwarnings("error")
def test_no_tokens_have_no_biased_cka_in_the_shape_of_the_sites() -> None:
    z0, z1, B0, B1 = pair()
    for old, new, shape in (
        (slice(None), slice(None), (2, 3)),
        (0, slice(None), (2, 3)),
        (slice(None), 1, (2, 3)),
        (0, 1, (3,)),
    ):
        result = m.biased_cka(z0[..., :0, :, :][old], z1[..., :0, :, :][new], B0[old], B1[new])
        assert result.shape == shape
        assert np.isnan(result).all()
    assert np.isnan(m.biased_cka(z0[:, :1], z1[:, :1], B0, B1)).all()


@pytest.mark.filterwarnings("error")
def test_infinite_weights_beside_zeros_make_no_noise() -> None:
    z0, z1, B0, B1 = pair()
    B0 = B0.copy()
    B0[1, 2, 0] = np.inf
    B0[1, 2, 1] = 0
    B0[1, 2, 2, 0] = -np.inf
    B0[1, 2, 0, 1] = 0
    for measure in (m.cka, m.biased_cka):
        assert np.isnan(measure(z0, z1, B0, B1)).any(-1).tolist() == [False, True]
