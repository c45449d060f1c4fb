"""The analysis of a run kept beside it: RUN/analysis.h5, valid as long as the recordings are those it was made from.

The file follows the conventions of netCDF4, so that ``xarray.open_datatree(path, engine="h5netcdf")`` reads it. It is
written and read with h5py all the same: hundreds of small variables take ten times longer through the general layers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import xarray as xr

from driftlens.analysis.datasets import TABLES
from driftlens.errors import StorageError
from driftlens.store import atomic_file

__all__ = [
    "ANALYSIS_NAME",
    "ANALYSIS_VERSION",
    "UNREADABLE",
    "cache_key",
    "open_cache",
    "read_table",
    "write_cache",
    "write_table",
]

ANALYSIS_NAME: Final = "analysis.h5"
ANALYSIS_VERSION: Final = 1
"""Raised whenever a number in the tables changes its meaning; older caches are then computed again."""

Stamps = Mapping[str, tuple[int, int]]

_DIMS: Final = "_driftlens_dims"
_RESERVED: Final = frozenset({_DIMS, "dtype", "CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST"})
_COMPRESSED_FROM: Final = 1024
_MAX_BYTES: Final = 1 << 30
UNREADABLE: Final = (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError)
"""What h5py raises on a damaged file, depending on where the damage is."""


def cache_key(**content: Any) -> str:
    """Return the SHA-256 of everything that the tables depend on."""
    return hashlib.sha256(json.dumps({"version": ANALYSIS_VERSION, **content}, sort_keys=True).encode()).hexdigest()


def open_cache(path: Path, key: str) -> dict[str, tuple[int, int]] | None:
    """Check a cache.

    Returns:
        The stamps of the recordings it was made from; None if there is no cache, or it belongs to other recordings
        or another version, or is damaged.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("key") != key or set(TABLES) - set(file):
                return None
            stamps = json.loads(file.attrs["stamps"])
            return {name: (int(size), int(changed)) for name, (size, changed) in stamps.items()}
    except UNREADABLE:
        return None


def read_table(path: Path, name: str) -> xr.Dataset | None:
    """Read one table of a cache; None if it is damaged."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            group = _local(file, name)
            coordinates = set(json.loads(group.attrs["coordinate_names"]))
            variables: dict[str, Any] = {}
            coords: dict[str, Any] = {}
            for key in group:
                target = coords if key in coordinates else variables
                target[key] = _read_variable(_local(group, key))
            return xr.Dataset(variables, coords, json.loads(group.attrs["table_attributes"]))
    except UNREADABLE:
        return None


def _local(group: h5py.Group, name: str) -> Any:
    """Return a member; ValueError if it would be read from elsewhere, or is larger than any table."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is a link")
    member = group[name]
    if isinstance(member, h5py.Dataset) and (member.external or member.is_virtual or member.nbytes > _MAX_BYTES):
        raise ValueError(f"{name} is stored elsewhere or is too large")
    return member


def _read_variable(dataset: h5py.Dataset) -> tuple[tuple[str, ...], np.ndarray, dict[str, Any]]:
    about = {key: _plain(value) for key, value in dataset.attrs.items() if key not in _RESERVED}
    values = dataset.asstr()[...].astype(np.str_) if h5py.check_string_dtype(dataset.dtype) else dataset[...]
    if dataset.attrs.get("dtype") == "bool":
        values = values.astype(np.bool_)
    return tuple(json.loads(dataset.attrs[_DIMS])), values, about


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def write_cache(path: Path, key: str, stamps: Stamps, tables: Mapping[str, xr.Dataset]) -> bool:
    """Write a cache atomically.

    Returns:
        False if it could not be written: the cache is a convenience, its absence costs seconds.
    """
    if not os.access(path.parent, os.W_OK):
        return False
    try:
        with atomic_file(path) as partial, h5py.File(partial, "x", libver=("v110", "v110"), locking=False) as file:
            for name, table in tables.items():
                write_table(file.create_group(name), table)
            file.attrs["key"] = key
            file.attrs["stamps"] = json.dumps(stamps, sort_keys=True)
    except (StorageError, OSError):  # the second: another process analyses the same run and was faster
        return False
    return True


def write_table(group: h5py.Group, table: xr.Dataset) -> None:
    """Write a table into an empty group, with dimension scales; `read_table` gives it back."""
    group.attrs["coordinate_names"] = json.dumps(list(table.coords))
    group.attrs["coordinates"] = " ".join(str(name) for name in table.coords if name not in table.dims)
    group.attrs["table_attributes"] = json.dumps(table.attrs)
    for name in table.dims:
        _write_variable(group, str(name), table[name].variable).make_scale(str(name))
    for name, variable in table.variables.items():
        if name not in table.dims:
            dataset = _write_variable(group, str(name), variable)
            for axis, dim in enumerate(variable.dims):
                dataset.dims[axis].attach_scale(group[str(dim)])


def _write_variable(group: h5py.Group, name: str, variable: xr.Variable) -> h5py.Dataset:
    values = variable.to_numpy()
    options: dict[str, Any] = {}
    if values.nbytes >= _COMPRESSED_FROM and values.dtype.kind != "U":
        options = {"compression": "gzip", "compression_opts": 4, "shuffle": True, "chunks": values.shape}
    if values.dtype.kind == "U":
        values = values.astype(h5py.string_dtype())
    flag = values.dtype.kind == "b"
    dataset = group.create_dataset(name, data=values.astype(np.int8) if flag else values, track_times=False, **options)
    if flag:
        dataset.attrs["dtype"] = "bool"
    dataset.attrs[_DIMS] = json.dumps(list(variable.dims))
    for key, value in variable.attrs.items():
        dataset.attrs[key] = value
    return dataset
