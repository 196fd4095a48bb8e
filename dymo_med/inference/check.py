"""Validate what somebody brings, and list everything that is wrong with it at once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dymo_med.bundle import load_bundle, read_recipe
from dymo_med.config import Document
from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_patient, read_record
from dymo_med.errors import BundleError, ConfigError, PatientDataError, Problem
from dymo_med.inference.audit import audit
from dymo_med.modalities.image import file_in
from dymo_med.types import ModalitySpec, PatientRecord

Kind = Literal["cohort", "patient directory", "recipe", "bundle", "prediction"]
NOTHING = "(nothing)"


@dataclass(frozen=True)
class CheckReport:
    """What was checked and what was found.

    Attributes:
        path: What was checked.
        kind: What it was taken for.
        problems: Everything wrong with it.
        exit_code: What the command returns: 0, or that of the first sort of problem.
        patterns: For a cohort or patient, observed modalities joined by commas and the number of
            records that have just these, most frequent first.
        observed: For a cohort or patient, the number of records that have each modality.
        unused: For a cohort or patient, files and folders that no modality looks at, by their
            path in the patient directory, and the number of records that have one; most frequent
            first.
        admitted: For a prediction, what the replayed decision admits; None = nothing was replayed.
        reproduced: For a prediction, whether that is the decision and the choice it states.
    """

    path: Path
    kind: Kind
    problems: tuple[Problem, ...] = ()
    exit_code: int = 0
    patterns: Mapping[str, int] = field(default_factory=dict)
    observed: Mapping[str, int] = field(default_factory=dict)
    unused: Mapping[str, int] = field(default_factory=dict)
    admitted: tuple[str, ...] | None = None
    reproduced: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; only a prediction has been replayed."""
        replayed = {
            "admitted": None if self.admitted is None else list(self.admitted),
            "reproduced": self.reproduced,
        }
        return {
            "path": str(self.path),
            "kind": self.kind,
            "exit_code": self.exit_code,
            "problems": [asdict(problem) for problem in self.problems],
            "patterns": dict(self.patterns),
            "observed": dict(self.observed),
            "unused": dict(self.unused),
            **(replayed if self.kind == "prediction" else {}),
        }


