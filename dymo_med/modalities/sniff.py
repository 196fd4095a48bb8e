"""What a file is by its first bytes, whatever its name says."""

from __future__ import annotations

import zlib
from pathlib import Path

from dymo_med.modalities.scan import ScanError

_LENGTH = 4096
# Where a mark stands, the mark, what the file is, and the ending of names of files that are read.
_MARKS = (
    (128, b"DICM", "DICOM", ".dcm"),
    (344, b"n+1\0", "NIfTI", ".nii"),
    (4, b"n+2\0", "NIfTI", ".nii"),
    (0, b"NRRD", "NRRD", ".nrrd"),
    (0, b"ObjectType", "MetaImage", ".mha"),
    (0, b"NDims", "MetaImage", ".mha"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture", ".png"),
    (0, b"\xff\xd8\xff", "a JPEG picture", ".jpg"),
    (0, b"II*\0", "a TIFF picture", ".tif"),
    (0, b"MM\0*", "a TIFF picture", ".tif"),
    (0, b"II+\0", "a TIFF picture", ".tif"),
    (0, b"MM\0+", "a TIFF picture", ".tif"),
    (0, b"GIF8", "a GIF picture", ""),
    (0, b"BM", "a BMP picture", ""),
    (8, b"WEBP", "a WebP picture", ""),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 picture", ""),
    (0, b"\x89HDF", "an HDF5 file (MINC, for instance)", ""),
    (0, b"CDF\1", "a MINC file", ""),
    (0, b"%PDF", "a PDF", ""),
    (0, b"PK\3\4", "a ZIP archive", ""),
    (0, b"Rar!", "an archive", ""),
    (0, b"7z\xbc\xaf", "an archive", ""),
)
_WEB = (b"<!doctype html", b"<html")
# Names that say one thing: a picture of one kind under another's name is read all the same.
_ALIKE = (
    (".nii",),
    (".nii.gz",),
    (".nrrd", ".nhdr"),
    (".mha", ".mhd"),
    (".dcm",),
    (".png", ".jpg", ".jpeg", ".tif", ".tiff"),
)


def kind_of(path: Path) -> str:
    """Return what a file is, for people; nothing if that is not known."""
    with path.open("rb") as stream:
        found = _kind(stream.read(_LENGTH))
    return found[0] if found else ""


def refuse_misnamed(path: Path) -> None:
    """Refuse a file that is whole, as far as can be seen, but of another kind than its name says.

    Raises:
        ScanError: With what it is, and what to call it.
    """
    with path.open("rb") as stream:
        head = stream.read(_LENGTH)
    found = _kind(head)
    if found is None:
        return
    what, ending = found
    name = path.name.lower()
    named = next((alike for alike in _ALIKE if name.endswith(alike)), ())
    if ending and ending in named:
        return
    if ending:
        remedy = f"Rename it, so that its name ends in {ending}"
    elif what == "a web page":
        remedy = "Download the scan again: this page came in its place"
    else:
        remedy = "Unpack or convert it to a format that is read"
    raise ScanError(
        f"the file is not what its name says: it is {what}",
        expected=f"a name that ends in {ending}" if ending else "a scan in a format that is read",
        got=f"one that ends in {next((n for n in named if name.endswith(n)), path.suffix)}",
        remedy=remedy,
    )


def _kind(head: bytes) -> tuple[str, str] | None:
    """Return what a file is and the ending that its name should have; None if not known."""
    if head.startswith(b"\x1f\x8b"):
        try:
            inside = zlib.decompressobj(31).decompress(head, _LENGTH)
        except zlib.error:
            return None
        kind = _kind(inside) if not inside.startswith(b"\x1f\x8b") else None
        if kind is None:
            return None
        what, ending = kind
        packed = f"{what}, packed by gzip"
        return packed, ".nii.gz" if ending == ".nii" else ""
    if head[:200].lstrip().lower().startswith(_WEB):
        return "a web page", ""
    for place, mark, what, ending in _MARKS:
        if head[place : place + len(mark)] == mark:
            return what, ending
    return None
