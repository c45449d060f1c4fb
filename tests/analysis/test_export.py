"""Exported files: what is read back is what the run says, and nothing half-written stays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import xarray as xr

from driftlens.analysis import compare, comparison_dataset, export, export_run, open_run
from driftlens.analysis import table as drift_table
from driftlens.errors import ConfigError, NotFoundError, ProbeError, StorageError, UnknownNameError
from tests.analysis.synthetic import make_run


def test_netcdf_gives_back_every_table_of_the_run(run, tmp_path):
    rows = export_run(run, tmp_path / "out", "netcdf", level="site")
    assert [row["file"] for row in rows] == ["moe.nc"]
    with xr.open_datatree(tmp_path / "out" / "moe.nc", engine="h5netcdf") as tree:
        assert set(tree.children) == {"scores", "stream", *run.tables()}
        for name, table in {**run.tables(), "scores": run.scores, "stream": run.stream}.items():
            read = tree[name].to_dataset().load()
            xr.testing.assert_equal(read.reset_coords(), table.reset_coords())
            for variable in table.data_vars:
                assert read[variable].attrs.get("units") == table[variable].attrs.get("units")
        assert tree["codrift"]["impact"].attrs["definition"] == run.codrift["impact"].attrs["definition"]
        assert tree.attrs["method"] == run.method
        assert tree.attrs["stream_sha256"] == "5" * 64
        assert "xarray" in json.loads(tree.attrs["versions"])


def test_the_probe_level_leaves_sites_out(run, tmp_path):
    export_run(run, tmp_path / "out", "netcdf")
    with xr.open_datatree(tmp_path / "out" / "moe.nc", engine="h5netcdf") as tree:
        assert set(tree.children) == {"scores", "stream", "summary", "trend"}
    assert "drift_site" not in export.export_frames(run)
    assert "drift_site" in export.export_frames(run, level="site")


@pytest.mark.parametrize("to", ["parquet", "csv"])
def test_tidy_files_give_back_every_frame(run, tmp_path, to):
    rows = export_run(run, tmp_path / "out", to, level="site")
    frames = export.export_frames(run, level="site")
    assert {row["file"] for row in rows} == {f"{name}.{to}" for name in frames}
    for name, frame in frames.items():
        path = tmp_path / "out" / f"{name}.{to}"
        read = pd.read_parquet(path) if to == "parquet" else pd.read_csv(path, keep_default_na=False, na_values=[""])
        assert list(read.columns) == list(frame.columns)
        for column in frame.columns:
            if pd.api.types.is_numeric_dtype(frame[column]):
                np.testing.assert_array_equal(read[column].to_numpy(float), frame[column].to_numpy(float))
            else:
                wanted = [None if pd.isna(value) else str(value) for value in frame[column]]
                assert [None if pd.isna(value) else str(value) for value in read[column]] == wanted


def test_the_drift_file_is_the_tidy_table(run, tmp_path):
    export_run(run, tmp_path / "out")
    read, wanted = pd.read_parquet(tmp_path / "out" / "drift.parquet"), drift_table(run)
    numbers = wanted.drop(columns="undefined")
    pd.testing.assert_frame_equal(read.drop(columns="undefined"), numbers, check_dtype=False)
    np.testing.assert_array_equal(read["undefined"].isna(), wanted["undefined"].isna())


def test_what_the_numbers_mean_travels_with_them(run, tmp_path):
    export_run(run, tmp_path / "out", level="site")
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["run"]["name"] == run.name
    assert about["run"]["tasks"] == list(run.tasks)
    assert about["run"]["stream_sha256"] == "5" * 64
    assert about["versions"]["driftlens"]
    assert "attribut" in about["missing"]["attribution"]
    for file, entry in about["files"].items():
        frame = pd.read_parquet(tmp_path / "out" / file)
        assert list(entry["columns"]) == list(frame.columns), file
        assert entry["rows"] == len(frame)
        assert all(entry["columns"].values()), file
    assert about["measures"]["sample_js"]["units"] == "nats"
    assert about["measures"]["impact"]["definition"] == run.codrift["impact"].attrs["definition"]
    inside = json.loads(pq.read_schema(tmp_path / "out" / "trend.parquet").pandas_metadata["attributes"]["driftlens"])
    assert inside["method"] == run.method
    assert "noise floor" in inside["columns"]["impact_noise"] or "two recordings" in inside["columns"]["impact_noise"]


def test_a_formula_in_an_answer_does_not_run_in_a_spreadsheet(copy):
    frames = export.export_frames(open_run(copy))
    frames["samples"].loc[0, "prediction"] = "=1+1"
    path = copy.parent / "samples.csv"
    export._write_frame(frames["samples"], path, {})
    assert pd.read_csv(path)["prediction"][0] == "'=1+1"


def test_an_existing_folder_is_left_alone_unless_it_may_be_replaced(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        export_run(run, out, "csv")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    export_run(run, out, "parquet", overwrite=True)
    export_run(run, out, "csv", overwrite=True)
    assert (out / "drift.csv").is_file()
    assert not (out / "drift.parquet").exists()


def test_a_failure_leaves_nothing(run, tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(28, "No space left on device", str(tmp_path / "out.partial" / "trend.parquet"))

    monkeypatch.setattr(pd.DataFrame, "to_parquet", refuse)
    with pytest.raises(StorageError, match="No space left"):
        export_run(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_wrong_wishes_are_refused(run, tmp_path):
    with pytest.raises(UnknownNameError, match="Unknown format 'xlsx'"):
        export_run(run, tmp_path / "out", "xlsx")
    with pytest.raises(ConfigError, match="Unknown level 'expert'"):
        export_run(run, tmp_path / "out", level="expert")
    with pytest.raises(ConfigError, match="lies inside the run"):
        export_run(run, Path(run.path) / "tables")
    assert not list(tmp_path.iterdir())


def test_a_run_is_exported_as_far_as_it_goes(tmp_path):
    folder = make_run(tmp_path / "unrecorded", recordings=False)
    rows = export_run(folder, tmp_path / "out")
    assert {row["file"] for row in rows} >= {"scores.parquet", "samples.parquet", "train_log.parquet"}
    missing = json.loads((tmp_path / "out" / "export.json").read_text())["missing"]
    assert missing["recordings"] == "the run was not recorded"
    (folder / "scores.parquet").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["scores.parquet"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(NotFoundError, match="neither scores nor recordings"):
        export_run(folder, tmp_path / "none")


# --- several runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    sizes = {"samples": 3, "tokens_per_sample": 2, "sites": 2}
    return [make_run(folder / f"run{seed}", seed=seed, method=f"m{seed}", noise=False, **sizes) for seed in (0, 1)]


def test_compared_runs_as_labelled_arrays(pair):
    frame, table = compare(pair), comparison_dataset(pair)
    assert table.sizes["run"] == 2
    np.testing.assert_array_equal(table["AP"], frame["AP"])
    assert table["AP"].attrs["definition"]
    assert table["method"].to_numpy().tolist() == ["m0", "m1"]
    for number, path in enumerate(pair):
        run = open_run(path)
        np.testing.assert_array_equal(table["nll"][number], run.scores["nll"])
        summary = run.summary["impact"]
        np.testing.assert_array_equal(table["impact_by_probe"][number].transpose(*summary.dims), summary)


def test_runs_over_other_streams_are_compared_only_when_asked(pair, tmp_path):
    other = make_run(tmp_path / "other", stream_sha256="6" * 64, recordings=False, samples=3)
    with pytest.raises(ProbeError, match="cannot be compared"):
        comparison_dataset([pair[0], other])
    table = comparison_dataset([pair[0], other], strict=False)
    assert table["comparable"].to_numpy().tolist() == [True, False]
    assert np.isnan(table["impact_by_probe"].sel(run="other")).all()
    assert np.isfinite(table["nll"].sel(run="other")).any()


def test_only_a_folder_of_an_earlier_export_is_replaced(run, tmp_path):
    own, file = tmp_path / "own", tmp_path / "README.md"
    own.mkdir()
    (own / "thesis.txt").write_text("mine")
    file.write_text("mine too")
    for target in (own, file):
        with pytest.raises(StorageError, match="holds what no export wrote"):
            export_run(run, target, "csv", overwrite=True)
    out = tmp_path / "out"
    export_run(run, out, "csv")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"notes\.txt"):
        export_run(run, out, "csv", overwrite=True)
    assert (own / "thesis.txt").read_text() == "mine"
    assert file.read_text() == "mine too"
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    export_run(run, out, "csv", overwrite=True)
