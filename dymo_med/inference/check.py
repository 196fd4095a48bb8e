"""Validate what somebody brings, and list everything that is wrong with it at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from dymo_med import __version__
from dymo_med.backbones import BACKBONES, SEGMENTERS
from dymo_med.bundle import ModelBundle, load_bundle, read_recipe, task_of
from dymo_med.bundle_segmentation import SegmentationBundle, load_segmentation_bundle
from dymo_med.config import Document
from dymo_med.data import bids
from dymo_med.data.cohort import read_cohort, survey_cohort
from dymo_med.data.gate import CHECKS
from dymo_med.data.masks import with_mask
from dymo_med.data.patient import Intake, examine, examine_record, unused_files
from dymo_med.data.survey import Survey
from dymo_med.errors import BundleError, ConfigError, DymoMedError, PatientDataError, Problem
from dymo_med.imputers import IMPUTERS, require_recovery
from dymo_med.inference.audit import audit
from dymo_med.inference.failures import unexpected
from dymo_med.inference.matching import matched_specs
from dymo_med.inference.segmentation_file import audit_segmentation, is_segmentation
from dymo_med.inference.segmentation_page import audit_pages
from dymo_med.modalities import Whose
from dymo_med.modalities.table_files import ids_of_nobody
from dymo_med.types import SPLITS, Cohort, CohortRecord, ModalitySpec, Norms

Kind = Literal["cohort", "patient directory", "recipe", "bundle", "prediction"]
State = Literal["observed", "partly", "warn", "refuse", "damaged", "missing"]
STATES: tuple[State, ...] = ("observed", "partly", "warn", "refuse", "damaged", "missing")
NOTHING = "(nothing)"
SCHEMA_VERSION = 1
# Records that are written about in one note.
_MOST_NAMED = 5

# Networks by what trains and asks them.
_BACKBONES: Mapping[str, Mapping[str, Any]] = {"fusion": BACKBONES, "outline": SEGMENTERS}


@dataclass(frozen=True)
class RecordRow:
    """One record of a completeness table.

    Attributes:
        record_id: Id of the record.
        patient_id: Whose it is.
        split: The patient's split; None without one, and for a patient directory.
        labelled: Whether the target is known.
        states: State of every modality, in canonical order. `observed`, `partly` (blank cells) and
            `warn` (by the quality gate) can be used; `refuse` (by the gate) and `damaged` (it
            cannot be read) cannot; `missing` is not there.
    """

    record_id: str
    patient_id: str
    split: str | None
    labelled: bool
    states: Mapping[str, State]


@dataclass(frozen=True)
class CheckReport:
    """What was checked and what was found.

    Attributes:
        path: What was checked.
        kind: What it was taken for.
        problems: Everything wrong with it.
        exit_code: What the command returns: 0, or that of the first sort of problem.
        patterns: For a cohort or patient, observed modalities joined by commas and the number of
            records that have just these, most frequent first; of records that can be read.
        observed: For a cohort or patient, the number of such records that have each modality.
        unused: For a cohort or patient, files and folders that no modality looks at, by their path
            in the patient directory, and the number of records that have one.
        notes: What is worth a look and no error: warnings of the quality gate, records without
            label, scans that are there twice.
        rows: For a cohort or patient, every record.
        about: Facts, by name: of a bundle what it is, of a recipe what it asks for.
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
    notes: tuple[Problem, ...] = ()
    rows: tuple[RecordRow, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)
    admitted: tuple[str, ...] | None = None
    reproduced: bool | None = None

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """Per split of a cohort: records, patients, labelled records, and states by modality."""
        found: dict[str, dict[str, Any]] = {}
        for split in (*SPLITS, None):
            rows = [row for row in self.rows if row.split == split]
            if rows and self.kind == "cohort":
                found[split or "none"] = {
                    "records": len(rows),
                    "patients": len({row.patient_id for row in rows}),
                    "labelled": sum(row.labelled for row in rows),
                    "modalities": {
                        name: {s: n for s in STATES if (n := _count_state(rows, name, s))}
                        for name in rows[0].states
                    },
                }
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary (`docs/reference/check.md`)."""
        replayed = {
            "admitted": None if self.admitted is None else list(self.admitted),
            "reproduced": self.reproduced,
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "path": str(self.path),
            "kind": self.kind,
            "exit_code": self.exit_code,
            "problems": [asdict(problem) for problem in self.problems],
            "notes": [asdict(note) for note in self.notes],
            "patterns": dict(self.patterns),
            "observed": dict(self.observed),
            "unused": dict(self.unused),
            "splits": self.splits,
            "records": [asdict(row) for row in self.rows],
            "about": dict(self.about),
            **(replayed if self.kind == "prediction" else {}),
        }


def _count_state(rows: Iterable[RecordRow], name: str, state: State) -> int:
    return sum(row.states[name] == state for row in rows)


def check(
    path: Path,
    against: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Validate a cohort, a patient directory, a recipe or a bundle; audit a prediction.

    A folder with `configs/metadata.json` is a bundle, one with `cohort.yaml` a cohort, one with
    `prediction.json` a prediction, any other folder a patient directory. A YAML file is a recipe
    if it names an imputer or backbone, and a cohort description if it has modalities. Of a cohort
    every record's files are read, as far as its description makes sense, even if it has faults.

    Args:
        path: What to check.
        against: For a patient directory, the bundle or cohort it is meant for; for a cohort, a
            bundle that shall answer for it; for a recipe, the cohort it shall be trained on.
        progress: Called after every record with how many are done and how many there are.

    Raises:
        ConfigError: If `path` is none of these, or `against` is needed and absent or wrong.
        BundleError: If `against` is a bundle that cannot be loaded.
    """
    kind = _kind(path)
    if kind == "patient directory":
        return _check_patient(path, against)
    if against is not None and kind in ("bundle", "prediction"):
        raise ConfigError(
            Problem(
                "--against",
                f"a {kind} is checked on its own",
                expected="a patient directory, cohort or recipe as PATH",
                remedy="Leave it out",
            )
        )
    try:
        if kind == "bundle":
            return CheckReport(path, kind, about=_about(_load(path)))
        if kind == "recipe":
            return _check_recipe(path, against)
        if kind == "cohort":
            return _check_cohort(path, against, progress)
        return _check_prediction(path)
    except (ConfigError, BundleError) as error:
        return CheckReport(path, kind, error.problems, error.exit_code)


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


