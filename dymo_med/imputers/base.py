"""What every imputer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dymo_med.errors import PatientDataError, Problem
from dymo_med.types import Batch, ModalitySpec, Recovery


class Imputer(nn.Module, ABC):
    """Recovers missing modalities, and blank cells of partly filled tables, from observed ones.

    A subclass says what it can recover and proposes values for it; what was observed is passed on
    here, bit for bit, so that no imputer can touch it.

    Attributes:
        Options: Its part of a recipe.
        specs: Modalities in canonical order.
        probabilistic: Whether `propose` can draw.
    """

    Options: ClassVar[type[BaseModel]]
    probabilistic: ClassVar[bool]
    specs: tuple[ModalitySpec, ...]

    @abstractmethod
    def __init__(self, specs: Sequence[ModalitySpec], options: BaseModel) -> None:
        super().__init__()

    @abstractmethod
    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the training loss per record `(B,)`; terms without data are left out.

        Args:
            batch: B records, possibly incomplete.
            generator: CPU generator behind every random number.
        """

    def start_from(self, batch: Batch) -> None:
        """Take what helps to begin with from the training records, before the first epoch.

        Args:
            batch: All training records.
        """

    @abstractmethod
    def propose(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Return proposed values `(B, *shape)` for the modalities in `wanted`.

        Args:
            batch: B records; values where nothing was observed must not be looked at.
            wanted: Modalities that are missing or partly filled somewhere in the batch.
            generator: CPU generator for one random draw; None = the deterministic best guess.
        """

    def recoverable(self, observed: Tensor) -> Tensor:
        """Return bool `(B, M)`: what could be recovered from these observed modalities.

        Args:
            observed: Bool `(B, M)`.
        """
        return observed.any(1, keepdim=True).expand_as(observed)

    @torch.no_grad()
    def recover(self, batch: Batch, *, draws: int = 0, seed: int = 0) -> Recovery:
        """Propose values for everything that is missing and can be recovered.

        Args:
            batch: B records.
            draws: How many seeded random draws to add for probabilistic imputers.
            seed: Seed of the draws.

        Returns:
            Observed values bit for bit; proposals elsewhere.

        Raises:
            PatientDataError: If a record has nothing observed.
        """
        observed = batch.observed.available
        nothing = (~observed.any(1)).nonzero().squeeze(1).tolist()
        if nothing:
            raise PatientDataError(
                *(
                    Problem(
                        f"Patient {batch.record_ids[i]}",
                        "no modality is observed, so nothing can be recovered",
                        expected=f"at least one of {', '.join(batch.observed.names)}",
                    )
                    for i in nothing
                )
            )
        can = self.recoverable(observed)
        recovered = ~observed & can
        completed = batch.partly_filled() & can
        something = (recovered | completed).any(0).tolist()
        wanted = [n for n, want in zip(batch.observed.names, something, strict=True) if want]
        was_training = self.training
        self.eval()
        try:
            values = self._merge(batch, wanted, None)
            drawn = [
                self._merge(batch, wanted, torch.Generator().manual_seed(seed * 100_003 + i))
                for i in range(draws if self.probabilistic else 0)
            ]
        finally:
            self.train(was_training)
        return Recovery(
            values=values,
            observed=batch.observed,
            recovered=recovered,
            completed=completed,
            draws={n: torch.stack([d[n] for d in drawn]) for n in wanted} if drawn else None,
        )

    def _merge(
        self, batch: Batch, wanted: Sequence[str], generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Return the batch's values with proposals only where something is missing."""
        values = dict(batch.values)
        proposals = self.propose(batch, wanted, generator) if wanted else {}
        for m, name in enumerate(batch.observed.names):
            if name not in proposals:
                continue
            keep = batch.observed.available[:, m]
            keep = keep.view(-1, *(1,) * (values[name].ndim - 1))
            if name in batch.observed_fields:
                keep = keep & batch.observed_fields[name]
            values[name] = torch.where(keep, values[name], proposals[name].to(values[name].dtype))
        return values
