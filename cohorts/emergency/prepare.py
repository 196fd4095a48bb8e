"""Turn emergency tables into a cohort: `prepare.py SOURCE OUT [--seed 0]`.

SOURCE is laid out as README.md beside this file describes. OUT must not exist yet; it appears when
it is complete. A patient directory gets a table for every group of tests of which something was
recorded; cells are copied as they are.
"""

from __future__ import annotations

import argparse
import csv
import random
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
KEY, TARGET = "id", "cardiac"
SHARES = {"test": 0.2, "validation": 0.15, "calibration": 0.15}  # the rest is train


def read_table(path: Path, columns: Sequence[str]) -> dict[str, list[str]]:
    """Return some columns of a CSV file, by the row's id."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
            found = {row[KEY].strip(): [row[c] or "" for c in columns] for row in rows}
    except (OSError, KeyError, UnicodeDecodeError) as error:
        sys.exit(f"{path}: cannot be read as a table with these columns ({error}).")
    if len(found) != len(rows):
        sys.exit(f"{path}: an {KEY} is in two rows.")
    return found


def assign_splits(labels: Mapping[str, str], seed: int) -> dict[str, str]:
    """Return the split of each patient.

    Shares are the same in each label, and in those without one.

    Args:
        labels: Class of each patient, empty where it is not known.
        seed: Seed of the shuffle.
    """
    splits: dict[str, str] = {}
    generator = random.Random(seed)
    for label in sorted(set(labels.values())):
        group = sorted(p for p, own in labels.items() if own == label)
        generator.shuffle(group)
        start = 0
        for split, share in SHARES.items():
            count = round(share * len(group))
            splits.update(dict.fromkeys(group[start : start + count], split))
            start += count
        splits.update(dict.fromkeys(group[start:], "train"))
    return splits


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write a small CSV file."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)


def prepare(source: Path, out: Path, seed: int) -> None:
    """Write the cohort.

    Args:
        source: Folder with a table per group of tests and `labels.csv`.
        out: Folder to make.
        seed: Seed of the shuffle of patients.
    """
    described = yaml.safe_load((HERE / "cohort.yaml").read_text(encoding="utf-8"))
    classes = set(described["task"]["classes"])
    # Only declared columns are copied: a diagnosis or an outcome never reaches the cohort.
    headers = {
        m["file"]: [c["header"] for c in m["columns"].values()]
        for m in described["modalities"].values()
    }
    labels = {p: row[0].strip() for p, row in read_table(source / "labels.csv", [TARGET]).items()}
    if set(labels.values()) - classes - {""}:
        sys.exit(f"{source / 'labels.csv'}: {TARGET} is {' or '.join(sorted(classes))}, or blank.")
    tables = {file: read_table(source / file, columns) for file, columns in headers.items()}
    for file, rows in tables.items():
        if set(rows) != set(labels):
            sys.exit(f"{source / file}: has not the same {KEY}s as labels.csv.")
    splits = assign_splits(labels, seed)

    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for patient in sorted(labels):
            folder = work / "patients" / patient
            folder.mkdir(parents=True)
            for file, columns in headers.items():
                if any(cell.strip() for cell in tables[file][patient]):
                    write_csv(folder / file, [columns, tables[file][patient]])
        write_csv(work / "labels.csv", [("patient_id", TARGET), *sorted(labels.items())])
        write_csv(work / "splits.csv", [("patient_id", "split"), *sorted(splits.items())])
        shutil.copyfile(HERE / "cohort.yaml", work / "cohort.yaml")
        work.chmod(0o755)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for name in ("train", "validation", "calibration", "test"):
        own = [p for p in labels if splits[p] == name]
        print(f"{name}: {len(own)} patients, {sum(labels[p] != '' for p in own)} with a label")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out}: exists already. Choose another folder or remove it.")
    if not (arguments.source / "labels.csv").is_file():
        sys.exit(f"{arguments.source}: has no labels.csv. See README.md for the layout.")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    prepare(arguments.source, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
