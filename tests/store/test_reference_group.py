"""The reference's group in a recording: the same axes and readers as the pass's own, thinned and checked alike."""

from __future__ import annotations

import random
import re
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401 - xarray needs the filters
import numpy as np
import pytest
import xarray as xr

from driftlens.errors import FormatError
from driftlens.store import (
    RecordingWriter,
    ReferenceGroup,
    estimate_bytes,
    group_sites,
    open_recording,
    thin_recording,
    verify_recording,
)
from driftlens.store.schema import REFERENCE_GRAMS, stats_shapes, value_shapes
from tests.store import _make as make

PREFIX = "reference/"
Arrays = dict[str, np.ndarray]


def with_reference(tokens: tuple[int, ...] = (7, 0, 5), absent: bool = True) -> tuple[make.Content, list[Arrays]]:
    """Content with a reference, and its Gram matrices; the reference lacks the first site of every group."""
    c = make.content([make.site(0), make.site(1, 4, 3), make.site(2), make.site(3, 2, 0), make.site(4, 2, 0)], tokens)
    rng, grams = np.random.default_rng(5), []
    counts = 10.0 + np.array(tokens)
    for number, members in enumerate(group_sites(c.sites)):
        first = c.sites[members[0]]
        extent = len(members), first.num_experts, first.rank

        def gates(shape: tuple[int, ...], members: int = len(members)) -> np.ndarray:
            array = rng.dirichlet(np.ones(shape[-1]), size=shape[:-1])
            if absent and members > 1:
                array[0] = 0
            return array

        for probe, n in zip(c.probes, tokens, strict=True):
            for name, shape in value_shapes(extent[0], n, *extent[1:], reference=True).items():
                if name.startswith(PREFIX):
                    array = gates(shape) if name.endswith("gate") else rng.standard_normal(shape)
                    c.values[probe][number][name] = array.astype(np.float32)
        for name, shape in stats_shapes(extent[0], len(tokens), *extent[1:], reference=True).items():
            if name.startswith(PREFIX):
                c.stats[number][name] = (
                    gates(shape) * counts[:, None] if name.endswith("gate_sum") else rng.random(shape)
                )
        flat = first.num_experts * first.rank
        grams.append({name: rng.standard_normal((len(members), flat, flat)) for name in REFERENCE_GRAMS if flat})
    c.meta |= {"reference": "01-parity", "reference_sha256": "ab" * 32}
    return c, grams


def write(path: Path, c: make.Content, grams: list[Arrays], batch: int = 1000) -> Path:
    with RecordingWriter(
        path, sites=c.sites, probes=c.probes, sample_ids=c.sample_ids, meta=c.meta, n_tokens=c.n_tokens, reference=True
    ) as writer:
        make.fill(writer, c, batch=batch)
        for number, arrays in enumerate(grams):
            writer.set_reference_grams(number, arrays)
    return path


@pytest.mark.parametrize("batch", [1, 1000])
def test_what_is_written_is_what_is_read(batch: int, tmp_path: Path) -> None:
    c, grams = with_reference()
    path = write(tmp_path / "a.h5", c, grams, batch)
    assert verify_recording(path) == []
    with open_recording(path) as recording:
        assert recording.has_reference
        for number, group in enumerate(recording.groups):
            found = recording.reference(number)
            assert isinstance(found, ReferenceGroup)
            assert found is recording.reference(group)
            for probe in c.probes:
                for name, array in c.values[probe][number].items():
                    side = found if name.startswith(PREFIX) else group
                    seen = side.read(name.removeprefix(PREFIX), probe)
                    np.testing.assert_array_equal(seen, array.astype(np.float16))
                # what belongs to the pass is the pass's
                np.testing.assert_array_equal(found.read("base_norm", probe), group.read("base_norm", probe))
            for name, array in c.stats[number].items():
                side = found if name.startswith(PREFIX) else group
                np.testing.assert_array_equal(side.stats[name.removeprefix(PREFIX)], array)
            for name in ("count", "base_sq"):
                np.testing.assert_array_equal(found.stats[name], group.stats[name])
            if group.rank:
                assert found.grams is not None
                for name, array in grams[number].items():
                    np.testing.assert_array_equal(found.grams[name][...], array)
            else:
                assert found.grams is None
                assert np.isnan(found.stats["drift_sq"]).all()
                assert np.isnan(found.expert_norm).all()
                assert found.pathway.shape[-1] == 0


