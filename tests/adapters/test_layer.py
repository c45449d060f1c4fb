"""The layer equals a loop over experts written from the equation: outputs and every gradient."""

import copy

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.utils.checkpoint import checkpoint

from driftlens.adapters import MoELoraConfig, MoELoraLinear

from .loop import reference_gate, reference_layer
from .support import make_layer

GATE_KINDS = ["softmax", "topk", "energy"]
SHAPES = [  # d_in, d_out, E, r, top_k
    pytest.param((7, 5, 3, 2, 2), id="odd"),
    pytest.param((13, 17, 6, 5, 1), id="top1"),
    pytest.param((4, 3, 1, 3, 1), id="one-expert"),
    pytest.param((5, 9, 4, 1, 3), id="rank-one"),
    pytest.param((1, 1, 1, 1, 1), id="smallest"),
]
INPUTS = [pytest.param((11,), id="2d"), pytest.param((3, 5), id="3d"), pytest.param((2, 3, 2), id="4d")]


def reference_run(layer, h, target):
    """Output and gradients (input, A, B, router) of the loop, on copies of the layer's parameters."""
    name = "default"
    gate = layer.moe_lora_gate[name]
    h = h.detach().clone().requires_grad_()
    A = layer.moe_lora_A[name].weight.detach().clone().requires_grad_()
    B = layer.moe_lora_B[name].weight.detach().clone().requires_grad_()
    router = gate.weight.detach().clone().requires_grad_() if hasattr(gate, "weight") else None
    flat = h.reshape(-1, h.shape[-1])
    r, top_k = layer.r[name], getattr(gate, "top_k", 0)
    pi = reference_gate(gate.kind, flat, A, router, r, gate.temperature, top_k)
    base = layer.base_layer
    y = reference_layer(flat, base.weight, base.bias, A, B, pi, r, layer.scaling[name]).reshape(target.shape)
    (y * target).sum().backward()
    return y.detach(), {"input": h.grad, "A": A.grad, "B": B.grad, "router": None if router is None else router.grad}


def layer_run(layer, h, target, forward=None):
    h = h.detach().clone().requires_grad_()
    layer.zero_grad()
    y = (forward or layer)(h)
    (y.float() * target).sum().backward()
    gate = layer.moe_lora_gate["default"]
    return y.detach(), {
        "input": h.grad,
        "A": layer.moe_lora_A["default"].weight.grad,
        "B": layer.moe_lora_B["default"].weight.grad,
        "router": gate.weight.grad if hasattr(gate, "weight") else None,
    }


def assert_same(got, expected, atol, rtol=1e-5):
    y, grads = got
    y_ref, grads_ref = expected
    torch.testing.assert_close(y, y_ref, atol=atol, rtol=rtol, check_dtype=False)
    assert grads.keys() == grads_ref.keys()
    for key, grad in grads_ref.items():
        if grad is None:
            assert grads[key] is None
        else:
            scale = grad.abs().max().clamp_min(1.0)
            torch.testing.assert_close(grads[key] / scale, grad / scale, atol=atol, rtol=rtol, check_dtype=False)


@pytest.mark.parametrize("tau", [1.0, 0.6])
@pytest.mark.parametrize("lead", INPUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_equals_the_loop_over_experts(gate, shape, lead, tau):
    d_in, d_out, E, r, top_k = shape
    layer = make_layer(d_in, d_out, num_experts=E, r=r, gate=gate, top_k=top_k, gate_temperature=tau, lora_alpha=3)
    h, target = torch.randn(*lead, d_in), torch.randn(*lead, d_out)
    expected = reference_run(layer, h, target)
    assert expected[1]["A"].abs().max() > 0  # the comparison is not one of zeros
    assert_same(layer_run(layer, h, target), expected, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_gradient_checkpointing_changes_nothing(gate, reentrant):
    layer = make_layer(num_experts=4, r=3, gate=gate)
    h, target = torch.randn(6, 7), torch.randn(6, 5)
    plain = layer_run(layer, h, target)
    again = layer_run(layer, h, target, forward=lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert_same(again, plain, atol=0, rtol=0)
    assert_same(again, reference_run(layer, h, target), atol=1e-5)


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_bf16_autocast_follows_the_loop(gate):
    layer = make_layer(64, 32, num_experts=4, r=4, gate=gate)
    with torch.no_grad():
        for parameter in (layer.moe_lora_A["default"].weight, layer.moe_lora_B["default"].weight):
            parameter.mul_(0.3)  # keeps the energies near 1: their differences are what bfloat16 blurs
    h, target = torch.randn(40, 64), torch.randn(40, 32)

    def forward(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    y, grads = layer_run(layer, h, target, forward)
    assert y.dtype == torch.bfloat16
    y_ref, grads_ref = reference_run(layer, h, target)
    # bfloat16 keeps 8 bits; the tolerance is 2 % of the largest value.
    assert (y.float() - y_ref).abs().max() < 0.02 * y_ref.abs().max()
    for key, grad in grads_ref.items():
        if grad is not None:
            assert grads[key].dtype == torch.float32
            assert (grads[key] - grad).norm() < 0.05 * grad.norm(), key


def test_one_energy_expert_is_peft_lora():
    r, d_in, d_out = 4, 9, 6
    layer = make_layer(d_in, d_out, num_experts=1, r=r, gate="energy", lora_alpha=10)
    base = copy.deepcopy(layer.base_layer)
    lora = LoraLinear(base, "default", config=LoraConfig(r=r, lora_alpha=10), r=r, lora_alpha=10)
    lora.lora_A["default"].weight.data = layer.moe_lora_A["default"].weight.data.clone()
    lora.lora_B["default"].weight.data = layer.moe_lora_B["default"].weight.data.clone()
    h = torch.randn(3, 4, d_in)
    torch.testing.assert_close(layer(h), lora(h), atol=1e-5, rtol=1e-5)


def test_a_fresh_adapter_leaves_the_base_output_unchanged():
    base = nn.Linear(7, 5)
    h = torch.randn(4, 7)
    layer = MoELoraLinear(base, "default", MoELoraConfig(init_std=0.02, num_experts=50, r=20))
    assert torch.equal(layer(h), base(h))
    weight = layer.moe_lora_A["default"].weight
    assert weight.shape == (1000, 7)
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not layer.moe_lora_B["default"].weight.any()
