"""Writes foreign checkpoints, and computes what each one's evaluation adds: loops over experts, from the equations.

Nothing of the recorder is used: keys, shapes, files and fields are those of `SAME, CoIN, MCITlib, Prism: what the code
does`, sections 3 and 6.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

LAYERS, HIDDEN, MIDDLE, KEYS = 2, 32, 48, 16
SIZES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KEYS),
    "self_attn.v_proj": (HIDDEN, KEYS),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, MIDDLE),
    "mlp.up_proj": (HIDDEN, MIDDLE),
    "mlp.down_proj": (MIDDLE, HIDDEN),
}
VISION = 16
CLIP = 24  # width of the CLIP features; 768 in the releases


def text_config(vocabulary: int = 64) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=MIDDLE, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(text_config()).eval()


def llava() -> nn.Module:
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=VISION, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28,
        patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(vision_config=tower, text_config=text_config(80), image_token_index=79)
    return LlavaForConditionalGeneration(config).eval()


BASES: dict[str, Callable[[], nn.Module]] = {"LLaMA": llama, "LLaVA": llava}


def name_in(base: str, stored: str) -> str:
    """Where a layer of an old checkpoint lies in the base model."""
    return stored if base == "LLaMA" else stored.replace("model.layers", "model.language_model.layers")


@dataclass(frozen=True)
class Layout:
    """How one codebase writes and evaluates.

    ``files`` lists what ``write`` makes beside the two usual files; ``semantics`` is what must be inferred.
    """

    name: str
    peft_type: str
    semantics: str
    task_type: str = "CAUSAL_LM"
    safetensors: bool = False
    experts: int = 3
    trained: tuple[int, ...] = (0, 1, 2)
    cur_task: int | None = None
    router: bool = True
    mixer: bool = False
    ffn_only: bool = False
    alias: bool = False
    alias_only: bool = False
    extra: dict[str, object] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        return [m for m in SIZES if not self.ffn_only or m.startswith("mlp.")]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("CoIN MoELoRA", "MOE_LORA_CoIN", "sum_gBA", "CAUSAL_LM_CoIN", alias=True),
        Layout("MCITlib MoELoRA", "MOE_LORA_CoIN", "sum_gBA", "CAUSAL_LM_CoIN"),
        Layout("MCITlib HiDe", "MOE_LORA_HiDe", "hide", "CAUSAL_LM_HiDe", trained=(0, 1), cur_task=1),
        Layout("MCITlib O-LoRA", "MOE_LORA_CoIN", "olora", "CAUSAL_LM_CoIN", experts=5, trained=(4,), cur_task=4),
        Layout("MCITlib DISCO", "MOE_LORA_CoIN", "disco", "CAUSAL_LM_CoIN", trained=(0, 1), cur_task=1, router=False,
               mixer=True),
        Layout("Prism SAME", "MOE_LORA_SAME", "same", safetensors=True, cur_task=2, ffn_only=True, alias=True,
               extra={"tau_score": 0.1, "curvature_mu": 0.9, "window_size": 3, "max_components": 64,
                      "cumulative_energy_ratio": 0.9}),
        Layout("Prism moelora", "MOE_LORA_MOELORA", "product_of_sums", safetensors=True, cur_task=2),
        Layout("Prism O-LoRA", "MOE_LORA_OLORA", "olora", safetensors=True, trained=(0, 1), cur_task=1, router=False,
               alias_only=True),
        Layout("MCITlib CL-MoE", "MOE_LORA_CLMoE", "sum_gBA", "CAUSAL_LM_CLMoE"),
        Layout("Prism HiDe", "MOE_LORA_HiDe", "prism_hide", safetensors=True, cur_task=2,
               extra={"exclude_module_path_segments": ["vision_tower"]}),
    )
}  # fmt: skip


def tensors(layout: Layout, seed: int = 0, rank: int = 2) -> dict[str, Tensor]:
    """The adapter file, ``{site}.lora_A.loraA.{i}.weight`` and so on, without PEFT's prefix."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=g) * std

    found: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        for module in layout.modules:
            d_in, d_out = SIZES[module]
            site = f"model.layers.{layer}.{module}"
            for i in range(layout.experts):
                b = draw(d_out, rank, std=0.3) if i in layout.trained else torch.zeros(d_out, rank)
                found[f"{site}.lora_A.loraA.{i}.weight"] = draw(rank, d_in, std=0.3)
                found[f"{site}.lora_B.loraB.{i}.weight"] = b
            if layout.router:
                found[f"{site}.lora_router.weight"] = draw(layout.experts, d_in, std=0.7)
            if layout.mixer:
                found[f"{site}.lora_AB.weight"] = torch.eye(layout.experts * rank)
    return found


