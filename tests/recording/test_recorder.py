"""What a recording holds is what the layers did: rows, sums and weights, whatever the batches were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

from driftlens.adapters import iter_sites
from driftlens.backbones import Backbone, collate
from driftlens.backbones.prefix import FrozenPrefix
from driftlens.errors import ConfigError, ProbeError, SiteError, StorageError
from driftlens.recording import ProbePrefix, ProbeSample, ProbeSet, count_hooks, record
from driftlens.recording.sites import base_module

from .support import E, R, adapted, assert_same_rows, datasets, opened, toy_probes

META = {"checkpoint": "03-digit"}


@pytest.fixture(scope="module")
def tiny() -> tuple[Backbone, PeftModel]:
    return adapted()


@pytest.fixture(scope="module")
def one(tiny: tuple[Backbone, PeftModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference recording: all rows, batches of 4, padded on the left."""
    path = tmp_path_factory.mktemp("one") / "03-digit.h5"
    backbone, model = tiny
    record(model, toy_probes(), path, encoder=backbone.encoder, checkpoint_meta=META, batch_size=4)
    return path


def observed(model: nn.Module, backbone: Backbone, probes: ProbeSet, task: str) -> dict[str, dict[str, torch.Tensor]]:
    """What every layer really computes, sample by sample and unpadded: the independent reference."""
    root, seen, handles = base_module(model), {}, []
    for name, layer in iter_sites(model):
        store: dict[str, list[torch.Tensor]] = {"out": [], "base": [], "gate": [], "z": []}
        seen[name] = store
        handles += [
            layer.register_forward_hook(lambda _m, _a, out, s=store: s["out"].append(out[0])),
            layer.base_layer.register_forward_hook(lambda _m, _a, out, s=store: s["base"].append(out[0])),
            layer.moe_lora_gate["default"].register_forward_hook(lambda _m, _a, out, s=store: s["gate"].append(out[0])),
            layer.moe_lora_A["default"].register_forward_hook(lambda _m, _a, out, s=store: s["z"].append(out[0])),
        ]
    with torch.inference_mode():
        for row in probes.encode(backbone.encoder)[task]:
            batch = collate([row], pad_token_id=0)
            root(**{k: v for k, v in batch.items() if k not in ("labels", "roles")})
    for handle in handles:
        handle.remove()
    return {name: {k: torch.cat(v) for k, v in store.items()} for name, store in seen.items()}


@pytest.mark.parametrize("gate", ["softmax", "topk", "energy"])
def test_rows_reproduce_gates_and_the_layers_output(gate: str, tmp_path: Path) -> None:
    backbone, model = adapted(gate)
    probes = toy_probes()
    record(model, probes, tmp_path / "x.h5", encoder=backbone.encoder, checkpoint_meta=META, batch_size=4)
    recording = opened(tmp_path / "x.h5")
    for task in probes.tasks:
        truth = observed(model, backbone, probes, task)
        for info in recording.sites:
            pi, z = recording.gate(info.name, task), recording.pathway(info.name, task)
            assert np.abs(pi.sum(-1) - 1).max() < 1e-3
            real = truth[info.name]
            np.testing.assert_allclose(pi, real["gate"].numpy(), atol=1e-3)
            b = recording.weights(info.name)["B"]
            assert b is not None
            rebuilt = info.scaling * np.einsum("ne,nek,edk->nd", pi, z, b)
            branch = (real["out"] - real["base"]).numpy()
            error = np.linalg.norm(rebuilt - branch, axis=-1) / np.linalg.norm(branch, axis=-1)
            assert error.max() < 1e-3
            group, row = recording.locate(info.name)
            np.testing.assert_allclose(
                group.read("base_norm", task)[row], torch.linalg.vector_norm(real["base"], dim=-1), rtol=1e-3
            )
            experts = info.scaling * torch.einsum("nek,edk->ned", real["z"], torch.from_numpy(b))
            np.testing.assert_allclose(
                group.read("expert_norm", task)[row], torch.linalg.vector_norm(experts, dim=-1), rtol=1e-3
            )


