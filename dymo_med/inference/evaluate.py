"""A cohort under missing-data scenarios, every method side by side.

Records are read once and in batches; each finished batch is kept in `OUT/.progress`, so that an
interrupted evaluation goes on where it stopped and gives the same files. One bad patient costs a
row in `failures.csv`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dymo_med.bundle import ModelBundle, hashed_id
from dymo_med.data.missingness import Scenario, apply, parse_scenario
from dymo_med.data.patient import read_record
from dymo_med.errors import BundleError, ConfigError, PatientDataError, Problem
from dymo_med.files import write_csv, write_json
from dymo_med.inference import quality
from dymo_med.inference.cohort_page import write_pages
from dymo_med.inference.predict import (
    STEP_COLUMNS,
    Answers,
    answer,
    assemble,
    exhibits_of,
    explain_record,
    selection_steps,
    versions,
)
from dymo_med.inference.report import write_report
from dymo_med.metrics import Floats, bootstrap
from dymo_med.registry import nearest
from dymo_med.types import SPLITS, Cohort, CohortRecord, ModalitySpec, PatientRecord, Split

ORACLE = "oracle"
_PROGRESS = ".progress"
_FAILURE_COLUMNS = ("record_id", "scenario", "stage", "message")
_METRIC_COLUMNS = (
    "scenario",
    "method",
    "metric",
    "value",
    "low",
    "high",
    "p",
    "records",
    "patients",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class EvaluateResult:
    """What an evaluation came to.

    Attributes:
        out: Folder of its files.
        records: Labelled records in the split.
        failures: Records that could not be answered in every scenario.
        metrics: Rows of `metrics.csv`.
    """

    out: Path
    records: int
    failures: int
    metrics: tuple[Row, ...]


def evaluate(
    bundle: ModelBundle,
    cohort: Cohort,
    out: Path,
    *,
    split: str = "test",
    scenarios: Sequence[str] = ("as-is",),
    seed: int = 0,
    resume: bool = False,
    reports: bool | int = True,
    batch_size: int = 16,
    methods: Sequence[str] = (),
    draws: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluateResult:
    """Evaluate a bundle on the labelled records of one split.

    Methods: `observed_only`, `trust_all`, `dymo` and the bundle's default selector, from one
    recovery and one encoding; in scenarios that hide something also `oracle`: observed-only on
    everything the record really has, for all records of that scenario, so that methods are
    compared on the same ones, and how good the recoveries are (`inference.quality`).

    Args:
        bundle: The model.
        cohort: The cohort; its description must fit the bundle.
        out: Folder for `predictions.csv`, `selections.csv`, `metrics.csv`, `recovery.csv`,
            `recovery_summary.csv`, `failures.csv`, `run.json`, `index.html`, `plots/` and
            `reports/`.
        split: Which split.
        scenarios: Texts as in `data.missingness.parse_scenario`.
        seed: Seed of scenarios and bootstrap.
        resume: Go on with, or repeat from its batches, an evaluation in `out`.
        reports: Whether to write a report per patient (first scenario), or for how many.
        batch_size: Records at once.
        methods: Selectors to compare besides those above.
        draws: Draws of a probabilistic imputer, to see whether their spread is right: 0 = none,
            or at least 19.
        progress: Called with (done, total) records, scenarios counted separately.

    Returns:
        Counts and metrics.

    Raises:
        ConfigError: If the split, a scenario, the number of draws or `out` is wrong.
        BundleError: If the bundle is for another task or other modalities.
    """
    start = time.perf_counter()
    specs = _specs(bundle, cohort)
    rules = tuple(dict.fromkeys(parse_scenario(text, specs) for text in scenarios))
    records = _labelled(cohort, split)
    for name in methods:
        bundle.with_selector(name)  # an unknown one is refused before anything is written
    quality.check_draws(draws)
    run = _Run(
        bundle,
        cohort,
        split,
        specs,
        seed,
        int(reports) if reports is not True else None,
        methods,
        draws,
    )
    known = {
        "bundle": bundle.bundle_id,
        "cohort": cohort.name,
        "split": split,
        "seed": seed,
        "batch_size": batch_size,
        "reports": int(reports) if reports is not True else None,
        "first_scenario": rules[0].text,
        "selectors": [bundle.choice.name, *methods],
        "draws": draws,
        "records, label or patient": _digest(records),
    }
    _open(out, known, resume)
    parts: dict[Scenario, list[Row]] = {rule: [] for rule in rules}
    done, total = 0, len(records) * len(rules)
    for number, first in enumerate(range(0, len(records), batch_size)):
        chunk = records[first : first + batch_size]
        files = {rule: out / _PROGRESS / _file_name(rule, number) for rule in rules}
        if not all(file.is_file() for file in files.values()):
            read, unreadable = _read(chunk, specs, cohort.missing_values)
            for rule, file in files.items():
                if not file.is_file():
                    folder = out / "reports" if rule is rules[0] else None
                    part = run.batch(rule, read, folder, first)
                    part["failures"] += unreadable
                    write_json(file, part)
        for rule, file in files.items():
            parts[rule].append(json.loads(file.read_text(encoding="utf-8")))
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    kinds = ("predictions", "selections", "failures", "recovery", "pictures")
    predictions, selections, failures, recovered, pictures = (
        [row for rule in rules for part in parts[rule] for row in part[kind]] for kind in kinds
    )
    # A record that cannot be read fails in every scenario; once is enough.
    failures = list({tuple(row.values()): row for row in failures}.values())
    metrics = _metrics(predictions, [r.text for r in rules], bundle, seed)
    columns = _prediction_columns(bundle.task.classes)
    write_csv(out / "predictions.csv", columns, predictions)
    write_csv(out / "selections.csv", ("scenario", "record_id", *STEP_COLUMNS), selections)
    write_csv(out / "metrics.csv", _METRIC_COLUMNS, metrics)
    write_csv(out / "failures.csv", _FAILURE_COLUMNS, failures)
    facts: Row = {
        "schema_version": 1,
        "command": "evaluate",
        "cohort": cohort.name,
        "split": split,
        "target": bundle.task.target,
        "classes": list(bundle.task.classes),
        "modalities": [spec.name for spec in specs],
        "scenarios": [rule.text for rule in rules],
        "methods": list(dict.fromkeys(row["method"] for row in predictions)),
        "selector": bundle.choice.name,
        "selector_why": bundle.choice.why,
        "seed": seed,
        "draws": draws,
        "batch_size": batch_size,
        "records": len(records),
        "patients": len({r.patient_id for r in records}),
        "unlabelled_records": len(cohort.in_split(_split(split))) - len(records),
        "failed_records": len({row["record_id"] for row in failures}),
        "patients_seen_in_training": _seen(bundle, records),
        "bundle": {"name": bundle.name, "version": bundle.version, "id": bundle.bundle_id},
        "device": str(bundle.device),
        "versions": versions(),
    }
    recovery = quality.write(out, recovered, pictures, facts["scenarios"], specs, seed)
    write_pages(out, facts, predictions, metrics, failures, recovery)
    write_json(out / "run.json", {**facts, "seconds": round(time.perf_counter() - start, 1)})
    return EvaluateResult(out, len(records), facts["failed_records"], tuple(metrics))


@dataclass(frozen=True)
class _Run:
    """What stays the same from batch to batch.

    Attributes:
        bundle: The model.
        cohort: The cohort.
        split: Which split.
        specs: The bundle's modalities, with the cohort's file names.
        seed: Of scenarios.
        reports: How many records get a report; None = all.
        methods: Selectors to compare besides the usual ones.
        draws: Draws of the imputer, to judge their spread.
    """

    bundle: ModelBundle
    cohort: Cohort
    split: str
    specs: tuple[ModalitySpec, ...]
    seed: int
    reports: int | None
    methods: Sequence[str]
    draws: int

    def batch(
        self,
        rule: Scenario,
        read: Sequence[tuple[int, PatientRecord]],
        reports: Path | None,
        first: int,
    ) -> dict[str, list[Row]]:
        """Return the rows of one batch under one scenario, and write its reports.

        Args:
            rule: The scenario.
            read: Position in the batch and record.
            reports: Folder for reports; None = no reports in this scenario.
            first: Position of the batch's first record in the split.
        """
        rows: dict[str, list[Row]] = {
            key: [] for key in ("predictions", "selections", "failures", "recovery", "pictures")
        }
        hidden, whole, positions = [], [], []
        for position, record in read:
            left = apply(rule, record, self.specs, self.seed)
            if left.modalities:
                hidden.append(left)
                whole.append(record)
                positions.append(first + position)
            else:
                problem = Problem(
                    f"Patient {record.record_id}",
                    "the scenario leaves nothing to predict from",
                    expected="a modality besides those that are taken away",
                    remedy="Choose another scenario",
                )
                rows["failures"].append(_failure(record.record_id, rule.text, "hide", str(problem)))
        for index, answers in self._answers(hidden, rule, rows["failures"]):
            oracle = None
            if rule.kind != "as-is":
                oracle = self._ask([whole[i] for i in index])
                measured = quality.measure(
                    self.bundle, rule.text, answers, oracle, draws=self.draws, seed=self.seed
                )
                rows["recovery"] += measured.rows
                rows["pictures"] += measured.pictures
            for row, i in enumerate(index):
                record = hidden[i]
                rows["predictions"] += self._predictions(rule, record, answers, oracle, row)
                rows["selections"] += [
                    {"scenario": rule.text, "record_id": record.record_id, **asdict(step)}
                    for step in selection_steps(answers.own, row)
                ]
                if reports is not None and (self.reports is None or positions[i] < self.reports):
                    self._report(record, answers, row, reports)
        return rows

    def _answers(
        self, records: Sequence[PatientRecord], rule: Scenario, failures: list[Row]
    ) -> Iterator[tuple[list[int], Answers]]:
        """Yield answers with the positions they are for; all at once unless somebody fails."""
        everyone = list(range(len(records)))
        try:
            if records:
                yield everyone, self._ask(records)
        except PatientDataError:
            for i in everyone:
                try:
                    alone = self._ask([records[i]])
                except PatientDataError as error:
                    failures.append(
                        _failure(records[i].record_id, rule.text, "predict", _message(error))
                    )
                else:
                    yield [i], alone

    def _ask(self, records: Sequence[PatientRecord]) -> Answers:
        return answer(self.bundle, records, seed=self.seed, methods=self.methods)

    def _predictions(
        self,
        rule: Scenario,
        record: PatientRecord,
        answers: Answers,
        oracle: Answers | None,
        row: int,
    ) -> list[Row]:
        """Return one record's rows of `predictions.csv`, one per method."""
        rows = [self._prediction(rule, record, answers, m, m, row) for m in answers.traces]
        if oracle is not None:
            rows.append(self._prediction(rule, record, oracle, "observed_only", ORACLE, row))
        return rows

    def _prediction(
        self,
        rule: Scenario,
        record: PatientRecord,
        answers: Answers,
        method: str,
        name: str,
        row: int,
    ) -> Row:
        trace, recovery = answers.traces[method], answers.recovery
        probabilities = answers.probabilities[method][row].tolist()
        classes = self.bundle.task.classes
        partly = answers.batch.partly_filled()[row].tolist()
        observed = trace.observed[row].tolist()
        label = record.label if record.label is not None else -1
        return {
            "scenario": rule.text,
            "record_id": record.record_id,
            "patient_id": record.patient_id,
            "split": self.split,
            "label": classes[label],
            "method": name,
            **{f"prob_{c}": p for c, p in zip(classes, probabilities, strict=True)},
            "predicted": classes[int(np.argmax(probabilities))],
            "observed": _joined(trace.names, trace.observed[row]),
            "trusted": _joined(trace.names, trace.admitted[row]),
            "rejected": _joined(trace.names, trace.rejected[row]),
            "absent": _joined(trace.names, ~trace.observed[row] & ~recovery.recovered[row]),
            "pattern": "+".join(
                n + "~" * blank
                for n, seen, blank in zip(trace.names, observed, partly, strict=True)
                if seen
            ),
        }

    def _report(self, record: PatientRecord, answers: Answers, row: int, folder: Path) -> None:
        """Write one patient's report."""
        explanation = explain_record(self.bundle, answers, row, seed=self.seed)
        prediction = assemble(self.bundle, record, answers, row, explanation, seed=self.seed)
        exhibits = exhibits_of(self.bundle, record, answers, row, explanation)
        path = folder / record.record_id / "report.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_report(prediction, exhibits, path)


