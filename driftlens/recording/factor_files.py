"""Opening the weights of an adapter folder tensor by tensor, and its configuration, whatever wrote them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from driftlens.errors import FormatError, NotFoundError

__all__ = [
    "CONFIG_NAME",
    "WEIGHT_NAMES",
    "Tensors",
    "load_pickled",
    "open_tensors",
    "read_adapter_config",
    "weights_file",
]

CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_TRIPPED = (ValueError, TypeError, AttributeError, AssertionError)
_DAMAGED = "The checkpoint is damaged or still being written; copy it again."


class Tensors(Protocol):
    """An open file of named tensors; nothing is read before it is asked for."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name."""

    def get(self, name: str) -> Tensor:
        """Read one tensor."""


def weights_file(folder: Path) -> Path:
    """Return the file of weights in an adapter folder; safetensors where both formats are there.

    Raises:
        NotFoundError: no such folder, or no weights in it.
    """
    if not folder.is_dir():
        raise NotFoundError(f"No checkpoint folder at {folder}. Give folders that hold {' or '.join(WEIGHT_NAMES)}.")
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    inside = sorted(path.parent.name for name in WEIGHT_NAMES for path in folder.glob(f"*/{name}"))
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    hint = f" Its subfolders are checkpoints: {', '.join(inside[:12])}; give those." if inside else ""
    raise NotFoundError(f"{folder} holds neither {' nor '.join(WEIGHT_NAMES)} (found: {found}).{hint}")


@contextmanager
def open_tensors(path: Path) -> Iterator[Tensors]:
    """Open a ``.safetensors`` or ``.bin`` file; the mapping is dropped at the end, and with it its memory.

    Raises:
        FormatError: unreadable, truncated, or pickled objects other than tensors, which are never loaded.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                yield _Safetensors(file)
        else:
            yield _Pickled(path)
    except SafetensorError as error:
        raise FormatError(f"{path} cannot be read ({error}). {_DAMAGED}") from error


class _Safetensors:
    def __init__(self, file: Any) -> None:
        self._file = file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class _Pickled:
    def __init__(self, path: Path) -> None:
        self._tensors = {name: value for name, value in load_pickled(path).items() if isinstance(value, Tensor)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self._tensors.items()}

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


def load_pickled(path: Path) -> dict[str, Any]:
    """Return what a file of ``torch.save`` holds by name: tensors, numbers and lists of them, never objects with code.

    Raises:
        FormatError: unreadable, truncated, or pickled objects of other kinds.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    # a file cut short is an OSError; other damage surfaces as whatever the unpickler trips over
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ArithmeticError, LookupError, *_TRIPPED) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise FormatError(
            f"{path} cannot be read as plain tensors ({type(error).__name__}: {first:.200}). Files that run code "
            f"when loaded are refused. {_DAMAGED}"
        ) from error
    if not isinstance(loaded, Mapping):
        raise FormatError(f"{path} holds a {type(loaded).__name__}, expected tensors by name.")
    return {str(name): value for name, value in loaded.items()}


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_adapter_config(folder: Path) -> dict[str, Any] | None:
    """Read ``adapter_config.json``; None where there is none.

    Raises:
        FormatError: not a JSON object.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON: {error}. {_DAMAGED}") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path} must hold an object; found {type(config).__name__}. {_DAMAGED}")
    return config
