"""Repair: what is damaged goes aside, what proves itself is listed, and nothing good is lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from driftlens.errors import ConfigError, FormatError, LockedError, NotFoundError
from driftlens.store import Manifest, RunLock, verify_recording
from driftlens.store.repair import RepairStep, RunIdentity, repair_run
from tests.store import _make as make

NAMES = ("00-start", "01-colour", "02-parity")
SITES = [make.site(0), make.site(1)]


def checkpoint(folder: Path, seed: int) -> str:
    """Write what a checkpoint folder holds; return the hash that recordings of it store."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "MOE_LORA", "seed": seed}))
    save_file({"w": np.full(50, seed, np.float32)}, folder / "adapter_model.safetensors")
    (folder / "scores.parquet").write_bytes(b"PAR1" + bytes(20) + b"PAR1")
    parts = [
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "x"
    (run / "recordings").mkdir(parents=True)
    (run / "config.yaml").write_text("base: tiny-random\n")
    (run / "scores.parquet").write_bytes(b"PAR1" + bytes(30) + b"PAR1")
    manifest = Manifest(run, config_hash="c", stream_sha256="s", base={"name": "tiny-random"}, seed=3, threads=1)
    for number, name in enumerate(NAMES):
        digest = checkpoint(run / "checkpoints" / name, number)
        content = make.content(SITES, (4, 3), seed=number)
        content.meta |= {"checkpoint": name, "checkpoint_sha256": digest, "probes_sha256": "p", "base_sha256": "b"}
        make.write(run / "recordings" / f"{name}.h5", content)
    for name in ("config.yaml", "scores.parquet", "checkpoints", *(f"recordings/{n}.h5" for n in NAMES)):
        manifest.add(name)
    manifest.complete, manifest.probes_sha256 = True, "p"
    manifest.save()
    return run


def describe(_run: Path) -> RunIdentity:
    return RunIdentity("c", "s", "tiny-random", seed=3, threads=1, tasks=2)


def contents(run: Path) -> dict[str, bytes]:
    """Every file but empty locks, which writers leave and which are harmless."""
    found = {p.relative_to(run).as_posix(): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if not name.endswith(".lock")}


def kept_aside(run: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for folder in run.glob(".repair-*")
        for p in folder.rglob("*")
        if p.is_file()
    }


def actions(steps: list[RepairStep]) -> list[tuple[str, str]]:
    return [(step.action, step.path) for step in steps]


def flip(path: Path) -> bytes:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)
    return bytes(raw)


def test_a_sound_run_is_left_alone(run: Path) -> None:
    before = contents(run)
    assert repair_run(run) == []
    assert contents(run) == before
    assert Manifest.load(run).verify() == []


def test_what_interrupted_writers_left_is_removed(run: Path) -> None:
    before = contents(run)
    (run / "recordings" / "03-new.h5.partial").write_bytes(b"half")
    (run / "checkpoints" / "03-new.partial" / "deep").mkdir(parents=True)
    (run / "checkpoints" / "03-new.partial" / "deep" / "half").touch()
    (run / "recordings" / ".03-new.h5.lock").touch()
    (run / "recordings" / ".03-new.h5.lock.owner").write_text('{"pid": 1, "host": "gone"}')
    steps = repair_run(run)
    assert actions(steps) == [
        ("remove", "recordings/.03-new.h5.lock"),
        ("remove", "checkpoints/03-new.partial"),
        ("remove", "recordings/03-new.h5.partial"),
    ]
    assert contents(run) == before
    assert not (run / "recordings" / ".03-new.h5.lock").exists()
    assert not any(step.unsolved for step in steps)


def test_a_dry_run_says_the_same_and_changes_nothing(run: Path) -> None:
    (run / "recordings" / "03-new.h5.partial").write_bytes(b"half")
    flip(run / "recordings" / "01-colour.h5")
    (run / "recordings" / "02-parity.h5").write_bytes(b"torn")
    (run / "checkpoints" / "02-parity" / "adapter_config.json").unlink()
    before = contents(run)
    planned = repair_run(run, dry_run=True)
    assert contents(run) == before
    assert repair_run(run) == planned
    assert contents(run) != before


def test_a_damaged_recording_goes_aside_so_that_it_is_made_anew(run: Path) -> None:
    raw = flip(run / "recordings" / "01-colour.h5")
    (run / "recordings" / "02-parity.h5").unlink()
    others = {k: v for k, v in contents(run).items() if k not in ("recordings/01-colour.h5", "manifest.json")}
    steps = repair_run(run)
    assert actions(steps) == [("move aside", "recordings/01-colour.h5"), ("unlist", "recordings/02-parity.h5")]
    assert all("driftlens record --run" in step.why for step in steps)
    assert kept_aside(run) == {"recordings/01-colour.h5": raw}
    manifest = Manifest.load(run)
    assert manifest.verify() == []
    assert not manifest.lists("recordings/01-colour.h5")
    assert not manifest.lists("recordings/02-parity.h5")
    assert others.items() <= contents(run).items()
    assert repair_run(run) == [], "once is enough"


