"""Exchanged sites against models whose weights were really overwritten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from driftlens.attribution.intervene import Switchboard
from driftlens.attribution.ledger import AnswerBatches
from driftlens.attribution.pairs import LoadedPair, load_pair
from driftlens.backbones import load_backbone
from driftlens.errors import ConfigError, SiteError
from driftlens.recording.checkpoints import load_checkpoint
from tests.attribution.support import save_pair, save_plain_pair, sites_of, toy_samples


class Alone(LoadedPair):
    """One checkpoint, loaded by PEFT alone, to be asked for losses."""

    def __init__(self, folder: Path, like: LoadedPair) -> None:
        super().__init__(load_checkpoint(folder, "tiny-random"), like.reference, like.pairs)


def losses(folder: Path, like: LoadedPair) -> np.ndarray:
    alone = Alone(folder, like)
    # the cached prefix looks for the pair's own modules, which are not these
    return AnswerBatches(alone, toy_samples(), batch_size=4, prefix_cache=False).nll()


def mixed(router: Path, experts: Path, like: LoadedPair, names: set[str] | None = None) -> np.ndarray:
    """Losses of ``experts`` with the router weights of ``router`` copied in (all sites, or those named)."""
    alone, donor = Alone(experts, like), load_checkpoint(router, "tiny-random")
    donors = sites_of(donor.model)
    with torch.no_grad():
        for name, site in sites_of(alone.model).items():
            if names is None or name in names:
                site.moe_lora_gate["default"].weight.copy_(donors[name].moe_lora_gate["default"].weight)
    return AnswerBatches(alone, toy_samples(), batch_size=4, prefix_cache=False).nll()


def test_nothing_swapped_is_the_current_model_bit_for_bit(pair: LoadedPair, batches: AnswerBatches) -> None:
    before = batches.nll()
    with Switchboard(pair):
        np.testing.assert_array_equal(batches.nll(), before)
    np.testing.assert_array_equal(batches.nll(), before)


def test_current_and_anchor_equal_the_checkpoints_loaded_alone(
    pair: LoadedPair, batches: AnswerBatches, folders: tuple[Path, Path]
) -> None:
    np.testing.assert_allclose(batches.nll(), losses(folders[1], pair), atol=2e-5)
    with Switchboard(pair) as board:
        board.swap(True, True)
        swapped = batches.nll()
    np.testing.assert_allclose(swapped, losses(folders[0], pair), atol=2e-5)
    with pair.anchor_alone():
        alone = batches.nll()
    np.testing.assert_allclose(swapped, alone, atol=2e-5)
    assert np.abs(swapped - batches.nll()).max() > 1e-3, "the two checkpoints must differ for this test to say anything"


def test_the_cached_prefix_changes_nothing(pair: LoadedPair, batches: AnswerBatches) -> None:
    assert batches.prefix is not None
    assert batches.prefix.depth == 2
    whole = AnswerBatches(pair, toy_samples(), batch_size=4, prefix_cache=False)
    np.testing.assert_allclose(whole.nll(), batches.nll(), atol=1e-5)


@pytest.mark.parametrize("gate", ["softmax", "topk"], indirect=True)
def test_router_and_experts_are_exchanged_as_if_weights_were_copied(
    pair: LoadedPair, batches: AnswerBatches, folders: tuple[Path, Path]
) -> None:
    anchor, current = folders
    with Switchboard(pair) as board:
        board.swap(True, False)
        np.testing.assert_allclose(batches.nll(), mixed(anchor, current, pair), atol=2e-5)
        board.swap(False, True)
        np.testing.assert_allclose(batches.nll(), mixed(current, anchor, pair), atol=2e-5)
        chosen = np.zeros(len(pair.pairs), dtype=bool)
        chosen[[0, 3]] = True
        names = {pair.pairs[i].info.name for i in (0, 3)}
        board.swap(chosen, False)
        np.testing.assert_allclose(batches.nll(), mixed(anchor, current, pair, names), atol=2e-5)


@pytest.mark.parametrize("gate", ["energy"], indirect=True)
def test_the_old_router_of_a_self_routed_site_is_computed_from_the_old_A(pair: LoadedPair) -> None:
    site = pair.pairs[0]
    h = torch.randn(7, site.info.d_in, generator=torch.Generator().manual_seed(0))
    answers = site.answers(h)
    layer = site.current.module
    for name, gate, z in (("reference", answers.gate0, answers.z0), ("default", answers.gate1, answers.z1)):
        a = layer.moe_lora_A[name].weight.reshape(3, 4, -1)
        activations = torch.einsum("erd,nd->ner", a, h)
        torch.testing.assert_close(z, activations)
        torch.testing.assert_close(gate, torch.softmax(activations.square().mean(dim=-1), dim=-1))


def test_the_path_runs_from_the_anchor_to_the_current_checkpoint(pair: LoadedPair, batches: AnswerBatches) -> None:
    with Switchboard(pair) as board:
        board.swap(True, True)
        anchor = batches.nll()
        board.path(0.0)
        np.testing.assert_allclose(batches.nll(), anchor, atol=2e-5)
        board.path(1.0)
        at_end = batches.nll()
    np.testing.assert_allclose(at_end, batches.nll(), atol=2e-5)


def test_no_hook_is_left_after_success_and_after_an_error(pair: LoadedPair, batches: AnswerBatches) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pair.model.modules())

    before = hooks()
    with Switchboard(pair) as board:
        board.path(0.5)
        batches.nll()
        assert hooks() > before
    assert hooks() == before
    with pytest.raises(KeyboardInterrupt), Switchboard(pair):
        raise KeyboardInterrupt
    assert hooks() == before


def test_plain_lora_is_exchanged_whole(tmp_path: Path) -> None:
    paths = save_plain_pair(tmp_path)
    pair = load_pair(*paths, base="tiny-random")
    batches = AnswerBatches(pair, toy_samples(), batch_size=4)
    with Switchboard(pair) as board:
        board.swap(True, True)
        swapped = batches.nll()
        board.swap(True, False)  # there is no router to exchange
        np.testing.assert_allclose(batches.nll(), losses(paths[1], pair), atol=2e-5)
    np.testing.assert_allclose(swapped, losses(paths[0], pair), atol=2e-5)


def test_a_site_and_an_expert_that_did_not_exist_give_nothing_at_the_anchor(tmp_path: Path) -> None:
    before = save_pair(tmp_path / "few", num_experts=2, layers_to_transform=[3])[0]
    after = save_pair(tmp_path / "many")[1]
    pair = load_pair(before, after, base="tiny-random")
    assert [site.anchor is None for site in pair.pairs] == [True] * 3 + [False] * 3
    batches = AnswerBatches(pair, toy_samples(), batch_size=4)
    with Switchboard(pair) as board:
        board.swap(True, True)
        swapped = batches.nll()
    np.testing.assert_allclose(swapped, losses(before, pair), atol=2e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"use_dora": True}, "DoraLinearVariant rescales"), ({"lora_bias": True}, "lora_bias")],
)
def test_what_is_no_sum_of_experts_is_refused_by_name(tmp_path: Path, options: dict[str, bool], words: str) -> None:
    paths = save_plain_pair(tmp_path, **options)
    with pytest.raises(SiteError, match=words):
        load_pair(*paths, base="tiny-random")


def test_a_failed_pair_leaves_the_base_model_free(tmp_path: Path) -> None:
    paths = save_plain_pair(tmp_path, lora_bias=True)
    backbone = load_backbone("tiny-random")
    with pytest.raises(SiteError):
        load_pair(*paths, backbone=backbone)
    assert not isinstance(backbone.model, PeftModel)
    assert not any("lora" in name for name, _ in backbone.model.named_parameters())


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a whole model"):
        load_pair(tmp_path, tmp_path)
