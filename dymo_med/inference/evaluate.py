"""A cohort under missing-data scenarios, every method side by side.

Records are read ahead in the background and answered in batches; each finished batch is kept in
`OUT/.progress`, so that an interrupted evaluation goes on where it stopped and gives the same
files, and several processes can share one by taking different batches. What is kept of a finished
batch is numbers, so memory does not grow with scans. One bad patient costs a row in
`failures.csv`.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dymo_med import __version__
from dymo_med.bundle import ModelBundle, hashed_id
from dymo_med.bundle_segmentation import SegmentationBundle
from dymo_med.data.cohort import level
from dymo_med.data.missingness import (
    HIDDEN_COLUMNS,
    Scenario,
    apply,
    expanded,
    hidden,
    hidden_share,
    parse_scenario,
    planned,
)
from dymo_med.data.patient import Intake, examine_record, usable
from dymo_med.errors import BundleError, ConfigError, PatientDataError, Problem
from dymo_med.files import (
    csv_stream,
    naming,
    read_json,
    remove_abandoned,
    write_csv,
    write_json,
)
from dymo_med.inference import quality
from dymo_med.inference.cohort_page import write_pages
from dymo_med.inference.compare import comparator_probabilities
from dymo_med.inference.failures import ALL, Failures, concerns_all
from dymo_med.inference.failures import COLUMNS as FAILURE_COLUMNS
from dymo_med.inference.number_page import write_number_page
from dymo_med.inference.predict import (
    COMPARED,
    STEP_COLUMNS,
    Answers,
    answer,
    assemble,
    explain_record,
    prediction_file,
    selection_steps,
    value_of,
    versions,
    write_prediction,
)
from dymo_med.inference.scores import (
    METRIC_COLUMNS,
    ORACLE,
    PATTERN_COLUMNS,
    SUBGROUP_COLUMNS,
    Collector,
    Row,
    by_pattern,
    by_subgroup,
    metrics,
)
from dymo_med.registry import nearest
from dymo_med.types import (
    SPLITS,
    Cohort,
    CohortRecord,
    ModalitySpec,
    Norms,
    PatientRecord,
    Scale,
    Split,
)

PROGRESS = ".progress"
_ANOTHER = "Choose a bundle that was trained for this cohort, or correct cohort.yaml"
_QUALITY_COLUMNS = ("record_id", "modality", "state", "check", "got", "expected")
_NO_INTERVAL = {"value_low": None, "value_high": None}  # of methods other than the bundle's own
_AHEAD = 2  # batches that are read while one is answered


@dataclass(frozen=True)
class EvaluateResult:
    """What an evaluation came to.

    Attributes:
        out: Folder of its files.
        records: Labelled records in the split.
        failures: Records that could not be answered in every scenario.
        unexpected: Of these, records that met a bug, or too little memory.
        metrics: Rows of `metrics.csv`; empty while parts are open.
        open_batches: Batches that other parts still have to do; 0 = everything is written.
        notes: Where scenarios hide another share than they are asked for.
    """

    out: Path
    records: int
    failures: int
    metrics: tuple[Row, ...]
    open_batches: int = 0
    notes: tuple[str, ...] = ()
    unexpected: int = 0


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
    allow_overlap: bool = False,
    identify: bool = False,
    treat_refused_as_missing: bool = False,
    against: Sequence[ModelBundle] = (),
    num_parts: int = 1,
    part_id: int = 0,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> EvaluateResult:
    """Evaluate a bundle on the labelled records of one split.

    Methods: `observed_only`, `trust_all`, `dymo` and the bundle's default selector, from one
    recovery and one encoding; the bundle's comparators; in scenarios that hide something also
    `oracle`: observed-only on everything the record really has, for all records of that scenario,
    so that methods are compared on the same ones, and how good the recoveries are
    (`inference.quality`).

    Args:
        bundle: The model.
        cohort: The cohort; its description must fit the bundle.
        out: Folder for the files that `docs/reference/outputs.md` lists.
        split: Which split.
        scenarios: Texts as in `data.missingness.parse_scenario`.
        seed: Seed of scenarios and bootstrap.
        resume: Go on with, or repeat from its batches, an evaluation in `out`.
        reports: Whether to write a report per patient (first scenario), or for how many.
        batch_size: Records at once.
        methods: Selectors to compare besides those above.
        draws: Draws of a probabilistic imputer, to see whether their spread is right: 0 = none,
            or at least 19.
        allow_overlap: Evaluate although patients were used to make the bundle.
        identify: Whether reports show the identifier that headers state, instead of a pseudonym.
        treat_refused_as_missing: Answer without what the quality gate refuses; else such a record
            is a failure.
        against: Other bundles for the same cohort, whose methods are set beside this one's as
            `<bundle>:<method>`.
        num_parts: How many processes share the evaluation.
        part_id: Which of them this is, from 0. Each does every `num_parts`-th batch; whoever
            finds all batches done writes the tables (two that find it at the same moment write
            the same bytes).
        command: What was typed, for `run.json`.
        progress: Called with (done, total) records, scenarios counted separately.

    Returns:
        Counts and metrics.

    Raises:
        ConfigError: If the split, a scenario, the number of draws, a part or `out` is wrong, or
            patients were used to make the bundle and that is not allowed.
        BundleError: If the bundle, or one it is set against, is for another task or other
            modalities.
    """
    start = time.perf_counter()
    specs = matched_specs(bundle, cohort)
    rules = _rules(scenarios, specs, cohort)
    records = _labelled(cohort, split)
    ids = [record.record_id for record in records]
    rules = tuple(planned(rule, ids, specs, seed) for rule in rules)
    for name in methods:
        bundle.with_selector(name)  # an unknown one is refused before anything is written
    quality.check_draws(draws)
    check_part(part_id, num_parts)
    _distinct((bundle, *against))
    for other in against:
        if {s.name for s in matched_specs(other, cohort)} != {s.name for s in specs}:
            raise BundleError(
                Problem(
                    f"bundle {other.name}",
                    f"it is for other modalities than bundle {bundle.name}",
                    expected=", ".join(s.name for s in specs),
                    got=", ".join(s.name for s in other.specs),
                    remedy="Compare bundles that were trained on the same cohort.yaml",
                )
            )
    seen = {one.name: patients_seen(one, records) for one in (bundle, *against)}
    if not allow_overlap:
        require_unseen(seen, cohort, split)
    # All of them, however that is put: one may be gone on with as the other.
    most_reports = None if reports is True or int(reports) >= len(records) else int(reports)
    run = _Run(
        bundle, cohort, split, specs, seed, most_reports, methods, draws, identify, tuple(against)
    )
    known = {
        "bundle": bundle.bundle_id,
        "cohort": cohort.name,
        "split": split,
        "seed": seed,
        "batch_size": batch_size,
        "reports": most_reports,
        "identify": identify,
        "first_scenario": rules[0].text + rules[0].digest,
        "selectors": [bundle.choice.name, *methods],
        "draws": draws,
        "treatment of refused modalities": treat_refused_as_missing,
        "set of bundles": [other.bundle_id for other in against],
        "version of dymo-med": __version__,
        "description of the files": described(specs, cohort),
        "records, label or patient": digest_of(records),
        "subgroups": [asdict(s) for s in cohort.subgroups],
        "subgroup of a record": sha256(
            json.dumps([dict(r.subgroups) for r in records]).encode()
        ).hexdigest(),
    }
    prepare_folder(out, known, resume, num_parts)
    chunks = [records[first : first + batch_size] for first in range(0, len(records), batch_size)]

    def open_rules(number: int) -> list[Scenario]:
        return [r for r in rules if not (out / PROGRESS / _file_name(r, number)).is_file()]

    mine = range(part_id, len(chunks), num_parts)
    todo = [n for n in mine if open_rules(n)]
    total = len(rules) * sum(len(chunks[n]) for n in mine)
    done = total - len(rules) * sum(len(chunks[n]) for n in todo)
    if progress is not None and done:
        progress(done, total)
    how = _Reading(specs, cohort.missing_values, bundle.norms, treat_refused_as_missing)
    for number, chunk in _read_ahead([(n, chunks[n]) for n in todo], how):
        still = set(open_rules(number))
        for rule in rules:
            if rule in still:
                folder = out / "reports" if rule is rules[0] else None
                part = run.batch(rule, chunk, folder, number * batch_size)
                part["quality"] = chunk.judged if rule is rules[0] else []
                write_json(out / PROGRESS / _file_name(rule, number), part)
            done += len(chunks[number])
            if progress is not None:
                progress(done, total)
    still_open = sum(bool(open_rules(n)) for n in range(len(chunks)))
    if still_open:
        return EvaluateResult(out, len(records), 0, (), still_open)
    facts: Row = {
        "schema_version": 1,
        "command": command or "evaluate",
        "cohort": cohort.name,
        "split": split,
        "target": bundle.task.target,
        "classes": list(bundle.task.classes),
        "modalities": [spec.name for spec in specs],
        "scenarios": [rule.text for rule in rules],
        "selector": bundle.choice.name,
        "selector_why": bundle.choice.why,
        "seed": seed,
        "draws": draws,
        "batch_size": batch_size,
        "records": len(records),
        "patients": len({r.patient_id for r in records}),
        "unlabelled_records": len(cohort.in_split(known_split(split))) - len(records),
        "patients_seen_in_training": max(seen.values()),
        "refused_as_missing": treat_refused_as_missing,
        "bundle": {"name": bundle.name, "version": bundle.version, "id": bundle.bundle_id},
        "against": [{"name": b.name, "version": b.version, "id": b.bundle_id} for b in against],
        "records_sha256": known["records, label or patient"],
        "device": str(bundle.device),
        "versions": versions(),
    }
    if bundle.use is not None:
        facts["use"] = [{**asdict(r), "verdict": r.verdict} for r in bundle.use.rows]
    notes = scenario_notes(rules, len(specs))
    if notes:
        facts["scenario_notes"] = list(notes)
    if bundle.task.scale is not None:
        facts["scale"] = asdict(bundle.task.scale)
    with naming(out):
        return _write(out, facts, rules, len(chunks), specs, start, bundle.task.scale)


def _write(
    out: Path,
    facts: Row,
    rules: Sequence[Scenario],
    batches: int,
    specs: Sequence[ModalitySpec],
    start: float,
    scale: Scale | None,
) -> EvaluateResult:
    """Write tables, plots and the page from the finished batches, one batch at a time."""
    (out / "run.json").unlink(missing_ok=True)  # while it is there, everything belongs together
    classes, names, seed = facts["classes"], facts["modalities"], facts["seed"]
    on_page = {*COMPARED, facts["selector"]}
    collectors = [Collector(r.text, classes, names, facts["selector"], scale) for r in rules]
    recoveries = quality.Collector(specs)
    failures: dict[tuple[object, ...], Row] = {}
    unexpected: set[str] = set()
    listed: list[Row] = []
    columns = {
        "predictions": _prediction_columns(classes, scale),
        "selections": ("scenario", "record_id", *STEP_COLUMNS),
        "hidden": HIDDEN_COLUMNS,
        "recovery": quality.COLUMNS,
        "quality": _QUALITY_COLUMNS,
    }
    lines = dict.fromkeys(columns, 0)
    with ExitStack() as stack:
        append = {
            kind: stack.enter_context(csv_stream(out / f"{kind}.csv", header))
            for kind, header in columns.items()
        }
        for rule, collector in zip(rules, collectors, strict=True):
            for number in range(batches):
                path = out / PROGRESS / _file_name(rule, number)
                part = _written(path)
                for kind in columns:
                    append[kind](part[kind])
                    lines[kind] += len(part[kind])
                collector.add(part["predictions"], part["facts"])
                recoveries.add(quality.Measured(part["recovery"], part["pictures"]))
                # A record that cannot be read fails in every scenario; once is enough.
                failures |= {tuple(row.values()): row for row in part["failures"]}
                unexpected |= set(part.get("unexpected", ()))
                if rule is rules[0]:
                    listed += [row for row in part["predictions"] if row["method"] in on_page]
    for kind in ("hidden", "recovery"):
        if not lines[kind]:  # nothing was hidden, or nothing of it recovered
            (out / f"{kind}.csv").unlink(missing_ok=True)
    scores = [collector.scores() for collector in collectors]
    table = metrics(scores, facts["patients_seen_in_training"], seed)
    patterns = list(by_pattern(scores, seed))
    subgroups = list(by_subgroup(scores, seed))
    write_csv(out / "metrics.csv", METRIC_COLUMNS, table)
    write_csv(out / "metrics_by_pattern.csv", PATTERN_COLUMNS, patterns)
    write_csv(out / "metrics_by_subgroup.csv", SUBGROUP_COLUMNS, subgroups)
    write_csv(out / "failures.csv", FAILURE_COLUMNS, list(failures.values()))
    facts = {
        **facts,
        "methods": list(dict.fromkeys(m for s in scores for m in s.probabilities)),
        "failed_records": len({row["record_id"] for row in failures.values()}),
        "unexpected_failures": len(unexpected),
    }
    recovery = recoveries.write(out, facts["scenarios"], seed)
    (write_pages if scale is None else write_number_page)(
        out,
        facts,
        scores,
        table,
        listed,
        list(failures.values()),
        patterns=patterns,
        subgroups=subgroups,
        recovery=recovery,
    )
    seconds = time.perf_counter() - start
    write_json(out / "run.json", {**facts, "seconds": round(seconds, 1)})
    notes = tuple(facts.get("scenario_notes", ()))
    return EvaluateResult(
        out,
        facts["records"],
        facts["failed_records"],
        tuple(table),
        notes=notes,
        unexpected=len(unexpected),
    )


@dataclass(frozen=True)
class _Case:
    """One record as a scenario leaves it.

    Attributes:
        entry: Where it is.
        whole: All that it really has.
        left: What the scenario leaves.
        place: Its position in the split.
    """

    entry: CohortRecord
    whole: PatientRecord
    left: PatientRecord
    place: int


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
        identify: Whether reports show identifiers.
        against: Other bundles to compare with.
    """

    bundle: ModelBundle
    cohort: Cohort
    split: str
    specs: tuple[ModalitySpec, ...]
    seed: int
    reports: int | None
    methods: Sequence[str]
    draws: int
    identify: bool
    against: tuple[ModelBundle, ...] = ()

    def batch(
        self, rule: Scenario, chunk: _Chunk, reports: Path | None, first: int
    ) -> dict[str, Any]:
        """Return the rows of one batch under one scenario, and write its reports.

        Args:
            rule: The scenario.
            chunk: What could be read.
            reports: Folder for reports; None = no reports in this scenario.
            first: Position of the batch's first record in the split.
        """
        failures = Failures()
        failures.add(chunk.failures)
        rows: dict[str, list[Row]] = {
            key: [] for key in ("predictions", "selections", "hidden", "recovery", "pictures")
        }
        facts: dict[str, Row] = {}
        cases = []
        for position, entry, record in chunk.read:
            with failures.of(record.record_id, rule.text, "hide"):
                left = apply(rule, record, self.specs, self.seed)
                rows["hidden"] += hidden(record, left, self.specs, rule)
                if not left.modalities:
                    raise PatientDataError(
                        Problem(
                            f"Patient {record.record_id}",
                            "the scenario leaves nothing to predict from",
                            expected="a modality besides those that are taken away",
                            remedy="Choose another scenario",
                        )
                    )
                cases.append(_Case(entry, record, left, first + position))
        for some, answers, found in self._answered(cases, rule, failures):
            for kind, more in found.items():
                if kind != "facts":
                    rows[kind] += more
            facts |= found["facts"]
            for row, case in enumerate(some):
                if reports is not None and (self.reports is None or case.place < self.reports):
                    with failures.of(case.left.record_id, rule.text, "report"):
                        self._report(case.left, answers, row, reports)
        found = {"facts": facts, "failures": failures.rows, "unexpected": failures.unexpected}
        return {**rows, **found}

    def _answered(
        self, cases: Sequence[_Case], rule: Scenario, failures: Failures
    ) -> Iterator[tuple[Sequence[_Case], Answers, dict[str, Any]]]:
        """Yield cases, their answers and rows; all at once unless one of them fails."""
        if not cases:
            return
        try:
            together = self._rows(cases, rule)
        except Exception as error:
            # One of them, or all of them together, are too much: the others still get answers.
            if concerns_all(error):
                raise
        else:
            yield cases, *together
            return
        for case in cases:
            alone = None
            with failures.of(case.left.record_id, rule.text, "predict"):
                alone = self._rows([case], rule)
            if alone is not None:
                yield [case], *alone

    def _rows(self, cases: Sequence[_Case], rule: Scenario) -> tuple[Answers, dict[str, Any]]:
        """Return the answers for some cases, and everything that is kept of them."""
        answers, oracle, compared, others = self._ask(
            [case.left for case in cases], [case.whole for case in cases], rule
        )
        rows: dict[str, Any] = {"predictions": [], "selections": [], "facts": {}}
        if oracle is not None:
            measured = quality.measure(
                self.bundle, rule.text, answers, oracle, draws=self.draws, seed=self.seed
            )
            rows |= {"recovery": list(measured.rows), "pictures": list(measured.pictures)}
        points = self._points_to(answers)
        sets = self._sets(answers)
        names = {spec.name for spec in self.specs}
        for row, case in enumerate(cases):
            record = case.left
            members, calibrated_on = sets[row]
            rows["facts"][record.record_id] = {
                "points_to": points[row],
                "set": members,
                "calibrated_on": calibrated_on,
                "subgroups": {
                    s.name: level(s, case.entry, case.whole, self.specs)
                    for s in self.cohort.subgroups
                    if s.modality is None or s.modality in names
                },
            }
            rows["predictions"] += self._predictions(
                rule, record, answers, oracle, compared, others, members, row
            )
            rows["selections"] += [
                {"scenario": rule.text, "record_id": record.record_id, **asdict(step)}
                for step in selection_steps(answers.own, row)
            ]
        return answers, rows

    def _ask(
        self, records: Sequence[PatientRecord], whole: Sequence[PatientRecord], rule: Scenario
    ) -> tuple[Answers, Answers | None, dict[str, Tensor], dict[str, Answers]]:
        """Return the answers, those on the whole records, of comparators and other bundles."""
        answers = answer(self.bundle, records, seed=self.seed, methods=self.methods)
        oracle = None
        if rule.kind != "as-is":
            oracle = answer(self.bundle, whole, seed=self.seed, methods=self.methods)
        compared = comparator_probabilities(self.bundle, answers.batch)
        others = {b.name: answer(b, records, seed=self.seed) for b in self.against}
        return answers, oracle, compared, others

    def _points_to(self, answers: Answers) -> list[dict[str, int]]:
        """Return per record the class that each recovery, alone, points to."""
        candidates = answers.recovery.candidates
        rows, column = candidates.nonzero(as_tuple=True)
        found: list[dict[str, int]] = [{} for _ in range(len(candidates))]
        if not len(rows):
            return found
        only = torch.nn.functional.one_hot(column, candidates.shape[1]).bool()
        with torch.inference_mode():
            classes = answers.fuse(rows, only, only).logits.argmax(-1)
        for i, m, k in zip(rows.tolist(), column.tolist(), classes.tolist(), strict=True):
            found[i][answers.batch.observed.names[m]] = k
        return found

    def _sets(self, answers: Answers) -> list[tuple[list[int], int]]:
        """Return per record the classes of its prediction set, and how many it rests on."""
        n = len(answers.batch)
        conformal, method = self.bundle.conformal, answers.method
        if conformal is None or method not in conformal.scores:
            return [([], 0)] * n
        names = answers.batch.observed.names
        patterns = [joined(names, answers.batch.observed.available[i]) for i in range(n)]
        found = conformal.sets(method, answers.probabilities[method].numpy(), patterns)
        return [
            (np.flatnonzero(members).tolist(), int(size))
            for members, size in zip(found.members, found.calibrated_on, strict=True)
        ]

    def _predictions(
        self,
        rule: Scenario,
        record: PatientRecord,
        answers: Answers,
        oracle: Answers | None,
        compared: dict[str, Tensor],
        others: dict[str, Answers],
        members: Sequence[int],
        row: int,
    ) -> list[Row]:
        """Return one record's rows of `predictions.csv`, one per method."""
        rows = [self._prediction(rule, record, answers, m, m, row) for m in answers.traces]
        classes = self.bundle.task.classes
        for one in rows:
            if one["method"] == answers.method:
                one["prediction_set"] = "+".join(_escaped(classes[k]) for k in members)
                one |= self._interval(answers, row)
        for name, probabilities in compared.items():
            # They see what was observed and nothing else.
            base = self._prediction(rule, record, answers, "observed_only", name, row)
            rows.append({**base, **self._answer(probabilities[row])})
        rows += [
            self._prediction(rule, record, theirs, method, f"{bundle}:{method}", row)
            for bundle, theirs in others.items()
            for method in theirs.traces
        ]
        if oracle is not None:
            rows.append(self._prediction(rule, record, oracle, "observed_only", ORACLE, row))
        return rows

    def _interval(self, answers: Answers, row: int) -> Row:
        """Return the columns of a regression's interval; none of a classification."""
        found = value_of(self.bundle, answers, row)
        return {} if found is None else {"value_low": found.low, "value_high": found.high}

    def _answer(self, probabilities: Tensor) -> Row:
        """Return the columns that say what a method answers."""
        classes, values = self.bundle.task.classes, probabilities.tolist()
        answer: Row = {
            **{f"prob_{c}": p for c, p in zip(classes, values, strict=True)},
            "predicted": classes[int(np.argmax(values))],
        }
        if self.bundle.task.scale is not None:
            answer["value"] = float(self.bundle.task.scale.value(probabilities))
        return answer

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
        partly = answers.batch.partly_filled()[row].tolist()
        observed = trace.observed[row].tolist()
        label = record.label if record.label is not None else -1
        return {
            "scenario": rule.text,
            "record_id": record.record_id,
            "patient_id": record.patient_id,
            "split": self.split,
            "label": self.bundle.task.classes[label],
            "method": name,
            **self._answer(answers.probabilities[method][row]),
            **({} if record.value is None else {"value_true": record.value, **_NO_INTERVAL}),
            "prediction_set": "",
            "observed": joined(trace.names, trace.observed[row]),
            "trusted": joined(trace.names, trace.admitted[row]),
            "rejected": joined(trace.names, trace.rejected[row]),
            "absent": joined(trace.names, ~trace.observed[row] & ~recovery.recovered[row]),
            "pattern": "+".join(
                n + "~" * blank
                for n, seen, blank in zip(trace.names, observed, partly, strict=True)
                if seen
            ),
        }

    def _report(self, record: PatientRecord, answers: Answers, row: int, folder: Path) -> None:
        """Write one patient's report."""
        explanation = explain_record(self.bundle, answers, row, seed=self.seed)
        prediction = assemble(
            self.bundle, record, answers, row, explanation, seed=self.seed, identify=self.identify
        )
        file = prediction_file(
            self.bundle, record, answers, row, explanation, prediction, draws=self.draws
        )
        path = folder / record.record_id
        path.mkdir(parents=True, exist_ok=True)
        try:
            write_prediction(file, path)
        except BaseException:  # both files or none
            shutil.rmtree(path, ignore_errors=True)
            raise


