"""Fuzz the reader: mutated recordings are opened, read completely and verified, each under a time and a memory cap.

    python scripts/fuzz_reader.py [--inputs 1000000] [--seconds 3600] [--workers 2] [--corpus tests/store/corpus]

Input number n is the same everywhere (seed recordings of the corpus, random numbers from n), so that a run goes on
where COUNTER.json says that the last one stopped. Forked children share the numbers out and take inputs until they die:
of a signal (a crash of libhdf5 or of a filter), of the timer, or by an exception outside the family of DriftLens. Each
such input is made as small as possible and saved to the corpus as a patch of its seed; tests/store/test_fuzz.py
replays them. New seeds or mutations make other inputs of the same numbers: begin another section in COUNTER.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.store import _fuzz  # noqa: E402

CPU_SECONDS = 2.0
WALL_SECONDS = 120
MEMORY = 512 << 20
GROWTH_KIB = 200 << 10
OUTCOMES = ("refused", "equal", "different", "missed", "exception", "memory", "unseen")
BATCH = 5_000
MAX_PER_KIND = 4
MAX_CORPUS_BYTES = 2 << 20
# How often a seed is drawn, the others twice in so many: what has few objects is read quickly.
WEIGHTS = {"plain-1.0.h5": 400, "bare-1.1.h5": 40, "pathways-1.1.h5": 20, "small-1.1.h5": 10, "reference-1.1.h5": 10}


def load_seeds(corpus: Path) -> list[_fuzz.Seed]:
    """The seed recordings of the corpus."""
    return [_fuzz.load_seed(path) for path in sorted((corpus / "seeds").glob("*.h5"))]


def make_input(seeds: list[_fuzz.Seed], number: int) -> tuple[_fuzz.Seed, bytes, bool]:
    """Input ``number``: its seed, its bytes, and whether its checksums were repaired."""
    rng = random.Random(number)
    (seed,) = rng.choices(seeds, [WEIGHTS.get(seed.path.name, 2) for seed in seeds])
    return seed, *_fuzz.mutate(seed, rng)


def limit_memory() -> None:
    """Allow this process ``MEMORY`` bytes of address space more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def capped(path: Path, seed: _fuzz.Seed, sealed: bool, first: str = "both", key: str = "") -> str:
    """Judge one file under the caps; returns an outcome, with details after a colon where it is a failure."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The default action of both signals ends the process even inside C code.
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.alarm(WALL_SECONDS)
    try:
        outcome = _fuzz.judge(path, seed, first, key)
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "driftlens" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
        outcome = f"exception:{type(error).__name__}:{where}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if growth > GROWTH_KIB:
        return "memory:growth"
    if outcome == "different" and not sealed:
        return "unseen" if _fuzz.unseen(seed, path.read_bytes()) else "exception:silent"
    return outcome


def place(folder: Path, data: bytes) -> Path:
    """Write ``data`` under a name of its own: libhdf5 shares what it knows about an open file by inode."""
    path = folder / "input.h5"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def work(seeds: list[_fuzz.Seed], numbers: range, shared: mmap.mmap, folder: Path) -> None:
    """Take inputs until one is fatal: a child of `batch`."""
    limit_memory()
    gc.freeze()
    counts, parent = [0] * len(OUTCOMES), os.getppid()
    for number in numbers:
        if os.getppid() != parent:
            return
        struct.pack_into("<Q", shared, 0, number)
        seed, data, sealed = make_input(seeds, number)
        path, first = place(folder, data), "verify" if number // 16 % 8 == 0 else "read"
        # What a change damaged is read first: most inputs are refused there.
        outcome = capped(path, seed, sealed, first, seed.owner(data) if first == "read" else "")
        kind = outcome.split(":")[0]
        counts[OUTCOMES.index(kind)] += 1
        struct.pack_into(f"<{len(OUTCOMES)}Q", shared, 8, *counts)
        if kind in ("exception", "memory", "missed"):
            with (folder / "failures.jsonl").open("a") as log:
                log.write(json.dumps([number, outcome]) + "\n")
    struct.pack_into("<Q", shared, 0, numbers.stop)


def start(task: object, *args: object) -> int:
    """Run ``task`` in a forked child; return its process id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = task(*args) or 0  # type: ignore[operator]
        finally:
            os._exit(status)
    return pid


