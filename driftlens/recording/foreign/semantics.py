"""Which forward a folder of CoIN, MCITlib or Prism was trained for; keys alone do not say it.

=================  ===================================================  ==============================================
name               evaluation forward, y = W h + s * ...                written by
=================  ===================================================  ==============================================
sum_gBA            sum_e g_e B_e A_e h, g = softmax(R h) per token      CoIN and MCITlib MoELoRA, CL-MoE, Prism clmoe
product_of_sums    (sum_j g_j B_j)(sum_i g_i A_i) h, g as above         Prism moelora
same               product of sums; g = softmax(R h / E) averaged over  Prism SAME
                   a sample, times prototype weights, top 2
hide               product of sums with g = 1 for e <= cur_task; last   MCITlib HiDe
                   decoder layer: sum_e w_e B_e A_e h
prism_hide         sum_e B_e A_e h; last decoder layer: the expert of   Prism HiDe
                   the largest w_e alone
olora              sum of B_e A_e h over e <= cur_task                  MCITlib and Prism O-LoRA
disco              sum_e w_e B_e A_e h in every layer                   MCITlib and Prism DISCO
slot_select        B_c A_c h, c = cur_task                              the training forward of HiDe, O-LoRA and DISCO
=================  ===================================================  ==============================================

The last decoder layer is number 31 in MCITlib, which knows LLaMA-7B alone; here it is the last one of any base.
w compares CLIP features of a sample with stored prototypes, see `driftlens.recording.foreign.state`.
"""

from __future__ import annotations

import warnings
from typing import Final

from driftlens.errors import ConfigError, FormatError, UnknownNameError
from driftlens.recording.foreign.tensors import FolderTensors

__all__ = ["FOREIGN_SEMANTICS", "choose_semantics", "current_task"]

FOREIGN_SEMANTICS: Final[dict[str, str]] = {
    "sum_gBA": "per-token softmax router, sum of experts (CoIN, MCITlib MoELoRA, CL-MoE)",
    "product_of_sums": "per-token softmax router, mixed B times mixed A (Prism moelora)",
    "same": "router averaged over a sample, prototypes, top 2, mixed B times mixed A (Prism SAME)",
    "hide": "sums of A and of B up to cur_task; last layer weighted by prototypes (MCITlib HiDe)",
    "prism_hide": "sum of all experts; last layer the expert of the nearest prototype (Prism HiDe)",
    "olora": "sum of the experts up to cur_task (O-LoRA)",
    "disco": "experts weighted by prototypes in every layer (DISCO)",
    "slot_select": "expert cur_task alone (training forward of HiDe, O-LoRA, DISCO)",
}
"""Values of ``--semantics`` and what they mean."""

_BY_TYPE: Final = {
    "MOE_LORA_SAME": "same",
    "MOE_LORA_MOELORA": "product_of_sums",
    "MOE_LORA_CLMoE": "sum_gBA",
    "CLMOE": "sum_gBA",
    "MOE_LORA_OLORA": "olora",
    "MOE_LORA_DisCo": "disco",
}
_ROUTED: Final = ("sum_gBA", "product_of_sums", "same")
_OLORA_SLOT: Final = 4
"""MCITlib builds O-LoRA's configuration without cur_task, whose default is 4: every task trains this slot."""


def choose_semantics(tensors: FolderTensors, semantics: str | None) -> str:
    """Return the forward to use: the one that was asked for, or the one that the folder implies.

    Warns:
        UserWarning: keys and configuration fit several methods; the message says which one was taken.

    Raises:
        UnknownNameError: no such semantics.
        ConfigError: nothing was asked for and the folder does not tell.
        FormatError: the forward needs a router that the folder lacks, or it is of a method that is not supported.
    """
    if semantics is not None and semantics not in FOREIGN_SEMANTICS:
        raise UnknownNameError("semantics", semantics, FOREIGN_SEMANTICS)
    chosen = _inferred(tensors) if semantics is None else semantics
    if chosen in _ROUTED and next(iter(tensors.sites.values())).router is None:
        raise FormatError(
            f"{tensors.file} has no lora_router, which the semantics {chosen!r} needs. Give another one with "
            f"--semantics ({', '.join(name for name in FOREIGN_SEMANTICS if name not in _ROUTED)})."
        )
    if tensors.trained == (_OLORA_SLOT,) and chosen == "olora":
        _warn(
            f"{tensors.folder}: only slot {_OLORA_SLOT} of {tensors.num_experts} was ever trained. MCITlib's O-LoRA "
            "leaves cur_task out of the configuration, so that every task trains the slot of its default: this "
            "checkpoint is one LoRA trained on after another, not one slot per task."
        )
    return chosen


