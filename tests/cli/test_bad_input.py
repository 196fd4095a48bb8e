"""Bad input: the documented exit code, one clear message, no traceback, nothing half-written.

A new case is one line in `CASES`: what it is called, how to spoil the folder, which command, the
exit code, and what the message must say.
"""

import errno
import gzip
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

from dymo_med.cli import main
from tests.conftest import write_patient

PREDICT = ["predict", "-i", "{patient}", "-b", "{bundle}", "-o", "{out}", "--no-explain"]
EVALUATE = ["evaluate", "-b", "{bundle}", "-c", "{cohort}", "-o", "{out}", "--reports", "0"]
TRAIN = ["train", "{recipe}", "-c", "{cohort}", "-o", "{out}", "-d", "cpu"]
IMPUTE = ["impute", "-i", "{patient}", "-b", "{bundle}", "-o", "{out}"]


def edit(name, old, new):
    def spoil(place):
        path = place[name] if name in place else place["root"] / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return spoil


def remove_bundle(place):
    shutil.rmtree(place["bundle"])


def tamper(place):
    path = place["bundle"] / "models" / "backbone.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def truncate(place):
    path = place["patient"] / "t1.nii.gz"
    path.write_bytes(path.read_bytes()[:400])


def cell(column, text):
    def spoil(place):
        path = place["patient"] / "ehr.csv"
        header, row = path.read_text(encoding="utf-8").splitlines()
        names, cells = header.split(","), row.split(",")
        cells[names.index(column)] = text
        path.write_text(f"{header}\n{','.join(cells)}\n")

    return spoil


def four_axes(place):
    volume = np.random.default_rng(0).integers(1, 99, (16, 16, 16, 2)).astype(np.int16)
    nib.save(nib.Nifti1Image(volume, np.diag([2, 2, 2, 1])), place["patient"] / "t1.nii.gz")


def not_a_number(place):
    volume = np.ones((16, 16, 16), np.float32)
    volume[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(volume, np.diag([2, 2, 2, 1])), place["patient"] / "t1.nii.gz")


def not_an_image(place):
    (place["patient"] / "t1.nii.gz").write_bytes(gzip.compress(b"not an image at all"))


def folder_instead(place):
    (place["patient"] / "ehr.csv").unlink()
    (place["patient"] / "ehr.csv").mkdir()


def empty(place):
    for path in place["patient"].iterdir():
        path.unlink()


def absent(place):
    shutil.rmtree(place["patient"])


def two_rows(place):
    path = place["patient"] / "ehr.csv"
    path.write_text(
        path.read_text(encoding="utf-8") + path.read_text(encoding="utf-8").splitlines()[1] + "\n"
    )


def occupied(place):
    place["out"].mkdir()
    (place["out"] / "thesis.txt").write_text("mine")


def repeat_line(name, line):
    def spoil(place):
        path = place["cohort"] / name
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join([*lines, lines[line]]) + "\n")

    return spoil


def second_split(place):
    path = place["cohort"] / "splits.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    patient = next(line.split(",")[0] for line in lines if line.endswith(",train"))
    path.write_text("\n".join([*lines, f"{patient},test"]) + "\n")


def nothing(place):
    pass


CASES = [
    # name, spoil, command, exit code, the message must contain
    ("missing bundle", remove_bundle, PREDICT, 4, ["not a bundle", "configs/metadata.json"]),
    ("tampered bundle", tamper, PREDICT, 4, ["backbone.safetensors", "changed"]),
    ("truncated NIfTI", truncate, PREDICT, 3, ["t1.nii.gz"]),
    ("unreadable file", not_an_image, PREDICT, 3, ["t1.nii.gz"]),
    ("folder instead of a table", folder_instead, PREDICT, 3, ["ehr.csv"]),
    ("unknown category", cell("sex", "Q"), PREDICT, 3, ["column sex", "F, M"]),
    ("value out of range", cell("age", "400"), PREDICT, 3, ["column age", "0 to 120"]),
    ("text instead of a number", cell("age", "old"), PREDICT, 3, ["column age", "number"]),
    ("wrong dimension", four_axes, PREDICT, 3, ["t1.nii.gz", "4", "(16, 16, 16, 2)"]),
    ("voxels that are not numbers", not_a_number, PREDICT, 3, ["t1.nii.gz", "finite"]),
    ("empty directory", empty, PREDICT, 3, ["nothing was observed", "t1.nii.gz"]),
    ("absent directory", absent, PREDICT, 3, ["patient directory"]),
    ("two rows in a table", two_rows, PREDICT, 3, ["ehr.csv", "row"]),
    ("occupied output folder", occupied, PREDICT, 2, ["out"]),
    ("unreadable file, impute", truncate, IMPUTE, 3, ["t1.nii.gz"]),
    ("unknown device", nothing, [*PREDICT, "-d", "abacus"], 2, ["--device", "auto, cpu or cuda"]),
    (
        "unknown key in recipe",
        edit("recipe", "epochs", "epoch"),
        TRAIN,
        2,
        ["recipe.yaml:", "unknown key", "Did you mean 'epochs'"],
    ),
    (
        "unknown option of the imputer",
        edit("recipe", "latent", "latnet"),
        TRAIN,
        2,
        ["recipe.yaml:", "unknown key", "Did you mean 'latent'"],
    ),
    (
        "unknown imputer",
        edit("recipe", "name: mopoe", "name: mopo"),
        TRAIN,
        2,
        ["no imputer called 'mopo'", "Did you mean 'mopoe'"],
    ),
    (
        "unknown key in cohort",
        edit("cohort_file", "spacing_mm", "spacing"),
        TRAIN,
        2,
        ["cohort.yaml:", "unknown key", "spacing_mm"],
    ),
    ("not YAML", edit("recipe", "name:", "name: ["), TRAIN, 2, ["recipe.yaml", "YAML"]),
    ("duplicate patient", repeat_line("labels.csv", 1), TRAIN, 2, ["labels.csv", "twice"]),
    ("overlapping splits", second_split, TRAIN, 2, ["splits.csv", "split"]),
    ("overlapping splits, evaluate", second_split, EVALUATE, 2, ["splits.csv", "split"]),
    (
        "unknown scenario",
        nothing,
        [*EVALUATE, "-m", "rat:0.4"],
        2,
        ["scenario", "rate"],
    ),
    (
        "unknown modality in a scenario",
        nothing,
        [*EVALUATE, "-m", "drop:t11"],
        2,
        ["t11", "Did you mean 't1'"],
    ),
]


