"""How every router class of transformers defines its gate, and how to read the gate that a forward really used.

The table is explicit: a router that is not in it is reported, never guessed at, because classes that look alike differ
(softmax before or after the choice, a bias that only chooses, factors inside the weights or behind the experts).
Read from the modeling files of transformers 5.23; ``docs/moe_models.md`` lists the model types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from driftlens.errors import SiteError

__all__ = ["ROUTERS", "UNREADABLE", "RouterKind"]


Arguments = tuple[Any, ...]


def _chosen(_router: Any, _block: Any, _args: Arguments, output: Any) -> tuple[Tensor, Tensor]:
    """Return weights and indices of a router that gives (logits, weights [..., k], indices [..., k], ...)."""
    return output[1], output[2]


@dataclass(frozen=True)
class RouterKind:
    """How one router class defines its gate.

    Attributes:
        score: what turns a logit into a score, with the order of the steps, for example ``softmax, top-k``; asked of
            router and block where their configuration decides.
        renormalised: whether the chosen weights are divided by their sum; name of the router's attribute that decides,
            or a question to router and block.
        note: what else a reader must know, for example ``group-limited``; may look at router and block.
        read: weights [..., k] and expert indices [..., k] from the router's output.
        sums_to_one: False where the weights do not sum to 1 although they were renormalised (per-expert factors).
        inner: factor that the router already multiplied into its weights (taken out of the gate).
        outer: factor that the block applies behind the experts.
        weight: path of the router's weight, [E, d_in] or with further rows below; empty where it is not one matrix.
        num_experts: E where it is not the number of rows of the weight.
        top_k: k where it is not ``router.top_k``.
        args: what the block hands to the router beside the hidden states.
        batched: the router wants [B, T, d_in], not flat tokens.
        follows_input: whether the gate is a function of the router's input alone, token by token.
        output: whose output counts as the block's: ``block``, or ``experts`` where router and experts have no module
            of their own around them.
        within: the router is hidden in the block (no module call of its own), so that the block's output is read.
        beside: attribute of the block that holds a dense MLP (or its parts) which always runs, beside the usual names.
    """

    score: str | Callable[[Any, Any], str]
    renormalised: bool | str | Callable[[Any, Any], bool] = True
    note: Callable[[Any, Any], str] = lambda _router, _block: ""
    read: Callable[[Any, Any, Arguments, Any], tuple[Tensor, Tensor]] = _chosen
    sums_to_one: bool = True
    inner: Callable[[Any, Any], Any] = lambda _router, _block: 1.0
    outer: Callable[[Any, Any], Any] = lambda _router, _block: 1.0
    weight: str = "weight"
    num_experts: Callable[[Any, Any], int] | None = None
    top_k: Callable[[Any, Any], int] = lambda router, _block: int(router.top_k)
    args: Callable[[Any], Arguments] = lambda _block: ()
    batched: bool = False
    follows_input: bool = True
    output: str = "block"
    within: bool = False
    beside: str = ""

    def renormalises(self, router: nn.Module, block: nn.Module) -> bool:
        """Whether the chosen weights are divided by their sum."""
        if isinstance(self.renormalised, str):
            return bool(getattr(router, self.renormalised))
        return self.renormalised if isinstance(self.renormalised, bool) else self.renormalised(router, block)

    def normalised(self, router: nn.Module, block: nn.Module) -> bool:
        """Whether the rows of the gate sum to 1."""
        return self.sums_to_one and self.renormalises(router, block)

    def describe(self, router: nn.Module, block: nn.Module) -> str:
        """Return the kind of gate in words, as the file stores it."""
        score = self.score if isinstance(self.score, str) else self.score(router, block)
        words = [score]
        # a softmax over the chosen logits sums to 1 by itself
        if not score.endswith("softmax"):
            words.append("renormalised" if self.renormalises(router, block) else "not renormalised")
        if note := self.note(router, block):
            words.append(note)
        return ", ".join(words)

    def experts(self, router: nn.Module, block: nn.Module) -> int:
        """Return E."""
        if self.num_experts is not None:
            return int(self.num_experts(router, block))
        weight = self.router_weight(router)
        assert weight is not None, "kinds without a weight matrix name their number of experts"
        return int(weight.shape[0])

    def router_weight(self, router: nn.Module) -> Tensor | None:
        """Return the router's weight as it is now, [E, d_in] or more rows, None where it is not one matrix."""
        if not self.weight:
            return None
        value: Any = router
        for part in self.weight.split("."):
            value = getattr(value, part)
        tensor: Tensor = value.detach()
        return tensor

    def gate(self, router: nn.Module, block: nn.Module, args: Arguments, output: Any) -> Tensor:
        """Return the dense gate [..., E] of one call: the weights really used, zero outside the chosen experts."""
        weights, index = self.read(router, block, args, output)
        dense = weights.new_zeros(*weights.shape[:-1], self.experts(router, block))
        # add, not set: a slot that chose nothing may carry weight 0 on an expert that another slot chose
        dense = dense.scatter_add(-1, index, weights)
        inner = self.inner(router, block)
        dense = dense if isinstance(inner, float) and inner == 1.0 else dense / inner
        if dense.dtype in (torch.bfloat16, torch.float16) and self.normalised(router, block):
            # rounded weights miss the sum of 1 by more than the format allows; this moves them less than rounding did
            dense = dense.float()
            dense = dense / dense.sum(-1, keepdim=True)
        return dense