def joined(names: Sequence[str], available: Tensor) -> str:
    """Return the names that are available, joined by `+`."""
    return "+".join(n for n, a in zip(names, available.tolist(), strict=True) if a)


def _escaped(name: str) -> str:
    """Return a class's name so that `+` in it ("ER+") is not taken for the next class."""
    return name.replace("\\", "\\\\").replace("+", "\\+")


def _prediction_columns(classes: Sequence[str], scale: Scale | None) -> tuple[str, ...]:
    return (
        *("scenario", "record_id", "patient_id", "split", "label", "method"),
        *(() if scale is None else ("value_true", "value", *_NO_INTERVAL)),
        *(f"prob_{c}" for c in classes),
        *("predicted", "prediction_set", "observed", "trusted", "rejected", "absent", "pattern"),
    )


def known_split(name: str) -> Split:
    """Return a split's name once it is known to be one.

    Raises:
        ConfigError: If it is not.
    """
    for known in SPLITS:
        if name == known:
            return known
    raise ConfigError(
        Problem(
            "--split",
            f"there is no split '{name}'",
            expected=" or ".join(SPLITS),
            remedy=nearest(name, list(SPLITS)),
        )
    )


def _rules(
    scenarios: Sequence[str], specs: Sequence[ModalitySpec], cohort: Cohort
) -> tuple[Scenario, ...]:
    """Return the scenarios, each once.

    Raises:
        ConfigError: If one is unknown, or replays would mix or hide nothing.
    """
    texts = expanded(scenarios, specs)
    rules = tuple(dict.fromkeys(parse_scenario(text, specs) for text in texts))
    ids = {record.record_id for record in cohort.records}
    problems = []
    for rule in rules:
        where = f"scenario '{rule.text}'"
        if sum(other.text == rule.text for other in rules) > 1:
            problems.append(
                Problem(
                    where,
                    "two different files hide under this name",
                    expected="one file per scenario",
                    remedy="Replay one",
                )
            )
        if rule.kind == "replay" and not ids & set(rule.taken):
            problems.append(
                Problem(
                    where,
                    f"it names no record of cohort {cohort.name}",
                    expected="record ids of this cohort",
                    remedy="Replay what was hidden from this cohort",
                )
            )
    if problems:
        raise ConfigError(*problems)
    return rules


