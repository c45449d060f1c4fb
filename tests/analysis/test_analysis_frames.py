"""Long and wide rows, comparison of runs, scores over the stream, and thinned runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from driftlens.analysis import Run, compare, metric_names, open_run, summarise, table, thin_run
from driftlens.analysis.scores import score_arrays, stream_summary
from driftlens.errors import ConfigError, FormatError, NotFoundError, ProbeError, StorageError, UnknownNameError
from driftlens.metrics import MEASURES
from driftlens.store import Manifest
from tests.analysis.synthetic import make_run

SMALL = {"sites": 2, "samples": 3, "tokens_per_sample": 3}


# --- rows ----------------------------------------------------------------------------------------------------------


def test_long_rows_carry_their_context(run: Run) -> None:
    frame = table(run, "site", ["router_js", "coupling", "output_overlap", "rank_update_a"])
    assert len(frame) == 4 * 3 * 4 * 3  # measures x probes x checkpoints x sites
    row = frame.query("metric == 'router_js' and probe == 'digit' and checkpoint == 3 and layer == 1").iloc[0]
    at = run.drift.sel(probe="digit", checkpoint=3, site=row.site)
    assert row.value == float(at.router_js)
    assert (row.low, row.high) == (float(at.router_js_low), float(at.router_js_high))
    assert row.noise_floor == float(at.router_js_noise)
    assert row.gate_entropy == float(at.gate_entropy)
    assert row.specialisation == float(run.drift.specialisation.sel(checkpoint=3, site=row.site))
    assert (row.kind, row.anchor, row.checkpoint_name, bool(row.old)) == ("up_proj", 1, "03-country", True)
    assert row.undefined is None
    assert not row.within_run
    still = frame.query("metric == 'coupling' and probe == 'digit' and checkpoint == 1")
    assert still.value.isna().all()
    assert set(still.undefined) == {"neither router nor experts moved"}
    start = frame.query("metric == 'output_overlap' and checkpoint == 0")
    assert set(start.undefined) == {"a factor of zeros (B before the first task)"}
    assert frame.query("metric == 'rank_update_a'").within_run.all()
    assert not frame[frame.value.notna()].undefined.notna().any()


def test_probe_rows_are_means_over_sites_with_their_own_interval(run: Run) -> None:
    frame = table(run, metrics=["codrift_divergence"]).query("probe == 'digit' and checkpoint == 3")
    assert len(frame) == 1
    assert frame.value.item() == pytest.approx(
        float(run.codrift.codrift_divergence.sel(probe="digit", checkpoint=3).mean())
    )
    assert frame.low.item() < frame.value.item() < frame.high.item()
    assert frame.chance.item() == 0.5


def test_rows_for_machines_are_json_without_nan(run: Run) -> None:
    rows = summarise(run)
    assert len(rows) == 12
    json.dumps(rows, allow_nan=False)
    row = next(entry for entry in rows if (entry["probe"], entry["checkpoint"]) == ("digit", 3))
    assert row["router_js"] == float(run.summary.router_js.sel(probe="digit", checkpoint=3))
    assert row["router_js_low"] < row["router_js"] < row["router_js_high"]
    assert row["specialisation"] == float(run.summary.specialisation.sel(checkpoint=3))
    assert row["old"] is True
    own = next(entry for entry in rows if (entry["probe"], entry["checkpoint"]) == ("digit", 1))
    assert own["coupling"] is None
    assert "coupling: neither router nor experts moved" in own["undefined"]
    assert "alignment_energy" in row["within_run"]
    assert "router_js" not in row["within_run"]
    by_site = summarise(run, "site", ["router_js"])
    assert len(by_site) == 36
    assert {"site", "layer", "kind", "router_js", "near_uniform"} <= set(by_site[0])


def test_names_are_those_of_the_definitions() -> None:
    parts = {"impact_router", "impact_experts", "impact_cross", "alignment_loss", "importance_gini"}
    parts |= {"responsibility_router_alone", "responsibility_experts_alone"}
    parts |= {f"rank_update_{factor}{end}" for factor in "ab" for end in ("", "_correlation")}
    assert set(metric_names()) - parts <= set(MEASURES)


def test_unknown_measures_and_levels(run: Run) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown measure 'router_jz'. Did you mean 'router_js'\?"):
        table(run, metrics=["router_jz"])
    with pytest.raises(ConfigError, match="Unknown level 'layer'"):
        summarise(run, "layer")  # type: ignore[arg-type]  # a caller without types


# --- scores --------------------------------------------------------------------------------------------------------


def scores_of(strict: np.ndarray, lenient: np.ndarray | None = None, samples: int = 10) -> pd.DataFrame:
    """Rows whose accuracies are the given matrices [checkpoints, tasks] (multiples of 1/samples)."""
    loose = strict if lenient is None else lenient
    rows = [
        {
            "checkpoint": checkpoint,
            "checkpoint_name": f"{checkpoint:02d}",
            "task": "zyx"[task],
            "task_index": task + 1,
            "sample": str(sample),
            "prediction": "",
            "reference": "",
            "strict": sample < round(value * samples),
            "lenient": sample < round(loose[checkpoint, task] * samples),
            "nll": 1.0 - value,
        }
        for (checkpoint, task), value in np.ndenumerate(strict)
        for sample in range(samples)
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)  # the order of rows says nothing


MATRIX = np.array([[0.1, 0.2, 0.0], [0.9, 0.3, 0.1], [0.5, 0.8, 0.2], [0.4, 0.5, 1.0]])


def test_scores_and_their_summary_by_hand() -> None:
    scores = score_arrays(scores_of(MATRIX, np.clip(MATRIX + np.array([0.2, 0, 0]), 0, 1)))
    assert scores.task.to_numpy().tolist() == ["z", "y", "x"]  # stream order, not the alphabet
    np.testing.assert_allclose(scores.strict, MATRIX)
    np.testing.assert_allclose(scores.nll, 1 - MATRIX)
    assert (scores.n == 10).all()
    stream = stream_summary(scores)
    strict = stream.sel(scorer="strict")
    expected = {
        "AP": (0.4 + 0.5 + 1.0) / 3,
        "MAA": (0.9 + (0.5 + 0.8) / 2 + (0.4 + 0.5 + 1.0) / 3) / 3,
        "MFT": (0.9 + 0.8 + 1.0) / 3,
        "BWT_T": (-0.5 - 0.3 + 0) / 3,
        "BWT_T-1": (-0.5 - 0.3) / 2,
        "forgetting_max": (0.5 + 0.3) / 2,
        "FWT": (0.3 - 0.2 + 0.2 - 0.0) / 2,
    }
    for name, value in expected.items():
        assert float(strict[name]) == pytest.approx(value), name
    np.testing.assert_allclose(stream.task_forgetting.sel(scorer="strict"), [0.5, 0.3, 0.0])
    # Lenient: z loses 1.0 - 0.6 = 0.4 instead of 0.5.
    np.testing.assert_allclose(stream.format_share_by_task, [0.2, 0.0, np.nan], atol=1e-12)
    assert float(stream.format_share) == pytest.approx(1 - 0.7 / 0.8)


def test_a_stream_that_was_stopped_is_summarised_over_what_it_learned() -> None:
    stream = stream_summary(score_arrays(scores_of(MATRIX[:3])))
    assert int(stream.tasks_learned) == 2
    assert float(stream.AP.sel(scorer="strict")) == pytest.approx((0.5 + 0.8) / 2)
    np.testing.assert_allclose(stream.task_forgetting.sel(scorer="strict"), [0.4, 0.0, np.nan])
    start = stream_summary(score_arrays(scores_of(MATRIX[:1])))
    assert int(start.tasks_learned) == 0
    assert np.isnan(start.AP).all()
    one = stream_summary(score_arrays(scores_of(MATRIX[:2, :1])))
    assert float(one.AP.sel(scorer="strict")) == pytest.approx(0.9)
    assert math.isnan(float(one["BWT_T-1"].sel(scorer="strict")))


def test_scores_that_are_no_table(tmp_path: Path) -> None:
    for content, message in ((b"garbage", "not a readable parquet file"), (None, "lacks the columns nll")):
        root = make_run(tmp_path / message[:5].strip(), recordings=False)
        if content is None:
            pd.read_parquet(root / "scores.parquet").drop(columns="nll").to_parquet(root / "scores.parquet")
        else:
            (root / "scores.parquet").write_bytes(content)
        manifest = Manifest.load(root)
        manifest.add("scores.parquet")
        manifest.save()
        with pytest.raises(FormatError, match=message):
            _ = open_run(root).scores


# --- comparison ----------------------------------------------------------------------------------------------------


def test_comparison_has_a_row_per_run(run: Run, tmp_path: Path) -> None:
    still = make_run(tmp_path / "still", sites=3, samples=4, tokens_per_sample=3, drift=0.0, seed=1, method="pass-moe")
    frame = compare([run, still])
    assert frame["run"].tolist() == ["moe", "still"]
    assert frame["method"].tolist() == ["moelora", "pass-moe"]
    assert frame["seed"].tolist() == [0, 1]
    assert frame["comparable"].all()
    assert frame["note"].tolist() == ["", ""]
    first, second = frame.iloc[0], frame.iloc[1]
    old = run.drift.router_js.sel(checkpoint=3, probe=["digit", "colour"])
    assert first.router_js == pytest.approx(float(old.mean()))
    assert first.router_js_low < first.router_js < first.router_js_high
    assert float(run.stream.AP.sel(scorer="strict")) == first.AP
    assert first["BWT_T-1"] == float(run.stream["BWT_T-1"].sel(scorer="strict"))
    assert first.AP_lenient == float(run.stream.AP.sel(scorer="lenient"))
    assert first.gate_entropy == float(run.trend.gate_entropy.sel(checkpoint=3))
    assert second.codrift_divergence == pytest.approx(0.0, abs=1e-12)
    assert "alignment_energy" not in frame, "it depends on the gauge: independent runs cannot be compared by it"
    assert "rank_importance" not in frame


def test_other_streams_and_probes_are_refused_or_flagged(run: Run, tmp_path: Path) -> None:
    other = make_run(tmp_path / "stream", recordings=False, stream_sha256="6" * 64)
    with pytest.raises(
        ProbeError, match="cannot be compared: their streams differ \\(555555555555 and 666666666666\\)"
    ):
        compare([run, other])
    frame = compare([run, other], strict=False)
    assert frame["comparable"].tolist() == [True, False]
    assert "streams differ" in frame["note"][1]
    assert "not recorded" in frame["note"][1]
    assert math.isnan(frame["router_js"][1])
    probes = make_run(tmp_path / "probes", **SMALL, noise=False)
    manifest = Manifest.load(probes)
    manifest.probes_sha256 = "8" * 64
    manifest.save()
    with pytest.raises(ProbeError, match="their probes differ"):
        compare([run, probes])
    with pytest.raises(ConfigError, match="No run was given"):
        compare([])


def test_gates_that_never_route_are_noted(tmp_path: Path) -> None:
    flat = make_run(tmp_path / "flat", gate="uniform", **SMALL, noise=False)
    assert "hardly route" in compare([flat])["note"][0]
    alone = make_run(tmp_path / "alone", tasks=("digit",), **SMALL, noise=False)
    frame = compare([alone])
    assert "no task is old" in frame["note"][0]
    assert math.isnan(frame["router_js"][0])


# --- thinned runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thin(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return thin_run(run, tmp_path_factory.mktemp("thin") / "few", tokens_per_sample=2)


def test_a_thinned_run_shows_the_full_runs_tables(run: Run, thin: Path) -> None:
    small = open_run(thin)
    for name, expected in run.tables().items():
        xr.testing.assert_identical(small.tables()[name], expected)
    xr.testing.assert_identical(small.scores, run.scores)
    assert small.name == run.name
    assert [point.name for point in small.checkpoints] == [point.name for point in run.checkpoints]


def test_a_thinned_run_holds_no_weights_and_few_tokens(run: Run, thin: Path) -> None:
    files = sorted(path.relative_to(thin).as_posix() for path in thin.rglob("*") if path.is_file())
    assert not [name for name in files if name.endswith(".safetensors")]
    assert "checkpoints/01-digit/adapter_config.json" in files
    assert "recordings/03-country.noise.h5" in files
    with open_run(thin).recording(2) as recording:
        assert not recording.has_weights
        assert recording.gram_checkpoints == ["00-start", "01-digit", "02-colour"]
        assert np.bincount(recording.tokens("digit")["sample"]).tolist() == [2, 2, 2, 2]
    assert Manifest.load(thin).verify() == []


def test_recomputed_from_gram_matrices_the_tables_are_the_same(run: Run, tmp_path: Path) -> None:
    folder = thin_run(run, tmp_path / "all", tokens_per_sample=1000)
    (folder / "analysis.h5").unlink()
    again = open_run(folder)
    for name, expected in run.tables().items():
        xr.testing.assert_allclose(again.tables()[name], expected, rtol=0, atol=1e-6)
    shifted = again.anchored({"digit": 3}).codrift.codrift_divergence
    expected = run.anchored({"digit": 3}).codrift.codrift_divergence
    np.testing.assert_allclose(shifted, expected, atol=1e-6)


def test_fewer_tokens_still_tell_the_same_story(run: Run, thin: Path) -> None:
    small = open_run(thin)
    recomputed = small.anchored(dict.fromkeys(("digit",), 1)).summary.codrift_divergence.sel(
        probe="digit", checkpoint=3
    )
    expected = run.summary.sel(probe="digit", checkpoint=3)
    assert float(recomputed) == pytest.approx(float(expected.codrift_divergence), rel=0.5)
    assert float(recomputed) != float(expected.codrift_divergence)


def test_what_cannot_be_thinned(run: Run, thin: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="thin the run as it is"):
        thin_run(run.without("02-colour"), tmp_path / "out")
    with pytest.raises(ConfigError, match="keep at least 1 token"):
        thin_run(run, tmp_path / "out", tokens_per_sample=0)
    with pytest.raises(StorageError, match="exists already"):
        thin_run(run, thin)
    with pytest.raises(NotFoundError, match="has no recordings"):
        thin_run(make_run(tmp_path / "bare", recordings=False), tmp_path / "out")
    with pytest.raises(NotFoundError, match="thinned"):
        thin_run(thin, tmp_path / "out")
    assert not (tmp_path / "out").exists()
