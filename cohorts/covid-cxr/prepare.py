"""Turn the chest-radiograph collection into a cohort: `prepare.py SOURCE OUT [--seed 0]`.

SOURCE is laid out as README.md beside this file describes. OUT must not exist yet; it appears when
it is complete. Pictures are linked where the file system allows it, and copied otherwise.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
DEV_SPLITS = {"validation": 0.2, "calibration": 0.2}  # the rest of dev_train is train
CLASSES = {"0": "no", "1": "yes", "": ""}


def read_table(path: Path, key: str = "visit_id") -> dict[str, dict[str, str]]:
    """Return the rows of a CSV file by visit."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return {row[key].strip(): row for row in csv.DictReader(stream)}
    except (OSError, KeyError, UnicodeDecodeError) as error:
        sys.exit(f"{path}: cannot be read as a table with a column {key} ({error}).")


def assign_splits(labels: Mapping[str, str], testing: Mapping[str, bool], seed: int) -> dict:
    """Return the split of each patient.

    Patients of dev_test are test. Those of dev_train are shared out 60 / 20 / 20, separately for
    each label (and for those without one), so that every split has its share of each.

    Args:
        labels: Class of each patient, empty where it is not known.
        testing: Whether a patient is in dev_test.
        seed: Seed of the shuffle.
    """
    splits = {patient: "test" for patient, is_test in testing.items() if is_test}
    generator = random.Random(seed)
    for label in sorted(set(labels.values())):
        group = sorted(p for p, own in labels.items() if own == label and not testing[p])
        generator.shuffle(group)
        start = 0
        for split, share in DEV_SPLITS.items():
            count = round(share * len(group))
            splits.update(dict.fromkeys(group[start : start + count], split))
            start += count
        splits.update(dict.fromkeys(group[start:], "train"))
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
        source: Folder with `images/`, `ehr.csv`, `labels.csv` and `split.csv`.
        out: Folder to make.
        seed: Seed of the shuffle of patients.
    """
    described = yaml.safe_load((HERE / "cohort.yaml").read_text(encoding="utf-8"))
    modalities = described["modalities"].values()
    pictures = [m["file"] for m in modalities if m["kind"] == "image"]
    # Only declared columns are copied: columns that state the outcome never reach the cohort.
    columns = [name for m in modalities if m["kind"] == "table" for name in m["columns"]]
    ehr, outcomes, split = (read_table(source / f"{n}.csv") for n in ("ehr", "labels", "split"))
    visits = [v for v in sorted(split) if split[v]["split"] in ("dev_train", "dev_test")]
    if set(visits) - set(ehr) or set(visits) - set(outcomes):
        sys.exit(f"{source}: split.csv lists visits that ehr.csv or labels.csv do not have.")

    of_patient: dict[str, list[str]] = defaultdict(list)
    for visit in visits:
        of_patient[split[visit]["patient_id"]].append(visit)
    labels, testing = {}, {}
    for patient, own in of_patient.items():
        known = sorted({CLASSES[outcomes[v]["icu_or_death"].strip()] for v in own} - {""})
        parts = {split[v]["split"] for v in own}
        if len(known) > 1 or len(parts) > 1:
            sys.exit(f"{source}: patient {patient} has two labels or is in two splits.")
        labels[patient] = known[0] if known else ""
        testing[patient] = parts == {"dev_test"}
    splits = assign_splits(labels, testing, seed)

    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for visit in visits:
            folder = work / "patients" / visit
            folder.mkdir(parents=True)
            for name in pictures:
                if (source / "images" / visit / name).exists():
                    place(source / "images" / visit / name, folder / name)
            row = [ehr[visit][column].strip() for column in columns]
            write_csv(folder / "ehr.csv", columns, [row])
        rows = [
            (v, split[v]["patient_id"], CLASSES[outcomes[v]["icu_or_death"].strip()])
            for v in visits
        ]
        write_csv(work / "labels.csv", ("record_id", "patient_id", "icu_or_death"), rows)
        write_csv(work / "splits.csv", ("patient_id", "split"), sorted(splits.items()))
        shutil.copyfile(HERE / "cohort.yaml", work / "cohort.yaml")
        work.chmod(0o755)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for name in ("train", "validation", "calibration", "test"):
        own = [r for r in rows if splits[r[1]] == name]
        known = sum(r[2] != "" for r in own)
        patients = len({r[1] for r in own})
        print(f"{name}: {len(own)} visits of {patients} patients, {known} visits with a label")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out}: exists already. Choose another folder or remove it.")
    if not (arguments.source / "images").is_dir():
        sys.exit(f"{arguments.source}: has no folder images. See README.md for the layout.")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    prepare(arguments.source, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
