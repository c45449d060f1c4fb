"""The tables against loops written from metrics.md."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from driftlens import metrics
from driftlens.analysis import REASONS, Run, open_run, thin_run
from driftlens.errors import FormatError, UnknownNameError
from driftlens.metrics import Reason
from tests.analysis.synthetic import SCALING, make_run

SITE = "model.layers.0.mlp.down_proj"


def js(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon divergence of two distributions, base 2, from the definition."""
    middle = (p + q) / 2
    total = 0.0
    for side in (p, q):
        total += sum(a * math.log2(a / m) for a, m in zip(side, middle, strict=True) if a > 0) / 2
    return total


def by_sample(values: list[float], sample: np.ndarray) -> float:
    """Mean over tokens of a sample, then over samples."""
    groups = [[value for value, owner in zip(values, sample, strict=True) if owner == wanted] for wanted in set(sample)]
    return float(np.mean([np.mean(group) for group in groups]))


def raw(run: Run, checkpoint: int, probe: str, site: str = SITE) -> dict[str, np.ndarray]:
    with run.recording(checkpoint) as recording:
        weights = recording.weights(site)
        group, row = recording.locate(site)
        return {
            "gate": recording.gate(site, probe).astype(float),
            "z": recording.pathway(site, probe).astype(float),
            "A": np.asarray(weights["A"], dtype=float),
            "B": SCALING * np.asarray(weights["B"], dtype=float),
            "base": group.read("base_norm", probe)[row].astype(float),
            "norm": group.read("expert_norm", probe)[row].astype(float),
            "sample": recording.tokens(probe)["sample"],
        }


def cell(run: Run, table: str, name: str, probe: str, checkpoint: int, site: str = SITE) -> float:
    return float(getattr(run, table)[name].sel(probe=probe, checkpoint=checkpoint, site=site))


def test_router_js_is_the_mean_over_tokens_then_samples(run: Run) -> None:
    old, new = raw(run, 1, "digit"), raw(run, 3, "digit")
    p, q = (gate / gate.sum(-1, keepdims=True) for gate in (old["gate"], new["gate"]))
    expected = by_sample([js(a, b) for a, b in zip(p, q, strict=True)], old["sample"])
    plain = float(np.mean([js(a, b) for a, b in zip(p, q, strict=True)]))
    assert cell(run, "drift", "router_js", "digit", 3) == pytest.approx(expected, abs=1e-12)
    assert abs(plain - expected) > 1e-6, "samples of unequal length must make a difference, or the test shows nothing"


def test_codrift_divergence_and_its_parts_from_output_vectors(run: Run) -> None:
    old, new = raw(run, 1, "digit"), raw(run, 3, "digit")
    parts: dict[str, list[float]] = {name: [] for name in ("r", "e", "x", "old", "new", "base")}
    for i in range(len(old["sample"])):
        o0, o1 = (np.einsum("edr,er->ed", side["B"], side["z"][i]) for side in (old, new))
        p0, p1 = old["gate"][i][:, None], new["gate"][i][:, None]
        router = ((p1 - p0) * (o0 + o1) / 2).sum(0)
        experts = ((p0 + p1) / 2 * (o1 - o0)).sum(0)
        parts["r"].append(router @ router)
        parts["e"].append(experts @ experts)
        parts["x"].append(router @ experts)
        parts["old"].append(((p0 * o0).sum(0) ** 2).sum())
        parts["new"].append(((p1 * o1).sum(0) ** 2).sum())
        parts["base"].append(new["base"][i] ** 2)
    mean = {name: by_sample(values, old["sample"]) for name, values in parts.items()}
    scale = 2 * (mean["old"] + mean["new"])
    change = mean["r"] + mean["e"] + 2 * mean["x"]
    expected = {
        "codrift_divergence": change / scale,
        "codrift_router": mean["r"] / scale,
        "codrift_experts": mean["e"] / scale,
        "codrift_cross": mean["x"] / scale,
        "coupling": mean["x"] / math.sqrt(mean["r"] * mean["e"]),
        "codrift_share": 2 * mean["x"] / change,
        "impact": change / mean["base"],
        "impact_router": mean["r"] / mean["base"],
        "impact_experts": mean["e"] / mean["base"],
        "impact_cross": mean["x"] / mean["base"],
    }
    for name, value in expected.items():
        assert cell(run, "codrift", name, "digit", 3) == pytest.approx(value, rel=1e-9), name


