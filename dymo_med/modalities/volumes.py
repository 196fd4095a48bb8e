"""NRRD and MetaImage through SimpleITK, with what SimpleITK does not check.

A header of these formats may keep its voxels in other files (`data file`, `ElementDataFile`). They
must lie in the header's folder: a header that came from elsewhere must not open other files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from dymo_med import limits
from dymo_med.modalities.complaints import complaints
from dymo_med.modalities.packed import damaged, unpacked
from dymo_med.modalities.scan import (
    ScanError,
    ScanFacts,
    StoredScan,
    complex_error,
    refuse_header,
    refuse_packed,
    refuse_size,
    spacing_of,
    to_ras,
)

NRRD = (".nrrd", ".nhdr")
EXTENSIONS = (*NRRD, ".mha", ".mhd")

_PATTERN = re.compile(r"(\S*%0?\d{0,2}d\S*) (-?\d{1,6}) (-?\d{1,6}) (-?\d{1,6})(?: \d+)?")
# NRRD's anatomical spaces, spelled with hyphens, spaces or neither: the first two axes as multiples
# of LPS.
_ANATOMICAL = {
    "ras": (-1.0, -1.0),
    "las": (1.0, -1.0),
    "lps": (1.0, 1.0),
    "rightanteriorsuperior": (-1.0, -1.0),
    "leftanteriorsuperior": (1.0, -1.0),
    "leftposteriorsuperior": (1.0, 1.0),
}
_WITH_TIME = {
    name + ("t" if len(name) == 3 else "time"): axes for name, axes in _ANATOMICAL.items()
}


def read(path: Path) -> StoredScan:
    """Return the scan in a NRRD or MetaImage file.

    Geometry and types come from SimpleITK. Packed voxels are unpacked here: SimpleITK stops
    before their checksum, and of a MetaImage it prints a complaint and goes on.

    Raises:
        ScanError: If it cannot be read, holds colours, complex numbers or more than three axes,
            keeps its voxels outside its folder, is not in millimetres, or holds more or less than
            its header says.
    """
    import SimpleITK

    fields, others, start = _header(path)
    nrrd = path.suffix.lower() in NRRD
    data = _detached(path, fields, others)
    unstated = _check_fields(path, fields)
    SimpleITK.ProcessObject.GlobalWarningDisplayOff()
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if nrrd else "MetaImageIO")
    reader.SetFileName(str(path))
    try:
        with complaints() as heard:
            reader.ReadImageInformation()
        if heard:
            raise _unread(RuntimeError("a complaint of MetaIO"))
    except RuntimeError as error:  # the one exception SimpleITK has
        sizes = fields.get("sizes", "").split()
        raise _too_many(len(sizes), 1) if len(sizes) > 3 else _unread(error) from error
    size = reader.GetSize()
    axes = max((a + 1 for a, n in enumerate(size) if n > 1), default=1)
    kind = SimpleITK.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in kind or "complex" in fields.get("kinds", ""):
        raise complex_error()
    if reader.GetNumberOfComponents() != 1 or axes > 3:
        raise _too_many(axes, reader.GetNumberOfComponents())
    dtype = SimpleITK.GetArrayViewFromImage(SimpleITK.Image(1, 1, reader.GetPixelID())).dtype
    refuse_size(size, dtype.itemsize)
    packing = _packing(fields, nrrd)
    if packing:
        stored = _unpacked(path, data, start, fields, packing, math.prod(size) * dtype.itemsize)
        values = stored.view(dtype.newbyteorder(_order(fields))).reshape(size, order="F")
        values = values.astype(dtype, copy=False)
    else:
        try:
            with complaints() as heard:
                values = SimpleITK.GetArrayFromImage(reader.Execute()).T  # (X, Y, Z)
            if heard:
                raise _unread(RuntimeError("a complaint of MetaIO"))
        except RuntimeError as error:
            raise _unread(error) from error
    values = values.reshape((*size[:3], *(1,) * (3 - len(size))), order="F")
    n = len(size)
    lps = np.eye(4)
    directions = np.reshape(reader.GetDirection(), (n, n)) * np.asarray(reader.GetSpacing())
    n = min(3, n)
    lps[:n, :n] = directions[:n, :n]
    lps[:n, 3] = reader.GetOrigin()[:n]
    # SimpleITK turns RAS and LAS to LPS, and the same spaces with time not.
    turns = _WITH_TIME.get(_space(fields), (1.0, 1.0)) if nrrd else (1.0, 1.0)
    lps = np.diag([*turns, 1.0, 1.0]) @ lps
    affine = to_ras(lps)
    warnings = unstated if min(values.shape) > 1 else ()
    facts = ScanFacts(values.shape, str(values.dtype), spacing_of(affine), warnings)
    return StoredScan(values, affine, facts, (path, *data))


def _too_many(axes: int, numbers: int) -> ScanError:
    return ScanError(
        "the file holds more than one volume or colours",
        expected="3 axes and one number per voxel",
        got=f"{axes} axes, {numbers} numbers per voxel",
        remedy="Split the series or save it as greyscale",
    )


def _unread(error: Exception) -> ScanError:
    return ScanError(
        "the file is damaged or not what its name says",
        expected="a whole NRRD or MetaImage file",
        got=type(error).__name__,
        remedy="Export or copy it again",
    )


def _packing(fields: Mapping[str, str], nrrd: bool) -> str:
    """Return how the voxels are packed, as `packed.unpacked` calls it; nothing if as text.

    Voxels that are not packed are read here too, if nothing is to be passed over before them, so
    that a file that is longer than its header says is noticed.
    """
    if nrrd:
        encoding = fields.get("encoding", "").lower()
        if encoding == "raw" and _skips(fields) != (0, 0):
            return ""
        return {"gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2", "raw": "raw"}.get(
            encoding, ""
        )
    if _is_true(fields.get("compresseddata", "")):
        return "zlib"
    plain = _is_true(fields.get("binarydata", "")) and "headersize" not in fields
    return "raw" if plain else ""


def _is_true(text: str) -> bool:
    """Return whether MetaIO takes a value for true."""
    return text[:1] in ("T", "t", "1")


def _space(fields: Mapping[str, str]) -> str:
    """Return the NRRD space in which directions and origin are given, whatever its spelling."""
    return re.sub(r"[ -]", "", fields.get("space", "")).lower()


def _skips(fields: Mapping[str, str]) -> tuple[int, int]:
    """Return the lines and bytes of NRRD data that come before the voxels."""
    lines, count = (
        fields.get(f"{what} skip", fields.get(f"{what}skip", "0")) for what in ("line", "byte")
    )
    return int(lines), int(count)


def _order(fields: Mapping[str, str]) -> str:
    """Return the order of a number's bytes, as numpy writes it."""
    big = fields.get("endian", "").lower() == "big" or any(
        _is_true(fields.get(name, "")) for name in ("binarydatabyteordermsb", "elementbyteordermsb")
    )
    return ">" if big else "<"


