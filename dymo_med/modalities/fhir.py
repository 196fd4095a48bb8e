"""FHIR R4 records as tables: one Patient and its Observations, by LOINC code.

The record is a Bundle, a single resource, a list or lines (NDJSON) of resources, or a folder of
such files (HL7 FHIR Release 4, hl7.org/fhir/R4: Patient, Observation, Quantity). Only Patient and
Observation are looked at. Nothing of a patient enters a message: places are named by the code that
the cohort declares and the observation's position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from dymo_med.errors import PatientDataError, Problem
from dymo_med.modalities.cells import Cell, Row
from dymo_med.modalities.table_files import content, decode, load_json, scalar
from dymo_med.types import CellRules, Column, FileRules

LOINC = "http://loinc.org"
_UCUM = "http://unitsofmeasure.org"
# Types of identifiers (HL7 table 0203): medical record number, temporary one, internal, external
# and enterprise number of a patient, pseudonym, unspecified. Others are a state's or an insurer's.
_TYPES = "http://terminology.hl7.org/CodeSystem/v2-0203"
_HOSPITALS = ("MR", "MRT", "PI", "PT", "PE", "ANON", "U")
# What FHIR itself names: numbers of social security, of health insurances.
_NATIONAL = "http://hl7.org/fhir/sid/"
STATUSES = ("registered", "preliminary", "final", "amended", "corrected", "unknown")
_USED = ("final", "amended", "corrected")
_NO_DATA = ("entered-in-error", "cancelled", "registered")
_MOST_FILES = 10_000
_LATEST_DAY = "effective"

Parse = Callable[[Cell, Column, str], "float | Problem | None"]
Json = Mapping[str, Any]


@dataclass(frozen=True)
class _Measured:
    """One value of one observation.

    Attributes:
        cell: What it holds; an empty text is one that says why it is absent.
        when: Its day, and its instant where a time is given; None = not dated.
        number: Position of the observation in the record, from 1.
    """

    cell: Cell
    when: tuple[date, datetime | None] | None
    number: int


def read_record(
    path: Path, columns: Sequence[Column], rules: FileRules, where: str, parse: Parse
) -> Row:
    """Return a FHIR record as the row of a table, cells by the columns' names.

    The cell `effective` holds the day of the latest observation that a column uses, so that an age
    can be counted to it.

    Args:
        path: A JSON or NDJSON file, or a folder of them.
        columns: Each with a LOINC code, or an element of the patient.
        rules: Which observations count, by their status.
        where: Who this is, for messages.
        parse: Reads a cell, to tell whether several observations differ.

    Raises:
        PatientDataError: With everything that is wrong: no FHIR, several patients, observations
            of another patient, several values where none is preferred, limits, other statuses.
    """
    resources, digest = _resources(path, where)
    patients = [r for r in resources if r.get("resourceType") == "Patient"]
    observations = [r for r in resources if r.get("resourceType") == "Observation"]
    if not patients and not observations:
        raise PatientDataError(
            Problem(
                where,
                "there is no Patient and no Observation in the file",
                expected="FHIR R4 resources: a Bundle, a list, or one per line",
                remedy="Check that this is the patient's FHIR record",
            )
        )
    problems = _one_patient(patients, observations, where)
    if problems:
        raise PatientDataError(*problems)
    cells: dict[str, Cell] = {}
    days: list[date] = []
    for column in columns:
        own = column.rules or CellRules()
        if own.fhir:
            value = scalar(patients[0].get(own.fhir)) if patients else ""
            if not isinstance(value, str):
                problems.append(_malformed(f"{where}, Patient.{own.fhir}"))
                continue
            cells[column.name] = Cell(value, place=f"{where}, Patient.{own.fhir}")
            continue
        place = f"{where}, LOINC {' or '.join(own.loinc)}"
        try:
            found = list(_measured(observations, own.loinc, rules, place))
            chosen = _choose(found, column, own, place, parse)
        except PatientDataError as error:
            problems += error.problems
            continue
        if chosen is not None:
            cells[column.name] = replace(chosen.cell, place=_at(place, chosen.number))
            if chosen.when is not None and chosen.cell.text:
                days.append(chosen.when[0])
    if problems:
        raise PatientDataError(*problems)
    if days:
        cells[_LATEST_DAY] = Cell(max(days).isoformat())
    return Row(cells, where, digest, _identifiers(patients))


def _at(place: str, number: int) -> str:
    return f"{place}, observation {number}"


def _malformed(where: str) -> Problem:
    return Problem(
        where,
        "the element is not what FHIR R4 says",
        expected="a resource of FHIR R4 in JSON",
        remedy="Export the record again",
    )


# -- resources -------------------------------------------------------------------------------------


def _resources(path: Path, where: str) -> tuple[list[Json], str]:
    """Return all resources of a file or folder, and its hash."""
    if not path.is_dir():
        data = content(path, where)
        found = _parsed(data, path.suffix.lower(), where)
        return _unique(found), hashlib.sha256(data).hexdigest()
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in (".json", ".ndjson"))
    if not files or len(files) > _MOST_FILES:
        raise PatientDataError(
            Problem(
                where,
                "the folder is no FHIR record",
                expected=f"1 to {_MOST_FILES} files that end in .json or .ndjson",
                got=f"{len(files)} files",
                remedy="Put the patient's resources into it",
            )
        )
    found, hashes = [], []
    for number, file in enumerate(files, start=1):
        # A file's name may be the patient's; its position is not.
        here = f"{where}, file {number}"
        data = content(file, here)
        found += _parsed(data, file.suffix.lower(), here)
        hashes.append(hashlib.sha256(data).hexdigest())
    return _unique(found), hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def _parsed(data: bytes, suffix: str, where: str) -> list[Json]:
    text = decode(data, "", where)
    if suffix == ".ndjson":
        lines = enumerate(text.split("\n"), start=1)
        documents = [load_json(t, f"{where}, line {n}") for n, t in lines if t.strip()]
    else:
        documents = [load_json(text, where)]
    return [resource for document in documents for resource in _unpacked(document, where)]


def _unpacked(document: Any, where: str) -> Iterator[Json]:
    """Yield the resources of a document: itself, those of a list, those of a Bundle."""
    if isinstance(document, list):
        for part in document:
            yield from _unpacked(part, where) if isinstance(part, dict) else _unpacked(None, where)
        return
    if not isinstance(document, dict) or not isinstance(document.get("resourceType"), str):
        raise PatientDataError(
            Problem(
                where,
                "the file is no FHIR resource",
                expected="an object with a resourceType",
                remedy="Check that this is the patient's FHIR record",
            )
        )
    if document["resourceType"] != "Bundle":
        yield document
        return
    for entry in _listed(document.get("entry"), where):
        resource = entry.get("resource")
        if resource is None:
            continue
        if not isinstance(resource, dict) or resource.get("resourceType") == "Bundle":
            raise PatientDataError(_malformed(f"{where}, Bundle.entry"))
        full_url = entry.get("fullUrl")
        yield from (
            {**r, "_url": full_url} if isinstance(full_url, str) else r
            for r in _unpacked(resource, where)
        )


def _listed(value: Any, where: str) -> list[Json]:
    """Return a list of objects; what is absent is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise PatientDataError(_malformed(where))
    return value


