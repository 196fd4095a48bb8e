"""Simulated patients of many settings as one cohort: what the shipped bundle learns from.

python benchmarks/mixed_cohort.py make COHORT --batches 12 --patients 50 --seed 0
python benchmarks/mixed_cohort.py test BUNDLE WORK --batches 4 --patients 50 --seed 1000

`make` draws a setting for every batch (every third keeps the default), simulates its patients and
puts all of them in one folder with one `truth.csv`. `test` makes another such cohort, of settings
that no training patient had, evaluates the bundle on it, and prints how far its answers are from
the exact posterior.
"""

import argparse
import csv
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from dymo_med import evaluate, load_bundle, read_cohort, simulate
from dymo_med.data.dials import SETTINGS, Dials

FILES = ("labels.csv", "splits.csv", "truth.csv")


def drawn(number: int, rng: np.random.Generator) -> Dials:
    """Return the default for every third batch, else dials between the default and `hard`."""
    usual, hard = SETTINGS["default"], SETTINGS["hard"]
    if number % 3 == 0:
        return usual
    changed = {}
    for name in type(usual).model_fields:
        low, high = getattr(usual, name), getattr(hard, name)
        if name == "detail" or low == high:
            continue
        share = float(rng.uniform())
        if isinstance(low, bool):
            changed[name] = bool(rng.uniform() < 0.5)
        elif isinstance(low, tuple):
            between = [a + share * (b - a) for a, b in zip(low, high, strict=True)]
            whole = all(isinstance(a, int) for a in low)
            changed[name] = tuple(round(x) if whole else round(x, 4) for x in between)
        else:
            changed[name] = round(low + share * (high - low), 4)
    return usual.model_copy(update=changed)


def make(out: Path, batches: int, patients: int, seed: int, size: int, split: str = "") -> Path:
    """Write the cohort.

    Args:
        out: New folder.
        batches: Settings of the dials.
        patients: Of each.
        seed: Of dials and patients; batches have seeds of their own from here on.
        size: Voxels along each axis.
        split: Put everybody into this split; empty = as simulated.
    """
    rng = np.random.default_rng([seed, 17])
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in FILES}
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        for number in range(batches):
            part = simulate(
                Path(work) / str(number),
                patients,
                seed=seed + number,
                size=size,
                dials=drawn(number, rng),
            )
            (out / "patients").mkdir(parents=True, exist_ok=True)
            for folder in sorted((part / "patients").iterdir()):
                shutil.move(str(folder), out / "patients" / folder.name)
            for name in FILES:
                with (part / name).open(newline="") as stream:
                    rows[name] += list(csv.DictReader(stream))
            if number == 0:
                shutil.copy(part / "cohort.yaml", out / "cohort.yaml")
            print(f"batch {number + 1} of {batches}", flush=True)
    for name, found in rows.items():
        if split and name == "splits.csv":
            found = [{**row, "split": split} for row in found]
        with (out / name).open("w", newline="") as stream:
            # Only batches with a second site say where a patient was scanned.
            columns = list(dict.fromkeys(column for row in found for column in row))
            writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("make", "test"):
        command = commands.add_parser(name)
        if name == "test":
            command.add_argument("bundle", type=Path)
        command.add_argument("out", type=Path)
        command.add_argument("--batches", type=int, default=12 if name == "make" else 4)
        command.add_argument("--patients", type=int, default=50)
        command.add_argument("--seed", type=int, default=0 if name == "make" else 1000)
        command.add_argument("--size", type=int, default=48)
    a = parser.parse_args()
    (a.out.parent if a.command == "make" else a.out).mkdir(parents=True, exist_ok=True)
    if a.command == "make":
        make(a.out, a.batches, a.patients, a.seed, a.size)
        return
    cohort = make(a.out / "cohort", a.batches, a.patients, a.seed, a.size, split="test")
    evaluate(
        load_bundle(a.bundle, "cpu"),
        read_cohort(cohort),
        a.out / "evaluation",
        scenarios=("as-is", "rate:0.25", "rate:0.5", "rate:0.75"),
        reports=0,
    )
    exact = Path(__file__).with_name("exact.py")
    subprocess.run([sys.executable, str(exact), str(a.out / "evaluation"), str(cohort)], check=True)
    print(platform.processor() or platform.machine())


if __name__ == "__main__":
    main()
