"""What is particular to PEFT's layers: packing, what counts as base, what is refused and what is left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from driftlens.backbones import load_backbone
from driftlens.errors import SiteError
from driftlens.recording import Hooks, Site, find_sites, load_checkpoint
from driftlens.recording.families import LilyFamily, PeftFusedFamily, PeftLoraFamily, PolyFamily, XLoraFamily
from driftlens.recording.sites import base_module, forward_context
from driftlens.store import open_recording
from tests.recording.families import peft_fused, peft_lora, peft_mixtures
from tests.recording.families.peft_fused import fused, gpt_oss, mixtral
from tests.recording.families.peft_lora import TARGETS, lora, shake_lora, tiny_gpt2, tiny_llama, two_adapters
from tests.recording.families.peft_mixtures import LILY, poly, xlora
from tests.recording.families.suite import FamilyCase, parity, recorded

CASES = [*peft_lora.CASES, *peft_fused.CASES, *peft_mixtures.CASES, LILY]
FAMILIES = {
    "peft-lora": PeftLoraFamily,
    "peft-fused": PeftFusedFamily,
    "peft-xlora": XLoraFamily,
    "peft-poly": PolyFamily,
    "peft-lily": LilyFamily,
}
IDS = torch.arange(24).reshape(2, 12) * 5 % 90 + 1


def observe(
    model: nn.Module, sites: list[Site], run: Callable[[], object] | None = None
) -> dict[str, dict[str, Tensor]]:
    """What the sites read in one forward on ``IDS``."""
    points = [(site, point) for site in sites for point in site.points]
    seen: dict[str, dict[str, Tensor]] = {site.info.name: {} for site in sites}

    def look(index: int, args: tuple[Any, ...], output: Any) -> None:
        site, point = points[index]
        seen[site.info.name] |= {k: v.detach().clone() for k, v in site.read(point.part, args, output).items()}

    root = base_module(model)
    with torch.no_grad(), Hooks(root, [point for _, point in points], look):
        if run is not None:
            run()
        else:
            with forward_context(model):
                root(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    return seen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_base_norms_are_those_of_what_the_pathways_do_not_explain(case: FamilyCase) -> None:
    model = case.build()
    sites = list(FAMILIES[case.family]().find(model))
    expected, seen = case.truth(model, IDS), observe(model, sites)
    assert expected.keys() == seen.keys()
    for name, values in seen.items():
        norm = expected[name]["rest"].norm(dim=-1)
        torch.testing.assert_close(values["base_norm"].flatten(), norm, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_module_belongs_to_one_family(case: FamilyCase) -> None:
    model = case.build()
    found = {name: list(family().find(model)) for name, family in FAMILIES.items()}
    assert [name for name, sites in found.items() if sites] == [case.family]
    names = [site.info.name for site in find_sites(model)]
    assert len(set(names)) == len(names)
    modules = [id(site.module) for site in find_sites(model)]
    assert len(set(modules)) == len(modules)


@pytest.mark.parametrize("base", [mixtral, gpt_oss])
def test_every_experts_delta_is_rebuilt_from_the_sites_weights(base: Callable[[], nn.Module]) -> None:
    model = fused(base)
    for site in PeftFusedFamily().find(model):
        weights, wrapper = site.weights(), site.module
        rebuilt = site.info.scaling * torch.einsum("eor,eri->eoi", weights.b, weights.a)
        plain = wrapper.get_param().detach().clone()
        wrapper.merge()
        merged = wrapper.get_param().detach() - plain
        wrapper.unmerge()
        expected = merged.transpose(1, 2) if wrapper.get_base_layer().is_transposed else merged
        assert expected.shape == (5, site.info.d_out, site.info.d_in)
        torch.testing.assert_close(rebuilt, expected, rtol=1e-5, atol=1e-5)


def test_reading_both_factors_in_the_same_order_gives_another_delta() -> None:
    site = next(PeftFusedFamily().find(fused(mixtral)))
    weights = site.weights()
    b = site.module.lora_B["default"].weight.detach()
    guessed = b.reshape(-1, 5, 3).permute(1, 0, 2)  # expert slowest, as A is packed
    right, wrong = (torch.einsum("eor,eri->eoi", factor, weights.a) for factor in (weights.b, guessed))
    assert (right - wrong).norm() > right.norm()


@pytest.mark.parametrize(
    ("base", "gate", "normalised"),
    [
        (mixtral, "softmax, top-k, renormalised", True),
        (peft_fused.qwen3, "softmax, top-k, not renormalised", False),
        (gpt_oss, "top-k, softmax", True),
    ],
)
def test_fused_sites_say_how_the_native_router_defines_the_gate(
    base: Callable[[], nn.Module], gate: str, normalised: bool
) -> None:
    for site in PeftFusedFamily().find(fused(base)):
        assert (site.info.gate, site.info.top_k, site.info.normalised) == (gate, 2, normalised)


def test_pathways_of_experts_that_did_not_run_are_zero() -> None:
    model = fused(mixtral)
    for values in observe(model, list(PeftFusedFamily().find(model))).values():
        ran = values["gate"] > 0
        assert torch.equal(ran.sum(1), torch.full((24,), 2))
        assert bool((values["pathway"][~ran] == 0).all())
        assert bool((values["pathway"][ran] != 0).all())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_rows_do_not_depend_on_how_the_experts_are_computed(implementation: str) -> None:
    model = fused(mixtral, implementation=implementation)
    expected, seen = peft_fused.truth(model, IDS), observe(model, list(PeftFusedFamily().find(model)))
    for name, values in seen.items():
        for part in ("gate", "pathway"):
            torch.testing.assert_close(values[part], expected[name][part], rtol=1e-4, atol=1e-5)


class Bare(nn.Module):
    """One experts module behind an embedding, with routing that is given."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 24)
        self.experts = experts

    def routing(self, n: int) -> tuple[Tensor, Tensor]:
        index = torch.stack([torch.arange(n) % 5, (torch.arange(n) + 2) % 5], 1)
        return index, torch.linspace(0.1, 0.9, 2 * n).reshape(n, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.experts(self.embed(input_ids.flatten()), *self.routing(input_ids.numel()))


@pytest.mark.parametrize("kind", ["nemotron_h", "aria"])
def test_experts_without_a_gate_or_transposed_give_what_the_adapter_adds(kind: str) -> None:
    names = {"hidden_size": 24, "moe_intermediate_size": 20, "intermediate_size": 20, "moe_latent_size": None}
    counts = {"n_routed_experts": 5, "moe_num_experts": 5, "mlp_hidden_act": "relu2", "hidden_act": "silu"}
    config = SimpleNamespace(**names, **counts, _experts_implementation="eager")
    experts = {"nemotron_h": NemotronHExperts, "aria": AriaExperts}[kind](config)
    torch.manual_seed(3)
    for value in experts.parameters():
        nn.init.normal_(value, std=0.3)
    targets = [f"experts.{name}" for name, _ in experts.named_parameters()]
    model = get_peft_model(Bare(experts), LoraConfig(r=3, target_modules=[], target_parameters=targets)).eval()
    shake_lora(model)
    sites = {site.info.kind: site for site in PeftFusedFamily().find(model)}
    assert len(sites) == 2
    seen, down = observe(model, list(sites.values())), sites["down_proj"]
    values, weights = seen[down.info.name], down.weights()
    added = down.info.scaling * torch.einsum("ne,eor,ner->no", values["gate"], weights.b, values["pathway"])
    with torch.no_grad():
        on = model(IDS)
        down.module.enable_adapters(enabled=False)
        off = model(IDS)
    torch.testing.assert_close(added, on - off, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values["base_norm"], off.norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_adapters_that_were_added_without_a_peft_wrapper_are_found() -> None:
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS))
    assert [site.info for site in find_sites(model)] == [site.info for site in find_sites(lora())]


