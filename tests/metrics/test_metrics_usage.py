"""Use of experts at one checkpoint: entropies, specialisation, co-activation, dead experts."""

import math

import numpy as np
import pytest
from scipy.stats import entropy

from driftlens import metrics as m
from driftlens.errors import ConfigError


def gates(seed: int, *shape: int, concentration: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(shape[-1], concentration), size=shape[:-1])


def test_the_two_entropies_mean_opposite_things() -> None:
    one_hot = np.eye(4)[np.arange(40) % 4]
    assert m.gate_entropy(one_hot) == 0.0
    assert m.load_entropy(one_hot) == pytest.approx(1.0)
    collapsed = np.eye(4)[np.zeros(40, dtype=int)]
    assert m.load_entropy(collapsed) == 0.0
    uniform = np.full((40, 4), 0.25)
    assert m.gate_entropy(uniform) == pytest.approx(1.0)


def test_entropies_match_scipy() -> None:
    gate, sample = gates(0, 3, 9, 5), np.array([0, 0, 1, 1, 1, 2, 2, 2, 2])
    weight = np.array([1 / 6] * 2 + [1 / 9] * 3 + [1 / 12] * 4)
    tokens = entropy(gate, axis=-1) / math.log(5)
    np.testing.assert_allclose(m.gate_entropy(gate, sample), (tokens * weight).sum(-1), rtol=1e-12)
    mean = (gate * weight[:, None]).sum(-2)
    np.testing.assert_allclose(m.load(gate, sample), mean, rtol=1e-12)
    np.testing.assert_allclose(m.load_entropy(gate, sample), entropy(mean, axis=-1) / math.log(5), rtol=1e-12)


def test_exact_sums_stand_in_for_token_rows() -> None:
    gate = gates(1, 3, 50, 4)
    sums, nats = gate.sum(-2), entropy(gate, axis=-1).sum(-1)
    np.testing.assert_allclose(m.load_entropy(sums[:, None]), m.load_entropy(gate), rtol=1e-12)
    np.testing.assert_array_equal(m.dead_experts(sums[:, None]), m.dead_experts(gate))
    np.testing.assert_allclose(m.normalised_entropy(nats / 50, 4), m.gate_entropy(gate), rtol=1e-12)


def test_one_expert_has_no_entropy() -> None:
    gate = np.ones((2, 6, 1))
    assert np.isnan(m.gate_entropy(gate)).all()
    assert np.isnan(m.load_entropy(gate)).all()
    assert not m.near_uniform(m.gate_entropy(gate)).any()


def test_near_uniform_flags_a_gate_that_never_routed() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 200, 6)) * np.array([0.02, 3.0])[:, None, None]
    gate = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert m.near_uniform(m.gate_entropy(gate)).tolist() == [True, False]


def test_dead_experts_counts_loads_below_a_tenth_of_equal() -> None:
    share = np.array([0.0249, 0.0251, 0.45, 0.5])  # limit 1/40
    assert m.dead_experts(share[None]) == 1
    assert m.dead_experts(np.full((7, 4), 0.25)) == 0
    assert m.dead_experts(np.eye(4)[np.zeros(7, dtype=int)]) == 3


def test_specialisation_closed_forms() -> None:
    many = 1e12
    perfect = m.specialisation(np.eye(3), np.full(3, many))
    assert perfect.value == pytest.approx(1.0, abs=1e-9)
    assert m.specialisation(np.full((3, 4), 0.25), np.full(3, many)).value == pytest.approx(0.0, abs=1e-9)
    # Two tasks, four experts, each task on its own pair: I = ln 2 over ln min(4, 2)
    pairs = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    assert m.specialisation(pairs, np.full(2, many)).value == pytest.approx(1.0, abs=1e-9)


def test_specialisation_matches_a_loop_and_weighs_tasks_alike() -> None:
    loads, counts = gates(2, 5, 3, 4), np.array([10.0, 200.0, 35.0])
    expected = []
    for share in loads:

        def corrected(p: np.ndarray, n: float) -> float:
            return float(entropy(p)) + ((p > 0).sum() - 1) / (2 * n)

        information = corrected(share.mean(0), counts.sum()) - np.mean(
            [corrected(p, n) for p, n in zip(share, counts, strict=True)]
        )
        expected.append(min(max(information / math.log(3), 0.0), 1.0))
    np.testing.assert_allclose(m.specialisation(loads, counts).value, expected, atol=1e-12)


