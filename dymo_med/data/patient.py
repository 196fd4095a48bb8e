"""A patient directory: one folder, a file or folder per modality, or nothing."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath

from dymo_med.data import bids
from dymo_med.data.gate import CHECKS, WITHOUT_IT, judge
from dymo_med.errors import PatientDataError, Problem, RefusedError
from dymo_med.modalities import Modality, Whose, modality
from dymo_med.modalities.image import file_in
from dymo_med.modalities.native import same_scan
from dymo_med.types import (
    CohortRecord,
    GateFinding,
    GateResult,
    ModalitySpec,
    ModalityValue,
    Norms,
    PatientRecord,
)


@dataclass(frozen=True)
class Intake:
    """All that was found in a patient directory, usable or not.

    Attributes:
        record: What can be used; what the quality gate refused is in `record.refused`.
        results: What the quality gate says of every modality that can be read.
        problems: Why the rest cannot be read; each problem once.
        damaged: Modalities that cannot be read.
        refusals: What the quality gate refused, per modality, as problems.
    """

    record: PatientRecord
    results: Mapping[str, GateResult]
    problems: tuple[Problem, ...] = ()
    damaged: tuple[str, ...] = ()
    refusals: Mapping[str, tuple[Problem, ...]] = field(default_factory=dict)


# A cohort's folder holds one of these, and patient directories at most so many levels below.
_ROOT_FILES = ("cohort.yaml", bids.DESCRIPTION)
_DEEPEST = 3
_SIDECARS = (".json", ".txt", ".bval", ".bvec")
_RESULTS = ("prediction.json", "recovered/recovered.json")


def read_record(
    entry: CohortRecord,
    specs: Sequence[ModalitySpec],
    missing_values: Sequence[str] = (),
    *,
    require_something: bool = True,
    norms: Norms | None = None,
    treat_refused_as_missing: bool = False,
) -> PatientRecord:
    """Read one record of a cohort; see `read_patient`."""
    return usable(
        examine_record(entry, specs, missing_values, norms=norms),
        specs,
        require_something=require_something,
        treat_refused_as_missing=treat_refused_as_missing,
    )


def examine_record(
    entry: CohortRecord,
    specs: Sequence[ModalitySpec],
    missing_values: Sequence[str] = (),
    *,
    norms: Norms | None = None,
) -> Intake:
    """Read what there is of one record of a cohort; see `examine`."""
    found = examine(
        entry.folder,
        specs,
        record_id=entry.record_id,
        patient_id=entry.patient_id,
        label=entry.label,
        missing_values=missing_values,
        norms=norms,
        root=entry.root,
    )
    return replace(found, record=replace(found.record, value=entry.value, event=entry.event))


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
    norms: Norms | None = None,
    treat_refused_as_missing: bool = False,
) -> PatientRecord:
    """Read and preprocess what a patient directory holds.

    Args:
        folder: The patient directory.
        specs: The modalities to look for.
        record_id: Id of the record; the folder's name if not given, in a BIDS dataset with its
            subject's (`sub-01_ses-a`).
        patient_id: Id of the patient; the record's id if not given.
        label: Class index, if known.
        missing_values: Strings that mean "blank" in tables, besides the empty cell.
        require_something: Refuse a patient of whom nothing was observed.
        root: Folder of the cohort, where tables with rows of all records are; if not given, the
            nearest folder above that holds `cohort.yaml` or `dataset_description.json` (BIDS).
        norms: What training records were like, for the quality gate (`data.gate`); None = nothing
            is compared.
        treat_refused_as_missing: Go on without what the quality gate refuses.

    Raises:
        PatientDataError: With every problem of every modality at once; also if the folder is
            not there, nothing was observed, or headers name different patients. It is a
            `RefusedError` if everything can be read and only the quality gate objects.
    """
    found = examine(
        folder,
        specs,
        record_id=record_id,
        patient_id=patient_id,
        label=label,
        missing_values=missing_values,
        norms=norms,
        root=root,
    )
    return usable(
        found,
        specs,
        require_something=require_something,
        treat_refused_as_missing=treat_refused_as_missing,
    )


def usable(
    found: Intake,
    specs: Sequence[ModalitySpec],
    *,
    require_something: bool = True,
    treat_refused_as_missing: bool = False,
) -> PatientRecord:
    """Return what can be used of a patient directory, if the rest does not forbid it.

    Args:
        found: What was found there.
        specs: The modalities that were looked for.
        require_something: See `read_patient`. Likewise below.
        treat_refused_as_missing: Go on without what the quality gate refuses.

    Raises:
        PatientDataError: See `read_patient`.
    """
    refusals = [problem for problems in found.refusals.values() for problem in problems]
    if found.problems:
        raise PatientDataError(*found.problems, *refusals)
    if refusals and not treat_refused_as_missing:
        checks = [
            finding.check
            for result in found.record.refused.values()
            for finding in result.findings
            if finding.level == "refuse"
        ]
        raise RefusedError(*refusals, checks=checks)
    if not found.record.modalities and require_something:
        files = dict.fromkeys(spec.file for spec in specs)
        raise PatientDataError(
            *refusals,
            Problem(
                f"Patient {found.record.record_id}",
                "nothing was observed, so there is nothing to predict from",
                expected=f"at least one of {', '.join(files)} with a value in it",
                remedy="Check that this is the patient's folder and how its files are named",
            ),
        )
    return found.record


def examine(
    folder: Path,
    specs: Sequence[ModalitySpec],
    *,
    record_id: str | None = None,
    patient_id: str | None = None,
    label: int | None = None,
    missing_values: Sequence[str] = (),
    norms: Norms | None = None,
    root: Path | None = None,
) -> Intake:
    """Read what a patient directory holds, and go on where something cannot be used.

    Args:
        folder: See `read_patient`. Likewise below.
        specs: The modalities to look for.
        record_id: Id of the record.
        patient_id: Id of the patient.
        label: Class index, if known.
        missing_values: Strings that mean "blank" in tables.
        norms: What training records were like.
        root: Folder of the cohort.

    Raises:
        PatientDataError: If the folder is not there.
    """
    root = root or _root_above(folder)
    if record_id is None and root is not None and (root / bids.DESCRIPTION).is_file():
        record_id, patient_id = bids.ids(folder)
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
    readable: dict[ModalitySpec, ModalityValue] = {}
    wrong: dict[str, tuple[Problem, ...]] = {}
    whose = Whose(record_id, patient_id, root)
    results: dict[str, GateResult] = {}
    refused: dict[str, GateResult] = {}
    refusals: dict[str, tuple[Problem, ...]] = {}
    # References first: the grids of others are centred on them, unless they are refused.
    for kind in sorted(_modalities(tuple(specs)), key=lambda kind: kind.spec.grid != "reference"):
        name = kind.spec.name
        try:
            _stays_inside(folder, kind.spec.file, where)
            value = kind.read_beside(found, folder, where, missing_values, whose)
        except RefusedError as error:
            refusals[name] = tuple(
                replace(problem, remedy=f"{problem.remedy}; {WITHOUT_IT}")
                for problem in error.problems
            )
            refused[name] = results[name] = GateResult(
                tuple(
                    GateFinding(check, "refuse", problem.got, problem.expected)
                    for check, problem in zip(error.checks, error.problems, strict=True)
                )
            )
            continue
        except PatientDataError as error:
            wrong[name] = error.problems
            continue
        if value is None:
            continue
        value = replace(value, same_as=_twin(kind.spec, value, readable))
        result = results[name] = judge(kind.spec, value, norms)
        if result.state == "refuse":
            refused[name] = result
            refusals[name] = tuple(
                Problem(
                    f"{where}: {value.source.file}, {name}",
                    f"the quality gate refuses it: {CHECKS[finding.check]}",
                    expected=finding.expected,
                    got=finding.got,
                    remedy=f"Check that it is the right file and bring a better one; {WITHOUT_IT}",
                )
                for finding in result.findings
                if finding.level == "refuse"
            )
        else:
            found[kind.spec] = value
        readable[kind.spec] = value
    names = [spec.name for spec in specs]
    problems = [problem for name in names for problem in wrong.get(name, ())]
    problems += _same_scan_twice(readable, where)
    problems += _strangers({s.name: readable[s] for s in specs if s in readable}, where)
    return Intake(
        PatientRecord(
            record_id=record_id,
            patient_id=patient_id or record_id,
            modalities={spec.name: found[spec] for spec in specs if spec in found},
            label=label,
            refused={name: refused[name] for name in names if name in refused},
            unused=tuple(unused_files(folder, [spec.file for spec in specs])),
        ),
        {name: results[name] for name in names if name in results},
        # Tables that share a file report the same trouble with it; say it once.
        tuple(dict.fromkeys(problems)),
        tuple(name for name in names if name in wrong),
        {name: refusals[name] for name in names if name in refusals},
    )


def _stays_inside(folder: Path, file: str, where: str) -> None:
    """Refuse a file in a folder that is a link out of the patient directory.

    A scan may be a link itself, as in an archive; but whoever names `scans/t1.nii.gz` must not
    reach what is elsewhere, since a bundle comes from others.

    Raises:
        PatientDataError: If it is there.
    """
    inner = PurePosixPath(file_in(folder, file)).parent
    if inner.parts and not (folder / inner).resolve().is_relative_to(folder.resolve()):
        raise PatientDataError(
            Problem(
                f"{where}: {inner.as_posix()}",
                "the folder is a link that leads out of the patient directory",
                expected="folders inside it",
                remedy="Copy or move what it leads to into the patient directory",
            )
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


def _twin(
    spec: ModalitySpec, value: ModalityValue, others: Mapping[ModalitySpec, ModalityValue]
) -> str:
    """Return the modality that has the same voxels in a file of its own, or nothing."""
    if value.fingerprint is None:
        return ""
    for other, its in others.items():
        if (other.file, other.dicom) == (spec.file, spec.dicom) or its.fingerprint is None:
            continue
        if same_scan(value.fingerprint.numpy(), its.fingerprint.numpy()):
            return other.name
    return ""


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


def unused_files(folder: Path, files: Sequence[str]) -> Iterator[str]:
    """Yield what is in a patient directory and not among the files declared, in order.

    A folder that no declared file is in is one entry, with a slash at its end. Not among them are
    hidden files, sidecars (`.json`, `.txt`, `.bval`, `.bvec`) of another file, whatever is in a
    modality's folder, and folders that hold results of this program.

    Args:
        folder: The patient directory.
        files: As modalities and masks declare them.
    """
    paths = [PurePosixPath(file_in(folder, file)) for file in files]
    declared = {path.with_name(path.name.split(".")[0].lower()) for path in paths}
    # In names of BIDS `*` stands for anything.
    open_names = [str(path) for path in declared if "*" in path.name]
    within = {parent for path in paths for parent in path.parents}

    def known(path: PurePosixPath) -> bool:
        return path in declared or any(fnmatchcase(str(path), name) for name in open_names)

    for root, folders, names in os.walk(folder):
        here = PurePosixPath(Path(root).relative_to(folder).as_posix())
        stems = Counter(n.split(".")[0] for n in names)
        others = [
            n
            for n in names
            if not known(here / n.split(".")[0].lower())
            and not (n.lower().endswith(_SIDECARS) and stems[n.split(".")[0]] > 1)
        ]
        others += [
            f"{n}/"
            for n in folders
            if not {here / n, here / n.lower()} & (within | declared)
            and not any((Path(root) / n / result).exists() for result in _RESULTS)
        ]
        yield from (f"{here}/{n}".removeprefix("./") for n in sorted(others) if n[0] != ".")
        folders[:] = sorted(n for n in folders if here / n in within)
