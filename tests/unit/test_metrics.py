from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
from sklearn import metrics as reference

from dymo_med.metrics import METRICS, bootstrap, bootstrap_means, patient_weights


def cohort(seed: int, n: int = 200, classes: int = 2, ties: bool = False):
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=n)
    labels[:classes] = np.arange(classes)
    logits = generator.normal(size=(n, classes)) + 1.2 * np.eye(classes)[labels]
    p = np.exp(logits)
    p /= p.sum(1, keepdims=True)
    if ties:
        p = np.maximum(np.round(p, 1), 0.05)
        p /= p.sum(1, keepdims=True)
    patients = generator.integers(n // 2, size=n)
    return labels, p, patients


def value(name, labels, p, weights):
    return float(METRICS[name](labels, p, weights[None])[0])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_two_classes_agree_with_scikit_learn(seed, ties):
    y, p, patients = cohort(seed, ties=ties)
    w = patient_weights(patients.tolist())
    expected = {
        "auroc": reference.roc_auc_score(y, p[:, 1], sample_weight=w),
        "auprc": reference.average_precision_score(y, p[:, 1], sample_weight=w),
        "accuracy": reference.accuracy_score(y, p.argmax(1), sample_weight=w),
        "balanced_accuracy": reference.balanced_accuracy_score(y, p.argmax(1), sample_weight=w),
        "brier": reference.brier_score_loss(y, p[:, 1], sample_weight=w),
        "log_loss": reference.log_loss(y, p, sample_weight=w),
    }
    for name, number in expected.items():
        assert value(name, y, p, w) == pytest.approx(number, abs=1e-9), name


@pytest.mark.parametrize("seed", range(3))
def test_many_classes_agree_with_scikit_learn(seed):
    y, p, patients = cohort(seed, classes=4)
    w = patient_weights(patients.tolist())
    one_hot = np.eye(4)[y]
    expected = {
        "auroc": reference.roc_auc_score(y, p, multi_class="ovr", sample_weight=w),
        "auprc": reference.average_precision_score(one_hot, p, sample_weight=w),
        "balanced_accuracy": reference.balanced_accuracy_score(y, p.argmax(1), sample_weight=w),
        "log_loss": reference.log_loss(y, p, sample_weight=w),
        "brier": reference.brier_score_loss(
            y, p, sample_weight=w, labels=range(4), scale_by_half=False
        ),
    }
    for name, number in expected.items():
        assert value(name, y, p, w) == pytest.approx(number, abs=1e-9), name


def test_rows_of_weights_are_independent():
    y, p, _ = cohort(1, classes=3)
    rows = np.random.default_rng(0).integers(0, 3, size=(7, len(y))).astype(float)
    for name, metric in METRICS.items():
        together = metric(y, p, rows)
        alone = np.array([metric(y, p, row[None])[0] for row in rows])
        np.testing.assert_allclose(together, alone, atol=1e-12, err_msg=name)


def test_a_weight_of_two_is_the_record_twice():
    y, p, _ = cohort(2)
    w = np.ones(len(y))
    w[:50] = 2
    twice = np.r_[np.arange(len(y)), np.arange(50)]
    for name in METRICS:
        again = value(name, y[twice], p[twice], np.ones(len(twice)))
        assert value(name, y, p, w) == pytest.approx(again, abs=1e-12), name


def test_calibration_error_by_hand():
    p = np.array([[0.05, 0.95], [0.05, 0.95], [0.35, 0.65], [0.35, 0.65]])
    y = np.array([1, 1, 1, 0])
    assert value("ece", y, p, np.ones(4)) == pytest.approx(0.5 * 0.05 + 0.5 * 0.15)
    # Probability 1 falls in the last bin.
    assert value("ece", np.array([1]), np.array([[0.0, 1.0]]), np.ones(1)) == 0


def test_one_class_is_nan_not_a_crash():
    p = np.array([[0.4, 0.6], [0.3, 0.7]])
    y = np.array([1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("auroc", "auprc", "balanced_accuracy"):
            assert np.isnan(value(name, y, p, np.ones(2))), name
        assert value("accuracy", y, p, np.ones(2)) == 1
        nobody = bootstrap([], {"m": np.empty((0, 2))}, [], resamples=5)["m"]
        estimates = bootstrap([1, 1], {"m": p}, ["a", "b"], resamples=20)["m"]
    assert all(np.isnan(e.value) and np.isnan(e.low) for e in nobody.values())
    assert np.isnan(estimates["auroc"].low) and not np.isnan(estimates["brier"].low)


def test_certain_and_wrong_has_a_finite_loss():
    p = np.array([[1.0, 0.0]])
    assert np.isfinite(value("log_loss", np.array([1]), p, np.ones(1)))


def test_patients_not_records_are_weighed_and_drawn():
    assert patient_weights(["a", "b", "b", "b", "b"]).tolist() == [1, 0.25, 0.25, 0.25, 0.25]
    y, p, _ = cohort(3, n=40)
    once = bootstrap(y.tolist(), {"m": p}, list(range(40)), seed=1)
    five = np.repeat(np.arange(40), 5)
    many = bootstrap(y[five].tolist(), {"m": p[five]}, five.tolist(), seed=1)
    for name in METRICS:
        # Five identical visits of everybody add nothing: same value, same width.
        assert many["m"][name].value == pytest.approx(once["m"][name].value, abs=1e-12)
        assert many["m"][name].low == pytest.approx(once["m"][name].low, abs=1e-9)


def test_interval_is_near_the_large_sample_one():
    generator = np.random.default_rng(0)
    y = generator.integers(2, size=1000)
    right = generator.random(1000) < 0.8
    p = np.eye(2)[np.where(right, y, 1 - y)] * 0.8 + 0.1
    e = bootstrap(y.tolist(), {"m": p}, list(range(1000)), metrics=["accuracy"])["m"]["accuracy"]
    half = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert e.low == pytest.approx(e.value - half, abs=0.004)
    assert e.high == pytest.approx(e.value + half, abs=0.004)


def test_differences_are_paired():
    y, p, patients = cohort(4)
    nearly = p.copy()
    nearly[0] = nearly[0, ::-1]
    result = bootstrap(
        y.tolist(), {"a": p, "b": nearly}, patients.tolist(), pairs=[("a", "b"), ("a", "a")]
    )
    same = result["a - a"]["auroc"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    difference, alone = result["a - b"]["auroc"], result["a"]["auroc"]
    assert difference.value == pytest.approx(alone.value - result["b"]["auroc"].value, abs=1e-12)
    assert difference.high - difference.low < 0.5 * (alone.high - alone.low)


def test_same_seed_same_interval_whatever_the_chunks(monkeypatch):
    y, p, patients = cohort(5)
    first = bootstrap(y.tolist(), {"m": p}, patients.tolist(), seed=7)
    assert bootstrap(y.tolist(), {"m": p}, patients.tolist(), seed=7) == first
    assert bootstrap(y.tolist(), {"m": p}, patients.tolist(), seed=8) != first
    monkeypatch.setattr("dymo_med.metrics._MOST_WEIGHTS", 5000)
    again = bootstrap(y.tolist(), {"m": p}, patients.tolist(), seed=7)
    for name in METRICS:
        # Matrix products of another shape may round differently in the last bit.
        assert again["m"][name].low == pytest.approx(first["m"][name].low, abs=1e-12)


def test_means_are_those_of_the_other_bootstrap(monkeypatch):
    y, p, patients = cohort(8)
    right = (p.argmax(1) == y).astype(float)
    squared = np.square(p[:, 1] - y)
    expected = bootstrap(y.tolist(), {"m": p}, patients.tolist(), seed=3)["m"]
    for most in (2_000_000, 5000):
        monkeypatch.setattr("dymo_med.metrics._MOST_WEIGHTS", most)
        found = bootstrap_means(np.stack([right, squared], 1), patients.tolist(), seed=3)
        for estimate, name in zip(found, ("accuracy", "brier"), strict=True):
            for part in ("value", "low", "high"):
                number = getattr(expected[name], part)
                assert getattr(estimate, part) == pytest.approx(number, abs=1e-12)


def test_means_over_those_who_have_the_value():
    table = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan], [8.0, np.nan]])
    some, nobody = bootstrap_means(table, ["a", "a", "a", "b"])
    assert (some.value, some.low, some.high) == (5.0, 2.0, 8.0)
    assert np.isnan([nobody.value, nobody.low, nobody.high]).all()


def test_a_thousand_resamples_are_quick():
    y, p, patients = cohort(6, n=300)
    start = time.perf_counter()
    bootstrap(y.tolist(), {"a": p, "b": p, "c": p}, patients.tolist(), pairs=[("a", "b")])
    assert time.perf_counter() - start < 5
