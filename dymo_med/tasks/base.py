"""Tasks whose networks answer with K probabilities, and what they answer for.

Whatever is defined on classes (prototypes, rewards, selection, mixtures, prediction sets, Shapley
values) needs nothing of a task but its K classes: those of a classification, bands of a number,
bins of a time. `Batch.labels` say whose class is known, `Batch.shares` what is known where that is
more, or less, than a class. What differs stands here, beside what every task answers for
(`dymo_med.types.Task`):

1. *Training.* `loss` is that of a network, `figures` hold the validation score.
2. *What answers are judged by*, where selectors, references and networks are compared: `error`,
   called `error_key` in tables and `error_name` in sentences; `classes_matter` and `ranked`.
3. *Calibration* and its guarantee: `calibrated`, and `nonconformity` by kind of bound.
4. *Answers.* `value_of` a record, the columns of predictions.csv (`answer_columns`,
   `truth_columns`, `own_columns`), and `estimates` of how good many answers are.

The defaults are those of a classification.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, ClassVar

import numpy as np
from pydantic import model_validator
from torch import Tensor
from torch.nn import functional as F

from dymo_med.calibration import Calibration
from dymo_med.config import Strict
from dymo_med.conformal import Conformal
from dymo_med.errors import Problem
from dymo_med.metrics import (
    Estimate,
    auroc,
    bootstrap,
    bootstrap_means,
    delong,
    selection_quality,
)
from dymo_med.survival import Statement, log_likelihood
from dymo_med.types import CohortRecord, PatientRecord, Scores, Task, Value

# A stated probability of 0 is no infinite error.
_LEAST = 1e-6
# Of parts of a cohort: less than these need many patients of each class to mean anything.
PART_METRICS = ("auroc", "accuracy", "brier", "log_loss", "ece")


class TaskEntry(Strict):
    """`task:` of a cohort description; each task has keys of its own.

    Attributes:
        type: Which task.
    """

    type: str

    @model_validator(mode="before")
    @classmethod
    def _own_keys(cls, data: Any) -> Any:
        """Say which keys the task has, where one is absent or too many."""
        if not isinstance(data, dict):
            return data
        for key, field in cls.model_fields.items():
            if field.is_required() and data.get(key) in (None, "", [], {}):
                raise ValueError(f"a task of type {data.get('type')} needs the key {key}")
        for key in data:
            if key not in cls.model_fields:
                keys = ", ".join(cls.model_fields)
                raise ValueError(
                    f"a task of type {data.get('type')} has no key {key!s:.40}; it has {keys}"
                )
        return data


def class_loss(logits: Tensor, truth: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Return the cross entropy of answers, `(R,)`.

    Where classes are known in part, minus the log-likelihood of what is known: of a censored
    patient -log P(T > c).

    Args:
        logits: `(R, K)`.
        truth: Int64 `(R,)`, or shares `(R, K)`; all known.
        class_weights: `(K,)` weights of classes; None = the same. Without use for shares.
    """
    if truth.is_floating_point():
        return -log_likelihood(logits.log_softmax(-1), truth)
    return F.cross_entropy(logits, truth, weight=class_weights, reduction="none")


