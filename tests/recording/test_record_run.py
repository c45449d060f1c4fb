"""Recording a whole run: resumable to the byte, with its noise floor, and clear about what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from driftlens.backbones import load_backbone
from driftlens.errors import ConfigError, FormatError, NotFoundError, ProbeError, SiteError
from driftlens.recording import Progress, load_checkpoint, record_checkpoint, record_run, write_probes
from driftlens.store import verify_recording
from driftlens.store.manifest import Manifest
from driftlens.streams import load_stream

from .support import adapted, assert_same_rows, datasets, opened, shake, toy_probes

NAMES = ["00-start", "01-colour", "02-parity"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as training leaves it: three checkpoints of the tiny backbone on the toy stream."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    _, model = adapted("energy")
    config = {
        "base": "tiny-random",
        "stream": {"name": "toy", "tasks": ["colour", "parity"], "train_samples": 4, "test_samples": 2},
        "recording": {"probes": None, "batch_size": 4, "tokens_per_sample": 6},
    }
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for number, name in enumerate(NAMES):
        shake(model, number)
        model.peft_config["default"].base_model_name_or_path = "tiny-random"
        model.save_pretrained(str(run / "checkpoints" / name), save_embedding_layers=False)  # True asks the hub
    stream = load_stream("toy", tasks=["colour", "parity"], train=4, test=2)
    manifest = Manifest(run=run, stream_sha256=stream.sha256)
    manifest.add("config.yaml")
    manifest.add("checkpoints")
    manifest.save()
    return run


@pytest.fixture(scope="module")
def recorded(trained: Path) -> Path:
    run = trained.with_name("recorded")
    shutil.copytree(trained, run)
    record_run(run)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def contents(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run / "recordings").iterdir() if p.suffix == ".h5"}


def test_every_checkpoint_is_recorded_and_listed(recorded: Path) -> None:
    assert sorted(contents(recorded)) == ["00-start.h5", "01-colour.h5", "02-parity.h5", "02-parity.noise.h5"]
    manifest = Manifest.load(recorded)
    assert manifest.verify() == []
    for name in contents(recorded):
        assert manifest.lists(f"recordings/{name}")
        assert verify_recording(recorded / "recordings" / name) == []
    recording = opened(recorded / "recordings" / "01-colour.h5")
    assert recording.probes == ["colour", "parity"]
    assert recording.meta["checkpoint"] == "01-colour"
    assert recording.meta["base"] == "tiny-random"
    assert recording.meta["base_sha256"] == load_backbone("tiny-random").sha256
    assert recording.meta["probes_sha256"] == manifest.probes_sha256
    assert recording.meta["tokens_per_sample"] == 6
    assert len(recording.meta["checkpoint_sha256"]) == 64


def test_recordings_hold_the_checkpoints_own_weights(recorded: Path) -> None:
    for name in NAMES:
        loaded = load_checkpoint(recorded / "checkpoints" / name)
        layer = loaded.model.get_base_model().model.language_model.layers[3].mlp.down_proj
        weights = opened(recorded / "recordings" / f"{name}.h5").weights("model.language_model.layers.3.mlp.down_proj")
        stacked = layer.moe_lora_A["default"].weight.detach().numpy()
        np.testing.assert_array_equal(weights["A"].reshape(stacked.shape), stacked)


def test_the_noise_floor_pass_sees_the_same_tokens_and_almost_the_same_values(recorded: Path) -> None:
    first, second = (recorded / "recordings" / f"02-parity{end}" for end in (".h5", ".noise.h5"))
    here, there = datasets(first), datasets(second)
    for column in ("sample", "position", "token_id", "role"):
        np.testing.assert_array_equal(here[f"tokens/{column}"], there[f"tokens/{column}"])
    for name in ("gate", "pathway", "expert_norm", "base_norm"):
        assert_same_rows(there[f"group_0/{name}"], here[f"group_0/{name}"], name)
    meta, noise = opened(first).meta, opened(second).meta
    assert (meta["batch_size"], meta["padding_side"], meta["noise_floor"]) == (4, "left", False)
    assert (noise["batch_size"], noise["padding_side"], noise["noise_floor"]) == (2, "right", True)
    assert meta["checkpoint_sha256"] == noise["checkpoint_sha256"]


def test_recording_again_keeps_what_is_there(recorded: Path, run: Path) -> None:
    shutil.copytree(recorded / "recordings", run / "recordings")  # finished, but not yet listed in the manifest
    before = {p.name: p.stat().st_mtime_ns for p in (run / "recordings").iterdir()}
    steps: list[Progress] = []
    summaries = record_run(run, progress=steps.append)
    assert [s.skipped for s in summaries] == [True] * 4
    assert {p.name: p.stat().st_mtime_ns for p in (run / "recordings").iterdir() if p.suffix == ".h5"} == {
        name: stamp for name, stamp in before.items() if name.endswith(".h5")
    }
    assert Manifest.load(run).verify() == []
    assert steps[-1].done == steps[-1].total == 4 * 16
    assert summaries[1].row()["path"] == str(run / "recordings" / "01-colour.h5")


@pytest.mark.parametrize("stop_at", [2, 6, 9, 15])
def test_an_interrupted_run_resumes_to_the_same_bytes(recorded: Path, run: Path, stop_at: int) -> None:
    steps = []

    def stop(step: Progress) -> None:
        steps.append(step)
        if len(steps) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_run(run, progress=stop)
    finished = contents(run)
    assert len(finished) < 4
    assert all(contents(recorded)[name] == data for name, data in finished.items())
    assert not list((run / "recordings").glob("*.partial"))
    summaries = record_run(run)
    assert [s.skipped for s in summaries] == [s.path.name in finished for s in summaries]
    assert contents(run) == contents(recorded)
    assert Manifest.load(run).verify() == []


def test_a_damaged_recording_is_made_again(recorded: Path, run: Path) -> None:
    shutil.copytree(recorded / "recordings", run / "recordings")
    victim = run / "recordings" / "01-colour.h5"
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    victim.write_bytes(raw[: len(raw) - 100])
    summaries = record_run(run)
    assert [s.skipped for s in summaries] == [True, False, True, True]
    assert contents(run) == contents(recorded)


def test_other_settings_are_refused_and_resume_false_records_anew(recorded: Path, run: Path) -> None:
    shutil.copytree(recorded / "recordings", run / "recordings")
    with pytest.raises(ConfigError, match=r"00-start\.h5 was recorded in another way: tokens_per_sample 6 \(now 3\)"):
        record_run(run, tokens_per_sample=3)
    with pytest.raises(ProbeError, match="recorded in another way: probes_sha256"):
        record_run(run, probes=toy_probes(3))
    assert contents(run) == contents(recorded), "nothing was changed"
    summaries = record_run(run, tokens_per_sample=3, resume=False, noise_floor=False)
    assert [s.skipped for s in summaries] == [False] * 3
    assert opened(run / "recordings" / "00-start.h5").meta["tokens_per_sample"] == 3


def test_cached_layers_change_nothing_that_matters(recorded: Path, run: Path) -> None:
    record_run(run, prefix_cache=False, noise_floor=False)
    for name in NAMES:
        here, there = (datasets(r / "recordings" / f"{name}.h5") for r in (run, recorded))
        assert_same_rows(here["group_0/gate"], there["group_0/gate"], name)
        assert_same_rows(here["group_0/pathway"], there["group_0/pathway"], name)


def test_a_probe_folder_replaces_the_streams_probes(run: Path, tmp_path: Path) -> None:
    folder = write_probes(toy_probes(2).select(["shape"]), tmp_path / "probes")
    record_run(run, probes=folder, noise_floor=False)
    assert opened(run / "recordings" / "02-parity.h5").probes == ["shape"]


def test_a_checkpoint_that_changed_since_training_is_refused(run: Path) -> None:
    path = run / "checkpoints" / "01-colour" / "adapter_model.safetensors"
    shutil.copy(run / "checkpoints" / "02-parity" / path.name, path)
    with pytest.raises(FormatError, match=r"01-colour/adapter_model\.safetensors differs from what .* lists"):
        record_run(run)
    assert list(contents(run)) == ["00-start.h5"], "what was finished before stays"


def test_a_missing_checkpoint_folder_is_named(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "01-colour")
    with pytest.raises(NotFoundError, match=r"No checkpoint at .*01-colour.*has: 00-start, 02-parity"):
        record_run(run)


def test_runs_that_are_none(tmp_path: Path, run: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nowhere is not a run: there is no manifest\.json"):
        record_run(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    manifest = Manifest.load(run)
    manifest.remove("checkpoints")
    manifest.save()
    with pytest.raises(NotFoundError, match=r"has no finished checkpoint to record. Continue its training"):
        record_run(run)


def test_a_stream_that_changed_is_refused(run: Path) -> None:
    manifest = Manifest.load(run)
    manifest.stream_sha256 = "0" * 64
    manifest.save()
    with pytest.raises(ProbeError, match=r"The stream 'toy' of .* has changed since it was trained on"):
        record_run(run)


def test_a_lone_checkpoint_is_recorded(run: Path, tmp_path: Path) -> None:
    steps: list[Progress] = []
    summary = record_checkpoint(
        run / "checkpoints" / "01-colour", probes=toy_probes(3), out=tmp_path / "x.h5", progress=steps.append
    )
    assert (summary.checkpoint, summary.sites, summary.probes, summary.samples) == ("01-colour", 6, 3, 9)
    assert summary.bytes == (tmp_path / "x.h5").stat().st_size
    assert summary.tokens == summary.stored_tokens == opened(tmp_path / "x.h5").n_tokens
    assert [s.done for s in steps] == [3, 6, 9]
    assert steps[-1].message == "recording 01-colour on shape"


def edit(folder: Path, **changes: object) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_checkpoints_that_cannot_be_loaded(run: Path, tmp_path: Path) -> None:
    good = run / "checkpoints" / "01-colour"

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    with pytest.raises(NotFoundError, match=r"No checkpoint at .*01-color\..* has: 00-start, 01-colour, 02-parity"):
        record_checkpoint(run / "checkpoints" / "01-color")
    bare = copy("bare")
    (bare / "adapter_config.json").unlink()
    with pytest.raises(NotFoundError, match=r"is not a checkpoint: it has no adapter_config\.json \(found: .*README"):
        record_checkpoint(bare)
    pickled = copy("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(NotFoundError, match=r"it has no adapter_model\.safetensors"):
        record_checkpoint(pickled)
    torn = copy("torn")
    weights = torn / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(FormatError, match=r"The adapter in .*torn cannot be loaded on 'tiny-random' \(SafetensorError"):
        load_checkpoint(torn)
    with pytest.raises(FormatError, match="belongs to another base model"):
        load_checkpoint(edit(copy("experts"), num_experts=4))
    with pytest.raises(FormatError, match=r"do not match adapter_config\.json: of 12 tensors 12 missing"):
        load_checkpoint(edit(copy("layers"), layers_to_transform=[0, 1]))
    with pytest.raises(FormatError, match=r"peft_type 'MOE_LORO', which PEFT does not know. Did you mean 'MOE_LORA'"):
        load_checkpoint(edit(copy("kind"), peft_type="MOE_LORO"))
    with pytest.raises(NotFoundError, match=r"names no base model. Give it with --base"):
        load_checkpoint(edit(copy("nameless"), base_model_name_or_path=None))
    (broken := copy("json")).joinpath("adapter_config.json").write_text("{")
    with pytest.raises(FormatError, match=r"adapter_config\.json is not valid JSON"):
        load_checkpoint(broken)


def test_a_stock_lora_folder_is_recorded_and_one_without_pathways_is_refused(tmp_path: Path) -> None:
    from peft import IA3Config, LoraConfig, get_peft_model

    backbone = load_backbone("tiny-random")
    model = get_peft_model(backbone.model, LoraConfig(r=2, target_modules=["up_proj"]))
    model.save_pretrained(str(tmp_path / "lora"))
    record_checkpoint(tmp_path / "lora", base="tiny-random", probes=toy_probes(2), out=tmp_path / "x.h5")
    assert {(site.family, site.num_experts, site.rank) for site in opened(tmp_path / "x.h5").sites} == {
        ("peft-lora", 1, 2)
    }
    other = get_peft_model(
        load_backbone("tiny-random").model, IA3Config(target_modules=["up_proj"], feedforward_modules=[])
    )
    other.save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(SiteError, match="LlavaForConditionalGeneration has no site where routing could be observed"):
        record_checkpoint(tmp_path / "ia3", base="tiny-random", probes=toy_probes(2), out=tmp_path / "y.h5")
    assert not (tmp_path / "y.h5").exists()
