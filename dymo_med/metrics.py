"""How good probabilities and numbers are: weighted metrics, and intervals that resample patients.

Every metric here takes rows of weights `(R, n)` and returns R values, so that the point estimate
(one row) and a thousand bootstrap resamples (a thousand rows) are one code path. scikit-learn
has the same metrics for one row; the tests hold these to its numbers.

Records of one patient share that patient's weight: somebody scanned five times counts once.
A metric that is not defined (only one class, no record) is NaN, never an exception.

Two methods are compared on the same patients: by the bootstrap for any metric, by `delong` for the
AUROC. Of several comparisons `holm` says which hold together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

# Weights of one pass over resamples, at most: 2 MB per array, which stays in a processor's cache.
_MOST_WEIGHTS = 250_000
_BINS = 10
# Less than this between two methods is rounding.
_SAME = 1e-9

# 97.5th percentile of the normal distribution.
_Z = 1.959963984540054

# Newton's method: a step so short that none is needed after it (the error left is about its
# square), the longest step, and how many it may take.
_LAST_STEP = 1e-6
_LONGEST_STEP = 5.0
_MOST_STEPS = 100


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval.

    Attributes:
        value: On the records as they are.
        low: 2.5th percentile over resamples; NaN where no resample defines the metric.
        high: 97.5th percentile.
        p: Two-sided p-value of a difference against 0; None where there is nothing to compare.
    """

    value: float
    low: float
    high: float
    p: float | None = None


def patient_weights(patient_ids: Sequence[Hashable]) -> Floats:
    """Return one weight per record: 1 / the number of records of its patient.

    Args:
        patient_ids: n ids.

    Returns:
        `(n,)`; sums to the number of patients.

    Example:
        >>> patient_weights(["a", "b", "b"]).tolist()
        [1.0, 0.5, 0.5]
    """
    owner, count = _owners(patient_ids)
    return 1.0 / np.bincount(owner, minlength=count)[owner]


def accuracy(labels: Integers, probabilities: Floats, weights: Floats) -> Floats:
    """Return the weighted share of right answers.

    Args:
        labels: `(n,)` class indices.
        probabilities: `(n, K)`; the answer is the most probable class, the first one on a tie.
        weights: `(R, n)`, not negative.

    Returns:
        `(R,)`.
    """
    right = (probabilities.argmax(1) == labels).astype(np.float64)
    return _mean(right, weights)


def balanced_accuracy(labels: Integers, probabilities: Floats, weights: Floats) -> Floats:
    """Return the mean over classes of the share of their records that were recognised.

    Args:
        labels: `(n,)`.
        probabilities: `(n, K)`.
        weights: `(R, n)`.

    Returns:
        `(R,)`, over the classes that occur; NaN where fewer than two do.
    """
    right = (probabilities.argmax(1) == labels).astype(np.float64)
    recalls = [
        _mean(right, weights * (labels == k)[None, :]) for k in range(probabilities.shape[1])
    ]
    return _over_classes(recalls)


def f1(labels: Integers, probabilities: Floats, weights: Floats) -> Floats:
    """Return the harmonic mean of precision and recall.

    Args:
        labels: `(n,)`.
        probabilities: `(n, K)`. Two classes: of the last one. More: averaged over the classes that
            occur, each counting the same.
        weights: `(R, n)`.

    Returns:
        `(R,)`; NaN where the positive class of two, or all but one of more, do not occur.
    """
    classes = probabilities.shape[1]
    answer = probabilities.argmax(1)
    scores = []
    for k in [1] if classes == 2 else range(classes):
        said, true = (answer == k).astype(np.float64), (labels == k).astype(np.float64)
        occurs = weights @ true
        with np.errstate(invalid="ignore", divide="ignore"):
            score = 2 * (weights @ (said * true)) / (weights @ said + occurs)
        scores.append(np.where(occurs > 0, score, np.nan))
    return scores[0] if classes == 2 else _over_classes(scores)


def weighted_f1(labels: Integers, probabilities: Floats, weights: Floats) -> Floats:
    """Return the F1 of every class, averaged by how often the class occurs.

    Args:
        labels: `(n,)`.
        probabilities: `(n, K)`.
        weights: `(R, n)`.

    Returns:
        `(R,)`; NaN where there is no record.
    """
    return _weighted_f1(labels, probabilities.argmax(1), probabilities.shape[1], weights)


def _weighted_f1(labels: Integers, answer: Integers, classes: int, weights: Floats) -> Floats:
    """Return the F1 of classes averaged by how often they occur; of given answers `(n,)`."""
    total = np.zeros(len(weights))
    with np.errstate(invalid="ignore", divide="ignore"):
        for k in range(classes):
            said, true = (answer == k).astype(np.float64), (labels == k).astype(np.float64)
            occurs = weights @ true
            score = 2 * (weights @ (said * true)) / (weights @ said + occurs)
            total += np.where(occurs > 0, occurs * score, 0.0)
        return np.asarray(total / weights.sum(1))


