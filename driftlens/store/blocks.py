"""Token rows on their way into the file: collected until a whole chunk is full, then written at once.

Because only whole chunks are written, the bytes of a file do not depend on the batches in which rows arrived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import h5py
import numpy as np
from numpy.typing import NDArray

from driftlens.store.encoding import create
from driftlens.store.schema import REFERENCE_PREFIX, value_shapes

__all__ = ["TokenBlock", "block_length"]

_TARGET_CHUNK_BYTES: Final = 256 << 10
_FLOAT16_MAX: Final = float(np.finfo(np.float16).max)


def block_length(extents: Sequence[tuple[int, int]]) -> int:
    """Return how many tokens one chunk holds, the same for all datasets of a file.

    Args:
        extents: (E, r) of every group.

    Returns:
        A power of two from 64 to 4096, so that the widest chunk has about 256 KiB.
    """
    widest = max(experts * max(rank, 1) for experts, rank in extents) * 2
    length = 4096
    while length > 64 and length * widest > _TARGET_CHUNK_BYTES:
        length //= 2
    return length


class TokenBlock:
    """Collects the token rows of one dataset along its token axis.

    Values start as float16. From the first token whose value does not fit (beyond 65504), the dataset
    continues as float32: a single large activation costs space, not the recording. Earlier tokens keep their
    float16 rounding, so that the stored numbers do not depend on batch boundaries.

    Args:
        parent: HDF5 group.
        name: dataset name.
        shape: extent of the dataset with 0 tokens.
        axis: the token axis.
        dtype: stored type.
        length: tokens per chunk.
    """

    def __init__(
        self, parent: h5py.Group, name: str, shape: Sequence[int], *, axis: int, dtype: Any, length: int
    ) -> None:
        self.parent, self.name, self.axis, self.length = parent, name, axis, length
        self.shape = tuple(shape)
        self.buffer: NDArray[Any] = np.zeros(self._extent(length), dtype=dtype)
        self.filled = 0
        self.written = 0
        self.dataset: h5py.Dataset | None = None

    def _extent(self, tokens: int) -> tuple[int, ...]:
        return (*self.shape[: self.axis], tokens, *self.shape[self.axis + 1 :])

    def _part(self, start: int, stop: int) -> tuple[slice, ...]:
        return (*(slice(None),) * self.axis, slice(start, stop))

    def append(self, rows: NDArray[Any]) -> None:
        """Add rows (extent: the dataset's, with any number of tokens); finite values are the caller's duty."""
        total, start = rows.shape[self.axis], 0
        while start < total:
            take = min(total - start, self.length - self.filled)
            self._fill(rows[self._part(start, start + take)], take)
            start += take
            if self.filled == self.length:
                self.flush()

    def _fill(self, rows: NDArray[Any], take: int) -> None:
        target = self._part(self.filled, self.filled + take)
        if self.buffer.dtype == np.float16 and rows.size and np.abs(rows).max() > _FLOAT16_MAX:
            other = tuple(axis for axis in range(rows.ndim) if axis != self.axis)
            first = int(np.argmax(np.abs(rows).max(axis=other) > _FLOAT16_MAX))
            rows = rows.astype(np.float32)
            head = self._part(0, first)
            rows[head] = rows[head].astype(np.float16)
            self.buffer = self.buffer.astype(np.float32)
        self.buffer[target] = rows
        self.filled += take

    def flush(self) -> None:
        """Write the collected rows; called with fewer rows than a chunk only at the end."""
        if self.dataset is None:
            chunk = (*(1 if index < self.axis else n for index, n in enumerate(self._extent(0))),)
            chunk = (*chunk[: self.axis], max(1, min(self.length, self.filled)), *chunk[self.axis + 1 :])
            self.dataset = create(
                self.parent, self.name, self._extent(0), self.buffer.dtype, chunks=chunk, grow=self.axis
            )
        elif self.dataset.dtype != self.buffer.dtype:
            self.dataset = self._widen(self.dataset)
        if self.filled:
            self.dataset.resize(self.written + self.filled, axis=self.axis)
            part = self._part(0, self.filled)
            self.dataset[self._part(self.written, self.written + self.filled)] = self.buffer[part]
            self.written, self.filled = self.written + self.filled, 0

    def _widen(self, old: h5py.Dataset) -> h5py.Dataset:
        new = create(
            self.parent, f"{self.name}.float32", old.shape, self.buffer.dtype, chunks=old.chunks, grow=self.axis
        )
        for start in range(0, self.written, self.length):
            part = self._part(start, min(start + self.length, self.written))
            new[part] = old[part]
        del self.parent[self.name]
        self.parent.move(f"{self.name}.float32", self.name)
        return new


def value_blocks(
    parent: h5py.Group, n_sites: int, num_experts: int, rank: int, length: int, *, reference: bool = False
) -> dict[str, TokenBlock]:
    """Return one block per token value of a group, with those of a reference in its subgroup."""
    shapes = value_shapes(n_sites, 0, num_experts, rank, reference=reference)
    inner = parent.create_group(REFERENCE_PREFIX.rstrip("/")) if reference else parent
    return {
        name: TokenBlock(
            inner if name.startswith(REFERENCE_PREFIX) else parent,
            name.removeprefix(REFERENCE_PREFIX),
            shape,
            axis=1,
            dtype=np.float16,
            length=length,
        )
        for name, shape in shapes.items()
    }


def column_blocks(parent: h5py.Group, columns: Mapping[str, str], length: int) -> dict[str, TokenBlock]:
    """Return one block per integer column of /tokens."""
    return {
        name: TokenBlock(parent, name, (0,), axis=0, dtype=np.dtype(dtype), length=length)
        for name, dtype in columns.items()
    }
