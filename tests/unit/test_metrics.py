from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import norm
from sklearn import metrics as reference
from sklearn.linear_model import LogisticRegression

from dymo_med.metrics import (
    METRICS,
    NUMBER_METRICS,
    Estimate,
    bootstrap,
    bootstrap_means,
    bootstrap_numbers,
    delong,
    holm,
    number_metrics,
    patient_weights,
    reliability,
    selection_quality,
)


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


def recalibration(y, p, w):
    """Slope of a logistic regression on the log-odds."""
    odds = np.log(p[:, 1] / p[:, 0])[:, None]
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-14, max_iter=200)
    return float(model.fit(odds, y, sample_weight=w).coef_[0, 0])


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
        "f1": reference.f1_score(y, p.argmax(1), sample_weight=w),
        "weighted_f1": reference.f1_score(y, p.argmax(1), average="weighted", sample_weight=w),
        "calibration_slope": recalibration(y, p, w),
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
        "f1": reference.f1_score(y, p.argmax(1), average="macro", sample_weight=w),
        "weighted_f1": reference.f1_score(y, p.argmax(1), average="weighted", sample_weight=w),
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
        undefined = ("auroc", "auprc", "balanced_accuracy")
        for name in (*undefined, "calibration_slope", "calibration_intercept"):
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
    start = time.process_time()
    bootstrap(y.tolist(), {"a": p, "b": p, "c": p}, patients.tolist(), pairs=[("a", "b")])
    assert time.process_time() - start < 5  # 0.3 s; of this process alone, whoever else is busy


@pytest.mark.parametrize("seed", range(3))
def test_unweighted_agrees_with_monai(seed):
    from monai.metrics import ConfusionMatrixMetric, compute_average_precision, compute_roc_auc

    y, p, _ = cohort(seed)
    one = np.ones(len(y))
    score, truth = torch.from_numpy(p[:, 1]), torch.from_numpy(y)
    assert value("auroc", y, p, one) == pytest.approx(compute_roc_auc(score, truth), abs=1e-9)
    found = compute_average_precision(score, truth)
    assert value("auprc", y, p, one) == pytest.approx(found, abs=1e-9)
    names = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "f1": "f1 score"}
    for name, theirs in names.items():
        metric = ConfusionMatrixMetric(metric_name=theirs)
        # One image per record with one channel.
        metric(torch.from_numpy(p.argmax(1))[None, None].double(), truth[None, None].double())
        expected = float(metric.aggregate()[0])
        assert value(name, y, p, one) == pytest.approx(expected, abs=1e-6), name


def test_f1_of_the_classes_that_occur():
    p = np.eye(3)[[0, 0, 1, 2]]
    y = np.array([0, 1, 1, 0])  # class 2 is said, but does not occur
    assert value("f1", y, p, np.ones(4)) == pytest.approx((0.5 + 2 / 3) / 2)
    q = np.eye(2)[[0, 0, 1]]
    assert value("f1", np.array([1, 1, 0]), q, np.ones(3)) == 0
    assert np.isnan(value("f1", np.array([0, 0, 0]), q, np.ones(3)))


# --- Logistic recalibration -----------------------------------------------------------------------


def sure(odds):
    p = 1 / (1 + np.exp(-np.asarray(odds, dtype=float)))
    return np.stack([1 - p, p], 1)


def test_recalibration_finds_what_was_done_to_the_probabilities():
    generator = np.random.default_rng(0)
    odds = generator.normal(0, 1.5, 40000)
    y = (generator.random(40000) < sure(odds)[:, 1]).astype(int)
    one = np.ones(len(y))
    assert value("calibration_slope", y, sure(odds), one) == pytest.approx(1, abs=0.05)
    assert value("calibration_intercept", y, sure(odds), one) == pytest.approx(0, abs=0.05)
    slope = value("calibration_slope", y, sure(2 * odds + 1), one)
    assert slope == pytest.approx(value("calibration_slope", y, sure(odds), one) / 2, abs=1e-9)
    shifted = value("calibration_intercept", y, sure(odds + 1), one)
    expected = value("calibration_intercept", y, sure(odds), one) - 1
    assert shifted == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_intercept_makes_the_mean_right(seed):
    y, p, patients = cohort(seed)
    w = patient_weights(patients.tolist())
    a = value("calibration_intercept", y, p, w)
    moved = sure(np.log(p[:, 1] / p[:, 0]) + a)
    assert w @ moved[:, 1] == pytest.approx(w @ y, rel=1e-10)