# --- Predictions, bundles, recipes ----------------------------------------------------------------


def _check_prediction(path: Path) -> CheckReport:
    """Audit the folder of a prediction."""
    if is_segmentation(path / "prediction.json"):
        wrong = (*audit_segmentation(path), *audit_pages(path))
        code = PatientDataError.exit_code if wrong else 0
        return CheckReport(path, "prediction", wrong, code)
    found = audit(path)
    return CheckReport(
        path,
        "prediction",
        found.problems,
        PatientDataError.exit_code if found.problems else 0,
        admitted=found.admitted,
        reproduced=found.reproduced,
    )


def _load(path: Path) -> ModelBundle | SegmentationBundle:
    """Load a bundle of any task.

    Raises:
        BundleError: If it is damaged.
    """
    if task_of(path) == "segmentation":
        return load_segmentation_bundle(path, device="cpu")
    return load_bundle(path, device="cpu")


def _about(bundle: ModelBundle | SegmentationBundle) -> dict[str, str]:
    """Return what a bundle is, and with which versions it was made where they differ from here."""
    if isinstance(bundle, SegmentationBundle):
        trust = bundle.trust
        parts = {"backbone": str(bundle.backbone_entry["name"])}
        if trust is not None:
            parts["imputer"] = str(trust.imputer_entry["name"])
            parts["selector"] = trust.choice.name
    else:
        parts = {
            "imputer": str(bundle.imputer_entry["name"]),
            "backbone": str(bundle.backbone_entry["name"]),
            "selector": bundle.choice.name,
            **_plain(bundle),
        }
    known = list(bundle.norms.ranges) if bundle.norms is not None else []
    parts["quality gate"] = (
        f"compares {', '.join(known)} with those of training records"
        if known
        else "knows no training records"
    )
    provenance = bundle.provenance
    made, here = dict(provenance["versions"]), {"dymo_med": __version__}
    here |= {name: metadata.version(name) for name in made if name != "dymo_med"}
    differing = [f"{n} {v} (here {here[n]})" for n, v in made.items() if here[n] != v]
    return {
        "name": bundle.name,
        "id": bundle.bundle_id,
        "task": bundle.task.in_full,
        "modalities": ", ".join(f"{s.name} ({s.kind})" for s in bundle.specs),
        "trained on": f"{provenance['cohort']}, "
        + ", ".join(f"{len(p)} patients in {s}" for s, p in provenance["patients"].items()),
        **parts,
        "versions": "as installed here" if not differing else "made with " + ", ".join(differing),
    }


