"""MONAI transforms between a patient's scan on disk and the grid a network sees.

Importing this module imports MONAI (seconds), so it is imported only when a scan is read.

Geometry of volumes: the grid of a modality is axis-aligned (RAS+), of the declared size and
spacing, and centred on the centre of the scan's own field of view. One interpolation takes the
scan there, whatever its orientation or tilt, so the grid's affine is exact.

Geometry of pictures: rows run downwards as on a screen. A single-slice volume is turned the way
a viewer shows it: axial L-P, coronal L-I, sagittal A-I (columns to the right, rows downwards).
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import ImageReader, MetaTensor, NibabelReader, PILReader
from monai.transforms import (
    Compose,
    MapTransform,
    NormalizeIntensityd,
    Orientation,
    Orientationd,
    SpatialResample,
)
from monai.transforms.utils_pytorch_numpy_unification import percentile
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from PIL import Image as Picture
from PIL import ImageOps
from scipy.ndimage import gaussian_filter1d
from torch.nn import functional as F

from dymo_med.types import ModalitySpec

KEY = "image"
FACTS = "facts"
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
MOST_VOXELS = 2**31

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

# Size of a voxel of a NIfTI file in mm, by the header's unit.
_UNIT_MM = {"meter": 1000.0, "micron": 1e-3}

# The way a viewer shows a slice, by the world axis it is perpendicular to.
_SCREEN = {"S": "LPS", "I": "LPS", "A": "LIA", "P": "LIA", "R": "AIR", "L": "AIR"}


class ScanError(Exception):
    """A scan cannot be used; says why without naming the patient.

    Args:
        what: What is wrong, as a short clause.
        expected: What would have been right.
        got: What was found instead.
        remedy: What the user can do.
    """

    def __init__(self, what: str, expected: str = "", got: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.got = got
        self.remedy = remedy


def times(numbers: Sequence[float]) -> str:
    """Return numbers as a size for people.

    Example:
        >>> times((240, 240, 155))
        '240 x 240 x 155'
    """
    return " x ".join(f"{number:g}" for number in numbers)


@dataclass(frozen=True)
class ScanFacts:
    """What is worth knowing of a scan as stored; nothing that identifies anybody.

    Attributes:
        size: Voxels per axis.
        dtype: Type of the stored numbers.
        spacing_mm: Voxel size; None for a picture, which states none.
        warning: A sentence for the report, or nothing.
    """

    size: tuple[int, ...]
    dtype: str
    spacing_mm: tuple[float, ...] | None = None
    warning: str = ""

    def shown(self) -> dict[str, str]:
        """Return the facts as text by name."""
        facts = {"size": times(self.size), "dtype": self.dtype}
        if self.spacing_mm is not None:
            facts["spacing"] = f"{times([float(f'{s:.4g}') for s in self.spacing_mm])} mm"
        return facts


def _too_large(shape: Sequence[int]) -> None:
    """Refuse a header that claims an absurd size, before memory is asked for."""
    if any(n < 1 for n in shape) or int(np.prod([int(n) for n in shape])) > MOST_VOXELS:
        raise ScanError(
            "the header states a size that cannot be right",
            expected=f"at least one and at most {MOST_VOXELS} voxels",
            got=f"shape {tuple(int(n) for n in shape)}",
            remedy="Export the scan again",
        )


class NiftiReader(NibabelReader):  # type: ignore[misc]
    """NIfTI through nibabel: affine in mm, RAS+; trailing axes of length one dropped."""

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the array `(X, Y, Z)` or `(X, Y, Z, n)` and its metadata.

        Raises:
            ScanError: If the file holds colours or an absurd size.
        """
        _too_large(img.shape)
        if img.get_data_dtype().fields is not None:
            raise ScanError(
                "the file holds colours, not grey values",
                expected="one number per voxel",
                remedy="Save the scan as a greyscale image",
            )
        array, _ = super().get_data(img)
        array = np.asarray(array)
        while array.ndim < 3:
            array = array[..., None]
        unit_mm = _UNIT_MM.get(img.header.get_xyzt_units()[0], 1.0)
        affine = np.diag([unit_mm, unit_mm, unit_mm, 1.0]) @ np.asarray(img.affine, dtype=float)
        stated = int(img.header["sform_code"]) > 0 or int(img.header["qform_code"]) > 0
        meta = {
            "affine": affine,
            "channels": "none" if array.ndim == 3 else "last",
            FACTS: ScanFacts(
                array.shape,
                str(img.get_data_dtype()),
                _spacing(affine),
                ""
                if stated
                else "The file does not state its orientation; the NIfTI default was used.",
            ),
        }
        return array, meta


