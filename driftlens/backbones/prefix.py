"""The frozen prefix: decoder layers below the first adapted one, computed once per sample.

With adapters in the upper layers only, everything below them (vision tower, projector, embeddings and
the lower decoder layers) gives the same hidden states at every step and epoch. :class:`FrozenPrefix`
computes those states once; while :meth:`FrozenPrefix.skipping` is active the lower layers pass their
input through unchanged, so that ``model(inputs_embeds=states)`` is the whole model's forward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from driftlens.backbones.encoding import Encoded, collate
from driftlens.backbones.loading import decoder_layers

__all__ = ["FrozenPrefix", "KeyValues", "PrefixStates"]


@dataclass(frozen=True)
class PrefixStates:
    """Hidden states that enter the first adapted layer, for many samples, without padding.

    Attributes:
        hidden: [total tokens, d_model], samples one after another.
        offsets: [samples + 1]; sample i owns rows ``offsets[i]:offsets[i + 1]``.
    """

    hidden: Float[Tensor, "tokens d_model"]
    offsets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Float[Tensor, "tokens d_model"]:
        return self.hidden[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of the skipped layers for one padded batch: one ([B, heads, n, d], same) pair per layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]

    def fill(self, cache: DynamicCache) -> None:
        """Put these keys and values into the (still empty) lower layers of ``cache``."""
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, index)


class _PrefixReachedError(Exception):
    """Carries the hidden states out of a forward that need not go further."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class FrozenPrefix:
    """The part of ``model`` below decoder layer ``depth``.

    Args:
        model: a causal or LLaVA-like model, PEFT-wrapped or not. Nothing below ``depth`` may be trainable.
        depth: index of the first adapted decoder layer; 0 keeps only embeddings, tower and projector frozen.
        pad_token_id: id that fills padded positions.
    """

    def __init__(self, model: nn.Module, depth: int, pad_token_id: int) -> None:
        layers = decoder_layers(model)
        if not 0 <= depth <= len(layers):
            raise ValueError(f"The model has {len(layers)} decoder layers; a prefix of {depth} is impossible.")
        self.model, self.depth, self.pad_token_id = model, depth, pad_token_id
        self._layers = layers

    @torch.inference_mode()
    def run(self, batch: dict[str, Any], cache: DynamicCache | None = None) -> Float[Tensor, "batch n d_model"]:
        """Return the hidden states that enter layer ``depth`` for a collated batch, filling ``cache`` on the way."""

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _PrefixReachedError(args[0] if args else kwargs["hidden_states"])

        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids", "pixel_values") if k in batch}
        target = self._layers[self.depth] if self.depth < len(self._layers) else None
        if target is None:
            raise ValueError("A prefix that covers every layer leaves nothing to train.")
        handle = target.register_forward_pre_hook(stop, with_kwargs=True)
        was_training = self.model.training
        self.model.eval()
        try:
            self.model(**inputs, past_key_values=cache, use_cache=cache is not None)
        except _PrefixReachedError as reached:
            return reached.hidden
        finally:
            handle.remove()
            self.model.train(was_training)
        raise RuntimeError(f"Decoder layer {self.depth} was never called.")

    def compute(self, samples: Sequence[Encoded], batch_size: int, device: torch.device | str) -> PrefixStates:
        """Return the unpadded prefix states of ``samples``; batches are formed by length, so little is padded."""
        order = sorted(range(len(samples)), key=lambda i: len(samples[i].input_ids))
        rows: list[Tensor] = [torch.empty(0)] * len(samples)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([samples[i] for i in chosen], pad_token_id=self.pad_token_id, device=device)
            hidden = self.run(batch)
            for row, i in enumerate(chosen):
                # clone: a view would keep the whole padded batch alive, and inference tensors cannot be trained on
                rows[i] = hidden[row, hidden.shape[1] - len(samples[i].input_ids) :].clone()
        offsets = [0]
        for row_states in rows:
            offsets.append(offsets[-1] + row_states.shape[0])
        with torch.inference_mode(False):
            total = torch.cat(rows).clone()
        return PrefixStates(total, tuple(offsets))

    def key_values(self, batch: dict[str, Any]) -> tuple[Float[Tensor, "batch n d_model"], KeyValues]:
        """Return states and the skipped layers' keys and values for one padded batch (used by generation)."""
        cache = DynamicCache()
        hidden = self.run(batch, cache)
        # `cache.layers` is typed for caches of every kind; a DynamicCache holds plain keys and values.
        layers: list[Any] = list(cache.layers[: self.depth])
        return hidden, KeyValues(tuple((layer.keys, layer.values) for layer in layers))

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Let the layers below ``depth`` return their input while the context is open."""

        def identity(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            return hidden_states

        skipped = list(self._layers[: self.depth])
        try:
            for layer in skipped:
                layer.forward = identity
            yield
        finally:
            for layer in skipped:
                layer.__dict__.pop("forward", None)

    def key(self, backbone_sha256: str, samples: Sequence[Encoded], batch_size: int) -> str:
        """Return the SHA-256 of everything the states of ``samples`` depend on (the name of a disk cache entry)."""
        numerics = (torch.__version__, torch.get_num_threads(), torch.get_float32_matmul_precision())
        digest = hashlib.sha256(repr((backbone_sha256, self.depth, batch_size, numerics)).encode())
        for sample in samples:
            digest.update(sample.input_ids.tobytes())
            if sample.pixel_values is not None:
                digest.update(sample.pixel_values.tobytes())
        return digest.hexdigest()
