"""What is promised of outlines: thresholds, intervals of volumes, and that both are kept."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dymo_med.conformal import AS_THEY_CAME, COVERAGE, Bound
from dymo_med.outline_bounds import (
    LEVELS,
    MISSED,
    Case,
    OutlineBounds,
    Threshold,
    calibrate_outlines,
    missed_share,
    threshold_of,
)


def case(patient, found=10.0, true=10.0, missed=0.0, group=AS_THEY_CAME):
    return Case(
        patient,
        group,
        np.array([found]),
        np.array([true]),
        np.broadcast_to(np.asarray(missed), (1, len(LEVELS))),
        np.array([0.8]),
    )


def test_levels_fall_from_an_ordinary_outline_to_almost_everything():
    assert LEVELS[0] == 0.5 and 1e-4 <= LEVELS[-1] < 2e-4
    assert list(LEVELS) == sorted(set(LEVELS), reverse=True)


def test_what_is_missed_falls_with_the_threshold():
    rng = np.random.default_rng(0)
    p, true = rng.uniform(size=(8, 8, 8)), rng.uniform(size=(8, 8, 8)) < 0.3
    shares = missed_share(p, true)
    assert (np.diff(shares) <= 0).all()
    for k in (0, 20, 60):  # by definition: in the outline is what is above
        assert shares[k] == pytest.approx(1 - (p > LEVELS[k])[true].mean())
    assert not missed_share(p, np.zeros_like(true)).any()  # of nothing nothing is missed


@pytest.mark.parametrize("patients", [9, 20, 60])
def test_the_wide_outline_misses_as_little_as_promised(patients):
    """Expected share missed by a new patient, over calibrations, is at most what is stated."""
    rng = np.random.default_rng(patients)

    def draw(n):  # how easy a patient is, and how sure the network is of his lesion
        ease = rng.normal(0, 1.5, (n, 1))
        p = 1 / (1 + np.exp(-(ease + rng.normal(0, 2, (n, 40)))))
        return np.stack([missed_share(row, np.ones(40, bool)) for row in p])

    risks, plain = [], []
    for _ in range(300):
        found = threshold_of(draw(patients))
        new = draw(8)
        place = len(LEVELS) - 1 if found.threshold is None else LEVELS.index(found.threshold)
        risks.append(0.0 if found.threshold is None else new[:, place].mean())
        plain.append(new[:, 0].mean())
    assert np.mean(risks) <= MISSED + 2 * np.std(risks) / np.sqrt(len(risks))
    assert np.mean(plain) > 0.3  # without it much more is missed


def test_the_promise_needs_nine_patients_and_is_exact():
    nothing = np.zeros((9, len(LEVELS)))
    assert threshold_of(nothing) == Threshold(9, 0.5)
    assert threshold_of(nothing[:8]) == Threshold(8, None)
    some = nothing.copy()
    some[0, :30] = 0.001  # (0.001 + 1) / 10 > 0.1
    assert threshold_of(some).threshold == LEVELS[30]
    many = np.zeros((19, len(LEVELS)))
    many[0, :10], many[1, :10] = 0.5, 0.5  # (1 + 1) / 20 = 0.1, just kept
    assert threshold_of(many).threshold == 0.5
    many[2, :10] = 0.01
    assert threshold_of(many).threshold == LEVELS[10]
    assert threshold_of(np.ones((50, len(LEVELS)))).threshold is None


def test_intervals_of_volumes_cover(seed=0):
    rng = np.random.default_rng(seed)
    inside = []
    for _ in range(300):
        true = np.exp(rng.normal(2, 1, 30))
        found = true * np.exp(rng.normal(0.1, 0.4, 30))
        cases = [case(i, f, t) for i, (f, t) in enumerate(zip(found[:29], true[:29], strict=True))]
        cases += [replace(c, group="a") for c in cases]
        bounds = calibrate_outlines({"m": cases}, ["r"])
        interval = bounds.interval("m", "r", "a", found[29])
        assert 0 <= interval.low <= found[29] <= interval.high and interval.patients == 29
        inside.append(interval.low <= true[29] <= interval.high)
    assert COVERAGE - 0.05 < np.mean(inside) < COVERAGE + 0.06


def test_the_stricter_group_counts_and_a_patient_once():
    came = [case(i, found=10.0, true=11.0) for i in range(12)]
    alone = [case(i, found=10.0, true=20.0, missed=0.01, group="t1") for i in range(12)]
    copies = [replace(c, found_ml=np.array([500.0])) for c in came]
    bounds = calibrate_outlines({"m": came + copies + alone}, ["r"])
    wide, near = (bounds.interval("m", "r", g, 10.0) for g in ("t1", "flair"))
    assert wide.group == "pattern" and wide.high == pytest.approx(20.0)
    assert near is None  # no calibration patient was looked at so
    assert bounds.threshold("m", "r", "t1").patients == 12
    overlap = bounds.overlap["m"][AS_THEY_CAME]
    assert (overlap.patients, overlap.value) == (12, pytest.approx(0.8))
    assert overlap.low == pytest.approx(0.8) == overlap.high
    few = calibrate_outlines({"m": came[:8] + alone[:8]}, ["r"])
    assert few.interval("m", "r", "t1", 10.0) is None
    assert few.threshold("m", "r", "t1") is None
    assert few.interval("other", "r", "t1", 10.0) is None


def test_they_are_told_and_read_again():
    cases = [
        case(i, 10.0 + i, 12.0, missed=0.3 * (i == 0), group=g) for i in range(12) for g in "ab"
    ]
    bounds = calibrate_outlines({"m": cases}, ["r"])
    told = json.loads(json.dumps(bounds.to_dict()))
    assert OutlineBounds.from_dict(told) == bounds
    for change in (
        {"patients": 12, "threshold": 0.123},
        {"patients": 5, "threshold": 0.5},
        {"patients": -1, "threshold": None},
    ):
        wrong = json.loads(json.dumps(told))
        wrong["thresholds"]["m"]["r"]["a"] = change
        with pytest.raises(ValueError):
            OutlineBounds.from_dict(wrong)
    wrong = json.loads(json.dumps(told))
    wrong["overlap"]["m"]["a"]["value"] = 1.5
    with pytest.raises(ValueError, match="Dice"):
        OutlineBounds.from_dict(wrong)
    wrong = json.loads(json.dumps(told))
    wrong["volumes"]["m"]["r"]["a"] = {"patients": 12, "bound": -1.0}
    with pytest.raises(ValueError, match="negative"):
        OutlineBounds.from_dict(wrong)
    assert Bound(12, 0.0).bound == 0.0
