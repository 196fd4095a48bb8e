"""A first `cohort.yaml` from a folder of patients: what is there, and what a person must confirm.

Nothing is trained or judged. Types and ranges are guesses from what files hold; units are never
guessed. Columns that look like identifiers, dates and free text are left out and named.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dymo_med.data import bids
from dymo_med.errors import ConfigError, Problem
from dymo_med.modalities.dicom import stacks
from dymo_med.modalities.image import PICTURES, VOLUMES
from dymo_med.modalities.scan import ScanError
from dymo_med.modalities.table_files import EXTENSIONS

_KINDS = (*VOLUMES, *PICTURES, *EXTENSIONS)
_ID = re.compile(
    r"(^|[_\W])(id|ids|mrn|name|surname|forename|initials|birth\w*|dob|address|street|city|zip|"
    r"postal\w*|phone|tel|fax|e?mail|ssn|nhs|insurance|accession\w*|uid|visit|physician|doctor)($|[_\W])"
)
_BLANK = ("", "na", "n/a", "nan", "null", "none", ".", "-", "?", "unknown")
_UNIT = re.compile(r"(.+?)\s*[\[(]([^\[\]()]+)[\])]$")
_DATE = re.compile(r"\d{4}-\d\d-\d\d.*|\d\d?[./]\d\d?[./]\d{2,4}")
_NUMBER = re.compile(r"[<>]?=?\s*-?\d+([.,]\d+)?([eE]-?\d+)?")
_MOST_PATIENTS, _MOST_SCANS, _MOST_CATEGORIES = 500, 12, 12
# Voxels along the longest side of the grid that is proposed.
_SIDE = 64


@dataclass
class Found:
    """What a folder holds.

    Attributes:
        text: A `cohort.yaml`.
        modalities: Names, with how many of the records have a file.
        records: How many patient directories.
        left_out: Columns that are not in it, with the reason.
        confirm: What a person must look at.
    """

    text: str = ""
    modalities: dict[str, int] = field(default_factory=dict)
    records: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    confirm: list[str] = field(default_factory=list)


def describe(folder: Path) -> Found:
    """Return a first description of a folder of patients.

    Args:
        folder: Has patient directories, or a folder `patients` that has; or is a BIDS dataset.

    Raises:
        ConfigError: If there are no patient directories, or nothing in them is known.
    """
    is_bids = (folder / bids.DESCRIPTION).is_file()
    inside = folder / "patients" if (folder / "patients").is_dir() and not is_bids else folder
    places = [p for p in _visible(inside) if p.is_dir()]
    if is_bids:
        subjects = [p for p in places if bids.SUBJECT.fullmatch(p.name)]
        places = [place for subject in subjects for place in bids.sessions(subject)]
    if not places:
        raise ConfigError(
            Problem(
                str(folder),
                "there are no patient directories",
                expected="a folder per patient, here or in a folder called patients",
                remedy="Make one folder per visit, with its scans and tables",
            )
        )
    found = Found(records=len(places))
    groups = _groups(places, is_bids)
    entries: dict[str, list[str]] = {}
    grid = _grid(groups)
    for key, files in sorted(groups.items()):
        suffix = _suffix(files[0])
        name = _name(key, entries)
        if suffix in EXTENSIONS:
            lines = _table(name, key + suffix, files, found)
        elif suffix in PICTURES:
            lines = _picture(key, suffix, files, found, name)
        else:
            lines = _volume(key, suffix, grid, is_bids)
        if lines:
            entries[name] = lines
            found.modalities[name] = len({_owner(file, places) for file in files})
    target, task = _task(folder, found)
    if is_bids and (folder / bids.PARTICIPANTS).is_file():
        table = _read(folder / bids.PARTICIPANTS)
        lines = [] if table is None else _columns("participants", table, found, (target,))
        if lines:
            entries["participants"] = ["    kind: table", "    shared: participants.tsv", *lines]
            found.modalities["participants"] = len(places)
    for file in sorted(p for p in _visible(folder) if p.suffix in (".csv", ".tsv", ".parquet")):
        if file.name not in ("labels.csv", "splits.csv") and file.name != bids.PARTICIPANTS:
            lines = _shared(file, places, found)
            if lines:
                name = _name(file.stem, entries)
                entries[name] = lines
                found.modalities[name] = len(places)
    if not entries:
        raise ConfigError(
            Problem(
                str(folder),
                "no scan and no table was found in the patient directories",
                expected=f"files that end in {', '.join(_KINDS)}, or folders of DICOM",
                got=f"{len(places)} folders",
                remedy="Check that these are the patients' folders",
            )
        )
    head = [
        "# A first description, made by `dymo-med describe`. Look at every line that says CONFIRM,",
        "# then run `dymo-med check` on the folder.",
        f"name: {_name(folder.resolve().name, {})}",
        *task,
    ]
    if is_bids:
        head.append("layout: bids")
    elif inside == folder:
        head.append('patients: "."')
    blanks = sorted({b for b in _blanks(groups) if b})
    if blanks:
        head.append(f"missing_values: {json.dumps(blanks)}  # CONFIRM: words that mean blank")
    body = [line for name, lines in entries.items() for line in (f"  {name}:", *lines)]
    found.text = "\n".join([*head, "modalities:", *body, ""])
    return found


# -- files -----------------------------------------------------------------------------------------


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def _suffix(path: Path) -> str:
    """Return a file's known extension; of a folder of DICOM and of its files `.dcm`."""
    if path.is_dir():
        return ".dcm"
    return next((s for s in (*_KINDS, ".dcm") if path.name.lower().endswith(s)), "")


