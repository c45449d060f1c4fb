"""Cases of every measure whose value is known without the code, and what leaves measures that need no site alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from driftlens import metrics as m


class Form(NamedTuple):
    """One case: what it is, what the package says, and what is right."""

    text: str
    found: Callable[[], Any]
    wanted: Any


class Pair(NamedTuple):
    """The same measure before and after something that must leave it alone."""

    text: str
    values: Callable[[np.random.Generator], tuple[Any, Any]]


LEFT, RIGHT = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])  # one token, two experts
HALF, QUARTER = np.array([[0.5, 0.5]]), np.array([[0.75, 0.25]])
TWO = np.array([[1.0, 0.0], [0.0, 1.0]])  # two tokens
BOTH = np.array([0, 1])
X, Y = np.array([[1.0, 0.0, 0.0, 0.0]]), np.array([[0.0, 1.0, 0.0, 0.0]])  # one-dimensional subspaces of R^4
DIAGONAL = (X + Y) / math.sqrt(2)
PLANE = np.eye(4)[:2]
JS_HALF = 1.5 - 0.75 * math.log2(3)  # of (1, 0) and (1/2, 1/2), bits

EYE = np.eye(2)[None]  # B of one expert of rank 2
Z = np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[-1.0, 0.0]], [[0.0, -1.0]]])  # four tokens of one expert of rank 2
ONE_OF_FIVE = np.array([1.0, -1.0, 0.0, 0.0, 0.0])[:, None, None]  # five tokens of one expert of rank 1
Z_PAIR = np.ones((1, 2, 1))  # one token, two experts of rank 1 ...
B_PAIR = np.array([[[1.0], [0.0]], [[0.0], [1.0]]])  # ... with orthogonal outputs


def phi(gate0: Any, gate1: Any, B0: Any, B1: Any) -> m.CoDrift:
    """Co-drift of one token with two experts of rank 1."""
    return m.codrift(np.array(gate0), np.array(gate1), Z_PAIR, Z_PAIR, np.asarray(B0), np.asarray(B1))


def impact(gate1: Any, B1: Any) -> m.Impact:
    """Impact of the same, from gate (1, 0), with a base output of norm 2."""
    tokens = m.codrift_from_grams(LEFT, np.array(gate1), Z_PAIR, Z_PAIR, *m.expert_grams(B_PAIR, np.asarray(B1)))
    return tokens.impact(np.array([4.0]))


def origin() -> m.DriftOrigin:
    """One expert, r = d_out = 1: u = B z is 1 at the anchor, 2 with the anchor on the new input, 3 now."""
    gate, one = np.ones((1, 1)), np.ones((1, 1, 1))
    grams = m.expert_grams(np.array([[[1.0]]]), np.array([[[1.5]]]))
    return m.drift_origin((gate, one), (gate, 2 * one), (gate, 2 * one), *grams).reduce()


def responsibility(gate1: Any, norm1: Any) -> m.ResponsibilityDrift:
    """From gate (1/2, 1/2) and equal norms."""
    return m.responsibility_drift(HALF, np.array(gate1), np.ones((1, 2)), np.array(norm1))


def used(*energies: float) -> np.ndarray:
    """Second moment of a probe that uses the axes by these energies."""
    return np.diag(energies)


def spectrum(*values: float) -> np.ndarray:
    """Singular values of an update."""
    return np.array(values)


def factors(*singular: float) -> tuple[np.ndarray, np.ndarray]:
    """A and B of an update with these singular values."""
    return np.eye(4)[: len(singular)], np.eye(5)[:, : len(singular)] * np.array(singular)


def change() -> m.UpdateChange:
    """An update whose one singular value goes from 2 to 5 along the same directions."""
    return m.update_change(*factors(2.0), *factors(5.0))


#         task 1 2    3
SCORES = [[0.1, 0.2, 0.3], [0.9, 0.25, 0.3], [0.6, 0.8, 0.45], [0.5, 0.85, 0.7]]
LENIENT = [[0.1, 0.2, 0.3], [0.9, 0.25, 0.3], [0.8, 0.8, 0.45], [0.8, 0.85, 0.7]]
SWAPS = (0.9, 0.6, 0.5, 0.1)  # S_aa, S_ca, S_ac, S_cc
PROFILE = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # of two experts over four units

CLOSED_FORMS: dict[str, tuple[Form, ...]] = {
    "js_divergence": (
        Form("disjoint rows: 1", lambda: m.js_divergence(LEFT, RIGHT), [1.0]),
        Form("one-hot against even: 3/2 - 3/4 log2 3", lambda: m.js_divergence(LEFT, HALF), [JS_HALF]),
    ),
    "router_js": (
        Form("same gates: 0", lambda: m.router_js(QUARTER, QUARTER), 0.0),
        Form("one of two tokens switches: 1/2", lambda: m.router_js(TWO, np.vstack([LEFT, LEFT])), 0.5),
    ),
    "router_js_distance": (
        Form("one-hot against even: the root", lambda: m.router_js_distance(LEFT, HALF), math.sqrt(JS_HALF)),
    ),
    "marginal_js": (
        Form("two tokens exchange experts: 0", lambda: m.marginal_js(TWO, TWO[::-1]), 0.0),
        Form("all mass moves: 1", lambda: m.marginal_js(LEFT, RIGHT), 1.0),
    ),
    "sample_js": (
        Form("all mass moves: ln 2 nats", lambda: m.sample_js(LEFT, RIGHT, np.array([0])), math.log(2)),
        Form("exchange within a sample: 0", lambda: m.sample_js(TWO, TWO[::-1], np.array([0, 0])), 0.0),
        Form("exchange between samples: ln 2", lambda: m.sample_js(TWO, TWO[::-1], BOTH), math.log(2)),
    ),
    "mass_moved": (Form("(3/4, 1/4) to (1/2, 1/2): 1/4", lambda: m.mass_moved(QUARTER, HALF), 0.25),),
    "top1_switch": (
        Form("one of two tokens, chance 1 - p q", lambda: m.top1_switch(TWO, np.vstack([LEFT] * 2)), (0.5, 0.5, 0.0)),
    ),
    "topk_overlap": (
        Form("{1,2} against {2,3}, k = 2 of 3: 1/2 by chance 2/3",
             lambda: m.topk_overlap([[0.5, 0.4, 0.1]], [[0.1, 0.5, 0.4]], 2), (0.5, 2 / 3)),
    ),
    "relative_js": (
        Form("two opposite tokens exchange gates: 1", lambda: m.relative_js(TWO, TWO[::-1]).value, 1.0),
        Form("all tokens alike: undefined", lambda: m.relative_js(np.vstack([HALF] * 3), TWO[[0, 0, 1]]).value, np.nan),
    ),
    "gate_entropy": (
        Form("one-hot tokens: 0", lambda: m.gate_entropy(TWO), 0.0),
        Form("even: 1", lambda: m.gate_entropy(HALF), 1.0),
    ),
    "load_entropy": (
        Form("one-hot tokens in balance: 1", lambda: m.load_entropy(TWO), 1.0),
        Form("one expert does all: 0", lambda: m.load_entropy(LEFT), 0.0),
    ),
    "load": (Form("unnormalised rows count alike", lambda: m.load(np.array([[2.0, 0.0], [0.5, 0.5]])), [0.75, 0.25]),),
    "near_uniform": (Form("above 0.99 only", lambda: m.near_uniform(np.array([0.99, 0.991])), [False, True]),),
    "specialisation": (
        Form("one expert per task: 1", lambda: m.specialisation(TWO, np.full(2, 1e9)).value, 1.0),
        Form("same loads: 0", lambda: m.specialisation(np.vstack([HALF, HALF]), np.full(2, 9)).value, 0.0),
    ),
    "coactivation": (
        Form("3 experts, pairs {1,2} and {1,3} equally often",
             lambda: m.coactivation(np.array([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]), 2),
             [[1, 0.5, 0.5], [1, 1, 0], [1, 0, 1]]),
    ),
    "dead_experts": (
        Form("loads .52, .44, .04 of 3: below 1/30 is none, .95 .04 .01: one",
             lambda: m.dead_experts(np.array([[[0.52, 0.44, 0.04]], [[0.95, 0.04, 0.01]]])), [0, 1]),
    ),
    "subspace_overlap": (
        Form("line against its diagonal: 1/2", lambda: m.subspace_overlap(X, DIAGONAL), 0.5),
        Form("line in the plane: 1", lambda: m.subspace_overlap(X, PLANE), 1.0),
        Form("orthogonal: 0", lambda: m.subspace_overlap(X, Y), 0.0),
    ),
    "subspace_overlap_adjusted": (
        Form("1/2 by chance 1/4: 1/3", lambda: m.subspace_overlap_adjusted(X, DIAGONAL), 1 / 3),
        Form("orthogonal: -1/3", lambda: m.subspace_overlap_adjusted(X, Y), -1 / 3),
    ),
    "principal_angles": (
        Form("planes sharing a line, else 45 degrees",
             lambda: m.principal_angles(np.eye(4)[[0, 2]], np.vstack([np.eye(4)[2], DIAGONAL])), [0, math.pi / 4]),
    ),
    "largest_angle": (
        Form("the last one: 45 degrees",
             lambda: m.principal_angles(np.eye(4)[[0, 2]], np.vstack([np.eye(4)[2], DIAGONAL]))[-1], math.pi / 4),
    ),
    "grassmann_distance": (
        Form("angles 0 and 45 degrees: root mean square",
             lambda: m.grassmann_distance(np.eye(4)[[0, 2]], np.vstack([np.eye(4)[2], DIAGONAL])),
             math.pi / 4 / math.sqrt(2)),
    ),
    "active_overlap": (
        Form("energy 3 : 1 on a kept and a lost axis: 3/4",
             lambda: m.active_overlap(PLANE, np.eye(4)[[0, 2]], used(3, 1)), 0.75),
        Form("a probe that uses the lost axis only: 0",
             lambda: m.active_overlap(PLANE, np.eye(4)[[0, 2]], used(0, 1)), 0.0),
    ),
    "active_rank": (
        Form("two axes alike: 2", lambda: m.active_rank(PLANE, used(1, 1)), 2.0),
        Form("one axis: 1", lambda: m.active_rank(PLANE, used(5, 0)), 1.0),
    ),
    "output_overlap": (Form("line against its diagonal: 1/2", lambda: m.output_overlap(X.T, DIAGONAL.T), 0.5),),
    "output_overlap_adjusted": (
        Form("1/2 by chance 1/4: 1/3", lambda: m.pair_from_factors(X, DIAGONAL).adjusted(), 1 / 3),
    ),
    "rank_importance": (
        Form("mean of gate times square: (1 * 4 + 1/2 * 16)/2",
             lambda: m.rank_importance(np.array([[1.0], [0.5]]), np.array([[[2.0]], [[4.0]]])), [[6.0]]),
    ),
    "importance_concentration": (
        Form("equal: 0.4", lambda: m.importance_concentration(np.ones((2, 5))).top_share, 0.4),
        Form("all in one pathway: 1", lambda: m.importance_concentration(np.eye(5)[:1]).top_share, 1.0),
    ),
    "importance_gini": (
        Form("equal: 0", lambda: m.importance_concentration(np.ones((2, 5))).gini, 0.0),
        Form("all in one of 5: 4/5", lambda: m.importance_concentration(np.eye(5)[:1]).gini, 0.8),
    ),
    "rank_update": (Form("(3, 4) to (3, 0): 4/5", lambda: m.rank_update([[3.0, 4.0]], [[3.0, 0.0]]), [0.8]),),
    "rank_update_a": (Form("a row doubled: 1", lambda: m.rank_update([[3.0, 4.0]], [[6.0, 8.0]]), [1.0]),),
    "rank_update_b": (
        Form("a column reversed: 2", lambda: m.rank_update([[3.0], [4.0]], [[-3.0], [-4.0]], axis=-2), [2.0]),
    ),
    "rank_update_a_correlation": (Form("same order: 1", lambda: m.spearman([1.0, 2, 9], [0.1, 0.2, 0.3]), 1.0),),
    "rank_update_b_correlation": (Form("reversed: -1", lambda: m.spearman([1.0, 2, 9], [0.3, 0.2, 0.1]), -1.0),),
    "expert_drift": (
        Form("outputs times c: abs(c - 1)", lambda: m.expert_drift(np.array([4.0]), np.array([1.0])).value, [2.0]),
        Form("no output at the anchor: undefined", lambda: m.expert_drift(np.ones(1), np.zeros(1)).value, [np.nan]),
    ),
    "cka": (
        Form("same outputs: 1", lambda: m.cka(Z, Z, EYE, EYE), [1.0]),
        # centred Grams with -1 at {1,2} and at {3,4}: HSIC 2 * 2 / (4 * 3) against 4 - 5/3 * 2 + 2 * 2 / (4 * 3)
        Form("5 tokens, outputs 1, -1 on two of them and on two others: 1/3",
             lambda: m.cka(ONE_OF_FIVE, ONE_OF_FIVE[[2, 3, 0, 1, 4]], np.ones((1, 1, 1)), np.ones((1, 1, 1))), [1 / 3]),
    ),
    "biased_cka": (
        Form("same outputs: 1", lambda: m.biased_cka(Z, Z, EYE, EYE), [1.0]),
        Form("orthogonal one-dimensional outputs: 0",
             lambda: m.biased_cka(Z[..., :1], Z[..., 1:], np.ones((1, 1, 1)), np.ones((1, 1, 1))), [0.0]),
        Form("two axes against one of them: 1/sqrt 2",
             lambda: m.biased_cka(Z, Z[..., :1], EYE, np.array([[[1.0], [0.0]]])), [1 / math.sqrt(2)]),
    ),
    "codrift_divergence": (
        Form("reversed: 1", lambda: phi(LEFT, LEFT, B_PAIR, -B_PAIR).total, 1.0),
        Form("orthogonal outputs of equal size: 1/2", lambda: phi(LEFT, RIGHT, B_PAIR, B_PAIR).total, 0.5),
    ),
    "codrift_router": (
        Form("only the gate moved: all of it", lambda: phi(LEFT, RIGHT, B_PAIR, B_PAIR).router, 0.5),
        Form("only the experts moved: 0", lambda: phi(LEFT, LEFT, B_PAIR, 2 * B_PAIR).router, 0.0),
    ),
    "codrift_experts": (
        Form("doubled: 1/(2 (1 + 4))", lambda: phi(LEFT, LEFT, B_PAIR, 2 * B_PAIR).experts, 0.1),
        Form("only the gate moved: 0", lambda: phi(LEFT, RIGHT, B_PAIR, B_PAIR).experts, 0.0),
    ),
    "codrift_cross": (
        # u: 1 -> 3/2 * 2 = 3 with R = 1/2 * 3/2 = 3/4, E = 5/4, n = 2 (1 + 9)
        Form("gate 1 to 3/2, output 1 to 2: R E / n = 3/4 5/4 / 20",
             lambda: m.codrift([[1.0]], [[1.5]], *[np.ones((1, 1, 1))] * 2, [[[1.0]]], [[[2.0]]]).cross, 15 / 320),
    ),
    "coupling": (
        Form("both push alike: 1",
             lambda: m.codrift([[1.0]], [[1.5]], *[np.ones((1, 1, 1))] * 2, [[[1.0]]], [[[2.0]]]).coupling, 1.0),
        Form("one repairs the other: -1",
             lambda: m.codrift([[1.0]], [[0.5]], *[np.ones((1, 1, 1))] * 2, [[[1.0]]], [[[2.0]]]).coupling, -1.0),
        Form("only the gate moved: undefined", lambda: phi(LEFT, RIGHT, B_PAIR, B_PAIR).coupling, np.nan),
    ),
    "codrift_share": (
        Form("R = 3/4, E = 5/4: 2 R E / (R + E)^2 = 15/32",
             lambda: m.codrift([[1.0]], [[1.5]], *[np.ones((1, 1, 1))] * 2, [[[1.0]]], [[[2.0]]]).share, 15 / 32),
    ),
    "codrift_inherited": (Form("u 1 -> 2 -> 3: 1 / (2 (1 + 9))", lambda: origin().inherited, 0.05),),
    "codrift_local": (Form("u 1 -> 2 -> 3: 1 / 20", lambda: origin().local, 0.05),),
    "codrift_origin_cross": (
        Form("u 1 -> 2 -> 3: 1 / 20, and all parts make 4 / 20",
             lambda: (origin().cross, origin().inherited + origin().local + 2 * origin().cross), (0.05, 0.2)),
    ),
    "impact": (Form("change of norm sqrt 2 over a base of norm 2: 1/2", lambda: impact(RIGHT, B_PAIR).total, 0.5),),
    "impact_router": (Form("only the gate moved: all of it", lambda: impact(RIGHT, B_PAIR).router, 0.5),),
    "impact_experts": (Form("output doubled: 1/4", lambda: impact(LEFT, 2 * B_PAIR).experts, 0.25),),
    "impact_cross": (
        # R = 3/2 (e2 - e1), E = 1/2 (e1 + e2)
        Form("gate turned by 90 degrees, experts doubled: 0", lambda: impact(RIGHT, 2 * B_PAIR).cross, 0.0),
        Form("gate and experts doubled: 3/2 3/2 / 4", lambda: impact(2 * LEFT, 2 * B_PAIR).cross, 9 / 16),
    ),
    "responsibility": (
        Form("even gate, outputs 3 : 1", lambda: m.responsibility(HALF, np.array([[3.0, 1.0]])), [[0.75, 0.25]]),
    ),
    "responsibility_divergence": (
        Form("hand-over: 1", lambda: m.responsibility_drift(LEFT, RIGHT, HALF, HALF).total, 1.0),
    ),
    "responsibility_router": (
        Form("only the gate moved: all", lambda: responsibility(LEFT, HALF).phi_router, JS_HALF),
    ),
    "responsibility_experts": (
        Form("only the norms moved: all", lambda: responsibility(HALF, LEFT).phi_experts, JS_HALF),
    ),
    "responsibility_router_alone": (
        Form("only the gate moved: D", lambda: responsibility(LEFT, HALF).router, JS_HALF),
    ),
    "responsibility_experts_alone": (
        Form("only the gate moved: 0", lambda: responsibility(LEFT, HALF).experts, 0.0),
        Form("only the norms moved: D", lambda: responsibility(HALF, LEFT).experts, JS_HALF),
    ),
    "responsibility_synergy": (
        Form("gate (3, 1)/4 undone by norms 1 : 3: -2 D_R",
             lambda: responsibility(QUARTER, [[1.0, 3.0]]).synergy, -2 * float(m.js_divergence(HALF, QUARTER)[0])),
    ),
    "retained": (
        Form("even to one-hot: 1/2", lambda: responsibility(LEFT, HALF).retained, 0.5),
        Form("nothing moved: 1", lambda: responsibility(HALF, HALF).retained, 1.0),
    ),
    "alignment": (
        Form("gate proportional to the outputs: 1", lambda: m.alignment(QUARTER, np.array([[3.0, 1.0]])), 1.0),
        Form("gate on the silent expert: 0", lambda: m.alignment(LEFT, RIGHT), 0.0),
    ),
    "alignment_energy": (
        Form("gate (4, 1)/5 for pathways 2 and 1: 1",
             lambda: m.alignment_energy(np.array([[0.8, 0.2]]), np.array([[[2.0], [1.0]]])), 1.0),
    ),
    "alignment_loss": (
        Form("from aligned to opposite: 1", lambda: m.alignment(LEFT, LEFT) - m.alignment(RIGHT, LEFT), 1.0),
    ),
    "update_norm": (
        Form("singular values 3 and 4, scaling 2: 10", lambda: m.update_norm(*factors(3.0, 4.0), 2.0), 10.0),
    ),
    "update_norm_anchor": (Form("B = 0: 0", lambda: m.update_norm(*factors(0.0)), 0.0),),
    "update_difference": (Form("2 to 5: 3", lambda: change().difference, 3.0),),
    "update_change": (Form("2 to 5: 3/2", lambda: change().relative, 1.5),),
    "update_cosine": (
        Form("same direction: 1", lambda: change().cosine, 1.0),
        Form("(2, 0) against (3, 4): 3/5",
             lambda: m.update_change(*factors(2.0, 0.0), *factors(3.0, 4.0)).cosine, 0.6),
    ),
    "update_rank": (Form("one of three at 1e-7: 2", lambda: m.numerical_rank(spectrum(1.0, 0.5, 1e-7)), 2),),
    "effective_rank": (
        Form("three alike: 3", lambda: m.effective_rank(spectrum(2.0, 2.0, 2.0)), 3.0),
        Form("one: 1", lambda: m.effective_rank(spectrum(2.0, 0.0)), 1.0),
    ),
    "silent_experts": (Form("norms 0, 1, 0: 2", lambda: m.silent_experts(np.array([0.0, 1.0, 0.0])), 2),),
    "router_row_cosine": (
        Form("a row turned by 45 degrees", lambda: m.row_drift([[1.0, 0]], [[1.0, 1]]).cosine, [math.sqrt(0.5)]),
    ),
    "router_row_change": (Form("(1, 0) to (1, 1): 1", lambda: m.row_drift([[1.0, 0]], [[1.0, 1]]).relative, [1.0]),),
    "router_cosine": (Form("doubled: 1", lambda: m.row_drift([1.0, 2, 3], [2.0, 4, 6]).cosine, 1.0),),
    "router_change": (Form("doubled: 1", lambda: m.row_drift([1.0, 2, 3], [2.0, 4, 6]).relative, 1.0),),
    "router_change_centred": (
        Form("rows (1, -1) plus a constant, centred: 0",
             lambda: m.row_drift(*(np.array(r) - np.mean(r) for r in ([1.0, -1.0], [4.0, 2.0]))).relative, 0.0),
    ),
    "magnitude_change": (Form("(3, 4) to (3, 0): 4/5", lambda: m.row_drift([3.0, 4], [3.0, 0]).relative, 0.8),),
    "AP": (Form("last row", lambda: m.stream_scores(SCORES)["AP"], 2.05 / 3),),
    "MAA": (Form("means of rows so far", lambda: m.stream_scores(SCORES)["MAA"], (0.9 + 0.7 + 2.05 / 3) / 3),),
    "MFT": (Form("diagonal", lambda: m.stream_scores(SCORES)["MFT"], 0.8),),
    "BWT_T": (Form("(-.4 + .05 + 0)/3", lambda: m.stream_scores(SCORES)["BWT_T"], -0.35 / 3),),
    "BWT_T-1": (Form("(-.4 + .05)/2", lambda: m.stream_scores(SCORES)["BWT_T-1"], -0.35 / 2),),
    "forgetting_max": (Form("(.9 - .5 + .8 - .85)/2", lambda: m.stream_scores(SCORES)["forgetting_max"], 0.35 / 2),),
    "FWT": (Form("(.25 - .2 + .45 - .3)/2", lambda: m.stream_scores(SCORES)["FWT"], 0.1),),
    "format_share": (
        Form("strict loses .35, lenient .05: 6/7", lambda: m.format_share(SCORES, LENIENT).overall, 0.3 / 0.35),
    ),
    **{
        name: (Form("the matrix of the scores above", lambda name=name: m.foreign_scores(SCORES)[name], value),)
        for name, value in {
            "avalanche StreamForgetting": 0.175, "avalanche StreamBWT": -0.175, "avalanche StreamForwardTransfer": 0.1,
            "mammoth backward_transfer": -0.175, "mammoth forward_transfer": 0.1, "mammoth forgetting": 0.2,
            "Chaudhry forgetting": 0.175,
        }.items()
    },
    "swap_forgetting": (Form(".9 to .1: the parts make .8",
                             lambda: sum(m.forgetting_attribution(*SWAPS)[:2]), 0.8),),
    "phi_router": (Form("1/2 [(.9 - .6) + (.5 - .1)]", lambda: m.forgetting_attribution(*SWAPS).phi_router, 0.35),),
    "phi_experts": (Form("1/2 [(.9 - .5) + (.6 - .1)]", lambda: m.forgetting_attribution(*SWAPS).phi_experts, 0.45),),
    "interaction": (Form(".9 - .6 - .5 + .1", lambda: m.forgetting_attribution(*SWAPS).interaction, -0.1),),
    "depth_shapley": (
        Form("an additive score: each player's own gain",
             lambda: m.permutation_shapley(np.array([[0, 1, 2], [2, 1, 0]]), np.array([[0.0, 1, 3, 7], [0, 4, 6, 7]])),
             ([1, 2, 4], [np.nan] * 3)),
    ),
    "p_value": (
        Form("2 of 4 draws at or below: 3/5", lambda: m.null_test(2.0, [1.0, 2, 3, 4]).p_value, 0.6),
    ),
    "percentile": (Form("1 below, 1 tie of 4: 3/8", lambda: m.null_test(2.0, [1.0, 2, 3, 4]).percentile, 0.375),),
    "random_overlap": (
        Form("lines in the plane: mean 1/2, spread of cos^2 of a uniform angle: sqrt 1/8",
             lambda: m.random_overlap(1, 1, 2), (0.5, math.sqrt(1 / 8))),
    ),
    "profile_similarity": (
        Form("same and opposite profiles", lambda: m.profile_similarity(PROFILE, PROFILE), [[1, -1], [-1, 1]]),
    ),
    "matching": (
        Form("exchanged experts find each other",
             lambda: m.best_matching(m.profile_similarity(PROFILE, PROFILE[:, ::-1])).partner, [1, 0]),
    ),
}  # fmt: skip
"""Measure -> its cases."""


def _scores(change: Callable[[np.ndarray], np.ndarray], names: tuple[str, ...], foreign: bool) -> Callable[..., Any]:
    function = m.foreign_scores if foreign else m.stream_scores

    def values(rng: np.random.Generator) -> tuple[Any, Any]:
        matrix = rng.random((5, 4))
        return tuple([function(each)[name] for name in names] for each in (matrix, change(matrix)))

    return values


def _stream_pairs() -> dict[str, tuple[Pair, ...]]:
    differences = ("BWT_T", "BWT_T-1", "forgetting_max", "FWT")
    foreign = tuple(name for name in m.FOREIGN_SCORES if name != "mammoth forgetting")
    result: dict[str, tuple[Pair, ...]] = {}
    for name in (*differences, *foreign):
        result[name] = (Pair("a constant added to all scores", _scores(lambda a: a + 0.5, (name,), name in foreign)),)
    last = {"AP": 4, "mammoth forgetting": None}
    for name, row in last.items():

        def unseen(matrix: np.ndarray, row: int | None = row) -> np.ndarray:
            changed = matrix.copy()
            if row is None:
                changed[np.triu_indices(4)] = 0.77  # scores of tasks not yet seen, before the first task included
            else:
                changed[:row] = 0.77
            return changed

        text = "other scores before the last row" if row else "other scores of tasks not yet learned"
        result[name] = (Pair(text, _scores(unseen, (name,), row is None)),)

    def ahead(matrix: np.ndarray) -> np.ndarray:
        changed = matrix.copy()
        changed[np.triu_indices(4)] = 0.77
        return changed

    for name in ("MAA", "MFT"):
        result[name] = (Pair("other scores of tasks not yet learned", _scores(ahead, (name,), False)),)

    def share(rng: np.random.Generator) -> tuple[Any, Any]:
        strict, lenient = rng.random((2, 5, 4))
        return m.format_share(strict, lenient).overall, m.format_share(3 * strict + 1, 3 * lenient + 1).overall

    result["format_share"] = (Pair("another unit and zero of the scores", share),)
    return result


def _attribution_pairs() -> dict[str, tuple[Pair, ...]]:
    def shifted(field: Callable[[m.ForgettingAttribution], Any]) -> Callable[..., Any]:
        def values(rng: np.random.Generator) -> tuple[Any, Any]:
            scores = rng.random(4)
            return field(m.forgetting_attribution(*scores)), field(m.forgetting_attribution(*(scores + 2)))

        return values

    def exchanged(rng: np.random.Generator) -> tuple[Any, Any]:
        aa, ca, ac, cc = rng.random(4)
        return m.forgetting_attribution(aa, ca, ac, cc)[:2], m.forgetting_attribution(aa, ac, ca, cc)[1::-1]

    def orders(rng: np.random.Generator) -> tuple[Any, Any]:
        drawn = m.player_orders(4, 6, seed=int(rng.integers(99)))
        scores = rng.random((6, 5))
        swapped = np.r_[2:6, 0:2]
        first, second = (m.permutation_shapley(drawn[rows], scores[rows]).value for rows in (np.arange(6), swapped))
        return first, second

    text = "a constant added to all scores"
    roles = Pair("router and experts exchange roles and values", exchanged)
    return {
        "phi_router": (Pair(text, shifted(lambda parts: parts.phi_router)), roles),
        "phi_experts": (Pair(text, shifted(lambda parts: parts.phi_experts)), roles),
        "interaction": (Pair(text, shifted(lambda parts: parts.interaction)),),
        "swap_forgetting": (Pair(text, shifted(lambda parts: parts.phi_router + parts.phi_experts)),),
        "depth_shapley": (Pair("pairs of orders in another order", orders),),
    }


def _null_pairs() -> dict[str, tuple[Pair, ...]]:
    def placed(field: str) -> Callable[..., Any]:
        def values(rng: np.random.Generator) -> tuple[Any, Any]:
            observed, draws = rng.normal(size=3), rng.normal(size=(20, 3))
            first, second = m.null_test(observed, draws), m.null_test(np.exp(observed), np.exp(rng.permutation(draws)))
            return getattr(first, field), getattr(second, field)

        return values

    def ranks(rng: np.random.Generator) -> tuple[Any, Any]:
        r0, r1 = (int(value) for value in rng.integers(1, 5, size=2))
        return np.stack(m.random_overlap(r0, r1, 9)), np.stack(m.random_overlap(r1, r0, 9))

    def profiles(rng: np.random.Generator) -> tuple[Any, Any]:
        first, second = rng.random((2, 12, 3))
        order = rng.permutation(12)
        return m.profile_similarity(first, second), m.profile_similarity(2 * first[order] + 1, second[order])

    def matched(rng: np.random.Generator) -> tuple[Any, Any]:
        similarity, order = rng.random((4, 4)), rng.permutation(4)
        return m.best_matching(similarity).total, m.best_matching(similarity[:, order]).total

    monotone = "any increasing function of value and draws, draws in another order"
    return {
        "p_value": (Pair(monotone, placed("p_value")),),
        "percentile": (Pair(monotone, placed("percentile")),),
        "random_overlap": (Pair("ranks exchanged", ranks),),
        "profile_similarity": (Pair("units in another order, one run's shares in another unit", profiles),),
        "matching": (Pair("experts of one run renumbered", matched),),
    }


OTHER_INVARIANCES: dict[str, tuple[Pair, ...]] = {**_stream_pairs(), **_attribution_pairs(), **_null_pairs()}
"""Measures that are not of a site -> what leaves them alone."""