def _plain(bundle: ModelBundle) -> dict[str, str]:
    """Return what part a reference has in a bundle's answers, and which modalities they use."""
    parts = {}
    if bundle.references is not None:
        parts["references"] = f"{', '.join(bundle.references.fitted)}. {bundle.references.why}"
    if bundle.use is not None:
        verdicts: dict[str, list[str]] = {}
        for row in bundle.use.rows:
            verdicts.setdefault(row.verdict, []).append(row.part)
        parts["use of modalities"] = "; ".join(f"{v}: {', '.join(n)}" for v, n in verdicts.items())
    return parts


def _check_recipe(path: Path, against: Path | None) -> CheckReport:
    """Check a recipe, and whether its imputer and backbone can be made for a cohort.

    Raises:
        ConfigError: If either is wrong by itself.
    """
    plan = read_recipe(path)
    about = {"name": plan.name, "backbone": plan.backbone.name}
    if plan.imputer is not None:
        about["imputer"] = plan.imputer.name
    if plan.selector is not None:
        about["selector"] = plan.selector.name
    if against is None:
        return CheckReport(path, "recipe", about=about)
    cohort = read_cohort(against)
    about["for"] = f"cohort {cohort.name}: " + ", ".join(
        f"{s.name} ({s.kind})" for s in cohort.specs
    )
    problems: list[Problem] = []
    fitting = _BACKBONES[cohort.task.pipeline]
    if plan.backbone.name not in fitting:
        problems.append(
            Problem(
                str(path),
                f"backbone {plan.backbone.name} does not fit cohort {cohort.name}",
                expected=f"a backbone for a {cohort.task.type}",
                remedy="Choose another backbone, or another cohort",
            )
        )
    if plan.imputer is not None:
        problems += _makes(path, "imputer", lambda: _new_imputer(plan.imputer, cohort))
    elif fitting is BACKBONES:
        problems.append(
            Problem(
                str(path),
                "the recipe names no imputer",
                expected=f"an imputer for a {cohort.task.type}",
                remedy=f"Name one: {', '.join(IMPUTERS)}",
            )
        )
    if fitting is BACKBONES and plan.backbone.name in BACKBONES:
        entry = BACKBONES[plan.backbone.name]
        problems += _makes(
            path,
            "backbone",
            lambda: entry(
                cohort.specs, len(cohort.task.classes), entry.Options(**plan.backbone.options)
            ),
        )
    problems += _untrainable(cohort)
    code = ConfigError.exit_code if problems else 0
    return CheckReport(path, "recipe", tuple(problems), code, about=about)


def _new_imputer(entry: Any, cohort: Cohort) -> None:
    """Make an imputer for a cohort, and see whether it can recover anything.

    Raises:
        ConfigError: If it cannot.
    """
    made = IMPUTERS[entry.name]
    imputer = made(cohort.specs, made.Options(**entry.options))
    # What some can recover is known only once they have seen training records.
    with suppress(RuntimeError):
        require_recovery(imputer, entry.name)


def _makes(path: Path, what: str, make: Callable[[], object]) -> tuple[Problem, ...]:
    """Return why a part of a recipe cannot be made."""
    try:
        make()
    except DymoMedError as error:
        return error.problems
    except (ValueError, RuntimeError) as error:
        return (
            Problem(
                f"{path} {what}",
                "it cannot be made for this cohort's modalities",
                got=str(error)[:300],
                remedy="Change its options, or the modalities' size",
            ),
        )
    return ()


