"""Accumulators: shards of any cut, merged in any order, give what the functions give for all tokens at once."""

from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from driftlens import metrics as m
from driftlens.errors import ConfigError, ProbeError
from driftlens.recording import batch_sums

SITES, EXPERTS, GROWN, RANK, OUT, K = 2, 3, 4, 2, 5, 2


class Scene:
    """Paired passes with silent tokens, absent rows, an expert that grew, ties, and samples of unequal length."""

    def __init__(self, seed: int, tokens: int) -> None:
        rng = np.random.default_rng(seed)
        self.rng, self.tokens = rng, tokens
        self.gate0 = rng.dirichlet(np.full(EXPERTS, 0.5), size=(SITES, tokens)).round(1)
        self.gate1 = rng.dirichlet(np.full(GROWN, 0.5), size=(SITES, tokens))
        self.z0 = rng.normal(size=(SITES, tokens, EXPERTS, RANK))
        self.z1 = rng.normal(size=(SITES, tokens, GROWN, RANK))
        self.norm0 = np.linalg.norm(self.z0, axis=-1) * rng.integers(0, 2, size=(SITES, tokens, 1))
        self.norm1 = np.linalg.norm(self.z1, axis=-1)
        self.grams = m.expert_grams(
            rng.normal(size=(SITES, EXPERTS, OUT, RANK)), rng.normal(size=(SITES, GROWN, OUT, RANK))
        )
        self.sample = rng.integers(0, 4, size=tokens) * 7

    def shards(self, cuts: int) -> list[np.ndarray]:
        """Indices of every token, cut at random places in a random order; some shards may be empty."""
        ends = np.sort(self.rng.integers(0, self.tokens + 1, size=cuts))
        return np.split(self.rng.permutation(self.tokens), ends)

    def merged(self, make, update, cuts: int):
        """One accumulator for each shard, fed in two batches, merged pairwise in a random tree."""
        parts = []
        for shard in self.shards(cuts):
            part = make()
            for batch in np.array_split(shard, 2):
                update(part, batch)
            parts.append(part)
        while len(parts) > 1:
            first, second = (parts.pop(int(self.rng.integers(len(parts)))) for _ in range(2))
            parts.append(first.merge(second))
        return parts[0]


scenes = st.builds(Scene, st.integers(0, 2**20), st.integers(1, 25))
cuts = st.integers(0, 5)


def assert_close(found: object, wanted: object) -> None:
    np.testing.assert_allclose(
        np.asarray(found, dtype=float), np.asarray(wanted, dtype=float), rtol=1e-10, atol=1e-12, equal_nan=True
    )


@given(scenes, cuts, st.booleans())
@settings(max_examples=30, deadline=None)
def test_usage_from_shards_is_that_of_all_tokens(scene: Scene, cut: int, by_sample: bool) -> None:
    def update(part: m.UsageSums, batch: np.ndarray) -> None:
        sample = scene.sample[batch] if by_sample else None
        part.update(scene.gate0[:, batch], scene.z0[:, batch], sample)

    usage = scene.merged(lambda: m.UsageSums(K), update, cut).result()
    sample = scene.sample if by_sample else None
    assert usage.tokens == scene.tokens
    assert_close(usage.load, m.load(scene.gate0, sample))
    assert_close(usage.gate_entropy, m.gate_entropy(scene.gate0, sample))
    assert_close(usage.load_entropy, m.load_entropy(scene.gate0, sample))
    limit = np.isclose(usage.load, 1 / (10 * EXPERTS), rtol=1e-9).any(
        axis=-1
    )  # a load of just that is decided by rounding
    assert_close(usage.dead_experts[~limit], m.dead_experts(scene.gate0, sample)[~limit])
    assert_close(usage.coactivation, m.coactivation(scene.gate0, K, sample))
    assert_close(usage.rank_importance, m.rank_importance(scene.gate0, scene.z0, sample))
    assert_close(usage.second_moment, np.einsum("snek,snel->sekl", scene.z0, scene.z0) / scene.tokens)


