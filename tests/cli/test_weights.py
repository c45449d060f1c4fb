"""``driftlens weights``: the table and its ending, JSON, files, a run, and every wrong input."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from driftlens.store import Manifest
from tests.recording.test_factors import foreign


@pytest.fixture
def cli(cli):
    """Run `driftlens weights`."""
    return partial(cli, "weights")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"Task{task}_llava_lora" for task in (1, 2, 3)]
    for seed, path in enumerate(paths):
        foreign(path, seed=seed, base_model_name_or_path="some-org/some-7b")
    return paths


def test_the_table_summarises_lists_the_most_moved_and_names_what_is_missing(cli, folders):
    code, out, _ = cli(*folders[:2], "--top", 3)
    assert code == 0
    lines = out.splitlines()
    assert [name for name in ("q_proj", "down_proj") if any(f" {name} " in line for line in lines[1:3])]
    at = next(n for n, line in enumerate(lines) if line.startswith("The 3 most moved of 8 rows"))
    assert sum("model.layers." in line for line in lines[at:]) == 3
    assert "within_run" in out
    for name in ("gate_entropy", "router_js", "codrift_divergence", "dead_experts", "active_overlap", "attribution"):
        assert name in out[out.index("Missing here") :], name
    assert lines[-1] == f"Next, where the base model is at hand: driftlens record --ckpt {folders[1]}"


def test_json_has_one_object_per_row_and_the_ending_on_stderr(cli, folders):
    code, out, err = cli(*folders, "--json")
    rows = json.loads(out)
    assert code == 0
    assert len(rows) == 2 * 8
    assert {row["checkpoint"] for row in rows} == {folders[1].name, folders[2].name}
    assert 0 < rows[0]["subspace_overlap"] < 1
    assert "rank_update_a" in rows[0]["within_run"]
    assert "update_change" not in rows[0]["within_run"]
    assert "Missing here" in err
    code, out, err = cli(*folders[:2], "--json", "--level", "expert", "--quiet")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert len(rows) == 8 * 3
    assert len(rows[0]["principal_angles"]) == 2


def test_one_folder_gives_static_facts(cli, folders):
    code, out, _ = cli(folders[0])
    assert code == 0
    assert "update_norm" in out
    assert "largest of 8 rows" in out
    assert "subspace_overlap" not in out


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("level", ["kind", "layer", "site", "expert"])
def test_files_hold_what_python_returns(cli, folders, tmp_path, ending, level):
    import driftlens as dl

    path = tmp_path / f"rows.{ending}"
    code, out, err = cli(*folders[:2], "--out", path, "--level", level)
    expected = dl.weight_drift(*folders[:2], level=level)
    assert (code, out) == (0, "")
    assert f"Wrote {len(expected)} rows" in err
    assert "Missing here" in err
    found = pd.read_csv(path) if ending == "csv" else pd.read_parquet(path)
    assert list(found.columns) == list(expected.columns)
    pd.testing.assert_series_equal(found["update_change"], expected["update_change"], rtol=1e-12)
    if level == "expert":
        angles = found["principal_angles"].map(json.loads) if ending == "csv" else found["principal_angles"]
        assert list(angles[0]) == pytest.approx(expected["principal_angles"][0])


def test_a_run_is_compared_within_itself(cli, tmp_path):
    for number, name in enumerate(("00-start", "01-red", "02-green")):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        foreign(tmp_path / "checkpoints" / name, seed=number)
    manifest = Manifest(tmp_path)
    manifest.add(tmp_path / "checkpoints")
    manifest.save()
    code, out, _ = cli(tmp_path)
    assert code == 0
    assert "01-red" in out
    assert out.rstrip().endswith(f"driftlens record --run {tmp_path}")


def test_wrong_inputs_give_one_message_and_their_code(cli, folders, tmp_path):
    code, _, err = cli(tmp_path / "nowhere")
    assert (code, err.count("Error:")) == (3, 1)
    code, _, err = cli(*folders[:2], "--out", tmp_path / "rows.xlsx")
    assert code == 2
    assert ".csv, .parquet" in err
    foreign(tmp_path / "wide", experts=4)
    code, _, err = cli(folders[0], tmp_path / "wide")
    assert code == 4
    assert "differs in shape" in err
    (folders[1] / "adapter_model.safetensors").write_bytes(b"\x00" * 64)
    code, out, err = cli(*folders[:2])
    assert (code, out, err.count("Error:")) == (4, "", 1)
