"""DICOM: find the series, choose one by declared rules, derive its geometry, read its pixels.

Pixels are read by SimpleITK (GDCM), which knows the compressions. The geometry is derived here
from the headers, because SimpleITK makes up a spacing of 1 mm for multi-frame files that state
none, and takes one position for all frames of those that state it frame by frame. Where both
state a geometry (one slice per file), they must agree.

What GDCM does to the stored numbers (measured with SimpleITK 2.5, and covered by tests): it
applies one rescale slope and intercept to a whole file - those shared by all frames, else those of
the first frame, else those at the top of the header - and turns MONOCHROME1 round within the range
of the stored bits. So slopes that differ from slice to slice come out right from one file per
slice, and have to be put right here for multi-frame files and for dose grids.

Volumes are stacks of parallel slices at even steps. A step that is not along the slices' normal
(a tilted gantry) gives a sheared affine, which resampling to the grid straightens exactly.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.uid import UID, ExplicitVRBigEndian, MediaStorageDirectoryStorage

from dymo_med import limits
from dymo_med.modalities.complaints import complaints
from dymo_med.modalities.scan import (
    CORNER_MM,
    Matrix,
    ScanAbsent,
    ScanError,
    ScanFacts,
    StoredScan,
    apart_mm,
    millimetres,
    refuse_header,
    refuse_packed,
    refuse_size,
    spacing_of,
    times,
    to_ras,
)
from dymo_med.types import SeriesRule

# pydicom's warnings quote the values of the header, which identify people.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
warnings.filterwarnings("ignore", module="pydicom")
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

# Frames whose direction cosines differ by more than this belong to different stacks (about 1
# degree); within a stack the tolerance is CORNER_MM.
_OTHER_DIRECTION = 0.02
_MOST_LISTED = 8
_PIECE = 2**20
# Hounsfield units of CT begin at air, -1000; scanners store from here on.
_LEAST_HU = -1024.0
# X-ray projections (PS3.3 C.7.3.1.1.1), of which GDCM leaves PixelSpacing aside.
_PROJECTIONS = frozenset(("CR", "DX", "IO", "MG", "PX", "RF", "RG", "XA"))
_RLE = "1.2.840.10008.1.2.5"
_KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "PatientID",
    "Modality",
    "SeriesDescription",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "SegmentationType",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "NominalScannedPixelSpacing",
    "SliceThickness",
    "GridFrameOffsetVector",
    "RescaleSlope",
    "RescaleIntercept",
    "DoseGridScaling",
    "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
# Objects with rows and columns that are no scans, by SOP class (PS3.6, table A-1).
_NO_SCANS = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "a segmentation (label map)",
    "1.2.840.10008.5.1.4.1.1.30": "a parametric map, which was computed",
    "1.2.840.10008.5.1.4.1.1.4.2": "MR spectroscopy",
}
_NO_SCAN = ", not a scan"
_DEFLATED = "1.2.840.10008.1.2.1.99"
# Preamble, mark and the length of the group that names the transfer syntax; and what that group
# takes at most.
_START, _MOST_META = 144, 2**16
# What GDCM reads.
_UNCOMPRESSED = (
    "1.2.840.10008.1.2",  # implicit VR, little endian
    "1.2.840.10008.1.2.1",  # explicit VR, little endian
    _DEFLATED,
    "1.2.840.10008.1.2.2",  # explicit VR, big endian
)
_COMPRESSIONS = (
    _RLE,
    "1.2.840.10008.1.2.4.50",  # JPEG baseline
    "1.2.840.10008.1.2.4.51",  # JPEG extended
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.70",  # JPEG lossless, first order
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS near lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
)


@dataclass(frozen=True)
class Frame:
    """One slice of a DICOM file, as its header describes it.

    Attributes:
        file: Where it is.
        index: Which frame of the file it is, from 0.
        frames: How many frames the file has.
        image: SOPInstanceUID of the file.
        series: SeriesInstanceUID.
        patient: PatientID, which identifies somebody.
        modality: Modality tag ("MR").
        description: SeriesDescription; may hold a name, and is only matched, never shown.
        rows: Pixels along a column.
        columns: Pixels along a row.
        position: First pixel `(3,)` in mm, LPS.
        orientation: Direction cosines `(6,)` of a row and of a column.
        pixel_mm: Distance between rows and between columns.
        thickness_mm: Stated thickness, 0 if none is.
        rescale: Slope and intercept of this frame.
        applied: Slope and intercept that GDCM applies to the whole file.
        syntax: UID of the transfer syntax.
        trouble: Why its pixels are no grey values of a scan; empty if they are.
        pixel_bytes: Bytes of a pixel as stored.
        padding: Lowest and highest stored number that is no part of the image (PS3.3
            C.7.5.1.1.2), as GDCM gives stored numbers; None = there is none.
    """

    file: Path
    index: int
    frames: int
    image: str
    series: str
    patient: str
    modality: str
    description: str
    rows: int
    columns: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_mm: tuple[float, ...] | None
    thickness_mm: float
    rescale: tuple[float, float]
    applied: tuple[float, float]
    syntax: str
    trouble: str
    pixel_bytes: int = 2
    padding: tuple[int, int] | None = None


def read(path: Path, rule: SeriesRule | None = None) -> StoredScan:
    """Return the scan in a DICOM file, or the one series of a folder that the rule chooses.

    Args:
        path: A file, or a folder that is searched with its subfolders. Files that are not DICOM
            and objects that are no images are passed over.
        rule: Which series is meant; None = the folder holds only one.

    Raises:
        ScanAbsent: If no series fits a rule that says that the scan is missing then.
        ScanError: If there is no series or several that fit, or its geometry cannot be derived,
            or its pixels cannot be read.
    """
    there = list(_files(path))
    frames = [frame for file in there for frame in _frames(file)]
    if not frames and path.is_file():
        raise ScanError(
            "the DICOM file holds no image",
            expected="an object with rows, columns and pixels",
            got=_kinds([path]),
            remedy="Put the scan itself in its place",
        )
    if not frames:
        raise ScanError(
            "there is no DICOM image in the folder",
            expected="the files of one DICOM series, here or in subfolders",
            got=_kinds(there) if there else "an empty folder",
            remedy="Put the files of the series here; if the scan was not made, remove the folder",
        )
    patients = {frame.patient for frame in frames if frame.patient}
    if len(patients) > 1:
        raise ScanError(
            "the DICOM files belong to several patients",
            expected="one PatientID",
            got=f"{len(patients)} different ones",
            remedy="Find out whose files these are, and keep those of this patient",
        )
    stack = _choose(_stacks(frames), rule)
    if trouble := next((frame.trouble for frame in stack if frame.trouble), ""):
        raise ScanError(
            trouble,
            expected="grey values that a scanner measured",
            got=_described(stack),
            remedy="Put the scan that it was made from in its place"
            if trouble.endswith(_NO_SCAN)
            else "Bring the grey values as NIfTI, or a picture as PNG",
        )
    ordered, lps, stated = _geometry(stack)
    values, dtype, padding = _pixels(ordered)
    affine = to_ras(lps)
    facts = ScanFacts(values.shape, dtype, spacing_of(affine) if stated else None)
    files = tuple(dict.fromkeys(frame.file for frame in ordered))
    return StoredScan(values, affine, facts, files, tuple(patients), padding)


def stacks(path: Path) -> list[tuple[tuple[Frame, ...], Matrix]]:
    """Return every volume in a DICOM file or folder: its slices in order, and its affine in RAS+.

    Stacks whose geometry cannot be derived were not read either, and are left out.

    Args:
        path: See `read`.

    Raises:
        ScanError: If a file is damaged.
    """
    found = []
    for stack in _stacks([frame for file in _files(path) for frame in _frames(file)]):
        try:
            ordered, lps, _ = _geometry(stack)
        except ScanError:
            continue
        found.append((tuple(ordered), to_ras(lps)))
    return found


def is_dicom(path: Path) -> bool:
    """Return whether a patient directory's entry is read by this module."""
    return path.is_dir() or path.suffix.lower() == ".dcm"