def scenario_notes(rules: Sequence[Scenario], modalities: int) -> tuple[str, ...]:
    """Return a sentence for every scenario that hides far from the share it is asked for.

    That of `rate`, which rounds, is told only where it hides nothing.

    Args:
        rules: Scenarios.
        modalities: M.
    """
    notes = []
    for rule in rules:
        share = hidden_share(rule, modalities)
        if share is None or abs(share - rule.share) < 0.0005:
            continue
        of = f"of a complete record's {modalities} modalities"
        if rule.kind != "rate":
            notes.append(f"{rule.text} hides {share:.3f} {of}: one always stays.")
        elif share == 0:
            notes.append(f"{rule.text} hides nothing {of}: it rounds. See mean-rate.")
    return tuple(notes)


def _labelled(cohort: Cohort, split: str) -> tuple[CohortRecord, ...]:
    """Return the records to evaluate.

    Raises:
        ConfigError: If there is none.
    """
    records = tuple(r for r in cohort.in_split(known_split(split)) if r.label is not None)
    if not records:
        raise ConfigError(
            Problem(
                f"cohort {cohort.name}",
                f"split '{split}' has no record whose {cohort.task.target} is known",
                expected="a record to judge an answer by",
                remedy="Choose another split, or add labels",
            )
        )
    return records


