"""Drift of a recorded run beside what chance gives."""

from pathlib import Path

import numpy as np
import pytest

from driftlens.analysis import Run, null_table, open_run
from driftlens.analysis.nulls import NULLS
from driftlens.errors import ConfigError
from driftlens.metrics import permuted_experts, permuted_tokens, random_overlap, router_js
from tests.analysis.synthetic import make_run

DRAWS = 19


def test_drift_is_that_of_the_table_and_stands_beside_its_nulls(run: Run) -> None:
    table = null_table(run, draws=DRAWS)
    old = (run.drift["checkpoint"] > run.drift["anchor"]) & (run.drift["anchor"] >= 0)
    drift = run.drift["router_js"].where(old).transpose("probe", "checkpoint", "site")
    np.testing.assert_allclose(table["router_js"], drift, rtol=1e-5, equal_nan=True)
    overlap = run.subspaces["subspace_overlap"].mean("expert").where(old).transpose("probe", "checkpoint", "site")
    np.testing.assert_allclose(table["subspace_overlap"], overlap, rtol=1e-5, equal_nan=True)
    defined = table.where(old, drop=True)
    for name in ("router_js_unrelated_p", "router_js_relabelled_p"):
        assert float(defined[name].min()) >= 1 / (DRAWS + 1)
        assert float(defined[name].max()) <= 1
    assert all(table[name].attrs["definition"] == text for name, text in NULLS.items())
    assert table.attrs == {"draws": DRAWS, "seed": 0}


def test_numbers_are_those_of_the_gates_themselves(run: Run) -> None:
    table = null_table(run, draws=DRAWS, seed=3)
    probe = str(table["probe"][0].item())
    anchor, current = int(run.drift["anchor"].sel(probe=probe)), int(table["checkpoint"][-1])
    with run.recording(anchor) as first, run.recording(current) as second:
        sample = first.tokens(probe)["sample"]
        gate0, gate1 = (np.stack([part.gate(s.name, probe) for s in first.sites]) for part in (first, second))

    def drift(gate: np.ndarray) -> np.ndarray:
        return router_js(gate0, gate, sample)

    found = table.sel(probe=probe, checkpoint=current)
    unrelated = permuted_tokens(drift, gate1, draws=DRAWS, seed=3)
    relabelled = permuted_experts(drift, gate1, site_axes=1, draws=DRAWS, seed=3)
    np.testing.assert_allclose(found["router_js_unrelated"], unrelated.mean, rtol=1e-6)
    np.testing.assert_allclose(found["router_js_unrelated_low"], unrelated.low, rtol=1e-6)
    np.testing.assert_allclose(found["router_js_unrelated_p"], unrelated.p_value)
    np.testing.assert_allclose(found["router_js_relabelled"], relabelled.mean, rtol=1e-6)
    np.testing.assert_allclose(found["router_js_relabelled_p"], relabelled.p_value)


def test_random_subspaces_are_those_of_each_sites_width(run: Run) -> None:
    table = null_table(run, draws=1)
    last = table.isel(probe=0, checkpoint=-1)
    for number, site in enumerate(run.recording(1).sites):
        chance = random_overlap(site.rank, site.rank, site.d_in)
        assert float(last["subspace_overlap_random"][number]) == pytest.approx(float(chance.mean))
        spread = float(chance.spread) / np.sqrt(site.num_experts)
        assert float(last["subspace_overlap_random_spread"][number]) == pytest.approx(spread)


def test_a_run_that_hardly_moved_is_far_from_chance(tmp_path: Path) -> None:
    table = null_table(open_run(make_run(tmp_path / "still", sites=2, samples=6, drift=0.01)), draws=DRAWS)
    last = table.isel(probe=0, checkpoint=-1)
    np.testing.assert_allclose(last["router_js_unrelated_p"], 1 / (DRAWS + 1))
    assert (last["router_js"] < 0.2 * last["router_js_unrelated"]).all()
    assert (
        last["subspace_overlap"] > last["subspace_overlap_random"] + 5 * last["subspace_overlap_random_spread"]
    ).all()


def test_no_draws_are_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match="at least 1 is needed"):
        null_table(run, draws=0)
