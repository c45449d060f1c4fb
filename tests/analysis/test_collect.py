"""Lone recordings become a run that says the same as the run they came from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import xarray as xr

from driftlens.analysis import open_run
from driftlens.analysis.collect import collect
from driftlens.errors import ConfigError, FormatError, ProbeError, StorageError
from driftlens.store import Manifest, RecordingWriter, open_recording
from driftlens.store.schema import VALUES

from .synthetic import make_run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("source") / "run"
    make_run(root)
    return sorted(path for path in (root / "recordings").glob("*.h5") if ".noise" not in path.name)


def test_the_tables_are_those_of_the_original_run(files: list[Path], tmp_path: Path) -> None:
    source = open_run(files[0].parents[1])
    run = collect(files[1:], tmp_path / "run", tasks=source.tasks, start=files[0], method="theirs")
    assert run.method == "theirs"
    assert [point.task for point in run.checkpoints] == [None, *source.tasks]
    assert Manifest.load(run.path).verify() == []
    for name in ("codrift", "subspaces"):
        for measure in run.tables()[name].data_vars:
            if not measure.endswith(("_noise", "_reason")):
                xr.testing.assert_allclose(run.tables()[name][measure], source.tables()[name][measure], rtol=1e-12)


def test_names_come_from_the_probes(files: list[Path], tmp_path: Path) -> None:
    run = collect(files[1:3], tmp_path / "run")
    with open_recording(files[1]) as recording:
        assert list(run.tasks) == recording.probes[:2]


def test_what_does_not_belong_together_is_refused(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"No recording was given.*record --ckpt"):
        collect([], out)
    with pytest.raises(ConfigError, match="given twice"):
        collect([files[1], files[1]], out)
    with pytest.raises(ConfigError, match=r"2 recordings were given and 1 task names \(a\).*--tasks a,b,c"):
        collect(files[1:3], out, tasks=["a"])
    with pytest.raises(ConfigError, match=r"'a/b'.*cannot name files"):
        collect(files[1:3], out, tasks=["a/b", "c"])
    broken = tmp_path / "broken.h5"
    raw = bytearray(files[2].read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 4096] = bytes(4096)
    broken.write_bytes(raw)
    with pytest.raises(FormatError, match=r"broken\.h5"):
        collect([files[1], broken], out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(StorageError, match="exists"):
        collect(files[1:3], out)


def _changed(
    source: Path,
    path: Path,
    *,
    site: dict[str, str] | None = None,
    rename: str = "",
    reverse: bool = False,
    **meta: str,
) -> Path:
    """Write a recording again, without its weights, with some things changed."""
    with (
        open_recording(source) as old,
        RecordingWriter(
            path,
            sites=[replace(info, name=rename + info.name, **(site or {})) for info in old.sites],
            probes=old.probes[:: -1 if reverse else 1],
            sample_ids={probe: old.sample_ids(probe) for probe in old.probes},
            meta=old.meta | meta,
        ) as writer,
    ):
        for probe in old.probes[:: -1 if reverse else 1]:
            values = [{name: group.read(name, probe) for name in VALUES} for group in old.groups]
            writer.append(probe, **old.tokens(probe), values=values)
        for group in old.groups:
            writer.set_stats(group.index, dict(group.stats))
    return path


def test_another_base_or_other_probes_are_refused(files: list[Path], tmp_path: Path) -> None:
    one = _changed(files[1], tmp_path / "one.h5", base_sha256="aa")
    two = _changed(files[1], tmp_path / "two.h5", base_sha256="bb")
    with pytest.raises(FormatError, match=r"different base models .*one\.h5: aa; .*two\.h5: bb"):
        collect([one, two], tmp_path / "run")
    other = _changed(files[1], tmp_path / "other.h5", base_sha256="aa", reverse=True)
    with pytest.raises(ProbeError, match="recorded on the probes"):
        collect([one, other], tmp_path / "run")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_other_functions_at_a_site_are_no_drift(files: list[Path], tmp_path: Path) -> None:
    for field in ("family", "semantics", "gate"):
        value = "product_of_sums" if field == "semantics" else "other"
        other = _changed(files[2], tmp_path / f"{field}.h5", site={field: value})
        with pytest.raises(FormatError, match=rf"has {field} '.*' in .* and '{value}' in .*no drift"):
            collect([files[1], other], tmp_path / "run")
    elsewhere = _changed(files[2], tmp_path / "elsewhere.h5", rename="x.")
    with pytest.raises(FormatError, match="have no site in common"):
        collect([files[1], elsewhere], tmp_path / "run")


def test_the_folder_above_is_made(files: list[Path], tmp_path: Path) -> None:
    assert collect(files[1:3], tmp_path / "runs" / "theirs").path.is_dir()
