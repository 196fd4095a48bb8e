"""The script that makes a cohort of BraTS cases, on a made-up layout."""

import importlib.util
from collections import Counter
from pathlib import Path

import yaml

from dymo_med.bundle import read_recipe
from dymo_med.data.cohort import read_cohort
from dymo_med.data.masks import read_known
from tests.segmentation import masked_dir  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location(
    "prepare_brats", ROOT / "cohorts" / "brats2018" / "prepare.py"
)
prepare = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(prepare)


def test_the_layout_is_read(masked_dir, tmp_path):  # noqa: F811
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
    cohort = read_cohort(tmp_path / "brats")
    record = read_known(cohort.records[0], cohort)
    assert set(record.modalities) == set(prepare.SEQUENCES) and bool(record.mask.any())
    assert {cohort.splits[r.patient_id] for r in cohort.records} >= {"train", "test", "validation"}


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
