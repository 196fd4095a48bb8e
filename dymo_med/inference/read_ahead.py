"""Records of a cohort, read in the background while earlier ones are answered."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from dymo_med.data.patient import Intake, examine_record, usable
from dymo_med.inference.failures import ALL, Failures
from dymo_med.inference.scores import Row
from dymo_med.types import CohortRecord, ModalitySpec, Norms, PatientRecord

_AHEAD = 2  # batches that are read while one is answered


@dataclass(frozen=True)
class Chunk:
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
class Reading:
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


def reading_ahead(
    chunks: Sequence[tuple[int, Sequence[CohortRecord]]], how: Reading
) -> Iterator[tuple[int, Chunk]]:
    """Yield batches in order, the next ones being read in the background meanwhile.

    Args:
        chunks: Number and records of each batch.
        how: How to read them.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as reader:
        waiting: list[tuple[int, Future[Chunk]]] = []
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


def _read(chunk: Sequence[CohortRecord], how: Reading, stop: threading.Event) -> Chunk:
    """Return the records that can be read with their positions, the failures, and gate results.

    Once `stop` is set nobody waits for them, and the rest is left.
    """
    found = Chunk()
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
