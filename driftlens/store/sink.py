"""The byte stream under a recording that is being written."""

from __future__ import annotations

import io
import os
from pathlib import Path

__all__ = ["Sink"]


class Sink(io.RawIOBase):
    """A new file that remembers the first refusal of the disk and then accepts everything without storing it.

    HDF5 cannot close a file whose last writes fail: it keeps the handle and crashes the process when that ends.
    With this stream HDF5 always closes cleanly; the writer asks for ``error`` and throws the file away.

    Args:
        path: a file that must not exist.

    Attributes:
        error: the first error of the operating system, or None.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.error: OSError | None = None
        self._raw = path.open("x+b", buffering=0)

    def readable(self) -> bool:
        """Whether reading works (always)."""
        return True

    def writable(self) -> bool:
        """Whether writing works (always, see the class)."""
        return True

    def seekable(self) -> bool:
        """Whether seeking works (always)."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position and return it."""
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._raw.tell()

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # typeshed's WriteableBuffer
        """Read up to the length of ``buffer`` and return the number of bytes."""
        return self._raw.readinto(buffer) or 0

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]  # typeshed's ReadableBuffer
        """Write all of ``data``; on a refusal remember the error. Returns the length of ``data`` in either case."""
        view = memoryview(data).cast("B")
        length, done = len(view), 0
        try:
            while done < length and self.error is None:
                done += self._raw.write(view[done:]) or 0
        except OSError as error:
            self.error = error
        return length

    def truncate(self, size: int | None = None) -> int:
        """Set the length; on a refusal remember the error."""
        size = self.tell() if size is None else size
        if self.error is None:
            try:
                self._raw.truncate(size)
            except OSError as error:
                self.error = error
        return size

    def close(self) -> None:
        """Close the file."""
        try:
            self._raw.close()
        except OSError as error:  # network file systems report a full disk here
            self.error = self.error or error
        super().close()
