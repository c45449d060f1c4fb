"""From samples to tokens and from tokens to batches.

The prompt template is short on purpose: the image tokens, ``"{prompt}\\nAnswer:"``, then ``" {answer}"`` and the end
token.
Prompt and answer are tokenised apart, so that training and generation see the same boundary.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from driftlens.errors import ConfigError
from driftlens.streams import Sample

__all__ = ["IGNORED_LABEL", "PADDING_ROLE", "ROLES", "Encoded", "Encoder", "collate", "image_to_pixels"]

ROLES = ("image", "prompt", "answer")
"""What a token is for; the end token counts as answer."""

PADDING_ROLE = 255
IGNORED_LABEL = -100

_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)

ImageTransform = Callable[[Image.Image], NDArray[np.float32]]


@dataclass(frozen=True)
class Encoded:
    """One sample as tokens.

    Attributes:
        sample_id: the sample's id.
        input_ids: int64 [n].
        roles: uint8 [n], indices into :data:`ROLES`.
        n_prompt: number of tokens before the answer.
        pixel_values: float32 [3, height, width], or None for text.
    """

    sample_id: str
    input_ids: NDArray[np.int64]
    roles: NDArray[np.uint8]
    n_prompt: int
    pixel_values: NDArray[np.float32] | None


def image_to_pixels(image: Image.Image, size: int) -> NDArray[np.float32]:
    """Return the image at ``size`` x ``size`` pixels as float32 [3, size, size] with ImageNet's normalisation."""
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    pixels = (np.asarray(resized, np.float32) / 255.0 - _IMAGENET_MEAN) / _IMAGENET_STD
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)


class Encoder:
    """Turns samples into tokens for one base model.

    Args:
        tokenizer: the base model's tokenizer.
        image_token_id: the placeholder that image features replace; None for a text-only base.
        image_seq_length: how many placeholders stand for one image.
        image_transform: from a PIL image to float32 [3, height, width]; None for a text-only base.
        max_prompt_tokens: longest text part of a prompt; the question is cut at its end, never the template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token_id: int | None = None,
        image_seq_length: int = 0,
        image_transform: ImageTransform | None = None,
        max_prompt_tokens: int = 44,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"The tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so that an answer could never "
                "end. Use a base model whose tokenizer defines eos_token."
            )
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.image_seq_length = image_seq_length
        self.image_transform = image_transform
        self.max_prompt_tokens = max_prompt_tokens
        self.end_token_id: int = int(tokenizer.eos_token_id)
        # A pad token is never attended to and never a label, so the end token can serve.
        self.pad_token_id: int = int(
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
        self._prefix = self._special_prefix()
        self._suffix = self._text_ids("\nAnswer:")
        if max_prompt_tokens <= len(self._suffix):
            raise ConfigError(
                f"max_prompt_tokens is {max_prompt_tokens}, but the template alone takes {len(self._suffix)} tokens; "
                "give it at least one token more."
            )

    def encode(self, sample: Sample, with_answer: bool = True) -> Encoded:
        """Return the sample's tokens: prompt, and with ``with_answer`` also answer and end token.

        Raises:
            ConfigError: the sample has an image and the base model takes none, or the image cannot be read.
        """
        pixels = None if sample.image is None else self._pixels(sample)
        images = [] if pixels is None else [self.image_token_id or 0] * self.image_seq_length
        question = self._text_ids(sample.prompt)[: self.max_prompt_tokens - len(self._suffix)]
        answer = [*self._text_ids(" " + sample.answer), self.end_token_id] if with_answer else []
        ids = [*self._prefix, *images, *question, *self._suffix, *answer]
        roles = (
            [1] * len(self._prefix) + [0] * len(images) + [1] * (len(question) + len(self._suffix)) + [2] * len(answer)
        )
        return Encoded(sample.id, np.array(ids, np.int64), np.array(roles, np.uint8), len(ids) - len(answer), pixels)

    def decode(self, ids: Sequence[int] | NDArray[np.int64] | Tensor) -> str:
        """Return the text of generated answer tokens, up to the end token, without outer white space."""
        kept: list[int] = []
        for token in ids.tolist() if isinstance(ids, (np.ndarray, Tensor)) else ids:
            if token == self.end_token_id:
                break
            kept.append(int(token))
        return str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()

    def _text_ids(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _special_prefix(self) -> list[int]:
        # Some tokenizers open every text with a token that the model was trained to see (Llama's <s>).
        plain, full = self._text_ids("x"), [int(i) for i in self.tokenizer("x")["input_ids"]]
        return full[: len(full) - len(plain)] if full[len(full) - len(plain) :] == plain else []

    def _pixels(self, sample: Sample) -> NDArray[np.float32]:
        if self.image_token_id is None or self.image_transform is None:
            raise ConfigError(
                f"Sample {sample.id!r} of task {sample.task!r} has an image, but the base model reads text only. "
                "Choose text tasks, or a base model with a vision tower such as 'builtin'."
            )
        try:
            with Image.open(io.BytesIO(sample.image or b"")) as image:
                return self.image_transform(image)
        except (UnidentifiedImageError, OSError) as error:
            raise ConfigError(
                f"The image of sample {sample.id!r} (task {sample.task!r}, {len(sample.image or b'')} bytes) "
                f"cannot be read: {error}. Give a complete PNG or JPEG file."
            ) from error


def collate(
    encoded: Sequence[Encoded],
    *,
    padding_side: str = "left",
    pad_token_id: int,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Pad samples to one batch.

    Args:
        encoded: at least one sample.
        padding_side: ``"left"`` (for generation) or ``"right"``.
        pad_token_id: fills ``input_ids`` beside the sample.
        device: where the tensors go.

    Returns:
        ``input_ids``, ``attention_mask``, ``position_ids`` (0-based over real tokens, 0 on padding), ``labels``
        (-100 outside the answer), ``roles`` (uint8, 255 on padding), all [b, n]; and ``pixel_values``
        [images, 3, height, width] of the samples that have an image, in order, absent if none has.

    Raises:
        ConfigError: no sample, or an unknown padding side.
    """
    if not encoded:
        raise ConfigError("Cannot make a batch of no samples; give at least one.")
    if padding_side not in ("left", "right"):
        raise ConfigError(f"Unknown padding side {padding_side!r}; use 'left' or 'right'.")
    rows, longest = len(encoded), max(len(e.input_ids) for e in encoded)
    ids = np.full((rows, longest), pad_token_id, np.int64)
    mask = np.zeros((rows, longest), np.int64)
    labels = np.full((rows, longest), IGNORED_LABEL, np.int64)
    roles = np.full((rows, longest), PADDING_ROLE, np.uint8)
    for row, one in enumerate(encoded):
        n = len(one.input_ids)
        start = longest - n if padding_side == "left" else 0
        ids[row, start : start + n] = one.input_ids
        mask[row, start : start + n] = 1
        roles[row, start : start + n] = one.roles
        labels[row, start + one.n_prompt : start + n] = one.input_ids[one.n_prompt :]
    positions = np.where(mask == 1, np.cumsum(mask, axis=1) - 1, 0)
    arrays: dict[str, NDArray[Any]] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "labels": labels,
        "roles": roles,
    }
    images = [one.pixel_values for one in encoded if one.pixel_values is not None]
    if images:
        arrays["pixel_values"] = np.stack(images)
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
