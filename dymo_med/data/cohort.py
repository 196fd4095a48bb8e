"""A cohort on disk: `cohort.yaml`, who is in it, their labels and splits."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

from torch import nn

from dymo_med.config import CohortFile, Document, KeyPath
from dymo_med.data import bids
from dymo_med.data.gate import Limits
from dymo_med.errors import ConfigError, Problem
from dymo_med.modalities import MODALITIES
from dymo_med.registry import nearest
from dymo_med.tasks import TASKS
from dymo_med.text import comparable
from dymo_med.types import (
    SPLITS,
    Cohort,
    CohortRecord,
    ModalitySpec,
    PatientRecord,
    Split,
    Subgroup,
    Target,
    Task,
)

MOST_MODALITIES = 62  # a subset of modalities is a 63-bit number
_UNKNOWN = "unknown"
_PARTICIPANT, _SESSION = "participant_id", "session_id"  # columns of BIDS tables
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_ID = re.compile(r"(?!.*\.\.)\w(?:[\w.+@ -]{0,126}[\w+@-])?")


class _Cells(dict[str, str]):
    """Cells by header, headers as they are compared."""

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(comparable(name))


@dataclass(frozen=True)
class _Line:
    """One row of a CSV file: stripped cells by header."""

    number: int
    cells: Mapping[str, str]


def read_cohort(path: Path | str) -> Cohort:
    """Read a cohort's description, records, labels and splits; no patient data.

    Args:
        path: The folder that holds `cohort.yaml`, or the YAML file itself.

    Raises:
        ConfigError: With every problem found at once.

    `labels.csv` has one row per record: `patient_id`, the target's column, and `record_id` where
    a patient has several visits (it names the patient directory; without it the patient id
    does). A blank target means the label is not known. Of a segmentation the mask is the label:
    without `labels.csv` every folder of patients is a record. `splits.csv` has `patient_id` and
    `split`. With `layout: bids` the folder is a BIDS dataset, `participants.tsv` is the labels
    file unless another is named, and a record is a session.
    """
    cohort, problems = survey_cohort(Path(path))
    if problems:
        raise ConfigError(*problems)
    return cohort


def read_folders(path: Path) -> Cohort:
    """Read a cohort of which nothing but its patients need be known: no labels, no splits.

    Every patient directory is a record, by name, in a BIDS dataset every subject or session. If
    there is a labels file, it says which visits are of one patient; what else is in it does not
    matter.

    Args:
        path: The folder that holds `cohort.yaml`, or the YAML file itself.

    Raises:
        ConfigError: If the description is wrong, or there is no patient directory.
    """
    file = path / "cohort.yaml" if path.is_dir() else path
    document = Document(file)
    _refuse_booleans(document)
    entry = document.parse(CohortFile)
    problems: list[Problem] = []
    specs = _read_specs(document, entry, problems)
    if entry.layout == "bids":
        subjects = sorted(p for p in file.parent.iterdir() if bids.SUBJECT.fullmatch(p.name))
        places = [place for s in subjects if s.is_dir() for place in bids.sessions(s)]
        records = tuple(CohortRecord(*bids.ids(p), p, root=file.parent) for p in places)
    else:
        records = _folders(file.parent, entry, problems)
        owners: dict[str, str] = {}
        if (file.parent / entry.labels).is_file():
            for line in _read_lines(file.parent / entry.labels, (), []):
                patient = line.cells.get("patient_id", "")
                owners[line.cells.get("record_id", patient)] = patient
        records = tuple(
            replace(r, patient_id=owners.get(r.record_id) or r.patient_id) for r in records
        )
    if problems:
        raise ConfigError(*problems)
    blank = tuple(entry.missing_values)
    if entry.layout == "bids" and bids.BLANK not in blank:
        blank = (*blank, bids.BLANK)
    return Cohort(
        name=entry.name,
        root=file.parent,
        task=_task(document, entry, ()),
        specs=specs,
        records=records,
        splits={},
        missing_values=blank,
    )


def survey_cohort(path: Path) -> tuple[Cohort, tuple[Problem, ...]]:
    """Read a cohort as `read_cohort` does, and go on where something is wrong.

    Args:
        path: The folder that holds `cohort.yaml`, or the YAML file itself.

    Returns:
        What is right about it (modalities, records and splits that can be used), and every
        problem.

    Raises:
        ConfigError: If the description is so wrong that no modality or task is left.
    """
    file = path / "cohort.yaml" if path.is_dir() else path
    document = Document(file)
    _refuse_booleans(document)
    entry = document.parse(CohortFile)
    problems: list[Problem] = []
    specs = _read_specs(document, entry, problems)
    task = _task(document, entry, problems)
    problems.extend(task.misfits(specs, document.where))
    missing_values = tuple(entry.missing_values)
    if entry.layout == "bids" and bids.BLANK not in missing_values:
        missing_values = (*missing_values, bids.BLANK)
    blank = {"", *(value.strip() for value in missing_values)}
    subgroups = _read_subgroups(document, entry, specs, problems)
    try:
        document.parse_part(entry.quality, Limits, ("quality",))
    except ConfigError as error:
        problems.extend(error.problems)
    records = _read_records(file.parent, entry, task, subgroups, blank, problems)
    splits = _read_splits(file.parent / entry.splits, _patient_column(entry), records, problems)
    fitting = [r for r in records if splits.get(r.patient_id) == "train"]
    task = task.fitted(fitting)
    records = tuple(map(task.again, records))
    cohort = Cohort(
        name=entry.name,
        root=file.parent,
        task=task,
        specs=specs,
        records=records,
        splits=splits,
        missing_values=missing_values,
        subgroups=subgroups,
        quality={} if problems else entry.quality,
    )
    return cohort, tuple(problems)


def _task(document: Document, entry: CohortFile, problems: Sequence[Problem]) -> Task:
    """Return what is predicted.

    Args:
        document: The description.
        entry: What it says.
        problems: What was wrong before.

    Raises:
        ConfigError: If there is no such task, or it cannot be.
    """

    def where(key: str) -> str:
        return document.where(("task", key))

    name = entry.task.type
    if name not in TASKS:
        raise ConfigError(
            *problems,
            Problem(
                where("type"),
                f"there is no task '{name:.40}'",
                expected=" or ".join(TASKS),
                remedy=nearest(name, list(TASKS)),
            ),
        )
    kind = TASKS[name]
    try:
        return kind.from_entry(
            document.parse_part(
                {"type": name, **(entry.task.model_extra or {})}, kind.Entry, ("task",)
            ),
            where,
        )
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None


def level(
    subgroup: Subgroup, entry: CohortRecord, record: PatientRecord, specs: Sequence[ModalitySpec]
) -> str:
    """Return which part of a subgroup a record belongs to: a category, a band, or `unknown`.

    Args:
        subgroup: A way to divide patients.
        entry: The record's entry in the cohort.
        record: The whole record, before anything was hidden.
        specs: Modalities of the cohort.

    Example:
        >>> age = Subgroup("age", "age", edges=(40.0, 60.0))
        >>> whom = [CohortRecord("r", "p", Path(), subgroups={"age": a}) for a in ("39", "40", "")]
        >>> [level(age, entry, PatientRecord("r", "p", {}), ()) for entry in whom]
        ['< 40', '40 to < 60', 'unknown']
    """
    if subgroup.modality is None:
        text = entry.subgroups.get(subgroup.name, "")
        if not subgroup.edges or not text:
            return text or _UNKNOWN
        return _band(float(text), subgroup.edges)
    value = record.modalities.get(subgroup.modality)
    if value is None:
        return _UNKNOWN
    spec = next(spec for spec in specs if spec.name == subgroup.modality)
    place = [c.name for c in spec.columns].index(subgroup.column)
    if value.observed_fields is not None and not bool(value.observed_fields[place]):
        return _UNKNOWN
    number, column = float(value.values[place]), spec.columns[place]
    return (
        column.values[round(number)]
        if column.type == "categorical"
        else _band(number, subgroup.edges)
    )


def _band(number: float, edges: Sequence[float]) -> str:
    if number < edges[0]:
        return f"< {edges[0]:g}"
    for low, high in pairwise(edges):
        if low <= number < high:
            return f"{low:g} to < {high:g}"
    return f"{edges[-1]:g} and over"


def _read_subgroups(
    document: Document,
    entry: CohortFile,
    specs: Sequence[ModalitySpec],
    problems: list[Problem],
) -> tuple[Subgroup, ...]:
    """Return the subgroups; what is wrong with them goes to `problems`."""
    found = []
    for name, part in entry.subgroups.items():
        where = document.where(("subgroups", name))
        if part.label_column is not None:
            found.append(Subgroup(name, part.label_column, None, tuple(part.edges)))
            continue
        columns = {
            spelling: (spec.name, column)
            for spec in specs
            for column in spec.columns
            for spelling in (column.name, f"{spec.name}.{column.name}")
        }
        asked = str(part.column)
        if asked not in columns:
            problems.append(
                Problem(
                    where,
                    f"no table has a column '{asked}'",
                    expected="a column of a table, or label_column",
                    remedy=nearest(asked, list(columns)),
                )
            )
            continue
        modality, column = columns[asked]
        number = column.type == "continuous"
        if number != bool(part.edges):
            problems.append(
                Problem(
                    where,
                    "a number needs bands" if number else "categories have no bands",
                    expected="edges between bands" if number else "no edges",
                    remedy="Add edges: [40, 60]" if number else "Remove edges",
                )
            )
            continue
        found.append(Subgroup(name, column.name, modality, tuple(part.edges)))
    return tuple(found)


def _refuse_booleans(document: Document) -> None:
    """Explain YAML's booleans where classes are expected: `[no, yes]` is `[False, True]`."""
    task = (document.data or {}).get("task")
    classes = task.get("classes") if isinstance(task, dict) else None
    if isinstance(classes, list) and any(not isinstance(c, str) for c in classes):
        raise ConfigError(
            Problem(
                document.where(("task", "classes")),
                "a class is not text: YAML reads yes, no, on, off as booleans and 0 as a number",
                expected="text",
                remedy='Quote the classes, for example classes: ["no", "yes"]',
            )
        )


