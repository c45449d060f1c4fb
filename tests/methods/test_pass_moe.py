"""PASs-MoE against its equations, written out in numpy and as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from driftlens.adapters import iter_sites
from driftlens.errors import UnknownNameError
from driftlens.methods import METHODS, AdapterOptions, TaskContext, create_method
from driftlens.methods.pass_moe import pathway_importance, pathway_weights, stabilisation_penalty

ADAPTER = AdapterOptions(num_experts=3, r=2, target_modules=["up_proj", "down_proj"])


def tiny_model(method, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = get_peft_model(LlamaForCausalLM(config), method.adapter_config(ADAPTER))
    with torch.no_grad():
        for _, site in iter_sites(model):
            site.moe_lora_A["default"].weight.normal_(std=0.5)
            site.moe_lora_B["default"].weight.normal_(std=0.5)
    return model


def replay_of(model, batches):
    def replay():
        for ids, mask in batches:
            yield mask
            with torch.no_grad():
                model(input_ids=ids, attention_mask=mask)

    return replay


def random_batches(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(n):
        ids = torch.randint(0, 40, (3, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        batches.append((ids, mask))
    return batches


def move(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_importance_equals_two_lines_of_numpy():
    rng = np.random.default_rng(0)
    gate, z = rng.dirichlet(np.ones(4), size=50), rng.normal(size=(50, 4, 3))
    expected = (gate[:, :, None] * z**2).mean(axis=0)
    got = pathway_importance(torch.from_numpy(gate), torch.from_numpy(z))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_importance_of_a_task_is_measured_on_real_tokens(variant):
    """The whole path (hooks, padding, batches) against gates and pathways taken by independent hooks."""
    method = create_method("pass-moe", {"variant": variant, "temperature_start": 1.0, "temperature_end": 1.0})
    model = tiny_model(method).eval()
    batches = random_batches(3)
    seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name, _ in iter_sites(model)}
    task = TaskContext(1, "first", replay_of(model, batches))
    if variant == "release":
        method.begin_task(model, task)
        for ids, mask in batches:
            with method.observing(model, mask):
                model(input_ids=ids, attention_mask=mask)
    method.end_task(model, task)
    handles = []
    for name, site in iter_sites(model):
        gate_module = site.moe_lora_gate["default"]
        handles.append(
            gate_module.register_forward_hook(
                lambda _m, args, pi, name=name: seen[name].append((pi.detach().numpy(), args[1].detach().numpy()))
            )
        )
    with torch.no_grad():
        for ids, mask in batches:
            model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    for name, records in seen.items():
        kept = [
            (pi[mask.numpy() == 1], z[mask.numpy() == 1]) for (pi, z), (_, mask) in zip(records, batches, strict=True)
        ]
        if variant == "paper":
            gate, z = np.concatenate([k[0] for k in kept]), np.concatenate([k[1] for k in kept])
            expected = (gate[:, :, None] * z**2).mean(axis=0)
        else:
            expected = None
            for gate, z in kept:
                value = (z**2).mean(axis=0) * gate.mean(axis=0)[:, None]
                expected = value if expected is None else 0.9 * expected + 0.1 * value
        got = method.state_dict()[f"{name}.importance"].numpy()
        np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_penalty_and_gradient_equal_a_loop_and_autograd():
    torch.manual_seed(1)
    E, r, d_in, d_out = 3, 2, 5, 4
    A, a_ref = torch.randn(E * r, d_in, dtype=torch.double, requires_grad=True), torch.randn(E * r, d_in).double()
    B, b_ref = torch.randn(d_out, E * r, dtype=torch.double, requires_grad=True), torch.randn(d_out, E * r).double()
    w = torch.rand(E, r).double()
    got = stabilisation_penalty(A, B, a_ref, b_ref, w, 0.3, 0.07)
    expected = 0.0
    for e in range(E):
        for k in range(r):
            path = e * r + k
            expected += 0.3 * w[e, k] * sum((A[path, i] - a_ref[path, i]) ** 2 for i in range(d_in))
            expected += 0.07 * w[e, k] * sum((B[i, path] - b_ref[i, path]) ** 2 for i in range(d_out))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    grad_a, grad_b = torch.autograd.grad(got, (A, B))
    loop_a, loop_b = torch.autograd.grad(expected, (A, B))
    torch.testing.assert_close(grad_a, loop_a, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad_b, loop_b, rtol=1e-12, atol=1e-14)
    # closed form, as a hand-written gradient injection would add it
    torch.testing.assert_close(grad_a, 2 * 0.3 * w.flatten()[:, None] * (A - a_ref), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad_b, 2 * 0.07 * w.flatten()[None, :] * (B - b_ref), rtol=1e-12, atol=1e-14)


def test_whole_model_penalty_is_the_sum_over_sites_and_release_divides_and_ramps():
    results = {}
    for variant in ("paper", "release"):
        method = create_method(
            "pass-moe", {"variant": variant, "reference": "previous", "importance": "mean_of_product"}
        )
        model = tiny_model(method)
        first = TaskContext(1, "first", replay_of(model, random_batches(2)))
        method.begin_task(model, first)
        assert method.penalty(model) is None, "nothing may be penalised before a task was finished"
        method.end_task(model, first)
        before = {
            name: (s.moe_lora_A["default"].weight.clone(), s.moe_lora_B["default"].weight.clone())
            for name, s in iter_sites(model)
        }
        move(model, 3)
        method.begin_task(model, TaskContext(2, "second", replay_of(model, [])))
        method.begin_step(model, 0.05)
        early = method.penalty(model)
        method.begin_step(model, 0.5)
        full = method.penalty(model)
        expected, count = 0.0, 0
        for name, site in iter_sites(model):
            importance = method.state_dict()[f"{name}.importance"]
            w = pathway_weights(importance, 10.0, 1.0 if variant == "paper" else 0.4)
            a0, b0 = before[name]
            A, B = site.moe_lora_A["default"].weight, site.moe_lora_B["default"].weight
            expected += stabilisation_penalty(A, B, a0, b0, w, 5e-4, 5e-5)
            count += w.numel()
        if variant == "release":
            expected = expected / count
            torch.testing.assert_close(early, full * 0.05 / 0.2)
        else:
            torch.testing.assert_close(early, full)
        torch.testing.assert_close(full, expected)
        results[variant] = full
    assert results["paper"] > results["release"]


def test_importance_weighted_reference_is_the_running_average():
    method = create_method("pass-moe", {"variant": "release", "importance": "mean_of_product"})
    model = tiny_model(method)
    name = next(iter(iter_sites(model)))[0]
    first = TaskContext(1, "first", replay_of(model, random_batches(2, 5)))
    method.end_task(model, first)
    i1 = method.state_dict()[f"{name}.importance"].clone()
    a1 = method.state_dict()[f"{name}.a_ref"].clone()
    move(model, 4)
    method.end_task(model, TaskContext(2, "second", replay_of(model, random_batches(2, 6))))
    state = method.state_dict()
    i2 = state[f"{name}.importance"] - i1
    site = dict(iter_sites(model))[name]
    a2 = site.moe_lora_A["default"].weight.detach()
    weight1, weight2 = i1.flatten()[:, None], i2.flatten()[:, None]
    torch.testing.assert_close(
        state[f"{name}.a_ref"], (weight1 * a1 + weight2 * a2) / (weight1 + weight2), rtol=1e-4, atol=1e-6
    )


def test_paper_reference_is_the_previous_checkpoint_and_importance_a_plain_sum():
    method = create_method("pass-moe", {})
    model = tiny_model(method)
    totals = []
    for index in (1, 2):
        method.end_task(model, TaskContext(index, f"task{index}", replay_of(model, random_batches(2))))
        totals.append({k: v.clone() for k, v in method.state_dict().items()})
        for name, site in iter_sites(model):
            assert torch.equal(totals[-1][f"{name}.a_ref"], site.moe_lora_A["default"].weight)
            assert torch.equal(totals[-1][f"{name}.b_ref"], site.moe_lora_B["default"].weight)
    for name, _ in iter_sites(model):  # the same weights and data twice: the sum is twice the first
        torch.testing.assert_close(totals[1][f"{name}.importance"], 2 * totals[0][f"{name}.importance"])


def test_lambda_zero_adds_nothing():
    method = create_method("pass-moe", {"lambda_a": 0, "lambda_b": 0})
    model = tiny_model(method)
    task = TaskContext(1, "first", replay_of(model, random_batches(1)))
    method.end_task(model, task)
    method.begin_task(model, TaskContext(2, "second", task.replay))
    assert method.penalty(model) is None


def test_no_parameter_beyond_moelora_without_its_router():
    def trainable(name):
        method = create_method(name, {})
        model = tiny_model(method)
        return {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}

    mixture, passes = trainable("moe-lora"), trainable("pass-moe")
    routers = {n for n in mixture if "gate" in n}
    assert routers
    assert {n: c for n, c in mixture.items() if n not in routers} == passes


def test_sequential_lora_has_the_same_budget_without_router():
    sequential = create_method("seq-lora", {})
    model = tiny_model(sequential)
    passes = tiny_model(create_method("pass-moe", {}))
    count = lambda m: sum(p.numel() for p in m.parameters() if p.requires_grad)  # noqa: E731
    assert count(model) == count(passes)
    scalings = {site.scaling["default"] for _, site in iter_sites(model)}
    assert scalings == {site.scaling["default"] for _, site in iter_sites(passes)}


@given(
    st.lists(st.floats(0, 100, allow_subnormal=False), min_size=6, max_size=6),
    st.sampled_from([0.2, 0.4, 0.5, 1.0]),
    st.sampled_from([1.5, 10.0]),
)
def test_weights_are_clipped_sparse_and_ordered(values, fraction, clip):
    importance = torch.tensor(values, dtype=torch.double).reshape(2, 3)
    w = pathway_weights(importance, clip, fraction)
    assert w.min() >= 0
    assert w.max() <= clip
    assert int((w > 0).sum()) <= max(1, math.ceil(fraction * 6))
    kept = w.flatten() > 0
    if kept.any() and (~kept).any():
        assert importance.flatten()[kept].min() >= importance.flatten()[~kept].max() - 1e-9


def test_random_importance_permutes_within_a_site():
    plain, control = create_method("pass-moe", {}), create_method("pass-moe", {"random_importance": True})
    model = tiny_model(plain)
    for method in (plain, control):
        method.end_task(model, TaskContext(1, "first", replay_of(model, random_batches(2))))
        method.begin_task(model, TaskContext(2, "second", replay_of(model, [])))
    name = next(iter(iter_sites(model)))[0]
    a, b = plain._weights[name].flatten(), control._weights[name].flatten()
    assert not torch.equal(a, b)
    torch.testing.assert_close(a.sort().values, b.sort().values)


def test_release_temperature_schedule():
    method = create_method("pass-moe", {"variant": "release"})
    model = tiny_model(method)
    taus = []
    for progress in (0.0, 0.5, 1.0):
        method.begin_step(model, progress)
        taus.append(next(iter(iter_sites(model)))[1].moe_lora_gate["default"].temperature)
    assert taus == pytest.approx([1.5, 1.1, 0.7])


def test_state_survives_a_round_trip():
    method = create_method("pass-moe", {})
    model = tiny_model(method)
    method.end_task(model, TaskContext(1, "first", replay_of(model, random_batches(1))))
    other = create_method("pass-moe", {})
    other.load_state_dict(method.state_dict(), torch.device("cpu"))
    assert other.state_dict().keys() == method.state_dict().keys()
    assert all(torch.equal(other.state_dict()[k], v) for k, v in method.state_dict().items())


def test_unknown_method_and_option():
    with pytest.raises(UnknownNameError, match=r"Unknown method 'pass-mo'. Did you mean 'pass-moe'\? Known: moe-lora"):
        METHODS.get("pass-mo")
    with pytest.raises(ValidationError, match="lamda_a"):
        create_method("pass-moe", {"lamda_a": 1.0})


def test_hooks_are_gone_after_a_failing_pass():
    method = create_method("pass-moe", {})
    model = tiny_model(method)

    def broken():
        yield torch.ones(1, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.end_task(model, TaskContext(1, "first", broken))
    assert all(not site.moe_lora_gate["default"]._forward_hooks for _, site in iter_sites(model))