def test_parts_sum_to_the_whole_everywhere(run: Run) -> None:
    table = run.codrift
    total = table.codrift_router + table.codrift_experts + 2 * table.codrift_cross
    assert float(abs(total - table.codrift_divergence).max()) < 1e-12
    shapley = table.responsibility_router + table.responsibility_experts
    defined = table.responsibility_divergence.notnull()
    assert int(defined.sum()) > 0
    assert float(abs((shapley - table.responsibility_divergence).where(defined)).max()) < 1e-12


def test_every_routing_measure_equals_its_function(run: Run) -> None:
    old, new = raw(run, 1, "digit"), raw(run, 2, "digit")
    gates, sample = (old["gate"], new["gate"]), old["sample"]
    switch, overlap = metrics.top1_switch(*gates, sample), metrics.topk_overlap(*gates, 2, sample)
    expected = {
        "router_js_distance": metrics.router_js_distance(*gates, sample),
        "marginal_js": metrics.marginal_js(*gates, sample),
        "sample_js": metrics.sample_js(*gates, sample),
        "mass_moved": metrics.mass_moved(*gates, sample),
        "top1_switch": switch.switched,
        "top1_switch_chance": switch.chance,
        "topk_overlap": overlap.overlap,
        "topk_overlap_chance": overlap.chance,
        "relative_js": metrics.relative_js(*gates, sample).value,
    }
    for name, value in expected.items():
        assert cell(run, "drift", name, "digit", 2) == pytest.approx(float(value), abs=1e-12), name


def test_every_responsibility_measure_equals_its_function(run: Run) -> None:
    old, new = raw(run, 1, "digit"), raw(run, 2, "digit")
    sample = old["sample"]
    drift = metrics.responsibility_drift(old["gate"], new["gate"], old["norm"], new["norm"], sample)
    aligned = [metrics.alignment(side["gate"], side["norm"], sample) for side in (old, new)]
    expected = {
        "responsibility_divergence": drift.total,
        "responsibility_router_alone": drift.router,
        "responsibility_experts_alone": drift.experts,
        "responsibility_router": drift.phi_router,
        "responsibility_experts": drift.phi_experts,
        "responsibility_synergy": drift.synergy,
        "retained": drift.retained,
        "alignment": aligned[1],
        "alignment_loss": aligned[0] - aligned[1],
        "alignment_energy": metrics.alignment_energy(new["gate"], new["z"], sample),
    }
    for name, value in expected.items():
        assert cell(run, "codrift", name, "digit", 2) == pytest.approx(float(value), abs=1e-12), name


