"""The command line as users meet it: the whole path on a tiny stream, and every wrong input."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.training.support import tiny_config


def write_config(folder: Path, method: dict, **sections) -> Path:
    path = folder / f"{method['name']}.yaml"
    config = tiny_config(method=method, **sections)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two trained and recorded tiny runs, made through the library."""
    from driftlens.recording import record_run
    from driftlens.training import train_run

    folder = tmp_path_factory.mktemp("cli-runs")
    for name in ("moe-lora", "pass-moe"):
        train_run(tiny_config(method={"name": name}), folder / name)
        record_run(folder / name)
    return folder


def test_the_whole_path(cli, tmp_path):
    config = write_config(tmp_path, {"name": "moe-lora"}, training={"steps_per_task": 2})
    run = tmp_path / "run"
    code, out, err = cli("train", config, "training.seed=5", "--out", run, "--json", "--quiet")
    assert (code, err) == (0, "")
    (row,) = json.loads(out)
    assert {"AP", "BWT_T", "BWT_T-1", "MAA", "FWT"} <= row.keys()
    assert 0 <= row["AP"] <= 1
    code, out, _ = cli("record", "--run", run, "--json", "--quiet")
    assert code == 0
    assert [r["checkpoint"] for r in json.loads(out)][:4] == ["00-start", "01-colour", "02-parity", "03-shape"]
    code, out, _ = cli("record", "--run", run, "--json", "--quiet")
    assert all(r["skipped"] for r in json.loads(out)), "recording again keeps what is there"
    code, out, _ = cli("analyze", run, "--json", "--quiet")
    rows = json.loads(out)
    assert code == 0
    assert {"probe", "checkpoint", "router_js", "router_js_low", "codrift_divergence", "gate_entropy"} <= rows[0].keys()
    moved = [r for r in rows if r["probe"] == "colour" and r["checkpoint"] == 3]
    assert moved[0]["router_js"] > 0
    assert moved[0]["codrift_divergence"] > 0
    code, out, _ = cli("verify", run, "--json")
    assert (code, json.loads(out)) == (0, [])


def test_relative_paths(cli, tmp_path, monkeypatch):
    """What the README writes: run folders relative to the current one, in every command."""
    config = write_config(tmp_path, {"name": "moe-lora"}, training={"steps_per_task": 1}, stream={"tasks": ["colour"]})
    monkeypatch.chdir(tmp_path)
    assert cli("train", config.name, "--out", "runs/deep/x", "--quiet")[0] == 0
    for command in (
        ("record", "--run", "runs/deep/x", "--quiet"),
        ("record", "--run", "runs/deep/x", "--quiet"),
        ("analyze", "runs/deep/x", "--quiet"),
        ("compare", "runs/deep/x"),
        ("verify", "runs/deep/x"),
        ("ls", "runs/deep"),
        ("train", "--out", "runs/deep/x", "--resume", "--quiet"),
    ):
        code, _, err = cli(*command)
        assert code == 0, (command, err)


def test_compare_prints_one_object_per_run(cli, runs):
    code, out, _ = cli("compare", runs / "moe-lora", runs / "pass-moe", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["method"] for row in rows] == ["moe-lora", "pass-moe"]
    for row in rows:
        assert row["router_js_low"] <= row["router_js"] <= row["router_js_high"]
        assert 0 <= row["codrift_divergence"] <= 1
        assert 0 <= row["gate_entropy"] <= 1
    code, out, _ = cli("compare", runs / "moe-lora", runs / "pass-moe")
    assert code == 0
    assert "BWT_T-1" in out


def test_analyze_writes_files(cli, runs, tmp_path):
    import pandas as pd

    for suffix, read in ((".csv", pd.read_csv), (".parquet", pd.read_parquet), (".json", pd.read_json)):
        code, _, _ = cli("analyze", runs / "moe-lora", "--out", tmp_path / f"t{suffix}", "--quiet")
        assert code == 0
        assert "codrift_divergence" in read(tmp_path / f"t{suffix}").columns
    code, _, err = cli("analyze", runs / "moe-lora", "--out", tmp_path / "t.xls")
    assert code == 2
    assert "Allowed endings: .csv, .parquet, .json" in err


