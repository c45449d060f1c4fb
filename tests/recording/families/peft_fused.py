"""PEFT LoRA on fused experts: tiny native MoE models, and loops over their tokens and experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.recording.families.peft_lora import shake_lora
from tests.recording.families.suite import FamilyCase

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
FUSED = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=5))


def qwen2() -> nn.Module:
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES, num_experts=5, moe_intermediate_size=20, shared_expert_intermediate_size=12)
    )


def qwen3(*, norm: bool = False) -> nn.Module:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=5, moe_intermediate_size=20, norm_topk_prob=norm))


def olmoe() -> nn.Module:
    return OlmoeForCausalLM(OlmoeConfig(**(SIZES | {"head_dim": 6}), num_experts=5))


def gpt_oss() -> nn.Module:
    """Its weights are transposed, its experts have biases and interleave gate and up."""
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=5, sliding_window=32))


def fused(
    base: Callable[[], nn.Module], targets: list[str] | None = None, implementation: str | None = None
) -> nn.Module:
    """One adapter of rank 3 on the fused experts; weights large enough that routing and gating matter."""
    torch.manual_seed(0)
    model = base()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "experts" in name or name.endswith(("mlp.gate.weight", "mlp.router.weight", "mlp.router.bias")):
                value.copy_(0.3 * torch.randn(value.shape, generator=g))
    if implementation is not None:
        model.set_experts_implementation(implementation)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=[], target_parameters=targets or FUSED)
    adapted = get_peft_model(model, config)
    shake_lora(adapted)
    return adapted.eval()


def wrappers(model: nn.Module) -> dict[str, tuple[ParamWrapper, nn.Module]]:
    """Site name -> the wrapper of that parameter and the outermost wrapper of the same experts."""
    found: dict[str, tuple[ParamWrapper, nn.Module]] = {}
    outer: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            top = outer.setdefault(id(module.get_base_layer()), module)
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{path}.{module.parameter_name}"] = module, top
    return found


def by_expert(wrapper: ParamWrapper) -> tuple[Tensor, Tensor]:
    """A [E, r, in] and B [E, out, r] from the factors with which PEFT itself adapts the parameter."""
    left, right, _ = wrapper.get_delta_factors("default")
    if wrapper.get_base_layer().is_transposed:
        left, right = right.transpose(1, 2), left.transpose(1, 2)
    return right.detach(), left.detach()


@torch.no_grad()
def truth(model: nn.Module, input_ids: Tensor) -> dict[str, dict[str, Tensor]]:
    """One token and one expert at a time; outputs of ``down_proj`` from the experts with and without its adapter."""
    calls: dict[int, tuple[Tensor, ...]] = {}
    sites = wrappers(model)
    handles = [
        wrapper.get_base_layer().register_forward_hook(
            lambda module, args, kwargs, _out: calls.__setitem__(id(module), (*args, *kwargs.values())),
            with_kwargs=True,
        )
        for wrapper, _ in sites.values()
    ]
    model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    for handle in handles:
        handle.remove()
    found = {}
    for name, (wrapper, top) in sites.items():
        h, index, weight = calls[id(wrapper.get_base_layer())]
        a, _ = by_expert(wrapper)
        gate, pathway = torch.zeros(len(h), len(a)), torch.zeros(len(h), *a.shape[:2])
        for token in range(len(h)):
            for expert, share in zip(index[token].tolist(), weight[token], strict=True):
                x = h[token]
                if wrapper.parameter_name == "down_proj":
                    x = middle(sites, wrapper.get_base_layer(), expert, x)
                gate[token, expert], pathway[token, expert] = share, a[expert] @ x
        if wrapper.parameter_name == "down_proj":
            on = top(h, index, weight)
            wrapper.enable_adapters(enabled=False)
            off = top(h, index, weight)
            wrapper.enable_adapters(enabled=True)
            output, rest = on - off, off
        else:
            delta = wrapper.get_delta_weight("default")
            delta = delta.transpose(1, 2) if wrapper.get_base_layer().is_transposed else delta
            output = torch.einsum("te,eoi,ti->to", gate, delta, h)
            plain = (
                wrapper.get_param().transpose(1, 2) if wrapper.get_base_layer().is_transposed else wrapper.get_param()
            )
            rest = torch.einsum("te,eoi,ti->to", gate, plain, h)
            if wrapper.get_base_layer().has_bias:
                rest = rest + gate @ wrapper.get_base_layer().gate_up_proj_bias
        found[name] = {"gate": gate, "pathway": pathway, "output": output, "rest": rest}
    return found


def middle(sites: dict[str, tuple[ParamWrapper, nn.Module]], experts: nn.Module, expert: int, x: Tensor) -> Tensor:
    """What enters an expert's down-projection, from the equation of its model."""
    fused_weight = experts.gate_up_proj[expert]
    for wrapper, _ in sites.values():
        if wrapper.get_base_layer() is experts and wrapper.parameter_name == "gate_up_proj":
            fused_weight = fused_weight + wrapper.get_delta_weight("default")[expert]
    if experts.is_transposed:
        both = x @ fused_weight + experts.gate_up_proj_bias[expert]
        glu, up = both[::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
        return (up + 1) * glu * torch.sigmoid(glu * experts.alpha)
    glu, up = (fused_weight @ x).chunk(2)
    return nn.functional.silu(glu) * up


def _case(name: str, build: Callable[[], nn.Module]) -> FamilyCase:
    return FamilyCase(name=name, family="peft-fused", build=build, truth=truth)


CASES = [
    _case("PEFT LoRA on fused experts, Mixtral", lambda: fused(mixtral)),
    _case("PEFT LoRA on fused experts, Mixtral, eager", lambda: fused(mixtral, implementation="eager")),
    _case("PEFT LoRA on fused experts, down_proj alone", lambda: fused(mixtral, ["experts.down_proj"])),
    _case("PEFT LoRA on fused experts, Qwen2-MoE", lambda: fused(qwen2)),
    _case("PEFT LoRA on fused experts, Qwen3-MoE", lambda: fused(qwen3)),
    _case("PEFT LoRA on fused experts, Qwen3-MoE, renormalised", lambda: fused(lambda: qwen3(norm=True))),
    _case("PEFT LoRA on fused experts, OLMoE", lambda: fused(olmoe)),
    _case("PEFT LoRA on fused experts, gpt-oss", lambda: fused(gpt_oss)),
]