def test_subspaces_and_updates_equal_those_of_the_factors(run: Run) -> None:
    old, new = raw(run, 2, "colour"), raw(run, 3, "colour")
    rows = run.subspaces.sel(probe="colour", checkpoint=3, site=SITE)
    np.testing.assert_allclose(rows.subspace_overlap, metrics.subspace_overlap(old["A"], new["A"]), atol=1e-9)
    np.testing.assert_allclose(rows.output_overlap, metrics.output_overlap(old["B"], new["B"]), atol=1e-9)
    np.testing.assert_allclose(rows.principal_angles, metrics.principal_angles(old["A"], new["A"]), atol=1e-6)
    np.testing.assert_allclose(rows.grassmann_distance, metrics.grassmann_distance(old["A"], new["A"]), atol=1e-6)
    assert rows.subspace_overlap_chance.to_numpy() == pytest.approx(3 / 25)
    with run.recording(2) as recording:
        group, row = recording.locate(SITE)
        moment = group.stats["second_moment"][row, recording.probes.index("colour")]
        energy = group.stats["gated_energy"][row, recording.probes.index("colour")] / len(old["sample"])
    np.testing.assert_allclose(rows.active_overlap, metrics.active_overlap(old["A"], new["A"], moment), atol=1e-9)
    own = run.subspaces.sel(probe="colour", checkpoint=2, site=SITE)
    np.testing.assert_allclose(own.active_rank, metrics.active_rank(old["A"], moment), rtol=1e-9)
    importance = run.importance.sel(probe="colour", site=SITE)
    np.testing.assert_allclose(importance.rank_importance.sel(checkpoint=2), energy, rtol=1e-12)
    expected = metrics.rank_importance(old["gate"], old["z"])
    np.testing.assert_allclose(importance.rank_importance.sel(checkpoint=2), expected, rtol=5e-3)  # float16 rows
    update = importance.sel(checkpoint=3)
    np.testing.assert_allclose(update.rank_update_a, metrics.rank_update(old["A"], new["A"]), rtol=1e-9)
    np.testing.assert_allclose(update.rank_update_b, metrics.rank_update(old["B"], new["B"], axis=-2), rtol=1e-9)
    correlation = metrics.spearman(metrics.rank_update(old["A"], new["A"]).ravel(), energy.ravel())
    assert float(update.rank_update_a_correlation) == pytest.approx(float(correlation))
    top = metrics.importance_concentration(energy)
    assert float(importance.importance_concentration.sel(checkpoint=2)) == pytest.approx(float(top.top_share))
    assert float(importance.importance_gini.sel(checkpoint=2)) == pytest.approx(float(top.gini))


def test_context_follows_from_the_gates(run: Run) -> None:
    gates = {probe: raw(run, 2, probe)["gate"] for probe in run.tasks}
    here = run.drift.sel(checkpoint=2, site=SITE)
    loads = np.stack([gate.mean(0) for gate in gates.values()])
    np.testing.assert_allclose(here["load"], loads, atol=2e-4)  # exact sums against float16 rows
    for probe, gate in gates.items():
        assert float(here.gate_entropy.sel(probe=probe)) == pytest.approx(float(metrics.gate_entropy(gate)), abs=1e-3)
        assert float(here.load_entropy.sel(probe=probe)) == pytest.approx(float(metrics.load_entropy(gate)), abs=1e-3)
        assert float(here.dead_experts.sel(probe=probe)) == metrics.dead_experts(gate)
    counts = np.array([len(gate) for gate in gates.values()])
    assert float(here.specialisation) == pytest.approx(float(metrics.specialisation(loads, counts).value), abs=1e-3)


def test_intervals_are_the_bootstrap_over_samples(run: Run) -> None:
    columns = []
    for site in run.drift.site.to_numpy():
        old, new = raw(run, 1, "digit", site), raw(run, 3, "digit", site)
        columns.append(metrics.sample_means(metrics.js_divergence(old["gate"], new["gate"]), old["sample"]))
    here = metrics.bootstrap_mean(np.stack(columns), seed=0)
    at = run.drift.sel(probe="digit", checkpoint=3)
    np.testing.assert_allclose(at.router_js_low, here.low, atol=1e-12)
    np.testing.assert_allclose(at.router_js_high, here.high, atol=1e-12)
    mean = metrics.bootstrap_mean(np.stack(columns), seed=0, average_over=-1)
    row = run.summary.sel(probe="digit", checkpoint=3)
    assert [float(row.router_js), float(row.router_js_low), float(row.router_js_high)] == pytest.approx(
        [float(mean.value), float(mean.low), float(mean.high)], abs=1e-12
    )
    assert float(row.router_js_low) < float(row.router_js) < float(row.router_js_high)


def test_summary_and_trend_average_sites_then_old_probes(run: Run) -> None:
    table = run.codrift.codrift_divergence
    np.testing.assert_allclose(run.summary.codrift_divergence, table.mean("site"), rtol=1e-12)
    last = run.trend.sel(checkpoint=3)
    expected = table.sel(checkpoint=3, probe=["digit", "colour"]).mean().item()
    assert float(last.codrift_divergence) == pytest.approx(expected, rel=1e-12)
    assert run.trend.n_old.to_numpy().tolist() == [0, 0, 1, 2]
    assert np.isnan(run.trend.codrift_divergence.sel(checkpoint=1))
    assert float(last.codrift_divergence_low) < expected < float(last.codrift_divergence_high)


