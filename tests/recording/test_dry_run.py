"""--dry-run says what recording takes, is right about it, writes nothing and refuses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from driftlens.cli.main import app
from driftlens.recording import estimate_checkpoint, estimate_run, record_checkpoint, record_run, write_probes
from driftlens.recording.estimate import estimate_probes
from driftlens.recording.observer import Observer
from driftlens.recording.queue import DEPTH
from driftlens.recording.recorder import record_probes

from .support import adapted, opened, toy_probes
from .test_record_run import NAMES, run, trained  # noqa: F401 - fixtures


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_numbers_are_those_of_the_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, model = adapted()
    probes = toy_probes(tokens_per_sample=4)
    options = {"encoder": backbone.encoder, "batch_size": 2}
    found = estimate_probes(model, probes, tmp_path / "x.h5", checkpoint="x", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    sizes: list[int] = []
    original = Observer.pending

    def pending(self: Observer):  # type: ignore[no-untyped-def]
        batch = original(self)
        sizes.append(batch.copy.nbytes)
        return batch

    monkeypatch.setattr(Observer, "pending", pending)
    summary = record_probes(model, probes, tmp_path / "x.h5", checkpoint_meta={}, **options)  # type: ignore[arg-type]
    assert (found.sites, found.samples, found.tokens, found.stored_tokens) == (
        summary.sites,
        summary.samples,
        summary.tokens,
        summary.stored_tokens,
    )
    assert found.batches == len(sizes)
    assert found.seconds is not None
    assert found.seconds > 0
    # the sums of a batch carry one number per site that the file does not have, and none of its counts
    assert found.buffer_bytes is not None
    assert found.buffer_bytes == pytest.approx((DEPTH + 2) * max(sizes), rel=0.02)
    assert found.file_bytes is not None
    arrays = sum(a.nbytes for group in opened(tmp_path / "x.h5").groups for a in group.stats.values())
    assert found.file_bytes > arrays


def test_the_command_prints_json_and_writes_nothing(trained: Path, tmp_path: Path) -> None:  # noqa: F811
    write_probes(toy_probes(2), tmp_path / "probes")
    before, ckpt = contents(trained), trained / "checkpoints" / NAMES[1]
    out = tmp_path / "there.h5"
    out.write_bytes(b"mine")
    arguments = ["record", "--ckpt", str(ckpt), "--probes", str(tmp_path / "probes"), "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--dry-run", "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["checkpoint"], row["sites"], row["samples"]) == (NAMES[1], 6, 6)
    assert row["note"] == "the file is there already"
    assert min(row["tokens"], row["file_bytes"], row["buffer_bytes"], row["seconds"]) > 0
    assert out.read_bytes() == b"mine"
    assert contents(trained) == before


def test_a_run_is_estimated_recording_by_recording(run: Path) -> None:  # noqa: F811
    before = contents(run)
    found = estimate_run(run)
    assert [e.path.name for e in found] == [*(f"{name}.h5" for name in NAMES), f"{NAMES[-1]}.noise.h5"]
    assert contents(run) == before
    summaries = record_run(run)
    assert [(e.tokens, e.stored_tokens) for e in found] == [(s.tokens, s.stored_tokens) for s in summaries]
    assert {e.note for e in found} == {""}
    assert {e.note for e in estimate_run(run)} == {"there already: kept if it was made in the same way"}
    result = CliRunner().invoke(app, ["record", "--run", str(run), "--dry-run", "--json", "--quiet"])
    assert [row["checkpoint"] for row in json.loads(result.stdout)] == [*NAMES, NAMES[-1]]


def test_a_model_that_cannot_be_loaded_is_said_and_not_measured(trained: Path, tmp_path: Path) -> None:  # noqa: F811
    found = estimate_checkpoint(trained / "checkpoints" / NAMES[0], base=str(tmp_path / "no-base"))
    assert found.seconds is None
    assert found.tokens is None
    assert found.note.startswith("not measured, and recording would fail: ")
    assert "no-base" in found.note


def test_the_memory_cap_reaches_the_recording(trained: Path, tmp_path: Path) -> None:  # noqa: F811
    arguments = ["record", "--ckpt", str(trained / "checkpoints" / NAMES[0]), "--out", str(tmp_path / "x.h5")]
    write_probes(toy_probes(2), tmp_path / "probes")
    arguments += ["--probes", str(tmp_path / "probes"), "--max-buffer-mb", "0.001", "--quiet"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0
    assert "max_buffer_mb allows 0.0 MB" in str(result.exception) + result.output
    assert not (tmp_path / "x.h5").exists()


def test_a_cap_that_fits_gives_the_same_file(trained: Path, tmp_path: Path) -> None:  # noqa: F811
    files = []
    for cap in (None, 0.2, 50.0):
        out = tmp_path / f"{cap}" / "x.h5"
        out.parent.mkdir()
        record_checkpoint(
            trained / "checkpoints" / NAMES[0], probes=toy_probes(3), out=out, batch_size=2, max_buffer_mb=cap
        )
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]