def _unique(resources: Sequence[Json]) -> list[Json]:
    """Return resources without copies of the same content."""
    kept: list[Json] = []
    seen: set[str] = set()
    for resource in resources:
        text = repr(sorted((k, v) for k, v in resource.items() if k != "_url"))
        if text not in seen or not resource.get("id"):
            kept.append(resource)
        seen.add(text)
    return kept


# -- whose -----------------------------------------------------------------------------------------


def _one_patient(
    patients: Sequence[Json], observations: Sequence[Json], where: str
) -> list[Problem]:
    """Return what is wrong if the record is not about one patient; nobody is named."""
    if len(patients) > 1:
        return [
            Problem(
                where,
                f"the record holds {len(patients)} Patient resources",
                expected="one",
                remedy="Keep the resources of this patient",
            )
        ]
    names = [_subject(o) for o in observations]
    if patients:
        own = {str(patients[0].get(key)) for key in ("id", "_url") if patients[0].get(key)}
        own |= {f"Patient/{name}" for name in own}
    else:
        own = set(list(filter(None, names))[:1])
    strange = [
        number
        for number, name in enumerate(names, start=1)
        if name and name not in own and not _ends_alike(name, own)
    ]
    if not strange:
        return []
    some = ", ".join(map(str, strange[:5]))
    return [
        Problem(
            where,
            "observations are about another patient",
            expected="observations whose subject is the Patient of the record",
            got=f"{len(strange)} of {len(observations)} about somebody else (observation {some})",
            remedy="Take out what is not this patient's",
        )
    ]


