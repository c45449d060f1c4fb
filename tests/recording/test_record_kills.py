"""A few of the kills of `scripts/kill_recording.py`, whose table of 200 is docs/results/kills.csv."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = "what,kill,round,moment,before,after,leftovers,lost,different,files,datasets\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_recordings_lose_nothing_and_resume_to_the_same_bytes(tmp_path: Path) -> None:
    table = tmp_path / "kills.csv"
    table.write_text(HEAD + "kill,1,1,after 5 ms,0,0,0,0,0,,\n")  # the script goes on where it was stopped
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "kill_recording.py"), "--kills", "4", "--out", str(table)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    rows = list(csv.DictReader(table.open(newline="")))
    kills = [row for row in rows if row["what"] == "kill"]
    assert [int(row["kill"]) for row in kills] == list(range(1, 5))
    assert {row["round"] for row in kills[1:]} != {"1"}, "a stopped campaign begins a new run"
    assert any(row["moment"].startswith("before file event") for row in kills)
    assert all((row["lost"], row["different"]) == ("0", "0") for row in rows)
    assert rows[-1]["what"] == "end"
    assert int(rows[-1]["datasets"]) > 300


def test_the_table_of_200_kills_shows_no_loss() -> None:
    rows = list(csv.DictReader((ROOT / "docs" / "results" / "kills.csv").open(newline="")))
    kills, ends = ([row for row in rows if row["what"] == what] for what in ("kill", "end"))
    assert len(kills) == 200
    assert len(ends) > 10
    assert all((row["lost"], row["different"]) == ("0", "0") for row in rows)
    hit = [row for row in kills if int(row["after"]) < 5]
    assert len(hit) > 150, "most kills struck before the run was recorded"
    assert any(int(row["leftovers"]) for row in kills), "some struck while a file was being written"
