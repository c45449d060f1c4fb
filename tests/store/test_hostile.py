"""Files made by strangers: refused before a byte of their data is read."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest

from driftlens.errors import FormatError
from driftlens.store import Recording, open_recording, verify_recording
from driftlens.store.encoding import FILE_FORMAT
from tests.store import _make as make

KEY = "group_0/gate"
CHECKED = {"fletcher32": True, **hdf5plugin.Bitshuffle(cname="lz4")}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make.write(tmp_path / "a.h5", make.content([make.site(0)], (5, 3)))


def external_link(file: h5py.File) -> None:
    file[KEY] = h5py.ExternalLink("/nowhere/else.h5", "/x")


def soft_link(file: h5py.File) -> None:
    file[KEY] = h5py.SoftLink("/group_0/expert_norm")


def dangling_link(file: h5py.File) -> None:
    file[KEY] = h5py.SoftLink("/nothing")


def external_storage(file: h5py.File) -> None:
    file.create_dataset(KEY, shape=(1, 8, 3), dtype="<f2", external=[("/etc/hostname", 0, 48)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=(1, 8, 3), dtype="<f2")
    layout[:] = h5py.VirtualSource("/nowhere/else.h5", "x", shape=(1, 8, 3))
    file.create_virtual_dataset(KEY, layout)


def contiguous(file: h5py.File) -> None:
    file.create_dataset(KEY, data=np.zeros((1, 8, 3), dtype="<f2"))


def no_checksum(file: h5py.File) -> None:
    file.create_dataset(KEY, data=np.zeros((1, 8, 3), dtype="<f2"), chunks=(1, 8, 3), **hdf5plugin.Bitshuffle())


def other_filter(file: h5py.File) -> None:
    file.create_dataset(KEY, data=np.zeros((1, 8, 3), dtype="<f2"), compression="gzip", fletcher32=True)


def other_parameters(file: h5py.File) -> None:
    file.create_dataset(
        KEY,
        data=np.zeros((1, 8, 3), dtype="<f2"),
        chunks=(1, 8, 3),
        fletcher32=True,
        **hdf5plugin.Bitshuffle(64, "lz4"),
    )


def absurd_shape(file: h5py.File) -> None:
    file.create_dataset(KEY, shape=(1, 1 << 40, 3), dtype="<f2", chunks=(1, 4096, 3), **CHECKED)


def unfilled_shape(file: h5py.File) -> None:
    file.create_dataset(KEY, shape=(1, 8, 3), dtype="<f2", chunks=(1, 1, 3), **CHECKED)[0, 0] = 1


def absurd_chunk(file: h5py.File) -> None:
    file.create_dataset(KEY, shape=(1, 8, 3), maxshape=(1, None, 3), dtype="<f2", chunks=(1, 1 << 26, 3), **CHECKED)


def other_shape(file: h5py.File) -> None:
    file.create_dataset(KEY, data=np.zeros((1, 3, 8), dtype="<f2"), chunks=(1, 3, 8), **CHECKED)


def other_axes(file: h5py.File) -> None:
    file.create_dataset(KEY, data=np.zeros((8, 3), dtype="<f2"), chunks=(8, 3), **CHECKED)


def objects(file: h5py.File) -> None:
    file.create_dataset(KEY, shape=(1, 8, 3), dtype=h5py.string_dtype(), chunks=(1, 8, 3))


def references(file: h5py.File) -> None:
    file.create_dataset(KEY, shape=(1, 8, 3), dtype=h5py.ref_dtype, chunks=(1, 8, 3), fletcher32=True)


def ragged(file: h5py.File) -> None:
    file.create_dataset(KEY, shape=(1, 8, 3), dtype=h5py.vlen_dtype("f2"), chunks=(1, 8, 3))


def compound(file: h5py.File) -> None:
    file.create_dataset(KEY, shape=(1, 8, 3), dtype=[("a", "f2")], chunks=(1, 8, 3), fletcher32=True)


def integers(file: h5py.File) -> None:
    file.create_dataset(KEY, data=np.zeros((1, 8, 3), dtype="<i2"), chunks=(1, 8, 3), **CHECKED)


def big_endian(file: h5py.File) -> None:
    file.create_dataset(KEY, data=np.zeros((1, 8, 3), dtype=">f2"), chunks=(1, 8, 3), **CHECKED)


def a_group(file: h5py.File) -> None:
    file.create_group(KEY)


def a_type(file: h5py.File) -> None:
    file[KEY] = np.dtype("f2")


def nothing(file: h5py.File) -> None:
    pass


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (external_link, "is an external link, which could lead to other files"),
        (soft_link, "is a soft link, which could lead to other files"),
        (dangling_link, "is a soft link, which could lead to other files"),
        (external_storage, "has external storage, which reads other files; recordings contain none"),
        (virtual, "has a virtual layout, which reads other files; recordings contain none"),
        (contiguous, "is not stored in chunks; expected chunks with a checksum"),
        (no_checksum, "has the HDF5 filters [32008]; expected [32008, 3]"),
        (other_filter, "has the HDF5 filters [1, 3]; expected [32008, 3]"),
        (other_parameters, "has the bitshuffle parameters (2, 64, 2); expected (2, 0, 2)"),
        (absurd_shape, "has shape [1, 1099511627776, 3]; expected [1, 8, 3]"),
        (unfilled_shape, "has 1 stored chunks; expected 8 for shape [1, 8, 3]"),
        (absurd_chunk, "declares 48 bytes in chunks of 402,653,184; expected at most"),
        (other_shape, "has shape [1, 3, 8]; expected [1, 8, 3]"),
        (other_axes, "has shape [8, 3]; expected [1, 8, 3]"),
        (objects, "has type HDF5 type class 3; expected <f2 or <f4"),
        (references, "has type HDF5 type class 7; expected <f2 or <f4"),
        (ragged, "has type HDF5 type class 9; expected <f2 or <f4"),
        (compound, "has type HDF5 type class 6; expected <f2 or <f4"),
        (integers, "has type <i2; expected <f2 or <f4"),
        (big_endian, "has type >f2; expected <f2 or <f4"),
        (a_group, "is not a dataset; expected a dataset"),
        (a_type, "is not a dataset; expected a dataset"),
        (nothing, "is missing. The file is not a complete recording"),
    ],
)
def test_a_forged_dataset_is_refused(small: Path, build: Callable[[h5py.File], None], text: str) -> None:
    with h5py.File(small, "r+", libver=FILE_FORMAT) as file:
        del file[KEY]
        build(file)
    with open_recording(small) as recording, pytest.raises(FormatError, match=re.escape(f"{small}: /{KEY} {text}")):
        recording.gate(0, 0)
    assert any(f"/{KEY} {text}" in problem.what for problem in verify_recording(small))


def forge_token_count(path: Path, count: int) -> None:
    with h5py.File(path, "r+", libver=FILE_FORMAT) as file:
        for key in ("token", *(f"tokens/{name}" for name in file["tokens"])):
            file[key].resize((count,))


def test_a_tiny_file_that_declares_a_huge_one_costs_nothing(small: Path) -> None:
    forge_token_count(small, (1 << 31) - 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        FormatError, match=r"/token declares 8,589,934,560 bytes but stores \d+; expected a shape that fits"
    ):
        open_recording(small)
    assert verify_recording(small)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    forge_token_count(small, 1 << 40)
    with pytest.raises(FormatError, match=r"/token declares 4,398,046,511,104 bytes in chunks of 32; expected at most"):
        open_recording(small)


def forge_root_attr(name: str, value: Any, dtype: Any = None) -> Callable[[h5py.File], None]:
    def forge(file: h5py.File) -> None:
        file.attrs.create(name, value, dtype=dtype)

    return forge


def cycle(file: h5py.File) -> None:
    file["tokens/again"] = file["/"]


def link_anywhere(file: h5py.File) -> None:
    file["unknown"] = h5py.ExternalLink("/nowhere/else.h5", "/x")


def probe_of_objects(file: h5py.File) -> None:
    del file["probe"]
    file.create_dataset("probe", data=["task-0", "task-1"], dtype=h5py.string_dtype(), chunks=(2,))


@pytest.mark.parametrize(
    ("forge", "text"),
    [
        (forge_root_attr("driftlens_schema", b"2.0", "S3"), "reads schema 1. Upgrade driftlens to read it"),
        (forge_root_attr("driftlens_schema", b"0.9", "S3"), "has schema 0.9; this version of driftlens reads"),
        (forge_root_attr("driftlens_schema", 1), "no DriftLens schema version was found (found 1)"),
        (lambda file: file.attrs.__delitem__("driftlens_schema"), "no DriftLens schema version was found (found None)"),
        (forge_root_attr("x", "variable"), "attribute 'x' has shape (), 16 bytes and HDF5 type class 3; expected"),
        (forge_root_attr("x", np.zeros(3)), "attribute 'x' has shape (3,), 24 bytes"),
        (forge_root_attr("x", b"y" * (1 << 21), f"S{1 << 21}"), "attribute 'x' has shape (), 2097152 bytes"),
        (forge_root_attr("x", b"json:{", "S6"), "the attributes of / cannot be read"),
        (forge_root_attr("x", b"json:" + b"[" * 60_000, "S60005"), "the attributes of / cannot be read"),
        (forge_root_attr("x", b"\xff", "S1"), "the attributes of / cannot be read"),
        (link_anywhere, "/unknown is an external link"),
        (probe_of_objects, "/probe has type HDF5 type class 3; expected S"),
        (lambda file: file.__delitem__("sites"), "/sites is missing"),
        (lambda file: file.__delitem__("group_0"), "/group_0 is missing"),
    ],
)  # fmt: skip
def test_a_forged_head_is_refused_on_opening(small: Path, forge: Callable[[h5py.File], None], text: str) -> None:
    with h5py.File(small, "r+", libver=FILE_FORMAT) as file:
        forge(file)
    with pytest.raises(FormatError, match=re.escape(text)):
        open_recording(small)
    assert text in verify_recording(small)[0].what


def test_a_cycle_of_links_ends(small: Path) -> None:
    with h5py.File(small, "r+", libver=FILE_FORMAT) as file:
        cycle(file)
    with open_recording(small) as recording:
        assert recording.gate(0, 0).shape == (5, 3)
    assert any("/tokens/again is not part of schema 1.1" in problem.what for problem in verify_recording(small))


def test_a_newer_minor_schema_opens_with_a_warning(small: Path) -> None:
    with h5py.File(small, "r+", libver=FILE_FORMAT) as file:
        file.attrs.create("driftlens_schema", b"1.7", dtype="S3")
        file.create_group("something_new")
    with pytest.warns(UserWarning, match=r"has schema 1\.7, newer than 1\.1; what was added since is ignored. Upgrade"):
        recording = open_recording(small)
    assert recording.gate(0, 0).shape == (5, 3)
    recording.close()
    with pytest.warns(UserWarning, match="newer than"):
        assert verify_recording(small) == []


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"\x89HDF", "is truncated: 4 bytes are there, at least 48 are needed"),
        (b"PK\x03\x04" + bytes(100), "is not an HDF5 file. Give the path of a .h5 recording"),
        (bytes(512) + b"\x89HDF\r\n\x1a\n" + bytes(100), "is not an HDF5 file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "has HDF5 superblock version 0"),
    ],
)
def test_other_files(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "a.h5").write_bytes(data)
    with pytest.raises(FormatError, match=text):
        open_recording(tmp_path / "a.h5")
    os.mkfifo(tmp_path / "pipe.h5")
    for path in (tmp_path, tmp_path / "pipe.h5"):
        with pytest.raises(FormatError, match=r"is not a file. Give the path of a .h5 recording"):
            Recording(path)
