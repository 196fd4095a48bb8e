"""A bundle on another hospital's cohort: files are read as it says, networks get what they know."""

import csv
import shutil
from copy import deepcopy
from dataclasses import fields, replace

import pytest
import yaml

from dymo_med.bundle import load_bundle
from dymo_med.bundle_segmentation import load_segmentation_bundle
from dymo_med.data.cohort import read_cohort
from dymo_med.errors import BundleError, ConfigError
from dymo_med.inference import evaluate as module
from dymo_med.inference.check import check
from dymo_med.inference.evaluate import evaluate
from dymo_med.inference.matching import matched_specs
from dymo_med.inference.run_folder import digest_of
from dymo_med.inference.segment_evaluate import evaluate_segmentation
from dymo_med.tasks import Regression
from dymo_med.types import (
    CellRules,
    Column,
    FileRules,
    ModalitySpec,
    Scale,
    SeriesRule,
    Steps,
)
from tests.contracts.conftest import TASKS

# How a cohort may differ: by field, another value than the bundle's (SPECS below).
FILE = {
    "file": "another.file",
    "dicom": SeriesRule("MR", "AX T1"),
    "grid": "own",
    "rules": FileRules(separator=";", decimal=","),
}
NETWORK = {
    "kind": "image",
    "shape": (9,),
    "spacing_mm": (2.0,),
    "intensity": "percentile",
}
COLUMN_FILE = {"rules": CellRules(header="C-reactive protein"), "range": (1.0, 400.0)}
COLUMN_NETWORK = {
    "name": "CRP",
    "type": "categorical",
    "unit": "mg/dL",
    "values": ("i", "ii"),
}
STEPS_NETWORK = {"pooling": "interleaved", "standardise": False}
# Fitted to training records: the bundle's, whatever a cohort could say.
FITTED = {"descriptors", "mean", "std", "frequencies", "percentiles", "importance", "logarithm"}
INSIDE = {"name", "columns", "steps"}  # what the others are found by, or parts of their own

SCAN = ModalitySpec("t1", "image", "scans", (1, 16, 16, 16), (2.0, 2.0, 2.0), "zscore")
SCAN = replace(SCAN, dicom=SeriesRule("MR", "t1.*pre"), grid="reference")
LABS = ModalitySpec(
    "labs",
    "table",
    "labs.csv",
    (1,),
    columns=(Column("crp", "continuous", "mg/L", (0.0, 500.0), mean=9.0, std=2.0),),
)
GAIT = ModalitySpec("gait", "tokens", "gait.npy", (3, 4), steps=Steps(mean=(0.0,), std=(1.0,)))


def matched(tiny, spec, other):
    bundle = replace(load_bundle(tiny.bundle(), "cpu"), specs=(spec,))
    cohort = replace(read_cohort(tiny.cohort("classification")), specs=(other,))
    return matched_specs(bundle, cohort)[0]


def test_every_field_of_a_modality_is_the_files_the_networks_or_fitted():
    assert {f.name for f in fields(ModalitySpec)} <= {*FILE, *NETWORK, *INSIDE, *FITTED}
    fitted = (FITTED - {"descriptors"}) | {"known"}
    assert {f.name for f in fields(Column)} == {*COLUMN_FILE, *COLUMN_NETWORK} | fitted
    assert {f.name for f in fields(Steps)} == {*STEPS_NETWORK, "mean", "std"}


@pytest.mark.parametrize("field", FILE)
@pytest.mark.parametrize("spec", [SCAN, LABS, GAIT], ids=lambda s: s.kind)
def test_how_files_are_written_is_the_cohorts_own_business(tiny, spec, field):
    other = replace(spec, **{field: FILE[field]})
    assert matched(tiny, spec, other) == other
    default = next(f.default for f in fields(ModalitySpec) if f.name == field)
    if field != "file":  # to say nothing is to say the default, and not what the bundle says
        assert matched(tiny, other, replace(spec, **{field: default})) == replace(
            spec, **{field: default}
        )


def test_how_cells_are_written_is_the_cohorts_own_business(tiny):
    other = replace(LABS, columns=(replace(LABS.columns[0], mean=None, std=None, **COLUMN_FILE),))
    found = matched(tiny, LABS, other)
    assert found.columns == (replace(LABS.columns[0], **COLUMN_FILE),)
    without = replace(LABS, columns=(replace(LABS.columns[0], range=None),))
    assert matched(tiny, LABS, without) == LABS


@pytest.mark.parametrize(
    ("spec", "other"),
    [
        *((SCAN, replace(SCAN, **{k: v})) for k, v in NETWORK.items() if k != "kind"),
        (LABS, replace(LABS, kind="image")),
        *(
            (LABS, replace(LABS, columns=(replace(LABS.columns[0], **{k: v}),)))
            for k, v in COLUMN_NETWORK.items()
        ),
        (LABS, replace(LABS, columns=(*LABS.columns, *LABS.columns))),
        *(
            (GAIT, replace(GAIT, steps=replace(GAIT.steps, **{k: v})))
            for k, v in STEPS_NETWORK.items()
        ),
    ],
    ids=[*list(NETWORK)[1:], "kind", *COLUMN_NETWORK, "columns", *STEPS_NETWORK],
)  # fmt: skip
def test_what_networks_were_trained_on_must_be_the_same(tiny, spec, other):
    with pytest.raises(BundleError, match=f"'{spec.name}' is described differently") as error:
        matched(tiny, spec, other)
    (problem,) = error.value.problems
    assert problem.expected != problem.got


