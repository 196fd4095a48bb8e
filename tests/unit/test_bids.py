import csv
import shutil

import pytest
import torch
import yaml

from dymo_med.data.cohort import read_cohort
from dymo_med.data.patient import read_patient, read_record, unused_files
from dymo_med.errors import ConfigError, PatientDataError
from dymo_med.inference.check import check
from tests.conftest import COHORT, SPLIT_OF_PATIENT

SCAN = {"kind": "image", "dims": 3, "size": [16, 16, 16], "spacing_mm": [2, 2, 2]}
MODALITIES = {
    "t1": {**SCAN, "suffix": "T1w"},
    "t2": {**SCAN, "suffix": "T2w", "entities": {"acq": "tse"}},
    "photo": COHORT["modalities"]["photo"],
    **{
        name: {
            "kind": "table",
            "shared": "phenotype/ehr.tsv",
            "record_column": "session",
            "columns": COHORT["modalities"][name]["columns"],
        }
        for name in ("demographics", "labs")
    },
}


def subject(record):
    """The BIDS names of a record of the small cohort: p003_v2 is sub-p003, ses-2."""
    patient, _, visit = record.partition("_v")
    return f"sub-{patient}", f"ses-{visit or '1'}"


@pytest.fixture(scope="module")
def dataset(cohort_dir, cohort, tmp_path_factory):
    """The small cohort laid out as BIDS; every subject has sessions."""
    root = tmp_path_factory.mktemp("bids") / "ds"
    (root / "phenotype").mkdir(parents=True)
    (root / "dataset_description.json").write_text('{"Name": "small", "BIDSVersion": "1.10.0"}')
    described = {**COHORT, "layout": "bids", "modalities": MODALITIES, "missing_values": []}
    (root / "cohort.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    participants, table = {}, []
    for entry in cohort.records:
        sub, ses = subject(entry.record_id)
        folder = root / sub / ses
        (folder / "anat").mkdir(parents=True)
        names = {"t1": "run-1_T1w", "t2": "acq-tse_T2w"}
        for name, end in names.items():
            if (entry.folder / f"{name}.nii.gz").exists():
                to = folder / "anat" / f"{sub}_{ses}_{end}.nii.gz"
                shutil.copy(entry.folder / f"{name}.nii.gz", to)
                to.with_name(f"{sub}_{ses}_{end}.json").write_text("{}")
        if (entry.folder / "photo.png").exists():
            shutil.copy(entry.folder / "photo.png", folder)
        with (entry.folder / "ehr.csv").open() as stream:
            [row] = csv.DictReader(stream)
        row = {name: cell or "n/a" for name, cell in row.items()}
        table.append({"participant_id": sub, "session": f"{sub}_{ses}", **row})
        label = "n/a" if entry.label is None else cohort.task.classes[entry.label]
        participants[sub] = {"participant_id": sub, "grade": label}
    for name, rows in (
        ("participants.tsv", list(participants.values())),
        ("phenotype/ehr.tsv", table),
    ):
        with (root / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    splits = [f"{sub},{s}" for sub, s in zip(participants, SPLIT_OF_PATIENT, strict=True)]
    (root / "splits.csv").write_text("\n".join(["participant_id,split", *splits]))
    return root


def edited(dataset, tmp_path, file, old, new):
    root = shutil.copytree(dataset, tmp_path / "ds")
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))
    return root


def test_a_dataset_reads_as_the_cohort_it_was_made_from(dataset, cohort, records):
    laid_out = read_cohort(dataset)
    assert laid_out.missing_values == ("n/a",)
    pairs = dict(zip((e.record_id for e in cohort.records), records, strict=True))
    names = {"_".join(subject(record)): record for record in pairs}
    assert {e.record_id for e in laid_out.records} == set(names)
    for entry in laid_out.records:
        was = pairs[names[entry.record_id]]
        assert entry.label == was.label and entry.patient_id == f"sub-{was.patient_id}"
        assert laid_out.splits[entry.patient_id] == cohort.splits[was.patient_id]
        record = read_record(entry, laid_out.specs, laid_out.missing_values)
        assert list(record.modalities) == list(was.modalities)
        for name, value in record.modalities.items():
            assert torch.equal(value.values, was.modalities[name].values)
            if value.observed_fields is not None:
                assert torch.equal(value.observed_fields, was.modalities[name].observed_fields)


def test_one_session_alone_reads_the_same(dataset):
    cohort = read_cohort(dataset)
    entry = cohort.records[1]
    alone = read_patient(entry.folder, cohort.specs, missing_values=cohort.missing_values)
    within = read_record(entry, cohort.specs, cohort.missing_values)
    assert (alone.record_id, alone.patient_id) == (entry.record_id, entry.patient_id)
    assert list(alone.modalities) == list(within.modalities)
    assert alone.modalities["labs"].source.file == "phenotype/ehr.tsv"


