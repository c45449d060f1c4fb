"""MoE-LoRA behaves as PEFT users expect of any method, on a text model and on a LLaVA."""

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from driftlens.adapters import GATES, MoELoraConfig, MoELoraLinear, SoftmaxGate, iter_sites, set_gate_temperature
from driftlens.errors import ConfigError, UnknownNameError

from .support import make_llama, make_llava, randomise, tokens

MLP = ["gate_proj", "up_proj", "down_proj"]
GATE_KINDS = ["softmax", "topk", "energy"]


def config(**changes):
    return MoELoraConfig(**{"num_experts": 3, "r": 2, "target_modules": MLP, **changes})


def adapted(**changes):
    return randomise(get_peft_model(make_llama(), config(**changes)))


def logits(model, **extra):
    with torch.no_grad():
        return model(input_ids=tokens(), **extra).logits


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_save_and_load_is_bit_exact(gate, tmp_path):
    model = adapted(gate=gate, layers_to_transform=[1, 2]).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(model), logits(make_llama()))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    trainable = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    assert trainable.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    renamed = PeftModel.from_pretrained(make_llama(), tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    assert torch.equal(logits(renamed.eval()), logits(model))


def test_saving_twice_writes_the_same_bytes(tmp_path):
    model = adapted()
    for folder in ("a", "b"):
        model.save_pretrained(tmp_path / folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_llava_adapts_the_language_layers_asked_for(tmp_path):
    asked = config(target_modules=["q_proj", "down_proj"], layers_to_transform=[2], exclude_modules=r".*vision_tower.*")
    model = randomise(get_peft_model(make_llava(), asked)).eval()
    prefix = "model.language_model.layers.2."
    assert [name for name, _ in iter_sites(model)] == [prefix + "self_attn.q_proj", prefix + "mlp.down_proj"]
    ids = torch.cat([torch.full((2, 4), 39), tokens()], dim=1)
    pixels = torch.randn(2, 3, 8, 8)

    def see(model):
        with torch.no_grad():
            return model(input_ids=ids, pixel_values=pixels).logits

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_llava(), tmp_path).eval()
    assert torch.equal(see(again), see(model))
    with again.disable_adapter():
        assert torch.equal(see(again), see(make_llava()))
    assert not torch.equal(see(again), see(make_llava()))


def test_layers_to_transform_adapts_only_these_layers():
    model = get_peft_model(make_llama(), config(target_modules=["down_proj"], layers_to_transform=[0, 2]))
    assert [name for name, _ in iter_sites(model)] == ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]


def test_adapters_can_be_added_chosen_disabled_and_deleted():
    model = adapted().eval()
    base, first = logits(make_llama()), logits(model)
    model.add_adapter("second", config(num_experts=5, r=3, gate="energy", target_modules=["down_proj", "q_proj"]))
    assert torch.equal(logits(model), first)  # not active yet
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".second." in name)
    randomise(model, "second", seed=5)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(second, first)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".second." in name for name in trainable)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any(".second." in name for name, _ in model.named_parameters())
    assert all("second" not in layer.scaling for _, layer in iter_sites(model))


def test_several_active_adapters_add_up():
    base = nn.Linear(7, 5)
    layer = MoELoraLinear(base, "a", config(gate="softmax"))
    layer.update_layer("b", config(num_experts=4, gate="energy", lora_alpha=3))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    h = torch.randn(3, 7)
    alone = {}
    for name in ("a", "b"):
        layer.set_adapter(name)
        alone[name] = layer(h) - base(h)
    layer.set_adapter(["a", "b"])
    torch.testing.assert_close(layer(h) - base(h), alone["a"] + alone["b"], atol=1e-4, rtol=1e-4)


