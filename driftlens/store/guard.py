"""Opening files of strangers: every link, attribute and dataset is examined before a byte of its data is read."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import struct
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import h5py
import hdf5plugin  # registers the filters, also needed for reading
import numpy as np
from numpy.typing import DTypeLike, NDArray

from driftlens.errors import FormatError, NotFoundError
from driftlens.store.encoding import decode_attr
from driftlens.store.schema import MAX_CHUNK_BYTES, MAX_COMPRESSION_RATIO, MAX_DATASET_BYTES, MAX_EXTENT, MAX_TOKENS
from driftlens.store.structure import ForeignStorageError, StructureError, check_object

__all__ = ["GuardedFile", "LazyArray"]

_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
_FILTERS: Final = [hdf5plugin.Bitshuffle.filter_id, 3]  # bitshuffle+lz4, then fletcher32 over what is stored
_LZ4: Final = 2
_CHUNK_HEAD: Final = 12
_MAX_ATTRS: Final = 4096
_MAX_ATTR_BYTES: Final = 1 << 20
_ADVICE: Final = "Run `driftlens verify`, then restore the file from a copy or record it again."


class GuardedFile:
    """A read-only HDF5 file that refuses what a recording never contains.

    Args:
        path: the file.

    Raises:
        NotFoundError: no such file.
        FormatError: not HDF5, truncated, or damaged in its root.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._examined: set[int] = set()
        self._groups: dict[str, h5py.Group] = {}
        self._members: dict[str, list[str]] = {}
        self._plain: set[str] = set()
        self.size, root = _check_superblock(self.path)
        with self.path.open("rb") as raw:
            self._check_object("/", root, raw.fileno())
        self._open()

    def _open(self) -> None:
        with self.reading("/"):
            self._file = h5py.File(self.path, "r")
        self._groups.clear()
        self.pid = os.getpid()

    @property
    def h5(self) -> h5py.File:
        """The open file. A forked child gets its own handle: HDF5 handles must not be shared over fork."""
        if self.pid != os.getpid():
            self._open()
        return self._file

    def close(self) -> None:
        """Close the file; arrays that were not read yet become unreadable."""
        # Nothing was written. A damaged file may have objects that HDF5 cannot let go of.
        with contextlib.suppress(RuntimeError):
            self._file.close()

    @contextlib.contextmanager
    def reading(self, key: str) -> Iterator[None]:
        """Turn what h5py raises while ``key`` is read into FormatError."""
        try:
            yield
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise self.damaged(key, error) from error

    def damaged(self, key: str, error: Exception) -> FormatError:
        """Return the error for ``key`` whose bytes cannot be understood."""
        detail = str(error).strip("'\"") or type(error).__name__
        return FormatError(f"{self.path}: {key} cannot be read: {detail}. The file is damaged. {_ADVICE}")

    def refuse(self, key: str, found: str, expected: str) -> FormatError:
        """Return the error for ``key``: what was found and what a recording has there."""
        return FormatError(f"{self.path}: {key} {found}; expected {expected}. {_ADVICE}")

    def members(self, key: str) -> list[str]:
        """Return the names in group ``key`` after checking that each is a plain object of this file.

        Raises:
            FormatError: soft or external links, or an absurd number of entries.
        """
        if key in self._members:
            return self._members[key]
        group, links = self.group(key), []
        with self.reading(key):
            if len(group) > MAX_EXTENT:
                raise self.refuse(key, f"has {len(group)} entries", f"at most {MAX_EXTENT}")
            # The library fills one object again for every link.
            group.id.links.iterate(lambda name, info: links.append((name, info.type, info.u)), info=True)
            names = self._decoded(key, [name for name, _, _ in links])
            above = key.rstrip("/")
            for name, (_, kind, address) in zip(names, links, strict=True):
                self._check_link(f"{above}/{name}", kind, address)
        self._members[key] = names
        return names

    def _check_object(self, key: str, address: int, handle: int | None = None) -> None:
        """Examine the header at ``address`` before libhdf5 opens it, once."""
        if address in self._examined:
            return
        try:
            check_object(self.h5.id.get_vfd_handle() if handle is None else handle, self.size, address)
        except ForeignStorageError as error:
            raise self._foreign(key, str(error)) from error
        except StructureError as error:
            raise self.damaged(key, error) from error
        self._examined.add(address)

    def _foreign(self, key: str, kind: str) -> FormatError:
        return FormatError(
            f"{self.path}: {key} has {kind}, which reads other files; recordings contain none. "
            "The file was not written by driftlens; do not trust it."
        )

    def group(self, key: str) -> h5py.Group:
        """Return the group at the absolute path ``key``, following plain links only. Opened once per file."""
        if self.pid != os.getpid():
            self._open()
        if key not in self._groups:
            with self.reading(key):
                found = self._open_object(key)
            if not isinstance(found, h5py.h5g.GroupID):
                raise self.refuse(key, "is not a group", "a group")
            self._groups[key] = h5py.Group(found)
        return self._groups[key]

    def attrs(self, key: str) -> dict[str, Any]:
        """Return the decoded attributes of a group: text, numbers, or what their JSON says."""
        target = self.group(key)
        with self.reading(f"the attributes of {key}"):
            count = h5py.h5a.get_num_attrs(target.id)
            if count > _MAX_ATTRS:
                raise self.refuse(key, f"has {count} attributes", f"at most {_MAX_ATTRS}")
            names: list[bytes] = []
            h5py.h5a.iterate(target.id, names.append)
            return {name: self._attr(target, name) for name in self._decoded(key, names)}

    def _decoded(self, key: str, names: Sequence[bytes]) -> list[str]:
        try:
            return [name.decode() for name in names]
        except UnicodeDecodeError as error:
            raise self.refuse(
                key, f"holds the name {error.object!r:.80}, which is not UTF-8", "names in UTF-8"
            ) from None

    def _attr(self, target: h5py.Group, name: str) -> Any:
        attr = h5py.h5a.open(target.id, name.encode())
        kind = attr.get_type()
        plain = isinstance(kind, (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID)) or (
            isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
        )
        if not plain or attr.shape != () or attr.get_storage_size() > _MAX_ATTR_BYTES:
            raise self.refuse(
                f"attribute {name!r:.80}",
                f"has shape {attr.shape}, {attr.get_storage_size()} bytes and HDF5 type class {kind.get_class()}",
                f"one number or one fixed-length text of at most {_MAX_ATTR_BYTES} bytes",
            )
        value = np.empty((), dtype=kind.dtype)
        attr.read(value)
        return decode_attr(value[()])

    def _open_object(self, key: str) -> h5py.h5g.GroupID | h5py.h5d.DatasetID | h5py.h5t.TypeID:
        """Open what ``key`` leads to, after examining the link and the header behind it."""
        above, _, name = key.rpartition("/")
        if not name:
            return h5py.h5o.open(self.h5.id, b"/")
        group = self.group(above or "/")
        if key not in self._plain:
            self._find_link(group, key, name.encode())
        return h5py.h5o.open(group.id, name.encode())

    def _find_link(self, group: h5py.Group, key: str, name: bytes) -> None:
        # h5py's own test for membership would follow the link into another file.
        # Libraries have no name for a group whose link was forged, so it is not asked for.
        if not group.id.links.exists(name):
            raise FormatError(f"{self.path}: {key} is missing. The file is not a complete recording. {_ADVICE}")
        info = group.id.links.get_info(name)
        self._check_link(key, info.type, info.u)

    def _check_link(self, key: str, kind: int, address: int) -> None:
        """Examine a link and the header behind it, once."""
        if kind != h5py.h5l.TYPE_HARD:
            kinds = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "an external link"}
            raise FormatError(
                f"{self.path}: {key} is {kinds.get(kind, 'a link')}, which could lead to other files; recordings "
                "contain none. The file was not written by driftlens; do not trust it."
            )
        self._check_object(key, address)
        self._plain.add(key)

    def array(self, key: str, shape: Sequence[int | None], dtypes: Sequence[str]) -> LazyArray:
        """Return dataset ``key`` after checking everything about it but its data.

        Args:
            key: absolute path inside the file.
            shape: expected extent; None accepts any length within the limits.
            dtypes: allowed types, numpy notation; ``"S"`` is fixed-length text.

        Raises:
            FormatError: missing, a link, external or virtual storage, other filters, other type or shape,
                or a shape that is larger than what is stored.
        """
        with self.reading(key):
            found = self._open_object(key)
            if not isinstance(found, h5py.h5d.DatasetID):
                raise self.refuse(key, "is not a dataset", "a dataset")
            dtype = self._check_type(key, found, dtypes)
            chunks = self._check_layout(key, found, dtype.itemsize)
            extent = self._check_shape(key, found, shape, chunks, dtype.itemsize)
        return LazyArray(self, key, found, extent, dtype, chunks)

    def _check_type(self, key: str, dataset: h5py.h5d.DatasetID, dtypes: Sequence[str]) -> np.dtype[Any]:
        kind = dataset.get_type()
        text = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
        if text or isinstance(kind, (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID)):
            dtype: np.dtype[Any] = kind.dtype
            found = "S" if text else dtype.str
        else:
            found = f"HDF5 type class {kind.get_class()}"
        if found not in dtypes:
            raise self.refuse(key, f"has type {found}", " or ".join(dtypes))
        return dtype

    def _check_layout(self, key: str, dataset: h5py.h5d.DatasetID, item: int) -> tuple[int, ...]:
        """Return the extent of a chunk."""
        plist = dataset.get_create_plist()
        layout, external = plist.get_layout(), plist.get_external_count()
        if layout == h5py.h5d.VIRTUAL or external:
            raise self._foreign(key, "external storage" if external else "a virtual layout")
        if layout != h5py.h5d.CHUNKED:
            raise self.refuse(key, "is not stored in chunks", "chunks with a checksum")
        filters = [plist.get_filter(index) for index in range(plist.get_nfilters())]
        numbers = [item[0] for item in filters]
        if numbers != _FILTERS:
            raise self.refuse(key, f"has the HDF5 filters {numbers}", f"{_FILTERS} (bitshuffle, fletcher32)")
        # The filter's C code divides by the item size and trusts the block size that the file names.
        parameters = filters[0][2][2:]
        if parameters != (item, 0, _LZ4):
            raise self.refuse(key, f"has the bitshuffle parameters {parameters}", f"{(item, 0, _LZ4)}")
        chunks: tuple[int, ...] = plist.get_chunk()
        return chunks

    def _check_shape(
        self, key: str, dataset: h5py.h5d.DatasetID, expected: Sequence[int | None], chunks: tuple[int, ...], item: int
    ) -> tuple[int, ...]:
        """Return the extent."""
        shape: tuple[int, ...] = dataset.shape
        if len(shape) != len(expected) or any(e not in (None, n) for n, e in zip(shape, expected, strict=True)):
            wanted = "[" + ", ".join("any" if e is None else str(e) for e in expected) + "]"
            raise self.refuse(key, f"has shape {list(shape)}", wanted)
        chunk_bytes, total = item, item
        n_chunks = 1
        for n, c in zip(shape, chunks, strict=True):
            chunk_bytes, total, n_chunks = chunk_bytes * c, total * n, n_chunks * -(-n // c)
        if max(shape) > MAX_TOKENS or total > MAX_DATASET_BYTES or chunk_bytes > MAX_CHUNK_BYTES:
            raise self.refuse(
                key,
                f"declares {total:,} bytes in chunks of {chunk_bytes:,}",
                f"at most {MAX_DATASET_BYTES:,} in chunks of at most {MAX_CHUNK_BYTES:,}",
            )
        stored = dataset.get_storage_size()
        # The count is asked last: it walks the index, whose length the checks above have bounded by the file's size.
        if stored > self.size or n_chunks * chunk_bytes > stored * MAX_COMPRESSION_RATIO:
            raise self.refuse(
                key, f"declares {total:,} bytes but stores {stored:,}", "a shape that fits what is stored"
            )
        found = dataset.get_num_chunks()
        if found != n_chunks:
            raise self.refuse(key, f"has {found} stored chunks", f"{n_chunks} for shape {list(shape)}")
        return shape


class LazyArray:
    """A dataset of a recording that is read where it is indexed.

    Attributes:
        key: path inside the file.
        shape: extent.
        dtype: stored type; token values are usually float16, compute in float32 or wider.
    """

    def __init__(
        self,
        file: GuardedFile,
        key: str,
        dataset: h5py.h5d.DatasetID,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        chunks: tuple[int, ...],
    ) -> None:
        self.key, self.shape, self.dtype, self.chunks = key, shape, dtype, chunks
        self._file, self._dataset, self._pid = file, dataset, file.pid
        self._n_chunks = math.prod(-(-n // c) for n, c in zip(self.shape, self.chunks, strict=True))
        self._sound: set[tuple[int, ...]] = set()

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Read a part.

        Raises:
            IndexError: outside the extent.
            FormatError: the stored bytes do not match their checksum.
            NotFoundError: the recording was closed.
        """
        if self._pid != os.getpid():
            self._dataset, self._pid = self._file.h5[self.key].id, os.getpid()
            self.__dict__.pop("_slicer", None)
        if not self._dataset.valid:
            raise NotFoundError(f"{self._file.path} was closed before {self.key} was read; open it again.")
        try:
            self._check_chunks(index)
            if index is not Ellipsis:
                return np.asarray(self._slicer[index])
            whole = np.empty(self.shape, self.dtype)
            self._dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, whole)
            return whole
        except (OSError, RuntimeError, MemoryError, _ChunkError) as error:
            raise self._file.damaged(self.key, error) from error

    @cached_property
    def _slicer(self) -> h5py.Dataset:
        # h5py keeps its plan of reading only where it is told that nobody writes.
        return h5py.Dataset(self._dataset, readonly=True)

    def _check_chunks(self, index: Any) -> None:
        """Examine every chunk that ``index`` touches, each once."""
        if len(self._sound) == self._n_chunks:
            return
        spans = zip(_spans(index, self.shape), self.chunks, strict=True)
        item = self.dtype.itemsize
        for corner in itertools.product(*(range(low // c * c, high, c) for (low, high), c in spans)):
            if corner not in self._sound:
                check_chunk(self._dataset, corner, item, item * math.prod(self.chunks))
                self._sound.add(corner)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[...], dtype=dtype)

    def __repr__(self) -> str:
        return f"LazyArray({self.key}, shape={list(self.shape)}, dtype={self.dtype})"


class _ChunkError(Exception):
    """A stored chunk that must not reach the filter."""


def check_chunk(dataset: h5py.h5d.DatasetID, corner: tuple[int, ...], item: int, total: int) -> None:
    """Compare what a stored chunk declares with what its dataset needs, before the filter's C code trusts it.

    Bitshuffle stores the length of the chunk and of a block (8 and 4 bytes), then every block with its compressed
    length (4 bytes), then up to 7 values as they are; fletcher32 appends 4 bytes. The filter allocates, copies
    and decompresses as these numbers say, within no bounds of its own.

    Args:
        dataset: the dataset.
        corner: index of the first value of the chunk.
        item: bytes of a value.
        total: bytes of a whole chunk without filters.

    Raises:
        _ChunkError: lengths that do not add up, or filters (the checksum among them) that the chunk skips.
    """
    mask, raw = dataset.read_direct_chunk(corner)
    end = len(raw) - 4
    sound = mask == 0 and end >= _CHUNK_HEAD
    if sound:
        declared, block = struct.unpack_from(">QI", raw)
        sound = declared == total and 0 < block <= MAX_CHUNK_BYTES and block % (8 * item) == 0
    if sound:
        at, rest = _CHUNK_HEAD, total % block
        for _ in range(total // block + (rest >= 8 * item)):
            if at + 4 > end:
                break
            at += 4 + int.from_bytes(raw[at : at + 4], "big")
        sound = at + rest % (8 * item) == end
    if not sound:
        raise _ChunkError(f"the lengths inside its chunk at {list(corner)} do not add up to {total:,} bytes")


def _spans(index: Any, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return per axis the first index that ``index`` may touch and the one after the last; whole axes when in doubt."""
    if index is Ellipsis:
        return [(0, n) for n in shape]
    parts = list(index) if isinstance(index, tuple) else [index]
    simple = all(isinstance(part, (int, np.integer, slice)) or part is Ellipsis for part in parts)
    gaps = [at for at, part in enumerate(parts) if part is Ellipsis]
    if not simple or len(gaps) > 1 or len(parts) - len(gaps) > len(shape):
        return [(0, n) for n in shape]
    at = gaps[0] if gaps else len(parts)
    fill = [slice(None)] * (len(shape) - len(parts) + len(gaps))
    parts[at : at + 1] = fill
    spans = []
    for part, n in zip(parts, shape, strict=True):
        if isinstance(part, slice):
            touched = range(n)[part]
            spans.append((min(touched), max(touched) + 1) if touched else (0, 0))
        else:
            number = int(part) + n if part < 0 else int(part)
            spans.append((number, number + 1) if 0 <= number < n else (0, 0))
    return spans


def _check_superblock(path: Path) -> tuple[int, int]:
    """Return size and root address after comparing the size with what the file's first 48 bytes declare."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise FormatError(f"{path} is not a file. Give the path of a .h5 recording.")
        with path.open("rb") as file:
            head = file.read(48)
            size = os.fstat(file.fileno()).st_size
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(
            f"There is no recording {path}. List what exists with `driftlens ls {path.parent}`."
        ) from None
    except OSError as error:
        raise FormatError(
            f"{path} cannot be opened: {error.strerror or error}. Give the path of a .h5 recording."
        ) from None
    if not head:
        raise FormatError(f"{path} is empty (0 bytes). {_ADVICE}")
    if not head.startswith(_SIGNATURE[: len(head)]):
        raise FormatError(f"{path} is not an HDF5 file. Give the path of a .h5 recording.")
    if len(head) < 48:
        raise FormatError(f"{path} is truncated: {size} bytes are there, at least 48 are needed. {_ADVICE}")
    version, offset_size, _, _ = struct.unpack_from("4B", head, 8)
    base, extension, end, root = struct.unpack_from("<4Q", head, 12)
    if version not in (2, 3) or offset_size != 8 or base != 0 or extension != (1 << 64) - 1:
        raise FormatError(
            f"{path} has HDF5 superblock version {version}, offsets of {offset_size} bytes and base {base}; "
            "recordings have version 2 or 3, 8 and 0, and no extension. "
            "It was not written by driftlens, or its first bytes are damaged."
        )
    if end != size:
        state = "truncated" if size < end else "longer than it declares"
        raise FormatError(f"{path} is {state}: {size:,} bytes are there, {end:,} are expected. {_ADVICE}")
    return size, root
