"""What a scan file gives, whatever its format, and the geometry that all formats share.

World coordinates are millimetres along RAS+: x to the patient's right, y to the front, z upwards
(DICOM and ITK count x and y the other way, LPS+). Tolerances are lengths at the corners of the
volume, where an error of an angle or a spacing is largest, and never differences between entries
of a matrix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dymo_med import limits
from dymo_med.types import Native

Matrix = NDArray[np.float64]

# Headers that claim so many times the limit are no large scans, but wrong.
_ABSURD = 64
CORNER_MM = 0.1
"""Two statements of one geometry may differ by this much at the volume's corners."""


class ScanError(Exception):
    """A scan cannot be used; says why without naming the patient.

    Args:
        what: What is wrong, as a short clause.
        expected: What would have been right.
        got: What was found instead.
        remedy: What the user can do.
        refused: The check of the quality gate that this is, for a scan that can be read but not
            be used.
    """

    def __init__(
        self, what: str, expected: str = "", got: str = "", remedy: str = "", refused: str = ""
    ) -> None:
        super().__init__(what)
        self.refused = refused
        self.what = what
        self.expected = expected
        self.got = got
        self.remedy = remedy


class ScanAbsent(ScanError):
    """There is no such scan, and the cohort declares that this means missing."""


def times(numbers: Sequence[float]) -> str:
    """Return numbers as a size for people.

    Example:
        >>> times((240, 240, 155))
        '240 x 240 x 155'
    """
    return " x ".join(f"{number:g}" for number in numbers)


def millimetres(numbers: Sequence[float]) -> str:
    """Return lengths for people.

    Example:
        >>> millimetres((0.70313, 1, 6.5))
        '0.7031 x 1 x 6.5 mm'
    """
    return f"{times([float(f'{number:.4g}') for number in numbers])} mm"


@dataclass(frozen=True)
class ScanFacts:
    """What is worth knowing of a scan as stored; nothing that identifies anybody.

    Attributes:
        size: Voxels per axis.
        dtype: Type of the stored numbers.
        spacing_mm: Voxel size; None for a picture that states none.
        warnings: Sentences for the report.
        native: What the quality gate goes by.
        descriptors: Float32 `(P,)`, of its intensities (`modalities.descriptors`).
        fingerprint: Float32 `(K,)`, by which the same scan is known in another file.
    """

    size: tuple[int, ...]
    dtype: str
    spacing_mm: tuple[float, ...] | None = None
    warnings: tuple[str, ...] = ()
    native: Native | None = None
    descriptors: Tensor | None = None
    fingerprint: Tensor | None = None

    def shown(self) -> dict[str, str]:
        """Return the facts as text by name."""
        facts = {"size": times(self.size), "dtype": self.dtype}
        if self.spacing_mm is not None:
            facts["spacing"] = millimetres(self.spacing_mm)
        return facts


@dataclass(frozen=True)
class StoredScan:
    """A scan as it is stored.

    Attributes:
        values: `(X, Y, Z)`, or `(X, Y, Z, n)` where there is more than one number per voxel.
        affine: Voxel to world `(4, 4)`, mm, RAS+; it may be sheared.
        facts: What is worth knowing of it.
        files: The files it was read from.
        identifiers: What its header calls the patient; see `ModalityValue.identifiers`.
        padding: Bool `(X, Y, Z)`, voxels that the header calls no part of the image; their
            values are the lowest of the others. None = there are none.
    """

    values: NDArray[Any]
    affine: Matrix
    facts: ScanFacts
    files: tuple[Path, ...]
    identifiers: tuple[str, ...] = field(default=(), repr=False)
    padding: NDArray[np.bool_] | None = None


def complex_error() -> ScanError:
    """Return the error of a scan whose voxels have a real and an imaginary part."""
    return ScanError(
        "the scan holds complex numbers",
        expected="one number per voxel",
        got="a real and an imaginary part",
        remedy="Save the magnitude as a scan of its own",
    )