@pytest.mark.parametrize(
    ("odds", "labels", "exists"),
    [
        ([-1, 0, 1, 2], [0, 0, 1, 1], False),  # apart
        ([-1, 0, 1, 2], [1, 1, 0, 0], False),  # the wrong way round
        ([-1, 0, 0, 2], [0, 0, 1, 1], False),  # touching
        ([1, 1, 1, 1], [0, 1, 0, 1], False),  # nothing to go by
        ([-1, 0, 1, 2], [0, 1, 0, 1], True),
        ([0, 1, 1, 2], [1, 0, 1, 0], False),  # both
        ([0, 1, 1, 2], [1, 0, 1, 1], True),
    ],
)
def test_a_slope_exists_where_the_classes_overlap(odds, labels, exists):
    y = np.array(labels)
    found = value("calibration_slope", y, sure(odds), np.ones(4))
    assert np.isfinite(found) == exists
    # Weights of 0 count as absence.
    y, p = np.r_[y, 0, 1], sure([*odds, 9, -9])
    again = value("calibration_slope", y, p, np.array([1.0, 1, 1, 1, 0, 0]))
    assert again == pytest.approx(found, abs=1e-9, nan_ok=True)


def test_recalibration_arrives_from_anywhere():
    y = np.array([0, 1, 0, 1, 1, 0, 1])
    wild = sure([-700, 500, 30, -36, 2, 700, 0.1])
    for name in ("calibration_slope", "calibration_intercept"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.isfinite(value(name, y, wild, np.ones(7))), name
    # All but certain and almost always wrong: a long way for Newton.
    y = np.array([0] * 50 + [1])
    p = np.r_[np.repeat([[1e-12, 1 - 1e-12]], 50, 0), [[1 - 1e-12, 1e-12]]]
    a = value("calibration_intercept", y, p, np.ones(51))
    assert a < -20
    odds = np.log(p[:, 1] / p[:, 0])
    assert sure(odds + a)[:, 1].sum() == pytest.approx(1, rel=1e-6)


def test_three_classes_have_no_recalibration():
    y, p, _ = cohort(0, classes=3)
    for name in ("calibration_slope", "calibration_intercept"):
        assert np.isnan(value(name, y, p, np.ones(len(y))))


# --- Comparisons ----------------------------------------------------------------------------------


def test_the_p_value_of_a_difference_by_hand():
    y, p, patients = cohort(4)
    other = cohort(9)[1]
    result = bootstrap(
        y.tolist(),
        {"a": p, "b": other},
        patients.tolist(),
        pairs=[("a", "b"), ("b", "a"), ("a", "a")],
    )
    assert all(e.p is None for e in result["a"].values())
    assert all(e.p == 1 for e in result["a - a"].values())
    for name, found in result["a - b"].items():
        assert found.p == result["b - a"][name].p
        # The interval and the p-value say the same.
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0), name
    assert result["a - b"]["auroc"].p == pytest.approx(2 / 1001)
    nothing = bootstrap([1, 1], {"a": p[:2], "b": p[2:4]}, [0, 1], pairs=[("a", "b")])
    assert np.isnan(nothing["a - b"]["auroc"].p)


@given(st.lists(st.floats(0, 1) | st.just(float("nan")), max_size=8))
def test_holm_is_the_step_down_procedure(p_values):
    adjusted = holm(p_values)
    known = sorted(p for p in p_values if not np.isnan(p))
    for level in (0.01, 0.05, 0.3):
        # Reject in ascending order until one does not fall below its own level.
        rejected = 0
        while rejected < len(known) and known[rejected] * (len(known) - rejected) <= level:
            rejected += 1
        assert sum(a <= level for a in adjusted) == rejected
    for p, a in zip(p_values, adjusted, strict=True):
        assert np.isnan(p) == np.isnan(a) and not a < p and not a > 1


def test_holm_by_hand():
    nan = float("nan")
    assert holm([0.04, nan, 0.01, 0.03]) == [0.06, pytest.approx(nan, nan_ok=True), 0.03, 0.06]
    assert holm([]) == []


