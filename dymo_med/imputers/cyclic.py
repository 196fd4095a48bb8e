"""CyIN's cyclic translation, as an imputer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from dymo_med.cyclic import CyclicLatents, LatentOptions
from dymo_med.errors import ConfigError, Problem
from dymo_med.imputers.base import LikelihoodImputer, start_from_mean_images
from dymo_med.modalities import modality
from dymo_med.types import Batch, LatentTokens, ModalitySpec


class Cyclic(LikelihoodImputer):
    """Recovers a modality by translating the bottleneck latents of those observed.

    Beside the backbone `cyclic` it shares that network's latents, weights and all (`tie`): what it
    recovers are tokens of the backbone, and all that is trained here is a light decoder, which
    shows what a latent stands for. With any other backbone it trains latents of its own, by
    token-level bottlenecks, translation, and the decoder's likelihood (there is no task to hold
    them); then its values are what counts.

    A modality, and the blank cells of a table, can be recovered from any other modality. It says
    nothing of how sure it is, and so draws nothing.

    Args:
        specs: Modalities in canonical order, fitted.
        options: Sizes; those of latents must be the backbone's where they are shared.

    References:
        CyIN, NeurIPS 2025, Eq. 13-20.
    """

    class Options(LatentOptions):
        """Sizes of latents and decoders.

        Attributes:
            decoder_width: Last channels of image decoders.
            decoder_hidden: Hidden width of table decoders.
        """

        decoder_width: Annotated[int, Field(ge=4)] = 8
        decoder_hidden: Annotated[int, Field(ge=8)] = 64

    probabilistic = False
    latents: CyclicLatents

    def __init__(self, specs: Sequence[ModalitySpec], options: BaseModel) -> None:
        super().__init__(specs, options)
        o = self.options = Cyclic.Options.model_validate(options.model_dump())
        self.specs = tuple(specs)
        self.modalities = {spec.name: modality(spec) for spec in specs}
        self.latents = CyclicLatents(specs, o)
        self.tied = False
        sizes = {"width": o.decoder_width, "hidden": o.decoder_hidden}
        self.decoders = nn.ModuleDict(
            {s.name: self.modalities[s.name].decoder(o.length * o.bottleneck, sizes) for s in specs}
        )

    def tie(self, backbone: nn.Module) -> bool:
        """See `Imputer.tie`."""
        shared = getattr(backbone, "space", None)
        if not isinstance(shared, CyclicLatents):
            return False
        mine, theirs = self.options, shared.options
        differing = [
            key for key in LatentOptions.model_fields if getattr(mine, key) != getattr(theirs, key)
        ]
        if differing:
            raise ConfigError(
                Problem(
                    "Imputer and backbone cyclic",
                    f"they share latents, but differ in {', '.join(differing)}",
                    expected="the same options",
                    remedy="Give both the same values in the recipe",
                )
            )
        del self.latents
        # Past the register of parts: it is the backbone's, which trains, saves and moves it.
        object.__setattr__(self, "latents", shared)
        self.tied = True
        return True

    def start_from(self, batch: Batch) -> None:
        """Start image decoders from the mean image of the training records."""
        start_from_mean_images(self.specs, self.decoders, batch)

    def recoverable(self, observed: Tensor) -> Tensor:
        """Return bool `(B, M)`: whatever another modality is observed for."""
        return observed.sum(1, keepdim=True) - observed.int() > 0

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the loss per record: the decoders', and those of latents that are its own."""
        o = self.options
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.tied):
            encoded = self.latents.encode(batch)
            z = encoded.mean if self.tied else self.latents.draw(encoded, generator)
            translated = self.latents.translate(z)
            present = encoded.present
            other = ~torch.eye(len(self.specs), dtype=torch.bool, device=z.device)
            counted = present[:, :, None] & other
            recovered = self.latents.combined(translated, counted)
            total = z.new_zeros(len(batch))
            if not self.tied:
                if o.token_bottleneck:
                    total = total + self.latents.bottleneck_loss(encoded, z) / o.beta
                if o.translation:
                    total = total + o.gamma * self.latents.translation_loss(
                        z, encoded.available, translated
                    )
        for m, spec in enumerate(self.specs):
            # What is shown is decoded from recoveries; measured latents say what there is to show.
            for latents, known in (
                (z, present[:, m]),
                (recovered, present[:, m] & counted.any(1)[:, m]),
            ):
                rows = known.nonzero().squeeze(1)
                if len(rows):
                    fit = self._log_likelihood(spec, latents[rows, m], batch, rows)
                    total = total.index_add(0, rows, -fit)
        return total

    def _log_likelihood(
        self, spec: ModalitySpec, latents: Tensor, batch: Batch, rows: Tensor
    ) -> Tensor:
        """Return a modality's log-likelihood per voxel or cell, `(R,)`."""
        fields = batch.observed_fields.get(spec.name)
        fit = self.modalities[spec.name].log_likelihood(
            self.decoders[spec.name](latents.flatten(1)),
            batch.values[spec.name][rows],
            None if fields is None else fields[rows],
        )
        return fit / prod(spec.shape)

    def latent_tokens(self, batch: Batch, wanted: Sequence[str]) -> LatentTokens:
        """See `Imputer.latent_tokens`: measured latents where there are any, else translations."""
        encoded = self.latents.encode(batch)
        mean = encoded.mean
        if self.latents.options.latents == "sample":
            mean = self.latents.draw(encoded, torch.Generator().manual_seed(0))
        filled, _ = self.latents.fill(mean, encoded.available)
        at = {spec.name: m for m, spec in enumerate(self.specs)}
        return LatentTokens(self.latents, {name: filled[:, at[name]] for name in wanted})

    def likelihoods(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See `LikelihoodImputer.likelihoods`."""
        found = self.latent_tokens(batch, wanted).values
        return {name: self.decoders[name](z.flatten(1)) for name, z in found.items()}
