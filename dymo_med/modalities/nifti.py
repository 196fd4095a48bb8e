"""NIfTI-1 and -2: the header through nibabel, the voxels to the last byte of the file."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.spatialimages import HeaderDataError

from dymo_med.modalities.packed import unpacked
from dymo_med.modalities.scan import (
    CORNER_MM,
    ScanError,
    ScanFacts,
    StoredScan,
    apart_mm,
    complex_error,
    refuse_header,
    refuse_packed,
    refuse_size,
    spacing_of,
)

# Length of the unit of a file's lengths in mm, by its code in the header; 0 = not stated.
_UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 1e-3}
_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}


def read(path: Path) -> StoredScan:
    """Return the array `(X, Y, Z)` or `(X, Y, Z, n)` of a NIfTI file.

    Not through MONAI's reader, which makes up a geometry without a word where the voxel sizes that
    a header states do not fit its affine; and not through nibabel's, which stops at the last voxel
    and so never meets the checksum behind it.

    Raises:
        ScanError: If the file holds colours, complex numbers, more than four axes or an absurd
            size, or more or less than its header says.
    """
    packed = path.suffix.lower() == ".gz"
    with path.open("rb") as stream, LoggingOutputSuppressor():  # it prints what is wrong, too
        header = _header(stream, packed)
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        refuse_size(shape, dtype.itemsize)
        _refuse_kind(shape, dtype)
        start, size = int(header.get_data_offset()), math.prod(shape) * dtype.itemsize
        start = start or header.single_vox_offset  # 0 = not stated
        if start < header.sizeof_hdr:
            raise ValueError("voxels that begin within the header")
        refuse_header(start)
        if packed:
            refuse_packed(path.stat().st_size, size)
        stream.seek(0)
        data = unpacked(stream, "gzip" if packed else "raw", size, start)
    array = data.view(dtype).reshape(shape, order="F")
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    while array.ndim < 3:
        array = array[..., None]
    unit_mm = _UNIT_MM.get(int(header["xyzt_units"]) & 7)
    if unit_mm is None:
        raise ScanError(
            "the header states lengths in a unit that there is not",
            expected="metres, millimetres or micrometres",
            got=f"code {int(header['xyzt_units']) & 7}",
            remedy="Export the scan again",
        )
    affine = np.diag([unit_mm, unit_mm, unit_mm, 1.0]) @ np.asarray(
        header.get_best_affine(), dtype=float
    )
    with LoggingOutputSuppressor():
        warning = _warning(header, array.shape, unit_mm)
    facts = ScanFacts(array.shape, str(dtype), spacing_of(affine), (warning,) if warning else ())
    return StoredScan(_scaled(array, header), affine, facts, (path,))


def _header(stream: BinaryIO, packed: bool) -> Any:
    """Return the header of a file."""
    source: Any = gzip.GzipFile(fileobj=stream) if packed else stream
    head = source.read(540)
    for order in ("<", ">"):
        length = int(np.frombuffer(head[:4].ljust(4, b"\0"), f"{order}i4")[0])
        if length in _HEADERS:
            return _HEADERS[length](head[:length], order)
    raise ValueError("no header of NIfTI")


def _refuse_kind(shape: Sequence[int], dtype: Any) -> None:
    """Refuse what is not one number per voxel.

    Raises:
        ScanError: If it is.
    """
    if dtype.fields is not None:
        raise ScanError(
            "the file holds colours, not grey values",
            expected="one number per voxel",
            got="several",
            remedy="Save the scan as a greyscale image",
        )
    if dtype.kind == "c":
        raise complex_error()
    axes = max((a + 1 for a, n in enumerate(shape) if n > 1), default=0)
    if axes > 4:
        raise ScanError(
            f"the scan has {axes} axes",
            expected="3 (X, Y, Z)",
            got=f"shape {tuple(shape)}",
            remedy="Split it and keep one volume",
        )


def _scaled(array: np.ndarray, header: Any) -> np.ndarray:
    """Return stored numbers with the header's slope and intercept, if it has any."""
    slope, intercept = header.get_slope_inter()
    if slope is None or (slope, intercept) == (1.0, 0.0):
        return array
    scaled = np.empty(array.shape, np.float32, order="F")
    for part, stored in zip(np.moveaxis(scaled, -1, 0), np.moveaxis(array, -1, 0), strict=True):
        part[...] = stored.astype(np.float64) * slope + intercept
    return scaled


def _warning(header: Any, size: Sequence[int], unit_mm: float) -> str:
    """Return a warning about what a NIfTI header states of the geometry, or nothing.

    A header may state it twice. nibabel takes the sform, if it has a code, and the qform else.

    Raises:
        ScanError: If both claim to be the same coordinates and differ.
    """
    sform, sform_code = header.get_sform(coded=True)
    try:
        qform, qform_code = header.get_qform(coded=True)
    except (HeaderDataError, ValueError):
        if sform is None:
            raise
        return "Its qform is no rotation; the sform was used."
    if sform is None and qform is None:
        return "The file does not state its orientation; the NIfTI default was used."
    if sform is None or qform is None:
        return ""
    apart = unit_mm * apart_mm(sform, qform, size)
    if apart <= CORNER_MM or not math.isfinite(apart):  # what is broken is refused later
        return ""
    if sform_code == qform_code:
        raise ScanError(
            "the header states two geometries that differ (sform and qform)",
            expected=f"the same corners within {CORNER_MM} mm",
            got=f"corners up to {apart:.3g} mm apart",
            remedy="Find out which is right and write it as both, or convert the scan again",
        )
    return (
        f"Its sform and qform are different coordinates, {apart:.3g} mm apart at the corners;"
        " the sform was used."
    )
