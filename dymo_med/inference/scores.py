"""What an evaluation came to, kept small: arrays per scenario, and the tables made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from sys import intern
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dymo_med.metrics import (
    Estimate,
    Floats,
    bootstrap,
    bootstrap_means,
    bootstrap_numbers,
    delong,
    holm,
    number_metrics,
    selection_quality,
)
from dymo_med.types import Scale

Row = dict[str, Any]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]

ORACLE = "oracle"
METRIC_COLUMNS = (
    *("scenario", "method", "metric", "value", "low", "high", "p", "p_holm"),
    *("records", "patients", "seen_in_training"),
)
PATTERN_COLUMNS = (
    *("scenario", "pattern", "method", "metric", "value", "low", "high"),
    *("records", "patients", "calibrated_on"),
)
SUBGROUP_COLUMNS = (
    *("scenario", "subgroup", "level", "method", "metric", "value", "low", "high"),
    *("records", "patients"),
)
# Of parts of a cohort: less than these need many patients of each class to mean anything.
_PART_METRICS = ("auroc", "accuracy", "brier", "log_loss", "ece")
# Fewer patients than this give no interval worth printing.
_FEWEST = 10
_QUALITY = ("admitted", "harmed", "rescued", "trusted_right", "rejected_right")


@dataclass(frozen=True)
class Numbers:
    """What a regression answered in one scenario: n records in order.

    Attributes:
        scale: Of the regression.
        truth: `(n,)`.
        answers: Per method `(n,)`.
        low: `(n,)` lower ends of the bundle's own intervals; NaN where it cannot tell.
        high: `(n,)` upper ends.
    """

    scale: Scale
    truth: Floats
    answers: Mapping[str, Floats]
    low: Floats
    high: Floats

    def rows(self, index: Integers) -> Numbers:
        """Return some of the records."""
        return Numbers(
            self.scale,
            self.truth[index],
            {m: values[index] for m, values in self.answers.items()},
            self.low[index],
            self.high[index],
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that mean something on the scale."""
        return number_metrics(self.scale.low, self.scale.high)


@dataclass(frozen=True)
class Scores:
    """One scenario: n records in order, every method's answer for each.

    Attributes:
        scenario: Its text.
        classes: K class names.
        modalities: M names.
        own: The bundle's selector.
        record_ids: n ids.
        patient_ids: n ids.
        labels: `(n,)` class indices.
        patterns: n patterns: observed modalities joined by `+`.
        probabilities: Per method `(n, K)`.
        candidates: Bool `(n, M)`: recovered or completed.
        admitted: Bool `(n, M)`: by the bundle's selector.
        points_to: `(n, M)`: class that a recovery alone points to; -1 = no candidate.
        sets: Bool `(n, K)`: prediction sets; None where the bundle has no calibration for them.
        calibrated_on: `(n,)` how many patients a set was calibrated on.
        subgroups: Per subgroup n levels.
        numbers: Of a regression, whose bands `classes` are; else None.
        novel: Bool `(n, 2)`: whether a patient is unlike those of training, and so much that there
            is no answer; None where the bundle cannot say.
    """

    scenario: str
    classes: tuple[str, ...]
    modalities: tuple[str, ...]
    own: str
    record_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    labels: Integers
    patterns: tuple[str, ...]
    probabilities: Mapping[str, Floats]
    candidates: Bools
    admitted: Bools
    points_to: Integers
    sets: Bools | None
    calibrated_on: Integers
    subgroups: Mapping[str, tuple[str, ...]]
    numbers: Numbers | None = None
    novel: Bools | None = None

    def __len__(self) -> int:
        """Return n."""
        return len(self.record_ids)

    @property
    def patients(self) -> int:
        """How many patients the records are of."""
        return len(set(self.patient_ids))

    def rows(self, index: Integers) -> Scores:
        """Return some of the records."""

        def pick(values: Sequence[str]) -> tuple[str, ...]:
            return tuple(values[i] for i in index)

        return replace(
            self,
            record_ids=pick(self.record_ids),
            patient_ids=pick(self.patient_ids),
            labels=self.labels[index],
            patterns=pick(self.patterns),
            probabilities={m: p[index] for m, p in self.probabilities.items()},
            candidates=self.candidates[index],
            admitted=self.admitted[index],
            points_to=self.points_to[index],
            sets=None if self.sets is None else self.sets[index],
            calibrated_on=self.calibrated_on[index],
            subgroups={name: pick(levels) for name, levels in self.subgroups.items()},
            numbers=None if self.numbers is None else self.numbers.rows(index),
            novel=None if self.novel is None else self.novel[index],
        )


