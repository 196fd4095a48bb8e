"""Arrays to pictures: slices, saliency on top, SYNTHETIC in the pixels of what was made up."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dymo_med.inference.prediction_file import PicturePart, Plane, ScanPart, SliderPart, State

Array = NDArray[Any]

_PIXELS = 208  # longest side of one slice
_FRAME = 96  # longest side of one frame of a slider
_MOST_FRAMES = 64
SIGMA = 1.0  # smoothing of saliency, in voxels
_PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class Scan:
    """An image to show.

    Attributes:
        modality: Its name.
        values: `(C, X, Y, Z)` RAS+, or `(C, rows, columns)`.
        spacing_mm: Voxel size; empty = square pixels.
        state: Whether it was measured, or recovered and then trusted or rejected.
        zero_is_background: Whether exact zeros of a measured scan are outside the body.
        saliency: `(*spatial)`, for scans that were used; None = not computed.
    """

    modality: str
    values: Array
    spacing_mm: tuple[float, ...]
    state: State
    zero_is_background: bool
    saliency: Array | None = None


def draw(scans: Sequence[Scan]) -> tuple[ScanPart, ...]:
    """Return every scan as pictures, in the given order.

    Scans on one grid are cut at the same place: the middle of the body, and for the saliency
    where that of the measured scans is largest. Saliency is its absolute value, smoothed, on one
    scale for all scans, the made-up ones included.

    Args:
        scans: Of one patient.
    """
    from scipy.ndimage import gaussian_filter

    heats = {
        i: gaussian_filter(np.abs(s.saliency), SIGMA)
        for i, s in enumerate(scans)
        if s.saliency is not None
    }
    top = max((float(np.quantile(h, 0.999)) for h in heats.values()), default=0.0)
    heats = {i: np.clip(h / top, 0, 1) for i, h in heats.items()} if top > 0 else {}
    result = []
    for i, scan in enumerate(scans):
        inside = _foreground(scan, scans)
        grey = _grey(scan.values, inside)  # (C, *spatial) in 0..1
        centre = _centre(scan, scans)
        heat = heats.get(i)
        overlays: tuple[PicturePart, ...] = ()
        if heat is not None:
            overlays = _pictures(scan, grey, _hottest(i, scans, heats), heat)
        result.append(
            ScanPart(
                modality=scan.modality,
                state=scan.state,
                flat=scan.values.ndim == 3,
                spacing_mm=tuple(float(mm) for mm in scan.spacing_mm),
                pictures=_pictures(scan, grey, centre),
                slider=_slider(scan, grey, inside, centre[2], heat) if len(centre) == 3 else None,
                overlays=overlays,
            )
        )
    return tuple(result)


def _hottest(i: int, scans: Sequence[Scan], heats: dict[int, Array]) -> tuple[int, ...]:
    """Return where to cut a scan's saliency: as all measured ones on its grid are cut."""
    same = [j for j, h in heats.items() if h.shape == heats[i].shape]
    measured = [j for j in same if scans[j].state == "observed"] or same
    total = np.sum([heats[j] for j in measured], axis=0)
    return tuple(int(n) for n in np.unravel_index(int(np.argmax(total)), total.shape))


def _foreground(scan: Scan, scans: Sequence[Scan]) -> Array | None:
    """Return where there is a body, from measured scans on the same grid; None = everywhere."""
    if not scan.zero_is_background:
        return None
    same = [
        s.values
        for s in scans
        if s.state == "observed" and s.zero_is_background and s.values.shape == scan.values.shape
    ]
    if scan.state == "observed":
        same = [scan.values]
    return np.any([(v != 0).any(0) for v in same], axis=0) if same else None


