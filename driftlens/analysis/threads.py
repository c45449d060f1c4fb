"""Blocks of a run side by side: as many workers as the linear algebra library would use threads.

numpy's loops, its linear algebra and HDF5's filters release Python's lock. OpenBLAS does well with one large product on
all cores, badly with many small ones and with several threads that each want all cores (a fifth of the speed on two
busy cores); so while workers run, every product keeps to one thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Final, TypeVar

__all__ = ["in_order", "worker_count"]

_MAX_WORKERS: Final = 8
"""Every worker holds a block of sites, some hundred megabytes in a large run."""
_PREFIXES: Final = ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_", "openblas_{}")
_In = TypeVar("_In")
_Out = TypeVar("_Out")

_guard = threading.Lock()
_users = 0
_before = 1


@cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """The functions that get and set the number of threads of numpy's OpenBLAS; None for another library."""
    try:  # a symbol is looked for in the libraries that this one was linked with, too
        library = ctypes.CDLL(importlib.import_module("numpy.linalg._umath_linalg").__file__)
    except (ImportError, OSError):
        return None
    for pattern in _PREFIXES:
        with contextlib.suppress(AttributeError):
            get, put = (getattr(library, pattern.format(name)) for name in ("get_num_threads", "set_num_threads"))
            get.restype, put.argtypes, put.restype = ctypes.c_int, [ctypes.c_int], None
            return get, put
    return None


def worker_count() -> int:
    """Return how many workers `in_order` has: OpenBLAS's threads (``OMP_NUM_THREADS``), at most 8; 1 without it."""
    library = _openblas()
    if library is None:
        return 1
    return max(1, min(_before if _users else library[0](), _MAX_WORKERS))


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    global _users, _before
    library = _openblas()
    if library is None:
        yield
        return
    with _guard:
        if not _users:
            _before = library[0]()
            library[1](1)
        _users += 1
    try:
        yield
    finally:
        with _guard:
            _users -= 1
            if not _users:
                library[1](_before)


def in_order(work: Callable[[_In], _Out], items: Sequence[_In]) -> Iterator[_Out]:
    """Yield ``work(item)`` of every item in the order of the items, whatever the number of workers.

    A worker that fails raises here, the first item's failure first; what was not begun is then not begun.
    """
    workers = max(1, min(worker_count(), len(items)))
    with _one_thread_each(), ThreadPoolExecutor(workers, "driftlens") as pool:
        try:
            # One item more than workers is under way: results do not pile up while one of them is being used.
            begun = deque(pool.submit(work, item) for item in items[: workers + 1])
            for number in range(len(items)):
                result = begun.popleft().result()
                if number + workers + 1 < len(items):
                    begun.append(pool.submit(work, items[number + workers + 1]))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)
