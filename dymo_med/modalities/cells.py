"""Cells of a table: from what a file says to a number, a category or nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta

import torch

from dymo_med.errors import Problem
from dymo_med.modalities.units import UnitError, convert, same, suspects
from dymo_med.registry import nearest
from dymo_med.text import comparable
from dymo_med.types import CellRules, Column

# Python's float() also takes "1_000", "nan" and "inf"; a table must not.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_COMMA_NUMBER = re.compile(r"[+-]?(\d+,?\d*|,\d+)([eE][+-]?\d+)?", re.ASCII)
_GROUPED = re.compile(r"[+-]?\d{1,3}([., '’\u00a0\u202f]\d{3})+([.,]\d+)?", re.ASCII)
_CENSORED = re.compile(r"(?:[<>]=?|[≤≥])\s*(.+)|(\d.*?)\s*\+")  # <5, and 89+ as BIDS has it
_NOT_A_NUMBER = frozenset({"nan", "inf", "-inf", "+inf", "infinity", "-infinity"})
_DATE = re.compile(r"(\d{4}-\d\d-\d\d)(?:[T ]\d\d:\d\d\S*)?", re.ASCII)
# Dates and times of FHIR R4, known to the year, the month, the day or more closely.
_ISO = re.compile(
    r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:T\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:\d\d)?)?)?)?",
    re.ASCII,
)
_LARGEST = torch.finfo(torch.float32).max
_DEFAULT = CellRules()

# Words and numbers that often mean "not recorded". Never taken for it unless declared; only the
# remedy knows them.
_BLANK_WORDS = frozenset(
    {
        *("n/a", "na", "#n/a", "n.a.", "n.d.", "nd", "nan", "null", "none", "nil", "unk"),
        *("?", "??", "-", "--", "---", ".", "..", "*", "unknown", "missing", "pending"),
        *("not done", "not recorded", "not measured", "not available", "unavailable"),
        *("#div/0!", "#value!", "#ref!", "#null!", "#num!", "#name?"),
    }
)
_BLANK_NUMBERS = frozenset({-99.0, -999.0, -9999.0, -99999.0})

_DECLARE = (
    "if it means that nothing was recorded, list it under missing_values, or under this column's"
    " missing, in cohort.yaml"
)


@dataclass(frozen=True)
class Cell:
    """What a file holds in one cell.

    Attributes:
        text: Stripped.
        unit: The unit that the file states beside the number; empty = none.
        typed: The file's format itself says that this is a number (JSON, Parquet), so that the
            decimal sign is a point whatever the table's is.
        also: Other codes of the same category.
        place: Where, if that is not the row and the column.
        iso: The file's format itself says that this is a date as ISO 8601 writes it, however the
            table's dates are written in text: a year, a month, a day, or two days with a slash.
    """

    text: str
    unit: str = ""
    typed: bool = False
    also: tuple[str, ...] = ()
    place: str = ""
    iso: bool = False


@dataclass(frozen=True)
class Row:
    """One record's row of a table.

    Attributes:
        cells: By header.
        place: Where the row is, for messages.
        sha256: Hash of the file, or of the row where the file holds rows of others too.
        identifiers: What the file calls the patient.
        remarks: What of the file is not used though it could be meant, and why.
        names: Of all columns of the file.
    """

    cells: Mapping[str, Cell]
    place: str
    sha256: str
    identifiers: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def is_blank(cell: Cell, column: Column, blank: Collection[str], decimal: str = ".") -> bool:
    """Return whether a cell holds nothing, or a word declared to mean that.

    Args:
        cell: From the file.
        column: What it is a cell of.
        blank: Words that mean "blank" in all columns.
        decimal: The table's decimal sign.
    """
    text = comparable(cell.text)
    if not text:
        return True
    rules = column.rules or _DEFAULT
    words = {"", *(comparable(w) for w in (*blank, *rules.missing))}
    if text in words:
        return True
    if text in column.values or text in {word for word, _ in rules.aliases}:
        return False
    # A code written as another number: -999 as -999.0.
    number = _as_number(text, "." if cell.typed else decimal)
    return number is not None and number in {_as_number(w, ".") for w in words}


def _as_number(text: str, decimal: str) -> float | None:
    """Return the number that a text is; None if it is none."""
    pattern = _NUMBER if decimal == "." else _COMMA_NUMBER
    return float(text.replace(",", ".")) if pattern.fullmatch(text) else None


def parse(
    cell: Cell,
    column: Column,
    cells: Mapping[str, Cell],
    where: str,
    decimal: str = ".",
    blank: Collection[str] = (),
) -> float | Problem | None:
    """Return a cell's number or category index, None for a blank cell, or what is wrong with it.

    Args:
        cell: What the file holds.
        column: What it is a cell of.
        cells: The whole row, for dates that count from one column to another.
        where: Where the cell is, for the message.
        decimal: The table's decimal sign.
        blank: Words that mean "blank" in all columns.
    """
    if is_blank(cell, column, blank, decimal):
        return None
    rules = column.rules or _DEFAULT
    if column.type == "categorical":
        return _category(cell, column, where, "." if cell.typed else decimal)
    if rules.until:
        return _time_span(cell, column, rules, cells, where, blank)
    text = cell.text
    censored = _CENSORED.fullmatch(text)
    if censored is not None and rules.censored != "error":
        if rules.censored == "missing":
            return None
        text = censored[1] or censored[2]
    sign = "." if cell.typed else decimal
    if not (_NUMBER if sign == "." else _COMMA_NUMBER).fullmatch(text):
        return _no_number(text, column, sign, where, censored is not None)
    value = float(text.replace(",", "."))
    if column.range is None and value in _BLANK_NUMBERS:
        return Problem(
            where,
            "the number often stands for 'not measured', and the cohort does not say what it is",
            expected="a measurement, or a declared word for blank",
            remedy="Give the column a range if it is a measurement; " + _DECLARE,
        )
    converted = _convert(value, cell.unit, column, rules, where)
    return converted if isinstance(converted, Problem) else _within(converted, column, where)


def _category(cell: Cell, column: Column, where: str, decimal: str) -> float | Problem:
    """Return the index of a category, by its name or one of its aliases.

    Texts are compared as `text.comparable` has them. Tables pass through programs that make 1 into
    1.0: as a category both are the same code.
    """
    words = {comparable(value): value for value in column.values}
    words |= {comparable(word): value for word, value in (column.rules or _DEFAULT).aliases}
    codes = {as_code(word): value for word, value in words.items()}
    texts = [comparable(text) for text in (cell.text, *cell.also)]
    named = [words.get(text) or codes.get(as_code(text, decimal)) for text in texts]
    found = {value for value in named if value is not None}
    if len(found) == 1:
        return float(column.values.index(found.pop()))
    what = "the cell holds several categories" if found else "the cell holds an unknown category"
    hint = nearest(cell.text, list(column.values))
    if cell.text.lower() in _BLANK_WORDS or _is_code(cell.text):
        hint = _DECLARE[0].upper() + _DECLARE[1:]
    return Problem(
        where,
        what,
        expected=" or ".join(column.values),
        remedy=f"{hint}. Leave the cell blank if it was not recorded; other words for a category"
        " go under aliases in cohort.yaml",
    )


def as_code(text: str, decimal: str = ".") -> str:
    """Return a category's word as it is compared: a whole number without its decimals.

    Args:
        text: As a file or a cohort's description has it.
        decimal: The decimal sign.

    Example:
        >>> as_code("1.0"), as_code("1.5"), as_code(" a\u00a0")
        ('1', '1.5', 'a')
    """
    text = comparable(text)
    found = re.fullmatch(rf"\+?(-?\d+){re.escape(decimal)}0*", text, re.ASCII)
    return found[1] if found is not None else text


def _is_code(text: str) -> bool:
    return bool(_NUMBER.fullmatch(text)) and float(text) in _BLANK_NUMBERS


def _expected(column: Column) -> str:
    unit = f" {column.unit}" if column.unit else ""
    if column.range is None:
        return f"a number{' in' if unit else ''}{unit}"
    return f"a number from {column.range[0]:g} to {column.range[1]:g}{unit}"


def _no_number(text: str, column: Column, sign: str, where: str, censored: bool) -> Problem:
    """Return what is wrong with text that is no number, and what to do about it."""
    what = "the cell is not a number"
    if text.lower() in _NOT_A_NUMBER:
        what = "the cell does not hold a finite number"
        remedy = f"Leave the cell blank if it was not measured, or {_DECLARE}"
    elif text.lower() in _BLANK_WORDS:
        remedy = _DECLARE[0].upper() + _DECLARE[1:]
    elif censored:
        remedy = (
            "Say in cohort.yaml what a limit means in this column, censored: limit or"
            " censored: missing"
        )
    elif _GROUPED.fullmatch(text) and not _COMMA_NUMBER.fullmatch(text):
        remedy = (
            "Write numbers without thousands separators, with the decimal sign that the table"
            f" declares ('{sign}')"
        )
    elif sign == "." and _COMMA_NUMBER.fullmatch(text):
        remedy = (
            "If the comma is the decimal sign, say so in cohort.yaml: decimal: ',' for this table;"
            " if it separates thousands, take it out"
        )
    elif sign == "," and _NUMBER.fullmatch(text):
        remedy = (
            "The table declares a decimal comma; write one, or take decimal: out of cohort.yaml"
        )
    else:
        remedy = (
            "Write the number alone; a unit belongs into the header, as in [mmol/L], or into a"
            f" column of its own; and {_DECLARE}"
        )
    return Problem(where, what, expected=_expected(column), remedy=remedy)


def _convert(
    value: float, unit: str, column: Column, rules: CellRules, where: str
) -> float | Problem:
    """Return a number in the column's unit."""
    accepted = [column.unit, *rules.units]
    if not unit:
        if not rules.units:
            return value
        return Problem(
            where,
            "the file does not say in which unit the number is",
            expected=" or ".join(accepted),
            remedy="Put the unit into the header, as in [mmol/L], or into a column"
            f" {rules.header or column.name}_unit",
        )
    if same(unit, column.unit):
        return value
    if not any(same(unit, other) for other in rules.units):
        return Problem(
            where,
            "the number is in a unit that is not declared",
            expected=" or ".join(accepted) if column.unit else "a number without unit",
            remedy="Convert it, or list the file's unit under units of this column in cohort.yaml",
        )
    try:
        return convert(value, unit, column.unit, rules.molar_mass)
    except UnitError as error:
        return Problem(
            where,
            str(error),
            expected=f"a number that can be converted to {column.unit}",
            remedy="See units and molar_mass in cohort.yaml",
        )