def auroc(labels: Integers, probabilities: Floats, weights: Floats) -> Floats:
    """Return the area under the receiver operating characteristic curve.

    Args:
        labels: `(n,)`.
        probabilities: `(n, K)`. Two classes: the last is positive. More: one against the rest,
            averaged over the classes that occur.
        weights: `(R, n)`.

    Returns:
        `(R,)`; NaN where fewer than two classes occur.
    """
    return _one_against_rest(labels, probabilities, weights, _rank_auroc)


def auprc(labels: Integers, probabilities: Floats, weights: Floats) -> Floats:
    """Return the area under the precision-recall curve, as average precision.

    Args:
        labels: `(n,)`.
        probabilities: `(n, K)`; classes as in `auroc`.
        weights: `(R, n)`.

    Returns:
        `(R,)`; NaN where fewer than two classes occur.
    """
    return _one_against_rest(labels, probabilities, weights, _average_precision)


def brier(labels: Integers, probabilities: Floats, weights: Floats) -> Floats:
    """Return the mean squared error of the probabilities; 0 is perfect.

    Args:
        labels: `(n,)`.
        probabilities: `(n, K)`. Two classes: the error of the positive one, so in [0, 1]. More:
            summed over classes, so in [0, 2].
        weights: `(R, n)`.

    Returns:
        `(R,)`.
    """
    truth = np.eye(probabilities.shape[1])[labels]
    error = np.square(probabilities - truth)
    return _mean(error[:, -1] if error.shape[1] == 2 else error.sum(1), weights)


def log_loss(labels: Integers, probabilities: Floats, weights: Floats) -> Floats:
    """Return the mean negative log probability of the true class, in nats.

    Args:
        labels: `(n,)`.
        probabilities: `(n, K)`; clipped to the smallest step of a float64.
        weights: `(R, n)`.

    Returns:
        `(R,)`.
    """
    true = probabilities[np.arange(len(labels)), labels]
    return _mean(-np.log(true.clip(np.finfo(np.float64).eps, 1.0)), weights)


def ece(labels: Integers, probabilities: Floats, weights: Floats) -> Floats:
    """Return the expected calibration error of the answer's probability.

    The gap between mean probability and accuracy, in ten bins of equal width, weighted by how
    much falls in each.

    Args:
        labels: `(n,)`.
        probabilities: `(n, K)`.
        weights: `(R, n)`.

    Returns:
        `(R,)`.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 5.
    """
    right = (probabilities.argmax(1) == labels).astype(np.float64)
    confidence = probabilities.max(1)
    bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    gap = (right - confidence)[:, None] * np.eye(_BINS)[bins]  # (n, bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.abs(weights @ gap).sum(1) / weights.sum(1))


def calibration_slope(labels: Integers, probabilities: Floats, weights: Floats) -> Floats:
    """Return the slope of the logistic recalibration of two classes; 1 is perfect.

    The b of log-odds(positive) = a + b * log-odds of the probability, a and b by maximum
    likelihood. Below 1 the probabilities are too extreme, above 1 too timid.

    Args:
        labels: `(n,)`.
        probabilities: `(n, K)`; clipped as in `log_loss`.
        weights: `(R, n)`.

    Returns:
        `(R,)`; NaN for more than two classes, and where no finite slope exists: one class, or
        probabilities that divide the classes without overlap.

    References:
        Cox, Two further applications of a model for binary regression, Biometrika 45, 1958; Van
        Calster et al., A calibration hierarchy for risk models was defined, Journal of Clinical
        Epidemiology 74, 2016.
    """
    result = np.full(len(weights), np.nan)
    if probabilities.shape[1] != 2:
        return result
    odds = _log_odds(probabilities)
    positive = labels == 1
    there = weights > 0
    (low0, high0), (low1, high1) = (
        (
            np.where(there & of, odds, np.inf).min(1, initial=np.inf),
            np.where(there & of, odds, -np.inf).max(1, initial=-np.inf),
        )
        for of in (~positive, positive)
    )
    # Exactly where the classes overlap the likelihood has a maximum (Albert and Anderson 1984).
    defined = (low0 < high1) & (low1 < high0)
    if not defined.any():
        return result
    scale = odds.std()
    columns = np.stack([np.ones_like(odds), (odds - odds.mean()) / scale], 1)
    # Resamples start from all records: where some of them overlap, all do.
    found = _fit_logistic(positive, np.zeros_like(odds), columns, weights[defined])
    result[defined] = found[:, 1] / scale
    return result


