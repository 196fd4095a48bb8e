"""The published image encoder, with what it averages away: strided convolutions to a small grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dymo_med.blocks import ConvEncoder
from dymo_med.encoders.base import SHARPNESS, ToToken, body_of, pooled
from dymo_med.types import ModalitySpec, Tokens


class Strided(ConvEncoder):
    """Four strided stages, pooled to a grid of tokens.

    Made for thousands of pictures. From a few hundred volumes it learns nothing of small lesions:
    each stage averages, and the normalisation in it takes away how bright a scan is. It is kept
    for cohorts of many pictures, and for the imputers, which need to know where things are. One
    more token, which the published network lacks, says how the voxels are distributed.

    Args:
        spec: The image modality.
        dim: Token width D.
        sizes: `width` (first channels, 16); `stride` (voxels per token along each axis) or else
            `grid` (tokens per axis, 2); `tails`, whether there is the token of intensities (no).
    """

    def __init__(self, spec: ModalitySpec, dim: int, sizes: Mapping[str, Any]) -> None:
        spatial = spec.shape[1:]
        if "stride" in sizes:
            grid = tuple(-(-s // sizes["stride"]) for s in spatial)
        else:
            grid = (sizes.get("grid", 2),) * len(spatial)
        super().__init__(spec.shape, dim, sizes.get("width", 16), grid)
        self.intensities: ToToken | None = None
        if sizes.get("tails"):
            self.intensities = ToToken(spec.shape[0] * (2 + len(SHARPNESS)), dim)
            self.tokens += 1

    def forward(
        self,
        values: Tensor,
        observed_fields: Tensor | None = None,
        descriptors: Tensor | None = None,
    ) -> Tokens:
        """Return one token per grid cell, and that of intensities. See `ConvEncoder.forward`."""
        tokens = super().forward(values)
        if self.intensities is None:
            return tokens
        more = self.intensities(pooled(values.flatten(2), body_of(values)))[:, None]
        available = torch.ones(
            len(values), self.tokens, dtype=torch.bool, device=tokens.available.device
        )
        return Tokens(torch.cat([tokens.values, more], dim=1), available)
