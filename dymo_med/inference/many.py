"""Many patients whose answer nobody knows: one folder per patient, a table, a work list.

Each patient is answered by the very function behind `dymo-med predict`, so the files are those of
a patient alone, bit for bit; the model is loaded once. What is finished is kept in `OUT/.progress`:
an interrupted run goes on where it stopped, several processes can share one, and a patient who
cannot be answered costs a row in `failures.csv`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from dymo_med import __version__
from dymo_med.bundle import ModelBundle
from dymo_med.bundle_segmentation import SegmentationBundle
from dymo_med.data import bids
from dymo_med.data.cohort import read_folders
from dymo_med.errors import ConfigError, Problem
from dymo_med.files import csv_stream, write_csv, write_json
from dymo_med.inference.failures import Failures
from dymo_med.inference.matching import matched_specs, patients_seen
from dymo_med.inference.prediction_file import PredictionFile, read_prediction
from dymo_med.inference.run_folder import (
    PROGRESS,
    check_part,
    digest_of,
    prepare_folder,
    read_written,
)
from dymo_med.inference.segmentation_file import read_segmentation
from dymo_med.inference.software import versions
from dymo_med.inference.worklist import FAILED, write_worklist
from dymo_med.modalities.image import file_in
from dymo_med.types import CohortRecord, ModalitySpec

Row = dict[str, Any]

REPORTS = "reports"
FAILURE_COLUMNS = ("record_id", "stage", "message")
_RESULTS = ("prediction.json", "recovered", "run.json")


class Predict(Protocol):
    """Answers for one patient: what `predict_patient` and `segment_patient` do."""

    def __call__(self, entry: CohortRecord, out: Path, /) -> object:
        """Write the answer for one patient's folder to `out`."""


@dataclass(frozen=True)
class ManyResult:
    """What a run came to.

    Attributes:
        out: Folder of its files.
        records: Patients' folders.
        counts: How many of each status; empty while parts are open.
        unexpected: Records that met a bug, or too little memory.
        open_records: Records that other parts still have to do; 0 = everything is written.
        seen: How many of the patients were used to make the bundle.
    """

    out: Path
    records: int
    counts: Mapping[str, int]
    unexpected: int = 0
    open_records: int = 0
    seen: int = 0

    @property
    def failures(self) -> int:
        """Records that could not be answered."""
        return self.counts.get(FAILED, 0)


def find_records(folder: Path, specs: Sequence[ModalitySpec]) -> tuple[CohortRecord, ...]:
    """Return the patient directories in a folder; none if it is a patient directory itself.

    A folder of patients has none of the model's files itself, and a folder in it has. In a BIDS
    dataset they are subjects, or their sessions.

    Args:
        folder: Any folder.
        specs: The model's modalities.
    """
    if not folder.is_dir() or _is_patient(folder, specs):
        return ()
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if (folder / bids.DESCRIPTION).is_file():
        subjects = [p for p in inside if bids.SUBJECT.fullmatch(p.name)]
        places = [place for subject in subjects for place in bids.sessions(subject)]
        return tuple(CohortRecord(*bids.ids(place), place, root=folder) for place in places)
    places = [p for p in inside if not any((p / name).exists() for name in _RESULTS)]
    if not any(_is_patient(place, specs) for place in places):
        return ()
    return tuple(CohortRecord(p.name, p.name, p) for p in places)


def _is_patient(folder: Path, specs: Sequence[ModalitySpec]) -> bool:
    """Return whether a folder has something that is called as a modality's file."""
    for spec in specs:
        path = PurePosixPath(file_in(folder, spec.file))
        place, stem = folder / path.parent, path.name.split(".")[0].lower()
        if place.is_dir() and any(
            fnmatchcase(found.name.split(".")[0].lower(), stem) for found in place.iterdir()
        ):
            return True
    return False


