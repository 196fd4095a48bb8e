"""What a Python user gets: public names, strings for paths, a status, data in memory."""

import dataclasses

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import dymo_med
from dymo_med import PatientDataError, Prediction, load_bundle, predict_patient, read_cohort
from dymo_med.inference.prediction_file import read_prediction
from dymo_med.inference.report import reason_sentence

WHOM = "p001"


@pytest.fixture(scope="module")
def patient(cohort_dir):
    """A patient directory."""
    return cohort_dir / "patients" / WHOM


def in_memory(patient):
    """Return what is in a patient directory, by modality."""
    row = pd.read_csv(patient / "ehr.csv", dtype=str, keep_default_na=False).iloc[0]
    data = {
        "demographics": pd.DataFrame([row[["age", "sex"]]]),
        "labs": dict(row[["ldh", "crp", "blood_group"]]),
    }
    for name in ("t1", "t2"):
        if (patient / f"{name}.nii.gz").exists():
            data[name] = nib.load(patient / f"{name}.nii.gz")
    if (patient / "photo.png").exists():
        data["photo"] = np.asarray(Image.open(patient / "photo.png"))
    return data


def test_editors_complete_the_public_names():
    assert set(dymo_med.__all__) == {"__version__", *dymo_med._PUBLIC}
    assert set(dir(dymo_med)) == set(dymo_med.__all__)
    assert issubclass(dymo_med.RefusedError, dymo_med.PatientDataError)


def test_paths_may_be_strings(bundle_dir, cohort_dir, patient, tmp_path):
    bundle = load_bundle(str(bundle_dir), "cpu")
    assert bundle.task == read_cohort(str(cohort_dir)).task
    predict_patient(str(patient), bundle, str(tmp_path / "out"), explain=False, draws=0)
    assert (tmp_path / "out" / "prediction.json").is_file()


@pytest.mark.parametrize("draws", [0, 5])
def test_a_prediction_has_the_status_of_its_file(bundle, patient, tmp_path, draws):
    written = predict_patient(patient, bundle, tmp_path / "out", explain=False, draws=draws)
    alone = predict_patient(patient, bundle, explain=False, draws=draws)
    file = read_prediction(tmp_path / "out" / "prediction.json")
    assert written == alone
    assert alone.status == file.status
    assert alone.reasons == tuple(map(reason_sentence, file.status_reasons))
    assert alone.prediction_set == (file.prediction_set and file.prediction_set.classes)


def test_a_notebook_shows_a_table_without_markup_of_others(bundle, patient):
    found = predict_patient(patient, bundle, explain=False, draws=0)
    odd = dataclasses.replace(found, warnings=("<b>&",), record_id="<i>")
    html = odd._repr_html_()
    assert isinstance(odd, Prediction)
    assert "<b>" not in html and "<i>" not in html and "&lt;b&gt;&amp;" in html
    assert str(found.status) in html and found.predicted in html


def test_data_in_memory_is_answered_as_its_files_are(bundle, patient):
    files = predict_patient(patient, bundle, explain=False, draws=0)
    found = predict_patient(in_memory(patient), bundle, explain=False, draws=0)
    assert found.observed == files.observed and found.partly == files.partly
    assert found.probabilities == files.probabilities
    assert found.status == files.status


def test_an_array_lies_on_the_models_grid(bundle):
    rng = np.random.default_rng(0)
    values = rng.normal(100, 20, (16, 16, 16))
    (spec,) = (s for s in bundle.specs if s.name == "t1")
    x, y, z = np.mgrid[0:16, 0:16, 0:16] - 7.5
    values[x**2 + y**2 + z**2 > 49] = 0
    found = predict_patient({"t1": values}, bundle, explain=False, draws=0)
    affine = np.diag([*spec.spacing_mm, 1.0])
    affine[:3, 3] = -7.5 * np.array(spec.spacing_mm)
    image = nib.Nifti1Image(values.astype(np.float32), affine)
    image.header.set_xyzt_units("mm")
    assert found.observed == ("t1",)
    again = predict_patient({"t1": image}, bundle, explain=False, draws=0)
    assert found.probabilities == again.probabilities


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        ({"t3": np.zeros((16, 16, 16))}, "no modality 't3'"),
        ({"t1": np.zeros((4, 4, 4))}, "t1: it is not an array on the model's grid"),
        ({"t1": "t1.nii.gz"}, "t1: it is not an array"),
        ({"photo": np.zeros((8, 8)) + 0.5}, "photo: it is not"),
        ({"labs": {"potassium": 4}}, "labs: it is not a DataFrame of one row"),
        ({"labs": pd.DataFrame({"crp": [1.0, 2.0]})}, "labs: it is not a DataFrame of one row"),
        ({"labs": {"crp": 10_000_000}}, "crp"),
        ({}, "nothing"),
    ],
)
def test_data_that_cannot_be_used_is_refused_without_its_values(bundle, data, pattern):
    with pytest.raises(PatientDataError, match=pattern) as error:
        predict_patient(data, bundle)
    assert "10000000" not in str(error.value)


def test_the_table_of_an_evaluation_says_who_got_no_answer(bundle, cohort, tmp_path, plain):
    dymo_med.evaluate(bundle, cohort, str(tmp_path / "out"), reports=0)
    table = pd.read_csv(tmp_path / "out" / "predictions.csv", keep_default_na=False)
    own = table["method"] == bundle.choice.name
    assert set(table.loc[own, "status"]) <= {"answered", "caution", "abstained"}
    assert set(table.loc[~own, "status"]) == {""}
