"""Give a bundle that was made without them what the quality gate compares with.

    python benchmarks/quality_norms.py BUNDLE COHORT OUT

COHORT is the one that the bundle was trained on: its training patients must be those whom the
bundle names, each by the hash that it keeps. `configs/quality.json` is fitted on them as `train`
does it. Everything else in OUT, weights included, is that of BUNDLE, byte for byte; the id differs,
as it does whenever a file is added. The bundle that ships with the package got its norms this way.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from dymo_med import load_bundle, read_cohort
from dymo_med.bundle import hashed_id, save_bundle
from dymo_med.data.gate import fit_norms
from dymo_med.data.patient import read_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("bundle", "cohort", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    bundle, cohort = load_bundle(given.bundle, "cpu"), read_cohort(given.cohort)
    entries = cohort.in_split("train")
    theirs = sorted({hashed_id(bundle.name, entry.patient_id) for entry in entries})
    if theirs != bundle.provenance["patients"]["train"]:
        sys.exit(f"{given.cohort} does not hold the patients that {bundle.name} was trained on")
    records = [
        read_record(entry, cohort.specs, cohort.missing_values, require_something=False)
        for entry in entries
    ]
    records = [record for record in records if record.modalities]
    norms = fit_norms(bundle.specs, records, cohort.quality)
    print(save_bundle(replace(bundle, norms=norms), given.out))
    before = {p.relative_to(given.bundle): p.read_bytes() for p in given.bundle.rglob("*.*")}
    after = {p.relative_to(given.out): p.read_bytes() for p in given.out.rglob("*.*")}
    changed = sorted(str(p) for p in {*before, *after} if before.get(p) != after.get(p))
    print(f"added or changed: {', '.join(changed)}")


if __name__ == "__main__":
    main()