def _unpacked(
    path: Path, data: Sequence[Path], start: int, fields: Mapping[str, str], packing: str, size: int
) -> NDArray[np.uint8]:
    """Return the bytes of all voxels.

    Args:
        path: The header's file.
        data: The files beside it that hold the voxels; none if it holds them itself.
        start: Bytes of the header.
        fields: What the header says.
        packing: See `_packing`.
        size: Bytes of all voxels.

    Raises:
        ScanError: If they are damaged, more or fewer.
    """
    files = data or (path,)
    try:
        lines, skip = _skips(fields)
    except ValueError as error:
        raise _unread(error) from error
    share, rest = divmod(size, len(files))
    if rest or lines < 0 or skip < 0:
        raise _unread(ValueError("a share of the voxels that is no whole number"))
    if packing != "raw":
        held = sum(file.stat().st_size for file in files)
        most = limits.MAX_INFLATION if packing != "bzip2" else math.inf
        refuse_packed(held, size, most)
    parts = []
    for file in files:
        with file.open("rb") as stream:
            stream.seek(0 if data else start)
            for _ in range(lines):
                stream.readline(limits.MAX_HEADER_BYTES)
            length = fields.get("compresseddatasize", "")
            if length.isdigit() and file.stat().st_size - stream.tell() != int(length):
                raise damaged("packed data of another length than its header states")
            parts.append(unpacked(stream, packing, share, skip))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _header(path: Path) -> tuple[dict[str, str], list[str], int]:
    """Return the header's fields by name in lower case, the lines after the last, and its bytes.

    Raises:
        ScanError: If there is no such header.
    """
    nrrd = path.suffix.lower() in NRRD
    fields: dict[str, str] = {}
    others: list[str] | None = None
    with path.open("rb") as stream:
        if nrrd and not stream.readline(16).startswith(b"NRRD"):
            raise ScanError(
                "the file is damaged or not what its name says",
                expected="a NRRD header",
                got="another beginning",
                remedy="Export or copy it again",
            )
        while raw := stream.readline(limits.MAX_HEADER_BYTES + 1):
            refuse_header(stream.tell())
            line = raw.decode("latin-1").rstrip("\r\n")
            if nrrd and not line.strip():
                break
            if others is not None:
                others += [line.strip()] if line.strip() else []
                continue
            name, found, value = line.partition(":" if nrrd else "=")
            if not found or value.startswith("="):  # `key:=value` is a note
                continue
            fields[name.strip().lower()] = value.strip()
            if name.strip().lower() in ("data file", "datafile", "elementdatafile"):
                listed = value.strip().upper().startswith("LIST")
                if listed:
                    others = []
                elif not nrrd:
                    break
        return fields, others or [], stream.tell()


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


def _check_fields(path: Path, fields: dict[str, str]) -> tuple[str, ...]:
    """Return warnings if the header does not say how a scan lies in the body, or how large it is.

    Raises:
        ScanError: If lengths are not in millimetres.
    """
    nrrd = path.suffix.lower() in NRRD
    if nrrd:
        units = set(re.findall(r'"([^"]*)"', fields.get("space units", "")))
        stated = _space(fields) in (_ANATOMICAL | _WITH_TIME)
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
    warnings = []
    if not stated:
        warnings.append("The file does not state its orientation; LPS axes were assumed.")
    if not (_all_sizes_stated(fields) if nrrd else {"elementspacing", "elementsize"} & {*fields}):
        warnings.append("The file does not state its voxel size; 1 mm was assumed.")
    return tuple(warnings)


def _all_sizes_stated(fields: Mapping[str, str]) -> bool:
    """Return whether a NRRD header gives a length for every axis that has several samples.

    `axis mins` and `axis maxs` are none: SimpleITK does not divide their difference.
    """
    counts = fields.get("sizes", "").split()
    vectors = re.findall(r"\([^)]*\)|none", fields.get("space directions", ""))
    numbers = fields.get("spacings", "").split()

    def stated(axis: int) -> bool:
        found = [texts[axis].lower() for texts in (vectors, numbers) if axis < len(texts)]
        return any("none" not in text and "nan" not in text for text in found)

    return all(stated(axis) for axis, count in enumerate(counts) if count != "1")