class Collector:
    """Takes the parts of one scenario as they come, and keeps numbers only.

    Args:
        scenario: Its text.
        classes: K class names.
        modalities: M names.
        own: The bundle's selector.
        scale: Of a regression.
    """

    def __init__(
        self,
        scenario: str,
        classes: Sequence[str],
        modalities: Sequence[str],
        own: str,
        scale: Scale | None = None,
    ) -> None:
        self.scenario, self.own, self.scale = scenario, own, scale
        self.classes, self.modalities = tuple(classes), tuple(modalities)
        self._ids: list[tuple[str, str, str]] = []
        self._levels: dict[str, list[str]] = {}
        self._probabilities: dict[str, list[Floats]] = {}
        self._numbers: list[Integers] = []
        self._values: dict[str, list[float]] = {}
        self._known: list[tuple[float, float, float]] = []

    def add(self, predictions: Sequence[Row], facts: Mapping[str, Row]) -> None:
        """Take the rows of one batch.

        Args:
            predictions: Rows of `predictions.csv`.
            facts: What else is known of each record: `points_to` by modality, `set` as class
                indices (names of classes may hold anything), `subgroups`, `calibrated_on`, `novel`
                (0 familiar, 1 unusual, 2 strange; -1 = the bundle cannot say).
        """
        columns = [f"prob_{c}" for c in self.classes]
        by_method: dict[str, list[Row]] = {}
        for row in predictions:
            by_method.setdefault(row["method"], []).append(row)
        for method, rows in by_method.items():
            values = np.array([[row[c] for c in columns] for row in rows], dtype=np.float64)
            self._probabilities.setdefault(method, []).append(values)
            if self.scale is not None:
                self._values.setdefault(method, []).extend(row["value"] for row in rows)
        numbers = []
        for row in by_method.get(self.own, []):
            known = facts[row["record_id"]]
            if self.scale is not None:
                ends = (row[end] for end in ("value_low", "value_high"))
                low, high = (float("nan") if end is None else float(end) for end in ends)
                self._known.append((row["value_true"], low, high))
            pattern = row["pattern"].replace("~", "")
            # Ids and patterns come again in every scenario; one copy is enough.
            ids = (row["record_id"], row["patient_id"], pattern)
            self._ids.append((intern(ids[0]), intern(ids[1]), intern(ids[2])))
            trusted, rejected = (set(row[key].split("+")) for key in ("trusted", "rejected"))
            numbers.append(
                [
                    *(
                        self.classes.index(row["label"]),
                        known["calibrated_on"],
                        known.get("novel", -1),
                    ),
                    *(m in trusted | rejected for m in self.modalities),
                    *(m in trusted for m in self.modalities),
                    *(known["points_to"].get(m, -1) for m in self.modalities),
                    *(k in known["set"] for k in range(len(self.classes))),
                ]
            )
            for name, found in known["subgroups"].items():
                self._levels.setdefault(name, []).append(intern(found))
        if numbers:
            self._numbers.append(np.array(numbers, dtype=np.int64))

    def scores(self) -> Scores:
        """Return what was collected."""
        k, m = len(self.classes), len(self.modalities)
        empty = np.empty((0, 3 + 3 * m + k), dtype=np.int64)
        numbers = np.concatenate([empty, *self._numbers])
        facts, candidates, admitted, points_to, sets = np.split(
            numbers, np.cumsum([3, m, m, m]), axis=1
        )
        records, patients, patterns = zip(*self._ids, strict=True) if self._ids else ((), (), ())
        answered = None
        if self.scale is not None:
            truth, low, high = np.array(self._known, dtype=np.float64).reshape(-1, 3).T
            values = {m: np.array(v, dtype=np.float64) for m, v in self._values.items()}
            answered = Numbers(self.scale, truth, values, low, high)
        return Scores(
            scenario=self.scenario,
            classes=self.classes,
            modalities=self.modalities,
            own=self.own,
            record_ids=records,
            patient_ids=patients,
            labels=facts[:, 0].copy(),
            patterns=patterns,
            probabilities={
                method: np.concatenate(parts) for method, parts in self._probabilities.items()
            },
            candidates=candidates.astype(bool),
            admitted=admitted.astype(bool),
            points_to=points_to.copy(),
            sets=sets.astype(bool) if sets.any() else None,
            calibrated_on=facts[:, 1].copy(),
            subgroups={name: tuple(levels) for name, levels in self._levels.items()},
            numbers=answered,
            novel=None if (facts[:, 2] < 0).all() else facts[:, 2:3] >= np.array([1, 2]),
        )