class OverClasses(Task):
    """A task whose networks answer with the probabilities of K classes; see the module."""

    error_key: ClassVar[str] = "log_loss"
    error_name: ClassVar[str] = "log-loss"
    error_short: ClassVar[str] = "log-loss"
    calibrated: ClassVar[bool] = True
    """Whether probabilities are the answer: a temperature is fitted and their extremes limited."""
    classes_matter: ClassVar[bool] = True
    """Whether a class that is answered wrongly is an error, however near it is."""
    balances: ClassVar[bool] = True
    """Whether classes may be weighted in the loss."""
    ranked: ClassVar[bool] = True
    """Whether classes have areas under ROC curves."""
    answer_columns: ClassVar[tuple[str, ...]] = ()
    """Columns of predictions.csv beside the probabilities, for every method."""
    truth_columns: ClassVar[tuple[str, ...]] = ()
    """Columns that say what is true besides the class."""
    own_columns: ClassVar[tuple[str, ...]] = ()
    """Columns that only the bundle's own selector fills."""

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"A task needs at least two distinct classes, got {self.classes}.")

    def shortage(
        self, split: str, records: Sequence[CohortRecord | PatientRecord]
    ) -> Problem | None:
        """Return which classes do not occur in a split."""
        counts = Counter(record.label for record in records)
        return self.absent([c for k, c in enumerate(self.classes) if not counts[k]], split)

    def absent(self, classes: Sequence[str], split: str) -> Problem | None:
        """Return what is wrong where a split has no record of some classes.

        Args:
            classes: These.
            split: Which split.
        """
        if not classes:
            return None
        return Problem(
            "",
            f"split '{split}' has no labelled record of class {', '.join(classes)}",
            expected="each class in each split but test",
            remedy="Move patients between splits in splits.csv",
        )

    def loss(self, logits: Tensor, truth: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """Return the loss of answers, `(R,)`.

        Args:
            logits: `(R, K)`.
            truth: As of `Batch.truth`: Int64 `(R,)`, or shares `(R, K)`; all known.
            class_weights: `(K,)` weights of classes in the cross entropy; None = the same.
        """
        return class_loss(logits, truth, class_weights)

    def figures(self, logits: Tensor, truth: Tensor, weights: Tensor) -> dict[str, float]:
        """Return what is thought of a network: `score`, the one to raise, and others.

        Args:
            logits: `(R, K)`.
            truth: As of `loss`.
            weights: `(R,)`.

        Returns:
            Minus the mean log-loss and, of two classes, `auroc`.
        """
        losses = class_loss(logits.double(), truth)
        found = {"score": -float((losses * weights).sum() / weights.sum())}
        if logits.shape[1] == 2 and not truth.is_floating_point():
            probability, one = logits.double().softmax(1).numpy(), weights.numpy()[None]
            found["auroc"] = float(auroc(truth.numpy(), probability, one)[0])
        return found

    def error(self, probabilities: Tensor, labels: Tensor, shares: Tensor | None) -> Tensor:
        """Return what answers are judged by, `(R,)`: the lower the better.

        Args:
            probabilities: `(R, K)`.
            labels: Int64 `(R,)`, -1 where the class is hidden.
            shares: `(R, K)` as in `Batch`; None where labels say all.
        """
        return self.log_loss(probabilities.clamp_min(_LEAST).log(), labels, shares)

    def log_loss(self, log_probabilities: Tensor, labels: Tensor, shares: Tensor | None) -> Tensor:
        """Return minus the logarithm of the probability of what is true, `(R,)`.

        Args:
            log_probabilities: `(R, K)`.
            labels: As of `error`.
            shares: Likewise.
        """
        if shares is not None:
            return -log_likelihood(log_probabilities, shares)
        return F.nll_loss(log_probabilities, labels, reduction="none")

    def judged(self, logits: Tensor, labels: Tensor, shares: Tensor | None) -> Tensor:
        """Return the `error` of answers that are stated as logits `(R, K)`, `(R,)`.

        Args:
            logits: `(R, K)`.
            labels: As of `error`.
            shares: Likewise.
        """
        return self.log_loss(logits.log_softmax(-1), labels, shares)

    def recalibrated(
        self,
        calibration: Calibration,
        log_probabilities: Tensor,
        shares: Tensor | None,
        followed: Tensor | None,
        weights: Tensor,
        patients: Sequence[str],
    ) -> Calibration:
        """Return the calibration with what is fitted to answers of the default selector.

        Args:
            calibration: With the temperature.
            log_probabilities: `(B, K)`, of cases that neither networks nor the selector were
                fitted on, after the temperature.
            shares: `(B, K)` as in `Batch`.
            followed: `(B, 3)` likewise.
            weights: `(B,)` of cases within their patients.
            patients: Whose case each is.
        """
        return calibration

    def nonconformity(
        self,
        probabilities: Tensor,
        labels: Tensor,
        shares: Tensor | None,
        followed: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return how strange each truth is, by kind of bound (`conformal.Conformal`), each `(R,)`.

        Args:
            probabilities: Float64 `(R, K)`, as they are stated.
            labels: Int64 `(R,)`.
            shares: As of `error`.
            followed: `(R, 3)` as in `Batch`.

        Returns:
            1 - the probability of the true class as `scores`.
        """
        return {"scores": 1 - probabilities.gather(1, labels[:, None]).squeeze(1)}

    def value_of(
        self,
        probabilities: Mapping[str, Tensor],
        method: str,
        pattern: str,
        bounds: Conformal | None,
        calibration: Calibration | None = None,
    ) -> Value | Statement | None:
        """Return the number that is answered, with its interval; None of tasks without one.

        Args:
            probabilities: Of one record, `(K,)` by method.
            method: The bundle's own.
            pattern: Observed modalities, joined by `+`.
            bounds: What intervals go by; None = there is nothing.
            calibration: Behind the probabilities.
        """
        return None

    def answer_row(self, probabilities: Tensor) -> dict[str, Any]:
        """Return `answer_columns` of one answer `(K,)`."""
        return {}

    def truth_row(self, record: PatientRecord) -> dict[str, Any]:
        """Return `truth_columns` of one record, and empty `own_columns`."""
        return {}

    def own_row(self, value: Value | Statement | None) -> dict[str, Any]:
        """Return `own_columns` of what `value_of` returned."""
        return {}

    def estimates(
        self,
        scores: Scores,
        pairs: Sequence[tuple[str, str]],
        seed: int,
        *,
        resamples: int = 1000,
        whole: bool = True,
    ) -> dict[str, dict[str, Estimate]]:
        """Return how good answers are, by method and metric.

        Args:
            scores: Of one scenario, or of a part of its records.
            pairs: Methods whose difference is wanted, under `first - second`.
            seed: Of the bootstrap.
            resamples: Of the bootstrap; 0 = no intervals.
            whole: Whether these are all records of a scenario; of a part fewer metrics are given.
        """
        own, labels = scores.own, scores.labels.tolist()
        estimates = bootstrap(
            labels,
            scores.probabilities,
            scores.patient_ids,
            pairs=pairs,
            seed=seed,
            resamples=resamples,
            **({} if whole else {"metrics": PART_METRICS}),
        )
        if len(scores.classes) == 2:
            for first, second in pairs:
                estimates[f"{first} - {second}"]["auroc_delong"] = delong(
                    labels,
                    scores.probabilities[first][:, 1],
                    scores.probabilities[second][:, 1],
                    scores.patient_ids,
                )
        estimates[own] |= _set_quality(scores, seed, resamples)
        if whole:
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
        return estimates


def _set_quality(scores: Scores, seed: int, resamples: int) -> dict[str, Estimate]:
    """Return how often prediction sets hold the truth, and how many classes they hold."""
    if scores.sets is None:
        return {}
    right = scores.sets[np.arange(len(scores)), scores.labels]
    table = np.stack([right, scores.sets.sum(1)], 1).astype(np.float64)
    coverage, size = bootstrap_means(table, scores.patient_ids, seed=seed, resamples=resamples)
    return {"set_coverage": coverage, "set_size": size}


def answered(task: Task) -> OverClasses:
    """Return a task that is known to be one whose networks answer with K probabilities.

    Raises:
        ValueError: If it is another.
    """
    if not isinstance(task, OverClasses):
        raise ValueError(f"a {task.type} has no answer of {len(task.classes)} probabilities")
    return task


def number_of(cell: str) -> float | None:
    """Return a cell as a finite number; None if it is none."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if isfinite(value) else None
