import shutil
from pathlib import Path

import pytest

from driftlens.analysis import Run, open_run
from tests.analysis.synthetic import make_run


@pytest.fixture(scope="session")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three tasks that no test may change; its analysis is cached on first use."""
    return make_run(tmp_path_factory.mktemp("analysis") / "moe", sites=3, samples=4, tokens_per_sample=3)


@pytest.fixture(scope="session")
def run(master: Path) -> Run:
    return open_run(master)


@pytest.fixture
def copy(master: Path, run: Run, tmp_path: Path) -> Path:
    """A run of its own for a test that changes files; the analysis is there already."""
    assert run.drift is not None
    return Path(shutil.copytree(master, tmp_path / "copy"))
