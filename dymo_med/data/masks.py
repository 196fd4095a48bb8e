"""Masks of a segmentation: from a patient's own grid to the network's, and back.

The own grid is that of the patient's reference scan as it is stored: its voxels, their order and
their place in the world. Masks are taken to the network's grid by the nearest voxel; probabilities
come back by trilinear interpolation and are thresholded there.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dymo_med.data.patient import read_record
from dymo_med.errors import PatientDataError, Problem
from dymo_med.files import write_bytes
from dymo_med.modalities.image import file_in
from dymo_med.modalities.scan import ScanError, apart_mm, millimetres, spacing_of, times
from dymo_med.types import Cohort, CohortRecord, MaskSpec, ModalitySpec, Norms, PatientRecord

Affine = NDArray[np.float64]

# Scans and masks of a patient that lie this close (in voxels, at every corner) share a grid.
_SAME = 0.05
_THRESHOLD = 0.5


@dataclass(frozen=True)
class Grid:
    """Voxels and their place in the world.

    Attributes:
        shape: Voxels along each axis.
        affine: Voxel to world `(4, 4)`, mm, RAS+.
    """

    shape: tuple[int, int, int]
    affine: Affine

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in mL."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Length of a voxel along each axis."""
        x, y, z = spacing_of(self.affine)
        return x, y, z

    def apart(self, other: Grid) -> float:
        """Return the largest distance of two grids' corners, in voxels; inf if shapes differ."""
        if self.shape != other.shape:
            return float("inf")
        return apart_mm(self.affine, other.affine, self.shape) / min(self.spacing_mm)


def own_grid(record: PatientRecord, specs: Sequence[ModalitySpec]) -> Grid:
    """Return the grid of a patient's reference scan as it is stored.

    That is the scan on which the network's grid is centred: the first that was read (one with
    `grid: reference` before the others).

    Args:
        record: Of volumes only, one at least.
        specs: Modalities in canonical order.
    """
    there = [spec for spec in specs if spec.name in record.modalities]
    first = min(there, key=lambda spec: spec.grid != "reference")
    field = record.modalities[first.name].field_of_view
    if field is None:
        raise ValueError(f"{first.name} is no volume.")
    x, y, z = field.size
    return Grid((x, y, z), np.asarray(field.affine, dtype=float))


def network_grid(record: PatientRecord) -> Grid:
    """Return the grid on which a record's scans were read.

    Args:
        record: Of volumes only, one at least.

    Raises:
        PatientDataError: If its scans lie on different grids, so that the same voxel of two of
            them is not the same place.
    """
    grids = {}
    for name, value in record.modalities.items():
        x, y, z = value.values.shape[1:]
        grids[name] = Grid((x, y, z), np.asarray(value.source.affine, dtype=float))
    (first, grid), *others = grids.items()
    problems = [
        Problem(
            f"Patient {record.record_id}: {record.modalities[name].source.file}",
            f"the scan does not lie on the grid of {first}",
            expected="scans that are in register, with one field of view",
            remedy="Register the scans to one of them and resample them to its grid",
        )
        for name, other in others
        if grid.apart(other) > _SAME
    ]
    if problems:
        raise PatientDataError(*problems)
    return grid


def read_mask(folder: Path, mask: MaskSpec, grid: Grid, where: str) -> NDArray[np.uint8] | None:
    """Return a patient's mask on the own grid, or None if there is none.

    Args:
        folder: The patient directory.
        mask: Its file and labels.
        grid: The own grid.
        where: Who this is, for messages ("Patient p017").

    Raises:
        PatientDataError: If it is unreadable, on another grid, or holds other numbers.
    """
    path = folder / file_in(folder, mask.file)
    if not path.exists():
        return None
    array, stored = _stored(path, where)
    name = f"{where}: {path.name}"
    if not stored.apart(grid) <= _SAME:
        raise PatientDataError(
            Problem(
                name,
                "the mask does not lie on the grid of the patient's reference scan",
                expected=_described(grid),
                got=_described(stored),
                remedy="Resample the mask to the scan with nearest-neighbour interpolation",
            )
        )
    if not np.isfinite(array).all() or (array != np.round(array)).any():
        raise PatientDataError(
            Problem(
                name,
                "the mask holds numbers that are not whole",
                expected="labels",
                remedy="Save it without interpolation and without scaling",
            )
        )
    unknown = int((~np.isin(array, (0, *mask.labels))).sum())
    if unknown:
        raise PatientDataError(
            Problem(
                name,
                f"{unknown} voxels hold labels that the cohort does not describe",
                expected="0, " + ", ".join(map(str, mask.labels)),
                remedy="Correct the mask, or task.labels in cohort.yaml",
            )
        )
    return array.astype(np.uint8)


