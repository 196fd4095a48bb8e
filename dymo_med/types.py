"""The nouns of the package: frozen dataclasses and protocols, checked once at construction.

Letters in shapes, everywhere: B patients (records), M modalities, K classes, D embedding size,
N tokens, T selection steps, S subsets, F table columns, C image channels, R rows of a request.

Polarity, everywhere: True = available.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

Split = Literal["train", "validation", "calibration", "test"]
GateState = Literal["pass", "warn", "refuse"]
SPLITS: tuple[Split, ...] = ("train", "validation", "calibration", "test")


@dataclass(frozen=True)
class CellRules:
    """How a column's cells are written where that is more than a plain number or category.

    Attributes:
        header: Name of the column in the file; empty = the column's own.
        units: Units besides the column's that a file may state; numbers in them are converted.
            Where there is one, the file has to state a unit.
        molar_mass: Of the substance in g/mol, for units of mass and of amount.
        aliases: Pairs of a word in the file and the category it stands for.
        missing: Words that mean "blank" in this column.
        censored: What `<5` is: an error, the limit itself (5), or blank.
        until: The cells hold dates, and the value is the time from there to this date: a column
            of the same row, or a day as YYYY-MM-DD.
        date_format: How dates are written, as for `strptime`; empty = YYYY-MM-DD.
        partial: What the value of a date is that gives only the month or the year: the middle of
            what it allows, or blank.
        loinc: LOINC codes of the observations that hold this column in a FHIR record.
        fhir: Or the element of the patient that does, `gender` or `birthDate`.
        pick: Which observation counts if several differ: none (an error), the latest, or the
            earliest.
    """

    header: str = ""
    units: tuple[str, ...] = ()
    molar_mass: float | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    missing: tuple[str, ...] = ()
    censored: Literal["error", "limit", "missing"] = "error"
    until: str = ""
    date_format: str = ""
    partial: Literal["middle", "missing"] = "middle"
    loinc: tuple[str, ...] = ()
    fhir: str = ""
    pick: Literal["error", "latest", "earliest"] = "error"


@dataclass(frozen=True)
class FileRules:
    """How a table's file is written where that is more than UTF-8 with one row.

    Attributes:
        format: `fhir` for a FHIR record; empty = what the extension says.
        encoding: Of text without a byte-order mark; empty = UTF-8.
        separator: Between cells of a CSV file; empty = the one that makes a header of the
            declared columns.
        decimal: The decimal sign of numbers in text.
        shared: File inside the cohort's folder that holds a row for every record; read where the
            patient directory has no file of its own.
        record_column: Column that names the record of a row.
        patient_column: Column that names the patient of a row.
        statuses: FHIR observations of other status are no data; empty = final, amended and
            corrected, and a preliminary one is an error.
    """

    format: str = ""
    encoding: str = ""
    separator: str = ""
    decimal: str = "."
    shared: str = ""
    record_column: str = ""
    patient_column: str = ""
    statuses: tuple[str, ...] = ()


RulesT = TypeVar("RulesT", CellRules, FileRules)


def _told(rules: CellRules | FileRules | None) -> dict[str, Any]:
    """Return what rules say beyond the default."""
    if rules is None:
        return {}
    return {k: v for k, v in asdict(rules).items() if v != getattr(type(rules)(), k)}


def _untold(kind: type[RulesT], data: Mapping[str, Any] | None) -> RulesT | None:
    """Return the rules that `_told` described."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return kind(**{k: frozen(v) for k, v in data.items()}) if data else None


@dataclass(frozen=True)
class Logarithm:
    """A column's numbers as log(number + shift), standardised.

    Attributes:
        shift: What is added before the logarithm is taken.
        mean: Mean of the logarithms over training patients' observed cells.
        std: Standard deviation likewise, positive.
    """

    shift: float
    mean: float
    std: float


