"""Small synthetic runs, measured once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from driftlens.analysis import Run, open_run
from tests.analysis.synthetic import make_run

HOSTILE = ("<b>bold<i>", '<img src=x onerror="alert(1)">', "%{x} $a$ & =1+1")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("figures")


@pytest.fixture(scope="session")
def run(folder: Path) -> Run:
    return open_run(make_run(folder / "plain"))


@pytest.fixture(scope="session")
def lone(folder: Path) -> Run:
    return open_run(make_run(folder / "lone", tasks=("digit",), sites=1, num_experts=1))


@pytest.fixture(scope="session")
def uniform(folder: Path) -> Run:
    return open_run(make_run(folder / "uniform", sites=2, gate="uniform"))


@pytest.fixture(scope="session")
def hostile(folder: Path) -> Run:
    return open_run(make_run(folder / "hostile", tasks=HOSTILE, sites=2))


@pytest.fixture
def changed() -> Callable[..., Any]:
    """Return a stand-in for a run in which some tables are replaced."""

    def change(run: Run, **tables: Any) -> Any:
        names = ("scores", "drift", "codrift", "summary", "stream")
        return SimpleNamespace(**{name: tables.get(name, getattr(run, name)) for name in names})

    return change
