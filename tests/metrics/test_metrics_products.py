"""Products of expert outputs, which give the co-drift of any gates, against outputs formed in full."""

import sys
import warnings

import numpy as np
import pytest

from driftlens import metrics as m
from driftlens.errors import ConfigError, ProbeError
from driftlens.metrics.codrift import codrift_from_products, expert_products

S, N, D = 2, 6, 11


def side(seed: int, experts: int, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gates [S, n, E], pathways [S, n, E, r] and factors [S, E, d_out, r]."""
    rng = np.random.default_rng(seed)
    return rng.random((S, N, experts)), rng.normal(size=(S, N, experts, rank)), rng.normal(size=(S, experts, D, rank))


def outputs(z: np.ndarray, B: np.ndarray) -> np.ndarray:
    return np.einsum("snek,sedk->sned", z, B)


def test_products_are_those_of_outputs_formed_in_full() -> None:
    (_, z0, B0), (_, z1, B1) = side(0, 3, 2), side(1, 4, 5)
    G00, G01, G11 = m.expert_grams(B0, B1)
    o0, o1 = outputs(z0, B0), outputs(z1, B1)
    for found, first, second in (
        (expert_products(z0, z1, G01), o0, o1),
        (expert_products(z0, z0, G00), o0, o0),
        (expert_products(z1, z1, G11), o1, o1),
        (expert_products(z0, z0.copy(), G00), o0, o0),  # equal, but not known to be
    ):
        np.testing.assert_allclose(found, first @ second.swapaxes(-1, -2), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(expert_products(z0[0], z1[0], G01[0]), (o0 @ o1.swapaxes(-1, -2))[0], atol=1e-12)


def test_codrift_from_products_is_that_from_grams() -> None:
    (gate0, z0, B0), (gate1, z1, B1) = side(2, 3, 2), side(3, 3, 4)
    G00, G01, G11 = m.expert_grams(B0, B1)
    own0, own1 = expert_products(z0, z0, G00), expert_products(z1, z1, G11)
    between = expert_products(z0, z1, G01)
    kept = [part.copy() for part in (own0, between, own1)]
    found = codrift_from_products(gate0, gate1, own0, between, own1)
    wanted = m.codrift_from_grams(gate0, gate1, z0, z1, G00, G01, G11)
    for name in ("rr", "ee", "re", "u00_sq", "u11_sq"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-9, atol=1e-12)
    for before, after in zip(kept, (own0, between, own1), strict=True):
        np.testing.assert_array_equal(after, before)


def test_nothing_that_moved_is_exactly_nothing() -> None:
    gate, z, B = side(4, 3, 2)
    own = expert_products(z, z, m.expert_grams(B, B)[0])
    found = codrift_from_products(gate, gate, own, own, own)
    for name in ("rr", "ee", "re"):
        assert (getattr(found, name) == 0).all()
    # rounding may leave a square a little below 0; it is never given out
    small = codrift_from_products(gate, gate[:, ::-1], -1e-20 * own, 0 * own, 0 * own)
    for name in ("rr", "ee", "u00_sq", "u11_sq"):
        assert (getattr(small, name) >= 0).all()


@pytest.mark.parametrize("bad", [np.inf, 1e308])
def test_products_that_are_not_finite_end_without_a_warning(bad: float) -> None:
    gate, z, B = side(5, 3, 2)
    own = expert_products(z, z, m.expert_grams(B, B)[0])
    broken = own.copy()
    broken[1, 2] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = codrift_from_products(gate, 9 * gate[:, ::-1], broken, own, broken)
    assert np.isfinite(found.rr[0]).all()
    assert not np.isfinite(found.u11_sq[1, 2])


def test_what_does_not_fit_is_refused() -> None:
    (_, z0, B0), (_, z1, B1) = side(0, 3, 2), side(1, 4, 5)
    G01 = m.expert_grams(B0, B1)[1]
    with pytest.raises(ProbeError, match=r"^The pathways of the two checkpoints hold 6 and 5 tokens"):
        expert_products(z0, z1[:, 1:], G01)
    for gram in (G01[..., 1:], G01[:, 1:]):
        with pytest.raises(ConfigError) as caught:
            expert_products(z0, z1, gram)
        assert str(caught.value) == (f"The Gram matrix has shape {gram.shape}; expected [..., 6, 20] for E r columns.")


def test_small_products_of_a_single_site_are_what_they_are() -> None:
    (gate0, z0, B0), (gate1, z1, B1) = side(6, 3, 2), side(7, 3, 2)
    grams = [1e-4 * gram[0] for gram in m.expert_grams(B0, B1)]
    pairs = ((z0[0], z0[0]), (z0[0], z1[0]), (z1[0], z1[0]))
    products = [expert_products(*pair, gram) for pair, gram in zip(pairs, grams, strict=True)]
    found = codrift_from_products(gate0[0], gate1[0], *products)
    wanted = m.codrift_from_grams(gate0[0], gate1[0], z0[0], z1[0], *grams)
    for name in ("rr", "ee", "re", "u00_sq", "u11_sq"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("tokens", [64, 150])
def test_blocks_of_tokens_give_what_all_tokens_at_once_give(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    gates = rng.random((2, S, tokens, 3))
    paths = rng.normal(size=(2, S, tokens, 3, 2))
    grams = m.expert_grams(*rng.normal(size=(2, S, 3, D, 2)))
    wanted = m.codrift_from_grams(*gates, *paths, *grams)
    monkeypatch.setattr(sys.modules[expert_products.__module__], "_CACHED_BYTES", 1)  # blocks of 64
    pairs = ((paths[0], paths[0]), (paths[0], paths[1]), (paths[1], paths[1]))
    products = [expert_products(*pair, gram) for pair, gram in zip(pairs, grams, strict=True)]
    for product, (first, second), gram in zip(products, pairs, grams, strict=True):
        split = gram.reshape(S, 3, 2, 3, 2)
        np.testing.assert_allclose(product, np.einsum("snek,sekfl,snfl->snef", first, split, second), atol=1e-10)
    found = codrift_from_products(*gates, *products)
    for name in ("rr", "ee", "re", "u00_sq", "u11_sq"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-8, atol=1e-10)


def test_what_lacks_a_site_axis_serves_all_sites() -> None:
    (_, z0, B0), (_, z1, B1) = side(0, 3, 2), side(1, 4, 5)
    gram = m.expert_grams(B0, B1)[1]
    for first, second, inner in ((z0[0], z1, gram[0]), (z0, z1[0], gram[0]), (z0[0], z1[0], gram)):
        found = expert_products(first, second, inner)
        for site in range(S):
            parts = (part[site] if part.shape[0] == S and part.ndim == whole else part
                     for part, whole in ((first, 4), (second, 4), (inner, 3)))  # fmt: skip
            np.testing.assert_allclose(found[site], expert_products(*parts), rtol=1e-12)
