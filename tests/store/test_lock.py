"""One writer at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from driftlens.errors import LockedError, StorageError
from driftlens.store import RecordingWriter, RunLock
from tests.store import _make as make

HOLD = """
import sys, time
from driftlens.store import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_writer_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        expected = rf"run is being written by process {os.getpid()} on .*Wait until it has finished or stop it"
        with pytest.raises(LockedError, match=expected), RunLock(tmp_path / "run"):
            pytest.fail("two writers")
    with RunLock(tmp_path / "run"):
        pass


def test_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=f"process {child.pid} on "), RunLock(tmp_path):
            pytest.fail("two writers")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    with RunLock(tmp_path):
        pass


def test_second_recording_of_the_same_name_is_refused(tmp_path: Path) -> None:
    c = make.content()
    with RecordingWriter(
        tmp_path / "a.h5", sites=c.sites, probes=c.probes, sample_ids=c.sample_ids, meta=c.meta
    ) as writer:
        with pytest.raises(LockedError, match=r"a\.h5 is being written by"):
            make.write(tmp_path / "a.h5", c)
        make.write(tmp_path / "b.h5", c)  # another name is free
        make.fill(writer, c)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_impossible_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match=r"Cannot create the lock .*Choose an output folder"),
        RunLock(tmp_path / "file"),
    ):
        pytest.fail("no lock there")
