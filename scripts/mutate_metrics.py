"""Mutation testing of driftlens/metrics: change the code in small ways and see whether a test of tests/metrics notices.

mutmut makes the mutants; this script runs them. All tests are collected once in one process. A first pass, without a
mutant, notes which functions every test calls and how long it takes. Every mutant then meets the tests that call its
function, quickest first, until one fails: killed. Mutants run in forked children, some dozens in one. Before a failure
counts, the same test must pass again without the mutant; if it does not, the mutant has broken something for others
and starts again in a new child. A mutant that uses 20 times the time of its tests (and at least 20 s of CPU time) is a
timeout, which counts as killed. Hypothesis tests draw fewer examples, always the same ones. The checkout is not
touched: everything happens in a copy.

docs/results/mutants.csv holds one row per survivor. Reasons written there are kept for mutants that survive again; the
script names the survivors without one and then exits with 1. docs/results/mutants.md holds the counts by module.

    pip install mutmut==3.8.1
    python scripts/mutate_metrics.py [--work DIR] [--jobs 2] [--again] [module ...]
"""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children are forked, which threads do not survive
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["MUTANT_UNDER_TEST"] = ""

import mutmut.mutation.trampoline as trampoline
import pytest
from _pytest.outcomes import Skipped
from _pytest.warnings import catch_warnings_for_item
from hypothesis import HealthCheck, Phase, settings
from mutmut.mutation.file_mutation import mutate_file_contents

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("__init__", "definitions", "weight_definitions", "further_definitions", "shapes", "undefined")
"""Modules of names, texts and types, without functions that mutmut changes."""
NOT_COPIED = ("test_metrics_docs.py",)
"""Compares committed pages with what a script makes."""
EXAMPLES = 10
BATCH = 40
KILLED, SURVIVED, REDO = b"k", b"s", b"r"
FIELDS = ("module", "function", "mutation", "reason")


@dataclass(frozen=True)
class Mutant:
    """One change of one function."""

    module: str
    function: str
    mutation: str
    name: str  # what the trampolines listen to
    called: str  # what they report when the function is called
    source: str  # the function without the change

    @property
    def row(self) -> tuple[str, str, str]:
        """What the table knows it by."""
        return self.module, self.function, self.mutation


