"""What can be promised of an outline: how far its volume may be off, and how much it may miss.

Both promises are calibrated on patients on whom no network was fitted. Each of these patients is
looked at as it came, and with every subset of its scans: a group is a subset, or all patients as
they came, and a patient counts once in each. For a new patient the stricter of two groups holds:
calibration patients looked at with exactly the new one's scans (`pattern`), and all of them as they
came (`all`). See `dymo_med.conformal`, whose groups, level and argument these are.

- *Volume*: the error is |log(1 + mL) found - log(1 + mL) true|, so that an interval is as wide as
  the lesion is large. The true volume of a new patient is inside with probability `COVERAGE` or
  more (split conformal prediction).
- *What is missed*: the share of a region's true voxels that an outline leaves out falls as the
  threshold on their probability falls. The threshold of the *wide* outline is the highest one of
  `LEVELS` at which that share, over n calibration patients, obeys

      (sum of shares + 1) / (n + 1) <= MISSED

  Then a new patient's wide outline misses a share of `MISSED` at most on average (conformal risk
  control). It promises nothing of a single patient, and nothing of what it takes in besides.

Fewer than nine patients can promise neither. Where a bundle chose among selectors on the same
patients, the promise is of each selector by itself; the choice among few adds little.

References:
    Angelopoulos, Bates, Fisch, Lei, Schuster: Conformal Risk Control, ICLR 2024 (theorem 1, and
    its example of false negatives in tumour segmentation).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import expm1, isfinite, log1p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dymo_med.conformal import AS_THEY_CAME, FEWEST, Bound, bound_of
from dymo_med.metrics import bootstrap_means

MISSED = 0.1
# Thresholds from that of an ordinary outline down to one in ten thousand, evenly spaced as logits.
LEVELS = tuple(round(float(1 / (1 + np.exp(x))), 6) for x in np.arange(0, 9.25, 0.1))

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One calibration patient, looked at with some of its scans.

    Attributes:
        patient: Who.
        group: Scans looked at, joined by `+`, or `AS_THEY_CAME`.
        found_ml: `(R,)` volumes of the outline.
        true_ml: `(R,)` volumes of the truth.
        missed: `(R, len(LEVELS))` share of the truth that outlines at these thresholds leave out.
        dice: `(R,)`.
    """

    patient: Hashable
    group: str
    found_ml: Floats
    true_ml: Floats
    missed: Floats
    dice: Floats