def test_another_scale_is_another_task(tiny):
    bundle = load_bundle(tiny.bundle("regression"), "cpu")
    cohort = read_cohort(tiny.cohort("regression"))
    assert matched_specs(bundle, cohort)
    scale = Scale(0.0, 10.0, (0.0, 5.0000001, 10.0))  # of the same names
    task = Regression.of("growth", scale)
    with pytest.raises(BundleError, match="classes differ"):
        matched_specs(bundle, replace(cohort, task=task))


def test_the_cohorts_own_rules_reach_evaluation_and_check(tiny, tmp_path, monkeypatch):
    """Renamed files with other separators; the bundle's own cohort knows neither."""
    root = shutil.copytree(tiny.root / "cohort", tmp_path / "cohort")
    described = {"name": "abroad", **deepcopy(TASKS["classification"])}
    described["modalities"]["labs"] |= {"file": "werte.csv", "separator": ";", "decimal": ","}
    described["modalities"]["labs"]["columns"]["crp"]["header"] = "CRP"
    described["modalities"]["t1"] |= {"file": "{record}_t1.nii.gz", "grid": "reference"}
    (root / "classification.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    for patient in (root / "patients").iterdir():
        if (patient / "labs.csv").is_file():
            text = (patient / "labs.csv").read_text()
            text = text.replace(",", ";").replace(".", ",").replace("crp", "CRP")
            (patient / "werte.csv").write_text(text)
            (patient / "labs.csv").unlink()
        if (patient / "t1.nii.gz").is_file():
            (patient / "t1.nii.gz").rename(patient / f"{patient.name}_t1.nii.gz")
    bundle = load_bundle(tiny.bundle(), "cpu")
    monkeypatch.setattr(module, "write_pages", lambda *_, **__: None)
    tables = []
    for name, folder in (("home", tiny.root / "cohort"), ("abroad", root)):
        path = folder / "classification.yaml"
        assert check(path, against=tiny.bundle()).exit_code == 0
        done = evaluate(bundle, read_cohort(path), tmp_path / name, reports=False)
        assert done.failures == 0
        with (tmp_path / name / "predictions.csv").open() as stream:
            tables.append([(r["record_id"], r["prob_low"]) for r in csv.DictReader(stream)])
    assert tables[0] == tables[1]


def test_masks_are_read_as_the_cohort_says(tiny, tmp_path, monkeypatch):
    from dymo_med.inference import segment_evaluate

    monkeypatch.setattr(segment_evaluate, "write_page", lambda *_: None)
    root = shutil.copytree(tiny.root / "cohort", tmp_path / "cohort")
    described = {"name": "abroad", **deepcopy(TASKS["segmentation"])}
    described["task"]["file"] = "{record}_mask.nii.gz"
    described["modalities"]["t2"]["grid"] = "reference"
    (root / "segmentation.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    for patient in (root / "patients").iterdir():
        (patient / "seg.nii.gz").rename(patient / f"{patient.name}_mask.nii.gz")
    bundle = tiny.bundle("segmentation", "shared_unet", "synthesis")
    loaded = load_segmentation_bundle(bundle, "cpu")
    cohort = read_cohort(root / "segmentation.yaml")
    done = evaluate_segmentation(loaded, cohort, tmp_path / "o", scenarios=("as-is",))
    assert (done.records, done.failures) == (4, 0)
    with (tmp_path / "o" / "cases.csv").open() as stream:
        assert len({row["record_id"] for row in csv.DictReader(stream)}) == 4
    # A corrected mask is another truth.
    shutil.copy(
        root / "patients" / "p17" / "p17_mask.nii.gz", root / "patients" / "p16" / "p16_mask.nii.gz"
    )
    with pytest.raises(ConfigError, match="an evaluation with another masks"):
        evaluate_segmentation(loaded, cohort, tmp_path / "o", scenarios=("as-is",), resume=True)


# --- Going on with an evaluation, and whom bundles know -------------------------------------------


def test_a_corrected_number_is_another_truth(tiny):
    records = read_cohort(tiny.cohort("regression")).in_split("test")
    first = replace(records[0], value=records[0].value + 0.01)
    assert first.label == records[0].label
    assert digest_of(records) != digest_of([first, *records[1:]])
    assert digest_of(records) == digest_of(list(records))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: replace(c, missing_values=("99",)),
        lambda c: replace(c, specs=(replace(c.specs[0], grid="own"), *c.specs[1:])),
        lambda c: replace(c, specs=(replace(c.specs[0], dicom=SeriesRule("MR")), *c.specs[1:])),
    ],
    ids=["missing_values", "grid", "dicom"],
)
def test_files_read_in_another_way_are_not_mixed(tiny, tmp_path, monkeypatch, change):
    monkeypatch.setattr(module, "write_pages", lambda *_, **__: None)
    cohort = read_cohort(tiny.cohort("classification"))
    bundle = load_bundle(tiny.bundle(), "cpu")
    evaluate(bundle, cohort, tmp_path / "o", reports=False)
    with pytest.raises(ConfigError, match="another description of the files"):
        evaluate(bundle, change(cohort), tmp_path / "o", reports=False, resume=True)


def test_the_bundle_that_knows_a_patient_is_the_one_named(tiny, tmp_path):
    cohort = read_cohort(tiny.cohort("classification"))
    knows = load_bundle(tiny.bundle(), "cpu")
    nobody = replace(knows, name="stranger", provenance={**knows.provenance, "patients": {}})
    for first, second in ((nobody, knows), (knows, nobody)):
        with pytest.raises(
            ConfigError, match="4 of its patients were used to make bundle tiny"
        ) as e:
            evaluate(first, cohort, tmp_path / "o", split="calibration", against=(second,))
        assert "stranger" not in str(e.value)
    assert not (tmp_path / "o").exists()
