"""How often a bundle calls patients unusual or strange: its own, and others.

python benchmarks/novelty.py BUNDLE SOURCE [SOURCE ...]

A SOURCE is a cohort (its test split; a simulated one is also listed by scanner site), or a folder
with one folder of files per patient. What the gate refuses counts as missing, so that novelty alone
is looked at. For a cohort, the held-back scores of the bundle and those of its test patients are
also split at random a thousand times: the mean share of alarms, and how much it varies.
"""

import argparse
import csv
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dymo_med import load_bundle, novelty, read_cohort
from dymo_med.bundle import ModelBundle
from dymo_med.data.batch import collate
from dymo_med.data.patient import read_patient, read_record
from dymo_med.errors import DymoMedError
from dymo_med.inference.matching import matched_specs
from dymo_med.references import features_of, layout_of
from dymo_med.types import PatientRecord

RESPLITS = 1000


def features(bundle: ModelBundle, records: Sequence[PatientRecord]) -> Tensor:
    """Return what is looked at of records `(n, P)`."""
    return torch.cat([features_of(collate([r], bundle.specs), bundle.specs) for r in records])


def of_cohort(bundle: ModelBundle, path: Path) -> tuple[list[PatientRecord], list[str]]:
    """Return records of the test split, one per patient, and the site of each."""
    cohort = read_cohort(path)
    specs = matched_specs(bundle, cohort)
    sites = {}
    if (path / "truth.csv").is_file():
        with (path / "truth.csv").open(newline="", encoding="utf-8") as stream:
            sites = {row["record_id"]: row.get("site", "") for row in csv.DictReader(stream)}
    found = {}
    for entry in cohort.in_split("test"):
        if entry.patient_id not in found:
            found[entry.patient_id] = read_record(
                entry, specs, cohort.missing_values, treat_refused_as_missing=True
            )
    records = list(found.values())
    return records, [sites.get(r.record_id, "") for r in records]


def of_folder(bundle: ModelBundle, path: Path) -> tuple[list[PatientRecord], list[str]]:
    """Return a record of each folder that can be read."""
    found = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        try:
            found.append(
                read_patient(
                    folder,
                    bundle.specs,
                    missing_values=bundle.missing_values,
                    treat_refused_as_missing=True,
                )
            )
        except DymoMedError as error:
            print(f"{folder.name}: {type(error).__name__}")
    return found, [""] * len(found)


def shares(found: Sequence[novelty.Unusual]) -> str:
    """Return how many of them are unusual or strange."""
    unusual = np.mean([u.state in ("unusual", "strange") for u in found])
    strange = np.mean([u.state == "strange" for u in found])
    return f"{len(found):5d} patients   unusual {unusual:6.1%}   of these strange {strange:6.1%}"


def resplit(bundle: ModelBundle, rows: Tensor, owner: Sequence[int]) -> None:
    """Print the share of alarms when held-back and test patients change places at random."""
    known = bundle.novelty
    everyone = torch.cat([known.held_back, novelty.score(known, rows, owner)])
    rng = np.random.default_rng(0)
    alarms = []
    for _ in range(RESPLITS):
        order = torch.from_numpy(rng.permutation(len(everyone)))
        held, rest = order.split([len(known.held_back), len(rows)])
        row = everyone[rest[0]]
        here = replace(known, held_back=everyone[held])
        at = [m for m in range(len(known.names)) if not bool(row[m].isnan())]
        alarms.append(novelty.p_value(here.held_back, row, at)[0])
    p = np.array(alarms)
    for level in (known.strange, known.alarm, 0.1, 0.3):
        print(f"    p <= {level:<5g} in {np.mean(p <= level):6.1%} of {RESPLITS} random splits")


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("sources", type=Path, nargs="+")
    args = parser.parse_args()
    bundle = load_bundle(args.bundle, device="cpu")
    if bundle.novelty is None:
        raise SystemExit("The bundle does not know what is usual: train it again.")
    owner = layout_of(bundle.specs).owner
    print(f"{platform.machine()}, {len(bundle.novelty.held_back)} held-back patients")
    for path in args.sources:
        cohort = (path / "cohort.yaml").is_file()
        records, sites = (of_cohort if cohort else of_folder)(bundle, path)
        rows = features(bundle, records)
        found = novelty.assess(bundle.novelty, rows, owner)
        print(f"{path.name:20s} {shares(found)}")
        for site in sorted(set(sites) - {""}):
            some = [u for u, s in zip(found, sites, strict=True) if s == site]
            print(f"  site {site:13s} {shares(some)}")
        if cohort:
            resplit(bundle, rows, owner)


if __name__ == "__main__":
    main()
