"""What becomes of a record of an evaluation that cannot be answered: a row, never the end."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dymo_med.errors import (
    BundleError,
    ConfigError,
    PatientDataError,
    Problem,
    RefusedError,
    out_of_memory,
)

Row = dict[str, Any]

COLUMNS = ("record_id", "scenario", "stage", "message")
ALL = "all"  # in the place of a scenario: of every one
_PACKAGE = Path(__file__).resolve().parents[1]
_log = logging.getLogger(__name__)


@dataclass
class Failures:
    """Records that failed, and which of them for no fault of their own.

    Attributes:
        rows: Of `failures.csv`.
        unexpected: Ids of records that met an error which nobody foresaw: a bug, or too little
            memory.
    """

    rows: list[Row] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    @contextmanager
    def of(self, record_id: str, scenario: str, stage: str) -> Iterator[None]:
        """Turn whatever goes wrong with one record meanwhile into a row.

        What is wrong with the command, the bundle or the disk written to is about all records, and
        passes.

        Args:
            record_id: Whose.
            scenario: In which scenario, or `ALL`.
            stage: At what: `read`, `hide`, `predict` or `report`.
        """
        try:
            yield
        except PatientDataError as error:
            stage = "gate" if isinstance(error, RefusedError) else stage
            message = " ".join(str(problem) for problem in error.problems)
        except Exception as error:
            if concerns_all(error) and not (stage == "read" and isinstance(error, OSError)):
                raise
            _log.debug("Patient %s, stage %s", record_id, stage, exc_info=error)
            message = str(unexpected(f"Patient {record_id}", error))
            self.unexpected.append(record_id)
        else:
            return
        self.rows.append(
            {"record_id": record_id, "scenario": scenario, "stage": stage, "message": message}
        )

    def add(self, other: Failures) -> None:
        """Add another's."""
        self.rows += other.rows
        self.unexpected += other.unexpected


def concerns_all(error: Exception) -> bool:
    """Return whether an error is about more than the record that met it."""
    disk = isinstance(error, OSError) and error.errno is not None
    return disk or isinstance(error, ConfigError | BundleError)


def unexpected(where: str, error: Exception) -> Problem:
    """Return what to say of an error that nobody foresaw.

    Its own text is left out: it may state a patient's values.

    Args:
        where: Whose.
        error: The error, as it was caught.
    """
    if out_of_memory(error):
        return Problem(
            where,
            "memory does not hold what its answer takes",
            expected="a record that fits into the memory of the device",
            got=type(error).__name__,
            remedy="Give the process more memory, or compute with --device cpu, into a new folder",
        )
    ours = [
        f"{Path(frame.filename).relative_to(_PACKAGE.parent).as_posix()}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_PACKAGE)
    ]
    return Problem(
        where,
        "an unexpected error, which is a bug of dymo-med and not the patient's fault",
        got=f"{type(error).__name__} in {ours[-1]}" if ours else type(error).__name__,
        remedy="Please report it; --verbose shows the traceback, which may hold patients' values",
    )