def test_ls_methods_streams_sites(cli, runs):
    code, out, _ = cli("ls", runs, "--json")
    assert {row["name"]: row["complete"] for row in json.loads(out)} == {"moe-lora": True, "pass-moe": True}
    code, out, _ = cli("methods", "--json")
    assert {"seq-lora", "moe-lora", "moe-lora-topk", "pass-moe"} <= {row["name"] for row in json.loads(out)}
    code, out, _ = cli("streams", "--json")
    builtin = [row["task"] for row in json.loads(out) if row["stream"] == "builtin"]
    assert len(builtin) >= 6
    code, out, _ = cli("sites", runs / "moe-lora" / "checkpoints" / "03-shape", "--json")
    sites = json.loads(out)
    assert code == 0
    assert len(sites) == 6  # two layers, three projections
    assert {site["num_experts"] for site in sites} == {3}


def test_dry_run_writes_nothing(cli, tmp_path):
    config = write_config(tmp_path, {"name": "pass-moe"})
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = cli("train", config, "--out", tmp_path / "run", "--dry-run", "--json")
    rows = {row["what"]: row["value"] for row in json.loads(out)}
    assert code == 0
    assert rows["optimizer steps"] == 12
    assert rows["first adapted layer (below: computed once)"] == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_counts_the_parameters_that_are_trained(cli, runs, tmp_path):
    from safetensors.torch import load_file

    config = write_config(tmp_path, {"name": "moe-lora"})
    _, out, _ = cli("train", config, "--dry-run", "--json")
    promised = {row["what"]: row["value"] for row in json.loads(out)}["trainable parameters"]
    weights = load_file(runs / "moe-lora/checkpoints/03-shape/adapter_model.safetensors")
    assert promised == sum(value.numel() for value in weights.values())