@dataclass(frozen=True)
class Column:
    """One column of a table modality.

    Attributes:
        name: Header of the column in the file.
        type: `continuous` or `categorical`.
        unit: Unit of a continuous column, for people ("U/L"); empty if none.
        range: Plausible closed range of a continuous column in `unit`; outside it is an error.
        values: Categories of a categorical column, in canonical order.
        mean: Mean over training patients' observed cells, in `unit`; None before fitting.
        std: Standard deviation likewise, positive; None before fitting.
        frequencies: Share of each category among training patients' observed cells, one per
            entry of `values`; empty before fitting and for continuous columns.
        percentiles: The 101 percentiles 0..100 of a continuous column over training patients,
            in `unit`, the first and last replaced by the 1st and 99th; empty before fitting, for
            categorical columns, and where too few cells were filled to hide single patients.
        importance: How much the column tells about the target, as a share of what all columns of
            all tables tell (`training.train.fit_importances`); None before fitting and in
            bundles that were made without it.
        rules: How its cells are written; None = plain numbers, or the categories themselves.
        logarithm: How networks see a continuous column that is skewed; None = as it is.
    """

    name: str
    type: Literal["continuous", "categorical"]
    unit: str = ""
    range: tuple[float, float] | None = None
    values: tuple[str, ...] = ()
    mean: float | None = None
    std: float | None = None
    frequencies: tuple[float, ...] = ()
    percentiles: tuple[float, ...] = ()
    importance: float | None = None
    rules: CellRules | None = None
    known: bool = True

    @property
    def neutral(self) -> float:
        """What stands for a cell of a column that is not known: the mean, or the first category."""
        return 0.0 if self.values else self.mean or 0.0

    logarithm: Logarithm | None = None


@dataclass(frozen=True)
class DescriptorNorms:
    """What is fitted to the descriptors of an image's training scans (`modalities.descriptors`).

    Attributes:
        center: Their means `(P,)`.
        components: `(Q, P)`: Q principal components of the standardised descriptors, divided by
            what they spread among training scans, from differences to `center`.
        adapt: `(P, P + 1)`: descriptors of a scan as stored from those of its values on the grid,
            with the constant last; for recovered scans, which have no other voxels.
    """

    center: tuple[float, ...]
    components: tuple[tuple[float, ...], ...]
    adapt: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Steps:
    """How a sequence of feature vectors is brought to its number of steps, and its constants.

    Attributes:
        pooling: Which steps are averaged where there are too many (`modalities.tokens`).
        standardise: Whether networks see features with zero mean and unit spread.
        mean: Mean of each feature over training records and steps; empty before fitting, and
            where nothing is standardised.
        std: Standard deviation likewise, positive.
    """

    pooling: Literal["neighbours", "interleaved"] = "neighbours"
    standardise: bool = True
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class SeriesRule:
    """Which DICOM series of a folder is meant; every rule that is declared must hold.

    Attributes:
        modality: The Modality tag ("MR"); empty = any.
        description: Regular expression that is searched for in the SeriesDescription, capitals or
            not; empty = any.
        slices: Fewest and most slices; None = any.
        absent: What it means that no series fits: an `error`, or that the scan is `missing`.
    """

    modality: str = ""
    description: str = ""
    slices: tuple[int, int] | None = None
    absent: Literal["error", "missing"] = "error"


