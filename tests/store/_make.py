"""Small recordings with known content, made from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from driftlens.store import RecordingWriter, SiteInfo, group_sites
from driftlens.store.schema import stats_shapes


@dataclass
class Content:
    sites: list[SiteInfo]
    probes: list[str]
    sample_ids: dict[str, list[str]]
    columns: dict[str, dict[str, np.ndarray]]
    values: dict[str, list[dict[str, np.ndarray]]]
    stats: list[dict[str, np.ndarray]]
    weights: list[dict[str, np.ndarray]]
    meta: dict[str, Any]

    @property
    def n_tokens(self) -> int:
        return sum(len(columns["sample"]) for columns in self.columns.values())


def site(index: int, experts: int = 3, rank: int = 2) -> SiteInfo:
    return SiteInfo(
        name=f"model.layers.{index}.mlp.down_proj", layer=index, kind="down_proj", num_experts=experts, rank=rank,
        d_in=5, d_out=4, scaling=2.0, gate="softmax",
    )  # fmt: skip


def content(sites: list[SiteInfo] | None = None, tokens: tuple[int, ...] = (7, 0, 5), seed: int = 0) -> Content:
    rng = np.random.default_rng(seed)
    sites = sites if sites is not None else [site(0), site(1), site(2, 4, 3), site(3, 1, 1), site(4)]
    probes = [f"task-{index}" for index in range(len(tokens))]
    ids = {probe: [f"{probe}/{number}" for number in range(3)] for probe in probes}
    columns, values = {}, {}
    for probe, n in zip(probes, tokens, strict=True):
        columns[probe] = {
            "sample": np.sort(rng.integers(0, 3, n)),
            "position": rng.integers(0, 50, n),
            "token_id": rng.integers(0, 49152, n),
            "role": rng.integers(0, 3, n),
        }
        values[probe] = [_values(rng, sites, members, n) for members in group_sites(sites)]
    stats = [_stats(rng, sites, members, tokens) for members in group_sites(sites)]
    weights = [
        {
            "A": rng.standard_normal((s.num_experts, s.rank, s.d_in)).astype(np.float32),
            "B": rng.standard_normal((s.num_experts, s.d_out, s.rank)).astype(np.float32),
            "router": rng.standard_normal((s.num_experts, s.d_in)).astype(np.float32),
        }
        if s.rank
        else {"router": rng.standard_normal((s.num_experts, s.d_in)).astype(np.float32)}
        for s in sites
    ]
    meta = {"checkpoint": "03-digit", "seed": 7, "overhead_percent": 3.5, "versions": {"torch": "2"}, "reference": None}
    return Content(sites, probes, ids, columns, values, stats, weights, meta)


def _values(rng: np.random.Generator, sites: list[SiteInfo], members: list[int], n: int) -> dict[str, np.ndarray]:
    experts, rank = sites[members[0]].num_experts, sites[members[0]].rank
    values = {
        "gate": rng.dirichlet(np.ones(experts), size=(len(members), n)),
        "pathway": rng.standard_normal((len(members), n, experts, rank)),
        "expert_norm": rng.random((len(members), n, experts)),
        "base_norm": 10 * rng.random((len(members), n)),
    }
    if not rank:
        del values["pathway"], values["expert_norm"]
    return {name: array.astype(np.float32) for name, array in values.items()}


def _stats(
    rng: np.random.Generator, sites: list[SiteInfo], members: list[int], tokens: tuple[int, ...]
) -> dict[str, np.ndarray]:
    experts, rank = sites[members[0]].num_experts, sites[members[0]].rank
    shapes = stats_shapes(len(members), len(tokens), experts, rank)
    stats = {name: rng.random(shape) for name, shape in shapes.items()}
    stats["count"] = 10.0 + np.array(tokens)
    stats["gate_sum"] = rng.dirichlet(np.ones(experts), size=(len(members), len(tokens))) * stats["count"][:, None]
    return stats


def write(path: Path, c: Content, *, batch: int = 1000, weights: bool = True, **options: Any) -> Path:
    with RecordingWriter(
        path, sites=c.sites, probes=c.probes, sample_ids=c.sample_ids, meta=c.meta, **options
    ) as writer:
        fill(writer, c, batch=batch, weights=weights)
    return path


def fill(writer: RecordingWriter, c: Content, *, batch: int = 1000, weights: bool = True) -> None:
    for probe in c.probes:
        for start in range(0, len(c.columns[probe]["sample"]), batch):
            part = slice(start, start + batch)
            writer.append(
                probe,
                **{name: array[part] for name, array in c.columns[probe].items()},
                values=[{name: array[:, part] for name, array in group.items()} for group in c.values[probe]],
            )
    for index, stats in enumerate(c.stats):
        writer.set_stats(index, stats)
    for index, arrays in enumerate(c.weights if weights else []):
        writer.set_weights(index, arrays.get("A"), arrays.get("B"), arrays["router"])
