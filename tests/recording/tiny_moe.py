"""A tiny random model of every MoE model type that transformers ships, and what its experts were really given."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

EXPERTS, TOP_K, VOCABULARY, SCALE = 8, 2, 64, 2.5

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts, under the names that the models use
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": SCALE,
    "router_scaling_factor": SCALE,
    "moe_routed_scaling_factor": SCALE,
    "moe_router_scaling_factor": SCALE,
    "route_scale": SCALE,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "mlp_only_layers": [],
    "mlp_layer_types": ["sparse", "sparse"],
    "num_nextn_predict_layers": 0,
    # attention of the latent kind, linear attention, state spaces
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
"""Small sizes, each used where a configuration has the field."""

_LATENT = {"num_key_value_heads": 4}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}


_ROUTING = ("router", "gate", "expert_bias", "score_correction", "balancing", "scale", "statics")
"""What makes the choice: none of it may stay at the zeros or ones of initialisation."""


@dataclass(frozen=True)
class TinyMoE:
    """How one model type is built small.

    Attributes:
        model_type: of the configuration, or of its text part.
        changes: fields that differ from ``SMALL``.
        model: name of the model class where no causal language model is registered for the configuration.
        behind: factor that the model applies to the experts' sum, after the weights that it hands to them.
    """

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    behind: float = 1.0


MODELS = [
    TinyMoE("afmoe"),
    TinyMoE("aria_text"),
    TinyMoE("axk1", _LATENT),
    TinyMoE("axk2", _LATENT),
    TinyMoE("bailing_hybrid", _LATENT | _HYBRID),
    TinyMoE("beam", behind=SCALE),
    TinyMoE("cohere2_moe", {"num_shared_experts": 1}, behind=0.5),
    TinyMoE(
        "dbrx",
        {
            "d_model": 32,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 16, "hidden_size": 32, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
        },
    ),
    TinyMoE("deepseek_ocr2_text", model="DeepseekOcr2TextModel"),
    TinyMoE("deepseek_v2", _LATENT),
    TinyMoE("deepseek_v3", _LATENT),
    TinyMoE("deepseek_v32", _LATENT),
    TinyMoE("deepseek_v4", {"mlp_layer_types": ["hash_moe", "moe"]}),
    TinyMoE("diffusion_gemma_text", {"per_layer_config": {}}, model="DiffusionGemmaEncoderTextModel"),
    TinyMoE("doge", {"is_moe": True, "num_experts": 9}),
    TinyMoE("dots1", {"n_shared_experts": 1}),
    TinyMoE("dots3_note_text", _LATENT),
    TinyMoE("ernie4_5_moe"),
    TinyMoE(
        "ernie4_5_vl_moe_text",
        {
            "moe_intermediate_size": [16, 8],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        model="Ernie4_5_VLMoeTextModel",
    ),
    TinyMoE("exaone_moe"),
    TinyMoE("flex_olmo"),
    TinyMoE("flint"),
    TinyMoE(
        "gemma4_text",
        {
            "per_layer_config": {},
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "enable_moe_block": True,
        },
    ),
    TinyMoE("glm4_moe"),
    TinyMoE("glm4_moe_lite", _LATENT),
    TinyMoE(
        "glm4v_moe_text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
        model="Glm4vMoeTextModel",
    ),
    TinyMoE(
        "glm5_next_text",
        _LATENT | {"qk_rope_head_dim": 0, "layer_types": ["linear_attention", "indexed_attention"]},
        model="Glm5NextTextModel",
    ),
    TinyMoE("glm_moe_dsa", _LATENT),
    TinyMoE("gpt_oss"),
    TinyMoE("granitemoe"),
    TinyMoE("granitemoe_swa"),
    TinyMoE(
        "granitemoehybrid",
        {
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 16,
        },
    ),
    TinyMoE("granitemoeshared", {"shared_intermediate_size": 16}),
    TinyMoE("hunyuan_v1_moe"),
    TinyMoE("hy_v3"),
    TinyMoE("hy_v4", _LATENT),
    TinyMoE("inkling_text"),
    TinyMoE("inkling2_text"),
    TinyMoE("jamba", {"attn_layer_period": 2, "attn_layer_offset": 0, "mamba_d_state": 8, "mamba_dt_rank": 4}),
    TinyMoE("jetmoe"),
    TinyMoE("kimi_linear", _LATENT | _HYBRID),
    TinyMoE("kolibri1"),
    TinyMoE("laguna", behind=SCALE),
    TinyMoE("lfm2_moe", {"layer_types": ["conv", "full_attention"]}),
    TinyMoE("llama4_text"),
    TinyMoE(
        "longcat_flash",
        _LATENT | {"zero_expert_num": 2, "num_layers": 1, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 32},
    ),
    TinyMoE("mellum"),
    TinyMoE("mimo_v2_flash"),
    TinyMoE("minimax"),
    TinyMoE("minimax_m2"),
    TinyMoE("minimax_m3_vl_text", behind=SCALE),
    TinyMoE("mistral4", _LATENT | {"head_dim": 16}, model="Mistral4ForCausalLM"),
    TinyMoE("mistral_large4_text", _LATENT, model="MistralLarge4TextModel"),
    TinyMoE("mixtral"),
    TinyMoE("muse_spark_text", {"moe_hidden_size": 16}, model="MuseSparkTextModel"),
    TinyMoE(
        "nemotron_h",
        {
            "layers_block_type": ["moe", "linear_attention", "full_attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    TinyMoE("olmoe"),
    TinyMoE("openai_privacy_filter", model="OpenAIPrivacyFilterModel", behind=TOP_K),
    TinyMoE("phimoe"),
    TinyMoE("qwen2_moe"),
    TinyMoE("qwen3_5_moe_text", _HYBRID),
    TinyMoE("qwen3_moe"),
    TinyMoE("qwen3_next", _HYBRID),
    TinyMoE("qwen3_omni_moe_talker_text", {"shared_expert_intermediate_size": 16}, model="Qwen3OmniMoeTalkerModel"),
    TinyMoE("qwen3_omni_moe_text", model="Qwen3OmniMoeThinkerTextModel"),
    TinyMoE("qwen3_vl_moe_text", model="Qwen3VLMoeTextModel"),
    TinyMoE(
        "qwen4_exp_text",
        _HYBRID
        | {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
        },
    ),
    TinyMoE("solar_open"),
    TinyMoE(
        "step3p5",
        {
            "pad_token_id": 0,
            "share_expert_dim": 16,
            "sliding_window": 64,
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        },
        model="Step3p7TextModel",
        behind=SCALE,
    ),
    TinyMoE(
        "switch_transformers",
        {
            "pad_token_id": 0,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 16,
            "num_heads": 4,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 2,
        },
        model="SwitchTransformersForConditionalGeneration",
    ),
    TinyMoE("unlimited_ocr_text", {"num_key_value_heads": 4}, model="UnlimitedOcrTextModel"),
    TinyMoE("zaya", {"num_experts_per_tok": 1, "router_hidden_size": 16}),
]


NLLB = TinyMoE(
    "nllb-moe",
    {
        "pad_token_id": 0,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
    },
    model="NllbMoeForConditionalGeneration",
)
"""The one type whose gate is not recorded."""


NOT_ROUTED = {
    "granite_docling": "its router decides whether an image takes a finer path; it has no experts",
    "vitpose_backbone": "its experts are chosen by the data set that the caller names; it has no router",
}
"""Folders of transformers with experts or a router, but no routing of tokens, with the reason."""


def build(tiny: TinyMoE, seed: int = 0) -> nn.Module:
    """Return the seeded tiny model in evaluation mode, with nothing in its routers left at zero or one."""
    config_class = CONFIG_MAPPING[tiny.model_type]
    names = set(config_class().to_dict()) | set(config_class.attribute_map)
    sizes = {name: value for name, value in SMALL.items() if name in names}
    # a mapped name and its target are one field
    for name, target in config_class.attribute_map.items():
        if target in sizes:
            sizes.pop(name, None)
    config = config_class(**(sizes | tiny.changes))
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    if tiny.model:
        package = config_class.__module__.rpartition(".")[0]
        module = importlib.import_module(f"{package}.modeling_{package.rpartition('.')[2]}")
        model = getattr(module, tiny.model)(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point() and any(word in name for word in _ROUTING):
                spread = 0.1 if "bias" in name or value.dim() != 2 else value.shape[-1] ** -0.5
                value.add_(torch.randn_like(value) * spread)
            elif name.endswith("tid2eid"):
                value.copy_(torch.rand(value.shape[0], EXPERTS).argsort(-1)[:, : value.shape[1]])
    result: nn.Module = model.eval()
    return result


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return two rows of six tokens."""
    if type(model).__name__ == "Qwen3OmniMoeTalkerModel":
        # it is fed with the thinker's states
        return {"inputs_embeds": torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))}
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
    twice = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **twice}