def _within(value: float, column: Column, where: str) -> float | Problem:
    low, high = column.range if column.range is not None else (-_LARGEST, _LARGEST)
    if low <= value <= high and math.isfinite(value):
        return value
    remedy = "Check the value and its unit, or widen the range in cohort.yaml"
    if column.range is not None and column.unit:
        molar_mass = (column.rules or _DEFAULT).molar_mass
        others = suspects(value, column.unit, column.range, molar_mass)
        if others:
            remedy = (
                f"It would be within the range if it were in {' or '.join(others)}: check the unit"
            )
    if value in _BLANK_NUMBERS:
        remedy = f"{remedy}; {_DECLARE}"
    return Problem(
        where, "the number is outside the declared range", expected=_expected(column), remedy=remedy
    )


def _time_span(
    cell: Cell,
    column: Column,
    rules: CellRules,
    cells: Mapping[str, Cell],
    where: str,
    blank: Collection[str],
) -> float | Problem | None:
    """Return the time from a cell's date to the reference date, in the column's unit.

    A year is 365.25 days and a month a twelfth of it, as in UCUM. Where a date is a month or a
    year, the value is the middle of what the dates allow, or blank, as the cohort declares.
    """
    bounds = _bounds(cell, rules, cells, where, blank)
    if bounds is None or isinstance(bounds, Problem):
        return bounds
    fewest, most = bounds
    if most < 0:
        return Problem(
            where,
            "the date lies after the date up to which time is counted",
            expected=f"a day up to that of {rules.until}",
            remedy="Check which of the two is wrong",
        )
    if fewest < most and rules.partial == "missing":
        return None
    middle = (max(fewest, 0) + most) / 2
    return _within(convert(middle, "days", column.unit), column, where)


