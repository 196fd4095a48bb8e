"""What an evaluation came to, kept small: arrays per scenario, and the tables made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from sys import intern
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dymo_med.metrics import (
    Estimate,
    Floats,
    bootstrap_means,
    holm,
)
from dymo_med.tasks import PLAIN, OverClasses
from dymo_med.types import Scores

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


class Collector:
    """Takes the parts of one scenario as they come, and keeps numbers only.

    Args:
        scenario: Its text.
        classes: K class names.
        modalities: M names.
        own: The bundle's selector.
        task: What is predicted.
    """

    def __init__(
        self,
        scenario: str,
        classes: Sequence[str],
        modalities: Sequence[str],
        own: str,
        task: OverClasses = PLAIN,
    ) -> None:
        self.scenario, self.own, self.task = scenario, own, task
        self.classes, self.modalities = tuple(classes), tuple(modalities)
        self._ids: list[tuple[str, str, str]] = []
        self._levels: dict[str, list[str]] = {}
        self._probabilities: dict[str, list[Floats]] = {}
        self._numbers: list[Integers] = []
        self._told: dict[str, dict[str, list[float]]] = {c: {} for c in task.answer_columns}
        self._known: dict[str, list[float]] = {
            c: [] for c in (*task.truth_columns, *task.own_columns)
        }

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
            for column, told in self._told.items():
                told.setdefault(method, []).extend(row[column] for row in rows)
        numbers = []
        for row in by_method.get(self.own, []):
            known = facts[row["record_id"]]
            for column, one in self._known.items():
                one.append(float("nan") if row[column] is None else float(row[column]))
            pattern = row["pattern"].replace("~", "")
            # Ids and patterns come again in every scenario; one copy is enough.
            ids = (row["record_id"], row["patient_id"], pattern)
            self._ids.append((intern(ids[0]), intern(ids[1]), intern(ids[2])))
            trusted, rejected = (set(row[key].split("+")) for key in ("trusted", "rejected"))
            numbers.append(
                [
                    *(
                        self.classes.index(row["label"]) if row["label"] else -1,
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
            known={c: np.array(v, dtype=np.float64) for c, v in self._known.items()},
            told={
                c: {m: np.array(v, dtype=np.float64) for m, v in by_method.items()}
                for c, by_method in self._told.items()
            },
            novel=None if (facts[:, 2] < 0).all() else facts[:, 2:3] >= np.array([1, 2]),
        )


def metrics(
    scenarios: Sequence[Scores], seen: int, seed: int, task: OverClasses = PLAIN
) -> list[Row]:
    """Return the rows of `metrics.csv`.

    Per scenario every metric of every method; the difference of the bundle's selector to every
    other method; for two classes that of AUROC also by DeLong's test; how good its prediction
    sets and its choices are. `p_holm` adjusts a metric's p-values for the number of comparisons
    made with it in this run. Of a regression the metrics are those of its numbers and intervals.

    Args:
        scenarios: In order.
        seen: How many of the patients the bundle was fitted on.
        seed: Of the bootstrap.
        task: What is predicted.
    """
    rows: list[Row] = []
    for scores in scenarios:
        if not len(scores):
            continue
        own = scores.own
        others = [m for m in scores.probabilities if m not in (own, ORACLE)]
        pairs = [(own, other) for other in others]
        estimates = task.estimates(scores, pairs, seed)
        estimates[own] |= _alarms(scores, seed)
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


def by_pattern(scenarios: Sequence[Scores], seed: int, task: OverClasses = PLAIN) -> Iterator[Row]:
    """Yield the rows of `metrics_by_pattern.csv`, commonest pattern first.

    Args:
        scenarios: In order.
        seed: Of the bootstrap.
        task: What is predicted.
    """
    for scores in scenarios:
        for pattern, part in parts(scores, scores.patterns):
            calibrated = int(part.calibrated_on.min())
            for row in _part(part, seed, task):
                on = calibrated if row["metric"].startswith(("set_", "interval_")) else None
                yield {
                    "scenario": scores.scenario,
                    "pattern": pattern,
                    "calibrated_on": on,
                    **row,
                }


def by_subgroup(scenarios: Sequence[Scores], seed: int, task: OverClasses = PLAIN) -> Iterator[Row]:
    """Yield the rows of `metrics_by_subgroup.csv`.

    Args:
        scenarios: In order.
        seed: Of the bootstrap.
        task: What is predicted.
    """
    for scores in scenarios:
        for name, levels in scores.subgroups.items():
            for found, part in parts(scores, levels):
                for row in _part(part, seed, task):
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


def _part(scores: Scores, seed: int, task: OverClasses) -> Iterator[Row]:
    """Yield the metrics of some of a scenario's records; no intervals for a handful of patients."""
    resamples = 1000 if scores.patients >= _FEWEST else 0
    estimates = task.estimates(scores, (), seed, resamples=resamples, whole=False)
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
