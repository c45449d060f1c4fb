"""Finding sites: names, what they say about themselves, and what cannot be recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from driftlens.adapters import MoELoraConfig
from driftlens.errors import SiteError, UnknownNameError
from driftlens.recording import SITE_FAMILIES, Site, find_sites
from driftlens.recording.sites import layer_index, output_roots

from .support import E, R, adapted


def test_sites_are_described_in_model_order() -> None:
    _, model = adapted("topk")
    infos = [site.info for site in find_sites(model)]
    kinds = ["gate_proj", "up_proj", "down_proj"]
    assert [i.name for i in infos] == [f"model.language_model.layers.{n}.mlp.{k}" for n in (2, 3) for k in kinds]
    assert [i.layer for i in infos] == [2, 2, 2, 3, 3, 3]
    assert [i.kind for i in infos] == kinds * 2
    assert {(i.num_experts, i.rank, i.scaling, i.gate, i.top_k) for i in infos} == {(E, R, 4.0, "topk", 2)}
    assert [(i.d_in, i.d_out) for i in infos[:3]] == [(32, 64), (32, 64), (64, 32)]


def test_the_wrapped_and_the_plain_model_have_the_same_sites() -> None:
    _, model = adapted()
    assert [s.info for s in find_sites(model)] == [s.info for s in find_sites(model.get_base_model())]


def test_a_model_without_sites_is_refused() -> None:
    with pytest.raises(SiteError, match=r"Sequential has no site where routing .*looked for: .*moe-lora"):
        find_sites(nn.Sequential(nn.Linear(2, 2)))


def test_a_disabled_adapter_is_no_site() -> None:
    _, model = adapted()
    with model.disable_adapter(), pytest.raises(SiteError, match=r"no site.*adapter that is switched on"):
        find_sites(model)
    assert len(find_sites(model)) == 6


def test_the_active_adapter_is_recorded_and_two_at_once_are_refused() -> None:
    _, model = adapted()
    config = MoELoraConfig(num_experts=2, r=1, target_modules=["down_proj"], layers_to_transform=[3])
    model.add_adapter("second", config)
    assert {s.info.num_experts for s in find_sites(model)} == {E}
    model.set_adapter("second")
    assert [(s.info.num_experts, s.info.rank) for s in find_sites(model)] == [(2, 1)]
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(SiteError, match=r"mlp\.down_proj has 2 active adapters \(default, second\)"):
        find_sites(model)


def test_a_new_family_is_found_by_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = adapted()
    first = find_sites(model)[0]
    only = [replace(first, info=replace(first.info, name="elsewhere", family="test-family"))]

    class Family:
        def find(self, model: nn.Module) -> Iterator[Site]:
            yield from only

    monkeypatch.setattr(SITE_FAMILIES, "_items", dict(SITE_FAMILIES._items))
    SITE_FAMILIES.register("test-family", Family())
    assert find_sites(model, ["test-family"]) == only
    names = [site.info.name for site in find_sites(model)]
    assert len(names) == 7
    assert names.index("elsewhere") < 2  # sites come in module order, whatever their family
    with pytest.raises(UnknownNameError, match="Did you mean 'moe-lora'"):
        find_sites(model, ["moe-lor"])


def test_output_roots_give_the_norm_of_the_experts_output() -> None:
    _, model = adapted()
    sites = find_sites(model)[:2]
    z = torch.randn(2, 7, E, R, generator=torch.Generator().manual_seed(0))
    b = torch.stack([site.weights().b for site in sites])
    direct = 4.0 * torch.einsum("sedk,snek->sned", b, z)
    through_root = torch.einsum("seij,snej->snei", output_roots(sites), z)
    torch.testing.assert_close(through_root.norm(dim=-1), direct.norm(dim=-1), rtol=1e-5, atol=1e-6)


def test_output_roots_where_the_output_is_narrower_than_the_rank() -> None:
    from driftlens.adapters import MoELoraLinear

    config = MoELoraConfig(num_experts=2, r=5, target_modules=["x"])
    layer = MoELoraLinear(nn.Linear(6, 3), "default", config)
    nn.init.normal_(layer.moe_lora_B["default"].weight)
    (site,) = find_sites(nn.ModuleDict({"x": layer}))
    z = torch.randn(1, 4, 2, 5)
    direct = layer.scaling["default"] * torch.einsum("edk,snek->sned", site.weights().b, z)
    through_root = torch.einsum("seij,snej->snei", output_roots([site]), z)
    torch.testing.assert_close(through_root.norm(dim=-1), direct.norm(dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "layer"), [("model.layers.20.mlp.up_proj", 20), ("h.3.fc", 3), ("head", -1)])
def test_layer_index(name: str, layer: int) -> None:
    assert layer_index(name) == layer


def test_two_families_cannot_claim_one_site(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = adapted()
    monkeypatch.setattr(SITE_FAMILIES, "_items", dict(SITE_FAMILIES._items))
    SITE_FAMILIES.register("twin", SITE_FAMILIES.get("moe-lora"))
    with pytest.raises(SiteError, match=r"down_proj|gate_proj is claimed by the families moe-lora and moe-lora"):
        find_sites(model, ["moe-lora", "twin"])
