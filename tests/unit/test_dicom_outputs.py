"""DICOM objects of a prediction: valid, readable by others, the patient's study, no identifiers."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.uid import ComputedRadiographyImageStorage

from dymo_med.errors import ConfigError, PatientDataError
from dymo_med.inference.pdf import render_pdf
from dymo_med.inference.predict import predict_patient
from dymo_med.inference.prediction_file import PredictionFile, read_prediction
from dymo_med.inference.segment import segment_patient
from dymo_med.modalities.made_up import refuse_made_up
from dymo_med.outputs import export
from dymo_med.outputs.study import read_study
from dymo_med.privacy import pseudonym
from dymo_med.types import SeriesRule
from tests import dicom_files
from tests.conftest import write_patient
from tests.segmentation import (  # noqa: F401
    masked_cohort,
    masked_dir,
    segmentation_bundle,
    segmentation_dir,
)

NAME, IDENTIFIER, BORN = dicom_files.SECRETS
STUDY = {
    "StudyDate": "20260102",
    "StudyTime": "101112",
    "StudyID": "S-17",
    "AccessionNumber": "ACC-4711",
    "ReferringPhysicianName": "Referrer^Rita",
    "PatientSex": "F",
    "StudyDescription": "Doe family",
    "InstitutionName": "Hospital of Doe",
}
SECRETS = (
    *dicom_files.SECRETS,
    "Doe family",
    "Hospital of Doe",
    "20260102",
    "S-17",
    "ACC-4711",
    "Referrer",
)
AFFINE = np.array([[-2.0, 0, 0, 17], [0, -2, 0, 19], [0, 0, 3, -16.5], [0, 0, 0, 1]])


def head():
    """Return stored numbers of a head, `(X, Y, Z)`."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (18, 20, 12)), indexing="ij")
    noise = np.random.default_rng(1).normal(0, 6, x.shape)
    return np.where(x**2 + y**2 + z**2 < 0.8, 100 + noise, 0).clip(0).astype(np.uint16)