def metrics(scenarios: Sequence[Scores], seen: int, seed: int) -> list[Row]:
    """Return the rows of `metrics.csv`.

    Per scenario every metric of every method; the difference of the bundle's selector to every
    other method; for two classes that of AUROC also by DeLong's test; how good its prediction
    sets and its choices are. `p_holm` adjusts a metric's p-values for the number of comparisons
    made with it in this run. Of a regression the metrics are those of its numbers and intervals.

    Args:
        scenarios: In order.
        seen: How many of the patients the bundle was fitted on.
        seed: Of the bootstrap.
    """
    rows: list[Row] = []
    for scores in scenarios:
        if not len(scores):
            continue
        own = scores.own
        others = [m for m in scores.probabilities if m not in (own, ORACLE)]
        pairs = [(own, other) for other in others]
        if scores.numbers is not None:
            rows += _rows(scores, _number_estimates(scores, scores.numbers, pairs, seed), seen)
            continue
        estimates = bootstrap(
            scores.labels.tolist(),
            scores.probabilities,
            scores.patient_ids,
            pairs=pairs,
            seed=seed,
        )
        if len(scores.classes) == 2:
            for other in others:
                estimates[f"{own} - {other}"]["auroc_delong"] = delong(
                    scores.labels.tolist(),
                    scores.probabilities[own][:, 1],
                    scores.probabilities[other][:, 1],
                    scores.patient_ids,
                )
        estimates[own] |= _set_quality(scores, seed) | _alarms(scores, seed)
        estimates[own] |= selection_quality(
            scores.labels,
            scores.probabilities["observed_only"].argmax(1),
            scores.probabilities[own].argmax(1),
            scores.candidates,
            scores.admitted,
            scores.points_to,
            scores.patient_ids,
            seed=seed,
        )
        rows += _rows(scores, estimates, seen)
    families: dict[str, list[Row]] = {}
    for row in rows:
        if row["p"] is not None and not np.isnan(row["p"]):
            families.setdefault(row["metric"], []).append(row)
    for family in families.values():
        for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = p
    return rows


def _rows(scores: Scores, estimates: Mapping[str, Mapping[str, Estimate]], seen: int) -> list[Row]:
    """Return a scenario's rows of `metrics.csv`, not yet adjusted."""
    return [
        {
            "scenario": scores.scenario,
            "method": method,
            "metric": metric,
            **asdict(estimate),
            "p_holm": None,
            "records": len(scores),
            "patients": scores.patients,
            "seen_in_training": seen,
        }
        for method, by_metric in estimates.items()
        for metric, estimate in by_metric.items()
    ]


