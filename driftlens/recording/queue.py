"""A bounded queue with one writer thread: the model computes the next batch while the last one is written."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from driftlens.errors import ConfigError

__all__ = ["DEPTH", "WriteQueue", "check_fits_buffer"]

T = TypeVar("T")

DEPTH = 2
"""Batches that may wait for the writer; one more is being written."""


def check_fits_buffer(size: int, max_bytes: int | None) -> None:
    """Raise ConfigError if one batch of ``size`` bytes is larger than all that may be in flight."""
    if max_bytes is not None and size > max_bytes:
        raise ConfigError(
            f"One batch of recorded values takes {size / 1e6:,.1f} MB, and max_buffer_mb allows {max_bytes / 1e6:,.1f} "
            "MB in flight. Lower the batch size or tokens_per_sample, or allow more."
        )


class WriteQueue(Generic[T]):
    """Hands items to ``consume`` in order, in one thread; use it as a context manager.

    Leaving the block normally waits until everything is consumed. Leaving it by an exception throws away what waits,
    and joins the thread. An exception of ``consume`` reaches the caller as it was raised, from the next ``put`` or on
    leaving; nothing is consumed after it.

    Args:
        consume: what is done with an item.
        max_bytes: how many bytes may be in flight, waiting or being written; None for no limit but the depth.
        depth: how many items may wait.
        drop: where there is no room, refuse an item instead of waiting for room.

    Raises:
        ConfigError: a limit below 1.
    """

    def __init__(
        self, consume: Callable[[T], None], *, max_bytes: int | None = None, depth: int = DEPTH, drop: bool = False
    ) -> None:
        if depth < 1 or (max_bytes is not None and max_bytes < 1):
            raise ConfigError(
                f"A write queue of depth {depth} and {max_bytes} bytes can hold nothing: both must be at least 1."
            )
        self._consume, self._max_bytes, self._depth, self._drop = consume, max_bytes, depth, drop
        self._waiting: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._error: BaseException | None = None
        self._closing = False
        self._changed = threading.Condition()
        # A daemon: an interpreter that is told to exit does not wait for a disk that hangs.
        self._thread = threading.Thread(target=self._work, name="driftlens-writer", daemon=True)

    def __enter__(self) -> WriteQueue[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close(discard=error is not None)
        except BaseException:
            self._close(discard=True)  # an interrupt while waiting: the thread must not outlive the block
            raise
        if error is None:
            self._raise()

    def put(self, item: T, size: int) -> bool:
        """Hand over ``item`` of ``size`` bytes; waits for room.

        Returns:
            False if there was no room and the queue drops; the item was not taken.

        Raises:
            ConfigError: the item alone is larger than ``max_bytes``.
            Exception: whatever ``consume`` raised on an earlier item.
        """
        check_fits_buffer(size, self._max_bytes)
        with self._changed:
            while self._error is None and not self._has_room(size):
                if self._drop:
                    return False
                self._changed.wait()
            self._raise()
            self._waiting.append((item, size))
            self._bytes += size
            self._changed.notify_all()
        return True

    def _has_room(self, size: int) -> bool:
        fits = self._max_bytes is None or self._bytes + size <= self._max_bytes
        return len(self._waiting) < self._depth and fits

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _close(self, *, discard: bool) -> None:
        with self._changed:
            if discard:
                self._waiting.clear()
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                item, size = self._waiting.popleft()
            try:
                self._consume(item)
            except BaseException as error:  # it is raised again in the caller's thread
                with self._changed:
                    self._error = error
                    self._waiting.clear()
                    self._changed.notify_all()
                return
            del item  # its buffers are free before anyone is told that there is room
            with self._changed:
                self._bytes -= size
                self._changed.notify_all()
