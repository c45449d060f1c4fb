"""Faults that are injected into recording; docs/faults.md lists all of them with the test that shows each."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from peft import PeftModel
from torch import nn

from driftlens.adapters import iter_sites
from driftlens.backbones import Backbone, load_backbone
from driftlens.cli.main import main
from driftlens.errors import (
    FormatError,
    LockedError,
    NotFoundError,
    ProbeError,
    SiteError,
    StorageError,
)
from driftlens.recording import (
    Hooks,
    count_hooks,
    find_sites,
    load_probes,
    record,
    record_checkpoint,
    record_run,
    write_probes,
)
from driftlens.recording.observer import Observer
from driftlens.store import Manifest, RunLock, open_recording, verify_recording
from driftlens.store import atomic as atomic_module
from tests.store import _make as make

from .support import adapted, datasets, opened, toy_probes
from .test_record_run import run, trained  # noqa: F401  # fixtures: a trained run, and a copy of it

ROOT = Path(__file__).parents[2]
META = {"checkpoint": "x"}


@pytest.fixture(scope="module")
def tiny() -> tuple[Backbone, PeftModel]:
    return adapted()


def write(tiny: tuple[Backbone, PeftModel], path: Path, **options: Any) -> Path:
    backbone, model = tiny
    record(model, toy_probes(3), path, encoder=backbone.encoder, checkpoint_meta=META, batch_size=4, **options)
    return path


@pytest.fixture(scope="module")
def one(tiny: tuple[Backbone, PeftModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tiny, tmp_path_factory.mktemp("one") / "x.h5")


def in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


# -- the table --------------------------------------------------------------------------------------------------------


def test_every_row_of_the_fault_table_names_tests_that_exist() -> None:
    lines = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    rows = [(int(match[1]), line) for line in lines if (match := re.match(r"\|\s*(\d+)\s*\|", line))]
    assert sorted({number for number, _ in rows}) == list(range(1, 24))
    for _, row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, f"no test in {row}"
        for file, name in tests:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (file, name)


# -- 2, 5 to 8: files -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_file_that_a_killed_appender_left_open_is_named(one: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(one, tmp_path / "x.h5"))

    def append() -> None:
        file = h5py.File(path, "r+", libver="latest")
        file.swmr_mode = True
        file["token"][0] = 0
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WIFSIGNALED(in_child(append))
    with pytest.raises(FormatError, match=r"x\.h5: .*already open for write.*record it again"):
        open_recording(path)
    assert verify_recording(path)
    assert one.read_bytes()[11] == 0, "what we write never carries the flag"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_leaves_finished_recordings_and_no_partial(
    run: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """The refusal strikes at the last moment: when the second recording is flushed before its renaming."""
    flush, flushed = atomic_module.fsync_path, []

    def refuse(path: Path) -> None:
        if str(path).endswith(".h5.partial"):
            flushed.append(path)
            if len(flushed) == 2:
                raise OSError(number, os.strerror(number), str(path))
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_module, "fsync_path", refuse)
        with pytest.raises(StorageError, match=rf"Cannot write .*01-colour\.h5: {re.escape(os.strerror(number))}"):
            record_run(run)
    assert [p.name for p in (run / "recordings").iterdir() if not p.name.startswith(".")] == ["00-start.h5"]
    assert Manifest.load(run).verify() == []
    assert [summary.skipped for summary in record_run(run)] == [True, False, False, False]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX permissions")
def test_a_folder_that_may_only_be_read_is_one_clear_error() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        old = make.write(folder / "a.h5", make.content())
        before = old.read_bytes()
        (folder / ".a.h5.lock").unlink(missing_ok=True)
        folder.chmod(0o555)
        message = folder.with_name(folder.name + ".message")

        def attempt() -> None:
            if os.getuid() == 0:
                os.setuid(65534)  # root may write anywhere
            try:
                make.write(old, make.content(), overwrite=True)
            except StorageError as error:
                if "Cannot create the lock" not in str(error) or "Choose an output folder" not in str(error):
                    raise
                return
            raise AssertionError("nothing was refused")

        try:
            assert in_child(attempt) == 0
        finally:
            folder.chmod(0o755)
            message.unlink(missing_ok=True)
        assert old.read_bytes() == before
        assert [p.name for p in folder.iterdir()] == ["a.h5"]


def test_a_second_recorder_of_the_run_is_refused_before_it_touches_anything(run: Path) -> None:  # noqa: F811
    before = sorted(run.rglob("*"))
    with RunLock(run), pytest.raises(LockedError, match="is being written by"):
        record_run(run)
    assert [p for p in sorted(run.rglob("*")) if not p.name.startswith(".")] == before


def test_a_reader_keeps_what_it_opened_while_the_name_is_written_anew(
    tiny: tuple[Backbone, PeftModel], one: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(one, tmp_path / "x.h5"))
    with open_recording(path) as reader:
        write(tiny, path, overwrite=True, tokens_per_sample=2)
        assert np.array_equal(reader.gate(0, 0), opened(one).gate(0, 0))
        assert len(opened(path).gate(0, 0)) < len(reader.gate(0, 0))


def test_leftovers_and_empty_folders_do_not_disturb_a_recording(run: Path, tmp_path: Path) -> None:  # noqa: F811
    (run / "recordings").mkdir()
    (run / "recordings" / "01-colour.h5.partial").write_bytes(b"half")
    (run / "recordings" / "02-parity.h5").write_bytes(b"")  # neither listed nor a recording
    (run / "checkpoints" / "03-shape").mkdir()  # not listed, empty
    assert [summary.checkpoint for summary in record_run(run)] == ["00-start", "01-colour", "02-parity", "02-parity"]
    assert Manifest.load(run).verify() == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="is not a run: there is no manifest"):
        record_run(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_no_renaming_leaves_its_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Between file systems a renaming is a copy, which a kill can tear; beside its target it is one step."""
    replace, moves = Path.replace, []
    monkeypatch.setattr(
        Path, "replace", lambda self, target: moves.append((self, Path(target))) or replace(self, target)
    )
    record_run(run)
    assert len(moves) == 8, "four recordings, four times the manifest"
    assert all(source.parent == target.parent for source, target in moves)
    assert all(source.name == f"{target.name}.partial" for source, target in moves)