def calibration_intercept(labels: Integers, probabilities: Floats, weights: Floats) -> Floats:
    """Return the calibration in the large of two classes; 0 is perfect.

    The a of log-odds(positive) = a + log-odds of the probability, by maximum likelihood. Above 0
    the positive class is more frequent than the probabilities say.

    Args:
        labels: `(n,)`.
        probabilities: `(n, K)`; clipped as in `log_loss`.
        weights: `(R, n)`.

    Returns:
        `(R,)`; NaN for more than two classes, and where one class occurs.

    References:
        Van Calster et al., Calibration: the Achilles heel of predictive analytics, BMC Medicine
        17:230, 2019.
    """
    result = np.full(len(weights), np.nan)
    if probabilities.shape[1] != 2:
        return result
    positive = labels == 1
    defined = (weights @ positive > 0) & (weights @ ~positive > 0)
    if defined.any():
        columns = np.ones((len(labels), 1))
        odds = _log_odds(probabilities)
        result[defined] = _fit_logistic(positive, odds, columns, weights[defined])[:, 0]
    return result


METRICS: Mapping[str, Callable[[Integers, Floats, Floats], Floats]] = {
    "auroc": auroc,
    "auprc": auprc,
    "balanced_accuracy": balanced_accuracy,
    "accuracy": accuracy,
    "f1": f1,
    "weighted_f1": weighted_f1,
    "brier": brier,
    "log_loss": log_loss,
    "ece": ece,
    "calibration_slope": calibration_slope,
    "calibration_intercept": calibration_intercept,
}


# --- Numbers --------------------------------------------------------------------------------------


def mae(truth: Floats, values: Floats, weights: Floats) -> Floats:
    """Return the mean absolute error, `(R,)`.

    Args:
        truth: `(n,)`.
        values: `(n,)`, what was answered.
        weights: `(R, n)`, not negative.
    """
    return _mean(np.abs(values - truth), weights)


def rmse(truth: Floats, values: Floats, weights: Floats) -> Floats:
    """Return the square root of the mean squared error, `(R,)`; arguments as of `mae`."""
    return np.asarray(np.sqrt(_mean(np.square(values - truth), weights)))


def pearson(truth: Floats, values: Floats, weights: Floats) -> Floats:
    """Return the correlation of answer and truth, `(R,)`; arguments as of `mae`.

    NaN where either does not vary.
    """
    x, y = _centered(truth, weights), _centered(values, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        both = np.einsum("rn,rn,rn->r", weights, x, y)
        sizes = np.einsum("rn,rn->r", weights, x * x) * np.einsum("rn,rn->r", weights, y * y)
        return np.where(sizes > 1e-24, both / np.sqrt(sizes), np.nan)


def r2(truth: Floats, values: Floats, weights: Floats) -> Floats:
    """Return the share of the truth's variance that is explained, `(R,)`; at most 1.

    Arguments as of `mae`. 0 is what the mean of these very records would get; NaN where the truth
    does not vary.
    """
    whole = np.einsum("rn,rn->r", weights, np.square(_centered(truth, weights)))
    left = weights @ np.square(values - truth)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 1e-24, 1 - left / whole, np.nan)


def acc7(truth: Floats, values: Floats, weights: Floats) -> Floats:
    """Return the share of answers that are right once rounded, of a scale from -3 to 3, `(R,)`.

    Both are clipped to the scale and rounded to the nearest whole number, halves to even, as the
    published codes do. Arguments as of `mae`.
    """
    rounded = [np.round(np.clip(x, -3, 3)) for x in (truth, values)]
    return _mean((rounded[0] == rounded[1]).astype(np.float64), weights)


def acc2_nonnegative(truth: Floats, values: Floats, weights: Floats) -> Floats:
    """Return the share of answers on the right side of 0, where 0 counts as positive, `(R,)`.

    The convention "non-negative against negative". Arguments as of `mae`.
    """
    return _mean(((truth >= 0) == (values >= 0)).astype(np.float64), weights)


def acc2_nonzero(truth: Floats, values: Floats, weights: Floats) -> Floats:
    """Return the share of answers on the right side of 0, of records whose truth is not 0, `(R,)`.

    The convention "positive against negative". Arguments as of `mae`.
    """
    right = ((truth > 0) == (values > 0)).astype(np.float64)
    return _mean(right, weights * (truth != 0))


def f1_nonnegative(truth: Floats, values: Floats, weights: Floats) -> Floats:
    """Return the weighted F1 of the two sides of `acc2_nonnegative`, `(R,)`."""
    sides = [(x >= 0).astype(np.int64) for x in (truth, values)]
    return _weighted_f1(sides[0], sides[1], 2, weights)


