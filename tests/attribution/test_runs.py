"""Attributing a tiny run and a lone pair of adapters: what is written, kept, made again and refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
from safetensors.torch import load_file, save_file

from driftlens.analysis import open_run
from driftlens.analysis.attribution import attribution_rows, open_attribution
from driftlens.analysis.attribution_files import read_cell
from driftlens.attribution import (
    AttributionOptions,
    CellSummary,
    attribute_pair,
    attribute_run,
    estimate_pair,
    estimate_run_attribution,
)
from driftlens.backbones import load_backbone
from driftlens.errors import (
    ConfigError,
    DriftLensError,
    FormatError,
    LockedError,
    NotFoundError,
    ProbeError,
    SiteError,
    UnknownNameError,
)
from driftlens.recording import ProbeSample, ProbeSet
from driftlens.recording.recorder import Progress
from driftlens.store import Manifest, RunLock
from driftlens.store.repair import repair_run
from driftlens.streams import load_stream
from driftlens.training import train_run
from tests.attribution.support import save_pair, save_plain_pair
from tests.training.support import tiny_config

OPTIONS = AttributionOptions(nodes=3, depth=2, permutations=2, restores=True, batch_size=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of three tasks that no test may change."""
    return train_run(tiny_config(method={"name": "moe-lora"}), tmp_path_factory.mktemp("attribute") / "run")


