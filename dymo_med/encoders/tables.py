"""Tables as one token per column, or as one token for the whole row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dymo_med.blocks import Cells, ColumnEncoder, Encoder
from dymo_med.types import ModalitySpec, Tokens


class Columns(ColumnEncoder):
    """One token per column, and attention among the columns (`ColumnEncoder`).

    Args:
        spec: The table modality, fitted.
        dim: Token width D.
        sizes: `layers` (attention among the columns, 1) and `heads` (4).
    """

    def __init__(self, spec: ModalitySpec, dim: int, sizes: Mapping[str, Any]) -> None:
        super().__init__(spec.columns, dim, sizes.get("layers", 1), sizes.get("heads", 4))


class Row(Encoder):
    """The sum of what each filled cell says, as one token.

    Far fewer parameters than attention among columns, and the better choice for few patients. A
    blank cell adds nothing, so that it counts as the training mean; that it is blank is no
    evidence.

    Args:
        spec: The table modality, fitted.
        dim: Token width D.
        sizes: Not used.
    """

    tokens = 1

    def __init__(self, spec: ModalitySpec, dim: int, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        self.cells = Cells(spec.columns, dim)
        self.bias = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.scale = len(spec.columns) ** -0.5

    def forward(
        self,
        values: Tensor,
        observed_fields: Tensor | None = None,
        descriptors: Tensor | None = None,
    ) -> Tokens:
        """Return one token `(B, 1, D)`, available where any cell is filled.

        Args:
            values: `(B, F)`, natural units, categories as their index.
            observed_fields: Bool `(B, F)`, True = filled; None = all filled.
            descriptors: Not used.
        """
        observed_fields = self.cells.filled(values, observed_fields)
        x = self.cells.vectors(values, observed_fields) * observed_fields[..., None]
        token = x.sum(1, keepdim=True) * self.scale + self.bias
        return Tokens(token, observed_fields.any(1, keepdim=True))