def test_modules_to_save_travel_with_the_adapter(tmp_path):
    model = adapted(modules_to_save=["lm_head"]).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1.0)
    assert model.get_output_embeddings().weight.requires_grad
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_the_energy_gate_has_no_parameters_beyond_moelora_without_its_router():
    router, energy = (adapted(gate=gate).get_nb_trainable_parameters()[0] for gate in ("softmax", "energy"))
    sites = [layer for _, layer in iter_sites(adapted())]
    assert router - energy == sum(3 * layer.d_in for layer in sites)
    assert energy == sum(3 * 2 * (layer.d_in + layer.d_out) for layer in sites)


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_gradient_checkpointing_of_the_whole_model_gives_the_same_gradients(gate):
    model = adapted(gate=gate).train()
    collected = []
    for activate in (False, True):
        if activate:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        collected.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    plain, again = collected
    assert plain.keys() == again.keys()
    assert all(torch.equal(again[name], grad) for name, grad in plain.items())
    assert any(grad.any() for grad in plain.values())


def test_hooks_see_what_the_layer_used():
    model = adapted(gate="topk").eval()
    _, layer = next(iter_sites(model))
    seen = {}
    parts = {"base": layer.base_layer, "z": layer.moe_lora_A, "pi": layer.moe_lora_gate, "out": layer.moe_lora_B}
    for key, part in parts.items():
        module = part if key == "base" else part["default"]
        module.register_forward_hook(lambda module, args, output, key=key: seen.__setitem__(key, output.clone()))
    layer.register_forward_hook(lambda module, args, output: seen.__setitem__("y", output))
    logits(model)
    gated = (seen["pi"].unsqueeze(-1) * seen["z"]).flatten(-2)
    expected = layer.scaling["default"] * gated @ layer.moe_lora_B["default"].weight.T
    torch.testing.assert_close(seen["out"], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(seen["y"], seen["base"] + seen["out"])


def test_a_bfloat16_base_keeps_its_dtype_and_the_adapter_float32():
    model = randomise(get_peft_model(make_llama().bfloat16(), config(gate="energy")))
    _, layer = next(iter_sites(model))
    assert layer.moe_lora_A["default"].weight.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16
    narrow = get_peft_model(make_llama().bfloat16(), config(), autocast_adapter_dtype=False)
    assert logits(narrow).dtype == torch.bfloat16
    assert next(iter_sites(narrow))[1].moe_lora_B["default"].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("gate", GATE_KINDS)
def test_a_layer_compiles_without_a_graph_break(gate):
    torch._dynamo.reset()
    _, layer = next(iter_sites(adapted(gate=gate)))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    h = torch.randn(2, 3, 16, requires_grad=True)
    y = compiled(h)
    torch.testing.assert_close(y, layer(h), atol=1e-6, rtol=1e-6)
    y.sum().backward()
    assert layer.moe_lora_A["default"].weight.grad.any()


def test_generation_runs_with_an_adapter():
    model = adapted(gate="energy").eval()
    ids = model.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert ids.shape == (2, 9)


def test_merging_is_refused_and_unload_gives_the_base_back():
    model = adapted().eval()
    _, layer = next(iter_sites(model))
    for attempt in (model.merge_and_unload, model.merge_adapter, layer.merge):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert "cannot be merged into the base weights: its update depends on the input" in str(caught.value)
        assert "save_pretrained" in str(caught.value)
    assert "unload()" in str(caught.value)
    model.unmerge_adapter()
    assert torch.equal(logits(model.unload()), logits(make_llama()))


def test_no_target_matched_names_the_nearest_and_the_choices():
    with pytest.raises(ConfigError) as caught:
        get_peft_model(make_llama(), config(target_modules=["dwon_proj"], layers_to_transform=[1]))
    text = str(caught.value)
    assert "No module of LlamaForCausalLM matches target_modules=['dwon_proj'] with layers_to_transform=[1]." in text
    assert "Did you mean 'down_proj'?" in text
    assert "end in: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj." in text
    with pytest.raises(ConfigError, match=r"with layers_to_transform=\[7\]\. Linear modules"):
        get_peft_model(make_llama(), config(layers_to_transform=[7]))


def test_unsupported_targets_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"'model\.embed_tokens' is a Embedding\. .*exclude_modules"):
        get_peft_model(make_llama(), config(target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="No default target_modules are known for model type 'custom'"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), config(target_modules=None))


