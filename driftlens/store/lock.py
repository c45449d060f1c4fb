"""One writer at a time: an operating-system lock on a run folder or on one file."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from pathlib import Path
from types import TracebackType

import filelock

from driftlens.errors import LockedError, StorageError

__all__ = ["RunLock"]


class RunLock:
    """Exclusive lock on a folder (or, for single recordings, on one file's name).

    The operating system releases the lock when the process ends, however it ends; a lock file that is left
    behind is harmless. Readers need no lock: finished files never change.

    Args:
        target: a run folder (created if missing), or the path of a file whose parent exists.
        file: True if ``target`` is the path of a file.

    Raises:
        LockedError: on entering, if another writer holds the lock.
        StorageError: on entering, if the lock file cannot be created.
    """

    def __init__(self, target: str | os.PathLike[str], *, file: bool = False) -> None:
        self.target = Path(target)
        self.path = self.target.parent / f".{self.target.name}.lock" if file else self.target / ".lock"
        self._owner = self.path.with_name(self.path.name + ".owner")
        # The owner may enter in one thread and leave in another (a recording closed by a callback).
        self._lock = filelock.FileLock(self.path, timeout=0, thread_local=False)

    def __enter__(self) -> RunLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise LockedError(
                f"{self.target} is being written by {self._describe_owner()}. "
                "Wait until it has finished or stop it; two writers would damage each other's work."
            ) from None
        except OSError as error:
            raise StorageError(
                f"Cannot create the lock {self.path}: {error.strerror or error}. "
                "Choose an output folder that you may write to."
            ) from error
        # Who holds it is a courtesy of the message; a disk that is full here must not stop the writer.
        with contextlib.suppress(OSError):
            self._owner.write_text(json.dumps({"pid": os.getpid(), "host": platform.node()}), encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._owner.unlink(missing_ok=True)
        self._lock.release()

    def _describe_owner(self) -> str:
        try:
            owner = json.loads(self._owner.read_text(encoding="utf-8"))
            return f"process {int(owner['pid'])} on {owner['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
