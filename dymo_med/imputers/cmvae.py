"""CMVAE: MMVAE+ with a prior of clusters over the shared latent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from dymo_med.imputers.mmvae_plus import MixtureOptions, MixtureVAE, log_laplace
from dymo_med.types import ModalitySpec


class CMVAE(MixtureVAE):
    """CMVAE over any mix of modality kinds: p(u) is a learned mixture of clusters.

    p(u) = sum_c pi_c p(u | c), Laplace distributions of learned mean and variance 1. The published
    objective has E_{q(c|u)}[log pi_c + log p(u | c) - log q(c | u)] with the exact posterior
    q(c | u) = pi_c p(u | c) / p(u) in place of log p(u). With that q both are the same number,
    and so are their gradients; here log p(u) is computed, in log space, where a cluster far from
    u does no harm.

    Deviation from the published model besides those of `MixtureVAE`: no diffusion decoder.

    Args:
        specs: Modalities in canonical order, fitted.
        options: Sizes.

    References:
        Palumbo, Manduchi, Laguna, Chopard, Vogt: Deep Generative Clustering with Multimodal
        Diffusion Variational Autoencoders, ICLR 2024.
    """

    class Options(MixtureOptions):
        """Sizes of the model.

        Attributes:
            clusters: Components of the prior.
        """

        clusters: Annotated[int, Field(ge=1)] = 10

    def __init__(self, specs: Sequence[ModalitySpec], options: BaseModel) -> None:
        o = CMVAE.Options.model_validate(options.model_dump())
        super().__init__(specs, o)
        self.cluster_logits = nn.Parameter(torch.zeros(o.clusters))
        # Apart from each other from the start, or all would stay the same cluster.
        self.cluster_means = nn.Parameter(2 * torch.rand(o.clusters, o.latent) - 1)

    def log_prior(self, u: Tensor) -> Tensor:
        """See `MixtureVAE.log_prior`."""
        per_cluster = log_laplace(u.unsqueeze(-2), self.cluster_means, u.new_zeros(()))
        return (self.cluster_logits.log_softmax(0) + per_cluster).logsumexp(-1)
