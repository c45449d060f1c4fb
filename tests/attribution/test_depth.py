"""Restores of single sites, and Shapley values by depth, against models whose weights were exchanged by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from driftlens.attribution.depth import (
    RESTORED,
    DepthShapley,
    Restores,
    depth_players,
    depth_shapley,
    most_evaluations,
    single_restores,
)
from driftlens.attribution.intervene import Switchboard
from driftlens.attribution.ledger import AnswerBatches
from driftlens.attribution.pairs import LoadedPair
from driftlens.errors import ConfigError
from driftlens.recording.checkpoints import load_checkpoint
from driftlens.training.evaluate import TaskScorer
from tests.attribution.support import loaded_pair, save_pair, save_plain_pair, toy_samples


@pytest.fixture(scope="module")
def restores(pair: LoadedPair, batches: AnswerBatches) -> Restores:
    return single_restores(pair, batches)


@pytest.fixture(scope="module")
def shares(pair: LoadedPair, batches: AnswerBatches) -> DepthShapley:
    return depth_shapley(pair, batches, groups=2, permutations=4)


def overwritten(folders: tuple[Path, Path], site: str, kinds: tuple[str, ...]) -> np.ndarray:
    """NLL of a plain model into whose state the anchor's tensors of one site were copied; whole forwards, no cache."""
    plain = load_checkpoint(folders[1], "tiny-random")
    old = load_file(folders[0] / "adapter_model.safetensors")
    taken = {k: v for k, v in old.items() if site in k and any(kind in k for kind in kinds)}
    assert taken
    state = plain.model.state_dict()
    for key, value in taken.items():
        head, _, last = key.rpartition(".")
        state[f"{head}.default.{last}"].copy_(value)
    scorer = TaskScorer(
        toy_samples(), plain.backbone.encoder, prefix=None, batch_size=4, max_new_tokens=1, device=torch.device("cpu")
    )
    return np.array([outcome.nll for outcome in scorer.score(plain.model)])


def test_restores_equal_models_whose_weights_were_overwritten(
    restores: Restores, folders: tuple[Path, Path], gate: str
) -> None:
    kinds = {"both": ("moe_lora_",), "experts": ("moe_lora_A", "moe_lora_B"), "router": ("moe_lora_gate",)}
    for number in (0, len(restores.sites) - 2):
        site = restores.sites[number]
        for part in RESTORED if gate != "energy" else ("both",):  # an energy gate has no tensors of its own
            expected = overwritten(folders, site, kinds[part])
            found = restores.nll[number, RESTORED.index(part)]
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=f"{site} {part}")
            assert np.abs(expected - restores.nll_current).max() > 1e-4


def test_restores_change_one_site_and_count_their_runs(
    restores: Restores, pair: LoadedPair, batches: AnswerBatches
) -> None:
    sites = len(pair.pairs)
    assert restores.sites == tuple(p.info.name for p in pair.pairs)
    assert restores.nll.shape == (sites, 3, len(batches.samples))
    assert restores.evaluations == 3 * sites + 1
    np.testing.assert_array_equal(restores.nll_current, batches.nll())
    np.testing.assert_array_equal(restores.gain, restores.nll_current - restores.nll)
    assert len({row.tobytes() for row in restores.nll.reshape(-1, len(batches.samples))}) == 3 * sites
    # chosen sites alone give the same rows
    few = single_restores(pair, batches, sites=[sites - 1, 0])
    np.testing.assert_array_equal(few.nll, restores.nll[[sites - 1, 0]])
    assert few.sites == (restores.sites[-1], restores.sites[0])


@pytest.mark.parametrize("site", [-1, 99])
def test_a_site_that_does_not_exist_is_refused(pair: LoadedPair, batches: AnswerBatches, site: int) -> None:
    with pytest.raises(ConfigError, match=f"no site number {site}: the model has {len(pair.pairs)}"):
        single_restores(pair, batches, sites=[site])


def test_shapley_parts_of_every_sample_sum_to_its_loss(
    shares: DepthShapley, pair: LoadedPair, batches: AnswerBatches
) -> None:
    lost = shares.nll_current - shares.nll_anchor
    np.testing.assert_allclose(shares.value.sum(axis=0), lost, atol=1e-12)
    np.testing.assert_array_equal(shares.nll_current, batches.nll())
    with pair.anchor_alone():
        np.testing.assert_allclose(shares.nll_anchor, batches.nll(), atol=1e-5)
    assert np.abs(shares.value.mean(axis=1)).min() > 1e-5
    assert shares.value.shape == (4, len(batches.samples))
    assert shares.error.shape == (4,)
    assert (shares.error >= 0).all()
    assert shares.evaluations <= most_evaluations(4, 4)


