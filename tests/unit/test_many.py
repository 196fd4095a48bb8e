"""Many patients: the answers of one at a time, a row for whoever fails, the same bytes resumed."""

import csv
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from dymo_med.cli import main
from dymo_med.errors import ConfigError
from dymo_med.inference import many as module
from dymo_med.inference.many import find_records, predict_many
from dymo_med.inference.predict import predict_patient
from dymo_med.inference.worklist import ORDER, by_need
from dymo_med.types import CohortRecord
from tests.conftest import write_patient
from tests.killed import killed
from tests.segmentation import (  # noqa: F401
    masked_cohort,
    masked_dir,
    segmentation_bundle,
    segmentation_dir,
)

LACKS = (["t2"], [], ["photo", "labs"], ["t1", "t2", "photo"], ["cells"])


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    """Five patients, one whose scan is damaged, and one whose folder is empty."""
    root = tmp_path_factory.mktemp("many") / "patients"
    rng = np.random.default_rng(7)
    for number, lacks in enumerate(LACKS):
        write_patient(root / f"p{number}", rng, number % 2 == 0, lacks)
    write_patient(root / "damaged", rng, True, [])
    (root / "damaged" / "t1.nii.gz").write_bytes(b"nothing of a scan")
    (root / "empty").mkdir()
    return root


def command(bundle_dir, out, *more):
    arguments = ("predict", "--bundle", bundle_dir, "--out", out, "--no-explain", *more)
    return [*map(str, arguments), "--quiet", "--device", "cpu"]


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code


@pytest.fixture(scope="module")
def done(tmp_path_factory, bundle_dir, patients):
    out = tmp_path_factory.mktemp("done") / "out"
    assert run(*command(bundle_dir, out, "--patient-dir", patients)) == 3
    return out


def table(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def files(out):
    """Return the bytes of all files but what says how long it took and what was typed."""
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file()
        and p.name != "run.json"
        and not p.relative_to(out).parts[0].startswith(".progress")
    }


def test_each_is_answered_as_if_alone(done, bundle, patients, tmp_path):
    rows = {row["record_id"]: row for row in table(done / "predictions.csv")}
    assert list(rows) == ["damaged", "empty", "p0", "p1", "p2", "p3", "p4"]
    predict_patient(patients / "p2", bundle, tmp_path / "alone", explain=False)
    for name in ("prediction.json", "selection.csv", "report.html"):
        alone = (tmp_path / "alone" / name).read_bytes()
        assert (done / "reports" / "p2" / name).read_bytes() == alone
    for name, row in rows.items():
        if row["status"] == "failed":
            continue
        file = json.loads((done / "reports" / name / "prediction.json").read_text(encoding="utf-8"))
        assert row["status"] == file["status"]
        assert row["trusted"] == "+".join(file["trusted"])
        assert row["reasons"].split("+") == [r["code"] for r in file["status_reasons"]]
        assert float(row["prob_high"]) == pytest.approx(file["probabilities"][1], rel=1e-8)


def test_who_fails_costs_a_row_and_nothing_is_left_of_them(done):
    failures = {row["record_id"]: row for row in table(done / "failures.csv")}
    assert set(failures) == {"damaged", "empty"}
    assert "t1.nii.gz" in failures["damaged"]["message"]
    assert "nothing was observed" in failures["empty"]["message"]
    assert not (done / "reports" / "damaged").exists()
    rows = {row["record_id"]: row["status"] for row in table(done / "predictions.csv")}
    assert [rows[name] for name in failures] == ["failed", "failed"]


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.states, self.links = [], []

    def handle_starttag(self, tag, attributes):
        known = dict(attributes)
        if tag == "tr" and "data-status" in known:
            self.states.append(known["data-status"])
        if tag == "a":
            self.links.append(known["href"])


