"""Survival of simulated patients: the law, and what is exact about it."""

import csv

import numpy as np
import pytest
import yaml

from dymo_med import simulate
from dymo_med.data.dials import Dials
from dymo_med.data.simulate import draw_evidence, posterior_high
from dymo_med.data.simulated_survival import (
    SURVIVAL,
    SURVIVAL_LABELS,
    SURVIVAL_TRUTH,
    draw_times,
    exact_survival,
    expected_concordance,
    grade_of_label,
)
from dymo_med.survival.metrics import brier, concordance, risk_gap


@pytest.fixture(scope="module")
def drawn():
    """Return 4000 patients: exact probability of high grade, death, end of follow-up."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(4000):
        evidence = draw_evidence(rng)
        high = posterior_high(evidence.log_likelihood_ratios, evidence.observed())
        rows.append((high, *draw_times(rng, evidence.grade)))
    return np.array(rows).T


def test_exact_curves_are_calibrated_and_beat_others(drawn):
    high, death, _ = drawn
    events, one = np.ones(4000, dtype=bool), np.ones((1, 4000))
    for t in (6.0, 12.0, 24.0, 48.0):
        for some in (high < 0.1, (high > 0.3) & (high < 0.7), high > 0.9):
            risk = 1 - exact_survival(high[some], [t])[:, 0]
            gap = risk_gap(death[some], events[some], risk, one[:, some], t)[0]
            assert abs(gap) < 4 * 0.5 / some.sum() ** 0.5
        at = np.array([t])
        exact = brier(death, events, exact_survival(high, [t]), one, at)
        for other in (np.full(4000, 0.5), np.clip(2 * high - 0.5, 0, 1)):
            assert exact < brier(death, events, exact_survival(other, [t]), one, at)


def test_expected_concordance_is_that_of_deaths(drawn):
    high, death, followed = drawn
    one = np.ones((1, 4000))
    best = expected_concordance(high, high, 36.0)
    seen = concordance(death, np.ones(4000, dtype=bool), high, one, 36.0)[0]
    assert best == pytest.approx(seen, abs=0.015)
    # And of censored patients too, by inverse-censoring weights.
    times, events = np.minimum(death, followed), death <= followed
    assert best == pytest.approx(concordance(times, events, high, one, 36.0)[0], abs=0.02)
    worse = np.random.default_rng(1).permutation(high)
    assert expected_concordance(worse, high, 36.0) == pytest.approx(0.5, abs=0.02)
    assert best > 0.65


def test_medians_are_the_dials():
    dials = Dials(median_months=(30.0, 10.0))
    assert exact_survival(np.array([0.0]), [30.0], dials)[0, 0] == pytest.approx(0.5)
    assert exact_survival(np.array([1.0]), [10.0], dials)[0, 0] == pytest.approx(0.5)


def test_the_grade_behind_a_label_that_may_be_wrong():
    dials = Dials(label_noise=0.2)
    assert grade_of_label(np.array([0.2, 0.5, 0.8]), dials) == pytest.approx([0.0, 0.5, 1.0])


def test_files(tmp_path):
    dials = Dials(second_site=0.5, unlabelled=0.5)
    root = simulate(tmp_path / "c", 12, seed=1, size=16, dials=dials)

    def rows(name):
        with (root / name).open(newline="") as stream:
            return list(csv.DictReader(stream))

    described = yaml.safe_load((root / SURVIVAL).read_text())
    assert described["labels"] == SURVIVAL_LABELS
    assert described["task"]["type"] == "survival"
    blank = {r["record_id"] for r in rows("labels.csv") if not r["grade"]}
    assert blank
    truth = {r["record_id"]: r for r in rows(SURVIVAL_TRUTH)}
    for row in rows(SURVIVAL_LABELS):
        death, end = (float(truth[row["record_id"]][f"{k}_months"]) for k in ("death", "follow_up"))
        if row["record_id"] in blank:
            assert (row["months"], row["died"]) == ("", "")
            continue
        assert row["died"] == ("yes" if death <= end else "no")
        assert float(row["months"]) == pytest.approx(min(death, end), abs=1e-3)
        assert row["site"] in ("1", "2")
