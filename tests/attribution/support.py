"""Pairs of tiny adapters on disk, and models into which weights are copied by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from driftlens.adapters import MoELoraConfig, iter_sites
from driftlens.attribution.pairs import LoadedPair, load_pair
from driftlens.backbones import load_backbone
from driftlens.streams import Sample, load_stream

TARGETS = ["gate_proj", "up_proj", "down_proj"]
SHAPE = {"num_experts": 3, "r": 4, "target_modules": TARGETS, "layers_to_transform": [2, 3], "init_std": 0.1}


def shake(model: nn.Module, seed: int, step: float) -> None:
    """Move every adapter parameter of the model by a seeded random step."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(step * torch.randn(parameter.shape, generator=g))


def save_pair(folder: Path, gate: str = "softmax", step: float = 0.03, **options: object) -> tuple[Path, Path]:
    """Write an anchor and a current checkpoint of a MoE-LoRA adapter that was moved on by ``step``."""
    torch.manual_seed(0)  # the adapter's own start is drawn from the global state
    model = get_peft_model(load_backbone("tiny-random").model, MoELoraConfig(gate=gate, **{**SHAPE, **options}))
    return _write(model, folder, step)


def save_plain_pair(folder: Path, step: float = 0.03, **options: object) -> tuple[Path, Path]:
    """Write two checkpoints of plain PEFT LoRA."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, layers_to_transform=[2, 3], **options)
    return _write(get_peft_model(load_backbone("tiny-random").model, config), folder, step)


def _write(model: PeftModel, folder: Path, step: float) -> tuple[Path, Path]:
    paths = folder / "01-first", folder / "02-second"
    for seed, (path, size) in enumerate(zip(paths, (0.05, step), strict=True)):
        shake(model, seed, size)
        model.save_pretrained(str(path), save_embedding_layers=False)
    return paths


def loaded_pair(paths: tuple[Path, Path]) -> LoadedPair:
    return load_pair(*paths, base="tiny-random")


def toy_samples(count: int = 6) -> list[Sample]:
    """Samples of the toy stream, images and text mixed."""
    stream = load_stream("toy", test=count)
    return [sample for task in stream for sample in task.test][:: max(1, len(stream.tasks))][:count]


def sites_of(model: nn.Module) -> dict[str, nn.Module]:
    return dict(iter_sites(model))
