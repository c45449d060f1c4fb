"""Folders of CoIN, MCITlib and Prism: what is inferred, restored and refused, and that outputs are each one's own."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from driftlens.backbones import Backbone
from driftlens.cli.main import app
from driftlens.errors import ConfigError, DriftLensError, FormatError, NotFoundError, SiteError, UnknownNameError
from driftlens.recording import LoadedCheckpoint, count_hooks, find_sites, load_checkpoint, write_probes
from driftlens.recording.foreign import FOREIGN_SEMANTICS, prototype_weights, read_folder, read_state
from driftlens.recording.reference import load_reference
from driftlens.store import open_recording
from tests.recording.families.foreign import expert_weights
from tests.recording.families.suite import probes
from tests.recording.foreign.folders import BASES, LAYOUTS, added, llama, name_in, write

WEIGHTED = ("same", "hide", "prism_hide", "disco")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def backbone(base: str = "LLaMA") -> Backbone:
    return Backbone(base, "0" * 64, BASES[base](), None)  # type: ignore[arg-type]


def load(folder: Path, base: str = "LLaMA", **options: Any) -> LoadedCheckpoint:
    return load_checkpoint(folder, backbone=backbone(base), **options)


def ids(length: int = 9) -> Tensor:
    return torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(4))


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_a_loop_over_experts(name: str, base: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    plain = write(tmp_path / "c", layout, base)
    w = expert_weights(name)
    loaded = load(tmp_path / "c", base, expert_weights=w if layout.semantics in WEIGHTED else None)
    other = BASES[base]()
    projector = getattr(loaded.model.get_submodule("model"), "multi_modal_projector", None)
    if projector is not None:
        other.get_submodule("model.multi_modal_projector").load_state_dict(projector.state_dict())
    sites = {key.split(".lora_")[0] for key in plain}
    for site in sites:  # the plain base model, with the loop added to each layer's output

        def add(_m: nn.Module, args: tuple[Tensor], out: Tensor, site: str = site) -> Tensor:
            return out + added(layout, plain, site, args[0][0].double(), w).float()[None]

        other.get_submodule(name_in(base, site)).register_forward_hook(add)
    inputs: dict[str, Tensor] = {"input_ids": ids()}
    if projector is not None:  # an image of four patches, so that the restored projector matters
        inputs["input_ids"] = torch.cat([torch.full((1, 4), 79), ids()], 1)
        inputs["pixel_values"] = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mine, expected, bare = (m(**inputs).logits for m in (loaded.model, other, BASES[base]()))
    error = float((mine - expected).abs().max())
    print(f"{name} on {base}: max |logit error| {error:.1e}, adapter moves logits by {(mine - bare).abs().max():.2f}")
    assert error < 1e-4
    assert (mine - bare).abs().max() > 0.01


def test_same_routes_each_sample_alone_and_leaves_padding_out(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["Prism SAME"])
    model = load(tmp_path / "c").model
    one, two = ids(9), ids(5) + 1
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), two], 1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        alone = model(input_ids=two).logits
        together = model(input_ids=torch.cat([one, padded]), attention_mask=mask).logits[1:, 4:]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_same_needs_a_mask_of_tokens(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["Prism SAME"])
    model = load(tmp_path / "c").model
    with pytest.raises(SiteError, match="attention_mask"):
        model(input_ids=ids(), attention_mask=torch.zeros(1, 1, 9, 9))


def test_slot_select_is_the_current_slot_alone(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["MCITlib HiDe"])
    sites = find_sites(load(tmp_path / "c", semantics="slot_select").model)
    assert sites[0].respond is not None
    gate = sites[0].respond(torch.randn(2, sites[0].info.d_in))["gate"]
    assert gate.tolist() == [[0.0, 1.0, 0.0]] * 2


def test_a_mask_given_by_position_counts_too(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["Prism SAME"])
    model, padded = load(tmp_path / "c").model, torch.cat([torch.zeros(1, 3, dtype=torch.long), ids()], 1)
    mask = (torch.arange(12) > 2).long()[None]
    with torch.no_grad():
        assert torch.equal(model(padded, mask).logits, model(input_ids=padded, attention_mask=mask).logits)
        assert not torch.equal(model(padded, mask).logits, model(padded).logits)


def test_weights_in_bfloat16_take_the_type_of_the_base(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["MCITlib MoELoRA"])
    _tensors(lambda t: t.update({key: value.bfloat16() for key, value in t.items()}))(tmp_path / "c")
    with torch.no_grad():
        assert load(tmp_path / "c").model(input_ids=ids()).logits.dtype == torch.float32


# ---------------------------------------------------------------- semantics


@pytest.mark.parametrize("name", LAYOUTS)
def test_semantics_follow_from_the_folder(name: str, tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS[name])
    loaded = load(tmp_path / "c")
    assert loaded.meta["semantics"] == LAYOUTS[name].semantics
    products = {"product_of_sums": 2, "same": 2, "hide": 1}.get(LAYOUTS[name].semantics, 0)
    found = {site.info.layer: site.info.semantics for site in find_sites(loaded.model)}
    assert list(found.values()) == ["product_of_sums"] * products + ["sum_gBA"] * (2 - products)


@pytest.mark.parametrize("name", ["CoIN MoELoRA", "MCITlib HiDe", "Prism HiDe", "Prism moelora", "MCITlib O-LoRA"])
def test_a_guess_among_codebases_is_warned_about_and_an_answer_is_not(name: str, tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS[name])
    layout = LAYOUTS[name]
    with pytest.warns(UserWarning, match=f"took --semantics {layout.semantics} "):
        load(tmp_path / "c")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load(tmp_path / "c", semantics=layout.semantics)
    assert not [w for w in seen if "took --semantics" in str(w.message)]


def test_an_explicit_semantics_computes_another_function_from_the_same_keys(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["CoIN MoELoRA"])
    one, two = (load(tmp_path / "c", semantics=name).model for name in ("sum_gBA", "product_of_sums"))
    with torch.no_grad():
        assert (one(input_ids=ids()).logits - two(input_ids=ids()).logits).abs().max() > 1e-3


def test_the_slot_that_o_lora_always_trains_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["MCITlib O-LoRA"])
    assert read_folder(tmp_path / "c").trained == (4,)
    with pytest.warns(UserWarning, match="only slot 4 of 5 was ever trained"):
        load(tmp_path / "c")


def test_missing_cur_task_is_replaced_by_a_stated_guess(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["MCITlib HiDe"], cur_task=None)
    with pytest.warns(UserWarning, match="took 1, the last slot that was trained"):
        load(tmp_path / "c")
    write(tmp_path / "d", LAYOUTS["MCITlib HiDe"], cur_task=7)
    with pytest.raises(FormatError, match="cur_task 7, expected a slot from 0 to 2"):
        load(tmp_path / "d")


@pytest.mark.parametrize("name", ["Prism SAME", "MCITlib HiDe", "MCITlib DISCO", "Prism HiDe"])
def test_without_clip_features_trained_slots_weigh_alike_and_that_is_said(name: str, tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS[name])
    with pytest.warns(UserWarning, match="depends on CLIP features"):
        loaded = load(tmp_path / "c")
    site = find_sites(loaded.model)[-1]
    assert site.info.gate.endswith("-uniform")
    assert loaded.meta["expert_weights"] == "uniform"
    if site.respond is not None:
        trained = LAYOUTS[name].trained
        expected = [1 / len(trained) if e in trained else 0.0 for e in range(3)]
        np.testing.assert_allclose(site.respond(torch.zeros(1, site.info.d_in))["gate"][0], expected)
    given = load(tmp_path / "c", expert_weights=[0.2, 0.3, 0.5])
    assert find_sites(given.model)[-1].info.gate.endswith("-given")


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [1.0, float("nan"), 0.0]])
def test_expert_weights_that_cannot_be_meant_are_refused(weights: list[float], tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["MCITlib DISCO"])
    with pytest.raises(ConfigError, match="Expert weights must be 3 numbers"):
        load(tmp_path / "c", expert_weights=weights)


def test_options_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["CoIN MoELoRA"])
    with pytest.raises(ConfigError, match="needs none"):
        load(tmp_path / "c", expert_weights=[1, 1, 1])
    with pytest.raises(UnknownNameError, match="Did you mean 'disco'"):
        load(tmp_path / "c", semantics="disko")
    write(tmp_path / "d", LAYOUTS["MCITlib DISCO"])
    with pytest.raises(FormatError, match="no lora_router"):
        load(tmp_path / "d", semantics="sum_gBA")


# ---------------------------------------------------------------- extra state


def test_prototypes_give_the_weights_of_each_method(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(2)
    image, text = torch.randn(24, generator=g), torch.randn(24, generator=g)

    def cos(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    for name, rule in {
        "MCITlib HiDe": lambda i, t: (i + t) / 2 / 0.1,
        "MCITlib DISCO": lambda i, t: t / 0.05,
        "Prism SAME": lambda i, t: 28 * (0.2 * i + 0.8 * t),
    }.items():
        folder = tmp_path / name
        write(folder, LAYOUTS[name])
        state = read_state(folder, read_folder(folder).buffers)
        assert state.image is not None
        assert state.text is not None
        scores = [rule(cos(image, state.image[e]), cos(text, state.text[e])) for e in range(3)]
        expected = np.exp(scores) / np.exp(scores).sum()
        found = prototype_weights(state, LAYOUTS[name].semantics, 3, image=image, text=text)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    with pytest.raises(ConfigError, match="text feature"):
        prototype_weights(state, "same", 3)


def test_sames_state_is_read_from_either_place_and_must_agree(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write(folder, LAYOUTS["Prism SAME"])
    both = read_state(folder, read_folder(folder).buffers)
    (folder / "same_state.bin").rename(tmp_path / "aside")
    copies = read_state(folder, read_folder(folder).buffers)
    assert torch.equal(both.image, copies.image)  # type: ignore[arg-type]
    assert "model.layers.0.mlp.up_proj.cov_U_prev_default" in copies.buffers
    state = torch.load(tmp_path / "aside", weights_only=True)
    state["image_anchors"][0] += 1
    torch.save(state, folder / "same_state.bin")
    with pytest.raises(FormatError, match=r"image_anchors\.0 in same_state.bin and in the adapter file"):
        load(folder)


def test_the_projector_goes_into_a_llava_and_comes_out_again(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["CoIN MoELoRA"], "LLaVA")
    stored = torch.load(tmp_path / "c" / "non_lora_trainables.bin", weights_only=True)
    base = backbone("LLaVA")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    hooks = count_hooks(base.model)
    loaded = load_checkpoint(tmp_path / "c", backbone=base)
    second = base.model.get_parameter("model.multi_modal_projector.linear_2.weight")
    assert torch.equal(second, stored["base_model.model.model.mm_projector.2.weight"])
    assert len(loaded.meta["restored"]) == 4
    loaded.unload()
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert count_hooks(base.model) == hooks


def test_a_projector_without_a_place_is_left_out_and_one_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["CoIN MoELoRA"], "LLaVA")
    with pytest.warns(UserWarning, match="takes no images"):
        assert load(tmp_path / "c").meta["restored"] == []
    path = tmp_path / "c" / "non_lora_trainables.bin"
    stored = torch.load(path, weights_only=True)
    del stored["base_model.model.model.mm_projector.2.bias"]
    torch.save(stored, path)
    with pytest.raises(FormatError, match="mm_projector"):
        load(tmp_path / "c", "LLaVA")


def test_checkpoints_follow_each_other_on_one_base_and_each_has_its_hash(tmp_path: Path) -> None:
    base = backbone()
    digests = set()
    for seed in (1, 2, 1):
        folder = tmp_path / f"c{len(list(tmp_path.iterdir()))}"
        write(folder, LAYOUTS["MCITlib MoELoRA"], seed=seed)
        loaded = load_checkpoint(folder, backbone=base)
        assert len(find_sites(loaded.model)) == 14
        digests.add(loaded.meta["checkpoint_sha256"])
        loaded.unload()
    assert len(digests) == 2


def test_an_anchor_answers_to_the_inputs_of_another_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "old", LAYOUTS["CoIN MoELoRA"], seed=1)
    write(tmp_path / "new", LAYOUTS["CoIN MoELoRA"], seed=2)
    loaded = load(tmp_path / "new")
    with torch.no_grad():
        before = loaded.model(input_ids=ids()).logits
    reference = load_reference(loaded, tmp_path / "old")
    own = find_sites(load(tmp_path / "old").model)
    h = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    assert [site.info for site in reference.sites] == [site.info for site in own]
    answer, expected = (sites[0].respond(h) for sites in (reference.sites, own))  # type: ignore[misc]
    assert torch.equal(answer["gate"], expected["gate"])
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids()).logits, before)


# ---------------------------------------------------------------- damaged and hostile folders


class _Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code from a checkpoint ran')",))


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.bin"
        stored = torch.load(path, weights_only=True)
        change(stored)
        torch.save(stored, path)

    return damage


def _config(**fields: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return damage


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.bin"
    path.write_bytes(path.read_bytes()[:-5000])


def _pickle(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(pickle.dumps({"base_model.model.x": _Harm()}))

    return damage


def _both(folder: Path) -> None:
    stored = torch.load(folder / "adapter_model.bin", weights_only=True)
    key = f"{UP}.lora_A.loraA.1.weight"
    save_file({k: v + 1 if k == key else v.clone() for k, v in stored.items()}, folder / "adapter_model.safetensors")


UP = "base_model.model.model.layers.1.mlp.up_proj"

DAMAGE: dict[str, tuple[Callable[[Path], object], type[DriftLensError], str]] = {
    "a B is missing": (
        _tensors(lambda t: t.pop(f"{UP}.lora_B.loraB.2.weight")),
        FormatError,
        r"up_proj loraB\.2 is missing",
    ),
    "an expert is missing": (
        _tensors(lambda t: [t.pop(f"{UP}.lora_{x}.lora{x}.1.weight") for x in "AB"]),
        FormatError,
        r"loraA\.1 is missing",
    ),
    "the last expert of one layer is missing": (
        _tensors(lambda t: [t.pop(f"{UP}.{x}.weight") for x in ("lora_A.loraA.2", "lora_B.loraB.2", "lora_router")]),
        FormatError,
        "up_proj has 2 experts, other layers have 3",
    ),
    "a router is missing": (_tensors(lambda t: t.pop(f"{UP}.lora_router.weight")), FormatError, "has no lora_router"),
    "ranks differ": (
        _tensors(lambda t: t.update({f"{UP}.lora_A.loraA.0.weight": torch.ones(3, 32)})),
        FormatError,
        "experts differ in shape",
    ),
    "A and B disagree": (
        _tensors(lambda t: t.update({f"{UP}.lora_A.loraA.{e}.weight": torch.ones(3, 32) for e in range(3)})),
        FormatError,
        r"A is \[3, 32\] and B is \[48, 2\]",
    ),
    "the router has other columns": (
        _tensors(lambda t: t.update({f"{UP}.lora_router.weight": torch.ones(3, 31)})),
        FormatError,
        r"router is \[3, 31\], expected \[3, 32\]",
    ),
    "a tensor is not finite": (
        _tensors(lambda t: t[f"{UP}.lora_B.loraB.0.weight"].fill_(float("nan"))),
        FormatError,
        "not finite",
    ),
    "aliases differ": (
        _tensors(lambda t: t.update({f"{UP}.lora_A.loraA.0.mlp.weight": torch.ones(2, 32)})),
        FormatError,
        "twice, as .* and as .*mlp.weight, with different values",
    ),
    "another method": (
        _tensors(lambda t: t.update({f"{UP}.lora_vu_gate.weight": torch.ones(4, 32)})),
        FormatError,
        "SMoLoRA, whose forward is not supported",
    ),
    "an unknown part": (_tensors(lambda t: t.update({f"{UP}.lora_x": torch.ones(1)})), FormatError, "known part"),
    "a layer that the base lacks": (
        _tensors(lambda t: t.update({k.replace("layers.1", "layers.5"): v.clone() for k, v in list(t.items())})),
        FormatError,
        "has 2 decoder layers",
    ),
    "a base of other sizes": (
        _tensors(
            lambda t: t.update(
                {k: v[:, :16].clone() for k, v in t.items() if UP in k and ("lora_A" in k or "router" in k)}
            )
        ),
        FormatError,
        "maps 16 to 48 features",
    ),
    "a file cut short": (_truncate, FormatError, "cannot be read"),
    "two files that differ": (_both, FormatError, "they differ"),
    "pickled code": (_pickle("adapter_model.bin"), FormatError, "run code when loaded are refused"),
    "pickled code beside": (_pickle("non_lora_trainables.bin"), FormatError, "run code when loaded are refused"),
    "trained parts that are not known": (
        lambda f: torch.save({"model.embed_tokens.weight": torch.ones(2, 2)}, f / "non_lora_trainables.bin"),
        FormatError,
        "embed_tokens.weight, which is not understood",
    ),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), NotFoundError, "has no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.bin").unlink(), NotFoundError, "it has no adapter_model"),
    "no alpha": (_config(lora_alpha=...), FormatError, "lora_alpha None, expected a number"),
    "a type that says nothing": (_config(peft_type="MOE_LORA_X"), ConfigError, "--semantics: sum_gBA"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_gives_one_clear_error_and_leaves_the_base_as_it_was(what: str, tmp_path: Path) -> None:
    damage, kind, message = DAMAGE[what]
    write(tmp_path / "c", LAYOUTS["MCITlib MoELoRA"])
    damage(tmp_path / "c")
    base = backbone()
    names = [name for name, _ in base.model.named_modules()]
    with pytest.raises(kind, match=message):
        load_checkpoint(tmp_path / "c", backbone=base)
    assert [name for name, _ in base.model.named_modules()] == names
    assert count_hooks(base.model) == 0


def test_two_files_that_agree_are_one_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["MCITlib MoELoRA"])
    stored = torch.load(tmp_path / "c" / "adapter_model.bin", weights_only=True)
    save_file(stored, tmp_path / "c" / "adapter_model.safetensors")
    assert len(find_sites(load(tmp_path / "c", semantics="sum_gBA").model)) == 14


def test_shapes_are_believed_before_the_configuration(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["MCITlib MoELoRA"], r=2, expert_num=8)
    with pytest.warns(UserWarning, match="r=2, the weights have 3 experts and 6 pathways"):
        info = find_sites(load(tmp_path / "c").model)[0].info
    assert (info.num_experts, info.rank, info.scaling) == (3, 2, 2.0)


def test_keys_with_the_adapters_name_are_read(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["MCITlib MoELoRA"])
    path = tmp_path / "c" / "adapter_model.bin"
    stored = torch.load(path, weights_only=True)
    renamed = {
        k.replace("lora_A.", "lora_A.default.").replace("router.", "router.default."): v for k, v in stored.items()
    }
    torch.save(renamed, path)
    assert len(read_folder(tmp_path / "c").sites) == 14


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize("name", ["CoIN MoELoRA", "Prism SAME"])
def test_the_command_line_records_a_folder_on_a_saved_base(name: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    write(tmp_path / "ckpt", LAYOUTS[name])
    write_probes(probes(), tmp_path / "probes")
    out = tmp_path / "x.h5"
    where = ["--base", str(tmp_path / "base"), "--semantics", LAYOUTS[name].semantics]
    command = ["record", "--ckpt", str(tmp_path / "ckpt"), "--probes", str(tmp_path / "probes"), "--out", str(out)]
    result = CliRunner().invoke(app, [*command, *where, "--quiet"])
    assert result.exit_code == 0, result.output
    with open_recording(out) as recording:
        assert recording.meta["semantics"] == LAYOUTS[name].semantics
        assert {site.family for site in recording.sites} == {"foreign"}
        assert len(recording.sites) == 2 * len(LAYOUTS[name].modules)
    listed = CliRunner().invoke(app, ["sites", str(tmp_path / "ckpt"), *where, "--json"])
    assert listed.exit_code == 0, listed.output


def test_semantics_are_documented_and_only_for_foreign_folders(tmp_path: Path) -> None:
    import driftlens.recording.foreign.semantics as module

    assert module.__doc__ is not None
    assert all(f"\n{name} " in module.__doc__ for name in FOREIGN_SEMANTICS)
    from peft import LoraConfig, get_peft_model

    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "peft")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="an adapter of PEFT"):
        load(tmp_path / "peft", semantics="olora")
