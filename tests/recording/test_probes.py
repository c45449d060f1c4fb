"""Probe sets: what is read is what was written, and what cannot be used says so with its line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from driftlens.backbones import Encoder, load_backbone
from driftlens.backbones.tiny import tiny_tokenizer
from driftlens.errors import NotFoundError, ProbeError, StorageError, UnknownNameError
from driftlens.recording import ProbeSample, ProbeSet, load_probes, write_probes
from driftlens.recording.probes import token_subset

from .support import toy_probes


def write_set(folder: Path, lines: list[object], index: dict[str, object] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "probe_set.yaml").write_text(yaml.safe_dump({"tasks": ["digit"], **(index or {})}), encoding="utf-8")
    rows = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "digit.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


GOOD = {"id": "7", "prompt": "Which digit?", "answer": "seven"}


def test_a_written_set_reads_back_with_the_same_hash(tmp_path: Path) -> None:
    probes = toy_probes(tokens_per_sample=6, seed=3)
    extra = {
        "chat": (ProbeSample("a", "yes", messages=({"role": "user", "content": "Is it?"},)),),
        "ids": (ProbeSample("b", input_ids=(5, 6), answer_ids=(7, 1)), ProbeSample("c", "text", input_ids=(5,))),
    }
    probes = ProbeSet({**probes.samples, **extra}, ("prompt", "answer"), 6, 3, "CC0 – déjà vu")
    read = load_probes(write_probes(probes, tmp_path / "set"))
    assert read == probes
    assert read.sha256 == probes.sha256
    assert len(read) == 18
    assert read.tasks == ("colour", "parity", "shape", "chat", "ids")


def test_the_hash_covers_everything_that_is_recorded() -> None:
    image = toy_probes().samples["colour"][0].image
    base = ProbeSet({"a": (ProbeSample("1", "x", prompt="p", image=image), ProbeSample("2", "y", prompt="q"))})
    first, second = base.samples["a"]
    others = [
        ProbeSet({"b": (first, second)}),
        ProbeSet({"a": (second, first)}),
        ProbeSet({"a": (ProbeSample("1", "x", prompt="p"), second)}),
        ProbeSet({"a": (first, ProbeSample("2", "z", prompt="q"))}),
        ProbeSet({"a": (first, ProbeSample("2", "y", messages=({"role": "user", "content": "q"},)))}),
        ProbeSet(base.samples, roles=("answer",)),
        ProbeSet(base.samples, tokens_per_sample=4),
        ProbeSet(base.samples, seed=1),
    ]
    assert len({probes.sha256 for probes in [base, *others]}) == 9
    assert ProbeSet(base.samples, licence="MIT").sha256 == base.sha256


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"digit\.jsonl, line 2: not valid JSON \(.*column 2\)"),
        ("[1]", "line 2: a sample must be a JSON object; found list"),
        ({"id": "8", "prompt": "p"}, r"line 2: the answer is missing \(`answer` as text"),
        ({"id": "8", "prompt": "p", "answer": "  "}, "line 2: the answer is missing"),
        ({"prompt": "p", "answer": "a"}, "line 2: `id` is missing"),
        ({"id": "8", "answer": "a"}, "exactly one of prompt, messages, input_ids is needed; found none"),
        ({"id": "8", "prompt": "p", "input_ids": [1], "answer": "a"}, "found prompt and input_ids"),
        ({"id": "8", "prompt": 3, "answer": "a"}, "line 2: `prompt` must be text; found int"),
        ({"id": "8", "promt": "p", "answer": "a"}, r"unknown key 'promt' \(did you mean 'prompt'\?\)"),
        ({"id": "8", "input_ids": [1, "x"], "answer": "a"}, "`input_ids` must be a non-empty list of token ids"),
        ({"id": "8", "prompt": "p", "answer_ids": [1]}, "`answer_ids` needs `input_ids`"),
        ({"id": "8", "messages": ["hi"], "answer": "a"}, "`messages` must be a list of objects with `role`"),
        ({"id": "8", "prompt": "p", "answer": "a", "image": "images/8.png"}, "the image 'images/8.png' does not exist"),
        ({"id": "8", "prompt": "p", "answer": "a", "image": "../secret.png"}, "lies outside the probe set's folder"),
        ({"id": "8", "prompt": "p", "answer": "a", "image": "broken.png"}, r"'broken.png' cannot be read"),
        ({"id": "7", "prompt": "p", "answer": "a"}, "the id '7' is used twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    folder = write_set(tmp_path / "set", [GOOD, line])
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(ProbeError, match=message):
        load_probes(folder)


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [GOOD, "{", {"id": "9", "prompt": "p"}], {"tasks": ["digit", "colour"]})
    with pytest.raises(ProbeError) as caught:
        load_probes(folder)
    text = str(caught.value)
    assert "line 2" in text
    assert "line 3" in text
    assert "task 'colour' is listed in probe_set.yaml but colour.jsonl is missing (found: ['digit'])" in text


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"tasks": []}, "`tasks` must be a list of task names"),
        ({"tasks": ["digit", "digit"]}, "names a task twice"),
        ({"tasks": ["../digit"]}, "cannot be a file name"),
        ({"role": ["answer"]}, r"unknown key 'role' \(did you mean 'roles'\?\)"),
        ({"roles": ["answers"]}, r"unknown role 'answers' \(allowed: image, prompt, answer\)"),
        ({"tokens_per_sample": 0}, "tokens_per_sample is 0; it must be at least 1"),
        ({"seed": "x"}, "`seed` must be a whole number; found 'x'"),
        ({"schema": 2}, "schema 2 is not known; this version reads schema 1"),
    ],
)
def test_a_bad_index_is_named(tmp_path: Path, index: dict[str, object], message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        load_probes(write_set(tmp_path / "set", [GOOD], index))


def test_a_missing_set_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"No probe set at .*none: it has no probe_set\.yaml"):
        load_probes(tmp_path / "none")
    (tmp_path / "probe_set.yaml").write_text("tasks: [", encoding="utf-8")
    with pytest.raises(ProbeError, match="is not valid YAML"):
        load_probes(tmp_path)


def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown probe task 'color'. Did you mean 'colour'"):
        toy_probes().select(["color"])


def test_a_set_is_not_written_over_another(tmp_path: Path) -> None:
    write_probes(toy_probes(), tmp_path / "set")
    with pytest.raises(StorageError, match="exists already"):
        write_probes(toy_probes(seed=1), tmp_path / "set")
    assert load_probes(tmp_path / "set").seed == 0


def test_images_do_not_fit_a_text_only_model() -> None:
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, max_position_embeddings=40)  # fmt: skip
    model, encoder = LlamaForCausalLM(config), Encoder(tokenizer)
    message = "tasks colour, shape have images, and the model LlamaForCausalLM reads text only"
    with pytest.raises(ProbeError, match=message):
        toy_probes().check_fits(model, encoder)
    toy_probes().select(["parity"]).check_fits(model, encoder)
    long = ProbeSet({"t": (ProbeSample("1", input_ids=(5,) * 50, answer_ids=(5,)),)})
    with pytest.raises(ProbeError, match="sample '1' of task 't' has 51 tokens; the model's context holds 40"):
        long.check_fits(model, None)
    foreign = ProbeSet({"t": (ProbeSample("1", input_ids=(5,), answer_ids=(99_999,)),)})
    with pytest.raises(ProbeError, match=r"token id 99999; the model's vocabulary has ids 0 to 258"):
        foreign.check_fits(model, None)
    with pytest.raises(ProbeError, match="Sample 'parity-probe-0000' of probe task 'parity' needs a tokenizer"):
        toy_probes().select(["parity"]).check_fits(model, None)


def test_a_wrong_number_of_image_placeholders_is_refused() -> None:
    backbone = load_backbone("tiny-random")
    image = toy_probes().samples["colour"][0].image
    token = backbone.encoder.image_token_id
    probes = ProbeSet({"t": (ProbeSample("1", "x", input_ids=(token, 9, 9), image=image),)})
    with pytest.raises(ProbeError, match=rf"has 1 image placeholders \(token id {token}\); the model needs 4"):
        probes.check_fits(backbone.model, backbone.encoder)


def test_token_ids_and_chat_form_encode_like_the_prompt_form() -> None:
    backbone = load_backbone("tiny-random")
    encoder = backbone.encoder
    row = toy_probes().samples["shape"][0]
    plain = ProbeSet({"t": (row,)}).encode(encoder)["t"][0]
    by_ids = ProbeSample(
        row.id, row.answer, input_ids=tuple(plain.input_ids[: plain.n_prompt].tolist()), image=row.image
    )
    same = ProbeSet({"t": (by_ids,)}).encode(encoder)["t"][0]
    np.testing.assert_array_equal(same.input_ids, plain.input_ids)
    np.testing.assert_array_equal(same.roles, plain.roles)
    np.testing.assert_array_equal(same.pixel_values, plain.pixel_values)
    assert same.n_prompt == plain.n_prompt

    chat = ProbeSample(row.id, row.answer, messages=({"role": "user", "content": row.prompt},), image=row.image)
    with pytest.raises(ProbeError, match=r"in chat form .* has no chat template"):
        ProbeSet({"t": (chat,)}).encode(encoder)
    encoder.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '\nAnswer:' }}"
    rendered = ProbeSet({"t": (chat,)}).encode(encoder)["t"][0]
    np.testing.assert_array_equal(rendered.input_ids, plain.input_ids)
    np.testing.assert_array_equal(rendered.roles, plain.roles)


@settings(max_examples=60, deadline=None)
@given(
    roles=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    limit=st.integers(1, 45),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_token_subset_keeps_every_role_and_the_limit(
    roles: list[int], limit: int, seed: int, data: st.DataObject
) -> None:
    role = np.array(roles, dtype=np.uint8)
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(roles), max_size=len(roles))))
    chosen = token_subset(role, keep, limit, seed, "sample")
    assert keep[chosen].all()
    assert (np.diff(chosen) > 0).all()
    assert set(role[chosen]) == set(role[keep])
    assert len(chosen) == min(keep.sum(), max(limit, len(set(role[keep]))))
    np.testing.assert_array_equal(chosen, token_subset(role, keep, limit, seed, "sample"))


def test_token_subset_is_uniform_over_positions_and_differs_between_samples() -> None:
    roles, keep = np.ones(12, dtype=np.uint8), np.ones(12, dtype=bool)
    hits = np.zeros(12)
    for number in range(600):
        hits[token_subset(roles, keep, 4, 0, f"sample-{number}")] += 1
    assert np.abs(hits / 600 - 4 / 12).max() < 0.08  # standard error 0.019
