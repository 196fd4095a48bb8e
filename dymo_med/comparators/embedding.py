"""From the values of one modality to one vector, as most comparators begin."""

from __future__ import annotations

from typing import Annotated, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.blocks import Block, Encoder
from dymo_med.config import Strict
from dymo_med.modalities import modality
from dymo_med.types import Batch, ModalitySpec


class Sizes(Strict):
    """Sizes of the network that encodes a modality, named as those of the fusion transformer.

    Attributes:
        dim: Token width, and length of a modality's vector.
        heads: Attention heads.
        image_encoders: Encoders of an image, whose tokens stand side by side.
        table_encoder: Encoder of a table.
        width: First channels of image encoders.
        grid: Tokens per axis of an image, of a `strided` encoder.
        column_layers: Blocks among a table's columns, of a `columns` encoder.
    """

    dim: Annotated[int, Field(ge=8)] = 128
    heads: Annotated[int, Field(ge=1)] = 4
    image_encoders: Annotated[tuple[str, ...], Field(min_length=1)] = ("strided",)
    table_encoder: str = "columns"
    width: Annotated[int, Field(ge=4)] = 16
    grid: Annotated[int, Field(ge=1)] = 2
    column_layers: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.dim % self.heads:
            raise ValueError("dim must be a multiple of heads")
        return self


class Embedding(nn.Module):
    """The encoder of a modality's kind, and a class token that gathers its tokens.

    That is the fusion transformer for a single modality: where something lies in an image is not
    averaged away, and the token of a blank table cell is left out.

    Args:
        spec: The modality, fitted.
        options: Sizes, as `Sizes` has them.
    """

    def __init__(self, spec: ModalitySpec, options: BaseModel) -> None:
        super().__init__()
        o = Sizes.model_validate(options.model_dump(include=set(Sizes.model_fields)))
        sizes = {
            "image_encoders": o.image_encoders,
            "table_encoder": o.table_encoder,
            "width": o.width,
            "grid": o.grid,
            "layers": o.column_layers,
            "heads": o.heads,
        }
        self.name = spec.name
        self.kind = modality(spec)
        self.encoder: Encoder = self.kind.encoder(o.dim, sizes)
        self.norm = nn.LayerNorm(o.dim)
        self.position = nn.Parameter(torch.randn(self.encoder.tokens, o.dim) * 0.02)
        self.class_token = nn.Parameter(torch.randn(o.dim) * 0.02)
        self.gather = Block(o.dim, o.heads)
        self.last_norm = nn.LayerNorm(o.dim)

    def forward(self, batch: Batch) -> Tensor:
        """Return one vector per record `(B, D)`.

        Args:
            batch: B records, all of which have the modality.
        """
        values, told = batch.values[self.name], batch.descriptors.get(self.name)
        if self.encoder.described and told is None:
            told = self.kind.describe(values)
        tokens = self.encoder(values, batch.observed_fields.get(self.name), told)
        x = self.norm(tokens.values) + self.position
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + N, D)
        attend = F.pad(tokens.available, (1, 0), value=True)[:, None, None, :]
        gathered: Tensor = self.last_norm(self.gather(x, attend, first=1)[:, 0])
        return gathered
