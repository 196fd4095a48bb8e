"""What a bundle states of survival: curves set right, bands, risks, and a bound on the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dymo_med.survival.bins import TimeBins
from dymo_med.survival.bound import TimeBound
from dymo_med.survival.recalibration import Recalibration

# The group of records as they came, whatever they have, as in `dymo_med.conformal`.
AS_THEY_CAME = ""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LowerBounds:
    """Lower bounds on the survival times of n patients.

    Attributes:
        times: `(n,)`; 0 where too few patients say anything.
        group: Whose times set the bound: `pattern` or `all`.
        calibrated_on: `(n,)` how many patients those are.
    """

    times: Floats
    group: tuple[str, ...]
    calibrated_on: NDArray[np.int64]


@dataclass(frozen=True)
class Guarantee:
    """What a bundle states of survival besides probabilities.

    Attributes:
        recalibration: How predicted distributions become those that are stated.
        bounds: By selector and group of held-back patients: what was looked at, joined by `+`, or
            `AS_THEY_CAME`.
        latest: No bound is later.
        everybody: Kaplan-Meier estimate of training patients at the bins' edges.
    """

    recalibration: Recalibration
    bounds: Mapping[str, Mapping[str, TimeBound]]
    latest: float
    everybody: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: If a number is out of its range.
        """
        if not self.latest > 0 or not all(0 <= s <= 1 for s in self.everybody):
            raise ValueError("a time must be above 0, and a share from 0 to 1")

    def lower(
        self, method: str, stated: Tensor, bins: TimeBins, patterns: Sequence[str]
    ) -> LowerBounds:
        """Return lower bounds on survival times at `bound.COVERAGE`.

        Of the patients with the same modalities and of all as they came, those count whose bound
        is earlier; both hold by themselves (`dymo_med.conformal` says of whom).

        Args:
            method: A selector with bounds.
            stated: `(n, K)`, what is stated.
            bins: Of the K.
            patterns: n patterns: observed modalities joined by `+`, in canonical order.

        Raises:
            KeyError: If there are no bounds of that selector.
        """
        found = [_earlier(self.bounds[method], pattern) for pattern in patterns]
        levels = [bound.level or 0.0 for _, bound in found]
        times = np.array(
            [float(bins.quantile(stated[i : i + 1], level)[0]) for i, level in enumerate(levels)]
        )
        return LowerBounds(
            np.minimum(times, self.latest),
            tuple(group for group, _ in found),
            np.array([bound.patients for _, bound in found], dtype=np.int64),
        )


def _earlier(bounds: Mapping[str, TimeBound], pattern: str) -> tuple[str, TimeBound]:
    """Return the bound to go by for a pattern, and whose it is; one that says nothing wins."""
    own = bounds.get(pattern, TimeBound(0, None))
    everybody = bounds.get(AS_THEY_CAME, TimeBound(0, None))
    if own.level is None or (everybody.level is not None and own.level <= everybody.level):
        return "pattern", own
    return "all", everybody