@dataclass(frozen=True)
class Threshold:
    """Of the wide outline of a group.

    Attributes:
        patients: How many calibration patients it rests on.
        threshold: On the probability; None = no threshold of `LEVELS` keeps the promise.
    """

    patients: int
    threshold: float | None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: If it is not.
        """
        known = type(self.patients) is int and self.patients >= 0
        if not known or (self.threshold is not None and self.threshold not in LEVELS):
            raise ValueError("a threshold must be one of the levels")
        if self.threshold is not None and self.patients < FEWEST:
            raise ValueError(f"a threshold needs {FEWEST} patients")


@dataclass(frozen=True)
class Overlap:
    """How well a group was outlined: mean Dice over its patients and regions, 95 % interval."""

    patients: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class VolumeInterval:
    """Where the true volume is, at `COVERAGE`.

    Attributes:
        low: mL.
        high: mL.
        group: Whose errors set the bound: `pattern` or `all`.
        patients: How many those are.
    """

    low: float
    high: float
    group: str
    patients: int


@dataclass(frozen=True)
class OutlineBounds:
    """What calibration patients say, by selector; volumes and thresholds also by region.

    Attributes:
        volumes: By selector, region and group: bounds of the error of log(1 + mL).
        thresholds: By selector, region and group: of the wide outline.
        overlap: By selector and group.
    """

    volumes: Mapping[str, Mapping[str, Mapping[str, Bound]]]
    thresholds: Mapping[str, Mapping[str, Mapping[str, Threshold]]]
    overlap: Mapping[str, Mapping[str, Overlap]]

    def interval(self, method: str, region: str, pattern: str, ml: float) -> VolumeInterval | None:
        """Return where a region's true volume is; None where calibration patients are too few.

        Args:
            method: A selector.
            region: Which.
            pattern: Observed scans, joined by `+`, in canonical order.
            ml: The volume that was found.
        """
        groups = self.volumes.get(method, {}).get(region, {})
        own = groups.get(pattern, Bound(0, None))
        everybody = groups.get(AS_THEY_CAME, Bound(0, None))
        if own.bound is None or everybody.bound is None:
            return None
        group, widest = max((("pattern", own), ("all", everybody)), key=lambda g: g[1].bound or 0)
        by = widest.bound or 0.0
        low, high = max(0.0, expm1(log1p(ml) - by)), expm1(log1p(ml) + by)
        return VolumeInterval(low, high, group, widest.patients)

    def threshold(self, method: str, region: str, pattern: str) -> Threshold | None:
        """Return the wide outline's threshold; None where there is none that keeps the promise.

        Args:
            method: A selector.
            region: Which.
            pattern: As for `interval`.
        """
        groups = self.thresholds.get(method, {}).get(region, {})
        both = [groups.get(g, Threshold(0, None)) for g in (pattern, AS_THEY_CAME)]
        if any(t.threshold is None for t in both):
            return None
        return min(both, key=lambda t: t.threshold or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        return {
            name: {method: _told(groups) for method, groups in getattr(self, name).items()}
            for name in ("volumes", "thresholds", "overlap")
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OutlineBounds:
        """Return what `to_dict` told.

        Args:
            data: As read from JSON.

        Raises:
            ValueError: If it cannot be right.
            TypeError: Likewise.
            KeyError: Likewise.
        """

        def by_region(kind: type[Bound] | type[Threshold], part: Mapping[str, Any]) -> Any:
            return {
                method: {
                    region: {group: kind(**one) for group, one in groups.items()}
                    for region, groups in regions.items()
                }
                for method, regions in part.items()
            }

        overlap = {
            method: {group: Overlap(**one) for group, one in groups.items()}
            for method, groups in data["overlap"].items()
        }
        for one in (o for groups in overlap.values() for o in groups.values()):
            if not (one.patients > 0 and all(0 <= x <= 1 for x in (one.low, one.value, one.high))):
                raise ValueError("a Dice must be from 0 to 1")
        found = by_region(Bound, data["volumes"])
        for groups in (g for regions in found.values() for g in regions.values()):
            if any(b.bound is not None and b.bound < 0 for b in groups.values()):
                raise ValueError("an error must not be negative")
        return cls(found, by_region(Threshold, data["thresholds"]), overlap)


def _told(part: Any) -> Any:
    """Return dataclasses within dictionaries as dictionaries."""
    if isinstance(part, Mapping):
        return {name: _told(one) for name, one in part.items()}
    return dict(vars(part))


def missed_share(probabilities: Floats, true: NDArray[np.bool_]) -> Floats:
    """Return the share of a region that outlines at each of `LEVELS` leave out; 0 of none.

    A voxel is in an outline if its probability is above the threshold.

    Args:
        probabilities: Of each voxel.
        true: Bool, the same shape.

    Example:
        >>> missed_share(np.array([0.9, 0.3, 0.001]), np.array([True, True, False]))[0]
        0.5
    """
    inside = np.sort(probabilities[true])
    if not len(inside):
        return np.zeros(len(LEVELS))
    return np.searchsorted(inside, LEVELS, side="right") / len(inside)


def threshold_of(missed: Floats) -> Threshold:
    """Return the highest threshold whose risk is controlled (see the head of this module).

    Args:
        missed: `(n, len(LEVELS))`, each row another patient's `missed_share`.

    Example:
        >>> threshold_of(np.zeros((9, len(LEVELS)))).threshold
        0.5
        >>> threshold_of(np.zeros((8, len(LEVELS)))).threshold is None
        True
    """
    n = len(missed)
    # 1e-12: (0 + 1) / (9 + 1) is 0.1, whatever floating point says.
    kept = np.flatnonzero((missed.sum(0) + 1) / (n + 1) <= MISSED + 1e-12)
    return Threshold(n, LEVELS[kept[0]] if len(kept) else None)


def calibrate_outlines(
    cases: Mapping[str, Sequence[Case]], regions: Sequence[str], seed: int = 0
) -> OutlineBounds:
    """Return what can be promised.

    Args:
        cases: By selector. Of several of one patient in one group the first counts.
        regions: Names, in the order of the cases' arrays.
        seed: Of the bootstrap behind the intervals of Dice.
    """
    volumes: dict[str, Any] = {}
    thresholds: dict[str, Any] = {}
    overlap: dict[str, Any] = {}
    for method, found in cases.items():
        groups: dict[str, dict[Hashable, Case]] = {}
        for case in found:
            groups.setdefault(case.group, {}).setdefault(case.patient, case)
        for group, by_patient in groups.items():
            members = list(by_patient.values())
            for r, region in enumerate(regions):
                errors = [abs(log1p(c.found_ml[r]) - log1p(c.true_ml[r])) for c in members]
                places = volumes, thresholds
                for place, one in zip(
                    places,
                    (bound_of(errors), threshold_of(np.stack([c.missed[r] for c in members]))),
                    strict=True,
                ):
                    place.setdefault(method, {}).setdefault(region, {})[group] = one
            values = np.array([[float(c.dice.mean())] for c in members])
            (mean,) = bootstrap_means(values, list(by_patient), seed=seed)
            low, high = (x if isfinite(x) else mean.value for x in (mean.low, mean.high))
            overlap.setdefault(method, {})[group] = Overlap(len(members), mean.value, low, high)
    return OutlineBounds(volumes, thresholds, overlap)
