"""Records collated into tensors, and masks that say what is real."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dymo_med.types import Batch, ModalityMask, ModalitySpec, PatientRecord


def collate(records: Sequence[PatientRecord], specs: Sequence[ModalitySpec]) -> Batch:
    """Stack records; what is missing is zero in `values` and False in the masks.

    Args:
        records: B records, at least one.
        specs: M modalities in canonical order.

    Raises:
        ValueError: If there is no record, or a value does not have its modality's shape.
    """
    if not records:
        raise ValueError("A batch needs at least one record, got none.")
    count = len(records)
    available = torch.zeros(count, len(specs), dtype=torch.bool)
    values, observed_fields, descriptors = {}, {}, {}
    for m, spec in enumerate(specs):
        rows = [i for i, record in enumerate(records) if spec.name in record.modalities]
        found = [records[i].modalities[spec.name] for i in rows]
        for value in found:
            if tuple(value.values.shape) != spec.shape:
                raise ValueError(
                    f"{spec.name} must have shape {spec.shape}, got {tuple(value.values.shape)}."
                )
        available[rows, m] = True
        stacked = torch.zeros(count, *spec.shape)
        if rows:
            stacked[rows] = torch.stack([value.values for value in found])
        values[spec.name] = stacked
        if spec.columns:
            filled = torch.zeros(count, *spec.shape, dtype=torch.bool)
            for i, value in zip(rows, found, strict=True):
                filled[i] = True if value.observed_fields is None else value.observed_fields
            values[spec.name] = stacked.where(filled, stacked.new_zeros(()))
            observed_fields[spec.name] = filled
        if rows and all(value.descriptors is not None for value in found):
            told = [value.descriptors for value in found if value.descriptors is not None]
            descriptors[spec.name] = torch.zeros(count, len(told[0]))
            descriptors[spec.name][rows] = torch.stack(told)
    masks = [record.mask for record in records]
    known = [mask for mask in masks if mask is not None]
    labels = [-1 if record.label is None else record.label for record in records]
    return Batch(
        record_ids=tuple(record.record_id for record in records),
        patient_ids=tuple(record.patient_id for record in records),
        values=values,
        observed=ModalityMask(tuple(spec.name for spec in specs), available),
        observed_fields=observed_fields,
        labels=torch.tensor(labels, dtype=torch.int64),
        masks=torch.stack([known[0] * 0 if mask is None else mask for mask in masks])
        if known
        else None,
        masked=torch.tensor([mask is not None for mask in masks]) if known else None,
        descriptors=descriptors,
    )
