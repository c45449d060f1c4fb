"""Sums over tokens: equal to a loop, and independent of how the tokens are cut into shards."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from driftlens.recording.accumulators import STATISTICS, ProbeSums, batch_sums

S, E, R, D = 2, 3, 4, 7


def draw(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    gate = torch.softmax(2 * torch.randn(S, n, E, generator=g), -1)
    return (
        gate,
        torch.randn(S, n, E, R, generator=g),
        torch.rand(S, n, generator=g) * 9,
        torch.randn(S, E, R, R, generator=g),
    )


def loop(gate: np.ndarray, z: np.ndarray, base: np.ndarray, root: np.ndarray) -> dict[str, np.ndarray]:
    """The definitions, token by token and expert by expert, in float64."""
    n = gate.shape[1]
    out = {
        "gate_sum": np.zeros((S, E)),
        "gate_outer": np.zeros((S, E, E)),
        "gated_energy": np.zeros((S, E, R)),
        "second_moment": np.zeros((S, E, R, R)),
        "entropy": np.zeros(S),
        "energy": np.zeros((S, E)),
        "expert_sq": np.zeros((S, E)),
        "base_sq": np.zeros(S),
    }
    for s in range(S):
        for i in range(n):
            out["gate_outer"][s] += np.outer(gate[s, i], gate[s, i])
            out["base_sq"][s] += base[s, i] ** 2
            for e in range(E):
                p, v = gate[s, i, e], z[s, i, e]
                out["gate_sum"][s, e] += p
                out["gated_energy"][s, e] += p * v**2
                out["second_moment"][s, e] += np.outer(v, v)
                out["entropy"][s] -= p * math.log(p) if p > 0 else 0.0
                out["energy"][s, e] += v @ v
                out["expert_sq"][s, e] += np.sum((root[s, e] @ v) ** 2)
    return out


@pytest.mark.parametrize("n", [1, 2, 23])
def test_batch_sums_equal_a_loop_over_tokens(n: int) -> None:
    arrays = draw(n, seed=n)
    found = batch_sums(*arrays)
    expected = loop(*(a.double().numpy() for a in arrays))
    assert set(found) == set(STATISTICS)
    for name in STATISTICS:
        np.testing.assert_allclose(found[name].numpy(), expected[name], rtol=2e-5, atol=1e-5, err_msg=name)
        assert found[name].dtype == torch.float32


def test_an_expert_that_topk_left_out_adds_nothing() -> None:
    gate, z, base, root = draw(5, seed=0)
    gate[..., 1] = 0.0
    sums = batch_sums(gate, z, base, root)
    assert torch.isfinite(sums["entropy"]).all()
    assert (sums["gate_sum"][:, 1] == 0).all()
    assert (sums["gated_energy"][:, 1] == 0).all()


@settings(max_examples=30, deadline=None)
@given(data=st.data(), n=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_shards_in_any_order_give_the_one_pass_result(data: st.DataObject, n: int, seed: int) -> None:
    gate, z, base, root = draw(n, seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    order = data.draw(st.permutations(range(len(cuts) + 1)))
    bounds = [0, *cuts, n]

    one = ProbeSums()
    one.update(n, {k: v.numpy() for k, v in batch_sums(gate, z, base, root).items()})

    shards = []
    for lo, hi in itertools.pairwise(bounds):
        shard = ProbeSums()
        part = batch_sums(gate[:, lo:hi], z[:, lo:hi], base[:, lo:hi], root)
        shard.update(hi - lo, {k: v.numpy() for k, v in part.items()})
        shards.append(shard)
    merged = ProbeSums()
    for index in order:
        merged = merged.merge(shards[index])

    assert merged.count == one.count == n
    for name, value in one.result().items():
        np.testing.assert_allclose(merged.result()[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(5)), seed=st.integers(0, 2**16))
def test_merging_is_exact_to_float64_in_any_order(order: list[int], seed: int) -> None:
    shards = []
    for index in range(5):
        shard = ProbeSums()
        sums = batch_sums(*draw(index + 1, seed + index))
        shard.update(index + 1, {k: v.numpy() for k, v in sums.items()})
        shards.append(shard)
    straight, shuffled = ProbeSums(), ProbeSums()
    for index in range(5):
        straight = straight.merge(shards[index])
        shuffled = shuffled.merge(shards[order[index]])
    for name, value in straight.result().items():
        assert value.dtype == np.float64
        np.testing.assert_allclose(shuffled.result()[name], value, rtol=1e-13, atol=1e-13, err_msg=name)


def test_merging_leaves_its_operands_alone_and_result_is_a_copy() -> None:
    left, right = ProbeSums(), ProbeSums()
    left.update(2, {"entropy": np.ones(S)})
    right.update(3, {"entropy": np.full(S, 2.0)})
    merged = left.merge(right)
    merged.result()["entropy"][:] = 99
    assert (left.count, right.count, merged.count) == (2, 3, 5)
    np.testing.assert_array_equal(left.result()["entropy"], 1.0)
    np.testing.assert_array_equal(merged.result()["entropy"], 3.0)


def test_float32_batches_do_not_lose_small_tokens_in_a_long_sum() -> None:
    total = ProbeSums()
    for _ in range(2000):
        total.update(1, {"entropy": np.full(S, 1e-4, dtype=np.float32)})
    total.update(1, {"entropy": np.full(S, 1e6, dtype=np.float32)})
    np.testing.assert_allclose(total.result()["entropy"], 1e6 + 0.2, rtol=1e-10)