@torch.no_grad()
def calls(model: nn.Module, fed: dict[str, Tensor]) -> dict[str, tuple[list[Any], Any]]:
    """Run the model; return by module name the arguments and the output of its last call."""
    seen: dict[str, tuple[list[Any], Any]] = {}

    def look(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            values = [*args, *kwargs.values()]
            seen[name] = ([v.clone() if isinstance(v, Tensor) else v for v in values], output)

        return hook

    handles = [module.register_forward_hook(look(n), with_kwargs=True) for n, module in model.named_modules()]
    try:
        model(**fed)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def really_used(model: nn.Module, fed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return by host of the experts the dense weights [T, E] that they were handed in a forward.

    Nothing of the recorder is used: experts modules take (hidden [T, d], index [T, k], weights [T, k]); where a model
    has no such module, the choice is read from what its experts were fed, and the weights follow its equation.
    """
    seen, found = calls(model, fed), {}
    for name, module in model.named_modules():
        host, _, last = name.rpartition(".")
        kind = type(module).__name__
        if kind == "Llama4TextExperts":
            found[host] = _scaled_inputs(seen[host][0][0], seen[name][0][0])
        elif kind == "SwitchTransformersExperts":
            _, mask, weights = seen[name][0]
            found[host] = mask[:, 0] * weights
        elif kind == "DogeCDMoE":
            found[name] = _product_keys(seen[f"{name}.router_gate"][1], seen[f"{name}.down_embed"][0][0])
        elif kind == "JetMoeTopKGating":
            found[host] = _sorted_rows(seen[name], seen[f"{host}.input_linear"][0])
        elif last == "experts" and name in seen and len(seen[name][0]) >= 3:
            _, index, weights = seen[name][0][:3]
            found[host.removesuffix(".text_moe")] = _by_slot(index, weights)
    return found


def _by_slot(index: Tensor, weights: Tensor) -> Tensor:
    dense = torch.zeros(index.shape[0], EXPERTS + 2)
    for token, (experts, values) in enumerate(zip(index.tolist(), weights.tolist(), strict=True)):
        for expert, value in zip(experts, values, strict=True):
            dense[token, expert] += value
    return dense


def _scaled_inputs(hidden: Tensor, routed: Tensor) -> Tensor:
    """Llama 4: expert e sees all tokens, each times its weight."""
    hidden = hidden.reshape(-1, hidden.shape[-1])
    by_expert = routed.reshape(-1, *hidden.shape)
    return torch.einsum("etd,td->te", by_expert, hidden) / hidden.square().sum(-1, keepdim=True)


def _product_keys(logits: Tensor, index: Tensor) -> Tensor:
    """Doge: the score of an expert is the sum of the scores of its two half keys; softmax over the chosen."""
    keys = logits.shape[-1] // 2
    x, y = logits.reshape(2, -1, keys)
    scores = (x[:, :, None] + y[:, None, :]).flatten(1)
    dense = torch.full_like(scores, float("-inf")).scatter(1, index, scores.gather(1, index))
    return dense.softmax(-1)


def _sorted_rows(router: tuple[list[Any], Any], linear: list[Any]) -> Tensor:
    """JetMoE: experts are fed rows sorted by expert; softmax of the logits over the chosen."""
    hidden, logits, (rows, sizes) = router[0][0], router[1][4], linear
    dense = torch.full_like(logits, float("-inf"))
    start = 0
    for expert, size in enumerate(sizes):
        for row in rows[start : start + size]:
            # equal tokens have equal rows, and equal logits
            same = (hidden == row).all(-1)
            dense[same, expert] = logits[same, expert]
        start += size
    return dense.softmax(-1)
