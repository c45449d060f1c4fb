"""How values become HDF5 attributes and datasets: the only place that creates either."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import h5py
import hdf5plugin
import numpy as np
from numpy.typing import ArrayLike, NDArray

from driftlens.errors import FormatError
from driftlens.store.schema import check_text

__all__ = ["FILE_FORMAT", "JSON_PREFIX", "attach", "create", "create_scale", "create_text", "decode_attr", "set_attr"]

# Since 1.10 every block of metadata carries a checksum; a fixed version keeps the bytes the same over library updates.
FILE_FORMAT: Final = ("v110", "v110")
JSON_PREFIX: Final = "json:"
_RESERVED: Final = ("driftlens_schema", "CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST")


def create(
    group: h5py.Group,
    name: str,
    shape: Sequence[int],
    dtype: Any,
    *,
    chunks: Sequence[int],
    grow: int | None = None,
) -> h5py.Dataset:
    """Create an empty dataset with bitshuffle+lz4 and a fletcher32 checksum.

    Args:
        group: where.
        name: name of the dataset.
        shape: its extent.
        dtype: its type.
        chunks: extent of one chunk; clipped to the shape.
        grow: the axis that may grow later, if any.

    Returns:
        The dataset.
    """
    return group.create_dataset(
        name,
        shape=tuple(shape),
        # HDF5 allows no chunk beyond a fixed axis, and no fixed axis of length 0: such an axis may grow.
        maxshape=tuple(None if axis == grow or n == 0 else n for axis, n in enumerate(shape)),
        chunks=tuple(
            max(1, c if axis == grow else min(c, n)) for axis, (n, c) in enumerate(zip(shape, chunks, strict=True))
        ),
        dtype=dtype,
        fletcher32=True,
        track_times=False,
        **hdf5plugin.Bitshuffle(cname="lz4"),
    )


def write(
    group: h5py.Group, name: str, data: ArrayLike, *, dtype: Any, chunks: Sequence[int] | None = None
) -> h5py.Dataset:
    """Create a dataset that holds ``data``; without ``chunks`` it is a single chunk."""
    array = np.asarray(data, dtype=dtype)
    dataset = create(group, name, array.shape, array.dtype, chunks=chunks or array.shape)
    if array.size:
        dataset[...] = array
    return dataset


def create_text(group: h5py.Group, name: str, texts: Sequence[str]) -> h5py.Dataset:
    """Create a dataset of fixed-length UTF-8 strings.

    Variable-length strings would live in HDF5's global heap, outside the checksums.

    Raises:
        FormatError: a text that cannot be stored.
    """
    raw = [check_text(f"{name} {text!r:.60}", text) for text in texts]
    kind = h5py.string_dtype("utf-8", max((len(item) for item in raw), default=1))
    dataset = create(group, name, (len(raw),), kind, chunks=(min(len(raw), 4096),))
    if raw:
        dataset[...] = np.array(raw, dtype=kind)
    # xarray decodes fixed-length text to str when this convention of netCDF is present.
    dataset.attrs.create("_Encoding", b"utf-8", dtype=h5py.string_dtype("utf-8", 5))
    return dataset


def create_scale(group: h5py.Group, name: str, values: ArrayLike | Sequence[str]) -> h5py.Dataset:
    """Create the dimension scale ``name`` (int32, or text where strings are given)."""
    if isinstance(values, (list, tuple)) and values and isinstance(values[0], str):
        dataset = create_text(group, name, values)
    else:
        dataset = write(group, name, values, dtype="<i4")
    dataset.make_scale(name)
    return dataset


def attach(dataset: h5py.Dataset, axes: Sequence[str], scales: Mapping[str, h5py.Dataset]) -> None:
    """Attach to every axis of ``dataset`` its dimension scale."""
    for index, axis in enumerate(axes):
        dataset.dims[index].attach_scale(scales[axis])


def set_attr(target: h5py.Group, key: str, value: Any) -> None:
    """Store one attribute: text, int and float as they are, everything else as JSON text.

    Raises:
        FormatError: a reserved or empty key, or a value that JSON cannot express.
    """
    check_text("attribute name", key)
    if key in _RESERVED or key.startswith("_"):
        raise FormatError(f"The attribute name {key!r} is reserved; use another key in the recording's meta.")
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str) and value and "\0" not in value and not value.startswith(JSON_PREFIX):
        _set_text(target, key, value)
    elif isinstance(value, float):
        target.attrs.create(key, value, dtype="<f8")
    elif isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63:
        target.attrs.create(key, value, dtype="<i8")
    else:
        try:
            text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise FormatError(
                f"The meta value {key!r} cannot be stored: {error}. Use text, numbers, lists, dicts."
            ) from None
        _set_text(target, key, JSON_PREFIX + text)


def _set_text(target: h5py.Group, key: str, text: str) -> None:
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"The meta value {key!r} is not valid Unicode: {error}.") from None
    target.attrs.create(key, raw, dtype=h5py.string_dtype("utf-8", len(raw)))


def decode_attr(value: Any) -> Any:
    """Return the value that ``set_attr`` was given.

    Raises:
        ValueError: text that is not UTF-8, or broken JSON.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str) and value.startswith(JSON_PREFIX):
        return json.loads(value[len(JSON_PREFIX) :])
    return value


def to_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return stored token values as float32, the type in which they are computed with."""
    return np.asarray(values, dtype=np.float32)


def is_finite(values: NDArray[Any]) -> bool:
    """Return whether all values are finite (one pass, no temporary array of flags for the usual case)."""
    return bool(math.isfinite(float(np.sum(values, dtype=np.float64))) or np.isfinite(values).all())