def test_the_work_list_begins_with_whoever_needs_a_look(done):
    page = _Page()
    page.feed((done / "index.html").read_text(encoding="utf-8"))
    assert len(page.states) == 7
    assert page.states == sorted(page.states, key=ORDER.index)
    assert page.states[:2] == ["failed", "failed"]
    links = [link for link in page.links if link.startswith("reports/")]
    assert len(links) == 5
    assert all((done / link).is_file() for link in page.links)


def test_more_reasons_come_first():
    base = {"status": "caution", "warnings": 0}
    rows = [
        {**base, "record_id": "a", "reasons": "x"},
        {**base, "record_id": "b", "reasons": "x+y"},
        {**base, "record_id": "c", "reasons": "x", "warnings": 2},
        {**base, "record_id": "d", "reasons": "", "status": "answered"},
        {**base, "record_id": "e", "reasons": "read", "status": "failed", "warnings": None},
    ]
    assert [row["record_id"] for row in by_need(rows)] == ["e", "b", "c", "a", "d"]


@pytest.mark.parametrize("moment", [1, 19])
def test_killed_and_resumed_gives_the_same_bytes(done, bundle_dir, patients, tmp_path, moment):
    """The moment is a number of files that have reached the disk."""
    out = tmp_path / "out"
    typed = command(bundle_dir, out, "--patient-dir", patients)
    assert killed(typed, moment) == -9
    assert not (out / "run.json").exists()
    assert run(*typed, "--resume") == 3
    assert files(out) == files(done)


def test_what_is_finished_is_not_done_again(done, bundle_dir, patients, tmp_path, monkeypatch):
    out = shutil.copytree(done, tmp_path / "out")
    asked = []
    answer = module._answer

    def counted(entry, *rest):
        asked.append(entry.record_id)
        return answer(entry, *rest)

    monkeypatch.setattr(module, "_answer", counted)
    typed = command(bundle_dir, out, "--patient-dir", patients, "--resume")
    assert run(*typed) == 3
    assert asked == ["damaged", "empty"]  # who failed is tried again
    assert files(out) == files(done)


def test_parts_together_write_what_one_does(done, bundle_dir, patients, tmp_path):
    out = tmp_path / "out"
    for part, code in ((1, 0), (0, 3)):
        parts = ("--num-parts", "2", "--part-id", str(part))
        assert run(*command(bundle_dir, out, "--patient-dir", patients, *parts)) == code
    assert files(out) == files(done)


@pytest.mark.parametrize("change", [("--seed", "1"), ("--draws", "3"), ("--pdf",)])
def test_other_settings_are_not_mixed(done, bundle_dir, patients, tmp_path, capsys, change):
    out = shutil.copytree(done, tmp_path / "out")
    typed = command(bundle_dir, out, "--patient-dir", patients, "--resume", *change)
    assert run(*typed) == 2
    assert f"with another {change[0].strip('-')}" in capsys.readouterr().err
    assert files(out) == files(done)


def test_a_cohort_needs_no_labels_and_no_splits(bundle_dir, cohort_dir, tmp_path):
    cohort = shutil.copytree(cohort_dir, tmp_path / "cohort")
    (cohort / "splits.csv").unlink()
    kept = ("p000", "p003", "p003_v2", "p016", "p019")
    for place in (cohort / "patients").iterdir():
        if place.name not in kept:
            shutil.rmtree(place)
    out = tmp_path / "out"
    assert run(*command(bundle_dir, out, "--cohort", cohort)) == 0
    rows = {row["record_id"]: row["patient_id"] for row in table(out / "predictions.csv")}
    assert rows["p003_v2"] == "p003"  # the labels file says whose visit it is
    assert tuple(rows) == kept
    run_ = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run_["patients"] == 4
    assert run_["patients_seen_in_training"] == 2  # p016 and p019 are of the test split
    file = json.loads((out / "reports" / "p003_v2" / "prediction.json").read_text(encoding="utf-8"))
    assert file["patient_id"] == "p003"
    (cohort / "labels.csv").unlink()
    records, _, _ = module.records_of(_bundle(bundle_dir), cohort)
    assert {r.record_id for r in records} == set(rows)