def test_help_imports_no_torch():
    code = (
        "import sys\nsys.argv = ['driftlens', '--help']\n"
        "from driftlens.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'pandas', 'xarray', 'h5py'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Exit codes" in done.stdout


# -- wrong input: one clear error, the documented exit code, nothing lost ------------------------------------------


def test_missing_things(cli, tmp_path):
    code, _, err = cli("record", "--ckpt", tmp_path / "none", "--base", "tiny-random")
    assert code == 3
    assert str(tmp_path / "none") in err.replace("\n", "")
    for command in (
        ("analyze", tmp_path / "none"),
        ("verify", tmp_path / "none"),
        ("record", "--run", tmp_path / "none"),
    ):
        code, _, err = cli(*command)
        assert code == 3, err
        assert err.startswith("Error: ")
    code, _, err = cli("train", tmp_path / "none.yaml", "--out", tmp_path / "run")
    assert code == 3
    assert not (tmp_path / "run").exists()


def test_unknown_method_key_and_command(cli, tmp_path):
    code, _, err = cli("train", "method.name=pas-moe", "--out", tmp_path / "run")
    assert code == 2
    assert "Did you mean 'pass-moe'?" in err
    code, _, err = cli("train", "builtin/pass-moe", "training.learning_rat=1", "--out", tmp_path / "run")
    assert code == 2
    assert "Did you mean 'learning_rate'?" in err
    assert cli("trian")[0] == 2
    code, _, err = cli("record")
    assert code == 2
    assert "exactly one of --run" in err
    assert list(tmp_path.iterdir()) == []


def test_training_into_an_existing_run(cli, runs, tmp_path):
    config = write_config(tmp_path, {"name": "moe-lora"})
    before = {p: p.stat().st_mtime_ns for p in (runs / "moe-lora").rglob("*.parquet")}
    code, _, err = cli("train", config, "--out", runs / "moe-lora")
    assert code == 2
    assert "--resume" in err
    assert {p: p.stat().st_mtime_ns for p in (runs / "moe-lora").rglob("*.parquet")} == before


def test_a_probe_set_that_does_not_fit(cli, runs, tmp_path):
    probes = tmp_path / "probes"
    probes.mkdir()
    (probes / "probe_set.yaml").write_text("tasks: [words]\nseed: 0\nlicence: CC0\n")
    (probes / "words.jsonl").write_text(
        '{"id": "1", "prompt": "what?", "answer": "that", "image": "images/none.png"}\n'
    )
    ckpt = runs / "moe-lora" / "checkpoints" / "03-shape"
    out = tmp_path / "x.h5"
    code, _, err = cli("record", "--ckpt", ckpt, "--probes", probes, "--out", out, "--quiet")
    assert code == 5, err
    assert "none.png" in err.replace("\n", "")
    assert not out.exists()


def test_a_corrupt_recording(cli, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "moe-lora", run)
    (run / "analysis.h5").unlink(missing_ok=True)
    damaged = run / "recordings" / "02-parity.h5"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    code, out, _ = cli("verify", run, "--json")
    assert code == 4
    assert any("02-parity.h5" in row["path"] for row in json.loads(out))
    code, _, err = cli("analyze", run, "--quiet")
    assert code == 4
    assert "02-parity.h5" in err.replace("\n", "")
    assert cli("analyze", runs / "moe-lora", "--quiet")[0] == 0, "other runs are unaffected"


@pytest.mark.parametrize("limit", [2_000, 9_000])
@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs POSIX resource limits")
def test_a_full_disk_while_training(limit, tmp_path):
    config = write_config(tmp_path, {"name": "pass-moe"})
    out = tmp_path / "run"
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"sys.argv = ['driftlens', 'train', {str(config)!r}, '--out', {str(out)!r}, '--quiet']\n"
        "from driftlens.cli.main import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(out.rglob("*.partial"))


def test_a_configuration_that_cannot_work_leaves_nothing(cli, tmp_path):
    out = tmp_path / "run"
    for wrong in (
        ("base=tiny-random", "adapter.target_modules=[foo]"),
        ("base=tiny-random", "adapter.num_experts=0"),
        ("base=tiny-random", "training.device=nowhere"),
        ("base=tiny-random", "training.lr_scheduler=cosin"),
        ("base=tiny-random", "training.learning_rate=.inf"),
        (f"base={tmp_path / 'none'}",),
    ):
        code, _, err = cli("train", "stream.name=toy", "method.name=moe-lora", *wrong, "--out", out, "--quiet")
        assert code in (2, 3), (wrong, err)
        assert not (out / "manifest.json").exists()
        assert not (out / "config.yaml").exists()


def test_resume_without_a_run(cli, tmp_path):
    code, _, err = cli("train", "--out", tmp_path / "typo", "--resume", "--quiet")
    assert code == 3
    assert "no run to resume" in err.replace("\n", " ")
    assert not (tmp_path / "typo" / "manifest.json").exists()


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs POSIX resource limits")
def test_a_full_disk_loses_nothing(runs, tmp_path):
    """A file-size limit makes the operating system refuse writes, as a full disk does."""
    ckpt = runs / "moe-lora" / "checkpoints" / "03-shape"
    target = tmp_path / "x.h5"
    target.write_bytes(b"precious")
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        f"sys.argv = ['driftlens', 'record', '--ckpt', {str(ckpt)!r}, '--fresh', '--out', {str(target)!r}, '--quiet',"
        f" '--probes', {str(tmp_path / 'probes')!r}]\n"
        "from driftlens.cli.main import main\nmain()\n"
    )
    from driftlens.recording import ProbeSet, write_probes
    from driftlens.streams import load_stream

    write_probes(ProbeSet.from_stream(load_stream("toy")), tmp_path / "probes")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert "Traceback" not in done.stderr
    assert "Nothing that was finished before is lost" in done.stderr.replace("\n", " ")
    assert target.read_bytes() == b"precious"
    assert not list(tmp_path.glob("*.partial"))
