"""`prediction.json` of a segmentation: what was found in one patient, and what its page shows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError

from dymo_med.errors import PatientDataError, Problem
from dymo_med.inference.prediction_file import Part, Plane, Png, Sha256, SourcePart, StepPart

SCHEMA_VERSION: Literal[1] = 1
SEGMENTATION = "segmentation.nii.gz"


class RegionPart(Part):
    """One region: its labels, the label written where nothing lies further in, and its volume."""

    name: str
    labels: tuple[int, ...]
    volume_ml: Annotated[float, Field(ge=0)]


class OutputPart(Part):
    """A file beside this one."""

    file: str
    sha256: Sha256


class CutPart(Part):
    """One slice with the outlines of the regions; `index` is its place on the network's grid."""

    plane: Plane
    index: int
    width: int
    height: int
    png: Png


class OutlinedPart(Part):
    """One scan in three planes through the lesion."""

    modality: str
    state: Literal["observed", "trusted"]
    cuts: tuple[CutPart, ...]


class GridPart(Part):
    """The grid that `segmentation.nii.gz` is on: that of the patient's reference scan."""

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    voxel_ml: float


class BundlePart(Part):
    """The model."""

    name: str
    version: str
    id: str


class SegmentationFile(Part):
    """What was found in one patient, and all that its page shows.

    Attributes are those of `docs/reference/outputs.md`.
    """

    schema_version: Literal[1]
    task: Literal["segmentation"]
    record_id: str
    patient_id: str
    bundle: BundlePart
    regions: tuple[RegionPart, ...]
    observed_only_ml: dict[str, float]
    grid: GridPart
    observed: tuple[str, ...]
    recovered: tuple[str, ...]
    trusted: tuple[str, ...]
    rejected: tuple[str, ...]
    absent: tuple[str, ...]
    refused: tuple[str, ...]
    method: str
    method_why: str
    steps: tuple[StepPart, ...]
    warnings: tuple[str, ...]
    sources: dict[str, SourcePart]
    files: dict[str, OutputPart]
    recovered_files: dict[str, OutputPart]
    scans: tuple[OutlinedPart, ...]
    flips: bool
    seed: int
    command: str
    versions: dict[str, str]

    def to_text(self) -> str:
        """Return the file's content."""
        return self.model_dump_json(indent=2) + "\n"


def is_segmentation(path: Path) -> bool:
    """Return whether a `prediction.json` is of a segmentation; what is wrong with it is not asked.

    Args:
        path: The file.
    """
    import json

    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("task") == "segmentation")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def read_segmentation(path: Path) -> SegmentationFile:
    """Read a `prediction.json` of a segmentation.

    Args:
        path: The file.

    Raises:
        PatientDataError: If it is not one of this version, with every problem.
    """
    try:
        return SegmentationFile.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PatientDataError(
            Problem(
                str(path),
                "this is not a readable prediction",
                got=type(error).__name__,
                remedy="Predict again",
            )
        ) from error
    except ValidationError as error:
        # Never the value: it may be health data.
        raise PatientDataError(
            *(
                Problem(
                    f"{path}: {'.'.join(map(str, e['loc']))}"[:300],
                    e["msg"][:200],
                    expected="a prediction as this version writes it",
                    remedy="Predict again",
                )
                for e in error.errors(include_url=False, include_input=False)
            )
        ) from error


def audit_segmentation(folder: Path) -> tuple[Problem, ...]:
    """Return what does not fit together in the folder of a segmentation.

    Files are compared with their hashes, and the volumes are counted again from the labels.

    Args:
        folder: Holds `prediction.json`.

    Raises:
        PatientDataError: If `prediction.json` cannot be read.
    """
    return tuple(_audit(folder, read_segmentation(folder / "prediction.json")))


def _audit(folder: Path, file: SegmentationFile) -> Iterator[Problem]:
    whole = True
    for part in (*file.files.values(), *file.recovered_files.values()):
        path = folder / part.file
        if ".." in Path(part.file).parts or not path.is_file():
            whole = False
            yield Problem(
                str(path),
                "the file is absent",
                expected="every file that prediction.json lists",
                remedy="Predict again",
            )
        elif hashlib.sha256(path.read_bytes()).hexdigest() != part.sha256:
            whole = False
            yield Problem(
                str(path),
                "the file is not the one that was predicted",
                expected="the hash that prediction.json states",
                remedy="Predict again, or put the original back",
            )
    if not whole:
        return
    import nibabel

    image = nibabel.load(folder / file.files["segmentation"].file)
    labels = np.asarray(image.dataobj)
    for region in file.regions:
        counted = float(np.isin(labels, region.labels).sum()) * file.grid.voxel_ml
        if abs(counted - region.volume_ml) > 1e-6 * max(1.0, counted):
            yield Problem(
                f"{folder / 'prediction.json'}: {region.name}",
                "the volume is not that of the labels in segmentation.nii.gz",
                expected="the voxels of its labels times the volume of one",
                remedy="Predict again",
            )