def _bundle(folder):
    from dymo_med.bundle import load_bundle

    return load_bundle(folder, "cpu")


def test_outputs_for_other_systems_are_written_for_each(bundle_dir, patients, tmp_path):
    some = tmp_path / "some"
    for name in ("p0", "p1"):
        shutil.copytree(patients / name, some / name)
    out = tmp_path / "out"
    assert run(*command(bundle_dir, out, "--patient-dir", some, "--fhir", "--dicom")) == 0
    for name in ("p0", "p1"):
        assert (out / "reports" / name / "fhir" / "bundle.json").is_file()
        assert (out / "reports" / name / "dicom" / "sr.dcm").is_file()


def test_an_output_that_cannot_be_written_is_a_failure(bundle_dir, patients, tmp_path):
    some = tmp_path / "some"
    shutil.copytree(patients / "p0", some / "p0")
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:  # none of them is of a BIDS dataset: about all
        main(command(bundle_dir, out, "--patient-dir", some, "--bids"))
    assert ended.value.code == 2


def test_segmentations_of_many(tmp_path, masked_dir, segmentation_dir):  # noqa: F811
    some = tmp_path / "some"
    for place in sorted((masked_dir / "patients").iterdir())[:2]:
        shutil.copytree(place, some / place.name)
    out = tmp_path / "out"
    typed = ["predict", "--bundle", str(segmentation_dir), "--out", str(out), "--quiet"]
    assert run(*typed, "--patient-dir", str(some), "--device", "cpu") == 0
    rows = table(out / "predictions.csv")
    assert len(rows) == 2
    assert all(float(row["volume_ml_whole"]) >= 0 for row in rows if "volume_ml_whole" in row)
    assert (out / "reports" / rows[0]["record_id"] / "segmentation.nii.gz").is_file()


def test_one_patient_is_told_from_many(bundle, patients, tmp_path, bundle_dir, capsys):
    assert find_records(patients / "p0", bundle.specs) == ()
    assert [r.record_id for r in find_records(patients, bundle.specs)][:2] == ["damaged", "empty"]
    assert find_records(tmp_path, bundle.specs) == ()
    for folder in (patients / "p0", tmp_path):  # the errors of one patient stay what they are
        assert run(*command(bundle_dir, tmp_path / "o", "-i", folder, "--resume")) == 2
        assert "--resume" in capsys.readouterr().err


def test_a_dicom_series_in_a_folder_is_a_scan_of_one_patient(bundle, tmp_path):
    (tmp_path / "T1").mkdir()
    (tmp_path / "T1" / "1.dcm").write_bytes(b"")
    assert find_records(tmp_path, bundle.specs) == ()


def test_sessions_of_bids_are_records(bundle, tmp_path):
    (tmp_path / "dataset_description.json").write_text("{}")
    for place in ("sub-01/ses-a", "sub-01/ses-b", "sub-02", "derivatives", "code"):
        (tmp_path / place).mkdir(parents=True)
    found = find_records(tmp_path, bundle.specs)
    assert [(r.record_id, r.patient_id) for r in found] == [
        ("sub-01_ses-a", "sub-01"),
        ("sub-01_ses-b", "sub-01"),
        ("sub-02", "sub-02"),
    ]


def test_two_records_of_one_name_are_refused(bundle, tmp_path):
    twice = [CohortRecord("a", "a", tmp_path), CohortRecord("a", "a", tmp_path)]
    with pytest.raises(ConfigError, match="several records are called a"):
        predict_many(bundle, twice, lambda *_: None, tmp_path / "out", settings={})


@pytest.mark.parametrize("both", [True, False])
def test_one_of_two_places_must_be_named(bundle_dir, patients, cohort_dir, tmp_path, capsys, both):
    more = ("--patient-dir", patients, "--cohort", cohort_dir) if both else ()
    assert run(*command(bundle_dir, tmp_path / "out", *more)) == 2
    assert "--cohort" in capsys.readouterr().err
