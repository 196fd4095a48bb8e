"""How long the tables of a large FHIR record take to read.

    python benchmarks/fhir.py --observations 100000 --tables 3

A record with one Patient and so many Observations (laboratory values, vital signs, codes; made by
a seed) is written into a folder that is removed again, as a Bundle and as lines of resources, and
several tables read it as `check` and `predict` do. Printed are seconds, memory and the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from dymo_med.modalities import modality
from dymo_med.modalities.fhir_record import LOINC
from dymo_med.modalities.table import Table, TableEntry

CODES = {
    "2345-7": "mg/dL",
    "718-7": "g/dL",
    "8480-6": "mm[Hg]",
    "8867-4": "/min",
    "2160-0": "mg/dL",
}


def resources(number: int, seed: int) -> list[dict[str, object]]:
    """Return a Patient and so many Observations."""
    rng = np.random.default_rng(seed)
    made: list[dict[str, object]] = [
        {"resourceType": "Patient", "id": "p", "gender": "female", "birthDate": "1960-02-29"}
    ]
    codes = list(CODES)
    for k in range(number):
        code = codes[k % len(codes)]
        time_of = np.datetime64("2010-01-01T08:00:00") + np.timedelta64(k, "m")
        made.append(
            {
                "resourceType": "Observation",
                "id": f"o{k}",
                "meta": {"versionId": "1", "lastUpdated": f"{time_of}Z"},
                "status": "final",
                "category": [{"coding": [{"system": "urn:category", "code": "laboratory"}]}],
                "code": {"coding": [{"system": LOINC, "code": code, "display": "a value"}]},
                "subject": {"reference": "Patient/p"},
                "effectiveDateTime": f"{time_of}Z",
                "valueQuantity": {
                    "value": round(float(rng.uniform(60, 140)), 1),
                    "unit": CODES[code],
                    "system": "http://unitsofmeasure.org",
                    "code": CODES[code],
                },
            }
        )
    return made


def tables(number: int) -> list[Table]:
    """Return so many tables of one record, each with all columns."""
    columns = {
        "age": {"type": "date", "fhir": "birthDate", "until": "effective"},
        **{
            f"c{code.replace('-', '_')}": {
                "type": "continuous",
                "unit": unit,
                "range": [0, 1000],
                "loinc": code,
                "pick": "latest",
            }
            for code, unit in CODES.items()
        },
    }
    entry = {"kind": "table", "format": "fhir", "file": "fhir.json", "columns": columns}
    made = []
    for k in range(number):
        spec = Table.spec_from_entry(f"t{k}", TableEntry.model_validate(entry))
        made.append(modality(spec))
    return made  # type: ignore[return-value]


def main() -> None:
    """Write, read, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--observations", type=int, default=100_000)
    parser.add_argument("--tables", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    made = resources(options.observations, options.seed)
    bundle = {"resourceType": "Bundle", "type": "collection"}
    forms = {
        "fhir.json": json.dumps({**bundle, "entry": [{"resource": r} for r in made]}),
        "fhir.ndjson": "\n".join(json.dumps(r) for r in made) + "\n",
    }
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    for name, text in forms.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / name).write_text(text)
            start, work = time.perf_counter(), time.process_time()
            for number, table in enumerate(tables(options.tables), start=1):
                value = table.read(Path(folder), "Patient p")
                seconds, busy = time.perf_counter() - start, time.process_time() - work
                filled = 0 if value is None else int(value.observed_fields.sum())
                print(
                    f"{name}, {len(text) / 1e6:.0f} MB: {seconds:.1f} s"
                    f" ({busy:.1f} s of a processor)"
                    f" after table {number}, {filled} cells"
                )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{peak:.1f} GB at most, this script's own copy included")


if __name__ == "__main__":
    main()
