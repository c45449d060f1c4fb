"""Stream scores: matrices computed by hand, and what other libraries call by the same names."""

import math

import numpy as np
import pytest

from driftlens import metrics as m
from driftlens.errors import ConfigError

#        task 1  2    3
HAND = [
    [0.10, 0.20, 0.30],  # before the first task
    [0.90, 0.25, 0.30],
    [0.60, 0.80, 0.45],
    [0.50, 0.85, 0.70],
]


def test_every_score_by_hand() -> None:
    scores = m.stream_scores(HAND)
    assert list(scores) == ["AP", "MAA", "MFT", "BWT_T", "BWT_T-1", "forgetting_max", "FWT"]
    assert scores["AP"] == pytest.approx((0.50 + 0.85 + 0.70) / 3)
    assert scores["MAA"] == pytest.approx((0.90 + (0.60 + 0.80) / 2 + (0.50 + 0.85 + 0.70) / 3) / 3)
    assert scores["MFT"] == pytest.approx((0.90 + 0.80 + 0.70) / 3)
    assert scores["BWT_T"] == pytest.approx((-0.40 + 0.05) / 3)
    assert scores["BWT_T-1"] == pytest.approx((-0.40 + 0.05) / 2)
    assert scores["forgetting_max"] == pytest.approx((0.40 - 0.05) / 2)
    assert scores["FWT"] == pytest.approx((0.05 + 0.15) / 2)


def test_a_published_row_is_reproduced() -> None:
    # PASs-MoE divides BWT by T, so with six tasks |BWT_T| is 5/6 of GEM's.
    matrix = np.random.default_rng(0).random((7, 6))
    scores = m.stream_scores(matrix)
    assert scores["BWT_T"] == pytest.approx(scores["BWT_T-1"] * 5 / 6)


def test_definitions_of_other_libraries_differ_as_documented() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        a = rng.random((5, 4))
        scores = m.stream_scores(a)
        # GEM: R[T, i] - R[i, i] over the tasks before the last
        assert scores["BWT_T-1"] == pytest.approx(sum(a[4, j] - a[j + 1, j] for j in range(3)) / 3)
        # forgetting without checkpoint 0 is Chaudhry's; ours may only be larger
        chaudhry = sum(max(a[t, j] for t in range(1, 4)) - a[4, j] for j in range(3)) / 3
        assert scores["forgetting_max"] >= chaudhry - 1e-12
        ours = sum(max(a[t, j] for t in range(4)) - a[4, j] for j in range(3)) / 3
        assert scores["forgetting_max"] == pytest.approx(ours)
        # a maximum that includes the last row (mammoth) can never be negative and is never below ours
        mammoth = sum(max(a[t, j] for t in range(1, 5)) - a[4, j] for j in range(3)) / 3
        assert mammoth >= 0
        # first minus last (avalanche) is minus GEM's backward transfer
        avalanche = sum(a[j + 1, j] - a[4, j] for j in range(3)) / 3
        assert scores["BWT_T-1"] == pytest.approx(-avalanche)


def test_forgetting_can_be_negative_and_counts_checkpoint_zero() -> None:
    assert m.stream_scores([[0, 0], [0.5, 0], [0.9, 1]])["forgetting_max"] == pytest.approx(-0.4)
    assert m.stream_scores([[0.8, 0], [0.5, 0], [0.2, 1]])["forgetting_max"] == pytest.approx(0.6)


def test_the_callers_matrix_is_left_alone() -> None:
    matrix = np.array(HAND)
    m.stream_scores(matrix)
    np.testing.assert_array_equal(matrix, HAND)


def test_one_task_has_no_backward_transfer_over_none() -> None:
    scores = m.stream_scores([[0.1], [0.9]])
    assert (scores["AP"], scores["MAA"], scores["MFT"], scores["BWT_T"]) == (0.9, 0.9, 0.9, 0.0)
    assert all(math.isnan(scores[name]) for name in ("BWT_T-1", "forgetting_max", "FWT"))


def test_missing_scores_are_not_invented() -> None:
    matrix = np.array(HAND)
    matrix[1, 2] = np.nan  # not needed by AP, MFT, MAA (j > t); needed by the maximum of task 3? no: j < T only
    scores = m.stream_scores(matrix)
    assert scores["MAA"] == pytest.approx(m.stream_scores(HAND)["MAA"])
    assert scores["forgetting_max"] == pytest.approx(m.stream_scores(HAND)["forgetting_max"])
    matrix[3, 0] = np.nan
    assert math.isnan(m.stream_scores(matrix)["AP"])
    assert math.isnan(m.stream_scores(matrix)["BWT_T"])


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (3,), (1, 0)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ConfigError, match=r"The score matrix has shape .*; expected \[T\+1, T\]: one row per checkpoint"
    ):
        m.stream_scores(np.zeros(shape))


def test_format_share_by_hand() -> None:
    strict = np.array([[0, 0], [1.0, 0], [0.2, 0.9]])
    lenient = np.array([[0, 0], [1.0, 0], [0.8, 0.9]])
    result = m.format_share(strict, lenient)
    assert result.per_task[0] == pytest.approx(0.75)  # of .8 lost only .2 is lost in substance
    assert np.isnan(result.per_task[1])
    assert result.overall == pytest.approx(0.75)
    assert math.isnan(m.format_share(lenient * 0, lenient * 0).overall)
    with pytest.raises(ConfigError, match="strict scores have 2 tasks and the lenient ones 1"):
        m.format_share(strict, np.zeros((2, 1)))


@pytest.mark.filterwarnings("error")
def test_one_task_is_undefined_without_a_warning() -> None:
    scores = m.stream_scores([[0.1], [0.9]])
    assert [name for name, value in scores.items() if math.isnan(value)] == ["BWT_T-1", "forgetting_max", "FWT"]
    assert all(math.isnan(value) for value in m.foreign_scores([[0.1], [0.9]]).values())


def test_the_refusal_of_a_shape_is_complete() -> None:
    for function in (m.stream_scores, m.foreign_scores):
        with pytest.raises(ConfigError) as caught:
            function(np.zeros((2, 3)))
        assert str(caught.value) == (
            "The score matrix has shape (2, 3); expected [T+1, T]: one row per checkpoint (row 0 before the first "
            "task) and one column per task."
        )


def test_a_lenient_score_that_rose_makes_the_share_more_than_one() -> None:
    strict = np.array([[0, 0, 0], [1.0, 0, 0], [0.2, 0.9, 0], [0.5, 0.9, 1.0]])
    lenient = np.array([[0, 0, 0], [0.6, 0, 0], [0.8, 0.9, 0], [0.85, 0.6, 1.0]])
    result = m.format_share(strict, lenient)
    assert result.per_task[0] == pytest.approx(1.5)  # .5 lost by the letter, .25 won in substance
    assert np.isnan(result.per_task[1:]).all()  # nothing lost by the letter, whatever was lost in substance
    assert result.overall == pytest.approx((0.5 - (-0.25 + 0.3)) / 0.5)
