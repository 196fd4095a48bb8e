"""Slices of scans with the outlines of the regions on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dymo_med.inference.pictures import Array, png, slices, watermark
from dymo_med.inference.prediction_file import Plane
from dymo_med.inference.segmentation_file import CutPart

# Okabe and Ito's colours, which people who see few colours can tell apart; each region has its own
# kind of line besides, for print in grey.
COLOURS = ((86, 180, 233), (230, 159, 0), (204, 121, 167), (0, 158, 115), (240, 228, 66))
_PERIODS = (0, 8, 4, 12, 6)  # pixels of a dash and its gap; 0 = a full line
_PIXELS = 288  # longest side of a slice
_PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
_LETTERS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # left, right, top, bottom


def cut_place(regions: NDArray[np.bool_], body: NDArray[np.bool_]) -> tuple[int, int, int]:
    """Return the voxel to cut through: along each axis the largest cross-section of the lesion.

    Args:
        regions: Bool `(R, X, Y, Z)`, the outermost region first.
        body: Bool `(X, Y, Z)`; its middle is taken where nothing was found.
    """
    whole = regions[0] if regions[0].any() else body
    if not whole.any():
        x, y, z = (n // 2 for n in whole.shape)
        return x, y, z
    x, y, z = (
        int(whole.sum(axis=tuple(b for b in range(3) if b != axis)).argmax()) for axis in range(3)
    )
    return x, y, z


def outlined(
    volume: Array,
    spacing_mm: Sequence[float],
    regions: NDArray[np.bool_],
    at: Sequence[int],
    *,
    synthetic: bool,
) -> tuple[CutPart, ...]:
    """Return three slices of a scan with the outlines of the regions and the orientation.

    Args:
        volume: `(X, Y, Z)` RAS+.
        spacing_mm: Voxel size.
        regions: Bool `(R, X, Y, Z)`, outer regions first.
        at: Voxel to cut through.
        synthetic: Whether the scan was made up; its pixels then say so.
    """
    body = volume[volume != 0]
    low, high = np.percentile(body, [1, 99]) if body.size else (0.0, 1.0)
    grey = np.clip((volume - low) / max(float(high - low), 1e-6), 0, 1) * (volume != 0)
    x, y, z = spacing_mm
    sizes = ((y, x), (z, x), (z, y))
    cuts = slices(grey, at)
    masks = [slices(region, at) for region in regions]
    longest = max(n * mm for n, mm in zip(volume.shape, spacing_mm, strict=True))
    result = []
    for i, (plane, cut, mm) in enumerate(zip(_PLANES, cuts, sizes, strict=True)):
        rows, columns = (
            max(1, round(n * s * _PIXELS / longest)) for n, s in zip(cut.shape, mm, strict=True)
        )
        picture = (255 * _resized(cut, (rows, columns))).round().astype(np.uint8)
        picture = np.stack([picture] * 3, -1)
        if synthetic:
            picture = watermark(picture)
        for r, mask in enumerate(masks):
            inside = _resized(mask[i].astype(np.float32), (rows, columns)) > 0.5
            picture = _outline(picture, inside, r)
        picture = _lettered(picture, _LETTERS[plane])
        index = int(at[2 - i])
        result.append(
            CutPart(plane=plane, index=index, width=columns, height=rows, png=png(picture))
        )
    return tuple(result)


def _resized(image: Array, size: tuple[int, int]) -> Array:
    """Return a 2D image in 0..1 resampled to `size` (rows, columns), bilinear."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.float32))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR)).clip(0, 1)


def _outline(picture: Array, inside: NDArray[np.bool_], region: int) -> Array:
    """Return a picture with the edge of a region on it, two pixels wide, within the region."""
    from scipy.ndimage import binary_erosion

    edge = inside & ~binary_erosion(inside, iterations=2, border_value=0)
    period = _PERIODS[region % len(_PERIODS)]
    if period:
        rows, columns = np.indices(inside.shape)
        edge &= (rows + columns) % period < max(2, period * 5 // 8)
    result = picture.copy()
    result[edge] = COLOURS[region % len(COLOURS)]
    return result


def _lettered(picture: Array, letters: str) -> Array:
    """Return a picture with the letters of its left, right, upper and lower edge."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=13)
    width, height = image.size
    places = ((2, height // 2), (width - 2, height // 2), (width // 2, 1), (width // 2, height - 2))
    for letter, place, anchor in zip(letters, places, ("lm", "rm", "mt", "mb"), strict=True):
        draw.text(
            place, letter, fill="white", stroke_fill="black", stroke_width=1, font=font,
            anchor=anchor,
        )  # fmt: skip
    return np.asarray(image)
