"""What is promised of one outline: its volumes, its wide outline, how good such outlines are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dymo_med.bundle_segmentation import SegmentationBundle
from dymo_med.conformal import AS_THEY_CAME, COVERAGE
from dymo_med.data.masks import Grid, compose, volumes_ml
from dymo_med.inference.prediction_file import IntervalPart
from dymo_med.inference.segmentation_file import (
    OverlapPart,
    RegionPart,
    VolumeIntervalPart,
    WidePart,
)
from dymo_med.outline import DISCARD
from dymo_med.outline_bounds import MISSED, Overlap, Threshold


def region_parts(
    bundle: SegmentationBundle,
    method: str,
    observed: Sequence[str],
    found_ml: Mapping[str, float],
    wide: Mapping[str, tuple[float, Threshold]],
) -> tuple[RegionPart, ...]:
    """Return each region with its volume and what is promised of it.

    Args:
        bundle: The model.
        method: The selector that answers.
        observed: Measured scans, in canonical order.
        found_ml: Volumes.
        wide: What `wide_outline` returned.
    """
    return tuple(
        RegionPart(
            name=name,
            labels=labels,
            volume_ml=found_ml[name],
            interval=_interval(bundle, method, name, "+".join(observed), found_ml[name]),
            wide=None
            if name not in wide
            else WidePart(
                volume_ml=wide[name][0],
                threshold=float(wide[name][1].threshold or 0),
                missed=MISSED,
                calibrated_on=wide[name][1].patients,
            ),
        )
        for name, labels in bundle.mask.regions.items()
    )


def _interval(
    bundle: SegmentationBundle, method: str, region: str, pattern: str, ml: float
) -> VolumeIntervalPart | None:
    """Return where a region's true volume is; None where the bundle cannot promise it."""
    found = None if bundle.bounds is None else bundle.bounds.interval(method, region, pattern, ml)
    if found is None:
        return None
    return VolumeIntervalPart(
        low_ml=found.low,
        high_ml=found.high,
        coverage=COVERAGE,
        compared_with=cast(Literal["pattern", "all"], found.group),
        calibrated_on=found.patients,
    )


def wide_regions(
    bundle: SegmentationBundle, method: str, observed: Sequence[str], probabilities: Tensor
) -> tuple[Tensor, dict[str, Threshold]] | None:
    """Return the wide outline of every region, and its threshold.

    A region that another lies within takes in the wide outline of that one too.

    Args:
        bundle: The model.
        method: The selector that answers.
        observed: Measured scans, in canonical order.
        probabilities: `(R, *grid)`, on the own grid.

    Returns:
        Bool `(R, *grid)` and thresholds by region; None where one of them cannot be promised.
    """
    thresholds: dict[str, Threshold] = {}
    for name in bundle.mask.regions:
        bounds = bundle.bounds
        one = None if bounds is None else bounds.threshold(method, name, "+".join(observed))
        if one is None or one.threshold is None:
            return None
        thresholds[name] = one
    levels = [t.threshold or 0.0 for t in thresholds.values()]
    wide = torch.stack([p > level for p, level in zip(probabilities, levels, strict=True)])
    sets = [set(labels) for labels in bundle.mask.regions.values()]
    for i in reversed(range(len(sets))):
        for j in range(i):
            if sets[i] < sets[j]:
                wide[j] |= wide[i]
    return wide, thresholds


def wide_outline(
    bundle: SegmentationBundle,
    method: str,
    observed: Sequence[str],
    probabilities: Tensor,
    grid: Grid,
) -> tuple[NDArray[np.uint8] | None, dict[str, tuple[float, Threshold]]]:
    """Return the wide outline as labels, and each region's volume and threshold.

    Args:
        bundle: The model.
        method: The selector that answers.
        observed: Measured scans, in canonical order.
        probabilities: `(R, *grid)`.
        grid: The own grid.

    Returns:
        Uint8 `(*grid)`, None where it cannot be promised; by region, empty then.
    """
    found = wide_regions(bundle, method, observed, probabilities)
    if found is None:
        return None, {}
    wide, thresholds = found
    volumes = volumes_ml(wide, grid, bundle.mask)
    by_region = {name: (volumes[name], thresholds[name]) for name in thresholds}
    return compose(wide, bundle.mask).cpu().numpy(), by_region


def overlap_part(
    bundle: SegmentationBundle, method: str, observed: Sequence[str]
) -> OverlapPart | None:
    """Return how good outlines from these scans are; None where the bundle does not say.

    Args:
        bundle: The model.
        method: The selector that answers.
        observed: Measured scans, in canonical order.
    """
    groups = {} if bundle.bounds is None else bundle.bounds.overlap.get(method, {})
    pattern = "+".join(observed)
    level: Literal["pattern", "all"] = "pattern" if pattern in groups else "all"
    group = pattern if level == "pattern" else AS_THEY_CAME
    if bundle.bounds is None or group not in groups:
        return None
    alone = bundle.bounds.overlap.get(DISCARD, {}).get(group)

    def shown(one: Overlap) -> IntervalPart:
        return IntervalPart(value=one.value, low=one.low, high=one.high)

    own = groups[pattern].patients if level == "pattern" else 0
    return OverlapPart(
        level=level,
        group=group,
        patients=groups[group].patients,
        dice=shown(groups[group]),
        observed_only=None if alone is None or method == DISCARD else shown(alone),
        pattern_patients=own,
    )
