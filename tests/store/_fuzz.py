"""Hostile recordings from good ones, and what the reader makes of them.

Metadata of HDF5 carries checksums, so that a plain flip ends at the first of them. Half of the mutations here are
therefore *sealed*: they know where blocks, messages, addresses and chunks lie and repair the checksums afterwards.
"""

from __future__ import annotations

import bisect
import itertools
import random
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from driftlens.errors import DriftLensError
from driftlens.store import Group, Recording, open_recording, verify_recording
from driftlens.store.schema import VALUES

SIGNATURES = (b"OHDR", b"OCHK", b"FRHP", b"FHDB", b"FHIB", b"BTHD", b"BTLF", b"BTIN", b"FAHD", b"FADB", b"EAHD",
              b"EAIB", b"EASB", b"EADB", b"FSHD", b"FSSE", b"SMTB", b"SMLI")  # fmt: skip
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 16, 255, 256, 4096, 65535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
           1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
WORDS = (b"gate", b"pathway", b"sites", b"probe", b"probe_index", b"token", b"stats", b"count", b"weights", b"grams",
         b"site", b"CLASS", b"NAME", b"DIMENSION_SCALE", b"DIMENSION_LIST", b"REFERENCE_LIST", b"_Encoding", b"json:",
         b"driftlens_schema", b"1.0", b"1.1", b"softmax", b"down_proj", b"model.layers", b"group_0",
         b"rank")  # fmt: skip
_MASK = 0xFFFFFFFF


def _rot(x: Any, k: int) -> Any:
    return ((x << k) | (x >> (32 - k))) & _MASK


def _mix(a: Any, b: Any, c: Any) -> tuple[Any, Any, Any]:
    for k1, k2, k3 in ((4, 6, 8), (16, 19, 4)):
        a = ((a - c) & _MASK) ^ _rot(c, k1)
        c = (c + b) & _MASK
        b = ((b - a) & _MASK) ^ _rot(a, k2)
        a = (a + c) & _MASK
        c = ((c - b) & _MASK) ^ _rot(b, k3)
        b = (b + a) & _MASK
    return a, b, c


def _final(a: Any, b: Any, c: Any) -> Any:
    for k1, k2, k3 in ((14, 11, 25), (16, 4, 14)):
        c = ((c ^ b) - _rot(b, k1)) & _MASK
        a = ((a ^ c) - _rot(c, k2)) & _MASK
        b = ((b ^ a) - _rot(a, k3)) & _MASK
    return ((c ^ b) - _rot(b, 24)) & _MASK


