"""Two processes record what one records: the same file, byte for byte, or none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from driftlens.errors import ConfigError, DriftLensError
from driftlens.recording import record
from driftlens.recording.distributed import ALONE, Ranks
from driftlens.recording.recorder import record_probes

from .support import adapted, shake, toy_probes

META = {"checkpoint": "x"}
TIMEOUT = 20.0


def test_one_process_is_alone_and_steps_are_plain_calls() -> None:
    ranks = Ranks.joined()
    assert (ranks.rank, ranks.size, ranks.main) == (0, 1, True)
    assert ALONE.step("counting", lambda: 3) == [3]
    assert ALONE.from_main("counting", lambda: 4) == 4
    with pytest.raises(KeyError, match="as raised"):
        ALONE.step("failing", lambda: {}["as raised"])


def _good(folder: Path) -> None:
    backbone, model = adapted()
    summary = record_probes(
        model,
        toy_probes(),
        folder / "two.h5",
        encoder=backbone.encoder,
        checkpoint_meta=META,
        batch_size=2,
        ranks=Ranks.joined(TIMEOUT),
    )
    assert summary.bytes == (folder / "two.h5").stat().st_size


def _failing(folder: Path) -> None:
    backbone, model = adapted()
    if dist.get_rank() == 1:
        calls = []

        def fail(*_: object) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("broken device")

        model.get_base_model().register_forward_pre_hook(fail)
    expected = (
        (RuntimeError, "broken device") if dist.get_rank() == 1 else (DriftLensError, "Process 1 of 2 failed while")
    )
    with pytest.raises(expected[0], match=expected[1]):
        record_probes(
            model,
            toy_probes(),
            folder / "two.h5",
            encoder=backbone.encoder,
            checkpoint_meta=META,
            batch_size=1,
            ranks=Ranks.joined(TIMEOUT),
        )


def _existing(folder: Path) -> None:
    backbone, model = adapted()
    with pytest.raises(DriftLensError, match="exists already"):
        record_probes(
            model,
            toy_probes(),
            folder / "there.h5",
            encoder=backbone.encoder,
            checkpoint_meta=META,
            ranks=Ranks.joined(TIMEOUT),
        )


def _different(folder: Path) -> None:
    backbone, model = adapted()
    shake(model, seed=dist.get_rank())
    with pytest.raises(ConfigError, match="the weights of process 1 differs from that of process 0"):
        record_probes(
            model,
            toy_probes(),
            folder / "two.h5",
            encoder=backbone.encoder,
            checkpoint_meta=META,
            ranks=Ranks.joined(TIMEOUT),
        )


def _dying(folder: Path) -> None:
    backbone, model = adapted()
    if dist.get_rank() == 1:
        model.get_base_model().register_forward_pre_hook(lambda *_: os._exit(9))
    with pytest.raises(DriftLensError, match="Another process was lost while recording"):
        record_probes(
            model,
            toy_probes(),
            folder / "two.h5",
            encoder=backbone.encoder,
            checkpoint_meta=META,
            batch_size=1,
            ranks=Ranks.joined(TIMEOUT),
        )


def _worker(rank: int, body: Callable[[Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    body(folder)
    if body is not _dying:
        dist.barrier()
        dist.destroy_process_group()


def _launch(body: Callable[[Path], None], folder: Path) -> None:
    mp.start_processes(_worker, args=(body, folder), nprocs=2, start_method="fork")


def _files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix in (".h5", ".partial"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    # A process that has already computed with several threads must not be forked.
    torch.set_num_threads(1)


def test_the_file_of_two_processes_is_that_of_one_byte_for_byte(tmp_path: Path) -> None:
    _launch(_good, tmp_path)
    backbone, model = adapted()
    record(model, toy_probes(), tmp_path / "one.h5", encoder=backbone.encoder, checkpoint_meta=META, batch_size=2)
    assert (tmp_path / "two.h5").read_bytes() == (tmp_path / "one.h5").read_bytes()
    assert _files(tmp_path) == ["one.h5", "two.h5"]


@pytest.mark.parametrize("body", [_failing, _different])
def test_an_error_in_one_process_ends_both_and_leaves_no_file(body: Callable[[Path], None], tmp_path: Path) -> None:
    _launch(body, tmp_path)
    assert _files(tmp_path) == []


def test_a_file_that_is_there_stops_both_and_stays(tmp_path: Path) -> None:
    (tmp_path / "there.h5").write_bytes(b"mine")
    _launch(_existing, tmp_path)
    assert (tmp_path / "there.h5").read_bytes() == b"mine"


def test_a_process_that_dies_is_noticed_and_leaves_no_file(tmp_path: Path) -> None:
    # not joined by torch, which would kill the survivor before it could clean up
    context = mp.start_processes(_worker, args=(_dying, tmp_path), nprocs=2, start_method="fork", join=False)
    for process in context.processes:
        process.join(60)
    assert [process.exitcode for process in context.processes] == [0, 9]
    assert _files(tmp_path) == []