@dataclass(frozen=True)
class ModalitySpec:
    """What one modality is: enough to read it, encode it and describe it.

    Attributes:
        name: Name within the cohort ("t1ce").
        kind: Registry key of the modality kind ("image", "table", "tokens").
        file: File (or stem) inside a patient's folder.
        shape: `(C, *spatial)` for images, `(F,)` for tables, `(L, C)` (steps, features) for
            tokens.
        spacing_mm: Voxel size along each spatial axis in mm; empty for other kinds.
        intensity: Image intensity rule ("zscore", "percentile" or "none"); empty for other kinds.
        columns: Columns of a table in order; empty for other kinds.
        steps: Of a sequence of feature vectors; None for other kinds.
        dicom: Which series of a DICOM folder is meant; None = its only one.
        grid: Where a volume's grid lies: `shared` = with the other volumes on a grid of this size
            and spacing, centred on their `reference` (the first that was observed, if none is
            called that); `own` = centred on the scan itself.
        rules: How a table's file is written; None = UTF-8, one row.
        descriptors: Of an image: what is fitted to its scans' descriptors; None before fitting.
    """

    name: str
    kind: str
    file: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...] = ()
    intensity: str = ""
    columns: tuple[Column, ...] = ()
    steps: Steps | None = None
    dicom: SeriesRule | None = None
    grid: Literal["shared", "reference", "own"] = "shared"
    rules: FileRules | None = None
    descriptors: DescriptorNorms | None = None

    @property
    def is_image(self) -> bool:
        """Whether values lie on a spatial grid."""
        return self.kind == "image"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; what does not apply to a modality has no key in it."""
        data = asdict(self)
        if self.steps is None:
            del data["steps"]
        if self.dicom is None:
            del data["dicom"]
        if self.grid == "shared":
            del data["grid"]
        if self.descriptors is None:
            del data["descriptors"]
        parts: list[tuple[dict[str, Any], CellRules | FileRules | None]] = [(data, self.rules)]
        for column, own in zip(data["columns"], self.columns, strict=True):
            if own.importance is None:
                del column["importance"]
            if own.known:
                del column["known"]
            if own.logarithm is None:
                del column["logarithm"]
            parts.append((column, own.rules))
        for part, rules in parts:
            del part["rules"]
            if told := _told(rules):
                part["rules"] = told
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModalitySpec:
        """Return the spec that `to_dict` described."""
        columns = tuple(
            Column(
                **{
                    **column,
                    "range": tuple(column["range"]) if column["range"] is not None else None,
                    "values": tuple(column["values"]),
                    "frequencies": tuple(column["frequencies"]),
                    "percentiles": tuple(column["percentiles"]),
                    "rules": _untold(CellRules, column.get("rules")),
                    "logarithm": Logarithm(**column["logarithm"])
                    if column.get("logarithm")
                    else None,
                }
            )
            for column in data["columns"]
        )
        steps = data.get("steps")
        return cls(
            name=data["name"],
            kind=data["kind"],
            file=data["file"],
            shape=tuple(data["shape"]),
            spacing_mm=tuple(data["spacing_mm"]),
            intensity=data["intensity"],
            columns=columns,
            steps=None
            if steps is None
            else Steps(
                **{**steps, "mean": tuple(steps["mean"]), "std": tuple(steps["std"])},
            ),
            dicom=_series_rule(data.get("dicom")),
            grid=data.get("grid", "shared"),
            rules=_untold(FileRules, data.get("rules")),
            descriptors=None
            if data.get("descriptors") is None
            else DescriptorNorms(
                tuple(data["descriptors"]["center"]),
                tuple(map(tuple, data["descriptors"]["components"])),
                tuple(map(tuple, data["descriptors"]["adapt"])),
            ),
        )


def _series_rule(data: Mapping[str, Any] | None) -> SeriesRule | None:
    if data is None:
        return None
    slices = data["slices"]
    return SeriesRule(**{**data, "slices": None if slices is None else tuple(slices)})


@dataclass(frozen=True)
class Scale:
    """The number that a regression predicts, and the bands that its networks think in.

    A network says how likely each band is, and the answer is the mean of the bands' centres by
    these probabilities. In training a true value belongs to the two bands it lies between, in
    proportion to how near it is to their centres, so that the mean is the value itself. With bands
    in the place of classes, whatever is defined on classes (prototypes, rewards, prediction sets,
    explanations) is defined on a number as well.

    Attributes:
        low: Lowest value there is.
        high: Highest value there is.
        centers: Of K bands, ascending, from `low` to `high`. A value belongs to the nearest.
        unit: For people; empty if none.

    References:
        Imani and White, Improving Regression Performance with Distributional Losses, ICML 2018;
        Schrittwieser et al., Mastering Atari, Go, Chess and Shogi by Planning with a Learned
        Model, Nature 588, 2020 (a value as shares of its two neighbours).

    Example:
        >>> scale = Scale(-1.0, 1.0, (-1.0, 0.0, 1.0))
        >>> scale.shares(torch.tensor([0.25])).tolist(), scale.band(0.25)
        ([[0.0, 0.75, 0.25]], 1)
        >>> scale.value(torch.tensor([0.0, 0.75, 0.25])).item()
        0.25
    """

    low: float
    high: float
    centers: tuple[float, ...]
    unit: str = ""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.centers))
        ends = len(self.centers) >= 2 and (self.centers[0], self.centers[-1])
        if not rising or ends != (self.low, self.high):
            raise ValueError("The bands' centres must rise from the lowest value to the highest.")
        if len(set(self.names)) != len(self.centers):
            raise ValueError("The bands' centres are too close to each other to have names.")

    @property
    def names(self) -> tuple[str, ...]:
        """K names of bands, by their centres ("near 2 mmHg")."""
        return tuple(f"near {center:g} {self.unit}".rstrip() for center in self.centers)

    def band(self, value: float) -> int:
        """Return the index of the nearest centre, the lower one on a tie."""
        return min(range(len(self.centers)), key=lambda k: abs(value - self.centers[k]))

    def shares(self, values: Tensor) -> Tensor:
        """Return what part of each value belongs to each band.

        Args:
            values: `(n,)`, NaN = not known.

        Returns:
            Float32 `(n, K)`; rows add up to 1, or are 0 where the value is not known.
        """
        centers = torch.tensor(self.centers, dtype=torch.float64)
        known = ~values.isnan()
        inside = values.double().where(known, self.low).clamp(self.low, self.high)
        right = torch.searchsorted(centers, inside, right=True).clamp(1, len(centers) - 1)
        step = centers[right] - centers[right - 1]
        share = (inside - centers[right - 1]) / step
        found = torch.zeros(len(values), len(centers), dtype=torch.float64)
        found.scatter_(1, right[:, None] - 1, 1 - share[:, None])
        found.scatter_(1, right[:, None], share[:, None])
        return (found * known[:, None]).float()

    def value(self, shares: Tensor) -> Tensor:
        """Return the mean of the bands' centres: `(...)` from probabilities `(..., K)`."""
        return shares @ torch.tensor(self.centers, dtype=shares.dtype, device=shares.device)


