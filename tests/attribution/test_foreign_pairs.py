"""Folders of CoIN, MCITlib and Prism: exchanged as a whole, and booked by their own forward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from driftlens.attribution.intervene import Switchboard
from driftlens.attribution.ledger import AnswerBatches, _panel
from driftlens.attribution.pairs import LoadedPair, load_pair
from driftlens.backbones import Backbone, Encoded
from driftlens.errors import SiteError
from driftlens.recording import load_checkpoint
from tests.recording.foreign.folders import BASES, LAYOUTS, write

BY_TOKEN = ["CoIN MoELoRA", "MCITlib MoELoRA", "MCITlib CL-MoE", "MCITlib O-LoRA", "Prism moelora"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def backbone() -> Backbone:
    return Backbone("LLaMA", "0" * 64, BASES["LLaMA"](), None)  # type: ignore[arg-type]


def samples() -> list[Encoded]:
    rng = np.random.default_rng(0)
    return [
        Encoded(str(i), rng.integers(3, 60, n), np.repeat(np.array([1, 2], np.uint8), [n - 3, 3]), n - 3, None)
        for i, n in enumerate((8, 11, 9))
    ]


def losses(folder: Path, like: LoadedPair) -> np.ndarray:
    alone = LoadedPair(load_checkpoint(folder, backbone=backbone()), like.reference, like.pairs)
    return AnswerBatches(alone, samples(), prefix_cache=False).nll()


@pytest.mark.parametrize("name", BY_TOKEN)
def test_foreign_checkpoints_are_exchanged_and_booked(name: str, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        write(folder, LAYOUTS[name], seed=seed)
    pair = load_pair(*folders, backbone=backbone())
    batches = AnswerBatches(pair, samples(), batch_size=2)
    assert not pair.runs_anchor
    with Switchboard(pair) as board:
        np.testing.assert_allclose(batches.nll(), losses(folders[1], pair), atol=2e-5)
        board.swap(True, True)
        np.testing.assert_allclose(batches.nll(), losses(folders[0], pair), atol=2e-5)
        # The ledger at one point of the path is the derivative of the loss along it.
        step, ends = 5e-4, []
        for alpha in (0.5 - step, 0.5 + step):
            board.path(alpha)
            ends.append(batches.nll().mean())
        booked = _panel(pair, board, batches, (0.5 - 1e-9, 0.5 + 1e-9), 1, lambda: None).entries
        slope = float(booked.sum()) / len(batches.samples) / 2e-9
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / (2 * step), rtol=0.02, atol=2e-3)
    assert abs(slope) > 0.01


def test_gates_that_are_not_a_function_of_the_token_are_refused(tmp_path: Path) -> None:
    for seed, name in enumerate(("first", "second")):
        write(tmp_path / name, LAYOUTS["Prism SAME"], seed=seed)
    with pytest.raises(SiteError, match="does not follow from the site's input alone"):
        load_pair(tmp_path / "first", tmp_path / "second", backbone=backbone())