def test_sums_equal_brute_force_over_all_tokens(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    backbone, model = tiny
    probes = toy_probes(tokens_per_sample=3)
    record(model, probes, tmp_path / "x.h5", encoder=backbone.encoder, checkpoint_meta=META, batch_size=2)
    recording = opened(tmp_path / "x.h5")
    for p, task in enumerate(probes.tasks):
        truth = observed(model, backbone, probes, task)
        for info in recording.sites:
            group, s = recording.locate(info.name)
            pi, z = (truth[info.name][k].double().numpy() for k in ("gate", "z"))
            b = np.asarray(recording.weights(info.name)["B"], dtype=np.float64)
            outputs = info.scaling * np.einsum("nek,edk->ned", z, b)
            expected = {
                "gate_sum": pi.sum(0),
                "gate_outer": np.einsum("ne,nf->ef", pi, pi),
                "gated_energy": np.einsum("ne,nek->ek", pi, z**2),
                "second_moment": np.einsum("nek,nel->ekl", z, z),
                "entropy": -(pi * np.log(pi)).sum(),
                "energy": (z**2).sum((0, 2)),
                "expert_sq": (outputs**2).sum((0, 2)),
                "base_sq": (truth[info.name]["base"].double().numpy() ** 2).sum(),
            }
            assert group.stats["count"][p] == len(pi) > len(recording.tokens(task)["sample"])
            for name, value in expected.items():
                found, scale = group.stats[name][s, p], np.abs(value).max()
                np.testing.assert_allclose(found / scale, value / scale, rtol=0, atol=2e-6, err_msg=name)


def test_weights_are_the_models_bit_for_bit(tiny: tuple[Backbone, PeftModel], one: Path) -> None:
    recording = opened(one)
    for name, layer in iter_sites(tiny[1]):
        weights = recording.weights(name)
        a, b = layer.moe_lora_A["default"].weight.detach(), layer.moe_lora_B["default"].weight.detach()
        for e in range(E):
            rows = slice(e * R, (e + 1) * R)
            np.testing.assert_array_equal(weights["A"][e], a[rows])
            np.testing.assert_array_equal(weights["B"][e], b[:, rows])
        np.testing.assert_array_equal(weights["router"], layer.moe_lora_gate["default"].weight.detach())


def test_tokens_are_the_samples_tokens_without_padding(tiny: tuple[Backbone, PeftModel], one: Path) -> None:
    recording, probes = opened(one), toy_probes()
    for task, rows in probes.encode(tiny[0].encoder).items():
        tokens = recording.tokens(task)
        assert recording.sample_ids(task) == [row.sample_id for row in rows]
        np.testing.assert_array_equal(tokens["token_id"], np.concatenate([row.input_ids for row in rows]))
        np.testing.assert_array_equal(tokens["role"], np.concatenate([row.roles for row in rows]))
        np.testing.assert_array_equal(tokens["position"], np.concatenate([np.arange(len(r.roles)) for r in rows]))
        np.testing.assert_array_equal(tokens["sample"], np.repeat(np.arange(len(rows)), [len(r.roles) for r in rows]))


@pytest.mark.parametrize(("batch_size", "side"), [(1, "left"), (3, "right"), (16, "left"), (16, "right")])
def test_batches_and_padding_change_nothing(
    tiny: tuple[Backbone, PeftModel], one: Path, tmp_path: Path, batch_size: int, side: str
) -> None:
    backbone, model = tiny
    path = tmp_path / "x.h5"
    record(
        model,
        toy_probes(),
        path,
        encoder=backbone.encoder,
        checkpoint_meta=META,
        batch_size=batch_size,
        padding_side=side,  # type: ignore[arg-type]
    )
    found, expected = datasets(path), datasets(one)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype.kind != "f":
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        elif "stats" in name:
            np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-6 * np.abs(value).max(), err_msg=name)
        else:
            assert_same_rows(found[name], value, name)


def test_order_of_samples_changes_nothing(tiny: tuple[Backbone, PeftModel], one: Path, tmp_path: Path) -> None:
    backbone, model = tiny
    probes = toy_probes()
    backwards = ProbeSet({task: rows[::-1] for task, rows in probes.samples.items()})
    record(model, backwards, tmp_path / "x.h5", encoder=backbone.encoder, checkpoint_meta=META, batch_size=4)
    there, here = opened(one), opened(tmp_path / "x.h5")
    for task in probes.tasks:
        last = len(probes.samples[task]) - 1
        order = np.lexsort((here.tokens(task)["position"], last - here.tokens(task)["sample"]))
        np.testing.assert_array_equal(here.tokens(task)["token_id"][order], there.tokens(task)["token_id"])
        for site in there.sites:
            np.testing.assert_allclose(here.gate(site.name, task)[order], there.gate(site.name, task), atol=2**-11)


