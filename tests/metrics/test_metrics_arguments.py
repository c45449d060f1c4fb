"""What every function owes its caller: refusals that name the argument, documented defaults, silence on broken data."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from driftlens import metrics as m
from driftlens.errors import ConfigError, DriftLensError, ProbeError
from driftlens.metrics.arrays import as_weights, check_same_tokens, divide, finite_matrices, mean_defined, normalise

TOKENS, EXPERTS, RANK, OUT = 6, 3, 2, 5


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).random(shape)


GATE, NORM = random(TOKENS, EXPERTS), random(TOKENS, EXPERTS) + 0.1
PATH, FACTOR = random(TOKENS, EXPERTS, RANK), random(EXPERTS, OUT, RANK)
GRAM = m.expert_grams(FACTOR, FACTOR)[0]


def refusal(error: type[DriftLensError], function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("function", "arguments", "names"),
    [
        (m.js_divergence, (GATE, GATE), ("p", "q")),
        (m.router_js, (GATE, GATE), ("gate0", "gate1")),
        (m.topk_mask, (GATE, 1), ("gate",)),
        (m.load, (GATE,), ("gate",)),
        (m.gate_entropy, (GATE,), ("gate",)),
        (m.specialisation, (GATE, np.ones(TOKENS)), ("loads",)),
        (m.rank_importance, (GATE, PATH), ("gate",)),
        (m.importance_concentration, (GATE,), ("importance",)),
        (m.responsibility, (GATE, NORM), ("gate", "expert norms")),
        (m.responsibility_drift, (GATE, GATE, NORM, NORM), ("gate0", "gate1", "norm0", "norm1")),
        (m.alignment, (GATE, NORM), ("gate", "expert norms")),
        (m.codrift_from_grams, (GATE, GATE, PATH, PATH, GRAM, GRAM, GRAM), ("gate0", "gate1")),
    ],
)
def test_negative_weights_are_refused_under_the_name_of_their_argument(
    function: Callable[..., Any], arguments: tuple[Any, ...], names: tuple[str, ...]
) -> None:
    for position, name in enumerate(names):
        changed = list(arguments)
        changed[position] = arguments[position] - 2 * (arguments[position] == arguments[position].max())
        text = refusal(ConfigError, function, *changed)
        assert text.startswith(f"{name} holds negative entries (lowest ")
        assert text.endswith(
            "; expected non-negative weights. If these are router logits, apply the model's own gate function first."
        )


def test_a_single_number_is_no_gate() -> None:
    text = refusal(ConfigError, m.load, 0.5)
    assert text == "gate is a single number; expected an array [..., tokens, experts]."


@pytest.mark.parametrize(
    ("function", "arguments", "what"),
    [
        (m.router_js, (GATE, GATE[1:]), "gates"),
        (m.responsibility_drift, (GATE, GATE, NORM[1:], NORM), "gates and expert norms"),
        (m.responsibility_drift, (GATE, GATE, NORM, NORM[1:]), "gates and expert norms"),
        (m.alignment, (GATE, NORM[1:]), "gates and expert norms"),
        (m.cka, (PATH, PATH[1:], FACTOR, FACTOR), "pathways"),
        (m.biased_cka, (PATH, PATH[1:], FACTOR, FACTOR), "pathways"),
    ],
)
def test_tokens_that_do_not_pair_are_refused_under_the_name_of_the_arrays(
    function: Callable[..., Any], arguments: tuple[Any, ...], what: str
) -> None:
    assert refusal(ProbeError, function, *arguments) == (
        f"The {what} of the two checkpoints hold 6 and 5 tokens; drift pairs the same token at both. Record both "
        "checkpoints on the same probe set."
    )


def test_arrays_without_a_token_axis_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^The gates have shapes \(3,\) and \(6, 3\); expected at least 2 axes"):
        m.router_js(GATE[0], GATE)
    with pytest.raises(ConfigError, match=re.escape("expected at least 1 axes (tokens first).")):
        check_same_tokens(np.zeros(()), np.zeros(3), axis=-1)
    check_same_tokens(np.zeros(3), np.zeros((2, 3)), axis=-1)


@pytest.mark.parametrize("ragged", [FACTOR[0, 0], FACTOR[:, 1:]])
def test_factors_of_different_outputs_are_refused_with_both_shapes(ragged: np.ndarray) -> None:
    for function in (m.expert_grams, lambda *factors: m.cka(PATH, PATH, *factors)):
        assert refusal(ConfigError, function, FACTOR, ragged) == (
            f"B has shapes (3, 5, 2) and {ragged.shape}; expected [..., E, d_out, r] with one d_out."
        )


def test_intervals_have_the_documented_defaults() -> None:
    values, other = random(40), random(40) + 1
    tokens = m.codrift_from_grams(GATE, GATE[::-1], PATH, PATH[::-1] + 1, GRAM, GRAM, GRAM)
    usual = {"draws": 1000, "seed": 0, "level": 0.95}
    for plain, told in (
        (m.bootstrap_mean(values), m.bootstrap_mean(values, **usual)),
        (m.bootstrap_ratio(values, other), m.bootstrap_ratio(values, other, **usual)),
        (m.bootstrap(np.sqrt, values), m.bootstrap(np.sqrt, values, **usual)),
        (tokens.interval("total"), tokens.interval("total", **usual)),
    ):
        np.testing.assert_array_equal(plain, told)
    np.testing.assert_array_equal(m.bootstrap_weights(7), m.bootstrap_weights(7, 1000, 0))
    np.testing.assert_array_equal(m.percentile_interval(values), m.percentile_interval(values, 0.95))
    assert m.relative_js(GATE, GATE[::-1]).value == m.relative_js(GATE, GATE[::-1], noise_floor=1e-6, seed=0).value
    assert m.relative_js(GATE, GATE[::-1]).value != m.relative_js(GATE, GATE[::-1], seed=1).value


@pytest.mark.parametrize("option", [{"draws": 50}, {"seed": 3}, {"level": 0.5}])
def test_every_bootstrap_listens_to_its_settings(option: dict[str, Any]) -> None:
    values, other = random(40), random(40) + 1
    tokens = m.codrift_from_grams(GATE, GATE[::-1], PATH, PATH[::-1] + 1, GRAM, GRAM, GRAM)
    for bootstrap in (
        lambda **options: m.bootstrap_mean(values, **options),
        lambda **options: m.bootstrap_ratio(values, other, **options),
        lambda **options: m.bootstrap(np.sqrt, values, **options),
        lambda **options: tokens.interval("total", **options),
    ):
        plain, changed = bootstrap(), bootstrap(**option)
        assert changed.value == plain.value
        assert (changed.low, changed.high) != (plain.low, plain.high)
        np.testing.assert_array_equal(changed, bootstrap(**option))  # and the draws are those of the seed


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_broken_or_huge_activations_and_weights_end_without_a_warning(bad: float) -> None:
    path, factor = PATH.copy(), FACTOR.copy()
    path[2], factor[1, 2] = bad, bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for z, B in ((path, FACTOR), (PATH, factor), (path, factor)):
            for measure in (m.cka, m.biased_cka):
                assert np.isnan(measure(z, PATH, B, FACTOR)).any()
            with np.errstate(over="ignore", invalid="ignore"):
                grams = m.expert_grams(B, B)
            codrift = m.codrift_from_grams(GATE, GATE[::-1], z, z[::-1], *grams).reduce()
            assert np.isnan(codrift.total)
            assert codrift.reason == m.Reason.NOT_FINITE
            origin = m.drift_origin((GATE, z), (GATE, z + 1), (GATE[::-1], z[::-1]), *grams).reduce()
            assert np.isnan(origin.total)
            assert origin.reason == m.Reason.NOT_FINITE
        with np.errstate(over="ignore"):
            m.expert_drift_tokens(PATH, PATH, *m.expert_grams(FACTOR, FACTOR))


def test_quotients_and_means_know_what_is_undefined() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(divide([1.0, 0, -1, 6, np.inf], [0, 0, 0, 3, np.inf]), [np.nan] * 3 + [2, np.nan])
        np.testing.assert_array_equal(normalise(np.array([[0.0, 0], [1, 3], [np.inf, 1]]))[:2], [[0, 0], [0.25, 0.75]])
        assert np.isnan(normalise(np.array([[np.inf, 1.0]]))).any()
        holes = np.array([[1.0, np.nan, 3], [np.nan] * 3])
        np.testing.assert_array_equal(mean_defined(holes), [2, np.nan])
        np.testing.assert_array_equal(mean_defined(holes, axis=0), [1, np.nan, 3])
        assert mean_defined(holes, axis=(0, 1)) == 2.0


def test_matrices_that_are_not_finite_become_zeros_and_are_told() -> None:
    matrices = np.ones((3, 2, 2))
    matrices[0, 0, 1], matrices[2, 1, 0] = np.nan, np.inf
    clean, finite = finite_matrices(matrices)
    assert finite.tolist() == [False, True, False]
    np.testing.assert_array_equal(clean, finite[:, None, None] * np.ones((3, 2, 2)))


def test_weights_pass_nan_and_zeros_and_no_weights_at_all() -> None:
    np.testing.assert_array_equal(as_weights([0.0, np.nan, 2]), [0, np.nan, 2])
    assert as_weights(np.zeros((0, 3))).shape == (0, 3)
