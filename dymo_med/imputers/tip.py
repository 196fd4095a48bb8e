"""TIP: tables from scans, by tabular-image pre-training with masked table reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dymo_med.blocks import Block
from dymo_med.config import Strict
from dymo_med.imputers.base import LikelihoodImputer
from dymo_med.modalities import modality
from dymo_med.types import Batch, Column, ModalitySpec


def contrastive_loss(
    images: Tensor, tables: Tensor, strangers: Tensor, temperature: float
) -> Tensor:
    """Return how badly images and tables find their own partner among those of strangers.

    Half the cross-entropy of the image among all images for its table, plus half that of the
    table among all tables for its image.

    Args:
        images: `(P, E)`, unit length.
        tables: `(P, E)`, unit length; row i belongs to image i.
        strangers: Bool `(P, P)`: True where row and column are different patients. Other records
            of the same patient do not count as wrong.
        temperature: Of the softmax.

    Returns:
        `(P,)` in nats.

    References:
        Du et al.: TIP: Tabular-Image Pre-training for Multimodal Classification with Incomplete
        Data, ECCV 2024, image-tabular contrastive learning.

    Example:
        >>> same = torch.eye(2)
        >>> loss = contrastive_loss(same, same, ~torch.eye(2, dtype=torch.bool), 1.0)
        >>> [round(x, 4) for x in loss.tolist()]  # log(1 + 1/e)
        [0.3133, 0.3133]
    """
    own = torch.arange(len(images), device=images.device)
    compared = strangers | torch.eye(len(images), dtype=torch.bool, device=images.device)
    logits = (images @ tables.T / temperature).masked_fill(~compared, -torch.inf)
    image_to_table = F.cross_entropy(logits, own, reduction="none")
    table_to_image = F.cross_entropy(logits.T, own, reduction="none")
    return (image_to_table + table_to_image) / 2


def hard_negatives(similarity: Tensor, strangers: Tensor, generator: torch.Generator) -> Tensor:
    """Draw for each row a stranger, the more likely the more similar it is.

    Args:
        similarity: `(P, P)`, already divided by the temperature.
        strangers: Bool `(P, P)`, at least one True per row.
        generator: CPU generator.

    Returns:
        Int64 `(P,)`: columns drawn with weights softmax(similarity) + 0.0001.
    """
    weights = (similarity.detach().softmax(1) + 1e-4).where(strangers, 0.0)
    drawn = torch.multinomial(weights.float().cpu(), 1, generator=generator)
    return drawn.squeeze(1).to(similarity.device)


def choose_cells(filled: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
    """Choose so many of each row's filled cells at random.

    Args:
        filled: Bool `(B, F)`.
        count: `(B,)`, at most as many as are filled.
        generator: CPU generator.

    Returns:
        Bool `(B, F)`.
    """
    lot = torch.rand(filled.shape, generator=generator).to(filled.device)
    rank = lot.masked_fill(~filled, 2.0).argsort(1).argsort(1)
    return rank < count[:, None]


def other_patients_cells(
    values: Tensor, filled: Tensor, replaced: Tensor, generator: torch.Generator
) -> Tensor:
    """Replace cells by what random rows of the batch hold in the same column.

    Args:
        values: `(B, F)`.
        filled: Bool `(B, F)`: cells that may be drawn.
        replaced: Bool `(B, F)`, part of `filled`.
        generator: CPU generator.

    Returns:
        `(B, F)`: each replaced cell a draw from its column's filled cells, its own included.
    """
    count = filled.sum(0)
    donors = (~filled).to(torch.uint8).argsort(dim=0, stable=True)  # rows that have the cell first
    lot = torch.rand(filled.shape, generator=generator).to(filled.device)
    pick = torch.minimum((lot * count).long(), count - 1).clamp_min(0)
    return values.gather(0, donors.gather(0, pick)).where(replaced, values)


class _CellHead(nn.Module):
    """From a table's column tokens to the parameters of its likelihood.

    Every column has weights of its own, so a category can only be one of its own column. It
    starts from what the column's mean and frequencies say of everybody, and learns what differs.

    Args:
        columns: The columns.
        dim: Token width D.
    """

    owner: Tensor

    def __init__(self, columns: Sequence[Column], dim: int) -> None:
        super().__init__()
        sizes = torch.tensor([2 if c.type == "continuous" else len(c.values) for c in columns])
        owner = torch.repeat_interleave(torch.arange(len(columns)), sizes)
        self.register_buffer("owner", owner, persistent=False)
        self.weight = nn.Parameter(torch.zeros(len(owner), dim))
        start = [torch.tensor(c.frequencies).log() for c in columns]
        start = [s if len(s) else torch.zeros(int(n)) for s, n in zip(start, sizes, strict=True)]
        self.bias = nn.Parameter(torch.cat(start))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return parameters `(B, P)` from tokens `(B, F, D)`."""
        return (tokens.index_select(1, self.owner) * self.weight).sum(2) + self.bias


