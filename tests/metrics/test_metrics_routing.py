"""Routing drift: closed forms, loops written from the equations, invariances, degenerate gates."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon

from driftlens import metrics as m
from driftlens.errors import ConfigError, ProbeError

fast = settings(max_examples=40, deadline=None)


def gates(seed: int, *shape: int, concentration: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(shape[-1], concentration), size=shape[:-1])


@st.composite
def gate_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 6)))
    weights = arrays(np.float64, shape, elements=st.floats(0, 1, width=32))
    return tuple(array + 1e-3 * (array.sum(-1, keepdims=True) == 0) for array in (draw(weights), draw(weights)))  # type: ignore[return-value]


def test_js_matches_scipy_for_every_row() -> None:
    p, q = gates(0, 7, 5), gates(1, 7, 5)
    for base in (2, math.e, 10):
        expected = [jensenshannon(a, b, base=base) ** 2 for a, b in zip(p, q, strict=True)]
        np.testing.assert_allclose(m.js_divergence(p, q, base=base), expected, rtol=1e-12)


def test_js_closed_forms() -> None:
    assert m.js_divergence([1.0, 0.0], [0.0, 1.0]) == pytest.approx(1.0, abs=1e-15)
    assert m.js_divergence([1.0, 0.0], [0.0, 1.0], base=math.e) == pytest.approx(math.log(2), abs=1e-15)
    assert m.js_divergence([0.3, 0.7], [0.3, 0.7]) == 0.0
    # H(1/4, 3/4) - (0 + 1)/2 in bits
    middle = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert m.js_divergence([1.0, 0.0], [0.5, 0.5]) == pytest.approx(middle - 0.5, abs=1e-15)


def test_js_normalises_gates_that_do_not_sum_to_one() -> None:
    p, q = gates(2, 4, 3), gates(3, 4, 3)
    np.testing.assert_allclose(m.js_divergence(7 * p, 0.01 * q), m.js_divergence(p, q), rtol=1e-12)


def test_an_absent_site_is_a_full_change_and_stays_absent_without_one() -> None:
    absent, gate = np.zeros((1, 3)), np.array([[0.2, 0.3, 0.5]])
    assert m.js_divergence(absent, gate)[0] == 1.0
    assert m.js_divergence(absent, gate, base=math.e)[0] == pytest.approx(math.log(2))
    assert m.js_divergence(absent, absent)[0] == 0.0
    assert m.mass_moved(absent, gate) == 1.0
    assert m.top1_switch(absent, gate).switched == 1.0
    assert m.topk_overlap(absent, gate, 2).overlap == 0.0


def test_grown_experts_count_as_gate_zero_at_the_anchor() -> None:
    old, new = gates(4, 6, 3), gates(5, 6, 5)
    padded = np.concatenate([old, np.zeros((6, 2))], axis=-1)
    for measure in (m.router_js, m.marginal_js, m.mass_moved, m.router_js_distance):
        assert measure(old, new) == measure(padded, new)
    assert m.topk_overlap(old, new, 2).chance == pytest.approx(2 / 5)


def test_router_js_is_the_two_stage_mean_of_a_loop() -> None:
    g0, g1 = gates(6, 2, 7, 4), gates(7, 2, 7, 4)
    sample = np.array([5, 5, 5, 9, 9, 2, 9])
    expected = np.zeros(2)
    distance = np.zeros(2)
    for site in range(2):
        means, roots = [], []
        for name in (2, 5, 9):
            rows = [i for i in range(7) if sample[i] == name]
            values = [jensenshannon(g0[site, i], g1[site, i], base=2) for i in rows]
            means.append(sum(v * v for v in values) / len(values))
            roots.append(sum(values) / len(values))
        expected[site], distance[site] = sum(means) / 3, sum(roots) / 3
    np.testing.assert_allclose(m.router_js(g0, g1, sample), expected, rtol=1e-12)
    np.testing.assert_allclose(m.router_js_distance(g0, g1, sample), distance, rtol=1e-12)
    flat = m.js_divergence(g0, g1).mean(-1)
    np.testing.assert_allclose(m.router_js(g0, g1), flat, rtol=1e-12)


def test_marginal_and_sample_js_against_loops() -> None:
    g0, g1 = gates(8, 6, 3), gates(9, 6, 3)
    sample = np.array([0, 0, 1, 1, 1, 1])
    first = [g[:2].mean(0) for g in (g0, g1)]
    second = [g[2:].mean(0) for g in (g0, g1)]
    nats = (jensenshannon(*first) ** 2 + jensenshannon(*second) ** 2) / 2
    assert m.sample_js(g0, g1, sample) == pytest.approx(nats, rel=1e-12)
    whole = [(first[k] + second[k]) / 2 for k in (0, 1)]
    assert m.marginal_js(g0, g1, sample) == pytest.approx(jensenshannon(*whole, base=2) ** 2, rel=1e-12)
    sums = [g.sum(0) for g in (g0, g1)]
    assert m.marginal_js(sums[0][None], sums[1][None]) == pytest.approx(m.marginal_js(g0, g1), rel=1e-12)


@fast
@given(gate_pairs())
def test_js_is_symmetric_bounded_and_zero_on_itself(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = pair
    forward = m.js_divergence(p, q)
    np.testing.assert_allclose(forward, m.js_divergence(q, p), atol=1e-14)
    assert np.all((forward >= 0) & (forward <= 1))
    assert np.all(m.js_divergence(p, p) == 0)
    # Pinsker-type bounds: JS (bits) lies between TV^2 / (2 ln 2) and TV
    moved = m.mass_moved_tokens(p, q)
    assert np.all(forward <= moved + 1e-12)
    assert np.all(forward >= moved**2 / (2 * math.log(2)) - 1e-12)


@fast
@given(gate_pairs(), st.integers(0, 2**16))
def test_relabelling_and_token_order_change_nothing(pair: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    p, q = pair
    generator = np.random.default_rng(seed)
    experts, tokens = generator.permutation(p.shape[-1]), generator.permutation(p.shape[-2])
    sample = generator.integers(0, 3, p.shape[-2])
    for measure in (m.router_js, m.marginal_js, m.mass_moved, m.router_js_distance, m.sample_js):
        value = measure(p, q, sample)
        np.testing.assert_allclose(measure(p[..., experts], q[..., experts], sample), value, atol=1e-13)
        np.testing.assert_allclose(measure(p[:, tokens], q[:, tokens], sample[tokens]), value, atol=1e-13)


@fast
@given(gate_pairs(), st.integers(0, 2**16))
def test_averaging_before_the_divergence_never_raises_it(pair: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    sample = np.random.default_rng(seed).integers(0, 3, pair[0].shape[-2])
    by_token = m.router_js(*pair, sample)
    by_sample = m.sample_js(*pair, sample) / math.log(2)
    by_probe = m.marginal_js(*pair, sample)
    assert np.all(by_probe <= by_sample + 1e-12)
    assert np.all(by_sample <= by_token + 1e-12)


def test_the_triangle_inequality_of_the_distance() -> None:
    p, q, r = (gates(seed, 200, 4, concentration=0.3) for seed in (10, 11, 12))
    direct = np.sqrt(m.js_divergence(p, r))
    assert np.all(direct <= np.sqrt(m.js_divergence(p, q)) + np.sqrt(m.js_divergence(q, r)) + 1e-12)


def test_top1_switch_by_hand() -> None:
    g0 = np.array([[0.6, 0.4], [0.6, 0.4], [0.5, 0.5], [0.1, 0.9]])
    g1 = np.array([[0.4, 0.6], [0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    result = m.top1_switch(g0, g1)
    assert result.switched == 0.25  # the tie goes to expert 0, which does not switch
    assert result.ties == 0.25
    assert result.chance == pytest.approx(1 - (0.75 * 0.5 + 0.25 * 0.5))


def test_absence_has_its_own_slot_in_the_chance_of_a_switch() -> None:
    # anchor: absent, absent, expert 0, expert 1; current: absent, expert 0, expert 0, expert 0
    g0 = np.array([[0.0, 0.0], [0.0, 0.0], [0.9, 0.1], [0.1, 0.9]])
    g1 = np.array([[0.0, 0.0], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])
    result = m.top1_switch(g0, g1)
    assert result.switched == 0.5
    assert result.chance == pytest.approx(1 - (0.5 * 0.25 + 0.25 * 0.75))
    assert result.ties == 0.0


def test_top1_chance_is_the_rate_of_independent_routers() -> None:
    g0, g1 = gates(13, 40_000, 4), gates(14, 40_000, 4, concentration=2.0)
    result = m.top1_switch(g0, g1)
    assert result.switched == pytest.approx(result.chance, abs=0.01)


def test_topk_overlap_against_sets_and_chance() -> None:
    g0, g1 = gates(15, 3000, 6), gates(16, 3000, 6)
    expected = []
    for a, b in zip(g0, g1, strict=True):
        sets = [set(np.argsort(-row, kind="stable")[:2].tolist()) for row in (a, b)]
        expected.append(len(sets[0] & sets[1]) / 2)
    result = m.topk_overlap(g0, g1, 2)
    assert result.overlap == pytest.approx(np.mean(expected), abs=1e-12)
    assert result.chance == pytest.approx(1 / 3)
    assert result.overlap == pytest.approx(result.chance, abs=0.02)
    assert m.topk_overlap(g0, g0, 2).overlap == 1.0


def test_topk_ties_go_to_the_lower_index() -> None:
    gate = np.random.default_rng(0).integers(1, 4, (50, 64)).astype(float)  # many ties: unstable sorts mix them
    for row, mask in zip(gate, m.topk_mask(gate, 5), strict=True):
        expected = sorted(range(64), key=lambda e: (-row[e], e))[:5]
        assert np.flatnonzero(mask).tolist() == sorted(expected)


@pytest.mark.parametrize("k", [0, 5])
def test_topk_refuses_impossible_k(k: int) -> None:
    with pytest.raises(ConfigError, match=f"k is {k} for gates over 4 experts; expected 1 <= k <= 4"):
        m.topk_mask(gates(0, 2, 4), k)


def test_relative_js_is_one_for_unrelated_inputs() -> None:
    anchor = gates(17, 4000, 4)
    unrelated = anchor[np.random.default_rng(3).permutation(4000)]
    result = m.relative_js(anchor, unrelated)
    assert result.value == pytest.approx(1.0, abs=0.05)
    assert result.reason == m.Reason.DEFINED
    assert m.relative_js(anchor, anchor).value == 0.0


def test_relative_js_pairs_every_token_once_with_another() -> None:
    # Two kinds of one-hot tokens: the spread is the share of pairs of different kind, the same for a fixed seed.
    anchor = np.eye(2)[np.arange(100) % 2]
    cycle = np.random.default_rng(5).permutation(100)
    different = np.mean([cycle[i] % 2 != cycle[i - 1] % 2 for i in range(100)])
    result = m.relative_js(anchor, anchor[:, ::-1], seed=5)
    assert result.value == pytest.approx(1 / different)


def test_relative_js_names_its_reasons() -> None:
    alike = np.tile([0.3, 0.7], (2, 5, 1))
    moved = np.tile([0.7, 0.3], (2, 5, 1))
    result = m.relative_js(alike, moved)
    assert np.isnan(result.value).all()
    assert [m.Reason(code) for code in result.reason] == [m.Reason.BELOW_NOISE_FLOOR] * 2
    assert m.Reason(int(result.reason[0])).text == "different tokens are routed alike, to within the noise floor"
    assert m.relative_js(alike[:, :1], moved[:, :1]).reason[0] == m.Reason.TOO_FEW_TOKENS
    assert m.relative_js(alike[:, :0], moved[:, :0]).reason[0] == m.Reason.NO_TOKENS
    broken = gates(0, 2, 5, 2)
    broken[0, 0, 0] = np.nan
    result = m.relative_js(broken, broken)
    assert result.reason.tolist() == [m.Reason.NOT_FINITE, m.Reason.DEFINED]


def test_different_token_counts_are_refused() -> None:
    with pytest.raises(ProbeError, match="hold 5 and 6 tokens; drift pairs the same token at both"):
        m.router_js(gates(0, 5, 3), gates(0, 6, 3))


def test_logits_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"negative entries \(lowest -2\).*apply the model's own gate function"):
        m.router_js(np.array([[-2.0, 1.0]]), np.array([[0.5, 0.5]]))


def test_a_base_that_is_no_base_is_refused() -> None:
    with pytest.raises(ConfigError, match="base of the logarithm is 1"):
        m.js_divergence([1.0], [1.0], base=1)


def test_nan_reaches_the_result_of_its_site_only() -> None:
    g0, g1 = gates(18, 2, 5, 3), gates(19, 2, 5, 3)
    g0[1, 2, 0] = np.nan
    for measure in (m.router_js, m.marginal_js, m.mass_moved):
        value = measure(g0, g1)
        assert np.isfinite(value[0])
        assert np.isnan(value[1])
    switch = m.top1_switch(g0, g1)
    assert np.isnan(switch.switched[1])
    assert np.isnan(switch.chance[1])
    assert np.isfinite(switch.chance[0])
    assert np.isnan(m.topk_overlap(g0, g1, 2).overlap[1])


def test_no_tokens_is_undefined_and_one_expert_cannot_drift() -> None:
    empty = np.zeros((3, 0, 4))
    assert np.isnan(m.router_js(empty, empty)).all()
    assert np.isnan(m.top1_switch(empty, empty).switched).all()
    one = np.ones((3, 5, 1))
    assert (m.router_js(one, one) == 0).all()
    assert (m.top1_switch(one, one).chance == 0).all()


def test_float16_gates_are_computed_in_float64() -> None:
    g0, g1 = gates(20, 50, 4).astype(np.float16), gates(21, 50, 4).astype(np.float16)
    value = m.router_js(g0, g1)
    assert value.dtype == np.float64
    assert value == m.router_js(g0.astype(np.float64), g1.astype(np.float64))


SAMPLE = np.array([5, 5, 5, 9, 9, 2, 9])
WEIGHT = np.array([1 / 9] * 3 + [1 / 9, 1 / 9, 1 / 3, 1 / 9])


def test_every_share_of_tokens_weighs_samples_alike() -> None:
    g0, g1 = gates(6, 2, 7, 4), gates(7, 2, 7, 4)
    g0[0, 1] = g0[0, 5] = [0.4, 0.4, 0.1, 0.1]  # ties
    np.testing.assert_allclose(m.mass_moved(g0, g1, SAMPLE), m.mass_moved_tokens(g0, g1) @ WEIGHT, rtol=1e-12)
    switch = m.top1_switch(g0, g1, SAMPLE)
    best = [g.argmax(-1) for g in (g0, g1)]
    np.testing.assert_allclose(switch.switched, (best[0] != best[1]) @ WEIGHT, rtol=1e-12)
    np.testing.assert_allclose(switch.ties, [WEIGHT[1] + WEIGHT[5], 0], rtol=1e-12)
    loads = [np.stack([(b == e) @ WEIGHT for e in range(4)], axis=-1) for b in best]
    np.testing.assert_allclose(switch.chance, 1 - (loads[0] * loads[1]).sum(-1), rtol=1e-12)
    common = (m.topk_mask(g0, 2) & m.topk_mask(g1, 2)).sum(-1) / 2
    np.testing.assert_allclose(m.topk_overlap(g0, g1, 2, SAMPLE).overlap, common @ WEIGHT, rtol=1e-12)


def test_relative_js_weighs_samples_alike_above_and_below() -> None:
    g0, g1 = gates(6, 2, 7, 4), gates(7, 2, 7, 4)
    cycle = np.random.default_rng(0).permutation(7)
    partner = np.empty(7, dtype=int)
    for i in range(7):
        partner[cycle[i]] = cycle[i - 1]
    expected = (m.js_divergence(g0, g1) @ WEIGHT) / (m.js_divergence(g0, g0[:, partner]) @ WEIGHT)
    np.testing.assert_allclose(m.relative_js(g0, g1, SAMPLE).value, expected, rtol=1e-12)


def test_a_token_without_a_site_is_a_full_change_beside_tokens_that_have_one() -> None:
    some, all_there = np.array([[0.0, 0.0], [0.2, 0.8]]), np.array([[0.5, 0.5], [0.2, 0.8]])
    for first, second in ((some, all_there), (all_there, some)):
        np.testing.assert_array_equal(m.mass_moved_tokens(first, second), [1, 0])
        np.testing.assert_array_equal(m.js_divergence(first, second), [1, 0])
    assert m.topk_mask(some, 1).tolist() == [[False, False], [False, True]]


def test_k_may_be_one_or_all() -> None:
    gate = gates(22, 5, 3)
    np.testing.assert_array_equal(m.topk_mask(gate, 1), np.arange(3) == gate.argmax(-1)[:, None])
    assert m.topk_mask(gate, 3).all()


@pytest.mark.filterwarnings("error")
def test_relative_js_at_its_limits() -> None:
    two = np.eye(2)  # two tokens of different kind: their divergence is 1
    assert m.relative_js(two, two[::-1]).value == 1.0
    assert m.relative_js(two, two[::-1], noise_floor=1.0).reason == m.Reason.BELOW_NOISE_FLOOR
    same = np.tile([0.3, 0.7], (2, 5, 1))
    for tokens, reason in ((5, m.Reason.BELOW_NOISE_FLOOR), (1, m.Reason.TOO_FEW_TOKENS), (0, m.Reason.NO_TOKENS)):
        result = m.relative_js(same[:, :tokens], same[:, :tokens])
        assert result.value.dtype == np.float64
        assert np.isnan(result.value).tolist() == [True, True]
        assert result.reason.tolist() == [reason] * 2
    broken = gates(18, 2, 5, 3)
    broken[1, 2, 0] = np.nan
    assert m.relative_js(gates(18, 2, 5, 3), broken).reason.tolist() == [m.Reason.DEFINED, m.Reason.NOT_FINITE]


def test_broken_gates_have_no_ties() -> None:
    g0, g1 = gates(18, 2, 5, 3), gates(19, 2, 5, 3)
    g1[1, 2, 0] = np.nan
    for first, second in ((g0, g1), (g1, g0)):
        ties = m.top1_switch(first, second).ties
        assert ties[0] == 0
        assert np.isnan(ties[1])


def test_a_token_without_a_site_marks_nothing_in_any_batch() -> None:
    gate = gates(23, 2, 3, 4)
    gate[1, 2] = 0
    assert m.topk_mask(gate, 2).sum(-1).tolist() == [[2, 2, 2], [2, 2, 0]]


@pytest.mark.filterwarnings("error")
def test_divergences_of_zeros_and_broken_gates_make_no_noise() -> None:
    rows = np.array([[0.0, 1.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0], [0.5, 0.5], [1.0, 0.0]])
    found = m.js_divergence(rows[:, None], rows)
    broken = np.array([False, False, True, True, False, False])
    np.testing.assert_array_equal(np.isnan(found), broken[:, None] | broken)
    moved = m.mass_moved_tokens(np.repeat(rows, 6, axis=0), np.tile(rows, (6, 1)))
    np.testing.assert_array_equal(np.isnan(moved.reshape(6, 6)), broken[:, None] | broken)
    np.testing.assert_array_equal(np.diagonal(found)[~broken], 0)
