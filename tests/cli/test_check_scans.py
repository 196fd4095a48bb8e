"""Real scans through `dymo-med check`: what is odd in them is said, and nothing else happens."""

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import yaml

from dymo_med.inference.check import NOTHING, check
from tests.conftest import shared_data, write_patient
from tests.dicom_files import SECRETS, series

WHEEL = Path(pydicom.__file__).parent / "data" / "test_files"
FILM = {"kind": "image", "dims": 2, "file": "film.dcm", "size": [16, 16], "intensity": "percentile"}
VOLUME = {"kind": "image", "dims": 3, "size": [16, 16, 16], "spacing_mm": [4, 4, 4]}


def write_cohort(folder, names, modalities):
    """Write the description of a cohort whose patient directories are there already."""
    description = {
        "name": "real",
        "task": {"type": "classification", "target": "y", "classes": ["a", "b"]},
        "modalities": modalities,
    }
    (folder / "cohort.yaml").write_text(yaml.safe_dump(description, sort_keys=False))
    rows = [f"{name},{'ab'[k % 2]}" for k, name in enumerate(names)]
    (folder / "labels.csv").write_text("patient_id,y\n" + "\n".join(rows) + "\n")
    rows = [f"{name},train" for name in names]
    (folder / "splits.csv").write_text("patient_id,split\n" + "\n".join(rows) + "\n")
    return folder


SAID = {  # what `check` says of some of the files of pydicom's tests
    "MR_truncated.dcm": "damaged, cut short",
    "JPEG2000-embedded-sequence-delimiter.dcm": "damaged, cut short",
    "ExplVR_BigEnd.dcm": "colours",
    "examples_palette.dcm": "colours",
    "examples_ybr_color.dcm": "colours",
    "SC_rgb_rle_2frame.dcm": "colours",
    "badVR.dcm": "damaged",
    "rtdose.dcm": "the image is a volume",
    "rtdose_rle.dcm": "the image is a volume",
    "rtdose_expb.dcm": "32-bit numbers in big-endian order",
    "liver_1frame.dcm": "a segmentation (BINARY), not a scan",
    "reportsi.dcm": "holds no image",
    "rtplan.dcm": "holds no image",
    "DICOMDIR": "holds no image",
    "README.txt": "not what its name says",
    "IM00000A": "damaged",
}
GOOD = (  # compressed and plain, with and without geometry
    "693_J2KI.dcm",
    "CT_small.dcm",
    "JPEGLSNearLossless_16.dcm",
    "JPGExtended.dcm",
    "MR_small_RLE.dcm",
    "MR_small_bigendian.dcm",
    "examples_overlay.dcm",
    "image_dfl.dcm",
    "6154",  # CR, MONOCHROME1, rescaled
)


def test_the_files_of_another_readers_tests(tmp_path):
    names = {}
    for number, path in enumerate(sorted(p for p in WHEEL.rglob("*") if p.is_file())):
        folder = tmp_path / "patients" / f"f{number:03d}"
        folder.mkdir(parents=True)
        shutil.copy(path, folder / "film.dcm")
        names.setdefault(path.name, folder.name)
    folders = sorted(p.name for p in (tmp_path / "patients").iterdir())
    report = check(write_cohort(tmp_path, folders, {"film": FILM}))
    assert report.exit_code == 3
    assert set(report.patterns) == {"film"}
    assert report.patterns["film"] + len(report.problems) == len(folders)
    said = {p.where.split(":")[0].removeprefix("Patient "): p for p in report.problems}
    for problem in report.problems:
        assert problem.what and problem.expected and problem.got and problem.remedy
    for name, what in SAID.items():
        assert what in said[names[name]].what, name
    assert [(name, said[names[name]]) for name in GOOD if names[name] in said] == []


def test_files_that_nobody_looks_at_are_listed(cohort_dir, tmp_path):
    folder = tmp_path / "p1"
    write_patient(folder, np.random.default_rng(0), False, ["t2"])
    for name in ("T2w.nii.gz", "scans/t2.nii.gz", "notes.txt", ".DS_Store", "t1.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    report = check(folder, against=cohort_dir)
    assert report.exit_code == 0
    assert list(report.unused) == ["T2w.nii.gz", "notes.txt", "scans/"]
    assert report.to_dict()["unused"] == dict(report.unused)
    assert check(cohort_dir).unused == {}


def test_study_folders_through_rules(tmp_path):
    x, y, z = np.mgrid[-1:1:24j, -1:1:22j, -1:1:12j]
    stored = (900 * np.clip(1 - x**2 - y**2 - z**2, 0, 1)).astype(np.uint16)
    affine = np.diag([2.5, 2.5, 5.0, 1.0])
    for number in range(3):
        study = tmp_path / "patients" / f"p{number}" / "dicom"
        series(study, stored, affine, "1.2.3.1", SeriesDescription="t1 Doe^Jane")
        if number != 1:
            series(study, stored + 9, affine, "1.2.3.2", SeriesDescription="FLAIR")
        if number == 2:
            series(study, stored + 9, affine, "1.2.3.3", SeriesDescription="flair again")
    modalities = {
        name: VOLUME | {"file": "dicom", "dicom": {"description": name, "absent": absent}}
        for name, absent in (("t1", "error"), ("flair", "missing"))
    }
    report = check(write_cohort(tmp_path, ["p0", "p1", "p2"], modalities))
    assert report.patterns == {"t1, flair": 1, "t1": 1}
    [problem] = report.problems
    assert problem.where == "Patient p2: dicom" and "2 stacks of slices" in problem.got
    assert not any(secret in str(problem) for secret in SECRETS)
    assert report.unused == {}
    modalities["flair"]["dicom"]["absent"] = "error"
    report = check(write_cohort(tmp_path, ["p0", "p1", "p2"], modalities))
    assert [p.where for p in report.problems] == ["Patient p1: dicom", "Patient p2: dicom"]


@pytest.mark.shared
def test_multi_frame_files_without_geometry(tmp_path):
    source = shared_data("dicom", "pydicom_data_mit")
    names = []
    for path in sorted(source.glob("emri*.dcm")):
        names.append(path.stem)
        (tmp_path / "patients" / path.stem).mkdir(parents=True)
        shutil.copy(path, tmp_path / "patients" / path.stem / "t1.dcm")
    report = check(write_cohort(tmp_path, names, {"t1": VOLUME | {"file": "t1.dcm"}}))
    assert len(report.problems) == len(names) == 4
    assert all("geometry" in problem.what for problem in report.problems)
    assert NOTHING not in report.patterns
