"""Kill `driftlens record --run` at seeded random moments and compare what is left with a run that was never killed.

A tiny run (built-in random backbone, toy stream) is trained and recorded once without interruption. Copies of the
trained run are then recorded by child processes that end by SIGKILL: every other one after a random time, the rest
just before a random opening, renaming or removal of a file. The next child resumes what the last one left. After each
kill every recording under a final name must be the uninterrupted one, byte for byte, and none that was there may be
gone; whenever a child reaches the end, all files of the run, and all data sets of its recordings, must be equal.

One row a kill is appended to the table, so the script may be stopped at any time and started again.

    python scripts/kill_recording.py [--kills 200] [--out docs/results/kills.csv] [--seed 0]
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children are forked, which threads do not survive

import h5py
import numpy as np

# What a child needs is imported here once: kills should strike work, not imports.
import driftlens.recording
import driftlens.streams.toy  # noqa: F401
from driftlens.cli.main import main as command_line
from driftlens.store import Manifest, leftovers, sha256_file
from driftlens.training import train_run
from driftlens.training.config import parse_config

CONFIG = {
    "base": "tiny-random",
    "method": {"name": "moe-lora"},
    "stream": {"name": "toy", "train_samples": 8, "test_samples": 2},
    "adapter": {"num_experts": 3, "r": 4, "layers": [2, 3], "init_std": 0.1},
    "training": {"steps_per_task": 2, "batch_size": 4, "device": "cpu", "threads": 1, "prefix_cache": "memory"},
    "evaluation": {"batch_size": 4, "max_new_tokens": 1},
    "recording": {"batch_size": 4, "tokens_per_sample": 6},
}
COLUMNS = ["what", "kill", "round", "moment", "before", "after", "leftovers", "lost", "different", "files", "datasets"]
FILE_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree"})


def forked(work: Callable[[], None]) -> int:
    """Run ``work`` in a silent child of its own, which tells only of its failures; return its process id."""
    child = os.fork()
    if child:
        return child
    status, said = 1, io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            work()
        status = 0
    except SystemExit as done:
        status = int(done.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        if status:
            print(said.getvalue()[-2000:], file=sys.stderr, flush=True)
        os._exit(status)


def record(run: Path, die_at: int | None = None, counted: Path | None = None) -> None:
    """Record a run through the command line; die just before file event number ``die_at``, or count the events."""
    events = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal events
        if event in FILE_EVENTS and str(run) in str(arguments[0]):
            events += 1
            if events == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    sys.argv = ["driftlens", "record", "--run", str(run), "--quiet"]
    try:
        command_line()
    finally:
        if counted is not None:
            counted.write_text(str(events))


def train(run: Path) -> None:
    """Train the tiny run."""
    train_run(parse_config(CONFIG, "kill_recording"), run)


def finished(run: Path) -> dict[str, str]:
    """Return the SHA-256 of every recording under its final name."""
    return {path.name: sha256_file(path) for path in sorted((run / "recordings").glob("*.h5"))}


def files(run: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but locks."""
    found = [path for path in sorted(run.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(run).as_posix(): sha256_file(path) for path in found}


def datasets(run: Path) -> dict[str, np.ndarray]:
    """Return every array of every recording."""
    found: dict[str, np.ndarray] = {}
    for path in sorted((run / "recordings").glob("*.h5")):
        with h5py.File(path, "r") as file:
            file.visititems(
                lambda name, item, path=path: (
                    found.__setitem__(f"{path.name}/{name}", item[...]) if isinstance(item, h5py.Dataset) else None
                )
            )
    return found


def count_different(run: Path, whole: Path) -> tuple[int, int, int]:
    """Return how many files and data sets differ between two recorded runs, and how many there are of each."""
    here, there = files(run), files(whole)
    different = sum(here.get(name) != there.get(name) for name in here.keys() | there.keys())
    mine, theirs = datasets(run), datasets(whole)
    for name in mine.keys() | theirs.keys():
        same = name in mine and name in theirs and mine[name].dtype == theirs[name].dtype
        different += not (same and mine[name].tobytes() == theirs[name].tobytes())
    return different, len(there), len(theirs)


class Kills:
    """The campaign: its folder, its table and what an uninterrupted run looks like."""

    def __init__(self, folder: Path, out: Path, kills: int, seed: int) -> None:
        self.folder, self.out, self.kills, self.seed = folder, out, kills, seed
        self.trained, self.whole = folder / "trained", folder / "whole"
        self.rows = list(csv.DictReader(out.open(newline=""))) if out.is_file() else []
        self.bad = 0

    def prepare(self) -> None:
        """Train once; record once without interruption, counting file events and taking the time."""
        if os.waitpid(forked(lambda: train(self.trained)), 0)[1]:
            sys.exit("the tiny run could not be trained")
        shutil.copytree(self.trained, self.whole)
        begun = time.monotonic()
        if os.waitpid(forked(lambda: record(self.whole, counted=self.folder / "events")), 0)[1]:
            sys.exit("the tiny run could not be recorded")
        self.seconds = time.monotonic() - begun
        self.events = int((self.folder / "events").read_text())
        self.expected = finished(self.whole)

    def add(self, **row: object) -> None:
        """Append a row to the table."""
        new = not self.out.is_file()
        with self.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.bad += bool(row["lost"]) + bool(row["different"])

    def run(self) -> int:
        """Kill until the table holds enough kills; return the number of rows of this call that are not as they must."""
        killed = sum(row["what"] == "kill" for row in self.rows)
        number = 1 + max((int(row["round"]) for row in self.rows), default=0)
        self.prepare()
        run = self.fresh(number)
        while True:
            before = finished(run)
            last = killed == self.kills
            moment, alive = self.attempt(run, killed, to_the_end=last)
            if not alive:
                killed += 1
                self.check_kill(run, killed, number, moment, before)
                continue
            different, count, arrays = count_different(run, self.whole)
            row = {"what": "end", "kill": killed, "round": number, "before": len(before), "after": len(self.expected)}
            self.add(**row, lost=0, different=different, files=count, datasets=arrays)
            if last:
                return self.bad
            number += 1
            run = self.fresh(number)

    def fresh(self, number: int) -> Path:
        """Return a copy of the trained run, without recordings."""
        return Path(shutil.copytree(self.trained, self.folder / f"round-{number}"))

    def attempt(self, run: Path, killed: int, *, to_the_end: bool) -> tuple[str, bool]:
        """Record ``run`` in a child that is killed; return the moment and whether the child reached the end first."""
        # the attempts of a round that reach the end draw anew, or the same moment would be missed for ever
        self.draws = getattr(self, "draws", 0) + 1
        rng = random.Random(f"{self.seed}/{killed}/{self.draws}")
        event = rng.randrange(1, self.events) if killed % 2 and not to_the_end else None
        child = forked(lambda: record(run, die_at=event))
        moment = f"before file event {event}"
        if event is None and not to_the_end:
            after = rng.uniform(0.0, self.seconds)
            moment = f"after {1000 * after:.0f} ms"
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)  # a child that has ended is not reaped yet: its id is still its own
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            return moment, False
        if status:
            sys.exit(f"recording failed with exit code {os.waitstatus_to_exitcode(status)} after kill {killed}")
        return moment, True

    def check_kill(self, run: Path, killed: int, number: int, moment: str, before: dict[str, str]) -> None:
        """Compare what a killed child left with what was there before it and with the uninterrupted run."""
        after = finished(run)
        manifest = Manifest.load(run)
        ignored = {str(path) for path in leftovers(run)}
        listed = {str(run / name) for name in manifest.files}
        broken = [problem for problem in manifest.verify() if problem.path in listed and problem.path not in ignored]
        self.add(
            what="kill",
            kill=killed,
            round=number,
            moment=moment,
            before=len(before),
            after=len(after),
            leftovers=len(ignored),
            lost=len(before.keys() - after.keys()) + len(broken),
            different=sum(self.expected.get(name) != digest for name, digest in after.items()),
        )


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("docs/results/kills.csv"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bad = Kills(Path(folder), options.out.absolute(), options.kills, options.seed).run()
    print(f"{options.kills} kills: {bad} of them lost or changed something; table in {options.out}")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