def test_miller_madow_removes_most_of_the_bias_of_few_tokens() -> None:
    generator = np.random.default_rng(0)
    counts = generator.multinomial(30, np.full(6, 1 / 6), size=(400, 5))  # one law for all tasks: no information
    loads = counts / 30
    plain = (entropy(loads.mean(-2), axis=-1) - entropy(loads, axis=-1).mean(-1)) / math.log(5)
    corrected = m.specialisation(loads, np.full(5, 30)).value
    assert plain.mean() > 0.03
    assert corrected.mean() < plain.mean() / 4


def test_specialisation_names_its_reasons() -> None:
    assert m.specialisation(np.ones((2, 3, 1)), np.ones(3)).reason.tolist() == [m.Reason.ONE_EXPERT] * 2
    assert m.specialisation(np.full((1, 2), 0.5), np.ones(1)).reason == m.Reason.ONE_TASK
    empty = m.specialisation(np.full((2, 2), 0.5), np.array([0, 5]))
    assert empty.reason == m.Reason.NO_TOKENS
    assert np.isnan(empty.value)
    broken = m.specialisation(np.array([[np.nan, 0.5], [0.5, 0.5]]), np.array([5, 5]))
    assert broken.reason == m.Reason.NOT_FINITE


def test_specialisation_refuses_counts_of_other_probes() -> None:
    with pytest.raises(ConfigError, match=r"counts has shape \(2,\) for 3 probes; expected one count per probe"):
        m.specialisation(np.full((3, 4), 0.25), np.ones(2))


def test_coactivation_counts_all_pairs() -> None:
    gate = np.array([[0.5, 0.3, 0.2, 0.0], [0.4, 0.0, 0.35, 0.25], [0.1, 0.5, 0.4, 0.0]])
    result = m.coactivation(gate, 3)
    active = [{0, 1, 2}, {0, 2, 3}, {0, 1, 2}]
    for e in range(4):
        rows = [s for s in active if e in s]
        for f in range(4):
            assert result[e, f] == pytest.approx(sum(f in s for s in rows) / len(rows))


def test_coactivation_of_a_random_router_is_at_chance() -> None:
    result = m.coactivation(np.random.default_rng(0).random((30_000, 8)), 3)
    chance = m.coactivation_chance(3, 8)
    assert chance == pytest.approx(2 / 7)
    np.testing.assert_allclose(result[~np.eye(8, dtype=bool)], chance, atol=0.02)
    assert math.isnan(m.coactivation_chance(1, 1))


def test_coactivation_weighs_samples_and_leaves_idle_experts_undefined() -> None:
    gate = np.array([[0.6, 0.4, 0.0], [0.6, 0.0, 0.4], [0.6, 0.0, 0.4], [0.6, 0.0, 0.4]])
    assert m.coactivation(gate, 2)[0, 1] == pytest.approx(0.25)
    assert m.coactivation(gate, 2, np.array([0, 1, 1, 1]))[0, 1] == pytest.approx(0.5)
    idle = m.coactivation(gate[1:], 2)
    assert np.isnan(idle[1]).all()


def test_no_tokens_is_undefined() -> None:
    empty = np.zeros((2, 0, 3))
    assert np.isnan(m.gate_entropy(empty)).all()
    assert np.isnan(m.load_entropy(empty)).all()
    assert np.isnan(m.coactivation(empty, 2)).all()


def test_two_experts_have_entropies_in_bits() -> None:
    assert m.gate_entropy(np.array([[0.25, 0.75]])) == pytest.approx(entropy([0.25, 0.75], base=2), rel=1e-12)
    assert m.load_entropy(np.array([[1.0, 0.0], [0.5, 0.5]])) == pytest.approx(entropy([0.75, 0.25], base=2), rel=1e-12)
    assert m.coactivation_chance(1, 2) == 0.0
    assert m.coactivation_chance(2, 2) == 1.0