@given(scenes, cuts, st.booleans())
@settings(max_examples=30, deadline=None)
def test_routing_drift_from_shards_is_that_of_all_tokens(scene: Scene, cut: int, by_sample: bool) -> None:
    def update(part: m.RoutingSums, batch: np.ndarray) -> None:
        sample = scene.sample[batch] if by_sample else None
        part.update(scene.gate0[:, batch], scene.gate1[:, batch], sample)

    drift = scene.merged(lambda: m.RoutingSums(K), update, cut).result()
    pair, sample = (scene.gate0, scene.gate1), scene.sample if by_sample else None
    assert_close(drift.router_js, m.router_js(*pair, sample))
    assert_close(drift.router_js_distance, m.router_js_distance(*pair, sample))
    assert_close(drift.marginal_js, m.marginal_js(*pair, sample))
    assert_close(drift.sample_js, m.sample_js(*pair, np.zeros(scene.tokens, int) if sample is None else sample))
    assert_close(drift.mass_moved, m.mass_moved(*pair, sample))
    for found, wanted in zip(drift.top1_switch, m.top1_switch(*pair, sample), strict=True):
        assert_close(found, wanted)
    assert drift.topk_overlap is not None
    for found, wanted in zip(drift.topk_overlap, m.topk_overlap(*pair, K, sample), strict=True):
        assert_close(found, wanted)


@given(scenes, cuts, st.booleans())
@settings(max_examples=30, deadline=None)
def test_codrift_from_shards_is_that_of_all_tokens(scene: Scene, cut: int, by_sample: bool) -> None:
    tokens = m.codrift_from_grams(scene.gate0, scene.gate1, scene.z0, scene.z1, *scene.grams)
    base = scene.rng.random((SITES, scene.tokens))

    def update(part: m.TokenSums, batch: np.ndarray) -> None:
        pairs = (value[:, batch] for value in (scene.gate0, scene.gate1, scene.z0, scene.z1))
        part.update(m.codrift_from_grams(*pairs, *scene.grams), scene.sample[batch] if by_sample else None)

    def update_base(part: m.SampleSums, batch: np.ndarray) -> None:
        ids = scene.sample[batch] if by_sample else np.zeros(len(batch), int)
        part.update(ids, {"base": base[:, batch].T})

    sample = scene.sample if by_sample else None
    means = scene.merged(lambda: m.TokenSums(m.CoDriftTokens), update, cut).result()
    found, wanted = means.reduce(), tokens.reduce(sample)
    for name in ("total", "router", "experts", "cross", "coupling", "share", "reason", "coupling_reason"):
        assert_close(getattr(found, name), getattr(wanted, name))
    bases = scene.merged(m.SampleSums, update_base, cut).result()["base"].T
    for found_part, wanted_part in zip(means.impact(bases), tokens.impact(base, sample), strict=True):
        assert_close(found_part, wanted_part)
    if by_sample:  # the bootstrap needs samples, and the accumulator still has them
        interval, all_at_once = means.interval("total", draws=20), tokens.interval("total", sample, draws=20)
        assert_close(interval, all_at_once)


@given(scenes, cuts)
@settings(max_examples=20, deadline=None)
def test_origins_from_shards_are_those_of_all_tokens(scene: Scene, cut: int) -> None:
    moved = (scene.gate0[:, ::-1], scene.z0[:, ::-1])

    def tokens(batch: np.ndarray) -> m.DriftOriginTokens:
        sides = [(scene.gate0, scene.z0), moved, (scene.gate1, scene.z1)]
        anchor, reference, current = ((gate[:, batch], z[:, batch]) for gate, z in sides)
        return m.drift_origin(anchor, reference, current, *scene.grams)

    def update(part: m.TokenSums, batch: np.ndarray) -> None:
        part.update(tokens(batch), scene.sample[batch])

    found = scene.merged(lambda: m.TokenSums(m.DriftOriginTokens), update, cut).result().reduce()
    wanted = tokens(np.arange(scene.tokens)).reduce(scene.sample)
    for name in ("total", "inherited", "local", "cross", "reason"):
        assert_close(getattr(found, name), getattr(wanted, name))