# -- headers ---------------------------------------------------------------------------------------


def _files(path: Path) -> Iterator[Path]:
    """Yield a file, or all files of a folder and its subfolders but hidden ones, in order.

    Links are followed, each folder once. One that leads nowhere is yielded too: reading it fails,
    where passing over it might lose a slice.
    """
    if not path.is_dir():
        yield path
        return

    def refuse(error: OSError) -> None:
        raise error

    seen: set[Path] = set()
    for folder, subfolders, names in os.walk(path, onerror=refuse, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            if not name.startswith(".") and (file.is_file() or not file.exists()):
                yield file


def _kinds(files: Sequence[Path]) -> str:
    """Return what files are that hold no image, for people: "2 x RT Plan Storage, 1 other file"."""
    kinds: Counter[str] = Counter()
    for file in files:
        kind = ""
        try:
            with file.open("rb") as stream:
                marked = stream.read(132)[128:] == b"DICM"
            if marked or file.suffix.lower() in (".dcm", ".ima"):
                tags = ["SOPClassUID"]
                header = pydicom.dcmread(
                    file, force=True, stop_before_pixels=True, specific_tags=tags
                )
                meta = getattr(header, "file_meta", pydicom.Dataset())
                stated = header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID")
                uid = UID(str(stated or ""))
                kind = uid.name if uid.name != uid else "a DICOM object of a private kind"
                kind = kind if uid else ""
        except Exception:  # pydicom lets through whatever its converters raise
            kind = ""
        kinds[kind] += 1
    other = kinds.pop("", 0)
    told = [f"{count} x {kind}" if count > 1 else kind for kind, count in sorted(kinds.items())]
    if other:
        told.append(f"{other} other file{'s' if other > 1 else ''}")
    return ", ".join(told)


def _frames(file: Path) -> tuple[Frame, ...]:
    """Return the frames of a file; none if it is no DICOM image."""
    status = file.stat()
    return _frames_once(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=8192)
def _frames_once(file: Path, changed: int, size: int) -> tuple[Frame, ...]:
    """Return the frames of a file in this state; several modalities may look at one study."""
    header = _header(file)
    if header is None:
        return ()
    try:
        return tuple(_read_frames(file, header))
    except ScanError:
        raise
    except Exception as error:  # values of any type may be in the place of any other
        raise _damaged(file, error) from error


def _header(file: Path) -> pydicom.Dataset | None:
    """Return the header of a DICOM image; None for anything else.

    Raises:
        ScanError: If it claims to be DICOM and cannot be read.
    """
    with file.open("rb") as stream:
        start = stream.read(_START)
        marked = start[128:132] == b"DICM"
        length = int.from_bytes(start[140:144], "little")
        meta_group = stream.read(min(length, _MOST_META))
    deflated = marked and _DEFLATED.encode() in meta_group
    suffix = file.suffix.lower()
    named = suffix in (".dcm", ".ima")
    if not (marked or named or not suffix or suffix[1:].isdigit()):
        return None
    if deflated:
        _hold_deflated(file, _START + length)
    try:
        with _Counted(file) as stream:
            stream.counted = not deflated  # its whole rest is read at once
            header = pydicom.dcmread(
                stream, force=not marked, stop_before_pixels=True, specific_tags=list(_KEYWORDS)
            )
        meta = getattr(header, "file_meta", pydicom.Dataset())
        kind = header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID")
        image = bool(header.get("Rows")) and bool(header.get("Columns"))
        claims = kind is not None and "Image Storage" in UID(str(kind)).name
        # Reports, plans and the like are passed over, but only if they are there as a whole: a
        # slice that is cut short must not make the volume shorter without a word.
        whole = kind == MediaStorageDirectoryStorage or (kind and header.get("SeriesInstanceUID"))
    except ScanError:
        raise
    except Exception as error:  # pydicom lets through whatever its converters raise
        if marked or named:
            raise _damaged(file, error) from error
        return None
    if image and (marked or kind is not None):
        return header
    cut = len(start) < 132 and (not start or b"\0" in start)
    if claims or cut or (not whole and (named or marked)):
        raise _damaged(file)
    return None


class _Counted(io.FileIO):
    """A file that refuses to give a header that does not end.

    Args:
        file: Which file.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self.counted, self.count = True, 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Return bytes as a file does.

        Raises:
            ScanError: If more were asked for than a header has.
        """
        left = limits.MAX_HEADER_BYTES + 1 - self.count if self.counted else -1
        wanted = left if size is None or size < 0 else size if left < 0 else min(size, left)
        data = super().read(wanted) or b""
        self.count += len(data) if self.counted else 0
        refuse_header(self.count)
        return data


def _hold_deflated(file: Path, start: int) -> None:
    """Unpack a deflated file to its end, within the limits, before pydicom does it as a whole.

    Args:
        file: Which file.
        start: Where the deflated part begins.

    Raises:
        ScanError: If it is too much, damaged or cut short.
    """
    most = limits.MAX_UNPACKED_BYTES + limits.MAX_HEADER_BYTES
    count, stream = 0, zlib.decompressobj(-zlib.MAX_WBITS)
    with file.open("rb") as source:
        source.seek(start)
        data = source.read(_PIECE)
        try:
            while not stream.eof:
                data = data or source.read(_PIECE)
                piece = stream.decompress(data, _PIECE)
                if not data and not piece:
                    raise EOFError
                count += len(piece)
                if count > most:
                    refuse_size((count,))
                data = stream.unconsumed_tail
        except (zlib.error, EOFError) as error:
            raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception | None = None) -> ScanError:
    return ScanError(
        "a DICOM file is damaged, cut short or not what its name says",
        expected="a header with the rows, columns and numbers of an image",
        got=f"{file.name}" + (f" ({type(error).__name__})" if error else ""),
        remedy="Export or copy the series again",
    )


