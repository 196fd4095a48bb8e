"""The script that makes a cohort of BraTS cases, on a made-up layout."""

import csv
import importlib.util
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from dymo_med.bundle import read_recipe
from dymo_med.bundle_segmentation import load_segmentation_bundle
from dymo_med.data.cohort import read_cohort
from dymo_med.data.masks import read_known
from dymo_med.inference.segment import segment_patient
from dymo_med.inference.segment_evaluate import evaluate_segmentation
from dymo_med.training.train import train
from tests.segmentation import masked_dir, write_recipe  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location(
    "prepare_brats", ROOT / "cohorts" / "brats2018" / "prepare.py"
)
prepare = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(prepare)


@pytest.fixture(scope="module")
def made(masked_dir, tmp_path_factory):  # noqa: F811
    """Folder of six cases in the layout of BraTS, described at 16 voxels."""
    tmp_path = tmp_path_factory.mktemp("brats")
    data = tmp_path / "data" / "HGG"
    for folder in sorted((masked_dir / "patients").iterdir())[:6]:
        case = data / f"Brats18_{folder.name.replace('-', '_')}_1"
        case.mkdir(parents=True)
        for name in (*prepare.SEQUENCES, "seg"):
            (case / f"{case.name}_{name}.nii.gz").symlink_to(folder / f"{name}.nii.gz")
    assert prepare.prepare(tmp_path / "data", tmp_path / "brats", "common") == 6
    description = tmp_path / "brats" / "cohort.yaml"
    entry = yaml.safe_load(description.read_text())
    for modality in entry["modalities"].values():
        modality |= {"size": [16, 16, 16], "spacing_mm": [12, 12, 12]}
    description.write_text(yaml.safe_dump(entry, sort_keys=False))
    return tmp_path / "brats"


def test_the_layout_is_read(made):
    cohort = read_cohort(made)
    record = read_known(cohort.records[0], cohort)
    assert set(record.modalities) == set(prepare.SEQUENCES) and bool(record.mask.any())
    assert {cohort.splits[r.patient_id] for r in cohort.records} >= {"train", "test", "validation"}


def test_a_network_is_trained_predicts_and_is_evaluated(made, tmp_path):
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        imputer=None,
        backbone_training={
            **{"epochs": 1, "batch_size": 3, "learning_rate": 0.02, "gradient": "gmd"},
            **{"subsets": 6, "crop": [12, 12, 12]},
        },
    )
    bundle = load_segmentation_bundle(train(recipe, made, tmp_path / "run", device="cpu"), "cpu")
    cohort = read_cohort(made)
    (case,) = cohort.in_split("test")
    answer = segment_patient(case.folder, bundle, tmp_path / "out")
    assert set(answer.observed) == set(prepare.SEQUENCES)
    written = nib.load(tmp_path / "out" / "segmentation.nii.gz")
    given = nib.load(case.folder / f"{case.record_id}_t1.nii.gz")
    assert written.shape == given.shape
    assert np.abs(written.affine - given.affine).max() < 1e-4
    assert set(np.unique(np.asarray(written.dataobj))) <= {0, 1, 2, 4}
    evaluate_segmentation(bundle, cohort, tmp_path / "tables", scenarios=("drop:t1",))
    with (tmp_path / "tables" / "cases.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["region"] for row in rows] == ["WT", "TC", "ET"]
    assert {row["observed"] for row in rows} == {"t1ce+t2+flair"}
    assert (tmp_path / "tables" / "metrics.csv").stat().st_size > 0


def test_the_splits_have_the_published_sizes():
    gmd = Counter(prepare.split_cases(285, "gmd"))
    assert gmd["test"] == 57 and sum(gmd.values()) == 285
    common = Counter(prepare.split_cases(285, "common"))
    assert (common["test"], common["validation"]) == (57, 29)
    assert common["train"] + common["calibration"] == 199
    assert prepare.split_cases(285, "gmd") == prepare.split_cases(285, "gmd")


def test_the_recipes_fit_this_version():
    for name in ("brats2018", "segmentation-small"):
        assert read_recipe(ROOT / "configs" / f"{name}.yaml").backbone.name == "shared_unet"