def matched_specs(
    bundle: ModelBundle | SegmentationBundle, cohort: Cohort
) -> tuple[ModalitySpec, ...]:
    """Return the bundle's modalities, to be read from the cohort's files.

    What networks were trained on must be the same; how files are written, and where in them a
    modality is, is the cohort's own business.

    Raises:
        BundleError: If the cohort is about something else; every difference at once.
    """
    theirs = {spec.name: spec for spec in cohort.specs}
    where = f"bundle {bundle.name}, cohort {cohort.name}"
    problems = []
    if cohort.task.type != bundle.task.type:
        got = f"a {cohort.task.type}"
        remedy = "Give the cohort description whose task is the bundle's"
        raise BundleError(Problem(where, "the tasks differ", f"a {bundle.task.type}", got, remedy))
    if (cohort.task.classes, cohort.task.scale) != (bundle.task.classes, bundle.task.scale):
        problems.append(
            Problem(
                where,
                "the classes differ",
                expected=", ".join(bundle.task.classes),
                got=", ".join(cohort.task.classes),
                remedy=_ANOTHER,
            )
        )
    for spec in bundle.specs:
        other = theirs.get(spec.name)
        if other is None:
            problems.append(
                Problem(
                    where,
                    f"the cohort does not describe modality '{spec.name}'",
                    expected="every modality of the bundle",
                    remedy=_ANOTHER,
                )
            )
        elif _form(other) != _form(spec):
            problems.append(
                Problem(
                    where,
                    f"modality '{spec.name}' is described differently",
                    expected=_form_text(spec),
                    got=_form_text(other),
                    remedy=_ANOTHER,
                )
            )
    if problems:
        raise BundleError(*problems)
    return tuple(_written_as(spec, theirs[spec.name]) for spec in bundle.specs)