def _groups(router: Any, _block: Any) -> str:
    groups = router.num_group
    return f"group-limited ({router.topk_group} of {groups} groups)" if groups is not None and groups > 1 else ""


def _attribute(name: str) -> Callable[[Any, Any], Any]:
    return lambda router, _block: float(getattr(router, name))


def _of_block(name: str) -> Callable[[Any, Any], Any]:
    return lambda _router, block: float(getattr(block, name))


def _dbrx(_router: Any, block: Any, _args: Arguments, output: Any) -> tuple[Tensor, Tensor]:
    # the router gives logits only; the block's own method makes weights of them
    weights, index = block.route_tokens_to_experts(output)
    return weights, index


def _dbrx_sums(_router: Any, block: Any) -> bool:
    return bool(block.moe_normalize_expert_weights == 1)


def _dbrx_note(_router: Any, block: Any) -> str:
    p = block.moe_normalize_expert_weights
    return "" if p is None or p == 1 else f"divided by the {p:g}-norm"


def _llama4(_router: Any, _block: Any, _args: Arguments, output: Any) -> tuple[Tensor, Tensor]:
    # dense already: the sigmoid of -inf is 0 outside the top-k
    scores = output[0]
    return scores, torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)


def _switch(_router: Any, _block: Any, _args: Arguments, output: Any) -> tuple[Tensor, Tensor]:
    # the one-hot choice is zero where the expert is past its capacity
    mask, weight = output[0], output[1]
    gate = mask * weight
    return gate, torch.arange(gate.shape[-1], device=gate.device).expand_as(gate)


def _jetmoe(router: Any, _block: Any, _args: Arguments, output: Any) -> tuple[Tensor, Tensor]:
    # rows arrive grouped by expert: put each weight back at its token
    _, token, weight, sizes, logits = output
    expert = torch.arange(router.num_experts, device=weight.device)
    expert = expert.repeat_interleave(torch.tensor(sizes, device=weight.device))
    gate = weight.new_zeros(logits.shape).index_put((token, expert), weight, accumulate=True)
    return gate, torch.arange(gate.shape[-1], device=gate.device).expand_as(gate)


def _doge(router: Any, _block: Any, _args: Arguments, output: Any) -> tuple[Tensor, Tensor]:
    # two half keys per expert, as in the block's forward
    (score_x, score_y), (x, y) = output[1].topk(router.num_keys, dim=-1)
    scores = (score_x.unsqueeze(-1) + score_y.unsqueeze(-2)).flatten(-2)
    index = (x.unsqueeze(-1) * router.num_keys + y.unsqueeze(-2)).flatten(-2)
    scores, position = scores.topk(router.top_k, dim=-1)
    return torch.softmax(scores, dim=-1), index.gather(-1, position)


def _ernie_vl(router: Any, _block: Any, args: Arguments, output: Any) -> tuple[Tensor, Tensor]:
    kinds = args[1] if len(args) > 1 else None
    if kinds is not None and bool(kinds.any()):
        raise SiteError(
            "This batch holds image tokens; ERNIE 4.5 VL sends them to a second set of experts with a router of their "
            "own, so that a token's gate has no common set of experts. Record text-only probes with this model."
        )
    # the block keeps the logits only: the text router's own steps on them
    router = router.text_moe.gate
    scores = torch.softmax(output[1].float(), dim=-1)
    index = torch.topk(router.moe_statics(scores), router.top_k, dim=-1).indices
    weights = scores.gather(-1, index)
    return weights / weights.sum(-1, keepdim=True).clamp(min=router.norm_min), index


def _cohere_score(router: Any, _block: Any) -> str:
    return f"top-k, {router.expert_selection_fn}"


def _cohere_renormalised(router: Any, _block: Any) -> bool:
    return router.expert_selection_fn == "softmax" or bool(router.norm_topk_prob)


def _cohere_outer(_router: Any, block: Any) -> float:
    averaged = block.num_shared_experts > 0 and block.shared_expert_combination_strategy == "average"
    return 0.5 if averaged else 1.0