def _groups(places: Sequence[Path], is_bids: bool) -> dict[str, list[Path]]:
    """Return files that are the same of different patients, by name without extension."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for place in places[:_MOST_PATIENTS]:
        todo = _visible(place)
        for path in todo:
            if path.is_dir() and not _is_series(path):
                todo += [p for p in _visible(path) if p.parent.parent == place]
                continue
            if not _suffix(path) or (path.name.endswith(".json") and _has_twin(path)):
                continue
            stem = path.relative_to(place).as_posix()
            stem = stem[: len(stem) - len(_suffix(path))] if path.is_file() else stem
            if is_bids:
                stem = re.sub(r"(sub|ses|run)-[A-Za-z0-9]+_", "", stem)
            elif len(place.name) > 1:
                stem = stem.replace(place.name, "{record}")
            groups[stem].append(path)
    return groups


def _has_twin(path: Path) -> bool:
    """Return whether a JSON file is the sidecar of a scan."""
    return any(path.with_name(path.stem + s).exists() for s in VOLUMES)


def _is_series(folder: Path) -> bool:
    """Return whether a folder holds DICOM files."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            with path.open("rb") as stream:
                return stream.read(132)[128:] == b"DICM"
    return False


def _owner(file: Path, places: Sequence[Path]) -> Path:
    return next(p for p in (file, *file.parents) if p in set(places))


def _name(text: str, taken: Mapping[str, Any]) -> str:
    """Return a modality's name: small letters, digits and underscores, and not there already."""
    plain = text.replace("{record}", "").rpartition("/")[2].lower()
    name = re.sub(r"[^a-z0-9]+", "_", plain).strip("_") or "data"
    name = name if name[0].isalpha() else f"m_{name}"
    number = 2
    while name in taken:
        name = f"{re.sub(r'_[0-9]+$', '', name)}_{number}"
        number += 1
    return name


# -- scans -----------------------------------------------------------------------------------------