def write(
    folder: Path, layout: Layout, base: str = "LLaMA", *, seed: int = 0, rank: int = 2, **config: object
) -> dict[str, Tensor]:
    """Write a checkpoint; return the tensors of the adapter by plain name."""
    folder.mkdir(parents=True)
    plain = tensors(layout, seed, rank)
    stored = {f"base_model.model.{key}": value for key, value in plain.items()}
    if layout.alias_only:
        stored = {key.replace(".weight", ".mlp.weight"): value for key, value in stored.items()}
    if layout.alias:  # a plain state_dict() shows the wrapper's inner layer too
        part = ".lora_router." if layout.ffn_only else ".lora"
        for key in [k for k in stored if part in k and "lora_AB" not in k and (layout.ffn_only or "router" not in k)]:
            stored[key.replace(".weight", ".mlp.weight")] = stored[key].clone()
    fields: dict[str, object] = {
        "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "expert_num": layout.experts,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None,
        "layers_to_transform": None, "lora_alpha": 2 * rank * layout.experts, "lora_dropout": 0.05,
        "modules_to_save": None, "peft_type": layout.peft_type, "r": rank * layout.experts, "revision": None,
        "target_modules": [m.split(".")[1] for m in layout.modules], "task_embedding_dim": 64,
        "task_type": layout.task_type,
    }  # fmt: skip
    if layout.cur_task is not None:
        fields["cur_task"] = layout.cur_task
    (folder / "adapter_config.json").write_text(json.dumps(fields | layout.extra | config))
    if layout.semantics == "same":
        state = same_state()
        torch.save(state, folder / "same_state.bin")
        stored |= same_copies(state)
    if layout.safetensors:
        save_file({key: value.contiguous() for key, value in stored.items()}, folder / "adapter_model.safetensors")
    else:
        torch.save(stored, folder / "adapter_model.bin")
    beside = outside(layout, base)
    if beside:
        torch.save(beside, folder / "non_lora_trainables.bin")
    return plain


def outside(layout: Layout, base: str) -> dict[str, Tensor]:
    """non_lora_trainables.bin: the projector, and the prototypes of HiDe and DISCO."""
    g = torch.Generator().manual_seed(9)
    found: dict[str, Tensor] = {}
    if base == "LLaVA" and not layout.safetensors:
        for number, d_in in ((0, VISION), (2, HIDDEN)):
            found[f"base_model.model.model.mm_projector.{number}.weight"] = torch.randn(HIDDEN, d_in, generator=g)
            found[f"base_model.model.model.mm_projector.{number}.bias"] = torch.randn(HIDDEN, generator=g)
    if layout.semantics == "hide":
        for part in ("image", "text"):
            for i in range(10):
                found[f"base_model.model.{part}_anchors.{i}"] = torch.randn(1, CLIP, generator=g)
                found[f"base_model.model.{part}_boundary.{i}"] = torch.ones(1, dtype=torch.bfloat16)
    if layout.semantics == "disco":
        for part in ("image", "text"):
            for i in range(8):
                found[f"base_model.model.global_{part}_feature.{i}"] = torch.randn(CLIP, generator=g)
                found[f"base_model.model.{part}_boundary.{i}"] = torch.ones(1)
    return found


