"""A seeded toy backbone of the built-in one's shape: for tests and dry runs, made in milliseconds, no files."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from driftlens.backbones.conversion import join
from driftlens.backbones.encoding import Encoder, image_to_pixels
from driftlens.backbones.vision import EfficientNetLiteConfig, EfficientNetLiteModel

__all__ = ["tiny_backbone_parts", "tiny_tokenizer"]

_SPECIAL = ("<pad>", "<end>", "<image>")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without merges: 256 byte tokens and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *alphabet))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<image>"],
        clean_up_tokenization_spaces=False,
    )


def tiny_backbone_parts(seed: int = 0) -> tuple[LlavaForConditionalGeneration, Encoder]:
    """Return a random model (4 decoder layers, hidden size 32, 1e5 parameters) and its encoder.

    The global random state is left as it was.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = EfficientNetLiteModel(
            EfficientNetLiteConfig(
                image_size=32,
                stem_channels=8,
                stages=[[1, 3, 1, 1, 8], [1, 3, 2, 2, 8], [1, 3, 2, 2, 8]],
                head_channels=16,
                middle_block=1,
                hidden_size=16 + 4 * 8,
            )
        )
        lm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                # Larger than the default, so that a random model's logits and gates differ visibly between inputs.
                initializer_range=0.2,
            )
        )
        image_token = int(tokenizer.encode("<image>")[0])
        model = join(lm, tower, image_token)
        for parameter in model.model.multi_modal_projector.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    encoder = Encoder(
        tokenizer,
        image_token_id=image_token,
        image_seq_length=model.config.image_seq_length,
        image_transform=lambda image: image_to_pixels(image, 32),
        max_prompt_tokens=80,
    )
    return model, encoder
