"""Files of tables: from CSV, TSV, JSON and Parquet to the row of one record.

Nothing is guessed. Text is UTF-8, or UTF-16 with a byte-order mark, unless the cohort declares
another encoding; cells are separated by what is declared, or by the one sign that makes a header of
the declared columns. Nothing in a file is evaluated: no pickle, no schema metadata.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from dymo_med import limits
from dymo_med.errors import PatientDataError, Problem
from dymo_med.modalities.base import Whose
from dymo_med.modalities.cells import Cell, Row
from dymo_med.text import comparable
from dymo_med.types import FileRules

EXTENSIONS = (".csv", ".tsv", ".json", ".parquet")
ENCODINGS = (
    *("utf-8", "utf-16", "windows-1250", "windows-1251", "windows-1252", "windows-1253"),
    *("iso-8859-1", "iso-8859-2", "iso-8859-15", "macintosh", "cp437", "cp850"),
    *("gb18030", "big5", "shift_jis", "euc_jp", "euc_kr"),
)
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}

_KEEP = "Keep the rows and columns that are needed"
MOST_ROWS = 2_000_000
MOST_HEADERS = 20_000

_WITH_UNIT = re.compile(
    r"(.+?)\s*(?:\[([^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*)\]|\(([^()]*(?:\([^()]*\)[^()]*)*)\))"
)
# Brackets of full width, as Chinese and Japanese spreadsheets have them.
_BRACKETS = str.maketrans("（）［］", "()[]")
# What spreadsheets write before the header to say what separates the cells.
_STATED = re.compile(r'"?sep=([^\w"])"?', re.IGNORECASE)
# Lines with their ends, of any system; one by one, since a copy in memory would take four bytes
# for each character.
_LINE = re.compile(r"[^\r\n]+(?:\r\n|\r|\n)?|\r\n|\r|\n")
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


class _Number(str):
    """Text of a number whose format says that it is one."""

    __slots__ = ()


class _Names(dict[str, str]):
    """Names as they are compared, by how they are written; each is worked out once."""

    def __missing__(self, name: str) -> str:
        self[name] = comparable(name)
        return self[name]


class _Nested:
    """A list or an object where a cell is expected."""


_Raw = str | Cell | _Nested


@dataclass(frozen=True)
class _Grid:
    """All rows of a file.

    Attributes:
        header: Names of the columns, stripped, without units.
        rows: Number of each row, and its cells.
        sha256: Of the file.
        noun: What the rows' numbers count: "line" or "row".
        units: Units that stand in the header, by name.
        index: Places in `rows` by the cells of the key columns.
        names: Of all columns of the file, where `header` has only those that matter.
    """

    header: tuple[str, ...]
    rows: Sequence[tuple[int, Sequence[_Raw]]]
    sha256: str
    noun: str
    units: Mapping[str, str] = field(default_factory=dict)
    index: Mapping[tuple[str, ...], Sequence[int]] = field(default_factory=dict)
    names: tuple[str, ...] = ()


def read_row(
    path: Path, rules: FileRules, wanted: frozenset[str], where: str, whose: Whose, *, shared: bool
) -> Row | None:
    """Return the row of one record.

    Args:
        path: The file.
        rules: How it is written.
        wanted: Headers that matter, as `text.comparable` has them; others are left alone.
        where: Who this is, and which file, for messages.
        whose: Which record, where the file holds rows of several.
        shared: Whether the file is that of the whole cohort.

    Returns:
        None if a shared file has no row for the record.

    Raises:
        PatientDataError: If the file cannot be read, or holds not one row of the record.
    """
    keys = _keys(rules, whose)
    if not keys:
        return _only_row(_grid(path, rules, wanted, where), wanted, where)
    wanted |= frozenset(keys)
    try:
        stat = path.stat()
    except OSError as error:
        raise unreadable(where, error) from error
    grid = _indexed(path, (stat.st_mtime_ns, stat.st_size), rules, wanted, tuple(keys))
    if not isinstance(grid, _Grid):
        raise PatientDataError(*grid)
    one = len(grid.rows) == 1 and not shared
    if one and (
        any(column not in grid.header for column in keys)
        or (whose.patient_id is None and not rules.record_column)
    ):
        return _only_row(grid, wanted, where)
    absent = [column for column in keys if column not in grid.header]
    if absent:
        raise PatientDataError(
            Problem(
                path.name,
                "the column that tells whose a row is, is not there",
                expected=f"a column {', '.join(absent)}",
                remedy="Add it, or correct record_column and patient_column in cohort.yaml",
            )
        )
    found = grid.index.get(tuple(keys.values()), ())
    if not found and shared:
        return None
    if len(found) != 1:
        raise PatientDataError(
            Problem(
                where,
                f"the table has {len(found)} rows of this record"
                if found
                else "the table has rows of other records only",
                expected=f"one row with its {' and '.join(keys)}",
                got=" and ".join(f"{grid.noun} {grid.rows[i][0]}" for i in found[:5]),
                remedy="Keep the right one"
                if found
                else "Check whose table this is: it may be another patient's",
            )
        )
    return _row(grid, found[0], wanted, where, whole=one)


def _keys(rules: FileRules, whose: Whose) -> dict[str, str]:
    """Return what the key columns hold in the row of a record, by their headers."""
    keys = {}
    if rules.record_column:
        keys[comparable(rules.record_column)] = comparable(whose.record_id)
    if rules.patient_column:
        keys[comparable(rules.patient_column)] = comparable(whose.patient_id or whose.record_id)
    return keys


def ids_of_nobody(path: Path, rules: FileRules, records: Iterable[Whose]) -> list[str]:
    """Return ids in the key columns of a shared table that are no record's, in file order.

    A table that cannot be read has none: readers of its rows say what is wrong with it.

    Args:
        path: The table.
        rules: How it is written.
        records: All that there are.
    """
    known = [_keys(rules, whose) for whose in records]
    headers = tuple(known[0]) if known else ()
    try:
        stat = path.stat()
    except OSError:
        return []
    stamp = (stat.st_mtime_ns, stat.st_size)
    grid = _indexed(path, stamp, rules, frozenset(headers), headers) if headers else ()
    if not isinstance(grid, _Grid):
        return []
    own = {tuple(keys.values()) for keys in known}
    return [" ".join(key) for key in grid.index if key not in own]


@lru_cache(maxsize=8)
def _indexed(
    path: Path,
    stamp: tuple[int, int],
    rules: FileRules,
    wanted: frozenset[str],
    keys: tuple[str, ...],
) -> _Grid | tuple[Problem, ...]:
    """Return a file's rows with an index, or what is wrong; remembered while the file is as it was.

    Args:
        path: The file.
        stamp: Time of its last change, and size.
        rules: How it is written.
        wanted: Headers that matter.
        keys: Columns of the index.
    """
    try:
        grid = _grid(path, rules, wanted, path.name)
    except PatientDataError as error:
        return error.problems
    if any(grid.header.count(key) != 1 for key in keys):
        return grid
    places = [grid.header.index(key) for key in keys]
    index: dict[tuple[str, ...], list[int]] = {}
    for number, (line, cells) in enumerate(grid.rows):
        if len(cells) <= max(places):
            return (_uneven(f"{path.name}, {grid.noun} {line}", len(grid.header), len(cells)),)
        key = tuple(comparable(_as_cell(cells[place]).text) for place in places)
        if not all(key):
            return (
                Problem(
                    f"{path.name}, {grid.noun} {line}",
                    "the row does not say whose it is",
                    expected=f"a value under {', '.join(keys)}",
                    remedy="Fill it in, or take the row out",
                ),
            )
        index.setdefault(key, []).append(number)
    return replace(grid, index=index)


def _uneven(where: str, expected: int, got: int) -> Problem:
    return Problem(
        where,
        "the row does not have one cell per header",
        expected=f"{expected} cells",
        got=f"{got} cells",
        remedy="Quote cells that contain the separator",
    )


def _as_cell(value: _Raw) -> Cell:
    if isinstance(value, Cell):
        return value
    if isinstance(value, _Nested):
        return Cell("(nested)")
    if not isinstance(value, _Number):
        return Cell(value)
    # Tables pass through programs that make 1 into 1.0; as a category both are the same code.
    whole = re.fullmatch(r"([+-]?\d+)\.0+", value)
    return Cell(str(value), typed=True, also=(whole[1],) if whole else ())


def _only_row(grid: _Grid, wanted: frozenset[str], where: str) -> Row:
    """Return the row of a file that holds no other.

    Raises:
        PatientDataError: If it holds none, or several.
    """
    if len(grid.rows) != 1:
        many = len(grid.rows) > 1
        raise PatientDataError(
            Problem(
                where,
                "the table does not have one row",
                expected="a header line and one row of values"
                if grid.noun == "line"
                else "one row of values",
                got=f"{len(grid.rows)} rows of values" if grid.header else "an empty file",
                remedy="Keep the row of this visit, or say in cohort.yaml which column tells whose"
                " a row is (record_column, patient_column)"
                if many
                else "Write the row, or remove the file",
            )
        )
    return _row(grid, 0, wanted, where, whole=True)


def _row(grid: _Grid, number: int, wanted: frozenset[str], where: str, *, whole: bool) -> Row:
    """Return one row of a grid.

    Raises:
        PatientDataError: If it does not fit the header, or a cell is none.
    """
    line, values = grid.rows[number]
    place = where if grid.noun == "row" and whole else f"{where}, {grid.noun} {line}"
    if len(values) != len(grid.header):
        raise PatientDataError(_uneven(place, len(grid.header), len(values)))
    cells: dict[str, Cell] = {}
    problems = []
    for name, value in zip(grid.header, values, strict=True):
        if isinstance(value, _Nested):
            if name in wanted:
                problems.append(
                    Problem(
                        f"{place}, column {name}",
                        "the cell holds a list or an object",
                        expected='a value, or {"value": …, "unit": …}',
                        remedy="Write one value, and what else there is in columns of their own",
                    )
                )
            continue
        cells[name] = _as_cell(value)
    if problems:
        raise PatientDataError(*problems)
    for name in wanted & cells.keys():
        stated = {grid.units.get(name, ""), cells[name].unit}
        beside = f"{name}_unit"
        if beside in cells and beside not in wanted:
            stated.add(cells[beside].text)
        stated.discard("")
        if len(stated) > 1 and cells[name].text:
            problems.append(
                Problem(
                    f"{place}, column {name}",
                    "the file states two units for one number",
                    expected="one unit, in the header or beside the number",
                    remedy="Find out which is right and remove the other",
                )
            )
        cells[name] = replace(cells[name], unit=min(stated, default=""))
    if problems:
        raise PatientDataError(*problems)
    digest = grid.sha256
    if not whole:
        digest = sha256(
            repr([(n, str(_as_cell(v))) for n, v in zip(grid.header, values, strict=True)]).encode()
        ).hexdigest()
    return Row(cells, place, digest, names=grid.names or grid.header)


def unreadable(where: str, error: Exception) -> PatientDataError:
    """Return the error of a file that the system does not open."""
    return PatientDataError(
        Problem(
            where,
            "the file cannot be opened",
            got=type(error).__name__,
            remedy="Check that it is a file and its permissions",
        )
    )


def content(path: Path, where: str) -> bytes:
    """Return a file's bytes.

    Raises:
        PatientDataError: If it is no plain file, cannot be read, or is larger than any table.
    """
    try:
        if not path.is_file():
            raise PatientDataError(
                Problem(
                    where,
                    "is not a plain file",
                    expected="a file",
                    remedy="Put the table's file in its place",
                )
            )
        size = path.stat().st_size
        if size > limits.MAX_TABLE_BYTES:
            raise PatientDataError(
                limits.too_large(where, "the file", size, limits.MAX_TABLE_BYTES, _KEEP)
            )
        return path.read_bytes()
    except OSError as error:
        raise unreadable(where, error) from error


def decode(data: bytes, encoding: str, where: str) -> str:
    """Return a text file's text.

    Args:
        data: Its bytes. A byte-order mark says UTF-8 or UTF-16 and is believed.
        encoding: What the cohort declares for files without one; empty = UTF-8.
        where: Which file, for the message.

    Raises:
        PatientDataError: If the bytes are no such text; the line is named.
    """
    marked = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    declared = encoding or "utf-8"
    if marked is not None and encoding and not marked.startswith(encoding):
        raise PatientDataError(
            Problem(
                where,
                "the byte-order mark says another encoding than the cohort",
                expected=encoding,
                got=marked.removesuffix("-sig"),
                remedy="Take encoding out of cohort.yaml; a marked file needs none",
            )
        )
    if encoding == "utf-16" and marked is None:
        raise PatientDataError(
            Problem(
                where,
                "UTF-16 needs a byte-order mark",
                expected="text in UTF-8, or UTF-16 with its mark",
                remedy="Save the table as UTF-8",
            )
        )
    try:
        text = data.decode(marked or declared)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1 if marked != "utf-16" else 1
        raise PatientDataError(
            Problem(
                f"{where}, line {line}",
                f"the file cannot be read as text in {(marked or declared).removesuffix('-sig')}",
                expected="one encoding from the first line to the last",
                remedy="Save the table as UTF-8, or name its encoding in cohort.yaml"
                " (encoding: windows-1252); if only some lines differ, mend those",
            )
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise PatientDataError(
            Problem(
                f"{where}, line {line}",
                "the file holds NUL bytes, which no text does",
                expected="text",
                remedy="Copy it again, or save it as UTF-8 (UTF-16 needs a byte-order mark)",
            )
        )
    if marked is None and not declared.startswith("utf") and not data.isascii():
        for number, part in enumerate(data.split(b"\n"), start=1):
            if not part.isascii() and _is_utf8(part):
                raise PatientDataError(
                    Problem(
                        f"{where}, line {number}",
                        f"the line is in UTF-8, though the cohort declares {declared}",
                        expected="one encoding from the first line to the last",
                        remedy="Save the table in one encoding, UTF-8 for choice",
                    )
                )
    return text


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _grid(path: Path, rules: FileRules, wanted: frozenset[str], where: str) -> _Grid:
    """Return all rows of a file."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path, wanted, where)
    data = content(path, where)
    text, digest = decode(data, rules.encoding, where), sha256(data).hexdigest()
    if kind == ".json":
        return _json(text, digest, wanted, where)
    separator = rules.separator or ("\t" if kind == ".tsv" else "")
    return _csv(text, digest, separator, wanted, where)


