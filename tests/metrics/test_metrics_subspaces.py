"""Subspaces: SciPy parity, closed forms, gauge invariance, rank deficiency, the Gram route."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from driftlens import metrics as m
from driftlens.errors import ConfigError

fast = settings(max_examples=30, deadline=None)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def grams(A0: np.ndarray, A1: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return A0 @ A0.swapaxes(-1, -2), A0 @ A1.swapaxes(-1, -2), A1 @ A1.swapaxes(-1, -2)


def moment(A: np.ndarray, h: np.ndarray) -> np.ndarray:
    z = np.einsum("...kd,nd->...nk", A, h)
    return np.einsum("...nk,...nl->...kl", z, z) / h.shape[0]


def test_principal_angles_match_scipy() -> None:
    A0, A1 = normal(0, 3, 2, 4, 30), normal(1, 3, 2, 4, 30)
    A1[0] = A0[0] + 1e-5 * A1[0]  # small angles, where arccos alone fails
    angles = m.principal_angles(A0, A1)
    for index in np.ndindex(3, 2):
        expected = np.sort(subspace_angles(A0[index].T, A1[index].T))
        np.testing.assert_allclose(angles[index], expected, rtol=1e-6, atol=1e-12)
    by_gram = m.pair_from_grams(*grams(A0, A1), 30).angles()
    np.testing.assert_allclose(by_gram, angles, atol=3e-7)


def test_known_rotation_gives_known_angles() -> None:
    turn = 0.3
    A0 = np.eye(2, 6)
    A1 = np.zeros((2, 6))
    A1[0, 0], A1[0, 2] = math.cos(turn), math.sin(turn)
    A1[1, 1] = 1.0
    np.testing.assert_allclose(m.principal_angles(A0, A1), [0.0, turn], atol=1e-15)
    assert m.subspace_overlap(A0, A1) == pytest.approx((1 + math.cos(turn) ** 2) / 2, abs=1e-14)
    assert m.grassmann_distance(A0, A1) == pytest.approx(turn / math.sqrt(2), abs=1e-14)


def test_identical_and_orthogonal_subspaces() -> None:
    A = normal(2, 5, 3, 20)
    np.testing.assert_allclose(m.subspace_overlap(A, A), 1.0, atol=1e-14)
    np.testing.assert_allclose(m.subspace_overlap_adjusted(A, A), 1.0, atol=1e-13)
    np.testing.assert_allclose(m.grassmann_distance(A, A), 0.0, atol=1e-13)
    left, right = np.eye(3, 10), np.eye(3, 10, 5)
    assert m.subspace_overlap(left, right) == 0.0
    assert m.grassmann_distance(left, right) == pytest.approx(math.pi / 2)
    assert m.subspace_overlap_adjusted(left, right) == pytest.approx(-0.3 / 0.7)


def test_random_subspaces_overlap_by_chance() -> None:
    A0, A1 = normal(3, 60, 8, 128), normal(4, 60, 8, 128)
    pair = m.pair_from_factors(A0, A1)
    np.testing.assert_allclose(pair.chance(), 8 / 128)
    assert pair.overlap().mean() == pytest.approx(8 / 128, abs=0.005)
    assert pair.adjusted().mean() == pytest.approx(0.0, abs=0.005)


def test_chance_with_unequal_ranks_follows_the_larger_one() -> None:
    pair = m.pair_from_factors(normal(21, 400, 2, 40), normal(22, 400, 10, 40))
    np.testing.assert_allclose(pair.chance(), 10 / 40)
    assert pair.overlap().mean() == pytest.approx(10 / 40, abs=0.02)


def test_overlap_matches_projectors_of_a_loop() -> None:
    A0, A1 = normal(5, 4, 3, 12), normal(6, 4, 5, 12)
    value = m.subspace_overlap(A0, A1)
    for e in range(4):
        projectors = [A.T @ np.linalg.pinv(A.T) for A in (A0[e], A1[e])]
        assert value[e] == pytest.approx(np.trace(projectors[0] @ projectors[1]) / 3, abs=1e-12)


@fast
@given(st.integers(0, 2**20), st.integers(1, 5), st.integers(1, 5), st.integers(5, 12))
def test_every_subspace_measure_is_gauge_invariant(seed: int, r0: int, r1: int, d: int) -> None:
    generator = np.random.default_rng(seed)
    A0, A1, h = generator.normal(size=(2, r0, d)), generator.normal(size=(2, r1, d)), generator.normal(size=(30, d))
    G0 = np.eye(r0) + 0.3 * generator.normal(size=(2, r0, r0))
    G1 = np.eye(r1) + 0.3 * generator.normal(size=(2, r1, r1))
    if max(np.linalg.cond(G0).max(), np.linalg.cond(G1).max()) > 1e3:
        return
    C0, C1 = G0 @ A0, G1 @ A1
    close = {"rtol": 1e-7, "atol": 1e-9}
    np.testing.assert_allclose(m.subspace_overlap(C0, C1), m.subspace_overlap(A0, A1), **close)
    np.testing.assert_allclose(m.principal_angles(C0, C1), m.principal_angles(A0, A1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        m.active_overlap(C0, C1, moment(C0, h)), m.active_overlap(A0, A1, moment(A0, h)), **close
    )
    np.testing.assert_allclose(m.active_rank(C0, moment(C0, h)), m.active_rank(A0, moment(A0, h)), **close)
    B0, B1 = np.swapaxes(A0, -1, -2), np.swapaxes(A1, -1, -2)
    np.testing.assert_allclose(
        m.output_overlap(B0 @ np.linalg.inv(G0), B1 @ np.linalg.inv(G1)), m.output_overlap(B0, B1), **close
    )


@fast
@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 4))
def test_the_gram_route_agrees_with_the_factors(seed: int, r0: int, r1: int) -> None:
    generator = np.random.default_rng(seed)
    A0, A1, h = generator.normal(size=(3, r0, 9)), generator.normal(size=(3, r1, 9)), generator.normal(size=(20, 9))
    if r0 > 1:
        A0[0, -1] = A0[0, 0]  # rank-deficient
    direct, gram = m.pair_from_factors(A0, A1), m.pair_from_grams(*grams(A0, A1), 9)
    np.testing.assert_array_equal(direct.rank0, gram.rank0)
    np.testing.assert_allclose(direct.overlap(), gram.overlap(), atol=1e-7)
    np.testing.assert_allclose(direct.adjusted(), gram.adjusted(), atol=1e-7)
    np.testing.assert_allclose(direct.angles(), gram.angles(), atol=1e-5)
    used = moment(A0, h)
    np.testing.assert_allclose(direct.active_overlap(used), gram.active_overlap(used), atol=1e-7)
    np.testing.assert_allclose(m.active_rank(A0, used), m.active_rank_from_gram(grams(A0, A0)[0], used), rtol=1e-7)


def test_rank_deficiency_is_reported_not_padded() -> None:
    A = normal(7, 3, 12)
    deficient = np.stack([A, np.concatenate([A[:2], A[:1] + A[1:2]]), np.zeros((3, 12))])
    basis = m.orthonormal_rows(deficient)
    assert basis.rank.tolist() == [3, 2, 0]
    product = basis.vectors @ basis.vectors.swapaxes(-1, -2)
    np.testing.assert_allclose(product[0], np.eye(3), atol=1e-14)
    np.testing.assert_allclose(product[1], np.diag([1.0, 1, 0]), atol=1e-14)
    np.testing.assert_allclose(basis.matrix[:2] @ deficient[:2], basis.vectors[:2], atol=1e-12)
    pair = m.pair_from_factors(deficient, np.broadcast_to(A, (3, 3, 12)))
    np.testing.assert_allclose(pair.overlap()[:2], 1.0, atol=1e-13)
    assert np.isnan(pair.overlap()[2])
    assert np.isnan(pair.distance()[2])
    assert np.isnan(pair.angles()).tolist() == [[False] * 3, [False, False, True], [True] * 3]


def test_ill_conditioned_factors_keep_an_orthonormal_basis() -> None:
    left = np.linalg.qr(normal(8, 4, 4))[0]
    A = left @ np.diag([1.0, 1e-1, 1e-3, 1e-5]) @ np.linalg.qr(normal(9, 20, 4))[0].T
    basis = m.orthonormal_rows(A)
    assert basis.rank == 4
    np.testing.assert_allclose(basis.vectors @ basis.vectors.T, np.eye(4), atol=1e-12)


def test_more_rows_than_dimensions() -> None:
    A0, A1 = normal(10, 6, 4), normal(11, 6, 4)
    assert m.orthonormal_rows(A0).rank == 4
    assert m.subspace_overlap(A0, A1) == pytest.approx(1.0)
    assert np.isnan(m.subspace_overlap_adjusted(A0, A1))  # both fill the space: chance is 1


def test_active_overlap_weighs_directions_by_their_use() -> None:
    A0 = np.eye(2, 6)
    A1 = np.array([[1.0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]])  # keeps direction 0, loses direction 1
    assert m.subspace_overlap(A0, A1) == pytest.approx(0.5)
    used = np.diag([3.0, 1.0])
    assert m.active_overlap(A0, A1, used) == pytest.approx(0.75)
    assert m.active_overlap(A0, A1, np.diag([1.0, 0.0])) == pytest.approx(1.0)
    assert np.isnan(m.active_overlap(A0, A1, np.zeros((2, 2))))


def test_active_overlap_matches_the_eigenvector_definition() -> None:
    A0, A1, h = normal(12, 4, 15), normal(13, 4, 15), normal(14, 50, 15) * np.linspace(0.1, 2, 15)
    Q0 = np.linalg.qr(A0.T)[0].T
    Q1 = np.linalg.qr(A1.T)[0].T
    q = h @ Q0.T
    values, vectors = np.linalg.eigh(q.T @ q / 50)
    reached = sum(value * np.sum((Q1 @ (Q0.T @ vectors[:, k])) ** 2) for k, value in enumerate(values))
    assert m.active_overlap(A0, A1, moment(A0, h)) == pytest.approx(reached / values.sum(), rel=1e-10)
    share = values / values.sum()
    assert m.active_rank(A0, moment(A0, h)) == pytest.approx(math.exp(-np.sum(share * np.log(share))), rel=1e-10)


def test_active_rank_counts_equally_used_directions() -> None:
    A = normal(15, 4, 10)
    white = m.orthonormal_rows(A).matrix
    back = np.linalg.inv(white)
    for used in (1, 2, 4):
        spectrum = np.diag([1.0] * used + [0.0] * (4 - used))
        assert m.active_rank(A, back @ spectrum @ back.T) == pytest.approx(used, rel=1e-9)
    assert np.isnan(m.active_rank(A, np.zeros((4, 4))))


def test_output_overlap_works_on_columns() -> None:
    B = normal(16, 2, 9, 3)
    np.testing.assert_allclose(m.output_overlap(B, B @ normal(17, 2, 3, 3)), 1.0, atol=1e-12)
    assert np.isnan(m.output_overlap(np.zeros((9, 3)), B[0]))


def test_expert_blocks_cut_the_diagonal() -> None:
    B = normal(18, 2, 7, 4, 3)  # site, d_out, expert, rank
    flat = B.reshape(2, 7, 12)
    blocks = m.expert_blocks(flat.swapaxes(-1, -2) @ flat, 4)
    np.testing.assert_allclose(blocks, np.einsum("sdek,sdel->sekl", B, B), atol=1e-12)
    with pytest.raises(ConfigError, match="12 x 12 cannot be cut into blocks of 5 experts"):
        m.expert_blocks(np.eye(12), 5)


def test_nan_weights_do_not_break_their_neighbours() -> None:
    A = normal(19, 3, 2, 8)
    broken = A.copy()
    broken[1, 0, 0] = np.nan
    for pair in (m.pair_from_factors(broken, A), m.pair_from_grams(*grams(broken, A), 8)):
        assert np.isnan(pair.overlap()).tolist() == [False, True, False]
        assert np.isnan(pair.distance()).tolist() == [False, True, False]
        assert np.isnan(pair.active_overlap(np.broadcast_to(np.eye(2), (3, 2, 2)))).tolist() == [False, True, False]
    assert np.isnan(m.active_rank(broken, np.broadcast_to(np.eye(2), (3, 2, 2)))).tolist() == [False, True, False]


def test_scale_of_the_factor_does_not_decide_its_rank() -> None:
    A = normal(20, 3, 16)
    for scale in (1e-12, 1e12):
        assert m.orthonormal_rows(A * scale).rank == 3
    assert m.orthonormal_rows(A.astype(np.float16)).vectors.dtype == np.float64


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match="dimensions 8 and 9; only factors of the same site can be compared"):
        m.subspace_overlap(normal(0, 2, 8), normal(0, 2, 9))
    with pytest.raises(ConfigError, match=r"shape \(2, 3\) was passed; expected \[..., r, r\]"):
        m.whitening(np.zeros((2, 3)))
    with pytest.raises(ConfigError, match=r"shape \(3,\) was passed; expected \[..., r, d\]"):
        m.orthonormal_rows(np.zeros(3))


def test_a_whitening_is_zero_beyond_the_rank() -> None:
    A = normal(23, 3, 12)
    gram = grams(np.concatenate([A, A[:2]]), A)[0]
    white = m.whitening(gram)
    assert white.rank == 3
    np.testing.assert_array_equal(white.matrix[3:], 0)
    np.testing.assert_allclose(white.matrix @ gram @ white.matrix.T, np.diag([1.0, 1, 1, 0, 0]), atol=1e-9)
    zero = m.whitening(np.zeros((2, 2)))
    assert zero.rank == 0
    np.testing.assert_array_equal(zero.matrix, 0)


def test_the_tolerance_decides_the_rank_on_either_side_and_route() -> None:
    weak = np.diag([1.0, 0.5, 1e-3]) @ np.linalg.qr(normal(24, 9, 3))[0].T
    full = normal(25, 3, 9)
    assert m.orthonormal_rows(weak).rank == 3
    assert m.orthonormal_rows(weak, rtol=0.01).rank == 2
    for A0, A1 in ((weak, full), (full, weak)):
        for pair in (m.pair_from_factors(A0, A1, rtol=0.01), m.pair_from_grams(*grams(A0, A1), 9, rtol=0.01)):
            assert (pair.rank0, pair.rank1) == ((2, 3) if A0 is weak else (3, 2))


def test_equal_and_orthogonal_subspaces_stay_within_the_range() -> None:
    A = normal(26, 300, 3, 9)
    moments = np.einsum("skd,sld->skl", A, A)
    turned = normal(27, 300, 3, 3) @ A
    for pair in (
        m.pair_from_factors(A, A),
        m.pair_from_factors(A, turned),
        m.pair_from_grams(*grams(A, turned), 9),
    ):
        for value in (pair.overlap(), pair.active_overlap(moments)):
            np.testing.assert_allclose(value, 1.0, atol=1e-6)
            assert (value <= 1).all()
        assert (pair.angles() >= 0).all()  # and none is NaN
        np.testing.assert_allclose(pair.angles(), 0.0, atol=1e-4)
    apart = np.linalg.svd(A)[2][:, 3:6]
    for pair in (m.pair_from_factors(A, apart), m.pair_from_grams(*grams(A, apart), 9)):
        value = pair.active_overlap(moments)
        np.testing.assert_allclose(value, 0.0, atol=1e-9)
        assert (value >= 0).all()
        np.testing.assert_allclose(pair.angles(), math.pi / 2, atol=1e-6)


def test_active_overlap_needs_both_subspaces() -> None:
    A, moment_of = normal(28, 3, 9), np.eye(3)
    assert np.isnan(m.active_overlap(A, 0 * A, moment_of))
    assert np.isnan(m.active_overlap(0 * A, A, moment_of))
    one = np.array([[1.0, 0, 0]])
    assert m.active_overlap(one, np.array([[0.6, 0.8, 0]]), np.eye(1)) == pytest.approx(0.36)


def test_every_side_that_does_not_fit_is_named() -> None:
    for A0, A1 in ((normal(0, 4, 2, 8), normal(0, 4, 2, 9)), (normal(0, 4, 2, 9), normal(0, 4, 2, 8))):
        with pytest.raises(ConfigError) as caught:
            m.pair_from_factors(A0, A1)
        assert str(caught.value) == (
            f"The subspaces live in dimensions {A0.shape[-1]} and {A1.shape[-1]}; only factors of the same site can be "
            "compared."
        )
    for shape in ((12, 10), (10, 12)):
        with pytest.raises(ConfigError) as caught:
            m.expert_blocks(np.zeros(shape), 4)
        assert str(caught.value) == (
            f"A Gram matrix of {shape[0]} x {shape[1]} cannot be cut into blocks of 4 experts."
        )