def test_default_and_all_linear_targets_work():
    default = get_peft_model(make_llama(), config(target_modules=None))
    assert {name.rsplit(".", 1)[-1] for name, _ in iter_sites(default)} == {"q_proj", "v_proj"}
    every = get_peft_model(make_llama(), config(target_modules="all-linear"))
    assert len(list(iter_sites(every))) == 3 * 7
    saved = every.peft_config["default"].to_dict()["target_modules"]
    assert saved == sorted(saved)
    assert isinstance(saved, list)


def test_site_names_carry_no_wrapper():
    expected = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    settings = config(target_modules=["down_proj"])
    model = get_peft_model(make_llama(), settings)
    assert [name for name, _ in iter_sites(model)] == expected
    assert [name for name, _ in iter_sites(nn.ModuleDict({"module": model}))] == expected
    injected = inject_adapter_in_model(settings, make_llama())
    assert [name for name, _ in iter_sites(injected)] == expected
    for i, layer in enumerate(injected.model.layers):
        injected.model.layers[i] = torch.compile(layer)
    assert [name for name, _ in iter_sites(injected)] == expected
    assert list(iter_sites(make_llama())) == []


def test_sites_of_one_adapter():
    model = get_peft_model(make_llama(), config(target_modules=["down_proj"]))
    model.add_adapter("second", config(target_modules=["up_proj"], layers_to_transform=[0]))
    assert [name for name, _ in iter_sites(model, "second")] == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(UnknownNameError, match=r"Unknown adapter 'secnd'\. Did you mean 'second'"):
        list(iter_sites(model, "secnd"))


def test_the_temperature_in_use_is_the_one_saved(tmp_path):
    model = adapted(gate="energy").eval()
    before = logits(model)
    set_gate_temperature(model, 0.25)
    annealed = logits(model)
    assert not torch.allclose(annealed, before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    assert again.peft_config["default"].gate_temperature == 0.25
    assert torch.equal(logits(again), annealed)


def test_the_temperature_of_one_adapter_leaves_the_others():
    model = adapted()
    model.add_adapter("second", config(gate_temperature=3.0))
    set_gate_temperature(model, 2.0, "default")
    assert {name: c.gate_temperature for name, c in model.peft_config.items()} == {"default": 2.0, "second": 3.0}
    _, layer = next(iter_sites(model))
    assert (layer.moe_lora_gate["default"].temperature, layer.moe_lora_gate["second"].temperature) == (2.0, 3.0)
    for tau in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="must be a number above 0"):
            set_gate_temperature(model, tau)
    with pytest.raises(UnknownNameError, match="Unknown adapter 'third'"):
        set_gate_temperature(model, 1.0, "third")


class NestedGate(SoftmaxGate):
    """A third-party gate whose parameters sit in a submodule of its own."""

    def __init__(self, d_in, config):
        super().__init__(d_in, config)
        del self.weight
        self.net = nn.Sequential(nn.Linear(d_in, 4), nn.Tanh(), nn.Linear(4, config.num_experts))

    def scores(self, h, z):
        return self.net(h.float())


def test_a_third_party_gate_with_submodules_saves_and_loads(monkeypatch, tmp_path):
    monkeypatch.setitem(GATES._items, "nested", NestedGate)
    model = adapted(gate="nested").eval()
    model.save_pretrained(tmp_path)
    for adapter_name in ("default", "net"):
        again = PeftModel.from_pretrained(make_llama(), tmp_path, adapter_name=adapter_name).eval()
        assert torch.equal(logits(again), logits(model))


class Int8Linear(nn.Linear):
    """A quantised linear module: integer weight and one scale."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, h):
        return nn.functional.linear(h, self.weight.to(h.dtype) * self.scale)


def test_a_quantised_linear_base_stays_as_it_is():
    base = make_llama()
    for layer in base.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
    plain = logits(base)
    model = get_peft_model(base, config(target_modules=["down_proj"]))
    assert torch.equal(logits(model), plain)
    randomise(model).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    _, layer = next(iter_sites(model))
    assert layer.base_layer.weight.dtype == torch.int8
    assert layer.moe_lora_A["default"].weight.dtype == torch.float32
    assert layer.moe_lora_A["default"].weight.grad.any()
