"""What `dymo-med check` says of what people bring, and with which exit code."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from dymo_med.demo import shipped_bundle
from dymo_med.errors import BundleError, ConfigError
from dymo_med.inference.check import NOTHING, check
from dymo_med.inference.check_tables import tables
from tests.conftest import write_patient

MAIN = "from dymo_med.cli import main; main()"


@pytest.fixture
def copy(cohort_dir, tmp_path):
    """A copy of the small cohort to spoil."""
    return shutil.copytree(cohort_dir, tmp_path / "cohort")


def run(*arguments):
    command = [sys.executable, "-c", MAIN, "check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_good_cohort(cohort_dir):
    calls = []
    report = check(cohort_dir, progress=lambda done, total: calls.append((done, total)))
    assert report.kind == "cohort" and report.problems == () and report.exit_code == 0
    assert sum(report.patterns.values()) == 24
    assert next(iter(report.patterns)) == "t1, t2, photo, demographics, labs"
    assert list(report.observed) == ["t1", "t2", "photo", "demographics", "labs"]
    assert 0 < report.observed["t1"] < 24
    assert calls[-1] == (24, 24)
    assert check(cohort_dir / "cohort.yaml").to_dict()["patterns"] == dict(report.patterns)


def test_wrong_patient_data_of_several_patients_at_once(copy):
    (copy / "patients" / "p002" / "t1.nii.gz").write_bytes(b"\x1f\x8b broken")
    (copy / "patients" / "p004" / "ehr.csv").write_text("age,sex,ldh\n-3,F,\n")
    for path in (copy / "patients" / "p006").iterdir():
        path.unlink()
    report = check(copy)
    assert report.exit_code == 3
    wheres = [p.where for p in report.problems]
    assert wheres == ["Patient p002: t1.nii.gz", "Patient p004: ehr.csv, line 2, column age"]
    assert report.patterns[NOTHING] == 1
    assert sum(report.patterns.values()) == 22


def test_a_wrong_description(copy):
    text = (copy / "cohort.yaml").read_text(encoding="utf-8")
    (copy / "cohort.yaml").write_text(text.replace("spacing_mm", "spacing", 1))
    report = check(copy)
    assert report.exit_code == 2
    assert "cohort.yaml:" in report.problems[0].where


def test_a_patient_directory_needs_something_to_check_it_against(cohort_dir, tmp_path):
    folder = tmp_path / "p1"
    write_patient(folder, np.random.default_rng(0), False, ["t2"])
    with pytest.raises(ConfigError, match="--against"):
        check(folder)
    report = check(folder, against=cohort_dir)
    assert report.kind == "patient directory" and report.exit_code == 0
    assert report.observed == {"t1": 1, "t2": 0, "photo": 1, "demographics": 1, "labs": 1}
    (folder / "photo.png").write_bytes(b"")
    report = check(folder, against=cohort_dir)
    assert report.exit_code == 3 and report.problems[0].what == "the file is empty"


def test_recipes(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nimputer: {name: mopoe}\nbackbone: {name: transformer}\n")
    assert check(recipe).exit_code == 0
    recipe.write_text("name: x\nimputer: {name: mopoe}\nbackbon: {name: transformer}\n")
    report = check(recipe)
    assert report.kind == "recipe" and report.exit_code == 2
    assert any("Did you mean 'backbone'" in p.remedy for p in report.problems)


def test_a_damaged_bundle(tmp_path, cohort_dir):
    (tmp_path / "bundle" / "configs").mkdir(parents=True)
    (tmp_path / "bundle" / "configs" / "metadata.json").write_text("{")
    report = check(tmp_path / "bundle")
    assert report.kind == "bundle" and report.exit_code == 4 and report.problems
    with pytest.raises(BundleError):
        check(cohort_dir / "patients" / "p000", against=tmp_path / "bundle")


@pytest.mark.parametrize("name", ["nothing.yaml", "notes.txt", "other.yaml"])
def test_what_cannot_be_checked(tmp_path, name):
    if name != "nothing.yaml":
        (tmp_path / name).write_text("colour: red\n")
    with pytest.raises(ConfigError):
        check(tmp_path / name)


def test_the_command(copy):
    (copy / "patients" / "p002" / "ehr.csv").write_text("sex\nsomething private\n")
    done = run(copy)
    assert done.returncode == 3
    assert "Patient p002: ehr.csv, line 2, column sex" in done.stderr
    assert "F or M" in done.stderr
    assert "private" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    done = run(copy, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == report["exit_code"] == 3
    assert report["problems"][0]["expected"] == "F or M"


def test_everything_that_is_wrong_in_one_pass(copy):
    with (copy / "labels.csv").open("a") as labels:
        labels.write("p000,p000,low\np001_v9,p001,low\n")
    with (copy / "splits.csv").open("a") as splits:
        splits.write("p000,test\np001,tset\nghost,train\n")
    patients = copy / "patients"
    (patients / "p002" / "t1.nii.gz").write_bytes(b"\x1f\x8b broken")
    scan = nib.load(patients / "p004" / "t2.nii.gz")
    constant = np.full(scan.shape, 3, np.int16)
    nib.save(nib.Nifti1Image(constant, scan.affine), patients / "p004" / "t2.nii.gz")
    shutil.copy(patients / "p006" / "t1.nii.gz", patients / "p008" / "t1.nii.gz")
    (patients / "p010" / "letter.pdf").write_bytes(b"")
    (patients / "stranger").mkdir()
    report = check(copy)
    assert report.exit_code == 2
    said = [f"{p.where}: {p.what}" for p in report.problems]
    for part in (
        "record p000 occurs twice",
        "record p001_v9 has no patient directory",
        "patient p000 is in two splits",
        "unknown split",
        "Patient p002: t1.nii.gz",
        "Patient p004: t2.nii.gz: every voxel has the same value",
    ):
        assert sum(part in text for text in said) == 1, part
    notes = {p.what: p.got for p in report.notes}
    assert notes["patients with a split and no record"] == "1: ghost"
    assert notes["folders of patients that the labels do not list"] == "1: stranger"
    assert report.unused == {"letter.pdf": 1}
    assert notes["scans that are there more than once"] == "1: t1 of p006 and t1 of p008"
    states = {row.record_id: row.states for row in report.rows}
    assert states["p002"]["t1"] == "damaged" and states["p004"]["t2"] == "refuse"
    assert states["p000"]["labs"] == "observed"
    data = report.to_dict()
    assert data["schema_version"] == 1 and json.loads(json.dumps(data)) == data
    assert data["splits"]["train"]["modalities"]["t1"]["damaged"] == 1
    counted = sum(split["records"] for split in data["splits"].values())
    assert counted == len(data["records"]) == 24


def test_a_recipe_against_a_cohort(copy, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nimputer: {name: template}\nbackbone: {name: transformer}\n")
    report = check(recipe, against=copy)
    assert report.exit_code == 0 and "t1 (image)" in report.about["for"]
    splits = (copy / "splits.csv").read_text()
    (copy / "splits.csv").write_text(splits.replace("calibration", "test"))
    report = check(recipe, against=copy)
    assert report.exit_code == 2
    assert any("split 'calibration'" in p.what for p in report.problems)


def test_a_bundle_says_what_it_is_and_judges_a_cohort(cohort_dir):
    report = check(shipped_bundle())
    assert report.exit_code == 0 and report.about["name"] == "simulated-glioma"
    assert "classification: grade" in report.about["task"] and "t1ce" in report.about["modalities"]
    assert len(report.about["id"]) == 64
    with pytest.raises(ConfigError, match="--against"):
        check(shipped_bundle(), against=cohort_dir)
    report = check(cohort_dir, against=shipped_bundle())
    assert report.exit_code == 4 and "the classes" not in report.problems[0].remedy


def test_the_tables_fit_a_log_of_80_columns(cohort_dir):
    report = check(cohort_dir)
    few = dataclasses.replace(report, rows=report.rows[:9])
    for shown in (report, few, dataclasses.replace(few, kind="patient directory")):
        console = Console(width=80, file=io.StringIO(), no_color=True)
        for part in tables(shown):
            console.print(part)
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= 80
        assert "photo" in text


def test_the_command_without_anything_to_check(tmp_path):
    done = run(tmp_path / "nowhere")
    assert done.returncode == 2
    assert "nowhere" in done.stderr and "Traceback" not in done.stderr