def f1_nonzero(truth: Floats, values: Floats, weights: Floats) -> Floats:
    """Return the weighted F1 of the two sides of `acc2_nonzero`, `(R,)`."""
    sides = [(x > 0).astype(np.int64) for x in (truth, values)]
    return _weighted_f1(sides[0], sides[1], 2, weights * (truth != 0))


def _centered(x: Floats, weights: Floats) -> Floats:
    """Return values minus their weighted mean, `(R, n)`."""
    return np.asarray(x[None, :] - _mean(x, weights)[:, None])


NUMBER_METRICS: Mapping[str, Callable[[Floats, Floats, Floats], Floats]] = {
    "mae": mae,
    "rmse": rmse,
    "pearson": pearson,
    "r2": r2,
    "acc7": acc7,
    "acc2_nonnegative": acc2_nonnegative,
    "acc2_nonzero": acc2_nonzero,
    "f1_nonnegative": f1_nonnegative,
    "f1_nonzero": f1_nonzero,
}


def number_metrics(low: float, high: float) -> tuple[str, ...]:
    """Return the metrics that mean something on a scale.

    `acc7` needs one from -3 to 3, those that are about the sign one with 0 within it.
    """
    about_sign = ("acc2_nonnegative", "acc2_nonzero", "f1_nonnegative", "f1_nonzero")
    left_out = {"acc7"} if (low, high) != (-3.0, 3.0) else set()
    left_out |= set() if low < 0 < high else set(about_sign)
    return tuple(name for name in NUMBER_METRICS if name not in left_out)


def bootstrap_numbers(
    truth: Floats,
    values: Mapping[str, Floats],
    patient_ids: Sequence[Hashable],
    *,
    pairs: Sequence[tuple[str, str]] = (),
    metrics: Sequence[str] = tuple(NUMBER_METRICS),
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, dict[str, Estimate]]:
    """Return every metric of every method's numbers, as `bootstrap` does of probabilities.

    Args:
        truth: `(n,)`.
        values: Per method `(n,)`.
        patient_ids: n ids.
        pairs: Differences to estimate besides.
        metrics: Names out of `NUMBER_METRICS`.
        seed: Seed of the draws.
        resamples: Number of draws.

    Example:
        >>> y = np.array([0.0, 1.0, 2.0])
        >>> bootstrap_numbers(y, {"m": y + 1}, ["a", "b", "c"], resamples=10)["m"]["mae"].value
        1.0
    """
    chosen = {name: NUMBER_METRICS[name] for name in metrics}
    return resampled(truth, values, patient_ids, pairs, chosen, seed, resamples)


# --- Resampling -----------------------------------------------------------------------------------


def bootstrap(
    labels: Sequence[int],
    probabilities: Mapping[str, Floats],
    patient_ids: Sequence[Hashable],
    *,
    pairs: Sequence[tuple[str, str]] = (),
    metrics: Sequence[str] = tuple(METRICS),
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, dict[str, Estimate]]:
    """Return every metric of every method, with 95 % percentile intervals.

    Patients are drawn with replacement, all their records together, and each draw is used for
    all methods: the difference of two methods is therefore a paired one. Differences have a
    p-value, the level at which the percentile interval just reaches 0:
    `min(1, 2 * (1 + min(#(d <= 0), #(d >= 0))) / (1 + R))` over the R resamples d that define the
    difference. The ones keep it from being 0; with 1000 resamples 0.002 is the least.

    The calibration error of a resample is larger than that of the records themselves, because
    ties between drawn copies add noise to its bins: its interval can lie above the estimate and
    should be read as an upper bound.

    Args:
        labels: n class indices.
        probabilities: Per method `(n, K)`, rows as in `labels`.
        patient_ids: n ids.
        pairs: Differences to estimate besides, as (method, minus this method).
        metrics: Names out of `METRICS`.
        seed: Seed of the draws.
        resamples: Number of draws.

    Returns:
        Estimates by method (a difference is called ``a - b``) and metric.

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, sections 13.3 and 15.4;
        Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 4.2 (the ones).

    Example:
        >>> p = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> bootstrap([0, 1, 0], {"m": p}, ["a", "b", "c"], resamples=10)["m"]["auroc"].value
        1.0
    """
    y = np.asarray(labels, dtype=np.int64)
    chosen = {name: METRICS[name] for name in metrics}
    return resampled(y, probabilities, patient_ids, pairs, chosen, seed, resamples)


