"""Which tokens a forward has that somebody else runs: read from the arguments that the model is given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from driftlens.backbones.encoding import IGNORED_LABEL, ROLES
from driftlens.errors import SiteError
from driftlens.recording.probes import token_subset

__all__ = ["LivePasses", "LiveTokens"]

_IMAGE, _PROMPT, _ANSWER = (ROLES.index(name) for name in ("image", "prompt", "answer"))


@dataclass(frozen=True)
class LiveTokens:
    """The real tokens of one forward.

    Attributes:
        tokens: their flat positions (row * length + column), on the model's device.
        stored: ranks within ``tokens`` of those whose rows are stored.
        columns: ``sample``, ``position``, ``token_id`` and ``role`` of the stored tokens.
        rows: rows of the batch.
        samples: samples of the probe so far, those of this forward included.
        identity: sample, position, token id and role of all real tokens, as bytes.
    """

    tokens: Int[Tensor, " n"]
    stored: Int[Tensor, " m"]
    columns: Mapping[str, NDArray[np.int64]]
    rows: int
    samples: int
    identity: bytes


@dataclass
class _Open:
    """The last forward: what a next one with its key-value cache continues."""

    samples: NDArray[np.int64]
    lengths: NDArray[np.int64]
    width: int
    ids: NDArray[np.int64] | None


class LivePasses:
    """Reads one forward after the other and gives running numbers to their samples.

    Args:
        root: the model whose forward is called.
        limit: stored rows per sample and forward; None for all.
        seed: decides which.
    """

    def __init__(self, root: nn.Module, limit: int | None, seed: int) -> None:
        self._signature = inspect.signature(root.forward)
        self._device = next(root.parameters()).device
        config = getattr(root, "config", None)
        self._image_token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        self._limit, self._seed = limit, seed
        self._samples = 0
        self._open: _Open | None = None
        self._caches: list[Any] = []

    def restart(self) -> None:
        """Begin another probe: its samples count from 0."""
        self._samples, self._open = 0, None

    def close(self) -> None:
        """Leave nothing behind on the caches that were seen."""
        for cache in self._caches:
            cache.__dict__.pop("reorder_cache", None)
        self._caches.clear()

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], probe: str) -> LiveTokens:
        """Return the real tokens of a forward that is given these arguments.

        Raises:
            SiteError: a forward whose tokens cannot be told apart, or would be counted twice.
        """
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        ids, rows, width = _inputs(given)
        past = self._past(given.get("past_key_values"))
        real = _real(given.get("attention_mask"), rows, width, past)
        before = self._continued(past, rows, width, ids)
        position = np.cumsum(real, axis=1) - 1 + before.lengths[:, None]
        where = np.flatnonzero(real)
        table = {
            "sample": np.repeat(before.samples, width)[where],
            "position": position.reshape(-1)[where],
            "token_id": np.zeros(len(where), dtype=np.int64) if ids is None else ids.reshape(-1)[where],
            "role": self._roles(ids, given.get("labels"), (rows, width), past).reshape(-1)[where],
        }
        stored = self._chosen(table, probe)
        self._open = _Open(before.samples, before.lengths + real.sum(1), before.width + width, ids)
        return LiveTokens(
            torch.from_numpy(where).to(self._device),
            torch.from_numpy(stored).to(self._device),
            {name: column[stored] for name, column in table.items()},
            rows,
            self._samples,
            np.stack(list(table.values())).astype("<i8").tobytes(),
        )

    def _past(self, cache: Any) -> int:
        if cache is None:
            return 0
        if hasattr(cache, "reorder_cache") and "reorder_cache" not in getattr(cache, "__dict__", {"reorder_cache": 0}):
            # Beam search exchanges the rows of a batch between two forwards, and says so to the cache alone.
            cache.reorder_cache = _refuse_beams
            self._caches.append(cache)
        if hasattr(cache, "get_seq_length"):
            return int(cache.get_seq_length())
        return int(cache[0][0].shape[-2]) if len(cache) else 0

    def _continued(self, past: int, rows: int, width: int, ids: NDArray[np.int64] | None) -> _Open:
        """Return the samples of this batch and how long they are already; new ones where nothing is continued."""
        last = self._open
        if past:
            if last is None or len(last.samples) != rows or last.width != past:
                seen = "none" if last is None else f"{len(last.samples)} rows of {last.width} tokens"
                raise SiteError(
                    f"A forward continues a key-value cache of {rows} rows of {past} tokens, but the forward before it "
                    f"left {seen}. Begin the recording before the cache is filled, let one generation end before the "
                    "next one begins, and use no assistant model (its rejected tokens would count)."
                )
            return last
        if last is not None and ids is not None and last.ids is not None and np.array_equal(ids[:, :-1], last.ids):
            raise SiteError(
                "A forward repeats the batch before it with one more token, as generate(use_cache=False) does: its "
                "earlier tokens would be counted again. Generate with use_cache=True."
            )
        first, self._samples = self._samples, self._samples + rows
        return _Open(np.arange(first, first + rows), np.zeros(rows, dtype=np.int64), 0, None)

    def _roles(
        self, ids: NDArray[np.int64] | None, labels: Any, shape: tuple[int, int], past: int
    ) -> NDArray[np.int64]:
        roles = np.full(shape, _PROMPT, dtype=np.int64)
        if isinstance(labels, Tensor) and tuple(labels.shape) == shape:
            roles[labels.detach().cpu().numpy() != IGNORED_LABEL] = _ANSWER
        elif past:
            roles[:] = _ANSWER
        if ids is not None and self._image_token is not None:
            roles[ids == self._image_token] = _IMAGE
        return roles

    def _chosen(self, table: Mapping[str, NDArray[np.int64]], probe: str) -> NDArray[np.int64]:
        if self._limit is None:
            return np.arange(len(table["sample"]))
        parts = []
        for sample in np.unique(table["sample"]):
            mine = np.flatnonzero(table["sample"] == sample)
            roles = table["role"][mine].astype(np.uint8)
            every = np.ones(len(mine), dtype=np.bool_)
            parts.append(mine[token_subset(roles, every, self._limit, self._seed, f"{probe}/{sample}")])
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _inputs(given: Mapping[str, Any]) -> tuple[NDArray[np.int64] | None, int, int]:
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if isinstance(ids, Tensor) and ids.dim() == 2:
        return ids.detach().cpu().numpy().astype(np.int64), ids.shape[0], ids.shape[1]
    if isinstance(embeds, Tensor) and embeds.dim() == 3:
        return None, embeds.shape[0], embeds.shape[1]
    raise SiteError(
        f"A forward was given neither input_ids [batch, length] nor inputs_embeds [batch, length, width] (found "
        f"{', '.join(given) or 'no arguments'}), so its tokens are not known. Name the arguments as transformers does."
    )


def _real(mask: Any, rows: int, width: int, past: int) -> Bool[NDArray[np.bool_], "rows width"]:
    if mask is None:
        return np.ones((rows, width), dtype=np.bool_)
    allowed = ((rows, width), (rows, past + width))
    if not isinstance(mask, Tensor) or tuple(mask.shape) not in allowed:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise SiteError(
            f"attention_mask has shape {found}; to tell tokens from padding it must be [{rows}, {past + width}], 1 for "
            "real tokens. Let the model make wider masks (packed or static-cache ones) itself."
        )
    real: NDArray[np.bool_] = mask.detach()[:, -width:].cpu().numpy() != 0
    return real


def _refuse_beams(*_args: Any, **_kwargs: Any) -> None:
    raise SiteError(
        "Beam search exchanges the rows of a batch while it generates, so that tokens cannot be given to samples. "
        "Generate with num_beams=1 while recording."
    )