def _written_as(spec: ModalitySpec, other: ModalitySpec) -> ModalitySpec:
    """Return a bundle's modality, to be read from files as a cohort says they are written.

    That is which file, series and columns are meant, how cells are written, where a volume's grid
    lies, and what is not plausible in a column.
    """
    columns = tuple(
        replace(own, rules=theirs.rules, range=theirs.range or own.range)
        for own, theirs in zip(spec.columns, other.columns, strict=True)
    )
    return replace(
        spec,
        file=other.file,
        rules=other.rules,
        columns=columns,
        dicom=other.dicom,
        grid=other.grid,
    )


def _form(spec: ModalitySpec) -> tuple[object, ...]:
    """Return what a network depends on."""
    columns = tuple((c.name, c.type, c.unit, c.values) for c in spec.columns)
    steps = spec.steps and (spec.steps.pooling, spec.steps.standardise)
    return spec.kind, spec.shape, spec.spacing_mm, spec.intensity, columns, steps


def _form_text(spec: ModalitySpec) -> str:
    shape = " x ".join(str(n) for n in spec.shape)
    columns = ", ".join(
        f"{c.name} {c.type}" + f" in {c.unit}" * bool(c.unit) + f" {'/'.join(c.values)}".rstrip()
        for c in spec.columns
    )
    detail = columns or f"spacing {spec.spacing_mm} mm, intensity {spec.intensity}"
    if spec.steps is not None:
        detail = f"pooling {spec.steps.pooling}, standardise {spec.steps.standardise}".lower()
    return f"{spec.kind} {shape} ({detail})"