def _subject(observation: Json) -> str:
    subject = observation.get("subject")
    reference = subject.get("reference") if isinstance(subject, dict) else None
    return reference.split("/_history/")[0] if isinstance(reference, str) else ""


def _ends_alike(name: str, own: set[str]) -> bool:
    """Return whether an absolute and a relative reference mean one patient."""
    tail = "/".join(name.split("/")[-2:])
    return any(tail == "/".join(other.split("/")[-2:]) for other in own)


def _identifiers(patients: Sequence[Json]) -> tuple[str, ...]:
    """Return the patient's identifiers, if one of them may be what a scan's header states.

    A record that gives nothing but the server's id, a passport or an insurance number says nothing
    of the number in a DICOM header: that the two differ would be no sign of another patient.
    """
    stated = patients[0].get("identifier") if patients else None
    parts = [
        part
        for part in (stated if isinstance(stated, list) else [])
        if isinstance(part, dict) and isinstance(part.get("value"), str) and part["value"].strip()
    ]
    if not any(_may_be_a_hospitals(part) for part in parts):
        return ()
    return tuple(dict.fromkeys(part["value"].strip() for part in parts))


def _may_be_a_hospitals(identifier: Json) -> bool:
    """Return whether an identifier's type, or else its system, leaves room for a hospital's."""
    types = [c.get("code") for c in _codings(identifier.get("type")) if c.get("system") == _TYPES]
    if types:
        return any(code in _HOSPITALS for code in types)
    return not str(identifier.get("system", "")).startswith(_NATIONAL)


# -- observations ----------------------------------------------------------------------------------


def _codings(concept: Any) -> list[Json]:
    coding = concept.get("coding") if isinstance(concept, dict) else None
    return [c for c in coding if isinstance(c, dict)] if isinstance(coding, list) else []


def _is_about(concept: Any, codes: Sequence[str]) -> bool:
    return any(c.get("system") == LOINC and c.get("code") in codes for c in _codings(concept))


def _measured(
    observations: Sequence[Json], codes: Sequence[str], rules: FileRules, place: str
) -> Iterator[_Measured]:
    """Yield the values with one of the codes, of observations and of their components.

    Raises:
        PatientDataError: If one has a status that is neither data nor declared.
    """
    for number, observation in enumerate(observations, start=1):
        holders = [observation] if _is_about(observation.get("code"), codes) else []
        parts = observation.get("component")
        holders += [
            part
            for part in (parts if isinstance(parts, list) else [])
            if isinstance(part, dict) and _is_about(part.get("code"), codes)
        ]
        if not holders:
            continue
        here = _at(place, number)
        status = observation.get("status")
        if not isinstance(status, str):
            raise PatientDataError(_malformed(f"{here}, status"))
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
        when = _when(observation, here)
        for holder in holders:
            yield _Measured(_value(holder, here), when, number)


