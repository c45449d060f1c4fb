"""The metadata of one HDF5 object, read without libhdf5: what its C code would trust is examined first.

libhdf5 checks the checksums of metadata, not their sense. A forger repairs checksums, and some lengths and counts then
crash the library or keep it busy for ever (found by scripts/fuzz_reader.py). `check_object` parses the header of a
group or dataset, its attributes and the heads of its indices, as version 3 of the format specifies them
(https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html), and refuses what a recording never has.
"""

from __future__ import annotations

import math
import os
import struct
from functools import lru_cache
from typing import Final

__all__ = ["ForeignStorageError", "StructureError", "check_object"]

_UNDEFINED: Final = (1 << 64) - 1
_MAX_HEADER_BYTES: Final = 4 << 20
_MAX_CONTINUATIONS: Final = 1024
_MAX_TYPE_BYTES: Final = 1 << 26
_MAX_POINTS: Final = 1 << 62
_NODE_BYTES: Final = 512
_WINDOW: Final = 1024
# Type of a B-tree's records -> their length: large objects of a heap, links by name, attributes by name.
_RECORD_BYTES: Final = {1: 24, 5: 11, 8: 17}

# Types of messages in an object's header.
NIL, SPACE, LINK_INFO, TYPE, FILL, LINK, EXTERNAL, LAYOUT = 0, 1, 2, 3, 5, 6, 7, 8
GROUP_INFO, FILTERS, ATTRIBUTE, CONTINUATION, ATTRIBUTE_INFO, REFERENCES = 10, 11, 12, 16, 21, 22


class StructureError(Exception):
    """Metadata that must not reach libhdf5."""


class ForeignStorageError(StructureError):
    """Data that lies in other files."""


def check_object(handle: int, size: int, address: int) -> None:
    """Examine the group or dataset whose header is at ``address``.

    Args:
        handle: file descriptor.
        size: bytes of the file.
        address: where the header begins.

    Raises:
        StructureError: a part outside the file or its header, or numbers that no recording has.
    """
    try:
        _Object(handle, size).check(address)
    except (struct.error, IndexError) as error:
        raise StructureError(f"its header at byte {address:,} ends too early") from error


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise StructureError(f"its metadata has {what}")


