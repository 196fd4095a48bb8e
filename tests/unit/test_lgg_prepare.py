"""The script that makes cohorts of lower-grade gliomas, on a made-up layout and on the real one."""

import csv
import importlib.util
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from scipy.ndimage import gaussian_filter

from dymo_med.bundle import read_recipe
from dymo_med.data.cohort import read_cohort
from dymo_med.data.masks import read_known
from dymo_med.inference.check import check
from tests.conftest import shared_data

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("prepare_lgg", ROOT / "cohorts/lgg/prepare.py")
prepare = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(prepare)
AFFINE = np.diag([7.2, 7.2, 10.0, 1.0])  # the source's field of view, coarsely
# Codes of the source's table by column; what the cohort does not take stands there too.
CLINICAL = dict.fromkeys(
    (*prepare.COLUMNS, "histological_type", "neoplasm_histologic_grade", "death01"), "1"
)


@pytest.fixture
def source(tmp_path):
    """Folder of twelve patients as the collection has them; one in four lacks a scan."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(12):
        folder = tmp_path / "source" / "patients" / f"TCGA_AA_{k:04d}"
        folder.mkdir(parents=True)
        shape = (32, 32, 18 + k % 3)
        for scan in prepare.SCANS if k % 4 else prepare.SCANS[:1]:
            smooth = gaussian_filter(rng.normal(size=shape), 1.5)
            grey = (100 + 60 * smooth / np.abs(smooth).max()).astype(np.uint8)
            grey[:4] = 0
            nib.save(nib.Nifti1Image(grey, AFFINE), folder / scan)
        mask = np.zeros(shape, np.uint8)
        mask[8:12, 8:12, 5:7] = 1
        nib.save(nib.Nifti1Image(mask, AFFINE), folder / "mask.nii.gz")
        grade = "" if k == 5 else str(1 + k % 2)
        age = {"age_at_initial_pathologic": str(30 + k), "neoplasm_histologic_grade": grade}
        rows.append({"Patient": folder.name, **CLINICAL, **age})
    with (tmp_path / "source" / "clinical.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path / "source"


@pytest.mark.parametrize("clinical", [True, False])
def test_the_layout_becomes_a_cohort_of_outlines(source, tmp_path, clinical):
    if not clinical:  # the mask is the label: no table is needed
        (source / "clinical.csv").unlink()
    prepare.prepare(source, tmp_path / "lgg", 0)
    assert (tmp_path / "lgg" / "labels.csv").is_file() == clinical
    cohort = read_cohort(tmp_path / "lgg")
    assert len(cohort.records) == 12 and set(cohort.splits.values()) == set(prepare.SHARES) | {
        "train"
    }
    record = read_known(cohort.records[0], cohort)
    assert set(record.modalities) == {"flair"} and int(record.mask.sum()) == 32 * 4 * 4 * 2
    whole = read_known(cohort.records[1], cohort)
    assert list(whole.modalities) == ["flair", "t1", "t1ce"]
    if clinical:
        return
    report = check(tmp_path / "lgg")
    assert not report.problems, report.problems
    assert sum(s["labelled"] for s in report.splits.values()) == 12


def test_the_grade_is_a_classification_of_what_was_known_before_it(source, tmp_path):
    prepare.prepare(source, tmp_path / "lgg", 0)
    cohort = read_cohort(tmp_path / "lgg" / "cohort-grade.yaml")
    assert Counter(r.label for r in cohort.records) == {0: 6, 1: 5, None: 1}
    columns = [c.name for s in cohort.specs for c in s.columns]
    assert columns == list(prepare.COLUMNS.values())
    header = (tmp_path / "lgg" / "clinical.csv").read_text().splitlines()[0].split(",")
    assert header == ["patient_id", *columns]
    report = check(tmp_path / "lgg" / "cohort-grade.yaml")
    assert not report.problems, report.problems


def test_every_split_has_its_share_of_every_pattern():
    patterns = {f"p{k:03d}": "flair" if k < 20 else "flair+t1" for k in range(100)}
    splits = prepare.assign_splits(patterns, 3)
    counts = Counter((patterns[p], s) for p, s in splits.items())
    assert counts["flair", "test"] == 4 and counts["flair+t1", "test"] == 16
    assert counts["flair", "train"] in (10, 11) and splits == prepare.assign_splits(patterns, 3)
    assert splits != prepare.assign_splits(patterns, 4)


def test_a_patient_without_a_scan_ends_it_and_leaves_nothing(source, tmp_path):
    for scan in prepare.SCANS:
        (source / "patients" / "TCGA_AA_0001" / scan).unlink(missing_ok=True)
    with pytest.raises(SystemExit, match="has no scan"):
        prepare.prepare(source, tmp_path / "lgg", 0)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_recipe_fits_this_version():
    plan = read_recipe(ROOT / "configs" / "lgg-outline.yaml")
    grid = yaml.safe_load((ROOT / "cohorts/lgg/cohort.yaml").read_text())["modalities"]["flair"]
    assert plan.backbone.name == "shared_unet"
    assert all(c <= n for c, n in zip(plan.backbone_training.crop, grid["size"], strict=True))


@pytest.mark.shared
def test_the_real_collection(tmp_path):
    data = shared_data("lgg")
    prepare.prepare(data, tmp_path / "lgg", 0)
    cohort = read_cohort(tmp_path / "lgg")
    assert Counter(cohort.splits.values())["test"] >= 16
    gap = next(r for r in cohort.records if not (r.folder / "t1.nii.gz").exists())
    assert set(read_known(gap, cohort).modalities) == {"flair"}
    grades = read_cohort(tmp_path / "lgg" / "cohort-grade.yaml")
    assert Counter(r.label for r in grades.records) == {0: 38, 1: 44}