def resampled(
    y: NDArray[Any],
    answers: Mapping[str, Floats],
    patient_ids: Sequence[Hashable],
    pairs: Sequence[tuple[str, str]],
    metrics: Mapping[str, Callable[[Any, Floats, Floats], Floats]],
    seed: int,
    resamples: int,
) -> dict[str, dict[str, Estimate]]:
    """Return metrics and paired differences with intervals over resamples of patients.

    Args:
        y: What is true of n records, a row each.
        answers: Per method, a row for each record.
        patient_ids: n ids.
        pairs: Differences to estimate besides, as in `bootstrap`.
        metrics: By name; each takes `y`, a method's answers and weights `(R, n)`.
        seed: Seed of the draws.
        resamples: Number of draws.
    """
    owner, count = _owners(patient_ids)
    own = patient_weights(patient_ids)
    whole = {
        (method, metric): metrics[metric](y, p, own[None, :])
        for method, p in answers.items()
        for metric in metrics
    }
    draws: dict[tuple[str, str], list[Floats]] = {key: [] for key in whole}
    generator = np.random.default_rng(seed)
    chunk = max(1, _MOST_WEIGHTS // max(1, len(y)))
    for start in range(0, resamples if count else 0, chunk):
        rows = min(chunk, resamples - start)
        times = generator.multinomial(count, np.full(count, 1 / count), size=rows)  # (R, patients)
        weights = times[:, owner] * own  # (R, n)
        for method, p in answers.items():
            for metric in metrics:
                draws[method, metric].append(metrics[metric](y, p, weights))
    drawn = {key: np.concatenate([np.empty(0), *parts]) for key, parts in draws.items()}
    result = {
        method: {
            metric: _estimate(whole[method, metric], drawn[method, metric]) for metric in metrics
        }
        for method in answers
    }
    for a, b in pairs:
        result[f"{a} - {b}"] = {
            metric: _difference(
                whole[a, metric] - whole[b, metric], drawn[a, metric] - drawn[b, metric]
            )
            for metric in metrics
        }
    return result


def bootstrap_means(
    values: Floats, patient_ids: Sequence[Hashable], *, seed: int = 0, resamples: int = 1000
) -> list[Estimate]:
    """Return the mean over patients of every column, with 95 % percentile intervals.

    A patient's records are averaged first, those that have the value; then every patient counts
    once. Patients are drawn with replacement, the same ones for all columns.

    Args:
        values: `(n, J)`, one row per record; NaN where a record does not have the value.
        patient_ids: n ids.
        seed: Seed of the draws.
        resamples: Number of draws.

    Returns:
        J estimates; NaN where no record has the value.

    Example:
        >>> table = np.array([[1.0], [3.0], [4.0], [np.nan]])
        >>> bootstrap_means(table, ["a", "a", "b", "c"], resamples=10)[0].value
        3.0
    """
    owner, count = _owners(patient_ids)
    defined = ~np.isnan(values)
    total, number = np.zeros((2, count, values.shape[1]))
    np.add.at(total, owner, np.where(defined, values, 0.0))
    np.add.at(number, owner, defined)
    own = total / np.maximum(number, 1)  # (patients, J)
    has = (number > 0).astype(np.float64)
    generator = np.random.default_rng(seed)
    chunk = max(1, _MOST_WEIGHTS // max(1, count))
    drawn = [np.empty((0, values.shape[1]))]
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = own.sum(0) / has.sum(0)
        for start in range(0, resamples if count else 0, chunk):
            rows = min(chunk, resamples - start)
            times = generator.multinomial(count, np.full(count, 1 / count), size=rows)
            drawn.append((times @ own) / (times @ has))  # (R, J)
    table = np.concatenate(drawn)
    return [_estimate(whole[[j]], table[:, j]) for j in range(values.shape[1])]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that their family errs with at most the level of one test.

    Args:
        p_values: One per comparison; NaN = not defined, and not counted.

    Returns:
        Adjusted p-values in the same order, at most 1; NaN where it was.

    References:
        Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of
        Statistics 6, 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    left = np.arange(len(order), 0, -1)
    adjusted = p.copy()
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * left), 1.0)
    return [float(value) for value in adjusted]


