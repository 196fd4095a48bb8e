"""Concatenation that has been trained to do without any modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from dymo_med.comparators.base import TaskLoss, cross_entropy, only
from dymo_med.comparators.concatenation import Concatenation
from dymo_med.types import Batch, ModalitySpec


class ModDrop(Concatenation):
    """The network of `concatenation`, trained with modalities dropped at random.

    In every step each modality of each record is dropped with the same probability, never all
    that the record has.

    Two publications mean two networks by this name, and this one is neither (a table is in
    docs/reference/recipe.md). What all have in common is the draw per modality and record.

    Against ModDrop (Neverova et al.): a dropped modality is the learned placeholder of a missing
    one rather than zeros, because that is what stands there when it is missing; there is no
    pre-training of each modality and no gradual fusion, because every comparator has the same
    schedule; one rate holds for all modalities; the last modality left of a record is not dropped.

    Against the comparator of this name in DyMo's published code (`ModDrop.py`), whose numbers
    stand in its tables: that one is the fusion transformer, in which a dropped modality's tokens
    are zero before embeddings are added and are attended to like any other. Here each modality
    becomes one vector by itself, and vectors meet in a network with one hidden layer.

    Args:
        specs: Modalities in canonical order, fitted.
        classes: Number of classes K.
        options: Sizes and dropout.

    References:
        Neverova et al., ModDrop: adaptive multi-modal gesture recognition, IEEE TPAMI, 2016,
        arXiv:1501.00102. DyMo, ICLR 2026 (published code, snapshot 64e0f78).
    """

    class Options(Concatenation.Options):
        """Sizes of the network, and how much is dropped.

        Attributes:
            rate: Probability that a modality is dropped in a training step.
        """

        rate: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def __init__(self, specs: Sequence[ModalitySpec], classes: int, options: BaseModel) -> None:
        super().__init__(specs, classes, options)
        self.rate = ModDrop.Options.model_validate(options.model_dump()).rate

    def loss(
        self, batch: Batch, generator: torch.Generator, task_loss: TaskLoss = cross_entropy
    ) -> Tensor:
        """See `Comparator.loss`; of what is left of each record."""
        left = only(batch, self.kept(batch.observed.available, generator))
        return super().loss(left, generator, task_loss)

    def kept(self, available: Tensor, generator: torch.Generator) -> Tensor:
        """Return bool `(B, M)`: what is left of each record in one training step.

        Args:
            available: Bool `(B, M)`.
            generator: CPU generator.
        """
        draw = torch.rand(available.shape, generator=generator).to(available.device)
        draw = draw.masked_fill(~available, -1.0)
        # Where all would go, the one with the highest draw stays: any of them, equally likely.
        return available & ((draw >= self.rate) | (draw == draw.amax(1, keepdim=True)))
