"""One record, read and preprocessed, and what the quality gate says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

GateState = Literal["pass", "warn", "refuse"]


@dataclass(frozen=True)
class CohortRecord:
    """Where one record (visit) is, before any file of it is read.

    Attributes:
        record_id: Unique within the cohort.
        patient_id: Whose visit this is; splits go by patient.
        folder: Patient directory of this record.
        label: Class index, or None where the target is not known.
        value: The number of a regression, or None; `label` is its band. Of survival, the time.
        subgroups: Cells of the labels file that subgroups are made from, by subgroup.
        root: Folder of the cohort.
        event: Of survival, whether that is the time of the event.
    """

    record_id: str
    patient_id: str
    folder: Path
    label: int | None = None
    subgroups: Mapping[str, str] = field(default_factory=dict)
    root: Path | None = None
    value: float | None = None
    event: bool | None = None


@dataclass(frozen=True)
class Source:
    """Where a value came from.

    Attributes:
        file: File name relative to the patient directory (never an absolute path).
        sha256: Hash of the file's bytes (of all files' hashes, sorted, for a folder).
        affine: 4 x 4 voxel-to-world matrix in mm (RAS+) of the *preprocessed* grid, as nested
            tuples; None for tables and for images without geometry.
        facts: Acquisition facts worth showing ("size": "240 x 240 x 155"), never identifying.
    """

    file: str
    sha256: str
    affine: tuple[tuple[float, ...], ...] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FieldOfView:
    """Where a volume as stored lies in the world.

    Attributes:
        size: Voxels per axis.
        affine: 4 x 4 voxel-to-world matrix in mm (RAS+), as nested tuples; may be sheared.
    """

    size: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Native:
    """A scan as it was stored, measured before it was put on its modality's grid.

    Attributes:
        size: Voxels per axis: to the right, to the front, upwards (as far as the axes follow the
            body); rows and columns of a picture.
        spacing_mm: Voxel size along the same axes; None for a picture, which states none.
        tilt_degrees: Largest angle between an axis and the body's axis that it follows.
        low: 1st percentile of the stored numbers. Likewise `middle` (50th) and `high` (99th).
        levels: How many different numbers there are, counted to 256.
        foreground: Share of voxels that are brighter than the threshold that parts dark from
            bright best (Otsu).
        structure: Correlation of neighbouring voxels, along the axis where it is largest: near 1
            in a picture of something, near 0 in noise.
    """

    size: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    tilt_degrees: float
    low: float
    middle: float
    high: float
    levels: int
    foreground: float
    structure: float


@dataclass(frozen=True)
class GateFinding:
    """One thing that the quality gate holds against a modality.

    Attributes:
        check: Which check (`data.gate.CHECKS`).
        level: How much it matters.
        got: What was found: sizes, shares, names of columns; never a patient's value.
        expected: What the model has seen, or would need.
    """

    check: str
    level: Literal["warn", "refuse"]
    got: str
    expected: str = ""


@dataclass(frozen=True)
class GateResult:
    """What the quality gate says of one modality of one record."""

    findings: tuple[GateFinding, ...] = ()

    @property
    def state(self) -> GateState:
        """The gravest level of the findings, `pass` without any."""
        levels = {finding.level for finding in self.findings}
        return "refuse" if "refuse" in levels else "warn" if levels else "pass"


@dataclass(frozen=True)
class Norms:
    """What the modalities of training records were like, for the quality gate (`data.gate`).

    Attributes:
        limits: Limits that differ from the usual ones, by name.
        ranges: Per modality and measure the 1st and 99th percentile over training records, so
            that no single patient's figure stands here; without modalities that too few had.
        records: Training records that have the modality.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    ranges: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    records: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ModalityValue:
    """One modality of one record, read and preprocessed.

    Attributes:
        values: Float32 `(*spec.shape)`. Tables: natural units, categories as their index,
            blank cells 0 and False in `observed_fields`.
        observed_fields: Bool `(F,)` for tables (True = the cell was filled); None for images.
        source: Where it came from.
        warnings: Sentences worth showing to a reader of the report.
        identifiers: What the file calls the patient (DICOM's PatientID, FHIR's identifiers); only
            `privacy` turns them into something that may be shown.
        field_of_view: Where a volume as stored lies; None for pictures and tables.
        native: The scan as it was stored; None for tables.
        descriptors: Float32 `(P,)`, of a scan's intensities as stored (`modalities.descriptors`);
            None for other kinds.
        fingerprint: By which the same scan is known in another file (`modalities.native`); None
            for other kinds.
        same_as: Name of another modality that has the same voxels; empty if none has.
    """

    values: Tensor
    source: Source
    observed_fields: Tensor | None = None
    warnings: tuple[str, ...] = ()
    identifiers: tuple[str, ...] = field(default=(), repr=False)
    field_of_view: FieldOfView | None = None
    native: Native | None = None
    descriptors: Tensor | None = None
    fingerprint: Tensor | None = field(default=None, repr=False)
    same_as: str = ""


@dataclass(frozen=True)
class PatientRecord:
    """The observed modalities of one record; a missing modality has no key.

    Attributes:
        record_id: Id of the record.
        patient_id: Id of the patient.
        modalities: Observed modalities by name.
        label: Class index, or None.
        value: The number of a regression, or None; `label` is its band. Of survival, the time.
        mask: Uint8 `(X, Y, Z)`, the labels of a segmentation on the grid of the scans; None if
            not known or not read.
        refused: Modalities that were brought, that the quality gate refused and that therefore
            count as missing.
        unused: Files and folders of the patient directory that no modality looks at.
        event: Of survival, whether `value` is the time of the event.
    """

    record_id: str
    patient_id: str
    modalities: Mapping[str, ModalityValue]
    label: int | None = None
    value: float | None = None
    mask: Tensor | None = None
    refused: Mapping[str, GateResult] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    event: bool | None = None

    @property
    def identifier(self) -> str | None:
        """What all files that name the patient call them; None = no file does."""
        stated = [set(v.identifiers) for v in self.modalities.values() if v.identifiers]
        shared = set.intersection(*stated) if stated else set()
        return min(shared, default=None) or next((min(names) for names in stated), None)

    def without(self, names: Sequence[str]) -> PatientRecord:
        """Return this record with some modalities taken away."""
        kept = {k: v for k, v in self.modalities.items() if k not in names}
        return replace(self, modalities=kept)
