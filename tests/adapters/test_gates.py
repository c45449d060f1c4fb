"""Gates: rows sum to 1, order of experts is immaterial, ties, noise, normalised input, load balance."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from driftlens.adapters import GATES, MoELoraConfig, load_balance_loss

from .support import make_layer

GATE_KINDS = ["softmax", "topk", "energy"]


def gate_weights(layer, h):
    return layer.moe_lora_gate["default"](h, layer.moe_lora_A["default"](h))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(GATE_KINDS),
    E=st.integers(1, 9),
    r=st.integers(1, 5),
    n=st.integers(1, 6),
    scale=st.sampled_from([0.0, 1e-4, 1.0, 1e3]),
    tau=st.sampled_from([0.05, 1.0, 20.0]),
    seed=st.integers(0, 99),
)
def test_rows_sum_to_one(kind, E, r, n, scale, tau, seed):
    layer = make_layer(num_experts=E, r=r, gate=kind, top_k=1 + seed % E, gate_temperature=tau, seed=seed)
    pi = gate_weights(layer, scale * torch.randn(n, 7))
    assert pi.shape == (n, E)
    assert pi.dtype == torch.float32
    assert (pi >= 0).all()
    torch.testing.assert_close(pi.sum(-1), torch.ones(n), atol=1e-6, rtol=0)
    if kind == "topk":
        assert ((pi > 0).sum(-1) <= 1 + seed % E).all()


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(GATE_KINDS), E=st.integers(2, 7), r=st.integers(1, 4), seed=st.integers(0, 99))
def test_renaming_the_experts_changes_nothing(kind, E, r, seed):
    layer = make_layer(num_experts=E, r=r, gate=kind, top_k=1 + seed % E, seed=seed)
    h = torch.randn(4, 7)
    order = torch.randperm(E)
    renamed = copy.deepcopy(layer)
    A, B = renamed.moe_lora_A["default"].weight.data, renamed.moe_lora_B["default"].weight.data
    A.copy_(A.view(E, r, 7)[order].reshape(E * r, 7))
    B.copy_(B.view(5, E, r)[:, order].reshape(5, E * r))
    if kind != "energy":
        router = renamed.moe_lora_gate["default"].weight.data
        router.copy_(router[order].clone())
    torch.testing.assert_close(gate_weights(renamed, h), gate_weights(layer, h)[:, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(renamed(h), layer(h), atol=2e-5, rtol=1e-4)


def test_topk_over_all_experts_is_softmax():
    h = torch.randn(9, 7)
    dense = make_layer(num_experts=5, gate="softmax")
    sparse = make_layer(num_experts=5, gate="topk", top_k=5)
    assert torch.equal(gate_weights(sparse, h), gate_weights(dense, h))


def test_topk_is_the_renormalised_softmax_of_the_best():
    h = torch.randn(9, 7)
    dense = gate_weights(make_layer(num_experts=5, gate="softmax"), h)
    sparse = gate_weights(make_layer(num_experts=5, gate="topk", top_k=2), h)
    best, index = dense.topk(2, dim=-1)
    expected = torch.zeros_like(dense).scatter(-1, index, best / best.sum(-1, keepdim=True))
    torch.testing.assert_close(sparse, expected)


def test_of_equal_scores_the_lower_index_wins():
    layer = make_layer(num_experts=6, gate="topk", top_k=3)
    row = torch.randn(7)
    layer.moe_lora_gate["default"].weight.data.copy_(torch.stack([row * 0, row, row, row, row, row * 0]))
    h = torch.stack([row, -row])  # experts 1..4 tie at the top, then 0 and 5 tie above them
    third = torch.tensor(1 / 3)
    torch.testing.assert_close(gate_weights(layer, h[0]), torch.tensor([0, 1, 1, 1, 0, 0]) * third)
    pi = gate_weights(layer, h[1])
    assert pi.nonzero().flatten().tolist()[-1] == 5
    assert set(pi.nonzero().flatten().tolist()) <= {0, 1, 5}
    assert not pi[2:5].any()


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_one_expert_has_weight_one(kind):
    pi = gate_weights(make_layer(num_experts=1, gate=kind, top_k=1), torch.randn(3, 4, 7))
    assert torch.equal(pi, torch.ones(3, 4, 1))


@pytest.mark.parametrize("kind", ["softmax", "topk"])
def test_the_router_stays_float32_under_autocast(kind):
    layer = make_layer(num_experts=4, gate=kind)
    h = torch.randn(5, 7)
    plain = gate_weights(layer, h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gate_weights(layer, h)
    assert torch.equal(mixed, plain)


def test_the_energy_gate_sums_in_float32_under_autocast():
    layer = make_layer(num_experts=4, gate="energy")
    z = torch.randn(5, 4, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = layer.moe_lora_gate["default"](torch.randn(5, 7), z)
    expected = torch.softmax(z.float().pow(2).sum(-1) / 8, -1)
    torch.testing.assert_close(mixed, expected, atol=1e-6, rtol=1e-6)


def test_energy_is_the_mean_square_over_the_rank():
    layer = make_layer(d_in=2, num_experts=2, r=2, gate="energy")
    layer.moe_lora_A["default"].weight.data.copy_(torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 0]]))
    # A_1 h = (1, 1): energy 2 / 2; A_2 h = (2, 0): energy 4 / 2
    expected = torch.softmax(torch.tensor([1.0, 2.0]), -1)
    torch.testing.assert_close(gate_weights(layer, torch.ones(2)), expected)


def test_noise_acts_in_training_only():
    layer = make_layer(num_experts=4, gate="softmax", router_noise=1.0)
    silent = make_layer(num_experts=4, gate="softmax")
    h = torch.randn(5, 7)
    assert torch.equal(gate_weights(layer.eval(), h), gate_weights(silent, h))
    layer.train()
    torch.manual_seed(3)
    first = gate_weights(layer, h)
    assert not torch.allclose(first, gate_weights(silent, h), atol=1e-3)
    torch.manual_seed(3)
    assert torch.equal(gate_weights(layer, h), first)


def test_router_layernorm_ignores_the_length_of_the_input():
    layer = make_layer(num_experts=4, gate="softmax", router_layernorm=True)
    h = torch.randn(5, 7)
    torch.testing.assert_close(gate_weights(layer, 50 * h), gate_weights(layer, h), atol=1e-4, rtol=1e-4)
    raw = make_layer(num_experts=4, gate="softmax")
    assert not torch.allclose(gate_weights(raw, 50 * h), gate_weights(raw, h), atol=1e-2)


def test_the_gate_sees_the_input_before_dropout():
    layer = make_layer(num_experts=3, gate="softmax", lora_dropout=0.9).train()
    plain = make_layer(num_experts=3, gate="softmax").eval()
    h = torch.randn(6, 7)
    seen = []
    layer.moe_lora_gate["default"].register_forward_hook(lambda module, args, output: seen.append(output))
    dropped = layer(h)
    assert torch.equal(seen[0], gate_weights(plain, h))
    assert not torch.allclose(dropped, plain(h))
    assert torch.equal(layer.eval()(h), plain(h))


def test_balance_loss_is_one_when_uniform_and_the_number_of_experts_when_collapsed():
    layer = make_layer(num_experts=4, gate="softmax", load_balance_coef=0.5).train()
    router = layer.moe_lora_gate["default"].weight
    router.data.zero_()
    layer(torch.ones(6, 7))
    assert load_balance_loss(layer).item() == pytest.approx(0.5 * 1.0)
    router.data[2] = 100.0
    layer(torch.ones(6, 7))
    assert load_balance_loss(layer).item() == pytest.approx(0.5 * 4.0)


def test_balance_loss_of_topk_follows_its_equation():
    layer = make_layer(num_experts=5, gate="topk", top_k=2, load_balance_coef=1.0).train()
    h = torch.randn(8, 7)
    weights = torch.softmax(h @ layer.moe_lora_gate["default"].weight.T, -1)
    counts = [sum(int(e in row.topk(2).indices.tolist()) for row in weights) for e in range(5)]
    expected = 5 * sum(counts[e] / 16 * weights[:, e].mean().item() for e in range(5))
    layer(h)
    assert load_balance_loss(layer).item() == pytest.approx(expected, rel=1e-5)


def test_balance_loss_is_counted_once_with_gradient_checkpointing():
    layer = make_layer(num_experts=4, gate="softmax", load_balance_coef=1.0).train()
    router = layer.moe_lora_gate["default"].weight
    h = torch.randn(6, 7, requires_grad=True)
    grads = []
    for forward in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        loss = forward(h).sum() + load_balance_loss(layer)
        loss.backward()
        grads.append(router.grad.clone())
    assert torch.equal(*grads)


def test_balance_loss_is_absent_without_a_coefficient_and_in_evaluation():
    layer = make_layer(num_experts=4, gate="softmax")
    layer.train()(torch.randn(2, 7))
    assert load_balance_loss(layer) is None
    layer = make_layer(num_experts=4, gate="softmax", load_balance_coef=1.0)
    layer.eval()(torch.randn(2, 7))
    assert load_balance_loss(layer) is None


def test_a_layer_can_be_copied_after_a_training_step():
    layer = make_layer(num_experts=4, gate="softmax", load_balance_coef=1.0).train()
    h = torch.randn(2, 7)
    assert torch.equal(copy.deepcopy(layer)(h), layer(h))
    assert load_balance_loss(copy.deepcopy(layer)) is None


def test_every_registered_gate_gives_a_distribution():
    for kind in GATES:
        config = MoELoraConfig(num_experts=3, r=2, gate=kind)
        gate = GATES.get(kind)(7, config)
        pi = gate(torch.randn(4, 7), torch.randn(4, 3, 2))
        assert isinstance(gate, nn.Module)
        torch.testing.assert_close(pi.sum(-1), torch.ones(4))
        assert kind in repr(gate)