def _lfm2_score(router: Any, _block: Any) -> str:
    return _BIAS if router.use_expert_bias else "sigmoid, top-k"


def _activation(router: Any) -> str:
    return {"Sigmoid": "sigmoid", "SqrtSoftplusActivation": "root of softplus"}.get(
        type(router.score_fn).__name__, type(router.score_fn).__name__
    )


_BIAS = "sigmoid, top-k by score + bias"

_softmax = RouterKind("softmax, top-k")
_softmax_optional = replace(_softmax, renormalised="norm_topk_prob")
_after = RouterKind("top-k, softmax")
_deepseek_v3 = RouterKind(_BIAS, "norm_topk_prob", note=_groups, inner=_attribute("routed_scaling_factor"))
_deepseek_v2 = RouterKind(
    "softmax, top-k",
    renormalised=False,
    note=lambda router, block: "" if router.topk_method == "greedy" else _groups(router, block),
    inner=_attribute("routed_scaling_factor"),
)
_sigmoid_bias = RouterKind(_BIAS)
_sigmoid_scaled = replace(_sigmoid_bias, outer=_of_block("routed_scaling_factor"))
_deepseek_v4 = RouterKind(
    lambda router, _block: f"{_activation(router)}, top-k by score + bias", inner=_attribute("routed_scaling_factor")
)
_gemma = RouterKind(
    "softmax, top-k",
    note=lambda _router, _block: "times a learned factor per expert",
    sums_to_one=False,
    weight="proj.weight",
    top_k=lambda router, _block: int(router.config.top_k_experts),
    output="experts",
    beside="mlp",
)
_mistral = RouterKind("softmax, top-k", "norm_topk_prob", note=_groups, inner=_attribute("routed_scaling_factor"))
_ernie = RouterKind("softmax, top-k by score + bias")
_jet = RouterKind("top-k, softmax", read=_jetmoe, weight="layer.weight")

