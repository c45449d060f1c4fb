"""Simple measures and variants of co-drift against brute force on the files of a run."""

from __future__ import annotations

import numpy as np
import pytest

from driftlens.analysis import Run, open_run, thin_run
from driftlens.analysis.simple import SIMPLE, simple_measures
from driftlens.analysis.variants import average_variants, variant_definition, variant_measures, variant_names
from driftlens.errors import UnknownNameError
from driftlens.metrics import biased_cka
from tests.analysis.synthetic import SCALING, make_run


@pytest.fixture(scope="module")
def simple(run):
    return simple_measures(run)


def by_sample(values, sample):
    return np.mean([values[sample == number].mean() for number in np.unique(sample)])


def updates(run: Run, checkpoint: int, probe: str):
    """u [n, d_out] and norm(y)^2 [n] of every site, from gates, pathways and B of the recording."""
    with run.recording(checkpoint) as recording:
        for number in range(len(recording.sites)):
            gate = recording.gate(number, probe).astype(np.float64)
            gated = gate[:, :, None] * recording.pathway(number, probe)
            B = SCALING * recording.weights(number)["B"].astype(np.float64)
            base = recording.groups[0].read("base_norm", probe)[number].astype(np.float64)
            yield np.einsum("eor,ner->no", B, gated), base**2, gate


def tokens(run: Run, probe: str):
    with run.recording(1) as recording:
        return {name: np.asarray(values) for name, values in recording.tokens(probe).items()}


def test_weight_distances_are_those_of_the_factors(run, simple):
    factors = {}
    for checkpoint in (1, 3):
        with run.recording(checkpoint) as recording:
            factors[checkpoint] = [recording.weights(number) for number in range(len(recording.sites))]
    apart, moved, turned = [], [], []
    for old, new in zip(factors[1], factors[3], strict=True):
        flat = [np.concatenate([part["A"].ravel(), part["B"].ravel()]) for part in (old, new)]
        apart.append(np.linalg.norm(flat[1] - flat[0]) / np.linalg.norm(flat[0]))
        update = [np.einsum("eor,erd->eod", part["B"], part["A"]) for part in (old, new)]
        moved.append(np.linalg.norm(update[1] - update[0]) / np.linalg.norm(update[0]))
        rows = [part["router"] / np.linalg.norm(part["router"], axis=1, keepdims=True) for part in (old, new)]
        turned.append((1 - (rows[0] * rows[1]).sum(axis=1)).mean())
    cell = simple.sel(probe=run.tasks[0], checkpoint=3)
    assert float(cell["weight_distance"]) == pytest.approx(np.mean(apart), rel=1e-6)
    assert float(cell["update_distance"]) == pytest.approx(np.mean(moved), rel=1e-6)
    assert float(cell["router_row_distance"]) == pytest.approx(np.mean(turned), rel=1e-5)
    assert float(cell["tasks_since_anchor"]) == 2


def test_distances_of_the_update_are_those_of_its_vectors(run, simple):
    probe = run.tasks[0]
    sample = tokens(run, probe)["sample"]
    apart, unlike = [], []
    for (old, *_), (new, *_) in zip(updates(run, 1, probe), updates(run, 3, probe), strict=True):
        cosine = (old * new).sum(axis=1) / np.linalg.norm(old, axis=1) / np.linalg.norm(new, axis=1)
        apart.append(by_sample(1 - cosine, sample))
        eye = np.eye(old.shape[1])[None]
        unlike.append(1 - biased_cka(old[:, None], new[:, None], eye, eye)[0])
    cell = simple.sel(probe=probe, checkpoint=3)
    assert float(cell["u_cosine_distance"]) == pytest.approx(np.mean(apart), rel=1e-6)
    assert float(cell["cka_biased_distance"]) == pytest.approx(np.mean(unlike), rel=1e-6)


def test_only_old_probes_have_distances_and_a_noise_floor_stands_beside_them(run, simple):
    old = (run.summary["checkpoint"] > run.summary["anchor"]).transpose("probe", "checkpoint").to_numpy()
    for name in SIMPLE:
        np.testing.assert_array_equal(simple[name].notnull().transpose("probe", "checkpoint"), old, err_msg=name)
    assert (simple["u_cosine_distance_noise"] > 0).all()
    assert float(simple["u_cosine_distance_noise"].max()) < float(simple["u_cosine_distance"].min())


