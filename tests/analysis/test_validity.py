"""The validity study: planted relations come out as planted, and rows of one run do not count as independent."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from driftlens.analysis import open_run, validity
from driftlens.analysis.simple import SIMPLE
from driftlens.analysis.study import validity_rows
from driftlens.analysis.validity import correlate
from driftlens.errors import ConfigError, NotFoundError, ProbeError, UnknownNameError
from tests.analysis.synthetic import make_run

METHODS, SEEDS, TASKS = 3, 4, 5


def planted(**measures) -> pd.DataFrame:
    """Rows of 12 runs of 3 methods; a measure is a function of the frame with forgetting and difficulty in it."""
    rng = np.random.default_rng(0)
    rows = []
    for method in range(METHODS):
        for seed in range(SEEDS):
            level = rng.normal()
            for task in range(TASKS):
                hard = rng.normal()
                for checkpoint in range(task + 2, TASKS + 1):
                    lost = level + hard + 0.3 * (checkpoint - task) + 0.5 * rng.normal()
                    rows.append((f"m{method}-{seed}", f"m{method}", seed, f"t{task}", task + 1, checkpoint, hard, lost))
    names = ["run", "method", "seed", "task", "anchor", "checkpoint", "learned", "lost_strict"]
    frame = pd.DataFrame(rows, columns=names)
    frame["checkpoint_name"], frame["samples"] = "x", 64
    frame["lost_lenient"], frame["nll_rise"] = frame["lost_strict"], np.exp(frame["lost_strict"])
    frame["initial_nll"], frame["since"] = 1.0, frame["checkpoint"] - frame["anchor"]
    for name, function in measures.items():
        frame[name] = function(frame, rng)
    return frame


def find(table: pd.DataFrame, measure: str, target: str = "lost_strict") -> pd.Series:
    (row,) = table[(table["measure"] == measure) & (table["target"] == target)].to_dict("records")
    return pd.Series(row)


def test_a_monotone_function_of_forgetting_has_rank_correlation_one():
    study = correlate(planted(impact=lambda f, _: f["lost_strict"] ** 3, retained=lambda f, _: -f["lost_strict"]))
    for target in ("lost_strict", "lost_lenient", "nll_rise"):
        row = find(study.table, "impact", target)
        assert (row["rho"], row["low"], row["high"]) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
        assert row["predicts"]
        assert row["partial"] == pytest.approx(1)
        assert row["within_method"] == row["within_run"] == pytest.approx(1)
    fallen = find(study.table, "retained")
    assert fallen["rho"] == pytest.approx(-1)
    assert fallen["predicts"], "a similarity predicts by falling"


def test_noise_does_not_predict_and_is_shown_as_such():
    study = correlate(planted(router_js=lambda f, rng: rng.normal(size=len(f))))
    row = find(study.table, "router_js")
    assert row["low"] < 0 < row["high"]
    assert not row["predicts"]


def test_the_wrong_direction_is_no_prediction():
    study = correlate(planted(impact=lambda f, _: -f["lost_strict"], coupling=lambda f, _: -f["lost_strict"]))
    assert not find(study.table, "impact")["predicts"]
    assert find(study.table, "coupling")["predicts"], "no direction was expected of a coupling"


def test_a_measure_of_difficulty_alone_has_no_partial_correlation():
    frame = planted(impact=lambda f, rng: f["learned"] + 0.1 * rng.normal(size=len(f)))
    row = find(correlate(frame).table, "impact")
    assert row["rho"] > 0.4
    assert abs(row["partial"]) < 0.1
    assert row["partial_low"] < 0 < row["partial_high"]
    assert find(correlate(frame, given=[]).table, "impact")["partial"] == pytest.approx(row["rho"])


def test_differences_between_runs_do_not_pass_for_differences_within():
    level = lambda f, _: f.groupby("run")["lost_strict"].transform("mean")  # noqa: E731
    study = correlate(planted(impact=level))
    row = find(study.table, "impact")
    assert row["rho"] > 0.4
    assert np.isnan(row["within_run"]), "constant within every run"
    groups = study.groups.query("measure == 'impact' and target == 'lost_strict'")
    assert set(groups["grouping"]) == {"run", "method", "without_method"}
    assert groups.query("grouping == 'without_method'")["rho"].min() == pytest.approx(row["without_method"])


def test_rows_of_one_run_are_drawn_together():
    frame = planted(impact=lambda f, _: f.groupby("run")["lost_strict"].transform("mean"))
    runs = find(correlate(frame).table, "impact")
    tasks = find(correlate(frame, cluster="task").table, "impact")
    assert runs["rho"] == tasks["rho"]
    assert runs["high"] - runs["low"] > 1.1 * (tasks["high"] - tasks["low"])


def test_a_measure_is_held_against_every_simple_one_on_the_rows_of_both():
    frame = planted(
        impact=lambda f, _: f["lost_strict"],
        marginal_js=lambda f, rng: f["lost_strict"] + 2 * rng.normal(size=len(f)),
        weight_distance=lambda f, _: f["lost_strict"],
        router_row_distance=lambda f, rng: np.where(f["method"] == "m0", np.nan, rng.normal(size=len(f))),
    )
    study = correlate(frame)
    against = study.differences.query("measure == 'impact' and target == 'lost_strict'").set_index("simple")
    bar = find(study.table, "marginal_js")["rho"]
    assert against.loc["marginal_js", "difference"] == pytest.approx(1 - bar)
    assert against.loc["marginal_js", "low"] > 0
    assert against.loc["weight_distance", ["difference", "low", "high"]].to_list() == pytest.approx([0, 0, 0])
    assert against.loc["router_row_distance", "rows"] == (frame["method"] != "m0").sum()
    row = find(study.table, "impact")
    assert (row["beats"], row["of_simple"]) == (2, 3)
    assert find(study.table, "marginal_js")["of_simple"] == 2, "not against itself"


def test_the_noise_floor_is_flagged():
    frame = planted(impact=lambda f, rng: rng.uniform(size=len(f)), router_js=lambda f, rng: rng.uniform(size=len(f)))
    frame["impact_noise"] = 0.5
    study = correlate(frame)
    assert find(study.table, "impact")["above_noise"] == pytest.approx((frame["impact"] > 0.5).mean())
    assert np.isnan(find(study.table, "router_js")["above_noise"])
    assert "impact_noise" not in set(study.table["measure"])


def test_the_table_is_sorted_and_the_dataset_says_the_same():
    frame = planted(impact=lambda f, _: f["lost_strict"], router_js=lambda f, rng: rng.normal(size=len(f)))
    study = correlate(frame, undefined={"router_js": "no router (m0-1)"})
    assert study.table["target"].drop_duplicates().to_list() == ["lost_strict", "lost_lenient", "nll_rise"]
    assert study.table["measure"].iloc[0] == "impact"
    array = study.dataset
    for row in study.table.to_dict("records"):
        cell = array.sel(measure=row["measure"], target=row["target"])
        for name in ("rho", "low", "partial", "without_method"):
            np.testing.assert_equal(float(cell[name]), row[name])
    assert array["undefined"].sel(measure="router_js").item() == "no router (m0-1)"
    assert float(array["group_rho"].sel(measure="impact", target="nll_rise", group="run:m0-0")) == pytest.approx(1)
    assert array.attrs["cluster"] == "run"


# --- from runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validity")
    sizes = {"samples": 3, "tokens_per_sample": 3, "sites": 2, "tasks": ("a", "b", "c", "d")}
    return [
        make_run(
            folder / f"{method}-{seed}", seed=seed, method=method, gate=gate, drift=drift, noise=seed == 0, **sizes
        )
        for method, gate, drift in (("still", "softmax", 0.1), ("wild", "energy", 0.8))
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def study(runs):
    return validity(runs, draws=100)


def test_rows_hold_what_scores_and_tables_say(runs):
    run = open_run(runs[0])
    rows, _ = validity_rows(run)
    assert len(rows) == 6  # three later checkpoints of a, two of b, one of c
    assert (rows["checkpoint"] > rows["anchor"]).all()
    row = rows.set_index(["task", "checkpoint"]).loc[("a", 3)]
    scores = run.scores.sel(task="a")
    for name, sign in (("strict", 1), ("lenient", 1), ("nll", -1)):
        change = float(scores[name].sel(checkpoint=1) - scores[name].sel(checkpoint=3))
        assert row["nll_rise" if name == "nll" else f"lost_{name}"] == pytest.approx(sign * change)
    assert row["learned"] == float(scores["strict"].sel(checkpoint=1))
    assert row["initial_nll"] == float(scores["nll"].sel(checkpoint=0))
    assert (row["since"], row["samples"]) == (2, 3)
    cell = run.summary.sel(probe="a", checkpoint=3)
    assert row["codrift_divergence"] == float(cell["codrift_divergence"])
    assert row["codrift_divergence_noise"] == float(cell["codrift_divergence_noise"])
    overlap = run.subspaces["subspace_overlap"].sel(probe="a", checkpoint=3)
    assert row["subspace_overlap"] == pytest.approx(float(overlap.mean()))
    assert np.isfinite(row["impact_scored"])


def test_a_study_of_runs(study, runs):
    assert study.about["runs"] == study.about["clusters"] == 4
    assert len(study.rows) == 24
    kinds = study.table.drop_duplicates("measure").set_index("measure")["kind"]
    assert kinds[["codrift_divergence", "impact_scored", "marginal_js"]].to_list() == ["drift", "variant", "simple"]
    assert set(SIMPLE) <= set(kinds.index)
    values = study.table["rho"].dropna()
    assert values.between(-1, 1).all()
    inside = study.table.dropna(subset=["rho", "low", "high"])
    assert (inside["low"] <= inside["high"]).all()
    assert study.table["definition"].str.len().gt(0).all()
    assert bool(find(study.table, "rank_update_a")["within_run_only"])


def test_a_study_is_written_and_read(study, tmp_path):
    study.dataset.to_netcdf(tmp_path / "v.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "v.nc", engine="h5netcdf") as read:
        np.testing.assert_array_equal(read["rho"], study.dataset["rho"])
        assert read["kind"].to_numpy().tolist() == study.dataset["kind"].to_numpy().tolist()


def test_one_run_needs_tasks_to_draw(runs):
    with pytest.raises(ConfigError, match="an interval over runs needs at least two"):
        validity(runs[:1])
    alone = validity(runs[:1], cluster="task", draws=50)
    assert alone.about["clusters"] == 3


def test_wrong_sets_of_runs_are_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="No run was given"):
        validity([])
    with pytest.raises(ConfigError, match="was given twice"):
        validity([runs[0], runs[0]])
    with pytest.raises(UnknownNameError, match="Unknown covariate 'lerned'"):
        validity(runs, given=["lerned"])
    with pytest.raises(UnknownNameError, match="Unknown cluster 'row'"):
        validity(runs, cluster="row")
    other = make_run(tmp_path / "other", stream_sha256="6" * 64, samples=3, tokens_per_sample=2, sites=1)
    with pytest.raises(ProbeError, match="cannot be put into one study: their streams differ"):
        validity([runs[0], other])
    assert validity([runs[0], other], strict=False, draws=20).about["runs"] == 2


def test_runs_without_scores_or_recordings_are_named(runs, tmp_path):
    bare = make_run(tmp_path / "bare", recordings=False, tasks=("a", "b", "c", "d"), samples=3)
    with pytest.raises(NotFoundError, match="bare has no recordings"):
        validity([runs[0], bare])
    unscored = make_run(tmp_path / "unscored", tasks=("a", "b", "c", "d"), samples=3, tokens_per_sample=3, sites=1)
    (unscored / "scores.parquet").unlink()
    manifest = json.loads((unscored / "manifest.json").read_text())
    del manifest["files"]["scores.parquet"]
    (unscored / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(NotFoundError, match=r"scores.parquet is not listed"):
        validity([runs[0], unscored])


def test_too_few_old_tasks_are_no_study(tmp_path):
    sizes = {"tasks": ("a", "b"), "samples": 2, "tokens_per_sample": 2, "sites": 1, "noise": False}
    short = [make_run(tmp_path / f"r{seed}", seed=seed, **sizes) for seed in (0, 1)]
    with pytest.raises(NotFoundError, match=r"2 rows .* needs at least 5"):
        validity(short)


def test_two_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    sizes = {"samples": 3, "tokens_per_sample": 2, "sites": 1, "noise": False}
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    same = [make_run(tmp_path / place / "run", seed=seed, **sizes) for seed, place in enumerate("xy")]
    rows = validity(same, draws=20).rows
    assert set(rows["run"]) == {str(path) for path in same}


@pytest.mark.slow
def test_the_script_writes_its_tables(tmp_path, monkeypatch):
    sizes = {"samples": 3, "tokens_per_sample": 3, "sites": 2, "tasks": ("a", "b", "c", "d")}
    for method in ("one", "two"):
        for seed in (0, 1):
            make_run(tmp_path / "runs" / f"{method}-{seed}", seed=seed, method=method, **sizes)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    script = importlib.import_module("make_validity")
    out = tmp_path / "out" / "validity"
    monkeypatch.setattr("sys.argv", ["x", "--runs", str(tmp_path / "runs"), "--out", str(out), "--draws", "10"])
    script.main()
    page = out.with_suffix(".md").read_text()
    assert "24 rows (old task at a later checkpoint) of 4 runs: one, two; seeds 0, 1." in page
    assert page.count("## Chosen on seed 0, looked at on seed 1") == 1
    assert "## Chosen without one method" in page
    rows = pd.read_csv(out.with_name("validity_rows.csv"))
    assert len(rows) == 24
    search = pd.read_csv(out.with_name("validity_search.csv")).set_index("measure")
    wanted = rows[["impact_scored", "lost_strict"]].corr("spearman").iloc[0, 1]
    assert search.loc["impact_scored", "strict_all"] == pytest.approx(wanted, abs=1e-3)
    assert search.loc["impact_scored", "strict_without_one"] == pytest.approx(search.loc["impact_scored", "strict_two"])
