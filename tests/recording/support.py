"""Tiny models, probes and checkpoints for the recording tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from driftlens.adapters import MoELoraConfig, iter_sites
from driftlens.backbones import Backbone, load_backbone
from driftlens.recording import ProbeSet
from driftlens.store import Recording, open_recording
from driftlens.streams import load_stream

E, R = 3, 4
TARGETS = ["gate_proj", "up_proj", "down_proj"]


def adapted(gate: str = "softmax", seed: int = 0, layers: tuple[int, ...] = (2, 3)) -> tuple[Backbone, PeftModel]:
    """The tiny backbone with an adapter whose experts all do something."""
    backbone = load_backbone("tiny-random")
    torch.manual_seed(seed)
    config = MoELoraConfig(
        num_experts=E, r=R, gate=gate, target_modules=TARGETS, layers_to_transform=list(layers), init_std=0.3
    )
    model = get_peft_model(backbone.model, config)
    shake(model, seed)
    return backbone, model


def shake(model: nn.Module, seed: int) -> None:
    """Give every site random A, B and router, as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in iter_sites(model):
            layer.moe_lora_A["default"].weight.normal_(0, 0.3, generator=g)
            layer.moe_lora_B["default"].weight.normal_(0, 0.1, generator=g)
            router = getattr(layer.moe_lora_gate["default"], "weight", None)
            if router is not None:
                router.normal_(0, 0.5, generator=g)


def toy_probes(samples: int = 5, **options: object) -> ProbeSet:
    """The probe split of the toy stream: images, text, and both."""
    return ProbeSet.from_stream(load_stream("toy", probe=samples), **options)  # type: ignore[arg-type]


def datasets(path: Path) -> dict[str, np.ndarray]:
    """Every array of a recording by HDF5 path."""
    import h5py

    import driftlens.store  # noqa: F401  # registers the compression filters

    found: dict[str, np.ndarray] = {}
    with h5py.File(path, "r") as file:
        file.visititems(
            lambda name, item: found.__setitem__(name, item[...]) if isinstance(item, h5py.Dataset) else None
        )
    return found


def opened(path: Path) -> Recording:
    """Open a recording (closed by garbage collection at the end of the test)."""
    return open_recording(path)


def assert_same_rows(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Equal but for float32 noise, which moves few values, and these by one unit in float16's last place."""
    scale = float(np.abs(expected.astype(float)).max())
    np.testing.assert_allclose(
        found.astype(float), expected.astype(float), rtol=2**-10, atol=1e-5 * scale, err_msg=name
    )
    assert (found != expected).mean() < 0.01, f"{name}: more than 1 % of the values differ"