def refuse_size(shape: Sequence[int], voxel_bytes: int = 1) -> None:
    """Refuse a header that claims an absurd size, before memory is asked for.

    Args:
        shape: Voxels per axis.
        voxel_bytes: Bytes of each.

    Raises:
        ScanError: If an axis has no voxel, or all take more than `limits.MAX_UNPACKED_BYTES`.
    """
    sides = [int(n) for n in shape]
    size = math.prod(sides) * voxel_bytes
    if any(n < 1 for n in sides) or size > _ABSURD * limits.MAX_UNPACKED_BYTES:
        raise ScanError(
            "the header states a size that cannot be right",
            expected="at least one voxel, and at most"
            f" {limits.readable(limits.MAX_UNPACKED_BYTES)} of them",
            got=f"shape {tuple(sides)}",
            remedy="Export the scan again",
        )
    if size > limits.MAX_UNPACKED_BYTES:
        problem = limits.too_large(
            "",
            "the size that the header states",
            size,
            limits.MAX_UNPACKED_BYTES,
            "Crop it to what is needed, or save it with fewer bits per voxel",
        )
        raise ScanError(problem.what, problem.expected, problem.got, problem.remedy)


def refuse_header(size: int) -> None:
    """Refuse a header that is far longer than any that describes a scan.

    Args:
        size: Its bytes, or those of it that were read so far.

    Raises:
        ScanError: If it is longer than `limits.MAX_HEADER_BYTES`.
    """
    if size > limits.MAX_HEADER_BYTES:
        problem = limits.too_large(
            "", "the header", size, limits.MAX_HEADER_BYTES, "Save the scan without what it notes"
        )
        raise ScanError(problem.what, problem.expected, problem.got, problem.remedy)


def refuse_packed(
    packed_bytes: int, unpacked_bytes: int, most: float = limits.MAX_INFLATION
) -> None:
    """Refuse a packed file that cannot hold, or should not hold, what its header says.

    Args:
        packed_bytes: Bytes of the file, or files.
        unpacked_bytes: What its header says that its voxels take.
        most: Times that its packing can shrink anything.

    Raises:
        ScanError: If it is too short for that, or so thin that only memory is filled with it.
    """
    times_larger = unpacked_bytes / max(1, packed_bytes)
    if times_larger > most:
        raise ScanError(
            "the header states a size that cannot be right",
            expected=f"at most {most:g} times the size of the file",
            got=f"{times_larger:.0f} times",
            remedy="Export or copy the scan again",
        )
    if unpacked_bytes > limits.LARGE_BYTES and times_larger > limits.MAX_THINNESS:
        raise ScanError(
            "the file unpacks to much more than a scan of its size holds",
            expected=f"at most {limits.MAX_THINNESS} times the size of the packed file",
            got=f"{times_larger:.0f} times",
            remedy="If there is a scan in it, crop what is empty and save it again",
        )


def spacing_of(affine: Any) -> tuple[float, ...]:
    """Return the length of each voxel axis in mm, `(3,)`, of a 4 x 4 affine."""
    matrix = np.asarray(affine, dtype=float)[:3, :3]
    return tuple(float(s) for s in np.sqrt((matrix**2).sum(0)))


def has_volume(affine: Any) -> bool:
    """Return whether a voxel has a finite volume that is not 0."""
    matrix = np.asarray(affine, dtype=float)
    spacing = spacing_of(matrix)
    return bool(
        np.isfinite(matrix).all()
        and min(spacing) >= 1e-6
        and abs(np.linalg.det(matrix[:3, :3] / np.asarray(spacing))) >= 1e-3
    )


def corners(size: Sequence[int]) -> Matrix:
    """Return the voxel coordinates `(8, 4)` of the centres of a volume's corner voxels."""
    return np.array([[*c, 1.0] for c in itertools.product(*((0.0, n - 1.0) for n in size[:3]))])


def apart_mm(first: Any, second: Any, size: Sequence[int]) -> float:
    """Return how far apart two affines put the corners of a volume, at most, in mm.

    Args:
        first: Voxel to world `(4, 4)`.
        second: The same of somebody else.
        size: Voxels per axis.
    """
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    moved = corners(size) @ difference.T
    return float(np.sqrt((moved[:, :3] ** 2).sum(1)).max())


def to_ras(affine: Any) -> Matrix:
    """Return an affine of DICOM's and ITK's world (LPS) for the world used here (RAS)."""
    ras: Matrix = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(affine, dtype=float)
    return ras
