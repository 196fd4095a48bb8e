"""The fusion transformer of DyMo, for any number of modalities of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, cast

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.backbones.base import FusionBackbone
from dymo_med.blocks import Block, Encoder
from dymo_med.config import Strict
from dymo_med.modalities import modality
from dymo_med.types import FusionOutput, ModalitySpec, Tokens

# Rows are grouped by how many tokens they have, rounded up to a multiple of this, so that
# unavailable tokens cost nothing and there are few groups.
_GROUP = 4


class FusionTransformer(FusionBackbone):
    """Encoders by modality kind, then pre-norm attention over all available tokens.

    Each modality becomes tokens (LayerNorm per modality, plus a modality and a position
    embedding); a class token attends to the available ones; its last state gives the logits and,
    through a linear map, the embedding in which prototypes live (unit length for the cosine
    distance).

    Unavailable tokens are left out rather than masked. That equals the published masking (their
    keys are blocked and only the class token is read) and saves their cost.

    Deviations from the published code, on purpose: one modality embedding per modality (a cast
    through bool gave all but the first the same one), and blank table cells are left out too.

    Args:
        specs: Modalities in canonical order.
        classes: Number of classes K.
        options: Sizes.

    References:
        DyMo: dynamic modality selection at inference, ICLR 2026 (published code, snapshot
        64e0f78: DynamicTransformer).
    """

    class Options(Strict):
        """Sizes of the network.

        Attributes:
            dim: Token width.
            heads: Attention heads.
            layers: Fusion blocks.
            projection: Length D of the embedding.
            distance: Distance of prototype loss and selection.
            image_encoders: Encoders of an image, whose tokens stand side by side.
            table_encoder: Encoder of a table.
            width: First channels of image encoders.
            grid: Tokens per axis of an image, of a `strided` encoder.
            tails: Whether a `strided` encoder has a token of intensities, which the published one
                lacks.
            column_layers: Blocks among a table's columns, of a `columns` encoder.
            steps: Tokens per sequence of feature vectors, each of neighbouring steps; 0 = one
                per step.
            dropout: Share of a modality's tokens' values dropped while training.
        """

        dim: Annotated[int, Field(ge=8)] = 128
        heads: Annotated[int, Field(ge=1)] = 4
        layers: Annotated[int, Field(ge=1)] = 2
        projection: Annotated[int, Field(ge=2)] = 64
        distance: Literal["cosine", "euclidean"] = "cosine"
        image_encoders: Annotated[tuple[str, ...], Field(min_length=1)] = ("strided",)
        table_encoder: str = "columns"
        width: Annotated[int, Field(ge=4)] = 16
        grid: Annotated[int, Field(ge=1)] = 2
        tails: bool = True
        column_layers: Annotated[int, Field(ge=0)] = 1
        steps: Annotated[int, Field(ge=0)] = 0
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

        @model_validator(mode="after")
        def _heads_divide(self) -> Self:
            if self.dim % self.heads:
                raise ValueError("dim must be a multiple of heads")
            return self

    def __init__(self, specs: Sequence[ModalitySpec], classes: int, options: BaseModel) -> None:
        super().__init__(specs, classes, options)
        o = FusionTransformer.Options.model_validate(options.model_dump())
        self.specs = tuple(specs)
        self.distance = o.distance
        sizes: dict[str, Any] = {
            "image_encoders": o.image_encoders,
            "table_encoder": o.table_encoder,
            "width": o.width,
            "grid": o.grid,
            "tails": o.tails,
            "layers": o.column_layers,
            "heads": o.heads,
            "steps": o.steps,
        }
        self.modalities = {spec.name: modality(spec) for spec in specs}
        encoders = {name: kind.encoder(o.dim, sizes) for name, kind in self.modalities.items()}
        self.encoders = nn.ModuleDict(encoders)
        self.norms = nn.ModuleDict({spec.name: nn.LayerNorm(o.dim) for spec in specs})
        self.dropout = nn.Dropout(o.dropout)
        counts = [encoder.tokens for encoder in encoders.values()]
        self.start = [sum(counts[:m]) for m in range(len(counts))]
        token_modality = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.register_buffer("token_modality", token_modality, persistent=False)
        self.modality_embedding = nn.Parameter(torch.randn(len(counts), o.dim) * 0.02)
        self.position = nn.Parameter(torch.randn(sum(counts), o.dim) * 0.02)
        self.class_token = nn.Parameter(torch.randn(o.dim) * 0.02)
        self.blocks = nn.ModuleList(Block(o.dim, o.heads) for _ in range(o.layers))
        self.classifier = nn.Linear(o.dim, classes)
        self.projection = nn.Linear(o.dim, o.projection)
        self.embedding_size = o.projection

    def encode(
        self,
        name: str,
        values: Tensor,
        observed_fields: Tensor | None = None,
        descriptors: Tensor | None = None,
    ) -> Tokens:
        """See `FusionBackbone.encode`."""
        m = next(i for i, spec in enumerate(self.specs) if spec.name == name)
        encoder = self._encoder(name)
        if encoder.described and descriptors is None:
            descriptors = self.modalities[name].describe(values)
        tokens: Tokens = encoder(values, observed_fields, descriptors)
        x = self.dropout(self.norms[name](tokens.values)) + self.modality_embedding[m]
        position = self.position[self.start[m] : self.start[m] + x.shape[1]]
        return Tokens(x + position, tokens.available)

    def _encoder(self, name: str) -> Encoder:
        return cast("Encoder", self.encoders[name])

    def described(self, name: str) -> bool:
        """See `FusionBackbone.described`."""
        return self._encoder(name).described

    def sees_voxels(self, name: str) -> bool:
        """See `FusionBackbone.sees_voxels`."""
        return self._encoder(name).sees_values

    def fuse_all(self, tokens: Tensor, available: Tensor) -> FusionOutput:
        """See `FusionBackbone.fuse`."""
        r, _, d = tokens.shape
        counts = available.sum(1)
        groups = -(-counts // _GROUP) * _GROUP
        order = (~available).to(torch.uint8).argsort(dim=1, stable=True)  # available first
        state = tokens.new_empty(r, d)
        for size in groups.unique().tolist():
            rows = (groups == size).nonzero().squeeze(1)
            size = min(size, tokens.shape[1])
            index = order[rows, :size]
            x = tokens[rows[:, None], index]  # (rows, size, D)
            x = torch.cat([self.class_token.expand(len(rows), 1, d), x], dim=1)
            attend = None
            if size and not bool((counts[rows] == size).all()):
                real = available[rows[:, None], index]
                attend = F.pad(real, (1, 0), value=True)[:, None, None, :]  # (rows, 1, 1, 1 + size)
            for block in self.blocks[:-1]:
                x = block(x, attend)
            x = self.blocks[-1](x, attend, first=1)  # only the class token is read
            state = state.index_copy(0, rows, x[:, 0].to(state.dtype))
        embedding = self.projection(state)
        if self.distance == "cosine":
            embedding = F.normalize(embedding, dim=-1)
        return FusionOutput(self.classifier(state), embedding)

    def specific_modules(self) -> list[nn.Module]:
        """See `FusionBackbone.specific_modules`."""
        return [self.encoders, self.norms]
