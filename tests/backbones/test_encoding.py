"""Samples to tokens, tokens to batches, on the toy backbone."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from driftlens.backbones import ROLES, Encoder, collate, load_backbone
from driftlens.backbones.encoding import image_to_pixels
from driftlens.backbones.tiny import tiny_tokenizer
from driftlens.errors import ConfigError
from driftlens.streams import Sample, load_stream


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("tiny-random")


@pytest.fixture(scope="module")
def samples():
    return [sample for task in load_stream("toy", train=2) for sample in task.train]


def test_tokens_follow_the_template(backbone, samples):
    encoder = backbone.encoder
    picture = next(s for s in samples if s.task == "colour")
    encoded = encoder.encode(picture)
    ids = encoded.input_ids.tolist()
    assert ids[:4] == [encoder.image_token_id] * 4
    assert encoder.tokenizer.decode(ids[4 : encoded.n_prompt]) == f"{picture.prompt}\nAnswer:"
    assert encoder.tokenizer.decode(ids[encoded.n_prompt : -1]) == f" {picture.answer}"
    assert ids[-1] == encoder.end_token_id
    roles = [ROLES[r] for r in encoded.roles]
    assert roles == ["image"] * 4 + ["prompt"] * (encoded.n_prompt - 4) + ["answer"] * (len(ids) - encoded.n_prompt)
    assert encoded.pixel_values.shape == (3, 32, 32)
    assert encoded.pixel_values.dtype == np.float32
    text = encoder.encode(next(s for s in samples if s.task == "parity"))
    assert text.pixel_values is None
    assert encoder.image_token_id not in text.input_ids


def test_without_answer_is_a_prefix_of_with_answer(backbone, samples):
    for sample in samples:
        whole, open_end = backbone.encoder.encode(sample), backbone.encoder.encode(sample, with_answer=False)
        assert len(open_end.input_ids) == whole.n_prompt == open_end.n_prompt
        np.testing.assert_array_equal(open_end.input_ids, whole.input_ids[: whole.n_prompt])


def test_long_questions_lose_their_end_and_never_the_template():
    encoder = Encoder(tiny_tokenizer(), max_prompt_tokens=20)
    encoded = encoder.encode(Sample("1", "t", "abcdefghijklmnopqrstuvwxyz", "yes"), with_answer=False)
    assert encoder.tokenizer.decode(encoded.input_ids.tolist()) == "abcdefghijkl\nAnswer:"
    assert len(encoded.input_ids) == 20


@given(st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_decode_inverts_encode(answer):
    encoder = Encoder(tiny_tokenizer())
    encoded = encoder.encode(Sample("1", "t", "?", answer))
    assert encoder.decode(encoded.input_ids[encoded.n_prompt :]) == answer.strip()


def test_decode_stops_at_the_end_token(backbone):
    encoder = backbone.encoder
    ids = encoder.encode(Sample("1", "t", "?", "yes")).input_ids.tolist()[-5:]
    assert encoder.decode([*ids, *ids]) == "yes"
    assert encoder.decode(torch.tensor([encoder.end_token_id])) == ""


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_against_a_loop(backbone, samples, side):
    encoded = [backbone.encoder.encode(s) for s in samples]
    batch = collate(encoded, padding_side=side, pad_token_id=77)
    longest = max(len(e.input_ids) for e in encoded)
    for row, one in enumerate(encoded):
        n = len(one.input_ids)
        gap = longest - n
        where = range(gap, longest) if side == "left" else range(n)
        for offset, column in enumerate(where):
            assert batch["input_ids"][row, column] == one.input_ids[offset]
            assert batch["position_ids"][row, column] == offset
            assert batch["roles"][row, column] == one.roles[offset]
            answer = offset >= one.n_prompt
            assert batch["labels"][row, column] == (one.input_ids[offset] if answer else -100)
        padding = [c for c in range(longest) if c not in where]
        assert batch["attention_mask"][row].sum() == n
        for column in padding:
            assert batch["input_ids"][row, column] == 77
            assert batch["attention_mask"][row, column] == 0
            assert batch["position_ids"][row, column] == 0
            assert batch["labels"][row, column] == -100
            assert batch["roles"][row, column] == 255
    pictures = [e.pixel_values for e in encoded if e.pixel_values is not None]
    np.testing.assert_array_equal(batch["pixel_values"].numpy(), np.stack(pictures))
    assert 0 < len(pictures) < len(samples)


def test_text_batch_has_no_pixels(backbone):
    batch = collate([backbone.encoder.encode(Sample("1", "t", "?", "x"))], pad_token_id=0)
    assert "pixel_values" not in batch


def test_padding_changes_no_logit(backbone, samples):
    encoded = [backbone.encoder.encode(s) for s in samples]
    pad = backbone.encoder.pad_token_id
    with torch.no_grad():
        for side in ("left", "right"):
            batch = collate(encoded, padding_side=side, pad_token_id=pad)
            batch.pop("roles"), batch.pop("labels")
            together = backbone.model(**batch).logits
            for row, one in enumerate(encoded):
                alone = collate([one], pad_token_id=pad)
                alone.pop("roles"), alone.pop("labels")
                expected = backbone.model(**alone).logits[0]
                torch.testing.assert_close(
                    together[row][batch["attention_mask"][row].bool()], expected, atol=1e-4, rtol=1e-4
                )


def test_images_change_the_logits(backbone):
    sample = load_stream("toy").task("colour").train[0]
    other = next(s for s in load_stream("toy").task("colour").train if s.answer != sample.answer)
    logits = []
    for image in (sample.image, other.image):
        batch = collate([backbone.encoder.encode(replace(sample, image=image))], pad_token_id=0)
        batch.pop("roles"), batch.pop("labels")
        with torch.no_grad():
            logits.append(backbone.model(**batch).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_generation_returns_text(backbone, samples):
    encoded = [backbone.encoder.encode(s, with_answer=False) for s in samples]
    batch = collate(encoded, padding_side="left", pad_token_id=backbone.encoder.pad_token_id)
    batch.pop("roles"), batch.pop("labels")
    out = backbone.model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert out.shape[0] == len(samples)
    for row in out[:, batch["input_ids"].shape[1] :]:
        assert isinstance(backbone.encoder.decode(row), str)


def test_pixels_are_normalised_in_channel_order():
    pixels = image_to_pixels(Image.new("RGB", (5, 9), (255, 0, 0)), 8)
    assert pixels.shape == (3, 8, 8)
    np.testing.assert_allclose(pixels[0], (1 - 0.485) / 0.229, rtol=1e-6)
    np.testing.assert_allclose(pixels[1], -0.456 / 0.224, rtol=1e-6)
    np.testing.assert_allclose(pixels[2], -0.406 / 0.225, rtol=1e-6)


def test_errors_say_what_to_do(backbone, samples):
    picture = next(s for s in samples if s.image is not None)
    with pytest.raises(ConfigError, match=r"has an image, but the base model reads text only\. Choose text tasks"):
        Encoder(tiny_tokenizer()).encode(picture)
    with pytest.raises(ConfigError, match=r"image of sample .* \(task 'colour', 40 bytes\) cannot be read"):
        backbone.encoder.encode(replace(picture, image=picture.image[:40]))
    with pytest.raises(ConfigError, match="Cannot make a batch of no samples"):
        collate([], pad_token_id=0)
    with pytest.raises(ConfigError, match="Unknown padding side 'middle'; use 'left' or 'right'"):
        collate([backbone.encoder.encode(picture)], padding_side="middle", pad_token_id=0)
    with pytest.raises(ConfigError, match="the template alone takes 8 tokens"):
        Encoder(tiny_tokenizer(), max_prompt_tokens=8)
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(ConfigError, match="has no end-of-sequence token"):
        Encoder(endless)


def test_a_tokenizer_that_opens_with_a_special_token_keeps_doing_so():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<image>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<image> $A", special_tokens=[("<image>", start)]
    )
    ids = Encoder(tokenizer).encode(Sample("1", "t", "?", "x")).input_ids
    assert ids[0] == start
    assert (ids == start).sum() == 1


def test_image_bytes_of_any_mode_are_read(backbone, samples):
    picture = next(s for s in samples if s.image is not None)
    for mode in ("L", "RGBA", "P", "1"):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(picture.image)).convert(mode).save(buffer, "PNG")
        assert backbone.encoder.encode(replace(picture, image=buffer.getvalue())).pixel_values.shape == (3, 32, 32)
