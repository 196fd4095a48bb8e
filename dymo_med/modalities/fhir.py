"""FHIR R4 records as tables: one Patient and its Observations, by LOINC code.

Which resources there are and whose they are says `fhir_record`; here they become cells (HL7 FHIR
Release 4, hl7.org/fhir/R4: Observation, Quantity, date and dateTime). Nothing of a patient enters a
message: places are named by the code that the cohort declares and the observation's position.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from dymo_med.errors import PatientDataError, Problem
from dymo_med.modalities.cells import Cell, Row, days_of
from dymo_med.modalities.fhir_record import (
    LOINC,
    Json,
    Record,
    When,
    Whom,
    codings,
    is_modified,
    listed,
    malformed,
    open_record,
)
from dymo_med.modalities.table_files import scalar
from dymo_med.text import comparable
from dymo_med.types import CellRules, Column, FileRules

_UCUM = "http://unitsofmeasure.org"
STATUSES = ("registered", "preliminary", "final", "amended", "corrected", "unknown")
_USED = ("final", "amended", "corrected")
_NO_DATA = ("entered-in-error", "cancelled", "registered")
_LATEST_DAY = "effective"
# Codes that say why there is no value: of R4, of STU3, and those of HL7 version 3.
_ABSENT = (
    "http://terminology.hl7.org/CodeSystem/data-absent-reason",
    "http://hl7.org/fhir/data-absent-reason",
    "http://terminology.hl7.org/CodeSystem/v3-NullFlavor",
    "http://hl7.org/fhir/v3/NullFlavor",
)
# What the observation is about if that is not its subject; before R5 also as an extension.
_FOCUS_CODE = "http://hl7.org/fhir/StructureDefinition/observation-focusCode"

# Why a value was left out.
_MODIFIED = "they carry a modifierExtension or implicitRules that are not understood here"
_ELSEWHERE = "they are about somebody or something else than the patient (focus)"

Parse = Callable[[Cell, Column, str], "float | Problem | None"]


@dataclass(frozen=True)
class _Found:
    """An observation, or a component of one, with one of a column's codes.

    Attributes:
        holder: What has the value.
        when: Its time; None = not dated.
        number: Position of the observation in the record, from 1.
    """

    holder: Json
    when: When | None
    number: int


@dataclass(frozen=True)
class _Measured:
    """One value of one observation.

    Attributes:
        cell: What it holds; an empty text is one that says why it is absent.
        when: Its time; None = not dated.
        number: Position of the observation in the record, from 1.
    """

    cell: Cell
    when: When | None
    number: int


def read_record(
    path: Path, columns: Sequence[Column], rules: FileRules, where: str, parse: Parse
) -> Row:
    """Return a FHIR record as the row of a table, cells by the columns' names.

    The cell `effective` holds the day of the latest observation that a column uses, so that an age
    can be counted to it; a month, a year or two days with a slash if it is not known better.

    Args:
        path: A JSON or NDJSON file, or a folder of them.
        columns: Each with a LOINC code, or an element of the patient.
        rules: Which observations count, by their status.
        where: Who this is, for messages.
        parse: Reads a cell, to tell whether several observations differ.

    Raises:
        PatientDataError: With everything that is wrong: no FHIR, pages of a search that are
            missing, several patients, observations of another patient, several values where none
            is preferred, limits, other statuses.
    """
    record = open_record(path, where)
    problems: list[Problem] = []
    cells: dict[str, Cell] = {}
    times: list[When] = []
    left_out: dict[tuple[str, str], None] = {}  # in the order of the columns
    for column in columns:
        own = column.rules or CellRules()
        if own.fhir:
            value = _of_patient(record, own.fhir, left_out)
            if not isinstance(value, str):
                problems.append(malformed(f"{where}, Patient.{own.fhir}"))
                continue
            iso = own.fhir == "birthDate"
            cells[comparable(column.name)] = Cell(
                value, place=f"{where}, Patient.{own.fhir}", iso=iso
            )
            continue
        place = f"{where}, LOINC {' or '.join(own.loinc)}"
        try:
            found = list(_found(record, column, own, rules, place, left_out))
            chosen = _choose(found, column, own, place, parse)
        except PatientDataError as error:
            problems += error.problems
            continue
        if chosen is not None:
            cells[comparable(column.name)] = replace(chosen.cell, place=_at(place, chosen.number))
            if chosen.when is not None and chosen.cell.text:
                times.append(chosen.when)
    remarks = tuple(f"{name}: values are left out, since {why}" for name, why in left_out)
    if problems:
        raise PatientDataError(*problems)
    if times:
        ends = (max(time.first for time in times), max(time.last for time in times))
        text = "/".join(day.isoformat() for day in dict.fromkeys(ends))
        cells[_LATEST_DAY] = Cell(text, iso=True)
    return Row(cells, where, record.sha256, record.identifiers, remarks)


def _of_patient(record: Record, name: str, left_out: dict[tuple[str, str], None]) -> Any:
    """Return an element of the patient as a cell."""
    if record.patient is None:
        return ""
    value = scalar(record.patient.get(name))
    if value and is_modified(record.patient):
        left_out[f"Patient.{name}", _MODIFIED] = None
        return ""
    return value


def _at(place: str, number: int) -> str:
    return f"{place}, observation {number}"


# -- observations ----------------------------------------------------------------------------------


def _is_about(concept: Any, codes: Sequence[str]) -> bool:
    return any(c.get("system") == LOINC and c.get("code") in codes for c in codings(concept))


def _found(
    record: Record,
    column: Column,
    own: CellRules,
    rules: FileRules,
    place: str,
    left_out: dict[tuple[str, str], None],
) -> Iterator[_Found]:
    """Yield observations and components with one of the column's codes that may be used.

    Raises:
        PatientDataError: If one has a status that is neither data nor declared.
    """
    for number in sorted({n for code in own.loinc for n in record.by_code.get(code, ())}):
        observation = record.observations[number]
        here = _at(place, number)
        holders = [observation] if _is_about(observation.get("code"), own.loinc) else []
        parts = observation.get("component")
        holders += [
            part
            for part in (parts if isinstance(parts, list) else [])
            if isinstance(part, dict) and _is_about(part.get("code"), own.loinc)
        ]
        status = observation.get("status")
        if not isinstance(status, str):
            raise PatientDataError(malformed(f"{here}, status"))
        if status not in (rules.statuses or _USED):
            if rules.statuses or status in _NO_DATA:
                continue
            raise PatientDataError(
                Problem(
                    here,
                    "the observation is not final, and the cohort does not say whether it counts",
                    expected=", ".join(_USED),
                    got="preliminary" if status == "preliminary" else "another status",
                    remedy="Say in cohort.yaml which count, statuses: [final, amended, corrected,"
                    " preliminary]; all others are then left out",
                )
            )
        if _is_elsewhere(observation, record.whose, here):
            left_out[column.name, _ELSEWHERE] = None
            continue
        if number not in record.times:
            record.times[number] = _when(observation, here)
        when = record.times[number]
        modified = is_modified(observation)
        for holder in holders:
            if modified or _has_modified_part(holder):
                left_out[column.name, _MODIFIED] = None
            else:
                yield _Found(holder, when, number)


def _has_modified_part(holder: Json) -> bool:
    """Return whether an observation, a component, its code or its value must not be used."""
    return is_modified(holder) or any(
        isinstance(part, dict) and is_modified(part)
        for name, part in holder.items()
        if name == "code" or name.startswith("value")
    )


def _is_elsewhere(observation: Json, whose: Whom, here: str) -> bool:
    """Return whether an observation is about something else than its subject (R4, focus)."""
    extensions, focus = observation.get("extension"), observation.get("focus")
    if isinstance(extensions, list) and any(
        isinstance(part, dict) and part.get("url") == _FOCUS_CODE for part in extensions
    ):
        return True
    place = f"{here}, focus"
    return not all(whose.is_meant(part, place) for part in listed(focus, place))


def _when(observation: Json, here: str) -> When | None:
    """Return when an observation was made; the start of a period, the first event of a timing.

    Raises:
        PatientDataError: If it is no time of FHIR.
    """
    text: Any = None
    for key in ("effectiveDateTime", "effectiveInstant", "effectivePeriod", "effectiveTiming"):
        value = observation.get(key)
        if value is None:
            continue
        if key == "effectivePeriod":
            value = _start(value)
        elif key == "effectiveTiming":
            value = _first_event(value)
        text = value
        break
    if text is None:
        return None
    days = days_of(text, iso=True) if isinstance(text, str) else None
    if days is None:
        raise PatientDataError(
            Problem(
                here,
                "the observation's time is none",
                expected="YYYY, YYYY-MM or YYYY-MM-DD, or a day with a time of day",
                remedy="Export the record with times as FHIR writes them",
            )
        )
    try:
        instant = datetime.fromisoformat(text) if len(text) > len("YYYY-MM-DD") else None
        return When(*days, instant if instant is not None and instant.tzinfo else None)
    except (ValueError, OverflowError):  # a leap second, which FHIR has and Python has not
        return When(*days)


def _start(period: Any) -> Any:
    """Return the start of a Period, its end if it has none."""
    if not isinstance(period, dict):
        return ""
    return period.get("start") or period.get("end")


def _first_event(timing: Any) -> Any:
    """Return the first event of a Timing, else the start of the period within which it repeats."""
    if not isinstance(timing, dict):
        return ""
    events, repeat = timing.get("event"), timing.get("repeat")
    if isinstance(events, list) and events:
        return min(events) if all(isinstance(event, str) for event in events) else ""
    bounds = repeat.get("boundsPeriod") if isinstance(repeat, dict) else None
    return None if bounds is None else _start(bounds)


def _value(holder: Json, column: Column, here: str) -> Cell:
    """Return the value of an observation or component; empty where it says why there is none.

    Raises:
        PatientDataError: If it is of a kind that no column can hold.
    """
    kinds = sorted(key for key in holder if key.startswith("value"))
    if not kinds:
        return Cell("")
    if len(kinds) > 1:
        raise PatientDataError(malformed(f"{here}, value[x]"))
    kind, value = kinds[0], holder[kinds[0]]
    if kind == "valueQuantity" and isinstance(value, dict):
        return _quantity(value, here)
    if kind == "valueCodeableConcept" and isinstance(value, dict):
        return _concept(value, column, f"{here}, {kind}")
    plain = ("valueString", "valueBoolean", "valueInteger", "valueDateTime")
    if kind in plain and not isinstance(value, dict | list):
        cell = scalar(value)
        return Cell(str(cell), typed=kind == "valueInteger", iso=kind == "valueDateTime")
    raise PatientDataError(
        Problem(
            f"{here}, {kind if kind.isalnum() else 'value[x]'}",
            "the observation holds what no column can",
            expected="a quantity, a code, text, a whole number, a day, or true and false",
            remedy="Leave the column out, or take another code",
        )
    )


def _concept(value: Json, column: Column, here: str) -> Cell:
    """Return a CodeableConcept; empty if one of its codes says why there is no value.

    A code that the cohort declares for a category is that category, whatever it says.
    """
    coded = [c for c in codings(value) if isinstance(c.get("code"), str)]
    aliases = (column.rules or CellRules()).aliases
    declared = {*column.values, *(word for word, _ in aliases)}
    if any(c.get("system") in _ABSENT and c["code"] not in declared for c in coded):
        return Cell("")
    texts = [c["code"].strip() for c in coded]
    texts += [value["text"].strip()] if isinstance(value.get("text"), str) else []
    if not texts:
        raise PatientDataError(malformed(here))
    return Cell(texts[0], also=tuple(texts[1:]))


def _quantity(value: Json, here: str) -> Cell:
    """Return a Quantity; its UCUM code is the unit, else its unit in words."""
    number, comparator = scalar(value.get("value")), value.get("comparator", "")
    unit = value.get("code") if value.get("system") == _UCUM else None
    unit = value.get("unit", "") if unit is None else unit
    if not (isinstance(number, str) and isinstance(comparator, str) and isinstance(unit, str)):
        raise PatientDataError(malformed(f"{here}, valueQuantity"))
    if not number:
        return Cell("")
    return Cell(f"{comparator}{number}", unit=unit.strip() or "1", typed=True)


def _choose(
    found: Sequence[_Found], column: Column, rules: CellRules, place: str, parse: Parse
) -> _Measured | None:
    """Return the value that counts; None if there is none.

    Raises:
        PatientDataError: If several differ and the cohort does not say which counts, or the one it
            asks for cannot be told.
    """

    def filled(some: Sequence[_Found]) -> list[_Measured]:
        cells = [_value(f.holder, column, _at(place, f.number)) for f in some]
        return [
            _Measured(cell, f.when, f.number)
            for cell, f in zip(cells, some, strict=True)
            if cell.text
        ]

    if rules.pick == "error" or any(f.when is None or f.when.instant is None for f in found):
        present = filled(found)
        if rules.pick != "error" and len(present) > 1:
            present = _at_the_end(present, rules.pick == "latest", place)
    else:
        present = []
        by_time: dict[Any, list[_Found]] = defaultdict(list)
        for f in found:
            by_time[f.when.instant if f.when is not None else None].append(f)
        for instant in sorted(by_time, reverse=rules.pick == "latest"):
            if present := filled(by_time[instant]):
                break
    if len(present) < 2:
        return present[0] if present else None
    values: list[object] = [parse(m.cell, column, _at(place, m.number)) for m in present]
    if rules.until:  # days can be compared before it is known from when to count
        values = [m.cell.text for m in present]
    wrong = [value for value in values if isinstance(value, Problem)]
    if wrong:
        raise PatientDataError(*wrong)
    if len(set(values)) > 1:
        raise PatientDataError(
            Problem(
                place,
                f"{len(present)} observations"
                f"{' of the same time' if rules.pick != 'error' else ''} differ",
                expected="one value",
                got=f"observations {', '.join(str(m.number) for m in present[:5])}",
                remedy="Keep the right one"
                if rules.pick != "error"
                else "Say in cohort.yaml which counts, pick: latest or pick: earliest, or keep one",
            )
        )
    return present[0]


def _at_the_end(found: Sequence[_Measured], latest: bool, place: str) -> list[_Measured]:
    """Return those that may be the latest (or earliest).

    By the instant where all have one, else by the days on which they may have been made: a day
    alone does not come before or after the hours of that day, nor a month before its days.
    """
    undated = [m.number for m in found if m.when is None]
    if undated:
        raise PatientDataError(
            Problem(
                place,
                "an observation has no time, so that the latest or earliest cannot be told",
                got=f"observation {', '.join(map(str, undated[:5]))}",
                remedy="Export the record with effective times, or keep one observation",
            )
        )
    dated = [(m, m.when) for m in found if m.when is not None]
    instants = [when.instant for _, when in dated if when.instant is not None]
    if len(instants) == len(dated):
        end = max(instants) if latest else min(instants)
        return [m for m, when in dated if when.instant == end]
    if latest:
        bound = max(when.first for _, when in dated)
        return [m for m, when in dated if when.last >= bound]
    bound = min(when.last for _, when in dated)
    return [m for m, when in dated if when.first <= bound]
