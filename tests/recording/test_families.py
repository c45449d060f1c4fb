"""The common suite: every site family shows what the model's own forward does, and disturbs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from driftlens.recording import Hooks, count_hooks, find_sites
from driftlens.recording.observer import Observer
from driftlens.recording.sites import base_module, forward_context
from driftlens.store import open_recording, verify_recording
from tests.recording.families.suite import FamilyCase, cases, parity, probes, recorded, token_ids

ALL = cases()


@pytest.fixture(params=ALL, ids=lambda case: case.name, scope="module")
def case(request: pytest.FixtureRequest) -> FamilyCase:
    result: FamilyCase = request.param
    return result


@pytest.fixture(scope="module")
def model(case: FamilyCase) -> nn.Module:
    return case.build()


@pytest.fixture(scope="module")
def file(case: FamilyCase, model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family") / "x.h5"
    recorded(model, path, batch_size=2)
    return path


def test_gates_pathways_and_outputs_are_the_models_own(case: FamilyCase, model: nn.Module, file: Path) -> None:
    with open_recording(file) as recording:
        found = parity(case, model, recording)
    # float16 keeps 11 bits
    assert found.sites > 0
    assert found.gate < 1e-3
    assert found.pathway is None or found.pathway < 1e-3
    assert found.output is None or found.output < 2e-3


def test_the_file_verifies_and_names_the_family(case: FamilyCase, file: Path) -> None:
    assert verify_recording(file) == []
    with open_recording(file) as recording:
        assert case.family in {site.family for site in recording.sites}


def test_recording_changes_no_output_and_leaves_no_hook(model: nn.Module) -> None:
    root, ids = base_module(model), token_ids(probes().task("first")[0])
    before = count_hooks(model)
    with torch.inference_mode(), forward_context(model):
        plain = root(input_ids=ids, **_mask(root, ids)).logits
        observer = Observer(find_sites(model))
        observer.expect(torch.arange(ids.shape[1]), torch.arange(ids.shape[1]))
        with Hooks(root, observer.points, observer.on_fire, observer.on_pass):
            hooked = root(input_ids=ids, **_mask(root, ids)).logits
    assert torch.equal(plain, hooked)
    assert count_hooks(model) == before


def _mask(root: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    return {"attention_mask": torch.ones_like(ids)}


def test_padding_and_batches_change_nothing(model: nn.Module, file: Path, tmp_path: Path) -> None:
    recorded(model, tmp_path / "y.h5", batch_size=3, padding_side="right")
    with open_recording(file) as one, open_recording(tmp_path / "y.h5") as two:
        assert one.sites == two.sites
        for task in one.probes:
            for a, b in zip(one.groups, two.groups, strict=True):
                for name in ("gate", "pathway", "expert_norm", "base_norm"):
                    first, second = (group.read(name, task) for group in (a, b))
                    scale = max(float(np.abs(np.nan_to_num(first)).max(initial=0)), 1e-6)
                    np.testing.assert_allclose(second, first, rtol=0, atol=2e-3 * scale, err_msg=name)
        for a, b in zip(one.groups, two.groups, strict=True):
            for name in a.stats:
                np.testing.assert_allclose(b.stats[name], a.stats[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_site_responds_to_its_input_as_it_did(model: nn.Module) -> None:
    root, ids = base_module(model), token_ids(probes().task("first")[0])
    sites = [site for site in find_sites(model) if site.respond is not None]
    seen: dict[str, dict[str, torch.Tensor]] = {site.info.name: {} for site in sites}
    points = [(site, point) for site in sites for point in site.points]

    def look(index: int, args: tuple[Any, ...], output: Any) -> None:
        site, point = points[index]
        seen[site.info.name].update({k: v.detach().clone() for k, v in site.read(point.part, args, output).items()})

    with torch.inference_mode(), forward_context(model), Hooks(root, [point for _, point in points], look):
        root(input_ids=ids, **_mask(root, ids))
        for site in sites:
            values = seen[site.info.name]
            assert site.respond is not None
            answer = site.respond(values["input"].reshape(-1, site.info.d_in))
            for name, axes in (("gate", 1), ("pathway", 2)):
                if name in values:
                    expected = values[name].flatten(0, values[name].dim() - axes - 1)
                    torch.testing.assert_close(answer[name].float(), expected.float(), rtol=1e-5, atol=1e-6)


def test_names_are_unique() -> None:
    names = [case.name for case in ALL]
    assert len(set(names)) == len(names)
