"""The table of a recording with a reference, against numbers formed from outputs of full length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from driftlens import metrics as m
from driftlens.analysis import reference_drift
from driftlens.errors import FormatError, NotFoundError, ProbeError
from driftlens.store import Recording, RecordingWriter, SiteInfo, group_sites, open_recording
from driftlens.store.schema import stats_shapes

PROBES, SAMPLES, PER_SAMPLE = ("first", "second"), 5, 3
N = SAMPLES * PER_SAMPLE
SITES = [
    SiteInfo("layers.0.up", 0, "up", 3, 2, 6, 9, 2.0, "softmax"),
    SiteInfo("layers.0.moe", 0, "moe", 4, 0, 6, 6, 1.0, "topk", top_k=2),
    SiteInfo("layers.1.up", 1, "up", 3, 2, 6, 9, 2.0, "softmax", semantics="product_of_sums"),
    SiteInfo("layers.1.down", 1, "down", 2, 1, 6, 9, 0.5, "softmax"),
]


class Model:
    """Parameters of every site of one checkpoint; inputs come from outside."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.a = [rng.normal(size=(s.num_experts, s.rank, 6)) for s in SITES]
        self.b = [rng.normal(size=(s.num_experts, 9, s.rank)) for s in SITES]
        self.router = [rng.normal(size=(s.num_experts, 6)) for s in SITES]

    def gate(self, site: int, h: np.ndarray) -> np.ndarray:
        weights = np.exp(h @ self.router[site].T)
        return weights / weights.sum(-1, keepdims=True)

    def pathway(self, site: int, h: np.ndarray) -> np.ndarray:
        return np.einsum("erd,nd->ner", self.a[site], h)

    def outputs(self, site: int, h: np.ndarray) -> np.ndarray:
        z = self.pathway(site, h)
        if SITES[site].semantics == "product_of_sums":
            z = np.einsum("ne,ner->nr", self.gate(site, h), z)[:, None].repeat(z.shape[1], axis=1)
        return SITES[site].scaling * np.einsum("ner,eor->neo", z, self.b[site])

    def update(self, site: int, h: np.ndarray) -> np.ndarray:
        return np.einsum("ne,neo->no", self.gate(site, h), self.outputs(site, h))


def inputs(checkpoint: int, probe: int) -> np.ndarray:
    """What arrives at every site [sites, n, 6]; it differs between checkpoints, as upstream layers do."""
    shared, own = np.random.default_rng(probe), np.random.default_rng([checkpoint, probe])
    return shared.normal(size=(len(SITES), N, 6)) + 0.3 * own.normal(size=(len(SITES), N, 6))


def sums(model: Model, h: list[np.ndarray], members: list[int]) -> dict[str, np.ndarray]:
    rank = SITES[members[0]].rank
    stats = {
        name: np.zeros(shape)
        for name, shape in stats_shapes(len(members), len(PROBES), SITES[members[0]].num_experts, rank).items()
    }
    stats["count"][:] = N
    stats["gate_sum"] = np.array([[model.gate(s, h[p][s]).sum(0) for p in range(len(PROBES))] for s in members])
    if rank:
        stats["expert_sq"] = np.array(
            [[(model.outputs(s, h[p][s]) ** 2).sum((0, 2)) for p in range(len(PROBES))] for s in members]
        )
    return stats


def values(model: Model, h: np.ndarray, members: list[int]) -> dict[str, np.ndarray]:
    found = {"gate": np.stack([model.gate(s, h[s]) for s in members])}
    if SITES[members[0]].rank:
        found["pathway"] = np.stack([model.pathway(s, h[s]) for s in members])
        found["expert_norm"] = np.stack([np.linalg.norm(model.outputs(s, h[s]), axis=-1) for s in members])
    return found


def write(path: Path, checkpoint: int, model: Model, anchor: Model | None = None, shift: int = 0) -> Recording:
    h = [inputs(checkpoint, probe) for probe in range(len(PROBES))]
    meta = {"checkpoint": f"{checkpoint:02d}", "checkpoint_sha256": f"{checkpoint:064d}"}
    if anchor is not None:
        meta |= {"reference": "01", "reference_sha256": f"{1:064d}"}
    ids = {probe: [str(n) for n in range(SAMPLES)] for probe in PROBES}
    groups = group_sites(SITES)
    with RecordingWriter(
        path, sites=SITES, probes=PROBES, sample_ids=ids, meta=meta, reference=anchor is not None
    ) as writer:
        for p, probe in enumerate(PROBES):
            rows = []
            for members in groups:
                mine = values(model, h[p], members) | {"base_norm": np.ones((len(members), N))}
                if anchor is not None:
                    mine |= {f"reference/{name}": array for name, array in values(anchor, h[p], members).items()}
                rows.append({name: array.astype(np.float32) for name, array in mine.items()})
            sample = np.repeat(np.arange(SAMPLES), PER_SAMPLE)
            position = np.tile(np.arange(PER_SAMPLE), SAMPLES)
            writer.append(
                probe, sample=sample, position=position, token_id=sample + shift, role=sample * 0, values=rows
            )
        for number, members in enumerate(groups):
            stats = sums(model, h, members)
            if anchor is not None:
                own = {n: v for n, v in sums(anchor, h, members).items() if n not in ("count", "base_sq")}
                if SITES[members[0]].rank:
                    own["drift_sq"] = np.array(
                        [
                            [((model.outputs(s, x[s]) - anchor.outputs(s, x[s])) ** 2).sum((0, 2)) for x in h]
                            for s in members
                        ]
                    )
                stats |= {f"reference/{name}": array for name, array in own.items()}
                writer.set_reference_grams(number, grams(anchor, model, members))
            writer.set_stats(number, stats)
    return open_recording(path)


