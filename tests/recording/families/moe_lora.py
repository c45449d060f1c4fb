"""Our own MoE-LoRA, one case per gate."""

from __future__ import annotations

from functools import partial

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from driftlens.adapters import MoELoraConfig, iter_sites
from tests.recording.families.suite import FamilyCase, Truth
from tests.recording.support import shake


def llama(seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip


def build(gate: str) -> nn.Module:
    config = MoELoraConfig(num_experts=3, r=4, gate=gate, target_modules=["q_proj", "down_proj"], init_std=0.3)
    model = get_peft_model(llama(), config)
    shake(model, 1)
    return model.eval()


def truth(model: nn.Module, input_ids: Tensor) -> Truth:
    """The layer's equation as a loop over experts, on inputs that plain hooks saw."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda _m, args, out, name=name: seen.__setitem__(name, (args[0], out)))
        for name, layer in iter_sites(model)
    ]
    model(input_ids=input_ids)
    for handle in handles:
        handle.remove()
    found = {}
    for name, layer in iter_sites(model):
        h, out = (part[0] for part in seen[name])
        a = layer.moe_lora_A["default"].weight.unflatten(0, (3, 4))
        z = torch.stack([h @ a[e].T for e in range(3)], dim=1)
        gate = layer.moe_lora_gate["default"]
        if gate.kind == "energy":
            pi = torch.softmax(z.square().mean(-1), dim=-1)
        else:
            pi = torch.softmax(h @ gate.weight.T, dim=-1)
            if gate.kind == "topk":
                kept = torch.zeros_like(pi).scatter(1, pi.topk(gate.top_k).indices, 1.0)
                pi = pi * kept / (pi * kept).sum(-1, keepdim=True)
        found[name] = {"gate": pi, "pathway": z, "output": out - layer.base_layer(h)}
    return found


CASES = [
    FamilyCase(f"MoE-LoRA, {gate} gate", "moe-lora", partial(build, gate), truth)
    for gate in ("softmax", "topk", "energy")
]
