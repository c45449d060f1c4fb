"""Responsibility drift and alignment: metrics.md section 3b."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from driftlens import metrics as m
from driftlens.errors import ConfigError, ProbeError

fast = settings(max_examples=40, deadline=None)
Quad = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def quad(seed: int = 0, sites: int = 2, tokens: int = 6, experts: int = 4) -> Quad:
    generator = np.random.default_rng(seed)
    gates = generator.dirichlet(np.full(experts, 0.7), size=(2, sites, tokens))
    norms = generator.exponential(size=(2, sites, tokens, experts))
    return gates[0], gates[1], norms[0], norms[1]


def js(p: np.ndarray, q: np.ndarray) -> float:
    return float(jensenshannon(p, q, base=2) ** 2)


def share(pi: np.ndarray, o: np.ndarray) -> np.ndarray:
    return pi * o / sum(pi[e] * o[e] for e in range(len(pi)))


@pytest.mark.parametrize("sample", [None, np.array([1, 1, 0, 0, 0, 0])])
def test_brute_force(sample: np.ndarray | None) -> None:
    g0, g1, o0, o1 = quad()
    result = m.responsibility_drift(g0, g1, o0, o1, sample)
    weight = np.full(6, 1 / 6) if sample is None else np.array([0.25, 0.25, 0.125, 0.125, 0.125, 0.125])
    for site in range(2):
        total = router = experts = retained = 0.0
        for i in range(6):
            r00, r11 = share(g0[site, i], o0[site, i]), share(g1[site, i], o1[site, i])
            r10, r01 = share(g1[site, i], o0[site, i]), share(g0[site, i], o1[site, i])
            total += weight[i] * js(r00, r11)
            router += weight[i] * js(r00, r10)
            experts += weight[i] * js(r00, r01)
            retained += weight[i] * sum(min(a, b) for a, b in zip(r00, r11, strict=True))
        expected = (
            total,
            router,
            experts,
            (router + total - experts) / 2,
            (experts + total - router) / 2,
            total - router - experts,
            retained,
        )
        np.testing.assert_allclose([part[site] for part in result], expected, rtol=1e-10)


def test_fields_unpack_in_the_documented_order() -> None:
    result = m.responsibility_drift(*quad())
    total, router, experts, phi_router, phi_experts, synergy, retained = result
    assert total is result.total
    assert retained is result.retained
    np.testing.assert_allclose(phi_router + phi_experts, total, rtol=1e-12)
    np.testing.assert_allclose(synergy, total - router - experts, atol=1e-15)
    assert result.reason.tolist() == [m.Reason.DEFINED] * 2


def test_rows_of_responsibility_sum_to_one() -> None:
    g0, _, o0, _ = quad()
    np.testing.assert_allclose(m.responsibility(g0, o0).sum(-1), 1.0, rtol=1e-12)
    assert np.isnan(m.responsibility([[0.5, 0.5]], [[0.0, 0.0]])).all()


def test_nothing_moved() -> None:
    g0, _, o0, _ = quad()
    result = m.responsibility_drift(g0, g0, o0, o0)
    for part in result[:6]:
        np.testing.assert_allclose(part, 0.0, atol=1e-15)
    np.testing.assert_allclose(result.retained, 1.0)


def test_only_the_router_or_only_the_experts_moved() -> None:
    g0, g1, o0, o1 = quad()
    routed = m.responsibility_drift(g0, g1, o0, o0)
    np.testing.assert_allclose(routed.phi_router, routed.total, rtol=1e-12)
    np.testing.assert_allclose(routed.phi_experts, 0.0, atol=1e-14)
    rewritten = m.responsibility_drift(g0, g0, o0, o1)
    np.testing.assert_allclose(rewritten.phi_experts, rewritten.total, rtol=1e-12)
    np.testing.assert_allclose(rewritten.phi_router, 0.0, atol=1e-14)


def test_a_complete_handover() -> None:
    g0, g1 = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    norm = np.ones((1, 2))
    result = m.responsibility_drift(g0, g1, norm, norm)
    assert result.total == pytest.approx(1.0)
    assert result.retained == 0.0
    assert result.phi_router == pytest.approx(1.0)


def test_an_overwritten_expert_may_keep_its_responsibility() -> None:
    # All norms doubled: who acts is the same although every output changed.
    g0, _, o0, _ = quad()
    np.testing.assert_allclose(m.responsibility_drift(g0, g0, o0, 2 * o0).total, 0.0, atol=1e-15)


@fast
@given(st.integers(0, 2**20), st.integers(1, 5))
def test_ranges_shapley_sum_and_invariances(seed: int, experts: int) -> None:
    g0, g1, o0, o1 = quad(seed, experts=experts)
    result = m.responsibility_drift(g0, g1, o0, o1)
    for part in (result.total, result.router, result.experts, result.retained):
        assert np.all((part >= -1e-12) & (part <= 1 + 1e-12))
    np.testing.assert_allclose(result.phi_router + result.phi_experts, result.total, atol=1e-12)
    order = np.random.default_rng(seed).permutation(experts)
    tokens = np.random.default_rng(seed).permutation(6)
    shuffled = m.responsibility_drift(*(part[:, tokens][..., order] for part in (g0, g1, o0, o1)))
    scaled = m.responsibility_drift(3 * g0, 0.2 * g1, 5 * o0, 0.1 * o1)  # unnormalised gates, another unit
    for other in (shuffled, scaled):
        np.testing.assert_allclose(np.stack(other), np.stack(result), atol=1e-12)


def test_no_output_is_undefined_never_zero() -> None:
    g0, g1, o0, o1 = quad(sites=4)
    o0[0] = 0
    o1[1] = 0
    o0[2], o1[2] = 0, 0
    result = m.responsibility_drift(g0, g1, o0, o1)
    assert np.isnan(np.stack(result)[:, :3]).all()
    assert np.isfinite(np.stack(result)[:, 3]).all()
    assert [m.Reason(code) for code in result.reason] == [
        m.Reason.NO_OUTPUT_ANCHOR,
        m.Reason.NO_OUTPUT_CURRENT,
        m.Reason.NO_OUTPUT,
        m.Reason.DEFINED,
    ]
    assert m.Reason.NO_OUTPUT_ANCHOR.text == "the experts give no output at the anchor (B = 0)"


def test_silent_tokens_are_left_out() -> None:
    g0, g1, o0, o1 = quad()
    whole = m.responsibility_drift(g0[:, 1:], g1[:, 1:], o0[:, 1:], o1[:, 1:])
    o0[:, 0] = 0
    result = m.responsibility_drift(g0, g1, o0, o1)
    np.testing.assert_allclose(np.stack(result), np.stack(whole), rtol=1e-12)
    assert (result.reason == m.Reason.DEFINED).all()


def test_a_gate_that_moved_to_a_new_expert_has_a_drift_but_no_split() -> None:
    g0, g1 = np.array([[1.0]]), np.array([[0.0, 1.0]])
    result = m.responsibility_drift(g0, g1, np.ones((1, 1)), np.ones((1, 2)))
    assert result.total == pytest.approx(1.0)
    assert result.retained == 0.0
    for part in result[1:6]:
        assert np.isnan(part)


def test_the_split_stays_complete_over_the_tokens_that_have_it() -> None:
    g0, g1, o0, o1 = quad(sites=1, experts=2)
    o0[0, 0], g1[0, 0] = [1.0, 0.0], [0.0, 1.0]  # new gate on an expert without old output
    result = m.responsibility_drift(g0, g1, o0, o1)
    rest = m.responsibility_drift(g0[:, 1:], g1[:, 1:], o0[:, 1:], o1[:, 1:])
    np.testing.assert_allclose(np.stack(result[1:6]), np.stack(rest[1:6]), rtol=1e-12)
    assert result.total > rest.total


def test_nan_and_no_tokens_name_themselves() -> None:
    g0, g1, o0, o1 = quad()
    for broken in (np.nan, np.inf):
        o0[1, 2, 0] = broken  # one broken token must not be left out like a silent one
        result = m.responsibility_drift(g0, g1, o0, o1)
        assert np.isnan(np.stack(result)).any(0).tolist() == [False, True]
        assert np.isnan(m.alignment(g0, o0)).tolist() == [False, True]
        assert result.reason.tolist() == [m.Reason.DEFINED, m.Reason.NOT_FINITE]
    empty = m.responsibility_drift(*quad(tokens=0))
    assert empty.reason.tolist() == [m.Reason.NO_TOKENS] * 2
    assert np.isnan(empty.total).all()


def test_tokens_per_sample_feed_the_bootstrap() -> None:
    sample = np.array([0, 0, 1, 1, 2, 2])
    tokens = m.responsibility_tokens(*quad())
    result = m.bootstrap_mean(tokens.per_sample(sample).total, draws=200)
    np.testing.assert_allclose(result.value, tokens.reduce(sample).total, rtol=1e-12)
    assert np.all(result.low <= result.value)


def test_alignment_against_a_loop_and_its_ends() -> None:
    g0, _, o0, _ = quad()
    value = m.alignment(g0, o0)
    for site in range(2):
        divergence = [js(g0[site, i], o0[site, i] / o0[site, i].sum()) for i in range(6)]
        assert value[site] == pytest.approx(1 - np.mean(divergence), rel=1e-12)
    np.testing.assert_allclose(m.alignment(g0, 4 * g0), 1.0)
    assert m.alignment([[1.0, 0.0]], [[0.0, 2.0]]) == pytest.approx(0.0)
    assert np.isnan(m.alignment(g0, 0 * o0)).all()


def test_alignment_energy_is_one_for_a_gate_proportional_to_energy() -> None:
    z = np.random.default_rng(4).normal(size=(2, 6, 4, 3))
    energy = (z**2).sum(-1)
    gate = energy / energy.sum(-1, keepdims=True)
    np.testing.assert_allclose(m.alignment_energy(gate, z), 1.0, rtol=1e-12)
    g0 = quad()[0]
    np.testing.assert_allclose(m.alignment_energy(g0, z), m.alignment(g0, energy), rtol=1e-12)


def test_bad_arguments_are_named() -> None:
    g0, g1, o0, o1 = quad()
    with pytest.raises(ProbeError, match="hold 6 and 5 tokens"):
        m.responsibility_drift(g0, g1[:, :5], o0, o1[:, :5])
    with pytest.raises(ConfigError, match="norm0 holds negative entries"):
        m.responsibility_drift(g0, g1, -o0, o1)


def test_tokens_of_a_sample_average_without_those_that_are_undefined() -> None:
    g0, g1, o0, o1 = quad()
    o0[0, 1] = 0  # silent
    o0[1, 4], g1[1, 4] = [1, 0, 0, 0], [0, 1, 0, 0]  # a mixed update of nothing
    sample = np.array([7, 7, 3, 3, 3, 3])
    tokens = m.responsibility_tokens(g0, g1, o0, o1)
    by_sample = tokens.per_sample(sample)
    for name in ("total", "router", "experts", "retained"):
        values = getattr(tokens, name)
        expected = np.stack([np.nanmean(values[:, sample == label], axis=-1) for label in (3, 7)], axis=-1)
        np.testing.assert_allclose(getattr(by_sample, name), expected, rtol=1e-12)
    assert by_sample.reason is tokens.reason
    np.testing.assert_allclose(by_sample.reduce().total, tokens.reduce(sample).total, rtol=1e-12)


def test_small_outputs_are_outputs() -> None:
    g0, g1, o0, o1 = quad()
    o1[0] = 0
    result = m.responsibility_drift(g0, g1, 1e-6 * o0, 1e-6 * o1)
    assert result.reason.tolist() == [m.Reason.NO_OUTPUT_CURRENT, m.Reason.DEFINED]


def test_alignment_weighs_samples_alike_and_leaves_silent_tokens_out() -> None:
    g0, _, o0, _ = quad()
    o0[:, 1] = 0
    sample = np.array([7, 7, 3, 3, 3, 3])
    spoken = np.stack([1 - m.js_divergence(g0[:, i], o0[:, i]) for i in (0, 2, 3, 4, 5)], axis=-1)
    np.testing.assert_allclose(m.alignment(g0, o0), spoken.mean(-1), rtol=1e-12)
    np.testing.assert_allclose(m.alignment(g0, o0, sample), (spoken[:, 0] + spoken[:, 1:].mean(-1)) / 2, rtol=1e-12)
    z = np.sqrt(o0)[..., None]
    np.testing.assert_allclose(m.alignment_energy(g0, z, sample), m.alignment(g0, o0, sample), rtol=1e-12)


@pytest.mark.filterwarnings("error")
def test_infinite_norms_make_no_noise() -> None:
    g0, g1, o0, o1 = quad()
    o1[1, 0, 0], g1[1, 0, 0] = np.inf, 0
    result = m.responsibility_drift(g0, g1, o0, o1)
    assert result.reason.tolist() == [m.Reason.DEFINED, m.Reason.NOT_FINITE]