def test_a_recording_without_a_reference_has_none(tmp_path: Path) -> None:
    with open_recording(make.write(tmp_path / "a.h5", make.content())) as recording:
        assert not recording.has_reference
        assert [recording.reference(group) for group in recording.groups] == [None] * len(recording.groups)


def test_other_tools_read_it_with_labels(tmp_path: Path) -> None:
    c, grams = with_reference()
    path = write(tmp_path / "a.h5", c, grams)
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        assert tree["group_0/reference/gate"].dims == ("site", "token", "expert")
        assert tree["group_0/reference/pathway"].dims == ("site", "token", "expert", "rank")
        assert tree["group_0/reference/stats/drift_sq"].dims == ("site", "probe", "expert")
        assert tree["group_0/reference/grams/cross"].dims == ("site", "pathway", "pathway_col")
        drift = tree["group_0/reference/stats/drift_sq"].sel(site=2, probe="task-2").values
        np.testing.assert_array_equal(drift, c.stats[0]["reference/drift_sq"][1, 2])


def test_thinning_keeps_the_references_sums_grams_and_the_rows_of_kept_tokens(tmp_path: Path) -> None:
    c, grams = with_reference((40, 25))
    path = write(tmp_path / "a.h5", c, grams)
    thin_recording(path, tmp_path / "thin.h5", tokens_per_sample=4)
    assert verify_recording(tmp_path / "thin.h5") == []
    with open_recording(path) as full, open_recording(tmp_path / "thin.h5") as thin:
        assert thin.n_tokens < full.n_tokens
        for old, new in zip(full.groups, thin.groups, strict=True):
            assert old.reference is not None
            assert new.reference is not None
            for name in old.reference.stats:
                np.testing.assert_array_equal(new.reference.stats[name], old.reference.stats[name])
            for name, array in (old.reference.grams or {}).items():
                np.testing.assert_array_equal((new.reference.grams or {})[name][...], array[...])
            for probe in full.probes:
                # a kept token keeps its own row of the reference beside its row of the pass
                rows = {gate.tobytes(): n for n, gate in enumerate(np.swapaxes(old.read("gate", probe), 0, 1))}
                kept = [rows[gate.tobytes()] for gate in np.swapaxes(new.read("gate", probe), 0, 1)]
                seen, whole = new.reference.read("gate", probe), old.reference.read("gate", probe)
                np.testing.assert_array_equal(seen, whole[:, kept])


def test_size_is_foreseen(tmp_path: Path) -> None:
    c, grams = with_reference((300, 200))
    path = write(tmp_path / "a.h5", c, grams)
    foreseen, bare = (estimate_bytes(c.sites, c.n_tokens, len(c.probes), reference=flag) for flag in (True, False))
    added = sum(
        array.astype(np.float16).nbytes
        for probe in c.probes
        for group in c.values[probe]
        for name, array in group.items()
        if name.startswith(PREFIX)
    )
    added += sum(array.nbytes for group in c.stats for name, array in group.items() if name.startswith(PREFIX))
    added += sum(array.nbytes for group in grams for array in group.values())
    assert foreseen - bare == added
    with h5py.File(path) as file:
        assert file["group_0/reference/gate"].dtype == np.float16


def test_what_is_missing_is_refused_while_writing(tmp_path: Path) -> None:
    c, grams = with_reference()
    with pytest.raises(FormatError, match=r"Gram matrices of group 0 were never given; call set_reference_grams"):
        write(tmp_path / "a.h5", c, [])
    with pytest.raises(FormatError, match=r"group 0 was given anchor .*; expected anchor \[2, 6, 6\], cross .*current"):
        write(tmp_path / "a.h5", c, [{"anchor": grams[0]["anchor"]}])
    del c.values["task-0"][0]["reference/pathway"]
    with pytest.raises(FormatError, match=r"group 0 was given .*; expected .*reference/pathway \[2, 7, 3, 2\]"):
        write(tmp_path / "a.h5", c, grams)
    plain = make.content([make.site(0)])
    with (
        pytest.raises(FormatError, match="group 0 was given cross"),
        RecordingWriter(
            tmp_path / "a.h5", sites=plain.sites, probes=plain.probes, sample_ids=plain.sample_ids, meta=plain.meta
        ) as writer,
    ):
        writer.set_reference_grams(0, {"cross": np.zeros((1, 6, 6))})
    assert not (tmp_path / "a.h5").exists()


