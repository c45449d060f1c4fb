"""What must leave each measure alone on random passes, and what must not; scene.py and forms.py say which."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftlens import metrics as m
from tests.metrics.forms import OTHER_INVARIANCES
from tests.metrics.scene import TRANSFORMATIONS, VERDICTS, Verdict, measure, random_scene

EXACT = {"rtol": 1e-7, "atol": 1e-9}


def compare(key: str, seed: int) -> dict[str, bool]:
    """Measure -> whether the transformation left it alone."""
    rng = np.random.default_rng(seed)
    scene = random_scene(seed, int(rng.integers(8, 30)))
    before, after = measure(scene), measure(TRANSFORMATIONS[key][1](scene, rng))
    return {
        name: value.shape == after[name].shape and np.allclose(value, after[name], equal_nan=True, **EXACT)
        for name, value in before.items()
    }


@pytest.mark.parametrize("key", TRANSFORMATIONS)
@given(seed=st.integers(0, 2**20))
@settings(max_examples=12, deadline=None)
def test_what_must_not_change_does_not(key: str, seed: int) -> None:
    changed = [name for name, same in compare(key, seed).items() if not same and VERDICTS[name][key] is Verdict.SAME]
    assert not changed


@pytest.mark.parametrize("key", TRANSFORMATIONS)
def test_what_must_change_does(key: str) -> None:
    seen = [compare(key, seed) for seed in range(3)]
    stayed = [
        name
        for name, verdicts in VERDICTS.items()
        if verdicts[key] is Verdict.CHANGES and all(same[name] for same in seen)
    ]
    assert not stayed


OTHERS = [pytest.param(pair, id=f"{name}: {pair.text}") for name, pairs in OTHER_INVARIANCES.items() for pair in pairs]


@pytest.mark.parametrize("pair", OTHERS)
@given(seed=st.integers(0, 2**20))
@settings(max_examples=12, deadline=None)
def test_measures_that_are_not_of_a_site(pair, seed: int) -> None:
    before, after = pair.values(np.random.default_rng(seed))
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-9)


def test_every_measure_is_held_to_something() -> None:
    assert set(VERDICTS) | set(OTHER_INVARIANCES) == set(m.COMPUTED_BY)
    assert not set(VERDICTS) & set(OTHER_INVARIANCES)
    for name, verdicts in VERDICTS.items():
        assert list(verdicts) == list(TRANSFORMATIONS), name


def test_the_definitions_say_which_measures_the_gauge_changes() -> None:
    for name, verdicts in VERDICTS.items():
        entry = m.ALL_MEASURES[name]
        gauge_free = entry.invariance == "gauge"
        assert gauge_free == (not entry.within_run)
        if name.startswith(("router_row", "router_c")) or name == "magnitude_change":
            continue  # not of the factors: what bars comparing runs is that routers of two runs share no rows
        if gauge_free:
            assert verdicts["gauge"] is Verdict.SAME, name
        else:
            assert verdicts["gauge"] is not Verdict.SAME, name


def test_values_of_the_scene_are_defined_and_no_constants() -> None:
    first, second = measure(random_scene(0)), measure(random_scene(1))
    constant = {"dead_experts", "near_uniform", "update_rank", "silent_experts"}
    for name, value in first.items():
        assert not np.isnan(value).any(), name
        if name not in constant:
            assert not np.array_equal(value, second[name]), name
