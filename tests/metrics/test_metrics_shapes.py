"""Signatures tell the truth: arguments and results of every public function fit their annotated shapes."""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from jaxtyping import jaxtyped

from driftlens import metrics as m

SITES, TOKENS, EXPERTS, RANK, DIM, OUT = 2, 6, 3, 4, 9, 7


def _arguments() -> dict[str, Any]:
    """One value for every parameter name that the package uses; unequal sizes on every axis that may differ."""
    generator = np.random.default_rng(0)
    grown, wider = EXPERTS + 2, RANK + 1

    def gates(experts: int) -> np.ndarray:
        return generator.dirichlet(np.ones(experts), size=(SITES, TOKENS)).astype(np.float16)

    B0, B1 = generator.normal(size=(SITES, EXPERTS, OUT, RANK)), generator.normal(size=(SITES, grown, OUT, wider))
    G00, G01, G11 = m.expert_grams(B0, B1)
    A0, A1 = generator.normal(size=(SITES, RANK, DIM)), generator.normal(size=(SITES, wider, DIM))
    return {
        "gate": gates(EXPERTS), "gate0": gates(EXPERTS), "gate1": gates(grown), "norm": gates(EXPERTS),
        "norm0": gates(EXPERTS), "norm1": gates(grown), "sample": np.array([0, 0, 1, 1, 2, 2]), "k": 2,
        "experts": EXPERTS, "players": 3, "permutations": 4, "orders": m.player_orders(3, 4),
        "scores": generator.normal(size=(SITES, 4, 4)),
        "z": generator.normal(size=(SITES, TOKENS, EXPERTS, RANK)).astype(np.float16),
        "z0": generator.normal(size=(SITES, TOKENS, EXPERTS, RANK)),
        "z1": generator.normal(size=(SITES, TOKENS, grown, wider)),
        "B0": B0, "B1": B1, "G00": G00, "G01": G01, "G11": G11, "A": A0, "A0": A0, "A1": A1, "dim": DIM,
        "gram00": A0 @ A0.swapaxes(-1, -2), "gram01": A0 @ A1.swapaxes(-1, -2), "gram11": A1 @ A1.swapaxes(-1, -2),
        "gram": A0 @ A0.swapaxes(-1, -2), "moment": A0 @ A0.swapaxes(-1, -2), "entropy": np.full(SITES, 0.5),
        "loads": generator.dirichlet(np.ones(EXPERTS), size=(SITES, 5)), "counts": np.full(5, 30),
        "importance": generator.random((SITES, EXPERTS, RANK)), "x": generator.random((SITES, 8)),
        "y": generator.random((SITES, 8)), "matrix": generator.random((4, 3)), "strict": generator.random((4, 3)),
        "lenient": generator.random((4, 3)), "basis0": m.orthonormal_rows(A0), "basis1": m.orthonormal_rows(A1),
        "B": generator.normal(size=(SITES, OUT, RANK)), "spectrum": generator.random((SITES, RANK)),
        "drift_sq": generator.random((SITES, EXPERTS)), "anchor_sq": generator.random((SITES, EXPERTS)),
        "profile0": gates(EXPERTS), "profile1": gates(grown), "pairings": np.tile(np.arange(TOKENS), (2, 1)),
        "probe": np.array([0, 0, 0, 0, 1, 1]), "similarity": generator.random((SITES, EXPERTS, grown)),
        "basis_a": m.orthonormal_rows(A0), "basis_b": m.orthonormal_rows(B0[:, 0].swapaxes(-1, -2)),
    }  # fmt: skip


ARGUMENTS = _arguments()
_PLAIN = {"A": ARGUMENTS["A0"], "B": ARGUMENTS["B"]}
SPECIAL = {
    "output_overlap": {"B0": ARGUMENTS["A0"].swapaxes(-1, -2), "B1": ARGUMENTS["A1"].swapaxes(-1, -2)},
    "rank_update_from_grams": dict.fromkeys(("gram00", "gram01", "gram11"), ARGUMENTS["gram00"]),
    "expert_blocks": {"gram": ARGUMENTS["G01"][:, :, :9]},
    "cka_from_grams": {
        "G00": m.expert_blocks(ARGUMENTS["G00"], EXPERTS),
        "G11": m.expert_blocks(ARGUMENTS["G11"], EXPERTS + 2),
    },
    "biased_cka_from_grams": {
        "G00": m.expert_blocks(ARGUMENTS["G00"], EXPERTS),
        "G11": m.expert_blocks(ARGUMENTS["G11"], EXPERTS + 2),
    },
    "update_change": {"A1": _PLAIN["A"] + 1, "B0": _PLAIN["B"], "B1": _PLAIN["B"] + 1},
    "update_spectrum": {"B": ARGUMENTS["B0"][:, 0]},
    "expert_drift_tokens": {"z0": ARGUMENTS["z1"] + 1, **dict.fromkeys(("G00", "G01", "G11"), ARGUMENTS["G11"])},
}
FREE_FORM = {  # broadcast or take any axis: their tests state the shapes
    "js_divergence", "normalised_entropy", "rank_update", "sample_means", "probe_mean", "resampled_means",
    "bootstrap", "bootstrap_mean", "bootstrap_ratio", "bootstrap_weights", "percentile_interval", "exceeds_noise",
    "coactivation_chance", "drift_origin", "row_drift", "forgetting_attribution", "bootstrap_attribution",
    "null_test", "permuted_experts", "permuted_tokens", "random_overlap", "random_overlap_null",
}  # fmt: skip
FUNCTIONS = sorted(name for name in m.__all__ if inspect.isfunction(getattr(m, name)) and name not in FREE_FORM)


def fits(value: Any, hint: Any) -> bool:
    if hasattr(hint, "dims"):
        return isinstance(value, hint)
    if typing.get_origin(hint) is tuple:
        return all(fits(part, inner) for part, inner in zip(value, typing.get_args(hint), strict=True))
    options = [option for option in typing.get_args(hint) if hasattr(option, "dims")]
    if options:
        return value is None or any(isinstance(value, option) for option in options)
    if inspect.isclass(hint) and typing.get_type_hints(hint):  # result types: every annotated field
        return all(fits(getattr(value, name), inner) for name, inner in typing.get_type_hints(hint).items())
    return True


def call(function: Callable[..., Any], changes: dict[str, Any]) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    required = [
        name for name, p in inspect.signature(function).parameters.items()
        if p.default is inspect.Parameter.empty or name == "sample"
    ]  # fmt: skip
    arguments = {name: changes.get(name, ARGUMENTS[name]) for name in required}
    return arguments, function(**arguments), typing.get_type_hints(function)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_and_results_have_the_annotated_shapes(name: str) -> None:
    arguments, result, hints = call(getattr(m, name), SPECIAL.get(name, {}))
    assert "return" in hints
    assert any(hasattr(hint, "dims") for hint in hints.values()) or "basis0" in hints
    with jaxtyped("context"):
        for argument, value in arguments.items():
            if not isinstance(value, m.Basis):  # two bases share the names of one type, not their ranks
                assert fits(value, hints[argument]), argument
        assert fits(result, hints["return"])


def test_the_check_itself_can_fail() -> None:
    hints = typing.get_type_hints(m.codrift)
    with jaxtyped("context"):
        assert fits(ARGUMENTS["gate0"], hints["gate0"])
        assert not fits(ARGUMENTS["gate1"][:, :5], hints["gate1"])  # another number of tokens
        assert not fits(ARGUMENTS["z0"][..., :2, :], hints["z0"])  # another number of experts
        assert not fits(ARGUMENTS["gate0"].astype(int), hints["gate0"])