@dataclass(frozen=True)
class MaskSpec:
    """Where a segmentation's masks are and what their numbers mean.

    Attributes:
        file: File inside a patient's folder.
        labels: Every number that a mask may hold besides 0.
        regions: Labels that make up each region, by the region's name in canonical order: outer
            ones before those within them.
    """

    file: str
    labels: tuple[int, ...]
    regions: Mapping[str, tuple[int, ...]]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MaskSpec:
        """Return the spec that `dataclasses.asdict` described."""
        regions = {name: tuple(labels) for name, labels in data["regions"].items()}
        return cls(data["file"], tuple(data["labels"]), regions)


@dataclass(frozen=True)
class Task:
    """What is predicted.

    Attributes:
        type: `classification`, `regression` or `segmentation`.
        target: Column of `labels.csv`; of a segmentation, the file of the masks.
        classes: Class names in canonical order. For two classes the last is the positive one. Of a
            regression, the names of its bands; of a segmentation, those of its regions.
        scale: The number that a regression predicts.
        mask: The masks of a segmentation.
    """

    type: Literal["classification", "regression", "segmentation"]
    target: str
    classes: tuple[str, ...]
    scale: Scale | None = None
    mask: MaskSpec | None = None

    def __post_init__(self) -> None:
        if (self.type == "regression") != (self.scale is not None):
            raise ValueError("A regression has a scale, and nothing else has one.")
        if self.scale is not None and self.scale.names != self.classes:
            raise ValueError("The classes of a regression are its bands.")
        if (self.type == "segmentation") != (self.mask is not None):
            raise ValueError("A segmentation has masks, and nothing else has any.")
        if self.mask is not None:
            if tuple(self.mask.regions) != self.classes:
                raise ValueError("The classes of a segmentation are the regions of its masks.")
        elif len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"A task needs at least two distinct classes, got {self.classes}.")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; what does not apply to the task has no key."""
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class CohortRecord:
    """Where one record (visit) is, before any file of it is read.

    Attributes:
        record_id: Unique within the cohort.
        patient_id: Whose visit this is; splits go by patient.
        folder: Patient directory of this record.
        label: Class index, or None where the target is not known.
        value: The number of a regression, or None; `label` is its band.
        subgroups: Cells of the labels file that subgroups are made from, by subgroup.
        root: Folder of the cohort.
    """

    record_id: str
    patient_id: str
    folder: Path
    label: int | None = None
    subgroups: Mapping[str, str] = field(default_factory=dict)
    root: Path | None = None
    value: float | None = None


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
        value: The number of a regression, or None; `label` is its band.
        mask: Uint8 `(X, Y, Z)`, the labels of a segmentation on the grid of the scans; None if
            not known or not read.
        refused: Modalities that were brought, that the quality gate refused and that therefore
            count as missing.
        unused: Files and folders of the patient directory that no modality looks at.
    """

    record_id: str
    patient_id: str
    modalities: Mapping[str, ModalityValue]
    label: int | None = None
    value: float | None = None
    mask: Tensor | None = None
    refused: Mapping[str, GateResult] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

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


