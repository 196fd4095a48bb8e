"""What calibration patients say of outlines: each with every subset of its scans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dymo_med.bundle_segmentation import SegmentationBundle
from dymo_med.conformal import AS_THEY_CAME
from dymo_med.data.masks import dice, read_mask, regions_of
from dymo_med.outline import DISCARD, Segmented, finish, segment_record
from dymo_med.outline_bounds import Case, missed_share
from dymo_med.training.objectives import sampled_subsets
from dymo_med.types import Cohort, PatientRecord


def outline_cases(
    bundle: SegmentationBundle, cohort: Cohort, records: Sequence[PatientRecord]
) -> dict[str, list[Case]]:
    """Return every selector's outlines of calibration patients, beside the truth.

    Outlines are those that a patient would get, on the grid of the own reference scan. Each scan
    is looked at once, whatever the number of subsets.

    Args:
        bundle: The model, complete but for its promises.
        cohort: The records' cohort.
        records: Calibration records; those without a mask are left out.

    Returns:
        Cases by selector.
    """
    folders = {entry.record_id: entry.folder for entry in cohort.records}
    methods = (DISCARD,) if bundle.trust is None else tuple(bundle.trust.selectors)
    found: dict[str, list[Case]] = {method: [] for method in methods}
    for record in records:
        if record.mask is None:
            continue
        whole = segment_record(bundle, record, methods=methods)
        where = f"Patient {record.record_id}"
        labels = read_mask(folders[record.record_id], bundle.mask, whole.own, where)
        if labels is None:
            continue
        truth = regions_of(torch.from_numpy(labels), bundle.mask).to(bundle.device)
        for method in methods:
            found[method].append(_case(bundle, whole, method, AS_THEY_CAME, truth))
        for kept in _subsets(bundle, record):
            part = whole
            if len(kept) < len(record.modalities):
                left = record.without([n for n in record.modalities if n not in kept])
                part = segment_record(bundle, left, methods=methods, seen=whole)
            for method in methods:
                found[method].append(_case(bundle, part, method, "+".join(kept), truth))
    return found


def _subsets(bundle: SegmentationBundle, record: PatientRecord) -> Iterator[tuple[str, ...]]:
    """Yield subsets of what a record has: all of them, where that is not too many."""
    names = [spec.name for spec in bundle.specs]
    drawn = [
        tuple(n for n, inside in zip(names, row, strict=True) if inside and n in record.modalities)
        for row in sampled_subsets(len(names), 0).tolist()
    ]
    yield from dict.fromkeys(kept for kept in drawn if kept)


def _case(
    bundle: SegmentationBundle, segmented: Segmented, method: str, group: str, truth: torch.Tensor
) -> Case:
    """Return one outline beside the truth.

    Args:
        bundle: The model.
        segmented: The record with some of its scans.
        method: A selector.
        group: What was looked at.
        truth: Bool `(R, *own.shape)`.
    """
    probabilities, outlined = finish(bundle, segmented, method)
    voxel_ml = segmented.own.voxel_ml
    regions = zip(probabilities.cpu().double().numpy(), truth.cpu().numpy(), strict=True)
    return Case(
        patient=segmented.record.patient_id,
        group=group,
        found_ml=outlined.flatten(1).sum(1).cpu().double().numpy() * voxel_ml,
        true_ml=truth.flatten(1).sum(1).cpu().double().numpy() * voxel_ml,
        missed=np.stack([missed_share(p, true) for p, true in regions]),
        dice=dice(outlined, truth).cpu().numpy(),
    )