def _when(observation: Json, here: str) -> tuple[date, datetime | None] | None:
    """Return when an observation was made; the start of a period."""
    period = observation.get("effectivePeriod")
    text = next(
        (
            value
            for value in (
                observation.get("effectiveDateTime"),
                observation.get("effectiveInstant"),
                period.get("start") if isinstance(period, dict) else None,
            )
            if value is not None
        ),
        None,
    )
    if text is None:
        return None
    try:
        if not isinstance(text, str):
            raise ValueError
        day = date.fromisoformat(text[:10])
        if len(text) == 10:
            return day, None
        instant = datetime.fromisoformat(text)
        return day, instant.astimezone(UTC) if instant.tzinfo is not None else None
    except (ValueError, OverflowError):
        raise PatientDataError(
            Problem(
                here,
                "the observation's time is not a day",
                expected="YYYY-MM-DD, or with a time of day",
                remedy="Export the record with whole dates",
            )
        ) from None


def _value(holder: Json, here: str) -> Cell:
    """Return the value of an observation or component; empty where it says why there is none.

    Raises:
        PatientDataError: If it is of a kind that no column can hold.
    """
    kinds = sorted(key for key in holder if key.startswith("value"))
    if not kinds:
        return Cell("")
    if len(kinds) > 1:
        raise PatientDataError(_malformed(f"{here}, value[x]"))
    kind, value = kinds[0], holder[kinds[0]]
    if kind == "valueQuantity" and isinstance(value, dict):
        return _quantity(value, here)
    if kind == "valueCodeableConcept" and isinstance(value, dict):
        texts = [c["code"] for c in _codings(value) if isinstance(c.get("code"), str)]
        texts += [value["text"]] if isinstance(value.get("text"), str) else []
        if not texts:
            raise PatientDataError(_malformed(f"{here}, {kind}"))
        return Cell(texts[0].strip(), also=tuple(text.strip() for text in texts[1:]))
    plain = ("valueString", "valueBoolean", "valueInteger", "valueDateTime")
    if kind in plain and not isinstance(value, dict | list):
        cell = scalar(value)
        return Cell(str(cell), typed=kind == "valueInteger")
    raise PatientDataError(
        Problem(
            f"{here}, {kind if kind.isalnum() else 'value[x]'}",
            "the observation holds what no column can",
            expected="a quantity, a code, text, a whole number, a day, or true and false",
            remedy="Leave the column out, or take another code",
        )
    )


def _quantity(value: Json, here: str) -> Cell:
    """Return a Quantity; its UCUM code is the unit, else its unit in words."""
    number, comparator = scalar(value.get("value")), value.get("comparator", "")
    unit = value.get("code") if value.get("system") == _UCUM else None
    unit = value.get("unit", "") if unit is None else unit
    if not (isinstance(number, str) and isinstance(comparator, str) and isinstance(unit, str)):
        raise PatientDataError(_malformed(f"{here}, valueQuantity"))
    if not number:
        return Cell("")
    return Cell(f"{comparator}{number}", unit=unit.strip() or "1", typed=True)


def _choose(
    found: Sequence[_Measured], column: Column, rules: CellRules, place: str, parse: Parse
) -> _Measured | None:
    """Return the value that counts; None if there is none.

    Raises:
        PatientDataError: If several differ and the cohort does not say which counts, or the one it
            asks for cannot be told.
    """
    present = [m for m in found if m.cell.text]
    if len(present) < 2:
        return present[0] if present else None
    if rules.pick != "error":
        present = _at_the_end(present, rules.pick == "latest", place)
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
    """Return those of the latest (or earliest) time.

    By the instant where all have one, else by the day: a day alone does not come before or after
    the hours of that day.
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
    exact = all(m.when is not None and m.when[1] is not None for m in found)
    keys = [m.when[1] if exact else m.when[0] for m in found if m.when is not None]
    end = (max if latest else min)(keys)  # type: ignore[type-var]
    return [m for m, key in zip(found, keys, strict=True) if key == end]
