"""How good probabilities are: weighted metrics, and intervals that resample patients.

Every metric here takes rows of weights `(R, n)` and returns R values, so that the point estimate
(one row) and a thousand bootstrap resamples (a thousand rows) are one code path. scikit-learn
has the same metrics for one row; the tests hold these to its numbers.

Records of one patient share that patient's weight: somebody scanned five times counts once.
A metric that is not defined (only one class, no record) is NaN, never an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Weights of one pass over resamples, at most (16 MB per array).
_MOST_WEIGHTS = 2_000_000
_BINS = 10


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval.

    Attributes:
        value: On the records as they are.
        low: 2.5th percentile over resamples; NaN where no resample defines the metric.
        high: 97.5th percentile.
    """

    value: float
    low: float
    high: float


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


METRICS: Mapping[str, Callable[[Integers, Floats, Floats], Floats]] = {
    "auroc": auroc,
    "auprc": auprc,
    "balanced_accuracy": balanced_accuracy,
    "accuracy": accuracy,
    "brier": brier,
    "log_loss": log_loss,
    "ece": ece,
}


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
    all methods: the difference of two methods is therefore a paired one.

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

    Example:
        >>> p = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> bootstrap([0, 1, 0], {"m": p}, ["a", "b", "c"], resamples=10)["m"]["auroc"].value
        1.0
    """
    y = np.asarray(labels, dtype=np.int64)
    owner, count = _owners(patient_ids)
    own = patient_weights(patient_ids)
    whole = {
        (method, metric): METRICS[metric](y, p, own[None, :])
        for method, p in probabilities.items()
        for metric in metrics
    }
    draws: dict[tuple[str, str], list[Floats]] = {key: [] for key in whole}
    generator = np.random.default_rng(seed)
    chunk = max(1, _MOST_WEIGHTS // max(1, len(y)))
    for start in range(0, resamples if count else 0, chunk):
        rows = min(chunk, resamples - start)
        times = generator.multinomial(count, np.full(count, 1 / count), size=rows)  # (R, patients)
        weights = times[:, owner] * own  # (R, n)
        for method, p in probabilities.items():
            for metric in metrics:
                draws[method, metric].append(METRICS[metric](y, p, weights))
    drawn = {key: np.concatenate([np.empty(0), *parts]) for key, parts in draws.items()}
    result = {
        method: {
            metric: _estimate(whole[method, metric], drawn[method, metric]) for metric in metrics
        }
        for method in probabilities
    }
    for a, b in pairs:
        result[f"{a} - {b}"] = {
            metric: _estimate(
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


def _owners(patient_ids: Sequence[Hashable]) -> tuple[Integers, int]:
    """Return each record's patient as an integer in order of appearance, and how many there are."""
    index = {patient: i for i, patient in enumerate(dict.fromkeys(patient_ids))}
    return np.array([index[patient] for patient in patient_ids], dtype=np.int64), len(index)


def _estimate(value: Floats, drawn: Floats) -> Estimate:
    defined = drawn[~np.isnan(drawn)]
    low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (np.nan, np.nan)
    return Estimate(float(value[0]), float(low), float(high))


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
        hit = np.add.reduceat(ranked * positive[order], first, axis=1)  # (R, thresholds)
        rest = np.add.reduceat(ranked * ~positive[order], first, axis=1)
        areas.append(curve(hit, rest))
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
