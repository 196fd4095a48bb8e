"""MMVAE+: a multimodal VAE whose posterior is a mixture of experts, with private latents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import log, prod, sqrt
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from dymo_med.imputers.vae import SURE, MultimodalVAE, VAEOptions
from dymo_med.types import Batch, ModalitySpec


def log_laplace(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log density of independent Laplace variables, summed over the last axis.

    A Laplace distribution of variance v has scale sqrt(v / 2).

    Args:
        x: `(..., L)`.
        mean: `(..., L)`.
        log_variance: `(..., L)`.

    Returns:
        `(...)`, in nats.

    Example:
        >>> zero = torch.zeros(1)
        >>> round(log_laplace(zero, zero, zero).exp().item(), 4)  # 1 / (2 scale)
        0.7071
    """
    standard = sqrt(2) * (x - mean).abs() * (-0.5 * log_variance).exp()
    return -(standard + 0.5 * log_variance + 0.5 * log(2)).sum(-1)


def random_few(available: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return for each row at most so many of what is available, every choice equally likely.

    Args:
        available: Bool `(B, M)`.
        most: How many.
        generator: CPU generator.

    Returns:
        Bool `(B, M)`.
    """
    score = torch.rand(available.shape, generator=generator).to(available.device)
    order = score.masked_fill(~available, -1).argsort(1, descending=True)
    return available & (order.argsort(1) < most)


def draw_laplace(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    """Return one draw from independent Laplace variables.

    Args:
        mean: Any shape.
        log_variance: Same shape.
        generator: CPU generator.
    """
    half = torch.rand(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device) - 0.5
    # The generator can yield an exact 0, whose logarithm would be infinite.
    tail = (1 - 2 * half.abs()).clamp_min(torch.finfo(mean.dtype).eps)
    standard = -half.sign() * tail.log() / sqrt(2)
    return mean + standard * (0.5 * log_variance).exp()


class MixtureOptions(VAEOptions):
    """Sizes of a mixture-of-experts VAE.

    Attributes:
        private: Length of each modality's private latent vector.
        samples: K, latents drawn per record and encoding modality in training.
        encoders: At most so many observed modalities encode per record and training step.
    """

    private: Annotated[int, Field(ge=1)] = 16
    samples: Annotated[int, Field(ge=1)] = 1
    encoders: Annotated[int, Field(ge=1)] = 2
    column_layers: Annotated[int, Field(ge=0)] = 1
    hide_cells: Annotated[float, Field(ge=0, lt=1)] = 0.3


class MixtureVAE(MultimodalVAE):
    """Mixture-of-experts VAE with a shared latent u and a private latent w_m per modality.

    Each observed modality m of a record encodes u_m and w_m, reconstructs itself from
    (u_m, w_m), and every other observed modality n from (u_m, w~_n), where w~_n comes from an
    auxiliary zero-mean Laplace distribution r_n of learned scale. So what u does not hold cannot
    reach another modality through w. Minimised is minus the mean over m of

        log 1/K sum_k exp[ sum_n log p(x_n | u_m, w) + beta (log p(u_m) - log 1/M sum_j q_j(u_m)
                                                             + log p(w_m) - log q_m(w_m)) ],

    m, n and j running over the M observed modalities of the record: incomplete cohorts train as
    they are. Posteriors are Laplace distributions, so is the prior of w (variance 1). A subclass
    says what p(u) is.

    Recovery decodes posterior means: u is the mean of what the observed modalities say; w of a
    missing modality is 0, the mean of r_n; w of a partly filled table is its own. Every observed
    modality counts the same: each learns to be as sure as all of them together are, so weighting
    by precision changes nothing (measured). A random draw takes u from one observed modality
    picked at random, as the published code does, and w from r_n or its own posterior.

    Where there is a latent map, it is part of u. A table says nothing about it, so with a table
    as the encoding modality the map comes, like w~_n, from an auxiliary distribution of learned
    scale and enters no density but the likelihoods; in the mixture over j of an image's u a table
    stands for the map's prior (Laplace, variance 1). At recovery the observed images' maps count.

    Deviations from the published models: free log variances (in the published code the scales of
    a posterior sum to the length of the vector, which keeps it from being sure of everything
    there is to know); one network per modality gives u and w; the latent map; weighted tables,
    whose experts do not see every cell in training (`partly_hidden`).
    For K > 1 the gradient is the plain one of the bound above, not the doubly reparametrised one.
    Of the mean over m, each step computes a random part (`encoders`), which has the same
    expectation: decoding every modality from every other takes M^2 decodings per record.

    Args:
        specs: Modalities in canonical order, fitted.
        options: Sizes.
    """

    def __init__(self, specs: Sequence[ModalitySpec], options: MixtureOptions) -> None:
        super().__init__(specs, options, options.latent + options.private)
        self.shared = options.latent
        self.samples, self.encoders = options.samples, options.encoders
        # Log variances of r_n. They start small for the same reason as the experts': a decoder that
        # meets noise in the map for every table that encodes learns to ignore the map.
        self.auxiliary = nn.Parameter(torch.full((len(specs), options.private), SURE))
        self.auxiliary_map: nn.Parameter | None = None
        if self.grid and not all(self.has_map):
            self.auxiliary_map = nn.Parameter(torch.full((self.map_channels,), SURE))

    @abstractmethod
    def log_prior(self, u: Tensor) -> Tensor:
        """Return log p(u) `(...)` of shared vectors `(..., L)`."""

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the negative evidence bound per record and (weighted) element."""
        available = batch.observed.available
        mean, log_variance = self._posteriors(self.partly_hidden(batch, generator))
        # One pair for every record and modality of it that encodes in this step.
        encoding = random_few(available, self.encoders, generator)
        encoder, row = encoding.T.nonzero(as_tuple=True)  # (E,)
        several = (self.samples, -1, -1)
        center, spread = (
            mean[encoder, row].expand(several),
            log_variance[encoder, row].expand(several),
        )
        z = draw_laplace(center, spread, generator)  # (K, E, V + C T)
        bound = self.beta * self._log_ratio(z, mean, log_variance, available, encoder, row)
        for m, spec in enumerate(self.specs):
            pair = available[row, m].nonzero().squeeze(1)
            if not len(pair):
                continue
            own = (encoder[pair] == m)[:, None]
            w = z[:, pair, self.shared : self.vector]
            spread = self.auxiliary[m].expand_as(w)
            w = torch.where(own, w, draw_laplace(torch.zeros_like(w), spread, generator))
            latents = torch.cat([z[:, pair, : self.shared], w, z[:, pair, self.vector :]], -1)
            fit = self.log_likelihood(
                spec.name, latents.flatten(0, 1), batch, row[pair].repeat(self.samples)
            )
            bound = bound.index_add(1, pair, fit.view(self.samples, -1))
        per_pair = bound.logsumexp(0) - log(self.samples)
        per_pair = per_pair / encoding.sum(1)[row]
        loss = per_pair.new_zeros(len(batch)).index_add(0, row, -per_pair)
        return loss / self.elements

    def likelihoods(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See `LikelihoodImputer.likelihoods`."""
        available = batch.observed.available
        mean, log_variance = self._posteriors(batch)
        maps = available & torch.tensor(self.has_map, device=available.device)
        if generator is None:
            u = _mean_over(mean[..., : self.shared], available)
            z_map = _mean_over(mean[..., self.vector :], maps)
        else:
            score = torch.rand(available.shape, generator=generator).to(available.device)
            row = torch.arange(len(batch), device=available.device)
            pick = score.masked_fill(~available, -1).argmax(1)
            part = slice(self.shared)
            u = draw_laplace(mean[pick, row, part], log_variance[pick, row, part], generator)
            # If the one picked is a table, the map still comes from an image that was observed.
            pick = score.masked_fill(~maps, -1).argmax(1).where(maps.any(1), pick)
            part = slice(self.vector, None)
            z_map = draw_laplace(mean[pick, row, part], log_variance[pick, row, part], generator)
        found = {}
        for m, spec in enumerate(self.specs):
            if spec.name not in wanted:
                continue
            w = mean[m, :, self.shared : self.vector]  # 0 where the modality is missing
            if generator is not None:
                spread = log_variance[m, :, self.shared : self.vector]
                spread = torch.where(available[:, m, None], spread, self.auxiliary[m])
                w = draw_laplace(w, spread, generator)
            found[spec.name] = self.decode(spec.name, torch.cat([u, w, z_map], 1))
        return found

    def _posteriors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return `encode` of all that was observed; a table's map is the auxiliary one."""
        mean, log_variance = self.encode(batch, batch.observed.available)
        if self.auxiliary_map is not None:
            tables = ~torch.tensor(self.has_map, device=mean.device)
            unknown = self.auxiliary_map.repeat_interleave(prod(self.grid))
            log_variance[tables, :, self.vector :] = unknown
        return mean, log_variance

    def _log_ratio(
        self,
        z: Tensor,
        mean: Tensor,
        log_variance: Tensor,
        available: Tensor,
        encoder: Tensor,
        row: Tensor,
    ) -> Tensor:
        """Return log prior minus log posterior density of each draw, `(K, E)`.

        Args:
            z: Draws `(K, E, V + C T)`.
            mean: `(M, B, V + C T)`.
            log_variance: `(M, B, V + C T)`.
            available: Bool `(B, M)`.
            encoder: Int64 `(E,)`.
            row: Int64 `(E,)`.
        """
        shared, private = slice(self.shared), slice(self.shared, self.vector)
        cells = slice(self.vector, None)
        u, w, z_map = z[..., shared], z[..., private], z[..., cells]
        zero = z.new_zeros(())
        knows_map = torch.tensor(self.has_map, device=row.device)[encoder]
        prior_map = log_laplace(z_map, zero, zero).where(knows_map, zero)
        mixture = []
        for j, has_map in enumerate(self.has_map):
            center, spread = mean[j, row], log_variance[j, row]
            density = log_laplace(u, center[:, shared], spread[:, shared])
            if has_map:
                q_map = log_laplace(z_map, center[:, cells], spread[:, cells])
                density = density + q_map.where(knows_map, zero)
            else:
                density = density + prior_map
            mixture.append(density.masked_fill(~available[row, j], -torch.inf))
        posterior_u = torch.stack(mixture).logsumexp(0) - available.sum(1)[row].log()
        center, spread = mean[encoder, row], log_variance[encoder, row]
        posterior_w = log_laplace(w, center[:, private], spread[:, private])
        prior = self.log_prior(u) + prior_map + log_laplace(w, zero, zero)
        return prior - posterior_u - posterior_w


def _mean_over(mean: Tensor, available: Tensor) -> Tensor:
    """Return the mean of `(M, B, L)` over what is available `(B, M)`; 0 where nothing is."""
    weight = available.T[..., None].to(mean.dtype)
    return (mean * weight).sum(0) / weight.sum(0).clamp_min(1)


class MMVAEPlus(MixtureVAE):
    """MMVAE+ over any mix of modality kinds: p(u) is a Laplace distribution of variance 1.

    References:
        Palumbo, Daunhawer, Vogt: MMVAE+: Enhancing the Generative Quality of Multimodal VAEs
        without Compromises, ICLR 2023.
    """

    Options = MixtureOptions

    def __init__(self, specs: Sequence[ModalitySpec], options: BaseModel) -> None:
        super().__init__(specs, MixtureOptions.model_validate(options.model_dump()))

    def log_prior(self, u: Tensor) -> Tensor:
        """See `MixtureVAE.log_prior`."""
        zero = u.new_zeros(())
        return log_laplace(u, zero, zero)
