"""PEFT's own mixtures: X-LoRA, Poly and Lily on the tiny Llama, and what their layers compute."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LilyConfig, LoraConfig, PolyConfig, XLoraConfig, get_peft_model
from peft.tuners.lily.layer import Linear as LilyLinear
from peft.tuners.poly.layer import Linear as PolyLinear
from torch import Tensor, nn

from tests.recording.families.peft_lora import TARGETS, lora_layers, shake_lora, tiny_llama, watch
from tests.recording.families.suite import FamilyCase


def xlora(ranks: tuple[int, ...] = (3, 3, 3), **options: Any) -> nn.Module:
    """Three saved adapters under a classifier whose scalings differ by token and layer."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = {}
        for number, rank in enumerate(ranks):
            expert = get_peft_model(tiny_llama(), LoraConfig(r=rank, lora_alpha=7, target_modules=TARGETS))
            shake_lora(expert, number)
            adapters[str(number)] = str(Path(folder) / str(number))
            expert.save_pretrained(adapters[str(number)])
        base = tiny_llama()
        base.config.use_cache = False
        settings = {"hidden_size": 24, "adapters": adapters, "layerwise_scalings": True, "global_scaling_weight": 0.5}
        model = get_peft_model(base, XLoraConfig(**(settings | options)), low_cpu_mem_usage=False)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for value in model.base_model.internal_xlora_classifier.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def xlora_truth(model: nn.Module, input_ids: Tensor) -> dict[str, dict[str, Tensor]]:
    """Scalings that PEFT stored for its user, masked by hand; z in a loop over adapters; output minus base."""
    layers = lora_layers(model)
    modules = {f"{name}/base": layer.base_layer for name, layer in layers.items()}
    seen = watch(model, input_ids, {**layers, **modules})
    scalings = model.base_model.get_latest_scalings()
    config = model.base_model.xlora_config
    found = {}
    for number, (name, layer) in enumerate(layers.items()):
        gate = scalings[:, :, number].flatten(0, 1).clone()
        if config.top_k_lora:
            for row in gate:
                kept = row.argsort(descending=True)[: config.top_k_lora]
                values = row[kept].softmax(0) if config.enable_softmax_topk else row[kept].clone()
                row.zero_()
                row[kept] = values
        h = seen[name][0]
        parts = [h @ layer.lora_A[adapter].weight.T for adapter in layer.active_adapters]
        rank = max(part.shape[1] for part in parts)
        found[name] = {
            "gate": gate,
            "pathway": torch.stack([nn.functional.pad(part, (0, rank - part.shape[1])) for part in parts], 1),
            "output": seen[name][1] - seen[f"{name}/base"][1],
            "rest": seen[f"{name}/base"][1],
        }
    return found


def poly(splits: int = 1, task: int = 1) -> nn.Module:
    """Four skills, three tasks; bound to one task, so that it can be called without ``task_ids``."""
    sizes = {"r": 3, "n_tasks": 3, "n_skills": 4, "n_splits": splits}
    config = PolyConfig(**sizes, target_modules=TARGETS, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "poly_router" in name:
                value.copy_(2 * torch.randn(value.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, PolyLinear):
            module.register_forward_pre_hook(
                lambda _m, args, kwargs: (args, {"task_ids": torch.full((len(args[0]),), task), **kwargs}),
                with_kwargs=True,
            )
    return model.eval()


@torch.no_grad()
def poly_truth(model: nn.Module, input_ids: Tensor, task: int = 1) -> dict[str, dict[str, Tensor]]:
    """The gate from the table of logits; skills one by one on their split of the input."""
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, PolyLinear)}
    seen = watch(model, input_ids, {**layers, **{f"{n}/base": m.base_layer for n, m in layers.items()}})
    found = {}
    for name, layer in layers.items():
        a, h = layer.poly_lora_A["default"], seen[name][0]
        splits, skills = a.shape[:2]
        table = torch.sigmoid(layer.poly_router["default"].module_logits[task]).reshape(splits, skills)
        gate = (table / table.sum(1, keepdim=True)).flatten()
        chunks = h.chunk(splits, dim=1)
        z = [chunks[split] @ a[split, skill] for split in range(splits) for skill in range(skills)]
        rest = seen[f"{name}/base"][1]
        found[name] = {
            "gate": gate.expand(len(h), -1),
            "pathway": torch.stack(z, 1),
            "output": seen[name][1] - rest,
            "rest": rest,
        }
    return found


def lily() -> nn.Module:
    """Three B shared by all layers, one A for each two layers."""
    config = LilyConfig(r=4, scaling=1.5, stride_A=2, num_B=3, target_modules=TARGETS, init_weights=False)
    model = get_peft_model(tiny_llama(), config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lily_router" in name:
                value.copy_(torch.randn(value.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def lily_truth(model: nn.Module, input_ids: Tensor) -> dict[str, dict[str, Tensor]]:
    """z = A h for each expert, and the router's probabilities averaged over all positions, as its forward does."""
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LilyLinear)}
    seen = watch(model, input_ids, {**layers, **{f"{n}/base": m.base_layer for n, m in layers.items()}})
    found = {}
    for name, layer in layers.items():
        z = seen[name][0] @ layer.lily_A["default"].weight.T
        gate = (z @ layer.lily_router["default"].weight.T).softmax(-1).mean(0)
        rest = seen[f"{name}/base"][1]
        found[name] = {
            "gate": gate.expand(len(z), -1),
            "pathway": z.unsqueeze(1).expand(-1, len(gate), -1),
            "output": seen[name][1] - rest,
            "rest": rest,
        }
    return found


def _xlora_case(name: str, build: Callable[[], nn.Module]) -> FamilyCase:
    return FamilyCase(name=name, family="peft-xlora", build=build, truth=xlora_truth)


def _poly_case(name: str, splits: int) -> FamilyCase:
    return FamilyCase(name=name, family="peft-poly", build=lambda: poly(splits), truth=poly_truth)


# Lily is not here: its gate averages over the batch, so that no recording of it could be the same for other batches.
CASES = [
    _xlora_case("PEFT X-LoRA", xlora),
    _xlora_case("PEFT X-LoRA, top-2", lambda: xlora(top_k_lora=2)),
    _xlora_case(
        "PEFT X-LoRA, top-2 renormalised, adapters of different rank",
        lambda: xlora((2, 4, 3), top_k_lora=2, enable_softmax_topk=True),
    ),
    _xlora_case("PEFT X-LoRA, deep classifier", lambda: xlora(xlora_depth=2, xlora_size=8, layerwise_scalings=False)),
    _poly_case("PEFT Poly", 1),
    _poly_case("PEFT Poly, two splits", 2),
]
LILY = FamilyCase(name="PEFT Lily", family="peft-lily", build=lily, truth=lily_truth)