def delong(
    labels: Sequence[int],
    first: Floats,
    second: Floats,
    patient_ids: Sequence[Hashable],
    *,
    weights: Floats | None = None,
) -> Estimate:
    """Return the difference of two methods' AUROC on the same records, by a large-sample test.

    Structural components are summed per patient before they are squared, so that several visits of
    one patient are not taken for several patients. With one record per patient this is the test
    of DeLong et al., with weights of 1 that of Obuchowski.

    Args:
        labels: n labels, 1 = positive, 0 = negative.
        first: `(n,)` scores of one method, higher = positive.
        second: `(n,)` scores of the other.
        patient_ids: n ids.
        weights: `(n,)`; None = `patient_weights`, by which the difference is that of `auroc`.

    Returns:
        AUROC of the first minus the second, its normal 95 % interval and two-sided p-value. NaN
        where a class does not occur, or too few patients tell a variance. Methods that rank alike
        have p = 1.

    References:
        DeLong et al., Comparing the areas under two or more correlated receiver operating
        characteristic curves, Biometrics 44, 1988; Obuchowski, Nonparametric analysis of clustered
        ROC curve data, Biometrics 53, 1997.

    Example:
        >>> y, a, b = [0, 0, 1, 1], np.array([0.1, 0.4, 0.3, 0.9]), np.array([0.1, 0.2, 0.3, 0.9])
        >>> delong(y, a, b, range(4)).value
        -0.25
    """
    positive = np.asarray(labels) == 1
    owner, count = _owners(patient_ids)
    w = patient_weights(patient_ids) if weights is None else np.asarray(weights, dtype=np.float64)
    weight1, weight0 = w[positive], w[~positive]
    if not (weight1.sum() > 0 and weight0.sum() > 0):
        return Estimate(np.nan, np.nan, np.nan, np.nan)
    value, sums1, sums0 = 0.0, np.zeros(count), np.zeros(count)
    for sign, scores in ((1.0, first), (-1.0, second)):
        above = _wins(scores[positive], scores[~positive], weight0)  # per positive
        below = _wins(-scores[~positive], -scores[positive], weight1)  # per negative
        area = float(weight1 @ above / weight1.sum())
        value += sign * area
        sums1 += sign * np.bincount(
            owner[positive], weight1 * (above - area) / weight1.sum(), count
        )
        sums0 += sign * np.bincount(
            owner[~positive], weight0 * (below - area) / weight0.sum(), count
        )
    number1, number0 = len(set(owner[positive])), len(set(owner[~positive]))
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = (
            np.float64(number1) / (number1 - 1) * (sums1 @ sums1)
            + np.float64(number0) / (number0 - 1) * (sums0 @ sums0)
            + np.float64(2 * count) / (count - 1) * (sums1 @ sums0)
        )
    # Two sums that cancel leave rounding, not a variance.
    if variance <= 1e-24:
        same = abs(value) < 1e-12
        return Estimate(value, *((value, value, 1.0) if same else (np.nan,) * 3))
    error = float(np.sqrt(variance))
    p = float(2 * ndtr(-abs(value) / error))
    return Estimate(value, value - _Z * error, value + _Z * error, p)


@dataclass(frozen=True)
class ReliabilityBin:
    """Records whose probability lies in one interval.

    Attributes:
        left: Lower end of the bin.
        right: Upper end; it belongs to the next bin, except for 1.
        probability: Weighted mean probability; NaN where the bin is empty.
        observed: Weighted share that came true; NaN where the bin is empty.
        low: Lower end of the 95 % interval of `observed`.
        high: Upper end.
        records: How many records.
    """

    left: float
    right: float
    probability: float
    observed: float
    low: float
    high: float
    records: int