def read_known(
    entry: CohortRecord,
    cohort: Cohort,
    *,
    require_something: bool = True,
    norms: Norms | None = None,
    treat_refused_as_missing: bool = False,
) -> PatientRecord:
    """Read one record of a cohort with what is known of its answer.

    Args:
        entry: The record.
        cohort: Its cohort; of a segmentation the mask is read too, onto the grid of the scans.
        require_something: Refuse a patient of whom nothing was observed.
        norms: What training records were like, for the quality gate.
        treat_refused_as_missing: Go on without what the quality gate refuses.

    Raises:
        PatientDataError: See `read_patient` and `read_mask`.
    """
    record = read_record(
        entry,
        cohort.specs,
        cohort.missing_values,
        require_something=require_something,
        norms=norms,
        treat_refused_as_missing=treat_refused_as_missing,
    )
    return with_mask(record, entry.folder, cohort)


def with_mask(record: PatientRecord, folder: Path, cohort: Cohort) -> PatientRecord:
    """Return a record with its mask on the grid of its scans, where the task has one.

    Args:
        record: What was read from the patient directory.
        folder: The patient directory.
        cohort: The record's cohort.

    Raises:
        PatientDataError: See `read_mask`; also if scans lie on different grids.
    """
    mask = cohort.task.mask
    if mask is None or not record.modalities:
        return record
    own, seen = own_grid(record, cohort.specs), network_grid(record)
    labels = read_mask(folder, mask, own, f"Patient {record.record_id}")
    if labels is None:
        return record
    return replace(record, mask=torch.from_numpy(nearest_voxel(labels, own, seen)))


def nearest_voxel(labels: NDArray[np.uint8], own: Grid, other: Grid) -> NDArray[np.uint8]:
    """Return labels on another grid: of the nearest voxel, 0 outside.

    Args:
        labels: `(X, Y, Z)` on `own`.
        own: Where they are.
        other: Where they shall be.
    """
    from scipy.ndimage import affine_transform

    step = np.linalg.inv(own.affine) @ other.affine
    taken: NDArray[np.uint8] = affine_transform(
        labels, step[:3, :3], step[:3, 3], other.shape, order=0, mode="grid-constant", cval=0
    )
    return taken


def to_grid(probabilities: Tensor, here: Grid, there: Grid) -> Tensor:
    """Return probabilities on another grid, by trilinear interpolation, 0 outside.

    Args:
        probabilities: Float `(R, *here.shape)`.
        here: Where they are.
        there: Where they shall be.

    Returns:
        `(R, *there.shape)`; the very same numbers if the grids are one.
    """
    if here.apart(there) < 1e-4:
        return probabilities
    step = np.linalg.inv(here.affine) @ there.affine  # voxel there -> voxel here
    # grid_sample takes (z, y, x) and places from -1 to 1, corners being voxel centres.
    scale = np.diag([2 / max(n - 1, 1) for n in here.shape])
    place = np.hstack([scale @ step[:3, :3], (scale @ step[:3, 3] - 1)[:, None]])
    device = probabilities.device
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in there.shape]
    at = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)  # (*there, 3)
    matrix = torch.from_numpy(place).to(device, torch.float32)
    at = at @ matrix[:, :3].T + matrix[:, 3]
    return F.grid_sample(
        probabilities[None].float(), at.flip(-1)[None], padding_mode="zeros", align_corners=True
    )[0]