def lookup3(data: bytes) -> int:
    """The checksum of HDF5's metadata (Bob Jenkins' lookup3, little-endian, start value 0)."""
    n = len(data)
    a = b = c = (0xDEADBEEF + n) & _MASK
    if not n:
        return c
    words = struct.unpack(f"<{-(-n // 12) * 3}I", data.ljust(-(-n // 12) * 12, b"\0"))
    for at in range(0, len(words) - 3, 3):
        a, b, c = _mix((a + words[at]) & _MASK, (b + words[at + 1]) & _MASK, (c + words[at + 2]) & _MASK)
    return int(_final((a + words[-3]) & _MASK, (b + words[-2]) & _MASK, (c + words[-1]) & _MASK))


def _sealed_length(data: bytes, start: int, limit: int = 8192) -> int | None:
    """The length of the block at ``start`` without its checksum: the first one whose checksum is right."""
    data = data[start : start + limit + 4]
    lengths = np.arange(8, len(data) - 3, dtype=np.uint64)
    if not lengths.size:
        return None
    padded = np.frombuffer(data.ljust(len(data) + 24, b"\0"), dtype=np.uint8).astype(np.uint64)
    full = (lengths - 1) // 12
    a = (lengths + 0xDEADBEEF) & _MASK
    b, c = a.copy(), a.copy()
    result = np.zeros_like(a)
    for step in range(int(full.max()) + 1):
        part = padded[12 * step : 12 * step + 12]
        last = full == step
        if last.any():
            masked = np.where(np.arange(12) < (lengths[last] - 12 * step)[:, None], part, 0).reshape(-1, 3, 4)
            words = (masked << np.array([0, 8, 16, 24], dtype=np.uint64)).sum(axis=2)
            state = ((x[last] + words[:, k]) & _MASK for k, x in enumerate((a, b, c)))
            result[last] = _final(*state)
        words = (part.reshape(3, 4) << np.array([0, 8, 16, 24], dtype=np.uint64)).sum(axis=1)
        a, b, c = _mix((a + words[0]) & _MASK, (b + words[1]) & _MASK, (c + words[2]) & _MASK)
    at = lengths.astype(np.intp)[:, None] + np.arange(4)
    stored = (padded[at] << np.array([0, 8, 16, 24], dtype=np.uint64)).sum(axis=1)
    hits = np.flatnonzero(stored == result)
    return int(lengths[hits[0]]) if hits.size else None


def fletcher32(data: bytes) -> int:
    """The checksum of HDF5's fletcher32 filter, over big-endian words of 16 bits."""
    words = np.frombuffer(data[: len(data) // 2 * 2], dtype=">u2").astype(object)
    one = two = 0
    for word in words.tolist():
        one = (one + word) % 65535
        two = (two + one) % 65535
    if len(data) % 2:
        one = (one + (data[-1] << 8)) % 65535
        two = (two + one) % 65535
    # The filter folds sums instead of taking remainders: it keeps 65535 where a remainder is 0.
    one, two = one or (0xFFFF if any(data) else 0), two or (0xFFFF if any(data) else 0)
    return two << 16 | one


@dataclass
class Seed:
    """A good recording and where its parts lie.

    Attributes:
        blocks: (start, length) of metadata that is followed by its checksum.
        heaps: (start, length, place of the checksum) of blocks that hold names and attributes.
        messages: (start of the message's head, length of its data) inside object headers; empty ones (NIL) left out.
        chunks: (start, length) of stored chunks, their fletcher32 included.
        owners: (start, key) of headers and chunks of all datasets, in order.
    """

    path: Path
    data: bytes
    content: Any
    blocks: list[tuple[int, int]] = field(default_factory=list)
    heaps: list[tuple[int, int, int]] = field(default_factory=list)
    messages: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    pointers: list[int] = field(default_factory=list)
    owners: list[tuple[int, str]] = field(default_factory=list)

    def owner(self, data: bytes) -> str:
        """The dataset that the first difference of ``data`` probably belongs to."""
        size = min(len(data), len(self.data))
        changed = np.frombuffer(data, np.uint8, size) != np.frombuffer(self.data, np.uint8, size)
        at = int(changed.argmax()) if changed.any() else size
        number = bisect.bisect_right(self.owners, (at, "~")) - 1
        return self.owners[number][1] if number >= 0 else ""


def load_seed(path: Path) -> Seed:
    """Read a good recording and find its parts."""
    data = path.read_bytes()
    seed = Seed(path, data, everything(path), blocks=[(0, 44)])
    for signature in SIGNATURES:
        at = data.find(signature)
        while at >= 0:
            length = _sealed_length(data, at, 512) or _sealed_length(data, at)
            if length is not None:
                seed.blocks.append((at, length))
            at = data.find(signature, at + 1)
    seed.blocks.sort()
    seed.heaps = list(_heaps(data))
    for start, length in seed.blocks:
        if data[start : start + 4] == b"OHDR":
            seed.messages += _messages(data, start, length)
    with h5py.File(path) as file:
        file.visititems(lambda name, item: _add_chunks(seed, name, item, file.id.links.get_info(name.encode()).u))
    seed.owners.sort()
    seed.addresses = [start for start, _ in seed.blocks[1:]] + [start for start, _ in seed.chunks]
    known = {struct.pack("<Q", address) for address in seed.addresses}
    seed.pointers = [at for at in range(len(data) - 8) if data[at : at + 8] in known]
    return seed


def _heaps(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Direct blocks of fractal heaps: the checksum stands in the head and counts itself as 0."""
    at = data.find(b"FHDB")
    while at >= 0:
        for length, place in itertools.product((512, 1024, 2048, 4096, 8192), (at + 17, at + 18)):
            stored = int.from_bytes(data[place : place + 4], "little")
            if stored == lookup3(data[at:place] + bytes(4) + data[place + 4 : at + length]):
                yield at, length, place
                break
        at = data.find(b"FHDB", at + 1)


def _add_chunks(seed: Seed, name: str, item: Any, header: int) -> None:
    if isinstance(item, h5py.Dataset):
        found: list[tuple[int, int]] = []
        item.id.chunk_iter(lambda info: found.append((info.byte_offset, info.size)))
        seed.chunks += found
        seed.owners += [(start, name) for start in (header, *(start for start, _ in found))]


def _messages(data: bytes, start: int, length: int) -> list[tuple[int, int]]:
    flags = data[start + 5]
    at = start + 6 + (16 if flags & 32 else 0) + (4 if flags & 16 else 0) + (1 << (flags & 3))
    head, found = 6 if flags & 4 else 4, []
    while at + head <= start + length:
        size = struct.unpack_from("<H", data, at + 1)[0]
        if data[at]:
            found.append((at, size))
        at += head + size
    return found


def everything(path: Path, first: str = "") -> dict[str, Any]:
    """All that a recording holds, through the reader; the part with the dataset ``first`` before the others."""
    with open_recording(path) as r:
        parts = _parts(r)
        early = [name for name in parts if first.startswith(name)]
        return {name: parts[name]() for name in dict.fromkeys((*early, *parts))}


def _parts(r: Recording) -> dict[str, Callable[[], Any]]:
    """What reads each part of an open recording, by its place in the file."""

    def array(get: Callable[[], Any]) -> Callable[[], bytes]:
        return lambda: np.asarray(get()).tobytes()

    def values(group: Group, name: str) -> Callable[[], list[bytes]]:
        return lambda: [group.read(name, probe).tobytes() for probe in r.probes]

    parts: dict[str, Callable[[], Any]] = {
        "sites": lambda: (r.sites, r.probes, repr(r.meta), r.gram_checkpoints),
        "samples": lambda: [r.sample_ids(probe) for probe in r.probes],
        "tokens": lambda: [{n: c.tobytes() for n, c in r.tokens(probe).items()} for probe in r.probes],
    }
    for group in r.groups:
        for inner, key in ((group, ""), (group.reference, "reference/")):
            if inner is not None:
                key = f"group_{group.index}/{key}"
                parts |= {f"{key}{name}": values(inner, name) for name in VALUES if f"{key}{name}" not in parts}
                parts |= {f"{key}stats/{name}": array(partial(inner.stats.__getitem__, name)) for name in inner.stats}
        if group.reference is not None:
            parts |= {
                f"{key}grams/{name}": array(lambda g=g: g[...]) for name, g in (group.reference.grams or {}).items()
            }
    for site in range(len(r.sites) if r.has_weights else 0):
        parts[f"weights/site_{site:05}"] = lambda s=site: {n: np.asarray(a).tobytes() for n, a in r.weights(s).items()}
    parts["grams"] = lambda: [
        {key: {name: a.tobytes() for name, a in group.items()} for key, group in (r.grams(anchor) or {}).items()}
        for anchor in r.gram_checkpoints
    ]
    return parts


def judge(path: Path, seed: Seed, first: str = "both", key: str = "") -> str:
    """Say what the reader makes of a file.

    ``refused`` with a named problem, ``equal`` or ``different`` content without any complaint, ``missed`` where verify
    overlooks what reading meets. Any exception outside the family of DriftLens leaves it: it is a fault of the reader.

    Args:
        path: the file.
        seed: what it was made of.
        first: ``verify``, and a complete read of what it accepts, as a careful user does; ``read``, completely, and
            verify where nothing is refused, as a hasty one does; ``both`` in any case.
        key: the dataset that ``read`` begins with.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if first != "verify":
            try:
                found = everything(path, key)
            except DriftLensError:
                if first == "read":
                    return "refused"
        if verify_recording(path):
            return "refused"
        if first != "read":
            try:
                found = everything(path)
            except DriftLensError:
                return "missed"
    return "equal" if found == seed.content else "different"


# --- mutations -------------------------------------------------------------------------------------------------------


def mutate(seed: Seed, rng: random.Random) -> tuple[bytes, bool]:
    """Return a file that differs from the seed, and whether its checksums were repaired (a forgery, no accident)."""
    while True:
        data, sealed = _mutate(seed, rng)
        if data != seed.data:
            return data, sealed


def _mutate(seed: Seed, rng: random.Random) -> tuple[bytes, bool]:
    data = bytearray(seed.data)
    if rng.random() < 0.35:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            rng.choice(_RAW)(data, rng, 0, len(data))
            if not data:
                break
        return bytes(data), False
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(_SEALED)(seed, data, rng)
    if rng.random() < 0.05:
        _shorter(data, rng)
    reseal(seed, data)
    return bytes(data), True


def reseal(seed: Seed, data: bytearray) -> None:
    """Repair the checksums of everything that differs from the seed."""
    for start, length in seed.blocks:
        if data[start : start + length] != seed.data[start : start + length] and start + length + 4 <= len(data):
            struct.pack_into("<I", data, start + length, lookup3(bytes(data[start : start + length])))
    for start, length, place in seed.heaps:
        if data[start : start + length] != seed.data[start : start + length] and start + length <= len(data):
            data[place : place + 4] = bytes(4)
            struct.pack_into("<I", data, place, lookup3(bytes(data[start : start + length])))
    for start, size in seed.chunks:
        end = start + size - 4
        if data[start:end] != seed.data[start:end] and end + 4 <= len(data):
            struct.pack_into("<I", data, end, fletcher32(bytes(data[start:end])))


def _flip(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    data[rng.randrange(low, high)] ^= 1 << rng.randrange(8)


def _run(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    at = rng.randrange(low, high)
    end = min(high, at + rng.choice((1, 2, 4, 8, 16, 64)))
    data[at:end] = rng.randbytes(end - at)


def _zero(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    at = rng.randrange(low, high)
    end = min(high, at + rng.choice((1, 4, 8, 32, 512)))
    data[at:end] = bytes([rng.choice((0, 0, 255))]) * (end - at)


def _number(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    width = rng.choice((1, 2, 4, 8))
    at = rng.randrange(low, max(low + 1, high - width + 1))
    old = int.from_bytes(data[at : at + width], "little")
    value = rng.choice((*NUMBERS, old + 1, old - 1, old * 2, len(data))) % (1 << 8 * width)
    data[at : at + width] = value.to_bytes(width, "little")[: max(0, min(width, len(data) - at))]


def _copy(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    size = rng.choice((4, 8, 16, 64, 256))
    source, at = rng.randrange(low, high), rng.randrange(low, high)
    size = min(size, high - at, high - source)
    data[at : at + size] = data[source : source + size]


def _cut(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    del data[rng.randrange(low, high) :]


def _splice(data: bytearray, rng: random.Random, low: int, high: int) -> None:
    at = rng.randrange(low, high)
    if rng.random() < 0.5:
        del data[at : at + rng.choice((1, 4, 64, 512))]
    else:
        data[at:at] = rng.randbytes(rng.choice((1, 4, 64, 512)))


_RAW: tuple[Callable[[bytearray, random.Random, int, int], None], ...] = (
    _flip, _flip, _flip, _run, _run, _zero, _zero, _number, _number, _copy, _cut, _splice,
)  # fmt: skip
_INSIDE = (_flip, _flip, _run, _zero, _number, _number, _number, _copy)


def _in_block(seed: Seed, data: bytearray, rng: random.Random) -> None:
    start, length = rng.choice(seed.blocks)
    rng.choice(_INSIDE)(data, rng, start + 4, start + length)


def _in_heap(seed: Seed, data: bytearray, rng: random.Random) -> None:
    if seed.heaps:
        start, length, _ = rng.choice(seed.heaps)
        rng.choice(_INSIDE)(data, rng, start + 4, start + min(length, 512))


def _in_message(seed: Seed, data: bytearray, rng: random.Random) -> None:
    at, size = rng.choice(seed.messages)
    if rng.random() < 0.2 or not size:
        data[at] = rng.randrange(26)
    elif rng.random() < 0.1:
        struct.pack_into("<H", data, at + 1, rng.choice((0, 1, size + 1, size - 1, 65535)))
    else:
        rng.choice(_INSIDE)(data, rng, at + 4, min(at + 6 + size, len(data)))


def _pointer(seed: Seed, data: bytearray, rng: random.Random) -> None:
    at, target = rng.choice(seed.pointers), rng.choice(seed.addresses)
    struct.pack_into("<Q", data, at, target + rng.choice((0, 0, 0, 1, -8)))


def _in_chunk(seed: Seed, data: bytearray, rng: random.Random) -> None:
    start, size = rng.choice(seed.chunks)
    rng.choice(_INSIDE)(data, rng, start, max(start + 1, start + size - 4))


def _chunk_head(seed: Seed, data: bytearray, rng: random.Random) -> None:
    start, size = rng.choice(seed.chunks)
    if size < 20:
        return
    total, block = struct.unpack_from(">QI", data, start)
    numbers = (*NUMBERS, total - 1, total + 1, total * 2, total // 2, block * 2, block - 8)
    if rng.random() < 0.5:
        struct.pack_into(">Q", data, start, rng.choice(numbers) % (1 << 64))
    else:
        struct.pack_into(">I", data, start + 8, rng.choice(numbers) % (1 << 32))


def _word(seed: Seed, data: bytearray, rng: random.Random) -> None:
    old, new = rng.choice(WORDS), rng.choice(WORDS)
    at = data.find(old, rng.randrange(len(data)))
    if at >= 0:
        data[at : at + len(old)] = new[: len(old)].ljust(len(old), rng.choice((b"\0", b"x", b"\xff", b"/")))


def _swap_blocks(seed: Seed, data: bytearray, rng: random.Random) -> None:
    first, second = rng.sample(seed.blocks[1:], 2)
    size = min(first[1], second[1])
    a, b = data[first[0] : first[0] + size], data[second[0] : second[0] + size]
    data[first[0] : first[0] + size], data[second[0] : second[0] + size] = b, a


def _shorter(data: bytearray, rng: random.Random) -> None:
    """Truncate and declare the shorter length, or append and declare the longer one."""
    if rng.random() < 0.5:
        del data[rng.randrange(64, len(data)) :]
    else:
        data += bytes(rng.choice((1, 8, 4096)))
    struct.pack_into("<Q", data, 28, len(data))


_SEALED: tuple[Callable[[Seed, bytearray, random.Random], None], ...] = (
    _in_block, _in_block, _in_message, _in_message, _in_message, _in_heap, _pointer, _in_chunk, _in_chunk, _chunk_head,
    _word, _swap_blocks,
)  # fmt: skip


def unseen(seed: Seed, data: bytes) -> bool:
    """Whether the stored checksums cannot tell ``data`` from the seed: fletcher32 takes 0x0000 and 0xffff for equal."""
    if len(data) != len(seed.data):
        return False
    changed = np.flatnonzero(np.frombuffer(data, np.uint8) != np.frombuffer(seed.data, np.uint8)).tolist()
    left = set(changed)
    for start, size in seed.chunks:
        end = start + size - 4
        if data[start:end] != seed.data[start:end] and fletcher32(data[start:end]) == fletcher32(seed.data[start:end]):
            left -= set(range(start, end))
    return bool(changed) and not left


# --- the corpus ------------------------------------------------------------------------------------------------------


def difference(old: bytes, new: bytes) -> list[tuple[int, int, str]]:
    """Return (offset, bytes removed, hex inserted) that turn ``old`` into ``new``."""
    if len(old) == len(new):
        at = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
        runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1) if at.size else []
        return [(int(r[0]), len(r), new[int(r[0]) : int(r[-1]) + 1].hex()) for r in runs]
    start = next((i for i, (x, y) in enumerate(zip(old, new, strict=False)) if x != y), min(len(old), len(new)))
    end = 0
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    return [(start, len(old) - start - end, new[start : len(new) - end].hex())]


def patched(old: bytes, patch: list[Any]) -> bytes:
    """Return ``old`` after the changes of ``difference``."""
    data = bytearray(old)
    for at, removed, inserted in sorted(patch, reverse=True):
        data[at : at + removed] = bytes.fromhex(inserted)
    return bytes(data)
