"""Lay out the lower-grade gliomas as a cohort: `prepare.py SOURCE OUT [--seed 0]`.

SOURCE is laid out as README.md beside this file describes. OUT must not exist yet; it appears when
it is complete. Scans and masks are linked where the file system allows it, and copied otherwise.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCANS = ("flair.nii.gz", "t1.nii.gz", "t1ce.nii.gz")
MASK = "mask.nii.gz"
SHARES = {"test": 0.2, "validation": 0.12, "calibration": 0.16}  # the rest is train
GRADES = {"1": "II", "2": "III", "": ""}
# The table's columns, and what the cohort calls them. Left out: what comes from the same look
# through the microscope as the grade (histological type), what comes later (death), the cluster
# of clusters, which repeats the others, and what the cohort is too small or too uniform for.
COLUMNS = {
    "age_at_initial_pathologic": "age",
    "gender": "sex",
    "laterality": "laterality",
    "tumor_location": "location",
    "RNASeqCluster": "rna_sequencing",
    "MethylationCluster": "methylation",
    "miRNACluster": "micro_rna",
    "CNCluster": "copy_number",
    "RPPACluster": "rppa",
    "OncosignCluster": "oncosign",
}


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """Return the rows of `clinical.csv` by patient; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return {row["Patient"].strip(): row for row in csv.DictReader(stream)}
    except (OSError, KeyError, UnicodeDecodeError) as error:
        sys.exit(f"{path}: cannot be read as a table with a column Patient ({error}).")


def assign_splits(patterns: Mapping[str, str], seed: int) -> dict[str, str]:
    """Return the split of each patient: about 52 / 12 / 16 / 20 % of each pattern of scans.

    Args:
        patterns: What each patient has.
        seed: Seed of the shuffle.
    """
    # Shuffled within a pattern and dealt like cards, so that every split has its share of each.
    generator = random.Random(seed)
    line: list[str] = []
    for pattern in sorted(set(patterns.values())):
        group = sorted(p for p, own in patterns.items() if own == pattern)
        generator.shuffle(group)
        line += group
    splits: dict[str, str] = {}
    counts = dict.fromkeys(("train", *SHARES), 0)
    shares = {"train": 1 - sum(SHARES.values()), **SHARES}
    for done, patient in enumerate(line, start=1):
        split = max(counts, key=lambda name: shares[name] * done - counts[name])
        splits[patient] = split
        counts[split] += 1
    return splits


def place(source: Path, target: Path) -> None:
    """Link a file, or copy it where links are not possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a small CSV file."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def prepare(source: Path, out: Path, seed: int) -> None:
    """Write the cohort.

    Args:
        source: Folder with `patients/` and, for the grade, `clinical.csv`.
        out: Folder to make.
        seed: Seed of the shuffle of patients.
    """
    folders = {f.name: f for f in sorted((source / "patients").iterdir()) if f.is_dir()}
    patterns = {
        name: "+".join(scan.split(".")[0] for scan in SCANS if (folder / scan).is_file())
        for name, folder in folders.items()
    }
    without = [name for name, pattern in patterns.items() if not pattern]
    if without or not folders:
        sys.exit(f"{source}: {', '.join(without) or 'no patient'} has no scan. See README.md.")
    table = read_table(source / "clinical.csv")
    if table and set(folders) - set(table):
        sys.exit(f"{source}: clinical.csv lacks {', '.join(sorted(set(folders) - set(table)))}.")
    splits = assign_splits(patterns, seed)

    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for name, folder in folders.items():
            (work / "patients" / name).mkdir(parents=True)
            for file in (*SCANS, MASK):
                if (folder / file).is_file():
                    place(folder / file, work / "patients" / name / file)
        write_csv(work / "splits.csv", ("patient_id", "split"), sorted(splits.items()))
        shutil.copyfile(HERE / "cohort.yaml", work / "cohort.yaml")
        if table:
            grades = [
                (name, GRADES[table[name]["neoplasm_histologic_grade"].strip()]) for name in folders
            ]
            write_csv(work / "labels.csv", ("patient_id", "grade"), grades)
            rows = [[name, *(table[name][c].strip() for c in COLUMNS)] for name in folders]
            write_csv(work / "clinical.csv", ("patient_id", *COLUMNS.values()), rows)
            shutil.copyfile(HERE / "cohort-grade.yaml", work / "cohort-grade.yaml")
        work.chmod(0o755)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for split in ("train", "validation", "calibration", "test"):
        own = [name for name, s in splits.items() if s == split]
        complete = sum(patterns[name].count("+") == len(SCANS) - 1 for name in own)
        print(f"{split}: {len(own)} patients, {complete} with all scans")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out}: exists already. Choose another folder or remove it.")
    if not (arguments.source / "patients").is_dir():
        sys.exit(f"{arguments.source}: has no folder patients. See README.md for the layout.")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    prepare(arguments.source, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
