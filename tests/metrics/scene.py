"""One site at two checkpoints, everything that is measured on it, and what must and must not change the numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from driftlens import metrics as m

EXPERTS, RANK, D_IN, D_OUT, PROBES, TOP_K = 3, 2, 7, 6, 2, 2


@dataclass(frozen=True)
class Scene:
    """Arrays of one site; 0 is the anchor, 1 the current checkpoint, ``_ref`` the anchor on the current inputs."""

    sample: np.ndarray  # [n]
    probe: np.ndarray  # [n] in 0..PROBES-1: which task's tokens
    base: np.ndarray  # [n] norm of the base module's output
    gate0: np.ndarray  # [n, E]
    gate1: np.ndarray
    gate_ref: np.ndarray
    z0: np.ndarray  # [n, E, r]
    z1: np.ndarray
    z_ref: np.ndarray
    z_now: np.ndarray  # the current pathways on the current inputs: z1, in the gauge of the current checkpoint
    A0: np.ndarray  # [E, r, d_in]
    A1: np.ndarray
    B0: np.ndarray  # [E, d_out, r]
    B1: np.ndarray
    router0: np.ndarray  # [E, d_in]
    router1: np.ndarray
    magnitude0: np.ndarray  # [d_out]
    magnitude1: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.sample)


def random_scene(seed: int, tokens: int = 24) -> Scene:
    """A trained site that moved: inputs, gates, factors and router all changed by about a third."""
    rng = np.random.default_rng(seed)

    def near(value: np.ndarray, share: float = 0.4) -> np.ndarray:
        return value + share * np.abs(value).mean() * rng.normal(size=value.shape)

    h0 = rng.normal(size=(tokens, D_IN))
    h1 = near(h0)
    A0, B0 = rng.normal(size=(EXPERTS, RANK, D_IN)), rng.normal(size=(EXPERTS, D_OUT, RANK))
    router0 = rng.normal(size=(EXPERTS, D_IN))
    A1, B1, router1 = near(A0), near(B0), near(router0)

    def gate(router: np.ndarray, h: np.ndarray) -> np.ndarray:
        logits = h @ router.T
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    def paths(A: np.ndarray, h: np.ndarray) -> np.ndarray:
        return np.einsum("erd,nd->ner", A, h)

    magnitude = rng.random(D_OUT) + 0.5
    sample = np.sort(rng.integers(0, 5, size=tokens))
    return Scene(
        sample=sample,
        probe=(np.arange(tokens) % PROBES),
        base=rng.random(tokens) + 0.5,
        gate0=gate(router0, h0),
        gate1=gate(router1, h1),
        gate_ref=gate(router0, h1),
        z0=paths(A0, h0),
        z1=paths(A1, h1),
        z_ref=paths(A0, h1),
        z_now=paths(A1, h1),
        A0=A0,
        A1=A1,
        B0=B0,
        B1=B1,
        router0=router0,
        router1=router1,
        magnitude0=magnitude,
        magnitude1=near(magnitude),
    )


# --- transformations -----------------------------------------------------------------------------------------------

_BY_TOKEN = ("sample", "probe", "base", "gate0", "gate1", "gate_ref", "z0", "z1", "z_ref", "z_now")
_BY_EXPERT = {"gate0": 1, "gate1": 1, "gate_ref": 1, "z0": 1, "z1": 1, "z_ref": 1, "z_now": 1, "A0": 0, "A1": 0,
              "B0": 0, "B1": 0, "router0": 0, "router1": 0}  # fmt: skip


def _gauge(scene: Scene, rng: np.random.Generator) -> Scene:
    def turned(A: np.ndarray, B: np.ndarray, *paths: np.ndarray) -> tuple[np.ndarray, ...]:
        G = np.eye(RANK) + 0.4 * rng.normal(size=(EXPERTS, RANK, RANK))
        G += np.eye(RANK) * (np.abs(np.linalg.det(G)) < 0.2)[:, None, None]
        return G @ A, B @ np.linalg.inv(G), *(np.einsum("ekl,nel->nek", G, z) for z in paths)

    A0, B0, z0, z_ref = turned(scene.A0, scene.B0, scene.z0, scene.z_ref)
    A1, B1, z1, z_now = turned(scene.A1, scene.B1, scene.z1, scene.z_now)
    return replace(scene, A0=A0, B0=B0, z0=z0, z_ref=z_ref, A1=A1, B1=B1, z1=z1, z_now=z_now)


def _relabel(scene: Scene, rng: np.random.Generator) -> Scene:
    order = np.roll(np.arange(EXPERTS), 1 + int(rng.integers(EXPERTS - 1)))
    return replace(scene, **{name: np.take(getattr(scene, name), order, axis) for name, axis in _BY_EXPERT.items()})


def _token_order(scene: Scene, rng: np.random.Generator) -> Scene:
    order = rng.permutation(scene.tokens)
    return replace(scene, **{name: getattr(scene, name)[order] for name in _BY_TOKEN})


def _sample_names(scene: Scene, rng: np.random.Generator) -> Scene:
    return replace(scene, sample=rng.permutation(100)[scene.sample])


def _copies(scene: Scene, rng: np.random.Generator) -> Scene:
    twice = {name: np.concatenate([getattr(scene, name)] * 2) for name in _BY_TOKEN}
    twice["sample"][scene.tokens :] += 1000
    return replace(scene, **twice)


def _token_weights(scene: Scene, rng: np.random.Generator) -> Scene:
    """Every token of the first sample twice: it stays one sample."""
    first = np.flatnonzero(scene.sample == scene.sample[0])
    order = np.concatenate([np.arange(scene.tokens), first])
    return replace(scene, **{name: getattr(scene, name)[order] for name in _BY_TOKEN})


def _orthogonal(dim: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(dim, dim)))[0]


def _output_rotation(scene: Scene, rng: np.random.Generator) -> Scene:
    turn = _orthogonal(D_OUT, rng)
    return replace(scene, B0=turn @ scene.B0, B1=turn @ scene.B1)


def _input_rotation(scene: Scene, rng: np.random.Generator) -> Scene:
    turn = _orthogonal(D_IN, rng)
    names = ("A0", "A1", "router0", "router1")
    return replace(scene, **{name: getattr(scene, name) @ turn for name in names})


def _gate_scale(scene: Scene, rng: np.random.Generator) -> Scene:
    names = ("gate0", "gate1", "gate_ref")
    return replace(scene, **{name: getattr(scene, name) * (0.5 + rng.random((scene.tokens, 1))) for name in names})


def _output_scale(scene: Scene, rng: np.random.Generator) -> Scene:
    factor = 0.5 + 2 * rng.random()
    return replace(scene, B0=factor * scene.B0, B1=factor * scene.B1)


def _router_shift(scene: Scene, rng: np.random.Generator) -> Scene:
    return replace(scene, router1=scene.router1 + rng.normal(size=D_IN))


def _time(scene: Scene, rng: np.random.Generator) -> Scene:
    swapped = {}
    for name in ("gate", "z", "A", "B", "router", "magnitude"):
        swapped[f"{name}0"], swapped[f"{name}1"] = getattr(scene, f"{name}1"), getattr(scene, f"{name}0")
    # the current parameters on the anchor's inputs are not part of a scene, so what needs a reference stays as it is
    return replace(scene, **swapped)


Transformation = Callable[[Scene, np.random.Generator], Scene]
TRANSFORMATIONS: dict[str, tuple[str, Transformation]] = {
    "gauge": ("(A, B) -> (G A, B G^-1) for every expert, with another G at each checkpoint", _gauge),
    "labels": ("the experts of both checkpoints renumbered alike (values by expert: as a set)", _relabel),
    "token order": ("tokens in another order, at both checkpoints alike", _token_order),
    "sample names": ("other numbers for the samples", _sample_names),
    "copies": ("every sample twice", _copies),
    "token weights": ("every token of one sample twice, within that sample", _token_weights),
    "output rotation": ("outputs of both checkpoints turned by one orthogonal matrix", _output_rotation),
    "output scale": ("outputs of both checkpoints times one factor", _output_scale),
    "input rotation": ("the input space turned by one orthogonal matrix", _input_rotation),
    "gate scale": ("gates of every token times a factor of its own", _gate_scale),
    "router shift": ("one vector added to all rows of the current router: no gate changes", _router_shift),
    "time": ("anchor and current checkpoint exchanged", _time),
}
"""Name -> what it does, and the function."""


# --- measures ------------------------------------------------------------------------------------------------------


def measure(scene: Scene) -> dict[str, np.ndarray]:
    """Every measure of a site by name; values by expert, pathway or token are sorted, so that labels do not matter."""
    found = {**_routing(scene), **_subspaces(scene), **_codrift(scene), **_responsibility(scene), **_weights(scene)}
    return {name: np.sort(np.asarray(value, dtype=float), axis=None) for name, value in found.items()}


def _routing(scene: Scene) -> dict[str, object]:
    pair, sample = (scene.gate0, scene.gate1), scene.sample
    loads = np.stack([m.load(scene.gate1[scene.probe == number]) for number in range(PROBES)])
    return {
        "js_divergence": m.js_divergence(*pair)[np.argsort(scene.base)[: scene.tokens // 2]],
        "router_js": m.router_js(*pair, sample),
        "router_js_distance": m.router_js_distance(*pair, sample),
        "marginal_js": m.marginal_js(*pair, sample),
        "sample_js": m.sample_js(*pair, sample),
        "mass_moved": m.mass_moved(*pair, sample),
        "top1_switch": np.stack(m.top1_switch(*pair, sample)),
        "topk_overlap": m.topk_overlap(*pair, TOP_K, sample).overlap,
        "relative_js": m.relative_js(*pair, sample).value,
        "gate_entropy": m.gate_entropy(scene.gate1, sample),
        "load_entropy": m.load_entropy(scene.gate1, sample),
        "load": m.load(scene.gate1, sample),
        "specialisation": m.specialisation(loads, np.full(PROBES, 1e6)).value,
        "coactivation": m.coactivation(scene.gate1, TOP_K, sample),
        "dead_experts": m.dead_experts(scene.gate1**4, sample),
        "near_uniform": m.near_uniform(m.gate_entropy(scene.gate1, sample)),
    }


def _subspaces(scene: Scene) -> dict[str, object]:
    pair = m.pair_from_factors(scene.A0, scene.A1)
    moment0, moment1 = (np.einsum("nek,nel->ekl", z, z) for z in (scene.z0, scene.z1))
    importance0 = m.rank_importance(scene.gate0, scene.z0, scene.sample)
    concentration = m.importance_concentration(importance0)
    updates = {"a": m.rank_update(scene.A0, scene.A1), "b": m.rank_update(scene.B0, scene.B1, axis=-2)}
    grams = [m.expert_blocks(gram, EXPERTS) for gram in m.expert_grams(scene.B0, scene.B1)]
    sq00, sq01, sq11 = (
        np.einsum("nek,ekl,nel->e", first, gram, second)
        for first, gram, second in zip(
            (scene.z_ref, scene.z_ref, scene.z_now), grams, (scene.z_ref, scene.z_now, scene.z_now), strict=True
        )
    )
    outputs = m.pair_from_factors(scene.B0.swapaxes(-1, -2), scene.B1.swapaxes(-1, -2))
    return {
        "subspace_overlap": pair.overlap(),
        "subspace_overlap_adjusted": pair.adjusted(),
        "principal_angles": pair.angles(),
        "largest_angle": pair.angles()[..., -1],
        "grassmann_distance": pair.distance(),
        "active_overlap": pair.active_overlap(moment0),
        "active_rank": m.active_rank(scene.A1, moment1),
        "output_overlap": m.output_overlap(scene.B0, scene.B1),
        "output_overlap_adjusted": outputs.adjusted(),
        "rank_importance": importance0,
        "importance_concentration": concentration.top_share,
        "importance_gini": concentration.gini,
        "rank_update": np.stack(list(updates.values())),
        "rank_update_a": updates["a"],
        "rank_update_b": updates["b"],
        "rank_update_a_correlation": m.spearman(updates["a"].ravel(), importance0.ravel()),
        "rank_update_b_correlation": m.spearman(updates["b"].ravel(), importance0.ravel()),
        "expert_drift": m.expert_drift(sq11 - 2 * sq01 + sq00, sq00).value,
        "cka": m.cka(scene.z0, scene.z1, scene.B0, scene.B1),
        "biased_cka": m.biased_cka(scene.z0, scene.z1, scene.B0, scene.B1),
    }


def _codrift(scene: Scene) -> dict[str, object]:
    grams = m.expert_grams(scene.B0, scene.B1)
    tokens = m.codrift_from_grams(scene.gate0, scene.gate1, scene.z0, scene.z1, *grams)
    phi, impact = tokens.reduce(scene.sample), tokens.impact(scene.base**2, scene.sample)
    origin = m.drift_origin(
        (scene.gate0, scene.z0), (scene.gate_ref, scene.z_ref), (scene.gate1, scene.z1), *grams
    ).reduce(scene.sample)
    return {
        "codrift_divergence": phi.total,
        "codrift_router": phi.router,
        "codrift_experts": phi.experts,
        "codrift_cross": phi.cross,
        "coupling": phi.coupling,
        "codrift_share": phi.share,
        "codrift_inherited": origin.inherited,
        "codrift_local": origin.local,
        "codrift_origin_cross": origin.cross,
        "impact": impact.total,
        "impact_router": impact.router,
        "impact_experts": impact.experts,
        "impact_cross": impact.cross,
    }


def _responsibility(scene: Scene) -> dict[str, object]:
    norm0, norm1 = (
        np.linalg.norm(np.einsum("edk,nek->ned", B, z), axis=-1)
        for B, z in ((scene.B0, scene.z0), (scene.B1, scene.z1))
    )
    drift = m.responsibility_drift(scene.gate0, scene.gate1, norm0, norm1, scene.sample)
    alignments = [m.alignment(gate, norm, scene.sample) for gate, norm in ((scene.gate0, norm0), (scene.gate1, norm1))]
    return {
        "responsibility": m.responsibility(scene.gate1, norm1)[np.argsort(scene.base)[: scene.tokens // 2]],
        "responsibility_divergence": drift.total,
        "responsibility_router": drift.phi_router,
        "responsibility_experts": drift.phi_experts,
        "responsibility_router_alone": drift.router,
        "responsibility_experts_alone": drift.experts,
        "responsibility_synergy": drift.synergy,
        "retained": drift.retained,
        "alignment": alignments[1],
        "alignment_energy": m.alignment_energy(scene.gate1, scene.z1, scene.sample),
        "alignment_loss": alignments[0] - alignments[1],
    }


def _weights(scene: Scene) -> dict[str, object]:
    change = m.update_change(scene.A0, scene.B0, scene.A1, scene.B1)
    spectrum = m.update_spectrum(
        scene.A1, scene.B1, m.orthonormal_rows(scene.A1), m.orthonormal_rows(scene.B1.swapaxes(-1, -2))
    )
    rows, router = m.row_drift(scene.router0, scene.router1), m.row_drift(scene.router0.ravel(), scene.router1.ravel())
    centred = [(router - router.mean(axis=0)).ravel() for router in (scene.router0, scene.router1)]
    return {
        "update_norm": m.update_norm(scene.A1, scene.B1),
        "update_norm_anchor": m.update_norm(scene.A0, scene.B0),
        "update_difference": change.difference,
        "update_change": change.relative,
        "update_cosine": change.cosine,
        "update_rank": m.numerical_rank(spectrum),
        "effective_rank": m.effective_rank(spectrum),
        "silent_experts": m.silent_experts(m.update_norm(scene.A1, scene.B1)),
        "router_row_cosine": rows.cosine,
        "router_row_change": rows.relative,
        "router_cosine": router.cosine,
        "router_change": router.relative,
        "router_change_centred": m.row_drift(*centred).relative,
        "magnitude_change": m.row_drift(scene.magnitude0, scene.magnitude1).relative,
    }


# --- verdicts ------------------------------------------------------------------------------------------------------


class Verdict(Enum):
    """What a transformation does to a measure."""

    SAME = "same"
    CHANGES = "changes"
    EITHER = "either"
    """Counts and flags, and constants of this scene: a change is possible, but no random scene has to show it."""


def _changes() -> dict[str, set[str]]:
    """Measures that each transformation must change; all others must stay the same."""
    parts = {"codrift_divergence", "codrift_router", "codrift_experts", "codrift_cross", "coupling", "codrift_share"}
    impact = {"impact", "impact_router", "impact_experts", "impact_cross"}
    origin = {"codrift_inherited", "codrift_local", "codrift_origin_cross"}
    state = {"gate_entropy", "load_entropy", "load", "specialisation", "coactivation", "alignment", "alignment_energy",
             "responsibility"}  # fmt: skip
    shapley = {"responsibility_router", "responsibility_experts", "responsibility_router_alone",
               "responsibility_experts_alone", "responsibility_synergy"}  # fmt: skip
    pathways = {"rank_importance", "importance_concentration", "importance_gini", "rank_update", "rank_update_a",
                "rank_update_b"}  # fmt: skip
    updates = {"update_norm", "update_norm_anchor", "update_difference"}
    rows = {"router_row_cosine", "router_row_change", "router_cosine", "router_change"}
    return {
        "gauge": {*pathways, "alignment_energy"},
        "labels": set(),
        "token order": {"relative_js"},
        "sample names": set(),
        "copies": {"relative_js"},
        "token weights": {"relative_js", "expert_drift", "cka", "biased_cka", "specialisation", "active_overlap",
                          "active_rank"},
        "output rotation": set(),
        "output scale": {*updates, *impact},
        "input rotation": set(),
        "gate scale": {*parts, *impact, *origin, "rank_importance", "importance_concentration", "importance_gini"},
        "router shift": rows,
        "time": {*state, *shapley, *pathways, *origin, "relative_js", "active_overlap", "active_rank", "expert_drift",
                 "alignment_loss", "update_norm", "update_norm_anchor", "update_change", "effective_rank",
                 "router_row_change", "router_change", "router_change_centred", "magnitude_change"},
    }  # fmt: skip


def _verdicts() -> dict[str, dict[str, Verdict]]:
    either = {("gauge", "rank_update_a_correlation"), ("gauge", "rank_update_b_correlation"),
              ("gate scale", "rank_update_a_correlation"), ("gate scale", "rank_update_b_correlation"),
              ("time", "rank_update_a_correlation"), ("time", "rank_update_b_correlation"),
              ("time", "dead_experts"), ("time", "near_uniform"), ("time", "update_rank"), ("time", "silent_experts"),
              ("copies", "cka"),
              ("token weights", "js_divergence"), ("token weights", "responsibility"),
              ("copies", "js_divergence"), ("copies", "responsibility")}  # fmt: skip
    changes = _changes()
    return {
        name: {
            key: Verdict.EITHER if (key, name) in either else Verdict.CHANGES if name in changes[key] else Verdict.SAME
            for key in TRANSFORMATIONS
        }
        for name in measure(random_scene(0))
    }


VERDICTS: dict[str, dict[str, Verdict]] = _verdicts()
"""Measure -> transformation -> what it must do."""
