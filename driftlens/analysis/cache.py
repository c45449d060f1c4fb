"""The analysis of a run kept beside it: RUN/analysis.h5, valid as long as the recordings are those it was made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import h5py
import xarray as xr

from driftlens.analysis.datasets import TABLES
from driftlens.errors import StorageError
from driftlens.store import atomic_file

__all__ = ["ANALYSIS_NAME", "ANALYSIS_VERSION", "cache_key", "open_cache", "read_table", "write_cache"]

ANALYSIS_NAME: Final = "analysis.h5"
ANALYSIS_VERSION: Final = 1
"""Raised whenever a number in the tables changes its meaning; older caches are then computed again."""

Stamps = Mapping[str, tuple[int, int]]


def cache_key(**content: Any) -> str:
    """Return the SHA-256 of everything that the tables depend on."""
    return hashlib.sha256(json.dumps({"version": ANALYSIS_VERSION, **content}, sort_keys=True).encode()).hexdigest()


def file_stamp(path: Path) -> tuple[int, int]:
    """Return size and time of change: while they stay, a file that was hashed once is not hashed again."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


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
    except (OSError, KeyError, ValueError, TypeError):
        return None
    return {name: (int(size), int(changed)) for name, (size, changed) in stamps.items()}


def read_table(path: Path, name: str) -> xr.Dataset | None:
    """Read one table of a cache; None if it is damaged."""
    try:
        return xr.load_dataset(path, group=name, engine="h5netcdf")
    except (OSError, KeyError, ValueError, TypeError, RuntimeError):
        return None


def write_cache(path: Path, key: str, stamps: Stamps, tables: Mapping[str, xr.Dataset]) -> bool:
    """Write a cache atomically.

    Returns:
        False if the folder cannot be written to: the cache is a convenience, its absence costs seconds.
    """
    if not os.access(path.parent, os.W_OK):
        return False
    try:
        with atomic_file(path) as partial:
            for name, table in tables.items():
                packed = {
                    key: {"zlib": True, "complevel": 4, "shuffle": True} for key in table.data_vars if table[key].ndim
                }
                table.to_netcdf(partial, mode="a", group=name, engine="h5netcdf", encoding=packed)
            with h5py.File(partial, "a") as file:
                file.attrs["key"] = key
                file.attrs["stamps"] = json.dumps(stamps, sort_keys=True)
    except StorageError:
        return False
    return True