def _centre(scan: Scan, scans: Sequence[Scan]) -> tuple[int, ...]:
    """Return the middle voxel of the body, the same for all scans on one grid."""
    first = next((s for s in scans if s.values.shape == scan.values.shape), scan)
    inside = _foreground(first, scans)
    if inside is None or not inside.any():
        return tuple(n // 2 for n in scan.values.shape[1:])
    return tuple(int(np.median(axis)) for axis in np.nonzero(inside))


def slices(volume: Array, at: Sequence[int]) -> tuple[Array, Array, Array]:
    """Cut a volume the way radiologists look at it.

    Args:
        volume: `(X, Y, Z)` RAS+.
        at: Voxel to cut through.

    Returns:
        Axial `(Y, X)` with the nose up and coronal `(Z, X)`, both with the patient's right on
        the left; sagittal `(Z, Y)` with the nose on the left.
    """
    x, y, z = at
    return (
        volume[::-1, ::-1, z].T,
        volume[::-1, y, ::-1].T,
        volume[x, ::-1, ::-1].T,
    )


def _pictures(
    scan: Scan, grey: Array, at: Sequence[int], heat: Array | None = None
) -> tuple[PicturePart, ...]:
    """Return the slices of one scan through a voxel.

    Args:
        scan: The scan.
        grey: `(C, *spatial)` in 0..1.
        at: The voxel.
        heat: `(*spatial)` in 0..1, laid over it.
    """
    cuts: list[Array]
    heats: list[Array | None]
    planes: tuple[Plane, ...]
    if grey.ndim == 3:
        cuts, heats, planes = [grey], [heat], ("flat",)
        index: tuple[int, ...] = (0,)
        spacings = [scan.spacing_mm or (1.0, 1.0)]
    else:
        x, y, z = scan.spacing_mm or (1.0, 1.0, 1.0)
        cuts = [np.stack(c) for c in zip(*(slices(g, at) for g in grey), strict=True)]
        heats = [None] * 3 if heat is None else list(slices(heat, at))
        planes, index = _PLANES, (at[2], at[1], at[0])
        spacings = [(y, x), (z, x), (z, y)]
    longest = max(
        n * s
        for c, mm in zip(cuts, spacings, strict=True)
        for n, s in zip(c.shape[1:], mm, strict=True)
    )
    result = []
    for plane, i, cut, hot, mm in zip(planes, index, cuts, heats, spacings, strict=True):
        drawn = _drawn(cut, _size(cut.shape[1:], mm, _PIXELS / longest), hot)
        if scan.state != "observed":
            drawn = watermark(drawn)
        height, width = drawn.shape[:2]
        result.append(PicturePart(plane=plane, index=i, width=width, height=height, png=png(drawn)))
    return tuple(result)


def _slider(
    scan: Scan, grey: Array, inside: Array | None, centre: int, heat: Array | None
) -> SliderPart:
    """Return the axial slices that show any body, at most 64, evenly spread."""
    depth = grey.shape[-1]
    body: Sequence[int] = range(depth)
    if inside is not None and inside.any():
        body = np.flatnonzero(inside.any(axis=(0, 1))).tolist()
    first, last = int(body[0]), int(body[-1])
    number = min(last - first + 1, _MOST_FRAMES)
    shown = sorted({round(i) for i in np.linspace(first, last, number)})
    x, y, _ = scan.spacing_mm or (1.0, 1.0, 1.0)
    rows, columns = grey.shape[2], grey.shape[1]
    size = _size((rows, columns), (y, x), _FRAME / max(rows * y, columns * x))
    frames, glows = [], []
    for z in shown:
        # The nose up, the patient's right on the left, as `slices` does.
        frame = _drawn(np.stack([g[::-1, ::-1, z].T for g in grey]), size)
        frames.append(watermark(frame) if scan.state != "observed" else frame)
        if heat is not None:
            glows.append(_glow_layer(_resize(heat[::-1, ::-1, z].T, size)))
    strip = np.concatenate(frames)
    if (strip == strip[..., :1]).all():
        strip = strip[..., 0]  # grey: a third of the bytes
    return SliderPart(
        width=size[1],
        height=size[0],
        slices=tuple(shown),
        start=int(np.argmin([abs(z - centre) for z in shown])),
        png=png(strip),
        heat=png(np.concatenate(glows)) if glows else None,
    )


def _size(shape: Sequence[int], mm: Sequence[float], scale: float) -> tuple[int, ...]:
    """Return the pixels of a slice whose longest side is given by `scale` pixels per mm."""
    return tuple(max(1, round(n * s * scale)) for n, s in zip(shape, mm, strict=True))


def _drawn(cut: Array, size: tuple[int, ...], heat: Array | None = None) -> Array:
    """Return a slice `(C, rows, columns)` in 0..1 as a uint8 picture of that size."""
    channels = cut if len(cut) == 3 else cut[[0]].repeat(3, 0)
    rgb = np.stack([_resize(c, size) for c in channels], -1)
    if heat is not None:
        layer = _glow_layer(_resize(heat, size)) / 255
        opacity = layer[..., 3:]
        rgb = (1 - opacity) * rgb * 0.85 + opacity * layer[..., :3]
    return np.asarray((255 * rgb).round().astype(np.uint8))


def _grey(values: Array, inside: Array | None) -> Array:
    """Return values stretched to 0..1 between the 1st and 99th percentile of the body."""
    body = values if inside is None or not inside.any() else values[:, inside]
    low, high = np.percentile(body, [1, 99])
    grey = np.clip((values - low) / max(float(high - low), 1e-6), 0, 1)
    return grey if inside is None else np.where(inside, grey, 0.0)


def _resize(image: Array, size: tuple[int, ...]) -> Array:
    """Return a 2D float image in 0..1 resampled to `size` (rows, columns), bicubic."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.float32))
    resized = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float32)
    return resized.clip(0, 1)


def _glow_layer(heat: Array) -> Array:
    """Return heat in 0..1 as a transparent uint8 picture, with an outline that prints in grey."""
    from matplotlib import colormaps
    from scipy.ndimage import binary_dilation

    layer = np.empty((*heat.shape, 4))
    layer[..., :3] = colormaps["inferno"](0.35 + 0.6 * heat)[..., :3]
    layer[..., 3] = np.clip(1.3 * heat - 0.15, 0, 0.8)
    inside = heat >= 0.5
    line = binary_dilation(inside) & ~inside
    layer[binary_dilation(line) & ~inside] = (0, 0, 0, 1)
    layer[line] = 1.0
    layer[layer[..., 3] == 0] = 0  # nothing to see: compresses to nothing
    return np.asarray((255 * layer).round().astype(np.uint8))


def watermark(picture: Array) -> Array:
    """Return a picture with SYNTHETIC burnt into its pixels, twice and across.

    Args:
        picture: uint8 `(rows, columns, 3)`.
    """
    from PIL import Image

    layer = Image.fromarray(mark(*picture.shape[:2]))
    marked = Image.alpha_composite(Image.fromarray(picture).convert("RGBA"), layer)
    return np.asarray(marked.convert("RGB"))


@lru_cache(maxsize=8)
def mark(rows: int, columns: int) -> Array:
    """Return the mark alone, uint8 `(rows, columns, 4)`; the frames of a slider share one."""
    from PIL import Image, ImageDraw, ImageFont

    layer = Image.new("RGBA", (2 * columns, 2 * rows), (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    font = ImageFont.load_default(size=max(10, min(rows, columns) // 8))
    for place in (0.7, 1.3):
        # White with a dark edge: legible on every grey, in print too.
        draw.text(
            (columns, rows * place),
            "SYNTHETIC",
            fill=(255, 255, 255, 215),
            stroke_fill=(0, 0, 0, 215),
            stroke_width=1,
            font=font,
            anchor="mm",
        )
    turned = layer.rotate(28, resample=Image.Resampling.BICUBIC, center=(columns, rows))
    left, top = columns // 2, rows // 2
    return np.asarray(turned.crop((left, top, left + columns, top + rows)))


def png(picture: Array) -> str:
    """Return a uint8 picture as a `data:` address."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG", compress_level=6)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
