"""Other people's code on the same numbers: scipy for angles, divergences and ranks, brute force where there is none."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy, spearmanr

from driftlens import metrics as m

seeds = st.integers(0, 2**20)


@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_angles_and_overlap_are_scipys_at_any_ranks(seed: int, r0: int, r1: int, shared: int) -> None:
    rng = np.random.default_rng(seed)
    A0, A1 = rng.normal(size=(r0, 8)), rng.normal(size=(r1, 8))
    common = min(shared, r0, r1)
    A1[:common] = A0[:common]  # angles of exactly 0 are where arccos fails
    angles = np.sort(subspace_angles(A0.T, A1.T))
    np.testing.assert_allclose(m.principal_angles(A0, A1), angles, atol=1e-7)
    assert m.subspace_overlap(A0, A1) == pytest.approx((np.cos(angles) ** 2).mean())
    assert m.grassmann_distance(A0, A1) == pytest.approx(np.sqrt((angles**2).mean()), abs=1e-7)
    assert m.output_overlap(A0.T, A1.T) == pytest.approx((np.cos(angles) ** 2).mean())


@given(seeds, st.integers(1, 6), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_divergences_are_scipys(seed: int, experts: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    gate0, gate1 = rng.dirichlet(np.full(experts, 0.3), size=(2, tokens))
    gate0 = np.where(rng.random(gate0.shape) < 0.3, 0.0, gate0) + np.eye(experts)[rng.integers(experts)] * 0.1
    distance = np.atleast_1d(jensenshannon(gate0, gate1, base=2, axis=-1))
    np.testing.assert_allclose(m.js_divergence(gate0, gate1), distance**2, atol=1e-12)
    # the root of a divergence below 1e-16 is all rounding
    assert m.router_js_distance(gate0, gate1) == pytest.approx(distance.mean(), abs=1e-7)
    assert m.router_js(gate0, gate1) == pytest.approx((distance**2).mean(), abs=1e-12)
    if experts > 1:
        assert m.gate_entropy(gate1) == pytest.approx(entropy(gate1, axis=-1).mean() / np.log(experts))


@given(seeds, st.integers(3, 12))
@settings(max_examples=40, deadline=None)
def test_rank_correlations_are_scipys(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 5, size=(2, size)).astype(float)
    if np.ptp(x) and np.ptp(y):
        assert m.spearman(x, y) == pytest.approx(float(spearmanr(x, y).statistic), abs=1e-12)


@given(seeds, st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_the_matching_is_the_best_of_all_pairings(seed: int, experts: int) -> None:
    similarity = np.random.default_rng(seed).uniform(-1, 1, size=(experts, experts))
    best = max(similarity[np.arange(experts), list(order)].mean() for order in itertools.permutations(range(experts)))
    found = m.best_matching(similarity)
    assert found.total == pytest.approx(best)
    assert sorted(found.partner) == list(range(experts))


@given(seeds, st.integers(1, 10))
@settings(max_examples=30, deadline=None)
def test_the_gini_coefficient_is_half_the_relative_mean_difference(seed: int, pathways: int) -> None:
    values = np.random.default_rng(seed).random(pathways) ** 3 + 1e-6
    brute = np.abs(values[:, None] - values).sum() / (2 * pathways * values.sum())
    assert m.importance_concentration(values[None]).gini == pytest.approx(brute, abs=1e-12)


@given(seeds, st.integers(2, 4), st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_specialisation_is_the_mutual_information_of_the_joint_table(seed: int, tasks: int, experts: int) -> None:
    loads = np.random.default_rng(seed).dirichlet(np.full(experts, 0.5), size=tasks)
    joint = loads / tasks
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    information = entropy(joint.ravel(), independent.ravel()) / np.log(min(tasks, experts))
    found = m.specialisation(loads, np.full(tasks, 1e12)).value  # no finite-sample correction is left
    assert found == pytest.approx(information, abs=1e-6)
