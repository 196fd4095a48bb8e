"""Writes labels.csv and splits.csv beside the BraTS 2018 training cases.

    python cohorts/brats2018/prepare.py DATA COHORT [--split gmd|common]

DATA holds one folder per case, directly or under HGG and LGG, with CASE_t1.nii.gz and so on. COHORT
becomes a cohort whose `patients` are links to these folders. Nothing is copied or changed.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
from pathlib import Path

import numpy as np

SEQUENCES = ("t1", "t1ce", "t2", "flair")
# Cases in train, validation and test of the split that most papers use, by size.
COMMON = (199, 29, 57)
# Of the training cases, which part chooses the epoch, and which part the selector.
VALIDATION, CALIBRATION = 0.1, 0.05


def cases_of(data: Path) -> list[Path]:
    """Return the folders of cases, sorted by name.

    Raises:
        SystemExit: If there is none.
    """
    found = [
        p.parent for p in data.rglob("*_flair.nii.gz") if p.name == f"{p.parent.name}_flair.nii.gz"
    ]
    if not found:
        sys.exit(f"{data}: no folder CASE with CASE_flair.nii.gz")
    return sorted(found, key=lambda p: p.name)


def split_cases(count: int, rule: str) -> list[str]:
    """Return the split of each case, in the order of names.

    Args:
        count: How many cases there are.
        rule: `gmd`: the first of five folds of a permutation with seed 0 is the test split (57 of
            285); `common`: 199, 29 and 57 of 285 (as shares for other counts), same permutation.

    Returns:
        `train`, `validation`, `calibration` or `test`. Validation and calibration cases are taken
        from the end of the training part of the same permutation.
    """
    order = np.random.RandomState(0).permutation(count)
    if rule == "gmd":
        test = max(1, count // 5)
        testing, training = order[:test], order[test:]
        validating = training[len(training) - max(1, round(VALIDATION * len(training))) :]
        training = training[: len(training) - len(validating)]
    else:
        shares = np.array(COMMON) / sum(COMMON)
        test, valid = (max(1, round(share * count)) for share in (shares[2], shares[1]))
        testing, validating, training = (
            order[:test],
            order[test : test + valid],
            order[test + valid :],
        )
    held = max(1, round(CALIBRATION * len(training)))
    names = np.array(["train"] * count, dtype=object)
    names[testing], names[validating] = "test", "validation"
    names[training[len(training) - held :]] = "calibration"
    return names.tolist()


def prepare(data: Path, cohort: Path, rule: str) -> int:
    """Write the cohort; return how many cases it has."""
    cases = cases_of(data)
    (cohort / "patients").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("cohort.yaml"), cohort)
    for case in cases:
        (cohort / "patients" / case.name).symlink_to(case.resolve(), target_is_directory=True)
    for name, header, rows in (
        ("labels.csv", ("patient_id",), [(case.name,) for case in cases]),
        (
            "splits.csv",
            ("patient_id", "split"),
            zip((case.name for case in cases), split_cases(len(cases), rule), strict=True),
        ),
    ):
        with (cohort / name).open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    return len(cases)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--split", choices=("gmd", "common"), default="common")
    given = parser.parse_args()
    print(f"{prepare(given.data, given.cohort, given.split)} cases in {given.cohort}")
