"""The vision tower against an independent computation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from driftlens.backbones.tiny import tiny_backbone_parts
from driftlens.backbones.vision import (
    EfficientNetLiteConfig,
    EfficientNetLiteModel,
    _SameConv2d,
    convert_tower_state,
    register_tower,
)
from driftlens.errors import FormatError


@pytest.fixture(scope="module")
def tower():
    return tiny_backbone_parts()[0].model.vision_tower


@pytest.fixture(scope="module")
def lite0():
    return EfficientNetLiteModel(EfficientNetLiteConfig())


@pytest.mark.parametrize("size", [7, 8, 15, 16])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_equals_a_convolution_of_the_padded_plane(size, kernel, stride):
    torch.manual_seed(0)
    conv = _SameConv2d(2, 3, kernel, stride, bias=False)
    x = torch.randn(1, 2, size, size)
    out = conv(x)
    wanted = math.ceil(size / stride)
    total = max((wanted - 1) * stride + kernel - size, 0)
    assert out.shape[-2:] == (wanted, wanted)
    for i in range(wanted):
        for j in range(wanted):
            expected = torch.zeros(3)
            for u in range(kernel):
                for v in range(kernel):
                    a, b = i * stride + u - total // 2, j * stride + v - total // 2
                    if 0 <= a < size and 0 <= b < size:
                        expected += conv.weight[:, :, u, v].detach() @ x[0, :, a, b]
            torch.testing.assert_close(out[0, :, i, j].detach(), expected, atol=1e-5, rtol=1e-5)


def test_lite0_has_the_published_size(lite0):
    # 4,652,008 parameters with the classifier of 1280 x 1000 + 1000.
    assert sum(p.numel() for p in lite0.parameters()) == 4_652_008 - 1_281_000
    assert len(lite0.blocks) == 16
    with torch.no_grad():
        middle, last = lite0.feature_maps(torch.randn(1, 3, 112, 112))
    assert middle.shape == (1, 112, 7, 7)
    assert last.shape == (1, 1280, 4, 4)
    assert lite0.config.hidden_size == 1280 + 4 * 112


def test_tokens_are_quadrants_in_reading_order(tower):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        middle, last = tower.feature_maps(x)
        tokens = tower.raw_tokens(x)
    coarse = nn.functional.adaptive_avg_pool2d(last, 2)
    fine = nn.functional.adaptive_avg_pool2d(middle, 4)
    for row in range(2):
        for column in range(2):
            cells = [fine[:, :, 2 * row + u, 2 * column + v] for u in range(2) for v in range(2)]
            expected = torch.cat([coarse[:, :, row, column], *cells], dim=-1)
            torch.testing.assert_close(tokens[:, 2 * row + column], expected)


def test_statistics_standardise(tower):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        raw = tower.raw_tokens(x)
        tower.token_mean.fill_(2.0)
        tower.token_std.fill_(4.0)
        out = tower(x)
        tower.token_mean.zero_()
        tower.token_std.fill_(1.0)
    torch.testing.assert_close(out.last_hidden_state, (raw - 2) / 4)
    assert out.hidden_states[-1] is out.last_hidden_state


def test_training_mode_never_reaches_the_tower():
    model = tiny_backbone_parts()[0]
    model.train()
    tower = model.model.vision_tower
    assert not any(module.training for module in tower.modules())
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    with torch.no_grad():
        tower(torch.randn(2, 3, 32, 32) + 5)
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())


def test_published_names_load_strictly():
    model = tiny_backbone_parts()[0].model.vision_tower
    published = {}
    for name, value in model.state_dict().items():
        old = name.replace("stem.conv", "_conv_stem").replace("stem.norm", "_bn0")
        old = old.replace("head.conv", "_conv_head").replace("head.norm", "_bn1").replace("blocks.", "_blocks.")
        for part, conv, norm in (("expand", "_expand_conv", "_bn0"), ("depthwise", "_depthwise_conv", "_bn1")):
            old = old.replace(f"{part}.conv", conv).replace(f"{part}.norm", norm)
        old = old.replace("project.conv", "_project_conv").replace("project.norm", "_bn2")
        if not name.startswith("token_"):
            published[old] = value + 1
    published |= {"_fc.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}
    fresh = EfficientNetLiteModel(model.config)
    convert_tower_state(published, fresh)
    for name, value in fresh.state_dict().items():
        if not name.startswith("token_"):
            assert torch.equal(value, model.state_dict()[name] + 1)
    published.pop("_conv_stem.weight")
    with pytest.raises(FormatError, match=r"weights do not fit: stem\.conv\.weight\. Fetch the assets again"):
        convert_tower_state(published, fresh)
    published["_conv_stem.weight"] = torch.zeros(3)
    published["_extra"] = torch.zeros(1)
    with pytest.raises(FormatError, match=r"_extra, stem\.conv\.weight"):
        convert_tower_state(published, fresh)


def test_auto_classes_know_the_tower_after_registration():
    register_tower()
    register_tower()
    config = AutoConfig.for_model("driftlens_efficientnet_lite", head_channels=16, hidden_size=16 + 4 * 112)
    assert isinstance(AutoModel.from_config(config), EfficientNetLiteModel)
