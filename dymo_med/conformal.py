"""Prediction sets: which classes cannot be ruled out, at a stated coverage.

A set is right if it holds the true class. If the patients it was calibrated on and the new one are
exchangeable, at least `coverage` of the sets are right, whatever the model is like.

Coverage over everybody could hide that patients who lack most are wrong too often and the others
hardly ever. So a patient is compared with calibration patients of the same missing pattern; where
these are too few, with those who lack as many modalities; where these are too few, with all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dymo_med.types import Scale

COVERAGE = 0.9
# With fewer scores than this no class could ever be ruled out; with twice as many a set leaves out
# a class for a reason that is not the single worst score.
_FEWEST = 2 * math.ceil(COVERAGE / (1 - COVERAGE)) + 1

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Positions = NDArray[np.intp]
Bins = NDArray[Any] | None


@dataclass(frozen=True)
class Sets:
    """Prediction sets of n patients.

    Attributes:
        members: Bool `(n, K)`: classes in the set; never empty (the answer is always in).
        group: With whom each was compared: `pattern`, `count` or `all`.
        calibrated_on: `(n,)` how many calibration cases those are.
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
        group: With whom each was compared: `pattern`, `count` or `all`.
        calibrated_on: `(n,)` how many calibration cases those are.
    """

    low: Floats
    high: Floats
    group: tuple[str, ...]
    calibrated_on: NDArray[np.int64]


@dataclass(frozen=True)
class Conformal:
    """What calibration patients say of how sure is sure enough.

    Attributes:
        patterns: Per calibration case the observed modalities, joined by `+`.
        scores: By selector, per case: 1 - the probability of the true class, answered by a
            selector that was fitted on other patients.
        errors: Of a regression likewise: how far its number was from the truth.

    References:
        Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005 (Mondrian conformal
        predictors). Computed by crepes (Boström, COPA 2022).
    """

    patterns: tuple[str, ...]
    scores: Mapping[str, tuple[float, ...]]
    errors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def sets(self, method: str, probabilities: Floats, patterns: Sequence[str]) -> Sets:
        """Return prediction sets at `COVERAGE`.

        The most probable class is in every set: a set without it would say that nothing fits,
        which is no answer for a patient. Coverage only grows by that.

        Args:
            method: A selector with scores.
            probabilities: `(n, K)`, calibrated as the scores were.
            patterns: n patterns, spelt as `self.patterns`.

        Raises:
            KeyError: If there are no scores of that selector.
        """
        from crepes import ConformalClassifier

        scores = np.array(self.scores[method])
        alphas = 1 - probabilities
        members = np.ones(probabilities.shape, dtype=bool)
        groups = _Groups(self.patterns, patterns)
        for rows, alike, theirs, own in groups:
            fitted = ConformalClassifier().fit(scores[alike], bins=theirs)
            members[rows] = fitted.predict_set(
                alphas[rows], bins=own, confidence=COVERAGE, smoothing=False
            )
        members[np.arange(len(patterns)), probabilities.argmax(1)] = True
        return Sets(members, tuple(groups.group), groups.size)

    def intervals(
        self, method: str, values: Floats, patterns: Sequence[str], scale: Scale
    ) -> Intervals:
        """Return intervals at `COVERAGE` around a regression's numbers.

        An interval is as wide as errors of patients with the same missing pattern were, or of
        those that stand in for them; it ends where the scale does.

        Args:
            method: A selector with errors.
            values: `(n,)`, its answers.
            patterns: n patterns, spelt as `self.patterns`.
            scale: Of the regression.

        Raises:
            KeyError: If there are no errors of that selector.

        References:
            Papadopoulos et al., Inductive Confidence Machines for Regression, ECML 2002.
        """
        from crepes import ConformalRegressor

        errors = np.array(self.errors[method])
        ends = np.tile([scale.low, scale.high], (len(patterns), 1))
        groups = _Groups(self.patterns, patterns)
        for rows, alike, theirs, own in groups:
            fitted = ConformalRegressor().fit(errors[alike], bins=theirs)
            ends[rows] = fitted.predict_int(
                values[rows], bins=own, confidence=COVERAGE, y_min=scale.low, y_max=scale.high
            )
        return Intervals(ends[:, 0], ends[:, 1], tuple(groups.group), groups.size)


class _Groups:
    """With which calibration cases each patient is compared: pattern, else count, else all.

    Args:
        calibration: Patterns of the calibration cases.
        patterns: n patterns.

    Attributes:
        group: With whom each was compared, once iterated over.
        size: `(n,)` how many calibration cases those are.
    """

    def __init__(self, calibration: Sequence[str], patterns: Sequence[str]) -> None:
        self._calibration, self._patterns = calibration, patterns
        self.group = ["all"] * len(patterns)
        self.size = np.full(len(patterns), len(calibration), dtype=np.int64)

    def __iter__(self) -> Iterator[tuple[Positions, Bools, Bins, Bins]]:
        """Yield positions of patients, bool: the cases like them, and the bins of both."""
        open_ = np.ones(len(self._patterns), dtype=bool)
        for name, level in (("pattern", str), ("count", _count)):
            theirs, own = (
                np.array([level(p) for p in ps]) for ps in (self._calibration, self._patterns)
            )
            names, counts = np.unique(theirs, return_counts=True)
            known = dict(zip(names.tolist(), counts.tolist(), strict=True))
            many = np.array([known.get(x, 0) for x in own.tolist()], dtype=np.int64)
            rows = (open_ & (many >= _FEWEST)).nonzero()[0]
            if len(rows):
                enough = np.isin(theirs, own[rows])
                yield rows, enough, theirs[enough], own[rows]
            for i in rows:
                self.group[i] = name
            self.size[rows] = many[rows]
            open_[rows] = False
        rows = open_.nonzero()[0]
        if len(rows) and len(self._calibration):
            everybody = np.ones(len(self._calibration), dtype=bool)
            yield rows, everybody, None, None


def _count(pattern: str) -> int:
    """Return how many modalities a pattern has."""
    return len([name for name in pattern.split("+") if name])