def test_a_thinned_run_lacks_router_weights_alone(run, simple, tmp_path):
    thin_run(run.path, tmp_path / "thin")
    thin = simple_measures(open_run(tmp_path / "thin"))
    assert thin["router_row_distance"].isnull().all()
    assert "thinned" in thin["router_row_distance"].attrs["undefined"]
    for name in set(SIMPLE) - {"router_row_distance"}:
        np.testing.assert_allclose(thin[name], simple[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_all_tokens_and_all_sites_give_the_tables_of_the_run(run):
    names = ["codrift_divergence", "codrift_experts", "codrift_cross", "impact", "impact_cross", "router_js"]
    found = variant_measures(run, names)
    for name in names:
        wanted = run.summary[name].where(found[name].notnull())
        np.testing.assert_allclose(found[name].transpose(*wanted.dims), wanted, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found[f"{name}_noise"], run.summary[f"{name}_noise"], rtol=1e-9, atol=1e-12)


def test_scored_tokens_come_right_before_an_answer_token(run):
    probe = run.tasks[0]
    table = tokens(run, probe)
    answers = {(s, p) for s, p, r in zip(table["sample"], table["position"], table["role"], strict=True) if r == 2}
    scored = np.array([(s, p + 1) in answers for s, p in zip(table["sample"], table["position"], strict=True)])
    assert 0 < scored.sum() < len(scored)
    sample = table["sample"][scored]
    impact, share = [], []
    for (old, *_), (new, base, _) in zip(updates(run, 1, probe), updates(run, 3, probe), strict=True):
        size = by_sample(base[scored], sample)
        impact.append(by_sample(((new - old) ** 2).sum(axis=1)[scored], sample) / size)
        share.append(by_sample((new**2).sum(axis=1)[scored], sample) / size)
    names = ["impact_scored", *(f"impact_scored_{sites}" for sites in ("max", "late", "residual"))]
    found = variant_measures(run, [*names, "update_share_scored"])
    cell = found.sel(probe=probe, checkpoint=3)
    assert float(cell["impact_scored"]) == pytest.approx(np.mean(impact), rel=1e-6)
    assert float(cell["impact_scored_max"]) == pytest.approx(np.max(impact), rel=1e-6)
    assert float(cell["impact_scored_late"]) == pytest.approx(
        impact[-1], rel=1e-6
    )  # two layers, sites 0 and 1 in the first
    assert float(cell["impact_scored_residual"]) == pytest.approx(impact[1], rel=1e-6)  # the down projection
    assert float(cell["update_share_scored"]) == pytest.approx(np.mean(share), rel=1e-6)


def test_pooled_is_a_ratio_of_sums(run):
    probe = run.tasks[0]
    sample = tokens(run, probe)["sample"]
    top = bottom = 0.0
    for (old, *_), (new, base, _) in zip(updates(run, 1, probe), updates(run, 3, probe), strict=True):
        top += by_sample(((new - old) ** 2).sum(axis=1), sample)
        bottom += by_sample(base, sample)
    found = variant_measures(run, ["impact_pooled"])["impact_pooled"].sel(probe=probe, checkpoint=3)
    assert float(found) == pytest.approx(top / bottom, rel=1e-6)


def test_every_variant_can_be_measured_and_says_what_it_is(run):
    names = variant_names()
    assert len(names) == len(set(names)) > 80
    found = variant_measures(run)
    assert set(names) == {str(name) for name in found.data_vars if not str(name).endswith("_noise")}
    for name in names:
        assert found[name].notnull().any(), name
        assert variant_definition(name)
    with pytest.raises(UnknownNameError, match="Unknown variant 'impact_scord'"):
        average_variants(found.expand_dims(site=1), [], ["impact_scord"])


def test_without_a_router_of_its_own_a_site_has_no_rows_to_turn(tmp_path):
    folder = make_run(tmp_path / "one", num_experts=1, gate="uniform", samples=3, noise=False, sites=2)
    found = simple_measures(open_run(folder))
    assert (found["marginal_js"].fillna(0) == 0).all()
    assert found["weight_distance"].notnull().any()
