"""Forged metadata is refused before libhdf5 sees it, and what libhdf5 writes is never refused."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import h5py
import numpy as np
import pytest

from driftlens.errors import FormatError
from driftlens.store import open_recording, verify_recording
from driftlens.store.structure import StructureError, check_object
from tests.store import _fuzz
from tests.store import _make as make

SEED = Path(__file__).parent / "corpus" / "seeds" / "tiny-1.1.h5"


@pytest.fixture(scope="module")
def seed() -> _fuzz.Seed:
    return _fuzz.load_seed(SEED)


def forge(seed: _fuzz.Seed, path: Path, at: int, new: bytes) -> Path:
    data = bytearray(seed.data)
    data[at : at + len(new)] = new
    _fuzz.reseal(seed, data)
    path.write_bytes(data)
    return path


def refusal(path: Path) -> str:
    problems = verify_recording(path)
    assert problems
    return problems[0].what


def message(seed: _fuzz.Seed, kind: int, start: bytes = b"") -> int:
    """Where the data of the first message of this kind begins."""
    return next(at + 4 for at, _ in seed.messages if seed.data[at] == kind and seed.data[at + 4 :].startswith(start))


@pytest.mark.parametrize(
    ("kind", "start", "offset", "new", "text"),
    [
        (1, b"", 1, b"\xff", "an unknown dataspace"),
        (3, b"\x10", 4, b"\0\0\0\0", "an unknown type"),
        (3, b"\x10", 10, b"\xff\xff", "an impossible integer"),
        (8, b"\x04\x02", 5, b"\0", "an impossible chunk"),
        (8, b"\x04\x02", 3, b"\x1f", "an unknown layout of chunks"),
        (11, b"", 1, b"\xff", "an unknown list of filters"),
        (5, b"", 0, b"\x09", "an unknown fill value"),
    ],
)
def test_a_message_that_makes_no_sense_is_refused(
    seed: _fuzz.Seed, tmp_path: Path, kind: int, start: bytes, offset: int, new: bytes, text: str
) -> None:
    path = forge(seed, tmp_path / "a.h5", message(seed, kind, start) + offset, new)
    assert f"cannot be read: its metadata has {text}. The file is damaged. Run `driftlens verify`" in refusal(path)


@pytest.mark.parametrize(
    ("signature", "offset", "new", "text"),
    [
        (b"FAHD", 8, struct.pack("<Q", 1 << 40), "an index of another number of chunks"),
        (b"EAHD", 36, struct.pack("<Q", 1 << 60), "an index beyond the file"),
        (b"EAHD", 44, struct.pack("<Q", 1 << 60), "an index of more chunks than its dataset"),
        (b"BTHD", 6, struct.pack("<I", 8), "an unknown tree of names"),
        (b"BTHD", 24, struct.pack("<H", 60_000), "a node that is too full"),
        (b"FRHP", 110, struct.pack("<H", 0), "an unknown heap table"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(
    seed: _fuzz.Seed, tmp_path: Path, signature: bytes, offset: int, new: bytes, text: str
) -> None:
    at = next(start for start, _ in seed.blocks if seed.data.startswith(signature, start))
    path = forge(seed, tmp_path / "a.h5", at + offset, new)
    assert f"its metadata has {text}" in refusal(path)


def test_lengths_inside_a_chunk_are_added_up_before_the_filter_sees_them(seed: _fuzz.Seed, tmp_path: Path) -> None:
    with h5py.File(SEED) as file:
        start = file["group_0/gate"].id.get_chunk_info(0).byte_offset
    for at, new in ((4, b"\0\0\xff\0"), (8, b"\0\0\0\7"), (8, b"\xff\0\0\0")):
        path = forge(seed, tmp_path / "a.h5", start + at, new)
        expected = f"{path}: /group_0/gate cannot be read: the lengths inside its chunk at [0, 0, 0] do not add up"
        with open_recording(path) as recording, pytest.raises(FormatError, match=re.escape(expected)):
            recording.gate(0, 0)


def test_a_header_that_ends_too_early_or_lies_outside_is_refused(seed: _fuzz.Seed, tmp_path: Path) -> None:
    with SEED.open("rb") as file:
        for address in (0, len(seed.data), len(seed.data) + 1, 1 << 62):
            with pytest.raises(StructureError, match=r"outside|no OHDR|ends too early"):
                check_object(file.fileno(), len(seed.data), address)
        with pytest.raises(StructureError, match="no OHDR"):
            check_object(file.fileno(), len(seed.data), 49)


def test_a_hundred_sites_and_long_attributes_are_not_refused(tmp_path: Path) -> None:
    # Many names need trees of several levels; an attribute above 64 KiB is stored apart.
    sites = [make.site(index, 2, 1) for index in range(120)]
    c = make.content(sites, (2,))
    c.meta |= {f"key-{index}": "x" * (70_000 if index < 3 else 5) for index in range(60)}
    path = make.write(tmp_path / "a.h5", c)
    with open_recording(path) as recording:
        assert recording.meta == c.meta
        for site in (0, 57, 119):
            np.testing.assert_array_equal(recording.weights(site)["A"], c.weights[site]["A"])


def test_many_chunks_on_several_levels_of_an_index_are_not_refused(tmp_path: Path) -> None:
    c = make.content([make.site(0, 2, 1), make.site(1, 2, 1)], (4096 * 40 + 3,))
    path = make.write(tmp_path / "a.h5", c)
    assert verify_recording(path) == []
    with h5py.File(path) as file:
        assert file["group_0/gate"].id.get_num_chunks() > 80
    with open_recording(path) as recording:
        np.testing.assert_array_equal(recording.gate(1, 0), c.values["task-0"][0]["gate"][1].astype(np.float16))