def records_of(
    bundle: ModelBundle | SegmentationBundle, cohort: Path
) -> tuple[tuple[CohortRecord, ...], tuple[ModalitySpec, ...], tuple[str, ...]]:
    """Return all patients of a cohort, labelled or not, and how their files are read.

    Args:
        bundle: The model.
        cohort: The cohort's folder or its `cohort.yaml`; labels and splits need not be there.

    Returns:
        The records, the bundle's modalities to be read from the cohort's files, and words that
        mean "blank".

    Raises:
        ConfigError: If the description is wrong.
        BundleError: If it is about something else than the bundle.
    """
    found = read_folders(cohort)
    return found.records, matched_specs(bundle, found), found.missing_values


def predict_many(
    bundle: ModelBundle | SegmentationBundle,
    records: Sequence[CohortRecord],
    predict: Predict,
    out: Path,
    *,
    settings: Mapping[str, Any],
    also: Callable[[CohortRecord, Path], object] | None = None,
    resume: bool = False,
    num_parts: int = 1,
    part_id: int = 0,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> ManyResult:
    """Answer for many patients.

    Args:
        bundle: The model.
        records: Where they are.
        predict: Answers for one of them.
        out: Folder for `reports/RECORD/`, `predictions.csv`, `failures.csv`, `index.html` and
            `run.json`.
        settings: What else decides on the answers; an interrupted run must be gone on with by the
            same.
        also: Called with each record and the folder of its answer: writes other outputs there.
        resume: Go on with, or repeat from what is finished, a run in `out`. Patients who failed
            are tried again.
        num_parts: How many processes share the run.
        part_id: Which of them this is, from 0; each does every `num_parts`-th patient. Whoever
            finds all done writes the tables.
        command: What was typed, for `run.json`.
        progress: Called with (done, total) records of this part.

    Returns:
        Counts.

    Raises:
        ConfigError: If a part or `out` is wrong, or two records share an id.
    """
    start = time.perf_counter()
    check_part(part_id, num_parts)
    ids = [record.record_id for record in records]
    twice = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise ConfigError(
            Problem(
                str(out),
                f"several records are called {twice[0]}",
                expected="one folder per record",
                remedy="Rename one of the folders",
            )
        )
    known = {
        "bundle": bundle.bundle_id,
        "version of dymo-med": __version__,
        "list of records": digest_of(records),
        **settings,
    }
    prepare_folder(out, known, resume, num_parts, what="unfinished prediction")
    mine = list(records[part_id::num_parts])
    done = 0
    for number, entry in enumerate(mine):
        path = out / PROGRESS / _file_name(entry.record_id)
        if path.is_file() and not (resume and read_written(path)["row"]["status"] == FAILED):
            done += 1
            continue
        if progress is not None and number == done:
            progress(done, len(mine))
        write_json(path, _answer(entry, predict, out / REPORTS / entry.record_id, also))
        done += 1
        if progress is not None:
            progress(done, len(mine))
    left = sum(not (out / PROGRESS / _file_name(i)).is_file() for i in ids)
    seen = patients_seen(bundle, records)
    if left:
        return ManyResult(out, len(records), {}, open_records=left, seen=seen)
    facts: Row = {
        "schema_version": 1,
        "command": command or "predict",
        "bundle": {"name": bundle.name, "version": bundle.version, "id": bundle.bundle_id},
        "target": bundle.task.target,
        "classes": list(bundle.task.classes),
        "task": bundle.task.type,
        "unit": bundle.task.unit,
        "modalities": [spec.name for spec in bundle.specs],
        "records": len(records),
        "patients": len({r.patient_id for r in records}),
        "patients_seen_in_training": seen,
        "settings": dict(settings),
        "versions": versions(),
    }
    return _write(out, facts, ids, start)


def _answer(
    entry: CohortRecord,
    predict: Predict,
    place: Path,
    also: Callable[[CohortRecord, Path], object] | None,
) -> Row:
    """Return what is kept of a record; its files are in `place`, all or none."""
    failures = Failures()
    row: Row = {}
    place.parent.mkdir(parents=True, exist_ok=True)
    with failures.of(entry.record_id, "", "predict"):
        predict(entry, place)
        row = _row(entry, place / "prediction.json")
    if row and also is not None:
        with failures.of(entry.record_id, "", "export"):
            also(entry, place)
    if failures.rows:
        row = {"status": FAILED, "reasons": failures.rows[0]["stage"]}
        shutil.rmtree(place, ignore_errors=True)  # of an earlier try
    return {
        "row": {"record_id": entry.record_id, "patient_id": entry.patient_id, **row},
        "failures": [{name: f[name] for name in FAILURE_COLUMNS} for f in failures.rows],
        "unexpected": bool(failures.unexpected),
    }


def _row(entry: CohortRecord, path: Path) -> Row:
    """Return a record's row of `predictions.csv`, from what was written."""
    kind = json.loads(path.read_text(encoding="utf-8")).get("task")
    file = read_segmentation(path) if kind == "segmentation" else read_prediction(path)
    row: Row = {"status": "answered", "reasons": ""}
    if isinstance(file, PredictionFile):
        row |= {
            "status": file.status,
            "reasons": "+".join(dict.fromkeys(r.code for r in file.status_reasons)),
            "predicted": file.predicted,
            "prediction_set": ""
            if file.prediction_set is None
            else "+".join(file.prediction_set.classes),
            "partly": "+".join(file.partly),
        }
        named = zip(file.classes, file.probabilities, strict=True)
        row |= {f"prob_{name}": probability for name, probability in named}
        if file.value is not None:
            number = file.value
            row |= {"value": number.value, "value_low": number.low, "value_high": number.high}
    else:
        row |= {f"volume_ml_{region.name}": region.volume_ml for region in file.regions}
    for name in ("observed", "trusted", "rejected", "absent", "refused"):
        row[name] = "+".join(getattr(file, name))
    return {**row, "warnings": len(file.warnings)}


def columns(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of `predictions.csv`.

    Args:
        facts: What `run.json` says.
    """
    states = ("observed", "trusted", "rejected", "absent", "refused", "warnings")
    first = ("record_id", "patient_id", "status", "reasons")
    if facts["task"] == "segmentation":
        return (*first, *(f"volume_ml_{name}" for name in facts["classes"]), *states)
    numbers = ("value", "value_low", "value_high") if facts["task"] == "regression" else ()
    return (
        *(*first, *numbers, "predicted"),
        *(f"prob_{name}" for name in facts["classes"]),
        *("prediction_set", "observed", "partly", *states[1:]),
    )


def _write(out: Path, facts: Row, ids: Sequence[str], start: float) -> ManyResult:
    """Write tables and the work list from what is finished."""
    (out / "run.json").unlink(missing_ok=True)  # while it is there, everything belongs together
    names = columns(facts)
    rows: list[Row] = []
    failures: list[Row] = []
    unexpected = 0
    with ExitStack() as stack:
        append = stack.enter_context(csv_stream(out / "predictions.csv", names))
        for record_id in ids:
            kept = read_written(out / PROGRESS / _file_name(record_id))
            row = {name: kept["row"].get(name) for name in names}
            append([row])
            rows.append(row)
            failures += kept["failures"]
            unexpected += kept["unexpected"]
    write_csv(out / "failures.csv", FAILURE_COLUMNS, failures)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    facts = {**facts, "status": counts, "unexpected_failures": unexpected}
    write_worklist(out, facts, rows, failures)
    write_json(out / "run.json", {**facts, "seconds": round(time.perf_counter() - start, 1)})
    return ManyResult(
        out,
        len(ids),
        counts,
        unexpected=unexpected,
        seen=facts["patients_seen_in_training"],
    )


def _file_name(record_id: str) -> str:
    """Return the progress file of a record; its id may hold what file names must not."""
    return f"record-{sha256(record_id.encode()).hexdigest()[:24]}.json"
