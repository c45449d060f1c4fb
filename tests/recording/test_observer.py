"""The observer: no synchronisation in the hooks, one copy per batch, and a clear word when misused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from driftlens.backbones import collate
from driftlens.errors import SiteError
from driftlens.recording import Hooks, find_sites
from driftlens.recording.observer import Observer

from .support import E, R, adapted, toy_probes

# Operators that make the host wait for a device.
SYNCHRONISING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.unique")


class Spy(TorchDispatchMode):
    """Counts the operators that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func).rsplit(".", 1)[0]] += 1
        return func(*args, **(kwargs or {}))


def test_hooks_never_make_the_host_wait() -> None:
    backbone, model = adapted("topk")
    root = model.get_base_model()
    rows = toy_probes().encode(backbone.encoder)["parity"]
    batch = {k: v for k, v in collate(rows, pad_token_id=0).items() if k not in ("labels", "roles")}
    tokens = batch["attention_mask"].flatten().nonzero().squeeze(1)
    observer = Observer(find_sites(model))
    observer.expect(tokens, torch.arange(7))
    with torch.inference_mode():
        with Spy() as bare:
            root(**batch)
        with Spy() as hooked, Hooks(root, observer.points, observer.on_fire, observer.on_pass):
            root(**batch)
    added = hooked.calls - bare.calls
    assert added["aten.index_select"] >= 3 * 6, "the spy sees what the hooks do"
    assert [name for name in added if name.startswith(SYNCHRONISING)] == []
    (group,) = observer.take()
    assert group.values["pathway"].shape == (6, 7, E, R)
    assert group.sums["gate_sum"].sum() == pytest.approx(6 * len(tokens), rel=1e-5)


def test_taking_what_was_not_observed_is_an_error() -> None:
    _, model = adapted()
    observer = Observer(find_sites(model))
    observer.expect(torch.arange(3), torch.arange(3))
    with pytest.raises(SiteError, match="No forward was observed since `expect`"):
        observer.take()
