"""MONAI transforms between a patient's scan on disk and the grid a network sees.

Importing this module imports MONAI (seconds), so it is imported only when a scan is read.

Geometry of volumes: the grid of a modality is axis-aligned (RAS+), of the declared size and
spacing, and centred on the centre of a field of view: the scan's own, or that of the patient's
reference scan (see `dymo_med.modalities.alignment`). One interpolation takes the scan there,
whatever its orientation, tilt or shear, so the grid's affine is exact.

Geometry of pictures: rows run downwards as on a screen. A single-slice volume is turned the way
a viewer shows it: axial L-P, coronal L-I, sagittal A-I (columns to the right, rows downwards).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, Orientation
from monai.transforms.utils_pytorch_numpy_unification import percentile
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from PIL import Image as Picture
from PIL import ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch.nn import functional as F

from dymo_med import limits
from dymo_med.modalities import dicom, nifti, packed, volumes
from dymo_med.modalities.alignment import Reference, beside
from dymo_med.modalities.descriptors import describe
from dymo_med.modalities.native import fingerprint, native
from dymo_med.modalities.resample import Resampler, Volume, centred, standardised
from dymo_med.modalities.scan import (
    ScanError,
    ScanFacts,
    has_volume,
    refuse_size,
    spacing_of,
)
from dymo_med.modalities.sniff import kind_of, refuse_misnamed
from dymo_med.types import FieldOfView, ModalitySpec, SeriesRule

KEY = "image"
FACTS = "facts"
FIELD = "field"
FILES = "files"
IDENTIFIERS = "identifiers"
REFERENCE = "reference"
PADDING = "padding"
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_FORMATS = tuple(c.format for c in (PngImageFile, JpegImageFile, TiffImageFile))
# Tags of TIFF, and a value of the last.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT, _SIGNED = 258, 262, 339, 2

# What nibabel, gzip, Pillow and numpy raise for files that are cut short or not what they claim.
UNREADABLE = (
    OSError,  # includes Pillow's UnidentifiedImageError and gzip's BadGzipFile
    EOFError,
    zlib.error,
    ImageFileError,
    HeaderDataError,
    WrapStructError,
    Picture.DecompressionBombError,
    SyntaxError,  # Pillow: broken PNG chunks
    ValueError,
    OverflowError,
)

# Stored numbers that are kept as they are until they are resampled.
_SMALL = (np.uint8, np.int8, np.int16)
# The way a viewer shows a slice, by the world axis it is perpendicular to.
_SCREEN = {"S": "LPS", "I": "LPS", "A": "LIA", "P": "LIA", "R": "AIR", "L": "AIR"}


def _read_picture(path: Path, channels: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the array `(rows, columns)` or `(rows, columns, 3)` of a PNG, JPEG or TIFF file.

    Through Pillow, rows downwards as on a screen.

    Args:
        path: The file.
        channels: 1 turns colours into grey by luminance; 3 keeps colours.

    Raises:
        ScanError: If it is damaged, absurdly large, or holds several pictures.
    """
    packed.hold_png(path)
    try:
        opened = Picture.open(path, formats=_FORMATS)
    except UnidentifiedImageError as error:
        if kind_of(path) != "a TIFF picture":
            raise
        raise ScanError(
            "the TIFF picture is damaged or of a kind that is not read",
            expected="whole numbers of 8 or 16 bits without a sign, for instance",
            got="another layout of its numbers",
            remedy="Save it as PNG, or as TIFF of 16 bits without a sign",
        ) from error
    with opened as picture:
        tags = getattr(picture, "tag_v2", {})
        bits = tags.get(_BITS_PER_SAMPLE, (8,))
        refuse_size(picture.size, len(picture.getbands()) * max(1, *bits, 8) // 8)
        packed.hold_tiff(path, tags, limits.MAX_UNPACKED_BYTES)
        if getattr(picture, "n_frames", 1) > 1:
            raise ScanError(
                "the file holds several pictures",
                expected="one picture",
                got=f"{picture.n_frames} pictures",
                remedy="Keep the one that belongs to this visit",
            )
        stored, size = picture.mode, picture.size
        picture.load()
        upright = ImageOps.exif_transpose(picture)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        black = Picture.new("RGBA", upright.size, (0, 0, 0, 255))
        upright = Picture.alpha_composite(black, upright).convert("RGB")
    if channels == 3:
        upright = upright.convert("RGB")
    elif upright.mode not in ("L", "F") and not upright.mode.startswith("I"):
        # 16 and 32 bit grey stays as it is: converting it to "L" would clip it.
        upright = upright.convert("L")
    array = np.asarray(upright)
    if tags and array.ndim == 2:
        array = _as_tagged(array, stored, tags)
    meta = {
        "channels": "none" if array.ndim == 2 else "last",
        FACTS: ScanFacts(size, stored),
    }
    return array.astype(np.float32), meta


def _as_tagged(array: np.ndarray, mode: str, tags: Mapping[int, Any]) -> np.ndarray:
    """Return the grey values of a TIFF file as its tags say that they are meant.

    Pillow takes numbers of 8 bits for unsigned ones, and those of 32 for signed ones, and turns
    black and white (WhiteIsZero) in pictures of up to 8 bits only (TIFF 6.0, sections 4 and 19).

    Args:
        array: As Pillow gives it.
        mode: Of the picture as stored.
        tags: Of the picture, by number.
    """
    bits = tags.get(_BITS_PER_SAMPLE, (1,))[0]
    kind = tags.get(_SAMPLE_FORMAT, (1,))[0]
    white_is_zero = tags.get(_PHOTOMETRIC) == 0
    if kind == _SIGNED and bits == 8 and mode == "L":
        array = array.astype(np.uint8).view(np.int8)
    elif kind != _SIGNED and bits == 32 and mode == "I":
        array = array.astype(np.int32).view(np.uint32)
    if not white_is_zero or bits <= 8:
        return array
    if array.dtype.kind == "f":  # of no stated range: within its own
        array = array.min() + array.max() - array
        return array
    turned: np.ndarray = 2**bits - 1 - array.astype(np.int64)
    return turned


def _like(image: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return values with the geometry of the image that they were made from."""
    return MetaTensor(values, affine=image.affine) if isinstance(image, MetaTensor) else values


def _plain(image: torch.Tensor) -> torch.Tensor:
    """Return the values without what MONAI keeps beside them."""
    return image.as_tensor() if isinstance(image, MetaTensor) else image


class LoadScand(MapTransform):  # type: ignore[misc]
    """Reads a scan with the one reader that its name calls for.

    MONAI's own `LoadImaged` tries its other readers when the chosen one fails, and some of those
    make up an affine.

    Args:
        channels: Channels of the modality.
        rule: Which series of a DICOM folder is meant.
    """

    def __init__(self, channels: int, rule: SeriesRule | None = None) -> None:
        super().__init__(keys=KEY)
        self.channels = channels
        self.rule = rule

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read the file at `data["image"]`, and what is worth knowing of it.

        That is `facts`, `files` (those it was read from), `identifiers` (of the patient, in the
        header) and, for a volume, `field`.

        The image is `(C, *spatial)`. A picture, which has no place in the world, is a plain tensor:
        keeping track of an affine took longer than all the work on a small one.

        Raises:
            ScanError: If it cannot be read.
        """
        path = Path(data[KEY])
        try:
            if path.is_file() and path.stat().st_size == 0:
                raise ScanError(
                    "the file is empty",
                    expected="a scan",
                    got="0 bytes",
                    remedy="Export or copy it again",
                )
            if path.is_file():
                refuse_misnamed(path)
            array, meta = self._read(path)
        except PermissionError as error:
            raise ScanError(
                "the file cannot be opened",
                expected="a file that this user may read",
                got=type(error).__name__,
                remedy="Check its permissions",
            ) from error
        except UNREADABLE as error:
            raise ScanError(
                "the file is damaged, cut short or not what its name says",
                expected="a whole file of the format that its name states",
                got=type(error).__name__,
                remedy="Export or copy it again",
            ) from error
        # A volume stays as small as it is stored until the grid's part of it is cut out.
        small = array.ndim == 3 and min(array.shape) > 1 and array.dtype in _SMALL
        dtype = array.dtype.newbyteorder("=") if small else np.dtype(np.float32)
        values = torch.from_numpy(array.astype(dtype, copy=False))
        values = values[None] if meta["channels"] == "none" else values.movedim(-1, 0)
        found = {
            **data,
            KEY: values,
            FACTS: meta[FACTS],
            FILES: meta.get(FILES, (path,)),
            IDENTIFIERS: meta.get(IDENTIFIERS, ()),
        }
        if meta.get(PADDING) is not None:
            found[PADDING] = torch.from_numpy(meta[PADDING])[None]
        if "affine" in meta:
            affine = meta["affine"]
            found[KEY] = MetaTensor(values, affine=torch.from_numpy(affine))
            found[FIELD] = FieldOfView(
                tuple(int(n) for n in values.shape[1:]),
                tuple(tuple(float(x) for x in row) for row in affine),
            )
        return found

    def _read(self, path: Path) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the array and what the reader says of it."""
        name = path.name.lower()
        if name.endswith(PICTURES) and path.is_file():
            return _read_picture(path, self.channels)
        if dicom.is_dicom(path):
            scan = dicom.read(path, self.rule)
        elif name.endswith(volumes.EXTENSIONS):
            scan = volumes.read(path)
        else:
            scan = nifti.read(path)
        return scan.values, {
            "affine": scan.affine,
            "channels": "none" if scan.values.ndim == 3 else "last",
            FACTS: scan.facts,
            FILES: scan.files,
            IDENTIFIERS: scan.identifiers,
            PADDING: scan.padding,
        }


class CheckScand(MapTransform):  # type: ignore[misc]
    """Refuses what would go wrong later without a word.

    Args:
        spec: The modality.
    """

    def __init__(self, spec: ModalitySpec) -> None:
        super().__init__(keys=KEY)
        self.spec = spec
        self.dims = len(spec.shape) - 1

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data unchanged.

        Raises:
            ScanError: See the messages.
        """
        image = data[KEY]
        size = tuple(image.shape[1:])
        wanted = "3 (X, Y, Z)" if self.dims == 3 else "a single slice (X, Y)"
        if len(image) != 1 and not (self.spec.shape[0] == 3 and len(image) == 3):
            raise ScanError(
                "the scan has 4 axes",
                expected=wanted,
                got=f"shape {(*size, len(image))}",
                remedy="Split the series and keep one volume",
            )
        slices = [n for n in size if n == 1]
        if self.dims == 3 and (len(size) != 3 or slices):
            raise ScanError(
                "the image is a single slice or a picture",
                expected="a volume with 3 axes of more than one voxel",
                got=f"shape {size}",
                remedy="Put the whole volume in its place",
            )
        if self.dims == 2 and len(size) == 3 and not slices:
            raise ScanError(
                "the image is a volume",
                expected=wanted,
                got=f"shape {size}",
                remedy="Save the one slice that is meant",
            )
        if self.dims == 2 and self.spec.spacing_mm and data[FACTS].spacing_mm is None:
            raise ScanError(
                "a picture states no pixel size, and this modality declares spacing_mm",
                expected="a pixel size in the file",
                got="none",
                remedy="Give the image as NIfTI or DICOM, or take spacing_mm out of cohort.yaml",
            )
        if isinstance(image, MetaTensor) and not has_volume(image.affine):
            raise ScanError(
                "the header's geometry is broken: a voxel has no volume",
                expected="a positive spacing along three different directions",
                got="an axis without length or direction",
                remedy="Export the scan again with its position and spacing",
            )
        values = _plain(image)
        array = values.numpy()
        lowest, highest = array.min(), array.max()  # NaN if there is one
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise ScanError(
                "the scan holds voxels that are not numbers",
                expected="finite voxel values",
                got=f"{int((~torch.isfinite(values)).sum())} voxels that are NaN or infinite",
                remedy=_without_nan(array),
                refused="finite",
            )
        if lowest == highest:
            raise ScanError(
                "every voxel has the same value",
                expected="an image with contrast",
                got="one value",
                remedy="Remove the file if the scan was not made, or export it again",
                refused="constant",
            )
        if self.spec.intensity == "zscore" and lowest <= 0 <= highest:
            inside = array != 0
            if array.max(where=inside, initial=lowest) == array.min(where=inside, initial=highest):
                raise ScanError(
                    "all voxels other than zero have the same value, so zscore leaves nothing",
                    expected="an image with contrast",
                    got="two values, one of them 0",
                    remedy="Use intensity: percentile for masks",
                    refused="constant",
                )
        return dict(data)


def _without_nan(array: np.ndarray) -> str:
    """Return what to do about voxels that are not numbers, by where they are.

    Programs that mask a scan write NaN around what they keep; then every corner is NaN.
    """
    corners = array[(slice(None), *(slice(None, None, max(1, n - 1)) for n in array.shape[1:]))]
    if np.isnan(corners).all():
        return (
            "The background is NaN, as some programs write a masked scan: set it to 0 and save the"
            " scan again (fslmaths IN -nan OUT, or numpy.nan_to_num)"
        )
    return "Find out where they come from, and make the scan anew from its source"


class MeasureNatived(MapTransform):  # type: ignore[misc]
    """Measures the scan as stored, before anything is done to it.

    For the quality gate (`modalities.native`), and for networks (`modalities.descriptors`).

    Args:
        relative: Whether intensities have no unit.
    """

    def __init__(self, relative: bool) -> None:
        super().__init__(keys=KEY)
        self.relative = relative

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with its measures among the facts."""
        image = data[KEY]
        affine = image.affine.numpy() if isinstance(image, MetaTensor) else None
        values = _plain(image).numpy()
        facts = replace(
            data[FACTS],
            native=native(values, affine),
            descriptors=describe(values, relative=self.relative),
            fingerprint=torch.from_numpy(fingerprint(values, affine)),
        )
        return {**data, FACTS: facts}


def percentiles(data: Mapping[Hashable, Any]) -> tuple[float, float, ScanFacts | None]:
    """Return the 1st and 99th percentile of the stored values, without padding, and the facts.

    Where the two are equal (a mask of something small), minimum and maximum take their place, and
    a warning among the facts says so.

    Args:
        data: What `LoadScand` returned.
    """
    values, facts = _plain(data[KEY]), data.get(FACTS)
    if (padding := data.get(PADDING)) is not None:
        values = values[~padding]
    if values.is_floating_point():
        low, high = (float(x) for x in percentile(values, (1, 99)))
    else:
        low, high = _of_integers(values.numpy(), (0.01, 0.99))
    if low == high:
        low, high = (float(x) for x in values.aminmax())
        warning = "98 % of its voxels have the same value; minimum and maximum were made 0 and 1."
        if facts is not None:
            facts = replace(facts, warnings=(*facts.warnings, warning))
    return low, high, facts


def _of_integers(values: np.ndarray, shares: Sequence[float]) -> list[float]:
    """Return quantiles of small integers as numpy does, by counting instead of sorting."""
    least = int(values.min())
    counts = np.zeros(int(values.max()) - least + 1, np.int64)
    for part in np.moveaxis(values, int(np.argmax(values.strides)), 0):
        counts += np.bincount(part.ravel("K").astype(np.int64) - least, minlength=len(counts))
    upto = np.cumsum(counts)
    found = []
    for share in shares:
        place = share * (values.size - 1)
        a, b = (
            least + np.searchsorted(upto, rank, "right") for rank in (int(place), -(-place // 1))
        )
        found.append(float(np.float32(a + (b - a) * (place - int(place)))))
    return found


class PercentileRanged(MapTransform):  # type: ignore[misc]
    """Maps the 1st and 99th percentile of the stored values to 0 and 1 and clips beyond.

    The same numbers as MONAI's `ScaleIntensityRangePercentilesd`, from one sort instead of two and
    without its bookkeeping, which for a small picture took longer than the work.
    """

    def __init__(self) -> None:
        super().__init__(keys=KEY)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the scan with its values between 0 and 1."""
        image = data[KEY]
        low, high, facts = percentiles(data)
        values = ((_plain(image) - low) / (high - low)).clamp(0, 1)
        return {**data, KEY: _like(image, values), FACTS: facts}


class TissueOfd(MapTransform):  # type: ignore[misc]
    """Puts a mask of the tissue beside a picture, as channels.

    Tissue is every voxel other than 0 and padding.
    """

    def __init__(self) -> None:
        super().__init__(keys=KEY)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the picture, without what is no tissue, and its mask: `(2 C, *spatial)`."""
        image, padding = data[KEY], data.get(PADDING)
        tissue = _plain(image) != 0
        if padding is not None:
            tissue = tissue & ~padding
        return {**data, KEY: _like(image, torch.cat([_plain(image) * tissue, tissue.float()]))}


class StandardisePictured(MapTransform):  # type: ignore[misc]
    """Standardises a picture over its tissue; see `resample.standardised`."""

    def __init__(self) -> None:
        super().__init__(keys=KEY)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the picture `(C, rows, columns)` without its mask."""
        values, share = data[KEY].numpy().reshape(2, -1, *data[KEY].shape[1:])
        return {**data, KEY: torch.from_numpy(standardised(values, share))}


class ToScreend(MapTransform):  # type: ignore[misc]
    """A single-slice volume becomes a picture `(C, rows, columns)` as a viewer shows it."""

    def __init__(self) -> None:
        super().__init__(keys=KEY)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the picture, and its `pixel_mm` (rows, columns)."""
        image = data[KEY]
        pixel_mm = (1.0, 1.0)
        if image.ndim == 4:
            axis = max(a for a in range(3) if image.shape[1 + a] == 1)
            code = nib.aff2axcodes(np.asarray(image.affine, dtype=float))[axis]
            image = Orientation(axcodes=_SCREEN[code], labels=None)(image)
            spacing = spacing_of(image.affine)
            pixel_mm = (spacing[1], spacing[0])
            # (1, columns, rows, 1) -> (1, rows, columns)
            image = image.as_tensor()[..., 0].transpose(1, 2)
        return {**data, KEY: image, "pixel_mm": pixel_mm}


class Channelsd(MapTransform):  # type: ignore[misc]
    """Gives a grey picture the channels of its modality, all alike.

    Args:
        channels: How many.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(keys=KEY)
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the picture `(channels, rows, columns)`."""
        image = data[KEY]
        return {**data, KEY: image.expand(self.channels, *image.shape[1:])}


class FitFramed(MapTransform):  # type: ignore[misc]
    """Resizes a picture so that it fits the frame, or to the declared pixel size.

    Bilinear, smoothed against aliasing; the aspect ratio of the thing shown is kept. What then
    sticks out of the frame is cropped on both sides, and what lacks is padded with 0.

    Args:
        size: Rows and columns of the frame.
        spacing_mm: Pixel size to resample to; empty = as large as fits the frame.
    """

    def __init__(self, size: Sequence[int], spacing_mm: Sequence[float]) -> None:
        super().__init__(keys=KEY)
        self.size = tuple(size)
        self.spacing_mm = tuple(spacing_mm)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the picture `(C, rows, columns)` in its frame."""
        image = data[KEY]
        extent = [n * p for n, p in zip(image.shape[1:], data["pixel_mm"], strict=True)]
        if self.spacing_mm:
            new = [e / s for e, s in zip(extent, self.spacing_mm, strict=True)]
        else:
            scale = min(s / e for s, e in zip(self.size, extent, strict=True))
            new = [e * scale for e in extent]
        pixels = [max(1, round(n)) for n in new]
        values = image[None]
        if tuple(pixels) != tuple(values.shape[2:]):
            values = F.interpolate(
                values, size=pixels, mode="bilinear", antialias=True, align_corners=False
            )
        margins: list[int] = []
        for n, s in zip(pixels, self.size, strict=True):
            before = (s - n) // 2 if s > n else s // 2 - n // 2  # negative crops
            margins = [before, s - n - before, *margins]  # torch pads the last axis first
        if any(margins):
            values = F.pad(values, margins)
        return {**data, KEY: values[0]}


class ToGridd(MapTransform):  # type: ignore[misc]
    """Takes a volume to an RAS+ grid centred on a field of view, and normalises it.

    Normalised values move with the scan: a shift of a hundredth of a voxel changes them by about
    a hundredth of what neighbours differ by.

    Args:
        spec: The modality; its shape, spacing and `intensity`.
    """

    def __init__(self, spec: ModalitySpec) -> None:
        super().__init__(keys=KEY)
        self.size = spec.shape[1:]
        self.spacing_mm = spec.spacing_mm
        self.intensity = spec.intensity

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the volume `(1, X, Y, Z)` on the grid; its affine is the grid's.

        The grid is that of `data["reference"]`; without one it is centred on the scan.

        Raises:
            ScanError: If scan and reference do not show the same place.
        """
        image, reference = data[KEY], data.get(REFERENCE)
        stored, affine = _plain(image)[0].numpy(), np.asarray(image.affine, dtype=float)
        facts = data[FACTS]
        if reference is None:
            grid = centred(affine, stored.shape, self.size, self.spacing_mm)
        else:
            grid = np.asarray(reference.grid, dtype=float)
            if warning := beside(data[FIELD], reference):
                facts = replace(facts, warnings=(*facts.warnings, warning))
        to_grid = Resampler.between(affine, stored.shape, grid, self.size)
        part = stored[to_grid.window]
        if self.intensity == "zscore":
            padding = data.get(PADDING)
            moved = _standard(to_grid, part, None if padding is None else padding[0].numpy())
        elif self.intensity == "percentile":
            low, high, facts = percentiles({**data, FACTS: facts})
            scale = np.float32(high - low)
            moved = to_grid(part, prepare=lambda p: ((p - np.float32(low)) / scale).clip(0, 1))
        else:
            lowest = np.float32(stored.min())  # outside of the scan
            moved = to_grid(part, prepare=lambda p: p - lowest) + lowest
        on_grid = MetaTensor(torch.from_numpy(moved)[None], affine=torch.from_numpy(grid))
        return {**data, KEY: on_grid, FACTS: facts}


def _standard(to_grid: Resampler, part: np.ndarray, padding: np.ndarray | None) -> Volume:
    """Return a volume on the grid, standardised over its tissue: voxels other than 0 and padding.

    Args:
        to_grid: Where to.
        part: What the grid sees of the volume.
        padding: Bool, of the whole volume: voxels that count for nothing; None = there is none.
    """
    if padding is None:
        return standardised(to_grid(part), to_grid(part, prepare=lambda p: p != 0))
    both = part, padding[to_grid.window]
    tissue = to_grid(*both, prepare=lambda p, outside: (p != 0) & ~outside)
    return standardised(to_grid(*both, prepare=lambda p, outside: p * ~outside), tissue)


def pipeline(spec: ModalitySpec) -> Compose:
    """Return the transforms of one image modality, from `{"image": path}` to its grid.

    zscore is over the grid's tissue, in voxels and parts of voxels (0 stays 0). percentile runs
    first, over the scan as stored, so that padding cannot shift the percentiles.

    Args:
        spec: The modality.
    """
    channels, *size = spec.shape
    steps: list[Any] = [
        LoadScand(channels, spec.dicom),
        CheckScand(spec),
        MeasureNatived(relative=spec.intensity != "none"),
    ]
    if len(size) == 3:
        return Compose([*steps, ToGridd(spec)])
    if spec.intensity == "percentile":
        steps.append(PercentileRanged())
    if spec.intensity == "zscore":
        steps.append(TissueOfd())
    steps += [ToScreend(), FitFramed(size, spec.spacing_mm)]
    if spec.intensity == "zscore":
        steps.append(StandardisePictured())
    return Compose([*steps, Channelsd(channels)])


@dataclass(frozen=True)
class GridScan:
    """A scan on its modality's grid.

    Attributes:
        image: Float32 `(C, *spatial)`; of a volume the affine is that of the grid.
        facts: What is worth knowing of the scan as stored.
        field: Where a volume as stored lies; None for a picture.
        files: The files it was read from.
        identifiers: What its header calls the patient; see `ModalityValue.identifiers`.
    """

    image: MetaTensor
    facts: ScanFacts
    field: FieldOfView | None
    files: tuple[Path, ...]
    identifiers: tuple[str, ...]


def read_scan(transforms: Compose, path: Path, reference: Reference | None = None) -> GridScan:
    """Return the scan at `path` on its modality's grid.

    Args:
        transforms: What `pipeline` returned.
        path: A file, or a folder of DICOM series.
        reference: The scan whose grid it shall share; None = its own.

    Raises:
        ScanError: If the scan cannot be used.
    """
    try:
        data = transforms({KEY: str(path), REFERENCE: reference})
        image = data[KEY]
        return GridScan(
            image if isinstance(image, MetaTensor) else MetaTensor(image),
            data[FACTS],
            data.get(FIELD),
            data[FILES],
            data[IDENTIFIERS],
        )
    except RuntimeError as error:
        # Compose wraps whatever a transform raises; look for our own exception inside.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ScanError):
                raise cause from None
            cause = cause.__cause__
        raise
