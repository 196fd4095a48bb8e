"""The answer for one record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from dymo_med.survival import Statement
from dymo_med.types.record import GateResult, Source
from dymo_med.types.selection import SelectionStep

_SHOWN = ("observed", "partly", "refused", "trusted", "rejected", "absent")


@dataclass(frozen=True)
class Attribution:
    """How much one input moved the answer.

    Attributes:
        modality: Name of the modality.
        name: Column for a table cell, empty for the modality as a whole.
        value: Change of the predicted class probability that is ascribed to it.
        method: Name of the method ("shapley", "feature_ablation").
        recovered: Whether the input was made up: a modality that was missing, a blank cell.
    """

    modality: str
    name: str
    value: float
    method: str
    recovered: bool = False


@dataclass(frozen=True)
class WeightedSubset:
    """One of the subsets over which an answer was averaged.

    Attributes:
        admitted: The recoveries in it, beside everything observed.
        weight: Its share of the answer.
    """

    admitted: tuple[str, ...]
    weight: float


@dataclass(frozen=True)
class Value:
    """The number that a regression answers.

    Attributes:
        value: Mean of the bands' centres by the answer's probabilities.
        low: Lower end of the interval; None where the bundle cannot tell.
        high: Upper end likewise.
        coverage: Share of patients whose true value such intervals hold.
        compared_with: Whose errors the interval rests on: `pattern` or `all`.
        calibrated_on: How many patients these are.
        least: Of fewer the interval is the whole scale.
        unit: For people; empty if none.
        centers: Of the K bands.
        alternatives: Answers of the other methods by name.
    """

    value: float
    low: float | None
    high: float | None
    coverage: float
    compared_with: Literal["pattern", "all"]
    calibrated_on: int
    least: int
    unit: str
    centers: tuple[float, ...]
    alternatives: Mapping[str, float]


@dataclass(frozen=True)
class Prediction:
    """The answer for one record, and what it rests on.

    Attributes:
        record_id: Id of the record.
        patient_id: Id of the patient.
        classes: K class names.
        probabilities: K calibrated probabilities of the bundle's own selector.
        alternatives: Calibrated probabilities of the other methods by name.
        observed: Modalities measured (wholly or partly).
        partly: Of those, tables with blank cells.
        recovered: Missing modalities for which values were proposed, and tables completed.
        trusted: Of `recovered`, those the selector admitted.
        rejected: Of `recovered`, those it did not.
        absent: Missing modalities for which nothing could be proposed.
        method: Selector behind `probabilities`.
        steps: The selection, in order.
        attributions: Empty with `--no-explain`.
        warnings: Sentences.
        sources: Where each observed modality came from.
        bundle_id: Content hash of the bundle.
        bundle_name: Name of the bundle.
        seed: Seed of the run.
        base_rates: K class shares among training patients: the starting point of Shapley values.
        subsets: What the answer was averaged over, heaviest first; empty where it comes from
            `observed` and `trusted` alone.
        value: The number of a regression, of which `classes` are the bands; else None.
        survival: What is stated of a survival time, of which `classes` are the bins; else None.
        quality: What the quality gate says of each observed modality, and of each of `refused`.
        refused: Modalities that were brought but refused by the gate and treated as missing.
        status: `answered`, `caution` or `abstained` (no answer can be given); None = not judged.
        reasons: Why not `answered`, a sentence each.
        prediction_set: Classes that cannot be ruled out; None where the bundle cannot tell.
    """

    record_id: str
    patient_id: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    alternatives: Mapping[str, tuple[float, ...]]
    observed: tuple[str, ...]
    partly: tuple[str, ...]
    recovered: tuple[str, ...]
    trusted: tuple[str, ...]
    rejected: tuple[str, ...]
    absent: tuple[str, ...]
    method: str
    steps: tuple[SelectionStep, ...]
    attributions: tuple[Attribution, ...]
    warnings: tuple[str, ...]
    sources: Mapping[str, Source]
    bundle_id: str
    bundle_name: str
    seed: int
    base_rates: tuple[float, ...] = ()
    subsets: tuple[WeightedSubset, ...] = ()
    value: Value | None = None
    quality: Mapping[str, GateResult] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    survival: Statement | None = None
    status: Literal["answered", "caution", "abstained"] | None = None
    reasons: tuple[str, ...] = ()
    prediction_set: tuple[str, ...] | None = None

    @property
    def predicted(self) -> str:
        """The most probable class."""
        return self.classes[max(range(len(self.classes)), key=lambda k: self.probabilities[k])]

    def _repr_html_(self) -> str:
        """Return a small table, which notebooks show."""
        shares = ", ".join(
            f"{c} {p:.1%}" for c, p in zip(self.classes, self.probabilities, strict=True)
        )
        rows = {
            "status": self.status or "not judged",
            "answer": shares,
            "cannot be ruled out": ", ".join(self.prediction_set or ()),
            **{word: ", ".join(getattr(self, word)) for word in _SHOWN},
            "notes": " ".join((*self.reasons, *self.warnings)),
        }
        if self.value is not None:
            rows["answer"] = f"{self.value.value:.4g} {self.value.unit}".rstrip()
            if self.value.low is not None and self.value.high is not None:
                ends = f"{self.value.low:.4g} to {self.value.high:.4g}"
                rows["answer"] += f" ({self.value.coverage:.0%} interval {ends})"
        told = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>"
            for name, text in rows.items()
            if text
        )
        return f"<table><caption>{escape(self.record_id)}</caption>{told}</table>"

    @property
    def trust(self) -> dict[str, float]:
        """Share of the answer that rests on each recovery, where it is an average."""
        return {
            name: sum(s.weight for s in self.subsets if name in s.admitted)
            for name in self.recovered
            if self.subsets
        }
