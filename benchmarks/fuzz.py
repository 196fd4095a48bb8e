"""Coverage-guided fuzzing of what reads foreign files; only our own errors may come out.

    pip install 'dymo-med[fuzz]'
    python benchmarks/fuzz.py table --seconds 120

Targets: `table` (CSV), `json` (a table in JSON), `yaml` (recipes and cohort descriptions), `bundle`
(JSON of bundles) and `nifti` (headers). Prints executions and what was found; exit code 1 if
anything was. Needs atheris, which has wheels for Linux only.

The last runs, 60 seconds each on one busy core: `json` 15,873 executions, `bundle` 6,166; no
findings.
"""

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dymo_med", "yaml", "json", "csv", "nibabel"]):
    from dymo_med.bundle import read_recipe
    from dymo_med.data.cohort import read_cohort
    from dymo_med.errors import DymoMedError
    from dymo_med.files import read_json
    from dymo_med.modalities import modality
    from dymo_med.types import Column, ModalitySpec

COLUMNS = (
    Column("age", "continuous", "years", (0.0, 120.0)),
    Column("sex", "categorical", values=("F", "M")),
)
TABLE = ModalitySpec("ehr", "table", "ehr.csv", (2,), columns=COLUMNS)
SCAN = ModalitySpec("t1", "image", "t1.nii", (1, 8, 8, 8), (2.0, 2.0, 2.0), "zscore")
SEEDS = {
    "table": [b"age,sex\n61,F\n", b'\xef\xbb\xbf"age";sex\n"6,1";M\n', b"sex\tage\nF\t1e3\n"],
    "json": [b'{"age": 61, "sex": "F"}', b'[{"age": {"value": 1, "unit": "years"}}]'],
    "yaml": [
        b"name: a\nimputer: {name: mopoe, latent: 4}\nbackbone: {name: transformer}\n",
        b"name: a\ntask: {type: classification, target: y, classes: [a, b]}\n"
        b"modalities:\n  t1: {kind: image, dims: 3, file: a.nii, size: [8, 8, 8],"
        b" spacing_mm: [1, 1, 1]}\n",
        b"a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}}\n",
    ],
    "bundle": [b'{"a": [1, 2.5, null, true, "x"], "b": {"c": -1e-3}}'],
}


def targets(folder: Path) -> dict:
    """Return what each target does with the bytes it is given."""
    table, scan = modality(TABLE), modality(SCAN)

    def put(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    def read_table(data: bytes) -> None:
        put("ehr.csv", data)
        table.read(folder, "Patient x", ("n/a",))

    def read_json_table(data: bytes) -> None:
        put("ehr.json", data)
        table.read(folder, "Patient x", ("n/a",))

    def read_yaml(data: bytes) -> None:
        path = put("x.yaml", data)
        try:
            read_recipe(path)
        except DymoMedError:
            read_cohort(path)

    def read_bundle(data: bytes) -> None:
        try:
            read_json(put("x.json", data))
        except ValueError as error:  # what the bundle's reader turns into an error of its own
            if type(error) is not ValueError:
                raise

    def read_nifti(data: bytes) -> None:
        put("t1.nii", data)
        scan.read(folder, "Patient x")

    return {
        "table": read_table,
        "json": read_json_table,
        "yaml": read_yaml,
        "bundle": read_bundle,
        "nifti": read_nifti,
    }


def nifti_seed() -> bytes:
    """Return a small NIfTI file."""
    import nibabel as nib
    import numpy as np

    values = np.arange(512, dtype=np.int16).reshape(8, 8, 8)
    return nib.Nifti1Image(values, np.diag([2.0, 2.0, 2.0, 1.0])).to_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=[*SEEDS, "nifti"])
    parser.add_argument("--seconds", type=int, default=120)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = Path(tempfile.mkdtemp(prefix="corpus-"))
    seeds = [nifti_seed()] if options.target == "nifti" else SEEDS[options.target]
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    act = targets(folder)[options.target]
    found: dict[str, bytes] = {}
    executions, end = 0, time.monotonic() + options.seconds

    def once(data: bytes) -> None:
        nonlocal executions
        executions += 1
        try:
            act(data)
        except DymoMedError:
            pass
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found.setdefault(f"{type(error).__name__} in {where.filename}:{where.lineno}", data)
        if time.monotonic() > end:
            print(f"{options.target}: {executions} executions, {len(found)} findings")
            for name, example in found.items():
                print(f"  {name}: {example[:200]!r}")
            sys.stdout.flush()
            os._exit(bool(found))  # libFuzzer would go on

    atheris.Setup([sys.argv[0], str(corpus), "-max_len=4096", "-verbosity=0"], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
