"""Weights-only tables: what the LoRA factors and routers of checkpoints tell without the base model or any input.

The tables are computed block by block: a few sites of all checkpoints are read, measured in one batch and dropped, so
memory does not grow with the number of sites. Where the factors come from is the caller's affair (`WeightSource`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import pandas as pd
from jaxtyping import Float

from driftlens.errors import ConfigError, FormatError
from driftlens.metrics import (
    WEIGHT_MEASURES,
    effective_rank,
    numerical_rank,
    orthonormal_rows,
    pair_from_bases,
    rank_update,
    row_drift,
    silent_experts,
    update_change,
    update_norm,
    update_spectrum,
)
from driftlens.metrics.arrays import FloatArray, as_float, mean_defined
from driftlens.store import SiteInfo

__all__ = [
    "LEVELS",
    "MISSING",
    "Comparison",
    "Factors",
    "Level",
    "WeightSource",
    "most_moved",
    "summarise_weights",
    "weight_table",
]

Level = Literal["kind", "layer", "site", "expert"]
LEVELS: tuple[Level, ...] = ("kind", "layer", "site", "expert")

MISSING: dict[str, str] = {
    "gates (gate_entropy, load_entropy, specialisation, coactivation)": "a gate is a function of the module's input",
    "routing drift (router_js, mass_moved, top1_switch, topk_overlap, relative_js)": "it pairs gates of the same token",
    "pathways (rank_importance, active_overlap, active_rank, expert_drift, cka)": "they need activations A_e h",
    "co-drift (codrift_divergence, coupling, impact, responsibility, retained, alignment)": (
        "it weighs the experts' outputs by gates, on the same tokens"
    ),
    "dead_experts (by load)": "the load is a mean gate; silent_experts, by weights, is another number",
    "attribution (swaps, ledger)": "it scores the whole model on a task",
}
"""What weights alone cannot tell, and why: all of it needs the base model and a recording."""

_BLOCK_ELEMENTS = 1 << 20
"""Largest number of entries of one factor, over the sites of a block: 8 MB in float64."""

_LISTS = ("principal_angles", "rank_update_a_pathways", "rank_update_b_pathways")
_LABELS = ("task", "anchor", "checkpoint", "site", "layer", "kind", "expert", "sites", "experts")


@dataclass(frozen=True)
class Factors:
    """The weights of S sites of equal shape.

    Attributes:
        a: down-projections.
        b: up-projections, without the scaling.
        scaling: factor of the adapter branch.
        router: weight of the gate; None where the sites have none.
        magnitude: DoRA's magnitude vector; None where the sites have none.
    """

    a: Float[np.ndarray, "site expert rank d_in"]
    b: Float[np.ndarray, "site expert d_out rank"]
    scaling: Float[np.ndarray, "#site"]
    router: Float[np.ndarray, "site expert d_in"] | None = None
    magnitude: Float[np.ndarray, "site width"] | None = None


class WeightSource(Protocol):
    """A checkpoint whose factors can be read a few sites at a time."""

    @property
    def name(self) -> str:
        """What tables call the checkpoint."""

    @property
    def sites(self) -> Sequence[SiteInfo]:
        """Its sites, in order."""

    @property
    def extras(self) -> Sequence[tuple[int, int]]:
        """Of each site the rows of its router and the length of its magnitude vector; 0 where it has none."""

    def read(self, positions: Sequence[int]) -> Factors:
        """Read sites of equal shape by their position in ``sites``."""


class Comparison(NamedTuple):
    """Positions of two checkpoints; equal positions ask for the facts of one checkpoint alone."""

    anchor: int
    current: int
    task: str | None = None


def weight_table(
    sources: Sequence[WeightSource], comparisons: Sequence[Comparison], level: Level = "site"
) -> pd.DataFrame:
    """Measure updates, subspaces and routers between checkpoints.

    Args:
        sources: the checkpoints.
        comparisons: which to compare.
        level: rows per expert, per site (mean over the experts where the number is defined), or per kind of module or
            layer (mean over sites).

    Returns:
        Columns task (if any is named), anchor, checkpoint, then site, layer, kind, expert (as far as the level has
        them) and the measures of `WEIGHT_MEASURES`; ``subspace_overlap_chance`` and ``output_overlap_chance`` beside
        theirs; at expert level also lists: ``principal_angles`` (radians, ascending) and
        ``rank_update_{a,b}_pathways``. Measures that no site has are left out. ``undefined`` lists "NAME: reason" of
        every NaN of a row. ``frame.attrs``: ``within_run`` (columns comparable along one training run only),
        ``missing`` (see `MISSING`) and ``notes`` (sentences on what was found).

    Raises:
        ConfigError: unknown level, or nothing to compare.
        FormatError: checkpoints with different sites or shapes.
    """
    if level not in LEVELS:
        raise ConfigError(f"Unknown level {level!r}; choose one of {', '.join(LEVELS)}.")
    if not comparisons:
        raise ConfigError("No checkpoints to compare. Give an anchor and at least one later checkpoint.")
    for source in sources[1:]:
        _check_same_sites(sources[0], source)
    parts: list[dict[str, np.ndarray]] = []
    notes = _Notes(sources, comparisons)
    fine: Literal["site", "expert"] = "expert" if level == "expert" else "site"
    for positions in _blocks(sources[0]):
        for comparison, values in _measure_block(sources, comparisons, positions):
            notes.see(comparison, positions, values)
            parts.append(_rows(sources, comparison, positions, values, fine))
    frame = _ordered(_joined(parts))
    frame.attrs["within_run"] = [name for name in frame.columns if _is_within_run(name)]
    frame.attrs["missing"] = dict(MISSING)
    frame.attrs["notes"] = notes.sentences()
    return summarise_weights(frame, level) if level in ("kind", "layer") else frame


def summarise_weights(frame: pd.DataFrame, level: Literal["kind", "layer"]) -> pd.DataFrame:
    """Average a table of sites over the sites of each kind or layer where a number is defined; ``sites`` counts them.

    Args:
        frame: result of `weight_table` at level ``"site"``.
        level: what rows stand for.
    """
    keys = [name for name in ("task", "anchor", "checkpoint") if name in frame]
    measures = [name for name in frame.columns if name not in (*_LABELS, "undefined")]
    groups = frame.groupby([*keys, level], sort=False, dropna=False)
    means: pd.DataFrame = groups[["experts", *measures]].mean()
    means.insert(0, "sites", groups.size())
    means = means.reset_index()
    means.attrs = dict(frame.attrs)
    return means


def most_moved(frame: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return the ``count`` rows whose updates changed most; by size where the anchor's update is 0."""
    keys = [name for name in ("update_change", "update_difference", "update_norm") if name in frame]
    chosen: pd.DataFrame = frame.sort_values(keys, ascending=False, kind="stable", na_position="last").head(count)
    return chosen


