"""Exact swaps against models whose weights were exchanged by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from driftlens.attribution.ledger import AnswerBatches
from driftlens.attribution.pairs import LoadedPair
from driftlens.attribution.swaps import ANCHOR, COMBINATIONS, MEASURES, SwapScores, swap_scores, task_scorer
from driftlens.errors import ProbeError
from driftlens.recording.checkpoints import load_checkpoint
from driftlens.training.config import EvaluationOptions
from driftlens.training.evaluate import ScoredAnswer, TaskScorer
from tests.attribution.support import SHAPE, loaded_pair, save_pair, save_plain_pair, sites_of, toy_samples

EVALUATION = EvaluationOptions(batch_size=4, max_new_tokens=3)


@pytest.fixture(scope="module")
def swapped(pair: LoadedPair, batches: AnswerBatches) -> SwapScores:
    return swap_scores(pair, toy_samples(), EVALUATION, prefix=batches.prefix)


def scored(model: nn.Module, encoder: object) -> list[ScoredAnswer]:
    scorer = TaskScorer(toy_samples(), encoder, prefix=None, batch_size=4, max_new_tokens=3, device=torch.device("cpu"))
    return scorer.score(model)


def nlls(outcomes: list[ScoredAnswer]) -> np.ndarray:
    return np.array([outcome.nll for outcome in outcomes])


def use_router_of(model: nn.Module, anchor: nn.Module) -> None:
    """Give every site the anchor's gate, written out: its own router, or the energies of its own A."""
    for name, site in sites_of(model).items():
        old = sites_of(anchor)[name]
        gate, old_gate, a = (
            site.moe_lora_gate["default"],
            old.moe_lora_gate["default"],
            old.moe_lora_A["default"].weight.detach().clone(),
        )
        if hasattr(gate, "weight"):
            gate.weight.data.copy_(old_gate.weight.data)
            continue

        def energies(h: torch.Tensor, _z: torch.Tensor, a: torch.Tensor = a) -> torch.Tensor:
            z = (h @ a.T).unflatten(-1, (SHAPE["num_experts"], SHAPE["r"]))
            return torch.softmax(z.square().mean(dim=-1), dim=-1)

        gate.forward = energies


def use_experts_of(model: nn.Module, anchor: nn.Module, frozen_gates: bool) -> None:
    """Overwrite A and B by the anchor's; gates that read A keep reading the old one if ``frozen_gates``."""
    if frozen_gates:
        use_router_of(model, model)  # gates from a copy of A as it is now
    for name, site in sites_of(model).items():
        old = sites_of(anchor)[name]
        site.moe_lora_A["default"].weight.data.copy_(old.moe_lora_A["default"].weight.data)
        site.moe_lora_B["default"].weight.data.copy_(old.moe_lora_B["default"].weight.data)


def test_current_parts_are_the_current_model_bit_for_bit(
    swapped: SwapScores, folders: tuple[Path, Path], pair: LoadedPair
) -> None:
    plain = load_checkpoint(folders[1], "tiny-random")
    whole = scored(plain.model, plain.backbone.encoder)
    assert list(swapped.outcomes["cc"]) == whole
    # and the pair computes it still, after everything that was switched
    assert task_scorer(pair, toy_samples(), EVALUATION, None).score(pair.model) == whole


def test_anchor_alone_is_the_anchor_and_equals_its_parts(swapped: SwapScores, folders: tuple[Path, Path]) -> None:
    plain = load_checkpoint(folders[0], "tiny-random")
    assert list(swapped.outcomes[ANCHOR]) == scored(plain.model, plain.backbone.encoder)
    np.testing.assert_allclose(swapped.values("aa", "nll"), swapped.values(ANCHOR, "nll"), atol=1e-5)
    assert [o.prediction for o in swapped.outcomes["aa"]] == [o.prediction for o in swapped.outcomes[ANCHOR]]
    assert np.abs(swapped.intervals("nll").remainder.value) < 1e-5


@pytest.mark.parametrize("key", ["ca", "ac"])
def test_mixed_parts_equal_a_model_with_exchanged_weights(
    swapped: SwapScores, folders: tuple[Path, Path], key: str
) -> None:
    anchor, mixed = (load_checkpoint(folder, "tiny-random") for folder in folders)
    if key == "ac":
        use_router_of(mixed.model, anchor.model)
    else:
        gate = next(iter(sites_of(mixed.model).values())).moe_lora_gate["default"]
        use_experts_of(mixed.model, anchor.model, frozen_gates=not hasattr(gate, "weight"))
    expected = scored(mixed.model, mixed.backbone.encoder)
    np.testing.assert_allclose(swapped.values(key, "nll"), nlls(expected), atol=2e-5)
    assert [o.prediction for o in swapped.outcomes[key]] == [o.prediction for o in expected]
    for other in {*COMBINATIONS} - {key}:
        assert np.abs(swapped.values(other, "nll") - nlls(expected)).max() > 1e-3, f"{key} cannot be told from {other}"