def reliability(
    labels: Integers, probabilities: Floats, weights: Floats, bins: int = _BINS
) -> list[ReliabilityBin]:
    """Return the reliability curve: what was said against what came true, in bins.

    The interval is Wilson's with the sum of weights in the place of the number of records. With
    `patient_weights` somebody's five visits in one bin are one observation, not five; where visits
    of one patient differ, that is cautious.

    Args:
        labels: `(n,)` class indices.
        probabilities: `(n, K)`. Two classes: the curve of the last one. More: of the answer, the
            most probable class, and whether it is right.
        weights: `(n,)`.
        bins: How many bins of equal width.

    Returns:
        All bins in ascending order.

    References:
        Wilson, Probable inference, the law of succession, and statistical inference, Journal of
        the American Statistical Association 22, 1927.
    """
    if probabilities.shape[1] == 2:
        said, true = probabilities[:, 1], labels == 1
    else:
        said, true = probabilities.max(1), probabilities.argmax(1) == labels
    which = np.minimum((said * bins).astype(np.int64), bins - 1)
    weight = np.bincount(which, weights, bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(which, weights * said, bins) / weight
        share = np.bincount(which, weights * true, bins) / weight
        centre = (share + _Z**2 / (2 * weight)) / (1 + _Z**2 / weight)
        half = np.sqrt(share * (1 - share) / weight + (_Z / (2 * weight)) ** 2)
        half *= _Z / (1 + _Z**2 / weight)
    number = np.bincount(which, minlength=bins)
    return [
        ReliabilityBin(
            b / bins,
            (b + 1) / bins,
            float(mean[b]),
            float(share[b]),
            float(np.maximum(centre[b] - half[b], 0.0)),
            float(np.minimum(centre[b] + half[b], 1.0)),
            int(number[b]),
        )
        for b in range(bins)
    ]


def selection_quality(
    labels: Integers,
    before: Integers,
    after: Integers,
    candidates: Booleans,
    admitted: Booleans,
    points_to: Integers,
    patient_ids: Sequence[Hashable],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Estimate]:
    """Return how well recoveries were chosen, with 95 % intervals that resample patients.

    Shares are taken per record, then averaged over each patient's records, then over patients
    (see `bootstrap_means`).

    Args:
        labels: `(n,)` class indices.
        before: `(n,)` answers from measurements alone.
        after: `(n,)` answers with the recoveries that were admitted.
        candidates: `(n, M)`, True = a recovery was proposed.
        admitted: `(n, M)`, True = it was admitted; only where it is a candidate.
        points_to: `(n, M)`, the class that the recovered modality alone points to, -1 = not known.
        patient_ids: n ids.
        seed: Seed of the draws.
        resamples: Number of draws.

    Returns:
        By name: `admitted`, the share of candidates that were admitted; `harmed`, of the records
        that were right before, the share that is wrong after; `rescued`, of those that were
        wrong, the share that is right after; `trusted_right` and `rejected_right`, of the admitted
        and of the other candidates whose class is known, the share that points to the true class.
        NaN where there is nothing to take a share of.
    """
    right = before == labels
    known = candidates & (points_to >= 0)
    true = points_to == labels[:, None]

    def share(of: Booleans, among: Booleans) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((of & among).sum(1) / among.sum(1))

    shares = {
        "admitted": share(admitted, candidates),
        "harmed": np.where(right, (after != labels).astype(np.float64), np.nan),
        "rescued": np.where(right, np.nan, (after == labels).astype(np.float64)),
        "trusted_right": share(true, known & admitted),
        "rejected_right": share(true, known & ~admitted),
    }
    estimates = bootstrap_means(
        np.stack(list(shares.values()), 1), patient_ids, seed=seed, resamples=resamples
    )
    return dict(zip(shares, estimates, strict=True))


def _owners(patient_ids: Sequence[Hashable]) -> tuple[Integers, int]:
    """Return each record's patient as an integer in order of appearance, and how many there are."""
    index = {patient: i for i, patient in enumerate(dict.fromkeys(patient_ids))}
    return np.array([index[patient] for patient in patient_ids], dtype=np.int64), len(index)


def _estimate(value: Floats, drawn: Floats) -> Estimate:
    defined = drawn[~np.isnan(drawn)]
    low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan)
    return Estimate(float(value[0]), float(low), float(high))


def _difference(value: Floats, drawn: Floats) -> Estimate:
    """Return the estimate of a difference with its p-value; see `bootstrap`."""
    # Methods that answer alike on whom was drawn differ by rounding at most.
    drawn = np.where(np.abs(drawn) < _SAME, 0.0, drawn)
    defined = drawn[~np.isnan(drawn)]
    p = np.nan
    if len(defined) and not np.isnan(value[0]):
        beyond = min(np.count_nonzero(defined <= 0), np.count_nonzero(defined >= 0))
        p = min(1.0, 2 * (1 + beyond) / (1 + len(defined)))
    return replace(_estimate(value, drawn), p=p)


def _wins(scores: Floats, others: Floats, weights: Floats) -> Floats:
    """Return the weighted share of `others` below each score, equal ones counting half."""
    order = np.argsort(others, kind="stable")
    ranked = others[order]
    sums = np.concatenate([[0.0], np.cumsum(weights[order])])
    below = sums[np.searchsorted(ranked, scores, "left")]
    with_equal = sums[np.searchsorted(ranked, scores, "right")]
    return np.asarray((below + with_equal) / (2 * sums[-1]))


def _log_odds(probabilities: Floats) -> Floats:
    """Return the log-odds `(n,)` of the second of two classes."""
    logs = np.log(probabilities.clip(np.finfo(np.float64).eps, 1.0))
    return np.asarray(logs[:, 1] - logs[:, 0])


