"""What a modality is, and how its files are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar


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
        concepts: Concept ids (OMOP) or codes (MEDS) of the events that hold this column.
        person: Or what of the person it is, `gender` or `age`.
        unrecorded: What a column of two categories is without an event: blank, or the first.
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
    concepts: tuple[str, ...] = ()
    person: str = ""
    unrecorded: Literal["missing", "negative"] = "missing"


@dataclass(frozen=True)
class FileRules:
    """How a table's file is written where that is more than UTF-8 with one row.

    Attributes:
        format: `fhir` for a FHIR record, `omop` or `meds` for events; empty = what the extension
            says.
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
        index: Of events: file inside the cohort's folder with persons and index times.
        within_days: Of events: how long before the index time they count; 0 = ever.
    """

    format: str = ""
    encoding: str = ""
    separator: str = ""
    decimal: str = "."
    shared: str = ""
    record_column: str = ""
    patient_column: str = ""
    statuses: tuple[str, ...] = ()
    index: str = ""
    within_days: float = 0.0


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