def _check_same_sites(first: WeightSource, other: WeightSource) -> None:
    shapes = [
        {
            site.name: (site.num_experts, site.rank, site.d_in, site.d_out, *extra)
            for site, extra in zip(source.sites, source.extras, strict=True)
        }
        for source in (first, other)
    ]
    only = [sorted(shapes[0].keys() - shapes[1].keys()), sorted(shapes[1].keys() - shapes[0].keys())]
    advice = "Compare checkpoints of one adapter configuration on one base model."
    if only[0] or only[1]:
        found = [
            f"{len(names)} only in {source.name} (for example {names[0]})"
            for source, names in zip((first, other), only, strict=True)
            if names
        ]
        raise FormatError(
            f"{first.name} has {len(shapes[0])} sites and {other.name} has {len(shapes[1])}: {'; '.join(found)}. "
            f"{advice}"
        )
    for name, shape in shapes[0].items():
        if shape != shapes[1][name]:
            raise FormatError(
                f"Site {name} differs in shape: {first.name} has {_shape_text(shape)}; {other.name} has "
                f"{_shape_text(shapes[1][name])}. {advice}"
            )


def _shape_text(shape: tuple[int, ...]) -> str:
    experts, rank, d_in, d_out, router, magnitude = shape
    text = f"{experts} experts of rank {rank}, {d_in} -> {d_out}, {'a' if router else 'no'} router"
    return text + (", a magnitude vector" if magnitude else "")


