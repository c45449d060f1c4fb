"""What is written is what is read, whatever the shapes and batches."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

import hdf5plugin  # noqa: F401 - xarray needs the filters
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from driftlens.errors import NotFoundError, UnknownNameError
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
                if name in arrays:
                    np.testing.assert_array_equal(array, arrays[name])
                else:
                    assert array is None


def test_everything_comes_back(tmp_path: Path) -> None:
    c = make.content()
    path = make.write(tmp_path / "a.h5", c, batch=2)
    check_equal(path, c)
    assert verify_recording(path) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.h5.lock", "a.h5"]


sites_strategy = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=6)


@settings(max_examples=10, deadline=None)
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


def test_bytes_depend_on_the_data_alone(tmp_path: Path) -> None:
    c = make.content(tokens=(9, 70, 31))
    one = make.write(tmp_path / "one.h5", c).read_bytes()
    assert make.write(tmp_path / "two.h5", c, batch=4, n_tokens=c.n_tokens).read_bytes() == one
    other = make.content(tokens=(9, 70, 31), seed=1)
    assert make.write(tmp_path / "three.h5", other).read_bytes() != one


def test_many_chunks(tmp_path: Path) -> None:
    c = make.content([make.site(0, 64, 64)], (100, 50))  # widest rows: the chunk holds 64 tokens
    one = make.write(tmp_path / "one.h5", c, batch=7)
    check_equal(one, c)
    with open_recording(one) as recording:
        assert recording.groups[0].gate.chunks == (1, 64, 64)
    assert make.write(tmp_path / "two.h5", c, batch=64).read_bytes() == one.read_bytes()


def test_one_large_value_widens_its_dataset_only(tmp_path: Path) -> None:
    c = make.content([make.site(0, 64, 64), make.site(1)], (100, 50))
    c.values["task-1"][0]["pathway"][0, 3, 5, 7] = 1e6
    files = [make.write(tmp_path / f"{batch}.h5", c, batch=batch) for batch in (1, 33, 1000)]
    assert len({file.read_bytes() for file in files}) == 1
    with open_recording(files[0]) as recording:
        wide, narrow = recording.groups
        assert wide.pathway.dtype == np.float32
        assert wide.gate.dtype == wide.base_norm.dtype == narrow.pathway.dtype == np.float16
        late, early = c.values["task-1"][0]["pathway"], c.values["task-0"][0]["pathway"]
        np.testing.assert_array_equal(recording.pathway(0, 0), early[0].astype(np.float16))
        np.testing.assert_array_equal(recording.pathway(0, 1)[:3], late[0, :3].astype(np.float16))
        np.testing.assert_array_equal(recording.pathway(0, 1)[3:], late[0, 3:])
    assert verify_recording(files[0]) == []


def test_xarray_opens_it_with_names_and_axes(tmp_path: Path) -> None:
    c = make.content()
    path = make.write(tmp_path / "a.h5", c)
    with xr.open_datatree(path, engine="h5netcdf") as tree, open_recording(path) as recording:
        assert tree.attrs["checkpoint"] == "03-digit"
        assert tree["probe"].values.tolist() == c.probes
        assert tree["sites/name"].values.tolist() == [site.name for site in c.sites]
        assert tree["samples/id"].values.tolist() == [i for probe in c.probes for i in c.sample_ids[probe]]
        assert tree["group_0/gate"].dims == ("site", "token", "expert")
        assert tree["group_0/pathway"].dims == ("site", "token", "expert", "rank")
        assert tree["group_0/site"].values.tolist() == [0, 1, 4]
        moment = tree["group_0/stats/second_moment"]
        assert moment.dims == ("site", "probe", "expert", "rank", "rank_col")
        chosen = moment.sel(site=4, probe="task-2").values
        np.testing.assert_array_equal(chosen, recording.groups[0].stats["second_moment"][2, 2])
        assert tree["weights/site_00002/B"].dims == ("expert", "d_out", "rank")


def test_names_of_any_alphabet(tmp_path: Path) -> None:
    c = make.content([make.site(0)], (2,))
    c.probes = ["../<b>=1+1</b> 数字"]
    c.sample_ids = {c.probes[0]: ["a/b", "é", "z" * 1024]}
    c.columns = {c.probes[0]: c.columns["task-0"]}
    c.values = {c.probes[0]: c.values["task-0"]}
    c.meta = {
        "text": "json:not",
        "é": "ü\n",
        "empty": "",
        "nul": "a\0",
        "big": 1 << 70,
        "list": [1, None, "x"],
        "on": True,
    }
    c.meta |= {"small": -3, "real": 0.1, "long": "x" * 100_000}
    path = make.write(tmp_path / "a.h5", c)
    check_equal(path, c)
    assert verify_recording(path) == []


def test_empty_probes_and_no_stored_tokens(tmp_path: Path) -> None:
    c = make.content([make.site(0), make.site(1, 1, 0)], (0, 0))
    c.sample_ids = {probe: [] for probe in c.probes}
    path = make.write(tmp_path / "a.h5", c)
    check_equal(path, c)
    assert verify_recording(path) == []
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        assert tree["group_0/gate"].shape == (1, 0, 3)


def test_recording_without_weights_and_router(tmp_path: Path) -> None:
    c = make.content([make.site(0)], (2,))
    bare = make.write(tmp_path / "bare.h5", c, weights=False)
    with open_recording(bare) as recording:
        assert not recording.has_weights
        with pytest.raises(NotFoundError, match="was thinned"):
            recording.weights(0)
    with RecordingWriter(
        tmp_path / "b.h5", sites=c.sites, probes=c.probes, sample_ids=c.sample_ids, meta=c.meta
    ) as writer:
        make.fill(writer, c, weights=False)
        writer.set_weights(0, c.weights[0]["A"], c.weights[0]["B"])
        writer.set_meta(checkpoint="04-late")
    with open_recording(tmp_path / "b.h5") as recording:
        assert recording.weights(0)["router"] is None
        assert recording.meta["checkpoint"] == "04-late"


def test_unknown_names_get_the_nearest_one(tmp_path: Path) -> None:
    with open_recording(make.write(tmp_path / "a.h5", make.content())) as recording:
        with pytest.raises(UnknownNameError, match=r"Unknown probe 'task-9'. Did you mean 'task-"):
            recording.gate(0, "task-9")
        with pytest.raises(UnknownNameError, match=r"Did you mean 'model.layers.1.mlp.down_proj'"):
            recording.gate("model.layers.1.mlp.down", 0)
        with pytest.raises(UnknownNameError, match="Unknown site '5'"):
            recording.weights(5)
        with pytest.raises(UnknownNameError, match=r"Unknown token value 'gates'. Did you mean 'gate'"):
            recording.groups[0].read("gates", 0)
        with pytest.raises(UnknownNameError, match="Unknown sum 'entropie'"):
            recording.groups[0].stats["entropie"]
        with pytest.raises(IndexError):
            recording.groups[0].gate[99]
    with pytest.raises(NotFoundError, match="was closed before"):
        recording.groups[0].gate[0]
    with pytest.raises(NotFoundError, match=r"There is no recording .*b\.h5"):
        open_recording(tmp_path / "b.h5")


def test_recordings_travel_to_other_processes(tmp_path: Path) -> None:
    path = make.write(tmp_path / "a.h5", make.content())
    with open_recording(path) as recording, pickle.loads(pickle.dumps(recording)) as copy:
        assert copy is not recording
        assert "5 sites in 3 group(s), 3 probes, 12 stored tokens" in repr(copy)
        np.testing.assert_array_equal(copy.gate(0, 0), recording.gate(0, 0))
        assert np.asarray(copy.groups[0].gate).shape == (3, 12, 3)
        assert len(copy.groups[0].gate) == 3
        assert copy.groups[0].gate.ndim == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_opens_its_own_handle(tmp_path: Path) -> None:
    with open_recording(make.write(tmp_path / "a.h5", make.content())) as recording:
        gate = recording.groups[0].gate
        before = gate[0]
        child = os.fork()
        if child == 0:
            same, own = np.array_equal(gate[0], before), recording.file.pid == os.getpid()
            os._exit(0 if same and own else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_size_is_close_to_the_arithmetic(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sites = [make.site(index, 4, 8) for index in range(8)]
    c = make.content(sites, (1500, 1500))
    for arrays in (group for probe in c.probes for group in c.values[probe]):
        arrays["pathway"] = rng.standard_normal(arrays["pathway"].shape).astype(np.float32)
    path = make.write(tmp_path / "a.h5", c)
    assert path.stat().st_size < 1.2 * estimate_bytes(sites, 3000, 2)