def _untrainable(cohort: Cohort) -> list[Problem]:
    """Return what `train` would miss in a split."""
    found = (cohort.task.shortage(split, cohort.in_split(split)) for split in SPLITS[:3])
    return [replace(p, where=f"Cohort {cohort.name}") for p in found if p is not None]


# --- Patients and cohorts -------------------------------------------------------------------------


def _check_cohort(
    path: Path, against: Path | None, progress: Callable[[int, int], None] | None
) -> CheckReport:
    """Read every record of a cohort.

    Raises:
        ConfigError: If its description is too wrong to look for records.
        BundleError: If `against` cannot be loaded or is about something else.
    """
    cohort, described = survey_cohort(path)
    specs, norms = cohort.specs, Norms(limits=cohort.quality)
    if against is not None:
        bundle = _bundle(against)
        specs, norms = matched_specs(bundle, cohort), bundle.norms or norms
    problems, notes = list(described), []
    looked_at = [*(spec.file for spec in cohort.specs), *cohort.task.files]
    rows, files = [], _Files(looked_at)
    warned: dict[tuple[str, str], list[str]] = defaultdict(list)
    said: dict[tuple[str, str], list[str]] = defaultdict(list)
    seen = Survey(replace(cohort, specs=specs))
    readable: list[RecordRow] = []
    bug = False
    for done, entry in enumerate(cohort.records, start=1):
        if entry.folder.is_dir():
            files.unused.update(unused_files(entry.folder, files.files))
            try:
                found = examine_record(entry, specs, cohort.missing_values, norms=norms)
                masked = False
                if not found.problems:
                    record = with_mask(found.record, entry.folder, cohort)
                    masked = record.mask is not None
            except PatientDataError as error:
                problems.extend(error.problems)
            except Exception as error:  # one record must not end the survey of all
                if isinstance(error, ConfigError | BundleError):
                    raise
                problems.append(unexpected(f"Patient {entry.record_id}", error))
                bug = True
            else:
                problems.extend(_wrong(found))
                row = _row(found, specs, cohort, entry)
                if cohort.task.files:  # the mask is the target, not a row of a table
                    row = replace(row, labelled=masked)
                rows.append(row)
                seen.add(found.record)
                for name, value in found.record.modalities.items():
                    for warning in value.warnings if value.observed_fields is not None else ():
                        said[name, warning].append(entry.record_id)
                if not found.problems:
                    readable.append(row)
                files.add(entry, found)
                for name, result in found.results.items():
                    for finding in result.findings:
                        if finding.level == "warn":
                            warned[name, finding.check].append(entry.record_id)
        if progress is not None:
            progress(done, len(cohort.records))
    notes += [
        Problem(
            f"Cohort {cohort.name}: {name}",
            f"the quality gate warns: {CHECKS[finding_check]}",
            got=_some(ids),
        )
        for (name, finding_check), ids in warned.items()
    ]
    notes += [
        Problem(f"Cohort {cohort.name}: {name}", warning.rstrip("."), got=_some(ids))
        for (name, warning), ids in said.items()
    ]
    notes += seen.notes()
    notes += _loose_ends(cohort, path, [row.record_id for row in rows if not row.labelled])
    notes += _strangers_of_tables(cohort)
    notes += files.notes(cohort)
    exit_code = 0
    if problems:
        exit_code = ConfigError.exit_code if described else PatientDataError.exit_code
    return CheckReport(
        path,
        "cohort",
        tuple(dict.fromkeys(problems)),  # a shared table's fault is every record's
        1 if bug else exit_code,
        _patterns(readable),
        _observed(readable, specs),
        dict(files.unused.most_common()),
        tuple(notes),
        tuple(rows),
    )


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
    norms: Norms | None
    if _kind(against) == "bundle":
        bundle = _load(against)
        specs, missing_values = bundle.specs, bundle.missing_values
        norms = bundle.norms
    else:
        cohort = read_cohort(against)
        specs, missing_values = cohort.specs, cohort.missing_values
        norms = Norms(limits=cohort.quality)
    kind: Kind = "patient directory"
    try:
        found = examine(path, specs, missing_values=missing_values, norms=norms)
    except PatientDataError as error:
        return CheckReport(path, kind, error.problems, error.exit_code)
    row = _row(found, specs)
    problems = list(_wrong(found))
    if not found.results and not problems:
        problems.append(
            Problem(
                f"Patient {found.record.record_id}",
                "nothing was observed, so there is nothing to predict from",
                expected=f"at least one of {', '.join(dict.fromkeys(s.file for s in specs))}",
                remedy="Check that this is the patient's folder and how its files are named",
            )
        )
    notes = [
        Problem(
            f"Patient {found.record.record_id}: {name}",
            f"the quality gate warns: {CHECKS[finding.check]}",
            expected=finding.expected,
            got=finding.got,
        )
        for name, result in found.results.items()
        for finding in result.findings
        if finding.level == "warn"
    ]
    notes += [
        Problem(f"Patient {found.record.record_id}: {name}", warning.rstrip("."))
        for name, value in found.record.modalities.items()
        for warning in value.warnings
    ]
    whole = [] if found.problems else [row]
    return CheckReport(
        path,
        kind,
        tuple(problems),
        PatientDataError.exit_code if problems else 0,
        _patterns(whole),
        _observed(whole, specs) if whole else {},
        dict.fromkeys(unused_files(path, [spec.file for spec in specs]), 1),
        tuple(notes),
        (row,),
    )


