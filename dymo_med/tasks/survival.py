"""The time until an event, as probabilities of the bins it may lie in; patients may be censored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from dymo_med.calibration import Calibration
from dymo_med.config import as_words
from dymo_med.conformal import Conformal
from dymo_med.errors import Problem
from dymo_med.metrics import Estimate, patient_weights, resampled
from dymo_med.survival import (
    DAYS,
    FollowUp,
    Guarantee,
    Statement,
    Step,
    TimeBins,
    censoring,
    fit_bins,
    fit_recalibration,
    in_unit,
    kaplan_meier,
    known_weights,
    latest_bound,
    state,
    usable,
)
from dymo_med.survival.metrics import bound_coverage, mean_bound, metrics_of
from dymo_med.tasks.base import OverClasses, TaskEntry, number_of
from dymo_med.types import Batch, CohortRecord, PatientRecord, Scores, Target, Task, Value
from dymo_med.types.task import EntryModel

_PART_METRICS = ("concordance", "integrated_brier", "log_loss")


class SurvivalEntry(TaskEntry):
    """`task:` of survival.

    Attributes:
        time: Column of the labels file: time until the event, or until the patient was last seen
            without it. All times run from when the prediction is made.
        event: Column that says which of both.
        unit: Of all times.
        horizons: Times at which risk is stated.
        occurred: How an event is written; empty = 1, yes, true, dead, deceased and the like.
        censored: How its absence is; empty = 0, no, false, alive, living and the like.
        bins: How many bins of time networks think in, besides the one without an end, or where
            they end; absent = by the number of events.
        entry: Not read: patients under observation from a later time on (left truncation).
    """

    type: Literal["survival"]
    time: str
    event: str
    unit: str
    horizons: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    occurred: list[str] = Field(default_factory=list)
    censored: list[str] = Field(default_factory=list)
    bins: Annotated[int, Field(ge=2, le=30)] | list[float] | None = None
    entry: str = ""

    @field_validator("occurred", "censored", mode="before")
    @classmethod
    def _words(cls, values: Any) -> Any:
        return as_words(values)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.entry:
            raise ValueError(
                "entry is not read: patients who come under observation later than the prediction"
                " is made (left truncation) need another likelihood; let time run from entry, or"
                " leave these patients out"
            )
        if self.unit not in DAYS:
            raise ValueError(f"unit must be one of {', '.join(DAYS)}")
        if self.time == self.event:
            raise ValueError("time and event must be two columns")
        if self.horizons != sorted(set(self.horizons)):
            raise ValueError("horizons must rise")
        if bool(self.occurred) != bool(self.censored):
            raise ValueError("give both occurred and censored, or neither")
        if {w.casefold() for w in self.occurred} & {w.casefold() for w in self.censored}:
            raise ValueError("a word cannot be under both occurred and censored")
        if isinstance(self.bins, list):
            if not self.bins or self.bins != sorted(set(self.bins)) or self.bins[0] <= 0:
                raise ValueError("bins must rise from above 0")
            if not isfinite(self.bins[-1]) or self.horizons[-1] > self.bins[-1]:
                raise ValueError("the last of bins must be finite and no horizon after it")
        return self


@dataclass(frozen=True)
class Learned:
    """What training patients tell of follow-up.

    Attributes:
        latest: No lower bound is later (`survival.latest_bound`).
        everybody: Kaplan-Meier estimate at the bins' edges; empty = there were no such patients.
        not_censored: G, where a bundle is made; a bundle keeps none of it.
    """

    latest: float
    everybody: tuple[float, ...] = ()
    not_censored: Step = field(
        default_factory=lambda: Step(np.array([]), np.array([])), compare=False
    )


@dataclass(frozen=True)
class Survival(OverClasses):
    """The time until an event; its classes are bins of it (`survival.TimeBins`)."""

    type: ClassVar[str] = "survival"
    Entry: ClassVar[EntryModel] = SurvivalEntry
    cohort_page: ClassVar[str] = "survival"
    stored: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "follow_up": (
            *("time", "event", "unit", "horizons", "bins", "occurred", "censored"),
            *("latest", "everybody"),
        )
    }
    by_class: ClassVar[bool] = False
    classes_matter: ClassVar[bool] = False
    balances: ClassVar[bool] = False
    own_columns: ClassVar[tuple[str, ...]] = ("bound",)
    truth_columns: ClassVar[tuple[str, ...]] = ("time", "event")

    follow_up: FollowUp
    learned: Learned
    bins: int | None = None
    """How many have an end, where that was asked for; they are fitted if `to_fit`."""
    to_fit: bool = False

    def __post_init__(self) -> None:
        if self.follow_up.bins.names != self.classes:
            raise ValueError("The classes of survival are its bins.")
        super().__post_init__()

    @classmethod
    def of(cls, follow_up: FollowUp, learned: Learned | None = None, **how: Any) -> Survival:
        """Return the task of a follow-up."""
        learned = learned or Learned(follow_up.bins.last)
        return cls(follow_up.event, follow_up.bins.names, follow_up, learned, **how)

    @classmethod
    def from_entry(cls, entry: SurvivalEntry, where: Callable[[str], str]) -> Survival:
        """Return the task that cohort.yaml describes; bins end at horizons until they are fitted.

        A cohort without training patients is there to be answered by a bundle, which has bins of
        its own.
        """
        fixed = isinstance(entry.bins, list)
        edges = entry.bins if isinstance(entry.bins, list) else entry.horizons
        bins = TimeBins(tuple(map(float, edges)), entry.unit)
        horizons, words = tuple(entry.horizons), (tuple(entry.occurred), tuple(entry.censored))
        follow_up = FollowUp(entry.time, entry.event, entry.unit, horizons, bins, *words)
        number = entry.bins if isinstance(entry.bins, int) else None
        return cls.of(follow_up, bins=number, to_fit=not fixed)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Survival:
        """Return the task that `to_dict` described."""
        told = stored["follow_up"]
        follow_up = FollowUp.from_dict(told)
        learned = Learned(float(told["latest"]), tuple(map(float, told["everybody"])))
        if not learned.latest > 0 or not all(0 <= s <= 1 for s in learned.everybody):
            raise ValueError("a time must be above 0, and a share from 0 to 1")
        if len(learned.everybody) not in (0, len(follow_up.bins.edges)):
            raise ValueError("a share belongs to each edge")
        return cls.of(follow_up, learned)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        learned = {"latest": self.learned.latest, "everybody": list(self.learned.everybody)}
        return super().to_dict() | {"follow_up": self.follow_up.to_dict() | learned}

    @property
    def unit(self) -> str:
        """Of all times."""
        return self.follow_up.unit

    @property
    def answer_columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """Risks at the horizons."""
        return tuple(f"risk_{h:g}" for h in self.follow_up.horizons)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the labels file that hold the target."""
        return (self.follow_up.time, self.follow_up.event)

    def read(
        self, cells: Mapping[str, str], blank: Set[str], where: str
    ) -> Target | Problem | None:
        """Return the time and event of a row, and its bin where that is known."""
        time, event = (cells[column] for column in self.columns)
        if time in blank and event in blank:
            return None
        happened = self.follow_up.happened(event)
        if happened is None:
            own = " or ".join((*self.follow_up.occurred, *self.follow_up.censored))
            return Problem(
                f"{where} {self.follow_up.event}",
                "the cell does not say whether the event occurred",
                expected=own or "1 or 0, yes or no, dead or alive",
                remedy="Declare the words under occurred and censored in cohort.yaml, or leave the"
                " time blank too if nothing is known",
            )
        value = number_of(time)
        if value is None or not usable(value):
            return Problem(
                f"{where} {self.follow_up.time}",
                "the cell is no time",
                expected=f"a number of {self.unit}, 0 or more",
                remedy="Correct it, or leave time and event blank if nothing is known",
            )
        return Target(self.follow_up.bins.bin(value, happened), value, happened)

    def known(self, record: CohortRecord | PatientRecord) -> bool:
        """Return whether anything is known of a record's time."""
        return record.value is not None

    def fitted(self, training: Sequence[CohortRecord]) -> Survival:
        """Return the task with bins at quantiles of training patients' times, and what they tell.

        Where bins cannot be fitted they stay as they are: `shortage` says so.
        """
        known = [r for r in training if r.value is not None]
        if not known:
            return self
        times = np.array([r.value for r in known], dtype=np.float64)
        events = np.array([bool(r.event) for r in known], dtype=bool)
        weights = patient_weights([r.patient_id for r in known])
        follow_up = self.follow_up
        if self.to_fit:
            try:
                bins = fit_bins(times, events, weights, self.unit, self.bins)
                follow_up = replace(follow_up, bins=bins)
            except ValueError:  # no event, or horizons after what is known
                return self
        not_censored = censoring(times, events, weights)
        everybody = kaplan_meier(times, events, weights)(np.array(follow_up.bins.edges))
        learned = Learned(
            latest_bound(not_censored, follow_up.bins.last),
            # Four digits tell as much, and less of single patients.
            tuple(round(float(s), 4) for s in everybody),
            not_censored,
        )
        return Survival.of(follow_up, learned)

    def again(self, record: CohortRecord) -> CohortRecord:
        """Return a record with the bin that its time lies in."""
        if record.value is None:
            return record
        label = self.follow_up.bins.bin(record.value, bool(record.event))
        return replace(record, label=label)

    def adopt(self, other: Task, record: CohortRecord) -> CohortRecord:
        """Return a record of another cohort, its time in this task's unit and bins."""
        if record.value is None:
            return record
        return self.again(replace(record, value=in_unit(record.value, other.unit, self.unit)))

    def with_targets(self, batch: Batch, records: Sequence[PatientRecord]) -> Batch:
        """Return the batch with what share of each bin agrees with what is known of each patient.

        Those whose bin is known stand for the others by inverse-censoring weights.
        """
        nan = float("nan")
        times = torch.tensor([nan if r.value is None else r.value for r in records]).double()
        events = torch.tensor([bool(r.event) for r in records])
        bins = self.follow_up.bins
        known = torch.tensor([r.label is not None for r in records])
        stands_for = torch.from_numpy(
            known_weights(
                times.nan_to_num(0.0).numpy(), events.numpy(), self.learned.not_censored, bins.last
            )
        )
        columns = (times, events.double(), stands_for.where(known, 0.0))
        return replace(batch, shares=bins.fits(times, events), followed=torch.stack(columns, 1))

    def shortage(
        self, split: str, records: Sequence[CohortRecord | PatientRecord]
    ) -> Problem | None:
        """Return what a split lacks: an event, and in training bins and somebody in each."""
        what = ""
        counts = Counter(record.label for record in records)
        absent = [c for k, c in enumerate(self.classes) if not counts[k]]
        if not any(record.event for record in records):
            what = f"split '{split}' has no event"
        elif split == "train" and self.to_fit:
            what = (
                "bins of time cannot be fitted: too few events among patients who are followed, or"
                f" horizon {self.follow_up.horizons[-1]:g} lies after the latest event at which a"
                " tenth of the patients are followed"
            )
        elif split == "train" and absent:
            what = f"split 'train' has nobody whose time is known to be {', '.join(absent)}"
        if not what:
            return None
        return Problem(
            "",
            what,
            expected="an event in each split but test, and in train somebody in each bin",
            remedy="Move patients between splits in splits.csv, ask for an earlier horizon, or name"
            " bins in cohort.yaml",
        )

    def loss(self, logits: Tensor, truth: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """Return minus the log-likelihood of what is known, `(R,)`.

        Raises:
            ValueError: If bins are weighted: risks would not be right.
        """
        if class_weights is not None:
            raise ValueError("Bins of a survival time cannot be balanced.")
        return super().loss(logits, truth)

    def recalibrated(
        self,
        calibration: Calibration,
        log_probabilities: Tensor,
        shares: Tensor | None,
        followed: Tensor | None,
        weights: Tensor,
        patients: Sequence[str],
    ) -> Calibration:
        """Return the calibration with curves set right (`survival.recalibration`)."""
        assert shares is not None and followed is not None
        bins = self.follow_up.bins
        happened = followed[:, 1].cpu() > 0
        found = fit_recalibration(
            log_probabilities.exp(), shares.cpu(), happened, patients, bins, weights.cpu()
        )
        # The number of patients is in the prior, and limits no single probability.
        return replace(calibration, patients=None, recalibration=found, bins=bins)

    def nonconformity(
        self,
        probabilities: Tensor,
        labels: Tensor,
        shares: Tensor | None,
        followed: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return how early each event came as `times`, `(R, 3)` (`survival.bound`).

        The probability of an event until the patient's time; how many patients that stands for, 0
        where no bound could be wrong; and the most that anybody could stand for.
        """
        assert followed is not None
        g, latest = self.learned.not_censored, self.learned.latest
        times = followed[:, 0].numpy()
        counted = (followed[:, 1].numpy() > 0) & (times < latest)
        weight = np.where(counted, 1 / np.maximum(g.before(times), 1e-12), 0.0)
        reached = self.follow_up.bins.cumulative(probabilities, followed[:, 0])
        most = torch.full_like(reached, 1 / float(g.before(latest)))
        return {"times": torch.stack([reached, torch.from_numpy(weight), most], 1)}

    def value_of(
        self,
        probabilities: Mapping[str, Tensor],
        method: str,
        pattern: str,
        bounds: Conformal | None,
        calibration: Calibration | None = None,
    ) -> Statement:
        """Return curve, risks and lower bound."""
        assert calibration is not None and calibration.recalibration is not None
        guarantee = Guarantee(
            calibration.recalibration,
            {} if bounds is None else bounds.times,
            self.learned.latest,
            self.learned.everybody,
        )
        stated = {m: p[None] for m, p in probabilities.items()}
        return state(self.follow_up, guarantee, stated, method, pattern)

    def answer_row(self, probabilities: Tensor) -> dict[str, Any]:
        """Return risks at the horizons."""
        risks = 1 - self.follow_up.bins.survival(probabilities, self.follow_up.horizons)
        return dict(zip(self.answer_columns, risks.tolist(), strict=True))

    def truth_row(self, record: PatientRecord) -> dict[str, Any]:
        """Return time and event."""
        if record.value is None:
            return {}
        return {"time": record.value, "event": int(bool(record.event)), "bound": None}

    def own_row(self, value: Value | Statement | None) -> dict[str, Any]:
        """Return the lower bound."""
        return {"bound": value.bound} if isinstance(value, Statement) else {}

    def estimates(
        self,
        scores: Scores,
        pairs: Sequence[tuple[str, str]],
        seed: int,
        *,
        resamples: int = 1000,
        whole: bool = True,
    ) -> dict[str, dict[str, Estimate]]:
        """Return how good curves are under censoring, and the bundle's own lower bounds."""
        truth = np.stack([scores.known["time"], scores.known["event"]], 1)
        chosen = metrics_of(self.follow_up.bins, self.follow_up.horizons)
        if not whole:
            chosen = {name: chosen[name] for name in _PART_METRICS}
        estimates = resampled(
            truth, scores.probabilities, scores.patient_ids, pairs, chosen, seed, resamples
        )
        bound = scores.known["bound"]
        if not np.isnan(bound).all():
            about = {"bound_coverage": bound_coverage, "bound": mean_bound}
            found = resampled(
                truth, {scores.own: bound}, scores.patient_ids, (), about, seed, resamples
            )
            estimates[scores.own] |= found[scores.own]
        return estimates

    @property
    def predicts(self) -> str:
        """What is predicted, for the model card."""
        return (
            f"the time until the event in {self.unit}, as a distribution over these bins, which"
            f" below count as classes: {super().predicts}"
        )

    def accepts(self, other: Task) -> tuple[str, str, str] | None:
        """Return why another cohort's times cannot be judged by this one; bins are its own."""
        found = super().accepts(other)
        return found if other.type != self.type else None
