"""The same scan under two names of one patient is noticed, whatever its format."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from dymo_med.data.patient import examine, read_patient
from dymo_med.inference.check import check
from dymo_med.inference.predict import predict_patient
from dymo_med.types import ModalitySpec
from tests.dicom_files import series


def spec(name, intensity="zscore", file=None, **more):
    file = file or f"{name}.nii.gz"
    return ModalitySpec(name, "image", file, (1, 12, 12, 12), (2.0, 2.0, 2.0), intensity, **more)


SPECS = [spec("t1"), spec("t2", "percentile", grid="own")]
AFFINE = np.array([[-2.0, 0, 0, 9], [0, 2, 0, -8], [0, 0, 2, -7], [0, 0, 0, 1]])


def values(seed=0):
    rng = np.random.default_rng(seed)
    scan = rng.integers(100, 900, (11, 10, 9)).astype(np.int16)
    scan[:2] = 0
    return scan


def nifti(folder, array, affine, name="t2.nii.gz"):
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, folder / name)


def turned(folder, array):
    image = nib.as_closest_canonical(nib.Nifti1Image(array, AFFINE))
    nifti(folder, np.asarray(image.dataobj), image.affine)


def scaled(folder, array):
    nifti(folder, (array * 0.37 + 5).astype(np.float32), AFFINE)


def metaimage(folder, array):
    image = sitk.GetImageFromArray(array.T)
    image.SetSpacing((2.0, 2, 2))
    image.SetDirection((1.0, 0, 0, 0, -1, 0, 0, 0, 1))
    image.SetOrigin((-9.0, 8, -7))
    sitk.WriteImage(image, folder / "t2.mha", True)


COPIES = {
    "bytes": lambda folder, array: shutil.copy(folder / "t1.nii.gz", folder / "t2.nii.gz"),
    "not packed": lambda folder, array: nifti(folder, array, AFFINE, "t2.nii"),
    "turned": turned,
    "scaled": scaled,
    "MetaImage": metaimage,
    "DICOM": lambda folder, array: series(folder / "t2", array, AFFINE),
    "DICOM with slopes": lambda f, a: series(f / "t2", a, AFFINE, rescale=(0.5, -3)),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_a_warning(tmp_path, name):
    nifti(tmp_path, values(), AFFINE, "t1.nii.gz")
    COPIES[name](tmp_path, values())
    record = read_patient(tmp_path, SPECS)
    assert [v.same_as for v in record.modalities.values()] == ["", "t1"]
    found = examine(tmp_path, SPECS).results["t2"]
    assert found.state == "warn"
    assert [f.got for f in found.findings if f.check == "copy"] == ["the same voxels as t1"]


@pytest.mark.parametrize("change", [1, "noise", "lesion"])
def test_another_scan_is_none(tmp_path, change):
    first, second = values(), values()
    if change == "noise":
        second = second + np.random.default_rng(1).integers(-3, 4, second.shape).astype(np.int16)
    elif change == "lesion":
        second[5, 5, 5] = 5000
    else:
        second = values(1)
    nifti(tmp_path, first, AFFINE, "t1.nii.gz")
    nifti(tmp_path, second, AFFINE)
    assert read_patient(tmp_path, SPECS).modalities["t2"].same_as == ""


def test_masks_of_different_places_are_two(tmp_path):
    for name, corner in (("t1", 3), ("t2", 5)):
        mask = np.zeros((64, 64, 64), np.uint8)
        mask[corner : corner + 2, 11:13, 11 : 11 + corner] = 1
        nifti(tmp_path, mask, np.diag([2.0, 2, 2, 1]), f"{name}.nii.gz")
    prints = [
        examine(tmp_path, [spec(name, "percentile")]).results.get(name) for name in ("t1", "t2")
    ]
    assert all(r is None or "copy" not in [f.check for f in r.findings] for r in prints)
    both = examine(tmp_path, [spec("t1", "percentile"), spec("t2", "percentile")])
    assert all("copy" not in [f.check for f in r.findings] for r in both.results.values())


def test_one_file_declared_for_two_modalities_is_meant(tmp_path):
    nifti(tmp_path, values(), AFFINE, "ct.nii.gz")
    specs = [spec("soft", "percentile", "ct.nii.gz"), spec("bone", "none", "ct.nii.gz")]
    assert [v.same_as for v in read_patient(tmp_path, specs).modalities.values()] == ["", ""]


def test_every_command_says_it(bundle, cohort_dir, tmp_path):
    folder = shutil.copytree(cohort_dir / "patients" / "p000", tmp_path / "p000")
    shutil.copy(folder / "t1.nii.gz", folder / "t2.nii.gz")
    report = check(folder, against=cohort_dir)
    assert report.exit_code == 0
    assert any(
        "same scan" in note.what and note.got == "the same voxels as t1" for note in report.notes
    )
    predict_patient(folder, bundle, tmp_path / "out", explain=False, draws=0)
    said = json.loads((tmp_path / "out" / "prediction.json").read_text(encoding="utf-8"))
    assert [f["check"] for f in said["quality"]["t2"]["findings"] if f["check"] == "copy"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "The same scan as that of another modality" in page and "the same voxels as t1" in page


def test_an_evaluation_lists_it(bundle, cohort_dir, tmp_path):
    from dymo_med.data.cohort import read_cohort
    from dymo_med.inference.evaluate import evaluate

    root = shutil.copytree(cohort_dir, tmp_path / "cohort")
    cohort = read_cohort(root)
    folder = root / "patients" / "p016"
    shutil.copy(folder / "t1.nii.gz", folder / "t2.nii.gz")
    evaluate(bundle, cohort, tmp_path / "out", reports=0)
    with (tmp_path / "out" / "quality.csv").open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["check"] == "copy"]
    assert [(row["record_id"], row["modality"]) for row in rows] == [(folder.name, "t2")]