@dataclass(frozen=True)
class ModalityMask:
    """Which modalities are available, per patient.

    Attributes:
        names: Modality names in canonical order.
        available: Bool `(B, M)`, True = available.
    """

    names: tuple[str, ...]
    available: Tensor

    def __post_init__(self) -> None:
        if self.available.dtype != torch.bool or self.available.ndim != 2:
            raise ValueError(
                f"available must be a bool tensor of shape (B, M), got {self.available.dtype}"
                f" {tuple(self.available.shape)}."
            )
        if self.available.shape[1] != len(self.names):
            raise ValueError(
                f"available has {self.available.shape[1]} columns for {len(self.names)} names."
            )

    def of(self, row: int) -> tuple[str, ...]:
        """Return the names available to one patient."""
        return tuple(n for n, a in zip(self.names, self.available[row].tolist(), strict=True) if a)


def subset_id(available: Tensor) -> Tensor:
    """Return each subset's bitmask id, the sum of 2^m over its available modalities.

    Args:
        available: Bool `(..., M)`, M at most 62.

    Returns:
        Int64 `(...)`.

    Example:
        >>> subset_id(torch.tensor([[True, False, True]])).tolist()
        [5]
    """
    weights = torch.ones((), dtype=torch.int64, device=available.device) << torch.arange(
        available.shape[-1], device=available.device
    )
    return (available.to(torch.int64) * weights).sum(-1)


