"""Files of `driftlens attribute`, read without model or torch: one per (current checkpoint, old task)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import h5py
import numpy as np
import xarray as xr

from driftlens.analysis.cache import UNREADABLE, read_table
from driftlens.errors import FormatError, NotFoundError

__all__ = ["ATTRIBUTION_FILES", "ATTRIBUTION_SCHEMA", "COMBINATIONS", "SCORES", "AttributedCell", "read_cell"]

ATTRIBUTION_SCHEMA: Final = 1
ATTRIBUTION_FILES: Final = re.compile(r"attribution/(?P<current>\d+-[^/]+)/(?P<anchor>\d+-[^/]+)\.h5")
"""Files of attributed cells, as paths in a manifest."""

SCORES: Final = ("strict", "lenient", "nll")
"""What is swapped and scored: two accuracies, and the answer NLL with its sign turned (larger is better)."""

COMBINATIONS: Final = ("aa", "ca", "ac", "cc")
"""First letter router, second experts: a the anchor's, c the current one."""

_OPTIONAL: Final = ("swaps", "depth", "restores")
_TABLES: Final = ("scores", "ledger", "tokens")


class AttributedCell(NamedTuple):
    """One file.

    Attributes:
        path: where it is.
        about: what was compared and how, the file's attributes.
        tables: ``ledger`` and ``tokens``, and ``swaps``, ``depth`` and ``restores`` where they were made.
    """

    path: Path
    about: dict[str, Any]
    tables: dict[str, xr.Dataset]

    def belongs(self, checkpoints: Mapping[int, str], weights: Mapping[str, str]) -> bool:
        """Whether both checkpoints are there, with the weights that were attributed.

        Args:
            checkpoints: index -> name.
            weights: name -> SHA-256 of the weights, of those that are known.
        """
        for end in ("anchor", "current"):
            name = self.about.get(end)
            if checkpoints.get(self.about.get(f"{end}_index", -1)) != name:
                return False
            found = self.about.get(f"{end}_weights_sha256")
            if found is not None and weights.get(str(name), found) != found:
                return False
        return True


def read_cell(path: Path) -> AttributedCell:
    """Read one attributed cell.

    Raises:
        NotFoundError: no such file.
        FormatError: damaged, or no file of `driftlens attribute`.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist. Make it with `driftlens attribute`.")
    try:
        with h5py.File(path, "r", locking=False) as file:
            schema = file.attrs.get("driftlens_attribution")
            about = {key: _value(value) for key, value in file.attrs.items()}
            names = [name for name in (*_TABLES, *_OPTIONAL) if name in file]
    except UNREADABLE as error:
        raise FormatError(f"{path} cannot be read ({error}). Delete it and run `driftlens attribute` again.") from error
    if schema is None or int(schema) != ATTRIBUTION_SCHEMA:
        found = "no schema" if schema is None else f"schema {schema}"
        raise FormatError(
            f"{path} is not a file of `driftlens attribute` that this version reads: {found}, expected "
            f"{ATTRIBUTION_SCHEMA}. Run `driftlens attribute` again."
        )
    tables = {name: read_table(path, name) for name in names}
    missing = [name for name in _TABLES if name not in tables] + [name for name in tables if tables[name] is None]
    if missing:
        raise FormatError(
            f"{path}: {', '.join(missing)} cannot be read. Delete the file and run `driftlens attribute` again."
        )
    return AttributedCell(path, about, {name: table for name, table in tables.items() if table is not None})


def _value(value: Any) -> Any:
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, str) and (plain[:1] in ("{", "[") or plain in ("null", "true", "false")):
        try:
            return json.loads(plain)
        except ValueError:
            return plain
    return plain