def test_check_reads_a_dataset_and_tells_of_a_shared_table_once(dataset, tmp_path):
    root = edited(dataset, tmp_path, "phenotype/ehr.tsv", "\tsession\t", "\tvisit\t")
    for scans in [*root.glob("sub-*/ses-*/anat/*"), *root.glob("sub-*/ses-*/*.png")]:
        scans.unlink()
    report = check(root)
    [problem] = report.problems
    assert problem.where == "ehr.tsv" and "a column session" in problem.expected
    assert report.exit_code == 3
    shutil.copy(dataset / "phenotype" / "ehr.tsv", root / "phenotype")
    report = check(root)
    assert report.kind == "cohort" and report.problems == ()
    assert sum(report.patterns.values()) == 24 and "demographics, labs" in report.patterns


def test_check_notes_subjects_and_sessions_that_are_not_listed(dataset, tmp_path):
    root = shutil.copytree(dataset, tmp_path / "ds")

    def unlisted():
        notes = [n for n in check(root).notes if "do not list" in n.what]
        return [n.got for n in notes]

    for name in ("derivatives/fp/sub-77", "code", "sourcedata/sub-78", "stimuli", ".git/sub-79"):
        (root / name).mkdir(parents=True)
    assert unlisted() == []
    (root / "sub-99" / "anat").mkdir(parents=True)
    assert unlisted() == ["1: sub-99"]
    (root / "labels.tsv").write_text(
        "participant_id\tsession_id\tgrade\n"
        + "".join(f"{e.patient_id}\t{e.folder.name}\tlow\n" for e in read_cohort(root).records[1:])
    )
    with (root / "cohort.yaml").open("a") as stream:
        stream.write("\nlabels: labels.tsv\n")
    left = read_cohort(dataset).records[0]
    assert unlisted() == [f"2: sub-99, {left.patient_id}/{left.folder.name}"]


def test_scans_are_known_to_check_and_others_are_listed(dataset):
    cohort = read_cohort(dataset)
    folder = cohort.records[0].folder
    files = [spec.file for spec in cohort.specs]
    assert list(unused_files(folder, files)) == []
    # Its sidecar is no surprise of its own.
    scan = "anat/sub-p000_ses-1_run-1_T1w.nii.gz"
    assert list(unused_files(folder, files[1:])) == [scan]


def test_a_subject_without_sessions_is_the_record(dataset, tmp_path):
    root = shutil.copytree(dataset, tmp_path / "ds")
    for session in sorted(root.glob("sub-*/ses-*")):
        if session.name == "ses-1":
            shutil.copytree(session, session.parent, dirs_exist_ok=True)
        shutil.rmtree(session)
    cohort = read_cohort(root)
    assert [e.record_id for e in cohort.records][:2] == ["sub-p000", "sub-p001"]
    record = read_patient(cohort.records[0].folder, cohort.specs, missing_values=("n/a",))
    assert {"t1", "t2", "photo"} <= set(record.modalities)  # the table is by session
    assert record.record_id == record.patient_id == "sub-p000"


def test_two_runs_are_not_chosen_between(dataset, tmp_path):
    root = shutil.copytree(dataset, tmp_path / "ds")
    scan = next(root.glob("sub-p000/ses-1/anat/*_T1w.nii.gz"))
    shutil.copy(scan, scan.with_name(scan.name.replace("run-1", "run-2")))
    cohort = read_cohort(root)
    with pytest.raises(PatientDataError, match=r"several files.*run-1_T1w.*run-2_T1w"):
        read_record(cohort.records[0], cohort.specs, cohort.missing_values)


WRONG = {
    "no subject": ("participants.tsv", "sub-p000\t", "p000\t", "names no subject"),
    "no folder": ("participants.tsv", "sub-p000\t", "sub-x\t", "no patient directory"),
    "no split": ("splits.csv", "sub-p000,", "sub-x,", "has no split"),
    "class": ("participants.tsv", "\tlow", "\tlo", "class is not known"),
    "twice": ("participants.tsv", "sub-p001\t", "sub-p000\t", "occurs twice"),
    "entity": ("cohort.yaml", "acq: tse", "acquisition: tse", "no entities of BIDS"),
    "suffix": ("cohort.yaml", "suffix: T1w", "suffix: '*'", "suffix"),
    "file too": (
        "cohort.yaml",
        "suffix: T1w",
        "suffix: T1w\n    file: a.nii",
        "both say which scan",
    ),
    "patients": ("cohort.yaml", "layout: bids", "layout: bids\npatients: p", "leave patients out"),
    "commas": ("participants.tsv", "participant_id\t", "participant_id,", "separated by tabs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told(dataset, tmp_path, name):
    file, old, new, words = WRONG[name]
    with pytest.raises(ConfigError, match=words):
        read_cohort(edited(dataset, tmp_path, file, old, new))
