"""The file of a cell: written whole or not at all, read by xarray, and refused when damaged."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

from driftlens.analysis.attribution_files import read_cell
from driftlens.attribution.depth import DepthShapley, Player, Restores
from driftlens.attribution.ledger import Ledger, TokenEntries
from driftlens.attribution.options import AttributionOptions, covers
from driftlens.attribution.results import (
    depth_table,
    ledger_tables,
    restores_table,
    scores_table,
    swaps_table,
    write_cell,
)
from driftlens.errors import ConfigError, FormatError, NotFoundError, StorageError
from driftlens.store import SiteInfo

SAMPLES = ("a", "b", "c")


def site(name: str, experts: int, layer: int) -> SiteInfo:
    return SiteInfo(name, layer, "up_proj", experts, 2, 8, 8, 1.0, "softmax")


def made_ledger(seed: int = 0) -> Ledger:
    rng = np.random.default_rng(seed)
    entries = rng.normal(size=(3, 2, 2, 3))
    entries[:, 1, :, 2] = 0.0  # the second site has two experts
    nll = rng.uniform(1, 2, size=(2, 3))
    token = np.arange(7)
    tokens = TokenEntries(
        rng.normal(size=(7, 2)), np.array([0, 0, 0, 1, 1, 2, 2]), np.array([0, 1, 2, 0, 1, 0, 1]), token, token % 3
    )
    return Ledger(SAMPLES, ("x", "y"), entries, nll[0], nll[1], tokens, (0.0, 1.0), 8, 8, (0.1,))


def made_tables(seed: int = 0) -> dict[str, xr.Dataset]:
    rng = np.random.default_rng(seed)
    one = rng.integers(0, 2, size=(5, 3, 3)).astype(float)
    booked = ledger_tables(made_ledger(seed), [site("x", 3, 0), site("y", 2, 1)])
    players = Player(0, 0, "both", (0,)), Player(1, 1, "both", (1,))
    error = np.array([0.1, 0.2])
    depth = DepthShapley(SAMPLES, players, rng.normal(size=(2, 3)), error, np.zeros(3), np.ones(3), 16, 0, 4)
    restores = Restores(SAMPLES, ("x", "y"), np.ones(3), rng.normal(size=(2, 3, 3)), 7)
    return {
        "scores": scores_table(SAMPLES, one[0], one[4]),
        **booked,
        "swaps": swaps_table(SAMPLES, dict(zip(("aa", "ca", "ac", "cc"), one[1:], strict=True)), one[0]),
        "depth": depth_table(depth),
        "restores": restores_table(restores),
    }


ABOUT = {"task": "t", "anchor_index": 1, "settings": {"nodes": 8, "tolerance": None}, "versions": {"torch": "2"}}


def test_what_is_written_is_read_back_with_its_attributes(tmp_path: Path) -> None:
    tables = made_tables()
    write_cell(tmp_path / "cell.h5", tables, ABOUT)
    found = read_cell(tmp_path / "cell.h5")
    assert {key: found.about[key] for key in ABOUT} == ABOUT
    assert list(found.tables) == ["scores", "ledger", "tokens", "swaps", "depth", "restores"]
    for name, table in tables.items():
        assert found.tables[name].identical(table), name
    assert list(tmp_path.iterdir()) == [tmp_path / "cell.h5"]


def test_xarray_reads_the_file_without_driftlens(tmp_path: Path) -> None:
    write_cell(tmp_path / "cell.h5", made_tables(), ABOUT)
    with xr.open_datatree(tmp_path / "cell.h5", engine="h5netcdf") as tree:
        entries = tree["ledger"]["entries"]
        assert entries.dims == ("sample", "site", "part", "expert")
        assert entries.sel(site="x", part="router").to_numpy() == pytest.approx(made_ledger().entries[:, 0, 0])
        assert tree["ledger"]["nll_current"].attrs["units"] == "nats"
        assert tree.attrs["task"] == "t"


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.h5", "two.h5"):
        write_cell(tmp_path / name, made_tables(), ABOUT)
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()


def test_a_failed_write_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cell.h5"
    write_cell(path, made_tables(), ABOUT)
    before = path.read_bytes()
    monkeypatch.setattr("driftlens.attribution.results.read_cell", lambda partial: read_cell(path))
    with pytest.raises(StorageError, match="could not be read back"):
        write_cell(path, made_tables(1), ABOUT)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[: len(raw) // 2] = bytes(len(raw) // 2)
    path.write_bytes(bytes(raw))


def _drop(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["ledger"]


def _newer(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["driftlens_attribution"] = 99


def _link(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["ledger/entries"]
        file["ledger/entries"] = h5py.ExternalLink("elsewhere.h5", "/entries")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_flip, "cannot be read"),
        (_drop, "ledger cannot be read"),
        (_newer, "schema 99"),
        (_link, "ledger cannot be read"),
    ],
)
def test_a_damaged_file_is_refused_with_advice(tmp_path: Path, damage, said: str) -> None:
    path = tmp_path / "cell.h5"
    write_cell(path, made_tables(), ABOUT)
    damage(path)
    with pytest.raises(FormatError, match=said) as caught:
        read_cell(path)
    assert "driftlens attribute" in str(caught.value)


def test_a_missing_file_and_a_foreign_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        read_cell(tmp_path / "none.h5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(FormatError, match="no schema"):
        read_cell(tmp_path / "foreign.h5")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tolerance": 0.0}, "tolerance is 0"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"nodes": 0}, "nodes is 0"),
        ({"max_nodes": 2}, "max_nodes is 2"),
        ({"depth": -1}, "depth is -1"),
        ({"permutations": 3}, "permutations is 3"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_options_out_of_range_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AttributionOptions(**wrong)


def test_several_wrong_options_are_one_message() -> None:
    with pytest.raises(ConfigError, match=r"nodes is 0.*tolerance is -1"):
        AttributionOptions(nodes=0, tolerance=-1)


def test_a_file_covers_what_leaves_parts_of_it_out_but_no_other_settings() -> None:
    full = AttributionOptions(restores=True).settings(threads=1)
    assert covers(full, AttributionOptions(swaps=False, depth=0).settings(threads=1))
    for other in (
        AttributionOptions(nodes=9),
        AttributionOptions(tolerance=0.1),
        AttributionOptions(depth=3),
        AttributionOptions(batch_size=2),
    ):
        assert not covers(full, other.settings(threads=1)), other
    assert not covers(full, AttributionOptions().settings(threads=2))
    assert not covers(AttributionOptions(swaps=False).settings(), AttributionOptions().settings())
