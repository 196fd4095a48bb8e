"""What the encoders by name have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dymo_med.blocks import Encoder
from dymo_med.types import Tokens


class SideBySide(Encoder):
    """Several encoders of one modality; their tokens stand side by side.

    Args:
        parts: The encoders, of the same token width.
    """

    def __init__(self, parts: Sequence[Encoder]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.tokens = sum(part.tokens for part in parts)
        self.described = any(part.described for part in parts)
        self.sees_values = any(part.sees_values for part in parts)

    def forward(
        self,
        values: Tensor,
        observed_fields: Tensor | None = None,
        descriptors: Tensor | None = None,
    ) -> Tokens:
        """Return the tokens of all parts. See `Encoder.forward`."""
        found = [part(values, observed_fields, descriptors) for part in self.parts]
        return Tokens(
            torch.cat([tokens.values for tokens in found], dim=1),
            torch.cat([tokens.available for tokens in found], dim=1),
        )


class ToToken(nn.Linear):
    """A linear map to a token whose direction, not length, says how large its input is.

    A token goes through a normalisation before anything looks at it, which takes away its length.
    Without a bias, 2 x and 4 x would then be the same token, and with a small one nearly so until
    training has made it larger. With a bias as long as the product of a usual input, direction
    turns with size from the first step on.

    Args:
        features: Length of the input; its entries are of the order of 1.
        dim: Token width D.
    """

    def __init__(self, features: int, dim: int) -> None:
        super().__init__(features, dim)
        with torch.no_grad():
            self.weight.normal_(0, (dim * features) ** -0.5)
            self.bias.normal_(0, dim**-0.5)


# Between the mean (0) and the maximum (infinity): about the brightest tenth and thousandth.
SHARPNESS = (2.0, 8.0)


def pooled(channels: Tensor, body: Tensor) -> Tensor:
    """Return each channel's mean, largest value and soft quantiles over the body.

    A soft quantile is log(mean(exp(s x))) / s, which has a gradient at every voxel.

    Args:
        channels: `(B, C, V)`.
        body: Bool `(B, V)`, at least one of each row.

    Returns:
        `(B, 4 C)`.
    """
    count = body.sum(1)[:, None]
    mean = channels.masked_fill(~body[:, None], 0).sum(2) / count
    inside = channels.masked_fill(~body[:, None], -torch.inf)
    found = [mean, inside.amax(2)]
    found += [(torch.logsumexp(s * inside, dim=2) - count.log()) / s for s in SHARPNESS]
    return torch.cat(found, dim=1)


def body_of(values: Tensor) -> Tensor:
    """Return bool `(B, V)`: voxels of `(B, C, *spatial)` other than the background's exact 0."""
    body = (values != 0).any(1).flatten(1)
    return body | ~body.any(1, keepdim=True)  # an empty image is all body


def tokens_of(values: Sequence[Tensor]) -> Tokens:
    """Return tokens `(B, N, D)`, all available, from N of them `(B, D)`."""
    stacked = torch.stack(list(values), dim=1)
    return Tokens(stacked, torch.ones(stacked.shape[:2], dtype=torch.bool, device=stacked.device))
