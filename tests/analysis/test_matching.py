"""Experts of two recorded runs: counterparts found, chance told, and nothing compared that is not aligned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import driftlens as dl
from driftlens.analysis import Run, open_run
from driftlens.errors import ConfigError, NotFoundError, ProbeError, SiteError, UnknownNameError
from driftlens.metrics import Reason
from tests.analysis import synthetic
from tests.analysis.synthetic import Parameters, make_run

ORDER = np.array([2, 0, 3, 1])
"""Expert f of the relabelled run is expert ORDER[f] of the first."""


def relabelled(states: list[list[Parameters]]) -> list[list[Parameters]]:
    return [[Parameters(p.A[ORDER], p.B[ORDER], p.router[ORDER]) for p in state] for state in states]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matching")


@pytest.fixture(scope="module")
def first(folder: Path) -> Run:
    return open_run(make_run(folder / "first"))


@pytest.fixture(scope="module")
def renamed(folder: Path) -> Run:
    original: Any = synthetic._trajectory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_trajectory", lambda *arguments: relabelled(original(*arguments)))
        return open_run(make_run(folder / "renamed"))


@pytest.mark.parametrize("unit", ["token", "sample"])
@pytest.mark.parametrize("profile", ["responsibility", "gate"])
def test_a_relabelled_run_is_recognised(first: Run, renamed: Run, profile: Any, unit: Any) -> None:
    found = dl.match_experts(first, renamed, profile=profile, unit=unit, draws=200)
    np.testing.assert_array_equal(found["partner"], np.tile(np.argsort(ORDER), (4, 1)))
    np.testing.assert_allclose(found["score"], 1, atol=1e-9)
    assert float(found["p"].max()) <= 0.05
    assert float(found["overall_p"]) <= 0.01
    assert (found["other_mean"] < 0.9).all()
    np.testing.assert_allclose(found["other_p"], 1 / 4)  # three other sites, none as good
    assert found["site"].to_numpy().tolist() == [site.name for site in first.recording(3).sites]
    assert found.attrs["units"] == first.recording(3).n_tokens if unit == "token" else 18
    assert found.attrs["checkpoint_a"] == found.attrs["checkpoint_b"] == "03-country"


def test_aligned_measures_stand_beside_their_counterparts(first: Run, renamed: Run) -> None:
    for measure in ("load", "active_rank", "rank_importance"):
        table = dl.align_experts(first, renamed, measure)
        assert bool(table["aligned"].all())
        np.testing.assert_allclose(table[f"{measure}_a"], table[f"{measure}_b"], rtol=1e-5)
    assert table["rank_importance_b"].attrs["within_run"] == 1
    load = first.drift["load"].isel(checkpoint=-1)
    np.testing.assert_array_equal(dl.align_experts(first, renamed, "load")["load_a"], load)


def test_unrelated_runs_are_not_matched_and_not_compared(folder: Path) -> None:
    # Wide inputs: random routers on few input dimensions have habits in common.
    wide, stranger = (open_run(make_run(folder / f"wide{seed}", d_in=400, seed=seed)) for seed in (0, 6))
    found = dl.match_experts(wide, stranger, draws=200)
    assert float(found["overall_p"]) > 0.05
    assert float(found["overall_score"]) > 0.1  # and yet the best pairing looks like something
    with pytest.raises(
        ConfigError, match=r"No expert of wide0 has a counterpart in wide6 at alpha = 0.05 \(score 0.16"
    ):
        dl.align_experts(wide, stranger, "load", matching=found)


def test_only_experts_that_are_vouched_for_are_compared(first: Run, renamed: Run) -> None:
    found = dl.match_experts(first, renamed, draws=200)
    doubted = found.copy(deep=True)
    doubted["p"][0] = 0.2
    doubted["other_p"][1] = 0.5
    doubted["score_p"][2, 1] = 0.2
    doubted["partner"][3, 0] = -1
    table = dl.align_experts(first, renamed, "load", matching=doubted)
    expected = np.ones((4, 4), dtype=bool)
    expected[:2], expected[2, 1], expected[3, 0] = False, False, False
    np.testing.assert_array_equal(table["aligned"], expected)
    for name in ("load_a", "load_b"):
        np.testing.assert_array_equal(~np.isnan(table[name]).to_numpy(), np.broadcast_to(expected, (3, 4, 4)))


def test_other_probes_are_refused(folder: Path, first: Run) -> None:
    other = open_run(make_run(folder / "probes", probe_seed=8))
    with pytest.raises(ProbeError, match=r"tokens of probe 'digit' differ between .*first.* and .*probes"):
        dl.match_experts(first, other)


def test_runs_without_anything_in_common_are_refused(
    folder: Path, first: Run, renamed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = open_run(make_run(folder / "bare", recordings=False))
    with pytest.raises(NotFoundError, match=r"bare of \[\]: none in common"):
        dl.match_experts(first, bare)
    monkeypatch.setattr(synthetic, "KINDS", ("q_proj", "v_proj"))
    elsewhere = open_run(make_run(folder / "elsewhere"))
    with pytest.raises(SiteError, match="have no site in common"):
        dl.match_experts(first, elsewhere)
    with pytest.raises(UnknownNameError, match="Unknown unit 'word'"):
        dl.match_experts(first, renamed, unit="word")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="Unknown checkpoint '9'"):
        dl.match_experts(first, renamed, 9)
    with pytest.raises(UnknownNameError, match="measure of single experts 'router_js'"):
        dl.align_experts(first, renamed, "router_js")
    with pytest.raises(ConfigError, match="The matching is of"):
        dl.align_experts(renamed, first, "load", matching=dl.match_experts(first, renamed, draws=1))


def test_what_cannot_be_matched_says_why(folder: Path, first: Run, renamed: Run) -> None:
    start = dl.match_experts(first, renamed, "00-start", draws=19)
    assert (start["reason"] == Reason.NO_OUTPUT).all()
    assert np.isnan([*start["site_score"], *start["p"], *start["other_p"], float(start["overall_p"])]).all()
    flat = open_run(make_run(folder / "flat", gate="uniform"))
    routed = dl.match_experts(flat, flat, profile="gate", draws=19)
    assert (routed["reason"] == Reason.BELOW_NOISE_FLOOR).all()
    assert (routed["partner"] == -1).all()
    assert bool(routed["near_uniform_a"].all())
    lone = open_run(make_run(folder / "lone", num_experts=1))
    assert (dl.match_experts(lone, first, draws=19)["reason"] == Reason.ONE_EXPERT).all()
    assert (dl.match_experts(first, renamed, draws=19)["reason"] == Reason.DEFINED).all()
    assert not bool(dl.match_experts(first, renamed, draws=19)["near_uniform_b"].any())


def test_runs_of_other_widths_are_matched_as_far_as_experts_go(folder: Path, first: Run) -> None:
    grown = open_run(make_run(folder / "grown", grow=2))
    found = dl.match_experts(grown, first, 3, draws=19)
    assert found.sizes["expert"] == 6
    assert (found["experts_a"] == 6).all()
    assert (found["experts_b"] == 4).all()
    np.testing.assert_array_equal((found["partner"] >= 0).sum("expert"), [4] * 4)
    before = dl.match_experts(grown, first, 2, draws=19)  # the same seed: the same run up to here
    np.testing.assert_array_equal(before["partner"], np.tile(np.arange(4), (4, 1)))
    table = dl.align_experts(first, grown, "load", matching=dl.match_experts(first, grown, 2, draws=200))
    np.testing.assert_allclose(table["load_a"], table["load_b"])


def test_checkpoints_of_one_run_are_matched_with_themselves(folder: Path) -> None:
    slow = open_run(make_run(folder / "slow", drift=0.1))
    found = dl.match_experts(slow, slow, 1, checkpoint_b="03-country", draws=200)
    np.testing.assert_array_equal(found["partner"], np.tile(np.arange(4), (4, 1)))
    assert (found.attrs["checkpoint_a"], found.attrs["checkpoint_b"]) == ("01-digit", "03-country")
    assert float(found["overall_p"]) < 0.01
    table = dl.align_experts(slow, slow, "load", matching=found)
    np.testing.assert_array_equal(table["load_a"].where(table["aligned"]), table["load_a"])
    expected = slow.drift["load"].sel(checkpoint=3).where(table["aligned"])
    np.testing.assert_array_equal(table["load_b"].transpose("probe", "site", "expert"), expected)


def test_runs_may_be_given_as_folders(tmp_path):
    folder = make_run(tmp_path / "run")
    found = dl.match_experts(folder, str(folder), draws=20)
    assert found.equals(dl.match_experts(open_run(folder), open_run(folder), draws=20))
    with pytest.raises(NotFoundError):
        dl.match_experts(tmp_path / "nope", folder)
