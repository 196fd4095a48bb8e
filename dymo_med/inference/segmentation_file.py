"""`prediction.json` of a segmentation: what was found in one patient, and what its page shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError

from dymo_med.conformal import FEWEST
from dymo_med.errors import PatientDataError, Problem
from dymo_med.inference.prediction_file import (
    FEW_PATIENTS,
    Code,
    IntervalPart,
    Part,
    Plane,
    Png,
    Probability,
    QualityPart,
    ReasonPart,
    Sha256,
    SourcePart,
    Status,
    StepPart,
    gate_reasons,
)

SCHEMA_VERSION: Literal[2] = 2
SEGMENTATION = "segmentation.nii.gz"
WIDE = "segmentation_wide.nii.gz"
# A true volume that may lie this many times apart is called uncertain.
UNCERTAIN = 4
# Recovered scans that change a volume by more than this share are pointed at.
CHANGED = 0.25
# A larger share of the reference scan that the model does not look at is pointed at.
OUTSIDE = 0.01

Ml = Annotated[float, Field(ge=0)]


class VolumeIntervalPart(Part):
    """Where the true volume is, for `coverage` of patients.

    `compared_with`: calibration patients who have at least these scans, looked at with exactly
    these (`pattern`), or all of them as they came (`all`); `calibrated_on`: how many those are.
    """

    low_ml: Ml
    high_ml: Ml
    coverage: Probability
    compared_with: Literal["pattern", "all"]
    calibrated_on: Annotated[int, Field(ge=1)]


class WidePart(Part):
    """The wide outline: voxels whose probability is above `threshold`.

    Over patients it leaves out a share of `missed` of the region at most, on average.
    """

    volume_ml: Ml
    threshold: Probability
    missed: Probability
    calibrated_on: Annotated[int, Field(ge=1)]


class OverlapPart(Part):
    """How well held-back patients were outlined who had these scans (`pattern`), or all of them.

    `dice` is the mean over regions and patients; `pattern_patients`: how many had the very same.
    """

    level: Literal["pattern", "all"]
    group: str
    patients: Annotated[int, Field(ge=1)]
    dice: IntervalPart
    observed_only: IntervalPart | None
    pattern_patients: Annotated[int, Field(ge=0)]


class RegionPart(Part):
    """One region: its labels, its volume, where the true volume is, and its wide outline.

    `interval` and `wide` are null where the bundle cannot promise them.
    """

    name: str
    labels: tuple[int, ...]
    volume_ml: Ml
    interval: VolumeIntervalPart | None
    wide: WidePart | None


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

    schema_version: Literal[2]
    task: Literal["segmentation"]
    record_id: str
    patient_id: str
    status: Status
    status_reasons: tuple[ReasonPart, ...]
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
    quality: dict[str, QualityPart]
    performance: OverlapPart | None
    outside: Probability
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


def outline_status(
    regions: Sequence[RegionPart],
    alone_ml: Mapping[str, float],
    trusted: Sequence[str],
    quality: Mapping[str, QualityPart],
    performance: OverlapPart | None,
    outside: float,
    *,
    promises: bool,
) -> tuple[Status, tuple[ReasonPart, ...]]:
    """Return whether an outline stands, or stands with caution; and why.

    Args:
        regions: What was found.
        alone_ml: Volumes from measured scans alone.
        trusted: Recovered scans that were used.
        quality: What the quality gate says.
        performance: How good such outlines are; None where the bundle does not say.
        outside: Share of the reference scan that the model does not look at.
        promises: Whether the bundle was calibrated at all; older ones were not.
    """
    reasons: list[ReasonPart] = []

    def because(code: Code, **values: str | int | float) -> None:
        reasons.append(ReasonPart(code=code, values=values))

    for region in regions:
        interval = region.interval
        if interval is None:
            continue
        if interval.high_ml > UNCERTAIN * interval.low_ml and interval.high_ml > 1:
            because(
                "volume_uncertain",
                region=region.name,
                low=round(interval.low_ml, 1),
                high=round(interval.high_ml, 1),
                coverage=interval.coverage,
            )
    if promises and any(region.interval is None for region in regions):
        patients = performance.pattern_patients if performance is not None else 0
        because("volume_unbounded", patients=patients, least=FEWEST)
    for region in regions if trusted else ():
        both = region.volume_ml, alone_ml[region.name]
        if abs(both[0] - both[1]) > CHANGED * max(both):
            because(
                "volumes_differ",
                region=region.name,
                alone=round(both[1], 1),
                modalities=", ".join(trusted),
            )
    reasons += gate_reasons(quality)
    if outside > OUTSIDE:
        because("outside_view", share=outside)
    if performance is not None and performance.pattern_patients < FEW_PATIENTS:
        because("few_held_back", patients=performance.pattern_patients, least=FEW_PATIENTS)
    return ("caution" if reasons else "answered"), tuple(reasons)


def is_segmentation(path: Path) -> bool:
    """Return whether a `prediction.json` is of a segmentation; what is wrong with it is not asked.

    Args:
        path: The file.
    """
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
        text = path.read_text(encoding="utf-8")
        version = json.loads(text).get("schema_version")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise PatientDataError(
            Problem(
                str(path),
                "this is not a readable prediction",
                got=type(error).__name__,
                remedy="Predict again",
            )
        ) from error
    if version != SCHEMA_VERSION:
        raise PatientDataError(
            Problem(
                str(path),
                "the format of this segmentation is not known to this version",
                expected=f"schema_version {SCHEMA_VERSION}",
                got=f"{version!r:.40}",
                remedy="Predict again",
            )
        )
    try:
        return SegmentationFile.model_validate_json(text)
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

    for name in ("segmentation", "wide"):
        if name not in file.files:
            continue
        labels = np.asarray(nibabel.load(folder / file.files[name].file).dataobj)
        for region in file.regions:
            stated = region.volume_ml if name == "segmentation" else wide_ml(region)
            counted = float(np.isin(labels, region.labels).sum()) * file.grid.voxel_ml
            if stated is not None and abs(counted - stated) > 1e-6 * max(1.0, counted):
                yield Problem(
                    f"{folder / 'prediction.json'}: {region.name}",
                    f"the volume is not that of the labels in {file.files[name].file}",
                    expected="the voxels of its labels times the volume of one",
                    remedy="Predict again",
                )


def wide_ml(region: RegionPart) -> float | None:
    """Return the volume of a region's wide outline; None where there is none."""
    return None if region.wide is None else region.wide.volume_ml
