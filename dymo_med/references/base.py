"""What every reference offers, and what a bundle holds of them."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.stats import norm
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from dymo_med.references.features import Layout
from dymo_med.types import Scale

_FOLDS = 5
# A number with an error is spread over so many quantiles of a normal distribution.
_QUANTILES = 16
# No class is ever impossible: the logarithm has to exist.
_LEAST = 1e-6


@dataclass(frozen=True)
class Training:
    """What references are fitted on: the training split, and nothing else.

    Attributes:
        features: Float64 `(n, P)` of labelled records, NaN where there is nothing.
        labels: Int64 `(n,)` classes, or bands of a regression.
        values: Float64 `(n,)` numbers of a regression; None of a classification.
        weights: Float64 `(n,)`, by which every patient counts the same.
        patients: Whose record each is.
        everybody: Float64 `(N, P)`: all training records, labelled or not.
        seed: Of folds and draws.
    """

    features: Tensor
    labels: Tensor
    values: Tensor | None
    weights: Tensor
    patients: Sequence[str]
    everybody: Tensor
    seed: int

    def folds(self, most: int = _FOLDS) -> list[tuple[Tensor, Tensor]]:
        """Return positions outside and inside each fold; all of a patient's are in one.

        Args:
            most: How many folds at most; none where a class has too few patients for two.
        """
        patients = np.array(self.patients)
        classes, counts = np.unique(
            np.array([self.labels[patients == p][0].item() for p in np.unique(patients)]),
            return_counts=True,
        )
        # Bands of a regression may be rare: the commonest decides how many folds there are.
        least = int(counts.min() if self.values is None else counts.max())
        number = min(most, least)
        if number < 2 or len(classes) < 2:
            return []
        split = StratifiedGroupKFold(number, shuffle=True, random_state=self.seed % 2**32)
        empty = np.zeros(len(patients))
        with warnings.catch_warnings():  # rare bands of a regression are not in every fold
            warnings.simplefilter("ignore", UserWarning)
            return [
                (torch.from_numpy(outside), torch.from_numpy(inside))
                for outside, inside in split.split(empty, self.labels.numpy(), patients)
            ]


class Reference(ABC):
    """A plain model of the features of whatever was observed; gaps are part of its input.

    Args:
        layout: Of the P features.
        classes: K.
        scale: Of a regression, whose bands the classes are.
    """

    name: ClassVar[str]
    partner: ClassVar[bool] = True  # may have a part in a bundle's answers

    def __init__(self, layout: Layout, classes: int, scale: Scale | None) -> None:
        self.layout, self.classes, self.scale = layout, classes, scale

    @abstractmethod
    def fit(self, data: Training, others: Mapping[str, Reference]) -> dict[str, Any]:
        """Fit.

        Args:
            data: Of the training split.
            others: References that were fitted before, by name.

        Returns:
            The settings that were chosen, for people.
        """

    @abstractmethod
    def probabilities(self, features: Tensor) -> Tensor:
        """Return float64 `(R, K)` before calibration; a row depends on its own features only.

        Args:
            features: Float64 `(R, P)` on the CPU, NaN where there is nothing.
        """

    def logits(self, features: Tensor) -> Tensor:
        """Return the logarithm of `probabilities`, float64 `(R, K)`."""
        return self.probabilities(features).clamp_min(_LEAST).log()

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return what was fitted, as arrays."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor], others: Mapping[str, Reference]) -> None:
        """Take up what `state` returned.

        Raises:
            KeyError: If an array is absent.
            ValueError: If the arrays are not those of such a model.
        """

    def spread(self, value: Tensor, deviation: Tensor) -> Tensor:
        """Return how likely each band is if a number is normally distributed.

        Args:
            value: `(R,)` means.
            deviation: `(R,)` standard deviations.

        Returns:
            `(R, K)`: the mean over quantiles, each shared by the two bands it lies between, so
            that the mean of the bands' centres is the number itself (away from the scale's ends).
        """
        assert self.scale is not None
        nodes = value[:, None] + deviation[:, None] * quantiles(_QUANTILES)
        shares = self.scale.shares(nodes.flatten()).double()
        return shares.view(len(value), _QUANTILES, -1).mean(1)


@dataclass(frozen=True)
class FittedReference:
    """A reference as a bundle holds it.

    Attributes:
        model: Fitted.
        temperature: Probabilities are softmax(logits / temperature).
        settings: What its fit chose.
    """

    model: Reference
    temperature: float
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not (isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be a positive number, got {self.temperature}.")

    def probabilities(self, features: Tensor) -> Tensor:
        """Return calibrated probabilities, float64 `(R, K)`.

        Args:
            features: Float64 `(R, P)` on the CPU.
        """
        return torch.softmax(self.model.logits(features) / self.temperature, dim=-1)


@dataclass(frozen=True)
class References:
    """The references of a bundle, and what part of its answers they are.

    Attributes:
        layout: Of their features.
        fitted: By name.
        weight: Share of the network in the bundle's answers; 1 = the network alone.
        partner: Which reference has the rest.
        why: A sentence.
        better: References that were better than the network beyond chance.
        losses: Log-loss (of a regression: mean absolute error) of each reference, the `network`
            and the `answer` on held-back patients, out of fold.
        patients: How many those were.
    """

    layout: Layout
    fitted: Mapping[str, FittedReference]
    weight: float = 1.0
    partner: str = ""
    why: str = ""
    better: tuple[str, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    patients: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1 or (self.weight < 1 and self.partner not in self.fitted):
            raise ValueError("a weight is from 0 to 1, and what is below 1 has a partner")

    @property
    def plain(self) -> str:
        """The last reference of the table that looks at values; empty if there is none."""
        names = [name for name, reference in self.fitted.items() if reference.model.partner]
        return names[-1] if names else ""

    @property
    def mixed(self) -> FittedReference | None:
        """The reference that has a part in the bundle's answers; None = the network alone."""
        return self.fitted[self.partner] if self.weight < 1 else None


def quantiles(number: int) -> Tensor:
    """Return the middles of so many equal shares of a standard normal distribution.

    Example:
        >>> quantiles(2).tolist()
        [-0.6744897501960817, 0.6744897501960817]
    """
    return torch.from_numpy(norm.ppf((np.arange(number) + 0.5) / number))
