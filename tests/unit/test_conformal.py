"""Prediction sets and intervals: ranks in closed form, who counts, what few can say."""

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dymo_med.conformal import (
    AS_THEY_CAME,
    COVERAGE,
    FEWEST,
    Bound,
    Conformal,
    bound_of,
    calibrate,
)
from dymo_med.types import Scale

SCALE = Scale(-3.0, 3.0, (-3.0, 0.0, 3.0))


def both(pattern, scores):
    """Bounds of patients of one pattern who came with nothing else."""
    n = len(scores)
    return calibrate(
        (pattern,) * n + (AS_THEY_CAME,) * n, (*range(n), *range(n)), {"m": (*scores, *scores)}
    )


def test_nine_patients_are_needed_at_ninety_percent():
    """0.9 / (1 - 0.9) is 9.000000000000002 in floating point, and its ceiling 10."""
    assert FEWEST == 9 and COVERAGE == 0.9
    assert bound_of([0.5] * 8) == Bound(8, None)
    assert bound_of([0.5] * 8 + [0.7]) == Bound(9, 0.7)


@pytest.mark.parametrize("n", [9, 10, 18, 19, 20, 29, 30, 59, 60, 99, 199])
def test_the_rank_is_the_smallest_that_covers(n):
    scores = np.random.default_rng(n).permutation(np.arange(1, n + 1) / n)
    rank = round(bound_of(scores.tolist()).bound * n)
    # Of n + 1 exchangeable scores the new one is among the `rank` smallest with this probability.
    assert Fraction(rank, n + 1) >= Fraction(9, 10) > Fraction(rank - 1, n + 1)


@given(st.lists(st.floats(0, 1), min_size=9, max_size=60))
def test_of_any_scores_nine_in_ten_are_within_the_bound(scores):
    """Leaving each out in turn: the share of those within the bound of the others."""
    n = len(scores)
    inside = [
        (found := bound_of(scores[:i] + scores[i + 1 :])).bound is None or scores[i] <= found.bound
        for i in range(n)
    ]
    assert sum(inside) >= ceil(Fraction(9, 10) * n)


@pytest.mark.parametrize("copies", [1, 2, 6])
@pytest.mark.parametrize("n", [2, 5, 8, 9, 19])
def test_copies_of_a_patient_count_once(n, copies):
    scores = np.random.default_rng(n).uniform(size=n).tolist()
    patients = list(range(n)) * copies
    found = calibrate(["a"] * n * copies, patients, {"m": scores * copies}).scores["m"]["a"]
    assert found == bound_of(scores) and found.patients == n


def test_of_several_records_of_a_patient_one_counts():
    scores = [i / 20 for i in range(20)]
    found = calibrate(["a"] * 20, [i // 2 for i in range(20)], {"m": scores}).scores["m"]["a"]
    assert found == bound_of(scores[::2])


@pytest.mark.parametrize("n", [0, 1, 5, 8])
def test_too_few_rule_nothing_out(n):
    found = both("a", [0.0] * n)
    sets = found.sets("m", np.array([[1.0, 0.0, 0.0]]), ["a"])
    assert sets.members.all() and sets.calibrated_on.tolist() == [n] and sets.group == ("pattern",)
    errors = calibrate(("a",) * n, range(n), {}, {"m": [0.0] * n})
    interval = errors.intervals("m", np.array([0.5]), ["a"], SCALE)
    assert (interval.low[0], interval.high[0]) == (-3, 3)


def test_a_pattern_that_nobody_had_rules_nothing_out():
    found = both("a", [0.01] * 50).sets("m", np.array([[0.98, 0.01, 0.01]] * 2), ["b", "a"])
    assert found.members.tolist() == [[True] * 3, [True, False, False]]
    assert found.calibrated_on.tolist() == [0, 50]


def test_the_larger_of_both_bounds_holds():
    def of(own, everybody):
        return Conformal({"m": {"a": Bound(20, own), AS_THEY_CAME: Bound(40, everybody)}})

    p = np.array([[0.7, 0.2, 0.1]])
    for own, everybody, group, n in ((0.85, 0.4, "pattern", 20), (0.4, 0.85, "all", 40)):
        found = of(own, everybody).sets("m", p, ["a"])
        assert found.members.tolist() == [[True, True, False]]
        assert (found.group, found.calibrated_on.tolist()) == ((group,), [n])


def test_the_answer_is_always_in():
    found = both("a", [0.01] * 30).sets("m", np.array([[0.5, 0.3, 0.2]]), ["a"])
    assert found.members.tolist() == [[True, False, False]]


def test_an_interval_is_as_wide_as_the_bound_and_ends_where_the_scale_does():
    bounds = {"a": Bound(20, 0.5), AS_THEY_CAME: Bound(40, 0.25)}
    found = Conformal({}, {"m": bounds}).intervals("m", np.array([0.0, 2.9]), ["a", "a"], SCALE)
    assert found.low.tolist() == pytest.approx([-0.5, 2.4])
    assert found.high.tolist() == pytest.approx([0.5, 3.0])
    with pytest.raises(KeyError):
        Conformal({}, {}).intervals("m", np.array([0.0]), ["a"], SCALE)


@pytest.mark.parametrize(
    "wrong", [(8, 0.5), (9, None), (-1, None), (8.5, None), (20, float("nan")), (20, float("inf"))]
)
def test_a_bound_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="bound"):
        Bound(*wrong)