def _grid(groups: Mapping[str, Sequence[Path]]) -> tuple[list[int], float]:
    """Return size and spacing of one grid that holds what volumes usually show."""
    extents = []
    for files in groups.values():
        if _suffix(files[0]) in (*VOLUMES, ".dcm"):
            extents += [e for e in map(_extent, files[:_MOST_SCANS]) if e is not None]
    if not extents:
        return [_SIDE] * 3, 4.0
    usual = [sorted(sides)[len(sides) // 2] for sides in zip(*extents, strict=True)]
    spacing = max(1.0, math.ceil(2 * max(usual) / _SIDE) / 2)
    return [min(512, max(8, 8 * math.ceil(side / spacing / 8))) for side in usual], spacing


def _extent(path: Path) -> tuple[float, float, float] | None:
    """Return the field of view of a volume along the body's axes, in mm; None if it has none."""
    import nibabel
    import SimpleITK

    try:
        if path.is_dir() or path.suffix == ".dcm":
            stack, affine = stacks(path)[0]
            size: Sequence[int] = (stack[0].columns, stack[0].rows, len(stack))
        elif path.name.endswith((".nii", ".nii.gz")):
            image = nibabel.load(path)
            affine, size = image.affine, image.shape[:3]
        else:
            reader = SimpleITK.ImageFileReader()
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
            size, step = reader.GetSize(), reader.GetSpacing()
            return (size[0] * step[0], size[1] * step[1], size[2] * step[2])
    except (
        ScanError,
        OSError,
        RuntimeError,
        ValueError,
        IndexError,
        nibabel.filebasedimages.ImageFileError,
    ):
        return None
    if len(size) != 3:
        return None
    sides = abs(affine[:3, :3]) @ list(size)
    return float(sides[0]), float(sides[1]), float(sides[2])


def _volume(key: str, suffix: str, grid: tuple[list[int], float], is_bids: bool) -> list[str]:
    size, spacing = grid
    lines = ["    kind: image", "    dims: 3"]
    if is_bids:
        datatype, _, name = key.rpartition("/")
        *entities, last = name.split("_")
        lines += [f"    suffix: {last}", f"    datatype: {datatype or 'anat'}"]
        if entities:
            pairs = ", ".join(
                f"{k}: {json.dumps(v)}" for k, _, v in (e.partition("-") for e in entities)
            )
            lines.append(f"    entities: {{{pairs}}}")
    else:
        lines.append(f"    file: {json.dumps(key + (suffix if suffix != '.dcm' else ''))}")
    lines.append(f"    size: {size}  # CONFIRM: times spacing_mm it should cover the organ")
    lines.append(f"    spacing_mm: {[spacing] * 3}")
    return lines


def _picture(key: str, suffix: str, files: Sequence[Path], found: Found, name: str) -> list[str]:
    from PIL import Image

    colours = False
    for file in files[:_MOST_SCANS]:
        try:
            with Image.open(file) as picture:
                colours |= picture.mode in ("RGB", "RGBA", "P")
        except (OSError, ValueError):
            found.confirm.append(f"{name}: a picture cannot be opened")
            break
    lines = ["    kind: image", "    dims: 2", f"    file: {json.dumps(key + suffix)}"]
    lines += [f"    size: [{_SIDE}, {_SIDE}]  # CONFIRM", "    intensity: percentile"]
    return [*lines, "    channels: 3"] if colours else lines


# -- tables ----------------------------------------------------------------------------------------


def _read(path: Path) -> pd.DataFrame | None:
    """Return a table as text; None if it is none."""
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path).astype("string")
        if path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or "resourceType" in data:
                return None
            return pd.DataFrame(
                [{k: str(v) for k, v in data.items() if not isinstance(v, dict | list)}]
            )
        text = path.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        sign = max("\t;,", key=first.count)
        return pd.read_csv(path, sep=sign, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError, pd.errors.ParserError):
        return None


def _blanks(groups: Mapping[str, Sequence[Path]]) -> set[str]:
    """Return words in tables that usually mean "blank"."""
    words: set[str] = set()
    for files in groups.values():
        if _suffix(files[0]) in (".csv", ".tsv"):
            for file in files:
                table = _read(file)
                if table is not None:
                    cells = {str(c).strip() for c in table.to_numpy().ravel()}
                    words |= {c for c in cells if c.lower() in _BLANK}
    return words


def _table(name: str, file: str, files: Sequence[Path], found: Found) -> list[str]:
    tables = [table for table in map(_read, files) if table is not None]
    if len(tables) < len(files):
        found.confirm.append(
            f"{name}: {len(files) - len(tables)} of its files are no plain table; a FHIR record"
            " needs format: fhir"
        )
    if not tables:
        return []
    if any(len(table) > 1 for table in tables):
        found.confirm.append(f"{name}: some files have several rows; say whose they are")
    lines = _columns(name, pd.concat(tables, ignore_index=True), found, ())
    return ["    kind: table", f"    file: {json.dumps(file)}", *lines] if lines else []


def _shared(file: Path, places: Sequence[Path], found: Found) -> list[str]:
    """Return the entry of a table with a row per record, if it is one."""
    table = _read(file)
    if table is None:
        return []
    ids = {bids.ids(place)[0] for place in places} | {place.name for place in places}
    own = [c for c in table.columns if len(ids & set(table[c].str.strip())) > len(places) / 2]
    if not own:
        found.confirm.append(f"{file.name}: no column names the patients' folders; it was left out")
        return []
    lines = _columns(file.stem, table, found, (own[0],))
    head = ["    kind: table", f"    shared: {json.dumps(file.name)}"]
    return [*head, f"    record_column: {json.dumps(str(own[0]))}", *lines] if lines else []


def _columns(name: str, table: pd.DataFrame, found: Found, keys: Sequence[str]) -> list[str]:
    """Return the lines of a table's columns."""
    lines = []
    for header in table.columns:
        if header in keys:
            continue
        cells = [str(c).strip() for c in table[header].dropna()]
        cells = [c for c in cells if c.lower() not in _BLANK]
        what, why = _type(str(header), cells)
        if why:
            found.left_out[f"{name}.{header}"] = why
            continue
        plain = str(header).strip()
        unit = ""
        bracket = _UNIT.fullmatch(plain)
        if bracket:
            plain, unit = bracket[1], bracket[2]
        entry = what
        if "continuous" in what:
            unit = unit or ("years" if plain.lower() in ("age", "age_years") else "")
            if not unit:
                found.confirm.append(f"{name}.{plain}: unit")
            entry = f"{{type: continuous, unit: {json.dumps(unit)}, {what.split(', ', 1)[1]}"
            entry += "" if unit else ", unit"
        lines.append(f"      {json.dumps(plain)}: {entry}")
    return ["    columns:", *lines] if lines else []


def _type(header: str, cells: Sequence[str]) -> tuple[str, str]:
    """Return a column's entry, or why it is left out."""
    distinct = Counter(cells)
    small = {c.lower() for c in distinct}
    if _is_id(header):
        return "", "it looks like an identifier, by its name"
    if len(distinct) < 2:
        return "", "it has no two different values"
    if all(_DATE.fullmatch(c) for c in distinct):
        return "", "it holds dates, which may identify people; count them until a day (type: date)"
    numbers = [c for c in cells if _NUMBER.fullmatch(c)]
    if small in ({"0", "1"}, {"0.0", "1.0"}, {"yes", "no"}, {"true", "false"}):
        return "{type: boolean}", ""
    if len(numbers) >= 0.9 * len(cells):
        values = sorted(float(re.sub(r"[<>=\s]", "", c).replace(",", ".")) for c in numbers)
        long = all(len(c.split(".")[0]) >= 6 for c in numbers)
        if long and len(distinct) == len(cells) and len(cells) > 4:
            return "", "it looks like an identifier: long numbers, all different"
        codes = all(v == int(v) for v in values) and len(distinct) <= 5 <= len(cells) / 4
        if codes:
            return _categories(distinct), ""
        low, high = _range(values)
        return f"{{type: continuous, range: [{low:g}, {high:g}]}}  # CONFIRM: range", ""
    if len(distinct) <= min(_MOST_CATEGORIES, max(2, len(cells) // 2)):
        return _categories(distinct), ""
    if len(distinct) == len(cells):
        return "", "it looks like an identifier or free text: all different"
    return "", "it is free text, or has too many categories"


def _is_id(header: str) -> bool:
    """Return whether a column is called as identifiers are."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", header)
    return _ID.search(apart.lower()) is not None


def _categories(distinct: Mapping[str, int]) -> str:
    values = json.dumps(sorted(distinct), ensure_ascii=False)
    return f"{{type: categorical, values: {values}}}  # CONFIRM: all there can be"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return round numbers well outside what was seen, so that they are nobody's own."""
    low, high = values[0], values[-1]
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span))
    lowest = step * math.floor((low - span) / step)
    return (max(0.0, lowest) if low >= 0 else lowest), step * math.ceil((high + span) / step)


# -- what is predicted -----------------------------------------------------------------------------


def _task(folder: Path, found: Found) -> tuple[str, list[str]]:
    """Return the target and the lines of the task: a column of the labels file with few values."""
    for name in ("labels.csv", bids.PARTICIPANTS):
        table = _read(folder / name) if (folder / name).is_file() else None
        if table is None:
            continue
        for header in table.columns:
            cells = [c.strip() for c in table[header] if c.strip().lower() not in _BLANK]
            if 2 <= len(set(cells)) <= 10 and len(set(cells)) < len(cells) and not _is_id(header):
                classes = json.dumps(sorted(set(cells)), ensure_ascii=False)
                found.confirm.append(f"task: is {header} what shall be predicted?")
                return header, [
                    "task:",
                    "  type: classification",
                    f"  target: {json.dumps(header)}  # CONFIRM: what shall be predicted",
                    f"  classes: {classes}  # CONFIRM: the last of two is the event",
                ]
    found.confirm.append("task: what shall be predicted? There is no labels.csv with such a column")
    return "outcome", [
        "task:",
        "  type: classification",
        "  target: outcome  # CONFIRM: a column of labels.csv",
        '  classes: ["no", "yes"]  # CONFIRM: its values, the last of two is the event',
    ]