def _blocks(source: WeightSource) -> Iterator[list[int]]:
    """Yield positions of sites of equal shape, few enough for one block."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, (site, extra) in enumerate(zip(source.sites, source.extras, strict=True)):
        groups.setdefault((site.num_experts, site.rank, site.d_in, site.d_out, *extra), []).append(position)
    for (experts, rank, d_in, d_out, *_), positions in groups.items():
        size = max(1, _BLOCK_ELEMENTS // (experts * rank * max(d_in, d_out)))
        yield from (positions[start : start + size] for start in range(0, len(positions), size))


def _measure_block(
    sources: Sequence[WeightSource], comparisons: Sequence[Comparison], positions: Sequence[int]
) -> list[tuple[Comparison, _Values]]:
    """Read a block of sites once and compare it; a function, so that its arrays are freed before the next block."""
    block = [_Checkpoint(source.read(positions)) for source in sources]
    return [(item, _measure(block[item.anchor], block[item.current], item)) for item in comparisons]


class _Checkpoint:
    """One checkpoint's block with what all of its comparisons share; sites that are not finite hold zeros."""

    def __init__(self, factors: Factors) -> None:
        parts = [factors.a, factors.b, factors.router, factors.magnitude]
        finite = [np.isfinite(part).reshape(len(part), -1).all(axis=1) for part in parts if part is not None]
        self.finite = np.logical_and.reduce(finite)
        self.a, self.b, router, magnitude = (self._clean(part) for part in parts)
        assert self.a is not None and self.b is not None  # noqa: PT018 - Factors always hold both
        self.A, self.B, self.router, self.magnitude = self.a, self.b, router, magnitude
        self.scaling = as_float(factors.scaling)[:, None]
        self.basis_a, self.basis_b = orthonormal_rows(self.A), orthonormal_rows(np.swapaxes(self.B, -1, -2))
        self.norm = update_norm(self.A, self.B, self.scaling)
        self.spectrum = update_spectrum(self.A, self.B, self.basis_a, self.basis_b, self.scaling)

    def _clean(self, part: np.ndarray | None) -> FloatArray | None:
        if part is None:
            return None
        keep = self.finite.reshape(-1, *[1] * (part.ndim - 1))
        cleaned: FloatArray = np.where(keep, as_float(part), 0.0)
        return cleaned


class _Values(NamedTuple):
    """Measures of one block by name: [S], [S, E] and [S, E, r]; ``finite`` [S]."""

    site: dict[str, FloatArray]
    expert: dict[str, FloatArray]
    pathway: dict[str, FloatArray]
    finite: np.ndarray


def _measure(old: _Checkpoint, new: _Checkpoint, comparison: Comparison) -> _Values:
    site = {"silent_experts": silent_experts(new.norm).astype(np.float64)}
    expert: dict[str, FloatArray] = {
        "update_norm": new.norm,
        "update_rank": numerical_rank(new.spectrum).astype(np.float64),
        "effective_rank": effective_rank(new.spectrum),
    }
    pathway: dict[str, FloatArray] = {}
    if comparison.anchor != comparison.current:
        _subspaces(old, new, expert, pathway)
        _updates(old, new, expert, pathway)
        _routers(old, new, site, expert)
    finite = old.finite & new.finite
    for values in (site, expert, pathway):
        for name, array in values.items():
            values[name] = np.where(finite.reshape(-1, *[1] * (array.ndim - 1)), array, np.nan)
    return _Values(site, expert, pathway, finite)


def _subspaces(
    old: _Checkpoint, new: _Checkpoint, expert: dict[str, FloatArray], pathway: dict[str, FloatArray]
) -> None:
    pair = pair_from_bases(old.basis_a, new.basis_a)
    angles = pair.angles()
    expert["subspace_overlap"], expert["subspace_overlap_chance"] = pair.overlap(), pair.chance()
    expert["subspace_overlap_adjusted"], expert["grassmann_distance"] = pair.adjusted(), pair.distance()
    expert["largest_angle"] = np.where(np.isnan(angles).all(axis=-1), np.nan, np.nan_to_num(angles).max(axis=-1))
    pathway["principal_angles"] = angles
    outputs = pair_from_bases(old.basis_b, new.basis_b)
    expert["output_overlap"], expert["output_overlap_chance"] = outputs.overlap(), outputs.chance()
    expert["output_overlap_adjusted"] = outputs.adjusted()


