"""A patient directory: one folder, a file or folder per modality, or nothing."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from dymo_med.errors import PatientDataError, Problem
from dymo_med.modalities import Modality, Whose, modality
from dymo_med.types import CohortRecord, ModalitySpec, ModalityValue, PatientRecord

# A cohort's folder holds one of these, and patient directories at most so many levels below.
_ROOT_FILES = ("cohort.yaml", "dataset_description.json")
_DEEPEST = 3


def read_record(
    entry: CohortRecord,
    specs: Sequence[ModalitySpec],
    missing_values: Sequence[str] = (),
    *,
    require_something: bool = True,
) -> PatientRecord:
    """Read one record of a cohort; see `read_patient`."""
    record = read_patient(
        entry.folder,
        specs,
        record_id=entry.record_id,
        patient_id=entry.patient_id,
        label=entry.label,
        missing_values=missing_values,
        require_something=require_something,
        root=entry.root,
    )
    return replace(record, value=entry.value)


def read_patient(
    folder: Path,
    specs: Sequence[ModalitySpec],
    *,
    record_id: str | None = None,
    patient_id: str | None = None,
    label: int | None = None,
    missing_values: Sequence[str] = (),
    require_something: bool = True,
    root: Path | None = None,
) -> PatientRecord:
    """Read and preprocess what a patient directory holds.

    Args:
        folder: The patient directory.
        specs: The modalities to look for.
        record_id: Id of the record; the folder's name if not given.
        patient_id: Id of the patient; the record's id if not given.
        label: Class index, if known.
        missing_values: Strings that mean "blank" in tables, besides the empty cell.
        require_something: Refuse a patient of whom nothing was observed.
        root: Folder of the cohort, where tables with rows of all records are; if not given, the
            nearest folder above that holds `cohort.yaml` or `dataset_description.json` (BIDS).

    Raises:
        PatientDataError: With every problem of every modality at once; also if the folder is
            not there, nothing was observed, or headers name different patients.
    """
    record_id = record_id or folder.resolve().name
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in record_id):  # Cs: no UTF-8
        raise PatientDataError(
            Problem(
                f"Patient {record_id!a}",
                "the folder's name is the record's id and cannot be printed",
                expected="UTF-8 without control characters",
                remedy="Rename the folder",
            )
        )
    where = f"Patient {record_id}"
    try:
        with os.scandir(folder) as entries:
            next(entries, None)
    except OSError as error:
        raise PatientDataError(
            Problem(
                where,
                f"there is no readable patient directory at {folder}",
                expected="a folder",
                got=type(error).__name__,
                remedy="Check the path and its permissions",
            )
        ) from error
    found: dict[ModalitySpec, ModalityValue] = {}
    wrong: dict[str, tuple[Problem, ...]] = {}
    whose = Whose(record_id, patient_id, root or _root_above(folder))
    # References first: the grids of others are centred on them.
    for kind in sorted(_modalities(tuple(specs)), key=lambda kind: kind.spec.grid != "reference"):
        try:
            value = kind.read_beside(found, folder, where, missing_values, whose)
        except PatientDataError as error:
            wrong[kind.spec.name] = error.problems
            continue
        if value is not None:
            found[kind.spec] = value
    problems = [problem for spec in specs for problem in wrong.get(spec.name, ())]
    problems += _same_scan_twice(found, where)
    values = {spec.name: found[spec] for spec in specs if spec in found}
    if not problems and not values and require_something:
        files = dict.fromkeys(spec.file for spec in specs)
        problems.append(
            Problem(
                where,
                "nothing was observed, so there is nothing to predict from",
                expected=f"at least one of {', '.join(files)} with a value in it",
                remedy="Check that this is the patient's folder and how its files are named",
            )
        )
    problems += _strangers(values, where)
    if problems:
        # Tables that share a file report the same trouble with it; say it once.
        raise PatientDataError(*dict.fromkeys(problems))
    return PatientRecord(
        record_id=record_id,
        patient_id=patient_id or record_id,
        modalities=values,
        label=label,
    )


def _strangers(values: Mapping[str, ModalityValue], where: str) -> list[Problem]:
    """Return what is wrong if files name different patients, without saying the names."""
    stated = {name: set(v.identifiers) for name, v in values.items() if v.identifiers}
    first = next(iter(stated.values()), set())
    others = [name for name, identifiers in stated.items() if not identifiers & first]
    if not others:
        return []
    same = [name for name in stated if name not in others]
    return [
        Problem(
            where,
            "the files' headers name different patients",
            expected="files of one patient",
            got=f"another patient in {', '.join(others)} than in {', '.join(same)}",
            remedy="Take out what is not this patient's, or correct the identifier in its header",
        )
    ]


def _root_above(folder: Path) -> Path | None:
    """Return the folder of the cohort that a patient directory is part of, if it is."""
    for above in folder.resolve().parents[:_DEEPEST]:
        if any((above / name).is_file() for name in _ROOT_FILES):
            return above
    return None


@lru_cache(maxsize=4)
def _modalities(specs: tuple[ModalitySpec, ...]) -> tuple[Modality, ...]:
    """Return the handlers of a cohort's modalities; they compose their transforms once."""
    return tuple(modality(spec) for spec in specs)


def _same_scan_twice(found: Mapping[ModalitySpec, ModalityValue], where: str) -> list[Problem]:
    """Return a problem for each scan of a shared DICOM folder that two modalities took."""
    problems, taken = [], dict[tuple[str, str], str]()
    for spec, value in found.items():
        if spec.dicom is None:
            continue
        key = (value.source.file, value.source.sha256)
        other = taken.setdefault(key, spec.name)
        if other != spec.name:
            problems.append(
                Problem(
                    f"{where}: {value.source.file}",
                    f"the same DICOM series was taken for {other} and for {spec.name}",
                    expected="a series for each",
                    remedy="Tell them apart by `dicom` in cohort.yaml (modality, description,"
                    " slices)",
                )
            )
    return problems
