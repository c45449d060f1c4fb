"""Factors of every layout, read without a base model: against the models' own updates; and damaged folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import driftlens as dl
from driftlens.adapters import iter_sites
from driftlens.errors import ConfigError, FormatError, NotFoundError
from driftlens.recording.factors import FactorFolder
from tests.recording.support import E, R, adapted

D = 12


class Experts(nn.Module):
    """Fused 3-D experts, [E, out, in] or, ``transposed``, [E, in, out]."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(4, *((D, 6) if transposed else (6, D))))
        self.down = nn.Parameter(torch.randn(4, *((6, D) if transposed else (D, 6))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Toy(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, D)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(D, D), "up": nn.Linear(D, 20), "experts": Experts(transposed)})
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def peft_folder(folder: Path, transposed: bool = False, **options: Any) -> Any:
    """Save a PEFT LoRA of random factors; returns the model."""
    torch.manual_seed(0)
    model = get_peft_model(Toy(transposed), LoraConfig(r=3, lora_alpha=12, init_lora_weights=False, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.1)
    model.save_pretrained(folder)
    return model


def delta(factors: Any, site: int = 0) -> np.ndarray:
    """s B A of every expert: [E, d_out, d_in]."""
    update: np.ndarray = factors.scaling[site] * (factors.b[site] @ factors.a[site])
    return update


def foreign(folder: Path, *, experts: int = 3, alias: bool = False, binary: bool = False, seed: int = 0, **config):
    """A folder in the layout of CoIN; returns its tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in (0, 1, 10, 2):
        for kind, d_in, d_out in (("self_attn.q_proj", 8, 8), ("mlp.down_proj", 10, 8)):
            prefix = f"base_model.model.model.layers.{layer}.{kind}"
            for e in range(experts):
                ending = "mlp.weight" if alias else "weight"
                tensors[f"{prefix}.lora_A.loraA.{e}.{ending}"] = torch.randn(2, d_in, generator=generator).bfloat16()
                tensors[f"{prefix}.lora_B.loraB.{e}.{ending}"] = torch.randn(d_out, 2, generator=generator).bfloat16()
            tensors[f"{prefix}.lora_router.weight"] = torch.randn(experts, d_in, generator=generator).bfloat16()
    save(folder, tensors, binary, **config)
    return tensors


def save(folder: Path, tensors: dict[str, torch.Tensor], binary: bool = False, **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "MOE_LORA_CoIN", "r": 6, "lora_alpha": 12, "expert_num": 3} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if binary:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("gate", ["softmax", "energy"])
def test_our_folders_give_the_parameters_of_every_site(tmp_path: Path, gate: str) -> None:
    _, model = adapted(gate)
    model.save_pretrained(tmp_path)
    folder = FactorFolder(tmp_path)
    layers = dict(iter_sites(model))
    assert {site.name for site in folder.sites} == set(layers)
    for number, site in enumerate(folder.sites):
        layer = layers[site.name]
        factors = folder.read([number])
        assert (site.num_experts, site.rank, site.d_in, site.d_out) == (E, R, layer.d_in, layer.d_out)
        h = torch.randn(layer.d_in)
        z = layer.moe_lora_A["default"](h).detach()
        np.testing.assert_allclose(factors.a[0] @ h.numpy(), z.numpy(), atol=1e-5)
        for e in range(E):
            alone = torch.zeros(E, R)
            alone[e] = z[e] * layer.scaling["default"]
            output = layer.moe_lora_B["default"](alone).detach().numpy()
            np.testing.assert_allclose(delta(factors)[e] @ h.numpy(), output, atol=1e-4)
        router = getattr(layer.moe_lora_gate["default"], "weight", None)
        assert (factors.router is None) == (router is None)
        if router is not None and factors.router is not None:
            np.testing.assert_array_equal(factors.router[0], router.detach().numpy())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.q_proj": 5}, "alpha_pattern": {"up": 30}},
        {"use_dora": True},
    ],
    ids=["plain", "rslora", "patterns", "dora"],
)
def test_peft_lora_gives_peft_s_own_update(tmp_path: Path, options: dict[str, Any]) -> None:
    model = peft_folder(tmp_path, target_modules=["q_proj", "up"], **options)
    folder = FactorFolder(tmp_path)
    assert [site.name for site in folder.sites] == [f"layers.{n}.{kind}" for n in range(2) for kind in ("q_proj", "up")]
    for number, site in enumerate(folder.sites):
        layer = model.base_model.model.get_submodule(site.name)
        expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        factors = folder.read([number])
        np.testing.assert_allclose(delta(factors)[0], expected.detach().numpy(), rtol=1e-5)
        assert (factors.magnitude is not None) == ("use_dora" in options)
    assert any("DoRA" in note for note in folder.notes) == ("use_dora" in options)


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_give_peft_s_own_update(tmp_path: Path, transposed: bool) -> None:
    model = peft_folder(tmp_path, transposed, target_modules=["up"], target_parameters=["experts.up", "experts.down"])
    folder = FactorFolder(tmp_path)
    fused = [(n, site) for n, site in enumerate(folder.sites) if "experts" in site.name]
    assert len(fused) == 4
    for number, site in fused:
        assert (site.num_experts, site.rank) == (4, 3)
        wrapper = model.base_model.model.get_submodule(site.name)
        expected = wrapper.get_delta_weight("default").detach().numpy()
        expected = expected.swapaxes(1, 2) if transposed else expected
        np.testing.assert_allclose(delta(folder.read([number])), expected, rtol=1e-5)
    assert {site.num_experts for site in folder.sites if site.kind == "up"} == {1}


def test_embeddings_count_as_sites(tmp_path: Path) -> None:
    model = peft_folder(tmp_path, target_modules=["embed", "q_proj"])
    folder = FactorFolder(tmp_path)
    position = [site.name for site in folder.sites].index("embed")
    layer = model.base_model.model.embed
    expected = (layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"] * 4.0).detach().numpy()
    np.testing.assert_allclose(delta(folder.read([position]))[0], expected, rtol=1e-5)


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize("binary", [False, True])
def test_folders_with_one_tensor_per_expert(tmp_path: Path, alias: bool, binary: bool) -> None:
    tensors = foreign(tmp_path / "Task1", alias=alias, binary=binary)
    folder = FactorFolder(tmp_path / "Task1")
    assert [site.layer for site in folder.sites] == [0, 0, 1, 1, 2, 2, 10, 10], "layer 10 comes after layer 2"
    positions = [n for n, site in enumerate(folder.sites) if site.kind == "down_proj"]
    factors = folder.read(positions)
    assert factors.a.shape == (4, 3, 2, 10)
    assert factors.a.dtype == np.float32
    # CoIN divides alpha by the rank of all experts together
    assert factors.scaling.tolist() == [2.0] * 4
    prefix = "base_model.model.model.layers.10.mlp.down_proj"
    ending = "mlp.weight" if alias else "weight"
    for e in range(3):
        A, B = (tensors[f"{prefix}.lora_{x}.lora{x}.{e}.{ending}"].float() for x in "AB")
        np.testing.assert_allclose(delta(factors, 3)[e], 2.0 * (B @ A).numpy(), rtol=1e-5)
    np.testing.assert_array_equal(factors.router[3], tensors[f"{prefix}.lora_router.weight"].float().numpy())


def test_both_aliases_and_extra_state_of_a_method_are_one_site(tmp_path: Path) -> None:
    tensors = foreign(tmp_path / "a")
    twice = {key.replace(".weight", ".mlp.weight"): value.clone() for key, value in tensors.items()}
    extra = {
        "prism.same.image_anchors.0": torch.zeros(1, 4),
        "base_model.model.model.mm_projector.0.weight": torch.ones(2),
    }
    save(tmp_path / "b", tensors | twice | extra, peft_type="MOE_LORA_SAME")
    folder = FactorFolder(tmp_path / "b")
    assert len(folder.sites) == 8
    assert folder.sites[0].semantics == "product_of_sums"
    assert any("1 tensors that are no factors" in note and "mm_projector" in note for note in folder.notes)
    frame = dl.weight_drift(tmp_path / "b")
    assert any("cross terms" in note for note in frame.attrs["notes"])


def test_two_names_of_one_parameter_must_agree(tmp_path: Path) -> None:
    tensors = foreign(tmp_path / "a")
    key = "base_model.model.model.layers.2.mlp.down_proj.lora_B.loraB.1.weight"
    save(tmp_path / "b", tensors | {key.replace(".weight", ".mlp.weight"): tensors[key] + 1})
    with pytest.raises(FormatError, match=r"site model\.layers\.2\.mlp\.down_proj .* hold different values"):
        dl.weight_drift(tmp_path / "b")


def test_a_second_file_of_weights_is_named_and_not_read(tmp_path: Path) -> None:
    foreign(tmp_path / "a")
    torch.save({}, tmp_path / "a" / "adapter_model.bin")
    assert any("adapter_model.bin, which was not read" in note for note in FactorFolder(tmp_path / "a").notes)


def test_the_slot_that_never_moved_on_is_found_from_weights(tmp_path: Path) -> None:
    for task in (1, 2):
        tensors = foreign(tmp_path / f"Task{task}", experts=6, seed=task)
        for key in tensors:
            if ".lora_B." in key and ".loraB.4." not in key:
                tensors[key] = torch.zeros_like(tensors[key])
        save(tmp_path / f"Task{task}", tensors, r=12)
    frame = dl.weight_drift(tmp_path / "Task1", tmp_path / "Task2")
    assert (frame["silent_experts"] == 5).all()
    assert any("only expert 4 of 6" in note for note in frame.attrs["notes"])


def test_a_folder_without_configuration_lacks_only_the_scaling(tmp_path: Path) -> None:
    foreign(tmp_path / "a")
    foreign(tmp_path / "b", seed=1)
    full = dl.weight_drift(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match="b states no lora_alpha while the others do"):
        dl.weight_drift(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "adapter_config.json").unlink()
    bare = dl.weight_drift(tmp_path / "a", tmp_path / "b")
    np.testing.assert_allclose(bare["update_change"], full["update_change"], rtol=1e-12)
    np.testing.assert_allclose(2.0 * bare["update_norm"], full["update_norm"], rtol=1e-12)
    assert any("without the scaling" in note for note in bare.attrs["notes"])


def test_several_checkpoints_are_each_compared_with_the_anchor(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        foreign(tmp_path / name, seed=len(name) * ord(name[0]))
    frame = dl.weight_drift(tmp_path / "one", [tmp_path / "two", tmp_path / "three"], level="kind")
    assert frame["checkpoint"].tolist() == ["two", "two", "three", "three"]
    assert set(frame["anchor"]) == {"one"}
    assert frame["sites"].tolist() == [4] * 4
    assert frame.attrs["next"].startswith(f"driftlens record --ckpt {tmp_path / 'three'} --base")


def test_equal_folder_names_are_told_apart(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        foreign(tmp_path / name / "final", seed=ord(name))
    frame = dl.weight_drift(tmp_path / "x" / "final", tmp_path / "y" / "final")
    assert (frame["anchor"][0], frame["checkpoint"][0]) == ("x/final", "y/final")


def test_a_run_compares_every_task_s_anchor_with_what_came_later(tmp_path: Path) -> None:
    from driftlens.store import Manifest

    for number, name in enumerate(("00-start", "01-red", "02-green", "03-blue")):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        foreign(tmp_path / "checkpoints" / name, seed=number)
    manifest = Manifest(tmp_path)
    manifest.add(tmp_path / "checkpoints")
    manifest.save()
    foreign(tmp_path / "checkpoints" / "04-unlisted")
    frame = dl.weight_drift(tmp_path, level="kind")
    pairs = frame[["task", "anchor", "checkpoint"]].drop_duplicates().to_numpy().tolist()
    assert pairs == [
        ["red", "01-red", "02-green"],
        ["red", "01-red", "03-blue"],
        ["green", "02-green", "03-blue"],
    ]
    assert frame.attrs["next"] == f"driftlens record --run {tmp_path}"
    with pytest.raises(ConfigError, match="is a run, which is compared within itself"):
        dl.weight_drift(tmp_path, tmp_path)


def test_damaged_folders_give_one_clear_error(tmp_path: Path) -> None:
    tensors = foreign(tmp_path / "good")
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    faults = {
        "site model.layers.1.self_attn.q_proj expert 1 has A but no B": {f"{prefix}.lora_B.loraB.1.weight": None},
        "expert 1 of 3 has no factors": {f"{prefix}.lora_{x}.lora{x}.1.weight": None for x in "AB"},
        "factors of different shapes": {f"{prefix}.lora_A.loraA.0.weight": torch.ones(2, 9)},
        "A is 2 x 8 and B is 8 x 3": {f"{prefix}.lora_B.loraB.{e}.weight": torch.ones(8, 3) for e in range(3)},
        "its router is": {f"{prefix}.lora_router.weight": torch.ones(2, 8)},
    }
    for number, (message, changes) in enumerate(faults.items()):
        changed = {key: value for key, value in (tensors | changes).items() if value is not None}
        save(tmp_path / f"bad{number}", changed)
        with pytest.raises(FormatError, match=message):
            dl.weight_drift(tmp_path / "good", tmp_path / f"bad{number}")
    fewer = {key: value for key, value in tensors.items() if prefix not in key}
    save(tmp_path / "fewer", fewer)
    with pytest.raises(FormatError, match="good has 8 sites and fewer has 7"):
        dl.weight_drift(tmp_path / "good", tmp_path / "fewer")


def test_unreadable_folders_give_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="No checkpoint folder"):
        FactorFolder(tmp_path / "nowhere")
    foreign(tmp_path / "good")
    with pytest.raises(NotFoundError, match="Its subfolders are checkpoints: good"):
        FactorFolder(tmp_path)
    whole = (tmp_path / "good" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "good" / "adapter_model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(FormatError, match="cannot be read"):
        FactorFolder(tmp_path / "good")
    save(tmp_path / "other", {"base_model.model.x.hada_w1_a": torch.ones(2, 2)}, peft_type="LOHA")
    with pytest.raises(FormatError, match=r"no LoRA factors that are known.*LOHA.*hada_w1_a"):
        FactorFolder(tmp_path / "other")
    foreign(tmp_path / "config")
    (tmp_path / "config" / "adapter_config.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        FactorFolder(tmp_path / "config")
    foreign(tmp_path / "alpha", lora_alpha="many")
    with pytest.raises(FormatError, match="lora_alpha 'many', expected a number"):
        FactorFolder(tmp_path / "alpha")


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    foreign(tmp_path / "a", binary=True)
    torch.save({"x": Bomb()}, tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(FormatError, match="Files that run code when loaded are refused"):
        FactorFolder(tmp_path / "a")
    assert not (tmp_path / "ran").exists()


def test_ranks_of_our_adapters_must_fit_their_experts(tmp_path: Path) -> None:
    _, model = adapted()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"num_experts": 5}))
    with pytest.raises(FormatError, match="12 pathways cannot be cut into num_experts=5"):
        FactorFolder(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 18


def test_a_recording_of_the_same_run_gives_the_same_numbers(tmp_path: Path) -> None:
    from driftlens.analysis import table
    from driftlens.recording import record_run
    from driftlens.training import train_run
    from tests.training.support import tiny_config

    train_run(tiny_config(method={"name": "moe-lora"}, training={"steps_per_task": 2}), tmp_path / "run")
    record_run(tmp_path / "run", noise_floor=False)
    names = ["subspace_overlap", "subspace_overlap_adjusted", "grassmann_distance", "output_overlap"]
    names += ["rank_update_a", "rank_update_b"]
    long = table(dl.open(tmp_path / "run"), "site", names)
    keys = ["probe", "checkpoint_name", "site"]
    recorded = long[long["old"]].pivot(index=keys, columns="metric", values="value")
    weights = dl.weight_drift(tmp_path / "run").set_index(["task", "checkpoint", "site"])
    assert len(weights) == len(recorded) == 3 * 6
    for name in names:
        both = weights[name].rename_axis(keys).to_frame().join(recorded[name], rsuffix="_recorded")
        np.testing.assert_allclose(both[name], both[f"{name}_recorded"], atol=1e-6, err_msg=name)


def test_adapters_with_names_are_experts_of_one_site(tmp_path: Path) -> None:
    prefix = "base_model.model.layers.0.q_proj"
    tensors = {f"{prefix}.lora_A.{name}.weight": torch.rand(2, 8) for name in ("blue", "red")}
    tensors |= {f"{prefix}.lora_B.{name}.weight": torch.rand(6, 2) for name in ("blue", "red")}
    save(tmp_path / "a", tensors, peft_type="LORA", r=2, lora_alpha=6)
    folder = FactorFolder(tmp_path / "a")
    assert (folder.sites[0].num_experts, folder.sites[0].rank, folder.sites[0].scaling) == (2, 2, 3.0)
    expected = 3.0 * tensors[f"{prefix}.lora_B.red.weight"] @ tensors[f"{prefix}.lora_A.red.weight"]
    np.testing.assert_allclose(delta(folder.read([0]))[1], expected.numpy(), rtol=1e-5)


def test_convolutions_count_with_their_kernels_flattened(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["conv"]))
    model.save_pretrained(tmp_path)
    expected = model.base_model.model.conv.get_delta_weight("default").detach().numpy().reshape(5, -1)
    np.testing.assert_allclose(delta(FactorFolder(tmp_path).read([0]))[0], expected, rtol=1e-4, atol=1e-6)