def _joined(names: Sequence[str], available: Tensor) -> str:
    return "+".join(n for n, a in zip(names, available.tolist(), strict=True) if a)


def _message(error: PatientDataError) -> str:
    return " ".join(str(problem) for problem in error.problems)


def _failure(record_id: str, scenario: str, stage: str, message: str) -> Row:
    return {"record_id": record_id, "scenario": scenario, "stage": stage, "message": message}


def _prediction_columns(classes: Sequence[str]) -> tuple[str, ...]:
    return (
        *("scenario", "record_id", "patient_id", "split", "label", "method"),
        *(f"prob_{c}" for c in classes),
        *("predicted", "observed", "trusted", "rejected", "absent", "pattern"),
    )


def _split(name: str) -> Split:
    """Return a split's name once it is known to be one.

    Raises:
        ConfigError: If it is not.
    """
    for known in SPLITS:
        if name == known:
            return known
    raise ConfigError(
        Problem("--split", f"there is no split '{name}'", remedy=nearest(name, list(SPLITS)))
    )


def _labelled(cohort: Cohort, split: str) -> tuple[CohortRecord, ...]:
    """Return the records to evaluate.

    Raises:
        ConfigError: If there is none.
    """
    records = tuple(r for r in cohort.in_split(_split(split)) if r.label is not None)
    if not records:
        raise ConfigError(
            Problem(
                f"cohort {cohort.name}",
                f"split '{split}' has no record whose {cohort.task.target} is known",
                remedy="Choose another split, or add labels",
            )
        )
    return records


