"""A scan's intensities in a few numbers, measured on its own voxels before any resampling.

A lesion of a few voxels is a bright or dark tail of the intensities inside the body. Averaging to
a coarse grid shortens that tail, and a network must see many patients before it finds it. These
numbers state it outright.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dymo_med.modalities.native import best_threshold
from dymo_med.types import DescriptorNorms

Values = np.ndarray[Any, np.dtype[np.float64]]

PERCENTILES = (1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 97.5, 99.0, 99.9)
# In interquartile ranges from the median.
THRESHOLDS = (1.0, 1.5, 2.0, 3.0)
# Shares of the body whose mean is taken at either end.
TAILS = (0.002, 0.01, 0.05)
NAMES = (
    *(f"percentile {p:g}" for p in PERCENTILES),
    "mean",
    "standard deviation",
    "third moment",
    "fourth moment",
    *(f"mean of the brightest {100 * t:g} %" for t in TAILS),
    *(f"mean of the darkest {100 * t:g} %" for t in TAILS),
    *(f"share above {t:g}" for t in THRESHOLDS),
    *(f"share below -{t:g}" for t in THRESHOLDS),
    "share of the field of view",
)
"""What each of the P descriptors of a scan is."""

# A number this common is the background.
_COMMON = 0.05
# No voxel counts as further from the median than so many interquartile ranges.
_FURTHEST = 50.0
# Percentiles of fewer voxels say nothing.
_FEWEST = 8
# Outliers beyond these percentiles do not stretch the histogram behind the threshold.
_TAIL = 0.001
# Voxels that are looked at; of a larger scan every n-th along each axis.
_MOST_LOOKED_AT = 500_000


def describe(scan: np.ndarray, *, relative: bool = True) -> Tensor:
    """Return the descriptors of one scan.

    Voxels of the body are those unlike the background, where one number (0, or the lowest) makes
    up a twentieth of the scan; in a volume without such a number, those brighter than half way to
    the threshold that parts dark from bright (Otsu); in a picture without, all. Their intensities
    count in interquartile ranges from their median, since those of most scanners have no unit.

    Args:
        scan: `(C, *spatial)`, finite; channels are averaged.
        relative: False where intensities have a unit (CT): percentiles and moments then count in
            thousands of that unit.

    Returns:
        Float32 `(P,)`, what `NAMES` says. Moments are roots of their own order and shares are
        square roots, so that all spread about evenly.

    Example:
        >>> describe(np.arange(1000.0).reshape(1, 10, 10, 10)).shape
        torch.Size([30])
    """
    axes = scan.ndim - 1
    step = max(1, math.ceil((math.prod(scan.shape[1:]) / _MOST_LOOKED_AT) ** (1 / axes)))
    every = (slice(None), *[slice(None, None, step)] * axes)
    # Sorted once, all that follows is looked up: thousands of recovered scans are described too.
    voxels = np.sort(scan[every].mean(axis=0, dtype=np.float64).ravel())
    body = _body(voxels, volume=axes == 3)
    share = len(body) / len(voxels)
    ordered = body if len(body) >= _FEWEST else voxels
    low, centre, high = _quantiles(ordered, (0.25, 0.5, 0.75))
    # Where more than half of the body has one value, its standard deviation is the yardstick.
    spread = high - low or float(ordered.std()) or 1.0
    z = ((ordered - centre) / spread).clip(-_FURTHEST, _FURTHEST)
    told = z if relative else ordered / 1000
    away = told - told.mean()
    squares = away * away
    above = 1 - np.searchsorted(z, THRESHOLDS, side="right") / len(z)
    below = np.searchsorted(z, [-t for t in THRESHOLDS], side="left") / len(z)
    numbers = [
        *_quantiles(told, np.asarray(PERCENTILES) / 100),
        told.mean(),
        math.sqrt(squares.mean()),
        float(np.cbrt((squares * away).mean())),
        float((squares * squares).mean()) ** 0.25,
        *(float(told[-math.ceil(t * len(told)) :].mean()) for t in TAILS),
        *(float(told[: math.ceil(t * len(told))].mean()) for t in TAILS),
        *np.sqrt(above),
        *np.sqrt(below),
        math.sqrt(share),
    ]
    return torch.tensor([float(number) for number in numbers], dtype=torch.float32)


def _quantiles(ordered: Values, shares: Sequence[float] | Values) -> Values:
    """Return quantiles of ascending values, linear in between."""
    place = np.asarray(shares) * (len(ordered) - 1)
    below = np.floor(place).astype(int)
    above = np.minimum(below + 1, len(ordered) - 1)
    found: Values = ordered[below] + (place - below) * (ordered[above] - ordered[below])
    return found


def _body(voxels: Values, volume: bool) -> Values:
    """Return the voxels of the body, ascending like all of them `(n,)`."""
    n = len(voxels)
    for background in (0.0, float(voxels[0])):
        first, last = (
            np.searchsorted(voxels, background, side="left"),
            np.searchsorted(voxels, background, side="right"),
        )
        if last - first >= _COMMON * n:
            return np.concatenate([voxels[:first], voxels[last:]])
    low, high = _quantiles(voxels, (_TAIL, 1 - _TAIL))
    if not volume or low == high:
        return voxels
    edges = np.linspace(low, high, 257)
    within = np.searchsorted(voxels, edges[1:-1], side="left")
    threshold = best_threshold(np.diff([0, *within, n]), edges)
    return voxels[np.searchsorted(voxels, low + (threshold - low) / 2, side="right") :]


# Principal components of fewer scans per component would be noise.
_PER_COMPONENT = 8
_MOST_COMPONENTS = 8
# Ridge penalty, in scans, of the map from the grid to the scan as stored.
_RIDGE = 1.0


def fit_norms(stored: Tensor, on_grid: Tensor) -> DescriptorNorms:
    """Return what is fitted to the descriptors of training scans.

    Args:
        stored: `(n, P)`, of n scans as they were stored.
        on_grid: `(n, P)`, of the same scans on the grid.

    Returns:
        Their norms: with one component for every eight scans, eight at most.
    """
    x, y = stored.double(), on_grid.double()
    n, p = x.shape
    center = x.mean(0) if n else x.new_zeros(p)
    spread = x.std(0, correction=0) if n else x.new_zeros(p)
    spread = torch.where(spread > 1e-6, spread, torch.ones_like(spread))
    # Singular vectors of what is standardised; a sign makes them the same on every machine.
    _, singular, axes = torch.linalg.svd((x - center) / spread, full_matrices=False)
    kept = int((singular > 1e-6 * max(1, n) ** 0.5).sum())
    kept = max(1, min(kept, _MOST_COMPONENTS, n // _PER_COMPONENT))
    if not len(axes):
        axes, singular = torch.eye(p, dtype=x.dtype)[:1], x.new_ones(1)
    axes, deviation = axes[:kept], (singular[:kept] / max(1, n) ** 0.5).clamp_min(1e-6)
    largest = axes.abs().argmax(1, keepdim=True)
    axes = axes * axes.gather(1, largest).sign()
    components = axes / deviation[:, None] / spread
    # stored - center = W (on_grid - middle), in units of the spread, pulled towards W = 1.
    middle = y.mean(0) if n else y.new_zeros(p)
    a, b = (y - middle) / spread, (x - center) / spread
    identity = torch.eye(p, dtype=x.dtype)
    w = torch.linalg.solve(a.T @ a + _RIDGE * identity, a.T @ b + _RIDGE * identity).T
    w = w * spread[:, None] / spread
    constant = center - w @ middle
    return DescriptorNorms(
        center=tuple(center.tolist()),
        components=tuple(map(tuple, components.tolist())),
        adapt=tuple(map(tuple, torch.cat([w, constant[:, None]], dim=1).tolist())),
    )
