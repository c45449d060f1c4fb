"""Re-routing a tiny run: only routers move, what they can bring back comes back, and nothing is done twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from driftlens.attribution import reroute
from driftlens.attribution.reroute import REROUTED, Rerouted, estimate_reroute, reroute_run, router_parameters
from driftlens.attribution.swaps import ANCHOR, COMBINATIONS, MEASURES
from driftlens.errors import ConfigError, DriftLensError, NotFoundError, SiteError, UnknownNameError
from driftlens.store import Manifest
from driftlens.training import Progress, train_run
from driftlens.training.task_trainer import TaskTrainer
from tests.cli.conftest import cli  # noqa: F401  # a fixture
from tests.training.support import digests, tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "moe"
    return train_run(tiny_config(method={"name": "moe-lora"}), folder)


@pytest.fixture(scope="module")
def told() -> list[Progress]:
    """What the first re-routing reported."""
    return []


@pytest.fixture(scope="module")
def run(trained: Path, told: list[Progress], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with the routers of its last checkpoint retrained on both old tasks."""
    copy = tmp_path_factory.mktemp("runs") / "moe"
    shutil.copytree(trained, copy)
    reroute_run(copy, steps=8, progress=told.append)
    return copy


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """The run before anything was re-routed."""
    return Path(shutil.copytree(trained, tmp_path / "moe"))


@pytest.fixture
def again(run: Path, tmp_path: Path) -> Path:
    """The run with its results."""
    return Path(shutil.copytree(run, tmp_path / "again"))


def overwrite_last(run: Path, change: Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], None]) -> None:
    """Replace the weights after the last task by those after the first, changed by hand."""
    anchor, last = (run / "checkpoints" / name / "adapter_model.safetensors" for name in ("01-colour", "03-shape"))
    weights, old = load_file(anchor), load_file(anchor)
    change(weights, old)
    save_file(weights, last, metadata={"format": "pt"})
    manifest = Manifest.load(run)
    manifest.add(last.relative_to(run))
    manifest.save()


def test_one_listed_file_per_old_task_and_the_checkpoints_stay(run: Path, trained: Path) -> None:
    files = [f"reroute/03-shape/{name}.json" for name in ("01-colour", "02-parity")]
    assert sorted(p.relative_to(run).as_posix() for p in run.rglob("reroute/*/*")) == files
    manifest = Manifest.load(run)
    assert all(file in manifest.files for file in files)
    assert manifest.verify() == []
    assert {k: v for k, v in digests(run).items() if "reroute" not in k} == digests(trained)


def test_scores_are_those_of_the_run(run: Path) -> None:
    frame = pd.read_parquet(run / "scores.parquet")
    for result, name in zip(reroute_run(run, steps=8), ("01-colour", "02-parity"), strict=True):
        assert result.skipped
        for state, checkpoint in (("cc", "03-shape"), (ANCHOR, name)):
            rows = frame[(frame["checkpoint_name"] == checkpoint) & (frame["task"] == result.about["task"])]
            assert list(rows["sample"]) == list(result.samples)
            for measure in MEASURES:
                np.testing.assert_array_equal(result.values[state][measure], rows[measure].astype(float))
        assert set(result.values) == {*COMBINATIONS, ANCHOR, REROUTED}


def test_row_splits_the_forgetting_into_what_came_back_and_what_did_not(run: Path) -> None:
    for result in reroute_run(run, steps=8):
        for measure in MEASURES:
            row = result.row(measure, draws=50)
            assert row["recovered"] + row["remaining"] == pytest.approx(row["forgetting"], abs=1e-12)
            sign = -1 if measure == "nll" else 1
            assert row["recovered"] == pytest.approx(sign * (row["rerouted"] - row["current"]), abs=1e-12)
            assert row["forgetting"] == pytest.approx(sign * (row["anchor"] - row["current"]), abs=1e-12)
            assert row["recovered_low"] <= row["recovered"] <= row["recovered_high"]
            assert row["remaining_low"] <= row["remaining"] <= row["remaining_high"]
            aa, cc = (result.scores(state, measure).mean() for state in ("aa", "cc"))
            assert row["phi_router"] + row["phi_experts"] == pytest.approx(aa - cc, abs=1e-12)
            assert row["s_aa"] == pytest.approx(np.mean(result.values["aa"][measure]))
            assert row["old_router"] == pytest.approx(np.mean(result.values["ac"][measure]))
        assert row["rerouted"] != row["current"]
        assert (row["task"], row["checkpoint"], row["steps"], row["samples"]) == (
            result.about["task"], "03-shape", 8, 4,
        )  # fmt: skip
        assert 0 < row["gate_entropy_after"] <= 1
        assert result.log["loss"][0] != result.log["loss"][-1]


