"""Gates of transformers' own MoE models: what the recorder reads is what the experts were handed."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from typer.testing import CliRunner

from driftlens.cli.main import app
from driftlens.errors import ConfigError
from driftlens.recording import Hooks, find_sites, record_checkpoint
from driftlens.recording.families.native_gates import ROUTERS
from driftlens.recording.families.native_moe import NativeMoEFamily, declared_routers, router_kind
from driftlens.recording.sites import Site
from driftlens.store import open_recording, verify_recording
from driftlens.store.schema import GATE_SUM_TOLERANCE
from tests.recording.families.suite import probes, token_ids
from tests.recording.tiny_moe import MODELS, NLLB, NOT_ROUTED, TinyMoE, build, calls, inputs, really_used

ROOT = Path(__file__).resolve().parents[2]


def observe(model: nn.Module, sites: list[Site], fed: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What the sites read in one forward."""
    seen: dict[str, dict[str, Tensor]] = {site.info.name: {} for site in sites}
    points = [(site, point) for site in sites for point in site.points]

    def look(index: int, args: tuple[Any, ...], output: Any) -> None:
        site, point = points[index]
        seen[site.info.name].update({k: v.clone() for k, v in site.read(point.part, args, output).items()})

    with torch.no_grad(), Hooks(model, [point for _, point in points], look):
        model(**fed)
    return seen


BY_TYPE = {tiny.model_type: tiny for tiny in [*MODELS, NLLB]}


@cache
def built(model_type: str) -> nn.Module:
    """One shared copy of a tiny model, for tests that do not change it."""
    return build(BY_TYPE[model_type])


