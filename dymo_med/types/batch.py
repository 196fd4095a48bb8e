"""Records side by side, and what networks make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModalityMask:
    """Which modalities are available, per patient.

    Attributes:
        names: Modality names in canonical order.
        available: Bool `(B, M)`, True = available.
    """

    names: tuple[str, ...]
    available: Tensor

    def __post_init__(self) -> None:
        if self.available.dtype != torch.bool or self.available.ndim != 2:
            raise ValueError(
                f"available must be a bool tensor of shape (B, M), got {self.available.dtype}"
                f" {tuple(self.available.shape)}."
            )
        if self.available.shape[1] != len(self.names):
            raise ValueError(
                f"available has {self.available.shape[1]} columns for {len(self.names)} names."
            )

    def of(self, row: int) -> tuple[str, ...]:
        """Return the names available to one patient."""
        return tuple(n for n, a in zip(self.names, self.available[row].tolist(), strict=True) if a)


def subset_id(available: Tensor) -> Tensor:
    """Return each subset's bitmask id, the sum of 2^m over its available modalities.

    Args:
        available: Bool `(..., M)`, M at most 62.

    Returns:
        Int64 `(...)`.

    Example:
        >>> subset_id(torch.tensor([[True, False, True]])).tolist()
        [5]
    """
    weights = torch.ones((), dtype=torch.int64, device=available.device) << torch.arange(
        available.shape[-1], device=available.device
    )
    return (available.to(torch.int64) * weights).sum(-1)


@dataclass(frozen=True)
class Batch:
    """Records collated: one tensor per modality, and masks that say what is real.

    Attributes:
        record_ids: B ids.
        patient_ids: B ids.
        values: Per modality float32 `(B, *shape)`; finite everywhere, meaningless where not
            observed.
        observed: True where the modality was measured (a partly filled table counts).
        observed_fields: Per table modality bool `(B, F)`, True = the cell was filled; all False
            where the table is missing.
        labels: Int64 `(B,)`, -1 = not known.
        shares: `(B, K)`, 0 where nothing is known; None where `labels` say all. Of a regression in
            training, what part of each true value belongs to each band (`Scale.shares`); of
            survival, what share of each bin agrees with what is known (`TimeBins.fits`).
        followed: Of survival, float64 `(B, 3)`: time; 1 for an event, 0 for censored; and how many
            patients one whose bin is known stands for (`survival.known_weights`). Else None.
        masks: Uint8 `(B, X, Y, Z)`, the labels of a segmentation, all 0 where not known; None if
            no record has one.
        masked: Bool `(B,)`: True = the mask is known; None likewise.
        descriptors: Per image modality float32 `(B, P)`, of scans as they were stored; meaningless
            where not observed. A modality without an entry is described by its values.
    """

    record_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    values: Mapping[str, Tensor]
    observed: ModalityMask
    observed_fields: Mapping[str, Tensor]
    labels: Tensor
    shares: Tensor | None = None
    followed: Tensor | None = None
    masks: Tensor | None = None
    masked: Tensor | None = None
    descriptors: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return B."""
        return len(self.record_ids)

    @property
    def known(self) -> Tensor:
        """Bool `(B,)`: something is known of the target, if only that it is later than a time."""
        return self.labels >= 0 if self.shares is None else self.shares.any(1)

    @property
    def truth(self) -> Tensor:
        """What the loss of an answer is about: `labels`, or `shares`."""
        return self.labels if self.shares is None else self.shares

    def to(self, device: torch.device | str) -> Batch:
        """Return this batch with every tensor on `device`."""
        return replace(
            self,
            values={k: v.to(device) for k, v in self.values.items()},
            observed=replace(self.observed, available=self.observed.available.to(device)),
            observed_fields={k: v.to(device) for k, v in self.observed_fields.items()},
            labels=self.labels.to(device),
            shares=None if self.shares is None else self.shares.to(device),
            followed=None if self.followed is None else self.followed.to(device),
            masks=None if self.masks is None else self.masks.to(device),
            masked=None if self.masked is None else self.masked.to(device),
            descriptors={k: v.to(device) for k, v in self.descriptors.items()},
        )

    def rows(self, index: Tensor) -> Batch:
        """Return the records at integer positions `index` `(R,)`, in that order."""
        positions = index.tolist()
        return Batch(
            record_ids=tuple(self.record_ids[i] for i in positions),
            patient_ids=tuple(self.patient_ids[i] for i in positions),
            values={k: v[index] for k, v in self.values.items()},
            observed=replace(self.observed, available=self.observed.available[index]),
            observed_fields={k: v[index] for k, v in self.observed_fields.items()},
            labels=self.labels[index],
            shares=None if self.shares is None else self.shares[index],
            followed=None if self.followed is None else self.followed[index],
            masks=None if self.masks is None else self.masks[index],
            masked=None if self.masked is None else self.masked[index],
            descriptors={k: v[index] for k, v in self.descriptors.items()},
        )

    def partly_filled(self) -> Tensor:
        """Return bool `(B, M)`: True = an observed table with at least one blank cell."""
        result = torch.zeros_like(self.observed.available)
        for m, name in enumerate(self.observed.names):
            if name in self.observed_fields:
                blank = ~self.observed_fields[name].all(dim=1)
                result[:, m] = self.observed.available[:, m] & blank
        return result


@dataclass(frozen=True)
class LatentTokens:
    """Recovered modalities as a network's own tokens.

    Attributes:
        space: The network part whose tokens they are; nobody else can read them.
        values: Per modality `(B, N, D)`; they mean nothing where nothing was recovered.
    """

    space: object
    values: Mapping[str, Tensor]


@dataclass(frozen=True)
class Recovery:
    """What an imputer proposes for a batch.

    Attributes:
        values: Per modality float32 `(B, *shape)`: observed values bit for bit, proposals where
            something was missing. Where nothing could be proposed the values mean nothing.
        observed: The batch's own mask.
        recovered: Bool `(B, M)`: the modality was missing and values are proposed.
        completed: Bool `(B, M)`: a partly filled table whose blank cells are proposed.
        draws: Optional seeded draws per modality `(n, B, *shape)`, for uncertainty.
        latents: Optional tokens that a backbone takes in place of the values, if they are its own.
        descriptors: Per image `(B, P)`: descriptors of recovered scans as they would be stored,
            where the imputer knows more of them than the values show; they mean nothing where
            nothing was recovered.
    """

    values: Mapping[str, Tensor]
    observed: ModalityMask
    recovered: Tensor
    completed: Tensor
    draws: Mapping[str, Tensor] | None = None
    latents: LatentTokens | None = None
    descriptors: Mapping[str, Tensor] = field(default_factory=dict)

    def tokens_for(self, space: object) -> Mapping[str, Tensor]:
        """Return recovered tokens `(B, N, D)` by modality; none if they are not of this space."""
        if self.latents is None or space is None or self.latents.space is not space:
            return {}
        return self.latents.values

    @property
    def candidates(self) -> Tensor:
        """Bool `(B, M)`: what the selector may admit: recovered or completed."""
        return self.recovered | self.completed


@dataclass(frozen=True)
class Tokens:
    """A modality encoded.

    Attributes:
        values: Float `(B, N, D)`.
        available: Bool `(B, N)`: False for the token of a blank table cell.
    """

    values: Tensor
    available: Tensor
