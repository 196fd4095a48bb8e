import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dymo_med.data.patient import read_patient
from dymo_med.errors import PatientDataError
from dymo_med.modalities.image import Image
from tests.conftest import write_patient


@pytest.fixture
def patient(tmp_path):
    folder = tmp_path / "p017"
    write_patient(folder, np.random.default_rng(0), True, [])
    return folder


def test_a_missing_modality_has_no_key(cohort, cohort_dir):
    by_id = {r.record_id: r for r in cohort.records}
    full = read_patient(by_id["p000"].folder, cohort.specs)
    assert list(full.modalities) == [s.name for s in cohort.specs]
    assert full.record_id == full.patient_id == "p000"
    lacking = read_patient(by_id["p000_v2"].folder, cohort.specs)
    assert set(full.modalities) - set(lacking.modalities) == {"t2"}


def test_values_have_the_shape_of_their_modality(cohort, records):
    shapes = {s.name: s.shape for s in cohort.specs}
    for record in records:
        for name, value in record.modalities.items():
            assert tuple(value.values.shape) == shapes[name]
            assert value.values.dtype == torch.float32 and torch.isfinite(value.values).all()
            assert type(value.values) is torch.Tensor
            assert not value.source.file.startswith("/")
            assert (value.observed_fields is None) == (len(shapes[name]) > 1)


def test_reading_twice_gives_the_same(cohort, patient):
    a, b = (read_patient(patient, cohort.specs) for _ in range(2))
    for name in a.modalities:
        assert torch.equal(a.modalities[name].values, b.modalities[name].values)


def test_missing_values_are_blank(cohort, patient):
    text = (patient / "ehr.csv").read_text(encoding="utf-8").splitlines()
    (patient / "ehr.csv").write_text(f"{text[0]}\nn/a,{text[1].split(',', 1)[1]}\n")
    record = read_patient(patient, cohort.specs, missing_values=cohort.missing_values)
    assert record.modalities["demographics"].observed_fields.tolist() == [False, True]
    with pytest.raises(PatientDataError):
        read_patient(patient, cohort.specs)


def test_every_problem_at_once(cohort, patient):
    (patient / "t1.nii.gz").write_bytes(b"")
    (patient / "photo.png").write_text("no picture")
    (patient / "ehr.csv").write_text("age,sex,ldh\n400,X,\n")
    with pytest.raises(PatientDataError) as caught:
        read_patient(patient, cohort.specs)
    wheres = [p.where for p in caught.value.problems]
    assert wheres == [
        "Patient p017: t1.nii.gz",
        "Patient p017: photo.png",
        "Patient p017: ehr.csv, line 2, column age",
        "Patient p017: ehr.csv, line 2, column sex",
    ]
    assert caught.value.exit_code == 3


def test_trouble_with_a_shared_file_is_told_once(cohort, patient):
    (patient / "ehr.csv").write_text("age\n1\n2\n")
    with pytest.raises(PatientDataError) as caught:
        read_patient(patient, cohort.specs)
    assert len(caught.value.problems) == 1


def test_nothing_observed(cohort, patient):
    shutil.rmtree(patient)
    patient.mkdir()
    (patient / "ehr.csv").write_text("age,ldh\n,\n")
    with pytest.raises(PatientDataError, match=r"nothing was observed.*t1\.nii\.gz.*ehr\.csv"):
        read_patient(patient, cohort.specs)
    record = read_patient(patient, cohort.specs, require_something=False)
    assert record.modalities == {}


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text("a file")])
def test_no_directory(cohort, tmp_path, make):
    make(tmp_path / "p")
    with pytest.raises(PatientDataError, match="no readable patient directory"):
        read_patient(tmp_path / "p", cohort.specs)


def test_ids_and_label_are_kept(cohort, patient):
    record = read_patient(patient, cohort.specs, record_id="v1", patient_id="p", label=1)
    assert (record.record_id, record.patient_id, record.label) == ("v1", "p", 1)


def test_scans_of_different_places_are_an_error(cohort, patient):
    import nibabel as nib

    image = nib.load(patient / "t2.nii.gz")
    affine = image.affine.copy()
    affine[2, 3] += 45
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), patient / "t2.nii.gz")
    with pytest.raises(PatientDataError, match=r"t2\.nii\.gz: .* same place as t1.*0%, and 45 mm"):
        read_patient(patient, cohort.specs)


