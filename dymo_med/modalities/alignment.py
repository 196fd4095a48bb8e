"""One grid for the scans of a patient, and whether they show the same place.

Volumes of one record whose modalities declare the same size and spacing share a grid, centred on
the field of view of a reference scan, so that one voxel is one place of the body in all of them.
That holds only where the scans were made, or registered, in the same coordinates. Whether they
were cannot be known from the files; that they overlap can.

All limits are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dymo_med.modalities.scan import Matrix, ScanError
from dymo_med.types import FieldOfView

APART_MM = 20.0
"""Centres of two fields of view further apart than this are worth a warning."""
FARTHEST_MM = 100.0
"""Centres further apart than this are an error where the scans share a grid."""
LEAST_OVERLAP = 0.5
"""Share of the smaller field of view that must lie in the other where they share a grid."""
_SAMPLES = 16  # per axis, for the overlap


@dataclass(frozen=True)
class Reference:
    """The scan that others are put beside.

    Attributes:
        name: Name of its modality.
        field: Where it lies, as stored.
        grid: The grid's voxel-to-world matrix, 4 x 4, mm, RAS+.
    """

    name: str
    field: FieldOfView
    grid: Sequence[Sequence[float]]


def centre(field: FieldOfView) -> Matrix:
    """Return the centre `(3,)` of a field of view in the world."""
    affine = np.asarray(field.affine, dtype=float)
    middle: Matrix = affine[:3, :3] @ ((np.asarray(field.size) - 1) / 2) + affine[:3, 3]
    return middle


def distance_mm(first: FieldOfView, second: FieldOfView) -> float:
    """Return the distance between the centres of two fields of view."""
    return float(np.linalg.norm(centre(first) - centre(second)))


def overlap(first: FieldOfView, second: FieldOfView) -> float:
    """Return the share of the smaller field of view that lies in the other, 0 to 1.

    Counted over 16 x 16 x 16 points spread evenly over the smaller one, whatever the tilt or
    shear of either.
    """
    small, large = sorted((first, second), key=_volume)
    steps = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
    axes = [steps * n - 0.5 for n in small.size]
    points = np.stack([*(a.ravel() for a in np.meshgrid(*axes)), np.ones(_SAMPLES**3)])
    there = np.linalg.solve(np.asarray(large.affine), np.asarray(small.affine) @ points)[:3]
    sides = np.asarray(large.size)[:, None]
    return float(((there >= -0.5) & (there <= sides - 0.5)).all(0).mean())


def _volume(field: FieldOfView) -> float:
    affine = np.asarray(field.affine, dtype=float)
    return abs(float(np.linalg.det(affine[:3, :3]))) * float(np.prod(field.size))


def far_warning(field: FieldOfView, other: str, its: FieldOfView) -> str:
    """Return a warning if two fields of view are far from each other, or nothing.

    Args:
        field: Where a scan lies.
        other: Name of another one's modality.
        its: Where that one lies.
    """
    apart = distance_mm(field, its)
    if apart <= APART_MM:
        return ""
    return (
        f"Its field of view is centred {apart:.0f} mm from that of {other}; the two may show"
        " different anatomy."
    )


def beside(field: FieldOfView, reference: Reference) -> str:
    """Return a warning about a scan that shall share the grid of a reference, or nothing.

    Raises:
        ScanError: If the two cannot show the same place.
    """
    if field == reference.field:
        return ""
    apart, shared = distance_mm(field, reference.field), overlap(field, reference.field)
    if apart > FARTHEST_MM or shared < LEAST_OVERLAP:
        raise ScanError(
            f"the scan does not show the same place as {reference.name}, whose grid it shares",
            expected=f"at least {LEAST_OVERLAP:.0%} of the smaller field of view in the other, and"
            f" centres at most {FARTHEST_MM:g} mm apart",
            got=f"{shared:.0%}, and {apart:.0f} mm",
            remedy="Check that both are of this visit and in the same coordinates, and register"
            " one to the other; if they show different parts of the body, declare `grid: own`",
        )
    return far_warning(field, reference.name, reference.field)
