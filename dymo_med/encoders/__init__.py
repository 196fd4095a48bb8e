"""Networks from one modality's values to tokens, by name: a modality may have several at once.

Each is a class that is made from the fitted spec of its modality, the token width and the sizes
that a recipe states by name. Every one keeps magnitude: from its tokens, before any
training, a linear map gives back how large a cell is and how bright a scan's brightest voxels are
(`tests/contracts/test_encoders.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dymo_med.blocks import Encoder
from dymo_med.encoders.base import SideBySide
from dymo_med.encoders.contrast import Contrast
from dymo_med.encoders.fine import Fine
from dymo_med.encoders.strided import Strided
from dymo_med.encoders.tables import Columns, Row
from dymo_med.encoders.voxels import Voxels
from dymo_med.registry import Registry
from dymo_med.types import ModalitySpec

IMAGE_ENCODERS: Registry[Encoder] = Registry(
    "image encoder",
    {"strided": Strided, "descriptors": Contrast, "fine": Fine, "voxels": Voxels},
)
TABLE_ENCODERS: Registry[Encoder] = Registry("table encoder", {"columns": Columns, "row": Row})


def encoder(
    table: Registry[Encoder],
    names: Sequence[str],
    spec: ModalitySpec,
    dim: int,
    sizes: Mapping[str, Any],
) -> Encoder:
    """Return the encoder of a modality: one of a table, or several whose tokens stand side by side.

    Args:
        table: Of the modality's kind.
        names: Entries of it, at least one.
        spec: The modality, fitted.
        dim: Token width D.
        sizes: Sizes by name from the recipe; each encoder takes those it knows.

    Raises:
        ConfigError: If there is no encoder of a name.
    """
    parts = [table[name](spec, dim, sizes) for name in names]
    return parts[0] if len(parts) == 1 else SideBySide(parts)


__all__ = [
    "IMAGE_ENCODERS",
    "TABLE_ENCODERS",
    "Columns",
    "Contrast",
    "Fine",
    "Row",
    "SideBySide",
    "Strided",
    "Voxels",
    "encoder",
]
