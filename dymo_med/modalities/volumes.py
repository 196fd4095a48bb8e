"""NRRD and MetaImage through SimpleITK, with what SimpleITK does not check.

A header of these formats may keep its voxels in other files (`data file`, `ElementDataFile`). They
must lie in the header's folder: a header that came from elsewhere must not open other files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from dymo_med.modalities.scan import (
    ScanError,
    ScanFacts,
    StoredScan,
    refuse_packed,
    refuse_size,
    spacing_of,
    to_ras,
)

NRRD = (".nrrd", ".nhdr")
EXTENSIONS = (*NRRD, ".mha", ".mhd")

_MOST_HEADER_BYTES = 2**20
_PATTERN = re.compile(r"(\S*%0?\d{0,2}d\S*) (-?\d{1,6}) (-?\d{1,6}) (-?\d{1,6})(?: \d+)?")
_ANATOMICAL = re.compile(
    r"(right-anterior-superior|left-anterior-superior|left-posterior-superior|ras|las|lps)(-time)?",
    re.IGNORECASE,
)


def read(path: Path) -> StoredScan:
    """Return the scan in a NRRD or MetaImage file.

    Raises:
        ScanError: If it cannot be read, holds colours or more than three axes, keeps its voxels
            outside its folder, or is not in millimetres.
    """
    import SimpleITK

    fields, others = _header(path)
    files = (path, *_detached(path, fields, others))
    warning = _check_fields(path, fields)
    SimpleITK.ProcessObject.GlobalWarningDisplayOff()
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if path.suffix.lower() in NRRD else "MetaImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        refuse_size(reader.GetSize())
        axes, numbers = reader.GetDimension(), reader.GetNumberOfComponents()
        if numbers != 1 or axes > 3:
            raise ScanError(
                "the file holds more than one volume or colours",
                expected="3 axes and one number per voxel",
                got=f"{axes} axes, {numbers} numbers per voxel",
                remedy="Split the series or save it as greyscale",
            )
        packed = fields.get("encoding", fields.get("compresseddata", "")).lower()
        if packed in ("gzip", "gz", "bzip2", "bz2", "true"):
            voxel = SimpleITK.Image(1, 1, reader.GetPixelID()).GetSizeOfPixelComponent()
            refuse_packed(files[-1], math.prod(reader.GetSize()) * voxel)
        image = reader.Execute()
    except RuntimeError as error:  # the one exception SimpleITK has
        raise ScanError(
            "the file is damaged or not what its name says",
            expected="a whole NRRD or MetaImage file",
            got=type(error).__name__,
            remedy="Export or copy it again",
        ) from error
    values = SimpleITK.GetArrayFromImage(image).T  # (X, Y, Z)
    values = values.reshape(values.shape + (1,) * (3 - values.ndim))
    lps = np.eye(4)
    directions = np.reshape(image.GetDirection(), (axes, axes))
    lps[:axes, :axes] = directions * np.asarray(image.GetSpacing())
    lps[:axes, 3] = image.GetOrigin()
    affine = to_ras(lps)
    warnings = (warning,) if warning and min(values.shape) > 1 else ()
    facts = ScanFacts(values.shape, str(values.dtype), spacing_of(affine), warnings)
    return StoredScan(values, affine, facts, files)


def _header(path: Path) -> tuple[dict[str, str], list[str]]:
    """Return the header's fields by name in lower case, and the lines after the last one.

    Raises:
        ScanError: If there is no such header.
    """
    with path.open("rb") as stream:
        head = stream.read(_MOST_HEADER_BYTES)
    nrrd = path.suffix.lower() in NRRD
    if nrrd and not head.startswith(b"NRRD"):
        raise ScanError(
            "the file is damaged or not what its name says",
            expected="a NRRD header",
            got="another beginning",
            remedy="Export or copy it again",
        )
    fields: dict[str, str] = {}
    lines = head.decode("latin-1").splitlines()
    for number, line in enumerate(lines):
        if nrrd and not line.strip():
            return fields, []
        name, found, value = line.partition(":" if nrrd else "=")
        if not found or value.startswith("="):  # `key:=value` is a note
            continue
        fields[name.strip().lower()] = value.strip()
        last = name.strip().lower() in ("data file", "datafile", "elementdatafile")
        if last and (value.strip().upper().startswith("LIST") or not nrrd):
            return fields, [other.strip() for other in lines[number + 1 :] if other.strip()]
    return fields, []


def _detached(path: Path, fields: dict[str, str], others: Sequence[str]) -> tuple[Path, ...]:
    """Return the files beside the header that hold the voxels.

    Raises:
        ScanError: If one is not in the header's folder.
    """
    stated = fields.get("data file", fields.get("datafile", fields.get("elementdatafile")))
    if stated is None or stated.upper() == "LOCAL":
        return ()
    if stated.upper().startswith("LIST"):
        names = list(others)
    elif pattern := _PATTERN.fullmatch(stated):
        first, last, step = (int(pattern[i]) for i in (2, 3, 4))
        numbers = range(first, last + (1 if step > 0 else -1), step) if step else range(0)
        names = [pattern[1] % number for number in numbers]
    else:
        names = [stated]
    for name in names:
        plain = PurePosixPath(name.replace("\\", "/"))
        if plain.is_absolute() or ".." in plain.parts or re.match(r"[A-Za-z]:", name):
            raise ScanError(
                "the header's data file is outside its folder",
                expected="a file beside the header",
                got="a path that leaves the folder",
                remedy="Put both into the patient directory and name the file without its path",
            )
    files = tuple(path.parent / name for name in names)
    absent = [file.name for file in files if not file.is_file()]
    if absent or not files:
        raise ScanError(
            "the header's data file is not there",
            expected="the file that holds the voxels, beside the header",
            got=f"{len(absent)} of {len(files)} files absent",
            remedy="Copy the data file too; header and data belong together",
        )
    return files


def _check_fields(path: Path, fields: dict[str, str]) -> str:
    """Return a warning if the header does not say how the scan lies in the body.

    Raises:
        ScanError: If lengths are not in millimetres.
    """
    if path.suffix.lower() in NRRD:
        units = set(re.findall(r'"([^"]*)"', fields.get("space units", "")))
        stated = bool(_ANATOMICAL.fullmatch(fields.get("space", "")))
        stated = stated and "space directions" in fields
    else:
        units = {fields["distanceunits"]} if fields.get("distanceunits") else set()
        stated = any(k in fields for k in ("transformmatrix", "orientation", "rotation"))
    if units - {"mm", "", "none", "None", "NONE", "MM"}:
        raise ScanError(
            "lengths of the header are not in millimetres",
            expected="mm",
            got="another unit",
            remedy="Save the scan in millimetres",
        )
    return "" if stated else "The file does not state its orientation; LPS axes were assumed."