def regions_of(labels: Tensor, mask: MaskSpec) -> Tensor:
    """Return bool `(..., R, *spatial)`: where each region is.

    Args:
        labels: Uint8 `(..., X, Y, Z)`.
        mask: Its labels and regions.
    """
    parts = [
        torch.isin(labels, torch.tensor(own, dtype=labels.dtype, device=labels.device))
        for own in mask.regions.values()
    ]
    return torch.stack(parts, -4)


def decided(probabilities: Tensor, mask: MaskSpec) -> Tensor:
    """Return bool `(R, *spatial)`: probability above 0.5, and inner regions within outer ones.

    Args:
        probabilities: `(R, *spatial)`.
        mask: Its regions, outer ones first.
    """
    found = probabilities > _THRESHOLD
    sets = [set(labels) for labels in mask.regions.values()]
    for i, inner in enumerate(sets):
        for j in range(i):
            if inner < sets[j]:
                found[i] &= found[j]
    return found


def compose(regions: Tensor, mask: MaskSpec) -> Tensor:
    """Return uint8 `(*spatial)` labels: of each voxel, the own label of its innermost region.

    Args:
        regions: Bool `(R, *spatial)`, inner regions within outer ones.
        mask: Its regions, outer ones first.
    """
    labels = torch.zeros(regions.shape[1:], dtype=torch.uint8, device=regions.device)
    sets = [set(own) for own in mask.regions.values()]
    for i, region in enumerate(regions):
        (own,) = sets[i].difference(*sets[i + 1 :])
        labels[region] = own
    return labels


def dice(found: Tensor, true: Tensor) -> Tensor:
    """Return the Dice overlap per region, 1 where both are empty.

    Args:
        found: Bool `(..., *spatial)` of three spatial axes.
        true: Likewise.

    Returns:
        Float64 `(...)`.
    """
    both = (found & true).flatten(-3).sum(-1).double()
    either = found.flatten(-3).sum(-1).double() + true.flatten(-3).sum(-1).double()
    return torch.where(either > 0, 2 * both / either.clamp_min(1), 1.0)


def write_volume(path: Path, values: NDArray[Any], grid: Grid, description: str) -> Path:
    """Write a NIfTI file on a grid; the same values give the same bytes.

    Args:
        path: Ends in `.nii.gz`.
        values: `(*grid.shape)`.
        grid: Where they are.
        description: At most 79 characters, for the header.
    """
    import nibabel

    image = nibabel.Nifti1Image(values, grid.affine)
    image.set_qform(grid.affine, code=1)
    image.set_sform(grid.affine, code=1)
    image.header["descrip"] = description.encode()[:79]
    image.header.set_xyzt_units("mm")
    return write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))


def volumes_ml(regions: Tensor, grid: Grid, mask: MaskSpec) -> Mapping[str, float]:
    """Return the volume of each region in mL.

    Args:
        regions: Bool `(R, *grid.shape)`.
        grid: Where they are.
        mask: Its regions.
    """
    voxels = regions.flatten(1).sum(1).tolist()
    return {name: n * grid.voxel_ml for name, n in zip(mask.regions, voxels, strict=True)}


def _stored(path: Path, where: str) -> tuple[NDArray[Any], Grid]:
    """Return a volume as it is stored, its axes in the file's order."""
    from dymo_med.modalities.transforms import KEY, LoadScand

    try:
        data = LoadScand(1)({KEY: str(path)})
        image = data[KEY]
        if image.ndim != 4 or len(image) != 1:
            raise ScanError(
                "the file does not hold one volume",
                expected="3 axes and one number per voxel",
                remedy="Export it again",
            )
    except ScanError as error:
        raise PatientDataError(
            Problem(f"{where}: {path.name}", error.what, error.expected, error.got, error.remedy)
        ) from error
    x, y, z = image.shape[1:]
    affine = np.asarray(image.affine, dtype=float)
    return image.as_tensor()[0].numpy(), Grid((x, y, z), affine)


def _described(grid: Grid) -> str:
    origin = ", ".join(f"{mm:.4g}" for mm in grid.affine[:3, 3])
    size, spacing = times(grid.shape), millimetres(grid.spacing_mm)
    return f"{size} voxels of {spacing} from ({origin}) mm"
