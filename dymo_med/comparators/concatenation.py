"""The vectors of all modalities side by side, with a learned one where a modality is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from dymo_med.comparators.base import Comparator, narrowed
from dymo_med.comparators.embedding import Embedding, Sizes
from dymo_med.types import Batch, ModalitySpec


class Concatenation(Comparator):
    """Late fusion: one vector per modality, concatenated, and a network with one hidden layer.

    A missing modality is a vector that is learned, never zeros. It is trained on the records as
    they are: where a modality is hardly ever missing, its placeholder has hardly been learned, and
    that what is asked of it then was not trained for is the weakness by which this comparator is
    known.

    Args:
        specs: Modalities in canonical order, fitted.
        classes: Number of classes K.
        options: Sizes.
    """

    class Options(Sizes):
        """Sizes of the network.

        Attributes:
            hidden: Width of the hidden layer after the concatenation.
        """

        hidden: Annotated[int, Field(ge=1)] = 128

    def __init__(self, specs: Sequence[ModalitySpec], classes: int, options: BaseModel) -> None:
        super().__init__(specs, classes, options)
        o = type(self).Options.model_validate(options.model_dump())
        self.specs = tuple(specs)
        self.embeddings = nn.ModuleList(Embedding(spec, o) for spec in specs)
        self.placeholder = nn.Parameter(torch.randn(len(self.specs), o.dim) * 0.02)
        self.head = nn.Sequential(
            nn.Linear(len(self.specs) * o.dim, o.hidden), nn.GELU(), nn.Linear(o.hidden, classes)
        )

    def forward(self, batch: Batch) -> Tensor:
        """See `Comparator.forward`."""
        return self.under(batch, batch.observed.available[None])[0]

    def under(self, batch: Batch, used: Tensor) -> Tensor:
        """See `Comparator.under`: each modality is encoded once."""
        vectors = []
        for m, spec in enumerate(self.specs):
            placeholder = self.placeholder[m]
            vector = placeholder.expand(len(batch), -1)
            part, rows = narrowed(batch, [spec])
            if len(rows):
                vector = vector.index_copy(0, rows, self.embeddings[m](part).to(vector.dtype))
            vectors.append(torch.where(used[..., m, None], vector, placeholder))  # (S, B, D)
        logits: Tensor = self.head(torch.cat(vectors, dim=-1))
        return logits
