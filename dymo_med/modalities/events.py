"""Patients as lists of timed events: OMOP CDM 5.4 tables and MEDS shards, as the row of a table.

A record is a person and an index time: what was known by then may be used, and nothing later. Who
and when stand in a CSV file (`record_id`, `person_id` or `subject_id`, `index_time`). An event that
gives only its day is taken to have happened at the end of it, so that it counts from the next day
on: results of the day itself may be those that the answer is about.

References:
    OMOP Common Data Model 5.4 (ohdsi.github.io/CommonDataModel): PERSON, MEASUREMENT, OBSERVATION,
    CONDITION_OCCURRENCE, CONCEPT.
    Medical Event Data Standard (the package meds): subject_id, time, code, numeric_value,
    text_value.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from dymo_med.errors import PatientDataError, Problem
from dymo_med.modalities.base import Whose
from dymo_med.modalities.cells import Cell, Row
from dymo_med.modalities.table_files import content, decode, unreadable
from dymo_med.text import comparable
from dymo_med.types import CellRules, Column, FileRules

FORMATS = ("omop", "meds")
INDEX = "index.csv"
_PERSON = ("person_id", "subject_id", "patient_id")
_YEAR = 365.25
_ALWAYS = datetime.min
_MOST_FILES = 10_000
# Of MEASUREMENT: how the number is bounded (concepts of operators).
_OPERATORS = {"4171756": "<", "4171754": "<=", "4172704": ">", "4171755": ">="}
_BIRTH = "MEDS_BIRTH"
# table: its concept, its day, its instant
_OMOP = {
    "measurement": ("measurement_concept_id", "measurement_date", "measurement_datetime"),
    "observation": ("observation_concept_id", "observation_date", "observation_datetime"),
    "condition_occurrence": (
        "condition_concept_id",
        "condition_start_date",
        "condition_start_datetime",
    ),
}

Parse = Callable[[Cell, Column, str], "float | Problem | None"]


@dataclass(frozen=True)
class Event:
    """One thing that was recorded of a person.

    Attributes:
        code: What: a concept id, or a code of MEDS.
        at: From when on it is known.
        text: Its value; empty = that it was recorded is all there is.
        unit: Of a number, as the source states it.
        number: Whether the value is one.
    """

    code: str
    at: datetime
    text: str
    unit: str = ""
    number: bool = False


@dataclass
class Person:
    """What is known of a person.

    Attributes:
        events: Everything recorded.
        born: The day, and whether more than the year is known.
        gender: Concept of PERSON; empty = none.
    """

    events: list[Event] = field(default_factory=list)
    born: date | None = None
    gender: str = ""


def read_events(
    path: Path,
    columns: Sequence[Column],
    rules: FileRules,
    where: str,
    whose: Whose,
    parse: Parse,
    *,
    shared: bool,
) -> Row | None:
    """Return what was known of a record's person at its index time, cells by the columns' names.

    Args:
        path: Folder of tables or shards.
        columns: Each with concepts, or what of the person it is.
        rules: The format, the file of index times and the length of the window.
        where: Who this is, for messages.
        whose: Which record.
        parse: Reads a cell, to tell whether several events differ.
        shared: Whether the folder is that of the whole cohort; else it has `index.csv` itself.

    Returns:
        None if a shared folder knows nothing of the record.

    Raises:
        PatientDataError: With everything that is wrong.
    """
    index = _index(path, rules, where, whose, shared=shared)
    if index is None:
        return None
    person_id, until = index
    wanted = frozenset(c for column in columns for c in (column.rules or CellRules()).concepts)
    try:
        files = tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in _files(path))
    except OSError as error:
        raise unreadable(where, error) from error
    people = _people(rules.format, str(path), files, wanted)
    if not isinstance(people, dict):
        raise PatientDataError(*people)
    person = people.get(person_id)
    if person is None:
        if shared:
            return None
        raise PatientDataError(
            Problem(
                where,
                f"the person that {INDEX} names is not in the tables",
                expected="a row of that person",
                remedy=f"Correct {INDEX}, or bring this patient's tables",
            )
        )
    since = _ALWAYS if not rules.within_days else until - timedelta(days=rules.within_days)
    known = [e for e in person.events if e.at == _ALWAYS or since <= e.at <= until]
    cells: dict[str, Cell] = {}
    problems: list[Problem] = []
    for column in columns:
        own = column.rules or CellRules()
        place = f"{where}, {column.name}"
        if own.person:
            cell = _of_person(person, own.person, column, until)
        else:
            found = _choose([e for e in known if e.code in own.concepts], column, own, place, parse)
            if isinstance(found, Problem):
                problems.append(found)
                continue
            cell = found
        if cell is not None:
            cells[comparable(column.name)] = replace(cell, place=place)
    if problems:
        raise PatientDataError(*problems)
    said = repr([(n, str(c), c.unit) for n, c in sorted(cells.items())])
    return Row(cells, where, sha256(said.encode()).hexdigest())


def _choose(
    events: Sequence[Event], column: Column, own: CellRules, where: str, parse: Parse
) -> Cell | Problem | None:
    """Return the event that counts as a cell; None = nothing was recorded."""
    if not events:
        negative = own.unrecorded == "negative" and len(column.values) == 2
        return Cell(column.values[0]) if negative else None
    times = [event.at for event in events]
    if own.pick != "error":
        best = max(times) if own.pick == "latest" else min(times)
        events = [event for event in events if event.at == best]
    cells = dict.fromkeys(_cell(event, column) for event in events)
    values = [parse(cell, column, where) for cell in cells]
    if len({v for v in values if not isinstance(v, Problem)}) > 1:
        return Problem(
            where,
            "several events differ, and the cohort does not say which counts"
            if own.pick == "error"
            else f"several events of the {own.pick} time differ",
            expected="one value, or pick: latest or pick: earliest",
            got=f"{len(events)} events",
            remedy="Declare pick in cohort.yaml"
            if own.pick == "error"
            else "Find out which is right, or declare fewer concepts",
        )
    return next(iter(cells))


def _cell(event: Event, column: Column) -> Cell:
    if column.values == ("no", "yes") and not event.number:
        return Cell("yes")  # that it was recorded
    # A category is told by its value where there is one, else by the code.
    return Cell(event.text or event.code, event.unit, typed=event.number, also=(event.code,))


def _of_person(person: Person, name: str, column: Column, until: datetime) -> Cell | None:
    if name == "gender":
        return Cell(person.gender) if person.gender else None
    if person.born is None or person.born > until.date():
        return None
    years = (until.date() - person.born).days / _YEAR
    return Cell(f"{years:.4f}", unit=column.unit and "years", typed=True)


# -- who and when ----------------------------------------------------------------------------------


def _index(
    path: Path, rules: FileRules, where: str, whose: Whose, *, shared: bool
) -> tuple[str, datetime] | None:
    """Return the person of a record, and the index time; None if a shared file has no such record.

    Raises:
        PatientDataError: If the file is not there or cannot be understood.
    """
    file = path / INDEX
    if shared and whose.root is not None:
        file = whose.root / (rules.index or INDEX)
    try:
        stamp = (file.stat().st_mtime_ns, file.stat().st_size)
    except OSError as error:
        raise PatientDataError(
            Problem(
                f"{where}: {file.name}",
                "nothing tells the index time, until which events count",
                expected=f"a file {file.name} with record_id, person_id and index_time",
                got=type(error).__name__,
                remedy="Write it; without it results of later days could be used",
            )
        ) from error
    rows = _index_rows(file, stamp)
    if not isinstance(rows, dict):
        raise PatientDataError(*rows)
    found = rows.get(comparable(whose.record_id))
    if found is None and not shared and len(rows) == 1:
        found = next(iter(rows.values()))
    if found is None and not shared:
        raise PatientDataError(
            Problem(
                f"{where}: {INDEX}",
                "there is no index time of this record",
                expected="a row with its record_id",
                remedy="Add it",
            )
        )
    return found


@lru_cache(maxsize=8)
def _index_rows(
    file: Path, stamp: tuple[int, int]
) -> dict[str, tuple[str, datetime]] | tuple[Problem, ...]:
    """Return person and time by record, or what is wrong; remembered while the file is as it was.

    Args:
        file: The CSV file.
        stamp: Time of its last change, and size.
    """
    try:
        text = decode(content(file, file.name), "", file.name)
        lines = list(csv.reader(text.splitlines(), strict=True))
    except PatientDataError as error:
        return error.problems
    except csv.Error:
        return (Problem(file.name, "the file is no CSV", "commas and quotes", remedy="Mend it"),)
    header = [comparable(name).lower() for name in lines[0]] if lines else []
    own = next((name for name in _PERSON if name in header), "")
    if not own or "index_time" not in header:
        return (
            Problem(
                f"{file.name}, line 1",
                "the header does not fit",
                expected="record_id, person_id (or subject_id) and index_time",
                remedy="Name the columns so",
            ),
        )
    rows: dict[str, tuple[str, datetime]] = {}
    problems = []
    for number, line in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in line):
            continue
        cells = dict(zip(header, (c.strip() for c in line), strict=False))
        at = _instant(cells.get("index_time", ""))
        person = _code(cells.get(own, ""))
        record = comparable(cells.get("record_id") or cells.get(own, ""))
        if len(line) != len(header) or at is None or not person or record in rows:
            problems.append(
                Problem(
                    f"{file.name}, line {number}",
                    "the row does not tell one person and one index time of a record of its own",
                    expected="a day (YYYY-MM-DD) or an instant (ISO 8601) under index_time",
                    remedy="Correct it",
                )
            )
            continue
        rows[record] = person, at
    return tuple(problems) if problems else rows


# -- tables and shards -----------------------------------------------------------------------------


def _files(path: Path) -> list[Path]:
    """Return the files of a folder that hold tables, in order."""
    found = sorted(
        p
        for p in path.rglob("*")
        if p.suffix.lower() in (".csv", ".parquet")
        and p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
        and "metadata" not in p.relative_to(path).parts[:-1]
    )
    return found[:_MOST_FILES]


@lru_cache(maxsize=4)
def _people(
    kind: str, path: str, files: tuple[tuple[str, int, int], ...], wanted: frozenset[str]
) -> dict[str, Person] | tuple[Problem, ...]:
    """Return everybody with the events that matter, or what is wrong.

    Args:
        kind: `omop` or `meds`.
        path: The folder.
        files: Its files, with time of change and size.
        wanted: Concepts or codes.
    """
    names = [Path(name) for name, _, _ in files]
    try:
        return _read_omop(names, wanted) if kind == "omop" else _read_meds(names, wanted)
    except PatientDataError as error:
        return error.problems


def _read_omop(files: Sequence[Path], wanted: frozenset[str]) -> dict[str, Person]:
    """Read the tables of OMOP that matter.

    Raises:
        PatientDataError: If a table cannot be read, or lacks a column that is needed.
    """
    tables: dict[str, list[Path]] = {}
    for file in files:
        # A table is a file, or a folder of parts.
        inside = file.parent.name.lower()
        name = inside if inside in (*_OMOP, "person", "concept") else file.stem.lower()
        tables.setdefault(name, []).append(file)
    people: dict[str, Person] = {}
    needed = ("person_id", "gender_concept_id", "year_of_birth")
    for row in _rows(tables.get("person", ()), needed, ("month_of_birth", "day_of_birth")):
        gender = _code(row["gender_concept_id"])
        people[_code(row["person_id"])] = Person(
            born=_birthday(row), gender="" if gender == "0" else gender
        )
    if not people:
        raise PatientDataError(
            Problem(
                "person",
                "there is no table of persons, or it is empty",
                expected="person.csv or person.parquet",
                remedy="Bring it",
            )
        )
    units = {
        _code(row["concept_id"]): row["concept_code"]
        for row in _rows(
            tables.get("concept", ()), ("concept_id", "concept_code"), ("vocabulary_id",)
        )
        if row.get("vocabulary_id", "UCUM") == "UCUM"
    }
    for name, (concept, day, instant) in _OMOP.items():
        optional = (
            *(instant, "value_as_number", "value_as_string", "value_as_concept_id"),
            *("unit_source_value", "unit_concept_id", "operator_concept_id"),
        )
        for row in _rows(tables.get(name, ()), ("person_id", concept, day), optional):
            code = _code(row[concept])
            person = people.get(_code(row["person_id"]))
            if code not in wanted or person is None:
                continue
            at = _known_from(row.get(instant, ""), row[day])
            if at is None:
                continue  # nobody knows when
            number = row.get("value_as_number", "")
            bound = _OPERATORS.get(_code(row.get("operator_concept_id", "")), "")
            value = _code(row.get("value_as_concept_id", ""))
            text = row.get("value_as_string", "") or ("" if value == "0" else value)
            unit = row.get("unit_source_value", "") or units.get(
                _code(row.get("unit_concept_id", "")), ""
            )
            person.events.append(
                Event(code, at, f"{bound}{number}", unit, number=not bound)
                if number
                else Event(code, at, text)
            )
    return people


def _read_meds(files: Sequence[Path], wanted: frozenset[str]) -> dict[str, Person]:
    """Read the shards of MEDS.

    Raises:
        PatientDataError: If a shard cannot be read, or lacks a column that is needed.
    """
    people: dict[str, Person] = {}
    shards = [file for file in files if file.suffix.lower() == ".parquet"]
    for row in _rows(shards, ("subject_id", "time", "code"), ("numeric_value", "text_value")):
        person = people.setdefault(_code(row["subject_id"]), Person())
        code, at = row["code"], _known_from(row["time"], row["time"])
        born = _instant(row["time"])
        if code == _BIRTH and born is not None:
            person.born = born.date()
        if code not in wanted:
            continue
        number = row.get("numeric_value", "")
        # Static facts have no time: they were always so.
        person.events.append(
            Event(
                code,
                at or _ALWAYS,
                number or row.get("text_value", ""),
                number=bool(number),
            )
        )
    return people


def _rows(
    files: Iterable[Path], needed: Sequence[str], optional: Sequence[str]
) -> Iterator[dict[str, str]]:
    """Yield the rows of files, cells as text by names in small letters; a blank cell is empty.

    Raises:
        PatientDataError: If one cannot be read, or lacks a column that is needed.
    """
    import pyarrow as pa

    for file in files:
        try:
            yield from _rows_of(file, needed, optional)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise PatientDataError(
                Problem(
                    file.name,
                    "the table cannot be read",
                    expected="CSV in UTF-8 with a header, or Parquet",
                    got=type(error).__name__,
                    remedy="Export it again",
                )
            ) from error


def _rows_of(
    file: Path, needed: Sequence[str], optional: Sequence[str]
) -> Iterator[dict[str, str]]:
    """Yield the rows of one file, a part of it in memory at a time."""
    import pyarrow as pa
    from pyarrow import csv as text
    from pyarrow import parquet

    batches: Iterable[Any]
    if file.suffix.lower() == ".parquet":
        opened = parquet.ParquetFile(file)
        names = _named(file, opened.schema_arrow.names, needed, optional)
        batches = opened.iter_batches(columns=list(names))
    else:
        with text.open_csv(file) as first:
            header = first.schema.names
        names = _named(file, header, needed, optional)
        kinds = text.ConvertOptions(
            include_columns=list(names), column_types=dict.fromkeys(names, pa.string())
        )
        batches = text.open_csv(file, convert_options=kinds)
    for batch in batches:
        columns = {names[n]: batch.column(n).to_pylist() for n in batch.schema.names}
        for cells in zip(*columns.values(), strict=True):
            yield {n: _text(cell) for n, cell in zip(columns, cells, strict=True)}


def _named(
    file: Path, header: Sequence[str], needed: Sequence[str], optional: Sequence[str]
) -> dict[str, str]:
    """Return the columns that matter: as the file calls them, and in small letters.

    Raises:
        PatientDataError: If one that is needed is not there.
    """
    found = {name: name.lower() for name in header if name.lower() in (*needed, *optional)}
    absent = [name for name in needed if name not in found.values()]
    if absent:
        raise PatientDataError(
            Problem(
                file.name,
                "the table lacks a column",
                expected=", ".join(needed),
                got=f"none called {', '.join(absent)}",
                remedy="Export it as the standard has it",
            )
        )
    return found


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, float):
        return repr(value)
    return value.isoformat() if isinstance(value, date) else str(value).strip()


def _code(text: str) -> str:
    """Return an id as it is compared: tables pass through programs that make 8 into 8.0."""
    whole, dot, rest = text.strip().partition(".")
    return whole if dot and whole.lstrip("-").isdigit() and not rest.strip("0") else text.strip()


def _instant(text: str) -> datetime | None:
    """Return a time, of a day its beginning; those of a zone in UTC, and without it."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo is None else found.astimezone(UTC).replace(tzinfo=None)


def _known_from(instant: str, day: str) -> datetime | None:
    """Return from when on an event is known: its instant, or the end of its day.

    Midnight stands for a day whose time is not known, as programs fill it in.
    """
    exact = _instant(instant)
    if exact is not None and exact.time() != time():
        return exact
    at = exact or _instant(day)
    return None if at is None else datetime.combine(at.date() + timedelta(days=1), time())


def _birthday(row: Mapping[str, str]) -> date | None:
    """Return when somebody was born: the middle of the month or of the year if that is all."""
    try:
        year = int(float(row["year_of_birth"]))
        month = int(float(row.get("month_of_birth") or 0))
        day = int(float(row.get("day_of_birth") or 0))
        return date(year, month or 7, day or (15 if month else 1))
    except ValueError:
        return None