def check(
    path: Path,
    against: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Validate a cohort, a patient directory, a recipe or a bundle; audit a prediction.

    A folder with `configs/metadata.json` is a bundle, one with `cohort.yaml` a cohort, one with
    `prediction.json` a prediction, any other folder a patient directory. A YAML file is a recipe
    if it names an imputer or backbone, and a cohort description if it has modalities. Of a cohort
    every record's files are read.

    Args:
        path: What to check.
        against: For a patient directory, the bundle or cohort it is meant for.
        progress: Called after every record with how many are done and how many there are.

    Raises:
        ConfigError: If `path` is none of these, or `against` is needed and absent or wrong.
        BundleError: If `against` is a bundle that cannot be loaded.
    """
    kind = _kind(path)
    try:
        if kind == "bundle":
            load_bundle(path, device="cpu")
        elif kind == "recipe":
            read_recipe(path)
        elif kind == "cohort":
            return _check_cohort(path, progress)
        elif kind == "prediction":
            return _check_prediction(path)
        else:
            return _check_patient(path, against)
    except (ConfigError, BundleError) as error:
        if kind == "patient directory":
            raise
        return CheckReport(path, kind, error.problems, error.exit_code)
    return CheckReport(path, kind)


def _kind(path: Path) -> Kind:
    """Return what `path` is."""
    if path.is_dir():
        if (path / "configs" / "metadata.json").exists() or (path / "checksums.json").exists():
            return "bundle"
        if (path / "prediction.json").exists():
            return "prediction"
        return "cohort" if (path / "cohort.yaml").exists() else "patient directory"
    if path.exists() and path.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(
            Problem(
                str(path),
                "this kind of file cannot be checked",
                expected="a folder, or a YAML file",
                remedy="Name the folder that the file is in",
            )
        )
    keys = set(Document(path).data or {})
    if keys & {"imputer", "backbone", "selector"}:
        return "recipe"
    if keys & {"modalities", "task"}:
        return "cohort"
    raise ConfigError(
        Problem(
            str(path),
            "the file is neither a recipe nor a cohort description",
            expected="the keys imputer and backbone, or task and modalities",
            remedy="Check that it is the right file",
        )
    )


def _check_prediction(path: Path) -> CheckReport:
    """Audit the folder of a prediction."""
    found = audit(path)
    return CheckReport(
        path,
        "prediction",
        found.problems,
        PatientDataError.exit_code if found.problems else 0,
        admitted=found.admitted,
        reproduced=found.reproduced,
    )


def _check_cohort(path: Path, progress: Callable[[int, int], None] | None) -> CheckReport:
    """Read every record of a cohort.

    Raises:
        ConfigError: If its description is wrong.
    """
    cohort = read_cohort(path)
    problems: list[Problem] = []
    patterns: Counter[str] = Counter()
    observed: dict[str, int] = dict.fromkeys((spec.name for spec in cohort.specs), 0)
    unused: Counter[str] = Counter()
    looked_at = [spec.file for spec in cohort.specs]
    if cohort.task.mask is not None:
        looked_at.append(cohort.task.mask.file)
    for done, entry in enumerate(cohort.records, start=1):
        try:
            record = read_record(
                entry, cohort.specs, cohort.missing_values, require_something=False
            )
        except PatientDataError as error:
            problems.extend(error.problems)
        else:
            patterns[_pattern(record, cohort.specs)] += 1
            for name in record.modalities:
                observed[name] += 1
        unused.update(_unused(entry.folder, looked_at))
        if progress is not None:
            progress(done, len(cohort.records))
    exit_code = PatientDataError.exit_code if problems else 0
    ordered = dict(patterns.most_common())
    others = dict(unused.most_common())
    # A table that all records share is at fault once.
    told = tuple(dict.fromkeys(problems))
    return CheckReport(path, "cohort", told, exit_code, ordered, observed, others)


def _check_patient(path: Path, against: Path | None) -> CheckReport:
    """Read one patient directory as a bundle or cohort would.

    Raises:
        ConfigError: If there is nothing to check it against.
        BundleError: If there is, and it is a broken bundle.
    """
    if against is None:
        raise ConfigError(
            Problem(
                str(path),
                "a patient directory can only be checked against a bundle or a cohort",
                expected="what files to look for",
                remedy="Add --against BUNDLE or --against COHORT; a cohort's own folder holds"
                " cohort.yaml, a bundle's holds configs/metadata.json",
            )
        )
    if _kind(against) == "bundle":
        bundle = load_bundle(against, device="cpu")
        specs, missing_values = bundle.specs, bundle.missing_values
    else:
        cohort = read_cohort(against)
        specs, missing_values = cohort.specs, cohort.missing_values
    kind: Kind = "patient directory"
    unused = dict.fromkeys(_unused(path, [spec.file for spec in specs]), 1)
    try:
        record = read_patient(path, specs, missing_values=missing_values)
    except PatientDataError as error:
        return CheckReport(path, kind, error.problems, error.exit_code, unused=unused)
    observed = {spec.name: int(spec.name in record.modalities) for spec in specs}
    patterns = {_pattern(record, specs): 1}
    return CheckReport(path, kind, patterns=patterns, observed=observed, unused=unused)


def _unused(folder: Path, files: Sequence[str]) -> Iterator[str]:
    """Yield what is in a patient directory and not among the files declared, in order.

    A folder that no declared file is in is one entry, with a slash at its end.

    Hidden files, sidecars of the same name and whatever is in a modality's folder are not among
    them.
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
        others = [n for n in names if not known(here / n.split(".")[0].lower())]
        others += [
            f"{n}/" for n in folders if not {here / n, here / n.lower()} & (within | declared)
        ]
        yield from (f"{here}/{n}".removeprefix("./") for n in sorted(others) if n[0] != ".")
        folders[:] = sorted(n for n in folders if here / n in within)


def _pattern(record: PatientRecord, specs: tuple[ModalitySpec, ...]) -> str:
    """Return the observed modalities in canonical order as one string."""
    return ", ".join(s.name for s in specs if s.name in record.modalities) or NOTHING
