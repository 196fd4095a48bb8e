"""CyIN's fusion of bottleneck latents, as a backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.backbones.base import FusionBackbone
from dymo_med.cyclic import CrossModalFusion, CyclicLatents, FusionOptions, LatentOptions
from dymo_med.types import Batch, FusionOutput, ModalitySpec, Tokens


class CyclicFusion(FusionBackbone):
    """Classifier over cyclic bottleneck latents; any modality kind, any number of modalities.

    Its tokens are the latents of `CyclicLatents`, so that the imputer `cyclic`, which shares
    them, can recover a modality as tokens. Fusion is `CrossModalFusion`.

    Its own loss is CyIN's: the task over all modalities, of which in the second stage some are
    replaced by translations; the task from each modality's latents alone (label-level
    bottleneck); 1/beta times the token-level bottleneck loss; in the second stage gamma times the
    translation loss. In the first stage latents are real. Subsets are fused from latent means, as
    at inference.

    Deviations from the published method: networks for classes and an embedding stand side by
    side on the fused state, for a selector needs prototypes; convolutions before the fusion keep
    the length; absent modalities can be left out, not only filled in.

    Args:
        specs: Modalities in canonical order.
        classes: Number of outputs K.
        options: Sizes, weights, switches.

    References:
        CyIN, NeurIPS 2025, Eq. 4-23.
    """

    class Options(LatentOptions, FusionOptions):
        """Sizes, weights and switches of the network.

        Attributes:
            label_bottleneck: Whether each modality's latents have to give the answer alone.
            projection: Length D of the embedding.
            distance: Distance of prototype loss and selection.
        """

        label_bottleneck: bool = True
        projection: Annotated[int, Field(ge=2)] = 32
        distance: Literal["cosine", "euclidean"] = "cosine"

    recovers = True

    def __init__(self, specs: Sequence[ModalitySpec], classes: int, options: BaseModel) -> None:
        super().__init__(specs, classes, options)
        o = self.options = CyclicFusion.Options.model_validate(options.model_dump())
        self.specs = tuple(specs)
        self.distance = o.distance
        self.latents = CyclicLatents(specs, o)
        self.fusion = CrossModalFusion(
            len(specs),
            o.length,
            o.bottleneck,
            o.fusion_dim,
            o.heads,
            o.layers,
            o.memory_layers,
            o.fusion,
            o.dropouts([spec.name for spec in specs]),
            o.causal,
        )
        self.labels = nn.ModuleDict(
            {spec.name: nn.Linear(o.bottleneck, classes) for spec in specs}
            if o.label_bottleneck
            else {}
        )
        self.classifier = nn.Linear(self.fusion.width, classes)
        self.projection = nn.Linear(self.fusion.width, o.projection)
        self.embedding_size = o.projection
        owner = torch.arange(len(specs)).repeat_interleave(o.length)
        self.register_buffer("token_modality", owner, persistent=False)

    @property
    def space(self) -> CyclicLatents:
        """See `FusionBackbone.space`."""
        return self.latents

    def encode(
        self,
        name: str,
        values: Tensor,
        observed_fields: Tensor | None = None,
        descriptors: Tensor | None = None,
    ) -> Tokens:
        """See `FusionBackbone.encode`."""
        return self.latents.latents(name, values, observed_fields)

    def fuse_all(self, tokens: Tensor, available: Tensor) -> FusionOutput:
        """See `FusionBackbone.fuse`."""
        state = self.fusion(*self._apart(tokens, available))
        embedding = self.projection(state)
        if self.distance == "cosine":
            embedding = F.normalize(embedding, dim=-1)
        return FusionOutput(self.classifier(state), embedding)

    def specific_modules(self) -> list[nn.Module]:
        """See `FusionBackbone.specific_modules`."""
        return [self.latents.encoders, self.latents.bottlenecks]

    def fill(self, tokens: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        """See `FusionBackbone.fill`."""
        filled, now = self.latents.fill(*self._apart(tokens, available))
        return filled.flatten(1, 2), now.flatten(1)

    def own_loss(
        self,
        batch: Batch,
        progress: float,
        task_loss: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """See `FusionBackbone.own_loss`."""
        return sum(self.losses(batch, progress, task_loss, generator).values(), torch.zeros(()))

    def losses(
        self,
        batch: Batch,
        progress: float,
        task_loss: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Return the weighted terms of `own_loss`, each `(B,)`: task, label, token, translation.

        Those that are switched off, or not yet on, are not there. Arguments as `own_loss`.
        """
        o = self.options
        encoded = self.latents.encode(batch)
        z, available = self.latents.draw(encoded, generator), encoded.available
        terms: dict[str, Tensor] = {}
        if o.label_bottleneck:
            count = available.sum(2).clamp_min(1)[..., None]
            pooled = z.sum(2) / count  # (B, M, C); latents are 0 where unavailable
            terms["label"] = torch.stack(
                [
                    task_loss(self.labels[spec.name](pooled[:, i])) * encoded.present[:, i]
                    for i, spec in enumerate(self.specs)
                ]
            ).sum(0)
        if o.token_bottleneck:
            terms["token"] = self.latents.bottleneck_loss(encoded, z) / o.beta
        second = progress >= o.stage_divide and (o.translation or o.translated_latents)
        if second and len(self.specs) > 1:
            translated = self.latents.translate(z)
            if o.translation:
                loss = self.latents.translation_loss(z, available, translated)
                terms["translation"] = o.gamma * loss
            if o.translated_latents:
                z, available = self.latents.replaced(z, available, translated, generator)
        terms["task"] = task_loss(self.classifier(self.fusion(z, available)))
        return terms

    def _apart(self, tokens: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens `(R, M L, C)` and what is available of them, modality by modality."""
        shape = (len(self.specs), self.options.length)
        return tokens.unflatten(1, shape), available.unflatten(1, shape)
