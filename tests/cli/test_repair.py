"""`driftlens repair` as users meet it: a damaged run is put in order, recorded anew, and is what it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.training.support import digests, tiny_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    from driftlens.recording import record_run
    from driftlens.training import train_run

    run = tmp_path_factory.mktemp("repair") / "whole"
    train_run(tiny_config(stream={"tasks": ["colour", "parity"]}, training={"steps_per_task": 2}), run)
    record_run(run)
    return run


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


def test_repair_then_record_gives_the_run_that_was(cli, run, whole):
    (run / "recordings" / "03-x.h5.partial").write_bytes(b"half")
    flip(run / "recordings" / "01-colour.h5")
    assert cli("verify", run)[0] == 4
    code, out, err = cli("repair", run, "--dry-run", "--json")
    planned = json.loads(out)
    assert (code, err) == (0, "")
    assert [(row["action"], row["path"]) for row in planned] == [
        ("remove", "recordings/03-x.h5.partial"),
        ("move aside", "recordings/01-colour.h5"),
    ]
    assert (run / "recordings" / "03-x.h5.partial").exists()
    code, out, err = cli("repair", run)
    assert code == 0
    assert "move aside" in out
    assert "Next: driftlens record --run" in err.replace("\n", " ")
    code, out, _ = cli("verify", run, "--json")
    assert (code, json.loads(out)) == (0, [])
    code, out, _ = cli("record", "--run", run, "--json", "--quiet")
    assert [row["skipped"] for row in json.loads(out)] == [True, False, True, True]
    shutil.rmtree(next(run.glob(".repair-*")))
    assert digests(run) == digests(whole)
    assert (run / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


def test_a_run_without_manifest_is_a_run_again(cli, run, whole):
    (run / "manifest.json").unlink()
    assert cli("analyze", run)[0] == 3
    code, out, err = cli("repair", run, "--json", "--quiet")
    assert (code, err) == (0, "")
    assert {row["action"] for row in json.loads(out)} == {"rebuild", "list"}
    before, after = (json.loads((folder / "manifest.json").read_text()) for folder in (whole, run))
    differing = {key for key in before if before[key] != after[key]}
    assert differing <= {"created", "versions"}, "what only the first writer knew"
    assert cli("train", "--out", run, "--resume", "--quiet")[0] == 0, "configuration and stream are those of then"
    assert cli("record", "--run", run, "--quiet")[0] == 0
    assert cli("verify", run)[0] == 0
    assert digests(run) == digests(whole)


def test_what_only_a_copy_can_restore_is_exit_code_four(cli, run):
    flip(run / "checkpoints" / "00-start" / "adapter_model.safetensors")
    code, out, err = cli("repair", run, "--json")
    assert code == 4
    (row,) = json.loads(out)
    assert (row["action"], row["path"]) == ("restore", "checkpoints/00-start/adapter_model.safetensors")
    assert "can only be restored from a copy" in err.replace("\n", " ")
    code, _, err = cli("repair", run, "--dry-run")
    assert code == 4
    assert "nothing was changed" in err.replace("\n", " ")


def test_a_folder_that_is_no_run(cli, tmp_path):
    code, _, err = cli("repair", tmp_path / "none")
    assert code == 3
    assert "is not a run" in err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []
