"""A cohort under missing-data scenarios, every method side by side.

Records are read ahead in the background and answered in batches; each finished batch is kept in
`OUT/.progress`, so that an interrupted evaluation goes on where it stopped and gives the same
files, and several processes can share one by taking different batches. What is kept of a finished
batch is numbers, so memory does not grow with scans. One bad patient costs a row in
`failures.csv`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dymo_med import __version__
from dymo_med.bundle import ModelBundle
from dymo_med.data.cohort import level
from dymo_med.data.missingness import HIDDEN_COLUMNS, Scenario, apply, hidden, planned
from dymo_med.errors import BundleError, PatientDataError, Problem
from dymo_med.files import csv_stream, naming, write_csv, write_json
from dymo_med.inference import quality
from dymo_med.inference.answer import COMPARED, Answers, answer, explain_record
from dymo_med.inference.assemble import STEP_COLUMNS, assemble, selection_steps, value_of
from dymo_med.inference.cohort_page import write_pages
from dymo_med.inference.compare import comparator_probabilities
from dymo_med.inference.compose import prediction_file
from dymo_med.inference.failures import COLUMNS as FAILURE_COLUMNS
from dymo_med.inference.failures import Failures, concerns_all
from dymo_med.inference.matching import (
    adopted,
    known_split,
    labelled_records,
    matched_specs,
    patients_seen,
    require_distinct,
    require_unseen,
    scenario_notes,
    scenarios_of,
)
from dymo_med.inference.number_page import write_number_page
from dymo_med.inference.predict import write_prediction
from dymo_med.inference.read_ahead import Chunk, Reading, reading_ahead
from dymo_med.inference.run_folder import (
    PROGRESS,
    EvaluateResult,
    batch_file,
    check_part,
    described,
    digest_of,
    prepare_folder,
    read_written,
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
from dymo_med.inference.software import versions
from dymo_med.inference.standing import standing
from dymo_med.inference.survival_page import write_survival_page
from dymo_med.tasks import OverClasses
from dymo_med.types import Cohort, CohortRecord, ModalitySpec, PatientRecord

_QUALITY_COLUMNS = ("record_id", "modality", "state", "check", "got", "expected")
_NOVEL = {"unknown": -1, "familiar": 0, "unusual": 1, "strange": 2}


def evaluate(
    bundle: ModelBundle,
    cohort: Cohort,
    out: Path | str,
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
    start, out = time.perf_counter(), Path(out)
    specs = matched_specs(bundle, cohort)
    cohort = adopted(cohort, bundle.task)
    rules = scenarios_of(scenarios, specs, cohort)
    records = labelled_records(cohort, split)
    ids = [record.record_id for record in records]
    rules = tuple(planned(rule, ids, specs, seed) for rule in rules)
    for name in methods:
        bundle.with_selector(name)  # an unknown one is refused before anything is written
    quality.check_draws(draws)
    check_part(part_id, num_parts)
    require_distinct((bundle, *against))
    _require_same_modalities(bundle, against, cohort)
    seen = {one.name: patients_seen(one, records) for one in (bundle, *against)}
    if not allow_overlap:
        require_unseen(seen, cohort, split)
    # All of them, however that is put: one may be gone on with as the other.
    most_reports = None if reports is True or int(reports) >= len(records) else int(reports)
    run = _Run(
        bundle, cohort, split, specs, seed, most_reports, methods, draws, identify, tuple(against)
    )
    known = {
        **_settings(run, rules, records),
        "batch_size": batch_size,
        "treatment of refused modalities": treat_refused_as_missing,
    }
    prepare_folder(out, known, resume, num_parts)
    chunks = [records[first : first + batch_size] for first in range(0, len(records), batch_size)]
    how = Reading(specs, cohort.missing_values, bundle.norms, treat_refused_as_missing)
    mine = range(part_id, len(chunks), num_parts)
    _answer_open(run, out, rules, chunks, mine, how, progress)
    still_open = sum(bool(_open(out, rules, n)) for n in range(len(chunks)))
    if still_open:
        return EvaluateResult(out, len(records), 0, (), still_open)
    facts: Row = {
        **_facts(run, rules, records),
        "command": command or "evaluate",
        "batch_size": batch_size,
        "patients_seen_in_training": max(seen.values()),
        "refused_as_missing": treat_refused_as_missing,
        "records_sha256": known["records, label or patient"],
    }
    with naming(out):
        return _write(out, facts, rules, len(chunks), specs, start, bundle.task)


def _require_same_modalities(
    bundle: ModelBundle, against: Sequence[ModelBundle], cohort: Cohort
) -> None:
    """Check that bundles can be set side by side.

    Raises:
        BundleError: If one is for other modalities.
    """
    specs = bundle.specs
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


def _settings(run: _Run, rules: Sequence[Scenario], records: Sequence[CohortRecord]) -> Row:
    """Return what an evaluation that is gone on with must have in common with the first one."""
    bundle, cohort = run.bundle, run.cohort
    return {
        "bundle": bundle.bundle_id,
        "cohort": cohort.name,
        "split": run.split,
        "seed": run.seed,
        "reports": run.reports,
        "identify": run.identify,
        "first_scenario": rules[0].text + rules[0].digest,
        "selectors": [bundle.choice.name, *run.methods],
        "draws": run.draws,
        "set of bundles": [other.bundle_id for other in run.against],
        "version of dymo-med": __version__,
        "description of the files": described(run.specs, cohort),
        "records, label or patient": digest_of(records),
        "subgroups": [asdict(s) for s in cohort.subgroups],
        "subgroup of a record": sha256(
            json.dumps([dict(r.subgroups) for r in records]).encode()
        ).hexdigest(),
    }


def _open(out: Path, rules: Sequence[Scenario], number: int) -> list[Scenario]:
    """Return the scenarios in which a batch is not finished."""
    return [r for r in rules if not (out / PROGRESS / batch_file(r, number)).is_file()]


def _answer_open(
    run: _Run,
    out: Path,
    rules: Sequence[Scenario],
    chunks: Sequence[Sequence[CohortRecord]],
    mine: Sequence[int],
    how: Reading,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Answer for all batches of this part that are not finished, and keep what comes of them."""
    todo = [n for n in mine if _open(out, rules, n)]
    total = len(rules) * sum(len(chunks[n]) for n in mine)
    done = total - len(rules) * sum(len(chunks[n]) for n in todo)
    if progress is not None and done:
        progress(done, total)
    size = len(chunks[0])
    for number, chunk in reading_ahead([(n, chunks[n]) for n in todo], how):
        still = set(_open(out, rules, number))
        for rule in rules:
            if rule in still:
                folder = out / "reports" if rule is rules[0] else None
                part = run.batch(rule, chunk, folder, number * size)
                part["quality"] = chunk.judged if rule is rules[0] else []
                write_json(out / PROGRESS / batch_file(rule, number), part)
            done += len(chunks[number])
            if progress is not None:
                progress(done, total)


def _facts(run: _Run, rules: Sequence[Scenario], records: Sequence[CohortRecord]) -> Row:
    """Return what `run.json` says of an evaluation besides its metrics."""
    bundle, cohort, specs = run.bundle, run.cohort, run.specs
    facts: Row = {
        "schema_version": 1,
        "cohort": cohort.name,
        "split": run.split,
        "target": bundle.task.target,
        "classes": list(bundle.task.classes),
        "modalities": [spec.name for spec in specs],
        "scenarios": [rule.text for rule in rules],
        "selector": bundle.choice.name,
        "selector_why": bundle.choice.why,
        "seed": run.seed,
        "draws": run.draws,
        "records": len(records),
        "patients": len({r.patient_id for r in records}),
        "unlabelled_records": len(cohort.in_split(known_split(run.split))) - len(records),
        "bundle": {"name": bundle.name, "version": bundle.version, "id": bundle.bundle_id},
        "against": [{"name": b.name, "version": b.version, "id": b.bundle_id} for b in run.against],
        "device": str(bundle.device),
        "versions": versions(),
    }
    if bundle.use is not None:
        facts["use"] = [{**asdict(r), "verdict": r.verdict} for r in bundle.use.rows]
    notes = scenario_notes(rules, len(specs))
    if notes:
        facts["scenario_notes"] = list(notes)
    facts |= {k: v for k, v in bundle.task.to_dict().items() if k in bundle.task.stored}
    return facts


def _write(
    out: Path,
    facts: Row,
    rules: Sequence[Scenario],
    batches: int,
    specs: Sequence[ModalitySpec],
    start: float,
    task: OverClasses,
) -> EvaluateResult:
    """Write tables, plots and the page from the finished batches, one batch at a time."""
    (out / "run.json").unlink(missing_ok=True)  # while it is there, everything belongs together
    classes, names, seed = facts["classes"], facts["modalities"], facts["seed"]
    on_page = {*COMPARED, facts["selector"]}
    collectors = [Collector(r.text, classes, names, facts["selector"], task) for r in rules]
    recoveries = quality.Collector(specs)
    failures: dict[tuple[object, ...], Row] = {}
    unexpected: set[str] = set()
    listed: list[Row] = []
    columns = {
        "predictions": _prediction_columns(task),
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
                path = out / PROGRESS / batch_file(rule, number)
                part = read_written(path)
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
    table = metrics(scores, facts["patients_seen_in_training"], seed, task)
    patterns = list(by_pattern(scores, seed, task))
    subgroups = list(by_subgroup(scores, seed, task))
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
    pages = {
        "classes": write_pages,
        "numbers": write_number_page,
        "survival": write_survival_page,
    }
    pages[task.cohort_page](
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
        self, rule: Scenario, chunk: Chunk, reports: Path | None, first: int
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
                "novel": _NOVEL[answers.unusual[row].state] if answers.unusual else -1,
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
                one |= self.bundle.task.own_row(value_of(self.bundle, answers, row))
                said = assemble(self.bundle, record, answers, row, None, seed=self.seed)
                one["status"] = standing(self.bundle, answers, row, said).status
                if answers.unusual:
                    unusual = answers.unusual[row]
                    one |= {"novelty": unusual.state, "novelty_p": unusual.p}
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

    def _answer(self, probabilities: Tensor) -> Row:
        """Return the columns that say what a method answers."""
        classes, values = self.bundle.task.classes, probabilities.tolist()
        return {
            **{f"prob_{c}": p for c, p in zip(classes, values, strict=True)},
            "predicted": classes[int(np.argmax(values))],
            **self.bundle.task.answer_row(probabilities),
        }

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
        return {
            "scenario": rule.text,
            "record_id": record.record_id,
            "patient_id": record.patient_id,
            "split": self.split,
            # Censoring may hide it.
            "label": "" if record.label is None else self.bundle.task.classes[record.label],
            "method": name,
            **self._answer(answers.probabilities[method][row]),
            **self.bundle.task.truth_row(record),
            "prediction_set": "",
            "status": "",
            "novelty": "",
            "novelty_p": None,
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


def _prediction_columns(task: OverClasses) -> tuple[str, ...]:
    return (
        *("scenario", "record_id", "patient_id", "split", "label", "method"),
        *(*task.truth_columns, *task.answer_columns, *task.own_columns),
        *(f"prob_{c}" for c in task.classes),
        *(
            "predicted",
            "prediction_set",
            "status",
            "observed",
            "trusted",
            "rejected",
            "absent",
            "pattern",
        ),
        *("novelty", "novelty_p"),
    )
