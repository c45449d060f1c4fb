"""The exception family of DriftLens.

Every message says what was asked, what was found, what is allowed, and what to do next.
The command line turns each class into its ``exit_code`` and prints the message alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DriftLensError",
    "FormatError",
    "LockedError",
    "NotFoundError",
    "ProbeError",
    "SiteError",
    "StorageError",
    "UnknownNameError",
    "nearest_name",
]


class DriftLensError(Exception):
    """Base class of all errors that DriftLens raises on purpose (exit code 1)."""

    exit_code = 1


class ConfigError(DriftLensError):
    """A configuration, or a command line, that cannot be meant as written (exit code 2)."""

    exit_code = 2


class UnknownNameError(ConfigError):
    """A name (method, task, key, gate, ...) that is not registered (exit code 2)."""

    def __init__(self, kind: str, name: str, allowed: Iterable[str]) -> None:
        known = sorted(allowed)
        guess = nearest_name(name, known)
        hint = f" Did you mean {guess!r}?" if guess else ""
        listing = ", ".join(known) if known else "none is registered"
        super().__init__(f"Unknown {kind} {name!r}.{hint} Known: {listing}.")
        self.kind, self.name, self.nearest = kind, name, guess


class NotFoundError(DriftLensError):
    """A run, checkpoint, recording or asset that does not exist (exit code 3)."""

    exit_code = 3


class FormatError(DriftLensError):
    """A file that is corrupt, truncated, hostile or of another schema (exit code 4)."""

    exit_code = 4


class ProbeError(DriftLensError):
    """A probe set that does not fit the run, the model or another recording (exit code 5)."""

    exit_code = 5


class LockedError(DriftLensError):
    """A second writer on the same run or recording (exit code 6)."""

    exit_code = 6


class StorageError(DriftLensError):
    """The disk is full, read-only or otherwise refuses to store (exit code 7)."""

    exit_code = 7


class SiteError(DriftLensError):
    """A model without observable sites, or a site that did not fire as declared (exit code 8)."""

    exit_code = 8


def nearest_name(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name that is closest in spelling to ``name``, or None if none is close."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return matches[0] if matches else None
