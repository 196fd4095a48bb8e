"""MoPoE-VAE: a multimodal VAE whose posterior is a mixture of products of experts."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

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


class MoPoE(Imputer):
    """Mixture-of-products-of-experts VAE over any mix of modality kinds.

    One Gaussian expert per modality; the posterior of a subset is the product of its experts and
    the prior; the joint posterior is the uniform mixture over the subsets of what a patient has.
    Each training step draws one mixture component per patient and asks it to explain everything
    the patient has; likelihood terms exist only where data exist, so incomplete training cohorts
    work as they are. Recovery decodes the posterior mean of the observed modalities.

    Deviations from the published model: one component per patient and step instead of a
    contiguous slice of the batch per component (the same expectation), the prior is an expert in
    every product and not only in the full one (so that a single confident expert cannot escape
    it), and an image's log-likelihood is scaled down to `independent` voxels, because neighbouring
    voxels are not independent and would drown tables and the prior.

    Args:
        specs: Modalities in canonical order, fitted.
        options: Sizes.

    References:
        Sutter, Daunhawer, Vogt: Generalized Multimodal ELBO, ICLR 2021.
    """

    class Options(Strict):
        """Sizes of the model.

        Attributes:
            latent: Length of the shared latent vector.
            dim: Width of the tokens before the latent.
            width: First channels of image encoders, last of decoders.
            grid: Tokens per axis of an image.
            hidden: Hidden width of table decoders.
            beta: Weight of the prior.
            independent: Voxels that an image's log-likelihood counts for, at most.
        """

        latent: Annotated[int, Field(ge=1)] = 64
        dim: Annotated[int, Field(ge=8)] = 32
        width: Annotated[int, Field(ge=4)] = 8
        grid: Annotated[int, Field(ge=1)] = 3
        hidden: Annotated[int, Field(ge=8)] = 64
        beta: Annotated[float, Field(ge=0)] = 1.0
        independent: Annotated[int, Field(ge=1)] = 1000

    probabilistic = True

    def __init__(self, specs: Sequence[ModalitySpec], options: BaseModel) -> None:
        super().__init__(specs, options)
        o = MoPoE.Options.model_validate(options.model_dump())
        self.specs = tuple(specs)
        self.modalities = {spec.name: modality(spec) for spec in specs}
        self.beta, self.latent = o.beta, o.latent
        self.weight = {s.name: min(1.0, o.independent / prod(s.shape)) for s in specs}
        sizes = {
            "width": o.width,
            "grid": o.grid,
            "layers": 0,
            "heads": 1,
            "hidden": o.hidden,
        }
        self.encoders = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.decoders = nn.ModuleDict()
        for spec in specs:
            encoder = self.modalities[spec.name].encoder(o.dim, sizes)
            self.encoders[spec.name] = encoder
            self.heads[spec.name] = nn.Linear(encoder.tokens * o.dim, 2 * o.latent)
            self.decoders[spec.name] = self.modalities[spec.name].decoder(o.latent, sizes)

    def experts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each modality's expert: mean and log variance `(M, B, L)`.

        Rows without the modality hold zeros and must not be used.
        """
        means, logs = [], []
        for m, spec in enumerate(self.specs):
            rows = batch.observed.available[:, m].nonzero().squeeze(1)
            fields = batch.observed_fields.get(spec.name)
            tokens = self.encoders[spec.name](
                batch.values[spec.name][rows], None if fields is None else fields[rows]
            )
            x = tokens.values * tokens.available[..., None]
            mean, log_variance = self.heads[spec.name](x.flatten(1)).chunk(2, dim=1)
            blank = mean.new_zeros(len(batch), self.latent)
            means.append(blank.index_copy(0, rows, mean))
            # Bounded so that no expert becomes infinitely sure.
            logs.append(blank.index_copy(0, rows, log_variance.clamp(-10, 10)))
        return torch.stack(means), torch.stack(logs)

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the negative evidence bound per record; see `Imputer.loss`."""
        available = batch.observed.available
        subset = random_subsets(available, generator)
        mean, log_variance = product_of_experts(*self.experts(batch), subset)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
        z = mean + noise * (0.5 * log_variance).exp()
        loss = self.beta * kl_to_standard_normal(mean, log_variance)
        for m, spec in enumerate(self.specs):
            rows = available[:, m].nonzero().squeeze(1)
            if not len(rows):
                continue
            fields = batch.observed_fields.get(spec.name)
            fit = self.modalities[spec.name].log_likelihood(
                self.decoders[spec.name](z[rows]),
                batch.values[spec.name][rows],
                None if fields is None else fields[rows],
            )
            loss = loss.index_add(0, rows, -self.weight[spec.name] * fit)
        return loss

    def propose(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See `Imputer.propose`."""
        mean, log_variance = product_of_experts(*self.experts(batch), batch.observed.available)
        z = mean
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
            z = mean + noise.to(mean.device) * (0.5 * log_variance).exp()
        return {n: self.modalities[n].mean(self.decoders[n](z)) for n in wanted}
