"""Native MoE blocks through the whole recorder; ``test_native_moe.py`` runs every model type of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from tests.recording.families.suite import FamilyCase, Truth
from tests.recording.tiny_moe import MODELS, SCALE, TinyMoE, build, really_used

__all__ = ["CASES"]

_ROWS = {
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE (shared expert, not renormalised)",
    "deepseek_v3": "DeepSeek-V3 (groups, bias in the choice, factor)",
    "gpt_oss": "GPT-OSS (top-k, then softmax)",
    "gemma4_text": "Gemma 4 (router beside a dense MLP)",
    "llama4_text": "Llama 4 (weights on the experts' input)",
    "jetmoe": "JetMoE (experts in the attention too)",
    "jamba": "Jamba (state-space layers)",
}
_FACTOR = {"deepseek_v3": SCALE}
"""What the weights handed to the experts hold beyond the gate."""


def _truth(factor: float) -> Callable[[nn.Module, Tensor], Truth]:
    def truth(model: nn.Module, ids: Tensor) -> Truth:
        used = really_used(model, {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)})
        names = {host: f"{host}.router" if host.rpartition(".")[2].isdigit() else host for host in used}
        return {names[host]: {"gate": value[:, : _experts(model)] / factor} for host, value in used.items()}

    return truth


def _experts(model: nn.Module) -> int:
    config = model.config
    return int(getattr(config, "num_local_experts", None) or config.num_experts)


def _case(tiny: TinyMoE) -> FamilyCase:
    return FamilyCase(
        _ROWS[tiny.model_type], "native-moe", partial(build, tiny), _truth(_FACTOR.get(tiny.model_type, 1.0))
    )


CASES = [_case(tiny) for tiny in MODELS if tiny.model_type in _ROWS]
