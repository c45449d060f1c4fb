"""``driftlens export`` as users meet it."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import xarray as xr

from tests.analysis.synthetic import make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("export") / "run", samples=2, tokens_per_sample=2, sites=1, noise=False)


def test_files_are_listed_and_there(cli, folder, tmp_path):
    code, out, err = cli("export", folder, "--to", "csv", "--out", tmp_path / "out", "--level", "site", "--json")
    assert code == 0
    assert "export.json" in err
    rows = json.loads(out)
    for row in rows:
        path = tmp_path / "out" / row["file"]
        assert path.stat().st_size == row["bytes"]
        assert pd.read_csv(path).shape == (row["rows"], row["columns"])
    assert {"drift.csv", "drift_site.csv", "scores.csv", "samples.csv"} <= {row["file"] for row in rows}


def test_the_folder_is_named_after_the_run(cli, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("export", folder, "--to", "netcdf", "--quiet")
    assert (code, err) == (0, "")
    assert "run.nc" in out
    with xr.open_datatree(tmp_path / "run-netcdf" / "run.nc", engine="h5netcdf") as tree:
        assert "summary" in tree.children


def test_wrong_input(cli, folder, tmp_path):
    assert cli("export", folder, "--to", "xlsx", "--out", tmp_path / "out")[0] == 2
    code, _, err = cli("export", folder, "--out", folder / "tables")
    assert code == 2
    assert "inside the run" in err
    assert cli("export", tmp_path / "none", "--out", tmp_path / "out")[0] == 3
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    code, _, err = cli("export", folder, "--out", tmp_path / "out")
    assert code == 7
    assert "--overwrite" in err
    assert cli("export", folder, "--out", tmp_path / "out", "--overwrite", "--quiet")[0] == 0
