"""The generated pages are what the code says, and every function that returns a measure is on them."""

import inspect
import re
from pathlib import Path

import pytest

from driftlens import metrics as m
from scripts import make_metric_docs

ROOT = Path(__file__).resolve().parents[2]
PAGES = make_metric_docs.pages()

HELPERS = {
    # parts of measures, by token or from Gram matrices
    "active_rank_from_gram", "biased_cka_from_grams", "cka_from_grams", "codrift_from_grams", "expert_drift_tokens",
    "gate_entropy_tokens", "mass_moved_tokens", "rank_update_from_grams", "responsibility_tokens", "top1_tokens",
    "topk_mask", "topk_overlap_tokens", "expert_grams", "expert_blocks",
    # subspaces before they are compared
    "orthonormal_rows", "whitening", "pair_from_bases", "pair_from_factors", "pair_from_grams", "update_spectrum",
    # averages, intervals, chance levels, and statistics of any numbers
    "probe_mean", "sample_means", "resampled_means", "bootstrap", "bootstrap_mean", "bootstrap_ratio",
    "bootstrap_weights", "bootstrap_attribution", "percentile_interval", "exceeds_noise", "coactivation_chance",
    "normalised_entropy", "player_orders",
    # nulls: they place a value, whose name and meaning stay
    "permuted_tokens", "permuted_experts", "random_overlap_null", "null_pairings", "other_site_scores",
    "match_profiles",
}  # fmt: skip


@pytest.mark.parametrize("path", PAGES)
def test_the_committed_page_is_what_the_script_makes(path: str) -> None:
    committed = (ROOT / path).read_text(encoding="utf-8")
    assert committed == PAGES[path], f"{path} is stale; run: python scripts/make_metric_docs.py"


def test_every_function_that_returns_a_measure_is_defined() -> None:
    functions = {name for name in m.__all__ if inspect.isfunction(getattr(m, name))}
    defined = {name.split(".")[0] for name in m.COMPUTED_BY.values()}
    missing = functions - defined - HELPERS
    assert not missing, "add a definition (further_definitions.py), or name it a helper here"
    assert not defined & HELPERS
    assert not HELPERS - functions


def test_names_are_unique_and_what_computes_them_exists() -> None:
    assert len(m.ALL_MEASURES) == len(m.MEASURES) + len(m.FURTHER_MEASURES) + len(
        set(m.WEIGHT_MEASURES) - set(m.MEASURES)
    )
    assert set(m.ALL_MEASURES) - set(m.COMPUTED_BY) == {"remainder", "ledger", "residual"}
    for path in m.COMPUTED_BY.values():
        assert make_metric_docs.found(path).__doc__


@pytest.mark.parametrize("name", m.FURTHER_MEASURES)
def test_every_further_entry_is_filled_in(name: str) -> None:
    entry = m.FURTHER_MEASURES[name]
    assert entry.name == name
    assert all((entry.title, entry.formula, entry.range, entry.source, entry.undefined))
    assert entry.invariance in ("gauge", "none")
    assert entry.within_run == (entry.invariance == "none")
    assert entry.section in make_metric_docs.SECTIONS


def test_every_measure_is_on_the_pages_once() -> None:
    for name in m.ALL_MEASURES:
        assert PAGES["docs/measures.md"].count(f"### `{name}`:") == 1
        assert PAGES["docs/measure_tests.md"].count(f"\n| `{name}` |") == 1


def test_every_measure_of_the_defining_page_is_in_the_table() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([a-z0-9_]+)`", text, flags=re.MULTILINE))
    assert len(named) > 20
    assert named <= set(m.ALL_MEASURES)


def test_signatures_show_shapes() -> None:
    assert make_metric_docs.signature("router_js", m.router_js) == (
        "router_js(gate0: Float[*site token expert0], gate1: Float[*site token expert1], "
        "sample: Integer[token] | None = None) -> Float64[*site]"
    )
    assert "-> Top1Switch(switched, chance, ties)" in make_metric_docs.signature("top1_switch", m.top1_switch)
    assert ", *, noise_floor: ArrayLike = 1e-06" in make_metric_docs.signature("relative_js", m.relative_js)