def current_task(tensors: FolderTensors, semantics: str) -> int:
    """Return the slot up to which (or which alone) experts are active.

    Raises:
        FormatError: ``cur_task`` is not a slot.
    """
    stated = tensors.config.get("cur_task")
    count = tensors.num_experts
    if stated is None:
        last = max(tensors.trained, default=count - 1)
        current = min(_OLORA_SLOT, count - 1) if semantics == "olora" else last
        why = "the last slot that was trained"
        if semantics == "olora":
            why = "the default of O-LoRA's code" if current == _OLORA_SLOT else "for the default of 4 has no slot here"
        _warn(f"{tensors.folder}: adapter_config.json has no cur_task; took {current}, {why}.")
        return current
    if not isinstance(stated, int) or isinstance(stated, bool) or not 0 <= stated < count:
        raise FormatError(
            f"{tensors.folder}/adapter_config.json has cur_task {stated!r}, expected a slot from 0 to {count - 1} "
            f"(the weights hold {count} experts). Correct it, or restore the checkpoint."
        )
    return stated


def _inferred(tensors: FolderTensors) -> str:
    kind, sites = str(tensors.config.get("peft_type")), list(tensors.sites.values())
    if tensors.buffers or (tensors.folder / "same_state.bin").is_file():
        return "same"
    if any(site.has_mixer for site in sites):
        return "disco"
    if kind == "MOE_LORA_HiDe":
        return _hide(tensors)
    if kind == "MOE_LORA_CoIN":
        return _coin(tensors)
    if kind in _BY_TYPE:
        if kind == "MOE_LORA_MOELORA":
            _ambiguous(
                tensors, "product_of_sums", "sum_gBA", "Prism and CoIN write the same keys; only peft_type differs"
            )
        return _BY_TYPE[kind]
    raise ConfigError(
        f"{tensors.folder} has peft_type {kind!r}, which does not say how its experts combine. Give it with "
        f"--semantics: {', '.join(FOREIGN_SEMANTICS)}."
    )


def _hide(tensors: FolderTensors) -> str:
    prism = [
        what
        for what, is_so in (
            ("safetensors", tensors.file.suffix == ".safetensors"),
            ("hide_state.pt", (tensors.folder / "hide_state.pt").is_file()),
            ("task_type CAUSAL_LM", tensors.config.get("task_type") == "CAUSAL_LM"),
            ("exclude_module_path_segments", "exclude_module_path_segments" in tensors.config),
        )
        if is_so
    ]
    chosen, other = ("prism_hide", "hide") if prism else ("hide", "prism_hide")
    signs = f"signs of Prism: {', '.join(prism)}" if prism else "no sign of Prism"
    _ambiguous(tensors, chosen, other, f"MCITlib and Prism share peft_type MOE_LORA_HiDe; {signs}")
    return chosen


def _coin(tensors: FolderTensors) -> str:
    shared = "MoELoRA, O-LoRA and DISCO share peft_type MOE_LORA_CoIN"
    if next(iter(tensors.sites.values())).router is None:
        raise ConfigError(
            f"{tensors.folder} has no lora_router and no lora_AB, and {shared}. Say what it is with --semantics: "
            f"{', '.join(FOREIGN_SEMANTICS)}."
        )
    alone = tensors.trained == (_OLORA_SLOT,)
    if alone or "cur_task" in tensors.config:
        sign = f"only slot {_OLORA_SLOT} is trained" if alone else "the configuration has cur_task"
        _ambiguous(tensors, "olora", "sum_gBA", f"{shared}; {sign}")
        return "olora"
    _ambiguous(tensors, "sum_gBA", "olora", f"{shared}; there is a router, no lora_AB and no cur_task")
    return "sum_gBA"


def _ambiguous(tensors: FolderTensors, chosen: str, other: str, why: str) -> None:
    _warn(
        f"{tensors.folder}: took --semantics {chosen} ({why}). If it is another method, outputs are wrong without any "
        f"error: say it yourself, for example --semantics {other}."
    )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
