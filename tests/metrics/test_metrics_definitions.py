"""The table of definitions: complete, consistent, and true of the functions."""

import dataclasses

import numpy as np
import pytest

from driftlens import metrics as m

COMPUTED_BY = {
    "router_js": "router_js", "router_js_distance": "router_js_distance", "marginal_js": "marginal_js",
    "sample_js": "sample_js", "mass_moved": "mass_moved", "top1_switch": "top1_switch", "topk_overlap": "topk_overlap",
    "relative_js": "relative_js", "gate_entropy": "gate_entropy", "load_entropy": "load_entropy",
    "specialisation": "specialisation", "coactivation": "coactivation", "dead_experts": "dead_experts",
    "subspace_overlap": "subspace_overlap", "subspace_overlap_adjusted": "subspace_overlap_adjusted",
    "principal_angles": "principal_angles", "grassmann_distance": "grassmann_distance",
    "active_overlap": "active_overlap", "active_rank": "active_rank", "output_overlap": "output_overlap",
    "rank_importance": "rank_importance", "importance_concentration": "importance_concentration",
    "rank_update": "rank_update", "cka": "cka", "codrift_divergence": "codrift", "codrift_router": "codrift",
    "codrift_experts": "codrift", "codrift_cross": "codrift", "coupling": "codrift", "codrift_share": "codrift",
    "impact": "CoDriftTokens", "responsibility_divergence": "responsibility_drift",
    "responsibility_router": "responsibility_drift", "responsibility_experts": "responsibility_drift",
    "responsibility_synergy": "responsibility_drift", "retained": "responsibility_drift", "alignment": "alignment",
    "alignment_energy": "alignment_energy", "format_share": "format_share", "expert_drift": "expert_drift",
    "codrift_inherited": "drift_origin", "codrift_local": "drift_origin", "codrift_origin_cross": "drift_origin",
}  # fmt: skip


def test_every_measure_has_a_function_and_every_score_its_name() -> None:
    scores = set(m.stream_scores(np.eye(4, 3)))
    assert set(m.MEASURES) == set(COMPUTED_BY) | scores
    for function in COMPUTED_BY.values():
        assert callable(getattr(m, function))


@pytest.mark.parametrize("name", list(m.MEASURES))
def test_every_entry_is_filled_in(name: str) -> None:
    entry = m.MEASURES[name]
    assert entry.name == name
    for field in dataclasses.fields(entry):
        if field.name not in ("chance", "caveat", "within_run"):
            assert getattr(entry, field.name), field.name
    assert entry.invariance in ("gauge", "none")
    assert entry.section in ("1", "2", "3a", "3b", "5")


def test_within_run_is_exactly_what_a_gauge_changes() -> None:
    assert {n for n, e in m.MEASURES.items() if e.within_run} == {
        n for n, e in m.MEASURES.items() if e.invariance == "none"
    }
    generator = np.random.default_rng(0)
    z, gate = generator.normal(size=(20, 2, 3)), generator.dirichlet(np.ones(2), size=20)
    A = generator.normal(size=(2, 3, 6))
    gauge = np.eye(3) + 0.5 * generator.normal(size=(2, 3, 3))
    turned = np.einsum("ekl,nel->nek", gauge, z)
    assert not np.allclose(m.rank_importance(gate, turned), m.rank_importance(gate, z))
    assert not np.allclose(m.rank_update(gauge @ A, gauge @ (A + 1)), m.rank_update(A, A + 1))
    assert not np.allclose(m.alignment_energy(gate, turned), m.alignment_energy(gate, z))


def test_every_reason_has_words() -> None:
    assert len({reason.text for reason in m.Reason}) == len(m.Reason)


def test_all_exports_exist_and_are_documented() -> None:
    for name in m.__all__:
        item = getattr(m, name)
        if callable(item):
            assert item.__doc__, name