def pairwise_components(scores, y):
    """DeLong's structural components from all pairs."""
    a, b = scores[y == 1], scores[y == 0]
    wins = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    return wins.mean(), wins.mean(1), wins.mean(0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_delong_on_one_visit_each(seed, ties):
    y, p, _ = cohort(seed, n=90, ties=ties)
    first, second = p[:, 1], cohort(seed + 50, n=90, ties=ties)[1][:, 1]
    (a, v1, v0), (b, u1, u0) = pairwise_components(first, y), pairwise_components(second, y)
    covariance = np.cov(v1, u1) / len(v1) + np.cov(v0, u0) / len(v0)
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    found = delong(y.tolist(), first, second, range(90))
    assert found.value == pytest.approx(a - b, abs=1e-12)
    assert found.low == pytest.approx(a - b - norm.ppf(0.975) * error, abs=1e-12)
    assert found.p == pytest.approx(2 * norm.sf(abs(a - b) / error), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_delong_on_several_visits_is_obuchowskis(seed):
    y, p, patients = cohort(seed, n=120)
    first, second = p[:, 1], cohort(seed + 50, n=120)[1][:, 1]

    def sums(scores):
        area, v1, v0 = pairwise_components(scores, y)
        one, zero = patients[y == 1], patients[y == 0]
        both = [((v1[one == c] - area).sum(), (v0[zero == c] - area).sum()) for c in set(patients)]
        return area, np.array(both)

    (a, s), (b, t) = sums(first), sums(second)
    m, n = (y == 1).sum(), (y == 0).sum()
    clusters = len(set(patients))
    with1, with0 = len(set(patients[y == 1])), len(set(patients[y == 0]))

    def covariance(x, z):
        s10 = with1 / ((with1 - 1) * m) * (x[:, 0] @ z[:, 0])
        s01 = with0 / ((with0 - 1) * n) * (x[:, 1] @ z[:, 1])
        s11 = clusters / (clusters - 1) * (x[:, 0] @ z[:, 1] + x[:, 1] @ z[:, 0])
        return s10 / m + s01 / n + s11 / (m * n)

    error = np.sqrt(covariance(s, s) + covariance(t, t) - 2 * covariance(s, t))
    one = np.ones(120)
    found = delong(y.tolist(), first, second, patients.tolist(), weights=one)
    assert found.value == pytest.approx(a - b, abs=1e-12)
    assert (found.high - found.low) / 2 / norm.ppf(0.975) == pytest.approx(error, rel=1e-9)
    ours = delong(y.tolist(), first, second, patients.tolist())
    w = patient_weights(patients.tolist())
    assert ours.value == pytest.approx(
        value("auroc", y, np.stack([1 - first, first], 1), w)
        - value("auroc", y, np.stack([1 - second, second], 1), w),
        abs=1e-12,
    )


def test_delong_is_not_fooled_by_repeated_visits():
    y, p, _ = cohort(1, n=60)
    first, second = p[:, 1], cohort(51, n=60)[1][:, 1]
    once = delong(y.tolist(), first, second, range(60))
    five = np.repeat(np.arange(60), 5)
    many = delong(y[five].tolist(), first[five], second[five], five.tolist())
    for part in ("value", "low", "high", "p"):
        assert getattr(many, part) == pytest.approx(getattr(once, part), abs=1e-12)
    # It agrees with the bootstrap.
    both = {"a": p, "b": np.stack([1 - second, second], 1)}
    drawn = bootstrap(y.tolist(), both, range(60), pairs=[("a", "b")], metrics=["auroc"])
    assert once.low == pytest.approx(drawn["a - b"]["auroc"].low, abs=0.02)


def test_delong_without_a_difference_or_a_class():
    y, p, _ = cohort(2, n=50)
    same = delong(y.tolist(), p[:, 1], 3 * p[:, 1], range(50))
    assert same == Estimate(0.0, 0.0, 0.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nobody = delong([1] * 50, p[:, 1], p[:, 0], range(50))
        single = delong([0, 1], np.array([0.1, 0.9]), np.array([0.9, 0.1]), range(2))
    assert np.isnan([nobody.value, nobody.p, single.p]).all()


def visits(generator, patients=80, distance=1.0):
    """Patients with one to three visits, whose scores have half of their variance in common."""
    of = np.repeat(np.arange(patients), generator.integers(1, 4, patients))
    y = generator.integers(2, size=patients)[of]

    def score():
        common = generator.normal(size=patients)[of]
        return distance * y + np.sqrt(0.5) * (common + generator.normal(size=len(of)))

    return y, score, of


def test_intervals_cover_the_truth():
    """Binormal scores of log-odds d * s - d^2 / 2 are calibrated; AUROC is Phi(d / sqrt(2))."""
    generator, distance = np.random.default_rng(7), 1.0
    grid = np.linspace(-8, 9, 20001)
    density = np.stack([norm.pdf(grid), norm.pdf(grid, distance)], 1) / 2
    positive = sure(distance * grid - distance**2 / 2)[:, 1]
    error = (density[:, 0] * positive**2 + density[:, 1] * (1 - positive) ** 2).sum()
    truth = {
        "auroc": norm.cdf(distance / np.sqrt(2)),
        "brier": error * (grid[1] - grid[0]),
    }
    covered = dict.fromkeys(truth, 0)
    for seed in range(200):
        y, score, of = visits(generator)
        p = sure(distance * score() - distance**2 / 2)
        found = bootstrap(
            y.tolist(), {"m": p}, of.tolist(), metrics=list(truth), seed=seed, resamples=400
        )["m"]
        for name, number in truth.items():
            covered[name] += found[name].low <= number <= found[name].high
    for name, count in covered.items():
        # 95 % of 200, less and more by three standard errors.
        assert 181 <= count <= 199, (name, count)


def test_equal_methods_differ_significantly_as_often_as_they_should():
    generator = np.random.default_rng(3)
    found, naive, drawn = 0, 0, 0
    for seed in range(200):
        y, score, of = visits(generator)
        first, second = score(), score()
        found += delong(y.tolist(), first, second, of.tolist()).p < 0.05
        naive += delong(y.tolist(), first, second, range(len(y)), weights=np.ones(len(y))).p < 0.05
        both = {"a": sure(first), "b": sure(second)}
        drawn += (
            bootstrap(
                y.tolist(),
                both,
                of.tolist(),
                pairs=[("a", "b")],
                metrics=["auroc"],
                seed=seed,
                resamples=200,
            )["a - b"]["auroc"].p
            < 0.05
        )
    assert 2 <= found <= 19 and 2 <= drawn <= 19, (found, drawn)
    assert naive > found  # visits taken for patients


# --- Reliability and selection --------------------------------------------------------------------


def test_reliability_by_hand():
    p = sure(np.log([0.1 / 0.9, 0.15 / 0.85, 0.9 / 0.1, 0.95 / 0.05]))
    p = np.vstack([p, [0.0, 1.0]])
    y = np.array([0, 1, 1, 1, 0])
    low, *between, high = reliability(y, p, np.array([1.0, 3, 1, 1, 2]), bins=5)
    assert (low.left, low.right, high.right, low.records, high.records) == (0, 0.2, 1, 2, 3)
    assert low.probability == pytest.approx((0.1 + 3 * 0.15) / 4)
    assert (low.observed, high.observed) == (0.75, 0.5)
    assert all(b.records == 0 and np.isnan([b.observed, b.low, b.high]).all() for b in between)
    # Wilson's interval of 3 out of 4, from its tables.
    assert (low.low, low.high) == (pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4))


def test_reliability_counts_patients_and_agrees_with_the_calibration_error():
    y, p, patients = cohort(0, classes=3)
    w = patient_weights(patients.tolist())
    bins = reliability(y, p, w)
    which = np.minimum((p.max(1) * 10).astype(int), 9)
    gap = [
        w[which == b].sum() * abs(found.probability - found.observed)
        for b, found in enumerate(bins)
        if found.records
    ]
    assert sum(gap) / w.sum() == pytest.approx(value("ece", y, p, w), abs=1e-12)
    once = reliability(y, p, np.ones(len(y)))
    five = np.repeat(np.arange(len(y)), 5)
    many = reliability(y[five], p[five], np.full(len(five), 0.2))
    for a, b in zip(once, many, strict=True):
        assert b.records == 5 * a.records
        assert (b.low, b.high) == pytest.approx((a.low, a.high), nan_ok=True)


def test_selection_quality_by_hand():
    labels = np.array([0, 0, 1, 1, 1])
    before = np.array([0, 0, 0, 0, 1])
    after = np.array([0, 1, 1, 0, 1])
    candidates = np.array([[1, 1], [1, 0], [1, 1], [1, 1], [0, 0]], dtype=bool)
    admitted = np.array([[1, 0], [1, 0], [1, 1], [0, 0], [0, 0]], dtype=bool)
    points_to = np.array([[0, 1], [1, -1], [1, -1], [0, 1], [-1, -1]])
    found = selection_quality(
        labels, before, after, candidates, admitted, points_to, list("abcde"), resamples=200
    )
    values = {name: estimate.value for name, estimate in found.items()}
    assert values == pytest.approx(
        {
            "admitted": (0.5 + 1 + 1 + 0) / 4,
            "harmed": 1 / 3,
            "rescued": 1 / 2,
            "trusted_right": (1 + 0 + 1) / 3,
            "rejected_right": (0 + 0.5) / 2,
        }
    )
    assert all(e.low <= e.value <= e.high for e in found.values())
    nothing = np.zeros((5, 2), dtype=bool)
    empty = selection_quality(
        labels, before, before, nothing, nothing, points_to, list("abcde"), resamples=50
    )
    names = ("admitted", "trusted_right", "rejected_right")
    assert np.isnan([empty[name].value for name in names]).all()
    assert empty["harmed"].value == empty["rescued"].value == 0


# --- Numbers --------------------------------------------------------------------------------------


def numbers(n=200, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.uniform(-3, 3, n).round(1)
    truth[:20] = 0.0
    return truth, truth + rng.normal(0, 1, n), rng.integers(0, 4, n).astype(float)


def test_metrics_of_numbers_are_the_usual_ones():
    y, x, w = numbers()
    some = w > 0

    def sides(mask, *both):
        return [(v[mask]) for v in both]

    nonzero = some & (y != 0)
    expected = {
        "mae": reference.mean_absolute_error(y, x, sample_weight=w),
        "rmse": reference.root_mean_squared_error(y, x, sample_weight=w),
        "r2": reference.r2_score(y, x, sample_weight=w),
        "acc7": reference.accuracy_score(
            *(np.round(v.clip(-3, 3)).astype(int) for v in (y, x)), sample_weight=w
        ),
        "acc2_nonnegative": reference.accuracy_score(y >= 0, x >= 0, sample_weight=w),
        "f1_nonnegative": reference.f1_score(y >= 0, x >= 0, average="weighted", sample_weight=w),
        "acc2_nonzero": reference.accuracy_score(
            *sides(nonzero, y > 0, x > 0), sample_weight=w[nonzero]
        ),
        "f1_nonzero": reference.f1_score(
            *sides(nonzero, y > 0, x > 0), average="weighted", sample_weight=w[nonzero]
        ),
        "pearson": stats.pearsonr(np.repeat(y, w.astype(int)), np.repeat(x, w.astype(int)))[0],
    }
    assert set(expected) == set(NUMBER_METRICS)
    for name, value_ in expected.items():
        found = NUMBER_METRICS[name](y, x, w[None])
        assert found.shape == (1,) and float(found[0]) == pytest.approx(value_), name


def test_metrics_of_constant_numbers_are_not_defined():
    y = np.ones(4)
    for name in ("pearson", "r2"):
        assert np.isnan(NUMBER_METRICS[name](y, np.array([1.0, 2, 1, 2]), np.ones((1, 4)))).all()
    sign = NUMBER_METRICS["acc2_nonzero"](np.zeros(3), np.ones(3), np.ones((1, 3)))
    assert np.isnan(sign).all()


def test_only_metrics_that_mean_something_on_the_scale():
    assert number_metrics(-3.0, 3.0) == tuple(NUMBER_METRICS)
    assert number_metrics(0.0, 100.0) == ("mae", "rmse", "pearson", "r2")
    assert "acc7" not in number_metrics(-1.0, 1.0) and "acc2_nonzero" in number_metrics(-1.0, 1.0)


def test_numbers_are_resampled_by_patient_and_compared_in_pairs():
    y, x, _ = numbers(120)
    ids = [i // 2 for i in range(120)]
    found = bootstrap_numbers(y, {"a": x, "b": x + 1.0}, ids, pairs=[("a", "b")], resamples=200)
    own = found["a"]["mae"]
    assert own.low < own.value < own.high
    assert own.value == pytest.approx(np.abs(x - y).mean())
    difference = found["a - b"]["mae"]
    assert difference.value == pytest.approx(own.value - found["b"]["mae"].value)
    assert difference.high < 0 and difference.p == pytest.approx(2 / 201)
    assert found["a - b"]["pearson"].value == pytest.approx(0, abs=1e-12)
