"""Writing so that a name is only ever taken by something complete.

Everything is written beside its target as ``NAME.partial``, flushed to the disk, and renamed. A process that is
killed leaves at most a ``.partial``, which readers ignore and the next writer replaces.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from driftlens.errors import StorageError

__all__ = [
    "PARTIAL_SUFFIX",
    "atomic_file",
    "atomic_folder",
    "fsync_path",
    "partial_path",
    "storage_errors",
    "write_bytes",
    "write_json",
]

PARTIAL_SUFFIX: Final = ".partial"

_STORAGE_ERRNOS: Final = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENOTDIR", "ENAMETOOLONG")
    if hasattr(errno, name)
)


def partial_path(path: str | os.PathLike[str]) -> Path:
    """Return the sibling ``NAME.partial`` under which ``path`` is written."""
    target = Path(path)
    return target.with_name(target.name + PARTIAL_SUFFIX)


def fsync_path(path: str | os.PathLike[str]) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    # Windows cannot open folders; its rename is durable by itself.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    if os.name == "nt":
        if Path(path).is_dir():
            return
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def storage_errors(path: str | os.PathLike[str], needed: int | None = None) -> Iterator[None]:
    """Turn the operating system's refusals to store into StorageError.

    Args:
        path: what is being written; its ``.partial`` tells how much was written so far.
        needed: bytes that the finished file will take, if known.

    Raises:
        StorageError: disk full, quota, read-only, no permission; with the bytes written, needed and free.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        target, number = Path(path), _errno_of(error)
        if number not in _STORAGE_ERRNOS or not _concerns(error, target.parent):
            raise
        raise StorageError(
            f"Cannot write {target}: {os.strerror(number)}. {_space(target, needed)} "
            "Nothing that was finished before is lost; free space or choose another folder, then start again."
        ) from error


def _errno_of(error: BaseException) -> int:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # HDF5 reports the operating system's number only inside its text.
    match = re.search(r"errno = (\d+)", str(error))
    return int(match[1]) if match else 0


def _concerns(error: BaseException, folder: Path) -> bool:
    # A file elsewhere that cannot be read while writing is another story and keeps its own error.
    name = getattr(error, "filename", None)
    return not isinstance(name, str) or Path(name).absolute().is_relative_to(folder.absolute())


def _space(target: Path, needed: int | None) -> str:
    partial = partial_path(target)
    try:
        written = partial.stat().st_size if partial.is_file() else 0
        free = shutil.disk_usage(target.parent).free
    except OSError:
        return "The folder cannot be examined."
    need = f", {needed:,} bytes are needed" if needed is not None else ""
    return f"{written:,} bytes were written{need}, {free:,} bytes are free."


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, overwrite: bool = True, needed: int | None = None) -> Iterator[Path]:
    """Write a file completely or not at all.

    Args:
        path: the final name. Its folder must exist.
        overwrite: False refuses to replace an existing file; True replaces it in one step at the end.
        needed: bytes that will be written, if known; the disk is asked beforehand.

    Yields:
        The sibling ``NAME.partial`` to write to. It does not exist yet; a left-over of a killed writer is removed.

    Raises:
        StorageError: the target exists and may not be replaced, or the disk refuses. The target is then as before.
    """
    target, partial = Path(path), partial_path(path)
    with storage_errors(target, needed):
        _prepare(target, partial, overwrite=overwrite, needed=needed)
    try:
        with storage_errors(target, needed):  # inside, because the message tells the size of the partial
            yield partial
            fsync_path(partial)
            partial.replace(target)
            fsync_path(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder completely or not at all.

    Args:
        path: the final name. Its parent must exist.
        overwrite: True replaces an existing folder. The old one is moved aside, the new one renamed, and the old
            one removed, so that no moment mixes files of both.

    Yields:
        The sibling folder ``NAME.partial``, empty.

    Raises:
        StorageError: the target exists and may not be replaced, or the disk refuses. The target is then as before.
    """
    target, partial = Path(path), partial_path(path)
    aside = target.with_name(target.name + ".replaced" + PARTIAL_SUFFIX)
    with storage_errors(target):
        if aside.exists() and not target.exists():
            aside.rename(target)  # a writer was killed between its two renames
        _prepare(target, partial, overwrite=overwrite, needed=None)
        try:
            partial.mkdir()
            yield partial
            for folder, _, files in os.walk(partial):
                for name in files:
                    fsync_path(Path(folder, name))
                fsync_path(folder)
            if target.exists():
                _remove(aside)
                target.rename(aside)
            partial.rename(target)
            fsync_path(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                _remove(partial)
                if aside.exists() and not target.exists():
                    aside.rename(target)
            raise
        _remove(aside)


def _prepare(target: Path, partial: Path, *, overwrite: bool, needed: int | None) -> None:
    if not target.parent.is_dir():
        raise StorageError(f"Cannot write {target}: the folder {target.parent} does not exist. Create it first.")
    if target.exists() and not overwrite:
        raise StorageError(
            f"{target} exists already and was left as it is. "
            "Delete it, choose another name, or have it replaced (record --fresh, export --overwrite; in Python "
            "overwrite=True)."
        )
    _remove(partial)
    if needed is not None:
        free = shutil.disk_usage(target.parent).free
        if needed > free:
            raise StorageError(
                f"Cannot write {target}: {needed:,} bytes are needed, {free:,} bytes are free. "
                "Free space or choose another folder."
            )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` atomically and durably; StorageError if the disk refuses."""
    with atomic_file(path, needed=len(data)) as partial:
        partial.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON with sorted keys, atomically and durably.

    Raises:
        ValueError: the value contains NaN or infinity, which are not JSON.
        StorageError: the disk refuses.
    """
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())
