"""Weights-only tables: closed forms, dense references, gauge invariance, levels, notes and mismatches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from driftlens.analysis.weights import (
    MISSING,
    Comparison,
    Factors,
    most_moved,
    summarise_weights,
    weight_table,
)
from driftlens.errors import ConfigError, FormatError
from driftlens.metrics import updates
from driftlens.metrics.subspaces import orthonormal_rows
from driftlens.metrics.weight_definitions import WEIGHT_MEASURES
from driftlens.store import SiteInfo

S, E, R, D_IN, D_OUT = 3, 4, 3, 24, 20
PAIR = [Comparison(0, 1)]


class Source:
    """Factors in memory: a [S, E, r, d_in], b [S, E, d_out, r], router [S, E, d_in]."""

    def __init__(self, name: str, a: np.ndarray, b: np.ndarray, router: np.ndarray | None = None, **info) -> None:
        self.name, self.a, self.b, self.router = name, a, b, router
        self.scaling = info.pop("scaling", 2.0)
        self.magnitude = info.pop("magnitude", None)
        experts, rank, d_in = a.shape[1:]
        self.sites = [
            SiteInfo(f"layers.{n}.{kind}", n, kind, experts, rank, d_in, b.shape[2], self.scaling, "softmax", **info)
            for n, kind in zip(range(len(a)), ["up", "down", "up", "down"], strict=False)
        ]
        self.extras = [(0 if router is None else experts, 0 if self.magnitude is None else b.shape[2])] * len(a)
        self.reads: list[int] = []

    def read(self, positions: Sequence[int]) -> Factors:
        self.reads += positions
        at = list(positions)
        return Factors(
            self.a[at],
            self.b[at],
            np.full(len(at), self.scaling),
            None if self.router is None else self.router[at],
            None if self.magnitude is None else self.magnitude[at],
        )


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def source(name: str = "old", seed: int = 0, **info) -> Source:
    return Source(
        name, normal(seed, S, E, R, D_IN), normal(seed + 1, S, E, D_OUT, R), normal(seed + 2, S, E, D_IN), **info
    )


def moved(old: Source, size: float = 0.1, seed: int = 9) -> Source:
    return Source("new", *(x + size * normal(seed, *x.shape) for x in (old.a, old.b, old.router)))


def table(old: Source, new: Source, level: str = "site") -> pd.DataFrame:
    return weight_table([old, new], PAIR, level)  # type: ignore[arg-type]


def test_identical_checkpoints_have_not_moved_and_are_named() -> None:
    frame = table(source(), source("copy"))
    assert len(frame) == S
    for name in ("subspace_overlap", "subspace_overlap_adjusted", "output_overlap", "update_cosine"):
        np.testing.assert_allclose(frame[name], 1.0, atol=1e-12)
    for name in ("update_difference", "update_change", "rank_update_a", "rank_update_b", "router_change"):
        assert (frame[name] == 0).all(), name
    np.testing.assert_allclose(frame["grassmann_distance"], 0.0, atol=1e-7)
    np.testing.assert_allclose(frame["router_cosine"], 1.0, atol=1e-15)
    assert any("same weights" in note for note in frame.attrs["notes"])
    assert not any("same weights" in note for note in table(source(), moved(source())).attrs["notes"])


def test_orthogonal_subspaces_overlap_by_nothing() -> None:
    old = source()
    turned = np.zeros_like(old.a)
    basis = np.linalg.svd(old.a)[2]  # rows beyond the rank span the complement
    turned[...] = basis[..., R : 2 * R, :]
    frame = table(old, Source("new", turned, old.b, old.router))
    np.testing.assert_allclose(frame["subspace_overlap"], 0.0, atol=1e-12)
    np.testing.assert_allclose(frame["grassmann_distance"], np.pi / 2, atol=1e-7)
    np.testing.assert_allclose(frame["output_overlap"], 1.0, atol=1e-12)
    np.testing.assert_allclose(frame["update_cosine"], 0.0, atol=1e-12)


def test_random_subspaces_overlap_by_chance() -> None:
    a = [normal(seed, 4, 32, R, D_IN) for seed in (1, 2)]
    b = [normal(seed, 4, 32, D_OUT, R) for seed in (3, 4)]
    frame = table(Source("old", a[0], b[0]), Source("new", a[1], b[1]))
    np.testing.assert_allclose(frame["subspace_overlap_chance"], R / D_IN)
    np.testing.assert_allclose(frame["output_overlap_chance"], R / D_OUT)
    # 128 pairs of subspaces: the mean's standard error is below 0.01
    assert abs(frame["subspace_overlap_adjusted"].mean()) < 0.04
    assert abs(frame["output_overlap_adjusted"].mean()) < 0.04


def test_everything_agrees_with_dense_matrices() -> None:
    old = source(scaling=1.5)
    new = moved(old, 0.4)
    frame = table(old, new, "expert").set_index(["site", "expert"])
    for n, site in enumerate(old.sites):
        for e in range(E):
            row = frame.loc[(site.name, e)]
            angles = np.sort(subspace_angles(old.a[n, e].T, new.a[n, e].T))
            np.testing.assert_allclose(row["principal_angles"], angles, atol=1e-6)
            assert row["largest_angle"] == pytest.approx(angles[-1], abs=1e-6)
            assert row["grassmann_distance"] == pytest.approx(np.sqrt((angles**2).mean()), abs=1e-6)
            assert row["subspace_overlap"] == pytest.approx((np.cos(angles) ** 2).mean(), abs=1e-6)
            columns = subspace_angles(old.b[n, e], new.b[n, e])
            assert row["output_overlap"] == pytest.approx((np.cos(columns) ** 2).mean(), abs=1e-6)
            first, second = 1.5 * old.b[n, e] @ old.a[n, e], 2.0 * new.b[n, e] @ new.a[n, e]
            norm0, norm1 = np.linalg.norm(first), np.linalg.norm(second)
            assert row["update_norm_anchor"] == pytest.approx(norm0, rel=1e-6)
            assert row["update_norm"] == pytest.approx(norm1, rel=1e-6)
            assert row["update_difference"] == pytest.approx(np.linalg.norm(second - first), rel=1e-6)
            assert row["update_change"] == pytest.approx(np.linalg.norm(second - first) / norm0, rel=1e-6)
            assert row["update_cosine"] == pytest.approx((first * second).sum() / norm0 / norm1, rel=1e-6)
            sigma = np.linalg.svd(second, compute_uv=False)
            share = sigma[:R] / sigma[:R].sum()
            assert row["update_rank"] == np.linalg.matrix_rank(second)
            assert row["effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
            w0, w1 = old.router[n, e], new.router[n, e]
            cosine = w0 @ w1 / np.linalg.norm(w0) / np.linalg.norm(w1)
            assert row["router_row_cosine"] == pytest.approx(cosine, rel=1e-9)
            change = np.linalg.norm(w1 - w0) / np.linalg.norm(w0)
            assert row["router_row_change"] == pytest.approx(change, rel=1e-9)
            updates_a = np.linalg.norm(new.a[n, e] - old.a[n, e], axis=1) / np.linalg.norm(old.a[n, e], axis=1)
            np.testing.assert_allclose(row["rank_update_a_pathways"], updates_a, rtol=1e-9)
            updates_b = np.linalg.norm(new.b[n, e] - old.b[n, e], axis=0) / np.linalg.norm(old.b[n, e], axis=0)
            assert row["rank_update_b"] == pytest.approx(updates_b.mean(), rel=1e-9)


def test_small_changes_of_an_update_keep_their_digits() -> None:
    A, B = normal(0, R, D_IN), normal(1, D_OUT, R)
    move = normal(2, R, D_IN)
    got = updates.update_change(A, B, A + 1e-10 * move, B).difference
    step = (A + 1e-10 * move) - A
    assert float(got) == pytest.approx(np.linalg.norm(B @ step), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), both=st.booleans())
def test_gauge_invariant_columns_do_not_see_a_change_of_basis(seed: int, both: bool) -> None:
    old = source(seed=seed)
    new = moved(old, 0.5, seed + 7)
    plain = table(old, new, "expert")

    def turned(item: Source, number: int) -> Source:
        # orthogonal times a diagonal: invertible, and far enough from singular to compare at 1e-6
        q = np.linalg.qr(normal(seed + number, S, E, R, R))[0]
        scale = np.random.default_rng(seed + number).uniform(0.3, 3.0, (S, E, R))
        G = q * scale[..., None, :]
        return Source(item.name, G @ item.a, item.b @ np.linalg.inv(G), item.router)

    after = table(turned(old, 100) if both else old, turned(new, 200), "expert")
    within = set(plain.attrs["within_run"])
    assert {"rank_update_a", "rank_update_b", "router_row_change"} <= within
    invariant = [name for name in plain.select_dtypes("number").columns if name not in within]
    assert {"subspace_overlap", "update_change", "effective_rank", "output_overlap_adjusted"} <= set(invariant)
    for name in invariant:
        np.testing.assert_allclose(after[name], plain[name], atol=1e-6, rtol=1e-6, err_msg=name)
    assert not np.allclose(after["rank_update_a"], plain["rank_update_a"])


def test_a_vector_added_to_all_router_rows_moves_no_softmax_gate() -> None:
    old = source()
    new = Source("new", old.a, old.b, old.router + normal(5, S, 1, D_IN))
    frame = table(old, new)
    assert (frame["router_change"] > 0.3).all()
    np.testing.assert_allclose(frame["router_change_centred"], 0.0, atol=1e-14)


def test_experts_without_update_are_silent_and_the_single_slot_is_named() -> None:
    old = source()
    b = np.zeros_like(old.b)
    b[:, 2] = old.b[:, 2]
    slot = Source("slot", old.a, b, old.router)
    frame = weight_table([slot], [Comparison(0, 0)])
    assert (frame["silent_experts"] == E - 1).all()
    assert "anchor" not in frame
    assert "update_change" not in frame
    (note,) = (text for text in frame.attrs["notes"] if "silent" in text)
    assert "only expert 2 of 4" in note
    rows = weight_table([slot], [Comparison(0, 0)], "expert")
    assert rows["silent"].tolist() == [1.0, 1.0, 0.0, 1.0] * S
    assert rows.loc[rows["silent"] == 1, "effective_rank"].isna().all()
    assert not any("silent" in text for text in weight_table([old], [Comparison(0, 0)]).attrs["notes"])


def test_a_start_checkpoint_has_undefined_ratios_with_their_reason() -> None:
    new = source()
    start = Source("start", new.a, np.zeros_like(new.b), new.router)
    frame = table(start, new)
    assert frame["update_change"].isna().all()
    assert frame["output_overlap"].isna().all()
    np.testing.assert_allclose(frame["update_difference"], frame["update_norm"], rtol=1e-12)
    assert any(text.startswith("update_change: the update at the anchor is 0") for text in frame["undefined"][0])
    backwards = table(new, start)
    assert any("no expert has an update" in note for note in backwards.attrs["notes"])


def test_broken_values_make_their_site_undefined_and_no_other() -> None:
    old, new = source(), moved(source())
    new.a[1, 2, 0, 0] = np.nan
    frame = table(old, new)
    numbers = frame.select_dtypes("number").drop(columns=["layer", "experts"])
    assert numbers.iloc[1].isna().all()
    assert not numbers.iloc[[0, 2]].isna().any(axis=None)
    assert "NaN or infinite" in frame["undefined"][1][0]
    assert any("NaN or infinite" in note and "layers.1.down" in note for note in frame.attrs["notes"])


def test_levels_average_experts_then_sites() -> None:
    old = source()
    new = moved(old)
    experts, sites = table(old, new, "expert"), table(old, new)
    means = experts.groupby("site", sort=False)["update_change"].mean()
    np.testing.assert_allclose(sites["update_change"], means, rtol=1e-12)
    kinds = table(old, new, "kind").set_index("kind")
    assert kinds.loc["up", "sites"] == 2
    assert kinds.loc["up", "update_change"] == pytest.approx(sites["update_change"][[0, 2]].mean())
    pd.testing.assert_frame_equal(summarise_weights(sites, "layer"), table(old, new, "layer"))
    assert kinds.attrs["missing"] == MISSING


def test_blocks_do_not_change_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    old = source()
    new = moved(old)
    whole = table(old, new, "expert")
    monkeypatch.setattr("driftlens.analysis.weights._BLOCK_ELEMENTS", 1)
    old.reads.clear()
    pd.testing.assert_frame_equal(table(old, new, "expert"), whole, rtol=1e-12)
    assert old.reads == [0, 1, 2], "every site is read once"


def test_most_moved_sites_come_first() -> None:
    old = source()
    new = Source("new", old.a.copy(), old.b.copy(), old.router)
    new.b[2] *= 3
    new.b[0] *= 1.5
    assert most_moved(table(old, new), 2)["layer"].tolist() == [2, 0]


def test_magnitudes_of_dora_are_compared() -> None:
    m = np.abs(normal(3, S, D_OUT))
    old, new = source(magnitude=m), source("new", magnitude=1.25 * m)
    np.testing.assert_allclose(table(old, new)["magnitude_change"], 0.25, rtol=1e-12)


def test_sites_without_a_router_among_others_have_undefined_router_drift() -> None:
    def joined(name: str, seed: int) -> Source:
        item, bare = source(name, seed), source(name, seed)
        item.sites, item.extras = item.sites[:2] + bare.sites[2:], [(E, 0), (E, 0), (0, 0)]
        whole = item.read

        def read(positions: Sequence[int]) -> Factors:
            found = whole(positions)
            return found if 2 not in positions else Factors(found.a, found.b, found.scaling)

        item.read = read  # type: ignore[method-assign]
        return item

    frame = table(joined("old", 0), joined("new", 5))
    assert frame["router_change"].isna().tolist() == [False, False, True]
    assert frame["undefined"][0] == []
    assert any(text.startswith("router_change: the site has no router") for text in frame["undefined"][2])


def test_other_semantics_are_pointed_out() -> None:
    frame = table(source(semantics="product_of_sums"), source("new", 5, semantics="product_of_sums"))
    assert any("cross terms" in note for note in frame.attrs["notes"])


def test_checkpoints_with_other_sites_or_shapes_are_refused() -> None:
    old = source()
    fewer = Source("few", old.a[:2], old.b[:2], old.router[:2])
    with pytest.raises(
        FormatError, match=r"old has 3 sites and few has 2: 1 only in old \(for example layers\.2\.up\)"
    ):
        table(old, fewer)
    with pytest.raises(FormatError, match=r"layers\.0\.up differs in shape: old has 4 experts of rank 3.*rank 2"):
        table(old, Source("thin", old.a[:, :, :2], old.b[..., :2], old.router))
    with pytest.raises(FormatError, match=r"a router; .*no router"):
        table(old, Source("bare", old.a, old.b))
    with pytest.raises(ConfigError, match="kind, layer, site, expert"):
        table(old, old, "token")
    with pytest.raises(ConfigError, match="at least one"):
        weight_table([old], [])


def test_update_functions_refuse_what_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="same shape"):
        updates.update_change(normal(0, 3, 5), normal(1, 4, 3), normal(2, 2, 5), normal(3, 4, 2))
    with pytest.raises(ConfigError, match="same rows"):
        updates.row_drift(normal(0, 3, 5), normal(0, 3, 6))


def test_rank_of_an_update_is_that_of_its_product() -> None:
    A, B = normal(0, 3, D_IN), normal(1, D_OUT, 3)
    B[:, 2] = B[:, 0]
    A[2] = -A[0]  # the third pathway undoes the first
    spectrum = updates.update_spectrum(A, B, orthonormal_rows(A), orthonormal_rows(B.T), -3.0)
    np.testing.assert_allclose(spectrum, np.linalg.svd(-3.0 * B @ A, compute_uv=False)[:3], atol=1e-9)
    assert int(updates.numerical_rank(spectrum)) == np.linalg.matrix_rank(B @ A) == 1
    assert float(updates.effective_rank(np.array([2.0, 2.0, 0.0]))) == pytest.approx(2.0)
    assert int(updates.numerical_rank(np.zeros(3))) == 0


def test_every_column_is_defined() -> None:
    m = np.abs(normal(3, S, D_OUT))
    old, new = source(magnitude=m), source("new", 4, magnitude=m)
    found = set(table(old, new)) | set(table(old, new, "expert"))
    labels = {"anchor", "checkpoint", "site", "layer", "kind", "expert", "experts", "silent", "undefined"}
    named = {name.removesuffix("_chance").removesuffix("_pathways") for name in found - labels}
    assert named == set(WEIGHT_MEASURES)
    for name, entry in WEIGHT_MEASURES.items():
        assert entry.name == name
        assert all((entry.title, entry.formula, entry.range, entry.undefined)), name
        assert entry.within_run == (entry.invariance == "none"), name