def _specs(bundle: ModelBundle, cohort: Cohort) -> tuple[ModalitySpec, ...]:
    """Return the bundle's modalities with the cohort's file names.

    Raises:
        BundleError: If the cohort is about something else; every difference at once.
    """
    theirs = {spec.name: spec for spec in cohort.specs}
    where = f"bundle {bundle.name}, cohort {cohort.name}"
    problems = []
    if cohort.task.classes != bundle.task.classes:
        problems.append(
            Problem(
                where,
                "the classes differ",
                expected=", ".join(bundle.task.classes),
                got=", ".join(cohort.task.classes),
            )
        )
    for spec in bundle.specs:
        other = theirs.get(spec.name)
        if other is None:
            problems.append(Problem(where, f"the cohort does not describe modality '{spec.name}'"))
        elif _form(other) != _form(spec):
            problems.append(
                Problem(
                    where,
                    f"modality '{spec.name}' is described differently",
                    expected=_form_text(spec),
                    got=_form_text(other),
                )
            )
    if problems:
        raise BundleError(*problems)
    return tuple(replace(spec, file=theirs[spec.name].file) for spec in bundle.specs)


def _form(spec: ModalitySpec) -> tuple[object, ...]:
    """Return what a network depends on."""
    columns = tuple((c.name, c.type, c.unit, c.values) for c in spec.columns)
    return spec.kind, spec.shape, spec.spacing_mm, spec.intensity, columns