@cache
def observed(model_type: str) -> tuple[list[Site], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The sites of a tiny model, what they read, and what the experts were handed."""
    model = built(model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sites = list(NativeMoEFamily().find(model))
    fed = inputs(model)
    truth = really_used(model, fed)
    # a layer whose router and experts have no module of their own around them is named by its router
    by_site = {s.info.name: truth.get(s.info.name, truth.get(s.info.name.rpartition(".")[0])) for s in sites}
    assert len(truth) == len(sites) > 0
    assert all(value is not None for value in by_site.values())
    return sites, observe(model, sites, fed), {name: value for name, value in by_site.items() if value is not None}


@pytest.fixture(params=MODELS, ids=lambda tiny: tiny.model_type)
def tiny(request: pytest.FixtureRequest) -> TinyMoE:
    result: TinyMoE = request.param
    return result


def test_gates_are_the_weights_that_the_experts_were_handed(tiny: TinyMoE) -> None:
    sites, seen, truth = observed(tiny.model_type)
    for site in sites:
        gate, used = seen[site.info.name]["gate"], truth[site.info.name]
        assert gate.shape == (12, site.info.num_experts)
        assert not used[:, site.info.num_experts :].any()
        used = used[:, : site.info.num_experts]
        assert used.any()
        torch.testing.assert_close(gate * site.info.scaling, used * tiny.behind, rtol=0, atol=1e-6)


def test_the_chosen_experts_are_those_that_ran(tiny: TinyMoE) -> None:
    sites, seen, truth = observed(tiny.model_type)
    for site in sites:
        gate, used = seen[site.info.name]["gate"], truth[site.info.name][:, : site.info.num_experts]
        assert torch.equal(gate > 0, used > 0)
        assert int((gate > 0).sum(-1).max()) == site.info.top_k


def test_a_site_says_whether_its_rows_sum_to_one(tiny: TinyMoE) -> None:
    sites, seen, _ = observed(tiny.model_type)
    for site in sites:
        off = float((seen[site.info.name]["gate"].sum(-1) - 1).abs().max())
        assert (off < 1e-5) == site.info.normalised, site.info


def test_a_router_answers_on_its_input_as_it_did(tiny: TinyMoE) -> None:
    sites, seen, _ = observed(tiny.model_type)
    for site in sites:
        if site.respond is not None:
            values = seen[site.info.name]
            with torch.no_grad():
                answer = site.respond(values["input"])["gate"]
            torch.testing.assert_close(answer, values["gate"], rtol=0, atol=1e-6)


def test_the_norm_is_that_of_the_blocks_output(tiny: TinyMoE) -> None:
    sites, seen, _ = observed(tiny.model_type)
    model = built(tiny.model_type)
    made = calls(model, inputs(model))
    for site in sites:
        name = site.info.name
        if name not in made:
            # the attention of experts is returned by the module around it, Gemma's experts stand in the layer itself
            name = name.rpartition(".")[0]
        if name.endswith("layers.0") or site.info.name.endswith(".router"):
            name = f"{site.info.name.rpartition('.')[0]}.experts"
        output = made[name][1]
        output = output[0] if isinstance(output, tuple) else output
        norm = output.reshape(12, -1).norm(dim=-1)
        torch.testing.assert_close(seen[site.info.name]["base_norm"], norm, rtol=1e-5, atol=1e-6)


def test_weights_are_the_rows_of_the_router(tiny: TinyMoE) -> None:
    for site in observed(tiny.model_type)[0]:
        weights = site.weights()
        assert (weights.a, weights.b) == (None, None)
        if weights.router is not None:
            assert weights.router.shape == (site.info.num_experts, site.info.d_in)


@pytest.mark.parametrize("model_type", ["dbrx", "gpt_oss", "lfm2_moe", "mistral4", "qwen3_next"])
def test_rows_of_a_model_in_half_precision_sum_to_one(model_type: str) -> None:
    model: Any = build(BY_TYPE[model_type]).to(torch.bfloat16)
    fed = inputs(model)
    sites = list(NativeMoEFamily().find(model))
    seen, truth = observe(model, sites, fed), really_used(model, fed)
    for site in sites:
        gate, used = seen[site.info.name]["gate"], truth[site.info.name][:, : site.info.num_experts].float()
        assert float((gate.sum(-1) - 1).abs().max()) < GATE_SUM_TOLERANCE / 4
        assert torch.equal(gate > 0, used > 0)
        # bfloat16 keeps 8 bits
        torch.testing.assert_close(gate * site.info.scaling, used, rtol=2**-7, atol=0)


def test_every_declared_router_is_in_the_table(tiny: TinyMoE) -> None:
    names = {target.__name__ for target in declared_routers(built(tiny.model_type))} - {"JetMoeAttention"}
    assert names <= set(ROUTERS)


def test_at_least_25_model_types_are_read() -> None:
    assert len({tiny.model_type for tiny in MODELS}) >= 25


def test_every_moe_model_of_transformers_is_tried_or_explained() -> None:
    folder = Path(transformers.__file__).parent / "models"
    found = set()
    for path in folder.glob("*/modeling_*.py"):
        source = path.read_text(encoding="utf-8")
        declares = re.search(r'"router_logits": \[?OutputRecorder', source)
        if declares or re.search(r"^class \w*(Experts|Router|TopKGating|MoE|Moe)\w*\(", source, re.MULTILINE):
            found.add(path.parent.name)
    tried = {CONFIG_MAPPING[tiny.model_type].__module__.split(".")[-2] for tiny in [*MODELS, NLLB]}
    assert found == tried | set(NOT_ROUTED)


def test_every_router_class_of_the_table_is_met_by_a_model() -> None:
    met = {
        type(module).__name__ for tiny in MODELS for module in built(tiny.model_type).modules() if router_kind(module)
    }
    # declared by a model class of transformers, and built by none
    assert met | {"Qwen3OmniMoeTextTopKRouter"} == set(ROUTERS)


def test_nllb_hands_its_mask_to_the_experts_as_indices() -> None:
    model = built(NLLB.model_type)
    with pytest.warns(UserWarning, match="router's choice is not what runs"):
        assert list(NativeMoEFamily().find(model)) == []
    made = calls(model, inputs(model))
    ran = {match[0] for name in made if (match := re.search(r"expert_\d+", name))}
    assert ran == {"expert_0", "expert_1"}


class _OtherRouter(MixtralTopKRouter):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        logits, weights, index = super().forward(hidden_states)
        return logits, weights.square(), index


class _SameRouter(MixtralTopKRouter):
    pass


def test_a_router_whose_forward_was_changed_is_reported_and_not_guessed() -> None:
    model = build(BY_TYPE["mixtral"])
    router: Any = model.get_submodule("model.layers.0.mlp.gate")
    router.__class__ = _OtherRouter
    with pytest.warns(UserWarning, match="_OtherRouter.* not in the table"):
        names = [site.info.name for site in NativeMoEFamily().find(model)]
    assert names == ["model.layers.1.mlp"]
    router.__class__ = _SameRouter
    assert len(list(NativeMoEFamily().find(model))) == 2


def test_a_class_of_the_same_name_from_elsewhere_is_not_taken_for_it() -> None:
    other = type("MixtralTopKRouter", (nn.Module,), {"__module__": "transformers_modules.somebody.modeling"})
    assert router_kind(other()) is None


@pytest.mark.parametrize("how", [{"modules_to_save": ["gate"]}, {"target_parameters": ["gate.weight"]}])
def test_an_adapted_router_is_read_as_it_routes(how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, lora_alpha=4, init_lora_weights=False, **how)
    model: Any = peft.get_peft_model(build(BY_TYPE["mixtral"]), config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "modules_to_save" in name:
                value.add_(torch.randn_like(value))
    sites = list(NativeMoEFamily().find(model))
    assert [site.info.name for site in sites] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    base = model.get_base_model()
    fed = inputs(base)
    seen, truth = observe(base, sites, fed), really_used(base, fed)
    for site in sites:
        gate = seen[site.info.name]["gate"]
        torch.testing.assert_close(gate, truth[site.info.name][:, :8], rtol=0, atol=1e-6)
        # the weight that is recorded gives these gates
        router = site.weights().router
        assert router is not None
        scores, index = torch.softmax(seen[site.info.name]["input"] @ router.T, -1).topk(2)
        expected = torch.zeros_like(gate).scatter(1, index, scores / scores.sum(-1, keepdim=True))
        torch.testing.assert_close(gate, expected, rtol=0, atol=1e-5)
    with model.disable_adapter():
        plain = observe(base, list(NativeMoEFamily().find(model)), fed)
        truth = really_used(base, fed)
    for name, values in plain.items():
        torch.testing.assert_close(values["gate"], truth[name][:, :8], rtol=0, atol=1e-6)
        assert not torch.allclose(values["gate"], seen[name]["gate"], atol=1e-3)


def test_a_moe_language_model_inside_an_image_text_model_is_found() -> None:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text: Any = built("mixtral").config
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    sites, fed = find_sites(model), inputs(model)
    assert [site.info.name for site in sites] == [f"model.language_model.layers.{i}.mlp" for i in (0, 1)]
    assert [site.info.layer for site in sites] == [0, 1]
    seen, truth = observe(model, sites, fed), really_used(model, fed)
    for name, values in seen.items():
        torch.testing.assert_close(values["gate"], truth[name][:, :8], rtol=0, atol=1e-6)


def _saved(tmp_path: Path) -> nn.Module:
    model: Any = build(BY_TYPE["mixtral"])
    model.save_pretrained(tmp_path)
    words = {f"w{i}": i for i in range(61)} | {"<pad>": 61, "<s>": 62, "<unk>": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    saved: nn.Module = model
    return saved


def test_sites_are_listed_for_a_saved_model(tmp_path: Path) -> None:
    model = _saved(tmp_path)
    result = CliRunner().invoke(app, ["sites", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["name"] for row in rows] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert {(row["gate"], row["top_k"], row["num_experts"]) for row in rows} == {("softmax, top-k, renormalised", 2, 8)}
    assert {site.info.family for site in find_sites(model)} == {"native-moe"}


def test_a_saved_model_is_recorded_as_a_checkpoint(tmp_path: Path) -> None:
    model = _saved(tmp_path / "model")
    summary = record_checkpoint(tmp_path / "model", probes=probes(), out=tmp_path / "x.h5")
    assert (summary.sites, verify_recording(tmp_path / "x.h5")) == (2, [])
    with open_recording(tmp_path / "x.h5") as recording:
        used = really_used(model, {"input_ids": token_ids(probes().task("first")[0])})
        gate = recording.gate("model.layers.1.mlp", "first")[:7]
        torch.testing.assert_close(torch.tensor(gate), used["model.layers.1.mlp"][:, :8], rtol=0, atol=1e-3)
        router: Any = model.get_submodule("model.layers.1.mlp.gate")
        stored = recording.weights("model.layers.1.mlp")
        assert stored["A"] is None
        torch.testing.assert_close(torch.tensor(stored["router"]), router.weight.detach())


def test_a_whole_model_takes_no_base_model(tmp_path: Path) -> None:
    _saved(tmp_path)
    with pytest.raises(ConfigError, match="holds a whole model, not an adapter"):
        record_checkpoint(tmp_path, base="tiny-random", probes=probes(), out=tmp_path / "x.h5")


def test_the_committed_table_is_what_the_code_finds() -> None:
    spec = importlib.util.spec_from_file_location("make_moe_table", ROOT / "scripts" / "make_moe_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.page()
    committed = (ROOT / "docs" / "moe_models.md").read_text(encoding="utf-8")
    assert committed == found, "docs/moe_models.md is stale; run: python scripts/make_moe_table.py"
