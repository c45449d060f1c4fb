"""PEFT LoRA on linear layers: models, and what they compute, taken from their own forwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.recording.families.suite import FamilyCase

TARGETS = ["q_proj", "down_proj"]


def tiny_llama(seed: int = 0) -> nn.Module:
    """Two decoder layers, no bias."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def tiny_gpt2(seed: int = 0) -> nn.Module:
    """Two blocks of Conv1D layers, with biases."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=24, n_layer=2, n_head=4, n_positions=64))


def shake_lora(model: nn.Module, seed: int = 1) -> None:
    """Give A, B, their biases and DoRA's magnitudes random values, as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "magnitude" in name:
                value.mul_(1 + 0.3 * torch.rand(value.shape, generator=g))
            elif "lora_" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=g))


def lora(base: Callable[[], nn.Module] = tiny_llama, **options: Any) -> nn.Module:
    """One adapter; rank 3 and alpha 7 make every wrong scaling visible."""
    settings = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS, "lora_dropout": 0.1} | options
    model = get_peft_model(base(), LoraConfig(**settings))
    shake_lora(model)
    return model.eval()


def two_adapters(first: Mapping[str, Any], second: Mapping[str, Any]) -> nn.Module:
    """Two adapters, active together."""
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=TARGETS, **first), adapter_name="first")
    model.add_adapter("second", LoraConfig(target_modules=TARGETS, **second))
    model.base_model.set_adapter(["first", "second"])
    shake_lora(model)
    return model.eval()


def watch(model: nn.Module, input_ids: Tensor, modules: Mapping[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the model and return input and output of the last call of each module, flat over tokens."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, module in modules.items():

        def keep(_module: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> None:
            # copies: some layers add to their base module's output in place
            seen[name] = args[0].detach().flatten(0, -2).clone(), output.detach().flatten(0, -2).clone()

        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    for handle in handles:
        handle.remove()
    return seen


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """LoRA layers by their path in the base model."""
    return {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLinear)}


def truth(model: nn.Module, input_ids: Tensor) -> dict[str, dict[str, Tensor]]:
    """z from the A modules' own outputs, padded to the largest rank; what the layer added to its base module."""
    layers = lora_layers(model)
    modules: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        modules |= {name: layer, f"{name}/base": layer.base_layer}
        modules |= {f"{name}/{adapter}": layer.lora_A[adapter] for adapter in layer.active_adapters}
    seen = watch(model, input_ids, modules)
    found = {}
    for name, layer in layers.items():
        parts = [seen[f"{name}/{adapter}"][1] for adapter in layer.active_adapters]
        rank = max(part.shape[-1] for part in parts)
        pathway = torch.stack([nn.functional.pad(part, (0, rank - part.shape[-1])) for part in parts], dim=1)
        rest = seen[f"{name}/base"][1]
        if layer.use_dora[layer.active_adapters[0]]:
            rest = dora_rest(layer, seen[f"{name}/base"][0])
        for adapter in layer.active_adapters:
            if layer.lora_bias[adapter]:
                rest = rest + layer.scaling[adapter] * layer.lora_B[adapter].bias.detach()
        found[name] = {
            "gate": torch.ones(pathway.shape[:2]),
            "pathway": pathway,
            "output": seen[name][1] - rest,
            "rest": rest,
        }
    return found


@torch.no_grad()
def dora_rest(layer: LoraLinear, h: Tensor) -> Tensor:
    """The part of a DoRA layer that goes through no pathway: (m / ||W + s BA||) * W h + bias, row by row."""
    base = layer.base_layer
    w = base.weight.T if layer.fan_in_fan_out else base.weight
    adapted = w + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    rest = h @ (magnitude / adapted.square().sum(1).sqrt() * w.T)
    return rest if base.bias is None else rest + base.bias


def _case(name: str, build: Callable[[], nn.Module]) -> FamilyCase:
    return FamilyCase(name=name, family="peft-lora", build=build, truth=truth)


CASES = [
    _case("PEFT LoRA", lora),
    _case("PEFT LoRA, rsLoRA", lambda: lora(use_rslora=True)),
    _case(
        "PEFT LoRA, bias on B", lambda: lora(tiny_gpt2, target_modules=["c_fc"], fan_in_fan_out=True, lora_bias=True)
    ),
    _case("PEFT DoRA", lambda: lora(use_dora=True)),
    _case(
        "PEFT DoRA on Conv1D",
        lambda: lora(tiny_gpt2, target_modules=["c_fc", "c_proj"], fan_in_fan_out=True, use_dora=True),
    ),
    _case("PEFT LoRA, two adapters", lambda: two_adapters({"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 8})),
    _case(
        "PEFT LoRA, two adapters of different rank and scaling",
        lambda: two_adapters({"r": 2, "lora_alpha": 5}, {"r": 4, "lora_alpha": 3, "use_rslora": True}),
    ),
]