def _fit_logistic(
    positive: Booleans,
    offset: Floats,
    columns: Floats,
    weights: Floats,
) -> Floats:
    """Return maximum-likelihood coefficients of log-odds = offset + columns @ coefficients.

    Newton's method on all rows of weights at once, starting where all records alike end. Steps
    are cut to a longest one, and halved while they make the likelihood worse, so that it climbs
    from anywhere; rows that have arrived leave.

    Args:
        positive: `(n,)`.
        offset: `(n,)`.
        columns: `(n, J)`, about unit scale.
        weights: `(R, n)`, rows for which a maximum exists; then all records alike have one too.

    Returns:
        `(R, J)`; NaN where it did not arrive.
    """
    rows, size = len(weights), columns.shape[1]
    start = np.zeros(size)
    if rows > 1:
        alike = np.ones((1, len(offset)))
        start = np.nan_to_num(_fit_logistic(positive, offset, columns, alike)[0])
    result = np.full((rows, size), np.nan)
    products = (columns[:, :, None] * columns[:, None, :]).reshape(len(columns), -1)  # (n, J * J)
    ridge = 1e-12 * np.eye(size)
    weights = weights / weights.sum(1, keepdims=True)
    gained = (weights * positive) @ columns  # the part of the slope that stays the same
    sign = np.where(positive, -1.0, 1.0)
    left = np.arange(rows)
    here = np.broadcast_to(start, (rows, size)).copy()
    step = np.zeros((rows, size))
    best = np.full(rows, -np.inf)
    for _ in range(_MOST_STEPS):
        odds = offset + (here + step) @ columns.T  # (rows left, n)
        small = np.exp(-np.abs(odds))
        fitted = np.where(odds >= 0, 1.0, small) / (1.0 + small)
        loss = np.log1p(small) + np.maximum(sign * odds, 0.0)  # log(1 + exp(log-odds of wrong))
        likelihood = -np.einsum("rn,rn->r", weights, loss)
        better = likelihood >= best - 1e-12
        here[better] += step[better]
        best[better] = likelihood[better]
        expected = weights * fitted
        slope = gained - expected @ columns
        curvature = (expected * (1.0 - fitted)) @ products
        newton = np.linalg.solve(curvature.reshape(-1, size, size) + ridge, slope[:, :, None])
        newton = newton[:, :, 0]
        longest = np.abs(newton).max(1)
        arrived = better & (longest < _LAST_STEP)
        result[left[arrived]] = here[arrived] + newton[arrived]
        if arrived.all():
            break
        newton *= np.minimum(1.0, _LONGEST_STEP / np.maximum(longest, _LONGEST_STEP))[:, None]
        step = np.where(better[:, None], newton, step / 2)
        if arrived.any():
            left, here, step, best = (a[~arrived] for a in (left, here, step, best))
            weights, gained = weights[~arrived], gained[~arrived]
    return result


def _mean(values: Floats, weights: Floats) -> Floats:
    """Return the weighted means `(R,)` of `values` `(n,)`; NaN where all weights are 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(weights @ values / weights.sum(1))


def _over_classes(values: Sequence[Floats]) -> Floats:
    """Return the mean over defined values, one array `(R,)` per class; NaN where under two are."""
    table = np.stack(values)  # (K, R)
    defined = ~np.isnan(table)
    count = defined.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(defined, table, 0.0).sum(0) / count
    return np.where(count >= 2, mean, np.nan)


def _one_against_rest(
    labels: Integers,
    probabilities: Floats,
    weights: Floats,
    curve: Callable[[Floats, Floats], Floats],
) -> Floats:
    """Return a curve's area for the positive class of two, or averaged over classes."""
    classes = probabilities.shape[1]
    areas = []
    for k in [1] if classes == 2 else range(classes):
        scores, positive = probabilities[:, k], labels == k
        order = np.argsort(scores, kind="stable")
        # Equal scores are one threshold: sum their weights first.
        first = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)
        ranked = weights[:, order]
        if len(first) == 0:
            return np.full(len(weights), np.nan)
        hit, rest = ranked * positive[order], ranked * ~positive[order]
        if len(first) < len(scores):
            hit, rest = (np.add.reduceat(part, first, axis=1) for part in (hit, rest))
        areas.append(curve(hit, rest))  # each (R, thresholds)
    return areas[0] if classes == 2 else _over_classes(areas)


def _rank_auroc(hit: Floats, rest: Floats) -> Floats:
    """Return P(score of a positive > score of a negative) + half of P(equal), NaN if undefined."""
    below = np.cumsum(rest, axis=1) - rest
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((hit * (below + rest / 2)).sum(1) / (hit.sum(1) * rest.sum(1)))


def _average_precision(hit: Floats, rest: Floats) -> Floats:
    """Return the mean over positives of the precision at their threshold, NaN if undefined."""
    above_hit = np.cumsum(hit[:, ::-1], axis=1)
    above = above_hit + np.cumsum(rest[:, ::-1], axis=1)
    # A threshold nobody drawn reaches has hit 0: what its precision is does not matter.
    precision = above_hit / np.where(above > 0, above, 1.0)
    total = hit.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (hit[:, ::-1] * precision).sum(1) / total
    return np.where(rest.sum(1) > 0, area, np.nan)