def _bundle(path: Path) -> ModelBundle | SegmentationBundle:
    """Load the bundle that a cohort is checked against.

    Raises:
        ConfigError: If it is something else.
    """
    if _kind(path) != "bundle":
        raise ConfigError(
            Problem(
                "--against",
                "a cohort is checked against a bundle",
                expected="a bundle's folder",
                got=f"a {_kind(path)}",
                remedy="Name the bundle that the cohort is for",
            )
        )
    return _load(path)


def _wrong(found: Intake) -> tuple[Problem, ...]:
    """Return everything that keeps a record from being used as it is."""
    return (*found.problems, *(p for problems in found.refusals.values() for p in problems))


def _row(
    found: Intake,
    specs: Sequence[ModalitySpec],
    cohort: Cohort | None = None,
    entry: CohortRecord | None = None,
) -> RecordRow:
    """Return a record's row of the completeness table."""
    states: dict[str, State] = {}
    for spec in specs:
        result = found.results.get(spec.name)
        value = found.record.modalities.get(spec.name)
        fields = None if value is None else value.observed_fields
        states[spec.name] = (
            "damaged"
            if spec.name in found.damaged
            else "missing"
            if result is None
            else "refuse"
            if result.state == "refuse"
            else "warn"
            if result.state == "warn"
            else "partly"
            if fields is not None and not bool(fields.all())
            else "observed"
        )
    record = found.record
    return RecordRow(
        record.record_id,
        record.patient_id,
        None if cohort is None else cohort.splits.get(record.patient_id),
        entry is not None and cohort is not None and cohort.task.known(entry),
        states,
    )


def _patterns(rows: Sequence[RecordRow]) -> dict[str, int]:
    """Return how many records have which modalities, most frequent first."""
    return dict(
        Counter(
            ", ".join(n for n, state in row.states.items() if _there(state)) or NOTHING
            for row in rows
        ).most_common()
    )


def _observed(rows: Sequence[RecordRow], specs: Sequence[ModalitySpec]) -> dict[str, int]:
    return {s.name: sum(_there(row.states[s.name]) for row in rows) for s in specs}


def _there(state: State) -> bool:
    return state in ("observed", "partly", "warn")


class _Files:
    """What the folders of a cohort hold besides what is used, and which scans occur twice."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files
        self.unused: Counter[str] = Counter()
        self.scans: dict[str, list[tuple[str, str]]] = defaultdict(list)

    def add(self, entry: CohortRecord, found: Intake) -> None:
        """Take note of one record's files."""
        for name, value in found.record.modalities.items():
            if value.native is not None:
                self.scans[value.source.sha256].append((entry.record_id, name))

    def notes(self, cohort: Cohort) -> list[Problem]:
        """Return what is worth a look."""
        where = f"Cohort {cohort.name}"
        twice = [
            "the same bytes as " + " and ".join(f"{name} of {record}" for record, name in places)
            for places in self.scans.values()
            if len(places) > 1
        ]
        notes = []
        if twice:
            notes.append(
                Problem(
                    where,
                    "scans that are there more than once",
                    got=_some([text.removeprefix("the same bytes as ") for text in twice], "; "),
                    remedy="Check whose they are; in two splits they flatter every figure",
                )
            )
        return notes