def imprecision(
    cell: Cell, column: Column, cells: Mapping[str, Cell], blank: Collection[str] = ()
) -> str:
    """Return how far the value of a date may be off, as a remark; empty if it is exact.

    Args:
        cell: What the file holds.
        column: What it is a cell of.
        cells: The whole row.
        blank: Words that mean "blank" in all columns.
    """
    rules = column.rules or _DEFAULT
    if not rules.until or is_blank(cell, column, blank):
        return ""
    bounds = _bounds(cell, rules, cells, "", blank)
    if bounds is None or isinstance(bounds, Problem) or bounds[0] == bounds[1]:
        return ""
    if rules.partial == "missing":
        return f"{column.name} is blank, since its date is not known to the day"
    off = convert((bounds[1] - max(bounds[0], 0)) / 2, "days", column.unit)
    return (
        f"{column.name} is the middle of what its date allows, which is not known to the day: it"
        f" may be {off:.2g} {column.unit} more or less"
    )


def _bounds(
    cell: Cell, rules: CellRules, cells: Mapping[str, Cell], where: str, blank: Collection[str]
) -> tuple[int, int] | Problem | None:
    """Return the fewest and most days from a cell's date to the reference date; None = blank."""
    fixed = _DATE.fullmatch(rules.until)
    reference = (
        Cell(rules.until, iso=True) if fixed else cells.get(comparable(rules.until), Cell(""))
    )
    if not reference.text or reference.text in {w.strip() for w in (*blank, *rules.missing)}:
        return None
    ends = []
    for part, name in ((cell, ""), (reference, f" ({rules.until})")):
        days = days_of(part.text, rules.date_format, iso=part.iso)
        if days is not None:
            ends.append(days)
            continue
        expected = f"a day written as {rules.date_format}" if rules.date_format else "YYYY-MM-DD"
        remedy = "Write whole dates, or declare how they are written: format: '%d.%m.%Y'"
        if part.iso:
            expected, remedy = "YYYY, YYYY-MM or YYYY-MM-DD", "Export the record again"
        elif part.text.lower() in _BLANK_WORDS:
            remedy = _DECLARE[0].upper() + _DECLARE[1:]
        return Problem(where + name, "the cell is not a date", expected=expected, remedy=remedy)
    (first, last), (reference_first, reference_last) = ends
    return (reference_first - last).days, (reference_last - first).days


