"""Killed or starved writers leave the old state or the new one, nothing between."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from driftlens.errors import StorageError
from driftlens.store import Manifest, open_recording, verify_recording
from driftlens.store import writer as writer_module
from driftlens.store.sink import Sink
from tests.store import _make as make

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SITES = [make.site(0), make.site(1, 2, 0)]


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked child; return its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def kill_at(call: int, work: Callable[[], object]) -> None:
    """Run ``work`` and die by SIGKILL at the given call of any function, Python's or C's."""
    left = call

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal left
        left -= event in ("call", "c_call", "return", "c_return")
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    work()
    sys.setprofile(None)


def count_calls(work: Callable[[], object]) -> int:
    total = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal total
        total += event in ("call", "c_call", "return", "c_return")

    sys.setprofile(count)
    work()
    sys.setprofile(None)
    return total


def update(run: Path, c: make.Content) -> None:
    path = make.write(run / "a.h5", c, overwrite=True)
    manifest = Manifest.load(run)
    manifest.add(path)
    manifest.save()


def test_sigkill_at_any_moment_keeps_a_whole_recording(tmp_path: Path) -> None:
    old, new = make.content(SITES, (5, 3)), make.content(SITES, (6, 4), seed=1)
    (tmp_path / "new").mkdir()
    new_bytes = make.write(tmp_path / "new" / "a.h5", new).read_bytes()
    run = tmp_path / "run"
    run.mkdir()
    Manifest(run).save()
    update(run, old)
    old_bytes, old_manifest = (run / "a.h5").read_bytes(), (run / "manifest.json").read_bytes()
    total = count_calls(lambda: update(run, new))
    rng = random.Random(0)
    moments = sorted([*(rng.randrange(1, total) for _ in range(12)), *(total - n for n in (40, 120, 200, 320))])
    seen = set()
    for moment in moments:
        (run / "a.h5").write_bytes(old_bytes)
        (run / "manifest.json").write_bytes(old_manifest)
        status = in_child(lambda moment=moment: kill_at(moment, lambda: update(run, new)))  # type: ignore[misc]
        assert os.WIFSIGNALED(status), f"moment {moment} of {total} was never reached"
        data = (run / "a.h5").read_bytes()
        assert data in (old_bytes, new_bytes)
        assert verify_recording(run / "a.h5") == []
        seen.add(data == new_bytes)
        # What the manifest does not list as it is now is reported; resuming makes the same bytes.
        problems = Manifest.load(run).verify()
        assert all(".partial" in p.path or "changed after" in p.what for p in problems)
    assert seen == {False, True}
    update(run, new)
    assert (run / "a.h5").read_bytes() == new_bytes
    assert Manifest.load(run).verify() == []


STARVE = """
import resource, sys
from pathlib import Path
from tests.store import _make as make
from driftlens.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
content = make.content([make.site(0, 8, 8), make.site(1)], (3000, 2000), seed=1)
try:
    make.write(Path(sys.argv[1]), content, batch=500, overwrite=True)
except StorageError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("limit", [2_000, 800_000])
def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path: Path, limit: int) -> None:
    path = make.write(tmp_path / "a.h5", make.content(SITES, (5, 3)))
    before = path.read_bytes()
    child = subprocess.run(
        [sys.executable, "-c", STARVE, str(path), str(limit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert child.returncode == 7, child.stderr
    assert "Cannot write" in child.stdout
    assert "a.h5: File too large" in child.stdout
    assert "bytes were written" in child.stdout
    assert "Nothing that was finished before is lost" in child.stdout
    assert child.stderr == ""
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.h5.lock", "a.h5"]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 0.4, 0.6, 0.8, 0.99])
def test_the_disk_fills_at_any_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    c = make.content([make.site(0, 32, 32), make.site(1)], (300, 200))
    c.values["task-1"][0]["pathway"][0, 150] = 1e6  # the data set is rewritten wider at the end
    whole = make.write(tmp_path / "whole.h5", c).read_bytes()
    path = make.write(tmp_path / "a.h5", make.content(SITES, (5, 3)))
    before = path.read_bytes()

    class SmallDisk(Sink):
        left = int(share * len(whole))

        def write(self, data: Any) -> int:
            length = super().write(data)
            self.left -= length
            if self.left < 0:
                self.error = self.error or OSError(errno.ENOSPC, "No space left on device")
            return length

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "Sink", SmallDisk)
        with pytest.raises(StorageError, match=r"Cannot write .*a\.h5: No space left on device"):
            make.write(path, c, batch=100, overwrite=True)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock") == ["a.h5", "whole.h5"]
    assert make.write(path, c, overwrite=True).read_bytes() == whole


def test_readers_in_many_processes(tmp_path: Path) -> None:
    path = make.write(tmp_path / "a.h5", make.content(SITES, (50, 30)))

    def read() -> None:
        with open_recording(path) as recording:
            assert recording.gate(0, 0).shape == (50, 3)
            assert verify_recording(path) == []

    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                read()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]
