"""A scan as it was stored, in a few numbers: what the quality gate goes by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from nibabel.orientations import apply_orientation, io_orientation

from dymo_med.types import Native

# Voxels that are looked at; of a larger scan every n-th along each axis.
_MOST_LOOKED_AT = 500_000
# Different numbers are counted up to here.
MOST_LEVELS = 256
# Of fingerprints: how much more the mean counts than a voxel, and how far the same may be apart.
_MEAN, _ALIKE = 100.0, 1e-4
# Outliers beyond these percentiles do not stretch the histogram behind the threshold.
_TAIL = 0.001


def native(values: np.ndarray, affine: np.ndarray | None) -> Native:
    """Measure a scan.

    Args:
        values: `(C, *spatial)` as stored, finite.
        affine: 4 x 4, voxel to world in mm (RAS+), for three spatial axes; None for a picture.

    Returns:
        Its measures. Those of a scan of many voxels come from every n-th of them.
    """
    size, spacing, tilt = tuple(values.shape[1:]), None, 0.0
    if affine is not None:
        order, spacing, tilt = _axes(affine)
        size = tuple(size[axis] for axis in order)
    step = max(1, math.ceil((values.size / _MOST_LOOKED_AT) ** (1 / max(1, values.ndim - 1))))
    every = (slice(None), *[slice(None, None, step)] * (values.ndim - 1))
    looked_at = np.sort(values[every].ravel()).astype(np.float64)
    low, middle, high = (_quantile(looked_at, q) for q in (0.01, 0.5, 0.99))
    return Native(
        size=size,
        spacing_mm=spacing,
        tilt_degrees=tilt,
        low=low,
        middle=middle,
        high=high,
        levels=min(MOST_LEVELS, 1 + int(np.count_nonzero(np.diff(looked_at)))),
        foreground=_foreground(looked_at),
        structure=_structure(values, step),
    )


def fingerprint(values: np.ndarray, affine: np.ndarray | None) -> np.ndarray:
    """Return numbers that are the same for the same scan, in whatever format and order of axes.

    Values at points spread evenly over the scan, its axes turned towards RAS+, and the mean; all
    as shares of the range of values, so that a copy on another scale is known too.

    Args:
        values: As for `native`.
        affine: Likewise.

    Returns:
        Float32 `(K,)`; K goes by the size of the scan.
    """
    low, high = float(values.min()), float(values.max())
    width = (high - low) or 1.0
    array = np.moveaxis(values, 0, -1)
    if affine is not None and array.ndim == 4:
        array = apply_orientation(array, io_orientation(affine))
    points = 8 if array.ndim == 4 else 16
    places = [
        np.unique(((np.arange(points) + 0.5) * n / points).astype(int)) for n in array.shape[:-1]
    ]
    at = array[np.ix_(*places)].mean(-1, dtype=np.float64).ravel()
    mean = (values.mean(dtype=np.float64) - low) / width
    # The mean tells small masks apart that are empty at all of the points.
    told = np.concatenate([(at - low) / width, [_MEAN * mean], array.shape[:-1]])
    return told.astype(np.float32)


def same_scan(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether two fingerprints are of one scan."""
    return len(first) == len(second) and bool(np.abs(first - second).max() < _ALIKE)


def otsu(values: np.ndarray) -> float:
    """Return the threshold that parts values best into dark and bright ones.

    Best is the largest variance between the two, over a histogram of 256 bins; of a run of equally
    good thresholds, as between two peaks with nothing in between, the middle.

    Args:
        values: `(n,)`, not all equal.

    References:
        Otsu, A threshold selection method from gray-level histograms, IEEE Transactions on
        Systems, Man, and Cybernetics 9, 1979.

    Example:
        >>> otsu(np.array([0.0] * 90 + [10.0] * 10)) > 1
        True
    """
    return best_threshold(*np.histogram(values, bins=256))


def best_threshold(counts: np.ndarray, edges: np.ndarray) -> float:
    """Return Otsu's threshold of a histogram; see `otsu`.

    Args:
        counts: `(n,)` of each bin.
        edges: `(n + 1,)` of the bins, ascending.
    """
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    moment = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = moment[:-1] / below - (moment[-1] - moment[:-1]) / above
        between = np.where((below > 0) & (above > 0), below * above * apart**2, 0.0)
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return float(edges[1 + (best[0] + best[-1]) // 2])


def _quantile(ascending: np.ndarray, share: float) -> float:
    """Return a quantile of sorted numbers, the nearest one."""
    return float(ascending[round(share * (len(ascending) - 1))])


def _axes(affine: np.ndarray) -> tuple[list[int], tuple[float, ...], float]:
    """Return which voxel axis follows each axis of the body, the spacing there, and the tilt."""
    matrix = np.asarray(affine, dtype=float)[:3, :3]
    spacing = np.sqrt((matrix**2).sum(0))
    towards = np.abs(matrix / spacing)  # (world, voxel) cosines
    order: list[int] = []
    for world in range(3):
        left = [axis for axis in range(3) if axis not in order]
        order.append(max(left, key=lambda axis: float(towards[world, axis])))
    least = min(float(towards[world, axis]) for world, axis in enumerate(order))
    tilt = math.degrees(math.acos(min(1.0, least)))
    return order, tuple(float(spacing[axis]) for axis in order), tilt


def _foreground(ascending: np.ndarray) -> float:
    """Return the share of values above the threshold; of one value with outliers, their share."""
    low, high = _quantile(ascending, _TAIL), _quantile(ascending, 1 - _TAIL)
    if low == high:
        return float((ascending != low).mean())
    return float((ascending > otsu(ascending.clip(low, high))).mean())


def _structure(values: np.ndarray, step: int) -> float:
    """Return the largest correlation of neighbours over the spatial axes."""
    largest = 0.0
    for axis in range(1, values.ndim):
        if values.shape[axis] < 2:
            continue
        here: list[Any] = [slice(None), *[slice(None, None, step)] * (values.ndim - 1)]
        there = list(here)
        here[axis], there[axis] = slice(0, -1, step), slice(1, None, step)
        a, b = (values[tuple(part)].ravel().astype(np.float64) for part in (here, there))
        a, b = a - a.mean(), b - b.mean()
        norm = math.sqrt(float(a @ a) * float(b @ b))
        if norm > 0:
            largest = max(largest, float(a @ b) / norm)
    return largest


def extent_mm(size: Sequence[int], spacing_mm: Sequence[float]) -> tuple[float, ...]:
    """Return the field of view along each axis.

    Args:
        size: Voxels per axis.
        spacing_mm: Voxel size per axis.
    """
    return tuple(n * s for n, s in zip(size, spacing_mm, strict=True))
