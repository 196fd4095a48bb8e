"""The records that something is fitted on, read and found enough."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

import dymo_med
from dymo_med.bundle import hashed_id
from dymo_med.config import Recipe
from dymo_med.data.gate import WITHOUT_IT
from dymo_med.data.masks import read_known
from dymo_med.errors import PatientDataError, Problem
from dymo_med.training.loop import Log
from dymo_med.types import Batch, Cohort, PatientRecord, Split

FITTED_ON: tuple[Split, ...] = ("train", "validation", "calibration")


def provenance_of(
    plan: Recipe,
    described: Cohort,
    data: Mapping[Split, Batch],
    labelled: Mapping[Split, Batch],
    log: Log,
) -> dict[str, Any]:
    """Return what a bundle remembers of how it came about."""
    return {
        "cohort": described.name,
        "recipe": plan.model_dump(),
        "records": {s: len(b) for s, b in data.items()},
        "labelled_records": {s: len(b) for s, b in labelled.items()},
        "patients": {
            s: sorted({hashed_id(plan.name, p) for p in b.patient_ids}) for s, b in data.items()
        },
        "observed_share": {
            spec.name: round(float(data["train"].observed.available[:, m].double().mean()), 4)
            for m, spec in enumerate(described.specs)
        },
        "best_epoch": {stage: log.best_epoch(stage) for stage in log.stages},
        "versions": {
            "dymo_med": dymo_med.__version__,
            **{name: version(name) for name in ("torch", "monai", "numpy")},
        },
    }


def read_fitted_on(
    cohort: Cohort, reading: Callable[[int, int], None] | None
) -> dict[Split, list[PatientRecord]]:
    """Read every record that something is fitted on; ones with nothing observed are left out."""
    listed = [(split, entry) for split in FITTED_ON for entry in cohort.in_split(split)]
    records: dict[Split, list[PatientRecord]] = {split: [] for split in FITTED_ON}
    problems: list[Problem] = []
    for done, (split, entry) in enumerate(listed, start=1):
        try:
            record = read_known(entry, cohort, require_something=False)
        except PatientDataError as error:
            problems += error.problems
            continue
        if record.modalities:
            records[split].append(record)
        if reading is not None:
            reading(done, len(listed))
    if problems:
        # Other commands go on without what is refused; this one has no such option.
        raise PatientDataError(
            *(replace(p, remedy=p.remedy.replace(f"; {WITHOUT_IT}", "")) for p in problems)
        )
    return records


def fingerprint_of(
    recipe: Recipe, cohort: Cohort, records: Mapping[Split, Sequence[PatientRecord]]
) -> str:
    """Return a hash of everything a resumed run must have in common with the first one."""
    about: dict[str, Any] = {
        "recipe": recipe.model_dump(),
        "specs": [spec.to_dict() for spec in cohort.specs],
        "records": [
            [split, r.record_id, r.label, {n: v.source.sha256 for n, v in r.modalities.items()}]
            for split, part in records.items()
            for r in part
        ],
        "versions": [dymo_med.__version__, torch.__version__],
    }
    times = [(r.value, r.event) for part in records.values() for r in part if r.event is not None]
    if times:
        about["task"], about["times"] = cohort.task.to_dict(), times
    if cohort.task.files:
        about["task"] = cohort.task.to_dict()
        about["masks"] = [
            None if r.mask is None else hashlib.sha256(r.mask.numpy().tobytes()).hexdigest()
            for part in records.values()
            for r in part
        ]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
