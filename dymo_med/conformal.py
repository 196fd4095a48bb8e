"""Prediction sets: which classes cannot be ruled out, at a stated coverage.

A set is right if it holds the true class. Sets are calibrated on patients on whom nothing else was
fitted: networks, temperature, selectors and the choice among them come from others. Of each of
these patients one record is drawn for each combination of modalities that the record has, and is
looked at with these alone; one more is drawn and looked at as it came. So every score stands for
another patient, and the number of scores is the number of patients.

Two bounds on the score (1 - the probability of the true class) hold for a new patient, and the
set goes by the larger one:

- *pattern*: of calibration patients who have at least the new one's modalities, each looked at
  with exactly these. If the new patient is exchangeable with them, so whenever what a patient
  lacks has nothing to do with the rest, the set is right with probability `COVERAGE` or more,
  for every combination of modalities by itself and so for any mix of them.
- *all*: of all calibration patients as they came. If patients are exchangeable, sets of new
  patients as they come are right with probability `COVERAGE` or more on average over them, also
  where what is missing tells something.

Both are split conformal prediction on one draw from each of exchangeable groups of records
("subsampling once" of Dunn et al.; the groups are patients): the probability is
over calibration and new patients together, for any model, with any number of patients. Neither
covers a change of what is *in* a modality (blank cells hidden at random, another scanner).

Fewer than nine patients can rule nothing out at 90 %: the set then holds every class.

References:
    Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005 (chapter 4: Mondrian
    conformal predictors). Papadopoulos et al., Inductive Confidence Machines for Regression, ECML
    2002. Dunn, Wasserman, Ramdas: Distribution-Free Prediction Sets for Two-Layer Hierarchical
    Models, JASA 118, 2023.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, isfinite

import numpy as np
from numpy.typing import NDArray

from dymo_med.survival import TimeBound, level_of
from dymo_med.types import Scale

COVERAGE = 0.9
# Ranks are worked out in fractions: 0.9 / (1 - 0.9) is a little more than 9 in floating point.
_LEVEL = Fraction(str(COVERAGE))
FEWEST = ceil(_LEVEL / (1 - _LEVEL))
# The group of records as they came, whatever they have.
AS_THEY_CAME = ""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Sets:
    """Prediction sets of n patients.

    Attributes:
        members: Bool `(n, K)`: classes in the set; never empty (the answer is always in).
        group: Whose scores set the bound: `pattern` or `all`.
        calibrated_on: `(n,)` how many patients those are; below `FEWEST` every class is in.
    """

    members: Bools
    group: tuple[str, ...]
    calibrated_on: NDArray[np.int64]


@dataclass(frozen=True)
class Intervals:
    """Intervals around the numbers of n patients.

    Attributes:
        low: `(n,)`.
        high: `(n,)`.
        group: Whose errors set the bound: `pattern` or `all`.
        calibrated_on: `(n,)` how many patients those are; below `FEWEST` it is the whole scale.
    """

    low: Floats
    high: Floats
    group: tuple[str, ...]
    calibrated_on: NDArray[np.int64]


@dataclass(frozen=True)
class Bound:
    """What a group of calibration patients says.

    Attributes:
        patients: How many there are.
        bound: The largest score that cannot be ruled out; None = all of them are too few.
    """

    patients: int
    bound: float | None

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: If fewer patients than can have a bound have one, or the reverse.
        """
        known = type(self.patients) is int and self.patients >= 0
        if not known or (self.bound is None) != (self.patients < FEWEST):
            raise ValueError(f"a bound needs {FEWEST} patients")
        if self.bound is not None and not isfinite(self.bound):
            raise ValueError("a bound must be finite")


def bound_of(scores: Sequence[float]) -> Bound:
    """Return the bound that a new score keeps with probability `COVERAGE` or more.

    It is the score of rank ceil((n + 1) 9/10), counted from the smallest. If the n and the new
    one are exchangeable, the new one exceeds it with a probability of 1/10 at most.

    Args:
        scores: n, each of another patient.

    Example:
        >>> bound_of([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]).bound
        0.9
        >>> bound_of([0.5] * 8).bound is None
        True
    """
    n = len(scores)
    rank = ceil((n + 1) * _LEVEL)
    return Bound(n, None if rank > n else float(sorted(scores)[rank - 1]))


