"""The copy to the host on a CUDA device: asynchronous, and the same numbers. Elsewhere these tests skip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import driftlens as dl
from driftlens.recording.transfer import HostCopy
from tests.recording.support import adapted, datasets, toy_probes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_a_copy_from_the_device_is_pinned_and_equal() -> None:
    source = torch.randn(1 << 20, device="cuda")
    expected = source.cpu().numpy()
    copy = HostCopy(source)
    source = torch.zeros(1 << 20, device="cuda")  # may not take the place of what is still being copied
    assert copy._host.is_pinned()
    np.testing.assert_array_equal(copy.wait(), expected)
    np.testing.assert_array_equal(copy.wait(), expected)


def test_probes_and_own_forwards_on_the_device_equal_one_another(tmp_path: Path) -> None:
    backbone, model = adapted()
    model.to("cuda")
    probes = toy_probes().select(["parity"])
    dl.record(model, probes, tmp_path / "p.h5", encoder=backbone.encoder, checkpoint_meta={}, batch_size=1)
    with dl.record(model, "parity", out=tmp_path / "l.h5"), torch.no_grad():
        for row in probes.encode(backbone.encoder)["parity"]:
            model(input_ids=torch.from_numpy(row.input_ids)[None].cuda(), use_cache=False)
    at_once, live = datasets(tmp_path / "p.h5"), datasets(tmp_path / "l.h5")
    for name in ("group_0/gate", "group_0/pathway"):
        np.testing.assert_allclose(live[name], at_once[name], rtol=2e-3, atol=2e-3, err_msg=name)