def test_both_kinds_of_lora_in_one_model_are_both_found() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    names = [site.info.name for site in find_sites(get_peft_model(mixtral(), config), ["peft-lora", "peft-fused"])]
    assert sorted(names) == [
        f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("mlp.experts.down_proj", "self_attn.q_proj")
    ]


def test_a_fused_site_of_several_adapters_is_refused() -> None:
    model = get_peft_model(mixtral(), LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))
    model.add_adapter("more", LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))
    model.base_model.set_adapter(["default", "more"])
    with pytest.raises(SiteError, match="2 active adapters"):
        list(PeftFusedFamily().find(model))


def test_an_adapted_matrix_without_experts_is_left_out_with_a_reason() -> None:
    model = get_peft_model(mixtral(), LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"]))
    with pytest.warns(UserWarning, match=r"without an axis of experts: model\.layers\.0\.mlp\.gate\.weight"):
        assert list(PeftFusedFamily().find(model)) == []


@pytest.mark.parametrize("build", [lora, lambda: fused(mixtral)])
def test_merged_adapters_are_refused(build: Callable[[], nn.Module]) -> None:
    model = build()
    model.merge_adapter()
    with pytest.raises(SiteError, match="merged into the base weights"):
        find_sites(model)
    model.unmerge_adapter()
    assert find_sites(model)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_switched_off_adapter_is_no_site(case: FamilyCase) -> None:
    model, family = case.build(), FAMILIES[case.family]()
    with model.disable_adapter():
        assert list(family.find(model)) == []
    assert list(family.find(model))


def test_embeddings_are_left_out_with_a_reason_and_linear_layers_kept() -> None:
    model = lora(target_modules=[*TARGETS, "embed_tokens"])
    with pytest.warns(UserWarning, match=r"embedding .*: model\.embed_tokens\.$"):
        sites = find_sites(model, ["peft-lora"])
    assert len(sites) == 4


def test_variants_with_a_forward_of_their_own_are_left_out_with_a_reason() -> None:
    model = lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match=r"ALoraLinearVariant.*and 1 more\.$"):
        assert list(PeftLoraFamily().find(model)) == []