def child(task: object, *args: object) -> int:
    """Run ``task`` in a forked child; return 0, its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(start(task, *args), 0)[1])


def trial(seed: _fuzz.Seed, data: bytes, sealed: bool, folder: Path) -> str:
    """The outcome of one input in a child of its own, ``crash:SIGNAL`` or ``hang`` included."""
    answer = folder / "answer"
    answer.unlink(missing_ok=True)

    def once() -> None:
        limit_memory()
        answer.write_text(capped(place(folder, data), seed, sealed))

    return name_status(child(once)) or (answer.read_text() if answer.exists() else "exception:no answer")


def name_status(status: int) -> str:
    """The failure that an exit status means, or nothing."""
    if status in (-signal.SIGPROF, -signal.SIGALRM):
        return "hang"
    return f"crash:{signal.Signals(-status).name}" if status < 0 else ""


def minimise(seed: _fuzz.Seed, data: bytes, sealed: bool, kind: str, folder: Path) -> bytes:
    """Take back changes of ``data`` as long as the outcome stays ``kind``."""
    if len(data) != len(seed.data) or kind == "hang":
        return data
    for _ in range(2):
        runs = _fuzz.difference(seed.data, data)
        size = max(1, len(runs) // 2)
        while size and len(runs) > 1:
            for at in range(0, len(runs), size):
                attempt = bytearray(data)
                for start, removed, _ in runs[at : at + size]:
                    attempt[start : start + removed] = seed.data[start : start + removed]
                if sealed:
                    _fuzz.reseal(seed, attempt)
                if attempt != seed.data and trial(seed, bytes(attempt), sealed, folder) == kind:
                    data = bytes(attempt)
            size //= 2
    return data


def keep(corpus: Path, seeds: list[_fuzz.Seed], number: int, kind: str, folder: Path) -> None:
    """Save a failing input to the corpus, unless its kind is known well enough."""
    slug = "".join(c if c.isalnum() else "-" for c in kind)
    size = sum(path.stat().st_size for path in corpus.glob("*.json"))
    if len(list(corpus.glob(f"{slug}-*.json"))) >= MAX_PER_KIND or size > MAX_CORPUS_BYTES:
        return
    seed, data, sealed = make_input(seeds, number)
    again = trial(seed, data, sealed, folder)
    if again == kind:
        data = minimise(seed, data, sealed, kind, folder)
    patch = _fuzz.difference(seed.data, data)
    entry = {"seed": seed.path.name, "was": kind, "alone": again, "sealed": sealed, "patch": patch}
    (corpus / f"{slug}-{number}.json").write_text(json.dumps(entry) + "\n")


def batch(seeds: list[_fuzz.Seed], numbers: range, workers: int, folder: Path) -> tuple[Counter[str], list[list[Any]]]:
    """Give ``numbers`` to ``workers`` children, and a new child what a dead one left.

    Returns:
        How often each outcome was seen, and (number, failure) of what was none of the accepted ones.
    """
    totals: Counter[str] = Counter()
    failures: list[list[Any]] = []
    running: dict[int, tuple[range, mmap.mmap, Path]] = {}

    def begin(left: range, own: Path) -> None:
        shared = mmap.mmap(-1, 4096)
        running[start(work, seeds, left, shared, own)] = left, shared, own

    for worker in range(workers):
        own = folder / str(worker)
        own.mkdir(exist_ok=True)
        begin(numbers[worker::workers], own)
    while running:
        pid, status = os.wait()
        left, shared, own = running.pop(pid)
        at, *counts = struct.unpack_from(f"<{1 + len(OUTCOMES)}Q", shared, 0)
        totals.update({name: n for name, n in zip(OUTCOMES, counts, strict=True) if n})
        if at != left.stop and at not in left:
            raise RuntimeError(f"a child ended with status {status} before its first input")
        if at in left:
            failures.append([at, name_status(os.waitstatus_to_exitcode(status)) or "exception:worker"])
            totals[failures[-1][1].split(":")[0]] += 1
            begin(left[left.index(at) + 1 :], own)
    for log in folder.glob("*/failures.jsonl"):
        failures += [json.loads(line) for line in log.read_text().splitlines()]
        log.unlink()
    return totals, failures


def run(args: argparse.Namespace, folder: Path) -> None:
    """Fuzz until the number of inputs or the time is reached."""
    counter = args.corpus / "COUNTER.json"
    state = json.loads(counter.read_text())
    section = state["sections"][-1]
    seeds = load_seeds(args.corpus)
    began, totals = time.monotonic(), Counter(section["outcomes"])
    earlier = {"seconds": section["seconds"], "cpu_seconds": section["cpu_seconds"]}
    first = state["inputs"]
    while state["inputs"] < args.inputs and time.monotonic() - began < args.seconds:
        at = section["first"] + section["inputs"]
        numbers = range(at, at + min(args.batch, args.inputs - state["inputs"]))
        found, failures = batch(seeds, numbers, args.workers, folder)
        totals += found
        for number, kind in failures:
            print(f"input {number}: {kind}", flush=True)
            keep(args.corpus, seeds, number, kind, folder)
        seconds, usage = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        section["inputs"] += len(numbers)
        state["inputs"] += len(numbers)
        section["seconds"] = round(earlier["seconds"] + seconds, 1)
        section["cpu_seconds"] = round(earlier["cpu_seconds"] + usage.ru_utime + usage.ru_stime, 1)
        section["outcomes"] = dict(sorted(totals.items()))
        counter.with_suffix(".tmp").write_text(json.dumps(state, indent=1) + "\n")
        counter.with_suffix(".tmp").replace(counter)
        rate = (state["inputs"] - first) / seconds
        print(f"{state['inputs']:,} inputs, {rate:.0f}/s: {section['outcomes']}", flush=True)


def main() -> None:
    """Read the command line and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="stop at this number in total")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--batch", type=int, default=BATCH, help="inputs between two notes in COUNTER.json")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--corpus", type=Path, default=ROOT / "tests" / "store" / "corpus")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        run(args, Path(folder))


if __name__ == "__main__":
    main()