def days_of(text: str, written: str = "", *, iso: bool = False) -> tuple[date, date] | None:
    """Return the first and the last day that a date may mean; None if it is no date.

    Args:
        text: The date.
        written: How, as for `strptime`; empty = YYYY-MM-DD. Without a day in it, it is a month or
            a year.
        iso: It is written as FHIR writes dates (YYYY, YYYY-MM, YYYY-MM-DD, a time behind it or
            not), or two of these with a slash, whatever `written` says.

    Example:
        >>> [day.isoformat() for day in days_of("2024-02", iso=True)]
        ['2024-02-01', '2024-02-29']
    """
    try:
        if iso:
            ends = [_iso_days(part) for part in text.split("/")]
            return (ends[0][0], ends[-1][1]) if len(ends) < 3 else None
        if written:
            day = datetime.strptime(text, written).date()
            return _whole(day, _precision(written))
        found = _DATE.fullmatch(text)
        return _whole(date.fromisoformat(found[1]), "day") if found else None
    except (ValueError, OverflowError):
        return None


def _iso_days(text: str) -> tuple[date, date]:
    """Return the first and last day of a date or time of FHIR.

    Raises:
        ValueError: If it is none.
    """
    found = _ISO.fullmatch(text)
    if found is None:
        raise ValueError("no date of FHIR")
    year, month, day = (int(part) if part else 0 for part in found.groups())
    precision = "day" if day else "month" if month else "year"
    return _whole(date(year, month or 1, day or 1), precision)


def _precision(written: str) -> str:
    """Return what a date written like this is known to: the day, the month or the year."""
    signs = set(re.findall(r"%-?(.)", written))
    if signs & set("djxc") or (signs & set("aAwu") and signs & set("UWV")):
        return "day"
    return "month" if signs & set("mbB") else "year"


def _whole(day: date, precision: str) -> tuple[date, date]:
    """Return the first and last day of the month or year of a day, or the day itself."""
    if precision == "day":
        return day, day
    first = day.replace(day=1) if precision == "month" else day.replace(month=1, day=1)
    after = (first + timedelta(days=31 if precision == "month" else 366)).replace(day=1)
    return first, after - timedelta(days=1)
