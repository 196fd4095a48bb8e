"""MoPoE-VAE: a multimodal VAE whose posterior is a mixture of products of experts."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.blocks import ConvDecoder, ConvEncoder, PatchDecoder
from dymo_med.config import Strict
from dymo_med.imputers.base import Imputer
from dymo_med.modalities import modality
from dymo_med.types import Batch, ModalitySpec


def product_of_experts(
    mean: Tensor, log_variance: Tensor, available: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the product of the available Gaussian experts and a standard normal prior.

    Args:
        mean: `(M, B, L)`.
        log_variance: `(M, B, L)`.
        available: Bool `(B, M)`.

    Returns:
        Mean and log variance `(B, L)`. With no expert it is the prior.

    Example:
        >>> m, v = product_of_experts(torch.ones(1, 1, 1), torch.zeros(1, 1, 1),
        ...                           torch.ones(1, 1, dtype=torch.bool))
        >>> m.item(), round(v.exp().item(), 3)
        (0.5, 0.5)
    """
    weight = available.T[..., None].to(mean.dtype)  # (M, B, 1)
    precision = (-log_variance).exp() * weight
    total = 1 + precision.sum(0)
    # A mean that is not available may hold anything, NaN included.
    joint = (mean.where(weight > 0, mean.new_zeros(())) * precision).sum(0) / total
    return joint, -total.log()


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, e^log_variance) || N(0, I)) per row, in nats.

    Args:
        mean: `(B, L)`.
        log_variance: `(B, L)`.

    Returns:
        `(B,)`.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)


