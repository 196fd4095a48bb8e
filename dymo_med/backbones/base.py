"""What every fusion backbone offers: encode each version of a modality once, fuse many times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dymo_med.types import Batch, FusionOutput, ModalitySpec, Tokens


class FusionBackbone(nn.Module, ABC):
    """A classifier over any non-empty set of modalities.

    Which modalities take part is said by a mask, never by leaving tokens out: `fuse` takes the
    tokens of all M modalities, always. Whoever has no tokens for a modality that is not used, as an
    explanation or a set of draws, gives zeros and marks them unavailable. A network may then rely
    on the place of a token, and tell modalities apart by it.

    Attributes:
        Options: Its part of a recipe.
        specs: Modalities in canonical order.
        distance: Distance its embedding is trained for.
        token_modality: Int64 `(N,)`, the modality each token belongs to; rises from 0 to M - 1.
        embedding_size: Length D of its embedding.
        recovers: Whether it can recover modalities itself (`fill`).
    """

    Options: ClassVar[type[BaseModel]]
    specs: tuple[ModalitySpec, ...]
    distance: Literal["cosine", "euclidean"]
    token_modality: Tensor
    embedding_size: int
    recovers: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, specs: Sequence[ModalitySpec], classes: int, options: BaseModel) -> None:
        super().__init__()

    @abstractmethod
    def encode(
        self,
        name: str,
        values: Tensor,
        observed_fields: Tensor | None = None,
        descriptors: Tensor | None = None,
    ) -> Tokens:
        """Return the tokens of one version of one modality, ready to fuse.

        Args:
            name: Modality.
            values: `(B, *shape)`.
            observed_fields: Bool `(B, F)` for tables; None = every cell filled.
            descriptors: `(B, P)` of images as stored; None = what their values make probable
                (`Modality.describe`).

        Returns:
            As many tokens as `token_modality` has for it, `(B, N_m, D)`.
        """

    def fuse(self, tokens: Tensor, available: Tensor) -> FusionOutput:
        """Return class logits and embedding of each row's available tokens.

        Args:
            tokens: `(R, N, D)`: the tokens of all M modalities side by side, in canonical order
                (`token_modality`), those of unused modalities too.
            available: Bool `(R, N)`; any set, of part of a modality's tokens too. What stands in an
                unavailable token changes nothing.

        Raises:
            ValueError: If there are not N tokens in each row.
        """
        n = len(self.token_modality)
        if tokens.ndim != 3 or tokens.shape[1] != n or available.shape != tokens.shape[:2]:
            raise ValueError(
                f"fuse takes the tokens of all modalities, (R, {n}, D), and which of them are"
                f" available, (R, {n}); got {tuple(tokens.shape)} and {tuple(available.shape)}."
            )
        return self.fuse_all(tokens, available)

    @abstractmethod
    def fuse_all(self, tokens: Tensor, available: Tensor) -> FusionOutput:
        """Return what `fuse` does, once the shapes are known to be right."""

    @abstractmethod
    def specific_modules(self) -> list[nn.Module]:
        """Return the modules that hold each modality's own parameters.

        No other modality's tokens depend on these, and every other parameter may serve several.
        """

    def described(self, name: str) -> bool:
        """Return whether an image's tokens depend on its descriptors."""
        return False

    def sees_voxels(self, name: str) -> bool:
        """Return whether an image's tokens depend on its voxels on the grid."""
        return True

    @property
    def space(self) -> nn.Module | None:
        """Whose tokens it fuses, if recoveries may come as such (`LatentTokens`)."""
        return None

    def own_loss(
        self,
        batch: Batch,
        progress: float,
        task_loss: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> Tensor | None:
        """Return what the network minimises besides the task over subsets, `(B,)`; None = nothing.

        Args:
            batch: B training records, possibly incomplete.
            progress: Share of the epochs that are over, from 0.
            task_loss: The task's loss `(B,)` of outputs `(B, K)` for these records.
            generator: CPU generator behind every random number.
        """
        return None

    def fill(self, tokens: Tensor, available: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens in which the network itself recovers others, and what is available then.

        A network that cannot (`recovers`) returns what it is given.

        Args:
            tokens: `(R, N, D)`.
            available: Bool `(R, N)`.
        """
        return tokens, available
