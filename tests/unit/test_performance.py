import dataclasses
from math import isnan

import numpy as np
import pytest
import torch

from dymo_med.bundle import load_bundle, save_bundle
from dymo_med.conformal import AS_THEY_CAME
from dymo_med.metrics import METRICS, patient_weights
from dymo_med.training.held_back import TriedOut
from dymo_med.training.performance import FEWEST, performance


def answered(patients=40):
    """Each patient twice: with everything, and with a and b (every eighth with a alone)."""
    generator = torch.Generator().manual_seed(1)
    groups = ["a+b+c"] * patients + ["a" if i % 8 == 0 else "a+b" for i in range(patients)]
    labels = torch.randint(2, (patients,), generator=generator).repeat(2)
    logits = torch.randn(2 * patients, 2, generator=generator, dtype=torch.float64)
    logits[torch.arange(2 * patients), labels] += 1
    names = [f"p{i}" for i in range(patients)]
    first = torch.arange(patients)
    answers = {"gate": logits.softmax(-1), "observed_only": (logits / 2).softmax(-1)}
    return TriedOut(
        (*groups, *[AS_THEY_CAME] * patients),
        (*names, *names, *names),
        torch.cat([labels, labels[first]]),
        {name: torch.cat([p, p[first]]) for name, p in answers.items()},
    )


def test_figures_are_those_of_the_cases_with_the_same_pattern():
    cases = answered()
    found = performance(cases, "gate")
    assert {(r.method, r.level, r.group, r.patients, r.cases) for r in found.rows} == {
        (m, *rest)
        for m in ("gate", "observed_only")
        for rest in (
            ("all", "", 40, 40),
            ("count", "2", 35, 35),
            ("count", "3", 40, 40),
            ("pattern", "a+b", 35, 35),
            ("pattern", "a+b+c", 40, 40),
        )
    }
    assert found.patients == {"a": 5, "a+b": 35, "a+b+c": 40} and found.fewest == FEWEST
    row = found.row("gate", "a+b+c")
    for metric in ("auroc", "brier", "ece"):
        weights = patient_weights(cases.patients[:40])[None]
        p = cases.answers["gate"][:40].numpy()
        expected = METRICS[metric](cases.labels[:40].numpy(), p, weights)
        interval = getattr(row, metric)
        assert interval.value == pytest.approx(float(expected[0]))
        assert interval.low < interval.high


def test_who_is_rare_is_compared_with_more():
    found = performance(answered(), "gate")
    assert found.row("gate", "a+b").level == "pattern"
    assert found.row("gate", "a+c").level == "count"
    assert found.row("gate", "a").level == "all"
    assert found.row("dymo", "a+b") is None


def test_what_is_not_defined_is_none():
    cases = answered(2)
    one = dataclasses.replace(cases, labels=torch.zeros_like(cases.labels))
    (row,) = performance(one, "observed_only").rows
    assert row.level == "all" and row.auroc.value is None and row.brier.value is not None


def test_a_bundle_keeps_it_and_an_old_one_has_none(bundle, bundle_dir, tmp_path):
    assert bundle.performance is not None
    assert {r.method for r in bundle.performance.rows} == {bundle.choice.name, "observed_only"}
    assert all(r.level == "all" for r in bundle.performance.rows)  # three patients
    assert sum(bundle.performance.patients.values()) >= 3
    save_bundle(bundle, tmp_path / "again")
    assert load_bundle(tmp_path / "again", "cpu").performance == bundle.performance
    save_bundle(dataclasses.replace(bundle, performance=None), tmp_path / "old")
    assert not (tmp_path / "old" / "configs" / "performance.json").exists()
    assert load_bundle(tmp_path / "old", "cpu").performance is None


def test_intervals_hold_the_value_of_scores_without_ties():
    for row in performance(answered(200), "gate").rows:
        for interval in (row.auroc, row.brier):
            assert interval.low <= interval.value <= interval.high
        assert not isnan(row.ece.value)
    assert np.isfinite(row.ece.high)