@dataclass(frozen=True)
class Conformal:
    """Bounds by what patients have.

    Attributes:
        scores: By selector and group: of 1 - the probability of the true class. A group is the
            observed modalities, joined by `+`, or `AS_THEY_CAME`.
        errors: Of a regression likewise: of how far its number was from the truth.
        times: Of survival likewise: of how early events came (`survival.bound`).
    """

    scores: Mapping[str, Mapping[str, Bound]]
    errors: Mapping[str, Mapping[str, Bound]] = field(default_factory=dict)
    times: Mapping[str, Mapping[str, TimeBound]] = field(default_factory=dict)

    def sets(self, method: str, probabilities: Floats, patterns: Sequence[str]) -> Sets:
        """Return prediction sets at `COVERAGE`.

        The most probable class is in every set: a set without it would say that nothing fits,
        which is no answer for a patient. Coverage only grows by that.

        Args:
            method: A selector with bounds.
            probabilities: `(n, K)`, calibrated as the scores were.
            patterns: n patterns: observed modalities joined by `+`, in canonical order.

        Raises:
            KeyError: If there are no bounds of that selector.
        """
        found = [_larger(self.scores[method], pattern) for pattern in patterns]
        bounds = np.array([np.inf if b.bound is None else b.bound for _, b in found])
        members = 1 - probabilities <= bounds.reshape(-1, 1)
        members[np.arange(len(patterns)), probabilities.argmax(1)] = True
        return Sets(members, *_groups(found))

    def intervals(
        self, method: str, values: Floats, patterns: Sequence[str], scale: Scale
    ) -> Intervals:
        """Return intervals at `COVERAGE` around a regression's numbers; they end where it does.

        Args:
            method: A selector with bounds.
            values: `(n,)`, its answers.
            patterns: n patterns, as for `sets`.
            scale: Of the regression.

        Raises:
            KeyError: If there are no bounds of that selector.
        """
        found = [_larger(self.errors[method], pattern) for pattern in patterns]
        bounds = np.array([np.inf if b.bound is None else b.bound for _, b in found])
        low, high = (np.clip(values + side * bounds, scale.low, scale.high) for side in (-1, 1))
        return Intervals(low, high, *_groups(found))


def _larger(bounds: Mapping[str, Bound], pattern: str) -> tuple[str, Bound]:
    """Return the bound to go by for a pattern, and whose it is; one that rules nothing out wins."""
    own = bounds.get(pattern, Bound(0, None))
    everybody = bounds.get(AS_THEY_CAME, Bound(0, None))
    if own.bound is None or (everybody.bound is not None and own.bound >= everybody.bound):
        return "pattern", own
    return "all", everybody


def _groups(found: Sequence[tuple[str, Bound]]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return whose bounds those are, and on how many patients they rest."""
    return tuple(g for g, _ in found), np.array([b.patients for _, b in found], dtype=np.int64)


def calibrate(
    groups: Sequence[str],
    patients: Sequence[Hashable],
    scores: Mapping[str, Sequence[float]] | None = None,
    errors: Mapping[str, Sequence[float]] | None = None,
    times: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
) -> Conformal:
    """Return the bounds of calibration cases.

    Args:
        groups: Per case what was looked at: a pattern, or `AS_THEY_CAME`.
        patients: Whose case each is. Of several of one patient in one group the first counts:
            copies of a patient tell nothing new, and records of one patient are not exchangeable
            with those of others.
        scores: By selector, per case.
        errors: Of a regression likewise.
        times: Of survival likewise: what `survival.level_of` takes.
    """
    members: dict[str, dict[Hashable, int]] = {}
    for i, (group, patient) in enumerate(zip(groups, patients, strict=True)):
        members.setdefault(group, {}).setdefault(patient, i)

    def bounds(by_method: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Bound]]:
        return {
            method: {
                group: bound_of([values[i] for i in first.values()])
                for group, first in members.items()
            }
            for method, values in by_method.items()
        }

    levels = {
        method: {
            group: level_of([values[i] for i in first.values()]) for group, first in members.items()
        }
        for method, values in (times or {}).items()
    }
    return Conformal(bounds(scores or {}), bounds(errors or {}), levels)