ROUTERS: dict[str, RouterKind] = {
    **dict.fromkeys(
        (
            "FlexOlmoTopKRouter",
            "MellumTopKRouter",
            "OlmoeTopKRouter",
            "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter",
            "Qwen3OmniMoeTalkerTextTopKRouter",
            "Qwen3OmniMoeThinkerTextTopKRouter",
            "Qwen4ExpTextTopKRouter",
        ),
        _softmax_optional,
    ),
    **dict.fromkeys(
        (
            "MiniMaxTopKRouter",
            "MixtralTopKRouter",
            "Qwen3OmniMoeTextTopKRouter",
            "Qwen3VLMoeTextTopKRouter",
            "Qwen3_5MoeTopKRouter",
        ),
        _softmax,
    ),
    **dict.fromkeys(
        (
            "AXK1TopkRouter",
            "AXK2TopkRouter",
            "BailingHybridTopkRouter",
            "DeepseekV32TopkRouter",
            "DeepseekV3TopkRouter",
            "Dots1TopkRouter",
            "Dots3NoteTextTopkRouter",
            "ExaoneMoeTopkRouter",
            "Glm4MoeLiteTopkRouter",
            "Glm4MoeTopkRouter",
            "Glm4vMoeTextTopkRouter",
            "Glm5NextTextTopkRouter",
            "GlmMoeDsaTopkRouter",
            "HYV4TopkRouter",
            "KimiLinearTopkRouter",
            "MiMoV2FlashTopkRouter",
            "NemotronHTopkRouter",
            "SolarOpenTopkRouter",
        ),
        _deepseek_v3,
    ),
    **dict.fromkeys(
        (
            "AriaTextTopKRouter",
            "GptOssTopKRouter",
            "GraniteMoeHybridTopKRouter",
            "GraniteMoeSWATopKRouter",
            "GraniteMoeSharedTopKRouter",
            "GraniteMoeTopKRouter",
        ),
        _after,
    ),
    **dict.fromkeys(("DeepseekOcr2TextTopkRouter", "DeepseekV2TopkRouter", "UnlimitedOcrTextTopkRouter"), _deepseek_v2),
    **dict.fromkeys(("LagunaTopKRouter", "MiniMaxM3VLTopKRouter", "Step3p7TopKRouter"), _sigmoid_scaled),
    **dict.fromkeys(("DeepseekV4TopKRouter", "Inkling2TopKRouter"), _deepseek_v4),
    **dict.fromkeys(("DiffusionGemmaTextRouter", "Gemma4TextRouter"), _gemma),
    "AfmoeTokenChoiceRouter": replace(
        _sigmoid_bias,
        inner=_attribute("route_scale"),
        weight="gate.weight",
        args=lambda block: (block.expert_bias,),
        batched=True,
    ),
    "BeamTopKRouter": RouterKind(_BIAS, "norm_topk_prob", note=_groups, outer=_of_block("routed_scaling_factor")),
    "Cohere2MoeTopKRouter": RouterKind(_cohere_score, _cohere_renormalised, outer=_cohere_outer),
    "DbrxRouter": RouterKind(
        "softmax, top-k",
        _dbrx_sums,
        note=_dbrx_note,
        read=_dbrx,
        weight="layer.weight",
        top_k=lambda _router, block: int(block.top_k),
    ),
    "DeepseekV4HashRouter": replace(
        _deepseek_v4,
        score=lambda router, _block: f"{_activation(router)}, experts fixed by token id",
        follows_input=False,
    ),
    "DogeCDMoE": RouterKind(
        "product keys, top-k, softmax",
        read=_doge,
        weight="",
        num_experts=lambda router, _block: int(router.num_experts),
        follows_input=False,
        within=True,
        beside="gate_proj",
    ),
    "Ernie4_5_MoeTopKRouter": _ernie,
    "Ernie4_5_VLMoeMoeBlock": replace(
        _ernie,
        read=_ernie_vl,
        weight="text_moe.gate.weight",
        top_k=lambda router, _block: int(router.text_moe.gate.top_k),
        follows_input=False,
        within=True,
    ),
    "FlintTopKRouter": RouterKind("sigmoid, top-k", "norm_topk_prob"),
    "HYV3TopKRouter": RouterKind(
        _BIAS,
        inner=_attribute("router_scaling_factor"),
        args=lambda block: (block.e_score_correction_bias,),
    ),
    "HunYuanMoEV1Gate": replace(_softmax, weight="wg.weight"),
    "InklingTopkRouter": RouterKind(
        _BIAS,
        note=lambda _router, _block: "shared experts take part of the sum",
        sums_to_one=False,
        inner=lambda router, _block: router.route_scale * router.global_scale.detach().float(),
        num_experts=lambda router, _block: int(router.num_experts),
    ),
    "JambaTopKRouter": replace(_softmax, renormalised=False),
    "JetMoeTopKGating": _jet,
    "Kolibri1TopKRouter": RouterKind("top-k by logit + bias, sigmoid", "norm_topk_prob"),
    "Lfm2MoeTopKRouter": RouterKind(
        _lfm2_score,
        "norm_topk_prob",
        inner=_attribute("routed_scaling_factor"),
        args=lambda block: (block.expert_bias if block.use_expert_bias else None,),
    ),
    "Llama4Router": RouterKind(
        "top-k, sigmoid",
        renormalised=False,
        note=lambda _router, _block: "weights multiply the experts' input",
        read=_llama4,
    ),
    "LongcatFlashTopkRouter": RouterKind(
        "softmax, top-k by score + bias",
        renormalised=False,
        note=lambda _router, _block: "the last experts return their input",
        inner=_attribute("routed_scaling_factor"),
        weight="classifier.weight",
    ),
    "MiniMaxM2TopKRouter": replace(_sigmoid_bias, args=lambda block: (block.e_score_correction_bias,)),
    "Mistral4TopkRouter": _mistral,
    "MistralLarge4TextTopkRouter": replace(_mistral, renormalised=True),
    "MuseSparkTopkRouter": replace(_sigmoid_bias, inner=_attribute("routed_scaling_factor")),
    "OpenAIPrivacyFilterTopKRouter": replace(
        _after, inner=lambda router, _block: 1.0 / router.top_k, outer=_of_block("num_experts")
    ),
    "PhimoeTopKRouter": RouterKind(
        "softmax over the logits near the chosen one (sparse mixer), top-k", renormalised=False
    ),
    "SwitchTransformersTop1Router": RouterKind(
        "softmax, top-k",
        renormalised=False,
        note=lambda _router, _block: "zero past an expert's capacity",
        read=_switch,
        weight="classifier.weight",
        top_k=lambda _router, _block: 1,
        batched=True,
        follows_input=False,
    ),
    "ZayaRouter": RouterKind(
        "softmax, top-k by score + bias",
        renormalised=False,
        note=lambda _router, _block: "zero for the skipping expert",
        weight="",
        num_experts=lambda router, _block: int(router.num_experts),
        batched=True,
        follows_input=False,
    ),
}
"""Router classes by name. Names are looked up for classes of transformers only, and only with the forward they had."""

UNREADABLE: dict[str, str] = {
    "Dots3NoteVisionTopKRouter": "it routes image patches, which are not the tokens of the sequence",
    "NllbMoeTop2Router": (
        "the block hands the router's one-hot mask to its experts as indices, so that experts 0 and 1 run for every "
        "token and the router's choice is not what runs"
    ),
}
"""Router classes whose gate is not recorded, with the reason."""