@pytest.fixture(scope="module")
def attributed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[CellSummary]]:
    """The same with both old tasks of the last checkpoint attributed, in one go."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("attributed") / "run"))
    return folder, attribute_run(folder, OPTIONS)


@pytest.fixture
def fresh(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def copy(attributed: tuple[Path, list[CellSummary]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(attributed[0], tmp_path / "run"))


def datasets(folder: Path) -> dict[str, bytes]:
    """Bytes of every dataset of every file, by name."""
    found: dict[str, bytes] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            values = item.asstr()[...].tolist() if h5py.check_string_dtype(item.dtype) else item[...].tobytes()
            found[f"{path.relative_to(folder)}:{name}"] = repr(values).encode()

    for path in sorted((folder / "attribution").rglob("*.h5")):
        with h5py.File(path) as file:
            file.visititems(visit)
    return found


def test_every_old_task_has_a_file_that_the_manifest_lists(attributed) -> None:
    folder, summaries = attributed
    assert [summary.path.relative_to(folder).as_posix() for summary in summaries] == [
        "attribution/03-shape/01-colour.h5",
        "attribution/03-shape/02-parity.h5",
    ]
    assert Manifest.load(folder).verify() == []
    assert all(set(s.seconds) == {"load", "ledger", "swaps", "depth", "restores", "write"} for s in summaries)
    about = read_cell(summaries[0].path).about
    assert (about["task"], about["anchor"], about["current"], about["base"]) == (
        "colour", "01-colour", "03-shape", "tiny-random",
    )  # fmt: skip
    assert about["settings"]["nodes"] == 3
    assert about["settings"]["threads"] == 1
    assert "torch" in about["versions"]


def test_the_ledger_and_its_residual_are_the_rise_and_the_swaps_the_measured_forgetting(attributed) -> None:
    table = open_run(attributed[0]).attribution
    scores = open_run(attributed[0]).scores
    assert len(attribution_rows(table)) == 2
    for task, anchor in (("colour", 1), ("parity", 2)):
        found = table.sel(task=task, checkpoint=3)
        total = found["ledger"].sum(("site", "part", "expert")) + found["residual"]
        assert float(total) == pytest.approx(float(found["rise"]), abs=1e-12)
        parts = found["phi_router"] + found["phi_experts"] + found["remainder"]
        assert parts.to_numpy() == pytest.approx(found["forgetting"].to_numpy(), abs=1e-6)
        assert float(found["depth_shapley"].sum()) == pytest.approx(float(found["rise"]), abs=1e-5)
        nll = scores["nll"].sel(task=task)
        assert float(nll.sel(checkpoint=3) - nll.sel(checkpoint=anchor)) == pytest.approx(
            float(found["forgetting"].sel(score="nll"))
        )
        assert float(found["rise"]) != 0


def test_current_swaps_are_the_scores_that_the_run_was_given(attributed) -> None:
    for summary in attributed[1]:
        tables = read_cell(summary.path).tables
        measured = tables["scores"]["scores"]
        np.testing.assert_array_equal(tables["swaps"]["scores"].sel(combination="cc"), measured.sel(state="current"))
        np.testing.assert_array_equal(tables["swaps"]["anchor_alone"], measured.sel(state="anchor"))


def test_tokens_and_samples_of_a_file_add_up_to_its_sites(attributed) -> None:
    tables = read_cell(attributed[1][0].path).tables
    tokens = tables["tokens"]
    entries = tables["ledger"]["entries"]
    by_sample = tokens["entries"].groupby(tokens["sample"]).sum()
    np.testing.assert_allclose(by_sample.transpose("sample", "part"), entries.sum(("site", "expert")), atol=1e-12)
    encoder = load_backbone("tiny-random").need_encoder()
    first = encoder.encode(load_stream("toy", train=12, test=4).task("colour").test[0])
    own = tokens.isel(token=(tokens["sample"] == 0).to_numpy())
    assert own["token_id"].to_numpy().tolist() == first.input_ids.tolist()
    assert own["position"].to_numpy().tolist() == list(range(len(first.input_ids)))
    assert own["role"].to_numpy().tolist() == first.roles.tolist()


class Killed(BaseException):
    """As a signal would, it passes every `except Exception`."""


def kill_at(message: str) -> Callable[[Progress], None]:
    def report(step: Progress) -> None:
        if step.message == message:
            raise Killed

    return report


@pytest.mark.parametrize("message", ["colour: swaps", "parity: single sites"])
def test_a_killed_attribution_ends_with_the_same_bytes_in_every_dataset(attributed, fresh: Path, message: str) -> None:
    with pytest.raises(Killed):
        attribute_run(fresh, OPTIONS, progress=kill_at(message))
    assert Manifest.load(fresh).verify() == []
    done = attribute_run(fresh, OPTIONS)
    assert [summary.skipped for summary in done] == [message.startswith("parity"), False]
    assert datasets(fresh) == datasets(attributed[0])
    assert Manifest.load(fresh).verify() == []


def test_finished_cells_are_kept_and_a_part_less_needs_no_new_one(copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (copy / "attribution").rglob("*.h5")}
    told: list[object] = []
    for options in (OPTIONS, replace(OPTIONS, swaps=False), replace(OPTIONS, depth=0, restores=False)):
        summaries = attribute_run(copy, options, on_estimate=told.append)
        assert all(summary.skipped for summary in summaries)
    assert {path: path.stat().st_mtime_ns for path in (copy / "attribution").rglob("*.h5")} == before
    assert told == []


def test_other_settings_and_damaged_files_are_made_again(attributed, copy: Path) -> None:
    path = copy / "attribution" / "03-shape" / "01-colour.h5"
    path.write_bytes(path.read_bytes()[:-100])
    assert [summary.skipped for summary in attribute_run(copy, OPTIONS)] == [False, True]
    assert datasets(copy) == datasets(attributed[0])
    lean = replace(OPTIONS, nodes=2, swaps=False, depth=0, restores=False)
    assert [summary.skipped for summary in attribute_run(copy, lean, tasks=["colour"])] == [False]
    assert set(read_cell(path).tables) == {"scores", "ledger", "tokens"}
    row = attribution_rows(open_run(copy).attribution)[0]
    assert "phi_router_nll" in row
    assert np.isnan(row["phi_router_nll"])
    assert np.isfinite(row["forgetting_lenient"]), "measured without swaps too"
    assert Manifest.load(copy).verify() == []


def test_an_estimate_says_which_files_would_be_replaced(copy: Path) -> None:
    told = [one.note for one in estimate_run_attribution(copy, replace(OPTIONS, nodes=2))]
    assert told == ["there already with other settings or checkpoints: is replaced"] * 2


def test_a_checkpoint_that_was_trained_again_is_attributed_again(copy: Path) -> None:
    weights = copy / "checkpoints" / "02-parity" / "adapter_model.safetensors"
    save_file({name: 1.1 * value for name, value in load_file(weights).items()}, weights)
    manifest = Manifest.load(copy)
    manifest.add(weights)
    manifest.save()
    assert [row["task"] for row in attribution_rows(open_run(copy).attribution)] == ["colour"], "parity's is stale"
    assert [s.skipped for s in attribute_run(copy, OPTIONS)] == [True, False]
    assert len(attribution_rows(open_run(copy).attribution)) == 2


def test_repair_takes_a_damaged_file_out_to_be_made_again(copy: Path) -> None:
    path = copy / "attribution" / "03-shape" / "01-colour.h5"
    path.write_bytes(b"damaged")
    done = repair_run(copy)
    assert any("driftlens attribute" in step.why for step in done)
    assert Manifest.load(copy).verify() == []
    assert [summary.skipped for summary in attribute_run(copy, OPTIONS)] == [False, True]


def test_all_checkpoints_and_chosen_tasks(fresh: Path) -> None:
    lean = AttributionOptions(nodes=1, swaps=False, depth=0)
    made = attribute_run(fresh, lean, at="all")
    assert [(s.checkpoint, s.task) for s in made] == [
        ("02-parity", "colour"), ("03-shape", "colour"), ("03-shape", "parity"),
    ]  # fmt: skip
    chosen = attribute_run(fresh, lean, at=2, tasks=["colour"])
    assert [(s.checkpoint, s.task, s.skipped) for s in chosen] == [("02-parity", "colour", True)]
    assert open_run(fresh).attribution["reason"].to_numpy().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_a_tolerance_refines_the_path(fresh: Path) -> None:
    lean = AttributionOptions(nodes=1, swaps=False, depth=0, tolerance=1e-6, max_nodes=5)
    (made,) = attribute_run(fresh, lean, tasks=["colour"])
    assert read_cell(made.path).tables["ledger"].attrs["evaluations"] == 5


def test_an_estimate_counts_and_writes_nothing(fresh: Path) -> None:
    before = sorted(path for path in fresh.rglob("*") if not path.name.startswith(".lock"))
    colour, parity = estimate_run_attribution(fresh, OPTIONS)
    assert sorted(path for path in fresh.rglob("*") if not path.name.startswith(".lock")) == before
    # two ends and the nodes of the path, 2^2 coalitions, and each of six sites put back in three ways
    assert (colour.forwards, colour.backwards, colour.scorings) == (2 + 3 + 4 + 1 + 6 * 3, 3, 5)
    assert colour.seconds is not None
    assert colour.note == ""
    tables = read_cell(attribute_run(fresh, OPTIONS, tasks=["parity"])[0].path).tables
    assert parity.tokens == tables["tokens"].sizes["token"]
    arrays = sum(v.nbytes for table in tables.values() for v in table.data_vars.values())
    assert parity.bytes == pytest.approx(arrays, rel=0.1)
    assert [one.note for one in estimate_run_attribution(fresh, OPTIONS)] == ["", "there already: kept"]


def _thin(run: Path) -> None:
    manifest = Manifest.load(run)
    for path in (run / "checkpoints").rglob("adapter_model.safetensors"):
        manifest.remove(path.relative_to(run))
        path.unlink()
    manifest.save()


def _damage(run: Path) -> None:
    path = run / "checkpoints" / "01-colour" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")


def _other_stream(run: Path) -> None:
    manifest = Manifest.load(run)
    manifest.stream_sha256 = "0" * 64
    manifest.save()


def _other_base(run: Path) -> None:
    manifest = Manifest.load(run)
    manifest.base["sha256"] = "0" * 64
    manifest.save()


def _nothing(run: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "how", "error", "said"),
    [
        (_thin, {}, NotFoundError, "holds no weights"),
        (_damage, {}, FormatError, "01-colour"),
        (_other_stream, {}, ProbeError, "has changed since it was trained"),
        (_other_base, {}, ConfigError, "base model with hash 000000000000"),
        (_nothing, {"tasks": ["color"]}, UnknownNameError, "Did you mean 'colour'"),
        (_nothing, {"tasks": ["shape"]}, ConfigError, "learned at checkpoint 3"),
        (_nothing, {"tasks": ["parity"], "at": [1]}, ConfigError, "Give a later checkpoint"),
        (_nothing, {"at": 1}, ConfigError, "No task .* is old at checkpoint 1"),
        (_nothing, {"at": 9}, UnknownNameError, "Known: 0, 1, 2, 3"),
    ],
)
def test_what_cannot_be_attributed_is_one_message_and_changes_nothing(
    fresh: Path, change, how: dict, error: type[DriftLensError], said: str
) -> None:
    change(fresh)
    with pytest.raises(error, match=said):
        attribute_run(fresh, OPTIONS, **how)
    assert not (fresh / "attribution").exists()


def test_a_folder_that_is_no_run_is_left_alone_and_a_second_writer_waits(fresh: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is not a run"):
        attribute_run(tmp_path / "none", OPTIONS)
    assert not (tmp_path / "none").exists()
    with RunLock(fresh), pytest.raises(LockedError):
        attribute_run(fresh, OPTIONS)


# --- any two adapters ---------------------------------------------------------------------------------------------


def text_probes(tasks: tuple[str, ...] = ("parity",)) -> ProbeSet:
    return ProbeSet.from_stream(load_stream("toy", probe=4)).select(tasks)


def id_probes(answer: tuple[int, ...] = (70, 1)) -> ProbeSet:
    rows = tuple(ProbeSample(str(n), input_ids=(40 + n, 50, 60), answer_ids=answer) for n in range(4))
    return ProbeSet({"ids": rows})


LEAN = AttributionOptions(nodes=3, depth=2, permutations=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_plain_pair(tmp_path_factory.mktemp("plain"))


def test_plain_lora_answers_which_layers_forgot(plain: tuple[Path, Path], tmp_path: Path) -> None:
    probes = text_probes(("colour", "parity"))
    made = attribute_pair(*plain, probes, tmp_path / "out.h5", LEAN, base="tiny-random")
    assert [summary.path.name for summary in made] == ["out-colour.h5", "out-parity.h5"]
    table = open_attribution(*(summary.path for summary in made))
    rows = attribution_rows(table)
    assert [row["task"] for row in rows] == ["colour", "parity"]
    for row in rows:
        assert row["ledger_router"] == 0.0
        assert row["ledger_experts"] + row["residual"] == pytest.approx(row["rise"])
        assert row["phi_router_nll"] == pytest.approx(0.0, abs=1e-6)
        assert len(row["largest"]) == 3
    again = attribute_pair(*plain, probes, tmp_path / "out.h5", LEAN, base="tiny-random")
    assert all(summary.skipped for summary in again)


def test_samples_given_as_tokens_have_a_likelihood_but_no_accuracy(tmp_path: Path) -> None:
    paths = save_pair(tmp_path, "softmax")
    (made,) = attribute_pair(*paths, id_probes(), tmp_path / "out.h5", LEAN, base="tiny-random")
    (row,) = attribution_rows(open_attribution(made.path))
    assert np.isnan(row["phi_router_strict"])
    assert row["phi_router_nll"] + row["phi_experts_nll"] == pytest.approx(row["rise"], abs=1e-6)
    assert row["remainder_nll"] == pytest.approx(0.0, abs=1e-6)
    assert row["forgetting_nll"] == pytest.approx(row["rise"], abs=1e-6)


def test_a_pair_is_estimated_without_writing(plain: tuple[Path, Path], tmp_path: Path) -> None:
    (found,) = estimate_pair(*plain, id_probes(), tmp_path / "out.h5", LEAN, base="tiny-random")
    assert (found.samples, found.tokens, found.backwards) == (4, 4 * 5, 3)
    assert list(tmp_path.iterdir()) == []
    mute = estimate_pair(*plain, id_probes(()), tmp_path / "out.h5", LEAN, base="tiny-random")
    assert "would fail" in mute[0].note
    assert "have no answer" in mute[0].note


def _mute(plain, tmp_path):
    return (*plain, id_probes(()))


def _same(plain, tmp_path):
    return plain[0], plain[0], text_probes()


def _dora(plain, tmp_path):
    return (*save_plain_pair(tmp_path / "dora", use_dora=True), text_probes())


def _absent(plain, tmp_path):
    return plain[0], tmp_path / "none", text_probes()


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (_mute, ProbeError, "have no answer"),
        (_same, ConfigError, "are one folder"),
        (_dora, SiteError, "rescales the base"),
        (_absent, NotFoundError, "No checkpoint at"),
    ],
)
def test_pairs_that_cannot_be_attributed_are_refused(
    plain, tmp_path: Path, given, error: type[DriftLensError], said: str
) -> None:
    arguments = given(plain, tmp_path)
    with pytest.raises(error, match=said):
        attribute_pair(*arguments, tmp_path / "out.h5", LEAN, base="tiny-random")
    assert not (tmp_path / "out.h5").exists()


def test_every_file_opens_in_xarray_with_its_units(attributed) -> None:
    for summary in attributed[1]:
        with xr.open_datatree(summary.path, engine="h5netcdf") as tree:
            assert tree["depth"]["shapley"].attrs["units"] == "nats"
            assert tree["ledger"].sizes["sample"] == summary.samples