def test_dora_beside_another_active_adapter_is_refused() -> None:
    model = two_adapters({"r": 2}, {"r": 2, "use_dora": True})
    with pytest.raises(SiteError, match="one of them DoRA"):
        find_sites(model)


def test_a_batch_of_mixed_adapters_is_refused() -> None:
    model = two_adapters({"r": 2}, {"r": 2})
    names = ["first", "second"]
    with pytest.raises(SiteError, match="adapter_names"), model._enable_peft_forward_hooks(adapter_names=names):
        observe(model, find_sites(model))


def test_experts_of_other_rank_and_scaling_keep_their_own_deltas() -> None:
    model = two_adapters({"r": 2, "lora_alpha": 5}, {"r": 4, "lora_alpha": 3, "use_rslora": True})
    for site in find_sites(model):
        weights = site.weights()
        rebuilt = site.info.scaling * torch.einsum("eor,eri->eoi", weights.b, weights.a)
        expected = torch.stack([site.module.get_delta_weight(name) for name in ("first", "second")])
        torch.testing.assert_close(rebuilt, expected)


def test_a_bfloat16_base_gives_the_pathways_of_its_own_a_modules() -> None:
    model = get_peft_model(tiny_llama().to(torch.bfloat16), LoraConfig(r=3, target_modules=TARGETS)).eval()
    shake_lora(model)
    sites = find_sites(model)
    expected, seen = peft_lora.truth(model, IDS), observe(model, sites)
    for site in sites:
        assert torch.equal(seen[site.info.name]["pathway"].flatten(0, 1), expected[site.info.name]["pathway"])


def test_x_lora_is_observed_in_its_real_pass_when_the_hooks_were_there_first() -> None:
    model = xlora()
    inside = observe(model, find_sites(model))
    outside = observe(model, find_sites(model), lambda: model(input_ids=IDS, attention_mask=torch.ones_like(IDS)))
    for name, values in inside.items():
        for part, value in values.items():
            assert torch.equal(value, outside[name][part]), (name, part)


def test_x_loras_classifier_drops_nothing_while_it_is_recorded(tmp_path: Path) -> None:
    model = xlora(xlora_depth=2, xlora_size=8, xlora_dropout_p=0.5)
    recorded(model, tmp_path / "eval.h5")
    model.train()
    recorded(model, tmp_path / "train.h5")
    assert model.base_model.internal_xlora_classifier.training
    with open_recording(tmp_path / "eval.h5") as one, open_recording(tmp_path / "train.h5") as two:
        for site in one.sites:
            assert (one.gate(site.name, "first") == two.gate(site.name, "first")).all()