class TIP(LikelihoodImputer):
    """Recovers tables, and blank cells of tables, from scans and from the cells that are there.

    Columns of all tables are tokens of one table encoder (attention among a class token and the
    columns); a multimodal encoder lets them attend to the tokens of all available images; each
    column's last state says what the cell holds. A blank or hidden cell is a learned token that
    no other token sees. Three losses, each where a record has what it needs:

    - contrastive: image and table of a record find each other within the batch, the table with
      some cells replaced by other patients';
    - matching: the multimodal class token tells the pair from two wrong ones, whose partners are
      drawn by similarity;
    - reconstruction: hidden cells are predicted from the image and the other cells.

    A record's loss is a third of the sum of those it has the data for; for a record of images
    alone it is 0. Recovery is one pass with everything observed shown. It recovers no image.

    Deviations from the published model. A category competes with those of its own column alone
    (the published imputer takes the arg-max over the categories of all columns and clamps it into
    the column, so that a wrong column's category became the first or last one of the right
    column). Any number of images and tables. One attention over columns and image tokens in place
    of self- and cross-attention. Besides some cells of a record, whole tables are hidden, and
    images are left out of reconstruction, because both happen to patients. Continuous cells have
    a Gaussian likelihood with a learned spread where the published loss is the squared error. Two
    records of one patient are not each other's wrong partners. Images are not augmented. A random
    draw takes each cell from its own likelihood, independently of the other cells.

    Args:
        specs: Modalities in canonical order, fitted.
        options: Sizes.

    References:
        Du et al.: TIP: Tabular-Image Pre-training for Multimodal Classification with Incomplete
        Data, ECCV 2024 (and published code, snapshot 9258cc2).
    """

    class Options(Strict):
        """Sizes of the model, and how much is hidden from it in training.

        Attributes:
            dim: Token width, a multiple of `heads`.
            heads: Attention heads.
            table_layers: Blocks of the table encoder.
            layers: Blocks of the multimodal encoder.
            projection: Length of the vectors that image and table are compared by.
            width: First channels of image encoders.
            grid: Tokens per axis of an image.
            temperature: Of the contrastive softmax.
            replaced: Share of a record's cells that are replaced for contrast and matching.
            hidden: Share of a record's cells that are hidden for reconstruction.
            hidden_tables: Probability that a whole table is hidden for reconstruction.
            left_out: Probability that an image is left out of reconstruction.
        """

        dim: Annotated[int, Field(ge=8)] = 64
        heads: Annotated[int, Field(ge=1)] = 4
        table_layers: Annotated[int, Field(ge=1)] = 2
        layers: Annotated[int, Field(ge=1)] = 2
        projection: Annotated[int, Field(ge=2)] = 64
        width: Annotated[int, Field(ge=4)] = 16
        grid: Annotated[int, Field(ge=1)] = 2
        temperature: Annotated[float, Field(gt=0)] = 0.1
        replaced: Annotated[float, Field(ge=0, le=1)] = 0.3
        hidden: Annotated[float, Field(gt=0, le=1)] = 0.5
        hidden_tables: Annotated[float, Field(ge=0, le=1)] = 0.5
        left_out: Annotated[float, Field(ge=0, lt=1)] = 0.25

        @model_validator(mode="after")
        def _heads_divide(self) -> Self:
            if self.dim % self.heads:
                raise ValueError("dim must be a multiple of heads")
            return self

    probabilistic = True
    is_table: Tensor
    table_of_column: Tensor
    image_of_token: Tensor

    def __init__(self, specs: Sequence[ModalitySpec], options: BaseModel) -> None:
        super().__init__(specs, options)
        o = TIP.Options.model_validate(options.model_dump())
        self.specs = tuple(specs)
        self.options = o
        self.tables = [(m, spec) for m, spec in enumerate(self.specs) if spec.columns]
        self.images = [(m, spec) for m, spec in enumerate(self.specs) if not spec.columns]
        sizes = {"width": o.width, "grid": o.grid, "layers": 0, "heads": o.heads}
        self.modalities = {spec.name: modality(spec) for spec in self.specs}
        encoders = {name: kind.encoder(o.dim, sizes) for name, kind in self.modalities.items()}
        self.encoders = nn.ModuleDict(encoders)
        self.columns = [len(spec.columns) for _, spec in self.tables]
        self.tokens = [encoders[spec.name].tokens for _, spec in self.images]
        for name, counts in (("table_of_column", self.columns), ("image_of_token", self.tokens)):
            owner = [i for i, count in enumerate(counts) for _ in range(count)]
            self.register_buffer(name, torch.tensor(owner, dtype=torch.int64), persistent=False)
        is_table = torch.tensor([bool(spec.columns) for spec in self.specs])
        self.register_buffer("is_table", is_table, persistent=False)
        self.norms = nn.ModuleDict({spec.name: nn.LayerNorm(o.dim) for _, spec in self.images})
        self.position = nn.Parameter(torch.randn(sum(self.tokens), o.dim) * 0.02)
        self.class_token = nn.Parameter(torch.randn(o.dim) * 0.02)
        self.table_blocks = nn.ModuleList(Block(o.dim, o.heads) for _ in range(o.table_layers))
        self.blocks = nn.ModuleList(Block(o.dim, o.heads) for _ in range(o.layers))
        self.norm = nn.LayerNorm(o.dim)
        self.image_projection = _projection(o.dim, o.projection)
        self.table_projection = _projection(o.dim, o.projection)
        self.match = nn.Linear(o.dim, 2)
        self.heads = nn.ModuleDict(
            {spec.name: _CellHead(spec.columns, o.dim) for _, spec in self.tables}
        )

    # -- encoders ------------------------------------------------------------------------------

    def encode_images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the tokens of all images `(B, N, D)`, and bool `(B, N)`: which are available.

        Args:
            batch: B records. Images that were not observed are not encoded; their tokens are 0.
        """
        dim = self.options.dim
        tokens, available = [self.position.new_zeros(len(batch), 0, dim)], []
        for (m, spec), count in zip(self.images, self.tokens, strict=True):
            has = batch.observed.available[:, m]
            rows = has.nonzero().squeeze(1)
            x = self.position.new_zeros(len(batch), count, dim)
            if len(rows):
                encoded = self.norms[spec.name](
                    self.encoders[spec.name](batch.values[spec.name][rows]).values
                )
                x = x.index_copy(0, rows, encoded.to(x.dtype))
            tokens.append(x)
            available.append(has)
        which = torch.stack(available, 1) if available else self.is_table.new_zeros(len(batch), 0)
        return torch.cat(tokens, 1) + self.position, which[:, self.image_of_token]

    def encode_tables(self, values: Tensor, shown: Tensor) -> Tensor:
        """Return the class token and one token per column `(B, 1 + F, D)`.

        Args:
            values: `(B, F)`, the cells of all tables side by side, in natural units.
            shown: Bool `(B, F)`: cells that may be seen.
        """
        parts = zip(self.tables, self._split(values), self._split(shown), strict=True)
        tokens = [self.class_token.expand(len(values), 1, -1)]
        tokens += [self.encoders[spec.name](v, s).values for (_, spec), v, s in parts]
        x = torch.cat(tokens, 1)
        attend = _visible(F.pad(shown, (1, 0), value=True))
        for block in self.table_blocks:
            x = block(x, attend)
        return x

    def fuse(self, tables: Tensor, shown: Tensor, images: Tensor, available: Tensor) -> Tensor:
        """Return class token and columns `(B, 1 + F, D)` after they attended to the images.

        Args:
            tables: `(B, 1 + F, D)` from `encode_tables`.
            shown: Bool `(B, F)`.
            images: `(B, N, D)` from `encode_images`.
            available: Bool `(B, N)`.
        """
        length = tables.shape[1]
        x = torch.cat([tables, images], 1)
        attend = _visible(torch.cat([F.pad(shown, (1, 0), value=True), available], 1))
        for block in self.blocks[:-1]:
            x = block(x, attend)
        x = self.blocks[-1](x, attend[:, :, :length], first=length)
        fused: Tensor = self.norm(x)
        return fused

    def _cells(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return values `(B, F)` of all tables side by side, and bool `(B, F)`: filled."""
        values = torch.cat([batch.values[spec.name] for _, spec in self.tables], 1)
        filled = [
            batch.observed_fields[spec.name] & batch.observed.available[:, m, None]
            for m, spec in self.tables
        ]
        return values, torch.cat(filled, 1)

    # -- training ------------------------------------------------------------------------------

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return a third of contrast, matching and reconstruction each, per record, in nats.

        In evaluation mode it is the reconstruction alone: recovery rests on that, while contrast
        and matching, which are there to shape the encoders, are learned by heart earlier, so that
        the best epoch by their sum was one of the first.
        """
        values, filled = self._cells(batch)
        images, available = self.encode_images(batch)
        total = self.reconstruction_loss(values, filled, images, available, generator)
        if not self.training:
            return total
        rows = (available.any(1) & filled.any(1)).nonzero().squeeze(1)  # (P,)
        if len(rows) > 1:
            number = {patient: i for i, patient in enumerate(batch.patient_ids)}
            patient = torch.tensor([number[p] for p in batch.patient_ids], device=rows.device)[rows]
            strangers = patient[:, None] != patient
            parts = self.pair_losses(
                values[rows], filled[rows], images[rows], available[rows], strangers, generator
            )
            total = total.index_add(0, rows, parts)
        return total / 3

    def pair_losses(
        self,
        values: Tensor,
        filled: Tensor,
        images: Tensor,
        available: Tensor,
        strangers: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return contrastive plus matching loss of P records with an image and a cell, `(P,)`.

        Args:
            values: `(P, F)`.
            filled: Bool `(P, F)`, some True in each row.
            images: `(P, N, D)` from `encode_images`.
            available: Bool `(P, N)`, some True in each row.
            strangers: Bool `(P, P)`: True where row and column are different patients.
            generator: CPU generator.
        """
        o = self.options
        # Rounded down, lest a table of one column be nothing but another patient's cell.
        replaced = choose_cells(filled, (o.replaced * filled.sum(1)).floor(), generator)
        values = other_patients_cells(values, filled, replaced, generator)
        tables = self.encode_tables(values, filled)
        weight = available[..., None].to(images.dtype)
        pooled = (images * weight).sum(1) / weight.sum(1)
        a = F.normalize(self.image_projection(pooled), dim=1)
        b = F.normalize(self.table_projection(tables[:, 0]), dim=1)
        loss = contrastive_loss(a, b, strangers, o.temperature)

        rows = strangers.any(1).nonzero().squeeze(1)
        if not len(rows):
            return loss
        similarity = (a @ b.T / o.temperature)[rows]
        wrong_table = hard_negatives(similarity, strangers[rows], generator)
        similarity = (b @ a.T / o.temperature)[rows]
        wrong_image = hard_negatives(similarity, strangers[rows], generator)
        table = torch.cat([rows, wrong_table, rows])
        image = torch.cat([rows, rows, wrong_image])
        fused = self.fuse(tables[table], filled[table], images[image], available[image])
        matches = torch.arange(3 * len(rows), device=rows.device) < len(rows)
        wrong = F.cross_entropy(self.match(fused[:, 0]), matches.long(), reduction="none")
        return loss.index_add(0, rows, wrong.view(3, -1).mean(0))

    def reconstruction_loss(
        self,
        values: Tensor,
        filled: Tensor,
        images: Tensor,
        available: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the mean negative log-likelihood of a record's hidden cells, `(B,)`; 0 = none.

        Args:
            values: `(B, F)`.
            filled: Bool `(B, F)`.
            images: `(B, N, D)` from `encode_images`.
            available: Bool `(B, N)`.
            generator: CPU generator.
        """
        o, b = self.options, len(values)
        whole = torch.rand(b, len(self.tables), generator=generator) < o.hidden_tables
        whole = whole.to(filled.device)[:, self.table_of_column]
        some = choose_cells(filled, (o.hidden * filled.sum(1)).ceil(), generator)
        hidden = filled & (some | whole)
        kept = torch.rand(b, len(self.images), generator=generator) >= o.left_out
        available = available & kept.to(filled.device)[:, self.image_of_token]
        shown = filled & ~hidden
        fused = self.fuse(self.encode_tables(values, shown), shown, images, available)
        loss = fused.new_zeros(b)
        parts = zip(self.tables, *map(self._split, (fused[:, 1:], values, hidden)), strict=True)
        for (_, spec), tokens, truth, asked in parts:
            parameters = self.heads[spec.name](tokens)
            loss = loss - self.modalities[spec.name].log_likelihood(parameters, truth, asked)
        return loss / hidden.sum(1).clamp_min(1)

    # -- recovery ------------------------------------------------------------------------------

    def recoverable(self, observed: Tensor) -> Tensor:
        """Return bool `(B, M)`: all tables, where anything at all is observed."""
        return super().recoverable(observed) & self.is_table

    def likelihoods(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """See `LikelihoodImputer.likelihoods`."""
        values, filled = self._cells(batch)
        fused = self.fuse(self.encode_tables(values, filled), filled, *self.encode_images(batch))
        return {
            spec.name: self.heads[spec.name](tokens)
            for (_, spec), tokens in zip(self.tables, self._split(fused[:, 1:]), strict=True)
            if spec.name in wanted
        }

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return each table's part `(B, F, ...)` of all columns side by side."""
        parts: tuple[Tensor, ...] = x.split(self.columns, dim=1)
        return parts


def _visible(shown: Tensor) -> Tensor:
    """Return bool `(B, 1, N, N)`: every token sees the shown ones `(B, N)` and itself."""
    itself = torch.eye(shown.shape[1], dtype=torch.bool, device=shown.device)
    return (shown[:, None, :] | itself).unsqueeze(1)


def _projection(dim: int, size: int) -> nn.Module:
    """Return the network behind which image and table are compared."""
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, size))
