"""A first cohort.yaml: valid, without identifiers, and honest about what it does not know."""

import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

from dymo_med.cli import main
from dymo_med.data.cohort import read_cohort
from dymo_med.data.describe import describe
from dymo_med.data.patient import read_record
from dymo_med.errors import ConfigError
from tests import dicom_files
from tests.unit.test_dicom_outputs import AFFINE, head


def load(found):
    return yaml.safe_load(found.text)


def test_the_small_cohort_is_described_so_that_it_can_be_read(cohort_dir, tmp_path):
    root = shutil.copytree(cohort_dir, tmp_path / "cohort")
    (root / "cohort.yaml").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["describe", str(root), "--quiet"])
    assert ended.value.code == 0
    cohort = read_cohort(root)
    assert [s.name for s in cohort.specs] == ["ehr", "photo", "t1", "t2"]
    assert set(cohort.task.classes) == {"low", "high"}
    for entry in cohort.records:  # every patient lies within the ranges
        read_record(entry, cohort.specs, cohort.missing_values)
    with pytest.raises(SystemExit) as ended:  # what is there is not written over
        main(["describe", str(root)])
    assert ended.value.code == 2


def patients(root, tables, write):
    for number, row in enumerate(tables):
        folder = root / f"k{number:02d}"
        folder.mkdir(parents=True)
        write(folder, row)
    return root


def rows(n=24):
    rng = np.random.default_rng(3)
    return [
        {
            "MRN": f"00{5000 + i}",
            "patientName": f"Somebody {i}",
            "birth_date": f"19{50 + i % 40}-01-02",
            "seen": f"{1 + i % 28}.3.2024",
            "case": f"X{i}q",
            "number": f"{7_000_000 + 13 * i}",
            "LDH [U/L]": f"{rng.normal(250, 40):.1f}",
            "crp": f"{'<5' if i % 3 else 12.5 + i}",
            "stage": str(1 + i % 3),
            "sex": "FM"[i % 2],
            "smoker": ["yes", "no", "n/a"][i % 3],
            "note": f"came {i} times, was well and went",
            "always": "1",
        }
        for i in range(n)
    ]


def test_identifiers_dates_and_texts_are_left_out_and_named(tmp_path):
    def write(folder, row):
        pd.DataFrame([row]).to_csv(folder / "record.csv", index=False, sep=";")

    found = describe(patients(tmp_path / "all", rows(), write))
    out = {name.removeprefix("record."): why for name, why in found.left_out.items()}
    assert set(out) == {
        *("MRN", "patientName", "birth_date", "seen", "case", "number", "note", "always")
    }
    for secret in ("00500", "Somebody", "1950", "X0q", "7000013", "came"):
        assert secret not in found.text
        assert secret not in str(found)
    (entry,) = load(found)["modalities"].values()
    columns = entry["columns"]
    assert columns["LDH"]["unit"] == "U/L"
    assert columns["crp"] == {"type": "continuous", "unit": "", "range": columns["crp"]["range"]}
    assert columns["stage"] == {"type": "categorical", "values": ["1", "2", "3"]}
    assert columns["sex"]["values"] == ["F", "M"]
    assert columns["smoker"] == {"type": "boolean"}
    assert load(found)["missing_values"] == ["n/a"]
    assert "record.crp: unit" in found.confirm
    assert any(text.startswith("task") for text in found.confirm)


def test_ranges_are_nobodys_own_numbers(tmp_path):
    def write(folder, row):
        pd.DataFrame([{"x": row}]).to_csv(folder / "t.csv", index=False)

    numbers = [3.7, 41.2, 18.9, 27.7]
    found = describe(patients(tmp_path / "all", numbers, write))
    low, high = load(found)["modalities"]["t"]["columns"]["x"]["range"]
    assert low == 0
    assert high > 41.2
    assert not {low, high} & set(numbers)


def test_dicom_folders_and_names_with_the_patient_in_them(tmp_path):
    def write(folder, _):
        dicom_files.series(folder / "FLAIR series", head(), AFFINE)
        np.save(folder / "x.npy", np.zeros(3))
        (folder / f"{folder.name}_labs.json").write_text('{"ldh": 200}')

    found = describe(patients(tmp_path / "all", range(3), write))
    text = load(found)
    assert text["patients"] == "."
    scan = text["modalities"]["flair_series"]
    assert (scan["file"], scan["dims"]) == ("FLAIR series", 3)
    size, spacing = scan["size"], scan["spacing_mm"]
    assert all(n * s >= side for n, s, side in zip(size, spacing, (36, 40, 36), strict=True))
    assert "labs" not in text["modalities"]  # one value for all says nothing
    assert "labs.ldh" in found.left_out


def test_a_table_of_all_patients_is_shared(tmp_path):
    root = patients(tmp_path / "all", range(12), lambda folder, _: head_of(folder))
    table = pd.DataFrame({"who": [f"k{i:02d}" for i in range(12)], "age": range(30, 42)})
    table.to_csv(root / "clinic.tsv", index=False, sep="\t")
    pd.DataFrame({"drug": ["a", "b"]}).to_csv(root / "drugs.csv", index=False)
    found = describe(root)
    entry = load(found)["modalities"]["clinic"]
    assert entry["shared"] == "clinic.tsv"
    assert entry["record_column"] == "who"
    assert entry["columns"]["age"]["unit"] == "years"
    assert any(text.startswith("drugs.csv") for text in found.confirm)


def head_of(folder):
    dicom_files.series(folder / "t1", head(), AFFINE)


def test_a_bids_dataset_is_described_as_one(cohort_dir, tmp_path):
    (tmp_path / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    for sub, scan in (("sub-01", "t1"), ("sub-02", "t2"), ("sub-03", "t1")):
        folder = tmp_path / sub / "ses-a" / "anat"
        folder.mkdir(parents=True)
        for name in ("acq-fast_T1w", "FLAIR"):
            source = cohort_dir / "patients" / "p000" / f"{scan}.nii.gz"
            shutil.copy(source, folder / f"{sub}_ses-a_{name}.nii.gz")
            (folder / f"{sub}_ses-a_{name}.json").write_text("{}")
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tage\tgroup\nsub-01\t30\tcontrol\nsub-02\t40\tpatient\nsub-03\t50\tcontrol\n"
    )
    (tmp_path / "splits.csv").write_text(
        "participant_id,split\nsub-01,train\nsub-02,train\nsub-03,test\n"
    )
    found = describe(tmp_path)
    (tmp_path / "cohort.yaml").write_text(found.text)
    cohort = read_cohort(tmp_path)
    assert [s.name for s in cohort.specs] == ["flair", "acq_fast_t1w", "participants"]
    for entry in cohort.records:
        record = read_record(entry, cohort.specs, cohort.missing_values)
        assert len(record.modalities) == 3


@pytest.mark.parametrize("make", [lambda p: None, lambda p: (p / "a").mkdir()])
def test_where_there_is_nothing_that_is_said(tmp_path, make):
    make(tmp_path)
    with pytest.raises(ConfigError):
        describe(tmp_path)
