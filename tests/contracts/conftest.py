"""A tiny cohort of every kind of modality and task, and bundles barely trained on it, on demand."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from dymo_med.backbones import SEGMENTERS
from dymo_med.training import train as training
from tests.contracts.test_components import SMALL

_GRID = {"kind": "image", "dims": 3, "size": [16, 16, 16], "spacing_mm": [2, 2, 2]}
_VOLUMES = {name: {**_GRID, "file": f"{name}.nii.gz"} for name in ("t1", "t2")}
_OTHERS = {
    "labs": {
        "kind": "table",
        "file": "labs.csv",
        "columns": {
            "crp": {"type": "continuous", "range": [0, 500], "unit": "mg/L"},
            "age": {"type": "continuous", "range": [0, 120]},
            "sex": {"type": "categorical", "values": ["F", "M"]},
        },
    },
    "gait": {"kind": "tokens", "file": "gait.npy", "length": 3, "features": 4},
}
# The cohort's description by type of task.
TASKS: dict[str, dict[str, Any]] = {
    "classification": {
        "task": {"type": "classification", "target": "grade", "classes": ["low", "high"]},
        "modalities": {**_VOLUMES, **_OTHERS},
    },
    "regression": {
        "task": {"type": "regression", "target": "growth", "range": [0, 10], "bands": 3},
        "modalities": {**_VOLUMES, **_OTHERS},
    },
    "segmentation": {
        "task": {
            "type": "segmentation",
            "file": "seg.nii.gz",
            "labels": [1, 2],
            "regions": {"whole": [1, 2], "core": [2]},
        },
        "modalities": _VOLUMES,
    },
}
_SPLITS = ["train"] * 8 + ["validation"] * 4 + ["calibration"] * 4 + ["test"] * 4
# What the patients of the test split lack. The first has everything.
LACKS = {"p16": (), "p17": ("t2",), "p18": ("t1", "gait"), "p19": ("labs",)}
# Two blank cells of a table that is there.
BLANKS = "p17"
_SHORT = {"epochs": 1, "batch_size": 8, "learning_rate": 0.002}
_UNET = {"widths": [8, 16], "width_ratio": 0.5, "groups": 2}


def write_tiny(folder: Path) -> Path:
    """Write 20 patients; a description of the cohort for each type of task."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for task, described in TASKS.items():
        text = yaml.safe_dump({"name": "tiny", **described}, sort_keys=False)
        (folder / f"{task}.yaml").write_text(text)
    labels, splits = ["patient_id,grade,growth"], ["patient_id,split"]
    x, y, z = np.mgrid[0:16, 0:16, 0:16] - 7.5
    head = x**2 + y**2 + z**2 < 49
    for number, split in enumerate(_SPLITS):
        name, high = f"p{number:02d}", number % 2
        size = 2 + 2 * high + rng.random()
        labels.append(f"{name},{'high' if high else 'low'},{1 + 4 * (number % 3)}")
        splits.append(f"{name},{split}")
        at = folder / "patients" / name
        at.mkdir(parents=True)
        lacks = LACKS.get(name, ("t2",) if number % 4 == 1 else ("labs",) if number == 6 else ())
        lesion = (x - 2) ** 2 + y**2 + z**2 < size**2
        core = (x - 2) ** 2 + y**2 + z**2 < (size / 2) ** 2
        for scan, contrast in (("t1", -40), ("t2", 60)):
            values = head * (100 + contrast * lesion + rng.normal(0, 6, head.shape))
            _save(at / f"{scan}.nii.gz", values.clip(0), scan in lacks)
        _save(at / "seg.nii.gz", lesion.astype(int) + core, False)
        if "labs" not in lacks:
            crp = "" if name == BLANKS else f"{10 + 20 * high + rng.random():.1f}"
            sex = "" if name == BLANKS else rng.choice(["F", "M"])
            (at / "labs.csv").write_text(f"crp,age,sex\n{crp},{40 + number},{sex}\n")
        if "gait" not in lacks:
            np.save(at / "gait.npy", rng.normal(high, 1, (5, 4)).astype(np.float32))
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    (folder / "splits.csv").write_text("\n".join(splits) + "\n")
    return folder


def _save(path: Path, values: np.ndarray, absent: bool) -> None:
    if absent:
        return
    image = nib.Nifti1Image(values.astype(np.int16), np.diag([2.0, 2.0, 2.0, 1.0]))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


@dataclass
class Tiny:
    """The tiny cohort, and bundles by task, backbone and imputer, each trained when asked for.

    Attributes:
        root: Folder of everything.
    """

    root: Path
    _bundles: dict[tuple[str, str, str], Path] = field(default_factory=dict)

    @property
    def patients(self) -> Path:
        """Folder of the patient directories."""
        return self.root / "cohort" / "patients"

    def cohort(self, task: str) -> Path:
        """Return the description for a type of task."""
        return self.root / "cohort" / f"{task}.yaml"

    def bundle(
        self, task: str = "classification", backbone: str = "transformer", imputer: str = "mopoe"
    ) -> Path:
        """Return the folder of a bundle."""
        key = task, backbone, imputer
        if key not in self._bundles:
            run = self.root / "-".join(key)
            recipe = run.with_suffix(".yaml")
            recipe.write_text(yaml.safe_dump(recipe_of(*key)))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(training, "draw_curves", lambda *_: None)
                self._bundles[key] = training.train(recipe, self.cohort(task), run, device="cpu")
        return self._bundles[key]


def recipe_of(task: str, backbone: str, imputer: str, **training: Any) -> Mapping[str, Any]:
    """Return a recipe of one epoch."""
    sizes = _UNET if backbone in SEGMENTERS else SMALL.get(backbone, {})
    return {
        "name": "tiny",
        "imputer": {"name": imputer, **SMALL.get(imputer, {})},
        "backbone": {"name": backbone, **sizes},
        "imputer_training": {**_SHORT, **training},
        "backbone_training": {**_SHORT, "subsets": 3, **training},
    }


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The tiny cohort and its bundles; read only, shared by the whole session."""
    root = tmp_path_factory.mktemp("tiny")
    write_tiny(root / "cohort")
    return Tiny(root)