def _number_estimates(
    scores: Scores,
    numbers: Numbers,
    pairs: Sequence[tuple[str, str]],
    seed: int,
    resamples: int = 1000,
) -> dict[str, dict[str, Estimate]]:
    """Return how good the numbers of every method are, and the bundle's own intervals."""
    estimates = bootstrap_numbers(
        numbers.truth,
        numbers.answers,
        scores.patient_ids,
        pairs=pairs,
        metrics=numbers.metrics,
        seed=seed,
        resamples=resamples,
    )
    if not np.isnan(numbers.low).all():
        inside = (numbers.low <= numbers.truth) & (numbers.truth <= numbers.high)
        table = np.stack([inside, numbers.high - numbers.low], 1).astype(np.float64)
        coverage, width = bootstrap_means(table, scores.patient_ids, seed=seed, resamples=resamples)
        estimates[scores.own] |= {"interval_coverage": coverage, "interval_width": width}
    estimates[scores.own] |= _alarms(scores, seed, resamples)
    if scores.candidates.any():
        with np.errstate(invalid="ignore"):
            share = scores.admitted.sum(1) / scores.candidates.sum(1)
        (admitted,) = bootstrap_means(
            share[:, None], scores.patient_ids, seed=seed, resamples=resamples
        )
        estimates[scores.own]["admitted"] = admitted
    return estimates


def by_pattern(scenarios: Sequence[Scores], seed: int) -> Iterator[Row]:
    """Yield the rows of `metrics_by_pattern.csv`, commonest pattern first.

    Args:
        scenarios: In order.
        seed: Of the bootstrap.
    """
    for scores in scenarios:
        for pattern, part in parts(scores, scores.patterns):
            calibrated = int(part.calibrated_on.min())
            for row in _part(part, seed):
                on = calibrated if row["metric"].startswith(("set_", "interval_")) else None
                yield {
                    "scenario": scores.scenario,
                    "pattern": pattern,
                    "calibrated_on": on,
                    **row,
                }


def by_subgroup(scenarios: Sequence[Scores], seed: int) -> Iterator[Row]:
    """Yield the rows of `metrics_by_subgroup.csv`.

    Args:
        scenarios: In order.
        seed: Of the bootstrap.
    """
    for scores in scenarios:
        for name, levels in scores.subgroups.items():
            for found, part in parts(scores, levels):
                for row in _part(part, seed):
                    yield {
                        "scenario": scores.scenario,
                        "subgroup": name,
                        "level": found,
                        **row,
                    }


def parts(scores: Scores, values: Sequence[str]) -> Iterator[tuple[str, Scores]]:
    """Yield the records of each value, the commonest value first.

    Args:
        scores: n records.
        values: n values.
    """
    names, which, counts = np.unique(np.array(values), return_inverse=True, return_counts=True)
    for k in sorted(range(len(names)), key=lambda k: (-counts[k], names[k])):
        yield str(names[k]), scores.rows((which == k).nonzero()[0])


def _part(scores: Scores, seed: int) -> Iterator[Row]:
    """Yield the metrics of some of a scenario's records; no intervals for a handful of patients."""
    resamples = 1000 if scores.patients >= _FEWEST else 0
    if scores.numbers is not None:
        estimates = _number_estimates(scores, scores.numbers, (), seed, resamples)
    else:
        estimates = bootstrap(
            scores.labels.tolist(),
            scores.probabilities,
            scores.patient_ids,
            metrics=_PART_METRICS,
            seed=seed,
            resamples=resamples,
        )
        estimates[scores.own] |= _set_quality(scores, seed, resamples)
        estimates[scores.own] |= _alarms(scores, seed, resamples)
    for method, by_metric in estimates.items():
        for metric, estimate in by_metric.items():
            yield {
                "method": method,
                "metric": metric,
                "value": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "records": len(scores),
                "patients": scores.patients,
            }


def _alarms(scores: Scores, seed: int, resamples: int = 1000) -> dict[str, Estimate]:
    """Return how many patients are unlike those of training, and too much so for an answer."""
    if scores.novel is None:
        return {}
    unusual, strange = bootstrap_means(
        scores.novel.astype(np.float64), scores.patient_ids, seed=seed, resamples=resamples
    )
    return {"unusual": unusual, "strange": strange}


def _set_quality(scores: Scores, seed: int, resamples: int = 1000) -> dict[str, Estimate]:
    """Return how often prediction sets hold the truth, and how many classes they hold."""
    if scores.sets is None:
        return {}
    right = scores.sets[np.arange(len(scores)), scores.labels]
    table = np.stack([right, scores.sets.sum(1)], 1).astype(np.float64)
    coverage, size = bootstrap_means(table, scores.patient_ids, seed=seed, resamples=resamples)
    return {"set_coverage": coverage, "set_size": size}