class _Object:
    def __init__(self, handle: int, size: int) -> None:
        self.handle, self.size = handle, size
        self.start, self.window = 0, b""

    def read(self, address: int, length: int, signature: bytes = b"") -> bytes:
        if not (0 < address <= self.size and 0 <= length <= self.size - address):
            raise StructureError(f"its metadata has a part at byte {address:,} outside")
        at = address - self.start
        if not 0 <= at <= len(self.window) - length:
            # The parts of an object mostly follow each other.
            self.start, self.window, at = address, os.pread(self.handle, max(length, _WINDOW), address), 0
        data = self.window[at : at + length]
        if not data.startswith(signature):
            raise StructureError(f"its metadata has no {signature.decode()} at byte {address:,}")
        return data

    def check(self, address: int) -> None:
        found = self.messages(address)
        for kind in _ONCE & found.keys():
            _need(len(found[kind]) == 1, f"two messages of type {kind}")
        for body in found.get(ATTRIBUTE, ()):
            _attribute(body)
        for kind in (LINK_INFO, ATTRIBUTE_INFO):
            for body in found.get(kind, ()):
                self.dense(body, 8 if kind == LINK_INFO else 2)
        for body in found.get(FILTERS, ()):
            _filters(body)
        if EXTERNAL in found:
            raise ForeignStorageError("external storage")
        for body in found.get(TYPE, ()):
            _type(body, 0)
        if SPACE in found or LAYOUT in found:
            _need(all(kind in found for kind in (SPACE, TYPE, LAYOUT)), "a dataset without space, type or layout")
            extent, limit = _space(found[SPACE][0])
            item, _ = _type(found[TYPE][0], 0)
            for body in found.get(FILL, ()):
                _fill(body, item)
            self.layout(found[LAYOUT][0], extent, limit, item)

    def messages(self, address: int) -> dict[int, list[bytes]]:
        """Return the bodies of all messages of a header by their type."""
        head = self.read(address, min(64, self.size - address), b"OHDR")
        version, flags = head[4], head[5]
        _need(version == 2 and flags < 64, f"a header of version {version}")
        at = 6 + (16 if flags & 32 else 0) + (4 if flags & 16 else 0)
        width = 1 << (flags & 3)
        length = int.from_bytes(head[at : at + width], "little")
        parts = [(address + at + width, length)]
        total = 0
        seen: set[int] = set()
        found: dict[int, list[bytes]] = {}
        while parts:
            start, length = parts.pop(0)
            total += length
            _need(total <= _MAX_HEADER_BYTES and start not in seen, "a header without end")
            seen.add(start)
            _split(self.read(start, length), 6 if flags & 4 else 4, found)
            for body in found.pop(CONTINUATION, ()):
                place, extent = struct.unpack_from("<QQ", body)
                self.read(place, 4, b"OCHK")
                _need(extent >= 8 and len(seen) < _MAX_CONTINUATIONS, "an impossible continuation")
                parts.append((place + 4, extent - 8))
        return found

    def dense(self, body: bytes, counter: int) -> None:
        """Links or attributes that are stored outside the header: a heap and a B-tree of their names."""
        _need(body[0] == 0 and body[1] < 4, "an unknown kind of storage of names")
        at = 2 + (counter if body[1] & 1 else 0)
        heap, tree = struct.unpack_from("<QQ", body, at)
        _need((heap == _UNDEFINED) == (tree == _UNDEFINED) and not body[1] & 2, "names without a heap or a tree")
        if heap != _UNDEFINED:
            self.heap(heap)
            self.tree(tree)

    def heap(self, address: int) -> None:
        head = self.read(address, 146, b"FRHP")
        version, key, filters, flags, largest = struct.unpack_from("<BHHBI", head, 4)
        sizes = struct.unpack_from("<12Q", head, 14)
        width, first, direct, bits, rows, root, current = struct.unpack_from("<HQQHHQH", head, 110)
        _need(version == 0 and key in (7, 8) and filters == 0 and flags == 2 and largest == 4096, "an unknown heap")
        _need(max(*sizes[4:]) <= self.size, "a heap beyond the file")
        if sizes[1] != _UNDEFINED:
            self.tree(sizes[1])
        _need(width == 4 and first in (512, 1024) and direct == 1 << 16 and bits in (32, 40), "an unknown heap table")
        _need(rows <= 64 and current <= 64, "a heap table of too many rows")
        if root != _UNDEFINED:
            block = self.read(root, 13, b"FHIB" if current else b"FHDB")
            _need(block[4] == 0 and struct.unpack_from("<Q", block, 5)[0] == address, "a block of another heap")

    def tree(self, address: int) -> None:
        head = self.read(address, 38, b"BTHD")
        version, kind, node, record, depth, split, merge, root, count, total = struct.unpack_from(
            "<BBIHHBBQHQ", head, 4
        )
        _need(version == 0 and _RECORD_BYTES.get(kind) == record and node == _NODE_BYTES, "an unknown tree of names")
        _need(depth < 6 and split == 100 and merge == 40, "an unknown tree of names")
        _need(total <= self.size // record and (root == _UNDEFINED) == (count == 0), "a tree beyond the file")
        if count:
            _need(self.node(root, kind, record, count, depth) == total, "a tree that miscounts its names")

    def node(self, address: int, kind: int, record: int, count: int, depth: int) -> int:
        """Examine a node of a B-tree and all below it; returns the number of records."""
        data = self.read(address, _NODE_BYTES, b"BTIN" if depth else b"BTLF")
        levels = _levels(record, depth)
        _need(data[4] == 0 and data[5] == kind and 0 < count <= levels[depth][0], "a node that is too full")
        total, at = count, 6 + record * count
        for place, length, _ in struct.iter_unpack("<3Q", data[6:at]) if kind == 1 else ():
            self.read(place, 0)
            _need(length <= self.size - place, "an object beyond the file")
        for _ in range(count + 1 if depth else 0):
            child, below = struct.unpack_from("<QB", data, at)
            at += 9 + levels[depth - 1][1]
            total += self.node(child, kind, record, below, depth - 1)
            _need(total <= self.size // record, "a tree beyond the file")
        return total

    def layout(self, body: bytes, extent: tuple[int, ...], limit: tuple[int, ...], item: int) -> None:
        version, kind = body[0], body[1]
        if kind == 3:
            raise ForeignStorageError("a virtual layout")
        if kind != 2:
            _need(version in (3, 4) and kind in (0, 1), "an unknown layout")
            return
        flags, dims, width = body[2], body[3], body[4]
        _need(version == 4 and flags < 4 and dims == len(extent) + 1 and 0 < width <= 8, "an unknown layout of chunks")
        chunk = [int.from_bytes(body[5 + width * i : 5 + width * (i + 1)], "little") for i in range(dims)]
        _need(all(chunk) and chunk[-1] == item and math.prod(chunk) < 1 << 32, "an impossible chunk")
        at = 5 + width * dims
        kind, at = body[at], at + 1
        counts = [-(-n // c) for n, c in zip(extent, chunk[:-1], strict=True)]
        n_chunks = math.prod(counts)
        address = self.index_head(body, kind, at, flags)
        if address == _UNDEFINED:
            return
        if kind == 1:
            stored = struct.unpack_from("<Q", body, at)[0] if flags & 2 else item
            self.read(address, 0)
            _need(0 < stored <= self.size - address and n_chunks <= 1, "a chunk outside the file")
        elif kind == 3:
            self.fixed_array(address, math.prod(-(-n // c) for n, c in zip(limit, chunk[:-1], strict=True)))
        elif kind == 4:
            grow = [n for n, most in zip(counts, limit, strict=True) if most == _UNDEFINED]
            fixed = [-(-most // c) for most, c in zip(limit, chunk[:-1], strict=True) if most != _UNDEFINED]
            self.extensible_array(address, math.prod(fixed) * max(grow, default=0))
        else:
            _need(False, "an index of chunks that no recording has")

    @staticmethod
    def index_head(body: bytes, kind: int, at: int, flags: int) -> int:
        """Return the address of the index after the parameters that ``kind`` has."""
        parameters = {1: 12 if flags & 2 else 0, 2: 0, 3: 1, 4: 5, 5: 6}
        _need(kind in parameters, "an unknown index of chunks")
        if kind == 4:
            _need(tuple(body[at : at + 5]) == (32, 4, 4, 16, 10), "unknown parameters of an index of chunks")
        if kind == 3:
            _need(body[at] == 10, "unknown parameters of an index of chunks")
        return int(struct.unpack_from("<Q", body, at + parameters[kind])[0])

    def fixed_array(self, address: int, n_chunks: int) -> None:
        head = self.read(address, 28, b"FAHD")
        version, client, item, bits, count, block = struct.unpack_from("<4BQQ", head, 4)
        _need((version, client, bits) == (0, 1, 10) and 13 <= item <= 20, "an unknown index of chunks")
        _need(count == n_chunks and count <= self.size, "an index of another number of chunks")
        if block != _UNDEFINED:
            data = self.read(block, 14 + (0 if count > 1024 else count * item) + 4, b"FADB")
            _need(data[4:6] == b"\0\1" and struct.unpack_from("<Q", data, 6)[0] == address, "a foreign index block")

    def extensible_array(self, address: int, n_chunks: int) -> None:
        head = self.read(address, 72, b"EAHD")
        version, client, item, *constants = struct.unpack_from("<8B", head, 4)
        _need((version, client) == (0, 1) and 13 <= item <= 20, "an unknown index of chunks")
        _need(constants == [32, 4, 16, 4, 10], "an unknown index of chunks")
        supers, super_bytes, blocks, block_bytes, used, room, block = struct.unpack_from("<7Q", head, 12)
        _need(max(supers, super_bytes, blocks, block_bytes, room) <= self.size, "an index beyond the file")
        _need(used <= n_chunks, "an index of more chunks than its dataset")
        if block != _UNDEFINED:
            data = self.read(block, 14, b"EAIB")
            _need(data[4:6] == b"\0\1" and struct.unpack_from("<Q", data, 6)[0] == address, "a foreign index block")


def _levels(record: int, depth: int) -> list[tuple[int, int]]:
    """Return for every level of a B-tree how many records fit a node, and the bytes of the count of all below it."""
    most = (_NODE_BYTES - 10) // record
    levels, total = [(most, 0)], most
    for _ in range(depth):
        pointer = 9 + levels[-1][1]
        most = (_NODE_BYTES - 10 - pointer) // (record + pointer)
        total = (most + 1) * total + most
        levels.append((most, (total.bit_length() - 1) // 8 + 1))
    return levels


def _split(data: bytes, head: int, found: dict[int, list[bytes]]) -> None:
    """Add the body of every message of one part of a header to those of its type."""
    at, last = 0, len(data) - head
    while at <= last:
        kind, length, flags = _HEAD.unpack_from(data, at)
        at += head
        if kind not in _KNOWN or length > len(data) - at:
            raise StructureError(f"its metadata has a message of type {kind} that does not fit")
        if flags & 2:
            raise StructureError("its metadata has a shared message")
        if kind:
            found.setdefault(kind, []).append(data[at : at + length])
        at += length


_HEAD: Final = struct.Struct("<BHB")
_KNOWN: Final = frozenset(
    (NIL, SPACE, LINK_INFO, TYPE, FILL, LINK, EXTERNAL, LAYOUT, GROUP_INFO, FILTERS, ATTRIBUTE, CONTINUATION)
) | {ATTRIBUTE_INFO, REFERENCES}
_ONCE: Final = frozenset((SPACE, LINK_INFO, TYPE, FILL, LAYOUT, GROUP_INFO, FILTERS, ATTRIBUTE_INFO))
# The messages of a recording's datasets resemble each other: most of them were examined before.
_remembered: Final = lru_cache(256)


@_remembered
def _space(body: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return extent and largest extent of a dataspace."""
    version, rank, flags, kind = struct.unpack_from("<4B", body)
    _need(version == 2 and rank <= 32 and flags < 2 and kind < 3, "an unknown dataspace")
    _need(kind == 1 or rank == 0, "a scalar with axes")
    extent = struct.unpack_from(f"<{rank}Q", body, 4)
    limit = struct.unpack_from(f"<{rank}Q", body, 4 + 8 * rank) if flags else extent
    _need(all(n <= most for n, most in zip(extent, limit, strict=True)), "an extent above its limit")
    _need(math.prod(extent) < _MAX_POINTS, "an impossible extent")
    return extent, limit


@_remembered
def _type(body: bytes, depth: int) -> tuple[int, int]:
    """Return the bytes of one value and the bytes of its description."""
    _need(depth < 8, "a type without end")
    version, kind = body[0] >> 4, body[0] & 15
    bits, size = int.from_bytes(body[1:4], "little"), struct.unpack_from("<I", body, 4)[0]
    _need(0 < version < 6 and 0 < size <= _MAX_TYPE_BYTES, "an unknown type")
    if kind in (0, 4):
        return size, _integer(body, size)
    if kind == 1:
        return size, _float(body, size)
    if kind in (3, 7):
        return size, 8
    if kind == 6:
        return size, _compound(body, version, bits & 0xFFFF, size, depth)
    _need(kind == 9, f"a type of class {kind}")
    return size, 8 + _type(body[8:], depth + 1)[1]


def _integer(body: bytes, size: int) -> int:
    offset, precision = struct.unpack_from("<HH", body, 8)
    _need(precision > 0 and offset + precision <= 8 * size, "an impossible integer")
    return 12


def _float(body: bytes, size: int) -> int:
    offset, precision, e_at, e_size, m_at, m_size, _ = struct.unpack_from("<HHBBBBI", body, 8)
    _need(precision > 0 and offset + precision <= 8 * size, "an impossible float")
    _need(e_size > 0 and m_size > 0 and max(e_at + e_size, m_at + m_size) <= 8 * size, "an impossible float")
    _need(body[2] < 8 * size, "an impossible float")
    return 20


def _compound(body: bytes, version: int, members: int, size: int, depth: int) -> int:
    _need(version == 3 and 0 < members <= 64, "an unknown compound type")
    width, at = (size.bit_length() + 7) // 8, 8
    for _ in range(members):
        at = body.index(b"\0", at) + 1 if b"\0" in body[at:] else len(body)
        offset = int.from_bytes(body[at : at + width], "little")
        item, used = _type(body[at + width :], depth + 1)
        _need(offset + item <= size, "a member outside its compound")
        at += width + used
    return at


def _fill(body: bytes, item: int) -> None:
    _need(body[0] == 3, "an unknown fill value")
    if body[1] & 32:
        length = struct.unpack_from("<I", body, 2)[0]
        _need(length == item and 6 + length <= len(body), "a fill value of another type")


@_remembered
def _attribute(body: bytes) -> None:
    version, flags, name, kind, space = struct.unpack_from("<BBHHH", body)
    _need(version == 3 and flags == 0 and name > 1, "an unknown attribute")
    at = 9 + name
    _need(at + kind + space <= len(body) and body[at - 1] == 0, "an attribute outside its message")
    item, used = _type(body[at : at + kind], 0)
    extent, _ = _space(body[at + kind : at + kind + space])
    empty = body[at + kind + 3] == 2
    _need(used <= kind and (empty or at + kind + space + item * math.prod(extent) <= len(body)), "a cut attribute")


@_remembered
def _filters(body: bytes) -> None:
    _need(body[0] == 2 and 0 < body[1] <= 8, "an unknown list of filters")
    at = 2
    for _ in range(body[1]):
        number = struct.unpack_from("<H", body, at)[0]
        name = struct.unpack_from("<H", body, at + 2)[0] if number >= 256 else 0
        at += 4 if number >= 256 else 2
        _, values = struct.unpack_from("<HH", body, at)
        at += 4 + name + 4 * values
        _need(at <= len(body) and values <= 32, "a cut list of filters")