def test_tokens_without_a_site_have_no_entropy_and_the_others_have() -> None:
    gate = np.array([[0.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    assert np.isnan(m.gate_entropy_tokens(gate)).tolist() == [True, False]
    assert np.isnan(m.load_entropy(np.stack([0 * gate, gate]))).tolist() == [True, False]


def test_entropies_of_equal_shares_are_one_and_no_more() -> None:
    for experts in range(2, 60):
        gate = np.full((3, experts), 1 / experts)
        for value in (*m.gate_entropy_tokens(gate), m.load_entropy(gate)):
            assert 1 - 1e-12 < value <= 1


def test_limits_themselves_are_neither_near_uniform_nor_dead() -> None:
    assert m.near_uniform(np.array([m.NEAR_UNIFORM_ENTROPY, np.nextafter(m.NEAR_UNIFORM_ENTROPY, 1)])).tolist() == [
        False,
        True,
    ]
    assert m.dead_experts(np.array([[0.05, 0.95]])) == 0  # exactly 1/(10 E)
    assert m.dead_experts(np.array([[0.04, 0.96]])) == 1


def test_dead_experts_are_those_of_the_mean_over_samples() -> None:
    gate = np.array([[0.0, 1.0]] * 9 + [[0.3, 0.7]])
    assert m.dead_experts(gate) == 1  # 0.03 of the tokens' work
    assert m.dead_experts(gate, np.array([0] * 9 + [1])) == 0  # 0.15 of the samples'


def test_experts_that_a_task_never_uses_are_not_counted_as_occupied() -> None:
    loads = np.array([[0.7, 0.3, 0.0, 0.0], [0.4, 0.4, 0.2, 0.0], [0.1, 0.9, 0.0, 0.0]])
    counts = np.array([5.0, 4.0, 6.0])
    given = np.mean(entropy(loads, axis=-1) + np.array([1, 2, 1]) / (2 * counts))
    whole = entropy(loads.mean(0)) + 2 / (2 * 15)
    expected = max((whole - given) / math.log(3), 0)
    assert m.specialisation(loads, counts).value == pytest.approx(expected, rel=1e-12)
    many = m.specialisation(loads, 10 * counts)
    given = np.mean(entropy(loads, axis=-1) + np.array([1, 2, 1]) / (20 * counts))
    assert many.value > 0
    assert many.value == pytest.approx((entropy(loads.mean(0)) + 2 / 300 - given) / math.log(3), rel=1e-12)


def test_specialisation_stays_within_its_range() -> None:
    assert m.specialisation(np.eye(2), np.array([3, 3])).value == 1.0  # the correction alone would go beyond
    assert m.specialisation(np.full((2, 4), 0.25), np.array([3, 3])).value == 0.0  # and here below
    assert m.specialisation(np.eye(2), np.array([1, 1])).reason == m.Reason.DEFINED  # one token is one


def test_sites_may_have_counts_of_their_own() -> None:
    loads = gates(3, 3, 2, 4)
    counts = np.array([[5, 7], [0, 7], [30, 40]])
    result = m.specialisation(loads, counts)
    assert result.reason.tolist() == [m.Reason.DEFINED, m.Reason.NO_TOKENS, m.Reason.DEFINED]
    for site in (0, 2):
        assert result.value[site] == m.specialisation(loads[site], counts[site]).value
    loads[0, 0], loads[2, 1, 0] = 0, np.nan
    assert m.specialisation(loads, np.array([5, 7])).reason.tolist() == [
        m.Reason.NO_TOKENS,
        m.Reason.DEFINED,
        m.Reason.NOT_FINITE,
    ]


def test_what_has_no_specialisation_is_nan_in_the_shape_of_the_sites() -> None:
    for loads in (np.ones((2, 3, 1)), np.full((2, 1, 3), 1 / 3)):
        value = m.specialisation(loads, np.ones(loads.shape[1])).value
        assert value.dtype == np.float64
        assert np.isnan(value).tolist() == [True, True]
    with pytest.raises(ConfigError) as caught:
        m.specialisation(np.ones(3), np.ones(1))
    assert str(caught.value) == "loads has shape (3,); expected [..., probes, experts]."
