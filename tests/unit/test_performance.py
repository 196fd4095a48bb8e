import dataclasses
from math import isnan

import numpy as np
import pytest
import torch

from dymo_med.bundle import load_bundle
from dymo_med.metrics import METRICS, patient_weights
from dymo_med.selection import Cases
from dymo_med.training.performance import FEWEST, performance
from dymo_med.types import ModalityMask

NAMES = ("a", "b", "c")


def cases_of(patients=40):
    """Each patient twice: everything, and without c (every eighth patient without b too)."""
    generator = torch.Generator().manual_seed(1)
    available = torch.ones(2 * patients, 3, dtype=torch.bool)
    available[patients:, 2] = False
    available[patients::8, 1] = False
    labels = torch.randint(2, (patients,), generator=generator).repeat(2)
    logits = torch.randn(2 * patients, 2, generator=generator, dtype=torch.float64)
    logits[torch.arange(2 * patients), labels] += 1
    return (
        {"gate": logits.log_softmax(-1), "observed_only": (logits / 2).log_softmax(-1)},
        Cases(
            lambda *_: None,
            ModalityMask(NAMES, available),
            ~available,
            labels,
            torch.full((2 * patients,), 0.5),
            1.0,
        ),
        [f"p{i}" for i in range(patients)] * 2,
    )


def test_figures_are_those_of_the_cases_with_the_same_pattern():
    answers, cases, patients = cases_of()
    found = performance(answers, cases, patients, "gate")
    assert {(r.method, r.level, r.group, r.patients, r.cases) for r in found.rows} == {
        (m, *rest)
        for m in ("gate", "observed_only")
        for rest in (
            ("all", "", 40, 80),
            ("count", "2", 35, 35),
            ("count", "3", 40, 40),
            ("pattern", "a+b", 35, 35),
            ("pattern", "a+b+c", 40, 40),
        )
    }
    assert found.patients == {"a": 5, "a+b": 35, "a+b+c": 40} and found.fewest == FEWEST
    row = found.row("gate", "a+b+c")
    for metric in ("auroc", "brier", "ece"):
        weights = patient_weights(patients[:40])[None]
        p = answers["gate"][:40].exp().numpy()
        expected = METRICS[metric](cases.labels[:40].numpy(), p, weights)
        interval = getattr(row, metric)
        assert interval.value == pytest.approx(float(expected[0]))
        assert interval.low < interval.high


def test_who_is_rare_is_compared_with_more():
    found = performance(*cases_of(), "gate")
    assert found.row("gate", "a+b").level == "pattern"
    assert found.row("gate", "a+c").level == "count"
    assert found.row("gate", "a").level == "all"
    assert found.row("dymo", "a+b") is None


def test_what_is_not_defined_is_none():
    answers, cases, patients = cases_of(2)
    one = dataclasses.replace(cases, labels=torch.zeros_like(cases.labels))
    (row,) = performance(answers, one, patients, "observed_only").rows
    assert row.level == "all" and row.auroc.value is None and row.brier.value is not None


def test_a_bundle_keeps_it_and_an_old_one_has_none(bundle, bundle_dir, tmp_path):
    assert bundle.performance is not None
    assert {r.method for r in bundle.performance.rows} == {bundle.choice.name, "observed_only"}
    assert all(r.level == "all" for r in bundle.performance.rows)  # three patients
    assert sum(bundle.performance.patients.values()) >= 3
    bundle.save(tmp_path / "again")
    assert load_bundle(tmp_path / "again", "cpu").performance == bundle.performance
    dataclasses.replace(bundle, performance=None).save(tmp_path / "old")
    assert not (tmp_path / "old" / "configs" / "performance.json").exists()
    assert load_bundle(tmp_path / "old", "cpu").performance is None


def test_intervals_hold_the_value_of_scores_without_ties():
    answers, cases, patients = cases_of(200)
    for row in performance(answers, cases, patients, "gate").rows:
        for interval in (row.auroc, row.brier):
            assert interval.low <= interval.value <= interval.high
        assert not isnan(row.ece.value)
    assert np.isfinite(row.ece.high)
