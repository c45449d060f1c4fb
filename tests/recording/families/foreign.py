"""Checkpoints of CoIN, MCITlib and Prism on tiny LLaMA and LLaVA bases, against loops written from the equations."""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from driftlens.recording.foreign import apply_foreign
from tests.recording.families.suite import FamilyCase, Truth
from tests.recording.foreign.folders import BASES, LAYOUTS, added, gates, name_in, write


def expert_weights(layout: str) -> Tensor:
    """Weights that differ from slot to slot; Prism's HiDe takes the largest alone."""
    count = LAYOUTS[layout].experts
    if layout == "Prism HiDe":
        return torch.tensor([0.0, 1.0, 0.0])
    return torch.arange(1, count + 1) / sum(range(1, count + 1))


def build(layout: str, base: str) -> nn.Module:
    model = BASES[base]()
    with tempfile.TemporaryDirectory() as parent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(parent) / "c"
        model.plain = write(folder, LAYOUTS[layout], base)  # type: ignore[assignment]
        weighted = LAYOUTS[layout].semantics in ("same", "hide", "prism_hide", "disco")
        apply_foreign(model, folder, expert_weights=expert_weights(layout) if weighted else None)
    return model


def truth(model: nn.Module, input_ids: Tensor, *, layout: str, base: str) -> Truth:
    plain: dict[str, Tensor] = model.plain  # type: ignore[assignment]
    sites = {name_in(base, key.split(".lora_")[0]): key.split(".lora_")[0] for key in plain}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, args, out, name=name: seen.__setitem__(name, (args[0][0], out[0]))
        )
        for name in sites
    ]
    model(input_ids=input_ids)
    for handle in handles:
        handle.remove()
    found, chosen, w = {}, LAYOUTS[layout], expert_weights(layout)
    for name, stored in sites.items():
        h, out = seen[name]
        wrapped = model.get_submodule(name)
        base_out = torch.nn.functional.linear(h, wrapped.base_layer.weight)  # type: ignore[union-attr, arg-type]
        output = out - base_out
        loop = added(chosen, plain, stored, h.double(), w).float()
        torch.testing.assert_close(output, loop, rtol=1e-4, atol=1e-5)
        z = torch.stack([h @ plain[f"{stored}.lora_A.loraA.{e}.weight"].T for e in range(chosen.experts)], 1)
        found[name] = {"gate": gates(chosen, plain, stored, h, w), "pathway": z, "output": loop}
    return found


CASES = [
    FamilyCase(f"{layout} on {base}", "foreign", partial(build, layout, base), partial(truth, layout=layout, base=base))
    for layout in LAYOUTS
    for base in BASES
    # those that differ from another one in file names alone are shown on one base
    if base == "LLaMA" or layout not in ("MCITlib CL-MoE", "Prism O-LoRA", "Prism HiDe")
]
