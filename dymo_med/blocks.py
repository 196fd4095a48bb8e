"""Network parts in plain torch: attention; encoders and decoders of images, columns and steps."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.types import Column, Steps, Tokens

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
# No logarithm is taken of anything less: a recovered cell may lie below all measured ones.
_SMALLEST = 1e-6
_POOL: dict[int, Any] = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class Block(nn.Module):
    """Pre-norm transformer block: x += attention(LN x); x += MLP(LN x).

    MLP ratio 4, GELU, queries, keys and values without bias.

    Args:
        dim: Token width D.
        heads: Attention heads; divides `dim`.
        attention_dropout: Share of attention weights dropped while training.
    """

    def __init__(self, dim: int, heads: int, attention_dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}.")
        self.heads, self.attention_dropout = heads, attention_dropout
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Tensor, attend: Tensor | None = None, *, first: int | None = None
    ) -> Tensor:
        """Return the tokens after one block.

        Args:
            x: `(B, N, D)`.
            attend: Bool, broadcastable to `(B, 1, N, N)`: True where a query may see a key;
                None = every query sees every key.
            first: Return only the first so many tokens: after a last block of which only the
                class token is read, the others need no query and no MLP. None = all.
        """
        b, n, d = x.shape
        normed = self.norm1(x)
        if first is None:
            first = n
            q, k, v = self._heads(self.qkv(normed), 3)
        else:
            weight = self.qkv.weight
            (q,) = self._heads(F.linear(normed[:, :first], weight[:d]), 1)
            k, v = self._heads(F.linear(normed, weight[d:]), 2)
        drop = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=drop)
        x = x[:, :first] + self.out(y.transpose(1, 2).reshape(b, first, d))
        x = x + self.mlp(self.norm2(x))
        return x

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Return the parts of `(B, N, parts D)`, each `(B, heads, N, D / heads)`."""
        b, n, d = x.shape
        x = x.view(b, n, parts, self.heads, d // parts // self.heads)
        return x.permute(2, 0, 3, 1, 4).unbind(0)


def _stages(spatial: Sequence[int], grid: Sequence[int], most: int = 4) -> int:
    """Return how many halvings keep every axis at or above its `grid`, at most `most`."""
    stages = 0
    while stages < most and all(
        -(-s // 2 ** (stages + 1)) >= g for s, g in zip(spatial, grid, strict=True)
    ):
        stages += 1
    return stages


class Encoder(nn.Module):
    """A network from one modality's values to tokens.

    Attributes:
        tokens: How many tokens N it yields.
        described: Whether it reads a scan's descriptors.
        sees_values: Whether it reads the values themselves.
    """

    tokens: int
    described: bool = False
    sees_values: bool = True


class ConvEncoder(Encoder):
    """A stack of strided convolutions, pooled to a grid of tokens.

    Args:
        shape: `(C, *spatial)` of one image, 2D or 3D.
        dim: Token width D.
        width: Channels after the first convolution; they double at each halving, up to 8 times.
        grid: Tokens along each axis (at most the image's own size).
    """

    def __init__(self, shape: Sequence[int], dim: int, width: int, grid: Sequence[int]) -> None:
        super().__init__()
        channels, spatial = shape[0], shape[1:]
        conv = _CONV[len(spatial)]
        self.grid = tuple(min(g, s) for g, s in zip(grid, spatial, strict=True))
        self.tokens = prod(self.grid)
        layers: list[nn.Module] = []
        for i in range(_stages(spatial, self.grid)):
            out = width * 2 ** min(i, 3)
            layers += [conv(channels, out, 3, stride=2, padding=1), _norm(out), nn.GELU()]
            channels = out
        self.stack = nn.Sequential(*layers)
        # Averages equal blocks where the grid divides the size, overlapping ones elsewhere.
        self.pool = _POOL[len(spatial)](self.grid)
        self.project = conv(channels, dim, 1)

    def forward(
        self,
        values: Tensor,
        observed_fields: Tensor | None = None,
        descriptors: Tensor | None = None,
    ) -> Tokens:
        """Return one token per grid cell, all available.

        Args:
            values: `(B, C, *spatial)`.
            observed_fields: Not used; images have no cells.
            descriptors: Not used.
        """
        x = self.project(self.pool(self.stack(values)))
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        return Tokens(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))


def _norm(channels: int) -> nn.Module:
    """Return a normalisation that does not depend on the other patients of the batch."""
    groups = max(g for g in (1, 2, 4, 8) if channels % g == 0 and g <= max(1, channels // 4))
    return nn.GroupNorm(groups, channels)


def _to_voxels(x: Tensor, factor: int, shape: Sequence[int]) -> Tensor:
    """Rearrange channels into voxels (a pixel shuffle in 2D or 3D) and crop.

    Args:
        x: `(B, C factor^axes, *coarse)`.
        factor: Voxels per cell along each axis.
        shape: `(C, *spatial)` of the result, at most `factor` times the coarse size.

    Returns:
        `(B, *shape)`.
    """
    b, coarse = len(x), x.shape[2:]
    axes = len(coarse)
    x = x.view(b, shape[0], *(factor,) * axes, *coarse)
    # (B, C, f, f, f, X, Y, Z) -> (B, C, X, f, Y, f, Z, f)
    order = [0, 1]
    for a in range(axes):
        order += [2 + axes + a, 2 + a]
    x = x.permute(*order).reshape(b, shape[0], *(factor * c for c in coarse))
    for axis, size in enumerate(shape[1:], start=2):
        x = x.narrow(axis, 0, size)
    return x


class ConvDecoder(nn.Module):
    """From a latent vector to an image: a mean image plus a difference.

    Upsampling convolutions, of which the last doubling rearranges channels into voxels, so that
    no convolution runs at full resolution.

    Args:
        shape: `(C, *spatial)` of the image.
        latent: Length of the latent vector.
        width: Channels before the last doubling; more at the coarser levels.
    """

    def __init__(self, shape: Sequence[int], latent: int, width: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        spatial = self.shape[1:]
        axes = len(spatial)
        conv = _CONV[axes]
        stages = max(1, _stages(spatial, (3,) * axes))
        self.start = tuple(-(-s // 2**stages) for s in spatial)
        channels = width * 2 ** min(stages - 1, 3)
        self.channels = channels
        self.first = nn.Linear(latent, channels * prod(self.start))
        layers: list[nn.Module] = []
        for i in reversed(range(stages - 1)):
            out = width * 2 ** min(i, 3)
            layers += [
                nn.Upsample(scale_factor=2, mode="nearest"),
                conv(channels, out, 3, padding=1),
                _norm(out),
                nn.GELU(),
            ]
            channels = out
        self.stack = nn.Sequential(*layers)
        self.last = conv(channels, self.shape[0] * 2**axes, 3, padding=1)
        self.mean_image = nn.Parameter(torch.zeros(self.shape))

    def forward(self, z: Tensor, z_map: Tensor | None = None) -> Tensor:
        """Return images `(B, C, *spatial)` from latents `(B, latent)`."""
        x = F.gelu(self.first(z).view(len(z), self.channels, *self.start))
        return self.mean_image + _to_voxels(self.last(self.stack(x)), 2, self.shape)


class PatchDecoder(nn.Module):
    """From a latent map and a latent vector to an image: a mean image plus decoded patches.

    Each cell of the map becomes a patch of voxels: a linear part, and a part that sees the
    neighbouring cells and the vector. Nothing runs above the map's resolution, which makes it
    several times cheaper than upsampling convolutions, and the linear part learns fast.

    Args:
        shape: `(C, *spatial)` of the image.
        latent: Length of the latent vector.
        width: Hidden channels.
        map_channels: Channels of the latent map.
        stride: Voxels per cell along each axis.
    """

    def __init__(
        self, shape: Sequence[int], latent: int, width: int, map_channels: int, stride: int
    ) -> None:
        super().__init__()
        self.shape, self.stride = tuple(shape), stride
        axes = len(self.shape) - 1
        conv = _CONV[axes]
        voxels = self.shape[0] * stride**axes
        self.linear = conv(map_channels, voxels, 1)
        self.context = conv(map_channels, width, 3, padding=1)
        self.vector = nn.Linear(latent, width)
        self.patch = conv(width, voxels, 1)
        self.mean_image = nn.Parameter(torch.zeros(self.shape))

    def forward(self, z: Tensor, z_map: Tensor) -> Tensor:
        """Return images `(B, C, *spatial)`.

        Args:
            z: `(B, latent)`.
            z_map: `(B, map_channels, *grid)`.
        """
        vector = self.vector(z).view(len(z), -1, *(1,) * (z_map.ndim - 2))
        x = self.linear(z_map) + self.patch(F.gelu(self.context(z_map) + vector))
        return self.mean_image + _to_voxels(x, self.stride, self.shape)


class Cells(nn.Module):
    """Each cell of a table as a vector: a number times a slope, or a category's own vector.

    Args:
        columns: The columns, fitted (`mean`, `std` set) or not (then 0 and 1 are used).
        dim: Length D of the vectors.
    """

    offset: Tensor
    center: Tensor
    scale: Tensor
    is_category: Tensor
    known: Tensor
    logarithm: Tensor

    def __init__(self, columns: Sequence[Column], dim: int) -> None:
        super().__init__()
        categorical = [c.type == "categorical" for c in columns]
        offsets, total = [], 0
        for column in columns:
            offsets.append(total)
            total += len(column.values)
        # The numbers below come with the spec, so they are not part of the weights.
        self.register_buffer("offset", torch.tensor(offsets), persistent=False)
        self.register_buffer("is_category", torch.tensor(categorical), persistent=False)
        known = torch.tensor([c.known for c in columns])
        self.register_buffer("known", known, persistent=False)
        logs = [c.logarithm for c in columns]
        center = [
            c.mean or 0.0 if g is None else g.mean for c, g in zip(columns, logs, strict=True)
        ]
        scale = [c.std or 1.0 if g is None else g.std for c, g in zip(columns, logs, strict=True)]
        # NaN: this column's numbers are taken as they are.
        shift = [float("nan") if g is None else g.shift for g in logs]
        self.register_buffer("center", torch.tensor(center), persistent=False)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.register_buffer("logarithm", torch.tensor(shift), persistent=False)
        self.categories = nn.Embedding(total, dim) if total else None
        if self.categories is not None:  # as long as a usual number's vector
            nn.init.normal_(self.categories.weight, 0, dim**-0.5)
        self.slope = nn.Parameter(torch.randn(len(columns), dim) / dim**0.5)

    def filled(self, values: Tensor, observed_fields: Tensor | None) -> Tensor:
        """Return bool `(B, F)`: cells that count: none of a column that no training record had.

        Args:
            values: `(B, F)`.
            observed_fields: Bool `(B, F)`, True = filled; None = all filled.
        """
        if observed_fields is None:
            observed_fields = torch.ones_like(values, dtype=torch.bool)
        return observed_fields & self.known

    def vectors(self, values: Tensor, observed_fields: Tensor) -> Tensor:
        """Return `(B, F, D)`; what stands for a blank cell means nothing.

        Args:
            values: `(B, F)`, natural units, categories as their index.
            observed_fields: Bool `(B, F)`, True = filled.
        """
        values = values.where(observed_fields, values.new_zeros(()))
        logs = torch.log((values + self.logarithm).clamp_min(_SMALLEST))
        told = torch.where(self.logarithm.isnan(), values, logs)
        x = ((told - self.center) / self.scale).unsqueeze(-1) * self.slope
        if self.categories is not None:
            index = (values.round().long() + self.offset).where(self.is_category, 0)
            x = torch.where(self.is_category[:, None], self.categories(index), x)
        return x


class ColumnEncoder(Cells, Encoder):
    """A table as one token per column, with a learned token in place of a blank cell.

    A continuous cell is standardised by the column's training mean and spread; a category has
    its own embedding, per column. A blank cell's token is never seen by another column's (it
    sees itself, so that attention stays defined), and is reported as unavailable, so that the
    pattern of blanks cannot act as evidence. (TIP, ECCV 2024, masks attention likewise.)

    Args:
        columns: The columns, fitted (`mean`, `std` set) or not (then 0 and 1 are used).
        dim: Token width D.
        layers: Transformer blocks among the columns.
        heads: Attention heads.
    """

    def __init__(self, columns: Sequence[Column], dim: int, layers: int, heads: int) -> None:
        super().__init__(columns, dim)
        self.tokens = len(columns)
        self.blank = nn.Parameter(torch.randn(dim) * 0.02)
        # As long as the product of a usual cell: see `encoders.base.ToToken`.
        self.column = nn.Parameter(torch.randn(len(columns), dim) * dim**-0.5)
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))

    def forward(
        self,
        values: Tensor,
        observed_fields: Tensor | None = None,
        descriptors: Tensor | None = None,
    ) -> Tokens:
        """Return one token per column.

        Args:
            values: `(B, F)`, natural units, categories as their index.
            observed_fields: Bool `(B, F)`, True = filled; None = all filled.
            descriptors: Not used.
        """
        observed_fields = self.filled(values, observed_fields)
        x = self.vectors(values, observed_fields)
        x = torch.where(observed_fields[..., None], x, self.blank) + self.column
        x = self.norm(x)
        itself = torch.eye(self.tokens, dtype=torch.bool, device=x.device)
        attend = (observed_fields[:, None, :] | itself).unsqueeze(1)  # (B, 1, F, F)
        for block in self.blocks:
            x = block(x, attend)
        return Tokens(x, observed_fields)


class ColumnDecoder(nn.Module):
    """From a latent vector to the likelihood parameters of a table.

    Per column in order: mean and log spread in standardised units (continuous), or one logit
    per category.

    Args:
        columns: The columns.
        latent: Length of the latent vector.
        hidden: Width of the hidden layer.
    """

    def __init__(self, columns: Sequence[Column], latent: int, hidden: int) -> None:
        super().__init__()
        size = sum(2 if c.type == "continuous" else len(c.values) for c in columns)
        self.net = nn.Sequential(nn.Linear(latent, hidden), nn.GELU(), nn.Linear(hidden, size))

    def forward(self, z: Tensor, z_map: Tensor | None = None) -> Tensor:
        """Return `(B, P)` from latents `(B, latent)`; a table has no use for a latent map."""
        out: Tensor = self.net(z)
        return out


class StepEncoder(Encoder):
    """A sequence of feature vectors as tokens: a linear map that also sees neighbouring steps.

    Args:
        shape: `(L, C)`, steps and features.
        steps: The features' constants, fitted or not (then 0 and 1 are used).
        dim: Token width D.
        tokens: N, at most L; each averages neighbouring steps.
    """

    center: Tensor
    scale: Tensor

    def __init__(self, shape: Sequence[int], steps: Steps, dim: int, tokens: int) -> None:
        super().__init__()
        _, features = shape
        self.tokens = tokens
        # The numbers below come with the spec, so they are not part of the weights.
        center, scale = steps.mean or (0.0,) * features, steps.std or (1.0,) * features
        self.register_buffer("center", torch.tensor(center), persistent=False)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)
        self.project = nn.Linear(features, dim)
        self.mix = nn.Conv1d(dim, dim, 3, padding=1)

    def forward(
        self,
        values: Tensor,
        observed_fields: Tensor | None = None,
        descriptors: Tensor | None = None,
    ) -> Tokens:
        """Return `(B, N, D)`, all available.

        Args:
            values: `(B, L, C)`.
            observed_fields: Not used; sequences have no cells.
            descriptors: Not used.
        """
        x = self.project((values - self.center) / self.scale).transpose(1, 2)  # (B, D, L)
        x = x + F.gelu(self.mix(x))
        if self.tokens < x.shape[2]:
            x = F.adaptive_avg_pool1d(x, self.tokens)
        x = x.transpose(1, 2)
        return Tokens(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))


class StepDecoder(nn.Module):
    """From a latent vector to a sequence of feature vectors.

    Every step has a hidden state, which sees its neighbours'; one linear map, the same for all
    steps, turns states into features.

    Args:
        shape: `(L, C)`, steps and features.
        latent: Length of the latent vector.
        hidden: Width of a step's hidden state.
    """

    def __init__(self, shape: Sequence[int], latent: int, hidden: int) -> None:
        super().__init__()
        length, features = shape
        self.hidden = hidden
        self.first = nn.Linear(latent, hidden * length)
        self.mix = nn.Conv1d(hidden, hidden, 3, padding=1)
        self.last = nn.Linear(hidden, features)

    def forward(self, z: Tensor, z_map: Tensor | None = None) -> Tensor:
        """Return `(B, L, C)` from latents `(B, latent)`; it has no use for a latent map."""
        x = F.gelu(self.first(z).view(len(z), self.hidden, -1))
        x = x + F.gelu(self.mix(x))
        out: Tensor = self.last(x.transpose(1, 2))
        return out
