"""EfficientNet-Lite as a vision tower that yields four image tokens.

The architecture is the published one (Tan & Le 2019, arXiv:1905.11946; the "lite" variant has ReLU6 and no
squeeze-and-excitation). New here is what leaves the tower: one token per image quadrant that joins the last feature map
with a finer map from the middle of the network. The last map alone loses where things are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, pad, relu6
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from driftlens.errors import FormatError

__all__ = ["EfficientNetLiteConfig", "EfficientNetLiteModel", "convert_tower_state", "register_tower"]

LITE0_STAGES = (
    # repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLiteConfig(PretrainedConfig):
    """Shape of the tower; the defaults are EfficientNet-Lite0 at 112 pixels.

    Attributes:
        image_size: side of the square input in pixels.
        stem_channels: channels after the first convolution.
        stages: (repeats, kernel, stride, expansion, channels) of each stage of inverted residual blocks.
        head_channels: channels of the last feature map.
        middle_block: index of the block whose output gives the fine half of a token.
        hidden_size: size of a token, head_channels + 4 * channels of the middle block.
    """

    model_type = "driftlens_efficientnet_lite"

    image_size: int = 112
    stem_channels: int = 32
    stages: list[list[int]] | tuple[tuple[int, ...], ...] = LITE0_STAGES
    head_channels: int = 1280
    middle_block: int = 10
    hidden_size: int = 1728


class _SameConv2d(nn.Conv2d):
    """Convolution with output size ceil(input / stride); an odd remainder of padding goes right and below."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for axis in (-1, -2):
            size, kernel, stride = x.shape[axis], self.kernel_size[axis], self.stride[axis]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(pad(x, pads))


class _ConvNorm(nn.Sequential):
    def __init__(self, d_in: int, d_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = _SameConv2d(d_in, d_out, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(d_out, eps=1e-3)


class _Block(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, 1x1 projection."""

    def __init__(self, d_in: int, d_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = d_in * expansion
        self.expand = _ConvNorm(d_in, wide, 1) if expansion != 1 else None
        self.depthwise = _ConvNorm(wide, wide, kernel, stride, groups=wide)
        self.project = _ConvNorm(wide, d_out, 1)
        self.skips = stride == 1 and d_in == d_out

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.expand is None else relu6(self.expand(x))
        h = self.project(relu6(self.depthwise(h)))
        out: Tensor = x + h if self.skips else h
        return out


class EfficientNetLiteModel(PreTrainedModel):
    """A frozen feature extractor: images [n, 3, s, s] -> tokens [n, 4, hidden_size], standardised per dimension.

    ``train()`` leaves it in evaluation mode: its batch statistics belong to ImageNet and must not drift with a stream.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision_tower"
    config: EfficientNetLiteConfig
    token_mean: Tensor
    token_std: Tensor

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = _ConvNorm(3, config.stem_channels, 3, 2)
        blocks: list[nn.Module] = []
        channels = config.stem_channels
        for repeats, kernel, stride, expansion, width in config.stages:
            for repeat in range(repeats):
                blocks.append(_Block(channels, width, kernel, stride if repeat == 0 else 1, expansion))
                channels = width
        self.blocks = nn.ModuleList(blocks)
        self.head = _ConvNorm(channels, config.head_channels, 1)
        self.register_buffer("token_mean", torch.zeros(config.hidden_size))
        self.register_buffer("token_std", torch.ones(config.hidden_size))
        self.post_init()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        super().train(False)

    def train(self, mode: bool = True) -> EfficientNetLiteModel:
        """Stay in evaluation mode, whatever ``mode`` says."""
        del mode
        super().train(False)
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            if module.running_mean is not None and module.running_var is not None:
                nn.init.zeros_(module.running_mean)
                nn.init.ones_(module.running_var)
        elif isinstance(module, EfficientNetLiteModel):
            nn.init.zeros_(module.token_mean)
            nn.init.ones_(module.token_std)

    def feature_maps(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the middle map [n, c, h, w] and the last map [n, head_channels, h', w']."""
        h = relu6(self.stem(pixel_values))
        middle = h
        for index, block in enumerate(self.blocks):
            h = block(h)
            if index == self.config.middle_block:
                middle = h
        return middle, relu6(self.head(h))

    def raw_tokens(self, pixel_values: Tensor) -> Tensor:
        """Return tokens [n, 4, hidden_size] before standardisation, quadrants in reading order.

        A token is the quadrant's mean of the last map followed by its 2 x 2 cells of the middle map.
        """
        middle, last = self.feature_maps(pixel_values)
        coarse = adaptive_avg_pool2d(last, 2).flatten(2).transpose(1, 2)  # [n, 4, head]
        cells = adaptive_avg_pool2d(middle, 4)  # [n, c, 4, 4]
        n, c = cells.shape[:2]
        # rows and columns -> (quadrant row, row inside, quadrant column, column inside)
        fine = cells.view(n, c, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, 4, 4 * c)
        return torch.cat((coarse, fine), dim=-1)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the tokens as the last hidden state and as the only hidden state."""
        del kwargs  # LLaVA asks every tower for dictionaries and hidden states; this one has one answer
        tokens = self.raw_tokens(pixel_values.to(self.stem.conv.weight.dtype))
        tokens = (tokens - self.token_mean) / self.token_std
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


def register_tower() -> None:
    """Tell transformers' Auto classes about the tower; calling it again changes nothing."""
    AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)


_RENAMED = (
    (r"^_conv_stem\.", "stem.conv."),
    (r"^_bn0\.", "stem.norm."),
    (r"^_conv_head\.", "head.conv."),
    (r"^_bn1\.", "head.norm."),
    (r"^_blocks\.(\d+)\._expand_conv\.", r"blocks.\1.expand.conv."),
    (r"^_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand.norm."),
    (r"^_blocks\.(\d+)\._depthwise_conv\.", r"blocks.\1.depthwise.conv."),
    (r"^_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise.norm."),
    (r"^_blocks\.(\d+)\._project_conv\.", r"blocks.\1.project.conv."),
    (r"^_blocks\.(\d+)\._bn2\.", r"blocks.\1.project.norm."),
)
_CLASSIFIER = frozenset(("_fc.weight", "_fc.bias"))


def convert_tower_state(state: Mapping[str, Tensor], tower: EfficientNetLiteModel) -> None:
    """Load a published EfficientNet-Lite state dict into ``tower``; its classifier is left out.

    Raises:
        FormatError: a tensor is missing, unknown, or of another shape; nothing is loaded then.
    """
    renamed = {_rename(key): value for key, value in state.items() if key not in _CLASSIFIER}
    own = {key: value for key, value in tower.state_dict().items() if not key.startswith("token_")}
    wrong = sorted(own.keys() ^ renamed.keys())
    wrong += sorted(key for key in own.keys() & renamed.keys() if own[key].shape != renamed[key].shape)
    if wrong:
        raise FormatError(f"The image encoder's weights do not fit: {_some(wrong)}. Fetch the assets again.")
    tower.load_state_dict({**tower.state_dict(), **renamed}, strict=True)


def _rename(key: str) -> str:
    for pattern, replacement in _RENAMED:
        key, count = re.subn(pattern, replacement, key)
        if count:
            break
    return key


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