def test_shapley_converges_to_the_definition(pair: LoadedPair, batches: AnswerBatches) -> None:
    players = depth_players(pair.pairs, 2)
    value = {}
    with Switchboard(pair) as board:
        for members in itertools.chain.from_iterable(itertools.combinations(range(4), k) for k in range(5)):
            masks = np.zeros((2, len(pair.pairs)), bool)
            for player in members:
                masks[("router", "experts").index(players[player].part), list(players[player].sites)] = True
            board.swap(masks[0], masks[1])
            value[frozenset(members)] = -batches.nll().mean()
    exact = np.zeros(4)
    for player in range(4):
        for members in value:
            if player not in members:
                weight = math.factorial(len(members)) * math.factorial(3 - len(members)) / math.factorial(4)
                exact[player] += weight * (value[members | {player}] - value[members])
    found = depth_shapley(pair, batches, groups=2, permutations=200, seed=5)
    np.testing.assert_allclose(found.value.mean(axis=1), exact, atol=4 * found.error.max() + 1e-9)
    assert found.error.max() < 0.1 * np.abs(exact).max()
    assert found.evaluations == most_evaluations(4, 200) == 16  # every coalition once


def test_shapley_is_seeded_and_one_group_is_the_swap(pair: LoadedPair, batches: AnswerBatches) -> None:
    again, other = (depth_shapley(pair, batches, permutations=2, seed=seed) for seed in (3, 4))
    np.testing.assert_array_equal(again.value, depth_shapley(pair, batches, permutations=2, seed=3).value)
    assert (again.value != other.value).any()
    one = depth_shapley(pair, batches, groups=1, permutations=2)
    nll = {}
    with Switchboard(pair) as board:
        for router, experts in itertools.product((True, False), repeat=2):
            board.swap(router, experts)
            nll[router, experts] = batches.nll()
    router = ((nll[False, True] - nll[True, True]) + (nll[False, False] - nll[True, False])) / 2
    np.testing.assert_allclose(one.value[0], router, atol=1e-12)
    assert [player.name for player in one.players] == ["layers 2-3 router", "layers 2-3 experts"]
    assert np.isnan(one.error).all()  # one pair of orders: exact here, but nothing to estimate an error from
    whole = depth_shapley(pair, batches, groups=2, by_part=False, permutations=2)
    assert [player.name for player in whole.players] == ["layer 2 both", "layer 3 both"]
    np.testing.assert_allclose(whole.value.sum(axis=0), again.value.sum(axis=0), atol=1e-12)


def test_groups_are_neighbouring_layers_and_hold_every_site_once(tmp_path: Path) -> None:
    pair = loaded_pair(save_pair(tmp_path, layers_to_transform=[0, 1, 2, 3]))
    for groups in (1, 2, 3, 4, 9):
        players = depth_players(pair.pairs, groups, by_part=False)
        assert len(players) == min(groups, 4)
        assert sorted(site for player in players for site in player.sites) == list(range(len(pair.pairs)))
        for player in players:
            assert {pair.pairs[s].info.layer for s in player.sites} == set(range(player.first, player.last + 1))
    halves = depth_players(pair.pairs, 3)
    assert [player.name for player in halves[::2]] == ["layers 0-1 router", "layer 2 router", "layer 3 router"]
    with pytest.raises(ConfigError, match="0 groups"):
        depth_players(pair.pairs, 0)


def test_a_gate_that_is_always_one_is_not_run(tmp_path: Path) -> None:
    pair = loaded_pair(save_plain_pair(tmp_path))
    batches = AnswerBatches(pair, toy_samples(), batch_size=4)
    steps: list[int] = []
    found = single_restores(pair, batches, on_step=lambda: steps.append(1))
    assert found.evaluations == len(steps) == len(pair.pairs) + 1
    np.testing.assert_array_equal(found.nll[:, 0], np.tile(found.nll_current, (len(pair.pairs), 1)))
    np.testing.assert_array_equal(found.nll[:, 1], found.nll[:, 2])
    assert (found.nll[:, 1] != found.nll_current).any(axis=1).all()
    # it is really so: a model whose router is restored is the current one
    with Switchboard(pair) as board:
        board.swap(True, False)
        np.testing.assert_allclose(batches.nll(), found.nll_current, atol=1e-5)
    shares = depth_shapley(pair, batches, groups=2, permutations=4)
    np.testing.assert_array_equal(shares.value[::2], 0.0)
    assert shares.evaluations == 4  # two groups of experts
