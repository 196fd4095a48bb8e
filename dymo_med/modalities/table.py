"""Tables: one row of named cells, numbers and categories, any of which may be blank."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.blocks import ColumnDecoder, Encoder
from dymo_med.config import Strict, as_words
from dymo_med.encoders import TABLE_ENCODERS, encoder
from dymo_med.errors import PatientDataError, Problem
from dymo_med.files import csv_text, write_bytes
from dymo_med.modalities.base import Modality, Whose, the_one
from dymo_med.modalities.cells import Cell, Row, imprecision, parse
from dymo_med.modalities.events import FORMATS, read_events
from dymo_med.modalities.fhir import STATUSES, read_record
from dymo_med.modalities.image import plain_name
from dymo_med.modalities.made_up import RECOVERED_COLUMNS, refuse_made_up
from dymo_med.modalities.table_files import ENCODINGS, EXTENSIONS, read_row
from dymo_med.modalities.units import MOLAR_MASS, UnitError, convert, same_quantity
from dymo_med.text import comparable
from dymo_med.types import (
    CellRules,
    Column,
    FileRules,
    Logarithm,
    ModalitySpec,
    ModalityValue,
    Source,
)

# What a boolean column may hold, besides its categories no and yes.
_NO = ("No", "NO", "false", "False", "FALSE", "0")
_YES = ("Yes", "YES", "true", "True", "TRUE", "1")

# Percentiles of fewer cells than this would list patients' values in the bundle.
_FEWEST = 20
# Names of columns that a message lists.
_MOST_NAMED = 8


# A column is skewed, so that its networks see logarithms, from this third standardised moment on.
_SKEWED = 1.0


def _skewness(cells: Tensor) -> float:
    """Return the third standardised moment."""
    away = cells - cells.mean()
    return float(away.pow(3).mean() / away.square().mean().pow(1.5).clamp_min(1e-12))


def _logarithm(cells: Tensor) -> Logarithm | None:
    """Return how networks see a column whose few large numbers dwarf all others.

    Args:
        cells: Float64 `(n,)`, training patients' observed cells.

    Returns:
        None where the numbers are not skewed, may be negative, or are too few to tell, and where
        their logarithms are not much less skewed.
    """
    if len(cells) < _FEWEST or float(cells.min()) < 0 or not _skewness(cells) > _SKEWED:
        return None
    positive = cells[cells > 0]
    shift = 0.0 if len(positive) == len(cells) else float(positive.quantile(0.05)) / 2
    logs = (cells + shift).log()
    mean, std = float(logs.mean()), float(logs.std(correction=0))
    if std <= 1e-6 or abs(_skewness(logs)) > _skewness(cells) / 2:
        return None
    return Logarithm(shift, mean, std)


class ColumnEntry(Strict):
    """A column of a table in `cohort.yaml`.

    Attributes:
        type: `continuous`; `categorical`; `boolean`, categories no and yes; `date`, a day whose
            distance to `until` is the value.
        unit: Unit of the value.
        range: Lowest and highest plausible value in `unit`; outside it is an error.
        values: The categories of a categorical column. Quote words that YAML reads as true or
            false: `values: ["yes", "no"]`.
        header: Name of the column in the file, if it is another.
        units: Units besides `unit` that a file may state; numbers in them are converted.
        molar_mass: Of the substance, in g/mol or by name (`glucose`), between units of mass and
            of amount.
        aliases: Per category, other words for it; of a boolean column for "no" and "yes".
        missing: Words and numbers that mean "blank" in this column.
        censored: What `<5` is: an `error`, the `limit`, or `missing`.
        until: Of a date: the column, or the day (YYYY-MM-DD), to which time is counted.
        format: Of a date: how it is written, as for `strptime`; YYYY-MM-DD without. Dates of FHIR
            and Parquet are read as they are, whatever this says.
        partial: Of a date that gives only the month or the year: the `middle` of what it allows is
            the value, or it is `missing`.
        loinc: LOINC code, or codes, of the FHIR observation that holds the column.
        fhir: `gender` or `birthDate` of the FHIR patient instead.
        pick: Which observation counts if several differ: `latest`, `earliest`, or an `error`.
        concepts: Concept ids of OMOP, or codes of MEDS, of the events that hold the column.
        person: Or what of the person it is: `gender` (a concept id of OMOP) or `age` at the index
            time.
        unrecorded: Of two categories: what it is without an event, `missing` or `negative`, the
            first of them.
    """

    type: Literal["continuous", "categorical", "boolean", "date"]
    unit: str = ""
    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    values: list[str] | None = None
    header: str = ""
    units: list[str] = Field(default_factory=list)
    molar_mass: float | str | None = None
    aliases: dict[str, list[str]] = Field(default_factory=dict)
    missing: list[str] = Field(default_factory=list)
    censored: Literal["error", "limit", "missing"] = "error"
    until: str = ""
    format: str = ""
    partial: Literal["middle", "missing"] = "middle"
    loinc: list[str] = Field(default_factory=list)
    fhir: Literal["", "gender", "birthDate"] = ""
    pick: Literal["error", "latest", "earliest"] = "error"
    concepts: list[str] = Field(default_factory=list)
    person: Literal["", "gender", "age"] = ""
    unrecorded: Literal["missing", "negative"] = "missing"

    @field_validator("values", mode="before")
    @classmethod
    def _quoted(cls, values: Any) -> Any:
        if isinstance(values, list) and any(isinstance(v, bool) for v in values):
            raise ValueError(
                "YAML reads yes, no, on, off, true and false as booleans; quote the categories,"
                ' for example values: ["yes", "no"]'
            )
        if isinstance(values, list) and any(not isinstance(v, str) for v in values):
            raise ValueError('categories are text; quote them, for example values: ["0", "1"]')
        return values

    @field_validator("missing", mode="before")
    @classmethod
    def _words(cls, values: Any) -> Any:
        return as_words(values)

    @field_validator("aliases", mode="before")
    @classmethod
    def _lists(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if any(isinstance(name, bool) for name in values):
            raise ValueError("quote the categories: YAML reads yes and no as booleans")
        return {str(k): as_words(v if isinstance(v, list) else [v]) for k, v in values.items()}

    @field_validator("loinc", mode="before")
    @classmethod
    def _one_code(cls, values: Any) -> Any:
        return [values] if isinstance(values, str) else values

    @field_validator("concepts", mode="before")
    @classmethod
    def _codes(cls, values: Any) -> Any:
        return as_words(values if isinstance(values, list) else [values])

    @field_validator("until", mode="before")
    @classmethod
    def _day(cls, value: Any) -> Any:
        return value.isoformat() if type(value) is date else value

    @model_validator(mode="after")
    def _fits(self) -> ColumnEntry:
        if self.type in ("categorical", "boolean"):
            self._fits_categories()
        elif self.values is not None or self.aliases:
            raise ValueError(f"a {self.type} column has no values and no aliases")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError("range must be [lowest, highest]")
        if self.range is not None and not all(map(math.isfinite, self.range)):
            raise ValueError("range must be two finite numbers")
        if self.type == "date":
            if not self.until:
                raise ValueError(
                    "a date column needs until: the column, or the day, to which time is counted"
                )
            if not same_quantity(self.unit or "years", "days"):
                raise ValueError("the unit of a date column is years, months, weeks or days")
            if self.format and not re.search("%-?[YyGxc]", self.format):
                raise ValueError("the format of a date needs its year, for example '%d.%m.%Y'")
        elif self.until or self.format or self.partial != "middle":
            raise ValueError("until, format and partial belong to a column of type date")
        if self.type != "continuous" and (
            self.units or self.molar_mass is not None or self.censored != "error"
        ):
            raise ValueError("units, molar_mass and censored belong to a continuous column")
        self._fits_units()
        if any(word != word.strip() or not word for word in self.missing):
            raise ValueError("words under missing must not be empty, or begin or end with spaces")
        if self.loinc and self.fhir:
            raise ValueError("give either loinc or fhir")
        if self.concepts and self.person:
            raise ValueError("give either concepts or person")
        if self.unrecorded == "negative" and not (
            self.type == "boolean" or len(self.values or ()) == 2
        ):
            raise ValueError("unrecorded: negative belongs to a column of two categories")
        if any(not re.fullmatch(r"[0-9]{1,7}-[0-9]", code) for code in self.loinc):
            raise ValueError("a LOINC code is digits, a hyphen and a check digit: '2345-7'")
        return self

    def _fits_categories(self) -> None:
        if self.type == "boolean" and self.values is not None:
            raise ValueError("a boolean column is no or yes; for others declare categories")
        if self.type == "categorical" and self.values is None:
            raise ValueError("a categorical column needs values")
        values = self.values if self.values is not None else ["no", "yes"]
        stripped = [v.strip() for v in values]
        if len(set(stripped)) < 2 or len(set(stripped)) != len(stripped) or "" in stripped:
            raise ValueError("values must be at least two distinct, non-empty categories")
        if stripped != values:
            raise ValueError("values must not begin or end with spaces")
        if self.range is not None or self.unit:
            raise ValueError(f"a {self.type} column has no range and no unit")
        unknown = set(self.aliases) - set(values)
        if unknown:
            raise ValueError(f"aliases of what is no category: {', '.join(sorted(unknown))}")
        words = [*values, *(word for group in self.aliases.values() for word in group)]
        words += self.missing
        if self.type == "boolean":
            words += {*_NO, *_YES} - {
                *(word for word in self.aliases.get("no", ()) if word in _NO),
                *(word for word in self.aliases.get("yes", ()) if word in _YES),
            }
        if len(set(map(comparable, words))) < len(words) or any(
            word != word.strip() or not word for word in words
        ):
            raise ValueError(
                "a word stands for one category, or for blank; none is empty or begins or ends"
                " with spaces"
            )

    def _fits_units(self) -> None:
        if isinstance(self.molar_mass, str) and self.molar_mass not in MOLAR_MASS:
            raise ValueError(
                "molar_mass is a number in g/mol, or a known substance: "
                f"{', '.join(sorted(MOLAR_MASS))}"
            )
        mass = self.grams_per_mole
        if mass is not None and not (math.isfinite(mass) and mass > 0):
            raise ValueError("molar_mass must be positive")
        if self.units and not self.unit:
            raise ValueError("units besides none: declare unit too, the one numbers are kept in")
        for other in self.units:
            try:
                convert(1.0, other, self.unit, mass)
            except UnitError as error:
                raise ValueError(f"units: {error}") from None

    @property
    def grams_per_mole(self) -> float | None:
        """The molar mass as a number."""
        return MOLAR_MASS[self.molar_mass] if isinstance(self.molar_mass, str) else self.molar_mass

    def column(self, name: str) -> Column:
        """Return the column of this entry."""
        aliases = [(word, k) for k, words in self.aliases.items() for word in words]
        if self.type == "boolean":
            aliases += [(word, "no") for word in _NO] + [(word, "yes") for word in _YES]
        rules = CellRules(
            header=self.header,
            units=tuple(self.units),
            molar_mass=self.grams_per_mole,
            aliases=tuple(aliases),
            missing=tuple(self.missing),
            censored=self.censored,
            until=self.until,
            date_format=self.format,
            partial=self.partial,
            loinc=tuple(self.loinc),
            fhir=self.fhir,
            pick=self.pick,
            concepts=tuple(self.concepts),
            person=self.person,
            unrecorded=self.unrecorded,
        )
        values = ("no", "yes") if self.type == "boolean" else tuple(self.values or ())
        return Column(
            name=name,
            type="categorical" if values else "continuous",
            unit=self.unit or ("years" if self.type == "date" else ""),
            range=(self.range[0], self.range[1]) if self.range is not None else None,
            values=values,
            rules=rules if rules != CellRules() else None,
        )


class TableEntry(Strict):
    """A table modality in `cohort.yaml`.

    Attributes:
        kind: `table`.
        file: File inside the patient directory, CSV, TSV, JSON or Parquet; several tables may
            share one. A FHIR record is a JSON or NDJSON file or a folder of them, events are a
            folder of tables or shards.
        columns: Columns in canonical order.
        format: `fhir` for a FHIR record, `omop` or `meds` for timed events; otherwise the
            extension says.
        shared: File in the cohort's folder with a row for every record; `file` is then its name.
        record_column: Column that names the record of a row, for files with several.
        patient_column: Column that names the patient of a row.
        encoding: Of text files that are not UTF-8 and have no byte-order mark.
        separator: Between cells, where the header does not tell.
        decimal: The decimal sign, `.` or `,`.
        statuses: FHIR observations of other status are no data.
        index: Of events: file in the cohort's folder with persons and index times.
        within_days: Of events: how long before the index time they count; without it ever.
    """

    kind: Literal["table"]
    file: str = ""
    columns: Annotated[dict[str, ColumnEntry], Field(min_length=1)]
    format: Literal["", "fhir", "omop", "meds"] = ""
    shared: str = ""
    record_column: str = ""
    patient_column: str = ""
    encoding: str = ""
    separator: Literal["", ",", ";", "\t", "tab"] = ""
    decimal: Literal[".", ","] = "."
    statuses: list[str] = Field(default_factory=list)
    index: str = ""
    within_days: Annotated[float, Field(ge=0, le=50_000)] = 0.0

    @model_validator(mode="after")
    def _fits(self) -> TableEntry:
        events = [n for n, c in self.columns.items() if c.concepts or c.person]
        if self.format in FORMATS:
            return self._fits_events(events)
        if events or self.index or self.within_days:
            raise ValueError("concepts, person, index and within_days need format: omop or meds")
        if self.shared:
            plain_name(self.shared)
            if not (self.record_column or self.patient_column):
                raise ValueError(
                    "a shared table needs record_column or patient_column: the column that tells"
                    " whose a row is"
                )
        elif not self.file:
            raise ValueError("a table needs file")
        plain_name(self.path)
        known = (".json", ".ndjson") if self.format == "fhir" else EXTENSIONS
        for name in filter(None, (self.path, self.shared)):
            if not name.lower().endswith(known):
                raise ValueError(f"file must end in {', '.join(known[:-1])} or {known[-1]}")
        if self.encoding and self.encoding not in ENCODINGS:
            raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}")
        if any(not name or name != name.strip() for name in self.columns):
            raise ValueError("column names must not be empty, or begin or end with spaces")
        if self.format == "fhir":
            if self.shared or self.record_column or self.patient_column:
                raise ValueError("a FHIR record belongs to one patient directory")
            lost = [n for n, c in self.columns.items() if not (c.loinc or c.fhir)]
            if lost:
                raise ValueError(f"columns of a FHIR record need loinc or fhir: {', '.join(lost)}")
            if any(c.header for c in self.columns.values()):
                raise ValueError("header belongs to other files than FHIR records")
            if unknown := set(self.statuses) - set(STATUSES):
                raise ValueError(
                    f"unknown statuses {', '.join(sorted(unknown))}; known: {', '.join(STATUSES)}"
                )
        elif any(c.loinc or c.fhir for c in self.columns.values()) or self.statuses:
            raise ValueError("loinc, fhir and statuses need format: fhir")
        elif any(c.pick != "error" for c in self.columns.values()):
            raise ValueError("pick needs format: fhir")
        return self

    def _fits_events(self, events: Sequence[str]) -> TableEntry:
        """Check what an entry of events says."""
        if not (self.shared or self.file):
            raise ValueError("events need shared, or file: the folder of their tables")
        for name in filter(None, (self.path, self.shared, self.index)):
            plain_name(name)
        if self.record_column or self.patient_column or self.encoding or self.separator:
            raise ValueError(
                "keys of text files do not belong to events; index tells whose they are"
            )
        if lost := [name for name in self.columns if name not in events]:
            raise ValueError(f"columns of events need concepts or person: {', '.join(lost)}")
        if any(c.header or c.loinc or c.fhir or c.type == "date" for c in self.columns.values()):
            raise ValueError("header, loinc, fhir and dates do not belong to events")
        if self.format == "meds" and any(c.person == "gender" for c in self.columns.values()):
            raise ValueError("gender is a code in MEDS: name it under concepts (GENDER//F)")
        return self

    @property
    def path(self) -> str:
        """Name of the file inside the patient directory."""
        return self.file or Path(self.shared).name

    @property
    def rules(self) -> FileRules | None:
        """How the file is written."""
        rules = FileRules(
            format=self.format,
            encoding=self.encoding,
            separator="\t" if self.separator == "tab" else self.separator,
            decimal=self.decimal,
            shared=self.shared,
            record_column=self.record_column,
            patient_column=self.patient_column,
            statuses=tuple(self.statuses),
            index=self.index,
            within_days=self.within_days,
        )
        return rules if rules != FileRules() else None


def _none_found(where: str, headers: Sequence[str], names: Sequence[str]) -> Problem:
    """Return the problem of a table that has none of the declared columns.

    Names of columns are no data; what looks like a number is left out, as the line may be no
    header at all.
    """

    def some(words: Sequence[str]) -> str:
        left = len(words) - _MOST_NAMED
        return ", ".join(w[:40] for w in words[:_MOST_NAMED]) + (
            f" and {left} more" if left > 0 else ""
        )

    found = [name for name in names if name and not re.search(r"^\W*\d", name)]
    return Problem(
        where,
        "not one of the declared columns is in the table",
        expected=some(headers),
        got=some(found) or "no names",
        remedy="Correct the names, or say under header in cohort.yaml how the file calls them;"
        " columns are separated by commas, semicolons or tabs, in JSON they are keys of the"
        " outermost object; if the table was not made, leave its columns blank, or the file out",
    )


class Table(Modality):
    """One row of columns, each continuous or categorical.

    The likelihood is a Gaussian per continuous column in standardised units (zero mean and unit
    spread over training patients), its log spread kept within [-3, 2], and a softmax per
    categorical column; only filled cells count.
    """

    Entry = TableEntry
    log_std_range = (-3.0, 2.0)

    def __init__(self, spec: ModalitySpec) -> None:
        super().__init__(spec)
        # Where each column's parameters start.
        starts, size = [], 0
        for column in spec.columns:
            starts.append(size)
            size += 2 if column.type == "continuous" else len(column.values)
        self._starts = tuple(starts)
        self._rules = spec.rules or FileRules()

    @classmethod
    def spec_from_entry(cls, name: str, entry: BaseModel) -> ModalitySpec:
        """Return the spec of a validated `cohort.yaml` entry."""
        entry = cast("TableEntry", entry)
        columns = tuple(column.column(n) for n, column in entry.columns.items())
        return ModalitySpec(
            name=name,
            kind="table",
            file=entry.path,
            shape=(len(columns),),
            columns=columns,
            rules=entry.rules,
        )

    # -- files ---------------------------------------------------------------------------------

    def _find(self, folder: Path, where: str, whose: Whose) -> tuple[Path | None, bool]:
        """Return the table's file, and whether it is that of the whole cohort."""
        declared = folder / self.spec.file
        shared = None
        if self._rules.shared and whose.root is not None:
            shared = whose.root / self._rules.shared
        if self._rules.format in FORMATS:
            names = [declared]
        elif self._rules.format == "fhir":
            names = [declared.with_suffix(s) for s in (".json", ".ndjson", "")]
        else:
            names = [declared.with_suffix(s) for s in EXTENSIONS]
        found = [p for p in dict.fromkeys((*names, declared)) if p.exists() and p != shared]
        if shared is not None and shared.exists():
            found.append(shared)
        ambiguous = Problem(
            where,
            "two files hold the same table",
            expected=f"one of {', '.join(p.name for p in names)}",
            remedy="Keep the one that belongs to this visit",
        )
        path = the_one(found, declared, declared.stem, where, ambiguous)
        return path, path is not None and path == shared

    def read(
        self,
        folder: Path,
        where: str,
        missing_values: Sequence[str] = (),
        whose: Whose | None = None,
    ) -> ModalityValue | None:
        """Read the row. See `Modality.read`.

        A column that the file does not have is blank; columns of the file that are not declared
        are left alone.
        """
        whose = whose or Whose()
        path, shared = self._find(folder, where, whose)
        if path is None:
            return None
        at = f"{where}: {path.name}"
        if not shared:
            refuse_made_up(path, where, self.spec.name)
        columns = self.spec.columns
        shown = [(c.rules.header if c.rules is not None else "") or c.name for c in columns]
        headers = [comparable(header) for header in shown]
        until = {comparable(c.rules.until) for c in columns if c.rules is not None}
        wanted = {*headers, *until} - {""}
        row = self._row(path, at, frozenset(wanted), whose, missing_values, shared=shared)
        if row is None:
            return None
        values = torch.zeros(self.spec.shape, dtype=torch.float32)
        filled = torch.zeros(self.spec.shape, dtype=torch.bool)
        problems: list[Problem] = []
        remarks = [*row.remarks]
        unlearned: list[str] = []
        alike = {header.lower(): header for header in row.names if header not in wanted}
        if not self._rules.format and not any(
            header in row.cells or header.lower() in alike for header in headers
        ):
            raise PatientDataError(_none_found(at, shown, row.names))
        for i, (column, header) in enumerate(zip(columns, headers, strict=True)):
            other = alike.get(header.lower())
            if header not in row.cells and other is not None:
                problems.append(
                    Problem(
                        f"{at}, column {other}",
                        "the name differs from a declared column's in capital letters",
                        expected=header,
                        remedy="Rename the column",
                    )
                )
                continue
            cell = row.cells.get(header, Cell(""))
            place = cell.place or f"{row.place}, column {header}"
            value = parse(cell, column, row.cells, place, self._rules.decimal, missing_values)
            if isinstance(value, Problem):
                problems.append(value)
            elif value is not None and not column.known:
                unlearned.append(f"{column.name} is not used, since no training record had it")
            elif value is not None:
                values[i] = value
                filled[i] = True
            remarks.append(imprecision(cell, column, row.cells, missing_values))
        if problems:
            raise PatientDataError(*problems)
        if not filled.any():
            if row.remarks:
                raise PatientDataError(
                    Problem(
                        at,
                        "there are values of declared columns, but none that may be used",
                        expected="values of the patient, of elements that can be understood",
                        got="; ".join(row.remarks),
                        remedy="Export the record without what forbids their use, or take it out"
                        " if the table shall count as missing",
                    )
                )
            return None
        return ModalityValue(
            values=values,
            source=Source(
                file=self._rules.shared if shared else path.relative_to(folder).as_posix(),
                sha256=row.sha256,
                facts={"cells": f"{int(filled.sum())} of {len(filled)} filled"},
            ),
            observed_fields=filled,
            warnings=tuple(filter(None, [*remarks, *unlearned])),
            identifiers=row.identifiers,
        )

    def _row(
        self,
        path: Path,
        at: str,
        wanted: frozenset[str],
        whose: Whose,
        missing_values: Sequence[str],
        *,
        shared: bool,
    ) -> Row | None:
        """Return the record's row of a file, or of its FHIR record or events."""
        if not self._rules.format:
            return read_row(path, self._rules, wanted, at, whose, shared=shared)

        def value(cell: Cell, column: Column, where: str) -> float | Problem | None:
            return parse(cell, column, {}, where, blank=missing_values)

        if self._rules.format in FORMATS:
            return read_events(
                path, self.spec.columns, self._rules, at, whose, value, shared=shared
            )
        return read_record(path, self.spec.columns, self._rules, at, value)

    def write(
        self,
        folder: Path,
        values: Tensor,
        observed_fields: Tensor | None,
        affine: Sequence[Sequence[float]] | None,
    ) -> Path:
        """Write `<name>_synthetic.csv`: column, value, unit, source. See `Modality.write`.

        A column that no training record had has no value: nothing is recovered of it.
        """
        rows = []
        for i, column in enumerate(self.spec.columns):
            number = float(values[i])
            text = f"{number:.6g}" if column.type == "continuous" else column.values[round(number)]
            observed = observed_fields is not None and bool(observed_fields[i])
            source = "observed" if observed else "recovered" if column.known else "not known"
            if source == "not known":
                text = ""
            cells = (column.name, text, column.unit, source)
            rows.append(dict(zip(RECOVERED_COLUMNS, cells, strict=True)))
        content = csv_text(RECOVERED_COLUMNS, rows).encode()
        return write_bytes(folder / f"{self.spec.name}_synthetic.csv", content)

    # -- networks ------------------------------------------------------------------------------

    def fit(
        self,
        values: Tensor,
        observed_fields: Tensor | None,
        descriptors: Tensor | None = None,
    ) -> ModalitySpec:
        """Return the spec with each column's mean, std, frequencies and percentiles.

        Frequencies have one added to every count, so no category is impossible. The spread of a
        column with a single distinct value is 1.

        Args:
            values: `(n, F)`, rows of training records that have this table.
            observed_fields: Bool `(n, F)`; None = all filled.
            descriptors: Not used.
        """
        if observed_fields is None:
            observed_fields = torch.ones_like(values, dtype=torch.bool)
        columns = []
        for i, column in enumerate(self.spec.columns):
            cells = values[observed_fields[:, i], i].double()
            if column.type == "categorical":
                counts = torch.bincount(cells.round().long(), minlength=len(column.values)) + 1
                shares = (counts / counts.sum()).tolist()
                columns.append(
                    replace(
                        column, frequencies=tuple(shares), known=column.known and len(cells) > 0
                    )
                )
                continue
            if len(cells) == 0:
                middle = sum(column.range) / 2 if column.range is not None else 0.0
                columns.append(replace(column, mean=middle, std=1.0, known=False))
                continue
            mean = float(cells.mean())
            std = float(cells.std(correction=0))
            if std <= 1e-6 * max(1.0, abs(mean)):
                std = 1.0
            percentiles: tuple[float, ...] = ()
            if len(cells) >= _FEWEST:
                # The ends are single patients' values; the 1st and 99th stand in for them.
                grid = torch.linspace(0, 1, 101, dtype=torch.float64).clamp(0.01, 0.99)
                percentiles = tuple(torch.quantile(cells, grid).tolist())
            columns.append(
                replace(
                    column,
                    mean=mean,
                    std=std,
                    percentiles=percentiles,
                    logarithm=_logarithm(cells),
                )
            )
        return replace(self.spec, columns=tuple(columns))

    def encoder(self, dim: int, options: Mapping[str, Any]) -> Encoder:
        """Return an encoder to one token per column, or to one for the row.

        Args:
            dim: Token width D.
            options: `table_encoder` (an entry of `TABLE_ENCODERS`, `columns`), `layers`
                (attention among the columns, 1) and `heads` (4).
        """
        name = options.get("table_encoder", "columns")
        return encoder(TABLE_ENCODERS, (name,), self.spec, dim, options)

    def decoder(self, latent: int, options: Mapping[str, int]) -> nn.Module:
        """Return a decoder to likelihood parameters `(B, P)`.

        Args:
            latent: Length of the latent vector.
            options: `hidden` (width of the hidden layer, 64).
        """
        return ColumnDecoder(self.spec.columns, latent, options.get("hidden", 64))

    def log_likelihood(
        self, parameters: Tensor, values: Tensor, observed_fields: Tensor | None
    ) -> Tensor:
        """Return the log likelihood summed over filled cells, `(B,)`.

        Args:
            parameters: `(B, P)`: per column in order, mean and log spread in standardised units,
                or one logit per category.
            values: `(B, F)`, natural units, categories as their index.
            observed_fields: Bool `(B, F)`, True = filled; None = all filled.
        """
        if observed_fields is None:
            return self.cell_log_likelihood(parameters, values).sum(1)
        # A blank cell may hold anything; out with it before it can become NaN in a gradient.
        values = values.where(observed_fields, values.new_zeros(()))
        cells = self.cell_log_likelihood(parameters, values)
        return cells.where(observed_fields, cells.new_zeros(())).sum(1)

    def cell_log_likelihood(self, parameters: Tensor, values: Tensor) -> Tensor:
        """Return the log likelihood of every cell, `(B, F)`.

        Args:
            parameters: `(B, P)`, as in `log_likelihood`.
            values: `(B, F)`, all filled; numbers count in standardised units.
        """
        cells = []
        for i, (column, start) in enumerate(zip(self.spec.columns, self._starts, strict=True)):
            if column.type == "continuous":
                center, spread = column.mean or 0.0, column.std or 1.0
                cell = (values[:, i] - center) / spread
                log_std = parameters[:, start + 1].clamp(*self.log_std_range)
                z = (cell - parameters[:, start]) * (-log_std).exp()
                term = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
            else:
                logits = parameters[:, start : start + len(column.values)]
                index = values[:, i].round().long().clamp(0, len(column.values) - 1)
                term = -F.cross_entropy(logits, index, reduction="none")
            cells.append(term)
        return torch.stack(cells, dim=1)

    def mean(self, parameters: Tensor) -> Tensor:
        """Return the mean in natural units within `range`, or the likeliest category's index.

        Args:
            parameters: `(B, P)`.

        Returns:
            `(B, F)`.
        """
        return self._cells(parameters, None)

    def draw(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Return one draw of every cell from its likelihood, `(B, F)`, numbers within `range`."""
        return self._cells(parameters, generator)

    def _cells(self, parameters: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return every cell's mean or mode, or one draw of it."""

        def noise(sample: Callable[..., Tensor]) -> Tensor:
            return sample(len(parameters), generator=generator).to(parameters)

        cells = []
        for column, start in zip(self.spec.columns, self._starts, strict=True):
            if column.type == "continuous":
                cell = parameters[:, start]
                if generator is not None:
                    log_std = parameters[:, start + 1].clamp(*self.log_std_range)
                    cell = cell + noise(torch.randn) * log_std.exp()
                cell = cell * (column.std or 1.0) + (column.mean or 0.0)
                if column.range is not None:
                    cell = cell.clamp(*column.range)
            else:
                logits = parameters[:, start : start + len(column.values)]
                index = logits.argmax(1)
                if generator is not None:
                    below = logits.softmax(1).cumsum(1)[:, :-1]
                    index = (noise(torch.rand)[:, None] >= below).sum(1)
                cell = index.to(parameters.dtype)
            cells.append(cell)
        return torch.stack(cells, dim=1)
