"""SIGKILL at seeded random moments: a resumed run ends with the bytes of an uninterrupted one."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import pytest

from driftlens.store import Manifest
from driftlens.store.manifest import MANIFEST_NAME
from driftlens.training import train_run
from tests.training.support import digests, tiny_config

KILLS = 20


def _train(out: str, resume: bool) -> None:
    from pathlib import Path

    train_run(tiny_config(), Path(out), resume=resume)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL does not exist on Windows")
def test_twenty_random_kills_leave_the_same_run(tmp_path):
    # A server that has imported everything forks each victim, so that kills hit work rather than imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["driftlens.training.run", "tests.training.support"])
    out, whole = tmp_path / "killed", tmp_path / "whole"

    def start(folder, resume):
        process = context.Process(target=_train, args=(str(folder), resume))
        process.start()
        return process

    begun = time.monotonic()
    process = start(whole, False)
    process.join()
    assert process.exitcode == 0
    duration = time.monotonic() - begun
    begun = time.monotonic()
    process = start(tmp_path / "again", False)
    process.join()
    duration = min(duration, time.monotonic() - begun)

    rng = random.Random(20)
    killed = 0
    finished_before: set[str] = set()
    while killed < KILLS:
        process = start(out, (out / MANIFEST_NAME).is_file())
        process.join(rng.uniform(0.02, 0.9 * duration))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
        else:  # it reached the end: begin anew, so that every kill hits a run in progress
            assert process.exitcode == 0
            assert digests(out) == digests(whole)
            out = tmp_path / f"killed-{killed}"
            finished_before = set()
            continue
        if (out / MANIFEST_NAME).is_file():
            manifest = Manifest.load(out)
            listed = {name for name in manifest.files if name.startswith("checkpoints/")}
            assert finished_before <= listed, "a finished checkpoint was lost"
            finished_before = listed
            assert all((out / name).is_file() for name in listed)
    process = start(out, (out / MANIFEST_NAME).is_file())
    process.join()
    assert process.exitcode == 0
    assert digests(out) == digests(whole)
    assert digests(tmp_path / "again") == digests(whole)
    assert Manifest.load(out).verify() == []