def main() -> int:
    """Run the mutants of the modules named, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="modules of driftlens.metrics; all if left out")
    parser.add_argument("--work", type=Path, help="folder of the copy, kept; a temporary one if left out")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tests", nargs="+", default=["tests/metrics"], help="files of tests; all if left out")
    parser.add_argument("--again", action="store_true", help="leave out what an earlier run in --work killed")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results")
    options = parser.parse_args()
    options.out = options.out.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        mutants = prepare(work, options.modules)
        plugin = Mutator(mutants, options.jobs, work, known(work) if options.again else {})
        sys.path.insert(0, str(work))
        pytest.main(
            [*options.tests, "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist"], plugins=[plugin]
        )
    if len(plugin.status) < len(mutants):
        print(f"{len(mutants) - len(plugin.status)} mutants were not run; the tables are left as they are.")
        return 1
    return report(mutants, plugin.status, options.out)


def prepare(work: Path, modules: list[str]) -> list[Mutant]:
    """Copy code and tests into ``work`` and put all mutants of every module beside the function itself."""
    for part in ("driftlens", "tests/metrics"):
        shutil.rmtree(work / part, ignore_errors=True)
        shutil.copytree(ROOT / part, work / part, ignore=shutil.ignore_patterns("__pycache__", *NOT_COPIED))
    shutil.copy(ROOT / "tests/__init__.py", work / "tests")
    settings_of_mutmut = '\n[tool.mutmut]\nsource_paths = ["driftlens"]\n'
    (work / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + settings_of_mutmut)
    os.chdir(work)  # where mutmut looks for them
    mutants: list[Mutant] = []
    for path in sorted((work / "driftlens/metrics").glob("*.py")):
        if path.stem not in TABLES and (not modules or path.stem in modules):
            mutants += _mutated(path)
    return mutants


def _mutated(path: Path) -> list[Mutant]:
    made = mutate_file_contents(str(path), path.read_text())
    path.write_text(made.code)
    lines = made.code.splitlines()

    def source(name: str) -> list[str]:
        span = made.line_span_by_function_name[name]
        return [line.replace(name, "f", 1) for line in lines[span.start - 1 : span.end]]

    mutants = []
    for name in made.mutant_names:
        mangled = name.partition("__mutmut_")[0]
        original = source(mangled + "__mutmut_orig")
        mutants.append(
            Mutant(
                module=path.stem,
                function=mangled.removeprefix("x_").removeprefix("xǁ").replace("ǁ", "."),
                mutation=_difference(original, source(name)),
                name=f"driftlens.metrics.{path.stem}.{name}",
                called=f"driftlens.metrics.{path.stem}.{mangled}",
                source="\n".join(original),
            )
        )
    return mutants


def _difference(before: list[str], after: list[str]) -> str:
    changed = [line for line in difflib.ndiff(before, after) if line[:1] in "-+"]
    sides = [" ".join(line[2:].split("  #")[0].strip() for line in changed if line[0] == sign) for sign in "-+"]
    return " => ".join(sides)


class Mutator:
    """Pytest plugin that replaces the loop over tests by one over mutants."""

    def __init__(self, mutants: list[Mutant], jobs: int, work: Path, killed: dict[str, str]) -> None:
        self.mutants, self.jobs, self.work, self.killed = mutants, jobs, work, killed
        self.status: dict[Mutant, str] = {}
        self.seconds: dict[Any, float] = {}
        self.tests: defaultdict[str, list[Any]] = defaultdict(list)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Fewer examples, the same in every child, and no search for smaller ones."""
        for item in items:
            given = getattr(item.obj, "_hypothesis_internal_use_settings", None)
            if given is not None:
                item.obj._hypothesis_internal_use_settings = settings(
                    given,
                    max_examples=min(given.max_examples, EXAMPLES),
                    derandomize=True,
                    database=None,
                    deadline=None,
                    phases=(Phase.explicit, Phase.generate),
                    suppress_health_check=list(HealthCheck),
                )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Note what every test calls, then run the mutants."""
        if session.testsfailed:
            raise session.Interrupted("tests that cannot be collected")
        self._observe(session.items)
        waiting = []
        for mutant in self.mutants:
            verdict = self.killed.get(_identity(mutant))
            if not self.tests[mutant.called]:
                self.status[mutant] = "no tests"
            elif verdict in ("killed", "timeout"):
                self.status[mutant] = verdict
            else:
                waiting.append(mutant)
        running: dict[int, tuple[int, list[Mutant]]] = {}
        start = time.monotonic()
        while waiting or running:
            while waiting and len(running) < self.jobs:
                batch, waiting = waiting[:BATCH], waiting[BATCH:]
                pid, pipe = self._start(batch)
                running[pid] = pipe, batch
            waiting = self._wait(running) + waiting
            remember(self.work, self.status)
            print(f"{len(self.status)}/{len(self.mutants)} {dict(Counter(self.status.values()))} "
                  f"{time.monotonic() - start:.0f} s", file=sys.__stderr__, flush=True)  # fmt: skip
        return True

    def _observe(self, items: Iterable[Any]) -> None:
        called: set[str] = set()
        trampoline.record_trampoline_hit = lambda name, caller=None: called.add(name)
        os.environ["MUTANT_UNDER_TEST"] = "stats"
        for item in items:
            called.clear()
            before = time.process_time()
            if not _passes(item):
                print(f"left out, fails without a mutant: {item.nodeid}", file=sys.__stderr__, flush=True)
                continue
            self.seconds[item] = time.process_time() - before
            for name in called:
                self.tests[name].append(item)
        os.environ["MUTANT_UNDER_TEST"] = ""
        for tests in self.tests.values():
            tests.sort(key=self.seconds.__getitem__)

    def _start(self, batch: list[Mutant]) -> tuple[int, int]:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writing)
            return pid, reading
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the child
        for mutant in batch:
            limit = 20 + 20 * sum(self.seconds[item] for item in self.tests[mutant.called])
            signal.setitimer(signal.ITIMER_PROF, limit)
            verdict = self._verdict(mutant)
            os.write(writing, verdict)
            if verdict == REDO:
                break
        os._exit(0)

    def _verdict(self, mutant: Mutant) -> bytes:
        for item in self.tests[mutant.called]:
            os.environ["MUTANT_UNDER_TEST"] = mutant.name
            passed = _passes(item)
            os.environ["MUTANT_UNDER_TEST"] = ""
            if not passed:
                return KILLED if _passes(item) else REDO
        return SURVIVED

    def _wait(self, running: dict[int, tuple[int, list[Mutant]]]) -> list[Mutant]:
        """Take what a child found out and return the mutants that it did not come to."""
        pid, status = os.wait()
        pipe, batch = running.pop(pid)
        with os.fdopen(pipe, "rb") as file:
            found = file.read()
        for mutant, verdict in zip(batch, found, strict=False):
            if verdict != REDO[0]:
                self.status[mutant] = "killed" if verdict == KILLED[0] else "survived"
        left = batch[len(found.rstrip(REDO)) :]
        code = os.waitstatus_to_exitcode(status)
        if left and (code or found == REDO):  # the first one ended the child, or breaks tests for good
            self.status[left.pop(0)] = "timeout" if code == -signal.SIGPROF else "killed"
        return left


def _passes(item: Any) -> bool:
    """Run one test without writing a report, which takes longer than most tests."""
    item._initrequest()
    state = item.session._setupstate
    try:
        with catch_warnings_for_item(item.config, item.ihook, "runtest", item):
            try:
                state.setup(item)
                item.runtest()
            finally:
                state.teardown_exact(None)
    except Skipped:
        return True
    except BaseException:  # an assertion, pytest.fail, or whatever else the mutant does
        return False
    finally:
        item._request, item.funcargs = False, None
    return True


def _identity(mutant: Mutant) -> str:
    return json.dumps([*mutant.row, mutant.source])


def known(work: Path) -> dict[str, str]:
    """Verdicts of earlier runs in ``work`` on functions as they are now."""
    path = work / "verdicts.json"
    return json.loads(path.read_text()) if path.exists() else {}


def remember(work: Path, status: dict[Mutant, str]) -> None:
    """Add the verdicts of this run."""
    verdicts = known(work) | {_identity(mutant): verdict for mutant, verdict in status.items()}
    (work / "verdicts.json").write_text(json.dumps(verdicts))


def report(mutants: list[Mutant], status: dict[Mutant, str], out: Path) -> int:
    """Write both tables; survivors of modules that were not run stay in theirs."""
    modules = list(dict.fromkeys(mutant.module for mutant in mutants))
    table, counts = out / "mutants.csv", out / "mutants.md"
    old = list(csv.DictReader(table.open())) if table.exists() else []
    reasons = {(row["module"], row["function"], row["mutation"]): row["reason"] for row in old}
    rows = [tuple(row[name] for name in FIELDS) for row in old if row["module"] not in modules]
    found = [mutant for mutant in mutants if status[mutant] in ("survived", "no tests")]
    rows += [(*mutant.row, reasons.get(mutant.row, "")) for mutant in found]
    with table.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([FIELDS, *sorted(rows)])
    lines = (
        {line.split("|")[1].strip(): line for line in counts.read_text().splitlines()[2:]} if counts.exists() else {}
    )
    lines |= {name: _line(name, [status[mutant] for mutant in mutants if mutant.module == name]) for name in modules}
    lines.pop("all", None)
    cells = [[int(cell) for cell in line.split("|")[2:6]] for line in lines.values()]
    lines["all"] = _cells("all", [sum(column) for column in zip(*cells, strict=True)])
    head = "| module | mutants | killed | timeouts | survivors | share |\n|---|---|---|---|---|---|\n"
    counts.write_text(head + "\n".join(lines[name] for name in [*sorted(set(lines) - {"all"}), "all"]) + "\n")
    print(counts.read_text())
    without = [row for row in rows if not row[3]]
    for row in without:
        print("without a reason:", *row[:3], sep="\n    ")
    return int(bool(without))


def _line(name: str, verdicts: list[str]) -> str:
    count = Counter(verdicts)
    return _cells(name, [len(verdicts), count["killed"], count["timeout"], count["survived"] + count["no tests"]])


def _cells(name: str, numbers: list[int]) -> str:
    return f"| {name} | {' | '.join(map(str, numbers))} | {100 * numbers[3] / max(numbers[0], 1):.1f} % |"


if __name__ == "__main__":
    sys.exit(main())