@given(scenes, cuts, st.sampled_from(["as it is", "silent anchor", "silent current", "silent", "broken"]))
@settings(max_examples=60, deadline=None)
def test_responsibility_from_shards_is_that_of_all_tokens(scene: Scene, cut: int, state: str) -> None:
    if "anchor" in state or state == "silent":
        scene.norm0[0] = 0
    if "current" in state or state == "silent":
        scene.norm1[0] = 0
    if state == "broken":
        scene.norm1[0, -1, 0] = np.inf

    def update(part: m.ResponsibilitySums, batch: np.ndarray) -> None:
        arrays = (value[:, batch] for value in (scene.gate0, scene.gate1, scene.norm0, scene.norm1))
        part.update(m.responsibility_tokens(*arrays), scene.sample[batch])

    found = scene.merged(m.ResponsibilitySums, update, cut).result()
    wanted = m.responsibility_drift(scene.gate0, scene.gate1, scene.norm0, scene.norm1, scene.sample)
    for name in (*wanted._fields, "reason"):
        assert_close(getattr(found, name), getattr(wanted, name))
    if state == "broken":
        assert found.reason[0] == m.Reason.NOT_FINITE
        assert np.isnan(found.total[0])


def test_specialisation_and_used_rank_follow_from_usage() -> None:
    probes = [Scene(seed, 30) for seed in range(3)]
    usages = []
    for probe in probes:
        sums = m.UsageSums()
        sums.update(probe.gate1, probe.z1)
        usages.append(sums.result())
    loads, counts = np.stack([usage.load for usage in usages], axis=-2), [usage.tokens for usage in usages]
    wanted = m.specialisation(np.stack([m.load(probe.gate1) for probe in probes], axis=-2), np.full(3, 30))
    np.testing.assert_allclose(m.specialisation(loads, np.array(counts)).value, wanted.value)
    A = np.random.default_rng(0).normal(size=(SITES, GROWN, RANK, 7))
    moment = np.einsum("snek,snel->sekl", probes[0].z1, probes[0].z1)
    np.testing.assert_allclose(m.active_rank(A, usages[0].second_moment), m.active_rank(A, moment))