def test_stored_rows_are_the_same_subset_for_every_batching(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    backbone, model = tiny
    full = toy_probes()
    tokens = {}
    for number, options in enumerate(({"batch_size": 2}, {"batch_size": 16, "padding_side": "right"})):
        path = tmp_path / f"{number}.h5"
        record(
            model,
            full,
            path,
            encoder=backbone.encoder,
            checkpoint_meta=META,
            tokens_per_sample=5,
            **options,  # type: ignore[arg-type]
        )
        recording = opened(path)
        tokens[number] = {task: recording.tokens(task) for task in full.tasks}
    for task, rows in full.encode(backbone.encoder).items():
        first, second = tokens[0][task], tokens[1][task]
        for column in first:
            np.testing.assert_array_equal(first[column], second[column])
        for index, row in enumerate(rows):
            mine = first["sample"] == index
            assert mine.sum() == 5
            assert set(first["role"][mine]) == set(row.roles), "every role of the sample is represented"
            np.testing.assert_array_equal(first["token_id"][mine], row.input_ids[first["position"][mine]])


def test_only_the_wanted_roles_are_recorded(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    backbone, model = tiny
    probes = toy_probes()
    answers = ProbeSet(probes.samples, roles=("answer",))
    record(model, answers, tmp_path / "x.h5", encoder=backbone.encoder, checkpoint_meta=META)
    recording = opened(tmp_path / "x.h5")
    for p, (task, rows) in enumerate(answers.encode(backbone.encoder).items()):
        assert set(recording.tokens(task)["role"]) == {2}
        assert recording.groups[0].stats["count"][p] == sum(len(r.roles) - r.n_prompt for r in rows)


def test_a_role_that_a_task_does_not_have_is_refused(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    backbone, model = tiny
    images = ProbeSet(toy_probes().samples, roles=("image",))
    with pytest.raises(ProbeError, match=r"task 'parity' has no token with the roles to record \(image\)"):
        record(model, images, tmp_path / "x.h5", encoder=backbone.encoder, checkpoint_meta=META)


def test_same_inputs_give_the_same_bytes(tiny: tuple[Backbone, PeftModel], one: Path, tmp_path: Path) -> None:
    backbone, model = tiny
    record(model, toy_probes(), tmp_path / "again.h5", encoder=backbone.encoder, checkpoint_meta=META, batch_size=4)
    assert (tmp_path / "again.h5").read_bytes() == one.read_bytes()


def test_measuring_the_overhead_does_not_change_the_file(
    tiny: tuple[Backbone, PeftModel], one: Path, tmp_path: Path
) -> None:
    backbone, model = tiny
    path = tmp_path / "timed.h5"
    summary = record(
        model,
        toy_probes(),
        path,
        encoder=backbone.encoder,
        checkpoint_meta=META,
        batch_size=4,
        overhead_batches=2,
    )
    assert summary.overhead_percent is not None
    assert np.isfinite(summary.overhead_percent)
    assert path.read_bytes() == one.read_bytes()


def test_outputs_are_bit_equal_with_recording_on(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    backbone, model = tiny
    probes, root, logits = toy_probes(), base_module(model), []
    handle = root.lm_head.register_forward_hook(lambda _m, _a, out: logits.append(out.clone()))
    record(model, probes, tmp_path / "x.h5", encoder=backbone.encoder, checkpoint_meta=META, batch_size=5)
    with_recording, logits = logits[:], logits
    logits.clear()
    with torch.inference_mode():
        for rows in probes.encode(backbone.encoder).values():
            batch = collate(rows, pad_token_id=backbone.encoder.pad_token_id)
            root(**{k: v for k, v in batch.items() if k not in ("labels", "roles")}, logits_to_keep=1)
    handle.remove()
    assert len(logits) == len(with_recording) == 3
    assert all(torch.equal(a, b) for a, b in zip(logits, with_recording, strict=True))


def test_cached_lower_layers_give_the_same_recording(
    tiny: tuple[Backbone, PeftModel], one: Path, tmp_path: Path
) -> None:
    backbone, model = tiny
    probes = toy_probes()
    prefix = FrozenPrefix(model, 2, backbone.encoder.pad_token_id)
    states = {t: prefix.compute(rows, 4, "cpu") for t, rows in probes.encode(backbone.encoder).items()}
    record(
        model,
        probes,
        tmp_path / "x.h5",
        encoder=backbone.encoder,
        checkpoint_meta=META,
        batch_size=4,
        prefix=ProbePrefix(prefix, states),
    )
    found, expected = datasets(tmp_path / "x.h5"), datasets(one)
    for name in ("group_0/gate", "group_0/pathway"):
        assert_same_rows(found[name], expected[name], name)


def test_token_ids_need_no_tokenizer(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    backbone, model = tiny
    text = toy_probes().select(["parity"])
    encoded = text.encode(backbone.encoder)["parity"]
    ids = ProbeSet(
        {
            "parity": tuple(
                ProbeSample(
                    row.sample_id,
                    input_ids=tuple(row.input_ids[: row.n_prompt].tolist()),
                    answer_ids=tuple(row.input_ids[row.n_prompt :].tolist()),
                )
                for row in encoded
            )
        }
    )
    record(model, text, tmp_path / "text.h5", encoder=backbone.encoder, checkpoint_meta=META)
    record(model, ids, tmp_path / "ids.h5", encoder=None, checkpoint_meta=META)
    text_data, ids_data = datasets(tmp_path / "text.h5"), datasets(tmp_path / "ids.h5")
    for name, value in text_data.items():
        np.testing.assert_array_equal(ids_data[name], value, err_msg=name)


def test_a_bfloat16_model_records(tmp_path: Path) -> None:
    backbone, model = adapted()
    model.to(torch.bfloat16)
    record(model, toy_probes(), tmp_path / "x.h5", encoder=backbone.encoder, checkpoint_meta=META)
    recording = opened(tmp_path / "x.h5")
    assert recording.meta["dtype"] == "bfloat16"
    assert np.abs(recording.groups[0].gate[...].astype(float).sum(-1) - 1).max() < 1e-3


def test_training_mode_is_restored_and_no_hook_is_left(tiny: tuple[Backbone, PeftModel], tmp_path: Path) -> None:
    backbone, model = tiny
    model.train()
    model.get_base_model().model.vision_tower.eval()
    before = {name: module.training for name, module in model.named_modules()}
    record(model, toy_probes(), tmp_path / "x.h5", encoder=backbone.encoder, checkpoint_meta=META)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert count_hooks(model) == 0
    model.eval()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_recording_leaves_the_old_state(
    tiny: tuple[Backbone, PeftModel], one: Path, tmp_path: Path, error: type[BaseException], existing: bool
) -> None:
    backbone, model = tiny
    path = tmp_path / "x.h5"
    if existing:
        path.write_bytes(one.read_bytes())
    calls = []

    def fail(_m: nn.Module, _a: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error("stop")

    _, layer = list(iter_sites(model))[-1]
    handle = layer.register_forward_pre_hook(fail)
    hooks = count_hooks(model)
    options = {"encoder": backbone.encoder, "checkpoint_meta": META, "batch_size": 4, "overwrite": True}
    with pytest.raises(error, match="stop"):
        record(model, toy_probes(), path, **options)  # type: ignore[arg-type]
    assert count_hooks(model) == hooks, "only the test's own hook stays"
    handle.remove()
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == (["x.h5"] if existing else [])
    record(model, toy_probes(), path, **options)  # type: ignore[arg-type]
    assert path.read_bytes() == one.read_bytes()


def test_an_existing_file_is_not_replaced_unasked(tiny: tuple[Backbone, PeftModel], one: Path, tmp_path: Path) -> None:
    backbone, model = tiny
    before = one.read_bytes()
    with pytest.raises(StorageError, match="exists already"):
        record(model, toy_probes(), one, encoder=backbone.encoder, checkpoint_meta=META)
    assert one.read_bytes() == before


def test_values_that_are_not_finite_name_the_site(tmp_path: Path) -> None:
    backbone, model = adapted()
    name, layer = list(iter_sites(model))[4]
    with torch.no_grad():
        layer.moe_lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(SiteError, match=rf"Site {name} gave values that are not finite"):
        record(model, toy_probes(), tmp_path / "x.h5", encoder=backbone.encoder, checkpoint_meta=META)
    assert not (tmp_path / "x.h5").exists()


def test_a_gate_that_does_not_sum_to_one_names_the_site(tmp_path: Path) -> None:
    backbone, model = adapted()
    name, layer = list(iter_sites(model))[2]
    layer.moe_lora_gate["default"].register_forward_hook(lambda _m, _a, out: 2 * out)
    with pytest.raises(SiteError, match=rf"Gate rows of site {name} do not sum to 1 \(off by up to 1\)"):
        record(model, toy_probes(), tmp_path / "x.h5", encoder=backbone.encoder, checkpoint_meta=META)


def test_experts_without_output_have_norm_zero(tmp_path: Path) -> None:
    backbone, model = adapted()
    with torch.no_grad():
        for _, layer in iter_sites(model):
            layer.moe_lora_B["default"].weight.zero_()
    record(model, toy_probes(), tmp_path / "x.h5", encoder=backbone.encoder, checkpoint_meta=META)
    group = opened(tmp_path / "x.h5").groups[0]
    assert not group.expert_norm[...].any()
    assert not group.stats["expert_sq"].any()
    assert group.stats["energy"].all()


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"padding_side": "middle"}, {"tokens_per_sample": 0}])
def test_impossible_settings_are_refused(
    tiny: tuple[Backbone, PeftModel], tmp_path: Path, options: dict[str, object]
) -> None:
    backbone, model = tiny
    with pytest.raises(ConfigError, match="must be at least 1 and the side 'left' or 'right'"):
        record(
            model,
            toy_probes(),
            tmp_path / "x.h5",
            encoder=backbone.encoder,
            checkpoint_meta=META,
            **options,  # type: ignore[arg-type]
        )