def test_a_sound_recording_that_the_manifest_does_not_know_is_listed(run: Path) -> None:
    manifest = Manifest.load(run)
    manifest.remove("recordings/02-parity.h5")  # killed between recording and manifest
    manifest.save()
    make.write(run / "recordings" / "01-colour.h5", make.content(SITES, (6, 2), seed=9), overwrite=True)  # and again
    (run / "recordings" / "stray.h5").write_bytes(b"no recording")
    steps = repair_run(run)
    assert set(actions(steps)) >= {
        ("list", "recordings/01-colour.h5"),
        ("list", "recordings/02-parity.h5"),
        ("move aside", "recordings/stray.h5"),
    }
    assert Manifest.load(run).verify() == []
    assert kept_aside(run) == {"recordings/stray.h5": b"no recording"}


def test_tables_that_training_merges_again_go_aside(run: Path) -> None:
    (run / "scores.parquet").write_bytes(b"torn")
    (step,) = repair_run(run)
    assert (step.action, step.path) == ("move aside", "scores.parquet")
    assert "train --out" in step.why
    assert "--resume" in step.why
    assert Manifest.load(run).verify() == []


def test_the_last_checkpoint_is_trained_again_and_an_earlier_one_needs_a_copy(run: Path) -> None:
    flip(run / "checkpoints" / "02-parity" / "adapter_model.safetensors")
    (step,) = repair_run(run)
    assert (step.action, step.path) == ("move aside", "checkpoints/02-parity")
    assert "trains it again" in step.why
    assert sorted(kept_aside(run)) == [
        f"checkpoints/02-parity/{n}" for n in ("adapter_config.json", "adapter_model.safetensors", "scores.parquet")
    ]
    manifest = Manifest.load(run)
    assert not manifest.complete
    assert manifest.verify() == []
    flip(run / "checkpoints" / "00-start" / "adapter_model.safetensors")
    flip(run / "config.yaml")
    before = contents(run)
    steps = repair_run(run)
    assert actions(steps) == [
        ("restore", "config.yaml"),
        ("restore", "checkpoints/00-start/adapter_model.safetensors"),
    ]
    assert all(step.unsolved and "from a copy" in step.why for step in steps)
    assert contents(run) == before, "what cannot be made again stays listed, so that nobody takes it for sound"


def test_an_old_folder_that_a_killed_writer_moved_aside_is_put_back(run: Path) -> None:
    folder = run / "checkpoints" / "02-parity"
    before = contents(run)
    aside = folder.rename(folder.with_name("02-parity.replaced.partial"))
    folder.with_name("02-parity.partial").mkdir()
    planned = repair_run(run, dry_run=True)
    assert actions(planned) == [
        ("remove", "checkpoints/02-parity.partial"),
        ("put back", "checkpoints/02-parity.replaced.partial"),
    ]
    assert repair_run(run) == planned
    assert contents(run) == before
    # the new folder took the name, but it is not what the manifest lists: the old one is
    folder.rename(aside)
    checkpoint(folder, 7)
    assert ("put back", "checkpoints/02-parity.replaced.partial") in actions(repair_run(run))
    assert {k: v for k, v in contents(run).items() if not k.startswith(".repair-")} == before
    assert len(kept_aside(run)) == 3
    # both are there and the new one is as listed: the old one goes
    checkpoint(aside, 8)
    assert actions(repair_run(run)) == [("remove", "checkpoints/02-parity.replaced.partial")]


@pytest.mark.parametrize("damage", ["missing", "torn", "not an object"])
def test_a_lost_manifest_is_made_again_from_what_proves_itself(run: Path, damage: str) -> None:
    path = run / "manifest.json"
    expected = Manifest.load(run)
    raw = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(raw[:-40] if damage == "torn" else b"[]\n")
    steps = repair_run(run, describe=describe)
    manifest = Manifest.load(run)
    assert manifest.files == expected.files
    for field in ("config_hash", "stream_sha256", "probes_sha256", "seed", "threads", "complete"):
        assert getattr(manifest, field) == getattr(expected, field), field
    assert manifest.base == {"name": "tiny-random", "sha256": "b"}
    assert manifest.verify() == []
    assert steps[0].action == "rebuild"
    assert not any(step.unsolved or step.action == "doubt" for step in steps)
    assert list(kept_aside(run)) == ([] if damage == "missing" else ["manifest.json"])