def test_sums_of_a_recording_are_the_same_numbers() -> None:
    scene = Scene(0, 40)
    usage = m.UsageSums()
    usage.update(scene.gate1, scene.z1)
    found = usage.result()
    on_device = batch_sums(
        torch.tensor(scene.gate1),
        torch.tensor(scene.z1),
        torch.ones(SITES, 40),
        torch.eye(RANK).expand(SITES, GROWN, RANK, RANK),
    )
    recorded = m.ProbeSums()
    recorded.update(40, {name: value.numpy() for name, value in on_device.items()})
    sums = {name: value / recorded.count for name, value in recorded.result().items()}
    np.testing.assert_allclose(found.load, sums["gate_sum"], rtol=1e-5)
    np.testing.assert_allclose(found.rank_importance, sums["gated_energy"], rtol=1e-5)
    np.testing.assert_allclose(found.second_moment, sums["second_moment"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.gate_entropy, m.normalised_entropy(sums["entropy"], GROWN), rtol=1e-5)


def test_merging_leaves_the_operands_alone_and_nothing_is_neutral() -> None:
    scene = Scene(1, 12)
    first, second, empty = m.RoutingSums(), m.RoutingSums(), m.RoutingSums()
    first.update(scene.gate0[:, :5], scene.gate1[:, :5], scene.sample[:5])
    second.update(scene.gate0[:, 5:], scene.gate1[:, 5:], scene.sample[5:])
    before = [part.result().router_js.copy() for part in (first, second)]
    both = first.merge(second)
    both.update(scene.gate0, scene.gate1, scene.sample)
    for part, value in zip((first, second), before, strict=True):
        np.testing.assert_array_equal(part.result().router_js, value)
    for pair in ((first, empty), (empty, first)):
        merged = pair[0].merge(pair[1])
        np.testing.assert_array_equal(merged.result().router_js, before[0])
        merged.update(scene.gate0, scene.gate1, scene.sample)
        np.testing.assert_array_equal(first.result().router_js, before[0])


def test_no_tokens_are_undefined_and_nothing_at_all_is_refused() -> None:
    none = np.zeros(0, dtype=int)
    routing, usage, responsibility = m.RoutingSums(K), m.UsageSums(K), m.ResponsibilitySums()
    for part in (routing, usage, responsibility, m.TokenSums(m.CoDriftTokens), m.SampleSums()):
        with pytest.raises(ProbeError, match="call update"):
            part.result()
    scene = Scene(0, 3)
    routing.update(scene.gate0[:, :0], scene.gate1[:, :0], none)
    usage.update(scene.gate0[:, :0], scene.z0[:, :0], none)
    responsibility.update(
        m.responsibility_tokens(*(v[:, :0] for v in (scene.gate0, scene.gate1, scene.norm0, scene.norm1))), none
    )
    assert np.isnan(routing.result().router_js).all()
    assert np.isnan(usage.result().load).all()
    assert np.isnan(usage.result().second_moment).all()
    assert np.isnan(usage.result().coactivation).all()
    assert np.isnan(responsibility.result().total).all()
    assert (responsibility.result().reason == m.Reason.NO_TOKENS).all()


def test_what_is_not_asked_for_is_none() -> None:
    scene = Scene(0, 4)
    usage, routing = m.UsageSums(), m.RoutingSums()
    usage.update(scene.gate0)
    routing.update(scene.gate0, scene.gate1)
    assert (usage.result().coactivation, usage.result().rank_importance, usage.result().second_moment) == (None,) * 3
    assert routing.result().topk_overlap is None


def test_sums_by_sample_by_hand() -> None:
    sums = m.SampleSums()
    sums.update(np.array([5, 2, 5]), {"x": [1.0, 10.0, np.nan]}, skip_undefined=True)
    sums.update(np.array([2, 9]), {"x": [20.0, np.nan]}, skip_undefined=True)
    np.testing.assert_array_equal(sums.sample, [2, 5, 9])
    np.testing.assert_array_equal(sums.result()["x"], [15.0, 1.0, np.nan])
    broken = m.SampleSums()
    broken.update(np.array([5, 2, 5]), {"x": [1.0, 10.0, np.nan]})
    np.testing.assert_array_equal(broken.result()["x"], [10.0, np.nan])


def test_sums_over_many_shards_stay_exact() -> None:
    rng = np.random.default_rng(0)
    values = (rng.random(3000).astype(np.float16)).astype(np.float16)
    parts = []
    for shard in np.array_split(values, 300):
        part = m.SampleSums()
        part.update(np.zeros(len(shard), int), {"x": shard})
        parts.append(part)
    total = reduce(m.SampleSums.merge, parts)
    assert total.sums["x"][0] == pytest.approx(values.astype(np.float64).sum(), rel=1e-14)
    assert total.counts["x"][0] == 3000


def test_shards_that_do_not_belong_together_are_refused() -> None:
    scene = Scene(0, 6)
    first, second = m.RoutingSums(), m.RoutingSums()
    first.update(scene.gate0, scene.gate0)
    second.update(scene.gate1, scene.gate1)
    with pytest.raises(ConfigError, match="the same sites, experts and"):
        first.merge(second)
    with pytest.raises(ConfigError, match="k = 1 and k = None"):
        m.RoutingSums(1).merge(first)
    with pytest.raises(ConfigError, match="k = 2 and k = 1"):
        m.UsageSums(2).merge(m.UsageSums(1))
    usage = m.UsageSums()
    usage.update(scene.gate0, scene.z0)
    with pytest.raises(ConfigError, match="the same sites, experts and"):
        usage.update(scene.gate0)
    with pytest.raises(ProbeError, match="the same token at both"):
        first.update(scene.gate0, scene.gate0[:, :2])
    with pytest.raises(ProbeError, match="one sample per token"):
        first.update(scene.gate0, scene.gate0, scene.sample[:2])
    tokens = m.codrift_from_grams(scene.gate0, scene.gate1, scene.z0, scene.z1, *scene.grams)
    with pytest.raises(ConfigError, match="expected DriftOriginTokens"):
        m.TokenSums(m.DriftOriginTokens).update(tokens)
    with pytest.raises(ConfigError, match="cannot be added"):
        m.TokenSums(m.DriftOriginTokens).merge(m.TokenSums(m.CoDriftTokens))
