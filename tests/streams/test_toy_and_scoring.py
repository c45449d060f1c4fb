"""Streams as data, the toy stream, and the two scoring rules."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from driftlens.errors import ConfigError, UnknownNameError
from driftlens.streams import SPLITS, STREAMS, Sample, Stream, lenient_match, load_stream, strict_match
from driftlens.streams.types import constant_answer_accuracy


def test_toy_has_three_tasks_of_the_promised_sizes_and_valid_images():
    stream = load_stream("toy")
    assert stream.names == ("colour", "parity", "shape")
    for task in stream:
        assert [len(task.split(s)) for s in SPLITS] == [24, 8, 8]
        for sample in (s for split in SPLITS for s in task.split(split)):
            assert (sample.image is None) == (task.modality == "text")
            if sample.image is not None:
                assert Image.open(io.BytesIO(sample.image)).size == (32, 32)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_toy_splits_share_neither_image_nor_text(seed):
    for task in load_stream("toy", seed=seed, train=100, probe=40, test=40):
        contents = [
            hashlib.sha256(s.image or s.prompt.encode()).digest() for split in SPLITS for s in task.split(split)
        ]
        assert len(set(contents)) == len(contents) == 180


def test_toy_is_a_function_of_its_seed():
    assert load_stream("toy", seed=3).sha256 == load_stream("toy", seed=3).sha256
    assert load_stream("toy", seed=3).sha256 != load_stream("toy", seed=4).sha256


def test_hash_sees_every_field_the_order_and_the_split():
    stream = load_stream("toy", tasks=2)
    task = stream.tasks[0]
    sample = task.train[0]
    changed = [
        replace(sample, id="other"),
        replace(sample, prompt=sample.prompt + " "),
        replace(sample, answer="other"),
        replace(sample, image=None),
        replace(sample, image=b""),
        replace(sample, aliases=("x",)),
        replace(sample, aliases=("x", "")),
    ]
    variants = [Stream("toy", (replace(task, train=(new, *task.train[1:])), stream.tasks[1])) for new in changed]
    variants.append(Stream("toy", stream.tasks[::-1]))
    variants.append(Stream("toy", (replace(task, train=task.train[1:], probe=(sample, *task.probe)), stream.tasks[1])))
    hashes = {stream.sha256, *(v.sha256 for v in variants)}
    assert len(hashes) == len(variants) + 1


def test_subset_orders_caps_and_refuses():
    stream = load_stream("toy")
    assert stream.subset(["shape", "colour"]).names == ("shape", "colour")
    small = stream.subset(2, samples={"train": 3, "test": 1})
    assert small.names == ("colour", "parity")
    assert [len(small.tasks[0].split(s)) for s in SPLITS] == [3, 8, 1]
    assert stream.subset(samples=5).tasks[0].probe == stream.tasks[0].probe[:5]
    with pytest.raises(ConfigError, match="first 4 tasks of stream 'toy': it has 3"):
        stream.subset(4)
    with pytest.raises(ConfigError, match="empty; stream 'toy' has colour, parity, shape"):
        stream.subset([])
    with pytest.raises(ConfigError, match="'shape' more than once"):
        stream.subset(["shape", "shape"])
    with pytest.raises(ConfigError, match="Cannot keep 0 samples of split 'train'"):
        stream.subset(samples=0)
    with pytest.raises(UnknownNameError, match=r"Unknown split 'tests'\. Did you mean 'test'"):
        stream.subset(samples={"tests": 1})


def test_unknown_names_and_options_name_the_nearest():
    with pytest.raises(UnknownNameError, match=r"Unknown stream 'toi'\. Did you mean 'toy'"):
        load_stream("toi")
    with pytest.raises(UnknownNameError, match=r"Unknown task 'color'\. Did you mean 'colour'"):
        load_stream("toy").task("color")
    with pytest.raises(ConfigError, match=r"Stream 'toy' has no option 'sed'\. Did you mean 'seed'"):
        load_stream("toy", sed=1)
    with pytest.raises(ConfigError, match="train=0, probe=8, test=8: each must be at least 1"):
        load_stream("toy", train=0)
    assert {"builtin", "toy"} <= set(STREAMS.names())


def test_constant_answer_accuracy():
    samples = [Sample(str(i), "t", "?", a) for i, a in enumerate(["x", "y", "x", "z"])]
    assert constant_answer_accuracy(samples) == 0.5
    assert constant_answer_accuracy([]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answer", "strict", "lenient"),
    [
        ("sandal", "sandal", True, True),
        (" sandal\n", "sandal", True, True),
        ("Sandal", "sandal", False, True),
        ("A sandal.", "sandal", False, True),
        ("The answer is a sandal.", "sandal", False, True),
        ("Answer: sandal", "sandal", False, True),
        ("It's a sandal!", "sandal", False, True),
        ("This is the sandal", "sandal", False, True),
        ("seven", "7", False, True),
        ("The answer is seven.", "7", False, True),
        ("7", "seven", False, True),
        ("ankle-boot", "ankle boot", False, True),
        ("T-shirt", "t-shirt", False, True),
        ("Réunion", "Reunion", False, True),
        ("sandals", "sandal", False, False),
        ("not spam", "spam", False, False),
        ("spam or ham", "spam", False, False),
        ("", "sandal", False, False),
        (" . ", "sandal", False, False),
        ("1.5", "15", False, False),
        ("1.5", "1.5.", False, True),
        ("-3", "3", False, False),
        ("the", "the", True, True),
        ("answer", "answer", True, True),
        ("17", "7", False, False),
    ],
)
def test_scoring_table(prediction, answer, strict, lenient):
    assert strict_match(prediction, answer) is strict
    assert lenient_match(prediction, answer) is lenient


def test_aliases_count_only_for_the_lenient_rule():
    assert lenient_match("north america", "Americas", ["America", "North America"])
    assert not strict_match("North America", "Americas", ["North America"])


# The words of the frames themselves would be taken for a frame.
FRAME_WORDS = {"answer", "right", "correct", "final", "think"}
WORDS = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=5, max_size=9).filter(
    lambda word: word not in FRAME_WORDS
)


@given(WORDS, st.sampled_from(["{}", "The answer is {}.", "the {}", " {}! ", "It is {}"]))
def test_strict_implies_lenient_and_frames_do_not_matter(word, frame):
    assert lenient_match(word, word)
    assert lenient_match(frame.format(word), word)
    assert lenient_match(frame.format(word.upper()), word)


@given(WORDS, WORDS)
def test_lenient_is_symmetric(a, b):
    assert lenient_match(a, b) == lenient_match(b, a)
