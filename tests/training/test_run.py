"""The continual trainer end to end on a tiny random LLaVA and the toy stream."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from driftlens.errors import ConfigError, DriftLensError, FormatError
from driftlens.methods import METHODS
from driftlens.store import Manifest
from driftlens.training import train_run
from driftlens.training.run import START, build_stream
from tests.training.support import digests, tiny_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "pass"
    steps = []
    train_run(tiny_config(), out, on_progress=steps.append)
    return out, steps


def test_layout_scores_and_log(finished):
    out, steps = finished
    names = [START, "01-colour", "02-parity", "03-shape"]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == names
    for name in names:
        held = {p.name for p in (out / "checkpoints" / name).iterdir()}
        assert {
            "adapter_config.json",
            "adapter_model.safetensors",
            "method_state.safetensors",
            "scores.parquet",
        } <= held
        assert "README.md" not in held
    scores = pd.read_parquet(out / "scores.parquet")
    assert len(scores) == 4 * 3 * 4  # checkpoints x tasks x samples
    assert list(scores["checkpoint_name"].unique()) == names
    assert scores["nll"].gt(0).all()
    assert np.isfinite(scores["nll"]).all()
    assert (scores["lenient"] | ~scores["strict"]).all(), "whatever the strict scorer accepts, the lenient one accepts"
    log = pd.read_parquet(out / "train_log.parquet")
    assert len(log) == 3 * 4
    assert log["gate_entropy"].between(0, 1).all()
    np.testing.assert_allclose(log["loss"], log["task_loss"] + log["penalty"], rtol=1e-6)
    assert (log.loc[log["task_index"] == 1, "penalty"] == 0).all()
    # the first step of the warm-up has learning rate 0, so weights first differ from the reference at the third
    assert (log.loc[(log["task_index"] > 1) & (log["step"] > 2), "penalty"] > 0).all()
    assert steps[-1].done == pytest.approx(steps[-1].total)
    config = json.loads((out / "checkpoints/01-colour/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-random", "no path of the machine that trained may be stored"


def test_training_changes_weights_and_lowers_the_loss(finished):
    out, _ = finished
    start = load_file(out / "checkpoints" / START / "adapter_model.safetensors")
    end = load_file(out / "checkpoints/03-shape/adapter_model.safetensors")
    assert start.keys() == end.keys()
    assert all(not torch.equal(start[key], end[key]) for key in start)
    scores = pd.read_parquet(out / "scores.parquet")
    first = scores[scores["task"] == "colour"].groupby("checkpoint")["nll"].mean()
    assert first[1] < first[0]


def test_same_seed_gives_the_same_bytes(finished, tmp_path):
    out, _ = finished
    train_run(tiny_config(), tmp_path / "again")
    assert digests(tmp_path / "again") == digests(out)


def test_another_seed_gives_other_weights(finished, tmp_path):
    out, _ = finished
    train_run(tiny_config(training={"seed": 1, "steps_per_task": 1}), tmp_path / "other")
    name = f"checkpoints/{START}/adapter_model.safetensors"
    assert digests(tmp_path / "other")[name] != digests(out)[name]


def test_prefix_cache_changes_nothing_but_rounding(finished, tmp_path, monkeypatch):
    out, _ = finished
    train_run(tiny_config(training={"prefix_cache": "off"}), tmp_path / "off")
    with_cache, without = (pd.read_parquet(run / "scores.parquet") for run in (out, tmp_path / "off"))
    np.testing.assert_allclose(with_cache["nll"], without["nll"], rtol=2e-4)
    monkeypatch.setenv("DRIFTLENS_CACHE", str(tmp_path / "cache"))
    for name in ("disk", "disk-again"):  # written, then read
        train_run(tiny_config(training={"prefix_cache": "disk"}), tmp_path / name)
    assert len(list((tmp_path / "cache" / "prefix").glob("*.safetensors"))) == 3
    left, right = digests(tmp_path / "disk"), digests(tmp_path / "disk-again")
    assert left == right
    weights = "checkpoints/03-shape/adapter_model.safetensors"
    assert left[weights] == digests(out)[weights], "states read from the disk must train to the same bytes"


@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_runs_the_stream(method, tmp_path):
    config = tiny_config(
        method={"name": method}, training={"steps_per_task": 1}, stream={"tasks": ["colour", "parity"]}
    )
    train_run(config, tmp_path / "run")
    log = pd.read_parquet(tmp_path / "run/train_log.parquet")
    assert log["gate_entropy"].isna().all() == (method == "seq-lora")


def test_lambda_zero_equals_reweighting_alone_bit_for_bit(tmp_path):
    """The penalty at lambda = 0 must not even touch rounding: equal to a method that has no stabilisation at all."""
    from driftlens.methods import Method

    class EnergyOnly(Method):
        name, title, source, summary, gate = "test-energy-only", "t", "s", "s", "energy"

    if "test-energy-only" not in METHODS.names():
        METHODS.register("test-energy-only", EnergyOnly)
    runs = {}
    for name, method in (
        ("zero", {"name": "pass-moe", "lambda_a": 0.0, "lambda_b": 0.0}),
        ("alone", {"name": "test-energy-only"}),
    ):
        train_run(tiny_config(method=method), tmp_path / name)
        runs[name] = load_file(tmp_path / name / "checkpoints/03-shape/adapter_model.safetensors")
    assert all(torch.equal(runs["zero"][key], runs["alone"][key]) for key in runs["zero"])


@pytest.mark.parametrize("training", [{"precision": "bf16"}, {"gradient_checkpointing": True}], ids=["bf16", "ckpt"])
def test_bf16_and_gradient_checkpointing(training, finished, tmp_path):
    train_run(tiny_config(training=training), tmp_path / "run")
    ours, plain = (pd.read_parquet(run / "train_log.parquet") for run in (tmp_path / "run", finished[0]))
    np.testing.assert_allclose(ours["task_loss"], plain["task_loss"], rtol=0.05 if "precision" in training else 1e-4)


def test_resume_refuses_what_does_not_belong(finished, tmp_path):
    out, _ = finished
    before = digests(out)
    with pytest.raises(ConfigError, match=r"already holds a run. Use --resume"):
        train_run(tiny_config(), out)
    with pytest.raises(ConfigError, match="a run of another configuration"):
        train_run(tiny_config(training={"seed": 9}), out, resume=True)
    assert digests(out) == before


def test_resuming_a_finished_run_changes_nothing(finished):
    out, _ = finished
    before = digests(out)
    train_run(tiny_config(), out, resume=True)
    assert digests(out) == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "method_state.safetensors", "scores.parquet"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_resume_refuses_a_damaged_checkpoint(name, damage, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    manifest = Manifest.load(run)
    manifest.remove("checkpoints/03-shape")
    manifest.complete = False
    manifest.save()
    file = run / "checkpoints/02-parity" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "flip": lambda: file.write_bytes(content),
        "cut": lambda: file.write_bytes(content[:-10]),
        "gone": file.unlink,
    }[damage]()
    before = digests(run)
    with pytest.raises(FormatError, match=r"(?s)cannot be resumed, 1 file\(s\).*02-parity"):
        train_run(tiny_config(), run, resume=True)
    assert digests(run) == before


def test_resume_makes_the_merged_tables_again(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    (run / "scores.parquet").unlink()
    train_run(tiny_config(), run, resume=True)
    assert digests(run) == digests(finished[0])


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_finished(tmp_path):
    config = tiny_config(training={"learning_rate": 1e30, "max_grad_norm": 0.0, "steps_per_task": 8})
    with pytest.raises(DriftLensError, match=r"loss of task 'colour' is no longer finite from step \d of 8"):
        train_run(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [START]


def test_decoders_that_flatten_their_tokens(tmp_path):
    """OPT hands [batch * n, d] to its feed-forward layers; gates are then flat, and so must the mask be."""
    from transformers import OPTConfig, OPTForCausalLM

    from driftlens.backbones.tiny import tiny_tokenizer

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    base = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
        )
    )
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = tiny_config(
        base=str(tmp_path / "base"),
        stream={"tasks": ["parity"]},
        adapter={"target_modules": ["fc1", "fc2"], "layers": [1]},
        training={"steps_per_task": 2, "prefix_cache": "off"},
    )
    train_run(config, tmp_path / "run")
    log = pd.read_parquet(tmp_path / "run/train_log.parquet")
    assert log["gate_entropy"].between(0, 1).all()


def test_stream_options_choose_tasks_and_sizes():
    stream = build_stream(tiny_config(stream={"tasks": ["shape", "colour"]}))
    assert [task.name for task in stream] == ["shape", "colour"]
    assert {len(task.train) for task in stream} == {12}
    assert {len(task.test) for task in stream} == {4}
