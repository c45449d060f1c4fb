"""What is written is what is read, whatever the shapes and batches."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import hdf5plugin  # noqa: F401 - xarray needs the filters
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from driftlens.errors import FormatError, NotFoundError, SiteError, StorageError, UnknownNameError
from driftlens.store import RecordingWriter, estimate_bytes, group_sites, open_recording, verify_recording
from tests.store import _make as make


def check_equal(path: Path, c: make.Content, weights: bool = True) -> None:
    with open_recording(path) as recording:
        assert recording.sites == c.sites
        assert recording.probes == c.probes
        assert recording.meta == c.meta
        assert recording.n_tokens == c.n_tokens
        for number, probe in enumerate(c.probes):
            assert recording.sample_ids(probe) == c.sample_ids[probe]
            tokens = recording.tokens(number)
            assert tokens.keys() == c.columns[probe].keys()
            for name, column in tokens.items():
                np.testing.assert_array_equal(column, c.columns[probe][name])
            for index, members in enumerate(group_sites(c.sites)):
                values = c.values[probe][index]
                for name in values:
                    expected = values[name].astype(np.float16)
                    np.testing.assert_array_equal(recording.groups[index].read(name, probe), expected)
                for row, member in enumerate(members):
                    gate = recording.gate(c.sites[member].name, probe)
                    assert gate.dtype == np.float32
                    np.testing.assert_array_equal(gate, values["gate"][row].astype(np.float16))
                    expected = values.get("pathway", np.zeros((*values["gate"].shape, 0)))[row].astype(np.float16)
                    np.testing.assert_array_equal(recording.pathway(member, probe), expected)
        for group, stats in zip(recording.groups, c.stats, strict=True):
            for name, array in stats.items():
                np.testing.assert_array_equal(group.stats[name], array)
            assert set(group.stats) >= set(stats)
        for index, arrays in enumerate(c.weights if weights else []):
            for name, array in recording.weights(index).items():
                np.testing.assert_array_equal(array, arrays[name])


def test_everything_comes_back(tmp_path: Path) -> None:
    c = make.content()
    path = make.write(tmp_path / "a.h5", c, batch=2)
    check_equal(path, c)
    assert verify_recording(path) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.h5.lock", "a.h5"]


sites_strategy = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(
    shapes=sites_strategy,
    tokens=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    batch=st.integers(1, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shapes_come_back(shapes: list[tuple[int, int]], tokens: list[int], batch: int, seed: int) -> None:
    c = make.content([make.site(i, e, r) for i, (e, r) in enumerate(shapes)], tuple(tokens), seed)
    with tempfile.TemporaryDirectory() as folder:
        path = make.write(Path(folder, "a.h5"), c, batch=batch)
        check_equal(path, c)
        assert verify_recording(path) == []
