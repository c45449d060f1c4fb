"""The live door: what a caller's own forwards do is recorded, and nothing about them changes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import driftlens as dl
from driftlens.adapters import iter_sites
from driftlens.backbones import Backbone, collate
from driftlens.errors import ConfigError, ProbeError, SiteError, StorageError
from driftlens.recording import LiveRecording, RecordingSummary, count_hooks
from driftlens.recording.recorder import Sink
from driftlens.store import verify_recording

from .support import adapted, assert_same_rows, datasets, opened, toy_probes

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


@pytest.fixture
def tiny() -> tuple[Backbone, PeftModel]:
    return adapted()


def batches(backbone: Backbone, size: int = 4) -> Iterator[tuple[str, dict[str, Any]]]:
    for task, rows in toy_probes().encode(backbone.encoder).items():
        for start in range(0, len(rows), size):
            batch = collate(rows[start : start + size], padding_side="left", pad_token_id=0)
            yield task, {k: v for k, v in batch.items() if k not in ("labels", "roles")}


def test_own_forwards_give_what_recording_the_probes_gives(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    backbone, model = tiny
    options = {"encoder": backbone.encoder, "checkpoint_meta": {"checkpoint": "x"}, "batch_size": 4}
    summary = dl.record(model, toy_probes(), tmp_path / "probes.h5", **options)
    assert isinstance(summary, RecordingSummary)
    with dl.record(model, toy_probes().tasks[0], out=tmp_path / "live.h5") as rec, torch.inference_mode():
        for task, batch in batches(backbone):
            rec.probe(task)
            model(**batch, use_cache=False)
    assert verify_recording(tmp_path / "live.h5") == []
    assert rec.summary is not None
    assert (rec.summary.tokens, rec.summary.samples) == (summary.tokens, summary.samples)
    live, probes = datasets(tmp_path / "live.h5"), datasets(tmp_path / "probes.h5")
    assert live.keys() == probes.keys()
    for name, value in probes.items():
        if name.startswith(("group_0", "weights", "sites", "probe")) or name in ("tokens/sample", "tokens/position"):
            np.testing.assert_array_equal(live[name], value, err_msg=name)
    np.testing.assert_array_equal(live["tokens/token_id"], probes["tokens/token_id"])
    meta = opened(tmp_path / "live.h5").meta
    assert (meta["live"], meta["dropped_tokens"], meta["parameters_changed"]) == (True, 0, False)


def test_outputs_gradients_and_modes_are_bit_equal(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    _, model = tiny
    model.train()
    model.get_base_model().model.vision_tower.eval()

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(3)
        model.zero_grad()
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    logits, gradients = step()
    before = {name: module.training for name, module in model.named_modules()}
    hooks = count_hooks(model)
    with dl.record(model, out=tmp_path / "x.h5"):
        recorded_logits, recorded_gradients = step()
    assert torch.equal(logits, recorded_logits)
    assert gradients
    assert gradients.keys() == recorded_gradients.keys()
    assert all(torch.equal(value, recorded_gradients[name]) for name, value in gradients.items())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert count_hooks(model) == hooks


class Mark(torch.autograd.Function):
    """The identity; its node in the graph holds an object whose end can be watched."""

    held: Any = None

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        class Held:
            pass

        ctx.held = Held()
        Mark.held = weakref.ref(ctx.held)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def test_no_graph_is_kept_alive(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    _, model = tiny
    _, last = list(iter_sites(model))[-1]
    handle = last.register_forward_pre_hook(lambda _module, args: (Mark.apply(args[0]),))
    with dl.record(model, out=tmp_path / "x.h5"):
        out = model(input_ids=IDS)
        assert Mark.held() is not None
        del out
        gc.collect()
        assert Mark.held() is None, "only the caller's own output held the graph"
    handle.remove()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(tiny: tuple[Backbone, PeftModel], tmp_path: Path, reentrant: bool) -> None:
    _, model = tiny
    root = model.get_base_model()
    model.train()
    with dl.record(model, out=tmp_path / "plain.h5"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    root.gradient_checkpointing_enable({"use_reentrant": reentrant})
    root.enable_input_require_grads()
    calls = []
    _, layer = next(iter(iter_sites(model)))
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    with dl.record(model, out=tmp_path / "checkpointed.h5"):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    handle.remove()
    assert len(calls) == 2, "the layer did run again"
    plain, checkpointed = datasets(tmp_path / "plain.h5"), datasets(tmp_path / "checkpointed.h5")
    for name, value in plain.items():
        np.testing.assert_array_equal(checkpointed[name], value, err_msg=name)


def test_generation_with_a_cache_counts_every_token_once(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    _, model = tiny
    prompt = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = (prompt != 0).long()
    options = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=prompt, **options)
    with dl.record(model, "answers", out=tmp_path / "g.h5") as rec:
        sequences = model.generate(input_ids=prompt, **options)
        model.generate(input_ids=prompt, **options)
    assert torch.equal(sequences, expected)
    recording = opened(tmp_path / "g.h5")
    tokens = recording.tokens("answers")
    assert rec.summary is not None
    assert rec.summary.samples == 4
    for row, padding in ((0, 2), (1, 0)):
        mine = tokens["sample"] == row
        # the last token that is generated is never given to the model
        real = sequences[row, padding:-1].numpy()
        np.testing.assert_array_equal(tokens["token_id"][mine], real)
        np.testing.assert_array_equal(tokens["position"][mine], np.arange(len(real)))
        np.testing.assert_array_equal(tokens["role"][mine], [1] * (5 - padding) + [2] * 3)
    full = sequences[:, :-1]
    with dl.record(model, "answers", out=tmp_path / "f.h5"), torch.no_grad():
        model(input_ids=full, attention_mask=torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1))
    once = opened(tmp_path / "f.h5")
    for site in recording.sites:
        found, order = recording.gate(site.name, "answers"), np.argsort(tokens["sample"], kind="stable")
        teacher = once.gate(site.name, "answers")
        assert_same_rows(found[order][: len(teacher)], teacher, site.name)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"use_cache": False}, "earlier tokens would be counted again"), ({"num_beams": 2}, "Beam search exchanges")],
)
def test_generation_that_cannot_be_counted_exactly_is_refused(
    tiny: tuple[Backbone, PeftModel], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    _, model = tiny
    with pytest.raises(SiteError, match=message), dl.record(model, out=tmp_path / "x.h5"):
        model.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, **options)
    assert not (tmp_path / "x.h5").exists()
    assert count_hooks(model) == 0


def test_a_cache_that_was_filled_before_is_refused(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    _, model = tiny
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    with (
        pytest.raises(SiteError, match=r"continues a key-value cache of 2 rows of 5 tokens.*left none"),
        dl.record(model, out=tmp_path / "x.h5"),
    ):
        model(input_ids=IDS[:, :1], past_key_values=cache)


def test_masks_say_which_tokens_are_real_and_others_are_refused(
    tiny: tuple[Backbone, PeftModel], tmp_path: Path
) -> None:
    _, model = tiny
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with dl.record(model, out=tmp_path / "x.h5") as rec:
        model(input_ids=IDS, attention_mask=mask)
    assert rec.summary is not None
    assert rec.summary.tokens == 8
    np.testing.assert_array_equal(opened(tmp_path / "x.h5").tokens("live")["sample"], [0] * 3 + [1] * 5)
    with (
        pytest.raises(SiteError, match=r"attention_mask has shape \[2, 1, 5, 5\]"),
        dl.record(model, out=tmp_path / "y.h5"),
    ):
        model(input_ids=IDS, attention_mask=torch.ones(2, 1, 5, 5))


def test_roles_come_from_labels(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    _, model = tiny
    labels = IDS.clone()
    labels[:, :3] = -100
    with dl.record(model, out=tmp_path / "x.h5"):
        model(input_ids=IDS, labels=labels)
    np.testing.assert_array_equal(opened(tmp_path / "x.h5").tokens("live")["role"], [1, 1, 1, 2, 2] * 2)


def test_probes_follow_one_another_with_running_samples(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    _, model = tiny
    with dl.record(model, "a", out=tmp_path / "x.h5") as rec:
        model(input_ids=IDS)
        model(input_ids=IDS + 1)
        rec.probe("b")
        model(input_ids=IDS[:1])
        with pytest.raises(ConfigError, match=r"probe 'a' of .* ended when 'b' began"):
            rec.probe("a")
    recording = opened(tmp_path / "x.h5")
    assert recording.probes == ["a", "b"]
    assert recording.sample_ids("a") == ["0", "1", "2", "3"]
    assert recording.sample_ids("b") == ["0"]
    np.testing.assert_array_equal(recording.groups[0].stats["count"], [20, 5])


def test_a_subset_of_rows_is_stored_and_all_tokens_are_summed(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    _, model = tiny
    with dl.record(model, out=tmp_path / "x.h5", tokens_per_sample=2) as rec:
        model(input_ids=IDS)
    assert rec.summary is not None
    assert (rec.summary.stored_tokens, rec.summary.tokens) == (4, 10)


def test_forwards_inside_paused_are_not_recorded(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    _, model = tiny
    with dl.record(model, out=tmp_path / "x.h5") as rec:
        model(input_ids=IDS)
        with rec.paused(), model.disable_adapter():
            model(input_ids=IDS)
        model(input_ids=IDS + 1)
    assert rec.summary is not None
    assert rec.summary.tokens == 20


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_file_and_no_hook(
    tiny: tuple[Backbone, PeftModel], tmp_path: Path, error: type[BaseException]
) -> None:
    _, model = tiny
    with pytest.raises(error, match="stop"), dl.record(model, out=tmp_path / "x.h5"):  # noqa: PT012 - the error must strike inside the block
        model(input_ids=IDS)
        raise error("stop")
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == []
    assert count_hooks(model) == 0


def test_an_existing_file_is_refused_before_anything_runs(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(b"mine")
    with pytest.raises(StorageError, match="exists already"), dl.record(tiny[1], out=tmp_path / "x.h5"):
        pytest.fail("the block must not run")
    assert (tmp_path / "x.h5").read_bytes() == b"mine"
    assert count_hooks(tiny[1]) == 0


def test_a_block_without_a_forward_is_an_error(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="ran no forward with a real token"), dl.record(tiny[1], out=tmp_path / "x.h5"):
        pass
    assert not (tmp_path / "x.h5").exists()


def test_parameters_that_change_inside_are_followed_and_said(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    _, model = tiny
    with dl.record(model, out=tmp_path / "x.h5"), torch.no_grad():
        model(input_ids=IDS)
        for _, layer in iter_sites(model):
            layer.moe_lora_B["default"].weight.mul_(2)
        model(input_ids=IDS)
    recording = opened(tmp_path / "x.h5")
    assert recording.meta["parameters_changed"] is True
    norms = np.asarray(recording.groups[0].expert_norm[0], dtype=np.float64)
    np.testing.assert_allclose(norms[10:], 2 * norms[:10], rtol=2e-3)


def test_dropping_is_counted_and_never_happens_unasked(
    tiny: tuple[Backbone, PeftModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = tiny
    free, original = threading.Event(), Sink.__call__

    def slow(self: Sink, batch: Any) -> None:
        free.wait(20)
        original(self, batch)

    monkeypatch.setattr(Sink, "__call__", slow)
    with dl.record(model, out=tmp_path / "x.h5", drop=True) as rec, torch.no_grad():
        for shift in range(6):
            model(input_ids=IDS + shift)
        assert rec.dropped_tokens >= 30
        free.set()
    assert rec.summary is not None
    assert rec.summary.tokens + rec.dropped_tokens == 60
    recording = opened(tmp_path / "x.h5")
    assert recording.meta["dropped_tokens"] == rec.dropped_tokens
    assert recording.groups[0].stats["count"].sum() == rec.summary.tokens


def test_a_batch_above_the_memory_cap_is_refused(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"max_buffer_mb allows 0\.0 MB"),
        dl.record(tiny[1], out=tmp_path / "x.h5", max_buffer_mb=0.001),
    ):
        tiny[1](input_ids=IDS)
    assert not (tmp_path / "x.h5").exists()


def test_a_compiled_model_is_refused(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    compiled = torch.compile(tiny[1])
    with (
        pytest.raises(SiteError, match=r"is compiled .torch.compile.*_orig_mod"),
        dl.record(compiled, out=tmp_path / "x.h5"),
    ):
        pass


def test_a_forward_in_another_thread_is_refused(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    errors = []

    def run() -> None:
        try:
            tiny[1](input_ids=IDS)
        except SiteError as error:
            errors.append(str(error))

    with pytest.raises(ProbeError), dl.record(tiny[1], out=tmp_path / "x.h5"):  # noqa: PT012 - the error must strike inside the block
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert "another thread" in errors[0]


def test_autocast_of_the_caller_does_not_reach_the_sums(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    _, model = tiny
    with dl.record(model, out=tmp_path / "x.h5"), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=IDS)
    group = opened(tmp_path / "x.h5").groups[0]
    gate = np.asarray(group.gate[...], dtype=np.float64)
    expected = np.einsum("sne,snf->sef", gate, gate)
    np.testing.assert_allclose(group.stats["gate_outer"][:, 0], expected, rtol=2e-3)


@pytest.mark.parametrize(("arguments", "message"), [((None,), "needs a file"), ((3, "x.h5"), "Cannot record on int")])
def test_calls_that_say_nothing_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dl.record(nn.Linear(2, 2), *arguments)


def test_a_name_gives_a_recording_that_has_not_begun(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    recording = dl.record(tiny[1], "task", out=tmp_path / "x.h5")
    assert isinstance(recording, LiveRecording)
    assert recording.summary is None
    assert list(tmp_path.iterdir()) == []
    assert count_hooks(tiny[1]) == 0
