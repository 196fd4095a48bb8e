"""What `check` and `train` say of columns that nobody has and of what only one class has."""

import pytest
import yaml

from dymo_med.data import patient
from dymo_med.data.cohort import read_cohort
from dymo_med.errors import PatientDataError
from dymo_med.inference.check import check
from dymo_med.training import train
from dymo_med.types import GateFinding, GateResult

DESCRIPTION = {
    "name": "c",
    "task": {"type": "classification", "target": "y", "classes": ["a", "b"]},
    "modalities": {
        "clinic": {
            "kind": "table",
            "file": "clinic.csv",
            "columns": {
                "age": {"type": "continuous", "range": [0, 120]},
                "sex": {"type": "categorical", "values": ["F", "M"]},
                "crp": {"type": "continuous", "range": [0, 500]},
            },
        },
        "labs": {
            "kind": "table",
            "file": "labs.csv",
            "columns": {"ldh": {"type": "continuous", "range": [0, 900]}},
        },
    },
}
SPLITS = (
    "train",
    "train",
    "validation",
    "validation",
    "calibration",
    "calibration",
    "test",
    "test",
)


def notes(folder, clinic, labs, description=DESCRIPTION):
    """What is noted of 16 patients, classes a and b in turn; files by number, class and split."""
    (folder / "cohort.yaml").write_text(yaml.safe_dump(description, sort_keys=False))
    labels, splits = ["patient_id,y"], ["patient_id,split"]
    for k in range(16):
        name, of, split = f"p{k:02}", "ab"[k % 2], SPLITS[k % 8]
        home = folder / "patients" / name
        home.mkdir(parents=True)
        (home / "clinic.csv").write_text(clinic(k, of, split))
        if text := labs(k, of, split):
            (home / "labs.csv").write_text(text)
        labels.append(f"{name},{of}")
        splits.append(f"{name},{split}")
    (folder / "labels.csv").write_text("\n".join(labels))
    (folder / "splits.csv").write_text("\n".join(splits))
    report = check(folder)
    assert not report.problems
    return [str(note) for note in report.notes]


def full(k, of, split):
    return f"age,sex,crp\n{50 + k},{'FM'[k // 2 % 2] if split == 'train' else 'F'},{k}\n"


def both(k, of, split):
    return f"ldh\n{200 + k}\n"


# Case: clinic.csv, labs.csv, words of the only note; none = there is no note.
CASES = {
    "all there": (lambda k, of, s: full(k * 2 + (k > 8), of, s), both, None),
    "blank for everybody": (
        lambda k, of, s: f"age,sex,crp\n{50 + k},{'FM'[k > 7]},\n",
        both,
        "columns that are blank in every record. Got crp",
    ),
    "under another name": (
        lambda k, of, s: f"age,sex,CRP value\n{50 + k},{'FM'[k > 7]},1\n",
        both,
        "columns that are blank in every record. Got crp",
    ),
    "not in train": (
        lambda k, of, s: f"age,sex,crp\n{50 + k},{'FM'[k > 7]},{'' if s == 'train' else 1}\n",
        both,
        "columns that no training record has. Got crp",
    ),
    "a category not in train": (
        lambda k, of, s: f"age,sex,crp\n{50 + k},{'F' if s == 'train' else 'M'},1\n",
        both,
        "categories that no training record has. Got sex (M)",
    ),
    "a modality of one class": (
        lambda k, of, s: f"age,sex,crp\n{50 + k},{'FM'[k > 7]},1\n",
        lambda k, of, s: both(k, of, s) if of == "b" else "",
        "labs: no patient of some class has the modality. Expected some patient of every class."
        " Got 0 of 8 a and 8 of 8 b",
    ),
    "a column of one class": (
        lambda k, of, s: f"age,sex,crp\n{50 + k},{'FM'[k > 7]},{1 if of == 'a' else ''}\n",
        both,
        "value in a column. Expected some patient of every class. Got crp: 8 of 8 a and 0 of 8 b",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_worth_a_look_is_noted(tmp_path, name):
    clinic, labs, words = CASES[name]
    found = notes(tmp_path, clinic, labs)
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_rows_of_a_shared_table_that_are_nobodys(tmp_path):
    columns = DESCRIPTION["modalities"]["labs"]["columns"]
    shared = {"kind": "table", "shared": "all.csv", "patient_column": "id", "columns": columns}
    rows = [f"p{k:02},{200 + k}" for k in range(16)] + ["P17,300", "p1,301"]
    (tmp_path / "all.csv").write_text("id,ldh\n" + "\n".join(rows))
    modalities = {**DESCRIPTION["modalities"], "labs": shared}
    found = notes(
        tmp_path,
        lambda k, of, s: f"age,sex,crp\n{50 + k},{'FM'[k > 7]},1\n",
        lambda *_: "",
        {**DESCRIPTION, "modalities": modalities},
    )
    assert len(found) == 1 and "rows that belong to no record. Got 2: P17, p1" in found[0]


def test_train_says_the_same(tmp_path, monkeypatch):
    def stop(*_):
        raise StopIteration

    monkeypatch.setattr(train, "fit_specs", stop)
    clinic, labs, _ = CASES["a modality of one class"]
    notes(tmp_path, clinic, labs)
    said = []
    with pytest.raises(StopIteration):
        train.train(None, tmp_path, tmp_path / "out", say=said.append)
    assert len(said) == 1 and said[0].startswith("note: ") and "0 of 6 a and 6 of 6 b" in said[0]


def test_train_recommends_nothing_that_it_cannot_do(cohort_dir, tmp_path, monkeypatch):
    # The gate compares with nothing in training; that it refuses a scan is made up here.
    monkeypatch.setattr(
        patient, "judge", lambda *_: GateResult((GateFinding("noise", "refuse", "9", "1"),))
    )
    with pytest.raises(PatientDataError, match="the quality gate refuses") as caught:
        train.train(None, cohort_dir, tmp_path / "out")
    assert "--treat-refused" not in str(caught.value)
    cohort = read_cohort(cohort_dir)
    with pytest.raises(PatientDataError, match="--treat-refused"):
        patient.read_record(cohort.records[0], cohort.specs)
