"""xarray opens our file directly: every dataset with labelled axes, every number as our reader gives it."""

from __future__ import annotations

from pathlib import Path

import hdf5plugin  # noqa: F401 - xarray needs the filters
import numpy as np
import pytest
import xarray as xr

from driftlens.store import open_recording
from driftlens.store.schema import PATHWAY_NAMES, STATS, TOKEN_COLUMNS, VALUES, weights_name

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("*/*.h5"))
WEIGHTS = {"A": ("expert", "rank", "d_in"), "B": ("expert", "d_out", "rank"), "router": ("expert", "d_in")}
GRAMS = {
    "a_gram": ("site", "checkpoint", "expert", "rank", "rank_col"),
    "b_gram": ("site", "checkpoint", "pathway", "pathway_col"),
}


@pytest.fixture(params=FILES, ids=[f"{path.parent.name}/{path.stem}" for path in FILES])
def path(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_no_axis_of_any_dataset_is_without_a_label(path: Path) -> None:
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        for node in tree.subtree:
            for name, array in node.to_dataset(inherit=True).variables.items():
                assert not [dim for dim in array.dims if str(dim).startswith("phony")], f"{node.path}/{name}"
                # An axis that counts has its coordinate; that of names and samples is the text itself.
                assert set(array.dims) <= set(node.to_dataset(inherit=True).coords), f"{node.path}/{name}"


def test_token_values_and_sums_are_those_of_the_reader(path: Path) -> None:
    with xr.open_datatree(path, engine="h5netcdf") as tree, open_recording(path) as recording:
        assert tree["probe"].values.tolist() == recording.probes
        assert tree["sites/name"].values.tolist() == [site.name for site in recording.sites]
        for name in TOKEN_COLUMNS:
            assert tree[f"tokens/{name}"].dims == ("token",)
        for group in recording.groups:
            node = tree[f"group_{group.index}"]
            assert node["site"].values.tolist() == group.site_index.tolist()
            for name, axes in VALUES.items():
                if group.rank or name not in PATHWAY_NAMES:
                    assert node[name].dims == axes
                    for number, probe in enumerate(recording.probes):
                        of_probe = tree["tokens/probe_index"].values == number
                        np.testing.assert_array_equal(node[name].values[:, of_probe], group.read(name, probe))
            for name, axes in STATS.items():
                if group.rank or name not in PATHWAY_NAMES:
                    assert node[f"stats/{name}"].dims == axes
                    np.testing.assert_array_equal(node[f"stats/{name}"].values, group.stats[name])


def test_parameters_are_those_of_the_reader(path: Path) -> None:
    with xr.open_datatree(path, engine="h5netcdf") as tree, open_recording(path) as recording:
        assert ("weights" in tree.children) == recording.has_weights
        assert ("grams" in tree.children) == recording.has_grams
        for number, site in enumerate(recording.sites if recording.has_weights else []):
            for name, array in recording.weights(number).items():
                if array is not None and array.size:
                    found = tree[f"weights/{weights_name(number)}/{name}"]
                    assert found.dims == WEIGHTS[name], site.name
                    np.testing.assert_array_equal(found.values, array)
        for group in recording.groups if recording.has_grams else []:
            for name, axes in GRAMS.items():
                found = tree[f"grams/group_{group.index}/{name}"]
                assert found.dims == axes
                for anchor in recording.gram_checkpoints:
                    wanted = (recording.grams(anchor) or {})[group.index][name]
                    np.testing.assert_array_equal(found.sel(checkpoint=anchor).values, wanted)


def test_selection_by_label_is_selection_by_name() -> None:
    path = GOLDEN / "schema-1.1" / "two_groups.h5"
    with xr.open_datatree(path, engine="h5netcdf") as tree, open_recording(path) as recording:
        energy = tree["group_0/stats/energy"].sel(site=2, probe="last")
        np.testing.assert_array_equal(energy.values, recording.groups[0].stats["energy"][1, 2])
