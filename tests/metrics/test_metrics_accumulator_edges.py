"""Accumulators away from the usual: one site without an axis, many axes, rank one, growth, no samples."""

from typing import Any

import numpy as np
import pytest

from driftlens import metrics as m

TOKENS, OLD, NEW = 9, 2, 4
SAMPLE = np.array([3, 3, 3, 1, 1, 7, 7, 7, 7])


def scene(*sites: int, rank: int = 3) -> dict[str, np.ndarray]:
    """Passes [..., n, E, r] of a site whose experts grew; one token went over to a new expert entirely."""
    rng = np.random.default_rng(0)
    gate0, gate1 = (rng.dirichlet(np.ones(experts), size=(*sites, TOKENS)) for experts in (OLD, NEW))
    gate1[..., 2, :] = np.eye(NEW)[NEW - 1]
    norm0, norm1 = (rng.random((*sites, TOKENS, experts)) + 0.1 for experts in (OLD, NEW))
    z0, z1 = (rng.normal(size=(*sites, TOKENS, experts, rank)) for experts in (OLD, NEW))
    B0, B1 = (rng.normal(size=(*sites, experts, 5, rank)) for experts in (OLD, NEW))
    return {"gate0": gate0, "gate1": gate1, "norm0": norm0, "norm1": norm1, "z0": z0, "z1": z1, "B0": B0, "B1": B1}


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.asarray(found, float), np.asarray(wanted, float), rtol=1e-10, atol=1e-13)


SITES = [(), (2,), (2, 3)]


@pytest.mark.parametrize("sample", [None, SAMPLE])
@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("rank", [1, 3])
def test_usage(sites: tuple[int, ...], sample: np.ndarray | None, rank: int) -> None:
    s = scene(*sites, rank=rank)
    sums = m.UsageSums(2)
    sums.update(s["gate1"], s["z1"], sample)
    found = sums.result()
    close(found.load, m.load(s["gate1"], sample))
    close(found.gate_entropy, m.gate_entropy(s["gate1"], sample))
    close(found.load_entropy, m.load_entropy(s["gate1"], sample))
    close(found.coactivation, m.coactivation(s["gate1"], 2, sample))
    close(found.rank_importance, m.rank_importance(s["gate1"], s["z1"], sample))
    close(found.second_moment, np.einsum("...nek,...nel->...ekl", s["z1"], s["z1"]) / TOKENS)


@pytest.mark.parametrize("sample", [None, SAMPLE])
@pytest.mark.parametrize("sites", SITES)
def test_routing(sites: tuple[int, ...], sample: np.ndarray | None) -> None:
    s = scene(*sites)
    pair = s["gate0"], s["gate1"]
    sums = m.RoutingSums(2)
    sums.update(*pair, sample)
    found = sums.result()
    close(found.router_js, m.router_js(*pair, sample))
    close(found.mass_moved, m.mass_moved(*pair, sample))
    for one, other in zip(found.top1_switch, m.top1_switch(*pair, sample), strict=True):
        close(one, other)
    assert found.topk_overlap is not None
    for one, other in zip(found.topk_overlap, m.topk_overlap(*pair, 2, sample), strict=True):
        close(one, other)


@pytest.mark.parametrize("sample", [None, SAMPLE])
@pytest.mark.parametrize("sites", SITES)
def test_codrift_and_responsibility(sites: tuple[int, ...], sample: np.ndarray | None) -> None:
    s = scene(*sites)
    tokens = m.codrift_from_grams(s["gate0"], s["gate1"], s["z0"], s["z1"], *m.expert_grams(s["B0"], s["B1"]))
    inner = m.TokenSums(m.CoDriftTokens)
    inner.update(tokens, sample)
    for name in ("rr", "ee", "re", "u00_sq", "u11_sq"):
        wanted = getattr(tokens, name).mean(-1, keepdims=True)
        close(getattr(inner.result(), name), wanted if sample is None else getattr(tokens.per_sample(sample), name))
    close(inner.result().reduce().total, tokens.reduce(sample).total)
    arrays = [s[name] for name in ("gate0", "gate1", "norm0", "norm1")]
    sums = m.ResponsibilitySums()
    for half in (slice(0, 4), slice(4, None)):
        axis = len(sites)
        parts = [np.take(value, np.arange(TOKENS)[half], axis) for value in arrays]
        sums.update(m.responsibility_tokens(*parts), None if sample is None else sample[half])
    found, wanted = sums.result(), m.responsibility_drift(*arrays, sample)
    close(found, wanted)
    np.testing.assert_array_equal(found.reason, wanted.reason)


def test_half_of_a_pair_without_output_does_not_hide_the_other() -> None:
    s = scene(2)
    s["norm0"][0, :4] = 0  # silent in the first shard only
    s["norm1"][1] = 0
    sums = m.ResponsibilitySums()
    for half in (slice(0, 4), slice(4, None)):
        sums.update(m.responsibility_tokens(*(s[n][:, half] for n in ("gate0", "gate1", "norm0", "norm1"))))
    assert sums.result().reason.tolist() == [m.Reason.DEFINED, m.Reason.NO_OUTPUT_CURRENT]


def test_plain_sums_add_up_and_leave_their_operands_alone() -> None:
    first, second = m.ProbeSums(), m.ProbeSums()
    for _ in range(2):
        first.update(3, {"x": np.array([1.0, 2.0], dtype=np.float32)})
    second.update(5, {"x": np.array([10.0, 20.0]), "y": np.ones(1)})
    both = first.merge(second)
    assert (first.count, second.count, both.count) == (6, 5, 11)
    assert both.result()["x"].tolist() == [12.0, 24.0]
    assert both.result()["x"].dtype == np.float64
    assert both.result()["y"].tolist() == [1.0]
    assert first.result()["x"].tolist() == [2.0, 4.0]


def test_sums_by_sample_merge_by_sample_and_pass_nan_unless_told() -> None:
    def added(samples: list[int], values: list[float], **options: bool) -> m.SampleSums:
        sums = m.SampleSums()
        sums.update(np.array(samples), {"x": values}, **options)
        return sums

    first, second = added([5, 2, 5], [1.0, 10.0, 3.0]), added([9, 2], [7.0, 20.0])
    both = first.merge(second)
    assert both.sample.tolist() == [2, 5, 9]
    assert both.result()["x"].tolist() == [15.0, 2.0, 7.0]
    for merged in (first.merge(m.SampleSums()), m.SampleSums().merge(first)):
        assert merged.sample.tolist() == [2, 5]
        assert merged.result()["x"].tolist() == [10.0, 2.0]
    assert np.isnan(added([5, 5], [1.0, np.nan]).result()["x"]).tolist() == [True]
    assert added([5, 5], [1.0, np.nan], skip_undefined=True).result()["x"].tolist() == [1.0]
    assert added([], []).result()["x"].shape == (0,)
