import shutil

import pytest
import yaml

from dymo_med.data.cohort import read_cohort
from dymo_med.errors import ConfigError
from tests.conftest import COHORT


@pytest.fixture
def folder(cohort_dir, tmp_path):
    """A copy of the small cohort whose patient directories are empty."""
    for path in cohort_dir.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    for path in (cohort_dir / "patients").iterdir():
        (tmp_path / "patients" / path.name).mkdir(parents=True)
    return tmp_path


def problems(folder):
    with pytest.raises(ConfigError) as caught:
        read_cohort(folder)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


def edit(folder, file, old, new):
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))


def test_a_cohort_is_read_in_order(cohort_dir):
    cohort = read_cohort(cohort_dir)
    assert cohort == read_cohort(cohort_dir / "cohort.yaml")
    assert [spec.name for spec in cohort.specs] == list(COHORT["modalities"])
    assert len(cohort.records) == 24 and len(cohort.splits) == 20
    assert cohort.records[0].record_id == "p000" and cohort.records[1].record_id == "p000_v2"
    assert cohort.records[-1].label is None
    assert {r.label for r in cohort.in_split("train")} == {0, 1}
    assert (
        sum(len(cohort.in_split(s)) for s in ("train", "validation", "calibration", "test")) == 24
    )
    assert cohort.task.classes == ("low", "high")
    assert cohort.missing_values == ("n/a",)


def test_visits_of_a_patient_share_a_split(cohort):
    for record in cohort.records:
        other = [r for r in cohort.records if r.patient_id == record.patient_id]
        assert len({cohort.splits[r.patient_id] for r in other}) == 1


def test_record_id_is_optional(folder):
    text = (folder / "labels.csv").read_text(encoding="utf-8").splitlines()
    kept = [line.split(",", 1)[1] for line in text if "_v2" not in line]
    (folder / "labels.csv").write_text("\n".join(kept))
    assert [r.record_id for r in read_cohort(folder).records][:2] == ["p000", "p001"]


def test_no_folder_no_file(tmp_path):
    assert "no such file" in problems(tmp_path / "nowhere")[0]
    assert "no such file" in problems(tmp_path)[0]