def _updates(old: _Checkpoint, new: _Checkpoint, expert: dict[str, FloatArray], pathway: dict[str, FloatArray]) -> None:
    change = update_change(old.A, old.B, new.A, new.B, old.scaling, new.scaling)
    expert["update_norm_anchor"], expert["update_difference"] = old.norm, change.difference
    expert["update_change"], expert["update_cosine"] = change.relative, change.cosine
    for letter, first, second, axis in (("a", old.A, new.A, -1), ("b", old.B, new.B, -2)):
        update = rank_update(first, second, axis=axis)
        expert[f"rank_update_{letter}"] = mean_defined(update)
        pathway[f"rank_update_{letter}_pathways"] = update


def _routers(old: _Checkpoint, new: _Checkpoint, site: dict[str, FloatArray], expert: dict[str, FloatArray]) -> None:
    if old.router is not None and new.router is not None:
        rows = row_drift(old.router, new.router)
        expert["router_row_cosine"], expert["router_row_change"] = rows.cosine, rows.relative
        whole = row_drift(*(router.reshape(len(router), -1) for router in (old.router, new.router)))
        site["router_cosine"], site["router_change"] = whole.cosine, whole.relative
        centred = [router - router.mean(axis=1, keepdims=True) for router in (old.router, new.router)]
        seen = row_drift(*(router.reshape(len(router), -1) for router in centred)).relative
        site["router_change_centred"] = seen if old.router.shape[1] > 1 else np.full_like(seen, np.nan)
    if old.magnitude is not None and new.magnitude is not None:
        site["magnitude_change"] = row_drift(old.magnitude, new.magnitude).relative


def _rows(
    sources: Sequence[WeightSource],
    comparison: Comparison,
    positions: Sequence[int],
    values: _Values,
    level: Literal["site", "expert"],
) -> dict[str, np.ndarray]:
    infos = [sources[0].sites[position] for position in positions]
    experts = infos[0].num_experts
    repeat = experts if level == "expert" else 1
    names = [sources[comparison.anchor].name, sources[comparison.current].name]
    columns: dict[str, np.ndarray] = {
        "position": np.repeat(positions, repeat),
        "comparison": _objects([comparison] * (len(infos) * repeat)),
        "task": _objects([comparison.task] * (len(infos) * repeat)),
        "anchor": _objects([names[0] if comparison.anchor != comparison.current else None] * (len(infos) * repeat)),
        "checkpoint": _objects([names[1]] * (len(infos) * repeat)),
        "site": np.repeat(_objects([info.name for info in infos]), repeat),
        "layer": np.repeat([info.layer for info in infos], repeat),
        "kind": np.repeat(_objects([info.kind for info in infos]), repeat),
    }
    if level == "expert":
        columns["expert"] = np.tile(np.arange(experts), len(infos))
        measures = {name: array.ravel() for name, array in values.expert.items()}
        measures["silent"] = np.where(np.isnan(measures["update_norm"]), np.nan, measures["update_norm"] == 0)
    else:
        columns["experts"] = np.full(len(infos), experts)
        measures = {name: mean_defined(array) for name, array in values.expert.items()} | values.site
    columns |= measures
    if level == "expert":
        for name, array in values.pathway.items():
            columns[name] = _objects(array.reshape(-1, array.shape[-1]).tolist())
    columns["undefined"] = _objects(_undefined(measures, np.repeat(values.finite, repeat)))
    return columns


def _objects(values: Sequence[object]) -> np.ndarray:
    """Return a flat array of objects; lists among them stay lists."""
    array = np.empty(len(values), dtype=object)
    for number, value in enumerate(values):
        array[number] = value
    return array


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> pd.DataFrame:
    """Join blocks to one table; NaN where a block has no such column (sites without a router among others)."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    rows = [len(part["position"]) for part in parts]
    for part in parts:
        absent = [
            f"{name}: {WEIGHT_MEASURES[name].undefined}"
            for name in names
            if name not in part
            if name in WEIGHT_MEASURES
        ]
        for reasons in part["undefined"]:
            reasons.extend(absent)
    columns = {
        name: np.concatenate([part.get(name, np.full(n, np.nan)) for part, n in zip(parts, rows, strict=True)])
        for name in names
    }
    return pd.DataFrame(columns)


def _undefined(measures: dict[str, FloatArray], finite: np.ndarray) -> list[list[str]]:
    reasons: list[list[str]] = [[] for _ in finite]
    for name, array in measures.items():
        defined = WEIGHT_MEASURES.get(name)
        if defined is None:
            continue
        for row in np.flatnonzero(np.isnan(array)):
            reason = defined.undefined if finite[row] else "the weights hold NaN or infinite values"
            reasons[row].append(f"{name}: {reason}")
    return reasons


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort by comparison, then as the sites lie in the model; drop what no site has."""
    order = {comparison: number for number, comparison in enumerate(dict.fromkeys(frame["comparison"]))}
    frame["comparison"] = frame["comparison"].map(order)
    keys = ["comparison", "position", *(["expert"] if "expert" in frame else [])]
    frame = frame.sort_values(keys, kind="stable", ignore_index=True).drop(columns=["comparison", "position"])
    frame = frame.drop(columns=[name for name in ("task", "anchor") if frame[name].isna().all()])
    labels = [name for name in _LABELS if name in frame]
    lists = [name for name in _LISTS if name in frame]
    first = [name for name in frame.columns if name not in (*labels, *lists, "undefined")]
    return frame[[*labels, *first, *lists, "undefined"]]