def test_the_noise_floor_is_the_drift_between_two_recordings_of_one_checkpoint(run: Run, master: Path) -> None:
    from driftlens.store import open_recording

    first, second = (master / "recordings" / f"03-country{end}.h5" for end in ("", ".noise"))
    with open_recording(first) as one, open_recording(second) as two:
        sample = one.tokens("digit")["sample"]
        expected = metrics.router_js(one.gate(SITE, "digit"), two.gate(SITE, "digit"), sample)
    noise = run.drift.router_js_noise.sel(probe="digit", site=SITE)
    assert float(noise) == pytest.approx(float(expected), rel=1e-9)
    assert 0 < float(noise) < 1e-3 * cell(run, "drift", "router_js", "digit", 3)
    assert np.isnan(run.codrift.coupling_noise).all(), "a ratio of two parts has no floor"


def test_an_anchor_compared_with_itself_has_not_drifted(run: Run) -> None:
    for probe, checkpoint in (("digit", 1), ("colour", 2), ("country", 3)):
        at = {"probe": probe, "checkpoint": checkpoint}
        for name in ("router_js", "mass_moved", "top1_switch", "sample_js"):
            assert (run.drift[name].sel(at) == 0).all(), name
        for name in ("codrift_divergence", "impact", "responsibility_divergence", "alignment_loss"):
            assert (abs(run.codrift[name].sel(at)) < 1e-12).all(), name
        assert (run.codrift.retained.sel(at) > 1 - 1e-12).all()
        assert np.isnan(run.codrift.coupling.sel(at)).all()
        assert (run.codrift.coupling_reason.sel(at) == Reason.NOTHING_MOVED).all()
        assert (run.importance.rank_update_a.sel(at) == 0).all()


def test_before_the_first_task_there_is_no_responsibility_and_the_reason_says_so(run: Run) -> None:
    at = {"probe": "digit", "checkpoint": 0}
    assert np.isnan(run.codrift.responsibility_divergence.sel(at)).all()
    codes = run.codrift.responsibility_divergence_reason.sel(at).to_numpy()
    assert {REASONS[int(code)] for code in codes} == {Reason.NO_OUTPUT_CURRENT.text}
    # Everything that the site adds now was not there before: unrelated functions, not an undefined number.
    np.testing.assert_allclose(run.codrift.codrift_divergence.sel(at), 0.5)


def test_a_run_without_drift_is_all_zeros(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path / "still", drift=0.0, sites=2, samples=3, tokens_per_sample=2))
    later = {"probe": "digit", "checkpoint": [1, 2, 3]}
    assert float(run.drift.router_js.sel(later).max()) == 0.0
    assert float(run.codrift.codrift_divergence.sel(later).max()) < 1e-12
    assert float(run.codrift.responsibility_divergence.sel(later).max()) == 0.0
    assert float(run.subspaces.subspace_overlap.sel(later).min()) > 1 - 1e-9
    assert float(run.subspaces.principal_angles.sel(later).max()) < 1e-6
    assert float(run.trend.router_js.sel(checkpoint=3)) == 0.0


def test_a_gate_that_never_routes_is_flagged(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path / "flat", gate="uniform", sites=2, samples=3, tokens_per_sample=2, noise=False))
    assert run.drift.near_uniform.all()
    assert float(run.drift.gate_entropy.min()) == pytest.approx(1.0)
    assert float(run.drift.router_js.max()) == 0.0
    assert np.isnan(run.drift.relative_js).all()
    assert (run.drift.relative_js_reason == Reason.BELOW_NOISE_FLOOR).all()
    assert float(run.summary.near_uniform_share.min()) == 1.0
    assert np.isnan(run.drift.router_js_noise).all(), "no second recording, no floor"


