"""A small synthetic cohort on disk, made once per session, and where optional data is."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_record
from dymo_med.privacy import KEY_VARIABLE

SPLIT_OF_PATIENT = (
    ["train"] * 10 + ["validation"] * 3 + ["calibration"] * 3 + ["test"] * 4
)  # 20 patients
TWO_VISITS = (0, 3, 11, 17)  # patients who came twice: 24 records

COHORT = {
    "name": "small",
    "description": "Synthetic; for tests only.",
    "task": {"type": "classification", "target": "grade", "classes": ["low", "high"]},
    "modalities": {
        "t1": {
            "kind": "image",
            "dims": 3,
            "file": "t1.nii.gz",
            "size": [16, 16, 16],
            "spacing_mm": [2, 2, 2],
        },
        "t2": {
            "kind": "image",
            "dims": 3,
            "file": "t2.nii.gz",
            "size": [16, 16, 16],
            "spacing_mm": [2, 2, 2],
        },
        "photo": {
            "kind": "image",
            "dims": 2,
            "file": "photo.png",
            "size": [16, 16],
            "intensity": "percentile",
        },
        "demographics": {
            "kind": "table",
            "file": "ehr.csv",
            "columns": {
                "age": {"type": "continuous", "unit": "years", "range": [0, 120]},
                "sex": {"type": "categorical", "values": ["F", "M"]},
            },
        },
        "labs": {
            "kind": "table",
            "file": "ehr.csv",
            "columns": {
                "ldh": {"type": "continuous", "unit": "U/L", "range": [50, 2000]},
                "crp": {"type": "continuous", "unit": "mg/L", "range": [0, 500]},
                "blood_group": {"type": "categorical", "values": ["A", "B", "AB", "0"]},
            },
        },
    },
    "missing_values": ["n/a"],
}


def write_cohort(folder: Path, seed: int = 0) -> Path:
    """Write a cohort of 24 records of 20 patients; every modality depends on the label.

    The first record of each patient with an even number has everything; others lack something.
    Record p019 is not labelled.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cohort.yaml").write_text(yaml.safe_dump(COHORT, sort_keys=False))
    labels, splits = ["record_id,patient_id,grade"], ["patient_id,split"]
    drops = (["t2"], ["photo"], ["t1"], ["demographics"], ["labs"], ["t1", "labs"], ["cells"])
    missing = 0
    for number, split in enumerate(SPLIT_OF_PATIENT):
        patient = f"p{number:03d}"
        splits.append(f"{patient},{split}")
        high = (number // 2) % 2 if split == "train" else number % 2
        for visit in range(2 if number in TWO_VISITS else 1):
            record = patient if visit == 0 else f"{patient}_v2"
            label = "" if number == 19 else COHORT["task"]["classes"][high]
            labels.append(f"{record},{patient},{label}")
            lacks: list[str] = []
            if visit or number % 2:
                lacks = drops[missing % len(drops)]
                missing += 1
            write_patient(folder / "patients" / record, rng, bool(high), lacks)
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    (folder / "splits.csv").write_text("\n".join(splits) + "\n")
    return folder


def write_patient(folder: Path, rng: np.random.Generator, high: bool, lacks: list[str]) -> None:
    """Write one patient directory."""
    folder.mkdir(parents=True)
    shape, spacing = (18, 20, 12), (2.0, 2.0, 3.0)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-17, -19, -16.5]
    world = [affine[a, a] * np.arange(shape[a]) + affine[a, 3] for a in range(3)]
    x, y, z = np.meshgrid(*world, indexing="ij")
    head = (x / 16) ** 2 + (y / 18) ** 2 + (z / 16) ** 2 < 1
    lesion = (x - 5) ** 2 + y**2 + z**2 < (7 if high else 4) ** 2
    for name, contrast in (("t1", -40.0), ("t2", 60.0)):
        if name not in lacks:
            scan = np.where(head, 100 + contrast * lesion + rng.normal(0, 6, shape), 0)
            image = nib.Nifti1Image(scan.clip(0).astype(np.int16), affine)
            image.header.set_xyzt_units("mm")
            nib.save(image, folder / f"{name}.nii.gz")
    if "photo" not in lacks:
        rows, columns = np.mgrid[0:24, 0:20]
        disc = (rows - 8) ** 2 + (columns - 12) ** 2 < (60 if high else 25)
        grey = 60 + 120 * disc + rng.normal(0, 8, disc.shape)
        Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(folder / "photo.png")
    row = {
        "age": f"{rng.normal(60 if high else 45, 10):.0f}",
        "sex": rng.choice(["F", "M"]),
        "ldh": f"{rng.normal(300 if high else 200, 40):.1f}",
        "crp": f"{abs(rng.normal(30 if high else 10, 8)):.1f}",
        "blood_group": rng.choice(["A", "B", "AB", "0"]),
    }
    if "demographics" in lacks:
        row |= {"age": "", "sex": ""}
    if "labs" in lacks:
        row |= {"ldh": "", "crp": "", "blood_group": ""}
    if "cells" in lacks:
        row |= {"age": "n/a", "crp": ""}
    (folder / "ehr.csv").write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")


@pytest.fixture(scope="session")
def cohort_dir(tmp_path_factory):
    """Folder of the small cohort; read only, shared by the whole session."""
    return write_cohort(tmp_path_factory.mktemp("small") / "cohort")


@pytest.fixture(scope="session")
def cohort(cohort_dir):
    """The small cohort, described."""
    return read_cohort(cohort_dir)


@pytest.fixture(scope="session")
def records(cohort):
    """All records of the small cohort, read."""
    return [read_record(entry, cohort.specs, cohort.missing_values) for entry in cohort.records]


@pytest.fixture(scope="session", autouse=True)
def _own_key(tmp_path_factory):
    """Make pseudonyms with a key of the session's own; the user's stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, str(tmp_path_factory.mktemp("key") / "key"))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    """Start every test from the same global random state."""
    torch.manual_seed(0)
    np.random.seed(0)


def shared_data(*parts: str) -> Path:
    """Return a path in the optional data folder, or skip the test.

    The folder is `DYMO_MED_SHARED`, or `shared` beside the repository.
    """
    beside = Path(__file__).resolve().parents[1].parent / "shared"
    path = Path(os.environ.get("DYMO_MED_SHARED", beside)).joinpath("data", *parts)
    if not path.exists():
        pytest.skip(f"optional data {'/'.join(parts)} is not there; set DYMO_MED_SHARED")
    return path
