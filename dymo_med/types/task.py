"""What is predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """The number that a regression predicts, and the bands that its networks think in.

    A network says how likely each band is, and the answer is the mean of the bands' centres by
    these probabilities. In training a true value belongs to the two bands it lies between, in
    proportion to how near it is to their centres, so that the mean is the value itself. With bands
    in the place of classes, whatever is defined on classes (prototypes, rewards, prediction sets,
    explanations) is defined on a number as well.

    Attributes:
        low: Lowest value there is.
        high: Highest value there is.
        centers: Of K bands, ascending, from `low` to `high`. A value belongs to the nearest.
        unit: For people; empty if none.

    References:
        Imani and White, Improving Regression Performance with Distributional Losses, ICML 2018;
        Schrittwieser et al., Mastering Atari, Go, Chess and Shogi by Planning with a Learned
        Model, Nature 588, 2020 (a value as shares of its two neighbours).

    Example:
        >>> scale = Scale(-1.0, 1.0, (-1.0, 0.0, 1.0))
        >>> scale.shares(torch.tensor([0.25])).tolist(), scale.band(0.25)
        ([[0.0, 0.75, 0.25]], 1)
        >>> scale.value(torch.tensor([0.0, 0.75, 0.25])).item()
        0.25
    """

    low: float
    high: float
    centers: tuple[float, ...]
    unit: str = ""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.centers))
        ends = len(self.centers) >= 2 and (self.centers[0], self.centers[-1])
        if not rising or ends != (self.low, self.high):
            raise ValueError("The bands' centres must rise from the lowest value to the highest.")
        if len(set(self.names)) != len(self.centers):
            raise ValueError("The bands' centres are too close to each other to have names.")

    @property
    def names(self) -> tuple[str, ...]:
        """K names of bands, by their centres ("near 2 mmHg")."""
        return tuple(f"near {center:g} {self.unit}".rstrip() for center in self.centers)

    def band(self, value: float) -> int:
        """Return the index of the nearest centre, the lower one on a tie."""
        return min(range(len(self.centers)), key=lambda k: abs(value - self.centers[k]))

    def shares(self, values: Tensor) -> Tensor:
        """Return what part of each value belongs to each band.

        Args:
            values: `(n,)`, NaN = not known.

        Returns:
            Float32 `(n, K)`; rows add up to 1, or are 0 where the value is not known.
        """
        centers = torch.tensor(self.centers, dtype=torch.float64)
        known = ~values.isnan()
        inside = values.double().where(known, self.low).clamp(self.low, self.high)
        right = torch.searchsorted(centers, inside, right=True).clamp(1, len(centers) - 1)
        step = centers[right] - centers[right - 1]
        share = (inside - centers[right - 1]) / step
        found = torch.zeros(len(values), len(centers), dtype=torch.float64)
        found.scatter_(1, right[:, None] - 1, 1 - share[:, None])
        found.scatter_(1, right[:, None], share[:, None])
        return (found * known[:, None]).float()

    def value(self, shares: Tensor) -> Tensor:
        """Return the mean of the bands' centres: `(...)` from probabilities `(..., K)`."""
        return shares @ torch.tensor(self.centers, dtype=shares.dtype, device=shares.device)


@dataclass(frozen=True)
class MaskSpec:
    """Where a segmentation's masks are and what their numbers mean.

    Attributes:
        file: File inside a patient's folder.
        labels: Every number that a mask may hold besides 0.
        regions: Labels that make up each region, by the region's name in canonical order: outer
            ones before those within them.
    """

    file: str
    labels: tuple[int, ...]
    regions: Mapping[str, tuple[int, ...]]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MaskSpec:
        """Return the spec that `dataclasses.asdict` described."""
        regions = {name: tuple(labels) for name, labels in data["regions"].items()}
        return cls(data["file"], tuple(data["labels"]), regions)


@dataclass(frozen=True)
class Task:
    """What is predicted.

    Attributes:
        type: `classification`, `regression` or `segmentation`.
        target: Column of `labels.csv`; of a segmentation, the file of the masks.
        classes: Class names in canonical order. For two classes the last is the positive one. Of a
            regression, the names of its bands; of a segmentation, those of its regions.
        scale: The number that a regression predicts.
        mask: The masks of a segmentation.
    """

    type: Literal["classification", "regression", "segmentation"]
    target: str
    classes: tuple[str, ...]
    scale: Scale | None = None
    mask: MaskSpec | None = None

    def __post_init__(self) -> None:
        if (self.type == "regression") != (self.scale is not None):
            raise ValueError("A regression has a scale, and nothing else has one.")
        if self.scale is not None and self.scale.names != self.classes:
            raise ValueError("The classes of a regression are its bands.")
        if (self.type == "segmentation") != (self.mask is not None):
            raise ValueError("A segmentation has masks, and nothing else has any.")
        if self.mask is not None:
            if tuple(self.mask.regions) != self.classes:
                raise ValueError("The classes of a segmentation are the regions of its masks.")
        elif len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"A task needs at least two distinct classes, got {self.classes}.")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; what does not apply to the task has no key."""
        return {k: v for k, v in asdict(self).items() if v is not None}
