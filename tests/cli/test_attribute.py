"""``driftlens attribute``: the table, JSON, the dry run, a pair without a run, and every wrong input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from driftlens.analysis import open_run
from driftlens.recording import ProbeSample, ProbeSet, write_probes
from driftlens.store import Manifest
from driftlens.streams import load_stream
from driftlens.training import train_run
from tests.attribution.support import save_plain_pair
from tests.training.support import tiny_config

LEAN = ("--nodes", 3, "--depth", 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(method={"name": "moe-lora"}, stream={"tasks": ["colour", "parity"]})
    return train_run(config, tmp_path_factory.mktemp("cli") / "run")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_the_table_has_a_line_per_task_and_its_largest_sites(cli, run: Path) -> None:
    code, out, err = cli("attribute", run, *LEAN)
    assert code == 0
    lines = out.splitlines()
    header = lines[0]
    assert all(name in header for name in ("forgetting", "rise", "ledger router", "ledger experts", "residual"))
    assert "phi_router (nll)" in header
    assert lines[1].startswith("colour  02-parity")
    at = lines.index("  colour at 02-parity")
    assert "shared out by depth: layer 2 " in lines[at + 1]
    assert all("model.language_model.layers." in line for line in lines[at + 2 : at + 5])
    assert "1 old task(s), each" in err
    assert "3 backwards" in err
    assert f"dl.open({str(run)!r}).attribution" in err
    assert Manifest.load(run).verify() == []


def test_json_rows_are_the_numbers_of_the_table_in_python(cli, run: Path) -> None:
    code, out, err = cli("attribute", run, *LEAN, "--json", "--quiet")
    assert (code, err) == (0, "")
    (row,) = json.loads(out)
    found = open_run(run).attribution.sel(task="colour", checkpoint=2)
    assert (row["task"], row["anchor"], row["checkpoint"], row["samples"]) == ("colour", 1, 2, 4)
    for name, value in (
        ("rise", found["rise"]),
        ("ledger_router", found["ledger_part"].sel(part="router")),
        ("ledger_experts_high", found["ledger_part_high"].sel(part="experts")),
        ("phi_experts_nll", found["phi_experts"].sel(score="nll")),
        ("forgetting_lenient", found["forgetting"].sel(score="lenient")),
        ("residual_share", found["residual_share"]),
    ):
        assert row[name] == float(value), name
    assert row["ledger_router"] + row["ledger_experts"] + row["residual"] == pytest.approx(row["rise"])
    assert len(row["largest"]) == 3
    code, out, _ = cli("attribute", run, *LEAN, "--json", "--no-swaps", "--quiet")
    assert json.loads(out) == [row], "kept, swaps included"
    code, out, _ = cli("attribute", run, *LEAN, "--json", "--no-swaps", "--quiet", "--fresh")
    assert json.loads(out)[0].get("phi_router_nll") is None


def test_a_dry_run_says_what_it_takes_and_writes_nothing(cli, run: Path) -> None:
    code, out, _ = cli("attribute", run, *LEAN, "--restores", "--dry-run", "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert row["backwards"] == 3
    assert row["forwards"] == 2 + 3 + 4 + 19
    assert row["seconds"] > 0
    assert row["bytes"] > 1000
    assert not (run / "attribution").exists()


def test_two_adapters_without_a_run(cli, tmp_path: Path) -> None:
    anchor, current = save_plain_pair(tmp_path)
    write_probes(ProbeSet.from_stream(load_stream("toy", probe=3)).select(["parity"]), tmp_path / "probes")
    words = ("--anchor", anchor, "--current", current, "--probes", tmp_path / "probes", "--base", "tiny-random")
    out = tmp_path / "found.h5"
    code, stdout, err = cli("attribute", *words, "--out", out, *LEAN)
    assert code == 0
    assert out.is_file()
    assert stdout.splitlines()[1].startswith("parity  02-second")
    assert f"Kept in {out}." in err
    code, stdout, _ = cli("attribute", *words, "--out", out, *LEAN, "--json")
    assert json.loads(stdout)[0]["ledger_router"] == 0.0


def test_probes_without_answers_are_refused(cli, tmp_path: Path) -> None:
    anchor, current = save_plain_pair(tmp_path)
    rows = (ProbeSample("0", input_ids=(40, 50, 60), answer_ids=()),)
    write_probes(ProbeSet({"ids": rows}), tmp_path / "probes")
    words = ("--anchor", anchor, "--current", current, "--probes", tmp_path / "probes", "--base", "tiny-random")
    code, _, err = cli("attribute", *words, "--out", tmp_path / "found.h5")
    assert code == 5
    assert "answer" in err
    assert not (tmp_path / "found.h5").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "Give a RUN, or two adapters"),
        (("RUN", "--out", "x.h5"), 2, "--out belongs to two adapters"),
        (("RUN", "--semantics", "coin"), 2, "--semantics belongs to two adapters"),
        (("--anchor", "a", "--current", "b"), 2, "--probes, --out is missing"),
        (("--anchor", "a", "--current", "b", "--probes", "p", "--out", "o", "--at", "all"), 2, "--at belongs to a RUN"),
        (("RUN", "--at", "soon"), 2, "--at is 'soon'"),
        (("RUN", "--at", "1"), 2, "is old at checkpoint 1"),
        (("RUN", "--at", "7"), 2, "Unknown checkpoint '7'"),
        (("RUN", "--task", "color"), 2, "Did you mean 'colour'?"),
        (("RUN", "--task", "parity"), 2, "learned at checkpoint 2"),
        (("RUN", "--tolerance", "0"), 2, "tolerance is 0"),
        (("RUN", "--nodes", "0"), 2, "nodes is 0"),
        (("nowhere",), 3, "is not a run"),
    ],
)
def test_wrong_command_lines_are_one_message(cli, run: Path, words: tuple[str, ...], code: int, said: str) -> None:
    found, out, err = cli("attribute", *(run if word == "RUN" else word for word in words))
    assert (found, out) == (code, "")
    assert said in err.replace("\n", " ")
    assert not (run / "attribution").exists()


def test_a_thinned_run_says_that_its_weights_are_missing(cli) -> None:
    code, _, err = cli("attribute", Path(__file__).parents[2] / "sample_runs" / "moe-lora")
    assert code == 3
    assert "holds no weights" in err