def _repeated(names: Sequence[str], where: str) -> list[Problem]:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    return [
        Problem(
            f"{where}, column {name}",
            "the header occurs twice",
            expected="each header once",
            remedy="Keep one of the two, or rename the other",
        )
        for name in twice
    ]


def _named(raw: Sequence[str], wanted: frozenset[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return headers without the units that stand beside wanted names, and these units."""
    names, units = [], {}
    for text in map(comparable, raw):
        found = _WITH_UNIT.fullmatch(text.translate(_BRACKETS))
        if text not in wanted and found is not None and found[1] in wanted:
            units[found[1]] = (found[2] or found[3] or "").strip()
            text = found[1]
        names.append(text)
    return tuple(names), units


# -- text ------------------------------------------------------------------------------------------


def _lines(text: str, separator: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """Return the lines of a CSV file that hold something, with their numbers.

    Lines of empty cells, which spreadsheets add, hold nothing, and cells behind the header's last
    one are left out where they are empty.

    Raises:
        PatientDataError: If its quotes do not match, or a cell is longer than 131072 characters.
    """
    lines = (found[0] for found in _LINE.finditer(text))
    skipped = 0
    if stated_separator(text):
        next(lines, "")
        skipped = 1
    reader = csv.reader(lines, strict=True, delimiter=separator)
    width = 0
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if not any(stripped):
                continue
            width = width or len(stripped)
            while len(stripped) > width and not stripped[-1]:
                del stripped[-1]
            yield reader.line_num + skipped, stripped
    except csv.Error as error:
        raise PatientDataError(
            Problem(
                f"{where}, line {reader.line_num + skipped}",
                "the file is not valid CSV",
                expected="cells of which those with a quote or a line break are quoted",
                remedy="Check the quotes",
            )
        ) from error


def stated_separator(text: str) -> str:
    """Return what the first line says to be between cells (`sep=;`); empty if it says nothing."""
    end = min((k for k in (text.find("\r"), text.find("\n")) if k >= 0), default=len(text))
    found = _STATED.fullmatch(text[: min(end, 8)].strip(" "))
    return found[1] if found is not None and end <= 8 else ""


def _separator(text: str, declared: str, wanted: frozenset[str], where: str) -> str:
    """Return what separates cells: what is declared, or stated, or makes a header of the columns.

    Raises:
        PatientDataError: If that is not clear.
    """
    stated = stated_separator(text)
    if stated and declared and stated != declared:
        raise PatientDataError(
            Problem(
                f"{where}, line 1",
                "the file says another separator than the cohort",
                expected=SEPARATORS[declared],
                got=SEPARATORS.get(stated, "another sign"),
                remedy="Take separator out of cohort.yaml; a file with a line sep= needs none",
            )
        )
    if stated or declared:
        return stated or declared
    headers = {}
    first_error: PatientDataError | None = None
    for sign in SEPARATORS:
        try:
            headers[sign] = next(_lines(text, sign, where), (1, []))[1]
        except PatientDataError as error:
            first_error = first_error or error
    if not headers and first_error is not None:
        raise first_error
    counts = {
        sign: len(wanted.intersection(_named(header, wanted)[0]))
        for sign, header in headers.items()
    }
    best = [sign for sign in headers if counts[sign] == max(counts.values())]
    if max(counts.values()) == 0:
        return ","  # whoever reads the row says that no declared column is in it
    if len({tuple(headers[sign]) for sign in best}) > 1:
        raise PatientDataError(
            Problem(
                f"{where}, line 1",
                "it is not clear what separates the cells",
                expected="one separator throughout",
                got=" or ".join(SEPARATORS[sign] for sign in best),
                remedy="Declare it in cohort.yaml, for example separator: ';'",
            )
        )
    return best[0]


def _csv(text: str, digest: str, separator: str, wanted: frozenset[str], where: str) -> _Grid:
    """Return the rows of comma-separated values (or other separators).

    Raises:
        PatientDataError: If it is none.
    """
    sign = _separator(text, separator, wanted, where)
    _refuse_many(text.count(sign) + text.count("\n") + text.count("\r"), where)
    lines = _lines(text, sign, where)
    first, raw = next(lines, (1, []))
    header, units = _named(raw, wanted)
    problems = _repeated(header, f"{where}, line {first}") if len(header) <= MOST_HEADERS else []
    if len(header) > MOST_HEADERS:
        problems = [
            Problem(
                f"{where}, line {first}",
                "the table has too many columns",
                expected=f"at most {MOST_HEADERS}",
                got=str(len(header)),
                remedy="Keep the columns that are needed",
            )
        ]
    if problems:
        raise PatientDataError(*problems)
    rows = []
    for line, cells in lines:
        rows.append((line, tuple(cells)))
        if len(rows) > MOST_ROWS:
            raise PatientDataError(_too_many(where))
    if not rows and header and _has_blank_row(text, sign, where):
        rows = [(first + 1, ("",) * len(header))]
    return _Grid(header, rows, digest, "line", units)


def _has_blank_row(text: str, separator: str, where: str) -> bool:
    """Return whether a file of one line has others of separators alone: a row without values."""
    return any(
        line.strip().strip('"' + separator) == "" for line in text.split("\n")[1:] if line.strip()
    )


def _refuse_many(cells: int, where: str) -> None:
    """Refuse a table of more cells than are read.

    Raises:
        PatientDataError: If it has.
    """
    if cells > limits.MAX_CELLS:
        raise PatientDataError(
            Problem(
                where,
                "the table has too many cells",
                expected=f"at most {limits.MAX_CELLS:,}",
                remedy=_KEEP,
            )
        )


def _too_many(where: str) -> Problem:
    return Problem(
        where,
        "the table has too many rows",
        expected=f"at most {MOST_ROWS}",
        remedy="Keep the rows of this cohort",
    )


# -- JSON ------------------------------------------------------------------------------------------


def load_json(text: str, where: str) -> Any:
    """Return what a JSON file holds; numbers stay text, to be parsed by the columns' own rules.

    Raises:
        PatientDataError: If it is not JSON, or an object has a name twice.
    """
    if sum(map(text.count, ",[{")) > limits.MAX_JSON_PARTS:
        raise PatientDataError(
            Problem(
                where,
                "the file holds too many values",
                expected=f"at most {limits.MAX_JSON_PARTS:,}",
                remedy="Keep what is needed, or divide it between the patients",
            )
        )
    repeated: list[str] = []
    names = _Names()

    def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = {names[name]: value for name, value in pairs}
        if len(made) < len(pairs):
            own = [names[name] for name, _ in pairs]
            repeated.extend(name for name in made if own.count(name) > 1)
        return made

    try:
        data = json.loads(
            text,
            object_pairs_hook=as_object,
            parse_int=_Number,
            parse_float=_Number,
            parse_constant=_Number,
        )
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise PatientDataError(
            Problem(
                f"{where}{line}",
                "the file is not valid JSON",
                expected="an object of column: value, or a list of them",
                remedy="Check commas and quotes",
            )
        ) from error
    if repeated:
        raise PatientDataError(
            *(
                Problem(
                    f"{where}, column {n}",
                    "the name occurs twice",
                    expected="each name once",
                    remedy="Keep one of them",
                )
                for n in sorted(set(repeated))
            )
        )
    return data


def scalar(value: Any) -> _Raw:
    """Return a JSON value as a cell: `{"value": 5, "unit": "mmol/L"}` is one with its unit."""
    if isinstance(value, dict) and "value" in value and set(value) <= {"value", "unit"}:
        inner, unit = scalar(value["value"]), scalar(value.get("unit"))
        if isinstance(inner, str) and type(unit) is str:
            return replace(_as_cell(inner), unit=unit)
        return _Nested()
    if isinstance(value, dict | list):
        return _Nested()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, _Number):
        return value
    return "" if value is None else str(value).strip()


def _json(text: str, digest: str, wanted: frozenset[str], where: str) -> _Grid:
    """Return the objects of a JSON file, one or a list of them.

    Raises:
        PatientDataError: If it holds something else.
    """
    data = load_json(text, where)
    records = data if isinstance(data, list) else [data]
    if not all(isinstance(record, dict) for record in records):
        raise PatientDataError(
            Problem(
                where,
                "the table does not have one row",
                expected="one object of column: value, or a list of such objects",
                remedy="Keep the row of this visit",
            )
        )
    if len(records) > MOST_ROWS:
        raise PatientDataError(_too_many(where))
    raw = tuple(dict.fromkeys(name for record in records for name in record))
    _refuse_many(len(records) * len(raw), where)  # every record gets a cell of every name
    header, units = _named(raw, wanted)
    problems = _repeated(header, where) if len(header) > len(set(header)) else []
    if problems:
        raise PatientDataError(*problems)
    rows: list[tuple[int, tuple[_Raw, ...]]] = [
        (number, tuple(scalar(record.get(name)) for name in raw))
        for number, record in enumerate(records, start=1)
    ]
    return _Grid(header, _filled(rows), digest, "row", units)


def _filled(rows: list[tuple[int, tuple[_Raw, ...]]]) -> list[tuple[int, tuple[_Raw, ...]]]:
    """Return rows without those of empty cells, but for one if there is no other."""
    kept = [row for row in rows if any(cell != "" for cell in row[1])]
    return kept or rows[:1]


# -- Parquet ---------------------------------------------------------------------------------------


def _parquet(path: Path, wanted: frozenset[str], where: str) -> _Grid:
    """Return the rows of a Parquet file: its plain columns, nothing evaluated.

    Raises:
        PatientDataError: If it is damaged, too large, or a wanted column holds more than numbers,
            text, dates and booleans.
    """
    import pyarrow as pa
    from pyarrow import parquet

    data = content(path, where)
    broken = Problem(
        where,
        "the file is not valid Parquet",
        expected="a Parquet file",
        remedy="Write it again, or save the table as CSV in UTF-8",
    )
    try:
        file = parquet.ParquetFile(
            pa.BufferReader(data),
            thrift_string_size_limit=limits.MAX_TABLE_BYTES,
            thrift_container_size_limit=10 * MOST_HEADERS,
        )
        schema, metadata = file.schema_arrow, file.metadata
        raw = [str(name) for name in schema.names]
        if metadata.num_rows > MOST_ROWS:
            raise PatientDataError(_too_many(where))
        header, units = _named([name.strip() for name in raw], wanted)
        problems = _repeated(header, where)
        keep = [
            i
            for i, name in enumerate(header)
            if name in wanted or (name.endswith("_unit") and name[:-5] in wanted)
        ]
        problems += [
            Problem(
                f"{where}, column {header[i]}",
                "the column holds something else than numbers, text, dates or booleans",
                got=str(schema.types[i]).split("<")[0].split("(")[0],
                remedy="Write it as plain values",
            )
            for i in keep
            if not _plain(pa, schema.types[i])
        ]
        _refuse_many(metadata.num_rows * len(keep), where)
        size = sum(metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups))
        if size > limits.MAX_UNPACKED_BYTES:
            problems.append(
                limits.too_large(
                    where, "the unpacked table", size, limits.MAX_UNPACKED_BYTES, _KEEP
                )
            )
        if problems:
            raise PatientDataError(*problems)
        table = parquet.ParquetFile(
            pa.BufferReader(data),
            thrift_string_size_limit=limits.MAX_TABLE_BYTES,
            thrift_container_size_limit=10 * MOST_HEADERS,
            read_dictionary=[raw[i] for i in keep if _is_text(pa, schema.types[i])],
        ).read(columns=[raw[i] for i in keep], use_threads=False)
        _refuse_long(table, where)
        if table.num_columns != len(keep) or table.num_rows != metadata.num_rows:
            raise PatientDataError(broken)
        columns = [[_plain_text(v) for v in column.to_pylist()] for column in table.columns]
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise PatientDataError(broken) from error
    rows: list[tuple[int, tuple[_Raw, ...]]] = (
        list(enumerate(zip(*columns, strict=True), start=1))
        if columns
        else [(number, ()) for number in range(1, metadata.num_rows + 1)]
    )
    if len(keep) == len(header):
        rows = _filled(rows)
    digest = sha256(data).hexdigest()
    return _Grid(tuple(header[i] for i in keep), rows, digest, "row", units, names=header)


def _is_text(pa: Any, kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _refuse_long(table: Any, where: str) -> None:
    """Refuse texts that are too long, or too many once they are written out.

    Few bytes of a file may stand for one text in a million rows; it is read as a dictionary, so
    that each text lies in memory once until it is known how much they come to.

    Raises:
        PatientDataError: If they are.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    total = 0
    for column in table.columns:
        for chunk in column.chunks if pa.types.is_dictionary(column.type) else ():
            if not _is_text(pa, chunk.dictionary.type):
                continue
            lengths = pc.binary_length(chunk.dictionary)
            longest = pc.max(lengths).as_py() or 0
            total += pc.sum(pc.take(lengths, chunk.indices)).as_py() or 0
            if longest > limits.MAX_CELL_CHARACTERS or total > limits.MAX_UNPACKED_BYTES // 4:
                size, most = longest, limits.MAX_CELL_CHARACTERS
                if longest <= most:
                    size, most = total, limits.MAX_UNPACKED_BYTES // 4
                raise PatientDataError(
                    limits.too_large(where, "the text in the table", size, most, _KEEP)
                )


def _plain(pa: Any, kind: Any) -> bool:
    """Return whether a column's type is one that a cell may have."""
    types = pa.types
    if types.is_dictionary(kind):
        return _plain(pa, kind.value_type)
    return any(
        check(kind)
        for check in (
            types.is_integer,
            types.is_floating,
            types.is_decimal,
            types.is_boolean,
            types.is_string,
            types.is_large_string,
            types.is_date,
            types.is_timestamp,
            types.is_null,
        )
    )


def _plain_text(value: Any) -> _Raw:
    """Return a Parquet value as a cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, date):  # a datetime is one too
        return Cell(value.isoformat(), iso=True)
    return _Number(value)
