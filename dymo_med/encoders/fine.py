"""Convolutions that keep fine maps, read by their mean and their largest value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.blocks import Encoder
from dymo_med.encoders.base import SHARPNESS, ToToken, body_of, pooled, tokens_of
from dymo_med.types import ModalitySpec, Tokens

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}


class _Residual(nn.Module):
    """x + conv(GELU(conv(GELU x))), which starts as x: no normalisation is needed."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.first = _CONV[axes](channels, channels, 3, padding=1)
        self.second = _CONV[axes](channels, channels, 3, padding=1)
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, C, *spatial)`."""
        out: Tensor = x + self.second(F.gelu(self.first(F.gelu(x))))
        return out


class Fine(Encoder):
    """Two levels of residual convolutions, at a half and a quarter of the resolution.

    Each level is one token, made from the mean and the maximum of each of its channels over the
    whole map: a small lesion anywhere is a large value somewhere. A third token says how the
    voxels themselves are distributed. No layer normalises, so absolute intensity is kept, and a
    patient's tokens do not depend on the others of a batch.

    Args:
        spec: The image modality.
        dim: Token width D.
        sizes: `width`, channels of the first level (16); the second has twice as many.
    """

    tokens = 3

    def __init__(self, spec: ModalitySpec, dim: int, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        channels, axes = spec.shape[0], len(spec.shape) - 1
        width = sizes.get("width", 16)
        self.intensities = ToToken(channels * (2 + len(SHARPNESS)), dim)
        self.levels = nn.ModuleList()
        self.project = nn.ModuleList()
        for out in (width, 2 * width):
            down = _CONV[axes](channels, out, 3, stride=2, padding=1)
            nn.init.kaiming_normal_(down.weight, nonlinearity="relu")
            self.levels.append(nn.Sequential(down, nn.GELU(), _Residual(out, axes)))
            self.project.append(ToToken(2 * out, dim))
            channels = out

    def forward(
        self,
        values: Tensor,
        observed_fields: Tensor | None = None,
        descriptors: Tensor | None = None,
    ) -> Tokens:
        """Return three tokens `(B, 3, D)`.

        Args:
            values: `(B, C, *spatial)`.
            observed_fields: Not used; images have no cells.
            descriptors: Not used.
        """
        found, x = [self.intensities(pooled(values.flatten(2), body_of(values)))], values
        for level, project in zip(self.levels, self.project, strict=True):
            x = level(x)
            flat = x.flatten(2)
            found.append(project(torch.cat([flat.mean(2), flat.amax(2)], dim=1)))
        return tokens_of(found)