@dataclass(frozen=True)
class Batch:
    """Records collated: one tensor per modality, and masks that say what is real.

    Attributes:
        record_ids: B ids.
        patient_ids: B ids.
        values: Per modality float32 `(B, *shape)`; finite everywhere, meaningless where not
            observed.
        observed: True where the modality was measured (a partly filled table counts).
        observed_fields: Per table modality bool `(B, F)`, True = the cell was filled; all False
            where the table is missing.
        labels: Int64 `(B,)`, -1 = not known.
        shares: Of a regression in training, what part of each true value belongs to each band
            `(B, K)`, 0 where it is not known (`Scale.shares`); else None.
        masks: Uint8 `(B, X, Y, Z)`, the labels of a segmentation, all 0 where not known; None if
            no record has one.
        masked: Bool `(B,)`: True = the mask is known; None likewise.
        descriptors: Per image modality float32 `(B, P)`, of scans as they were stored; meaningless
            where not observed. A modality without an entry is described by its values.
    """

    record_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    values: Mapping[str, Tensor]
    observed: ModalityMask
    observed_fields: Mapping[str, Tensor]
    labels: Tensor
    shares: Tensor | None = None
    masks: Tensor | None = None
    masked: Tensor | None = None
    descriptors: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return B."""
        return len(self.record_ids)

    @property
    def truth(self) -> Tensor:
        """What a cross entropy is asked to match: `labels`, or the shares of a regression."""
        return self.labels if self.shares is None else self.shares

    def to(self, device: torch.device | str) -> Batch:
        """Return this batch with every tensor on `device`."""
        return replace(
            self,
            values={k: v.to(device) for k, v in self.values.items()},
            observed=replace(self.observed, available=self.observed.available.to(device)),
            observed_fields={k: v.to(device) for k, v in self.observed_fields.items()},
            labels=self.labels.to(device),
            shares=None if self.shares is None else self.shares.to(device),
            masks=None if self.masks is None else self.masks.to(device),
            masked=None if self.masked is None else self.masked.to(device),
            descriptors={k: v.to(device) for k, v in self.descriptors.items()},
        )

    def rows(self, index: Tensor) -> Batch:
        """Return the records at integer positions `index` `(R,)`, in that order."""
        positions = index.tolist()
        return Batch(
            record_ids=tuple(self.record_ids[i] for i in positions),
            patient_ids=tuple(self.patient_ids[i] for i in positions),
            values={k: v[index] for k, v in self.values.items()},
            observed=replace(self.observed, available=self.observed.available[index]),
            observed_fields={k: v[index] for k, v in self.observed_fields.items()},
            labels=self.labels[index],
            shares=None if self.shares is None else self.shares[index],
            masks=None if self.masks is None else self.masks[index],
            masked=None if self.masked is None else self.masked[index],
            descriptors={k: v[index] for k, v in self.descriptors.items()},
        )

    def partly_filled(self) -> Tensor:
        """Return bool `(B, M)`: True = an observed table with at least one blank cell."""
        result = torch.zeros_like(self.observed.available)
        for m, name in enumerate(self.observed.names):
            if name in self.observed_fields:
                blank = ~self.observed_fields[name].all(dim=1)
                result[:, m] = self.observed.available[:, m] & blank
        return result


@dataclass(frozen=True)
class LatentTokens:
    """Recovered modalities as a network's own tokens.

    Attributes:
        space: The network part whose tokens they are; nobody else can read them.
        values: Per modality `(B, N, D)`; they mean nothing where nothing was recovered.
    """

    space: object
    values: Mapping[str, Tensor]


@dataclass(frozen=True)
class Recovery:
    """What an imputer proposes for a batch.

    Attributes:
        values: Per modality float32 `(B, *shape)`: observed values bit for bit, proposals where
            something was missing. Where nothing could be proposed the values mean nothing.
        observed: The batch's own mask.
        recovered: Bool `(B, M)`: the modality was missing and values are proposed.
        completed: Bool `(B, M)`: a partly filled table whose blank cells are proposed.
        draws: Optional seeded draws per modality `(n, B, *shape)`, for uncertainty.
        latents: Optional tokens that a backbone takes in place of the values, if they are its own.
    """

    values: Mapping[str, Tensor]
    observed: ModalityMask
    recovered: Tensor
    completed: Tensor
    draws: Mapping[str, Tensor] | None = None
    latents: LatentTokens | None = None

    def tokens_for(self, space: object) -> Mapping[str, Tensor]:
        """Return recovered tokens `(B, N, D)` by modality; none if they are not of this space."""
        if self.latents is None or space is None or self.latents.space is not space:
            return {}
        return self.latents.values

    @property
    def candidates(self) -> Tensor:
        """Bool `(B, M)`: what the selector may admit: recovered or completed."""
        return self.recovered | self.completed


@dataclass(frozen=True)
class Tokens:
    """A modality encoded.

    Attributes:
        values: Float `(B, N, D)`.
        available: Bool `(B, N)`: False for the token of a blank table cell.
    """

    values: Tensor
    available: Tensor


@dataclass(frozen=True)
class FusionOutput:
    """What a fusion backbone says of a set of modalities.

    Attributes:
        logits: Float `(R, K)`, uncalibrated.
        embedding: Float `(R, D)`, unit length for the cosine distance.
    """

    logits: Tensor
    embedding: Tensor


class Fuse(Protocol):
    """Fusion over versions of modalities that were encoded beforehand; cheap, called often."""

    def __call__(self, rows: Tensor, used: Tensor, admitted: Tensor) -> FusionOutput:
        """Fuse.

        Args:
            rows: Int64 `(R,)`: which patient of the batch each request is about.
            used: Bool `(R, M)`: the modalities to fuse.
            admitted: Bool `(R, M)`: of those, which to take in their recovered (or completed)
                version; the others are taken as observed.
        """
        ...


@dataclass(frozen=True)
class SubsetStatistics:
    """Class prototypes and spreads of the embedding, per subset of modalities.

    Attributes:
        distance: `cosine` or `euclidean`.
        subsets: Bool `(S, M)`, the subsets that are kept, ascending by `subset_id`.
        prototypes: Float `(S, K, D)`, mean embedding of training patients of class k who have
            all of subset s; cosine means are not re-normalised.
        overall: Float `(K, D)`, unweighted mean of `prototypes` over subsets.
        spread: Float `(S, K)`, root mean square distance to the prototype.
        counts: Int64 `(S, K)`, training records that have all of s, per class.
        borrowed_from: Int64 `(S, K)`: index of the subset whose numbers were borrowed where
            counts is too small; its own index otherwise.
    """

    distance: Literal["cosine", "euclidean"]
    subsets: Tensor
    prototypes: Tensor
    overall: Tensor
    spread: Tensor
    counts: Tensor
    borrowed_from: Tensor

    def to(self, device: torch.device | str) -> SubsetStatistics:
        """Return these statistics on `device`."""
        return replace(
            self,
            **{
                name: getattr(self, name).to(device)
                for name in (
                    "subsets",
                    "prototypes",
                    "overall",
                    "spread",
                    "counts",
                    "borrowed_from",
                )
            },
        )


@dataclass(frozen=True)
class Mixture:
    """An answer that is an average over subsets.

    Attributes:
        rows: Int64 `(P,)`, ascending: the patient each averaged subset is of.
        admitted: Bool `(P, M)`: the candidates in it, beside everything observed.
        weight: Float `(P,)`, adding up to 1 per patient.
    """

    rows: Tensor
    admitted: Tensor
    weight: Tensor


@dataclass(frozen=True)
class SelectionTrace:
    """Every number behind a selection; enough to replay it offline.

    Attributes:
        names: Modality names in canonical order.
        method: Selector that made it.
        observed: Bool `(B, M)`.
        candidates: Bool `(B, M)`.
        used: Bool `(B, M)`: observed or trusted.
        admitted: Bool `(B, M)`: candidates that were trusted.
        chosen: Int64 `(T, B)`: modality admitted in that step, -1 = stopped; the best of them
            where a selector admits several at once.
        reward: Float `(T, B, M)`, NaN where there was no candidate. Likewise below.
        quality_before: Float `(T, B)`.
        quality_after: Float `(T, B, M)`.
        similarity_before: Float `(T, B)`: log tail probability to the predicted class.
        similarity_after: Float `(T, B, M)`.
        factor: Float `(T, B, M)`: similarity calibration factor.
        borrowed: Bool `(T, B, M)`: statistics of another subset had to be borrowed, for the value
            before or after.
        trust: Float `(T, B, M)`: what a fitted selector gives for admitting the candidate, 0 to
            1; NaN for those that go by the reward.
        threshold: What reward (or trust, where there is one) has to exceed to be admitted.
        output: Fusion of the final subset: logits `(B, K)`, embedding `(B, D)`; of an average, the
            logits that its probabilities come from, and the embedding of `used`.
        mixture: The subsets that were averaged; None = the answer is that of `used` alone. In an
            average a candidate counts as admitted if the subsets with it weigh more than half.
    """

    names: tuple[str, ...]
    method: str
    observed: Tensor
    candidates: Tensor
    used: Tensor
    admitted: Tensor
    chosen: Tensor
    reward: Tensor
    quality_before: Tensor
    quality_after: Tensor
    similarity_before: Tensor
    similarity_after: Tensor
    factor: Tensor
    borrowed: Tensor
    trust: Tensor
    threshold: float
    output: FusionOutput
    mixture: Mixture | None = None

    @property
    def rejected(self) -> Tensor:
        """Bool `(B, M)`: candidates that were not admitted."""
        return self.candidates & ~self.admitted


@dataclass(frozen=True)
class SelectionStep:
    """One candidate in one step of one patient's selection (a row of `selection.csv`).

    Only what exceeds `threshold` can be admitted: `trust` where the selector gives one, else
    `reward`.
    """

    step: int
    modality: str
    version: Literal["recovered", "completed"]
    quality_before: float
    quality_after: float
    similarity_before: float
    similarity_after: float
    factor: float
    reward: float
    decision: Literal["admitted", "rejected", "not yet", "stopped"]
    borrowed: bool
    trust: float | None = None
    threshold: float = 0.0


@dataclass(frozen=True)
class Choice:
    """Which selector is the default, and why.

    Attributes:
        name: The default.
        why: A sentence.
        results: Per selector, on held-back patients: log-loss, accuracy, answers of the observed
            modalities that it spoilt and put right (shares of patients), all cross-fitted.
        patients: How many there were.
    """

    name: str
    why: str
    results: Mapping[str, Mapping[str, float]]
    patients: int


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; None where it is not defined (a class did not occur)."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PerformanceRow:
    """How good a selector was on held-back patients who had about as much as somebody has.

    Attributes:
        method: The selector.
        level: `pattern`: patients looked at with these modalities and no others; `count`: with as
            many of them; `all`: as they came.
        group: The observed modalities joined by `+`, their number, or nothing.
        patients: How many patients these cases are of.
        cases: How many cases; of `count` a patient is several, with other modalities hidden.
        auroc: Area under the ROC curve.
        brier: Brier score.
        ece: Expected calibration error.
    """

    method: str
    level: Literal["pattern", "count", "all"]
    group: str
    patients: int
    cases: int
    auroc: Interval
    brier: Interval
    ece: Interval


@dataclass(frozen=True)
class Performance:
    """How good a bundle is, by what patients have (`training.performance`).

    Attributes:
        rows: Of the default selector and of `observed_only`; patterns and counts of at least
            `fewest` patients, and all.
        patients: Held-back patients by pattern, few as they may be.
        fewest: On fewer patients no figure is given.
    """

    rows: tuple[PerformanceRow, ...]
    patients: Mapping[str, int]
    fewest: int

    def row(self, method: str, pattern: str) -> PerformanceRow | None:
        """Return the figures that come closest to a patient; None for a selector without any.

        Args:
            method: A selector.
            pattern: The patient's observed modalities joined by `+`, in canonical order.
        """
        known = {(r.level, r.group): r for r in self.rows if r.method == method}
        count = str(len([name for name in pattern.split("+") if name]))
        for key in (("pattern", pattern), ("count", count), ("all", "")):
            if key in known:
                return known[key]
        return None


@dataclass(frozen=True)
class UseRow:
    """What happens when a modality's content is exchanged between patients of the same pattern.

    Attributes:
        part: A modality, or a group of them.
        patients: Held-back patients who could exchange it.
        change: Mean change of probability (half the sum over classes); None for too few patients.
            Likewise `p`.
        auroc_loss: How much AUROC is lost; not defined for a regression.
        loss: How much log-loss is added; of a regression, mean absolute error.
        p: Of the permutation test that the content does not matter to `loss`, one-sided.
        alone: AUROC of the bundle's answers from it alone.
        reference: AUROC of a plain reference from it alone.
    """

    part: str
    patients: int
    change: float | None
    auroc_loss: Interval
    loss: Interval
    p: float | None
    alone: Interval
    reference: Interval

    @property
    def verdict(self) -> Literal["used", "unused", "unproven", "untested"]:
        """Whether answers rest on its content.

        `unused`: they change by less than 0.02, and from it alone they are no better than chance.
        `used`: without it they are worse beyond chance (p at most 0.05). `unproven`: neither.
        """
        if self.change is None or self.p is None:
            return "untested"
        tells = self.alone.low is not None and self.alone.low > 0.5
        if self.change < 0.02 and not tells:
            return "unused"
        return "used" if self.p <= 0.05 else "unproven"

    @property
    def neglected(self) -> bool:
        """Whether a plain reference finds in it what the bundle does not."""
        tells = self.reference.low is not None and self.reference.low > 0.5
        known = self.alone.low is not None and self.alone.low > 0.5
        return self.verdict in ("unused", "unproven") and tells and not known


@dataclass(frozen=True)
class Use:
    """Which modalities a bundle uses (`training.use`).

    Attributes:
        rows: Modalities in canonical order, then groups of them.
        patients: Held-back patients.
        permutations: How often contents were exchanged.
    """

    rows: tuple[UseRow, ...]
    patients: int
    permutations: int

    def of(self, part: str) -> UseRow | None:
        """Return the row of a modality or group."""
        return next((row for row in self.rows if row.part == part), None)


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
