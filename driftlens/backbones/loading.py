"""Load a base model together with the encoder that feeds it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from driftlens.backbones.assets import fetch_assets, hash_files
from driftlens.backbones.conversion import quiet_transformers
from driftlens.backbones.encoding import Encoder, ImageTransform, image_to_pixels
from driftlens.backbones.tiny import tiny_backbone_parts
from driftlens.backbones.vision import register_tower
from driftlens.errors import ConfigError, FormatError, NotFoundError, SiteError

__all__ = ["DTYPES", "Backbone", "decoder_layers", "load_backbone", "load_projector"]

_NO_CODE: Final = {"trust_remote_code": False}
"""Said outright, because transformers otherwise asks at a terminal whether to run the code that a folder names."""

_ANSWER_ROOM = 64
"""Tokens of a foreign model's context that are left for template and answer."""

_USUAL_CONTEXT = 2048
"""Context of models whose configuration names none."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Backbone:
    """A base model that is ready to be adapted.

    Attributes:
        name: what it was asked for as: ``"builtin"``, ``"tiny-random"``, a hub id or a folder.
        sha256: hash over the weights; equal hashes mean equal models.
        model: the model, in evaluation mode.
        encoder: turns samples into the model's tokens; None for a folder without a tokenizer, whose probes must hold
            token ids.
    """

    name: str
    sha256: str
    model: PreTrainedModel
    encoder: Encoder | None

    def need_encoder(self) -> Encoder:
        """Return the encoder.

        Raises:
            ConfigError: the base model came without a tokenizer.
        """
        if self.encoder is None:
            raise ConfigError(
                f"The base model {self.name!r} has no tokenizer. Save one beside its weights "
                "(tokenizer.save_pretrained), or work with probes that hold `input_ids` and `answer_ids`."
            )
        return self.encoder


def load_backbone(
    base: str = "builtin",
    cache_dir: Path | None = None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
) -> Backbone:
    """Load a base model.

    Args:
        base: ``"builtin"`` (EfficientNet-Lite0, our projector and SmolLM2-135M-Instruct; fetched on first use),
            ``"tiny-random"`` (a seeded toy of the same shape), or a hub id or local folder of a text-only causal
            language model or of a model in transformers' LLaVA layout.
        cache_dir: cache of the built-in weights; None for the default cache.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: where the model goes.

    Raises:
        ConfigError: unknown dtype, or a model of a kind that cannot be used.
        NotFoundError: no such model, or its weights cannot be fetched.
        FormatError: damaged weights.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"Unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}.")
    if base == "builtin":
        backbone = _load_builtin(cache_dir)
    elif base == "tiny-random":
        model, encoder = tiny_backbone_parts()
        backbone = Backbone(base, _hash_state(model), model, encoder)
    else:
        backbone = _load_foreign(base, DTYPES[dtype])
    module: nn.Module = backbone.model  # transformers types `to` with a decorator that mypy cannot follow
    module.to(device=torch.device(device), dtype=DTYPES[dtype])
    _into_memory(module)
    backbone.model.eval()
    return backbone


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of text decoder layers of a language or vision-language model, PEFT-wrapped or not.

    Raises:
        SiteError: the model has no such list.
    """
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else model
    find = getattr(inner, "get_decoder", None)
    decoder = find() if callable(find) else inner
    for name in ("layers", "h", "blocks"):
        layers = getattr(decoder, name, None)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise SiteError(
        f"{type(inner).__name__} has no list of decoder layers (looked for layers, h and blocks in "
        f"{type(decoder).__name__}). Use a decoder-only language model or a vision-language model around one."
    )


def load_projector(model: LlavaForConditionalGeneration, weights: bytes | None = None) -> str:
    """Put the aligned projector and its token statistics into ``model``; return the hash of the file.

    Args:
        model: the joined built-in model.
        weights: content of a safetensors file; None for the one that ships with the package.

    Raises:
        FormatError: the tensors do not fit the model.
    """
    raw = (
        weights
        if weights is not None
        else (resources.files("driftlens.backbones") / "data" / "projector.safetensors").read_bytes()
    )
    tensors = {name: value.float() for name, value in load_safetensors(raw).items()}
    statistics = {name: tensors.pop(name) for name in ("token_mean", "token_std") if name in tensors}
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    expected = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    expected |= {name: tuple(getattr(tower, name).shape) for name in ("token_mean", "token_std")}
    found = {name: tuple(value.shape) for name, value in (tensors | statistics).items()}
    if found != expected:
        raise FormatError(f"The projector has the tensors {found}, expected {expected}. Reinstall driftlens.")
    projector.load_state_dict(tensors, strict=True)
    for name, value in statistics.items():
        getattr(tower, name).copy_(value)
    return hashlib.sha256(raw).hexdigest()


def _load_builtin(cache_dir: Path | None) -> Backbone:
    assets = fetch_assets(cache_dir)
    register_tower()
    with quiet_transformers():
        model = LlavaForConditionalGeneration.from_pretrained(assets.folder, dtype=torch.float32, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(assets.folder, local_files_only=True)
    projector = load_projector(model)
    size = model.model.vision_tower.config.image_size
    encoder = Encoder(
        tokenizer,
        image_token_id=model.config.image_token_id,
        image_seq_length=model.config.image_seq_length,
        image_transform=lambda image: image_to_pixels(image, size),
    )
    sha256 = hashlib.sha256(f"{assets.sha256}\n{projector}\n".encode()).hexdigest()
    return Backbone("builtin", sha256, model, encoder)


def _into_memory(model: nn.Module) -> None:
    """Copy parameters that are mapped from a file into memory of the process.

    A mapped page can be dropped by the system at any time and is then read again on its next use; where memory is
    reclaimed eagerly that happens in every forward and doubled the time of a training step.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def _load_foreign(base: str, dtype: torch.dtype) -> Backbone:
    register_tower()  # a saved copy of the built-in model is a local folder like any other
    try:
        config = AutoConfig.from_pretrained(base, **_NO_CODE)
        tokenizer = AutoTokenizer.from_pretrained(base, **_NO_CODE) if _has_tokenizer(base) else None
    except (OSError, ValueError) as error:
        raise NotFoundError(
            f"The base model {base!r} cannot be loaded: {_first_line(error)} Give 'builtin', 'tiny-random', a hub id, "
            "or a local folder with config.json, weights and (but for probes of token ids) a tokenizer."
        ) from error
    try:
        if hasattr(config, "vision_config"):
            model, encoder = _vision_language(base, config, tokenizer, dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **_NO_CODE)
            encoder = None if tokenizer is None else Encoder(tokenizer, max_prompt_tokens=_room(config))
    except (OSError, ValueError) as error:
        raise NotFoundError(f"The weights of {base!r} cannot be loaded: {_first_line(error)}") from error
    except (RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        raise FormatError(
            f"The weights of {base!r} are damaged, belong to another model, or hold code, which is never run "
            f"({type(error).__name__}: {_first_line(error)}). Restore them, or save the model again as safetensors."
        ) from error
    return Backbone(base, _hash_weights(base, model), model, encoder)


def _has_tokenizer(base: str) -> bool:
    """Whether a local folder holds a tokenizer; a hub id always counts as having one."""
    folder = Path(base)
    return not folder.is_dir() or any(folder.glob("*token*")) or any(folder.glob("vocab*"))


def _vision_language(
    base: str, config: Any, tokenizer: Any, dtype: torch.dtype
) -> tuple[PreTrainedModel, Encoder | None]:
    if tokenizer is None:
        return AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, **_NO_CODE), None
    image_token = getattr(config, "image_token_id", None)
    length = getattr(config, "image_seq_length", None)
    if image_token is None or length is None:
        raise ConfigError(
            f"The base model {base!r} ({config.model_type}) does not say how many tokens an image takes "
            "(image_token_id and image_seq_length in its config). Use a model in transformers' LLaVA layout."
        )
    processor = AutoImageProcessor.from_pretrained(base, **_NO_CODE)

    def transform(image: Image.Image) -> NDArray[np.float32]:
        pixels = processor(images=image.convert("RGB"), return_tensors="np")["pixel_values"]
        return np.asarray(pixels[0], np.float32)

    model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, **_NO_CODE)
    made: ImageTransform = transform
    return model, Encoder(tokenizer, int(image_token), int(length), made, max_prompt_tokens=_room(config))


def _room(config: Any) -> int:
    """Return the longest prompt that leaves room for an image and an answer in the model's context."""
    context = int(getattr(config.get_text_config(), "max_position_embeddings", None) or _USUAL_CONTEXT)
    taken = int(getattr(config, "image_seq_length", None) or 0) + _ANSWER_ROOM
    return max(context - taken, context // 2)


def _hash_weights(base: str, model: PreTrainedModel) -> str:
    """Hash the weights as they lie on disk; a model without safetensors files is hashed by its tensors."""
    config_file = cached_file(base, "config.json", local_files_only=True)
    files = sorted(Path(config_file).parent.glob("*.safetensors")) if config_file else []
    return hash_files(files) if files else _hash_state(model)


def _hash_state(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if line.endswith(".") else line + "."
