"""Nothing that identifies a patient gets out of the files it came in, unless asked for."""

import base64
import copy
import gzip
import io
import json
import pickle
import re
import shutil
import zlib

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dymo_med.bundle import load_bundle
from dymo_med.cli import main
from dymo_med.data.patient import read_patient
from dymo_med.errors import PatientDataError
from dymo_med.privacy import pseudonym
from tests.conftest import COHORT
from tests.corruption.spoil import GRID, edit, resummed, volume, write_series

IDENTIFIER = "MRN7734011"
PLANTED = {
    "name": "Qwertzian",
    "id": IDENTIFIER,
    "birth": "19510203",
    "institution": "Hexenberg",
    "physician": "Ypsilanti",
    "series": "Zebulon",
    "uid": "1.2.826.0.1.99123",
    "file": "Marzipan",
    "descrip": "Obadiah",
    "extension": "Pumpernickel",
    "png": "Rumpelstilz",
    "exif": "Sauerampfer",
    "cell": "Tarantella",
    "server": "Wurlitzer",
    "address": "Kaleidoskopgasse",
    "note": "Mirabilis",
    "passport": "XK5550182",
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A cohort of one patient, whose files hold identifiers wherever there is room for one."""
    root = tmp_path_factory.mktemp("planted")
    (root / "cohort.yaml").write_text(yaml.safe_dump(COHORT, sort_keys=False))
    (root / "labels.csv").write_text("patient_id,grade\np1,low\n")
    (root / "splits.csv").write_text("patient_id,split\np1,test\n")
    folder = root / "patients" / "p1"
    folder.mkdir(parents=True)
    write_series(
        folder / "t1",
        slices=12,
        series=PLANTED["uid"],
        patient=IDENTIFIER,
        PatientName=f"{PLANTED['name']}^Jane",
        PatientBirthDate=PLANTED["birth"],
        InstitutionName=PLANTED["institution"],
        ReferringPhysicianName=PLANTED["physician"],
        SeriesDescription=PLANTED["series"],
        StudyDescription=PLANTED["series"],
    )
    for path in list((folder / "t1").iterdir()):
        path.rename(path.with_name(f"{PLANTED['file']}_{path.name}"))
    comment = PngInfo()
    comment.add_text("Comment", PLANTED["png"])
    exif = Image.Exif()
    exif[0x010E] = PLANTED["exif"]
    picture = Image.fromarray(volume((24, 20), np.uint8))
    picture.save(folder / "photo.png", pnginfo=comment, exif=exif)
    (folder / "ehr.csv").write_text(f"age,nickname,sex,ldh\n61,{PLANTED['cell']},F,201\n")
    return root


def with_remarks(folder):
    """Put a NIfTI file with remarks in the place of the DICOM series."""
    shutil.rmtree(folder / "t1")
    image = nib.Nifti1Image(volume(), GRID)
    image.header["descrip"] = PLANTED["descrip"].encode()
    image.header["db_name"] = PLANTED["name"].encode()
    image.header.extensions.append(
        nib.nifti1.Nifti1Extension("comment", PLANTED["extension"].encode())
    )
    nib.save(image, folder / "t1.nii.gz")


def unpacked(data):
    """Yield bytes, and what is packed inside of them: gzip, PNG text, PDF streams, data URLs."""
    yield data
    if data[:2] == b"\x1f\x8b":
        yield from unpacked(gzip.decompress(data))
    for start in re.finditer(rb"stream\r?\n", data):
        stream = data[start.end() : data.find(b"endstream", start.end())]
        for decode in (lambda s: s, lambda s: base64.a85decode(s.strip(), adobe=False)):
            try:
                yield zlib.decompress(decode(stream.strip().removesuffix(b"~>")))
                break
            except (zlib.error, ValueError):
                continue
    for url in re.finditer(rb"base64,([A-Za-z0-9+/=]+)", data):
        picture = base64.b64decode(url[1])
        yield picture
        if picture[:4] == b"\x89PNG":
            yield repr(Image.open(io.BytesIO(picture)).info).encode()


def leaks(out, *texts, allowed=()):
    """Return what of the planted words can be found in files, their names, or texts."""
    places = [*texts, *(str(p.relative_to(out)) for p in out.rglob("*"))]
    parts = [text.encode() for text in places]
    for path in out.rglob("*"):
        if path.is_file():
            parts += unpacked(path.read_bytes())
    words = {k: w for k, w in PLANTED.items() if w not in allowed}
    return sorted({k for k, w in words.items() for part in parts if w.encode() in part})


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return stopped.value.code or 0, printed.out + printed.err


@pytest.fixture
def no_pickle(monkeypatch):
    """Let whoever unpickles anything fail."""

    def refuse(*_, **__):
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)


def test_the_search_finds_what_is_packed(tmp_path):
    """The test itself: a word in a packed file, a PDF and a picture is found."""
    word = PLANTED["name"].encode()
    (tmp_path / "a.gz").write_bytes(gzip.compress(word))
    assert leaks(tmp_path) == ["name"]
    (tmp_path / "a.gz").write_bytes(
        b"stream\n" + zlib.compress(PLANTED["id"].encode()) + b"endstream"
    )
    assert leaks(tmp_path) == ["id"]
    (tmp_path / "a.gz").unlink()
    assert leaks(tmp_path, "Marzipan") == ["file"]


@pytest.mark.parametrize("kind", ["dicom", "nifti"])
def test_nothing_identifies_the_patient(
    planted, bundle_dir, tmp_path, capsys, no_pickle, plain, kind
):
    cohort = shutil.copytree(planted, tmp_path / "cohort")
    patient = cohort / "patients" / "p1"
    if kind == "nifti":
        with_remarks(patient)
    out = tmp_path / "out"
    out.mkdir()
    source = ["-i", patient, "-b", bundle_dir, "-d", "cpu"]
    said = []
    for command in (
        ["predict", *source, "-o", out / "predict", "--pdf"],
        ["impute", *source, "-o", out / "impute"],
        ["check", patient, "--against", bundle_dir, "--json"],
        ["check", cohort, "--json"],
        ["check", out / "predict", "--json"],
        ["evaluate", "-b", bundle_dir, "-c", cohort, "-o", out / "evaluate", "-m", "cells:0.5"],
    ):
        code, text = run(capsys, *command)
        assert code == 0, text
        said.append(text)
    assert leaks(out, *said) == []
    shown = pseudonym(IDENTIFIER) in (out / "predict" / "report.html").read_text(encoding="utf-8")
    assert shown == (kind == "dicom")
    facts = json.loads((out / "impute" / "recovered" / "recovered.json").read_text())["sources"]
    assert ("patient" in facts["t1"]["facts"]) == (kind == "dicom")


def test_the_identifier_is_shown_if_asked_for(planted, bundle_dir, tmp_path, capsys):
    source = ["-i", planted / "patients" / "p1", "-b", bundle_dir, "-d", "cpu", "--identify"]
    assert run(capsys, "predict", *source, "-o", tmp_path / "predict", "--no-explain")[0] == 0
    assert f"patient {IDENTIFIER}" in (tmp_path / "predict" / "report.html").read_text()
    assert leaks(tmp_path, allowed=(IDENTIFIER,)) == []


def test_files_of_two_patients_are_refused_without_saying_whose(
    planted, bundle_dir, tmp_path, capsys
):
    patient = shutil.copytree(planted / "patients" / "p1", tmp_path / "p1")
    write_series(patient / "t2", slices=12, patient="MRN999")
    code, text = run(
        capsys, "predict", "-i", patient, "-b", bundle_dir, "-o", tmp_path / "out", "-d", "cpu"
    )
    assert code == 3 and "different patients" in text and "in t2 than in t1" in text
    assert leaks(tmp_path / "out", text) == [] and "MRN999" not in text


# --- FHIR records ---------------------------------------------------------------------------------

# Where the columns of the small cohort's tables are in a FHIR record.
FHIR_COLUMNS = {
    "age": {"fhir": "birthDate", "until": "effective"},
    "sex": {"fhir": "gender", "aliases": [["female", "F"], ["male", "M"]]},
    "ldh": {"loinc": ["2532-0"]},
    "crp": {"loinc": ["1988-5"]},
    "blood_group": {"loinc": ["882-1"]},
}
TYPES = "http://terminology.hl7.org/CodeSystem/v2-0203"
MEDICAL_RECORD = {"system": "urn:hospital", "value": IDENTIFIER}
PASSPORT = {
    "type": {"coding": [{"system": TYPES, "code": "PPN"}]},
    "system": "urn:passports",
    "value": PLANTED["passport"],
}


def fhir(*identifiers):
    """Return a FHIR record that holds identifiers wherever there is room for one."""
    subject = {"reference": f"Patient/{PLANTED['server']}", "display": PLANTED["name"]}
    values = {
        "2532-0": {"valueQuantity": {"value": 201, "unit": "U/L"}},
        "882-1": {"valueString": "AB"},
    }
    birth = PLANTED["birth"]
    patient = {
        "resourceType": "Patient",
        "id": PLANTED["server"],
        "identifier": [{**i, "assigner": {"display": PLANTED["institution"]}} for i in identifiers],
        "name": [{"family": PLANTED["name"], "given": ["Jane"]}],
        "telecom": [{"system": "phone", "value": PLANTED["birth"]}],
        "gender": "female",
        "birthDate": f"{birth[:4]}-{birth[4:6]}-{birth[6:]}",
        "address": [{"line": [PLANTED["address"]], "text": PLANTED["address"]}],
        "generalPractitioner": [{"display": PLANTED["physician"]}],
        "text": {"status": "generated", "div": f"<div>{PLANTED['descrip']}</div>"},
        "photo": [{"title": PLANTED["png"]}],
    }
    observations = [
        {
            "resourceType": "Observation",
            "id": f"{PLANTED['server']}-{code}",
            "status": "final",
            "code": {
                "coding": [{"system": "http://loinc.org", "code": code}],
                "text": PLANTED["cell"],
            },
            "subject": subject,
            "effectiveDateTime": "2012-03-04T10:00:00Z",
            "performer": [{"display": PLANTED["physician"]}],
            "note": [{"text": PLANTED["note"], "authorString": PLANTED["physician"]}],
            "extension": [{"url": "urn:x", "valueString": PLANTED["extension"]}],
            **value,
        }
        for code, value in values.items()
    ]
    url = f"http://h/fhir/Patient/{PLANTED['server']}"
    entry = [{"fullUrl": url, "resource": patient}, *({"resource": o} for o in observations)]
    return json.dumps({"resourceType": "Bundle", "type": "collection", "entry": entry})


@pytest.fixture(scope="module")
def fhir_bundle(bundle_dir, tmp_path_factory):
    """The small bundle, told to take the cells of its tables from FHIR records."""

    def change(description):
        for modality in description["modalities"]:
            if modality["kind"] == "table":
                modality["file"], modality["rules"] = "fhir.json", {"format": "fhir"}
                for column in modality["columns"]:
                    column["rules"] = FHIR_COLUMNS[column["name"]]

    bundle = shutil.copytree(bundle_dir, tmp_path_factory.mktemp("fhir") / "bundle")
    resummed(edit("configs/metadata.json", change))(bundle)
    return bundle


@pytest.fixture
def fhir_cohort(planted, tmp_path):
    """The planted cohort, with a FHIR record in place of the table."""
    cohort = shutil.copytree(planted, tmp_path / "cohort")
    described = copy.deepcopy(COHORT)
    for modality in described["modalities"].values():
        if modality["kind"] == "table":
            modality |= {"file": "fhir.json", "format": "fhir"}
            for name, column in modality["columns"].items():
                rules = {k: v for k, v in FHIR_COLUMNS[name].items() if k != "aliases"}
                column |= {**rules, "type": "date"} if "until" in rules else rules
    described["modalities"]["demographics"]["columns"]["age"].pop("unit")
    sex = described["modalities"]["demographics"]["columns"]["sex"]
    sex["aliases"] = {"F": ["female"], "M": ["male"]}
    (cohort / "cohort.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    patient = cohort / "patients" / "p1"
    (patient / "ehr.csv").unlink()
    (patient / "fhir.json").write_text(fhir(MEDICAL_RECORD, PASSPORT))
    return cohort


def test_nothing_of_a_fhir_record_identifies_the_patient(
    fhir_cohort, fhir_bundle, tmp_path, capsys, plain
):
    patient, out = fhir_cohort / "patients" / "p1", tmp_path / "out"
    out.mkdir()
    source = ["-i", patient, "-b", fhir_bundle, "-d", "cpu"]
    said = []
    for command in (
        ["predict", *source, "-o", out / "predict", "--no-explain"],
        ["impute", *source, "-o", out / "impute"],
        ["check", patient, "--against", fhir_bundle, "--json"],
        ["check", fhir_cohort, "--json"],
        ["evaluate", "-b", fhir_bundle, "-c", fhir_cohort, "-o", out / "evaluate"],
    ):
        code, text = run(capsys, *command)
        assert code == 0, text
        said.append(text)
    assert leaks(out, *said) == []
    page = (out / "predict" / "report.html").read_text(encoding="utf-8")
    assert pseudonym(IDENTIFIER) in page  # the number that both name, not the passport's
    assert "1951-02-03" not in page + "".join(said)
    facts = json.loads((out / "impute" / "recovered" / "recovered.json").read_text())["sources"]
    assert facts["t1"]["facts"]["patient"] == facts["labs"]["facts"]["patient"]


ANOTHER = {"system": "urn:hospital", "value": PLANTED["address"]}
WHOSE = [
    # the record's identifiers, whether it may be that of the patient in the DICOM header
    ([ANOTHER], False),
    ([ANOTHER, PASSPORT], False),
    ([{"value": PLANTED["address"]}], False),
    ([{**PASSPORT, "type": {"coding": [{"system": TYPES, "code": "MR"}]}}], False),
    ([{**MEDICAL_RECORD, "system": "urn:another"}], True),
    ([{**PASSPORT, "value": IDENTIFIER}], True),
    ([PASSPORT], True),
    ([{"system": "http://hl7.org/fhir/sid/us-ssn", "value": PLANTED["passport"]}], True),
    ([], True),
]


@pytest.fixture(scope="module")
def fhir_specs(fhir_bundle):
    """The scan that is a DICOM series, and the tables."""
    specs = load_bundle(fhir_bundle, "cpu").specs
    return [spec for spec in specs if spec.name not in ("t2", "photo")]


@pytest.mark.parametrize(("identifiers", "agrees"), WHOSE)
def test_a_fhir_record_of_another_patient_than_the_scan_is_refused(
    fhir_cohort, fhir_specs, identifiers, agrees
):
    patient = fhir_cohort / "patients" / "p1"
    (patient / "fhir.json").write_text(fhir(*identifiers))
    if agrees:
        assert len(read_patient(patient, fhir_specs).modalities) == 3
        return
    with pytest.raises(PatientDataError) as caught:
        read_patient(patient, fhir_specs)
    (problem,) = caught.value.problems
    assert problem.got == "another patient in demographics, labs than in t1"
    assert leaks(fhir_cohort / "none", str(caught.value)) == []