class PictureReader(PILReader):  # type: ignore[misc]
    """PNG, JPEG and TIFF through Pillow, rows downwards as on a screen.

    Args:
        channels: 1 turns colours into grey by luminance; 3 keeps colours.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(converter=self._convert, reverse_indexing=False)
        self.channels = channels

    def _convert(self, picture: Picture.Image) -> Picture.Image:
        _too_large(picture.size)
        if getattr(picture, "n_frames", 1) > 1:
            raise ScanError(
                "the file holds several pictures",
                expected="one picture",
                got=f"{picture.n_frames} pictures",
                remedy="Keep the one that belongs to this visit",
            )
        stored = picture.mode
        picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            black = Picture.new("RGBA", picture.size, (0, 0, 0, 255))
            picture = Picture.alpha_composite(black, picture).convert("RGB")
        if self.channels == 3:
            picture = picture.convert("RGB")
        elif picture.mode not in ("L", "F") and not picture.mode.startswith("I"):
            # 16 and 32 bit grey stays as it is: converting it to "L" would clip it.
            picture = picture.convert("L")
        picture.info["stored mode"] = stored
        return picture

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the array `(rows, columns)` or `(rows, columns, 3)` and its metadata."""
        array = np.asarray(img)
        meta = {
            "channels": "none" if array.ndim == 2 else "last",
            FACTS: ScanFacts(img.size, str(img.info["stored mode"])),
        }
        return array.astype(np.float32), meta