def test_a_model_that_diverged_gives_no_number(again: Path) -> None:
    def burst(weights: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> None:
        for key in [k for k in weights if "moe_lora_B" in k]:
            weights[key] = old[key] * torch.inf

    overwrite_last(again, burst)
    with pytest.raises(DriftLensError, match="no longer finite from step 1"):
        reroute_run(again, tasks=["colour"], steps=1)
    values = {state: {measure: [1.0, None] for measure in MEASURES} for state in (*COMBINATIONS, ANCHOR, REROUTED)}
    about = {"task": "a", "current": "02-b", "settings": {"training": {"steps_per_task": 1}}}
    result = Rerouted(again, about, ("0", "1"), values, {"gate_entropy": [0.5]})
    assert np.isnan(result.scores("cc", "nll")).tolist() == [False, True]
    assert np.isnan(result.row("nll", draws=2)["current"])


def test_routers_alone_are_trained(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    class Spy(TaskTrainer):
        def train(self, *args: object, **kwargs: object) -> object:
            before = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            result = super().train(*args, **kwargs)
            seen.append((before, {k: v.detach().clone() for k, v in self.model.state_dict().items()}))
            return result

    monkeypatch.setattr(reroute, "TaskTrainer", Spy)
    found = reroute_run(copied, tasks=["colour"], steps=3)
    ((before, after),) = seen
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if ".moe_lora_gate.default." in key}
    # it began at the checkpoint's own weights
    stored = load_file(copied / "checkpoints/03-shape/adapter_model.safetensors")
    for key, value in stored.items():
        head, _, last = key.rpartition(".")
        assert torch.equal(before[f"{head}.default.{last}"], value)
    assert found[0].about["router_parameters"] == sum(before[key].numel() for key in moved)
    assert len(found[0].log["loss"]) == 3


def test_a_lost_router_comes_back(copied: Path) -> None:
    def scramble(weights: dict[str, torch.Tensor], _: dict[str, torch.Tensor]) -> None:
        g = torch.Generator().manual_seed(0)
        for key in [k for k in weights if "moe_lora_gate" in k]:
            weights[key] = torch.randn(weights[key].shape, generator=g)

    overwrite_last(copied, scramble)
    row = reroute_run(copied, tasks=["colour"], steps=40)[0].row("nll")
    assert row["phi_experts"] == pytest.approx(0, abs=1e-5)
    assert row["phi_router"] == pytest.approx(row["forgetting"], abs=1e-5)
    assert row["forgetting"] > 0.01
    assert row["recovered"] > 0.7 * row["forgetting"]


def test_overwritten_experts_do_not_come_back(copied: Path) -> None:
    def reverse(weights: dict[str, torch.Tensor], old: dict[str, torch.Tensor]) -> None:
        for key in [k for k in weights if "moe_lora_B" in k]:
            weights[key] = -old[key]

    overwrite_last(copied, reverse)
    row = reroute_run(copied, tasks=["colour"], steps=40)[0].row("nll")
    assert row["phi_router"] == pytest.approx(0, abs=1e-5)
    assert row["forgetting"] > 0.05
    # weights that sum to 1 cannot turn a reversed update round
    assert row["recovered"] < 0.3 * row["forgetting"]


def test_same_numbers_again_and_other_steps_are_another_result(again: Path) -> None:
    kept = reroute_run(again, tasks=["parity"], steps=8)[0]
    anew = reroute_run(again, tasks=["parity"], steps=8, resume=False)[0]
    assert kept.skipped
    assert not anew.skipped
    assert (anew.values, anew.log) == (kept.values, kept.log)
    other = reroute_run(again, tasks=["parity"])[0]  # the run's own number of steps
    assert not other.skipped
    assert len(other.log["loss"]) == other.about["settings"]["training"]["steps_per_task"] == 4
    assert other.values[REROUTED] != kept.values[REROUTED]
    assert other.values["cc"] == kept.values["cc"]


def test_what_was_finished_before_an_interruption_is_kept(run: Path, copied: Path) -> None:
    class InterruptedHereError(Exception):
        pass

    def stop(step: Progress) -> None:
        if "parity: retraining" in step.message:
            raise InterruptedHereError

    with pytest.raises(InterruptedHereError):
        reroute_run(copied, steps=8, progress=stop)
    assert Manifest.load(copied).verify() == []
    first, second = reroute_run(copied, steps=8)
    assert first.skipped
    assert not second.skipped
    for made, expected in zip((first, second), reroute_run(run, steps=8), strict=True):
        assert (made.values, made.log, made.samples) == (expected.values, expected.log, expected.samples)


def test_progress_ends_at_its_total(run: Path, told: list[Progress]) -> None:
    assert run.is_dir()
    assert [step.done for step in told] == sorted(step.done for step in told)
    assert told[-1].done == pytest.approx(told[-1].total)


def test_a_damaged_or_changed_result_is_made_anew(again: Path) -> None:
    first = reroute_run(again, tasks=["colour"], steps=8)[0]
    first.path.write_text("{}")
    made = reroute_run(again, tasks=["colour"], steps=8)[0]
    assert not made.skipped
    assert made.values == first.values

    def nudge(weights: dict[str, torch.Tensor], _: dict[str, torch.Tensor]) -> None:
        key = next(k for k in weights if "moe_lora_B" in k)
        weights[key] = weights[key] + 0.1

    overwrite_last(again, nudge)
    other = reroute_run(again, tasks=["colour"], steps=8)[0]
    assert not other.skipped
    assert other.about["current_sha256"] != first.about["current_sha256"]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"name": "pass-moe"}, r"gates \(kind 'energy'\) own no parameters but follow from A"),
        ({"name": "seq-lora"}, "single expert, so nothing is routed"),
    ],
)
def test_methods_without_a_router_are_refused_honestly(tmp_path: Path, method: dict[str, str], reason: str) -> None:
    config = tiny_config(method=method, stream={"tasks": ["colour", "parity"]}, training={"steps_per_task": 1})
    folder = train_run(config, tmp_path / "run")
    before = digests(folder)
    with pytest.raises(SiteError, match=f"no router to retrain: .*{reason}.*driftlens attribute"):
        reroute_run(folder)
    assert digests(folder) == before
    # a router before a single expert is no router either, and a dry run refuses nothing but says the same
    assert router_parameters(tiny_config(method={"name": "moe-lora"}, adapter={"num_experts": 1, "top_k": 1})) == 0
    assert [row["router_parameters"] for row in estimate_reroute(folder)] == [0]


