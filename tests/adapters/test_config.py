"""Configuration: defaults, scaling, and errors that name the fault, the allowed values and the next step."""

import json

import pytest
from peft import PeftConfig

from driftlens.adapters import MoELoraConfig, MoELoraModel, register_with_peft
from driftlens.errors import ConfigError, UnknownNameError


def refused(**settings):
    with pytest.raises(ConfigError) as caught:
        MoELoraConfig(**settings)
    return str(caught.value)


def test_defaults_are_those_of_the_papers():
    config = MoELoraConfig()
    assert (config.num_experts, config.r, config.lora_alpha, config.gate) == (4, 8, 16, "softmax")
    assert (config.gate_temperature, config.router_noise, config.load_balance_coef) == (1.0, 0.0, 0.0)
    assert config.router_layernorm is False
    assert config.peft_type == "MOE_LORA"


def test_scaling_divides_by_the_rank_of_one_expert():
    assert MoELoraConfig(num_experts=6, r=4, lora_alpha=10).scaling == 2.5
    assert MoELoraConfig(num_experts=6, r=4, lora_alpha=10, use_rslora=True).scaling == 5.0


def test_unknown_gate_names_the_nearest():
    with pytest.raises(UnknownNameError) as caught:
        MoELoraConfig(gate="enrgy")
    assert str(caught.value) == "Unknown gate 'enrgy'. Did you mean 'energy'? Known: energy, softmax, topk."


def test_top_k_above_the_number_of_experts():
    text = refused(gate="topk", top_k=5, num_experts=4)
    assert "top_k=5 does not fit num_experts=4: choose 1 to 4, or raise num_experts." in text
    assert MoELoraConfig(gate="softmax", num_experts=1).top_k == 2  # not read by this gate


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 0}, "r=0 must be a whole number of at least 1 (the rank of one expert)."),
        ({"r": 2.0}, "r=2.0 must be a whole number"),
        ({"num_experts": 0}, "num_experts=0 must be a whole number of at least 1."),
        ({"num_experts": True}, "num_experts=True must be a whole number"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be a number above 0."),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a number above 0."),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 must be in 0..1, 1 excluded."),
        ({"gate_temperature": 0.0}, "gate_temperature=0.0 must be a number above 0."),
        ({"gate_temperature": "hot"}, "gate_temperature='hot' must be a number above 0."),
        ({"router_noise": -0.1}, "router_noise=-0.1 must be 0 or above."),
        ({"load_balance_coef": -1}, "load_balance_coef=-1 must be 0 or above."),
        ({"init_std": 0}, "init_std=0 must be a number above 0."),
        ({"top_k": 0}, "top_k=0 must be a whole number of at least 1."),
        ({"bias": "all"}, "bias='all' must be 'none': MoE-LoRA trains no biases."),
        ({"gate": "energy", "router_layernorm": True}, "router_layernorm=True has no effect on gate='energy'"),
        ({"layers_pattern": "layers"}, "layers_pattern='layers' has no effect without layers_to_transform"),
    ],
)
def test_each_fault_is_named(settings, words):
    assert words in refused(**settings)


def test_a_string_target_with_layers_to_transform_says_what_to_write():
    text = refused(target_modules=r".*\.mlp\..*", layers_to_transform=[1])
    assert "needs target_modules as a list of names" in text
    assert "['gate_proj', 'up_proj', 'down_proj']" in text


def test_all_faults_are_shown_together():
    text = refused(r=0, num_experts=-1, gate="sofmax", lora_dropout=2)
    for words in ("r=0", "num_experts=-1", "lora_dropout=2", "Did you mean 'softmax'"):
        assert words in text
    assert text.count("\n  - ") == 4


def test_the_saved_file_does_not_depend_on_the_order_of_names(tmp_path):
    for folder, names in (("a", ["up_proj", "down_proj"]), ("b", {"down_proj", "up_proj"})):
        config = MoELoraConfig(target_modules=names, exclude_modules=("x", "b"))
        assert config.target_modules == ["down_proj", "up_proj"]
        config.save_pretrained(tmp_path / folder)
    first, second = ((tmp_path / f / "adapter_config.json").read_bytes() for f in "ab")
    assert first == second
    assert json.loads(first)["target_modules"] == ["down_proj", "up_proj"]
    assert json.loads(first)["peft_type"] == "MOE_LORA"


def test_reading_back_gives_the_same_configuration(tmp_path):
    config = MoELoraConfig(num_experts=3, r=5, gate="topk", top_k=3, gate_temperature=0.7, target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, MoELoraConfig)
    assert again == config


def test_registering_twice_is_harmless_and_a_foreign_owner_is_named(monkeypatch):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    register_with_peft()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["MOE_LORA"] is MoELoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["MOE_LORA"] is MoELoraModel
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, "MOE_LORA", dict)
    with pytest.raises(ConfigError, match=r"'MOE_LORA' is already registered for <class 'dict'>"):
        register_with_peft()
