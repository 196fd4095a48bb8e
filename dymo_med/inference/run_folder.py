"""Where an evaluation keeps what is finished, so that it can be gone on with and shared."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from dymo_med.data.missingness import Scenario
from dymo_med.errors import ConfigError, Problem
from dymo_med.files import read_json, remove_abandoned, write_json
from dymo_med.inference.scores import Row
from dymo_med.types import Cohort, CohortRecord, ModalitySpec

PROGRESS = ".progress"


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


def prepare_folder(
    out: Path, known: Row, resume: bool, num_parts: int, what: str = "evaluation"
) -> None:
    """Prepare the folder: a new one, or one that may be gone on with.

    Args:
        out: The folder.
        known: Settings that it must be gone on with.
        resume: Whether it may be gone on with.
        num_parts: How many processes share it.
        what: What is kept there, for errors.

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
                f"holds no {what} to go on with",
                expected=f"a folder of an {what} that was interrupted",
                remedy="Name another folder with --out",
            )
        )
    earlier = read_written(marker)
    now = json.loads(json.dumps(known))
    differing = [key for key in now if earlier.get(key) != now[key]]
    if differing:
        raise ConfigError(
            Problem(
                str(out),
                f"holds an {what} with another {', '.join(differing)}",
                expected="the same settings",
                remedy="Repeat its settings, or name another folder with --out",
            )
        )


def read_written(path: Path) -> Any:
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
                expected="JSON that this command wrote",
                got=type(error).__name__ if isinstance(error, OSError) else str(error),
                remedy="Remove a batch's file and go on with --resume; without settings.json, begin"
                " again in another folder",
            )
        ) from None


def digest_of(records: Sequence[CohortRecord]) -> str:
    """Return a hash of what finished batches say of their records besides the answers."""
    rows = [
        # A corrected number may stay within its band.
        (
            r.record_id,
            r.patient_id,
            r.label,
            *(() if r.value is None else (r.value,)),
            *(() if r.event is None else (r.event,)),
        )
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


def batch_file(rule: Scenario, number: int) -> str:
    """Return the progress file of a batch; the text may hold what file names must not."""
    digest = sha256((rule.text + rule.digest).encode()).hexdigest()[:8]
    return f"{rule.kind}-{digest}-{number:05d}.json"
