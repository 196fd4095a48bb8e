"""A number, as probabilities of the bands it may lie in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from dymo_med.calibration import Calibration
from dymo_med.conformal import COVERAGE, FEWEST, Conformal
from dymo_med.errors import ConfigError, Problem
from dymo_med.metrics import Estimate, bootstrap_means, bootstrap_numbers, number_metrics
from dymo_med.survival import Statement
from dymo_med.tasks.base import OverClasses, TaskEntry, number_of
from dymo_med.types import Batch, PatientRecord, Scale, Scores, Target, Task, Value
from dymo_med.types.task import EntryModel


class RegressionEntry(TaskEntry):
    """`task:` of a regression.

    Attributes:
        target: Column of the labels file.
        range: Its lowest and highest value.
        bands: How many bands networks think in, evenly spread, or the bands' centres.
        unit: For people.
    """

    type: Literal["regression"]
    target: str
    range: list[Annotated[float, Field(allow_inf_nan=False)]]
    bands: Annotated[int, Field(ge=2, le=50)] | list[float] = 7
    unit: str = ""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if len(self.range) != 2 or not self.range[0] < self.range[1]:
            raise ValueError("range must be [lowest, highest]")
        bands = self.bands
        if isinstance(bands, list) and (
            len(bands) < 2 or bands != sorted(set(bands)) or [bands[0], bands[-1]] != self.range
        ):
            raise ValueError("bands must rise from the lowest value of range to the highest")
        return self


@dataclass(frozen=True)
class Regression(OverClasses):
    """A number from a range; its classes are bands of it (`Scale`)."""

    type: ClassVar[str] = "regression"
    Entry: ClassVar[EntryModel] = RegressionEntry
    cohort_page: ClassVar[str] = "numbers"
    error_key: ClassVar[str] = "mae"
    error_name: ClassVar[str] = "mean absolute error"
    error_short: ClassVar[str] = "MAE"
    # Another temperature than 1 would move the answers themselves.
    calibrated: ClassVar[bool] = False
    classes_matter: ClassVar[bool] = False
    ranked: ClassVar[bool] = False
    answer_columns: ClassVar[tuple[str, ...]] = ("value",)
    truth_columns: ClassVar[tuple[str, ...]] = ("value_true",)
    own_columns: ClassVar[tuple[str, ...]] = ("value_low", "value_high")

    stored: ClassVar[Mapping[str, tuple[str, ...]]] = {"scale": ("low", "high", "centers", "unit")}
    by_class: ClassVar[bool] = False

    numbers: Scale

    def __post_init__(self) -> None:
        if self.numbers.names != self.classes:
            raise ValueError("The classes of a regression are its bands.")
        super().__post_init__()

    @classmethod
    def of(cls, target: str, scale: Scale) -> Regression:
        """Return the regression of a target on a scale."""
        return cls(target, scale.names, scale)

    @classmethod
    def from_entry(cls, entry: RegressionEntry, where: Callable[[str], str]) -> Self:
        """Return the task that cohort.yaml describes.

        Raises:
            ConfigError: If bands cannot be told apart.
        """
        low, high = entry.range
        centers = entry.bands
        if isinstance(centers, int):
            # Exact at both ends, and free of rounding where the step is a short number.
            centers = [low + (high - low) * k / (centers - 1) for k in range(centers)]
        try:
            scale = Scale(low, high, tuple(centers), entry.unit)
        except ValueError as error:
            raise ConfigError(
                Problem(
                    where("bands"),
                    str(error)[:-1],
                    expected="centres that can be told apart",
                    remedy="Name fewer bands, or a wider range",
                )
            ) from None
        return cls(entry.target, scale.names, scale)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Return the task that `to_dict` described."""
        told = stored["scale"]
        centers = tuple(float(c) for c in told["centers"])
        scale = Scale(float(told["low"]), float(told["high"]), centers, str(told["unit"]))
        return cls(str(stored["target"]), tuple(map(str, stored["classes"])), scale)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return super().to_dict() | {"scale": asdict(self.numbers)}

    @property
    def scale(self) -> Scale:
        """The number."""
        return self.numbers

    @property
    def unit(self) -> str:
        """Of the number."""
        return self.numbers.unit

    def read(
        self, cells: Mapping[str, str], blank: Set[str], where: str
    ) -> Target | Problem | None:
        """Return the number of a cell, and the band that it is nearest to."""
        text, scale = cells[self.target], self.numbers
        if text in blank:
            return None
        where = f"{where} {self.target}"
        expected = f"a number from {scale.low:g} to {scale.high:g} {scale.unit}".rstrip()
        value = number_of(text)
        if value is None:
            remedy = "Leave it blank if it is not known"
            return Problem(where, "the cell is not a number", expected, remedy=remedy)
        if not scale.low <= value <= scale.high:
            remedy = "Check the value, or widen range in cohort.yaml"
            return Problem(
                where, "the number is outside the declared range", expected, remedy=remedy
            )
        return Target(scale.band(value), value)

    def with_targets(self, batch: Batch, records: Sequence[PatientRecord]) -> Batch:
        """Return the batch with the shares of bands that make up each number."""
        values = [float("nan") if r.value is None else r.value for r in records]
        return replace(batch, shares=self.numbers.shares(torch.tensor(values, dtype=torch.float64)))

    def absent(self, classes: Sequence[str], split: str) -> Problem | None:
        """Return what is wrong: every band must occur in training, and something elsewhere."""
        if classes and split == "train":
            return Problem(
                "",
                f"no labelled training record is {', '.join(classes)}",
                expected="a record that is nearest to each of the bands' centres",
                remedy="List other centres under bands in cohort.yaml, or fewer",
            )
        return super().absent(classes if len(classes) == len(self.classes) else (), split)

    def loss(self, logits: Tensor, truth: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """Return the cross entropy of the bands' shares, plus the absolute error, `(R,)`.

        The error is counted in steps between neighbouring bands (their mean distance).
        """
        scale = self.numbers
        loss = F.cross_entropy(logits, truth, weight=class_weights, reduction="none")
        step = (scale.high - scale.low) / (len(scale.centers) - 1)
        error = scale.value(logits.softmax(-1)) - scale.value(truth)
        return loss + error.abs() / step

    def figures(self, logits: Tensor, truth: Tensor, weights: Tensor) -> dict[str, float]:
        """Return `score`, minus the mean absolute error."""
        scale = self.numbers
        answers, true = scale.value(logits.double().softmax(-1)), scale.value(truth.double())
        return {"score": -float(((answers - true).abs() * weights).sum() / weights.sum())}

    def error(self, probabilities: Tensor, labels: Tensor, shares: Tensor | None) -> Tensor:
        """Return how far numbers are from the truth, `(R,)`."""
        if shares is None:
            raise ValueError("A regression is judged by numbers.")
        scale = self.numbers
        return (scale.value(probabilities) - scale.value(shares.double())).abs()

    def log_loss(self, log_probabilities: Tensor, labels: Tensor, shares: Tensor | None) -> Tensor:
        """Return minus the logarithm of the probability of the true band, `(R,)`."""
        return super().log_loss(log_probabilities, labels, None)

    def judged(self, logits: Tensor, labels: Tensor, shares: Tensor | None) -> Tensor:
        """Return how far numbers are from the truth, `(R,)`."""
        return self.error(logits.softmax(-1), labels, shares)

    def nonconformity(
        self,
        probabilities: Tensor,
        labels: Tensor,
        shares: Tensor | None,
        followed: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return also how far numbers are from the truth, as `errors`."""
        found = super().nonconformity(probabilities, labels, None)
        if shares is not None:
            found["errors"] = self.error(probabilities, labels, shares)
        return found

    def value_of(
        self,
        probabilities: Mapping[str, Tensor],
        method: str,
        pattern: str,
        bounds: Conformal | None,
        calibration: Calibration | None = None,
    ) -> Value:
        """Return the number that is answered, with its interval."""
        scale = self.numbers
        values = {m: float(scale.value(p)) for m, p in probabilities.items()}
        own = values.pop(method)
        found = None
        if bounds is not None and method in bounds.errors:
            found = bounds.intervals(method, np.array([own]), [pattern], scale)
        return Value(
            value=own,
            low=None if found is None else float(found.low[0]),
            high=None if found is None else float(found.high[0]),
            coverage=COVERAGE,
            compared_with="all" if found is None or found.group[0] == "all" else "pattern",
            calibrated_on=0 if found is None else int(found.calibrated_on[0]),
            least=FEWEST,
            unit=scale.unit,
            centers=scale.centers,
            alternatives=values,
        )

    def answer_row(self, probabilities: Tensor) -> dict[str, Any]:
        """Return the number."""
        return {"value": float(self.numbers.value(probabilities))}

    def truth_row(self, record: PatientRecord) -> dict[str, Any]:
        """Return the true number."""
        if record.value is None:
            return {}
        return {"value_true": record.value, **dict.fromkeys(self.own_columns)}

    def own_row(self, value: Value | Statement | None) -> dict[str, Any]:
        """Return the ends of the interval."""
        if not isinstance(value, Value):
            return {}
        return {"value_low": value.low, "value_high": value.high}

    def estimates(
        self,
        scores: Scores,
        pairs: Sequence[tuple[str, str]],
        seed: int,
        *,
        resamples: int = 1000,
        whole: bool = True,
    ) -> dict[str, dict[str, Estimate]]:
        """Return how good numbers are, and the bundle's own intervals."""
        truth, low, high = (scores.known[c] for c in ("value_true", "value_low", "value_high"))
        estimates = bootstrap_numbers(
            truth,
            scores.told["value"],
            scores.patient_ids,
            pairs=pairs,
            metrics=number_metrics(self.numbers.low, self.numbers.high),
            seed=seed,
            resamples=resamples,
        )
        if not np.isnan(low).all():
            inside = (low <= truth) & (truth <= high)
            table = np.stack([inside, high - low], 1).astype(np.float64)
            coverage, width = bootstrap_means(
                table, scores.patient_ids, seed=seed, resamples=resamples
            )
            estimates[scores.own] |= {"interval_coverage": coverage, "interval_width": width}
        if scores.candidates.any():
            with np.errstate(invalid="ignore"):
                share = scores.admitted.sum(1) / scores.candidates.sum(1)
            (admitted,) = bootstrap_means(
                share[:, None], scores.patient_ids, seed=seed, resamples=resamples
            )
            estimates[scores.own]["admitted"] = admitted
        return estimates

    @property
    def in_full(self) -> str:
        """The task and its target; bands are no part of it."""
        return self.about

    @property
    def predicts(self) -> str:
        """What is predicted, for the model card."""
        scale = self.numbers
        unit = f" {scale.unit}" if scale.unit else ""
        return (
            f"a number from {scale.low:g} to {scale.high:g}{unit}, as the mean over these"
            f" bands, which below count as classes: {super().predicts}"
        )

    def accepts(self, other: Task) -> tuple[str, str, str] | None:
        """Return why another cohort's numbers cannot be judged by this one."""
        found = super().accepts(other)
        if found is None and other.scale != self.scale:
            return "the classes differ", ", ".join(self.classes), ", ".join(other.classes)
        return found
