"""Damaged files: one clear error or an unchanged content, never a wrong number."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from driftlens.errors import FormatError
from driftlens.store import open_recording, verify_recording
from tests.store import _make as make


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make.write(tmp_path / "a.h5", make.content([make.site(0), make.site(1, 2, 0)], (5, 3)))


def everything(path: Path) -> list[Any]:
    with open_recording(path) as r:
        out: list[Any] = [r.sites, r.probes, r.meta, [r.sample_ids(probe) for probe in r.probes]]
        for probe in r.probes:
            out.append({name: column.tobytes() for name, column in r.tokens(probe).items()})
            names = ("gate", "pathway", "expert_norm", "base_norm")
            out += [group.read(name, probe).tobytes() for group in r.groups for name in names]
        out += [{name: array.tobytes() for name, array in group.stats.items()} for group in r.groups]
        for site in range(len(r.sites)):
            out.append({name: np.asarray(array).tobytes() for name, array in r.weights(site).items()})
        return out


def test_truncation_anywhere_is_one_clear_error(small: Path) -> None:
    good = small.read_bytes()
    cuts = [*range(64), *range(64, len(good), 997), len(good) - 1]
    for cut in cuts:
        small.write_bytes(good[:cut])
        with pytest.raises(FormatError) as caught:
            open_recording(small)
        message = str(caught.value)
        assert str(small) in message
        assert "driftlens verify" in message
        assert f"{cut:,} bytes" in message
        if cut >= 48:
            assert f"is truncated: {cut:,} bytes are there, {len(good):,} are expected" in message
        assert len(verify_recording(small)) == 1
    small.write_bytes(good + b"x")
    with pytest.raises(FormatError, match=f"is longer than it declares: {len(good) + 1:,} bytes"):
        open_recording(small)


def test_no_flipped_or_zeroed_byte_changes_a_number_silently(small: Path) -> None:
    good, content = small.read_bytes(), everything(small)
    rng, caught, tried = random.Random(0), 0, 0
    for _ in range(90):
        data, position = bytearray(good), rng.randrange(len(good))
        if rng.random() < 0.7:
            data[position] ^= 1 << rng.randrange(8)
        else:
            end = min(len(data), position + rng.choice([4, 64, 512]))
            data[position:end] = bytes(end - position)
        if data == good:
            continue
        small.write_bytes(data)
        tried += 1
        if verify_recording(small):
            caught += 1
        else:  # HDF5 leaves gaps between objects; nothing reads them
            assert everything(small) == content, f"byte {position} changed a value unnoticed"
    assert caught > 0.7 * tried


def test_every_flipped_byte_of_the_data_is_caught(small: Path) -> None:
    with h5py.File(small) as file:
        info = file["group_0/pathway"].id.get_chunk_info(0)
    good = small.read_bytes()
    for position in range(info.byte_offset, info.byte_offset + info.size, 3):
        data = bytearray(good)
        data[position] ^= 0x10
        small.write_bytes(data)
        with open_recording(small) as recording:
            expected = r"a\.h5: /group_0/pathway cannot be read: .*The file is damaged\. Run `driftlens verify`"
            with pytest.raises(FormatError, match=expected):
                recording.pathway(0, 0)
    problems = verify_recording(small)
    assert [p.path for p in problems] == [str(small)]
    assert problems[0].what.startswith("/group_0/pathway cannot be read")


def test_verify_reports_each_damaged_dataset(small: Path) -> None:
    data = bytearray(small.read_bytes())
    keys = ("group_0/gate", "group_1/base_norm", "group_0/stats/energy", "weights/site_00000/B", "tokens/role")
    with h5py.File(small) as file:
        offsets = [file[key].id.get_chunk_info(0).byte_offset for key in keys]
    for offset in offsets:
        data[offset + 20] ^= 1
    small.write_bytes(data)
    found = "\n".join(str(problem) for problem in verify_recording(small))
    for key in keys:
        assert f"{small}: /{key} cannot be read" in found


def edit(path: Path, key: str, index: Any, value: Any) -> None:
    with h5py.File(path, "r+") as file:
        file[key][index] = value


@pytest.mark.parametrize(
    ("key", "index", "value", "text"),
    [
        ("group_0/gate", (0, 1, 2), 0.9, "/group_0/gate has gate rows that do not sum to 1 or are not finite at site"),
        ("group_0/gate", (0, 1, 2), np.nan, "/group_0/gate has gate rows that do not sum to 1 or are not finite"),
        ("group_0/expert_norm", (0, 7, 1), np.inf, "/group_0/expert_norm has values that are not finite at site"),
        ("group_0/stats/entropy", (0, 0), np.nan, "/group_0/stats/entropy has values that are not finite"),
        ("group_0/stats/count", 1, 2.0, "/group_0/stats/count of probe 'task-1' is below its number of stored tokens"),
        ("group_1/stats/gate_sum", (0, 0, 0), 9e9, "/group_1/stats/gate_sum of site 'model.layers.1"),
        ("weights/site_00000/A", (1, 1, 1), np.nan, "A of site 'model.layers.0.mlp.down_proj' has values that are"),
        ("tokens/sample", 2, 3, "/tokens/sample of probe 'task-0' ranges to 3; 3 samples are listed"),
        ("tokens/probe_index", 0, 1, "/tokens/probe_index is not sorted or leads outside /probe"),
        ("samples/probe_index", 0, 7, "/samples/probe_index leads outside /probe"),
        ("group_0/expert", 0, 5, "/group_0/expert does not count 0, 1, 2"),
        ("group_1/site", 0, 0, "/group_1/site does not list the sites with the same E and r"),
        ("sites/rank", 0, 1 << 21, "/sites: Site 'model.layers.0.mlp.down_proj' has rank = 2097152"),
        ("sites/num_experts", 0, 0, "/sites: Site 'model.layers.0.mlp.down_proj' has num_experts = 0"),
        ("sites/d_in", 0, 6, "/weights/site_00000/A has shape [3, 2, 5]; expected [3, 2, 6]"),
        ("sites/name", 0, b"model.layers.1.mlp.down_proj", "/sites/name or /probe repeats a name"),
        ("sites/kind", 0, b"\xff\xfe", "/sites/kind holds bytes that are not UTF-8"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_right_are_reported(small: Path, key: str, index: Any, value: Any, text: str) -> None:
    edit(small, key, index, value)
    problems = verify_recording(small)
    assert any(text in problem.what for problem in problems), problems
