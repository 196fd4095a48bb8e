"""A network that looks at one voxel at a time: a histogram whose bins are learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.blocks import Encoder
from dymo_med.encoders.base import SHARPNESS, ToToken, body_of, pooled, tokens_of
from dymo_med.types import ModalitySpec, Tokens


class Voxels(Encoder):
    """Layers of 1 x 1 x 1 convolutions, pooled over the body as one token.

    Each channel is a function of intensity; pooled by mean, maximum and soft quantiles (the
    logarithm of the mean of exp(s x), divided by s) it says how much of the body has which
    intensity. Few parameters, and where a lesion lies makes no difference.

    Args:
        spec: The image modality.
        dim: Token width D.
        sizes: `width`, channels of a voxel (16).
    """

    tokens = 1

    def __init__(self, spec: ModalitySpec, dim: int, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        width = sizes.get("width", 16)
        self.first = nn.Linear(spec.shape[0], width)
        self.second = nn.Linear(width, width)
        with torch.no_grad():
            # Steps at intensities all over the usual range, in standard deviations.
            self.first.weight.normal_(0, 1).add_(self.first.weight.sign())
            self.first.bias.copy_(-self.first.weight.sum(1) * torch.linspace(-3, 6, width))
        self.project = ToToken(width * (2 + len(SHARPNESS)), dim)

    def forward(
        self,
        values: Tensor,
        observed_fields: Tensor | None = None,
        descriptors: Tensor | None = None,
    ) -> Tokens:
        """Return one token `(B, 1, D)`.

        Args:
            values: `(B, C, *spatial)`; voxels where all channels are 0 are background.
            observed_fields: Not used; images have no cells.
            descriptors: Not used.
        """
        x = self.second(F.gelu(self.first(values.flatten(2).transpose(1, 2))))  # (B, V, width)
        return tokens_of([self.project(pooled(x.transpose(1, 2), body_of(values)))])
