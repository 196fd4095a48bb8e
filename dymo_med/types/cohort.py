"""A described cohort, before any file of a patient is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dymo_med.types.record import CohortRecord
from dymo_med.types.spec import ModalitySpec
from dymo_med.types.task import Task

Split = Literal["train", "validation", "calibration", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "calibration", "test")


@dataclass(frozen=True)
class Subgroup:
    """A way to divide patients, for reporting.

    Attributes:
        name: What it is called.
        column: Column of a table, or of the labels file.
        modality: The table; None = the labels file.
        edges: Where a number's bands end; empty for categories.
    """

    name: str
    column: str
    modality: str | None = None
    edges: tuple[float, ...] = ()


@dataclass(frozen=True)
class Cohort:
    """A described cohort: records, labels and splits; no patient data yet.

    Attributes:
        name: Name of the cohort.
        root: Folder of `cohort.yaml`.
        task: What is predicted.
        specs: Modalities in canonical order.
        records: All records, in file order.
        splits: Split of each patient id.
        missing_values: Strings that mean "blank" in this cohort's tables, besides the empty cell.
        subgroups: Ways to divide patients, for reporting.
        quality: Limits of the quality gate that differ from the usual ones, by name.
    """

    name: str
    root: Path
    task: Task
    specs: tuple[ModalitySpec, ...]
    records: tuple[CohortRecord, ...]
    splits: Mapping[str, Split]
    missing_values: tuple[str, ...] = ()
    subgroups: tuple[Subgroup, ...] = ()
    quality: Mapping[str, float] = field(default_factory=dict)

    def in_split(self, split: Split) -> tuple[CohortRecord, ...]:
        """Return the records whose patient is in `split`, in file order."""
        return tuple(r for r in self.records if self.splits.get(r.patient_id) == split)
