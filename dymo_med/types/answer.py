"""The answer for one record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dymo_med.types.record import GateResult, Source
from dymo_med.types.selection import SelectionStep


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
        quality: What the quality gate says of each observed modality, and of each of `refused`.
        refused: Modalities that were brought but refused by the gate and treated as missing.
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

    @property
    def trust(self) -> dict[str, float]:
        """Share of the answer that rests on each recovery, where it is an average."""
        return {
            name: sum(s.weight for s in self.subsets if name in s.admitted)
            for name in self.recovered
            if self.subsets
        }
