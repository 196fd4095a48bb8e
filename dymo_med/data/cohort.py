"""A cohort on disk: `cohort.yaml`, who is in it, their labels and splits."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dymo_med.config import CohortFile, Document
from dymo_med.errors import ConfigError, Problem
from dymo_med.modalities import MODALITIES
from dymo_med.registry import nearest
from dymo_med.types import SPLITS, Cohort, CohortRecord, ModalitySpec, Split, Task

MOST_MODALITIES = 62  # a subset of modalities is a 63-bit number
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_ID = re.compile(r"(?!.*\.\.)\w(?:[\w.+@ -]{0,126}[\w+@-])?")


@dataclass(frozen=True)
class _Line:
    """One row of a CSV file: stripped cells by header."""

    number: int
    cells: Mapping[str, str]


def read_cohort(path: Path) -> Cohort:
    """Read a cohort's description, records, labels and splits; no patient data.

    Args:
        path: The folder that holds `cohort.yaml`, or the YAML file itself.

    Raises:
        ConfigError: With every problem found at once.

    `labels.csv` has one row per record: `patient_id`, the target's column, and `record_id` where
    a patient has several visits (it names the patient directory; without it the patient id
    does). A blank target means the label is not known. `splits.csv` has `patient_id` and
    `split`.
    """
    file = path / "cohort.yaml" if path.is_dir() else path
    document = Document(file)
    _refuse_booleans(document)
    entry = document.parse(CohortFile)
    problems: list[Problem] = []
    specs = _read_specs(document, entry, problems)
    classes = tuple(entry.task.classes)
    if len(set(classes)) != len(classes):
        where = document.where(("task", "classes"))
        problems.append(Problem(where, "a class occurs twice"))
    blank = {"", *(value.strip() for value in entry.missing_values)}
    records = _read_records(file.parent, entry, blank, problems)
    splits = _read_splits(file.parent / entry.splits, records, problems)
    if problems:
        raise ConfigError(*problems)
    return Cohort(
        name=entry.name,
        root=file.parent,
        task=Task(entry.task.type, entry.task.target, classes),
        specs=specs,
        records=records,
        splits=splits,
        missing_values=tuple(entry.missing_values),
    )


def _refuse_booleans(document: Document) -> None:
    """Explain YAML's booleans where classes are expected: `[no, yes]` is `[False, True]`."""
    task = (document.data or {}).get("task")
    classes = task.get("classes") if isinstance(task, dict) else None
    if isinstance(classes, list) and any(not isinstance(c, str) for c in classes):
        raise ConfigError(
            Problem(
                document.where(("task", "classes")),
                "a class is not text: YAML reads yes, no, on, off as booleans and 0 as a number",
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
                )
            )
        elif hasattr(nn.ModuleDict(), name):
            # Networks keep their parts by modality in a ModuleDict, which has these itself.
            problems.append(
                Problem(
                    document.where(key),
                    f"'{name}' cannot be a modality's name: networks use the word themselves",
                    remedy=f"Call it {name}_1, or by what it holds; `file` may stay as it is",
                )
            )
        kind = part.get("kind")
        if not isinstance(kind, str) or kind not in list(MODALITIES):
            where = document.where((*key, "kind"))
            what = "the modality has no kind" if kind is None else "the kind is not known"
            problems.append(Problem(where, what, remedy=nearest(str(kind), list(MODALITIES))))
            continue
        cls = MODALITIES[kind]
        try:
            specs.append(cls.spec_from_entry(name, document.parse_part(part, cls.Entry, key)))
        except ConfigError as error:
            problems.extend(error.problems)
    if len(entry.modalities) > MOST_MODALITIES:
        problems.append(
            Problem(
                document.where(("modalities",)),
                "there are too many modalities",
                expected=f"at most {MOST_MODALITIES}",
                got=str(len(entry.modalities)),
            )
        )
    return tuple(specs)


def _read_records(
    root: Path, entry: CohortFile, blank: set[str], problems: list[Problem]
) -> tuple[CohortRecord, ...]:
    """Return the rows of the labels file as records, in file order."""
    path = root / entry.labels
    classes = entry.task.classes
    records: list[CohortRecord] = []
    seen: dict[str, int] = {}
    for line in _read_lines(path, ("patient_id", entry.task.target), problems):
        where = f"{path}:{line.number}"
        patient_id = line.cells["patient_id"]
        record_id = line.cells.get("record_id", patient_id)
        bad = [
            Problem(
                f"{where} {column}",
                "the id cannot be a folder's name",
                expected="1 to 128 letters, digits, spaces or any of _ . + @ -",
            )
            for column, value in (("patient_id", patient_id), ("record_id", record_id))
            if not _ID.fullmatch(value)
        ]
        if bad:
            problems.extend(bad if "record_id" in line.cells else bad[:1])
            continue
        if record_id in seen:
            problems.append(
                Problem(
                    where,
                    f"record {record_id} occurs twice",
                    expected="one row per visit",
                    got=f"the same id on line {seen[record_id]}",
                    remedy="Remove one row, or tell visits apart in a record_id column",
                )
            )
            continue
        seen[record_id] = line.number
        label = None
        target = line.cells[entry.task.target]
        if target not in blank:
            if target not in classes:
                problems.append(
                    Problem(
                        f"{where} {entry.task.target}",
                        "the class is not known",
                        expected=" or ".join(classes),
                        remedy=f"{nearest(target, classes)}. Leave it blank if it is not known",
                    )
                )
                continue
            label = classes.index(target)
        folder = root / entry.patients / record_id
        if not folder.is_dir():
            problems.append(
                Problem(
                    where,
                    f"record {record_id} has no patient directory",
                    expected=f"a folder {entry.patients}/{record_id}",
                    remedy="Add the folder or remove the row",
                )
            )
        records.append(CohortRecord(record_id, patient_id, folder, label))
    return tuple(records)


def _read_splits(
    path: Path, records: Sequence[CohortRecord], problems: list[Problem]
) -> dict[str, Split]:
    """Return the split of each patient."""
    before = len(problems)
    splits: dict[str, Split] = {}
    lines = _read_lines(path, ("patient_id", "split"), problems)
    unreadable = len(problems) > before
    for line in lines:
        where = f"{path}:{line.number}"
        patient_id, split = line.cells["patient_id"], line.cells["split"]
        if split not in SPLITS:
            problems.append(
                Problem(f"{where} split", "unknown split", remedy=nearest(split, list(SPLITS)))
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
            Problem(str(path), f"patient {p} has no split", remedy="Add a row") for p in without
        )
    return splits


def _read_lines(path: Path, needed: Sequence[str], problems: list[Problem]) -> list[_Line]:
    """Return the rows of a CSV file that has a header with the needed columns."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            rows = [
                (reader.line_num, [cell.strip() for cell in row])
                for row in reader
                if any(cell.strip() for cell in row)
            ]
    except FileNotFoundError:
        problems.append(Problem(str(path), "there is no such file", remedy="Add it to the cohort"))
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(
            Problem(
                str(path),
                "the file cannot be read",
                expected="comma-separated values in UTF-8",
                got=type(error).__name__,
            )
        )
        return []
    header = rows[0][1] if rows else []
    absent = [name for name in needed if header.count(name) != 1]
    if absent or len(rows) < 2:
        problems.append(
            Problem(
                f"{path}:1",
                "the header does not fit" if absent else "the file has no rows",
                expected=f"a header with {', '.join(needed)} (once each), separated by commas,"
                " and a row for each",
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
                )
            )
            continue
        lines.append(_Line(number, dict(zip(header, cells, strict=True))))
    return lines
