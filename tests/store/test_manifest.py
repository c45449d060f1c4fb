"""The manifest notices every change of a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from driftlens.errors import FormatError, NotFoundError
from driftlens.store import Manifest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    (run / "checkpoints" / "00-start").mkdir(parents=True)
    (run / "checkpoints" / "00-start" / "a.bin").write_bytes(b"\0" * 100)
    (run / "config.yaml").write_text("name: x\n")
    manifest = Manifest(run, config_hash="c", stream_sha256="s", base={"name": "builtin"}, seed=3, threads=1)
    manifest.add("config.yaml")
    manifest.add(run / "checkpoints" / "00-start")
    manifest.save()
    return run


def problems(run: Path) -> dict[str, str]:
    return {Path(p.path).relative_to(run).as_posix(): p.what for p in Manifest.load(run).verify()}


def test_round_trip(run: Path) -> None:
    manifest = Manifest.load(run)
    assert manifest.files.keys() == {"config.yaml", "checkpoints/00-start/a.bin"}
    assert manifest.files["checkpoints/00-start/a.bin"].size == 100
    assert (manifest.seed, manifest.base, manifest.complete) == (3, {"name": "builtin"}, False)
    before = manifest.path.read_bytes()
    manifest.save()
    assert manifest.path.read_bytes() == before
    assert problems(run) == {}
    assert manifest.lists("checkpoints/00-start")
    assert not manifest.lists("checkpoints/01-x")
    manifest.remove(run / "checkpoints")
    assert manifest.files.keys() == {"config.yaml"}


def test_changed_missing_and_foreign_files_are_found(run: Path) -> None:
    data = run / "checkpoints" / "00-start" / "a.bin"
    data.write_bytes(b"\0" * 99 + b"\1")
    (run / "config.yaml").write_text("name: xy\n")
    (run / "stray.txt").touch()
    (run / "recordings").mkdir()
    (run / "recordings" / "01.h5.partial").touch()
    (run / "checkpoints" / "01-x.partial").mkdir()
    (run / "checkpoints" / "01-x.partial" / "half").touch()
    (run / ".lock").touch()
    found = problems(run)
    assert "is listed. It was changed after it was finished" in found.pop("checkpoints/00-start/a.bin")
    assert found.pop("config.yaml").startswith("has 9 bytes, 8 are listed")
    assert found.pop("stray.txt").startswith("is not listed in the manifest and is ignored")
    for name in ("recordings/01.h5.partial", "checkpoints/01-x.partial"):
        assert found.pop(name).startswith("was left by an interrupted writer and is ignored")
    assert found == {}
    data.unlink()
    assert problems(run)["checkpoints/00-start/a.bin"].startswith("is listed in the manifest but is no file")


def test_links_do_not_count_as_files(run: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("name: x\n")
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(tmp_path / "outside")
    assert "config.yaml" in problems(run)
    manifest = Manifest.load(run)
    for path in ("config.yaml", "../outside"):
        with pytest.raises(FormatError, match="is a link or lies outside"):
            manifest.add(path)
    for method in (manifest.remove, manifest.lists):
        with pytest.raises(FormatError, match=r"outside lies outside .*a run holds its own files only"):
            method(tmp_path / "outside")
    with pytest.raises(NotFoundError, match="does not exist and cannot be listed"):
        manifest.add("nothing")


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"is not a run: there is no manifest.json. List runs with `driftlens ls"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "C:\\x", "a\0"])
def test_paths_that_leave_the_run_are_refused(run: Path, name: str) -> None:
    path = run / "manifest.json"
    data = json.loads(path.read_text())
    data["files"][name] = {"size": 1, "sha256": "0" * 64}
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=r"a path in files is .*expected a path inside the run folder"):
        Manifest.load(run)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schema": "2.0"}, "has schema 2.0; this version of driftlens reads schema 1. Upgrade"),
        ({"schema": 1}, "no DriftLens schema version was found"),
        ({"seed": "3"}, "seed is '3', expected int"),
        ({"complete": 1}, "complete is 1, expected bool"),
        ({"config_hash": None}, "config_hash is None, expected str"),
        ({"base": {"name": 1}}, "base is .* expected an object of texts"),
        ({"files": []}, "files is .*, expected an object"),
        ({"files": {"a": {"size": -1, "sha256": "0" * 64}}}, "the entry of 'a' is .* expected a size and a SHA-256"),
        ({"files": {"a": 3}}, "the entry of 'a' is 3"),
    ],
)
def test_wrong_fields_are_named(run: Path, change: dict[str, object], text: str) -> None:
    path = run / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=text):
        Manifest.load(run)


def test_damaged_json_at_every_length(run: Path) -> None:
    path = run / "manifest.json"
    good = path.read_bytes()
    for cut in range(0, len(good) - 2, 5):
        path.write_bytes(good[:cut])
        with pytest.raises(FormatError, match=r"manifest.json is not valid JSON .*Restore it"):
            Manifest.load(run)
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(FormatError, match="is not valid JSON"):
        Manifest.load(run)
    path.write_bytes(b"[]")
    with pytest.raises(FormatError, match="holds list, expected an object"):
        Manifest.load(run)


def test_what_could_not_be_loaded_is_not_saved(run: Path) -> None:
    manifest = Manifest.load(run)
    manifest.base = "builtin"  # type: ignore[assignment]  # a caller's mistake
    with pytest.raises(FormatError, match="base is 'builtin', expected an object of texts"):
        manifest.save()
    assert Manifest.load(run).base == {"name": "builtin"}
