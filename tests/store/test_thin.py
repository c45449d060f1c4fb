"""A thinned recording keeps exact sums, fewer tokens, and Gram matrices that stand in for the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from driftlens.errors import ConfigError, FormatError, NotFoundError, UnknownNameError
from driftlens.store import Grams, gram_matrices, open_recording, thin_recording, verify_recording
from tests.store import _make as make


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    sites = [make.site(0), make.site(1, 4, 3), make.site(2), make.site(3, 2, 0)]
    return [make.write(tmp_path / f"{i:02d}.h5", make.content(sites, (40, 25), seed=i)) for i in range(3)]


def test_thinned_copy(run: list[Path], tmp_path: Path) -> None:
    with open_recording(run[0]) as a, open_recording(run[1]) as b, open_recording(run[2]) as c:
        grams = gram_matrices(c, [("00-start", a), ("01-x", b)], name="02-y")
        thin_recording(run[2], tmp_path / "thin.h5", tokens_per_sample=4, grams=grams)
        with open_recording(tmp_path / "thin.h5") as thin:
            assert thin.sites == c.sites
            assert thin.meta == c.meta | {"thinned": True}
            for probe in c.probes:
                assert thin.sample_ids(probe) == c.sample_ids(probe)
                old, new = c.tokens(probe), thin.tokens(probe)
                assert np.bincount(new["sample"]).tolist() == np.minimum(np.bincount(old["sample"]), 4).tolist()
            for old_group, new_group in zip(c.groups, thin.groups, strict=True):
                for name in old_group.stats:
                    np.testing.assert_array_equal(new_group.stats[name], old_group.stats[name])
            assert thin.gram_checkpoints == ["00-start", "01-x", "02-y"]
            for label, anchor in (("00-start", a), ("01-x", b), ("02-y", c)):
                check_grams(thin, anchor, c, label)
            with pytest.raises(NotFoundError, match=r"has no weights: it was thinned. Use Recording.grams"):
                thin.weights(0)
            with pytest.raises(UnknownNameError, match=r"Unknown checkpoint '01-z'. Did you mean '01-x'"):
                thin.grams("01-z")
            assert c.grams("00-start") is None
    assert verify_recording(tmp_path / "thin.h5") == []
    with xr.open_datatree(tmp_path / "thin.h5", engine="h5netcdf") as tree:
        assert tree["grams/group_0/b_gram"].dims == ("site", "checkpoint", "pathway", "pathway_col")
        assert tree["grams/checkpoint"].values.tolist() == ["00-start", "01-x", "02-y"]


def check_grams(thin, anchor, current, label) -> None:  # type: ignore[no-untyped-def]  # three recordings and a text
    grams = thin.grams(label)
    assert grams.keys() == {0, 1}  # the group without pathways has none
    for site in (0, 1, 2):
        group, row = thin.locate(site)
        info = thin.sites[site]
        A0, A1 = anchor.weights(site)["A"].astype(float), current.weights(site)["A"].astype(float)
        B0, B1 = anchor.weights(site)["B"].astype(float), current.weights(site)["B"].astype(float)
        for e in range(info.num_experts):
            np.testing.assert_allclose(grams[group.index]["a_gram"][row, e], A0[e] @ A1[e].T, rtol=1e-12)
            for f in range(info.num_experts):
                rows, cols = slice(e * info.rank, (e + 1) * info.rank), slice(f * info.rank, (f + 1) * info.rank)
                found = grams[group.index]["b_gram"][row, rows, cols]
                np.testing.assert_allclose(found, B0[e].T @ B1[f], rtol=1e-12, atol=1e-12)


def test_all_checkpoints_of_a_run_keep_the_same_tokens(tmp_path: Path) -> None:
    kept = []
    for seed in (0, 1):
        c = make.content([make.site(0)], (40, 25), seed=seed)
        c.columns = make.content([make.site(0)], (40, 25), seed=9).columns
        make.write(tmp_path / f"{seed}.h5", c)
        thin_recording(tmp_path / f"{seed}.h5", tmp_path / f"thin{seed}.h5", tokens_per_sample=3, seed=5)
        with open_recording(tmp_path / f"thin{seed}.h5") as thin:
            kept.append([thin.tokens(probe)["token_id"].tolist() for probe in thin.probes])
    assert kept[0] == kept[1]


def test_a_mask_keeps_exactly_its_tokens(run: list[Path], tmp_path: Path) -> None:
    keep = np.random.default_rng(0).random(65) < 0.3
    thin_recording(run[0], tmp_path / "thin.h5", keep_tokens=keep)
    with open_recording(run[0]) as full, open_recording(tmp_path / "thin.h5") as thin:
        assert thin.n_tokens == keep.sum()
        for group, other in zip(full.groups, thin.groups, strict=True):
            np.testing.assert_array_equal(group.gate[...][:, keep], other.gate[...])
            np.testing.assert_array_equal(np.asarray(group.pathway)[:, keep], np.asarray(other.pathway))


def test_wrong_requests(run: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "thin.h5"
    with pytest.raises(ConfigError, match="Give either tokens_per_sample or keep_tokens"):
        thin_recording(run[0], out)
    with pytest.raises(ConfigError, match=r"keep_tokens has shape \[3\], expected \[65\]"):
        thin_recording(run[0], out, keep_tokens=np.ones(3, dtype=bool))
    wrong = Grams(["00-start"], {0: {"a_gram": np.zeros((2, 1, 3, 2, 2)), "b_gram": np.zeros((2, 1, 5, 5))}})
    with pytest.raises(
        FormatError, match=r"group 0 was given .*b_gram \[2, 1, 5, 5\]; expected .*b_gram \[2, 1, 6, 6\]"
    ):
        thin_recording(run[0], out, tokens_per_sample=1, grams=wrong)
    make.write(tmp_path / "other.h5", make.content([make.site(0)], (2,)))
    with (
        open_recording(run[0]) as a,
        open_recording(tmp_path / "other.h5") as b,
        pytest.raises(FormatError, match="were recorded at different sites"),
    ):
        gram_matrices(a, [("00-start", b)], name="01-x")
    assert not out.exists()