@pytest.mark.parametrize("name", ["t1.ima", "t1.nii.gz.bak", "ehr.xlsx"])
def test_a_file_in_a_format_that_is_not_read_is_an_error_not_missing(cohort, tmp_path, name):
    write_patient(tmp_path / "p", np.random.default_rng(0), True, [])
    folder = tmp_path / "p"
    stem = name.split(".")[0]
    next(folder.glob(f"{stem}.*")).rename(folder / name)
    with pytest.raises(PatientDataError, match=f"{name}.*format is not read"):
        read_patient(folder, cohort.specs)


@pytest.mark.parametrize("name", ["T1.nii.gz", "t1.NII.GZ", "EHR.CSV", "Ehr.csv", "EHR.json"])
def test_a_name_in_other_capitals_is_never_missing(cohort, tmp_path, name):
    folder = tmp_path / "p"
    write_patient(folder, np.random.default_rng(0), True, [])
    stem = name.split(".")[0].lower()
    next(folder.glob(f"{stem}.*")).rename(folder / name)
    try:
        record = read_patient(folder, cohort.specs)
    except PatientDataError as error:
        assert f"{name}: the name differs" in str(error)
    else:  # an extension in capitals is read
        assert "t1" in record.modalities and name == "t1.NII.GZ"


@pytest.mark.parametrize("name", ["t1.nii.gz", "ehr.csv"])
def test_a_link_to_nothing_is_an_error(cohort, patient, name):
    (patient / name).unlink()
    (patient / name).symlink_to(patient / "gone")
    with pytest.raises(PatientDataError, match=f"{name}: the link leads nowhere"):
        read_patient(patient, cohort.specs)


@pytest.mark.parametrize("name", ["a\nb", "\udcff\udcfe"])
def test_a_folder_name_that_no_file_can_hold_is_an_error(cohort, patient, name):
    patient.rename(patient.with_name(name))
    with pytest.raises(PatientDataError, match="Rename the folder") as caught:
        read_patient(patient.with_name(name), cohort.specs)
    str(caught.value).encode()


def test_a_sidecar_without_its_scan_is_no_scan(cohort, tmp_path):
    write_patient(tmp_path / "p", np.random.default_rng(0), True, ["t1"])
    (tmp_path / "p" / "t1.json").write_text("{}")
    assert "t1" not in read_patient(tmp_path / "p", cohort.specs).modalities


@pytest.fixture
def named(monkeypatch):
    """Lets scans state whom they are of, by modality."""

    def name(**identifiers):
        read = Image.read_beside

        def with_identifiers(self, *arguments):
            value = read(self, *arguments)
            if value is not None:
                value = replace(value, identifiers=identifiers.get(self.spec.name, ()))
            return value

        monkeypatch.setattr(Image, "read_beside", with_identifiers)

    return name


def test_files_of_different_patients_are_refused_without_naming_them(cohort, cohort_dir, named):
    named(t1=("MRN-0042", "X7"), t2=("MRN-0043",), photo=("X7",))
    with pytest.raises(PatientDataError, match="in t2 than in t1, photo") as caught:
        read_patient(cohort_dir / "patients" / "p000", cohort.specs)
    assert len(caught.value.problems) == 1
    assert not any(word in str(caught.value) for word in ("MRN", "X7", "004"))


def test_a_record_knows_what_its_files_call_the_patient(cohort, cohort_dir, named):
    folder = cohort_dir / "patients" / "p000"
    assert read_patient(folder, cohort.specs).identifier is None
    named(t1=("MRN-0042", "A"), photo=("MRN-0042",))
    record = read_patient(folder, cohort.specs)
    assert record.identifier == record.without(["t1"]).identifier == "MRN-0042"
    assert "MRN-0042" not in repr(record)


@pytest.mark.parametrize("name", ["scans/t1.nii.gz", "scans/ehr.csv", "a/scans/photo.png"])
def test_a_folder_that_leads_out_of_the_patient_directory_is_refused(cohort, tmp_path, name):
    """A bundle names files, and comes from others; a link that stays inside is the patient's."""
    other, patient = tmp_path / "other", tmp_path / "p01"
    kept = patient / "kept"
    for folder in (other, kept, (patient / name).parent.parent):
        folder.mkdir(parents=True, exist_ok=True)
    base = name.rsplit("/", 1)[1]
    source = cohort.records[0].folder / base
    for folder in (other, kept):
        shutil.copy(source, folder / base)
    specs = [replace(s, file=name) for s in cohort.specs if s.file == base]
    place = (patient / name).parent
    place.symlink_to(other)
    with pytest.raises(PatientDataError, match="leads out of the patient directory") as error:
        read_patient(patient, specs)
    assert error.value.exit_code == 3
    place.unlink()
    place.symlink_to(kept)
    assert set(read_patient(patient, specs).modalities) == {s.name for s in specs}