class SimpleITKReader(ImageReader):  # type: ignore[misc]
    """NRRD, MetaImage and DICOM series through SimpleITK, with the affine turned to RAS+."""

    def verify_suffix(self, filename: Any) -> bool:
        """Return True: which file goes to which reader is decided by `reader_for`."""
        return True

    def read(self, data: Any, **kwargs: Any) -> Any:
        """Return the SimpleITK image of a file, or of the one series in a folder.

        Raises:
            ScanError: If it cannot be read, or a folder does not hold exactly one whole series.
        """
        import SimpleITK

        path = Path(data[0] if isinstance(data, tuple) else data)
        SimpleITK.ProcessObject.GlobalWarningDisplayOff()
        try:
            if path.is_dir():
                return self._read_series(path)
            reader = SimpleITK.ImageFileReader()
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
            _too_large(reader.GetSize())
            return reader.Execute()
        except RuntimeError as error:  # the one exception SimpleITK has
            raise ScanError(
                "the file is damaged or not what its name says",
                got=type(error).__name__,
                remedy="Export or copy it again",
            ) from error

    def _read_series(self, folder: Path) -> Any:
        import SimpleITK

        series = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        if len(series) != 1:
            raise ScanError(
                "the folder does not hold one DICOM series",
                expected="one series",
                got=f"{len(series)} series",
                remedy="Keep the one series that is this modality in the folder",
            )
        names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
        header = SimpleITK.ImageFileReader()
        directions, origins = [], []
        for name in names:
            header.SetFileName(name)
            header.ReadImageInformation()
            _too_large(header.GetSize())
            frames = header.GetSize()[2] if len(header.GetSize()) > 2 else 1
            if frames > 1 and not header.HasMetaDataKey("0028|0030"):
                # SimpleITK makes up a spacing of 1 mm for enhanced multi-frame files.
                raise ScanError(
                    "the geometry of a multi-frame DICOM file cannot be read",
                    expected="one file per slice",
                    remedy="Convert the series to NIfTI and put that in its place",
                )
            axes = len(header.GetSize())
            directions.append(np.asarray(header.GetDirection(), dtype=float).reshape(axes, axes))
            origins.append(np.asarray(header.GetOrigin(), dtype=float))
        if len(names) > 1:
            _check_slices(np.stack(directions), np.stack(origins))
        if len(names) == 1:
            return header.Execute()
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(names)
        image = reader.Execute()
        if header.HasMetaDataKey("0028|0004"):
            image.SetMetaData("0028|0004", header.GetMetaData("0028|0004"))
        return image

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the array `(X, Y, Z)` and its metadata.

        Raises:
            ScanError: If the image has colours or more than three axes.
        """
        import SimpleITK

        axes = img.GetDimension()
        if img.GetNumberOfComponentsPerPixel() != 1 or axes > 3:
            raise ScanError(
                "the file holds more than one volume or colours",
                expected="3 axes and one number per voxel",
                got=f"{axes} axes, {img.GetNumberOfComponentsPerPixel()} numbers per voxel",
                remedy="Split the series or save it as greyscale",
            )
        array = SimpleITK.GetArrayFromImage(img).T  # (X, Y, Z)
        while array.ndim < 3:
            array = array[..., None]
        if img.HasMetaDataKey("0028|0004") and "MONOCHROME1" in img.GetMetaData("0028|0004"):
            array = array.max() + array.min() - array.astype(np.float32)  # stored as a negative
        lps = np.eye(4)
        directions = np.asarray(img.GetDirection(), dtype=float).reshape(axes, axes)
        lps[:axes, :axes] = directions * np.asarray(img.GetSpacing(), dtype=float)
        lps[:axes, 3] = img.GetOrigin()
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps
        meta = {
            "affine": affine,
            "channels": "none",
            FACTS: ScanFacts(array.shape, img.GetPixelIDTypeAsString(), _spacing(affine)),
        }
        return array, meta


def _check_slices(directions: np.ndarray, origins: np.ndarray) -> None:
    """Refuse slices that do not stack to a volume with right angles and even spacing.

    Args:
        directions: `(n, 3, 3)` direction cosines, a column per axis.
        origins: `(n, 3)` positions of the first pixel, in mm.

    Raises:
        ScanError: If they do not; the volume read would look fine and be wrong.
    """
    again = "Export the whole series again"
    if np.abs(directions - directions[0]).max() > 1e-3:
        raise ScanError("slices of the DICOM series are not parallel", remedy=again)
    normal = directions[0, :, 2]
    along = origins @ normal
    gaps = np.abs(np.diff(along))
    if gaps.max() - gaps.min() > max(0.1, 0.1 * float(np.median(gaps))):
        raise ScanError(
            "slices of the DICOM series are missing, doubled or unevenly spaced",
            expected="one distance between neighbouring slices",
            got=f"distances from {gaps.min():.3g} to {gaps.max():.3g} mm",
            remedy=again,
        )
    aside = origins - origins[0] - np.outer(along - along[0], normal)
    drift_mm = float(np.linalg.norm(aside, axis=1).max())
    if drift_mm > 1.0:
        raise ScanError(
            "slices of the DICOM series are shifted sideways (a tilted gantry)",
            expected="slices stacked along their normal",
            got=f"a drift of {drift_mm:.1f} mm",
            remedy="Straighten the series with a DICOM converter and bring the NIfTI file",
        )


def _plain(image: torch.Tensor) -> torch.Tensor:
    """Return the values without what MONAI keeps beside them."""
    return image.as_tensor() if isinstance(image, MetaTensor) else image


def _has_volume(affine: Any) -> bool:
    """Return whether a voxel has a finite volume that is not 0."""
    matrix = np.asarray(affine, dtype=float)
    spacing = _spacing(matrix)
    return bool(
        np.isfinite(matrix).all()
        and min(spacing) >= 1e-6
        and abs(np.linalg.det(matrix[:3, :3] / np.asarray(spacing))) >= 1e-3
    )


def _spacing(affine: Any) -> tuple[float, ...]:
    """Return the length of each voxel axis in mm, `(3,)`, of a 4 x 4 affine."""
    matrix = np.asarray(affine, dtype=float)[:3, :3]
    return tuple(float(s) for s in np.sqrt((matrix**2).sum(0)))


class LoadScand(MapTransform):  # type: ignore[misc]
    """Reads a scan with the one reader that its name calls for.

    MONAI's own `LoadImaged` tries its other readers when the chosen one fails, and some of those
    make up an affine.

    Args:
        channels: Channels of the modality.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(keys=KEY)
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Read the file at `data["image"]`, and what is worth knowing of it into `facts`.

        The image is `(C, *spatial)`. A picture, which has no place in the world, is a plain tensor:
        keeping track of an affine took longer than all the work on a small one.

        Raises:
            ScanError: If it cannot be read.
        """
        path = Path(data[KEY])
        reader: ImageReader
        name = path.name.lower()
        if path.is_dir() or name.endswith((".nrrd", ".nhdr", ".mha", ".mhd")):
            reader = SimpleITKReader()
        elif name.endswith(PICTURES):
            reader = PictureReader(self.channels)
        else:
            reader = NiftiReader()
        try:
            if path.is_file() and path.stat().st_size == 0:
                raise ScanError("the file is empty", remedy="Export or copy it again")
            array, meta = reader.get_data(reader.read((str(path),)))
        except UNREADABLE as error:
            raise ScanError(
                "the file is damaged, cut short or not what its name says",
                got=type(error).__name__,
                remedy="Export or copy it again",
            ) from error
        values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
        values = values[None] if meta["channels"] == "none" else values.movedim(-1, 0)
        image = values
        if "affine" in meta:
            image = MetaTensor(values, affine=torch.from_numpy(meta["affine"]))
        return {**data, KEY: image, FACTS: meta[FACTS]}


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
                remedy="Give the image as NIfTI or DICOM, or take spacing_mm out of cohort.yaml",
            )
        if isinstance(image, MetaTensor) and not _has_volume(image.affine):
            raise ScanError(
                "the header's geometry is broken: a voxel has no volume",
                expected="a positive spacing along three different directions",
                remedy="Export the scan again with its position and spacing",
            )
        values = _plain(image)
        lowest, highest = values.aminmax()  # NaN if there is one
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise ScanError(
                "the scan holds voxels that are not numbers",
                expected="finite voxel values",
                got=f"{int((~torch.isfinite(values)).sum())} voxels that are NaN or infinite",
                remedy="Export the scan again",
            )
        if lowest == highest:
            raise ScanError(
                "every voxel has the same value",
                expected="an image with contrast",
                remedy="Remove the file if the scan was not made, or export it again",
            )
        if self.spec.intensity == "zscore":
            inside = values[values != 0]
            if inside.min() == inside.max():
                raise ScanError(
                    "all voxels other than zero have the same value, so zscore leaves nothing",
                    remedy="Use intensity: percentile for masks",
                )
        return dict(data)


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
        values = _plain(image)
        low, high = percentile(values, (1, 99))
        if high == low:
            warnings.warn("The percentiles of a scan are equal: not scaled.", stacklevel=2)
            values = values - low
        else:
            values = ((values - low) / (high - low)).clamp(0, 1)
        if isinstance(image, MetaTensor):
            values = MetaTensor(values, affine=image.affine)
        return {**data, KEY: values}


class ToScreend(MapTransform):  # type: ignore[misc]
    """A single-slice volume becomes a picture `(C, rows, columns)` as a viewer shows it."""

    def __init__(self, channels: int) -> None:
        super().__init__(keys=KEY)
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the picture, and its `pixel_mm` (rows, columns)."""
        image = data[KEY]
        pixel_mm = (1.0, 1.0)
        if image.ndim == 4:
            axis = max(a for a in range(3) if image.shape[1 + a] == 1)
            code = nib.aff2axcodes(np.asarray(image.affine, dtype=float))[axis]
            image = Orientation(axcodes=_SCREEN[code], labels=None)(image)
            spacing = _spacing(image.affine)
            pixel_mm = (spacing[1], spacing[0])
            # (1, columns, rows, 1) -> (1, rows, columns)
            image = image.as_tensor()[..., 0].transpose(1, 2)
        if len(image) < self.channels:
            image = image.expand(self.channels, *image.shape[1:])
        return {**data, KEY: image, "pixel_mm": pixel_mm}


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


