"""Fuzz the reader: mutated recordings are opened, read completely and verified, each under a time and a memory cap.

    python scripts/fuzz_reader.py [--inputs 1000000] [--seconds 3600] [--corpus tests/store/corpus] [--work /dev/shm]

Input number n is the same everywhere (seed recordings of the corpus, random numbers from n), so that a run goes on
where COUNTER.json says that the last one stopped. A forked child takes inputs until it dies: of a signal (a crash of
libhdf5 or of a filter), of the timer, or by an exception outside the family of DriftLens. Each such input is made as
small as possible and saved to the corpus as a patch of its seed; tests/store/test_fuzz.py replays them.
"""

from __future__ import annotations

import argparse
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.store import _fuzz  # noqa: E402

CPU_SECONDS = 2.0
WALL_SECONDS = 120
MEMORY = 512 << 20
GROWTH_KIB = 200 << 10
OUTCOMES = ("refused", "equal", "different", "missed", "exception", "memory")
BATCH = 5_000
MAX_PER_KIND = 4
MAX_CORPUS_BYTES = 2 << 20


def load_seeds(corpus: Path) -> list[_fuzz.Seed]:
    """The seed recordings of the corpus."""
    return [_fuzz.load_seed(path) for path in sorted((corpus / "seeds").glob("*.h5"))]


def make_input(seeds: list[_fuzz.Seed], number: int) -> tuple[_fuzz.Seed, bytes, bool]:
    """Input ``number``: its seed, its bytes, and whether its checksums were repaired."""
    rng = random.Random(number)
    seed = rng.choice(seeds)
    return seed, *_fuzz.mutate(seed, rng)


def limit_memory() -> None:
    """Allow this process ``MEMORY`` bytes of address space more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def capped(path: Path, seed: _fuzz.Seed, sealed: bool, read_first: bool = True) -> str:
    """Judge one file under the caps; returns an outcome, with details after a colon where it is a failure."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The default action of both signals ends the process even inside C code.
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.alarm(WALL_SECONDS)
    try:
        outcome = _fuzz.judge(path, seed, read_first=read_first)
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
    return "exception:silent" if outcome == "different" and not sealed else outcome


def place(folder: Path, data: bytes) -> Path:
    """Write ``data`` under a name of its own: libhdf5 shares what it knows about an open file by inode."""
    path = folder / "input.h5"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def work(seeds: list[_fuzz.Seed], start: int, stop: int, shared: mmap.mmap, folder: Path, failures: Path) -> None:
    """Take inputs until one is fatal: the child of `run`."""
    limit_memory()
    counts = [0] * len(OUTCOMES)
    for number in range(start, stop):
        struct.pack_into("<Q", shared, 0, number)
        seed, data, sealed = make_input(seeds, number)
        outcome = capped(place(folder, data), seed, sealed, read_first=number % 8 == 0)
        kind = outcome.split(":")[0]
        counts[OUTCOMES.index(kind)] += 1
        struct.pack_into(f"<{len(OUTCOMES)}Q", shared, 8, *counts)
        if kind in ("exception", "memory", "missed"):
            with failures.open("a") as log:
                log.write(json.dumps([number, outcome]) + "\n")
    struct.pack_into("<Q", shared, 0, stop)


def child(task: object, *args: object) -> int:
    """Run ``task`` in a forked child; return 0, its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = task(*args) or 0  # type: ignore[operator]
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


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


def run(args: argparse.Namespace, folder: Path) -> None:
    """Fuzz until the number of inputs or the time is reached."""
    counter = args.corpus / "COUNTER.json"
    state = json.loads(counter.read_text()) if counter.exists() else {"inputs": 0, "seconds": 0.0, "outcomes": {}}
    seeds = load_seeds(args.corpus)
    began, first = time.monotonic(), state["inputs"]
    earlier = state["seconds"]
    totals = Counter(state["outcomes"])
    failures = folder / "failures.jsonl"
    while state["inputs"] < args.inputs and time.monotonic() - began < args.seconds:
        shared = mmap.mmap(-1, 4096)
        start = state["inputs"]
        stop = min(start + args.batch, args.inputs)
        failures.unlink(missing_ok=True)
        fatal = name_status(child(work, seeds, start, stop, shared, folder, failures))
        at, *counts = struct.unpack_from(f"<{1 + len(OUTCOMES)}Q", shared, 0)
        totals.update({name: n for name, n in zip(OUTCOMES, counts, strict=True) if n})
        found = [json.loads(line) for line in failures.read_text().splitlines()] if failures.exists() else []
        if at < stop:
            found.append([at, fatal or "exception:worker"])
            totals[found[-1][1].split(":")[0]] += 1
        for number, kind in found:
            keep(args.corpus, seeds, number, kind, folder)
        state["inputs"] = min(at + 1, stop)
        state["seconds"] = round(earlier + time.monotonic() - began, 1)
        state["outcomes"] = dict(sorted(totals.items()))
        counter.with_suffix(".tmp").write_text(json.dumps(state, indent=1) + "\n")
        counter.with_suffix(".tmp").replace(counter)
        rate = (state["inputs"] - first) / (time.monotonic() - began)
        print(f"{state['inputs']:,} inputs, {rate:.0f}/s: {state['outcomes']}", flush=True)


def main() -> None:
    """Read the command line and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="stop at this number in total")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--batch", type=int, default=BATCH, help="inputs per child")
    parser.add_argument("--corpus", type=Path, default=ROOT / "tests" / "store" / "corpus")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        run(args, Path(folder))


if __name__ == "__main__":
    main()