# -- 9: schemas -------------------------------------------------------------------------------------------------------


def test_recording_into_a_run_of_a_newer_schema_changes_nothing(run: Path) -> None:  # noqa: F811
    path = run / "manifest.json"
    data = json.loads(path.read_text()) | {"schema": "2.0"}
    path.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=r"has schema 2\.0; this version of driftlens reads schema 1\. Upgrade"):
        record_run(run)
    assert not (run / "recordings").exists()
    path.write_text(json.dumps(data | {"schema": "1.99", "added_later": 1}))
    assert Manifest.load(run).files


# -- 13, 14: hostile names and checkpoints ----------------------------------------------------------------------------

EVIL = [
    "=cmd|' /C calc'!A0",
    "../../evil",
    "\x1b[2J\x1b]0;evil\x07",
    "<script>alert(1)</script>",
    "[red]x[/red]",
    "\u202eabc",
]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["driftlens", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out + err

    return call


def test_hostile_names_are_shown_letter_by_letter_in_a_terminal(
    run: Path,  # noqa: F811
    cli: Callable[..., tuple[int, str]],
) -> None:
    for name in EVIL:
        config = yaml.safe_load((run / "config.yaml").read_text()) | {"name": name, "method": {"name": name}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        code, text = cli("ls", run.parent)
        assert code == 0
        assert not set(text) & {"\x1b", "\x07", "\u202e"}
        assert ascii(name)[1:-1].replace("\\\\", "\\").replace("'", "'") in text.replace("\\'", "'")
        code, text = cli("verify", run.parent / name.replace("/", "_"))
        assert code == 3
        assert not set(text) & {"\x1b", "\x07", "\u202e"}


def test_hostile_names_run_nowhere_in_a_csv(
    run: Path,  # noqa: F811
    tmp_path: Path,
    cli: Callable[..., tuple[int, str]],
) -> None:
    probes = toy_probes(3)
    named = type(probes)(dict(zip(EVIL, [*probes.samples.values()] * 2, strict=True)))
    record_run(run, probes=named, noise_floor=False)
    code, text = cli("analyze", run, "--out", tmp_path / "t.csv", "--quiet")
    assert code == 0, text
    cells = pd.read_csv(tmp_path / "t.csv", dtype=str, keep_default_na=False)
    assert set(cells["probe"]) >= {"'" + EVIL[0], EVIL[1], EVIL[3]}
    assert not any(value[:1] in tuple("=+@") for column in cells for value in cells[column] if value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "t.csv"]


def test_hostile_probe_names_reach_no_other_file(tmp_path: Path) -> None:
    probes = toy_probes(2)
    for name in ("../../evil", "/evil", "a/b", "a\0b"):
        with pytest.raises(ProbeError, match="cannot be a file name"):
            write_probes(type(probes)({name: probes.samples["colour"]}), tmp_path / "set")
        folder = tmp_path / "read"
        folder.mkdir(exist_ok=True)
        (tmp_path / "evil.jsonl").write_text('{"id": "1", "prompt": "p", "answer": "secret"}\n')
        (folder / "probe_set.yaml").write_text(yaml.safe_dump({"tasks": [name], "seed": 0, "licence": "CC0"}))
        with pytest.raises(ProbeError, match="cannot be a file name"):
            load_probes(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.jsonl", "read"]


def test_names_of_ten_megabytes_are_refused_before_any_file(tmp_path: Path) -> None:
    long = "x" * 10_000_000
    content = make.content([make.site(0)], (3,))
    object.__setattr__(content.sites[0], "name", long)
    with pytest.raises(FormatError) as caught:
        make.write(tmp_path / "a.h5", content)
    assert len(str(caught.value)) < 2_000, "the message does not repeat all of it"
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == []


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize("beside", [True, False])
def test_a_pickle_in_a_checkpoint_is_never_run(run: Path, tmp_path: Path, beside: bool) -> None:  # noqa: F811
    folder, proof = run / "checkpoints" / "01-colour", tmp_path / "was-run"
    payload = pickle.dumps(Payload(proof))
    for name in ("adapter_model.bin", "pytorch_model.bin", "model.pt", "optimizer.pt"):
        (folder / name).write_bytes(payload)
        torch.save({"w": Payload(proof)}, folder / f"saved-{name}")
    torch.save({"w": Payload(proof)}, folder / "adapter_model.bin")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["auto_mapping"] = {"parent_library": "os", "base_model_class": "system"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    options = {"probes": toy_probes(2), "out": tmp_path / "x.h5"}
    if beside:
        record_checkpoint(folder, **options)  # type: ignore[arg-type]
        assert verify_recording(tmp_path / "x.h5") == []
    else:
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises((NotFoundError, FormatError)):
            record_checkpoint(folder, **options)  # type: ignore[arg-type]
        assert not (tmp_path / "x.h5").exists()
    assert not proof.exists()


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_code_in_the_folder_of_a_whole_model_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    folder, proof = tmp_path / "model", tmp_path / "was-run"
    folder.mkdir()
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(proof)!r}).touch()\nclass Config: ...\n")
    torch.save({"w": Payload(proof)}, folder / weights)
    tiny = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks whether to run what a folder names
    for kind, error in (("own_kind", NotFoundError), ("llama", FormatError)):
        (folder / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": names, **tiny}))
        with pytest.raises(error):
            load_backbone(str(folder))
    assert not proof.exists()


# -- 15 to 18: models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, SystemExit])
def test_running_out_of_memory_takes_the_hooks_off_and_keeps_the_old_file(
    tiny: tuple[Backbone, PeftModel], one: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    model = tiny[1]
    path = Path(shutil.copy(one, tmp_path / "x.h5"))
    calls = []

    def fail(_m: nn.Module, _a: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error("no memory left")

    handle = list(iter_sites(model))[-1][1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        write(tiny, path, overwrite=True)
    handle.remove()
    assert count_hooks(model) == 0
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["x.h5"]
    assert write(tiny, path, overwrite=True).read_bytes() == one.read_bytes()


def test_an_expert_that_is_never_chosen_is_recorded_with_zeros(tmp_path: Path) -> None:
    backbone, model = adapted("topk")
    with torch.no_grad():
        for _, layer in iter_sites(model):
            layer.moe_lora_gate["default"].weight.zero_()  # all logits tie at 0: the two lower indices win
    path = write((backbone, model), tmp_path / "x.h5")
    group = opened(path).groups[0]
    gate, sums = group.gate[...], group.stats
    np.testing.assert_array_equal(gate, np.broadcast_to(np.float16([0.5, 0.5, 0.0]), gate.shape))
    assert not sums["gate_sum"][..., 2].any()
    for expert in (0, 1):
        np.testing.assert_array_equal(sums["gate_sum"][..., expert], np.broadcast_to(sums["count"] / 2, (6, 3)))
    np.testing.assert_allclose(sums["entropy"], np.broadcast_to(sums["count"] * np.log(2), (6, 3)), rtol=1e-6)
    assert verify_recording(path) == []


def test_dropout_never_reaches_a_recording(tiny: tuple[Backbone, PeftModel], one: Path, tmp_path: Path) -> None:
    model = tiny[1]
    layers = [layer for _, layer in iter_sites(model)]
    before = [layer.moe_lora_dropout["default"] for layer in layers]
    for layer in layers:
        layer.moe_lora_dropout["default"] = nn.Dropout(0.5)
    model.train()
    try:
        assert write(tiny, tmp_path / "x.h5").read_bytes() == one.read_bytes()
        assert layers[0].moe_lora_dropout["default"].training
    finally:
        model.eval()
        for layer, dropout in zip(layers, before, strict=True):
            layer.moe_lora_dropout["default"] = dropout


def test_a_model_that_trains_with_checkpointing_records_the_same(one: Path, tmp_path: Path) -> None:
    backbone, model = adapted()
    model.train()
    model.gradient_checkpointing_enable()
    assert write((backbone, model), tmp_path / "x.h5").read_bytes() == one.read_bytes()
    assert model.training


def test_each_forward_of_generate_counts_once_per_point(tiny: tuple[Backbone, PeftModel]) -> None:
    model = tiny[1]
    root, observer = model.get_base_model(), Observer(find_sites(model))
    seen: list[int] = []
    with Hooks(root, observer.points, lambda index, args, output: seen.append(index)) as hooks:
        model.generate(input_ids=torch.arange(3, 13).reshape(2, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert hooks.passes == 4, "the prompt, then one token at a time"
    points = len(observer.points)
    assert all(sorted(seen[i * points : (i + 1) * points]) == list(range(points)) for i in range(4))
    assert len(seen) == 4 * points
    assert count_hooks(model) == 0


def test_several_forwards_between_two_batches_are_no_silent_sum(tiny: tuple[Backbone, PeftModel]) -> None:
    model = tiny[1]
    root, observer = model.get_base_model(), Observer(find_sites(model))
    ids = torch.arange(3, 13).reshape(2, 5)
    with torch.inference_mode(), Hooks(root, observer.points, observer.on_fire, observer.on_pass):
        observer.expect(torch.arange(10), torch.arange(10))
        root(input_ids=ids)
        root(input_ids=ids)  # the later pass replaces the earlier one
        (twice,) = observer.take()
        observer.expect(torch.arange(10), torch.arange(10))
        root(input_ids=ids)
        (once,) = observer.take()
    for name, value in once.sums.items():
        np.testing.assert_array_equal(value, twice.sums[name], err_msg=name)


@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (torch.compile, r"OptimizedModule is compiled .*_orig_mod"),
        (nn.DataParallel, r"DataParallel runs copies of the model.*`model\.module`"),
    ],
)
def test_models_whose_hooks_would_not_fire_once_are_refused(
    tiny: tuple[Backbone, PeftModel], tmp_path: Path, wrap: Callable[[nn.Module], nn.Module], text: str
) -> None:
    backbone, model = tiny
    with pytest.raises(SiteError, match=text):
        write((backbone, wrap(model)), tmp_path / "x.h5")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    assert count_hooks(model) == 0


def test_a_layer_that_was_compiled_in_place_is_named(tmp_path: Path) -> None:
    backbone, model = adapted()
    name, layer = list(iter_sites(model))[3]
    layer.compile()
    with pytest.raises(SiteError, match=rf"MoELoraLinear .*{re.escape(name)} is compiled"):
        write((backbone, model), tmp_path / "x.h5")
    layer._compiled_call_impl = None
    assert verify_recording(write((backbone, model), tmp_path / "x.h5")) == []


# -- 22, 23: numbers and processes -----------------------------------------------------------------------------------


def test_a_half_precision_model_that_overflows_names_its_first_site(tmp_path: Path) -> None:
    backbone, model = adapted()
    model.half()
    name, layer = next(iter_sites(model))
    with torch.no_grad():
        layer.moe_lora_A["default"].weight.mul_(30_000)
    with pytest.raises(SiteError, match=rf"Site {name} gave values that are not finite \(.*pathway.*record in float32"):
        write((backbone, model), tmp_path / "x.h5")
    assert not (tmp_path / "x.h5").exists()


def test_activations_beyond_float16_are_stored_as_they_are(tmp_path: Path) -> None:
    backbone, model = adapted()
    with torch.no_grad():
        for _, layer in iter_sites(model):
            layer.moe_lora_A["default"].weight.mul_(1e6)
            layer.moe_lora_B["default"].weight.mul_(1e-6)
    found = datasets(write((backbone, model), tmp_path / "x.h5"))
    assert found["group_0/pathway"].dtype == np.float32
    assert np.abs(found["group_0/pathway"]).max() > 65504
    assert all(np.isfinite(value).all() for value in found.values() if value.dtype.kind == "f")


def test_one_expert_of_rank_one_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from . import support

    monkeypatch.setattr(support, "E", 1)
    monkeypatch.setattr(support, "R", 1)
    path = write(adapted(), tmp_path / "x.h5")
    group = opened(path).groups[0]
    assert group.pathway.shape[2:] == (1, 1)
    assert (group.gate[...] == 1).all()
    assert not group.stats["entropy"].any()
    assert verify_recording(path) == []


def test_a_task_without_samples_is_refused_by_name() -> None:
    probes = toy_probes(2)
    with pytest.raises(ProbeError, match="task 'nothing' has no sample"):
        type(probes)({**probes.samples, "nothing": ()})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_reader_that_is_forked_reads_in_every_process_at_once(one: Path) -> None:
    with open_recording(one) as reader:
        expected = reader.gate(0, 0)  # opened, and used, before the fork

        def read() -> None:
            for _ in range(20):
                if not np.array_equal(reader.gate(0, 0), expected):
                    raise AssertionError("another value")

        children = []
        for _ in range(4):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    read()
                    status = 0
                finally:
                    os._exit(status)
            children.append(child)
        read()
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]
