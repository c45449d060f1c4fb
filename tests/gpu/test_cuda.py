"""What only a CUDA device shows. Elsewhere these tests skip and say why."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from driftlens.adapters import MoELoraConfig, MoELoraLinear
from driftlens.recording import record_run
from driftlens.store import open_recording
from driftlens.training import train_run
from tests.training.support import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("gate", ["softmax", "topk", "energy"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_layer_on_cuda_equals_the_cpu(gate, dtype, tolerance):
    torch.manual_seed(0)
    layer = MoELoraLinear(nn.Linear(48, 40), "default", MoELoraConfig(num_experts=4, r=4, gate=gate))
    with torch.no_grad():
        layer.moe_lora_B["default"].weight.normal_(std=0.2)
    h = torch.randn(3, 7, 48)
    expected = layer(h)
    layer.to("cuda")
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        got = layer(h.to("cuda"))
    scale = float(expected.abs().max())
    assert float((got.float().cpu() - expected).abs().max()) < tolerance * scale


def test_a_run_on_cuda_is_close_to_the_cpu(tmp_path):
    frames = {}
    for device in ("cpu", "cuda"):
        train_run(tiny_config(training={"device": device}), tmp_path / device)
        frames[device] = pd.read_parquet(tmp_path / device / "scores.parquet")
    np.testing.assert_allclose(frames["cuda"]["nll"], frames["cpu"]["nll"], rtol=0.02)


def test_recording_on_cuda_equals_the_cpu(tmp_path):
    run = train_run(tiny_config(training={"device": "cuda"}), tmp_path / "run")
    record_run(run, device="cuda")
    on_cuda = open_recording(run / "recordings/03-shape.h5")
    gates = {(s.name, p): np.asarray(on_cuda.gate(s.name, p)) for s in on_cuda.sites for p in on_cuda.probes}
    record_run(run, device="cpu", resume=False)
    on_cpu = open_recording(run / "recordings/03-shape.h5")
    for (site, probe), gate in gates.items():
        np.testing.assert_allclose(gate, np.asarray(on_cpu.gate(site, probe)), atol=2e-3)
