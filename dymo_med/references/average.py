"""The mean of the other references: seldom the best, seldom far from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dymo_med.references.base import Reference, Training


class Average(Reference):
    """Mean of the probabilities of every reference before it."""

    name = "reference_mean"

    def fit(self, data: Training, others: Mapping[str, Reference]) -> dict[str, Any]:
        """See `Reference.fit`."""
        self._members = tuple(others.values())
        return {"of": list(others)}

    def probabilities(self, features: Tensor) -> Tensor:
        """See `Reference.probabilities`."""
        return torch.stack([m.probabilities(features) for m in self._members]).mean(0)

    def state(self) -> dict[str, Tensor]:
        """See `Reference.state`."""
        return {}

    def load_state(self, state: Mapping[str, Tensor], others: Mapping[str, Reference]) -> None:
        """See `Reference.load_state`."""
        if state or not others:
            raise ValueError("an average has members and nothing of its own")
        self._members = tuple(others.values())