def _read_specs(
    document: Document, entry: CohortFile, problems: list[Problem]
) -> tuple[ModalitySpec, ...]:
    """Return the modalities; what is wrong with them goes to `problems`."""
    specs = []
    for name, part in entry.modalities.items():
        key = ("modalities", name)
        if not _NAME.fullmatch(name):
            problems.append(
                Problem(
                    document.where(key),
                    "a modality's name cannot be used",
                    expected="lower-case letters, digits and underscores, a letter first",
                    remedy="Rename it; `file` may stay as it is",
                )
            )
        elif hasattr(nn.ModuleDict(), name):
            # Networks keep their parts by modality in a ModuleDict, which has these itself.
            problems.append(
                Problem(
                    document.where(key),
                    f"'{name}' cannot be a modality's name: networks use the word themselves",
                    expected="another name",
                    remedy=f"Call it {name}_1, or by what it holds; `file` may stay as it is",
                )
            )
        kind = part.get("kind")
        if not isinstance(kind, str) or kind not in list(MODALITIES):
            where = document.where((*key, "kind"))
            what = "the modality has no kind" if kind is None else "the kind is not known"
            remedy = nearest(str(kind), list(MODALITIES))
            problems.append(Problem(where, what, expected="a known kind", remedy=remedy))
            continue
        cls = MODALITIES[kind]
        if kind == "table":
            part = {**entry.tables, **part}
        try:
            if entry.layout == "bids":
                part = _bids_entry(document, part, key)
            specs.append(cls.spec_from_entry(name, document.parse_part(part, cls.Entry, key)))
        except ConfigError as error:
            problems.extend(error.problems)
    references = [spec for spec in specs if spec.grid == "reference"]
    for place, spec in enumerate(references):
        if any(
            spec.shape[1:] == other.shape[1:] and spec.spacing_mm == other.spacing_mm
            for other in references[:place]
        ):
            problems.append(
                Problem(
                    document.where(("modalities", spec.name, "grid")),
                    "several modalities are the reference of the same grid",
                    expected="one `grid: reference` per size and spacing",
                    remedy="Keep one of them; the others are `shared`",
                )
            )
    if len(entry.modalities) > MOST_MODALITIES:
        problems.append(
            Problem(
                document.where(("modalities",)),
                "there are too many modalities",
                expected=f"at most {MOST_MODALITIES}",
                got=str(len(entry.modalities)),
                remedy="Leave some out, or make columns of them",
            )
        )
    return tuple(specs)