def tool(name):
    """Return a validator's program, or skip."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed; see CONTRIBUTING.md")
    return found


def told(*command):
    """Return what a program says, and its exit code."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """A patient with a DICOM series t1; t2 and the photo are missing."""
    folder = tmp_path_factory.mktemp("dicom") / "anna"
    write_patient(folder, np.random.default_rng(5), True, ["t1", "t2", "photo", "cells"])
    dicom_files.series(folder / "t1", head(), AFFINE, **STUDY)
    return folder


@pytest.fixture(scope="module")
def predicted(tmp_path_factory, bundle, patient):
    out = tmp_path_factory.mktemp("predicted") / "out"
    predict_patient(patient, bundle, out, explain=False)
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory, predicted, patient):
    """DICOM folders by whether the patient is identified."""
    folders = {}
    for identify in (False, True):
        place = tmp_path_factory.mktemp("written")
        export(predicted, ["dicom"], patient, out=place, identify=identify)
        folders[identify] = place / "dicom"
    return folders


def read(folder):
    return {p.name: pydicom.dcmread(p) for p in sorted(folder.glob("*.dcm"))}


def test_what_is_written_is_in_the_patients_own_study(written):
    objects = read(written[False])
    assert set(objects) == {"sr.dcm", "report.dcm", "recovered_t2.dcm", "recovered_photo.dcm"}
    assert {o.StudyInstanceUID for o in objects.values()} == {"1.2.3.4"}
    assert len({o.SeriesInstanceUID for o in objects.values()}) == len(objects)
    sources = {f"1.2.3.4.5.{k}" for k in range(1, 13)}
    referred = {
        item.ReferencedSOPInstanceUID for item in objects["recovered_t2.dcm"].SourceImageSequence
    }
    assert referred == sources
    assert sources <= {
        item.ReferencedSOPInstanceUID
        for study in objects["sr.dcm"].CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }


def test_nothing_identifies_the_patient_unless_asked(written):
    for path in written[False].iterdir():
        content = path.read_bytes()
        assert not [s for s in SECRETS if s.encode() in content], path.name
    for name, dataset in read(written[False]).items():
        assert dataset.PatientID == pseudonym(IDENTIFIER), name
        assert dataset.PatientIdentityRemoved == "YES"
    for name, dataset in read(written[True]).items():
        assert (dataset.PatientID, dataset.PatientName) == (IDENTIFIER, NAME), name
        assert dataset.PatientBirthDate == BORN
        assert dataset.StudyDate == STUDY["StudyDate"]
        assert dataset.AccessionNumber == STUDY["AccessionNumber"]
        assert "PatientIdentityRemoved" not in dataset


@pytest.mark.parametrize("identify", [False, True])
def test_dciodvfy_finds_no_error(written, identify):
    program = tool("dciodvfy")
    for path in sorted(written[identify].glob("*.dcm")):
        _, said = told(program, path)
        lines = [line for line in said.splitlines() if line.startswith(("Error", "Warning"))]
        assert not [line for line in lines if line.startswith("Error")], path.name
        # Those that docs/reference/outputs.md lists.
        known = ("99DYMO", "<Laterality>", *(() if identify else ("DICOMDIR - Study",)))
        assert not [line for line in lines if not any(k in line for k in known)], path.name


def test_other_programs_read_the_structured_report(written, tmp_path, predicted):
    path = written[False] / "sr.dcm"
    code, said = told(tool("dsrdump"), path)
    assert code == 0
    assert "Probability" in said
    code, said = told(
        tool("tid1500reader"), "--inputDICOM", path, "--outputMetadata", tmp_path / "sr.json"
    )
    assert code == 0, said
    groups = json.loads((tmp_path / "sr.json").read_text())["Measurements"]
    names = [group["TrackingIdentifier"] for group in groups]
    assert [n for n in names if n.startswith("class ")] == ["class low", "class high"]
    assert "modality t2" in names


def test_the_structured_report_says_what_the_prediction_says(written, predicted):
    file = read_prediction(predicted / "prediction.json")
    content = highdicom.sr.srread(written[False] / "sr.dcm").content
    groups = {g.tracking_identifier: g for g in content.get_image_measurement_groups()}
    for name, probability in zip(file.classes, file.probabilities, strict=True):
        number = groups[f"class {name}"].get_measurements()[0]
        assert number.name.meaning == "Probability"
        assert number.value == pytest.approx(probability, abs=1e-8)
    said = [
        (e.name.meaning, e.value.meaning)
        for e in groups[f"prediction of {file.target}"].get_qualitative_evaluations()
    ]
    assert ("Predicted class", file.predicted) in said
    states = {
        name.removeprefix("modality "): group.get_qualitative_evaluations()[0].value.value
        for name, group in groups.items()
        if name.startswith("modality ")
    }
    for name in (*file.observed, *file.recovered):
        kind = "observed" if name in file.observed else "recovered"
        assert states[name].startswith(kind)
        assert states[name].endswith("-trusted") == (name in file.trusted)
    assert len(groups["modality t1"].source_images) == 12
    dataset = pydicom.dcmread(written[False] / "sr.dcm")
    assert (dataset.CompletionFlag, dataset.VerificationFlag) == ("COMPLETE", "UNVERIFIED")


def test_the_page_comes_back_as_it_went_in(written, predicted):
    dataset = read(written[False])["report.dcm"]
    content = dataset.EncapsulatedDocument[: dataset.EncapsulatedDocumentLength]
    assert content == render_pdf(read_prediction(predicted / "prediction.json"))


def test_nobody_takes_a_recovered_scan_for_an_acquired_one(written, predicted):
    dataset = read(written[False])["recovered_t2.dcm"]
    assert list(dataset.ImageType[:2]) == ["DERIVED", "SECONDARY"]
    assert (dataset.ConversionType, dataset.SyntheticData) == ("SYN", "YES")
    assert dataset.BurnedInAnnotation == "YES"
    assert dataset.SeriesDescription.startswith("SYNTHETIC")
    assert "SYNTHETIC" in dataset.DerivationDescription
    purpose = dataset.ContributingEquipmentSequence[0].PurposeOfReferenceCodeSequence[0]
    assert purpose.CodeMeaning == "Synthesizing Equipment"
    # The mark is in the pixels of every slice: brighter than any voxel.
    assert ((dataset.pixel_array == 4095).sum((1, 2)) > 100).all()
    with pytest.raises(PatientDataError, match="made it up"):
        refuse_made_up(written[False] / "recovered_t2.dcm", "Patient", "t2")


def test_a_recovered_scan_lies_where_it_was_computed(written, predicted):
    image = nib.load(predicted / "recovered" / "t2_synthetic.nii.gz")
    ends = np.array([[-0.5] * 3, np.array(image.shape) - 0.5])
    box = np.sort(nib.affines.apply_affine(np.diag([-1, -1, 1, 1]) @ image.affine, ends), axis=0)
    path = written[False] / "recovered_t2.dcm"
    read_ = SimpleITK.ReadImage(str(path))
    size = np.array(read_.GetSize())
    corners = [read_.TransformContinuousIndexToPhysicalPoint(c) for c in ((-0.5,) * 3, size - 0.5)]
    assert np.abs(np.sort(corners, axis=0) - box).max() < 0.01
    volume = highdicom.imread(path).get_volume()
    ends = np.array([[-0.5] * 3, np.array(volume.spatial_shape) - 0.5])
    corners = nib.affines.apply_affine(volume.affine, ends)
    assert np.abs(np.sort(corners, axis=0) - box).max() < 0.01


def test_the_same_prediction_gives_the_same_bytes(written, predicted, patient, tmp_path):
    export(predicted, ["dicom"], patient, out=tmp_path)
    for path in written[False].iterdir():
        assert (tmp_path / "dicom" / path.name).read_bytes() == path.read_bytes(), path.name


def test_without_dicom_inputs_there_is_a_study_of_its_own(tmp_path, bundle):
    patient = tmp_path / "p7"
    write_patient(patient, np.random.default_rng(5), True, ["t2"])
    predict_patient(patient, bundle, tmp_path / "out", explain=False)
    _, notes = export(tmp_path / "out", ["dicom"], patient)
    assert any("nothing refers to images" in note for note in notes)
    objects = read(tmp_path / "out" / "dicom")
    assert len({o.StudyInstanceUID for o in objects.values()}) == 1
    assert {str(o.PatientID) for o in objects.values()} == {"p7"}
    program = tool("dciodvfy")
    for name in objects:
        _, said = told(program, tmp_path / "out" / "dicom" / name)
        assert "Error" not in said, name


def test_an_identified_prediction_is_not_given_away(tmp_path, bundle, patient):
    predict_patient(patient, bundle, tmp_path / "out", explain=False, identify=True)
    export(tmp_path / "out", ["dicom"])
    for path in (tmp_path / "out" / "dicom").iterdir():
        assert IDENTIFIER.encode() not in path.read_bytes(), path.name
    export(tmp_path / "out", ["dicom"], identify=True)
    for dataset in read(tmp_path / "out" / "dicom").values():
        assert dataset.PatientID == IDENTIFIER


def test_an_identifier_that_nobody_knows_is_an_error(predicted, tmp_path):
    with pytest.raises(ConfigError, match="pseudonym"):
        export(predicted, ["dicom"], out=tmp_path, identify=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["another", "gone", "no folder"])
def test_files_that_were_not_predicted_from_are_refused(predicted, patient, tmp_path, change):
    other = tmp_path / "other"
    if change != "no folder":
        shutil.copytree(patient, other)
    if change == "gone":
        shutil.rmtree(other / "t1")
    if change == "another":
        path = sorted((other / "t1").iterdir())[3]
        dataset = pydicom.dcmread(path)
        dataset.PixelData = bytes(len(dataset.PixelData))
        dataset.save_as(path)
    with pytest.raises(PatientDataError, match="not the files that t1 was read from"):
        export(predicted, ["dicom"], other, out=tmp_path / "out")
    assert not (tmp_path / "out" / "dicom").exists()


@pytest.mark.parametrize(("unit", "code"), [("years", "a"), ("points", ""), ("", "")])
def test_a_regression_says_its_number_and_unit(predicted, tmp_path, unit, code):
    out = shutil.copytree(predicted, tmp_path / "out")
    content = read_prediction(out / "prediction.json").to_dict()
    del content["content_sha256"]
    content["value"] = {
        **{"value": 2.5, "low": -1.25, "high": None, "coverage": 0.9, "compared_with": "all"},
        **{"calibrated_on": 30, "least": 9, "unit": unit, "centers": [0.0, 5.0]},
        "alternatives": dict.fromkeys(content["alternatives"], 1.0),
    }
    content["prediction_set"] = None
    (out / "prediction.json").write_text(PredictionFile.make(content).to_text())
    export(out, ["dicom", "fhir"])
    content = highdicom.sr.srread(out / "dicom" / "sr.dcm").content
    group = content.get_image_measurement_groups()[0]
    said = {m.name.value: (m.value, m.unit.value) for m in group.get_measurements()}
    assert said["value"] == (2.5, code or ("unit" if unit else "1"))
    assert said["value-low"][0] == -1.25
    assert "value-high" not in said
    bundle = json.loads((out / "fhir" / "bundle.json").read_text())
    answers = [e["resource"] for e in bundle["entry"] if "valueQuantity" in e["resource"]]
    assert answers[0]["valueQuantity"]["value"] == 2.5
    assert answers[0]["valueQuantity"].get("code", "") == code
    _, lines = told(tool("dciodvfy"), out / "dicom" / "sr.dcm")
    assert "Error" not in lines


@pytest.mark.parametrize("change", ["edited", "swapped", "gone"])
def test_what_was_changed_does_not_go_out(predicted, tmp_path, change):
    out = shutil.copytree(predicted, tmp_path / "out")
    scan = out / "recovered" / "t2_synthetic.nii.gz"
    if change == "edited":
        path = out / "prediction.json"
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    elif change == "swapped":
        scan.write_bytes(scan.read_bytes() + b" ")
    else:
        scan.unlink()
    with pytest.raises(PatientDataError, match="not as it was when it was written"):
        export(out, ["dicom", "fhir"])
    assert not (out / "dicom").exists()


def test_names_in_other_letters_are_kept(tmp_path, bundle):
    patient = tmp_path / "p8"
    write_patient(patient, np.random.default_rng(5), True, ["t1", "t2"])
    name = "Wang^XiaoDong=王^小东"
    dicom_files.series(
        patient / "t1", head(), AFFINE, SpecificCharacterSet="ISO_IR 192", PatientName=name
    )
    predict_patient(patient, bundle, tmp_path / "out", explain=False)
    export(tmp_path / "out", ["dicom"], patient, identify=True)
    assert {str(o.PatientName) for o in read(tmp_path / "out" / "dicom").values()} == {name}


@pytest.mark.parametrize(
    "fields",
    [
        {"PatientBirthDate": "1970-01-01", "PatientSex": "female", "StudyDate": "last May"},
        {"PatientID": "MRN 0042 " + "0" * 80},
        {"PatientName": "", "PatientID": "", "FrameOfReferenceUID": ""},
        {"StudyInstanceUID": ""},
        {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "M\u00fcller^J\u00f6rg"},
        {"TimezoneOffsetFromUTC": "-0330"},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize("identify", [False, True])
def test_headers_as_hospitals_write_them(tmp_path, bundle, fields, identify, monkeypatch):
    monkeypatch.setattr(pydicom.config.settings, "writing_validation_mode", pydicom.config.IGNORE)
    patient = tmp_path / "p9"
    write_patient(patient, np.random.default_rng(5), True, ["t1", "t2"])
    dicom_files.series(patient / "t1", head(), AFFINE, **fields)
    monkeypatch.undo()
    predict_patient(patient, bundle, tmp_path / "out", explain=False)
    export(tmp_path / "out", ["dicom", "fhir"], patient, identify=identify)
    program = tool("dciodvfy")
    for name, dataset in read(tmp_path / "out" / "dicom").items():
        _, said = told(program, tmp_path / "out" / "dicom" / name)
        errors = [line for line in said.splitlines() if line.startswith("Error")]
        # An identifier that is too long stays what it is: cut, it would be another patient's.
        known = ("Patient ID", "invalid data values") if len(dataset.PatientID) > 64 else ("?",)
        assert not [line for line in errors if not any(k in line for k in known)], (name, errors)
        assert not identify or dataset.PatientID in (fields.get("PatientID") or "p9", IDENTIFIER)
        zone = fields.get("TimezoneOffsetFromUTC")
        assert zone is None or dataset.TimezoneOffsetFromUTC == zone


@pytest.mark.parametrize("kind", ["enhanced", "picture", "two studies"])
def test_other_kinds_of_sources_are_referred_to(tmp_path, bundle, kind):
    patient = tmp_path / "p9"
    lacks = ["t2", "photo"] if kind == "picture" else ["t1", "t2", "photo"]
    write_patient(patient, np.random.default_rng(5), True, lacks)
    if kind == "enhanced":
        dicom_files.enhanced(patient / "t1.dcm", head(), AFFINE)
    elif kind == "picture":
        stored = np.ascontiguousarray(head()[:, :, 6].T)
        image = dicom_files.header(ComputedRadiographyImageStorage, stored, "1.2.3.4.6", 1, "CR")
        image.save_as(patient / "photo.dcm", enforce_file_format=True)
    else:
        dicom_files.series(patient / "t1", head(), AFFINE)
        other = head()[::-1] * 2
        uids = {"uid": "1.2.3.5.5", "StudyInstanceUID": "1.2.3.5"}
        dicom_files.series(patient / "t2", other, AFFINE, **uids)
    predict_patient(patient, bundle, tmp_path / "out", explain=False)
    export(tmp_path / "out", ["dicom", "fhir"], patient)
    objects = read(tmp_path / "out" / "dicom")
    assert {o.StudyInstanceUID for o in objects.values()} == {"1.2.3.4"}
    program = tool("dciodvfy")
    for name in objects:
        _, said = told(program, tmp_path / "out" / "dicom" / name)
        assert not [line for line in said.splitlines() if line.startswith("Error")], (name, said)
    sources = {"enhanced": 1, "picture": 1, "two studies": 24}[kind]
    assert len(objects["report.dcm"].SourceInstanceSequence) == sources


def test_series_of_one_folder_are_told_apart(tmp_path, bundle):
    """Two modalities in one folder: each refers to the images of its own series."""
    rule = {"t1": "^one", "t2": "^two"}
    specs = tuple(
        replace(s, file="study", dicom=SeriesRule("", rule[s.name], None, "error"))
        if s.name in rule
        else s
        for s in bundle.specs
    )
    patient = tmp_path / "p9"
    write_patient(patient, np.random.default_rng(5), True, ["t1", "t2", "photo"])
    dicom_files.series(patient / "study", head(), AFFINE, uid="1.2.3.4.7", SeriesDescription="one")
    other = (head() * 1.5 + 10 * (head() > 90)).astype(np.uint16)
    dicom_files.series(patient / "study", other, AFFINE, uid="1.2.3.4.8", SeriesDescription="two")
    predict_patient(patient, replace(bundle, specs=specs), tmp_path / "out", explain=False)
    study = read_study(tmp_path / "out", patient)
    series = {n: {i.SeriesInstanceUID for i in s.images} for n, s in study.sources.items()}
    assert series == {"t1": {"1.2.3.4.7"}, "t2": {"1.2.3.4.8"}}


# --- Outlines ------------------------------------------------------------------------------------


def _as_dicom(nifti, folder, multi):
    image = nib.load(nifti)
    values = np.asarray(image.dataobj)
    stored = np.round((values - values.min()) / np.ptp(values) * 1000).astype(np.uint16)
    nifti.unlink()
    if multi:
        order = [3, 0, *range(1, 3), *range(4, stored.shape[2])]  # frames in no order of places
        return dicom_files.enhanced(folder.with_suffix(".dcm"), stored, image.affine, order=order)
    return dicom_files.series(folder, stored, image.affine, order=range(stored.shape[2])[::-1])


@pytest.fixture(scope="module", params=[False, True], ids=["series", "multi-frame"])
def outlined(request, tmp_path_factory, masked_dir, segmentation_bundle):  # noqa: F811
    root = tmp_path_factory.mktemp("outlined")
    patient = root / "patient"
    shutil.copytree(next(p for p in sorted((masked_dir / "patients").iterdir())), patient)
    first = segmentation_bundle.specs[0]
    _as_dicom(patient / first.file, patient / first.name, request.param)
    segment_patient(patient, segmentation_bundle, root / "out")
    export(root / "out", ["dicom"], patient)
    return root / "out"


def test_an_outline_lies_on_its_source(outlined):
    out = outlined
    labels = nib.load(out / "segmentation.nii.gz")
    for path in sorted((out / "dicom").glob("seg_*.dcm")):
        seg = highdicom.seg.segread(path)
        # Voxel for voxel: the volume in space is that of the labels.
        volume = seg.get_volume(combine_segments=True)
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ labels.affine
        there = highdicom.Volume(
            np.asarray(labels.dataobj), lps, coordinate_system="PATIENT"
        ).match_geometry(volume)
        assert np.abs(there.affine - volume.affine).max() < 0.01
        file = json.loads((out / "prediction.json").read_text())
        region = next(r for r in file["regions"] if path.name == f"seg_{r['name']}.dcm")
        assert (volume.array == np.isin(there.array, region["labels"])).all()
        read_ = SimpleITK.ReadImage(str(path))
        assert np.allclose(sorted(read_.GetSpacing()), sorted(volume.spacing), atol=0.01)
    assert len(sorted((out / "dicom").glob("seg_*.dcm"))) == len(file["regions"])


def test_outlines_are_valid_and_the_report_refers_to_them(outlined, tmp_path):
    out = outlined
    segs = {pydicom.dcmread(p).SOPInstanceUID for p in (out / "dicom").glob("seg_*.dcm")}
    content = highdicom.sr.srread(out / "dicom" / "sr.dcm").content
    groups = content.get_volumetric_roi_measurement_groups()
    assert {g.referenced_segment.referenced_sop_instance_uid for g in groups} == segs
    volumes = [g.get_measurements()[0].value for g in groups]
    file = json.loads((out / "prediction.json").read_text())
    assert volumes == pytest.approx([1000 * r["volume_ml"] for r in file["regions"]], rel=1e-6)
    program = tool("dciodvfy")
    for path in sorted((out / "dicom").glob("*.dcm")):
        _, said = told(program, path)
        assert not [line for line in said.splitlines() if line.startswith("Error")], path.name
    for path in sorted((out / "dicom").glob("seg_*.dcm")):
        code, said = told(
            tool("segimage2itkimage"),
            *("--inputDICOM", path, "--outputDirectory", tmp_path, "--prefix", path.stem),
            *("--outputType", "nii"),
        )
        assert code == 0, said


def test_without_a_dicom_source_there_is_no_outline_and_it_is_said(
    tmp_path,
    masked_dir,  # noqa: F811
    segmentation_bundle,  # noqa: F811
):
    patient = next(p for p in sorted((masked_dir / "patients").iterdir()))
    segment_patient(patient, segmentation_bundle, tmp_path / "out")
    _, notes = export(tmp_path / "out", ["dicom"], patient)
    assert any("no segmentation object" in note for note in notes)
