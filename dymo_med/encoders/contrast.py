"""A scan's descriptors as one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dymo_med.blocks import Encoder
from dymo_med.encoders.base import ToToken, tokens_of
from dymo_med.types import ModalitySpec, Tokens

# Whitened components have unit variance among training patients; nobody is further out than this.
_FURTHEST = 5.0


class Contrast(Encoder):
    """The principal components of a scan's descriptors as one token.

    What the descriptors are says `dymo_med.modalities.descriptors`; their components are fitted on
    training patients and whitened (`DescriptorNorms`).

    Args:
        spec: The image modality, fitted.
        dim: Token width D.
        sizes: Not used.
    """

    tokens = 1
    described = True
    sees_values = False
    center: Tensor
    components: Tensor

    def __init__(self, spec: ModalitySpec, dim: int, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        norms = spec.descriptors
        if norms is None:
            raise ValueError(f"The descriptors of {spec.name} are not fitted.")
        # The numbers come with the spec, so they are not part of the weights.
        self.register_buffer("center", torch.tensor(norms.center), persistent=False)
        self.register_buffer("components", torch.tensor(norms.components), persistent=False)
        self.project = ToToken(len(norms.components), dim)

    def forward(
        self,
        values: Tensor,
        observed_fields: Tensor | None = None,
        descriptors: Tensor | None = None,
    ) -> Tokens:
        """Return one token `(B, 1, D)`.

        Args:
            values: Not used.
            observed_fields: Not used; images have no cells.
            descriptors: `(B, P)`.

        Raises:
            ValueError: If there are no descriptors.
        """
        if descriptors is None:
            raise ValueError("This encoder reads descriptors, got none.")
        x = (descriptors - self.center) @ self.components.T
        return tokens_of([self.project(x.clamp(-_FURTHEST, _FURTHEST))])