def same_state() -> dict[str, object]:
    g = torch.Generator().manual_seed(8)
    state: dict[str, object] = {}
    for part in ("image", "text"):
        state[f"{part}_anchors"] = [torch.randn(1, CLIP, generator=g) for _ in range(3)]
        state[f"{part}_boundary"] = [torch.ones(1) for _ in range(3)]
    state["_prior_expert_vec"] = torch.ones(3) / 3
    for layer in range(LAYERS):
        prefix = f"base_model.model.model.layers.{layer}.mlp.up_proj."
        state[prefix + "cov_U_prev_default"] = torch.randn(HIDDEN, 4, generator=g)
        state[prefix + "cov_S_prev_default"] = torch.rand(4, generator=g)
        state[prefix + "importance_default"] = torch.rand(3, generator=g)
        state[prefix + "cov_prev_valid_default"] = torch.tensor(1.0)
    return state


def same_copies(state: dict[str, object]) -> dict[str, Tensor]:
    copies: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, list):
            copies |= {f"prism.same.{key}.{i}": part.clone() for i, part in enumerate(value)}
        elif isinstance(value, Tensor) and "." in key:
            copies["prism.same.buf." + key.replace(".", "__DOT__")] = value.clone()
    return copies


# ---------------------------------------------------------------- what the evaluation forward of each codebase adds


def gates(layout: Layout, plain: dict[str, Tensor], site: str, h: Tensor, w: Tensor) -> Tensor:
    """The weight of every expert for the tokens ``h`` [T, d_in] of one sample; ``w`` [E] stands for CLIP's verdict."""
    experts, tokens, last = layout.experts, len(h), f"layers.{LAYERS - 1}." in site
    if layout.semantics in ("sum_gBA", "product_of_sums", "same"):
        logits = h @ plain[f"{site}.lora_router.weight"].to(h).T
        if layout.semantics != "same":
            return torch.softmax(logits, -1)
        p = torch.softmax(logits / experts, -1).mean(0) * w.to(h)
        p = p / p.sum()
        top = sorted(range(experts), key=lambda e: -float(p[e]))[:2]
        kept = torch.stack([p[e] if e in top else torch.zeros_like(p[e]) for e in range(experts)])
        return (kept / kept.sum()).repeat(tokens, 1)
    if layout.semantics == "disco" or (layout.semantics in ("hide", "prism_hide") and last):
        return w.to(h).repeat(tokens, 1)
    upto = experts if layout.semantics == "prism_hide" else (layout.cur_task or 0) + 1
    return torch.tensor([1.0 if e < upto else 0.0 for e in range(experts)]).to(h).repeat(tokens, 1)


def added(layout: Layout, plain: dict[str, Tensor], site: str, h: Tensor, w: Tensor) -> Tensor:
    """What the experts add to the tokens ``h`` [T, d_in] of one sample, token by token and expert by expert."""
    g, last = gates(layout, plain, site, h, w), f"layers.{LAYERS - 1}." in site
    a = [plain[f"{site}.lora_A.loraA.{e}.weight"].to(h) for e in range(layout.experts)]
    b = [plain[f"{site}.lora_B.loraB.{e}.weight"].to(h) for e in range(layout.experts)]
    product = layout.semantics in ("product_of_sums", "same") or (layout.semantics == "hide" and not last)
    rows = []
    for t in range(len(h)):
        if product:
            down = sum(g[t, e] * a[e] for e in range(layout.experts))
            up = sum(g[t, e] * b[e] for e in range(layout.experts))
            rows.append(up @ (down @ h[t]))  # type: ignore[operator]
        else:
            rows.append(sum(g[t, e] * (b[e] @ (a[e] @ h[t])) for e in range(layout.experts)))
    return 2.0 * torch.stack(rows)  # alpha is twice the rank of all experts
