"""Probabilities as they are stated: from logits, and never surer than patients can support."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dymo_med.survival import Recalibration, TimeBins

# A frequency is counted among patients whose answer was as sure as this one, give or take so much,
LIKE = 0.1
# and stated if there are so many of them.
ENOUGH = 10
# Training finds temperatures between 0.05 and 20.
SANE = (0.01, 100.0)


@dataclass(frozen=True)
class Calibration:
    """How a bundle turns logits into the probabilities that it states.

    Attributes:
        temperature: T, of softmax(logits / T).
        fitted_on: Patients on whom T was fitted.
        patients: n held-back patients on whom nothing was fitted; None = probabilities are not
            limited by their number (of a regression they only weight its bands).
        confidence: By selector, per held-back patient with one record as it came: the
            probability of the class that was answered.
        right: Likewise, whether that class was the true one.
        recalibration: Of survival: how predicted distributions become those that are stated.
        bins: Of survival.
    """

    temperature: float
    fitted_on: int
    patients: int | None
    confidence: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    right: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    recalibration: Recalibration | None = None
    bins: TimeBins | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: If a number is out of its range, or lists do not belong together.
        """
        if not SANE[0] <= self.temperature <= SANE[1]:
            raise ValueError("the temperature must be from {:g} to {:g}".format(*SANE))
        counts = (self.fitted_on, 0 if self.patients is None else self.patients)
        if not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError("a number of patients must be a whole one, 0 or more")
        if {m: len(c) for m, c in self.confidence.items()} != {
            m: len(r) for m, r in self.right.items()
        } or not all(0 <= c <= 1 for counted in self.confidence.values() for c in counted):
            raise ValueError("the counted answers cannot be right")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities that are stated; every command states these and no others.

        Args:
            logits: `(..., K)`.

        Returns:
            Float64 `(..., K)` on the same device.
        """
        own = torch.softmax(logits.double() / self.temperature, -1)
        if self.recalibration is not None and self.bins is not None:
            return self.recalibration.apply(own, self.bins)
        return supported(own, self.patients)

    def count(self, method: str, probability: float) -> tuple[int, int]:
        """Return how many held-back patients got an answer as sure as this, and how many rightly.

        Args:
            method: Selector.
            probability: Of the class that it answers.

        Returns:
            Patients whose probability was within `LIKE` of this one, and those of them for whom
            the answer was right.
        """
        pairs = zip(self.confidence.get(method, ()), self.right.get(method, ()), strict=True)
        # The margin itself is in, whatever the last digit of a difference is.
        like = [r for c, r in pairs if abs(c - probability) <= LIKE + 1e-9]
        return len(like), sum(like)


def supported(probabilities: Tensor, patients: int | None) -> Tensor:
    """Return probabilities no more extreme than so many patients can support.

    With n patients and K classes, p becomes (n p + 1) / (n + K): the rule of succession. What n
    patients who all were of one class say of the next one, starting from K equally likely
    classes, is (n + 1) / (n + K); no probability exceeds it and none is below 1 / (n + K). Rows
    still sum to 1 and keep the order of their classes, and of two patients the surer answer stays
    the surer one.

    Args:
        probabilities: `(..., K)`.
        patients: n; None = as they are.

    References:
        Laplace 1774; Good, The Estimation of Probabilities, MIT Press 1965 (K classes: the
        posterior mean under a uniform Dirichlet prior).

    Example:
        >>> supported(torch.tensor([1.0, 0.0], dtype=torch.float64), 5).tolist()
        [0.8571428571428571, 0.14285714285714285]
    """
    if patients is None:
        return probabilities
    return (patients * probabilities + 1) / (patients + probabilities.shape[-1])
