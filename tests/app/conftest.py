"""A folder of small synthetic runs, good and bad, for the page to open."""

from __future__ import annotations

from pathlib import Path

import pytest

from driftlens.analysis import open_run
from tests.analysis.synthetic import make_run

MAIN = Path(__file__).resolve().parents[2] / "app" / "main.py"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sound runs of one stream, one with a damaged recording, one without recordings, one that is no run."""
    folder = tmp_path_factory.mktemp("runs")
    for name, method, drift in (("a-pass", "pass-moe", 0.2), ("b-moe", "moe-lora", 0.6)):
        run = make_run(folder / name, sites=3, samples=4, tokens_per_sample=3, method=method, drift=drift)
        _ = open_run(run).drift  # measured here once, so that the page opens on the cache
    damaged = make_run(folder / "c-damaged", sites=2, samples=4, tokens_per_sample=3)
    file = damaged / "recordings" / "02-colour.h5"
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    file.write_bytes(content)
    make_run(folder / "d-unrecorded", recordings=False)
    broken = make_run(folder / "e-broken", recordings=False)
    (broken / "manifest.json").write_text('{"schema": 1, "files": {')
    return folder