def test_x_lora_without_its_classifiers_scalings_is_refused() -> None:
    model = xlora()
    with pytest.raises(SiteError, match="without the scalings"):
        observe(model, find_sites(model), lambda: base_module(model)(input_ids=IDS))


def test_x_lora_scalings_without_a_softmax_are_left_out_with_a_reason() -> None:
    model = xlora(enable_softmax=False)
    with pytest.warns(UserWarning, match="signed numbers"):
        assert list(XLoraFamily().find(model)) == []


def test_poly_gates_follow_the_task_of_each_sample() -> None:
    model = poly()
    sites = find_sites(model)
    tasks = torch.tensor([2, 0])
    seen = observe(model, sites, lambda: model(input_ids=IDS, task_ids=tasks))
    for site in sites:
        gate = seen[site.info.name]["gate"]
        for sample, task in enumerate((2, 0)):
            expected = peft_mixtures.poly_truth(model, IDS, task)[site.info.name]["gate"]
            torch.testing.assert_close(gate[sample], expected[:12])


def test_lily_recorded_by_single_samples_is_what_its_forward_does(tmp_path: Path) -> None:
    model = LILY.build()
    recorded(model, tmp_path / "x.h5", batch_size=1)
    with open_recording(tmp_path / "x.h5") as recording:
        found = parity(LILY, model, recording)
        routers = {info.name: recording.weights(info.name)["router"] for info in recording.sites}
    assert found.sites == 4
    assert found.gate < 1e-3
    assert found.pathway is not None
    assert found.pathway < 1e-3
    assert found.output is not None
    assert found.output < 2e-3
    for site in find_sites(model):
        layer = site.module
        composed = layer.lily_router["default"].weight @ layer.lily_A["default"].weight
        torch.testing.assert_close(torch.from_numpy(routers[site.info.name]), composed.detach(), rtol=1e-5, atol=1e-6)


def test_several_adapters_of_a_mixture_are_refused() -> None:
    model = poly()
    model.add_adapter("more", model.peft_config["default"])
    model.base_model.set_adapter(["default", "more"])
    with pytest.raises(SiteError, match="2 active adapters"):
        list(PolyFamily().find(model))


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if "X-LoRA" not in c.name and "two adapters" not in c.name],
    ids=lambda case: case.name,
)
def test_a_saved_adapter_loads_as_the_same_sites(case: FamilyCase, tmp_path: Path) -> None:
    model = case.build()
    model.save_pretrained(tmp_path)
    backbone = load_backbone("tiny-random")
    backbone.model = model.unload()
    loaded = load_checkpoint(tmp_path, backbone=backbone)
    before, after = (find_sites(m, [case.family]) for m in (case.build(), loaded.model))
    assert [site.info for site in before] == [site.info for site in after]
    for one, two in zip(before, after, strict=True):
        for name in ("a", "b", "router"):
            torch.testing.assert_close(getattr(two.weights(), name), getattr(one.weights(), name), rtol=0, atol=0)


def test_a_saved_x_lora_model_loads_as_the_same_sites(tmp_path: Path) -> None:
    adapters = {}
    for number in "01":
        expert = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=TARGETS))
        shake_lora(expert, int(number))
        expert.save_pretrained(tmp_path / number)
        adapters[number] = str(tmp_path / number)
    base = tiny_llama()
    base.config.use_cache = False
    model = get_peft_model(base, XLoraConfig(hidden_size=24, adapters=adapters))
    model.save_pretrained(tmp_path / "mixture")
    before = [site.weights().b for site in find_sites(model)]
    backbone = load_backbone("tiny-random")
    backbone.model = tiny_llama()
    backbone.model.config.use_cache = False
    loaded = load_checkpoint(tmp_path / "mixture", backbone=backbone)
    assert isinstance(loaded.model, PeftModel)
    after = [site.weights().b for site in find_sites(loaded.model)]
    assert len(after) == 4
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_nothing_is_warned_about_where_everything_is_recorded() -> None:
    model = lora(tiny_gpt2, target_modules=["c_fc"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_sites(model)) == 2
