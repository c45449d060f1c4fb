"""The writer keeps nothing that is wrong, incomplete or interrupted, and says what it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from driftlens.errors import DriftLensError, FormatError, SiteError, StorageError, UnknownNameError
from driftlens.store import RecordingWriter, SiteInfo, open_recording
from driftlens.store import writer as writer_module
from driftlens.store.schema import Problem
from tests.store import _make as make

SMALL = [make.site(0), make.site(1, 2, 0)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def open_writer(path: Path, c: make.Content, **options: Any) -> RecordingWriter:
    return RecordingWriter(path, sites=c.sites, probes=c.probes, sample_ids=c.sample_ids, meta=c.meta, **options)


def fail_inside(path: Path, c: make.Content, error: BaseException) -> None:
    with open_writer(path, c, overwrite=True) as writer:
        make.fill(writer, c)
        raise error


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), MemoryError(), SystemExit()])
def test_an_exception_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    c = make.content(SMALL, (3, 2))
    with pytest.raises(type(error)):
        fail_inside(tmp_path / "a.h5", c, error)
    assert names(tmp_path) == []
    before = make.write(tmp_path / "a.h5", c).read_bytes()
    with pytest.raises(type(error)):
        fail_inside(tmp_path / "a.h5", make.content(SMALL, (3, 2), seed=1), error)
    assert names(tmp_path) == ["a.h5"]
    assert (tmp_path / "a.h5").read_bytes() == before


def test_an_existing_recording_is_replaced_only_when_asked(tmp_path: Path) -> None:
    c = make.content(SMALL, (3, 2))
    path = make.write(tmp_path / "a.h5", c)
    before = path.read_bytes()
    with pytest.raises(StorageError, match=r"a\.h5 exists already and was left as it is"):
        make.write(path, make.content(SMALL, (3, 2), seed=1))
    assert path.read_bytes() == before
    with open_recording(path) as reader:  # open while it is replaced: the old one stays readable
        make.write(path, make.content(SMALL, (4, 2), seed=1), overwrite=True)
        assert reader.gate(0, 0).shape == (3, 3)
    with open_recording(path) as reader:
        assert reader.gate(0, 0).shape == (4, 3)
    (tmp_path / "b.h5.partial").write_bytes(b"half of something")
    make.write(tmp_path / "b.h5", c)
    assert names(tmp_path) == ["a.h5", "b.h5"]


def test_what_does_not_verify_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "verify_recording", lambda path: [Problem(str(path), "a bit flipped.")])
    with pytest.raises(
        FormatError, match=r"did not verify after writing and was not kept: a bit flipped.* Check the disk"
    ):
        make.write(tmp_path / "a.h5", make.content(SMALL, (3, 2)))
    assert names(tmp_path) == []


def test_a_disk_that_is_too_small_is_refused_before_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with (
        pytest.raises(StorageError, match=r"Cannot write .*a\.h5: .* bytes are needed, 100 bytes are free"),
        open_writer(tmp_path / "a.h5", make.content(SMALL, (3, 2)), n_tokens=5),
    ):
        pytest.fail("the body must not run")
    with (
        pytest.raises(StorageError, match=r"the folder .*none does not exist"),
        open_writer(tmp_path / "none" / "a.h5", make.content(SMALL, (3, 2))),
    ):
        pytest.fail("the body must not run")
    assert names(tmp_path) == []


def nan_at_second_site(c: make.Content) -> None:
    c.values["task-1"][0]["pathway"][1, 2, 0, 1] = np.nan


def gate_of_logits(c: make.Content) -> None:
    c.values["task-1"][0]["gate"][1, 3] *= 3


def wrong_shape(c: make.Content) -> None:
    c.values["task-0"][0]["base_norm"] = c.values["task-0"][0]["base_norm"][:1]


def missing_value(c: make.Content) -> None:
    del c.values["task-0"][0]["expert_norm"]


def missing_group(c: make.Content) -> None:
    del c.values["task-0"][1]


def unknown_sample(c: make.Content) -> None:
    c.columns["task-0"]["sample"][-1] = 3


def large_role(c: make.Content) -> None:
    c.columns["task-0"]["role"][0] = 256


def short_column(c: make.Content) -> None:
    c.columns["task-0"]["position"] = c.columns["task-0"]["position"][:-1]


def probes_out_of_order(c: make.Content) -> None:
    c.probes.reverse()  # the writer was made before


def unknown_probe(c: make.Content) -> None:
    c.probes[0] = "task-7"
    c.columns["task-7"], c.values["task-7"] = c.columns["task-0"], c.values["task-0"]


def stats_missing(c: make.Content) -> None:
    c.stats.pop()


def stats_shape(c: make.Content) -> None:
    c.stats[0]["entropy"] = c.stats[0]["entropy"][:, :1]


def stats_nan(c: make.Content) -> None:
    c.stats[0]["energy"][0, 0, 0] = np.inf


def stats_count(c: make.Content) -> None:
    c.stats[0]["gate_sum"] *= 1.1


def weights_missing(c: make.Content) -> None:
    c.weights.pop()


def weights_shape(c: make.Content) -> None:
    c.weights[0]["B"] = c.weights[0]["B"].swapaxes(1, 2)


def weights_nan(c: make.Content) -> None:
    c.weights[1]["router"][0, 0] = np.nan


def too_few_tokens(c: make.Content) -> None:
    for columns in (c.columns["task-1"],):
        for name in columns:
            columns[name] = columns[name][:-1]
    c.values["task-1"] = [{k: v[:, :-1] for k, v in group.items()} for group in c.values["task-1"]]


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (
            nan_at_second_site,
            SiteError,
            r"pathway of site 'model\.layers\.1\..*' is not finite everywhere on probe 'task-1'",
        ),
        (
            gate_of_logits,
            SiteError,
            r"1 of 8 gate rows do not sum to 1 on probe 'task-1', first at site 'model\.layers\.1",
        ),
        (wrong_shape, FormatError, r"group 0 was given .*base_norm \[1, 3\]; expected .*base_norm \[2, 3\]"),
        (missing_value, FormatError, r"group 0 was given .*; expected .*expert_norm"),
        (missing_group, FormatError, r"values for 1 groups were appended; the sites form 2"),
        (unknown_sample, FormatError, r"sample of probe 'task-0' ranges from \d to 3; allowed are 0 to 2"),
        (large_role, FormatError, r"role of probe 'task-0' ranges from \d to 256; allowed are 0 to 255"),
        (short_column, FormatError, r"position has shape \[2\], expected \[3\] like sample"),
        (probes_out_of_order, FormatError, r"'task-0' were appended after rows of 'task-1'; append probes in order"),
        (unknown_probe, UnknownNameError, r"Unknown probe 'task-7'"),
        (stats_missing, FormatError, r"the sums of group 1 were never given; call set_stats"),
        (stats_shape, FormatError, r"group 0 was given .*entropy \[2, 1\].*; expected .*entropy \[2, 2\]"),
        (stats_nan, SiteError, r"The sum energy of group 0 is not finite; accumulate in float64"),
        (stats_count, FormatError, r"was not kept: /group_0/stats/gate_sum of site .* does not add up to count"),
        (weights_missing, FormatError, r"weights of site 'model\.layers\.5.*' were never given; give all or none"),
        (weights_shape, FormatError, r"B of site .* has shape \[3, 2, 4\]; expected \[3, 4, 2\], once"),
        (weights_nan, SiteError, r"router of site 'model\.layers\.1.*' has values that are not finite. The checkpoint"),
        (too_few_tokens, FormatError, r"7 token rows were announced, 6 were appended"),
    ],
)
def test_wrong_data_is_refused_by_name(tmp_path: Path, spoil: Any, error: type[DriftLensError], text: str) -> None:
    c = make.content([make.site(0), make.site(1), make.site(5, 2, 0)], (3, 4))
    writer = open_writer(tmp_path / "a.h5", c, n_tokens=7)
    spoil(c)
    with pytest.raises(error, match=text), writer:
        make.fill(writer, c)
    assert names(tmp_path) == []


def site_with(**fields: Any) -> list[SiteInfo]:
    return [SiteInfo(**{**make.site(0).__dict__, **fields})]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sites": []}, "a recording needs at least one site and one probe"),
        ({"probes": [], "sample_ids": {}}, "a recording needs at least one site and one probe"),
        ({"sites": [make.site(0), make.site(0)]}, r"the site name 'model\.layers\.0\.mlp\.down_proj' occurs twice"),
        ({"probes": ["a", "a"], "sample_ids": {"a": []}}, "the probe name 'a' occurs twice"),
        ({"sample_ids": {"other": []}}, r"sample ids are given for \['other'\], the probes are \['task-0'\]"),
        ({"sites": site_with(num_experts=0)}, "has num_experts = 0; allowed are 1 to"),
        ({"sites": site_with(rank=-1)}, "has rank = -1; allowed are 0 to"),
        ({"sites": site_with(scaling=float("nan"))}, "has scaling nan"),
        ({"sites": site_with(name="")}, "name of site '' cannot be stored"),
        (
            {"sites": site_with(kind="a\0b")},
            r"kind of site .* cannot be stored: 'a\\x00b' \(3 bytes\)\. Allowed are 1 to",
        ),
        ({"sites": site_with(gate="\ud800")}, "gate of site .* is not valid Unicode"),
    ],
)
def test_wrong_descriptions_are_refused_before_any_file(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"sites": SMALL, "probes": ["task-0"], "sample_ids": {"task-0": []}, "meta": {}}
    with pytest.raises(FormatError, match=text):
        RecordingWriter(tmp_path / "a.h5", **(given | change))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("meta", "text"),
    [
        ({"path": Path("x")}, r"The meta value 'path' cannot be stored: .*PosixPath.* Use text, numbers, lists, dicts"),
        ({"CLASS": "x"}, "attribute name 'CLASS' is reserved"),
        ({"driftlens_schema": "9"}, "attribute name 'driftlens_schema' is reserved"),
        ({"list": [float("nan")]}, "The meta value 'list' cannot be stored"),
        ({"": 1}, "attribute name cannot be stored"),
    ],
)
def test_meta_that_cannot_be_stored(tmp_path: Path, meta: dict[str, Any], text: str) -> None:
    c = make.content(SMALL, (3, 2))
    c.meta = meta
    with pytest.raises(FormatError, match=text):
        make.write(tmp_path / "a.h5", c)
    assert names(tmp_path) == []


def test_the_writer_works_inside_its_block_only(tmp_path: Path) -> None:
    c = make.content(SMALL, (3, 2))
    writer = open_writer(tmp_path / "a.h5", c)
    with pytest.raises(StorageError, match="is not open for writing; use the writer inside its `with` block"):
        make.fill(writer, c)
    with writer:
        make.fill(writer, c)
    with pytest.raises(StorageError, match="is not open for writing"):
        make.fill(writer, c)


def test_values_are_copied(tmp_path: Path) -> None:
    c = make.content(SMALL, (3, 2))
    with open_writer(tmp_path / "a.h5", c) as writer:
        make.fill(writer, c)
        kept = c.values["task-0"][0]["gate"].copy()
        for arrays in (*c.values["task-0"], *c.stats):
            for array in arrays.values():
                array[...] = -1
    with open_recording(tmp_path / "a.h5") as recording:
        np.testing.assert_array_equal(recording.gate(0, 0), kept[0].astype(np.float16))
        assert recording.groups[0].stats["count"].min() > 0