def grams(old: Model, new: Model, members: list[int]) -> dict[str, np.ndarray]:
    if not SITES[members[0]].rank:
        return {}
    b0, b1 = (np.stack([SITES[s].scaling * side.b[s] for s in members]) for side in (old, new))
    return dict(zip(("anchor", "cross", "current"), m.expert_grams(b0, b1), strict=True))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Recording, Recording]:
    """The anchor's recording, and the current one against it."""
    old, new = Model(1), Model(2)
    return write(tmp_path / "01.h5", 1, old), write(tmp_path / "02.h5", 2, new, old)


def test_expert_drift_is_exact_and_within_its_interval(files: tuple[Recording, Recording]) -> None:
    table, old, new = reference_drift(files[1], draws=200), Model(1), Model(2)
    assert "codrift_inherited" not in table
    assert table.attrs["reference"] == "01"
    for p, probe in enumerate(PROBES):
        for s, site in enumerate(SITES):
            h, cell = inputs(2, p)[s], table.sel(probe=probe, site=site.name)
            here, beyond = slice(0, site.num_experts), slice(site.num_experts, None)
            np.testing.assert_allclose(cell["load"][here], new.gate(s, h).mean(0), rtol=1e-9)
            if not site.rank:
                assert np.isnan(cell.expert_drift).all()
                assert (cell.expert_drift_reason == m.Reason.NOT_MEASURED).all()
                continue
            change, size = (
                (part**2).sum((0, 2)) for part in (new.outputs(s, h) - old.outputs(s, h), old.outputs(s, h))
            )
            np.testing.assert_allclose(cell.expert_drift[here], np.sqrt(change / size), rtol=1e-9)
            assert (cell.expert_drift_low < cell.expert_drift)[here].all()
            assert (cell.expert_drift < cell.expert_drift_high)[here].all()
            assert (cell.expert_drift_reason[here] == m.Reason.DEFINED).all()
            assert np.isnan(cell.expert_drift[beyond]).all()


def test_the_origin_of_drift_is_that_of_outputs_of_full_length(files: tuple[Recording, Recording]) -> None:
    table, old, new = reference_drift(files[1], files[0], draws=200), Model(1), Model(2)
    whole = table.codrift_inherited + table.codrift_local + 2 * table.codrift_origin_cross
    np.testing.assert_allclose(whole, table.codrift_divergence, rtol=0, atol=1e-12)
    for p, probe in enumerate(PROBES):
        for s, site in enumerate(SITES):
            cell = table.sel(probe=probe, site=site.name)
            if not site.rank:
                assert np.isnan(cell.codrift_local)
                assert cell.codrift_local_reason == m.Reason.NOT_MEASURED
                continue
            before, moved, now = (
                old.update(s, inputs(1, p)[s]),
                old.update(s, inputs(2, p)[s]),
                new.update(s, inputs(2, p)[s]),
            )
            scale = 2 * ((before**2).sum(-1).mean() + (now**2).sum(-1).mean())
            # rows are stored in float16
            np.testing.assert_allclose(
                cell.codrift_inherited, ((moved - before) ** 2).sum(-1).mean() / scale, rtol=2e-3
            )
            np.testing.assert_allclose(cell.codrift_local, ((now - moved) ** 2).sum(-1).mean() / scale, rtol=2e-3)
            cross = ((moved - before) * (now - moved)).sum(-1).mean() / scale
            np.testing.assert_allclose(cell.codrift_origin_cross, cross, rtol=2e-3, atol=1e-3)
            assert cell.codrift_local_low < cell.codrift_local < cell.codrift_local_high


def test_what_cannot_be_told_is_refused(files: tuple[Recording, Recording], tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"01\.h5 was recorded without a reference"):
        reference_drift(files[0])
    other = write(tmp_path / "00.h5", 0, Model(0))
    with pytest.raises(FormatError, match=r"recorded against '01' .* but .*00\.h5 is of '00'"):
        reference_drift(files[1], other)
    shifted = write(tmp_path / "other.h5", 1, Model(1), shift=1)
    with pytest.raises(ProbeError, match="tokens of probe 'first' differ"):
        reference_drift(files[1], shifted)