@pytest.mark.parametrize(
    ("where", "value", "what"),
    [
        ("group_0/reference/gate", 0.7, "/group_0/reference/gate has gate rows that do not sum to 1"),
        ("group_0/reference/pathway", np.nan, "/group_0/reference/pathway has values that are not finite"),
        (
            "group_0/reference/stats/drift_sq",
            np.inf,
            "/group_0/reference/stats/drift_sq has values that are not finite",
        ),
        (
            "group_0/reference/stats/gate_sum",
            1e4,
            "/group_0/reference/stats/gate_sum of site .* does not add up to count",
        ),
        ("group_0/reference/grams/cross", np.nan, "/group_0/reference/grams/cross has values that are not finite"),
    ],
)
def test_wrong_values_are_reported_by_name(where: str, value: float, what: str, tmp_path: Path) -> None:
    c, grams = with_reference()
    path = write(tmp_path / "a.h5", c, grams)
    with h5py.File(path, "r+") as file:
        file[where][1, 0] = value
    (problem,) = verify_recording(path)
    assert re.search(what, problem.what)


def test_a_reference_that_is_incomplete_or_nameless_is_reported(tmp_path: Path) -> None:
    c, grams = with_reference()
    path = write(tmp_path / "a.h5", c, grams)
    with h5py.File(path, "r+") as file:
        del file["group_1/reference"]
        del file.attrs["reference"]
        file.move("group_0/reference/grams/anchor", "group_0/reference/grams/other")
    found = "\n".join(problem.what for problem in verify_recording(path))
    assert "/group_1/reference exists in some groups only" in found
    assert "the attribute 'reference' does not say whose parameters" in found
    assert "/group_0/reference/grams/anchor is missing" in found
    assert "/group_0/reference/grams/other is not part of schema" in found


def test_a_link_in_place_of_the_reference_is_not_followed(tmp_path: Path) -> None:
    c, grams = with_reference()
    path = write(tmp_path / "a.h5", c, grams)
    with h5py.File(path, "r+") as file:
        del file["group_0/reference/gate"]
        file["group_0/reference/gate"] = h5py.ExternalLink("elsewhere.h5", "/secret")
    with (
        open_recording(path) as recording,
        pytest.raises(FormatError, match="/group_0/reference/gate is an external link"),
    ):
        recording.groups[0].reference.gate  # type: ignore[union-attr]  # noqa: B018


def everything(path: Path) -> list[bytes]:
    found: list[bytes] = []
    with open_recording(path) as recording:
        for group in recording.groups:
            seen = group.reference
            found.append(b"no reference" if seen is None else b"reference")
            if seen is None:
                continue
            for probe in recording.probes:
                found += [seen.read(name, probe).tobytes() for name in ("gate", "pathway", "expert_norm", "base_norm")]
            found += [array.tobytes() for array in seen.stats.values()]
            found += [array[...].tobytes() for array in (seen.grams or {}).values()]
    return found


def test_no_flipped_byte_changes_a_number_silently(tmp_path: Path) -> None:
    c, grams = with_reference((3, 2))
    path = write(tmp_path / "a.h5", c, grams)
    good, content = path.read_bytes(), everything(path)
    with h5py.File(path) as file:
        inside = [
            file[f"group_0/reference/{name}"].id.get_chunk_info(0).byte_offset
            for name in ("gate", "pathway", "stats/drift_sq", "grams/cross")
        ]
    rng = random.Random(0)
    for position in [offset + 14 for offset in inside] + [rng.randrange(len(good)) for _ in range(60)]:
        data = bytearray(good)
        data[position] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        if position - 14 in inside:
            with pytest.raises(FormatError, match="reference"):
                everything(path)
            continue
        try:
            assert everything(path) == content, position
        except FormatError:
            assert verify_recording(path), position
