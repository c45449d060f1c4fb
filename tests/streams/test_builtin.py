"""The shipped data: sizes, disjoint splits, answers and images."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from driftlens.errors import ConfigError, UnknownNameError
from driftlens.streams import SPLITS, load_stream
from driftlens.streams.builtin import BUILTIN_TASKS, DEFAULT_ORDER


@pytest.fixture(scope="module")
def everything():
    return load_stream("builtin", tasks=list(BUILTIN_TASKS))


def pixels(sample):
    image = Image.open(io.BytesIO(sample.image)).convert("RGB")
    return (image.size, image.tobytes())


def test_default_order_and_options():
    stream = load_stream("builtin")
    assert stream.names == DEFAULT_ORDER == ("shapes-vqa", "garment", "digit", "spam", "noun-class", "flag-continent")
    assert load_stream("builtin", tasks=2).names == DEFAULT_ORDER[:2]
    small = load_stream("builtin", tasks=["antonym", "digit"], train=5, test=3)
    assert small.names == ("antonym", "digit")
    assert [len(small.task("digit").split(s)) for s in SPLITS] == [5, 24, 3]
    assert small.task("digit").train == stream.task("digit").train[:5]
    with pytest.raises(UnknownNameError, match=r"Unknown task of the built-in stream 'spm'\. Did you mean 'spam'"):
        load_stream("builtin", tasks=["spm"])
    with pytest.raises(ConfigError, match="first 9 tasks of stream 'builtin': it has 6"):
        load_stream("builtin", tasks=9)


def test_sizes(everything):
    sizes = {task.name: tuple(len(task.split(s)) for s in SPLITS) for task in everything}
    assert sizes.pop("flag-continent") == (264, 16, 34)
    assert set(sizes.values()) == {(360, 24, 64)}


def test_splits_share_no_image_and_no_text(everything):
    owner = {}
    for task in everything:
        for split in SPLITS:
            for sample in task.split(split):
                key = pixels(sample) if sample.image is not None else sample.prompt.casefold()
                # Across tasks too: the aligned projector and a method's memory must not see a test image elsewhere.
                assert owner.setdefault(key, (task.name, split)) == (task.name, split)
    assert len(owner) > 3000


def test_samples_are_well_formed(everything):
    ids = [s.id for task in everything for split in SPLITS for s in task.split(split)]
    assert len(set(ids)) == len(ids)
    for task in everything:
        for split in SPLITS:
            for sample in task.split(split):
                assert sample.task == task.name
                assert sample.id.startswith(f"{task.name}-{split}-")
                assert 0 < len(sample.prompt) <= 120
                assert sample.answer == sample.answer.strip() != ""
                assert len(sample.answer) <= 16
                assert (sample.image is None) == (task.modality == "text")
        assert 0 < task.chance <= 0.5


def test_every_test_answer_of_a_closed_task_can_be_learned(everything):
    for task in everything:
        if task.name != "antonym":
            assert {s.answer for s in (*task.probe, *task.test)} <= {s.answer for s in task.train}


def test_prompt_does_not_contain_the_answer_where_it_would_give_it_away(everything):
    for name in ("flag-continent", "noun-class", "antonym"):
        for split in SPLITS:
            for sample in everything.task(name).split(split):
                assert sample.answer.casefold() not in sample.prompt.casefold().split(" ")


def test_data_stay_small():
    from importlib import resources

    folder = resources.files("driftlens.streams") / "data" / "builtin"
    assert sum(len(entry.read_bytes()) for entry in folder.iterdir()) < 8e6
