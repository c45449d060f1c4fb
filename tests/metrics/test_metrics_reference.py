"""What needs the anchor on the current inputs: expert drift, and drift that was inherited or is the site's own."""

import numpy as np
import pytest

from driftlens import metrics as m
from driftlens.errors import ConfigError, ProbeError

S, N, D = 2, 9, 13


class Site:
    """One stack of sites at the anchor (0) and now (1), with its inputs at both; experts may have grown."""

    def __init__(self, seed: int = 0, experts: tuple[int, int] = (3, 3), ranks: tuple[int, int] = (2, 2)) -> None:
        rng = np.random.default_rng(seed)
        self.inputs = [rng.normal(size=(S, N, 6)) for _ in range(2)]
        self.A = [rng.normal(size=(S, e, r, 6)) for e, r in zip(experts, ranks, strict=True)]
        self.B = [rng.normal(size=(S, e, D, r)) for e, r in zip(experts, ranks, strict=True)]
        self.router = [rng.normal(size=(S, e, 6)) for e in experts]

    def side(self, parameters: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
        """Gate and pathways of some parameters on some inputs."""
        h = self.inputs[inputs]
        logits = np.einsum("sed,snd->sne", self.router[parameters], h)
        gate = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return gate, np.einsum("serd,snd->sner", self.A[parameters], h)

    def outputs(self, parameters: int, inputs: int) -> np.ndarray:
        """o [S, n, E, d_out], formed in full."""
        return np.einsum("sner,sedr->sned", self.side(parameters, inputs)[1], self.B[parameters])

    def update(self, parameters: int, inputs: int) -> np.ndarray:
        """u [S, n, d_out], formed in full."""
        return np.einsum("sne,sned->snd", self.side(parameters, inputs)[0], self.outputs(parameters, inputs))

    def grams(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return m.expert_grams(self.B[0], self.B[1])

    def origin(self) -> m.DriftOriginTokens:
        return m.drift_origin(self.side(0, 0), self.side(0, 1), self.side(1, 1), *self.grams())


@pytest.mark.parametrize(("experts", "ranks"), [((3, 3), (2, 2)), ((1, 4), (3, 2))])
def test_origins_are_those_of_outputs_formed_in_full(experts: tuple[int, int], ranks: tuple[int, int]) -> None:
    site = Site(experts=experts, ranks=ranks)
    tokens = site.origin()
    inherited, local = site.update(0, 1) - site.update(0, 0), site.update(1, 1) - site.update(0, 1)
    for found, expected in (
        (tokens.inherited, (inherited**2).sum(-1)),
        (tokens.local, (local**2).sum(-1)),
        (tokens.cross, (inherited * local).sum(-1)),
        (tokens.u00_sq, (site.update(0, 0) ** 2).sum(-1)),
        (tokens.u11_sq, (site.update(1, 1) ** 2).sum(-1)),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_inherited_and_local_and_twice_their_cross_are_the_codrift_divergence(seed: int) -> None:
    site, sample = Site(seed), np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    (gate0, z0), (gate1, z1) = site.side(0, 0), site.side(1, 1)
    whole = m.codrift_from_grams(gate0, gate1, z0, z1, *site.grams())
    found, phi = site.origin().reduce(sample), whole.reduce(sample)
    np.testing.assert_allclose(found.inherited + found.local + 2 * found.cross, phi.total, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.total, phi.total, rtol=0, atol=1e-12)
    change = whole.change_sq
    np.testing.assert_allclose(site.origin().change_sq / change.max(), change / change.max(), rtol=0, atol=1e-12)
    assert (found.reason == m.Reason.DEFINED).all()


def test_equal_inputs_inherit_nothing_and_equal_parameters_do_nothing_of_their_own() -> None:
    still = Site()
    still.inputs[1] = still.inputs[0]
    assert still.origin().reduce().inherited.max() == 0
    assert still.origin().reduce().local.min() > 0.01
    kept = Site()
    for part in (kept.A, kept.B, kept.router):
        part[1] = part[0]
    assert kept.origin().reduce().local.max() < 1e-14
    assert kept.origin().reduce().inherited.min() > 0.01


def test_expert_drift_is_that_of_outputs_formed_in_full() -> None:
    site = Site()
    old, new = site.outputs(0, 1), site.outputs(1, 1)
    tokens = m.expert_drift_tokens(site.side(0, 1)[1], site.side(1, 1)[1], *site.grams())
    np.testing.assert_allclose(tokens.drift_sq, ((new - old) ** 2).sum(-1), rtol=1e-10)
    np.testing.assert_allclose(tokens.anchor_sq, (old**2).sum(-1), rtol=1e-10)
    found = m.expert_drift(tokens.drift_sq.sum(1), tokens.anchor_sq.sum(1))
    expected = np.sqrt(((new - old) ** 2).sum((1, 3)) / (old**2).sum((1, 3)))
    np.testing.assert_allclose(found.value, expected, rtol=1e-10)


def test_a_gauge_of_either_checkpoint_changes_nothing() -> None:
    site, turned = Site(), Site()
    rng = np.random.default_rng(9)
    for side in (0, 1):
        gauge = np.eye(2) + 0.5 * rng.normal(size=(S, 3, 2, 2))
        turned.A[side], turned.B[side] = gauge @ turned.A[side], turned.B[side] @ np.linalg.inv(gauge)

    def drift(of: Site) -> np.ndarray:
        tokens = m.expert_drift_tokens(of.side(0, 1)[1], of.side(1, 1)[1], *of.grams())
        return m.expert_drift(tokens.drift_sq.sum(1), tokens.anchor_sq.sum(1)).value

    np.testing.assert_allclose(drift(turned), drift(site), rtol=1e-9)
    for part in ("inherited", "local", "cross"):
        np.testing.assert_allclose(
            getattr(turned.origin().reduce(), part), getattr(site.origin().reduce(), part), atol=1e-10
        )


def test_scaling_an_expert_by_c_drifts_by_c_minus_one() -> None:
    found = m.expert_drift(np.array([4.0, 0.0, 1.0]), np.array([16.0, 5.0, 0.0]))
    np.testing.assert_array_equal(found.value, [0.5, 0.0, np.nan])
    assert found.reason.tolist() == [m.Reason.DEFINED, m.Reason.DEFINED, m.Reason.NO_OUTPUT_ANCHOR]
    site = Site()
    site.A[1], site.B[1] = site.A[0], 3 * site.B[0]
    tokens = m.expert_drift_tokens(site.side(0, 1)[1], site.side(1, 1)[1], *site.grams())
    np.testing.assert_allclose(m.expert_drift(tokens.drift_sq.sum(1), tokens.anchor_sq.sum(1)).value, 2, rtol=1e-12)


def test_no_output_no_tokens_and_broken_data_are_told_apart() -> None:
    silent = Site()
    silent.B = [0 * silent.B[0], 0 * silent.B[1]]
    assert (silent.origin().reduce().reason == m.Reason.NO_OUTPUT).all()
    broken = Site()
    broken.inputs[1] = np.where(np.arange(N)[:, None] == 3, np.nan, broken.inputs[1])
    found = broken.origin().reduce()
    assert np.isnan(found.total).all()
    assert (found.reason == m.Reason.NOT_FINITE).all()
    empty = Site()
    empty.inputs = [part[:, :0] for part in empty.inputs]
    assert (empty.origin().reduce().reason == m.Reason.NO_TOKENS).all()


def test_what_does_not_fit_is_refused() -> None:
    site, short = Site(), Site()
    short.inputs[1] = short.inputs[1][:, :4]
    with pytest.raises(ProbeError, match="9 and 4 tokens"):
        m.drift_origin(site.side(0, 0), short.side(0, 1), short.side(1, 1), *site.grams())
    g00, g01, g11 = site.grams()
    with pytest.raises(ConfigError, match=r"G01 has shape .*; expected \[\.\.\., 6, 6\]"):
        m.drift_origin(site.side(0, 0), site.side(0, 1), site.side(1, 1), g00, g01[..., :5], g11)
    with pytest.raises(ConfigError, match="twice the same"):
        m.expert_drift_tokens(site.side(0, 1)[1], short.side(1, 1)[1], g00, g01, g11)


def test_samples_weigh_alike_in_the_parts_too() -> None:
    sample = np.array([4, 4, 4, 1, 1, 2, 2, 2, 2])
    tokens = Site().origin()
    by_sample = tokens.per_sample(sample)
    for name in ("inherited", "local", "cross", "u00_sq", "u11_sq"):
        values = getattr(tokens, name)
        expected = np.stack([values[:, sample == label].mean(-1) for label in (1, 2, 4)], axis=-1)
        np.testing.assert_allclose(getattr(by_sample, name), expected, rtol=1e-12)
    np.testing.assert_allclose(by_sample.reduce().local, tokens.reduce(sample).local, rtol=1e-12)


def test_rounding_never_leaves_the_documented_range() -> None:
    def total(inherited: float, local: float, cross: float) -> float:
        parts = (np.array([value]) for value in (inherited, local, cross, 1.0, 1.0))
        return float(m.DriftOriginTokens(*parts).reduce().total)

    more = 1 + 1e-13
    assert total(1.0, 1.0, -more) == 0.0
    assert total(0.0, 4 * more, 0.0) == 1.0


def test_small_experts_and_small_drifts_are_what_they_are() -> None:
    site = Site()
    site.A[1], site.B[1] = site.A[0], 1.001 * site.B[0]
    old = 1e-3 * site.outputs(0, 1)
    tokens = m.expert_drift_tokens(1e-3 * site.side(0, 1)[1], 1e-3 * site.side(1, 1)[1], *site.grams())
    np.testing.assert_allclose(tokens.anchor_sq, (old**2).sum(-1), rtol=1e-10)
    np.testing.assert_allclose(tokens.drift_sq, 1e-6 * tokens.anchor_sq, rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_sums_that_are_not_finite_are_told_and_reasons_are_small_integers() -> None:
    found = m.expert_drift(np.array([np.inf, -1e-30, np.nan, 0.0]), np.array([1.0, 1.0, 1.0, 0.0]))
    assert np.isnan(found.value[1:]).all()
    assert found.reason.tolist() == [m.Reason.NOT_FINITE] * 3 + [m.Reason.NO_OUTPUT_ANCHOR]
    assert found.reason.dtype == np.uint8
    for tokens in (N, 0):
        site = Site()
        site.inputs = [part[:, :tokens] for part in site.inputs]
        reason = site.origin().reduce().reason
        assert reason.dtype == np.uint8
        assert reason.tolist() == [m.Reason.DEFINED if tokens else m.Reason.NO_TOKENS] * S


def test_a_single_site_needs_no_site_axis() -> None:
    site = Site(experts=(3, 4), ranks=(2, 5))
    sides = [site.side(0, 0), site.side(0, 1), site.side(1, 1)]
    alone = m.drift_origin(*((gate[0], z[0]) for gate, z in sides), *(gram[0] for gram in site.grams())).reduce()
    for name in ("total", "inherited", "local", "cross"):
        np.testing.assert_allclose(getattr(alone, name), getattr(site.origin().reduce(), name)[0], rtol=1e-12)


def test_every_shape_that_does_not_fit_is_named() -> None:
    site = Site(experts=(3, 4), ranks=(2, 5))
    sides = (site.side(0, 0), site.side(0, 1), site.side(1, 1))
    sizes = {"G00": (6, 6), "G01": (6, 20), "G11": (20, 20)}
    grams = dict(zip(sizes, site.grams(), strict=True))
    for name, (rows, columns) in sizes.items():
        with pytest.raises(ConfigError) as caught:
            m.drift_origin(*sides, *{**grams, name: grams[name][..., 1:]}.values())
        assert str(caught.value) == (
            f"{name} has shape (2, {rows}, {columns - 1}); expected [..., {rows}, {columns}] for E r columns."
        )
    gate, z = sides[0]
    for bad in ((gate[..., :2], z), (gate, z[..., 0]), (gate[0, 0], z[0, 0])):
        with pytest.raises(ConfigError) as caught:
            m.drift_origin(bad, *sides[1:], *grams.values())
        assert str(caught.value) == (
            f"Gates have shape {bad[0].shape} and pathways {bad[1].shape}; expected [..., n, E] and [..., n, E, r]."
        )
    with pytest.raises(ConfigError) as caught:
        m.expert_drift_tokens(z, z, *(grams["G00"][..., 1:] for _ in range(3)))
    assert str(caught.value) == "A Gram matrix has shape (2, 6, 5); expected [..., 6, 6] for E r columns."
    for old, new in ((z, z[:, 1:]), (z[0, 0], z[0, 0])):
        with pytest.raises(ConfigError) as caught:
            m.expert_drift_tokens(old, new, *(grams["G00"] for _ in range(3)))
        assert str(caught.value) == (
            f"Pathways have shapes {old.shape} and {new.shape}; expected [..., n, E, r], twice the same."
        )
