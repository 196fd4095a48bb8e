"""What every fusion backbone offers: encode each version of a modality once, fuse many times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import BaseModel
from torch import Tensor, nn

from dymo_med.types import FusionOutput, ModalitySpec, Tokens


class FusionBackbone(nn.Module, ABC):
    """A classifier over any non-empty set of modalities.

    Attributes:
        Options: Its part of a recipe.
        specs: Modalities in canonical order.
        distance: Distance its embedding is trained for.
        token_modality: Int64 `(N,)`, the modality each token belongs to.
    """

    Options: ClassVar[type[BaseModel]]
    specs: tuple[ModalitySpec, ...]
    distance: Literal["cosine", "euclidean"]
    token_modality: Tensor

    @abstractmethod
    def __init__(self, specs: Sequence[ModalitySpec], classes: int, options: BaseModel) -> None:
        super().__init__()

    @abstractmethod
    def encode(self, name: str, values: Tensor, observed_fields: Tensor | None = None) -> Tokens:
        """Return the tokens of one version of one modality, ready to fuse.

        Args:
            name: Modality.
            values: `(B, *shape)`.
            observed_fields: Bool `(B, F)` for tables; None = every cell filled.
        """

    @abstractmethod
    def fuse(self, tokens: Tensor, available: Tensor) -> FusionOutput:
        """Return class logits and embedding of each row's available tokens.

        Args:
            tokens: `(R, N, D)`, modalities side by side in canonical order.
            available: Bool `(R, N)`. What stands in an unavailable token changes nothing.
        """

    @abstractmethod
    def specific_modules(self) -> list[nn.Module]:
        """Return the modules that hold each modality's own parameters.

        No other modality's tokens depend on these, and every other parameter may serve several.
        """