def _strangers_of_tables(cohort: Cohort) -> list[Problem]:
    """Return rows of shared tables whose ids match no record."""
    notes = []
    for spec in cohort.specs:
        rules = spec.rules
        if rules is None or not rules.shared:
            continue
        whose = [Whose(entry.record_id, entry.patient_id, entry.root) for entry in cohort.records]
        strangers = ids_of_nobody(cohort.root / rules.shared, rules, whose)
        if strangers:
            notes.append(
                Problem(
                    f"Cohort {cohort.name}: {rules.shared}",
                    "rows that belong to no record",
                    got=_some(strangers),
                    remedy="Compare how ids are written there and in the labels",
                )
            )
    return list(dict.fromkeys(notes))


def _loose_ends(cohort: Cohort, path: Path, without: Sequence[str]) -> list[Problem]:
    """Return records without label, and patients and folders without record.

    Args:
        cohort: The cohort.
        path: Its folder or description.
        without: Records that could be read and have no label or mask.
    """
    where = f"Cohort {cohort.name}"
    notes = []
    if cohort.task.files and without:
        notes.append(
            Problem(
                where,
                "records without mask: they are not learned from and not evaluated",
                expected=", ".join(cohort.task.files),
                got=_some(without),
            )
        )
    if cohort.task.columns:
        unlabelled = [r.record_id for r in cohort.records if not cohort.task.known(r)]
        if unlabelled:
            notes.append(
                Problem(
                    where,
                    "records without label: they train the imputer and are not evaluated",
                    got=_some(unlabelled),
                )
            )
    known = {record.patient_id for record in cohort.records}
    strangers = [patient for patient in cohort.splits if patient not in known]
    if strangers:
        notes.append(
            Problem(
                where,
                "patients with a split and no record",
                got=_some(strangers),
                remedy="Add their rows to the labels, or take them out of the splits",
            )
        )
    listed = _unlisted(cohort, path)
    if listed:
        notes.append(
            Problem(
                where,
                "folders of patients that the labels do not list",
                got=_some(listed),
                remedy="Add their rows, or move the folders away",
            )
        )
    problems = _untrainable(cohort)
    return [*notes, *problems]


def _unlisted(cohort: Cohort, path: Path) -> list[str]:
    """Return folders of patients, or of sessions of a BIDS dataset, that are no record."""
    folders = {record.folder for record in cohort.records}
    if folders and all(bids.SUBJECT.fullmatch(_first(f, cohort.root)) for f in folders):
        # Of a BIDS dataset (1.10, Common principles) sub-LABEL alone is a subject.
        subjects = {cohort.root / _first(folder, cohort.root) for folder in folders}
        unlisted = [
            p.name
            for p in cohort.root.iterdir()
            if p.is_dir() and bids.SUBJECT.fullmatch(p.name) and p not in subjects
        ]
        unlisted += [
            f"{subject.name}/{session.name}"
            for subject in subjects
            if subject.is_dir()
            for session in bids.sessions(subject)
            if session != subject and session not in folders
        ]
        return sorted(unlisted)
    roots = {folder.parent for folder in folders if folder.parent.is_dir()}
    if roots == {path}:
        return []
    return sorted(
        p.name
        for root in roots
        for p in root.iterdir()
        if p.is_dir() and p not in folders and not p.name.startswith(".")
    )


def _first(folder: Path, root: Path) -> str:
    """Return the first part of a folder's path below the cohort's."""
    return folder.relative_to(root).parts[0] if folder != root else ""


def _some(names: Sequence[str], between: str = ", ") -> str:
    """Return the first of some names, and how many there are."""
    shown = between.join(names[:_MOST_NAMED])
    left = len(names) - _MOST_NAMED
    return f"{len(names)}: {shown}" + (f" and {left} more" if left > 0 else "")