def test_wrong_modalities_are_located(folder):
    described = yaml.safe_load((folder / "cohort.yaml").read_text(encoding="utf-8"))
    described["modalities"]["t1"]["kind"] = "imag"
    described["modalities"]["t2"]["sise"] = [1]
    del described["modalities"]["photo"]["kind"]
    described["modalities"]["labs"]["columns"]["ldh"]["type"] = "number"
    described["modalities"]["Bad Name"] = described["modalities"].pop("demographics")
    (folder / "cohort.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    found = problems(folder)
    assert len(found) == 5
    lines = (folder / "cohort.yaml").read_text(encoding="utf-8").splitlines()
    assert "kind is not known" in found[0] and "Did you mean 'image'" in found[0]
    assert "unknown key" in found[1] and "Did you mean 'size'" in found[1]
    line = int(found[1].split("cohort.yaml:")[1].split()[0])
    assert "sise" in lines[line - 1]
    assert "no kind" in found[2]
    assert "columns.ldh.type" in found[3]
    assert "name cannot be used" in found[4]


@pytest.mark.parametrize("word", ["values", "type", "items", "keys", "training", "forward"])
def test_words_of_the_networks_are_no_names(folder, word):
    described = yaml.safe_load((folder / "cohort.yaml").read_text())
    described["modalities"][word] = described["modalities"].pop("labs")
    (folder / "cohort.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    (problem,) = problems(folder)
    assert f"'{word}' cannot be a modality's name" in problem


def test_yaml_booleans_as_classes_are_explained(folder):
    edit(folder, "cohort.yaml", "- low\n  - high", "- no\n  - yes")
    [problem] = problems(folder)
    assert "booleans" in problem and 'classes: ["no", "yes"]' in problem


def test_a_class_twice(folder):
    edit(folder, "cohort.yaml", "- low\n  - high", "- low\n  - high\n  - low")
    assert "occurs twice" in problems(folder)[0]


def test_every_problem_of_labels_and_splits_at_once(folder):
    edit(folder, "labels.csv", "p001,p001,low", "p001,p001,lo")
    edit(folder, "labels.csv", "p002,p002,high", "p002,../p002,high")
    edit(folder, "labels.csv", "p004,p004,", "p000,p004,")
    edit(folder, "splits.csv", "p005,train", "p005,trian")
    edit(folder, "splits.csv", "p006,train", "p006,train\np006,test")
    edit(folder, "splits.csv", "p007,train\n", "")
    shutil.rmtree(folder / "patients" / "p008")
    found = problems(folder)
    expected = [
        "class is not known",
        "cannot be a folder's name",
        "record p000 occurs twice",
        "record p008 has no patient directory",
        "unknown split",
        "patient p006 is in two splits",
        "patient p007 has no split",
    ]
    for text, problem in zip(expected, found, strict=True):
        assert text in problem
    assert "labels.csv:4" in found[0] and "Did you mean 'low'" in found[0]
    assert "Did you mean 'train'" in found[4]


@pytest.mark.parametrize(
    "bad", ["", ".", "..", "a/b", "a\\b", "a..b", "x" * 129, "-x", "a\tb", "=1+1", "con:"]
)
def test_unsafe_ids_are_refused(folder, bad):
    edit(folder, "labels.csv", "p001,p001,", f'"{bad}",p001,')
    assert any("cannot be a folder's name" in p for p in problems(folder))


def test_files_that_do_not_fit(folder):
    (folder / "labels.csv").write_text("record_id;patient_id;grade\np000;p000;low\n")
    (folder / "splits.csv").write_bytes(b"\xff\xfe\x00")
    found = problems(folder)
    assert "header does not fit" in found[0] and "grade" in found[0]
    assert "cannot be read" in found[1]
    assert len(found) == 2
    (folder / "labels.csv").unlink()
    (folder / "splits.csv").write_text("patient_id,split\n")
    found = problems(folder)
    assert "no such file" in found[0] and "no rows" in found[1]


def test_a_ragged_row(folder):
    edit(folder, "labels.csv", "p001,p001,low", "p001,p001,low,extra")
    assert "labels.csv:4" in problems(folder)[0]


def test_paths_stay_inside(folder):
    edit(folder, "cohort.yaml", "name: small", "name: small\nlabels: ../labels.csv")
    assert "inside the cohort" in problems(folder)[0]


def test_numbers_in_place_of_classes_are_one_problem(folder):
    text = (folder / "labels.csv").read_text(encoding="utf-8")
    (folder / "labels.csv").write_text(text.replace(",low", ",0").replace(",high", ",1"))
    found = problems(folder)
    assert len(found) == 1 and "the same in" in found[0]
    assert 'classes: ["0", "1"]' in found[0]


# Case: what labels.csv says in place of `low`, and of its header.
LOOK_THE_SAME = {
    "unseen": ("low\u200b", "grade\ufeff"),
    "space of other width": ("\u00a0low", "grade\u00a0"),
}


@pytest.mark.parametrize("name", LOOK_THE_SAME)
def test_labels_compare_as_they_look(folder, cohort_dir, name):
    low, header = LOOK_THE_SAME[name]
    text = (folder / "labels.csv").read_text(encoding="utf-8")
    assert "grade" in text
    (folder / "labels.csv").write_text(text.replace(",low", f",{low}").replace("grade", header))
    assert [r.label for r in read_cohort(folder).records] == [
        r.label for r in read_cohort(cohort_dir).records
    ]


def test_codes_of_classes_may_have_decimals(folder):
    edit(folder, "cohort.yaml", "low", '"0"')
    edit(folder, "cohort.yaml", "high", '"1"')
    text = (folder / "labels.csv").read_text(encoding="utf-8")
    (folder / "labels.csv").write_text(text.replace(",low", ",0.0").replace(",high", ",1"))
    assert {r.label for r in read_cohort(folder).records} == {0, 1, None}


def outlines(root, names, extra=""):
    """Write a segmentation cohort without labels: folders of patients and their splits."""
    for name in names:
        (root / "patients" / name).mkdir(parents=True)
    root.mkdir(exist_ok=True)
    (root / "cohort.yaml").write_text(
        "name: outlines\n"
        "task: {type: segmentation, file: seg.nii.gz, labels: [1], regions: {lesion: [1]}}\n"
        "modalities:\n"
        "  t1: {kind: image, dims: 3, file: t1.nii.gz, size: [8, 8, 8], spacing_mm: [9, 9, 9]}\n"
        + extra
    )
    rows = "".join(f"{name},train\n" for name in names if not name.startswith((".", "-")))
    (root / "splits.csv").write_text("patient_id,split\n" + rows)
    return root


def test_where_the_mask_is_the_label_folders_are_the_records(tmp_path):
    cohort = read_cohort(outlines(tmp_path / "c", ["p2", "p1", ".cache"]))
    assert [(r.record_id, r.patient_id, r.label) for r in cohort.records] == [
        ("p1", "p1", None),
        ("p2", "p2", None),
    ]
    (tmp_path / "c" / "labels.csv").write_text("patient_id\np2\n")  # where there is one it counts
    assert [r.record_id for r in read_cohort(tmp_path / "c").records] == ["p2"]


@pytest.mark.parametrize(
    ("names", "extra", "said"),
    [
        ((), "", "no patient directory"),
        (("p1", "-a"), "", "cannot be a patient's id"),
        (("p1",), "labels: who.csv\n", "no such file"),
        (("p1",), "subgroups: {site: {label_column: site}}\n", "no such file"),
    ],
)
def test_cohorts_of_outlines_that_cannot_do_without_labels(tmp_path, names, extra, said):
    with pytest.raises(ConfigError, match=said):
        read_cohort(outlines(tmp_path / "c", names, extra))
