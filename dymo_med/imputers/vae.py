"""What multimodal VAEs share: one expert and one decoder per modality, and the latents' layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.blocks import ConvEncoder
from dymo_med.config import Strict
from dymo_med.imputers.base import LikelihoodImputer, start_from_mean_images
from dymo_med.modalities import modality
from dymo_med.types import Batch, ModalitySpec

# Log variance that posteriors start from.
SURE = -4.0


class VAEOptions(Strict):
    """Sizes that every multimodal VAE has.

    Attributes:
        latent: Length of the shared latent vector.
        map_channels: Channels of the latent map; 0 = no map.
        stride: Voxels per cell of the latent map along each axis.
        dim: Width of the tokens before the latent.
        width: First channels of image encoders, last of decoders.
        grid: Cells per axis at the coarsest level of an image.
        hidden: Hidden width of table decoders.
        beta: Weight of the prior.
        table_weight: Weight of a table's log-likelihood; an image's is 1 per voxel.
        column_layers: Transformer blocks among a table's columns in its expert.
        hide_cells: Share of filled table cells that experts do not see in a training step.
    """

    latent: Annotated[int, Field(ge=1)] = 64
    map_channels: Annotated[int, Field(ge=0)] = 8
    stride: Annotated[int, Field(ge=2)] = 4
    dim: Annotated[int, Field(ge=8)] = 32
    width: Annotated[int, Field(ge=4)] = 8
    grid: Annotated[int, Field(ge=1)] = 3
    hidden: Annotated[int, Field(ge=8)] = 64
    beta: Annotated[float, Field(ge=0)] = 1.0
    table_weight: Annotated[float, Field(gt=0)] = 20.0
    column_layers: Annotated[int, Field(ge=0)] = 0
    hide_cells: Annotated[float, Field(ge=0, lt=1)] = 0.0


class _Expert(nn.Module):
    """One modality's view of the latent vector and, for images, of the latent map.

    Args:
        spec: The modality.
        o: Sizes.
        vector: Length of the latent vector.
        grid: Cells of the latent map along each axis, or empty if this modality has none.
    """

    def __init__(self, spec: ModalitySpec, o: VAEOptions, vector: int, grid: Sequence[int]) -> None:
        super().__init__()
        sizes = {"width": o.width, "layers": o.column_layers, "heads": 1}
        sizes |= {"stride": o.stride} if grid else {"grid": o.grid}
        self.grid = tuple(grid)
        self.encoder = modality(spec).encoder(o.dim, sizes)
        self.trunk: ConvEncoder | None = None
        self.map_head: nn.Linear | None = None
        tokens = self.encoder.tokens
        if grid:
            self.trunk = ConvEncoder((o.dim, *grid), o.dim, o.dim, (o.grid,) * len(grid))
            self.map_head = nn.Linear(o.dim, 2 * o.map_channels)
            tokens = self.trunk.tokens
        self.head = nn.Linear(tokens * o.dim, 2 * vector)
        # Experts start out fairly sure: decoders that first met latents drowned in noise learned
        # to ignore them and never came back.
        with torch.no_grad():
            for head in (self.head, self.map_head):
                if head is not None:
                    head.bias[head.out_features // 2 :].fill_(SURE)

    def forward(
        self, values: Tensor, observed_fields: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return mean and log variance of the vector `(B, V)` and of the map `(B, C T)`."""
        tokens = self.encoder(values, observed_fields)
        x = tokens.values * tokens.available[..., None]
        map_mean = map_log = None
        if self.trunk is not None and self.map_head is not None:
            parts = self.map_head(x).transpose(1, 2).chunk(2, dim=1)  # each (B, C, T)
            map_mean, map_log = (part.flatten(1) for part in parts)
            cells = x.transpose(1, 2).unflatten(2, self.grid)  # (B, D, *grid)
            x = self.trunk(F.gelu(cells)).values
        mean, log_variance = self.head(x.flatten(1)).chunk(2, dim=1)
        # Bounded so that no expert becomes infinitely sure.
        bounded = log_variance.clamp(-10, 10)
        return mean, bounded, map_mean, None if map_log is None else map_log.clamp(-10, 10)