def _form_text(spec: ModalitySpec) -> str:
    shape = " x ".join(str(n) for n in spec.shape)
    columns = ", ".join(c.name for c in spec.columns)
    detail = columns or f"spacing {spec.spacing_mm} mm, intensity {spec.intensity}"
    return f"{spec.kind} {shape} ({detail})"


def _seen(bundle: ModelBundle, records: Sequence[CohortRecord]) -> int:
    """Return how many of the patients the bundle was fitted on."""
    fitted = {patient for ids in bundle.provenance.get("patients", {}).values() for patient in ids}
    return len({r.patient_id for r in records if hashed_id(bundle.name, r.patient_id) in fitted})


def _open(out: Path, known: Row, resume: bool) -> None:
    """Prepare the folder: a new one, or one that may be gone on with.

    Raises:
        ConfigError: If it holds something else, or an evaluation with other settings.
    """
    marker = out / _PROGRESS / "settings.json"
    if out.exists() and not out.is_dir():
        raise ConfigError(Problem(str(out), "is a file", remedy="Name a folder with --out"))
    if out.is_dir() and any(out.iterdir()):
        if not resume:
            remedy = "Go on with it by --resume, or name another folder with --out"
            raise ConfigError(Problem(str(out), "is not empty", remedy=remedy))
        if not marker.is_file():
            raise ConfigError(
                Problem(
                    str(out),
                    "holds no evaluation to go on with",
                    remedy="Name another folder with --out",
                )
            )
        earlier = json.loads(marker.read_text(encoding="utf-8"))
        differing = [key for key in known if earlier.get(key) != known[key]]
        if differing:
            raise ConfigError(
                Problem(
                    str(out),
                    f"holds an evaluation with another {', '.join(differing)}",
                    remedy="Repeat its settings, or name another folder with --out",
                )
            )
        return
    marker.parent.mkdir(parents=True)
    write_json(marker, known)


