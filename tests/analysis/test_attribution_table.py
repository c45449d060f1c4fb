"""`Run.attribution` on files made by hand: sums, intervals, reasons, and what is not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from driftlens.analysis.attribution import (
    ATTRIBUTION_REASONS,
    attribution_rows,
    open_attribution,
    tabulate,
)
from driftlens.analysis.attribution_files import AttributedCell
from driftlens.analysis.run import Run, open_run
from driftlens.analysis.thin import thin_run
from driftlens.attribution.results import write_cell
from driftlens.errors import ConfigError, FormatError, NotFoundError
from driftlens.metrics import bootstrap_mean, forgetting_attribution
from driftlens.store import Manifest
from tests.attribution.test_results import made_tables

TASKS = ("one", "two", "three")
POINTS = {0: "00-start", 1: "01-one", 2: "02-two", 3: "03-three"}


def cell(task: str = "one", anchor: int = 1, current: int = 3, seed: int = 0, leave: tuple[str, ...] = ()):
    about = {
        "task": task,
        "anchor": POINTS[anchor],
        "current": POINTS[current],
        "anchor_index": anchor,
        "current_index": current,
        "anchor_sha256": f"{anchor}",
        "current_sha256": f"{current}",
        "settings": {"nodes": 8},
    }
    tables = {name: table for name, table in made_tables(seed).items() if name not in leave}
    return AttributedCell(Path("cell.h5"), about, tables)


@pytest.fixture(scope="module")
def table() -> xr.Dataset:
    cells = [cell("one", 1, 2, 0), cell("one", 1, 3, 1), cell("two", 2, 3, 2, ("swaps", "depth", "restores"))]
    return tabulate(cells, TASKS, POINTS)


def test_every_level_of_the_ledger_is_the_sum_of_the_one_below(table: xr.Dataset) -> None:
    done = table["reason"] == 0
    assert int(done.sum()) == 3
    xr.testing.assert_allclose(table["ledger_site"].where(done), table["ledger"].sum("expert").where(done))
    xr.testing.assert_allclose(table["ledger_part"].where(done), table["ledger_site"].sum("site").where(done))
    xr.testing.assert_allclose(
        table["rise"].where(done), (table["ledger_part"].sum("part") + table["residual"]).where(done)
    )


def test_numbers_are_means_of_the_files_over_samples(table: xr.Dataset) -> None:
    entries = made_tables(1)["ledger"]["entries"]
    found = table.sel(task="one", checkpoint=3)
    assert found["ledger"].sel(site="x").to_numpy() == pytest.approx(entries.sel(site="x").mean("sample").to_numpy())
    booked = entries.sum(("site", "expert")).transpose("part", "sample").to_numpy()
    for end, expected in zip(("", "_low", "_high"), bootstrap_mean(booked), strict=True):
        assert found[f"ledger_part{end}"].to_numpy() == pytest.approx(expected)


def test_swaps_split_the_forgetting_of_the_sites_and_leave_the_remainder(table: xr.Dataset) -> None:
    found = table.sel(task="one", checkpoint=3)
    whole = found["phi_router"] + found["phi_experts"]
    xr.testing.assert_allclose(whole, found["swap_forgetting"], atol=1e-12)
    xr.testing.assert_allclose(whole + found["remainder"], found["forgetting"], atol=1e-12)
    scores = made_tables(1)["swaps"]["scores"]
    nll = [-scores.sel(combination=key, score="nll").to_numpy() for key in ("aa", "ca", "ac", "cc")]
    exact = forgetting_attribution(*nll)
    assert float(found["phi_router"].sel(score="nll")) == pytest.approx(exact.phi_router.mean())
    ledger = found["ledger_part"].to_numpy()
    assert found["disagreement"].to_numpy() == pytest.approx(
        ledger - [exact.phi_router.mean(), exact.phi_experts.mean()]
    )


def test_a_loss_that_rises_is_forgetting_and_a_score_that_falls_too() -> None:
    tables = made_tables()
    scores = tables["scores"]["scores"]
    scores.loc[{"state": "anchor", "score": "strict"}] = 1.0
    scores.loc[{"state": "current", "score": "strict"}] = 0.0
    scores.loc[{"state": "anchor", "score": "nll"}] = 0.5
    scores.loc[{"state": "current", "score": "nll"}] = 2.0
    found = tabulate([cell()._replace(tables=tables)], TASKS, POINTS).sel(task="one", checkpoint=3)
    assert float(found["forgetting"].sel(score="strict")) == 1.0
    assert float(found["forgetting"].sel(score="nll")) == 1.5


def test_what_is_undefined_is_nan_with_a_reason(table: xr.Dataset) -> None:
    assert table["reason"].sel(task="one").to_numpy().tolist() == [1, 1, 0, 0]
    assert table["reason"].sel(task="two").to_numpy().tolist() == [1, 1, 1, 0]
    assert table["reason"].sel(task="three").to_numpy().tolist() == [1, 1, 1, 1]
    assert np.isnan(table["rise"].where(table["reason"] != 0)).all()
    lean = table.sel(task="two", checkpoint=3)
    for name, values in (
        ("swaps_reason", "phi_router"),
        ("depth_reason", "depth_shapley"),
        ("restores_reason", "gain"),
        ("remainder_reason", "remainder"),
    ):
        assert ATTRIBUTION_REASONS[int(lean[name])].startswith("left out"), name
        assert np.isnan(lean[values]).all()
        assert int(table[name].sel(task="one", checkpoint=3)) == 0
    assert np.isnan(table["ledger"].sel(site="y", expert=2)).all(), "site y has two experts"
    assert tabulate([], TASKS, POINTS)["reason"].to_numpy()[0].tolist() == [1, 1, 2, 2]


def test_an_anchor_that_could_not_run_alone_and_a_loss_that_stayed_are_named() -> None:
    tables = made_tables()
    tables["swaps"]["anchor_alone"][:] = np.nan
    tables["ledger"]["nll_anchor"][:] = tables["ledger"]["nll_current"]
    found = tabulate([cell()._replace(tables=tables)], TASKS, POINTS).sel(task="one", checkpoint=3)
    assert np.isnan(found["remainder"]).all()
    assert "by itself" in ATTRIBUTION_REASONS[int(found["remainder_reason"])]
    assert np.isnan(found["residual_share"])
    assert "did not change" in ATTRIBUTION_REASONS[int(found["residual_share_reason"])]


def test_every_variable_says_what_it_is(table: xr.Dataset) -> None:
    for name, variable in table.data_vars.items():
        assert variable.attrs["long_name"], name
        if not str(name).endswith("_reason") and name != "reason":
            assert {"units", "definition"} <= set(variable.attrs), name


def test_sites_that_came_later_are_undefined_where_they_were_not() -> None:
    grown = cell("one", 1, 3)
    early = made_tables(1)
    early["ledger"] = early["ledger"].isel(site=[1])
    early["restores"] = early["restores"].isel(site=[1])
    found = tabulate([cell("one", 1, 2)._replace(tables=early), grown], TASKS, POINTS)
    assert sorted(found["site"].to_numpy().tolist()) == ["x", "y"]
    assert np.isnan(found["ledger_site"].sel(task="one", checkpoint=2, site="x")).all()
    expected = early["ledger"]["entries"].sel(site="y").mean("sample").sum("expert")
    assert found["ledger_site"].sel(task="one", checkpoint=2, site="y").to_numpy() == pytest.approx(expected)


def test_rows_carry_the_three_largest_sites_and_say_where_the_accounts_disagree() -> None:
    tables = made_tables()
    tables["ledger"]["entries"][:] = 0.0
    tables["ledger"]["entries"].loc[{"site": "y", "part": "router", "expert": 0}] = [5.0, 5.1, 4.9]
    tables["ledger"]["entries"].loc[{"site": "x", "part": "experts", "expert": 0}] = [-1.0, -1.1, -0.9]
    (row,) = attribution_rows(tabulate([cell()._replace(tables=tables)], TASKS, POINTS))
    assert [entry["site"] for entry in row["largest"]] == ["y", "x"]
    assert row["largest"][0]["router"] == pytest.approx(5.0)
    assert (row["ledger_router"], row["ledger_experts"]) == (pytest.approx(5.0), pytest.approx(-1.0))
    assert any("disagree on the router: 5.000 [4.9" in note for note in row["notes"])
    assert any("residual is" in note for note in row["notes"])
    assert [group["layers"] for group in row["depth"]] == ["layer 0 both", "layer 1 both"]


def test_accounts_that_agree_get_no_remark() -> None:
    tables = made_tables()
    swaps = tables["swaps"]["scores"]
    for key, nll in (("aa", 1.0), ("ca", 1.5), ("ac", 3.0), ("cc", 3.5)):
        swaps.loc[{"combination": key, "score": "nll"}] = nll
    entries = tables["ledger"]["entries"]
    entries[:] = 0.0
    entries.loc[{"site": "x", "part": "router", "expert": 0}] = [0.4, 0.5, 0.6]
    entries.loc[{"site": "x", "part": "experts", "expert": 0}] = [1.9, 2.0, 2.1]
    tables["ledger"]["nll_current"][:] = tables["ledger"]["nll_anchor"] + 2.5
    (row,) = attribution_rows(tabulate([cell()._replace(tables=tables)], TASKS, POINTS))
    assert row["notes"] == []


def _listed(folder: Path, *cells: AttributedCell) -> Run:
    manifest = Manifest.load(folder)
    for one in cells:
        path = folder / "attribution" / one.about["current"] / f"{one.about['anchor']}.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_cell(path, one.tables, one.about)
        manifest.add(path)
    manifest.save()
    return open_run(folder)


def test_a_run_without_attribution_says_how_to_make_it(run: Run) -> None:
    with pytest.raises(NotFoundError, match="driftlens attribute"):
        _ = run.attribution


def test_a_run_reads_its_files_and_trusts_only_listed_ones(copy: Path) -> None:
    names = [point.name for point in open_run(copy).checkpoints]
    task = names[1].split("-", 1)[1]
    one = cell(task, 1, 3)
    one.about.update(anchor=names[1], current=names[3])
    opened = _listed(copy, one)
    assert [row["task"] for row in attribution_rows(opened.attribution)] == [task]
    assert Manifest.load(copy).verify() == []
    thin = open_run(thin_run(opened, copy.parent / "thin"))
    xr.testing.assert_identical(thin.attribution, opened.attribution)
    stray = copy / "attribution" / names[3] / f"{names[2]}.h5"
    write_cell(stray, made_tables(3), one.about)
    assert len(attribution_rows(open_run(copy).attribution)) == 1
    path = copy / "attribution" / names[3] / f"{names[1]}.h5"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 255]))
    with pytest.raises(FormatError, match=r"has the SHA-256"):
        _ = open_run(copy).attribution


def test_files_without_a_run_are_read_together_if_they_compare_the_same_checkpoints(tmp_path: Path) -> None:
    paths = [tmp_path / f"{task}.h5" for task in ("one", "two", "other")]
    for path, (task, anchor) in zip(paths, (("one", 1), ("two", 1), ("two", 2)), strict=True):
        write_cell(path, made_tables(), cell(task, anchor).about)
    found = open_attribution(*paths[:2])
    assert [row["task"] for row in attribution_rows(found)] == ["one", "two"]
    with pytest.raises(ConfigError, match="compare other checkpoints"):
        open_attribution(paths[0], paths[2])
    with pytest.raises(ConfigError, match="of one task"):
        open_attribution(paths[1], paths[1])
