"""``driftlens validate`` as users meet it."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import xarray as xr

from tests.analysis.synthetic import make_run

SIZES = {"samples": 3, "tokens_per_sample": 2, "sites": 1, "tasks": ("a", "b", "c", "d")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validate")
    return [make_run(folder / f"m{seed}", seed=seed, method=f"m{seed}", noise=False, **SIZES) for seed in (0, 1)]


def test_the_table_is_sorted_and_says_what_it_rests_on(cli, runs):
    code, out, err = cli("validate", *runs, "--draws", "20", "--given", "since")
    assert code == 0
    assert "given since" in err
    lines = out.splitlines()
    assert lines[0].split()[:5] == ["measure", "kind", "rho", "low", "high"]
    sizes = [abs(float(line.split()[2])) for line in lines[1:] if line.split()[2] != "-"]
    assert sizes == sorted(sizes, reverse=True)
    assert "12 rows of 2 runs" in err
    assert "whole runs" in err
    assert "the best of many looks better than it is" in err


def test_json_holds_every_measure_with_its_differences(cli, runs):
    code, out, err = cli("validate", *runs, "--draws", "20", "--json", "--quiet", "--target", "nll")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert {row["target"] for row in rows} == {"nll_rise"}
    by_name = {row["measure"]: row for row in rows}
    assert {"codrift_divergence", "impact_scored", "router_js", "weight_distance", "retained"} <= by_name.keys()
    against = by_name["codrift_divergence"]["against_simple"]
    assert {"marginal_js", "weight_distance", "tasks_since_anchor"} <= against.keys()
    entry = against["weight_distance"]
    assert entry["difference"] == pytest.approx(
        by_name["codrift_divergence"]["rho"] - by_name["weight_distance"]["rho"]
    )
    assert by_name["impact_scored"]["predicts"] in (True, False)


def test_more_variants_and_other_covariates_can_be_asked_for(cli, runs):
    _, out, err = cli("validate", *runs, "--draws", "1", "--json", "--all-variants", "--given", "since")
    assert {"impact_cross_scored_pooled", "impact_scored", "impact"} <= {row["measure"] for row in json.loads(out)}
    assert err == ""


@pytest.mark.parametrize("suffix", [".csv", ".nc"])
def test_all_targets_go_into_a_file(cli, runs, tmp_path, suffix):
    out = tmp_path / f"v{suffix}"
    code, _, err = cli("validate", *runs, "--draws", "5", "--out", out, "--json")
    assert code == 0
    assert "Wrote" in err
    if suffix == ".nc":
        with xr.open_dataset(out, engine="h5netcdf") as table:
            assert set(table["target"].to_numpy()) == {"lost_strict", "lost_lenient", "nll_rise"}
    else:
        assert set(pd.read_csv(out)["target"]) == {"lost_strict", "lost_lenient", "nll_rise"}


def test_wrong_input(cli, runs, tmp_path):
    code, _, err = cli("validate", runs[0])
    assert code == 2
    assert "--cluster task" in err
    assert cli("validate", runs[0], "--cluster", "task", "--draws", "5")[0] == 0
    code, _, err = cli("validate", *runs, "--out", tmp_path / "v.xls")
    assert code == 2
    assert "Allowed endings" in err
    code, _, err = cli("validate", *runs, "--given", "lerned")
    assert code == 2
    assert "learned" in err
    assert cli("validate", *runs, "--target", "speed")[0] == 2
    code, _, err = cli("validate", runs[0], tmp_path / "none")
    assert code == 3
    assert "none" in err
    bare = make_run(tmp_path / "bare", recordings=False, **SIZES)
    code, _, err = cli("validate", runs[0], bare)
    assert code == 3
    assert "has no recordings" in err
    other = make_run(tmp_path / "other", stream_sha256="6" * 64, noise=False, **SIZES)
    code, _, err = cli("validate", runs[0], other)
    assert code == 5
    assert "--force" in err
    assert cli("validate", runs[0], other, "--force", "--draws", "5", "--quiet")[0] == 0