def _digest(records: Sequence[CohortRecord]) -> str:
    """Return a hash of what finished batches say of their records besides the answers."""
    rows = [(r.record_id, r.patient_id, r.label) for r in records]
    return sha256(json.dumps(rows).encode()).hexdigest()


def _file_name(rule: Scenario, number: int) -> str:
    """Return the progress file of a batch; the text may hold what file names must not."""
    digest = sha256(rule.text.encode()).hexdigest()[:8]
    return f"{rule.kind}-{digest}-{number:05d}.json"


def _read(
    chunk: Sequence[CohortRecord], specs: Sequence[ModalitySpec], missing_values: Sequence[str]
) -> tuple[list[tuple[int, PatientRecord]], list[Row]]:
    """Return the records that can be read with their positions, and the failures."""
    read, failures = [], []
    for position, entry in enumerate(chunk):
        try:
            record = read_record(entry, specs, missing_values)
        except PatientDataError as error:
            failures.append(_failure(entry.record_id, "all", "read", _message(error)))
        else:
            read.append((position, record))
    return read, failures


def _metrics(
    predictions: Sequence[Row], scenarios: Sequence[str], bundle: ModelBundle, seed: int
) -> list[Row]:
    """Return the rows of `metrics.csv`: methods, then differences, per scenario."""
    classes = bundle.task.classes
    own = bundle.choice.name
    rows: list[Row] = []
    for scenario in scenarios:
        methods: dict[str, list[Row]] = {}
        for row in predictions:
            if row["scenario"] == scenario:
                methods.setdefault(row["method"], []).append(row)
        if not methods:
            continue
        first = methods[own]
        patients = [row["patient_id"] for row in first]
        probabilities: Mapping[str, Floats] = {
            method: np.array([[row[f"prob_{c}"] for c in classes] for row in part])
            for method, part in methods.items()
        }
        estimates = bootstrap(
            [classes.index(row["label"]) for row in first],
            probabilities,
            patients,
            pairs=[(own, other) for other in methods if other not in (own, ORACLE)],
            seed=seed,
        )
        rows += [
            {
                "scenario": scenario,
                "method": method,
                "metric": metric,
                **asdict(estimate),
                "records": len(first),
                "patients": len(set(patients)),
            }
            for method, by_metric in estimates.items()
            for metric, estimate in by_metric.items()
        ]
    return rows
