"""Loading base models: the toy, a local folder, what cannot be loaded, and the built-in one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from torch import nn
from transformers import CLIPVisionConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from driftlens.backbones import collate, decoder_layers, load_backbone
from driftlens.backbones.loading import load_projector
from driftlens.backbones.tiny import tiny_backbone_parts, tiny_tokenizer
from driftlens.errors import ConfigError, FormatError, NotFoundError, SiteError
from driftlens.streams import load_stream


def test_tiny_is_seeded_and_leaves_the_global_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = load_backbone("tiny-random")
    assert torch.equal(torch.rand(3), expected)
    second = load_backbone("tiny-random")
    assert first.sha256 == second.sha256
    with torch.no_grad():
        next(second.model.parameters()).add_(1)
    changed = tiny_backbone_parts(seed=1)[0]
    assert not torch.equal(changed.lm_head.weight, first.model.lm_head.weight)
    assert not first.model.training


def test_dtype_and_names():
    half = load_backbone("tiny-random", dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    batch = collate([half.encoder.encode(load_stream("toy").tasks[0].train[0])], pad_token_id=0)
    batch.pop("roles")
    assert torch.isfinite(half.model(**batch).loss)
    with pytest.raises(ConfigError, match="Unknown dtype 'float8'; use one of float32, bfloat16, float16"):
        load_backbone("tiny-random", dtype="float8")


def test_decoder_layers_of_every_wrapping():
    model = load_backbone("tiny-random").model
    layers = decoder_layers(model)
    assert len(layers) == 4
    assert layers[0] is model.model.language_model.layers[0]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"]))
    assert decoder_layers(wrapped) is layers
    text = LlamaForCausalLM(model.config.text_config)
    assert decoder_layers(text) is text.model.layers
    with pytest.raises(SiteError, match="Linear has no list of decoder layers"):
        decoder_layers(nn.Linear(2, 2))


PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def clip_llava(text_config):
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text_config, image_token_index=2, image_seq_length=16, vision_feature_layer=-2
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["text", "ours", "clip"])
def test_a_local_folder_loads_and_gives_the_same_logits(tmp_path, kind):
    tiny = load_backbone("tiny-random")
    if kind == "text":
        model = LlamaForCausalLM(tiny.model.config.text_config).eval()
    elif kind == "ours":
        model = tiny.model
    else:
        model = clip_llava(tiny.model.config.text_config)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    tiny_tokenizer().save_pretrained(folder)
    loaded = load_backbone(str(folder))
    sample = load_stream("toy").task("parity" if kind == "text" else "shape").train[0]
    encoded = loaded.encoder.encode(sample)
    assert (encoded.roles == 0).sum() == {"text": 0, "ours": 4, "clip": 16}[kind]
    batch = collate([encoded], pad_token_id=loaded.encoder.pad_token_id)
    batch.pop("roles")
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch).logits, model(**batch).logits)
    again = tmp_path / "copy"
    shutil.copytree(folder, again)
    assert load_backbone(str(again)).sha256 == loaded.sha256
    if kind == "text":
        with pytest.raises(ConfigError, match="reads text only"):
            loaded.encoder.encode(load_stream("toy").task("colour").train[0])


def test_what_cannot_be_loaded_says_what_can(tmp_path):
    with pytest.raises(NotFoundError, match=r"base model '.*/nothing' cannot be loaded.*'builtin', 'tiny-random'"):
        load_backbone(str(tmp_path / "nothing"))
    model = LlamaForCausalLM(load_backbone("tiny-random").model.config.text_config)
    model.config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(NotFoundError, match=r"The weights of .* cannot be loaded"):
        load_backbone(str(tmp_path))


def test_a_projector_of_another_shape_is_refused():
    model = tiny_backbone_parts()[0]
    wrong = save({"linear_1.weight": torch.zeros(2, 2)})
    with pytest.raises(FormatError, match="The projector has the tensors"):
        load_projector(model, wrong)
    projector = model.model.multi_modal_projector
    state = {name: torch.full_like(value, 0.5) for name, value in projector.state_dict().items()}
    state |= {"token_mean": torch.ones(48), "token_std": torch.full((48,), 2.0)}
    assert len(load_projector(model, save(state))) == 64
    assert float(projector.linear_1.weight.detach().mean()) == 0.5
    assert float(model.model.vision_tower.token_std.mean()) == 2.0


def test_a_foreign_base_keeps_long_prompts(tmp_path):
    tiny = load_backbone("tiny-random")
    config = tiny.model.config.text_config
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny.encoder.tokenizer.save_pretrained(tmp_path / "model")
    encoder = load_backbone(str(tmp_path / "model")).encoder
    assert encoder.max_prompt_tokens == max(config.max_position_embeddings - 64, config.max_position_embeddings // 2)
    assert encoder.max_prompt_tokens > 44


def test_a_base_without_a_tokenizer_serves_token_ids(tmp_path):
    tiny = load_backbone("tiny-random")
    LlamaForCausalLM(tiny.model.config.text_config).save_pretrained(tmp_path / "text")
    clip_llava(tiny.model.config.text_config).save_pretrained(tmp_path / "llava")
    for kind in ("text", "llava"):
        loaded = load_backbone(str(tmp_path / kind))
        assert loaded.encoder is None
        with pytest.raises(ConfigError, match=r"has no tokenizer. Save one beside its weights .* `input_ids`"):
            loaded.need_encoder()
    tiny.encoder.tokenizer.save_pretrained(tmp_path / "text")
    assert load_backbone(str(tmp_path / "text")).encoder is not None
