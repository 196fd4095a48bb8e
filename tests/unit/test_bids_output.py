"""Derivatives of a BIDS dataset: what its validator says, and what of a scan is said."""

import json
import shutil
import subprocess
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from dymo_med.data.patient import read_patient
from dymo_med.errors import ConfigError
from dymo_med.inference.predict import predict_patient
from dymo_med.inference.segment import segment_patient
from dymo_med.outputs import export
from tests.conftest import write_patient
from tests.segmentation import (  # noqa: F401
    masked_cohort,
    masked_dir,
    segmentation_bundle,
    segmentation_dir,
)
from tests.unit.test_dicom_outputs import tool

NAMES = {"t1": "anat/sub-*_T1w.nii.gz", "t2": "anat/sub-*_acq-tse_*_T2w.nii.gz"}


@pytest.fixture(scope="module")
def bids_bundle(bundle):
    """The small bundle, as if its cohort had been a BIDS dataset."""
    specs = tuple(replace(s, file=NAMES.get(s.name, s.file)) for s in bundle.specs)
    return replace(bundle, specs=specs)


def dataset(root, session):
    """Write a dataset of one subject, without t2."""
    root.mkdir()
    (root / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.0"}')
    folder = root / "sub-01" / "ses-a" if session else root / "sub-01"
    write_patient(folder, np.random.default_rng(5), True, ["t2", "photo"])
    stem = "sub-01_ses-a_T1w" if session else "sub-01_T1w"
    (folder / "anat").mkdir()
    (folder / "t1.nii.gz").rename(folder / "anat" / f"{stem}.nii.gz")
    (folder / "anat" / f"{stem}.json").write_text('{"SkullStripped": true}')
    return folder


def complaints(folder):
    """Return what the validator finds, `CODE severity`."""
    done = subprocess.run(
        [tool("bids-validator-deno"), str(folder), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    return sorted({f"{i['code']} {i['severity']} {i.get('subCode', '')}".strip() for i in issues})


@pytest.mark.parametrize("session", [False, True])
def test_a_recovered_scan_is_a_derivative(tmp_path, bids_bundle, session):
    patient = dataset(tmp_path / "raw", session)
    predict_patient(patient, bids_bundle, tmp_path / "out", explain=False)
    files = {s.name: s.file for s in bids_bundle.specs}
    export(tmp_path / "out", ["bids"], patient, files=files)
    made = tmp_path / "out" / "bids"
    stem = "sub-01_ses-a" if session else "sub-01"
    place = made / "sub-01" / "ses-a" / "anat" if session else made / "sub-01" / "anat"
    path = place / f"{stem}_acq-tse_desc-synthetic_T2w.nii.gz"
    original = tmp_path / "out" / "recovered" / "t2_synthetic.nii.gz"
    assert path.read_bytes() == original.read_bytes()
    assert b"SYNTHETIC" in bytes(nib.load(path).header["descrip"])
    sidecar = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
    source = f"bids:raw:{patient.relative_to(tmp_path / 'raw')}/anat/{stem}_T1w.nii.gz"
    assert sidecar["Sources"] == [source]
    assert sidecar["SyntheticData"] is True
    assert sidecar["SkullStripped"] is True
    assert complaints(made) == ["TOO_FEW_AUTHORS warning"]


def test_without_the_bundle_usual_names_are_known(tmp_path, bids_bundle):
    patient = dataset(tmp_path / "raw", False)
    predict_patient(patient, bids_bundle, tmp_path / "out", explain=False)
    export(tmp_path / "out", ["bids"])
    assert [p.name for p in (tmp_path / "out" / "bids").rglob("*.nii.gz")] == [
        "sub-01_desc-synthetic_T2w.nii.gz"
    ]
    _, notes = export(tmp_path / "out", ["bids"], files={"t2": "strange.nii.gz"})
    assert notes == []


def test_another_patient_is_an_error_and_leaves_nothing(tmp_path, bundle):
    patient = tmp_path / "p1"
    write_patient(patient, np.random.default_rng(5), True, ["t2"])
    predict_patient(patient, bundle, tmp_path / "out", explain=False)
    with pytest.raises(ConfigError, match="not one of a BIDS dataset"):
        export(tmp_path / "out", ["bids"])
    assert not (tmp_path / "out" / "bids").exists()


def test_a_derivative_is_not_read_as_a_scan(tmp_path, bids_bundle):
    patient = dataset(tmp_path / "raw", False)
    predict_patient(patient, bids_bundle, tmp_path / "out", explain=False)
    export(tmp_path / "out", ["bids"], out=tmp_path / "raw" / "derivatives")
    record = read_patient(patient, bids_bundle.specs)
    assert "t2" not in record.modalities
    assert complaints(tmp_path / "raw" / "derivatives" / "bids") == ["TOO_FEW_AUTHORS warning"]


def test_an_outline_is_a_discrete_segmentation(
    tmp_path,
    masked_dir,  # noqa: F811
    segmentation_bundle,  # noqa: F811
):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "dataset_description.json").write_text("{}")
    patient = tmp_path / "raw" / "sub-07"
    shutil.copytree(next(p for p in sorted((masked_dir / "patients").iterdir())), patient)
    segment_patient(patient, segmentation_bundle, tmp_path / "out")
    export(tmp_path / "out", ["bids"], patient)
    made = tmp_path / "out" / "bids"
    path = made / "sub-07" / "anat" / "sub-07_space-orig_desc-dymo_dseg.nii.gz"
    assert path.read_bytes() == (tmp_path / "out" / "segmentation.nii.gz").read_bytes()
    names = path.with_name(path.name.replace(".nii.gz", ".tsv")).read_text().splitlines()
    regions = json.loads((tmp_path / "out" / "prediction.json").read_text())["regions"]
    assert names[0] == "index\tname"
    assert len(names) == 1 + len({label for r in regions for label in r["labels"]})
    assert complaints(made) == ["TOO_FEW_AUTHORS warning"]