def _read_frames(file: Path, header: pydicom.Dataset) -> Iterator[Frame]:
    """Yield the frames of an image: positions from its functional groups where it has them."""
    count = int(header.get("NumberOfFrames") or 1)
    pixel_bytes = max(1, int(header.get("BitsAllocated") or 16) // 8)
    refuse_size((header.Columns, header.Rows, count), pixel_bytes)
    shared = (header.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    per_frame = list(header.get("PerFrameFunctionalGroupsSequence") or [])
    trouble, padding = _trouble(header), _padding(header)
    if per_frame and len(per_frame) != count and not trouble:
        raise ScanError(
            "a multi-frame DICOM file does not describe each of its frames",
            expected=f"{count} functional groups, one per frame",
            got=str(len(per_frame)),
            remedy="Export the series again",
        )
    position = _numbers(header, "ImagePositionPatient", 3)
    orientation = _numbers(header, "ImageOrientationPatient", 6)
    pixel_mm = next(
        (
            spacing
            for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
            if (spacing := _numbers(header, keyword, 2))
        ),
        None,
    )
    top = _rescale(header)
    dose = _numbers(header, "DoseGridScaling", 1)
    of_shared = _rescale(_item(shared, "PixelValueTransformationSequence"))
    of_frames = [_rescale(_item(own, "PixelValueTransformationSequence")) for own in per_frame]
    of_frames += [None] * (count - len(of_frames)) if of_frames else []
    first = of_frames[0] if of_frames else None
    along = _offsets(header, count)
    syntax = str(getattr(header, "file_meta", pydicom.Dataset()).get("TransferSyntaxUID") or "")
    for index in range(count):
        own = per_frame[index] if index < len(per_frame) else pydicom.Dataset()
        where = position if count == 1 else None
        if where is None and along is not None and position and orientation:
            normal = np.cross(orientation[:3], orientation[3:])
            where = tuple(float(x) for x in np.asarray(position) + along[index] * normal)

        def group(
            sequence: str, keyword: str, length: int, own: Any = own
        ) -> tuple[float, ...] | None:
            found = _numbers(_item(own, sequence), keyword, length)
            return found or _numbers(_item(shared, sequence), keyword, length)

        thickness = group("PixelMeasuresSequence", "SliceThickness", 1)
        yield Frame(
            file=file,
            index=index,
            frames=count,
            image=str(header.get("SOPInstanceUID") or ""),
            series=str(header.get("SeriesInstanceUID") or ""),
            patient=str(header.get("PatientID") or "").strip(),
            modality=str(header.get("Modality") or "").strip().upper(),
            description=str(header.get("SeriesDescription") or ""),
            rows=int(header.Rows),
            columns=int(header.Columns),
            position=group("PlanePositionSequence", "ImagePositionPatient", 3) or where,
            orientation=group("PlaneOrientationSequence", "ImageOrientationPatient", 6)
            or orientation,
            pixel_mm=group("PixelMeasuresSequence", "PixelSpacing", 2) or pixel_mm,
            thickness_mm=(thickness or _numbers(header, "SliceThickness", 1) or (0.0,))[0],
            rescale=(dose[0], 0.0)
            if dose
            else (of_frames[index] if of_frames else None) or of_shared or top or (1.0, 0.0),
            applied=of_shared or first or top or (1.0, 0.0),
            syntax=syntax,
            trouble=trouble,
            pixel_bytes=pixel_bytes,
            padding=padding,
        )


def _item(group: pydicom.Dataset, sequence: str) -> pydicom.Dataset:
    """Return the one item of a functional group; an empty one if there is none."""
    items = group.get(sequence)
    return items[0] if items else pydicom.Dataset()


def _numbers(header: pydicom.Dataset, keyword: str, length: int) -> tuple[float, ...] | None:
    """Return the numbers of an element; None if it is absent or empty.

    Raises:
        ValueError: If there are more or fewer, or one is not finite.
    """
    value = header.get(keyword)
    if value is None or value == "" or (hasattr(value, "__len__") and len(value) == 0):
        return None
    numbers = tuple(float(x) for x in (value if length > 1 else [value]))
    if len(numbers) != length or not np.isfinite(numbers).all():
        raise ValueError(keyword)
    return numbers


def _rescale(header: pydicom.Dataset) -> tuple[float, float] | None:
    """Return slope and intercept, if one of them is stated.

    Raises:
        ScanError: If the slope is 0, which leaves nothing of the image.
    """
    slope = _numbers(header, "RescaleSlope", 1)
    intercept = _numbers(header, "RescaleIntercept", 1)
    if slope is None and intercept is None:
        return None
    if slope == (0.0,):
        raise ScanError(
            "a DICOM file states a rescale slope of 0",
            expected="a number other than 0",
            got="0, which makes all voxels the same",
            remedy="Export the series again",
        )
    return (slope or (1.0,))[0], (intercept or (0.0,))[0]


def _offsets(header: pydicom.Dataset, count: int) -> tuple[float, ...] | None:
    """Return how far the frames of a dose grid lie from the first one, along the normal."""
    if count == 1:
        return None
    offsets = _numbers(header, "GridFrameOffsetVector", count)
    return offsets if offsets is not None and offsets[0] == 0 else None


def _trouble(header: pydicom.Dataset) -> str:
    """Return why the pixels of an image are no grey values of a scan, or nothing."""
    if kind := _NO_SCANS.get(str(header.get("SOPClassUID") or "")):
        of_type = str(header.get("SegmentationType") or "").strip().upper()
        told = f" ({of_type})" if of_type in ("BINARY", "FRACTIONAL") else ""
        return f"the DICOM file holds {kind}{told}{_NO_SCAN}"
    if str(header.get("Modality") or "").strip().upper() == "SEG":
        return f"the DICOM file holds a segmentation{_NO_SCAN}"
    if int(header.get("SamplesPerPixel") or 1) != 1 or not str(
        header.get("PhotometricInterpretation") or ""
    ).startswith("MONOCHROME"):
        return "the DICOM file holds colours, not grey values"
    if int(header.get("BitsAllocated") or 0) == 1:
        return "the DICOM file holds a mask of one bit per pixel, not a scan"
    big = getattr(header, "file_meta", {}).get("TransferSyntaxUID") == ExplicitVRBigEndian
    if big and int(header.get("BitsAllocated") or 0) > 16:  # GDCM mixes the bytes up
        return "the DICOM file holds 32-bit numbers in big-endian order, which are not read"
    if header.get("ModalityLUTSequence"):
        return "the DICOM file's values need its lookup table (Modality LUT), which is not read"
    return ""


def _padding(header: pydicom.Dataset) -> tuple[int, int] | None:
    """Return the lowest and highest stored number that is no part of the image.

    As GDCM gives stored numbers: without bits above the stored ones, MONOCHROME1 turned round.
    """
    ends = [header.get(k) for k in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None or ends[0] == "":
        return None
    bits = int(header.get("BitsStored") or header.get("BitsAllocated") or 16)
    signed = int(header.get("PixelRepresentation") or 0) == 1
    stored = []
    for end in ends:
        if end is None or end == "":
            continue
        number = int.from_bytes(end, "little") if isinstance(end, bytes) else int(end)
        number &= (1 << bits) - 1
        stored.append(number - (1 << bits) if signed and number >> (bits - 1) else number)
    if str(header.get("PhotometricInterpretation") or "").strip() == "MONOCHROME1":
        top = -1 if signed else (1 << bits) - 1
        stored = [top - number for number in stored]
    return min(stored), max(stored)


# -- which series ----------------------------------------------------------------------------------


def _stacks(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Return the frames by series, size and direction."""
    stacks: list[list[Frame]] = []
    kinds: dict[tuple[object, ...], list[list[Frame]]] = {}
    for frame in frames:
        alike = kinds.setdefault(
            (frame.series, frame.rows, frame.columns, frame.orientation is None), []
        )
        for stack in alike:
            if frame.orientation is None or _same_direction(frame, stack[0]):
                stack.append(frame)
                break
        else:
            alike.append([frame])
            stacks.append(alike[-1])
    return stacks


def _same_direction(first: Frame, second: Frame) -> bool:
    difference = np.subtract(first.orientation or (), second.orientation or ())
    return bool(np.abs(difference).max() <= _OTHER_DIRECTION)


def _choose(stacks: Sequence[list[Frame]], rule: SeriesRule | None) -> list[Frame]:
    """Return the one stack that fits the rule.

    Raises:
        ScanAbsent: If none does, and the rule says that the scan is missing then.
        ScanError: If there are several, or none.
    """
    fitting = [stack for stack in stacks if rule is None or _fits(stack, rule)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and rule is not None:
        if rule.absent == "missing":
            raise ScanAbsent("no DICOM series fits the rules of this modality")
        raise ScanError(
            "no DICOM series fits the rules of this modality",
            expected=_spelled(rule),
            got=_listing(stacks, rule),
            remedy="Bring the series that is meant, or correct `dicom` in cohort.yaml; where a"
            " series that does not fit shall mean that the scan was not made, declare"
            " `absent: missing`",
        )
    raise ScanError(
        "several DICOM series could be this scan",
        expected="one series" + (f" of {_spelled(rule)}" if rule else ""),
        got=_listing(fitting, rule),
        remedy="Keep the one that is meant, or tell them apart by `dicom` in cohort.yaml"
        " (modality, description, slices)",
    )


def _fits(stack: Sequence[Frame], rule: SeriesRule) -> bool:
    """Return whether a stack fits every declared rule."""
    first = stack[0]
    return (
        (not rule.modality or first.modality == rule.modality.upper())
        and _described_as(stack, rule)
        and (rule.slices is None or rule.slices[0] <= len(stack) <= rule.slices[1])
    )


def _described_as(stack: Sequence[Frame], rule: SeriesRule) -> bool:
    if not rule.description:
        return True
    return re.search(rule.description, stack[0].description, re.IGNORECASE) is not None


def _spelled(rule: SeriesRule) -> str:
    """Return the rules as a cohort file spells them."""
    parts = []
    if rule.modality:
        parts.append(f"modality {rule.modality}")
    if rule.description:
        parts.append(f"a description like '{rule.description}'")
    if rule.slices is not None:
        parts.append(f"{rule.slices[0]} to {rule.slices[1]} slices")
    return ", ".join(parts)


def _listing(stacks: Sequence[Sequence[Frame]], rule: SeriesRule | None) -> str:
    """Return what was found, without the descriptions: people write names into them."""
    lines: list[str] = []
    for stack in stacks[:_MOST_LISTED]:
        text = _described(stack)
        if rule is not None and rule.description:
            text += f", description {'fits' if _described_as(stack, rule) else 'does not fit'}"
        lines.append(f"({len(lines) + 1}) {text}")
    if len(stacks) > _MOST_LISTED:
        lines.append(f"and {len(stacks) - _MOST_LISTED} more")
    series = len({stack[0].series for stack in stacks})
    split = "" if series == len(stacks) else f" in {series} series, by size and direction"
    return f"{len(stacks)} stacks of slices{split}: {'; '.join(lines)}"


def _described(stack: Sequence[Frame]) -> str:
    """Return what a stack is, for people, without anything that identifies somebody."""
    first = stack[0]
    modality = first.modality if re.fullmatch(r"[A-Z]{2,16}", first.modality) else "no modality"
    slices = f"{len(stack)} slice{'s' if len(stack) > 1 else ''}"
    text = f"{modality}, {slices} of {first.columns} x {first.rows}"
    try:
        _, affine, stated = _geometry(stack)
    except ScanError:
        return text + ", no even stack"
    return f"{text}, {millimetres(spacing_of(affine))}" if stated else text


# -- geometry --------------------------------------------------------------------------------------


def _geometry(stack: Sequence[Frame]) -> tuple[list[Frame], Matrix, bool]:
    """Return the frames in order, the affine in LPS, and whether the voxel size is stated.

    Raises:
        ScanError: If they are no stack of parallel slices at even steps.
    """
    first = stack[0]
    located = [f for f in stack if f.position is not None and f.orientation is not None]
    if len(located) < len(stack):
        if len(stack) > 1:
            multi = first.frames > 1
            raise ScanError(
                "the geometry of the DICOM "
                + ("multi-frame file" if multi else "series")
                + " cannot be derived",
                expected="a position and a direction for every slice",
                got=f"{len(stack) - len(located)} of {len(stack)} slices without",
                remedy="Export the series again with its geometry"
                + (", or as one file per slice" if multi else ""),
            )
        between_rows, between_columns = first.pixel_mm or (1.0, 1.0)
        return list(stack), np.diag([between_columns, between_rows, 1.0, 1.0]), bool(first.pixel_mm)
    if any(frame.pixel_mm is None or min(frame.pixel_mm) <= 0 for frame in stack):
        raise ScanError(
            "the DICOM series does not state its pixel size",
            expected="PixelSpacing, two positive numbers",
            got=f"{sum(not f.pixel_mm or min(f.pixel_mm) <= 0 for f in stack)} of {len(stack)}"
            " slices without",
            remedy="Export the series again with its geometry",
        )
    planes = [_plane(frame) for frame in stack]
    common, size = planes[0], (first.columns, first.rows, 1)
    apart = max(_apart(plane, common, size) for plane in planes)
    if apart > CORNER_MM:
        raise ScanError(
            "slices of the DICOM series are not parallel or of one pixel size",
            expected=f"corners that lie alike within {CORNER_MM} mm",
            got=f"{apart:.3g} mm between corners of two slices",
            remedy="Export the whole series again",
        )
    affine = common.copy()
    normal = np.cross(common[:3, 0], common[:3, 1])
    normal /= np.linalg.norm(normal)
    if len(stack) == 1:
        affine[:3, 2] = normal * (first.thickness_mm if first.thickness_mm > 0 else 1.0)
        return list(stack), affine, True
    origins = np.array([frame.position for frame in stack])
    along = origins @ normal
    order = np.argsort(along, kind="stable")
    _check_steps(origins[order], along[order], [stack[i] for i in order])
    ordered = [stack[i] for i in order]
    affine[:3, 3] = origins[order[0]]
    affine[:3, 2] = (origins[order[-1]] - origins[order[0]]) / (len(stack) - 1)
    return ordered, affine, True


def _plane(frame: Frame) -> Matrix:
    """Return the affine of a slice `(4, 4)` in LPS, its third column 0.

    Raises:
        ScanError: If its rows and columns are not at right angles.
    """
    row, column = np.reshape(frame.orientation or (), (2, 3))
    between_rows, between_columns = frame.pixel_mm or (0.0, 0.0)
    plane = np.zeros((4, 4))
    plane[:3, 0], plane[:3, 1] = row * between_columns, column * between_rows
    plane[:3, 3], plane[3, 3] = frame.position, 1.0
    length = max(float(np.linalg.norm(row)), 1e-9)
    straight = plane.copy()
    straight[:3, 0] = row / length * between_columns
    upright = column - (column @ row) / length**2 * row
    straight[:3, 1] = upright / max(float(np.linalg.norm(upright)), 1e-9) * between_rows
    apart = apart_mm(plane, straight, (frame.columns, frame.rows, 1))
    if apart > CORNER_MM:
        raise ScanError(
            "the direction of a DICOM slice is broken",
            expected="two directions of length 1 at right angles",
            got=f"corners {apart:.3g} mm from where such directions put them",
            remedy="Export the series again",
        )
    return straight


def _apart(plane: Matrix, common: Matrix, size: tuple[int, ...]) -> float:
    """Return how far apart the corners of two slices are, laid upon each other, in mm."""
    moved = plane.copy()
    moved[:3, 3] = common[:3, 3]
    return apart_mm(moved, common, size)


def _check_steps(origins: Matrix, along: Matrix, stack: Sequence[Frame]) -> None:
    """Refuse slices that do not follow each other at even steps.

    Args:
        origins: First pixels `(n, 3)` in mm, in order along the normal.
        along: `(n,)`, in mm along the normal.
        stack: The slices, likewise.

    Raises:
        ScanError: If they do not; the volume read would look fine and be wrong.
    """
    again = "Export the whole series again"
    n = len(stack)
    gaps = np.diff(along)
    span = float(along[-1] - along[0])
    same = gaps <= max(1e-3, 0.02 * float(np.median(gaps)))
    if same.any():
        images = Counter((frame.image, frame.index) for frame in stack if frame.image)
        copies = sum(count - 1 for count in images.values())
        if copies:
            raise ScanError(
                "files of the DICOM series are there twice",
                expected="every image once",
                got=f"{copies} copies among {n} slices",
                remedy="Remove the copies",
            )
        places = int((~same).sum()) + 1
        sizes = np.diff(np.flatnonzero(np.concatenate([[True], ~same, [True]])))
        if (sizes == sizes[0]).all():
            raise ScanError(
                "the DICOM series holds several volumes at the same positions (a time series,"
                " several echoes or several weightings)",
                expected="one volume",
                got=f"{int(sizes[0])} slices at each of {places} positions",
                remedy="Split the series and keep the one volume that is meant",
            )
        raise ScanError(
            "slices of the DICOM series are doubled",
            expected="one slice per position",
            got=f"{n} slices at {places} positions",
            remedy="Keep one slice per position, or export the series again",
        )
    even = origins[0] + np.outer(np.arange(n) / (n - 1), origins[-1] - origins[0])
    off = float(np.linalg.norm(origins - even, axis=1).max())
    usual = float(np.median(gaps))
    if off <= CORNER_MM and gaps.max() <= 1.5 * usual:
        return
    multiples = gaps / usual
    missing = int((np.rint(multiples) - 1).sum())
    if missing and np.abs(multiples - np.rint(multiples)).max() < 0.1:
        raise ScanError(
            "slices of the DICOM series are missing",
            expected=f"{n + missing} slices every {usual:.4g} mm over {span:.4g} mm",
            got=f"{n} slices, {missing} missing in {int((multiples > 1.5).sum())} gaps",
            remedy=again,
        )
    if gaps.max() - gaps.min() > max(CORNER_MM, 0.01 * usual):
        raise ScanError(
            "slices of the DICOM series are unevenly spaced",
            expected="one distance between neighbouring slices",
            got=f"distances from {gaps.min():.4g} to {gaps.max():.4g} mm",
            remedy="Export the whole series again, or resample it to even slices",
        )
    raise ScanError(
        "slices of the DICOM series do not follow a straight line",
        expected=f"first pixels within {CORNER_MM} mm of it",
        got=f"one {off:.3g} mm aside",
        remedy=again,
    )


# -- pixels ----------------------------------------------------------------------------------------


def _pixels(stack: Sequence[Frame]) -> tuple[np.ndarray, str, np.ndarray | None]:
    """Return the values `(X, Y, Z)` float32 of an ordered stack, the type as read, and padding.

    Padding is where the scanner saw nothing: bool `(X, Y, Z)`, or None if there is none. It is
    not to be used in computations of the image (PS3.3 C.7.5.1.1.2), and its number may be any;
    it is given the lowest of the image's own.

    Raises:
        ScanError: If a file cannot be read, or says something else than its header.
    """
    first = stack[0]
    refuse_size((first.columns, first.rows, len(stack)), first.pixel_bytes)
    padding = np.zeros((len(stack), first.rows, first.columns), bool) if first.padding else None
    volume = np.empty((len(stack), first.rows, first.columns), np.float32)
    by_file: dict[Path, list[int]] = {}
    for place, frame in enumerate(stack):
        by_file.setdefault(frame.file, []).append(place)
    dtype = ""
    for places in by_file.values():
        values = _file_values(stack[places[0]])
        dtype = dtype or str(values.dtype)
        for place in places:
            frame = stack[place]
            part = values[frame.index]
            if padding is not None and frame.padding:
                slope, intercept = frame.applied
                stored = (part.astype(np.float64) - intercept) / slope
                low, high = frame.padding
                padding[place] = (stored > low - 0.5) & (stored < high + 0.5)
                if frame.modality == "CT" and high * slope + intercept < _LEAST_HU:
                    padding[place] |= part < _LEAST_HU  # lossy compression blurs the number
            volume[place] = part if frame.rescale == frame.applied else _rescaled(part, frame)
    if padding is None or padding.all() or not padding.any():
        return volume.T, dtype, None
    volume[padding] = volume.min(where=~padding, initial=np.inf)
    return volume.T, dtype, padding.T


def _rescaled(values: np.ndarray, frame: Frame) -> np.ndarray:
    """Return the values of one frame with its own slope and intercept instead of the file's.

    Raises:
        ScanError: If what the file's were applied to was no whole number: then it was not this.
    """
    slope, intercept = frame.applied
    stored = (values.astype(np.float64) - intercept) / slope
    whole = np.rint(stored)
    if np.abs(stored - whole).max() > 1e-3:
        raise ScanError(
            "the rescaling of a multi-frame DICOM file cannot be followed",
            expected="whole numbers as they were stored",
            got=f"numbers up to {np.abs(stored - whole).max():.2g} off",
            remedy="Export the series as one file per slice, or as NIfTI",
        )
    own_slope, own_intercept = frame.rescale
    return np.asarray(whole * own_slope + own_intercept)


def _file_values(frame: Frame) -> np.ndarray:
    """Return what SimpleITK reads from a frame's file, `(frames, rows, columns)`.

    Raises:
        ScanError: If it cannot, or understands the header in another way.
    """
    import SimpleITK

    _hold(frame)
    SimpleITK.ProcessObject.GlobalWarningDisplayOff()
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(frame.file))
    try:
        with complaints():  # GDCM tries its decoders in turn, and each says that it is not the one
            image = reader.Execute()
    except RuntimeError as error:  # the one exception SimpleITK has
        raise _unread(frame) from error
    stated = (frame.columns, frame.rows, frame.frames)
    size = tuple(image.GetSize()) + (1,) * (3 - image.GetDimension())
    if size != stated or image.GetNumberOfComponentsPerPixel() != 1:
        raise ScanError(
            "two readers disagree about the size of a DICOM file",
            expected=f"{times(stated)} as its header says",
            got=f"{times(size)}, {image.GetNumberOfComponentsPerPixel()} numbers per pixel",
            remedy="Export the series again",
        )
    if frame.frames == 1 and frame.position and frame.orientation and frame.pixel_mm:
        seen = np.zeros((4, 4))
        directions = np.reshape(image.GetDirection(), (3, 3))
        spacing = image.GetSpacing()[:2]
        if frame.modality in _PROJECTIONS:
            # GDCM gives the size at the detector, or 1 mm, also where that in the body is stated.
            spacing = frame.pixel_mm[::-1]
        seen[:3, :2] = directions[:, :2] * spacing
        seen[:3, 3], seen[3, 3] = image.GetOrigin(), 1.0
        apart = apart_mm(seen, _plane(frame), stated)
        if apart > CORNER_MM:
            raise ScanError(
                "two readers disagree about the geometry of a DICOM file",
                expected=f"the same corners within {CORNER_MM} mm",
                got=f"corners {apart:.3g} mm apart",
                remedy="Convert the series to NIfTI with a DICOM converter, and check it",
            )
    values: np.ndarray = SimpleITK.GetArrayFromImage(image)
    return values.reshape(frame.frames, frame.rows, frame.columns)


def _hold(frame: Frame) -> None:
    """Hold a file's pixels to what its header says of them, before they are unpacked.

    Raises:
        ScanError: If there are fewer bytes than pixels take, or a compressed frame is of another
            size or does not end.
    """
    size = frame.columns * frame.rows * frame.frames * frame.pixel_bytes
    held = frame.file.stat().st_size
    if frame.syntax == _DEFLATED:
        refuse_packed(held, size)
    elif frame.syntax in _UNCOMPRESSED and held < size:
        raise _unread(frame)
    elif frame.syntax in _COMPRESSIONS:
        refuse_packed(held, size, math.inf)
        try:
            pixels = pydicom.dcmread(frame.file, force=True, specific_tags=["PixelData"]).PixelData
            streams = list(generate_frames(pixels, number_of_frames=frame.frames))
        except Exception as error:  # pydicom lets through whatever its converters raise
            raise _unread(frame) from error
        if len(streams) != frame.frames:
            raise _unread(frame)
        for stream in streams:
            if frame.syntax == _RLE:
                continue
            stated = _size_of(stream)
            whole = b"\xff\xd9" in stream[-16:]  # end of the image; padding may follow
            if not whole or stated not in (None, (frame.columns, frame.rows)):
                raise _unread(frame)


def _size_of(stream: bytes) -> tuple[int, int] | None:
    """Return columns and rows that a JPEG, JPEG-LS or JPEG 2000 stream states, if it does.

    ISO 10918-1 B.2.2 (and JPEG-LS alike): start-of-frame markers C0 to CF without C4, C8 and CC,
    and F7. ISO 15444-1 A.5.1: marker 51, of which the offset of the image is taken off.
    """
    place = stream.find(b"\xff\x4f\xff\x51")
    if 0 <= place < 256:
        right, down, left, top = struct.unpack(">4I", stream[place + 8 : place + 24].ljust(16))
        return right - left, down - top
    place = 2
    while place + 9 <= len(stream) and stream[place] == 0xFF:
        marker = stream[place + 1]
        if marker == 0xFF:  # may fill up before a marker
            place += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = struct.unpack(">2H", stream[place + 5 : place + 9])
            return columns, rows
        place += 2 + int.from_bytes(stream[place + 2 : place + 4], "big")
    return None


def _unread(frame: Frame) -> ScanError:
    """Return why the pixels of a file could not be read."""
    syntax = UID(frame.syntax)
    name = syntax.name if frame.syntax else "no transfer syntax"
    if frame.syntax and frame.syntax not in (*_UNCOMPRESSED, *_COMPRESSIONS):
        return ScanError(
            "the compression of the DICOM file is not read",
            expected="an uncompressed series, RLE, JPEG, JPEG-LS or JPEG 2000",
            got=name,
            remedy="Export the series uncompressed (Explicit VR Little Endian)",
        )
    return ScanError(
        "the pixels of a DICOM file are damaged, cut short or of a kind that is not read",
        expected=f"{times((frame.columns, frame.rows, frame.frames))} grey values",
        got=f"{frame.file.name}, {name}",
        remedy="Export or copy the series again",
    )
