"""What every comparator offers, and what one of them holds once it is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.tasks import PLAIN, OverClasses
from dymo_med.types import Batch, ModalityMask, ModalitySpec

# Logits `(R, K)` and what is true of the same rows (`Batch.truth`) to the loss of each `(R,)`.
TaskLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the cross entropy per row; 0 where the label is not known."""
    return F.cross_entropy(logits, truth, reduction="none", ignore_index=-1)


class Comparator(nn.Module, ABC):
    """A classifier that answers from whatever was observed and recovers nothing.

    It is there to be compared with: trained on the same records, for the same loss, under the same
    schedule and augmentation as the fusion backbone, with a temperature of its own.

    Attributes:
        Options: Its part of a recipe.
        specs: Modalities in canonical order.
    """

    Options: ClassVar[type[BaseModel]]
    specs: tuple[ModalitySpec, ...]

    @abstractmethod
    def __init__(self, specs: Sequence[ModalitySpec], classes: int, options: BaseModel) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Return uncalibrated logits `(B, K)`.

        A row depends on nothing but what its own record has observed; in evaluation mode it is
        the same every time.

        Args:
            batch: B records with at least one modality each; what stands in `values` where
                nothing was observed, NaN even, must not be looked at.
        """

    def loss(
        self, batch: Batch, generator: torch.Generator, task_loss: TaskLoss = cross_entropy
    ) -> Tensor:
        """Return the training loss per record `(B,)`; a record without a label has 0.

        Args:
            batch: B records.
            generator: CPU generator behind every random number.
            task_loss: That of the fusion backbone, class weights and all.
        """
        return task_loss(self(batch), batch.truth)

    def under(self, batch: Batch, used: Tensor) -> Tensor:
        """Return the logits `(S, B, K)` that it would give with only some modalities left.

        Validation and probability calibration look at many subsets of every record. Override
        this where each modality can be encoded once for all of them.

        Args:
            batch: B records.
            used: Bool `(S, B, M)`, within what is observed, never empty.
        """
        return torch.stack([self(only(batch, left)) for left in used])

    def parts(self) -> Mapping[str, Comparator]:
        """Return what is trained one after another, by name; itself alone unless overridden.

        A part is trained on the records that have any of its own `specs`, and sees only these.
        """
        return {"": self}

    def finish(self, batch: Batch, weights: Tensor, task: OverClasses = PLAIN) -> None:
        """Fit what is left to fit once all parts are trained; nothing unless overridden.

        Args:
            batch: Labelled validation records, on the CPU.
            weights: `(B,)`, by which every patient counts the same.
            task: What is predicted.
        """


@dataclass(frozen=True)
class FittedComparator:
    """A trained comparator as a bundle holds it.

    Attributes:
        network: In evaluation mode.
        options: Its options, every one.
        temperature: Probabilities are softmax(logits / temperature).
        best_epoch: Per stage of its training, counted from 0.
        validation: Its figures on validation records, over subsets of their modalities.
    """

    network: Comparator
    options: Mapping[str, Any]
    temperature: float
    best_epoch: Mapping[str, int]
    validation: Mapping[str, float]

    def __post_init__(self) -> None:
        if not (isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be a positive number, got {self.temperature}.")


def only(batch: Batch, used: Tensor) -> Batch:
    """Return the batch with every modality missing but some.

    Args:
        batch: B records.
        used: Bool `(B, M)`; what is not observed stays missing.
    """
    left = batch.observed.available & used
    names = batch.observed.names
    fields = {
        name: filled & left[:, names.index(name), None]
        for name, filled in batch.observed_fields.items()
    }
    return replace(batch, observed=ModalityMask(names, left), observed_fields=fields)


def narrowed(batch: Batch, specs: Sequence[ModalitySpec]) -> tuple[Batch, Tensor]:
    """Return the records that have any of some modalities, and of these modalities alone.

    Args:
        batch: B records.
        specs: Some of its modalities.

    Returns:
        The batch of R records, and their positions `(R,)` among the B.
    """
    names = tuple(spec.name for spec in specs)
    columns = [batch.observed.names.index(name) for name in names]
    available = batch.observed.available[:, columns]
    of_these = replace(
        batch,
        values={name: batch.values[name] for name in names},
        observed=ModalityMask(names, available),
        observed_fields={n: f for n, f in batch.observed_fields.items() if n in names},
    )
    rows = available.any(1).nonzero().squeeze(1)
    # Scans are large: they are copied only where some are left out.
    return (of_these if len(rows) == len(batch) else of_these.rows(rows)), rows
