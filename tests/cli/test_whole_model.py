"""A fine-tuned transformers mixture of experts, folder by folder, through the command line alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from driftlens.recording import write_probes
from tests.recording.families.suite import probes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    root = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip
    for name in ("task1", "task2"):
        model.save_pretrained(root / name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("gate.weight"):
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
    write_probes(probes(), root / "probes")
    return root


def test_from_folders_to_drift(cli, folders: Path, tmp_path: Path) -> None:
    code, out, _ = cli("sites", folders / "task1", "--json")
    assert code == 0
    assert {(row["family"], row["num_experts"], row["rank"]) for row in json.loads(out)} == {("native-moe", 4, 0)}
    for name in ("task1", "task2"):
        path = tmp_path / f"{name}.h5"
        code, out, _ = cli("record", "--ckpt", folders / name, "--probes", folders / "probes", "--out", path, "--json")
        assert code == 0
        assert json.loads(out)[0]["sites"] == 2
    code, out, err = cli("collect", tmp_path / "task1.h5", tmp_path / "task2.h5", "--out", tmp_path / "run")
    assert code == 0
    assert "01-first" in out
    assert "driftlens analyze" in err
    code, out, _ = cli("analyze", tmp_path / "run", "--json")
    rows = {(row["probe"], row["checkpoint_name"]): row for row in json.loads(out)}
    assert code == 0
    assert rows["first", "02-second"]["router_js"] > 0.05
    assert rows["first", "02-second"]["codrift_divergence"] is None
    assert cli("verify", tmp_path / "run")[0] == 0


def test_a_whole_model_takes_no_base(cli, folders: Path, tmp_path: Path) -> None:
    code, _, err = cli("record", "--ckpt", folders / "task1", "--base", "builtin", "--out", tmp_path / "x.h5")
    assert code == 2
    assert "holds a whole model, not an adapter" in " ".join(err.split())
    assert not (tmp_path / "x.h5").exists()