def _bids_entry(document: Document, part: dict[str, Any], key: KeyPath) -> dict[str, Any]:
    """Return a modality's entry as it would be without BIDS.

    Raises:
        ConfigError: If its suffix, datatype or entities are not those of BIDS.
    """
    if part["kind"] == "table":
        known = {"record_column", "patient_column"} & part.keys()
        return part if known or "shared" not in part else {**part, "patient_column": _PARTICIPANT}
    own, others = bids.scan_keys(part)
    if not own:
        return part
    if "file" in others:
        raise ConfigError(
            Problem(
                document.where((*key, "file")),
                "file and suffix both say which scan is meant",
                expected="one of them",
                remedy="Remove one",
            )
        )
    return {**others, "file": document.parse_part(own, bids.ScanName, key).file}


def _patient_column(entry: CohortFile) -> str:
    """Return the column that names the patient in labels and splits."""
    return _PARTICIPANT if entry.layout == "bids" else "patient_id"


def _visits(
    root: Path, entry: CohortFile, cells: Mapping[str, str], where: str, problems: list[Problem]
) -> list[tuple[str, Path]]:
    """Return record id and folder of each visit that a row of the labels file is about."""
    patient_id = cells[_patient_column(entry)]
    if entry.layout == "patients":
        record_id = cells.get("record_id", patient_id)
        bad = [
            Problem(
                f"{where} {column}",
                "the id cannot be a folder's name",
                expected="1 to 128 letters, digits, spaces or any of _ . + @ -",
                remedy="Rename it here and everywhere else",
            )
            for column, value in (("patient_id", patient_id), ("record_id", record_id))
            if not _ID.fullmatch(value)
        ]
        problems.extend(bad if "record_id" in cells else bad[:1])
        return [] if bad else [(record_id, root / entry.patients / record_id)]
    session = cells.get(_SESSION, "")
    if not bids.SUBJECT.fullmatch(patient_id) or not (
        session in ("", bids.BLANK) or bids.SESSION.fullmatch(session)
    ):
        problems.append(
            Problem(
                where,
                "the row names no subject or session of BIDS",
                expected=f"sub-LABEL under {_PARTICIPANT}, ses-LABEL or n/a under {_SESSION}",
                remedy="Call it as its folder is called",
            )
        )
        return []
    subject = root / patient_id
    every = session in ("", bids.BLANK)
    folders = bids.sessions(subject) if every else [subject / session]
    return [
        (patient_id if folder == subject else f"{patient_id}_{folder.name}", folder)
        for folder in folders
    ]