@pytest.fixture
def place(tmp_path, cohort_dir, bundle_dir):
    found = {
        "root": tmp_path,
        "cohort": shutil.copytree(cohort_dir, tmp_path / "cohort"),
        "bundle": shutil.copytree(bundle_dir, tmp_path / "bundle"),
        "patient": tmp_path / "p042",
        "recipe": tmp_path / "recipe.yaml",
        "out": tmp_path / "out",
    }
    found["cohort_file"] = found["cohort"] / "cohort.yaml"
    write_patient(found["patient"], np.random.default_rng(0), True, [])
    found["recipe"].write_text(
        "name: r\nimputer: {name: mopoe, latent: 4}\nbackbone: {name: transformer}\n"
        "imputer_training: {epochs: 1}\n"
    )
    return found


@pytest.mark.parametrize(
    ("spoil", "command", "code", "says"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_bad_input(place, capsys, spoil, command, code, says):
    spoil(place)
    before = sorted(p for p in place["root"].rglob("*") if place["out"] not in p.parents)
    with pytest.raises(SystemExit) as stopped:
        main([part.format(**place) for part in command])
    printed = capsys.readouterr()
    message = printed.err
    assert stopped.value.code == code, message
    assert "Traceback" not in message + printed.out
    for part in says:
        assert part in message
    assert message.count("error:") == 1
    # Nothing half-written: no output folder (or the one that was there), no temporary file.
    if place["out"].exists():
        assert [p.name for p in place["out"].iterdir()] == ["thesis.txt"]
    after = sorted(p for p in place["root"].rglob("*") if place["out"] not in p.parents)
    assert before == [p for p in after if p != place["out"] or place["out"] in before]


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, 2), (errno.EROFS, 2), (errno.ENAMETOOLONG, 2), (errno.EBADF, None)],
)
def test_a_full_or_read_only_disk_is_no_bug(place, capsys, monkeypatch, number, code):
    def fail(*_):
        raise OSError(number, os.strerror(number), "out")

    monkeypatch.setattr("dymo_med.inference.predict.write_text", fail)
    with pytest.raises((SystemExit, OSError)) as stopped:
        main([part.format(**place) for part in PREDICT])
    assert getattr(stopped.value, "code", None) == code
    assert code is None or os.strerror(number) in capsys.readouterr().err
    assert not place["out"].exists()


def test_no_error_repeats_a_value(place, capsys):
    """What a cell holds is health data and must not reach a log."""
    cell("sex", "secretvalue")(place)
    with pytest.raises(SystemExit):
        main([part.format(**place) for part in PREDICT])
    assert "secretvalue" not in capsys.readouterr().err


def test_one_bad_patient_does_not_stop_an_evaluation(place, capsys):
    test_patients = [
        line.split(",")[0]
        for line in (place["cohort"] / "splits.csv").read_text(encoding="utf-8").splitlines()
        if line.endswith(",test")
    ]
    records = [
        line.split(",")[0]
        for line in (place["cohort"] / "labels.csv").read_text(encoding="utf-8").splitlines()[1:]
        if line.split(",")[1] in test_patients and line.split(",")[2]
    ]
    (place["cohort"] / "patients" / records[0] / "t1.nii.gz").write_bytes(b"broken")
    with pytest.raises(SystemExit) as stopped:
        main([part.format(**place) for part in [*EVALUATE, "-q"]])
    assert stopped.value.code == 3
    failures = (place["out"] / "failures.csv").read_text(encoding="utf-8").splitlines()
    assert len(failures) == 2 and records[0] in failures[1]
    predictions = (place["out"] / "predictions.csv").read_text(encoding="utf-8")
    assert records[0] not in predictions
    assert all(r in predictions for r in records[1:])
    assert json.loads((place["out"] / "run.json").read_text(encoding="utf-8"))
