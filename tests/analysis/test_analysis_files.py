"""What a run folder may do to a reader: damaged, changed, missing and unfitting files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import driftlens.analysis.cache as cache_module
from driftlens.analysis import Run, list_runs, open_run
from driftlens.errors import FormatError, NotFoundError, ProbeError, StorageError, UnknownNameError
from driftlens.store import Manifest
from tests.analysis.synthetic import make_run

SHAPE = {"sites": 3, "samples": 4, "tokens_per_sample": 3}


def relist(run: Path, *files: str) -> None:
    manifest = Manifest.load(run)
    for file in files:
        manifest.add(file)
    manifest.save()


def no_analysis(*_: object, **__: object) -> dict[str, xr.Dataset]:
    raise AssertionError("the analysis was computed although a valid cache was there")


def test_a_damaged_recording_is_one_clear_error_and_hides_no_other(copy: Path) -> None:
    (copy / "analysis.h5").unlink()
    path = copy / "recordings" / "02-colour.h5"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)
    run = open_run(copy)
    with pytest.raises(FormatError) as caught:
        _ = run.drift
    text = str(caught.value)
    assert "02-colour.h5 has the SHA-256" in text
    assert "changed or damaged" in text
    assert "run.without('02-colour')" in text
    with run.recording(1) as sound:
        assert sound.probes == ["digit", "colour", "country"]
    rest = run.without("02-colour")
    assert rest.drift.sizes["checkpoint"] == 3
    assert not np.isnan(rest.drift.router_js.sel(probe="digit", checkpoint=3)).any()


def test_a_recording_that_is_broken_inside_but_listed_as_it_is(copy: Path) -> None:
    path = copy / "recordings" / "02-colour.h5"
    path.write_bytes(path.read_bytes()[:-4000])
    relist(copy, "recordings/02-colour.h5")
    with pytest.raises(FormatError, match=r"02-colour\.h5 is truncated"):
        _ = open_run(copy).drift


def test_a_shortened_file_and_a_missing_one(copy: Path) -> None:
    path = copy / "recordings" / "03-country.h5"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"has [\d,]+ bytes, the manifest lists [\d,]+"):
        _ = open_run(copy).drift
    path.unlink()
    with pytest.raises(NotFoundError, match="is listed in the manifest but missing"):
        open_run(copy).recording(3)


def test_recordings_of_other_probes_are_refused(copy: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", **SHAPE, probe_seed=8, noise=False)
    shutil.copy(other / "recordings" / "02-colour.h5", copy / "recordings" / "02-colour.h5")
    relist(copy, "recordings/02-colour.h5")
    with pytest.raises(ProbeError, match="tokens of probe 'digit' differ between 00-start") as caught:
        _ = open_run(copy).drift
    assert "driftlens record" in str(caught.value)


def test_other_probe_names_are_refused(copy: Path, tmp_path: Path) -> None:
    other = make_run(
        tmp_path / "other", tasks=("digit", "colour"), sites=3, samples=4, tokens_per_sample=3, noise=False
    )
    shutil.copy(other / "recordings" / "02-colour.h5", copy / "recordings" / "02-colour.h5")
    relist(copy, "recordings/02-colour.h5")
    with pytest.raises(
        ProbeError, match="02-colour was recorded on the probes digit, colour, 00-start on digit, colour, country"
    ):
        _ = open_run(copy).drift


def test_a_valid_cache_is_opened_and_gives_the_same_numbers(
    copy: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("driftlens.analysis.analyse.analyse", no_analysis)
    os.utime(copy / "recordings" / "01-digit.h5")  # touched, as by a clone: hashed again, not computed again
    again = open_run(copy)
    for name, table in run.tables().items():
        xr.testing.assert_identical(again.tables()[name], table)


def test_the_cache_is_a_netcdf_file(master: Path, run: Run) -> None:
    expected = run.drift
    with xr.open_dataset(master / "analysis.h5", engine="h5netcdf", group="drift") as found:
        np.testing.assert_array_equal(found["router_js"], expected.router_js)
        assert found["site"].to_numpy().tolist() == expected.site.to_numpy().tolist()
        assert found["near_uniform"].dtype == bool
        assert set(found.coords) == set(expected.coords)
        assert found["router_js"].dims == expected["router_js"].dims


def test_a_changed_recording_makes_the_cache_invalid(copy: Path, run: Run, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", **SHAPE, seed=1)
    shutil.copy(other / "recordings" / "03-country.h5", copy / "recordings" / "03-country.h5")
    with pytest.raises(FormatError, match=r"03-country\.h5 has"):
        _ = open_run(copy).drift  # the manifest does not know it yet
    relist(copy, "recordings/03-country.h5")
    changed = open_run(copy).drift.router_js
    assert not np.allclose(changed.sel(checkpoint=3), run.drift.router_js.sel(checkpoint=3))
    np.testing.assert_allclose(
        changed.sel(probe="digit", checkpoint=2), run.drift.router_js.sel(probe="digit", checkpoint=2)
    )


@pytest.mark.parametrize("damage", ["cut", "table", "garbage", "link"])
def test_a_damaged_cache_is_computed_again(copy: Path, run: Run, damage: str) -> None:
    import h5py

    path = copy / "analysis.h5"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "garbage":
        path.write_bytes(b"not a file of ours")
    elif damage == "table":
        with h5py.File(path, "r+") as file:
            del file["drift"].attrs["coordinate_names"]
    else:  # a stranger's file that points at another one
        with h5py.File(path, "r+") as file:
            del file["drift/router_js"]
            file["drift/router_js"] = h5py.ExternalLink("recordings/01-digit.h5", "/group_0/gate")
    xr.testing.assert_identical(open_run(copy).drift, run.drift)


def test_a_folder_that_cannot_be_written_to_works_without_a_cache(
    copy: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "analysis.h5").unlink()

    def refuse(path: Path) -> object:
        raise StorageError(f"Cannot write {path}: Read-only file system.")

    monkeypatch.setattr(cache_module, "atomic_file", refuse)
    xr.testing.assert_identical(open_run(copy).summary, run.summary)
    assert not (copy / "analysis.h5").exists()


def test_a_run_without_recordings_still_shows_its_scores(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path / "bare", recordings=False))
    assert run.scores.strict.sizes == {"checkpoint": 4, "task": 3}
    assert run.recorded == ()
    with pytest.raises(NotFoundError, match=r"has no recordings.*driftlens record --run"):
        _ = run.drift
    with pytest.raises(NotFoundError, match="no recording of 01-digit"):
        run.recording(1)


def test_tasks_still_to_come_have_no_anchor_yet(copy: Path) -> None:
    manifest = Manifest.load(copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("  tasks:\n  - digit\n  - colour\n  - country\n", ""))
    for name in ("recordings/03-country.h5", "recordings/03-country.noise.h5", "checkpoints/03-country"):
        manifest.remove(name)
    manifest.complete = False
    manifest.save()
    run = open_run(copy)
    assert run.tasks == ("digit", "colour")
    assert run.stream_tasks == ("digit", "colour", "country")
    assert run.drift.anchor.to_numpy().tolist() == [1, 2, -1]
    assert run.drift.probe_index.to_numpy().tolist() == [1, 2, 3]
    assert run.trend.n_old.to_numpy().tolist() == [0, 0, 1]
    assert "not finished" in repr(run)


def test_an_empty_run(tmp_path: Path) -> None:
    Manifest(tmp_path).save()
    run = open_run(tmp_path)
    assert (run.method, run.tasks, run.checkpoints, run.recorded) == ("unknown", (), (), ())
    with pytest.raises(NotFoundError, match=r"scores\.parquet is not listed in the manifest"):
        _ = run.scores
    assert "0 checkpoints" in repr(run)


def test_opening_reads_no_recording(copy: Path) -> None:
    shutil.rmtree(copy / "recordings")
    (copy / "scores.parquet").unlink()
    run = open_run(copy)
    assert run.recorded == (0, 1, 2, 3)
    assert [point.task for point in run.checkpoints] == [None, "digit", "colour", "country"]


def test_what_a_run_says_of_itself(copy: Path) -> None:
    run = open_run(copy)
    assert (run.name, run.method, run.seed, run.tasks, run.complete) == (
        "moe",
        "moelora",
        0,
        ("digit", "colour", "country"),
        True,
    )
    text = repr(run)
    for part in (str(copy), "moelora", "3 (digit, colour, country) tasks", "4 checkpoints", "4 recordings", "MB"):
        assert part in text
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("name: moelora", "name: <script>"))
    assert "&lt;script&gt;" in open_run(copy)._repr_html_()
    assert "<script>" not in open_run(copy)._repr_html_()


def test_unknown_checkpoints_name_the_nearest(run: Run) -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean '03-country'\?"):
        run.recording("03-county")
    with pytest.raises(UnknownNameError, match="Unknown checkpoint '7'"):
        run.recording(7)


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"is not a run: there is no manifest\.json"):
        open_run(tmp_path)


def test_broken_configuration(copy: Path) -> None:
    (copy / "config.yaml").write_text("method: [unclosed")
    with pytest.raises(FormatError, match=r"config\.yaml cannot be read"):
        open_run(copy)


def test_listing_finds_runs_and_hides_none_behind_a_broken_one(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    (tmp_path / "notes").mkdir()
    entries = list_runs(tmp_path)
    assert [entry.path.name for entry in entries] == ["broken", "copy"]
    assert entries[0].problem is not None
    assert "not valid JSON" in entries[0].problem
    found = entries[1]
    assert (found.name, found.method, found.seed, found.tasks) == ("moe", "moelora", 0, ("digit", "colour", "country"))
    assert (found.checkpoints, found.recordings, found.complete, found.problem) == (4, 4, True, None)
    assert found.size_bytes == open_run(copy).size_bytes
    with pytest.raises(NotFoundError, match="is not a folder"):
        list_runs(tmp_path / "nowhere")


def test_importing_loads_neither_torch_nor_xarray(tmp_path: Path) -> None:
    code = (
        "import sys, json, driftlens as dl, driftlens.analysis as a\n"
        f"a.list_runs({str(tmp_path)!r})\n"
        "listed = sorted({'torch', 'xarray', 'pandas', 'transformers'} & set(sys.modules))\n"
        "dl.open, dl.compare, dl.open_recording\n"
        "print(json.dumps([listed, sorted({'torch', 'transformers'} & set(sys.modules)), dl.open.__name__]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], [], "open_run"]