@pytest.mark.parametrize("measure", MEASURES)
def test_parts_sum_to_what_was_forgotten(swapped: SwapScores, measure: str) -> None:
    found = swapped.intervals(measure, draws=100)
    lost = swapped.scores("aa", measure) - swapped.scores("cc", measure)
    router, experts, interaction = swapped.parts(measure)
    np.testing.assert_allclose(router + experts, lost, atol=1e-12)
    np.testing.assert_allclose(found.forgetting.value, lost.mean(), atol=1e-12)
    np.testing.assert_allclose(found.phi_router.value + found.phi_experts.value, lost.mean(), atol=1e-12)
    np.testing.assert_allclose(found.interaction.value, interaction.mean(), atol=1e-12)
    # with the remainder it is what the two checkpoints differ by
    whole = swapped.scores(ANCHOR, measure) - swapped.scores("cc", measure)
    np.testing.assert_allclose(found.forgetting.value + found.remainder.value, whole.mean(), atol=1e-12)


def test_a_loss_counts_with_its_sign_turned() -> None:
    def outcome(nll: float, right: bool) -> list[ScoredAnswer]:
        return [ScoredAnswer("1", "a", "a", right, right, nll), ScoredAnswer("2", "a", "a", right, True, nll)]

    made = SwapScores(
        "01-a", "02-b",
        {"aa": outcome(0.5, True), "ca": outcome(1.0, True), "ac": outcome(2.5, False), "cc": outcome(3.0, False)},
    )  # fmt: skip
    assert made.samples == ("1", "2")
    nats, strict = made.intervals("nll"), made.intervals("strict")
    np.testing.assert_allclose([nats.forgetting.value, nats.phi_router.value, nats.phi_experts.value], [2.5, 0.5, 2.0])
    assert (strict.forgetting.value, strict.phi_router.value, strict.phi_experts.value) == (1.0, 0.0, 1.0)
    assert made.intervals("lenient").forgetting.value == 0.5
    assert np.isnan(nats.remainder).all()  # the anchor was not run by itself


def test_projector_saved_beside_the_adapter_is_the_remainder(tmp_path: Path) -> None:
    paths = save_plain_pair(tmp_path, modules_to_save=["multi_modal_projector"])
    from safetensors.torch import load_file, save_file

    weights = load_file(paths[1] / "adapter_model.safetensors")
    for key in [name for name in weights if "multi_modal_projector" in name]:
        weights[key] = weights[key] + 0.5
    save_file(weights, paths[1] / "adapter_model.safetensors", metadata={"format": "pt"})
    pair = loaded_pair(paths)
    batches = AnswerBatches(pair, toy_samples(), batch_size=4)
    found = swap_scores(pair, toy_samples(), EVALUATION, prefix=batches.prefix)
    anchor, current = (load_checkpoint(path, "tiny-random") for path in paths)
    np.testing.assert_allclose(found.values(ANCHOR, "nll"), nlls(scored(anchor.model, anchor.backbone.encoder)))
    np.testing.assert_array_equal(found.values("cc", "nll"), nlls(scored(current.model, current.backbone.encoder)))
    images = np.array([sample.image is not None for sample in toy_samples()])
    remainder = found.scores(ANCHOR, "nll") - found.scores("aa", "nll")
    assert (np.abs(remainder[images]) > 1e-3).all()
    np.testing.assert_allclose(remainder[~images], 0.0, atol=1e-5)


def test_one_plain_lora_forgets_by_its_experts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = loaded_pair(save_plain_pair(tmp_path))
    runs: list[int] = []
    score = TaskScorer.score
    monkeypatch.setattr(TaskScorer, "score", lambda self, model: runs.append(1) or score(self, model))
    found = swap_scores(pair, toy_samples(), EVALUATION)
    router, experts, _ = found.parts("nll")
    np.testing.assert_array_equal(router, 0.0)
    assert np.abs(experts).min() > 1e-4
    assert len(runs) == 3  # current, anchor's experts, anchor alone: a gate of 1 is not exchanged
    np.testing.assert_array_equal(
        found.values("cc", "nll"), nlls(score(task_scorer(pair, toy_samples(), EVALUATION, None), pair.model))
    )
    np.testing.assert_allclose(found.values("ca", "nll"), found.values(ANCHOR, "nll"), atol=1e-5)


def test_two_equal_checkpoints_lost_nothing(tmp_path: Path) -> None:
    pair = loaded_pair(save_pair(tmp_path, step=0.0))
    found = swap_scores(pair, toy_samples(3), EVALUATION)
    for parts in found.parts("nll"):
        np.testing.assert_allclose(parts, 0.0, atol=1e-5)


def test_progress_is_told_after_every_scoring(pair: LoadedPair) -> None:
    steps: list[int] = []
    swap_scores(pair, toy_samples(2), EVALUATION, on_step=lambda: steps.append(1))
    assert len(steps) == 5


def test_nothing_to_score_is_refused(pair: LoadedPair) -> None:
    with pytest.raises(ProbeError, match="no samples to score"):
        swap_scores(pair, [], EVALUATION)
