"""MoPoE-VAE: a multimodal VAE whose posterior is a mixture of products of experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel
from torch import Tensor

from dymo_med.imputers.vae import MultimodalVAE, VAEOptions
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


class MoPoE(MultimodalVAE):
    """Mixture-of-products-of-experts VAE over any mix of modality kinds.

    One Gaussian expert per modality; the posterior of a subset is the product of its experts and
    the prior; the joint posterior is the uniform mixture over the subsets of what a patient has.
    Each training step draws one mixture component per patient and asks it to explain everything
    the patient has; likelihood terms exist only where data exist, so incomplete training cohorts
    work as they are. Recovery decodes the posterior mean of the observed modalities.

    Deviations from the published model: one component per patient and step instead of a
    contiguous slice of the batch per component (the same expectation); the prior is an expert in
    every product and not only in the full one, so that a single overconfident expert cannot
    escape it; and the latent map of `MultimodalVAE` (as in U-HVED, here at one scale), fused cell
    by cell.

    Args:
        specs: Modalities in canonical order, fitted.
        options: Sizes.

    References:
        Sutter, Daunhawer, Vogt: Generalized Multimodal ELBO, ICLR 2021.
        Dorent et al.: Hetero-Modal Variational Encoder-Decoder, MICCAI 2019.
    """

    Options = VAEOptions

    def __init__(self, specs: Sequence[ModalitySpec], options: BaseModel) -> None:
        o = VAEOptions.model_validate(options.model_dump())
        super().__init__(specs, o, o.latent)

    def posterior(self, batch: Batch, subset: Tensor) -> tuple[Tensor, Tensor]:
        """Return the product of a subset's experts: mean and log variance `(B, L + C T)`.

        Args:
            batch: B records.
            subset: Bool `(B, M)`, part of what was observed. Other experts are not evaluated.
        """
        mean, log_variance = self.encode(batch, subset)
        end = self.vector
        has_map = torch.tensor(self.has_map, device=subset.device)
        vector = product_of_experts(mean[..., :end], log_variance[..., :end], subset)
        cells = product_of_experts(mean[..., end:], log_variance[..., end:], subset & has_map)
        return torch.cat([vector[0], cells[0]], 1), torch.cat([vector[1], cells[1]], 1)

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the negative evidence bound per record and (weighted) element."""
        available = batch.observed.available
        seen = self.partly_hidden(batch, generator)
        mean, log_variance = self.posterior(seen, random_subsets(available, generator))
        z = _draw(mean, log_variance, generator)
        loss = self.beta * kl_to_standard_normal(mean, log_variance)
        for m, spec in enumerate(self.specs):
            rows = available[:, m].nonzero().squeeze(1)
            if not len(rows):
                continue
            loss = loss.index_add(0, rows, -self.log_likelihood(spec.name, z[rows], batch, rows))
        return loss / self.elements

    def likelihoods(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See `LikelihoodImputer.likelihoods`."""
        mean, log_variance = self.posterior(batch, batch.observed.available)
        z = mean if generator is None else _draw(mean, log_variance, generator)
        return {name: self.decode(name, z) for name in wanted}


def _draw(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    """Return one draw per row of N(mean, e^log_variance)."""
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
    return mean + noise * (0.5 * log_variance).exp()
