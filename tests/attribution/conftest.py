from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from driftlens.attribution.ledger import AnswerBatches
from driftlens.attribution.pairs import LoadedPair
from tests.attribution.support import loaded_pair, save_pair, toy_samples


@pytest.fixture(scope="module", params=["softmax", "topk", "energy"])
def gate(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, gate: str) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp(gate), gate, top_k=2)


@pytest.fixture(scope="module")
def pair(folders: tuple[Path, Path]) -> Iterator[LoadedPair]:
    loaded = loaded_pair(folders)
    yield loaded
    loaded.unload()


@pytest.fixture(scope="module")
def batches(pair: LoadedPair) -> AnswerBatches:
    return AnswerBatches(pair, toy_samples(), batch_size=4)