class MultimodalVAE(LikelihoodImputer):
    """Experts and decoders for any mix of modality kinds; a subclass adds the objective.

    All modalities share a latent vector. Images that lie on one common grid (the sequences of
    one MRI study) also share a latent map, a coarse grid of latents fused cell by cell, so that
    a lesion keeps its place; tables say nothing about the map. A latent `(V + C T,)` is the vector
    followed by the map's C channels of T cells.

    Likelihoods are summed over voxels, and a table's is weighted up, as the published codes weight
    small modalities, lest images drown it.

    Args:
        specs: Modalities in canonical order, fitted.
        options: Sizes.
        vector: Length of the latent vector.

    References:
        Dorent et al.: Hetero-Modal Variational Encoder-Decoder, MICCAI 2019 (latent maps).
    """

    probabilistic = True

    def __init__(self, specs: Sequence[ModalitySpec], options: VAEOptions, vector: int) -> None:
        super().__init__(specs, options)
        o = options
        self.specs = tuple(specs)
        self.modalities = {spec.name: modality(spec) for spec in specs}
        self.beta, self.hide_cells = o.beta, o.hide_cells
        spatial = {spec.shape[1:] for spec in specs if spec.is_image}
        common = spatial.pop() if len(spatial) == 1 and o.map_channels else ()
        self.grid = tuple(-(-s // o.stride) for s in common)
        self.map_channels = o.map_channels if self.grid else 0
        self.has_map = tuple(bool(self.grid) and s.is_image for s in specs)
        self.vector = vector
        self.weight = {s.name: o.table_weight if s.columns else 1.0 for s in specs}
        self.elements = sum(self.weight[s.name] * prod(s.shape) for s in specs)
        sizes = {"width": o.width, "hidden": o.hidden, "map": self.map_channels, "stride": o.stride}
        self.experts = nn.ModuleDict(
            {
                s.name: _Expert(s, o, vector, self.grid if has_map else ())
                for s, has_map in zip(specs, self.has_map, strict=True)
            }
        )
        self.decoders = nn.ModuleDict(
            {s.name: self.modalities[s.name].decoder(vector, sizes) for s in specs}
        )

    def start_from(self, batch: Batch) -> None:
        """Start image decoders from the mean image of the training records."""
        start_from_mean_images(self.specs, self.decoders, batch)

    def partly_hidden(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Return a training batch as experts see it: without some of the filled cells of tables.

        Likelihoods are asked for all filled cells, so that a blank cell is something that a model
        has learned to fill from what a patient's experts do see. A bound on the evidence stays
        one: a posterior may look at less than there is.

        Args:
            batch: B records.
            generator: CPU generator.
        """
        if not self.hide_cells:
            return batch
        fields = {}
        for name, filled in batch.observed_fields.items():
            coin = torch.rand(filled.shape, generator=generator).to(filled.device)
            seen = filled & (coin >= self.hide_cells)
            # A table that is there keeps something to say.
            fields[name] = torch.where(seen.any(1, keepdim=True), seen, filled)
        return replace(batch, observed_fields=fields)

    def encode(self, batch: Batch, subset: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each expert of a subset says: mean and log variance `(M, B, V + C T)`.

        Args:
            batch: B records.
            subset: Bool `(B, M)`, part of what was observed. Other experts are not evaluated.

        Returns:
            0 and 0 where there is no expert, and for the map of a modality that has none.
        """
        b, m = subset.shape
        size = self.vector + self.map_channels * prod(self.grid)
        mean = next(self.parameters()).new_zeros(m, b, size)
        log_variance = torch.zeros_like(mean)
        for i, spec in enumerate(self.specs):
            rows = subset[:, i].nonzero().squeeze(1)
            fields = batch.observed_fields.get(spec.name)
            parts = self.experts[spec.name](
                batch.values[spec.name][rows], None if fields is None else fields[rows]
            )
            end = self.vector
            mean[i, rows, :end], log_variance[i, rows, :end] = parts[0], parts[1]
            if self.has_map[i]:
                mean[i, rows, end:], log_variance[i, rows, end:] = parts[2], parts[3]
        return mean, log_variance

    def decode(self, name: str, z: Tensor) -> Tensor:
        """Return the likelihood parameters of one modality from latents `(R, V + C T)`."""
        z_map = None
        if self.map_channels:
            z_map = z[:, self.vector :].view(len(z), self.map_channels, *self.grid)
        parameters: Tensor = self.decoders[name](z[:, : self.vector], z_map)
        return parameters

    def log_likelihood(self, name: str, z: Tensor, batch: Batch, rows: Tensor) -> Tensor:
        """Return the weighted log-likelihood of one modality, `(R,)`.

        Args:
            name: The modality.
            z: Latents `(R, V + C T)`.
            batch: B records.
            rows: Int64 `(R,)`: whose values each latent should explain; they have the modality.
        """
        fields = batch.observed_fields.get(name)
        fit = self.modalities[name].log_likelihood(
            self.decode(name, z), batch.values[name][rows], None if fields is None else fields[rows]
        )
        return self.weight[name] * fit