def test_top_k_gates_are_compared_by_their_own_k(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path / "topk", gate="topk", sites=2, samples=3, tokens_per_sample=2))
    old, new = raw(run, 1, "digit"), raw(run, 2, "digit")
    expected = metrics.topk_overlap(old["gate"], new["gate"], 2, old["sample"])
    assert cell(run, "drift", "topk_overlap", "digit", 2) == pytest.approx(float(expected.overlap))
    assert (run.drift.top_k == 2).all()


def test_one_expert_and_one_task(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path / "one", tasks=("digit",), num_experts=1, sites=1, samples=2, tokens_per_sample=2))
    assert np.isnan(run.drift.gate_entropy).all()
    assert np.isnan(run.drift.specialisation).all()
    assert float(run.drift.router_js.max()) == 0.0
    assert float(run.codrift.codrift_router.max()) == 0.0
    assert run.trend.n_old.to_numpy().tolist() == [0, 0]
    assert run.summary.sizes == {"probe": 1, "checkpoint": 2}


def test_other_anchors(run: Run) -> None:
    moved = run.anchored({"digit": 2})
    assert moved.drift.anchor.to_numpy().tolist() == [2, 2, 3]
    old, new = raw(run, 2, "digit"), raw(run, 3, "digit")
    expected = metrics.router_js(old["gate"], new["gate"], old["sample"])
    assert cell(moved, "drift", "router_js", "digit", 3) == pytest.approx(float(expected), abs=1e-12)
    assert cell(moved, "drift", "router_js", "colour", 3) == cell(run, "drift", "router_js", "colour", 3)
    assert run.anchored(1).drift.anchor.to_numpy().tolist() == [1, 1, 1]
    with pytest.raises(UnknownNameError, match="Unknown checkpoint '9'"):
        run.anchored(9)
    with pytest.raises(UnknownNameError, match=r"Unknown probe 'digits'. Did you mean 'digit'\?"):
        _ = run.anchored({"digits": 1}).drift


def test_a_probe_whose_anchor_is_missing_is_undefined_not_zero(run: Run) -> None:
    partial = run.without("01-digit")
    assert partial.recorded == (0, 2, 3)
    assert partial.drift.anchor.to_numpy().tolist() == [-1, 2, 3]
    assert np.isnan(partial.drift.router_js.sel(probe="digit")).all()
    assert (partial.drift.router_js_reason.sel(probe="digit") == Reason.NOT_MEASURED).all()
    assert np.isnan(partial.subspaces.subspace_overlap.sel(probe="digit")).all()
    same = partial.drift.router_js.sel(probe="colour", checkpoint=3)
    np.testing.assert_allclose(same, run.drift.router_js.sel(probe="colour", checkpoint=3))


def test_experts_that_did_not_exist_at_the_anchor_count_as_silent(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path / "grown", grow=2, sites=2, samples=3, tokens_per_sample=2, noise=False))
    assert run.drift.sizes["expert"] == 6
    old, new = raw(run, 1, "digit"), raw(run, 3, "digit")
    assert (old["gate"].shape[1], new["gate"].shape[1]) == (4, 6)
    gates = (old["gate"], new["gate"])
    expected = metrics.router_js(*gates, old["sample"])
    assert cell(run, "drift", "router_js", "digit", 3) == pytest.approx(float(expected), abs=1e-12)
    phi = metrics.codrift(*gates, old["z"], new["z"], old["B"], new["B"], old["sample"])
    assert cell(run, "codrift", "codrift_divergence", "digit", 3) == pytest.approx(float(phi.total), rel=1e-9)
    here = run.drift.sel(probe="digit", site=SITE)
    np.testing.assert_array_equal(here["load"].sel(checkpoint=1, expert=[4, 5]), 0.0)
    assert (here["load"].sel(checkpoint=3, expert=[4, 5]) > 0).all()
    overlap = run.subspaces.subspace_overlap.sel(probe="digit", checkpoint=3, site=SITE)
    np.testing.assert_allclose(overlap[:4], metrics.subspace_overlap(old["A"], new["A"][:4]), atol=1e-9)
    assert np.isnan(overlap[4:]).all()
    with pytest.raises(FormatError, match="need the same sites"):
        thin_run(run, tmp_path / "thin")