def random_subsets(available: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each row a subset drawn uniformly from its non-empty subsets.

    Args:
        available: Bool `(B, M)`; rows without any True stay empty.
        generator: CPU generator.

    Returns:
        Bool `(B, M)`.
    """
    result = torch.zeros_like(available)
    todo = available.any(1)
    while bool(todo.any()):
        coin = torch.rand(available.shape, generator=generator).to(available.device) < 0.5
        result = torch.where(todo[:, None], coin & available, result)
        todo = todo & ~result.any(1)
    return result


# The mean image of fewer records than this would show single patients to whoever has the bundle.
_MOST_PRIVATE = 10
# Log variance that experts start from.
_SURE = -4.0


class _Expert(nn.Module):
    """One modality's Gaussian expert over the latent vector and, for images, the latent map.

    Args:
        spec: The modality.
        o: Sizes.
        grid: Cells of the latent map along each axis, or empty if this modality has none.
    """

    def __init__(self, spec: ModalitySpec, o: MoPoE.Options, grid: Sequence[int]) -> None:
        super().__init__()
        sizes = {"width": o.width, "layers": 0, "heads": 1}
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
        self.head = nn.Linear(tokens * o.dim, 2 * o.latent)
        # Experts start out fairly sure: decoders that first met latents drowned in noise learned
        # to ignore them and never came back.
        with torch.no_grad():
            for head in (self.head, self.map_head):
                if head is not None:
                    head.bias[head.out_features // 2 :].fill_(_SURE)

    def forward(
        self, values: Tensor, observed_fields: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return mean and log variance of the vector `(B, L)` and of the map `(B, C T)`."""
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


class MoPoE(Imputer):
    """Mixture-of-products-of-experts VAE over any mix of modality kinds.

    One Gaussian expert per modality; the posterior of a subset is the product of its experts and
    the prior; the joint posterior is the uniform mixture over the subsets of what a patient has.
    Each training step draws one mixture component per patient and asks it to explain everything
    the patient has; likelihood terms exist only where data exist, so incomplete training cohorts
    work as they are. Recovery decodes the posterior mean of the observed modalities.

    All modalities share a latent vector. Images that lie on one common grid (the sequences of
    one MRI study) also share a latent map, a coarse grid of Gaussians fused cell by cell, so that
    a lesion keeps its place; tables say nothing about the map.

    Deviations from the published model: one component per patient and step instead of a
    contiguous slice of the batch per component (the same expectation); the prior is an expert in
    every product and not only in the full one, so that a single overconfident expert cannot
    escape it; the latent map (as in U-HVED, here at one scale); and a table's log-likelihood is
    weighted up, as the published code weights small modalities, lest images drown it.

    Args:
        specs: Modalities in canonical order, fitted.
        options: Sizes.

    References:
        Sutter, Daunhawer, Vogt: Generalized Multimodal ELBO, ICLR 2021.
        Dorent et al.: Hetero-Modal Variational Encoder-Decoder, MICCAI 2019.
    """

    class Options(Strict):
        """Sizes of the model.

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

    probabilistic = True

    def __init__(self, specs: Sequence[ModalitySpec], options: BaseModel) -> None:
        super().__init__(specs, options)
        o = MoPoE.Options.model_validate(options.model_dump())
        self.specs = tuple(specs)
        self.modalities = {spec.name: modality(spec) for spec in specs}
        self.beta = o.beta
        spatial = {spec.shape[1:] for spec in specs if len(spec.shape) > 1}
        common = spatial.pop() if len(spatial) == 1 and o.map_channels else ()
        self.grid = tuple(-(-s // o.stride) for s in common)
        self.map_channels = o.map_channels if self.grid else 0
        self.latent = o.latent
        self.weight = {s.name: 1.0 if len(s.shape) > 1 else o.table_weight for s in specs}
        self.elements = sum(self.weight[s.name] * prod(s.shape) for s in specs)
        sizes = {"width": o.width, "hidden": o.hidden, "map": self.map_channels, "stride": o.stride}
        self.experts = nn.ModuleDict(
            {s.name: _Expert(s, o, self.grid if len(s.shape) > 1 else ()) for s in specs}
        )
        self.decoders = nn.ModuleDict(
            {s.name: self.modalities[s.name].decoder(o.latent, sizes) for s in specs}
        )

    def posterior(self, batch: Batch, subset: Tensor) -> tuple[Tensor, Tensor]:
        """Return the product of a subset's experts: mean and log variance `(B, L + C T)`.

        Args:
            batch: B records.
            subset: Bool `(B, M)`, part of what was observed. Other experts are not evaluated.
        """
        b, m = subset.shape
        size = self.latent + self.map_channels * prod(self.grid)
        mean = next(self.parameters()).new_zeros(m, b, size)
        log_variance = torch.zeros_like(mean)
        has_map = torch.zeros(m, dtype=torch.bool, device=subset.device)
        for i, spec in enumerate(self.specs):
            rows = subset[:, i].nonzero().squeeze(1)
            fields = batch.observed_fields.get(spec.name)
            parts = self.experts[spec.name](
                batch.values[spec.name][rows], None if fields is None else fields[rows]
            )
            end = self.latent
            mean[i, rows, :end], log_variance[i, rows, :end] = parts[0], parts[1]
            if parts[2] is not None:
                has_map[i] = True
                mean[i, rows, end:], log_variance[i, rows, end:] = parts[2], parts[3]
        vector = product_of_experts(
            mean[..., : self.latent], log_variance[..., : self.latent], subset
        )
        cells = product_of_experts(
            mean[..., self.latent :], log_variance[..., self.latent :], subset & has_map
        )
        return torch.cat([vector[0], cells[0]], 1), torch.cat([vector[1], cells[1]], 1)

    def start_from(self, batch: Batch) -> None:
        """Start image decoders from the mean image of the training records."""
        for m, spec in enumerate(self.specs):
            decoder = self.decoders[spec.name]
            if isinstance(decoder, ConvDecoder | PatchDecoder):
                rows = batch.observed.available[:, m]
                if int(rows.sum()) < _MOST_PRIVATE:
                    continue
                with torch.no_grad():
                    decoder.mean_image.copy_(batch.values[spec.name][rows].mean(0))

    def decode(self, name: str, z: Tensor) -> Tensor:
        """Return the likelihood parameters of one modality from latents `(B, L + C T)`."""
        z_map = None
        if self.map_channels:
            z_map = z[:, self.latent :].view(len(z), self.map_channels, *self.grid)
        parameters: Tensor = self.decoders[name](z[:, : self.latent], z_map)
        return parameters

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the negative evidence bound per record and (weighted) element."""
        available = batch.observed.available
        mean, log_variance = self.posterior(batch, random_subsets(available, generator))
        z = _draw(mean, log_variance, generator)
        loss = self.beta * kl_to_standard_normal(mean, log_variance)
        for m, spec in enumerate(self.specs):
            rows = available[:, m].nonzero().squeeze(1)
            if not len(rows):
                continue
            fields = batch.observed_fields.get(spec.name)
            fit = self.modalities[spec.name].log_likelihood(
                self.decode(spec.name, z[rows]),
                batch.values[spec.name][rows],
                None if fields is None else fields[rows],
            )
            loss = loss.index_add(0, rows, -self.weight[spec.name] * fit)
        return loss / self.elements

    def propose(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See `Imputer.propose`."""
        mean, log_variance = self.posterior(batch, batch.observed.available)
        z = mean if generator is None else _draw(mean, log_variance, generator)
        return {n: self.modalities[n].mean(self.decode(n, z)) for n in wanted}


def _draw(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    """Return one draw per row of N(mean, e^log_variance)."""
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
    return mean + noise * (0.5 * log_variance).exp()