def test_dry_run_counts_and_writes_nothing(run: Path, trained: Path) -> None:
    before = digests(trained)
    rows = estimate_reroute(trained, steps=8)
    assert digests(trained) == before
    assert [(row["task"], row["steps"], row["train_samples"], row["scored_answers"]) for row in rows] == [
        ("colour", 8, 12, 24), ("parity", 8, 12, 24),
    ]  # fmt: skip
    assert not any(row["kept"] for row in rows)
    made = reroute_run(run, steps=8)
    assert {row["router_parameters"] for row in rows} == {result.about["router_parameters"] for result in made}
    assert all(row["kept"] for row in estimate_reroute(run, steps=8))
    assert [(r["checkpoint"], r["task"]) for r in estimate_reroute(trained, at="all")] == [
        ("02-parity", "colour"), ("03-shape", "colour"), ("03-shape", "parity"),
    ]  # fmt: skip


def test_questions_that_cannot_be_answered_are_refused(trained: Path, tmp_path: Path) -> None:
    before = digests(trained)
    with pytest.raises(ConfigError, match="for 0 steps; give at least 1"):
        reroute_run(trained, steps=0)
    with pytest.raises(UnknownNameError, match="color"):
        reroute_run(trained, tasks=["color"])
    with pytest.raises(ConfigError, match="shape"):
        reroute_run(trained, tasks=["shape"])  # learned last: nothing can be forgotten yet
    with pytest.raises(NotFoundError):
        reroute_run(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert digests(trained) == before


def test_another_base_model_is_refused(copied: Path) -> None:
    manifest = Manifest.load(copied)
    manifest.base["sha256"] = "0" * 64
    manifest.save()
    with pytest.raises(ConfigError, match=r"another base model .*000000000000"):
        reroute_run(copied, steps=1)


def test_command_prints_a_row_per_task_and_measure(
    run: Path,
    cli: Callable[..., tuple[int, str, str]],  # noqa: F811
) -> None:
    code, out, _ = cli("reroute", run, "--task", "colour", "--steps", 8, "--json", "--quiet")
    assert code == 0
    rows = json.loads(out)
    assert [(row["task"], row["measure"]) for row in rows] == [("colour", measure) for measure in MEASURES]
    assert rows[2] == pytest.approx(reroute_run(run, tasks=["colour"], steps=8)[0].row("nll"))
    code, out, err = cli("reroute", run, "--steps", 8)
    assert code == 0
    assert "recovered" in out
    assert "positive: lost" in err
    code, out, _ = cli("reroute", run, "--dry-run", "--steps", 2, "--json")
    assert code == 0
    assert [row["kept"] for row in json.loads(out)] == [False, False]
    assert cli("reroute", run, "--at", "soon")[0] == 2


def test_result_is_plain_json(run: Path) -> None:
    content = json.loads((run / "reroute/03-shape/01-colour.json").read_text())
    assert content["schema"] == "1.0"
    assert content["settings"]["evaluation"] == {"batch_size": 4, "max_new_tokens": 3}
    assert str(run) not in json.dumps(content), "no path of the machine may be stored"
    result: Rerouted = reroute_run(run, tasks=["colour"], steps=8)[0]
    assert content["values"] == result.values
