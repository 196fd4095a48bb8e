"""The FHIR Bundle of a prediction: as R4 defines it, and what the library does not look at."""

import base64
import hashlib
import json

import numpy as np
import pytest

from dymo_med.inference.pdf import render_pdf
from dymo_med.inference.predict import predict_patient
from dymo_med.inference.prediction_file import read_prediction
from dymo_med.outputs import export
from dymo_med.outputs.ucum import ucum
from dymo_med.privacy import pseudonym
from tests import dicom_files
from tests.conftest import write_patient
from tests.unit.test_dicom_outputs import AFFINE, IDENTIFIER, SECRETS, STUDY, head

# Required bindings of R4 that are used here.
CODES = {
    ("Observation", "status"): {"preliminary"},
    ("DiagnosticReport", "status"): {"preliminary"},
    ("RiskAssessment", "status"): {"preliminary"},
    ("ImagingStudy", "status"): {"available"},
    ("Bundle", "type"): {"collection"},
    ("Patient", "gender"): {"male", "female", "other", "unknown"},
}


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fhir") / "anna"
    write_patient(folder, np.random.default_rng(5), True, ["t1", "t2", "photo", "cells"])
    dicom_files.series(folder / "t1", head(), AFFINE, **STUDY)
    return folder


@pytest.fixture(scope="module")
def predicted(tmp_path_factory, bundle, patient):
    out = tmp_path_factory.mktemp("predicted") / "out"
    predict_patient(patient, bundle, out, explain=False)
    return out


def bundle_of(folder):
    return json.loads((folder / "fhir" / "bundle.json").read_text())


@pytest.fixture(scope="module", params=[False, True], ids=["pseudonym", "identified"])
def written(request, tmp_path_factory, predicted, patient):
    place = tmp_path_factory.mktemp("written")
    export(predicted, ["fhir"], patient, out=place, identify=request.param)
    return bundle_of(place), request.param


def resources(bundle, kind):
    return [e["resource"] for e in bundle["entry"] if e["resource"]["resourceType"] == kind]


def test_the_library_of_r4_takes_it_and_gives_it_back(written):
    r4b = pytest.importorskip("fhir.resources.R4B.bundle", reason="fhir.resources is a dev extra")
    bundle, _ = written
    read = r4b.Bundle.model_validate_json(json.dumps(bundle))
    again = json.loads(read.model_dump_json())

    def moments(value):
        if isinstance(value, dict):
            return {k: moments(v) for k, v in value.items()}
        if isinstance(value, list):
            return [moments(v) for v in value]
        if isinstance(value, str):
            return value.replace("+00:00", "Z")
        return float(value) if isinstance(value, int | float) else value

    assert moments(again) == moments(bundle)


def test_what_the_library_does_not_look_at(written):
    bundle, _ = written
    known = {entry["fullUrl"] for entry in bundle["entry"]}
    assert len(known) == len(bundle["entry"])
    assert all(e["fullUrl"] == f"urn:uuid:{e['resource']['id']}" for e in bundle["entry"])

    def walk(value):
        if isinstance(value, dict):
            if "reference" in value:
                assert value["reference"] in known
            assert "" not in value.values()
            assert [] not in value.values()
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(bundle)
    for (kind, key), allowed in CODES.items():
        for resource in [bundle, *(e["resource"] for e in bundle["entry"])]:
            if resource["resourceType"] == kind and key in resource:
                assert resource[key] in allowed


def test_it_says_what_the_prediction_says(written, predicted):
    bundle, _ = written
    file = read_prediction(predicted / "prediction.json")
    (risk,) = resources(bundle, "RiskAssessment")
    said = {p["outcome"]["text"]: p["probabilityDecimal"] for p in risk["prediction"]}
    assert said == pytest.approx(dict(zip(file.classes, file.probabilities, strict=True)), abs=1e-8)
    (report,) = resources(bundle, "DiagnosticReport")
    (form,) = report["presentedForm"]
    content = base64.b64decode(form["data"])
    assert content.startswith(b"%PDF")
    assert form["size"] == len(content)
    assert base64.b64decode(form["hash"]) == hashlib.sha1(content).digest()
    (provenance,) = resources(bundle, "Provenance")
    made = [e["what"]["display"] for e in provenance["entity"] if e["role"] == "derivation"]
    assert len(made) == len(file.recovered_files)
    assert all(text.startswith("SYNTHETIC ") for text in made)
    for name in file.recovered:
        state = next(
            o for o in resources(bundle, "Observation") if o["code"]["text"] == f"State of {name}"
        )
        (code,) = state["valueCodeableConcept"]["coding"]
        assert code["code"].endswith("-trusted") == (name in file.trusted)
    (images,) = resources(bundle, "ImagingStudy")
    assert images["identifier"][0]["value"] == "urn:oid:1.2.3.4"
    assert images["numberOfInstances"] == 12


def test_nothing_identifies_the_patient_unless_asked(written):
    bundle, identified = written
    text = json.dumps(bundle)
    (patient,) = resources(bundle, "Patient")
    if identified:
        assert patient["identifier"][0]["value"] == IDENTIFIER
        assert patient["birthDate"] == "1970-01-01"
        assert patient["gender"] == "female"
    else:
        assert patient["identifier"][0]["value"] == pseudonym(IDENTIFIER)
        assert not [s for s in SECRETS if s in text]


def test_the_page_in_it_is_that_of_the_prediction(written, predicted):
    bundle, identified = written
    (report,) = resources(bundle, "DiagnosticReport")
    content = base64.b64decode(report["presentedForm"][0]["data"])
    expected = render_pdf(read_prediction(predicted / "prediction.json"))
    assert (content == expected) != identified  # which shows the identifier in its place


@pytest.mark.parametrize(
    ("unit", "code"),
    [
        ("years", "a"),
        ("mg/dL", "mg/dL"),
        ("10^9/L", "10*9/L"),
        ("mmHg", "mm[Hg]"),
        ("µmol/L", "umol/L"),
        ("°C", "Cel"),
        ("%", "%"),
        ("points", ""),
        ("U/L", "U/L"),
        ("", ""),
        ("mm/h", "mm/h"),
        ("1.73m2", ""),
    ],
)
def test_units_are_codes_of_ucum_or_none(unit, code):
    assert ucum(unit) == code
