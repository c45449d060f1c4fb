"""Scores of other libraries under their own definitions, against bookkeeping as those libraries do it and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftlens import metrics as m
from driftlens.errors import ConfigError

#        task 1  2    3
HAND = [
    [0.10, 0.20, 0.30],  # before the first task
    [0.90, 0.25, 0.30],
    [0.95, 0.80, 0.45],
    [0.50, 0.85, 0.70],
]


def avalanche(matrix: np.ndarray) -> dict[str, float]:
    """Events of a training run: the whole stream is evaluated before training and after every experience.

    A score is an experience's initial one when training on it just ended, and its last one otherwise. What was not
    trained on has no initial score. Forward transfer keeps a score at initialisation and one right before training.
    """
    initial: dict[int, float] = {}
    previous: dict[int, float] = {}
    forgetting, transfer = math.nan, math.nan
    at_start = dict(enumerate(matrix[0]))
    for trained, row in enumerate(matrix[1:]):
        last: dict[int, float] = {}
        for experience, score in enumerate(row):
            if experience == trained:
                initial[experience] = score
            else:
                last[experience] = score
            if experience == trained + 1:
                previous[experience] = score
        both = initial.keys() & last.keys()
        if both:
            forgetting = sum(initial[k] - last[k] for k in both) / len(both)
        if previous:
            transfer = sum(score - at_start[k] for k, score in previous.items()) / len(previous)
    return {"StreamForgetting": forgetting, "StreamBWT": -forgetting, "StreamForwardTransfer": transfer}


def mammoth(matrix: np.ndarray, random: np.ndarray) -> dict[str, float]:
    """Rows grow with the tasks seen; the missing entries count as 0, and the last row is part of the maximum."""
    tasks = len(matrix[0])
    seen = [[matrix[t + 1][j] if j <= t else 0.0 for j in range(tasks)] for t in range(tasks)]
    old = range(tasks - 1)
    return {
        "backward_transfer": sum(seen[-1][j] - seen[j][j] for j in old) / len(old),
        "forward_transfer": sum(matrix[j][j] - random[j] for j in range(1, tasks)) / len(old),
        "forgetting": sum(max(row[j] for row in seen) - seen[-1][j] for j in old) / len(old),
    }


def test_by_hand() -> None:
    scores = m.foreign_scores(HAND, random=[0.5, 0.1, 0.0])
    assert list(scores) == list(m.FOREIGN_SCORES)
    assert scores["avalanche StreamForgetting"] == pytest.approx((0.40 - 0.05) / 2)
    assert scores["avalanche StreamBWT"] == pytest.approx((-0.40 + 0.05) / 2)
    assert scores["avalanche StreamForwardTransfer"] == pytest.approx((0.05 + 0.15) / 2)
    assert scores["mammoth backward_transfer"] == pytest.approx((-0.40 + 0.05) / 2)
    assert scores["mammoth forward_transfer"] == pytest.approx((0.15 + 0.45) / 2)
    assert scores["mammoth forgetting"] == pytest.approx((0.45 + 0.00) / 2)
    assert scores["Chaudhry forgetting"] == pytest.approx((0.45 - 0.05) / 2)


@given(st.integers(0, 2**20), st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_other_libraries_bookkeeping_is_reproduced(seed: int, tasks: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, random = rng.random((tasks + 1, tasks)), rng.random(tasks)
    scores = m.foreign_scores(matrix, random)
    for library, values in (("avalanche", avalanche(matrix)), ("mammoth", mammoth(matrix, random))):
        for name, value in values.items():
            assert scores[f"{library} {name}"] == pytest.approx(value), name


@given(st.integers(0, 2**20), st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_how_the_names_relate(seed: int, tasks: int) -> None:
    matrix = np.random.default_rng(seed).random((tasks + 1, tasks))
    ours, theirs = m.stream_scores(matrix), m.foreign_scores(matrix)
    assert theirs["avalanche StreamForgetting"] == pytest.approx(-ours["BWT_T-1"])
    assert theirs["mammoth backward_transfer"] == pytest.approx(ours["BWT_T-1"])
    assert theirs["avalanche StreamForwardTransfer"] == pytest.approx(ours["FWT"])
    assert theirs["mammoth forward_transfer"] == pytest.approx(ours["FWT"])  # baseline: before the first task
    assert theirs["mammoth forgetting"] >= 0
    assert theirs["Chaudhry forgetting"] <= ours["forgetting_max"] + 1e-12  # ours counts what the base model knew
    assert theirs["avalanche StreamForgetting"] <= theirs["mammoth forgetting"] + 1e-12


def test_adding_a_constant_to_all_scores_changes_no_difference() -> None:
    matrix = np.random.default_rng(0).random((5, 4))
    before, after = m.foreign_scores(matrix), m.foreign_scores(matrix + 0.5)
    for name in set(before) - {"mammoth forgetting"}:  # its zeros for unseen tasks stay zeros
        assert after[name] == pytest.approx(before[name])


def test_one_task_missing_scores_and_other_shapes() -> None:
    assert all(math.isnan(value) for value in m.foreign_scores([[0.1], [0.9]]).values())
    holed = np.array(HAND)
    holed[3, 0] = np.nan
    assert math.isnan(m.foreign_scores(holed)["mammoth forgetting"])
    assert not math.isnan(m.foreign_scores(holed)["mammoth forward_transfer"])
    with pytest.raises(ConfigError, match="shape"):
        m.foreign_scores(np.zeros((3, 3)))
    with pytest.raises(ConfigError, match="one score for each of the 3 tasks"):
        m.foreign_scores(HAND, random=[0.1])