def _distinct(bundles: Sequence[ModelBundle]) -> None:
    """Refuse bundles that one cannot tell apart by name.

    Raises:
        ConfigError: If two have the same.
    """
    names = [bundle.name for bundle in bundles]
    same = sorted({name for name in names if names.count(name) > 1})
    if same:
        raise ConfigError(
            Problem(
                "--against",
                f"several bundles are called {', '.join(same)}",
                expected="bundles of different names",
                remedy="Give each recipe a name of its own, and train again",
            )
        )


def patients_seen(bundle: ModelBundle | SegmentationBundle, records: Sequence[CohortRecord]) -> int:
    """Return how many of the patients the bundle was fitted on."""
    fitted = {patient for ids in bundle.provenance.get("patients", {}).values() for patient in ids}
    return len({r.patient_id for r in records if hashed_id(bundle.name, r.patient_id) in fitted})


def require_unseen(seen: Mapping[str, int], cohort: Cohort, split: str) -> None:
    """Refuse figures about patients whom a bundle was fitted on.

    Args:
        seen: How many of the patients, by the bundle's name.
        cohort: The cohort.
        split: Of which the patients are.

    Raises:
        ConfigError: If there are any; every such bundle at once.
    """
    problems = [
        Problem(
            f"cohort {cohort.name}, split {split}",
            f"{number} of its patients were used to make bundle {name}",
            expected="patients whom the bundle has never seen",
            remedy="Choose another split, or add --allow-overlap to see flattering figures",
        )
        for name, number in seen.items()
        if number
    ]
    if problems:
        raise ConfigError(*problems)