def _read_records(
    root: Path,
    entry: CohortFile,
    task: Task,
    subgroups: Sequence[Subgroup],
    blank: set[str],
    problems: list[Problem],
) -> tuple[CohortRecord, ...]:
    """Return the rows of the labels file as records, in file order."""
    name = entry.labels
    if entry.layout == "bids" and "labels" not in entry.model_fields_set:
        name = bids.PARTICIPANTS
    path = root / name
    from_labels = [s for s in subgroups if s.modality is None]
    unnamed = entry.layout == "patients" and "labels" not in entry.model_fields_set
    # The mask is the label; only visits of one patient and subgroups need a table.
    if task.files and unnamed and not from_labels and not path.exists():
        return _folders(root, entry, problems)
    patient_column = _patient_column(entry)
    records: list[CohortRecord] = []
    unknown: dict[tuple[str, str], tuple[int, list[Problem]]] = {}
    seen: dict[str, int] = {}
    needed = dict.fromkeys((patient_column, *task.columns, *(s.column for s in from_labels)))
    for line in _read_lines(path, tuple(needed), problems):
        where = f"{path}:{line.number}"
        visits = _visits(root, entry, line.cells, where, problems)
        twice = [record_id for record_id, _ in visits if record_id in seen]
        if twice:
            problems.append(
                Problem(
                    where,
                    f"record {twice[0]} occurs twice",
                    expected="one row per visit",
                    got=f"the same id on line {seen[twice[0]]}",
                    remedy="Remove one row, or tell visits apart in a"
                    f" {_SESSION if entry.layout == 'bids' else 'record_id'} column",
                )
            )
            continue
        seen.update((record_id, line.number) for record_id, _ in visits)
        if not visits:
            continue
        found = task.read({c: line.cells[c] for c in task.columns}, blank, where)
        if isinstance(found, Problem):
            _, others = unknown.setdefault((found.what, found.remedy), (len(problems), []))
            if not others:
                problems.append(found)
            others.append(found)
            continue
        target = found or Target(None)
        cells = {s.name: line.cells[s.column] for s in from_labels}
        cells = {name: cell for name, cell in cells.items() if cell not in blank}
        for subgroup in from_labels:
            if subgroup.edges and not _is_number(cells.get(subgroup.name, "0")):
                problems.append(
                    Problem(
                        f"{where} {subgroup.column}",
                        "the cell is not a number",
                        expected="a number, or blank",
                        remedy="Correct the cell, or list the word under missing_values",
                    )
                )
        for record_id, folder in visits:
            if not folder.is_dir():
                problems.append(
                    Problem(
                        where,
                        f"record {record_id} has no patient directory",
                        expected=f"a folder {folder.relative_to(root).as_posix()}",
                        remedy="Add the folder or remove the row",
                    )
                )
            patient_id = line.cells[patient_column]
            records.append(
                CohortRecord(
                    record_id,
                    patient_id,
                    folder,
                    target.label,
                    cells,
                    root,
                    target.value,
                    target.event,
                )
            )
    for place, alike in unknown.values():
        problems[place] = _together(alike)
    return tuple(records)


