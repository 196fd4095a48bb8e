"""The preparation script of the chest-radiograph cohort, on a made-up source of the same layout."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_patient
from dymo_med.inference.check import check
from tests.conftest import shared_data

FOLDER = Path(__file__).resolve().parents[2] / "cohorts" / "covid-cxr"
LEAKY = ("went_icu", "in_icu", "intubated", "survival", "needed_supplemental_o2", "offset_days")


def prepare(source, out, *options):
    command = [sys.executable, FOLDER / "prepare.py", source, out, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


@pytest.fixture
def source(tmp_path):
    """Thirty patients, the first of whom came twice; every third is not labelled."""
    rng = np.random.default_rng(0)
    described = yaml.safe_load((FOLDER / "cohort.yaml").read_text(encoding="utf-8"))["modalities"]
    columns = [n for m in described.values() for n in m.get("columns", {})]
    ehr, labels, splits = [], [], []
    for number in range(30):
        patient = f"P{number:03d}"
        for visit in range(2 if number == 0 else 1):
            name = f"{patient}_V{visit + 1:02d}"
            folder = tmp_path / "source" / "images" / name
            folder.mkdir(parents=True)
            rows, columns_of = np.mgrid[0:40, 0:30]
            film = 120 + 60 * np.sin(rows / 8 + number) * np.cos(columns_of / 7)
            film += rng.normal(0, 4, film.shape)  # as smooth as a picture of something
            Image.fromarray(film.astype(np.uint8)).save(folder / "cxr_frontal.png")
            row = dict.fromkeys(columns, "") | dict.fromkeys(LEAKY, "yes")
            ehr.append({"visit_id": name, "patient_id": patient, **row, "sex": "F"})
            label = ("", "0", "1")[number % 3]
            labels.append({"visit_id": name, "patient_id": patient, "icu_or_death": label})
            split = "dev_test" if number % 5 == 4 else "dev_train"
            splits.append({"visit_id": name, "patient_id": patient, "split": split})
    for file, rows in (("ehr", ehr), ("labels", labels), ("split", splits)):
        with (tmp_path / "source" / f"{file}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return tmp_path / "source"


def test_a_cohort_comes_out(source, tmp_path):
    done = prepare(source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert check(tmp_path / "out").problems == ()
    cohort = read_cohort(tmp_path / "out")
    assert len(cohort.records) == 31 and len(cohort.splits) == 30
    assert sum(split == "test" for split in cohort.splits.values()) == 6
    for split in ("train", "validation", "calibration"):
        assert {r.label for r in cohort.in_split(split)} == {None, 0, 1}
    record = read_patient(cohort.records[0].folder, cohort.specs)
    assert set(record.modalities) == {"cxr_frontal", "demographics"}


def test_columns_that_state_the_outcome_stay_behind(source, tmp_path):
    prepare(source, tmp_path / "out")
    text = "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "out").rglob("*.csv"))
    assert not any(column in text for column in LEAKY)


def test_the_seed_decides_the_split(source, tmp_path):
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        prepare(source, out, "--seed", seed)
    a, b, c = ((out / "splits.csv").read_text(encoding="utf-8") for out in outs)
    assert a == b != c


def test_what_prepare_refuses(source, tmp_path):
    assert "no folder images" in prepare(tmp_path, tmp_path / "out").stderr
    (tmp_path / "out").mkdir()
    assert "exists already" in prepare(source, tmp_path / "out").stderr
    (source / "labels.csv").write_text("visit_id,icu_or_death\n")
    assert "do not have" in prepare(source, tmp_path / "other").stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.shared
def test_no_declared_column_is_marked_as_giving_the_label_away():
    path = shared_data("covid-cxr", "columns.csv")
    with path.open(newline="") as stream:
        leaks = {row["column"]: row["do_not_use_as_feature_for"] for row in csv.DictReader(stream)}
    described = yaml.safe_load((FOLDER / "cohort.yaml").read_text(encoding="utf-8"))["modalities"]
    columns = [n for m in described.values() for n in m.get("columns", {})]
    marked = [c for c in columns if "icu_or_death" in leaks[c] or "not a feature" in leaks[c]]
    assert marked == ["po2_mmhg"]  # "caution", not "do not use": README.md says why


@pytest.mark.shared
@pytest.mark.slow
def test_the_real_source(tmp_path):
    source = shared_data("covid-cxr")
    assert prepare(source, tmp_path / "out").returncode == 0
    report = check(tmp_path / "out")
    assert report.problems == () and sum(report.patterns.values()) == 401
