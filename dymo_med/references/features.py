"""What a plain reference sees of a record: numbers side by side, NaN where there is nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dymo_med.modalities import modality
from dymo_med.modalities.descriptors import NAMES
from dymo_med.types import Batch, ModalitySpec, Recovery


@dataclass(frozen=True)
class Layout:
    """What P features are.

    Attributes:
        owner: Of each, the position of its modality in canonical order.
        categories: Of each, how many categories a cell has; 0 = a number.
        measured: Of each, whether it is one of many numbers measured on a scan or a sequence,
            which references reduce to a few before they use them.
    """

    owner: tuple[int, ...]
    categories: tuple[int, ...]
    measured: tuple[bool, ...]

    def __len__(self) -> int:
        """Return P."""
        return len(self.owner)


def layout_of(specs: Sequence[ModalitySpec]) -> Layout:
    """Return what the features of a record are.

    Args:
        specs: Modalities in canonical order.
    """
    owner: list[int] = []
    categories: list[int] = []
    measured: list[bool] = []
    for m, spec in enumerate(specs):
        if spec.columns:
            sizes = [len(c.values) if c.type == "categorical" else 0 for c in spec.columns]
        else:
            sizes = [0] * _width(spec)
        owner += [m] * len(sizes)
        categories += sizes
        measured += [not spec.columns] * len(sizes)
    return Layout(tuple(owner), tuple(categories), tuple(measured))


def features_of(batch: Batch, specs: Sequence[ModalitySpec]) -> Tensor:
    """Return what was observed of each record.

    Args:
        batch: B records; what stands in its values where nothing was observed is not looked at.
        specs: Modalities in canonical order.

    Returns:
        Float64 `(B, P)` on the CPU, NaN where there is nothing; columns as in `layout_of`.
    """
    parts = [torch.empty(len(batch), 0, dtype=torch.float64)]
    for m, spec in enumerate(specs):
        seen = batch.observed.available[:, m]
        values = _measured(batch, spec, seen)
        known = seen[:, None].expand(values.shape)
        if spec.name in batch.observed_fields:
            known = known & batch.observed_fields[spec.name]
        # What stands where nothing was observed may be anything, NaN even.
        parts.append(values.double().cpu().masked_fill(~known.cpu(), torch.nan))
    return torch.cat(parts, dim=1)


def recovered_features(
    observed: Tensor, recovery: Recovery, specs: Sequence[ModalitySpec]
) -> Tensor:
    """Return what each record's recovered versions are like.

    Args:
        observed: Of B records, as `features_of` returns it; not changed.
        recovery: Of these.
        specs: Modalities in canonical order.

    Returns:
        Float64 `(B, P)` on the CPU: as `features_of`, but whole where something was recovered or
        completed.
    """
    found = observed.clone()
    at = 0
    for m, spec in enumerate(specs):
        rows = recovery.candidates[:, m].nonzero().squeeze(1)
        told = recovery.descriptors.get(spec.name)
        values = summary(recovery.values[spec.name][rows], spec) if told is None else told[rows]
        if len(rows):
            found[rows.cpu(), at : at + values.shape[1]] = values.double().cpu()
        at += values.shape[1]
    return found


def under(features: Tensor, layout: Layout, used: Tensor) -> Tensor:
    """Return features with only some modalities left.

    Args:
        features: `(R, P)`.
        layout: Of the P features.
        used: Bool `(R, M)`.
    """
    owner = torch.tensor(layout.owner, dtype=torch.int64)
    return features.masked_fill(~used[:, owner], torch.nan)


def _width(spec: ModalitySpec) -> int:
    """Return how many features a modality without columns has."""
    return spec.shape[-1] if spec.kind == "tokens" else len(NAMES) if spec.is_image else 0


def _measured(batch: Batch, spec: ModalitySpec, known: Tensor) -> Tensor:
    """Return a modality's features `(B, p)`, which mean nothing where it is not known."""
    if spec.is_image and spec.name in batch.descriptors:
        return batch.descriptors[spec.name]
    values = batch.values[spec.name]
    rows = known.nonzero().squeeze(1)
    found = summary(values[rows], spec)
    return found.new_zeros(len(values), found.shape[1]).index_copy(0, rows, found)


def summary(values: Tensor, spec: ModalitySpec) -> Tensor:
    """Return the features `(R, p)` of values `(R, *shape)`.

    Cells are features as they are, of a sequence the mean over steps, and of an image what is
    measured on it.
    """
    if spec.columns:
        return values
    if spec.kind == "tokens":
        return values.mean(dim=1)
    found = modality(spec).describe(values)
    return values.new_empty(len(values), 0) if found is None else found
