"""What a run would cost, from its configuration alone: no weights are loaded and nothing is refused."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, LlavaConfig

from driftlens.backbones.tiny import tiny_backbone_parts
from driftlens.backbones.vision import register_tower
from driftlens.errors import NotFoundError
from driftlens.training.config import RunConfig
from driftlens.training.run import build_stream, first_adapted_layer

__all__ = ["estimate_costs", "skeleton"]

_CHARACTERS_PER_TOKEN = 4
_TEMPLATE_TOKENS = 4
_IMAGE_TOKENS = 4


def skeleton(base: str) -> nn.Module:
    """Return the base model on the meta device: names and shapes without weights.

    Raises:
        NotFoundError: ``base`` is no built-in base and has no readable configuration.
    """
    if base == "tiny-random":
        return tiny_backbone_parts()[0]
    config: Any
    if base == "builtin":
        register_tower()
        text = (resources.files("driftlens.backbones") / "data" / "builtin_config.json").read_text(encoding="utf-8")
        config = LlavaConfig.from_dict(json.loads(text))
    else:
        try:
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise NotFoundError(f"The base model {base!r} has no readable configuration: {error}") from error
    factory: Any = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = factory.from_config(config)
    return model


def estimate_costs(config: RunConfig) -> list[dict[str, object]]:
    """Return rows ``what``, ``value``, ``unit`` for ``driftlens train --dry-run``.

    Counts of parameters, steps and adapter bytes are exact; tokens are estimated from characters, memory as
    weights plus gradients and two AdamW moments of what is trained (activations are not included).
    """
    stream = build_stream(config)
    base = skeleton(config.base)
    base.requires_grad_(False)
    base_parameters = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, config.create_method().adapter_config(config.adapter))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    depth = first_adapted_layer(model)
    tasks, options = len(stream.tasks), config.training
    samples = [sample for task in stream for sample in task.train]
    tokens = sum(
        (len(sample.prompt) + len(sample.answer)) // _CHARACTERS_PER_TOKEN
        + _TEMPLATE_TOKENS
        + (_IMAGE_TOKENS if sample.image else 0)
        for sample in samples
    )
    seen = tokens / len(samples) * options.batch_size * options.steps_per_task * tasks
    width = int(model.get_input_embeddings().weight.shape[1])
    rows: list[tuple[str, object, str]] = [
        ("method", config.method_name, ""),
        ("tasks", ", ".join(task.name for task in stream), ""),
        ("optimizer steps", tasks * options.steps_per_task, "steps"),
        ("training tokens (estimate)", round(seen), "tokens"),
        ("scored answers", (tasks + 1) * sum(len(task.test) for task in stream), "answers"),
        ("base parameters", base_parameters, "parameters"),
        ("trainable parameters", trainable, "parameters"),
        ("first adapted layer (below: computed once)", depth, "layer"),
        ("memory: weights, gradients, AdamW (estimate)", 4 * (base_parameters + 4 * trainable), "bytes"),
        ("disk: checkpoints", 4 * trainable * (tasks + 1), "bytes"),
        ("disk: prefix cache (estimate)", 4 * tokens * width if options.prefix_cache == "disk" else 0, "bytes"),
    ]
    return [{"what": what, "value": value, "unit": unit} for what, value, unit in rows]
