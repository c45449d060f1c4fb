"""Recording while a Trainer trains: the files are there, and the training is the same bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import driftlens as dl
from driftlens.errors import ConfigError, ProbeError
from driftlens.recording import RecordCallback, count_hooks, record, write_probes
from driftlens.store import verify_recording

from .support import adapted, datasets, opened, toy_probes

PROBES = toy_probes(3).select(["parity"])
DATA = [{"input_ids": torch.arange(5, 13) + n, "labels": torch.arange(5, 13) + n} for n in range(12)]


def dropout(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Draws in training, and in evaluation too: from every global generator."""
    if not module.training:
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    return (nn.functional.dropout(args[0], 0.3, training=module.training), *args[1:])


def trained(
    folder: Path, *callbacks: RecordCallback, steps: int = 4, resume: Path | None = None, **options: Any
) -> tuple[PeftModel, Trainer]:
    _, model = adapted()
    model.get_base_model().lm_head.register_forward_pre_hook(dropout)
    model.get_base_model().model.vision_tower.eval()
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=7,
        logging_steps=1,
        **({"save_strategy": "no"} | options),
    )
    torch.manual_seed(7)
    trainer = Trainer(model=model, args=arguments, train_dataset=DATA, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, trainer


def callback(folder: Path, **options: Any) -> RecordCallback:
    return RecordCallback(PROBES, folder, encoder=adapted()[0].encoder, **({"every_steps": 2} | options))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_training_is_the_same_bit_for_bit_with_and_without(tmp_path: Path) -> None:
    plain, one = trained(tmp_path / "plain")
    recorded, two = trained(tmp_path / "recorded", callback(tmp_path / "files", at_start=True, at_end=True))
    after = torch.rand(3)
    for (name, a), (_, b) in zip(plain.state_dict().items(), recorded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (one, two)]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    assert [m.training for m in plain.modules()] == [m.training for m in recorded.modules()]
    trained(tmp_path / "again")
    assert torch.equal(after, torch.rand(3)), "the generator stands where it stands without recording"
    assert names(tmp_path / "files") == ["step-000000.h5", "step-000002.h5", "step-000004.h5"]
    assert count_hooks(recorded) == count_hooks(plain)


def test_the_files_show_the_model_of_their_step(tmp_path: Path) -> None:
    recorder = callback(tmp_path / "files", checkpoint_meta={"base": "tiny"})
    model, _ = trained(tmp_path / "run", recorder)
    assert [s.checkpoint for s in recorder.summaries] == ["step-000002", "step-000004"]
    record(
        model, PROBES, tmp_path / "after.h5", encoder=recorder.encoder, checkpoint_meta={"checkpoint": "step-000004"}
    )
    last, after = datasets(tmp_path / "files/step-000004.h5"), datasets(tmp_path / "after.h5")
    for name, value in after.items():
        np.testing.assert_array_equal(last[name], value, err_msg=name)
    earlier = datasets(tmp_path / "files/step-000002.h5")
    assert any((earlier[name] != last[name]).any() for name in last if name.startswith("weights"))
    meta = opened(tmp_path / "files/step-000004.h5").meta
    assert (meta["checkpoint"], meta["step"], meta["base"]) == ("step-000004", 4, "tiny")


def test_a_resumed_training_keeps_what_is_the_same_and_replaces_what_is_not(tmp_path: Path) -> None:
    trained(tmp_path / "run", callback(tmp_path / "files"))
    first = {name: (tmp_path / "files" / name).stat().st_mtime_ns for name in names(tmp_path / "files")}
    (tmp_path / "files/step-000004.h5").write_bytes(b"torn")
    again = callback(tmp_path / "files")
    trained(tmp_path / "run", again)
    assert [s.skipped for s in again.summaries] == [True, False]
    assert (tmp_path / "files/step-000002.h5").stat().st_mtime_ns == first["step-000002.h5"]
    assert verify_recording(tmp_path / "files/step-000004.h5") == []
    other = callback(tmp_path / "files", tokens_per_sample=2)
    trained(tmp_path / "run", other)
    assert [s.skipped for s in other.summaries] == [False, False], "recorded in another way"


def test_a_training_resumed_by_the_trainer_records_what_was_missing(tmp_path: Path) -> None:
    trained(tmp_path / "run", callback(tmp_path / "files"), save_strategy="steps", save_steps=2)
    whole = {name: (tmp_path / "files" / name).read_bytes() for name in names(tmp_path / "files")}
    (tmp_path / "files/step-000004.h5").unlink()
    trained(tmp_path / "run", callback(tmp_path / "files"), resume=tmp_path / "run/checkpoint-2")
    assert {name: (tmp_path / "files" / name).read_bytes() for name in names(tmp_path / "files")} == whole


def test_the_end_is_recorded_once(tmp_path: Path) -> None:
    trained(tmp_path / "run", callback(tmp_path / "files", every_steps=3, at_end=True))
    assert names(tmp_path / "files") == ["step-000003.h5", "step-000004.h5"]
    at_end = callback(tmp_path / "others", every_steps=4, at_end=True)
    trained(tmp_path / "run", at_end)
    assert len(at_end.summaries) == 1


def test_probes_may_be_a_folder(tmp_path: Path) -> None:
    write_probes(PROBES, tmp_path / "probes")
    from_folder = dl.RecordCallback(
        tmp_path / "probes", tmp_path / "files", every_steps=4, encoder=adapted()[0].encoder
    )
    assert from_folder.probes.sha256 == PROBES.sha256


def test_probes_that_do_not_fit_stop_the_training_before_its_first_step(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="needs a tokenizer"):
        trained(tmp_path / "run", RecordCallback(PROBES, tmp_path / "files", every_steps=2))


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every_steps is 0"):
        callback(tmp_path, every_steps=0)
    with pytest.raises(ConfigError, match="batch_size=0"):
        callback(tmp_path, batch_size=0)


@pytest.mark.parametrize("option", ["fsdp", "deepspeed"])
def test_sharded_parameters_are_refused(tmp_path: Path, option: str) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    setattr(arguments, option, "full_shard")
    with pytest.raises(ConfigError, match="FSDP or DeepSpeed shard over processes"):
        callback(tmp_path).on_train_begin(arguments, None, None, model=adapted()[1])  # type: ignore[arg-type]