class CentredGridd(MapTransform):  # type: ignore[misc]
    """Resamples a volume to an RAS+ grid centred on the scan's field of view.

    Along an axis that becomes coarser the scan is smoothed first, to a resolution (full width at
    half maximum) of the new spacing, so that a thin structure is blurred, not skipped.

    Args:
        size: Voxels per axis of the grid.
        spacing_mm: Voxel size of the grid.
        pad_minimum: Outside the field of view take the scan's minimum instead of 0.
    """

    def __init__(self, size: Sequence[int], spacing_mm: Sequence[float], pad_minimum: bool) -> None:
        super().__init__(keys=KEY)
        self.size = np.asarray(size)
        self.spacing_mm = np.asarray(spacing_mm, dtype=float)
        self.pad_minimum = pad_minimum
        self.resample = SpatialResample(
            mode="bilinear", padding_mode="zeros", align_corners=True, dtype=torch.float32
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the volume `(1, X, Y, Z)` on the grid; its affine is the grid's."""
        image = data[KEY]
        values = image.as_tensor().float().numpy()
        affine = np.asarray(image.affine, dtype=float)
        for axis, (new, old) in enumerate(zip(self.spacing_mm, _spacing(affine), strict=True)):
            if new > 1.1 * old:
                sigma = float(np.sqrt((new / old) ** 2 - 1) / 2.355)
                values = gaussian_filter1d(values, sigma, axis=1 + axis, mode="nearest")
        last = np.asarray(image.shape[1:]) - 1
        centre = affine[:3, :3] @ (last / 2) + affine[:3, 3]
        grid = np.diag([*self.spacing_mm, 1.0])
        grid[:3, 3] = centre - self.spacing_mm * (self.size - 1) / 2
        floor = float(values.min()) if self.pad_minimum else 0.0
        out = self.resample(
            MetaTensor(torch.from_numpy(values - floor), affine=torch.from_numpy(affine)),
            dst_affine=torch.from_numpy(grid),
            spatial_size=[int(n) for n in self.size],
        )
        return {**data, KEY: MetaTensor(out.as_tensor() + floor, affine=torch.from_numpy(grid))}


def pipeline(spec: ModalitySpec) -> Compose:
    """Return the transforms of one image modality, from `{"image": path}` to its grid.

    zscore runs last, over the grid's voxels other than 0 (0 stays 0). percentile runs first, over
    the scan as stored, so that padding cannot shift the percentiles.

    Args:
        spec: The modality.
    """
    channels, *size = spec.shape
    steps: list[Any] = [LoadScand(channels), CheckScand(spec)]
    if spec.intensity == "percentile":
        steps.append(PercentileRanged())
    if len(size) == 3:
        steps += [
            Orientationd(keys=KEY, axcodes="RAS", labels=None),
            CentredGridd(size, spec.spacing_mm, pad_minimum=spec.intensity == "none"),
        ]
    else:
        steps += [ToScreend(channels), FitFramed(size, spec.spacing_mm)]
    if spec.intensity == "zscore":
        steps.append(NormalizeIntensityd(keys=KEY, nonzero=True))
    return Compose(steps)


def read_scan(transforms: Compose, path: Path) -> tuple[MetaTensor, ScanFacts]:
    """Return the scan at `path` on its modality's grid, float32 `(C, *spatial)`, and its facts.

    Args:
        transforms: What `pipeline` returned.
        path: A file, or the folder of a DICOM series.

    Raises:
        ScanError: If the scan cannot be used.
    """
    try:
        data = transforms({KEY: str(path)})
        image = data[KEY]
        return image if isinstance(image, MetaTensor) else MetaTensor(image), data[FACTS]
    except RuntimeError as error:
        # Compose wraps whatever a transform raises; look for our own exception inside.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ScanError):
                raise cause from None
            cause = cause.__cause__
        raise