def check_part(part_id: int, num_parts: int) -> None:
    """Check that there is such a part.

    Raises:
        ConfigError: If there is none.
    """
    if not 0 <= part_id < num_parts:
        raise ConfigError(
            Problem(
                "--part-id",
                "there is no such part",
                expected=f"0 to {num_parts - 1}",
                got=str(part_id),
                remedy="Count parts from 0",
            )
        )


def prepare_folder(out: Path, known: Row, resume: bool, num_parts: int) -> None:
    """Prepare the folder: a new one, or one that may be gone on with.

    Raises:
        ConfigError: If it holds something else, or an evaluation with other settings.
    """
    marker = out / PROGRESS / "settings.json"
    if out.exists() and not out.is_dir():
        raise ConfigError(
            Problem(str(out), "is a file", expected="a folder", remedy="Name a folder with --out")
        )
    out.mkdir(parents=True, exist_ok=True)
    # A start that was killed before its settings took their name has left nothing to go on with.
    remove_abandoned(out)
    if not any(p for p in out.iterdir() if not p.name.startswith(f"{PROGRESS}.")):
        # Settings appear with their folder or not at all: other parts may start right now.
        new = out / f"{PROGRESS}.{secrets.token_hex(4)}"
        new.mkdir()
        try:
            write_json(new / marker.name, known)
            new.rename(marker.parent)
        except OSError:
            if not marker.is_file():
                raise
        else:
            return
        finally:
            shutil.rmtree(new, ignore_errors=True)
    # The parts of one evaluation meet in one folder, whichever starts first.
    if not resume and num_parts == 1:
        remedy = "Go on with it by --resume, or name another folder with --out"
        raise ConfigError(
            Problem(str(out), "is not empty", expected="a new or empty folder", remedy=remedy)
        )
    if not marker.is_file():
        raise ConfigError(
            Problem(
                str(out),
                "holds no evaluation to go on with",
                expected="an evaluation that was interrupted",
                remedy="Name another folder with --out",
            )
        )
    earlier = _written(marker)
    now = json.loads(json.dumps(known))
    differing = [key for key in now if earlier.get(key) != now[key]]
    if differing:
        raise ConfigError(
            Problem(
                str(out),
                f"holds an evaluation with another {', '.join(differing)}",
                expected="an evaluation with the same settings",
                remedy="Repeat its settings, or name another folder with --out",
            )
        )


