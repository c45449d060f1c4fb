"""Small layers and models for these tests, built in code."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from driftlens.adapters import MoELoraConfig, MoELoraLinear, iter_sites


def make_layer(d_in=7, d_out=5, bias=True, seed=0, **settings) -> MoELoraLinear:
    """A layer whose parameters are large enough for every expert and gate to matter."""
    torch.manual_seed(seed)
    base = nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)
    layer = MoELoraLinear(base, "default", MoELoraConfig(**settings))
    for name, parameter in layer.named_parameters():
        if "moe_lora_" in name:
            nn.init.normal_(parameter, std=0.7)
    return layer


def text_config(**changes):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaConfig(**{**sizes, **heads, **changes})


def make_llama(seed=0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(text_config(**changes)).eval()


def make_llava(seed=0) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    vision = SiglipVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(),
        image_token_index=39,
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaForConditionalGeneration(config).eval()


def randomise(model, adapter="default", seed=1):
    """Give B (zero at the start) and A values that change the output."""
    torch.manual_seed(seed)
    for _, layer in iter_sites(model, adapter):
        for part in (layer.moe_lora_A, layer.moe_lora_gate, layer.moe_lora_B):
            for parameter in part[adapter].parameters():
                nn.init.normal_(parameter, std=0.5)
    return model


def tokens(batch=2, length=6, vocab=39, seed=2):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