def test_a_rebuilt_manifest_says_what_nothing_proves(run: Path) -> None:
    (run / "manifest.json").unlink()
    (run / "recordings" / "01-colour.h5").unlink()  # nothing vouches for 01
    save_file({"w": np.full(50, 9, np.float32)}, run / "checkpoints" / "02-parity" / "adapter_model.safetensors")
    weights = run / "checkpoints" / "00-start" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    steps = {step.path: step for step in repair_run(run)}
    assert steps["checkpoints/01-colour"].action == "doubt"
    assert "no recording of it proves" in steps["checkpoints/01-colour"].why
    assert steps["checkpoints/02-parity"].unsolved
    assert "is not what its recording was made from" in steps["checkpoints/02-parity"].why
    assert steps["checkpoints/00-start"].unsolved
    assert "adapter_model.safetensors is torn" in steps["checkpoints/00-start"].why
    assert steps["config.yaml"].action == "doubt"
    manifest = Manifest.load(run)
    assert [n for n in NAMES if manifest.lists(f"checkpoints/{n}")] == ["01-colour"]
    assert not manifest.complete
    save_file({"w": np.full(50, 0, np.float32)}, weights)  # restored from a copy
    assert actions(repair_run(run)) == [("list", "checkpoints/00-start")]
    assert Manifest.load(run).lists("checkpoints/00-start/adapter_model.safetensors")


def test_a_run_of_collected_recordings(run: Path) -> None:
    """Without checkpoints a damaged recording can be made again by nobody here: it stays listed, and is reported."""
    shutil.rmtree(run / "checkpoints")
    (run / "scores.parquet").unlink()
    (run / "manifest.json").unlink()

    def refuse(_run: Path) -> RunIdentity:
        raise ConfigError("no configuration of a training")

    assert not any(step.unsolved for step in repair_run(run, describe=refuse))
    manifest = Manifest.load(run)
    assert sorted(manifest.files) == ["config.yaml", *(f"recordings/{name}.h5" for name in NAMES)]
    assert manifest.complete
    raw = flip(run / "recordings" / "01-colour.h5")
    (step,) = repair_run(run)
    assert (step.action, step.path, step.unsolved) == ("restore", "recordings/01-colour.h5", True)
    assert (run / "recordings" / "01-colour.h5").read_bytes() == raw
    assert Manifest.load(run).lists("recordings/01-colour.h5")


def test_a_configuration_that_cannot_be_read_is_said_and_stops_nothing(run: Path) -> None:
    (run / "manifest.json").unlink()

    def refuse(_run: Path) -> RunIdentity:
        raise ConfigError("base: unknown key")

    (doubt,) = [step for step in repair_run(run, describe=refuse) if step.action == "doubt"]
    assert doubt.path == "config.yaml"
    assert "base: unknown key" in doubt.why
    assert len(Manifest.load(run).files) == 14


def test_a_run_that_is_written_to_is_refused_and_a_file_that_is_written_to_is_left(run: Path) -> None:
    with RunLock(run), pytest.raises(LockedError, match="is being written by"):
        repair_run(run)
    partial = run / "recordings" / "03-new.h5.partial"
    partial.write_bytes(b"half")
    with RunLock(run / "recordings" / "03-new.h5", file=True):
        (step,) = repair_run(run)
        assert (step.action, step.path) == ("doubt", "recordings/03-new.h5.partial")
        assert partial.exists()


def test_links_are_moved_and_what_they_lead_to_stays(run: Path, tmp_path: Path) -> None:
    path, elsewhere = run / "recordings" / "01-colour.h5", tmp_path / "elsewhere.h5"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    (step,) = repair_run(run)
    assert (step.action, step.path) == ("move aside", "recordings/01-colour.h5")
    assert "is a link" in step.why
    assert verify_recording(elsewhere) == []
    (run / "recordings").rename(tmp_path / "outside")
    (run / "recordings").symlink_to(tmp_path / "outside")
    before = contents(tmp_path / "outside")
    assert all(step.action == "unlist" for step in repair_run(run))
    assert contents(tmp_path / "outside") == before


def test_no_run_and_a_newer_run_are_refused(run: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(NotFoundError, match="is not a run: neither"):
            repair_run(folder)
    assert not (tmp_path / "none").exists()
    path = run / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": "2.0"}))
    before = contents(run)
    with pytest.raises(FormatError, match=r"has schema 2\.0.*Upgrade driftlens"):
        repair_run(run)
    assert contents(run) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_repair_that_is_killed_is_finished_by_the_next(run: Path) -> None:
    from tests.store.test_faults import count_calls, in_child, kill_at

    def break_it() -> None:
        (run / "recordings" / "03-new.h5.partial").write_bytes(b"half")
        flip(run / "recordings" / "01-colour.h5")
        (run / "scores.parquet").write_bytes(b"torn")

    sound = contents(run)
    good = {k: v for k, v in sound.items() if k not in ("recordings/01-colour.h5", "scores.parquet", "manifest.json")}
    break_it()
    total = count_calls(lambda: repair_run(run))
    for moment in np.linspace(total // 3, total - 40, 6).astype(int):
        for name, data in sound.items():
            (run / name).write_bytes(data)
        break_it()
        status = in_child(lambda moment=moment: kill_at(int(moment), lambda: repair_run(run)))  # type: ignore[misc]
        assert os.WIFSIGNALED(status)
        repair_run(run)
        assert good.items() <= contents(run).items()
        assert Manifest.load(run).verify() == []