def _is_within_run(name: str) -> bool:
    entry = WEIGHT_MEASURES.get(name.removesuffix("_pathways"))
    return entry is not None and entry.within_run


class _Notes:
    """Sentences on what stands out, collected while the blocks go by."""

    def __init__(self, sources: Sequence[WeightSource], comparisons: Sequence[Comparison]) -> None:
        self._sources, self._comparisons = sources, comparisons
        self._working: dict[int, set[frozenset[int]]] = {}
        self._moved: dict[Comparison, bool] = {}
        self._broken: dict[int, list[str]] = {}

    def see(self, comparison: Comparison, positions: Sequence[int], values: _Values) -> None:
        """Take in one block of one comparison."""
        norms = values.expert["update_norm"]
        working = self._working.setdefault(comparison.current, set())
        working.update(frozenset(np.flatnonzero(row > 0).tolist()) for row in norms[values.finite])
        broken = [self._sources[0].sites[p].name for p, good in zip(positions, values.finite, strict=True) if not good]
        self._broken.setdefault(comparison.current, []).extend(broken)
        if comparison.anchor != comparison.current:
            watched = [values.expert["update_difference"], values.expert["rank_update_a"]]
            watched += [part[name] for part in values[:2] for name in part if name in ("router_change",)]
            still = all((np.nan_to_num(array, nan=0.0) == 0).all() for array in watched) and not broken
            self._moved[comparison] = self._moved.get(comparison, False) or not still

    def sentences(self) -> list[str]:
        """Return the notes, each one sentence or two."""
        notes = []
        for position, sets in self._working.items():
            notes += self._experts_at_work(position, sets)
        for comparison, moved in self._moved.items():
            if not moved:
                notes.append(
                    f"{self._sources[comparison.current].name} holds the same weights as "
                    f"{self._sources[comparison.anchor].name}: nothing was trained between them, or one was copied."
                )
        for position, names in self._broken.items():
            if names:
                notes.append(
                    f"{len(names)} sites of {self._sources[position].name}, or of its anchor, hold NaN or infinite "
                    f"values (for example {names[0]}); their numbers are undefined."
                )
        semantics = {site.semantics for site in self._sources[0].sites} - {"sum_gBA"}
        if semantics:
            notes.append(
                f"These experts combine as {', '.join(sorted(semantics))}, not as a gated sum of B_e A_e: the norm of "
                "an expert's own update leaves out the cross terms B_j A_i that the forward pass has."
            )
        return notes

    def _experts_at_work(self, position: int, sets: set[frozenset[int]]) -> list[str]:
        name, experts = self._sources[position].name, {site.num_experts for site in self._sources[position].sites}
        if len(experts) != 1 or max(experts) == 1 or len(sets) != 1:
            return []
        working, total = sorted(next(iter(sets))), max(experts)
        if not working:
            return [f"{name}: no expert has an update (B = 0 everywhere), as before the first task."]
        if len(working) == total:
            return []
        listing = ", ".join(map(str, working))
        return [
            f"{name}: at every site only expert {listing} of {total} (counted from 0) has an update; the others are "
            "silent (B = 0). "
            "A method that fills one slot per task should have filled one more after each task; the same single slot "
            "at every checkpoint means that the slot number never reached the adapter's configuration."
        ]