def _written(path: Path) -> Any:
    """Return what an evaluation kept of its settings or of a finished batch.

    Raises:
        ConfigError: If the file is damaged.
    """
    try:
        return read_json(path, most_bytes=1 << 31)
    except (OSError, ValueError) as error:
        raise ConfigError(
            Problem(
                str(path),
                "what was finished cannot be read",
                expected="JSON that this evaluation wrote",
                got=type(error).__name__ if isinstance(error, OSError) else str(error),
                remedy="Remove a batch's file and go on with --resume; without settings.json, begin"
                " again in another folder",
            )
        ) from None


def digest_of(records: Sequence[CohortRecord]) -> str:
    """Return a hash of what finished batches say of their records besides the answers."""
    rows = [
        # A corrected number may stay within its band.
        (r.record_id, r.patient_id, r.label, *(() if r.value is None else (r.value,)))
        for r in records
    ]
    return sha256(json.dumps(rows).encode()).hexdigest()


def described(specs: Sequence[ModalitySpec], cohort: Cohort) -> str:
    """Return a hash of how a cohort's files are read: another way may give other answers.

    Args:
        specs: Modalities, as `matched_specs` returns them.
        cohort: The cohort.
    """
    told = [spec.to_dict() for spec in specs], cohort.missing_values
    return sha256(json.dumps(told, default=str).encode()).hexdigest()


def _file_name(rule: Scenario, number: int) -> str:
    """Return the progress file of a batch; the text may hold what file names must not."""
    digest = sha256((rule.text + rule.digest).encode()).hexdigest()[:8]
    return f"{rule.kind}-{digest}-{number:05d}.json"


@dataclass(frozen=True)
class _Chunk:
    """What could be read of a batch.

    Attributes:
        read: Position in the batch, entry and record.
        failures: Those that could not.
        judged: Rows of `quality.csv`.
    """

    read: list[tuple[int, CohortRecord, PatientRecord]] = field(default_factory=list)
    failures: Failures = field(default_factory=Failures)
    judged: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class _Reading:
    """How records are read.

    Attributes:
        specs: Modalities, with fitted constants.
        missing_values: Strings that mean "blank".
        norms: For the quality gate.
        treat_refused_as_missing: Go on without what it refuses.
    """

    specs: Sequence[ModalitySpec]
    missing_values: Sequence[str]
    norms: Norms | None
    treat_refused_as_missing: bool


def _read_ahead(
    chunks: Sequence[tuple[int, Sequence[CohortRecord]]], how: _Reading
) -> Iterator[tuple[int, _Chunk]]:
    """Yield batches in order, the next ones being read in the background meanwhile.

    Args:
        chunks: Number and records of each batch.
        how: How to read them.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as reader:
        waiting: list[tuple[int, Future[_Chunk]]] = []
        try:
            for number, chunk in chunks:
                waiting.append((number, reader.submit(_read, chunk, how, stop)))
                if len(waiting) > _AHEAD:
                    first, future = waiting.pop(0)
                    yield first, future.result()
            while waiting:
                first, future = waiting.pop(0)
                yield first, future.result()
        finally:
            stop.set()
            for _, future in waiting:
                future.cancel()


def _read(chunk: Sequence[CohortRecord], how: _Reading, stop: threading.Event) -> _Chunk:
    """Return the records that can be read with their positions, the failures, and gate results.

    Once `stop` is set nobody waits for them, and the rest is left.
    """
    found = _Chunk()
    for position, entry in enumerate(chunk):
        if stop.is_set():
            break
        with found.failures.of(entry.record_id, ALL, "read"):
            intake = examine_record(entry, how.specs, how.missing_values, norms=how.norms)
            found.judged.extend(_quality(intake))
            record = usable(
                intake, how.specs, treat_refused_as_missing=how.treat_refused_as_missing
            )
            found.read.append((position, entry, record))
    return found


def _quality(found: Intake) -> list[Row]:
    """Return one record's rows of `quality.csv`: a finding each, or a modality that passes."""
    rows: list[Row] = []
    for name, result in found.results.items():
        about = {"record_id": found.record.record_id, "modality": name, "state": result.state}
        nothing = {"check": "", "got": "", "expected": ""}
        rows += [
            {**about, "check": f.check, "got": f.got, "expected": f.expected}
            for f in result.findings
        ] or [{**about, **nothing}]
    return rows
