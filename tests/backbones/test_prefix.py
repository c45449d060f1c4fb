"""The frozen prefix: the same bits as the whole model's forward, computed once."""

from __future__ import annotations

import pytest
import torch

from driftlens.backbones import collate, decoder_layers, load_backbone
from driftlens.backbones.prefix import FrozenPrefix
from driftlens.streams import load_stream


@pytest.fixture(scope="module")
def setting():
    backbone = load_backbone("tiny-random")
    samples = [backbone.encoder.encode(sample) for task in load_stream("toy") for sample in task.probe]
    return backbone, samples


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_suffix_of_cached_states_is_bit_equal_to_the_whole_forward(setting, depth, padding_side):
    backbone, samples = setting
    batch = collate(samples, padding_side=padding_side, pad_token_id=backbone.encoder.pad_token_id)
    prefix = FrozenPrefix(backbone.model, depth, backbone.encoder.pad_token_id)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids", "pixel_values")}
    with torch.no_grad():
        whole = backbone.model(**inputs).logits
        hidden = prefix.run(batch)
        with prefix.skipping():
            suffix = backbone.model(
                inputs_embeds=hidden, attention_mask=batch["attention_mask"], position_ids=batch["position_ids"]
            ).logits
    real = batch["attention_mask"].bool()
    assert torch.equal(whole[real], suffix[real])


def test_states_of_a_sample_do_not_depend_on_its_batch_beyond_rounding(setting):
    backbone, samples = setting
    prefix = FrozenPrefix(backbone.model, 2, backbone.encoder.pad_token_id)
    together, alone = prefix.compute(samples, 16, "cpu"), prefix.compute(samples, 1, "cpu")
    assert together.offsets == alone.offsets
    assert len(together) == len(samples)
    assert [len(together[i]) for i in range(len(samples))] == [len(sample.input_ids) for sample in samples]
    torch.testing.assert_close(together.hidden, alone.hidden, rtol=1e-4, atol=1e-5)
    assert torch.equal(together.hidden, prefix.compute(samples, 16, "cpu").hidden)


def test_layers_are_restored_after_an_exception(setting):
    backbone, _ = setting
    prefix = FrozenPrefix(backbone.model, 2, backbone.encoder.pad_token_id)
    with pytest.raises(KeyboardInterrupt), prefix.skipping():
        raise KeyboardInterrupt
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(backbone.model))
    assert not decoder_layers(backbone.model)[2]._forward_pre_hooks


def test_a_prefix_beyond_the_model_is_refused(setting):
    backbone, _ = setting
    with pytest.raises(ValueError, match="has 4 decoder layers; a prefix of 9"):
        FrozenPrefix(backbone.model, 9, 0)


def test_cache_key_depends_on_content_and_depth(setting):
    backbone, samples = setting
    pad = backbone.encoder.pad_token_id
    key = FrozenPrefix(backbone.model, 2, pad).key("base", samples, 8)
    assert key == FrozenPrefix(backbone.model, 2, pad).key("base", samples, 8)
    others = {
        FrozenPrefix(backbone.model, 1, pad).key("base", samples, 8),
        FrozenPrefix(backbone.model, 2, pad).key("other base", samples, 8),
        FrozenPrefix(backbone.model, 2, pad).key("base", samples[1:], 8),
        FrozenPrefix(backbone.model, 2, pad).key("base", samples, 4),
    }
    assert key not in others
    assert len(others) == 4