def _folders(root: Path, entry: CohortFile, problems: list[Problem]) -> tuple[CohortRecord, ...]:
    """Return the patient directories as records, each of a patient of its own, by name."""
    place = root / entry.patients
    names = (
        sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
        if place.is_dir()
        else []
    )
    problems.extend(
        Problem(
            f"{entry.patients}: a folder's name",
            "the name cannot be a patient's id",
            expected="1 to 128 letters, digits, spaces or any of _ . + @ -",
            remedy="Rename it here and in the splits",
        )
        for name in names
        if not _ID.fullmatch(name)
    )
    if not names:
        problems.append(
            Problem(
                str(place),
                "there is no patient directory",
                expected=f"a folder per patient, or {entry.labels} that names them",
                remedy="Add the folders, or set `patients` in cohort.yaml",
            )
        )
    return tuple(CohortRecord(n, n, place / n, root=root) for n in names if _ID.fullmatch(n))


def _together(alike: Sequence[Problem]) -> Problem:
    """Return one problem for rows with the same fault: the first, and how many there are."""
    if len(alike) == 1:
        return alike[0]
    return replace(alike[0], got=f"the same in {len(alike)} rows")


def _is_number(text: str) -> bool:
    try:
        return isfinite(float(text))
    except ValueError:
        return False


def _read_splits(
    path: Path, patient_column: str, records: Sequence[CohortRecord], problems: list[Problem]
) -> dict[str, Split]:
    """Return the split of each patient."""
    before = len(problems)
    splits: dict[str, Split] = {}
    lines = _read_lines(path, (patient_column, "split"), problems)
    unreadable = len(problems) > before
    for line in lines:
        where = f"{path}:{line.number}"
        patient_id, split = line.cells[patient_column], line.cells["split"]
        if split not in SPLITS:
            problems.append(
                Problem(
                    f"{where} split",
                    "unknown split",
                    expected=" or ".join(SPLITS),
                    remedy=nearest(split, list(SPLITS)),
                )
            )
            splits.setdefault(patient_id, "train")  # do not report the patient a second time
        elif splits.setdefault(patient_id, split) != split:
            problems.append(
                Problem(
                    where,
                    f"patient {patient_id} is in two splits",
                    got=f"{splits[patient_id]} and {split}",
                    remedy="A patient with all visits belongs to one split; keep one row",
                )
            )
    if not unreadable:
        without = dict.fromkeys(r.patient_id for r in records if r.patient_id not in splits)
        problems.extend(
            Problem(
                str(path),
                f"patient {p} has no split",
                expected="a row for each patient",
                remedy="Add a row",
            )
            for p in without
        )
    return splits


def _read_lines(path: Path, needed: Sequence[str], problems: list[Problem]) -> list[_Line]:
    """Return the rows of a CSV or TSV file that has a header with the needed columns."""
    separator, sign = ("\t", "tab") if path.suffix.lower() == ".tsv" else (",", "comma")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True, delimiter=separator)
            rows = [
                (reader.line_num, [cell.strip() for cell in row])
                for row in reader
                if any(cell.strip() for cell in row)
            ]
    except FileNotFoundError:
        problems.append(
            Problem(
                str(path), "there is no such file", expected="a file", remedy="Add it to the cohort"
            )
        )
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(
            Problem(
                str(path),
                "the file cannot be read",
                expected=f"{sign}-separated values in UTF-8",
                got=type(error).__name__,
                remedy="Check its permissions and quotes, and save it in UTF-8",
            )
        )
        return []
    header = [comparable(name) for name in rows[0][1]] if rows else []
    absent = [name for name in needed if header.count(comparable(name)) != 1]
    if absent or len(rows) < 2:
        problems.append(
            Problem(
                f"{path}:1",
                "the header does not fit" if absent else "the file has no rows",
                expected=f"a header with {', '.join(needed)} (once each), separated by"
                f" {sign}s, and a row for each",
                remedy=f"Add {', '.join(absent)}" if absent else "Add the rows",
            )
        )
        return []
    lines = []
    for number, cells in rows[1:]:
        if len(cells) != len(header):
            problems.append(
                Problem(
                    f"{path}:{number}",
                    "the row does not have one cell per header",
                    expected=f"{len(header)} cells",
                    got=f"{len(cells)} cells",
                    remedy="Quote cells that contain a comma",
                )
            )
            continue
        lines.append(_Line(number, _Cells(zip(header, cells, strict=True))))
    return lines
