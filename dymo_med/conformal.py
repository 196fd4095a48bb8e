"""Prediction sets: which classes cannot be ruled out, at a stated coverage.

A set is right if it holds the true class. If the patients it was calibrated on and the new one are
exchangeable, at least `coverage` of the sets are right, whatever the model is like.

Coverage over everybody could hide that patients who lack most are wrong too often and the others
hardly ever. So a patient is compared with calibration patients of the same missing pattern; where
these are too few, with those who lack as many modalities; where these are too few, with all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COVERAGE = 0.9
# With fewer scores than this no class could ever be ruled out; with twice as many a set leaves out
# a class for a reason that is not the single worst score.
_FEWEST = 2 * math.ceil(COVERAGE / (1 - COVERAGE)) + 1

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


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
class Conformal:
    """What calibration patients say of how sure is sure enough.

    Attributes:
        patterns: Per calibration case the observed modalities, joined by `+`.
        scores: By selector, per case: 1 - the probability of the true class, answered by a
            selector that was fitted on other patients.

    References:
        Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005 (Mondrian conformal
        predictors). Computed by crepes (Boström, COPA 2022).
    """

    patterns: tuple[str, ...]
    scores: Mapping[str, tuple[float, ...]]

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
        n = len(patterns)
        alphas = 1 - probabilities
        members = np.ones(probabilities.shape, dtype=bool)
        group = ["all"] * n
        size = np.full(n, len(scores), dtype=np.int64)
        open_ = np.ones(n, dtype=bool)
        for name, level in (("pattern", str), ("count", _count)):
            theirs, own = (np.array([level(p) for p in ps]) for ps in (self.patterns, patterns))
            names, counts = np.unique(theirs, return_counts=True)
            known = dict(zip(names.tolist(), counts.tolist(), strict=True))
            many = np.array([known.get(x, 0) for x in own.tolist()], dtype=np.int64)
            rows = (open_ & (many >= _FEWEST)).nonzero()[0]
            if len(rows):
                enough = np.isin(theirs, own[rows])
                fitted = ConformalClassifier().fit(scores[enough], bins=theirs[enough])
                members[rows] = fitted.predict_set(
                    alphas[rows], bins=own[rows], confidence=COVERAGE, smoothing=False
                )
            for i in rows:
                group[i] = name
            size[rows] = many[rows]
            open_[rows] = False
        rows = open_.nonzero()[0]
        if len(rows) and len(scores):
            members[rows] = (
                ConformalClassifier()
                .fit(scores)
                .predict_set(alphas[rows], confidence=COVERAGE, smoothing=False)
            )
        members[np.arange(n), probabilities.argmax(1)] = True
        return Sets(members, tuple(group), size)


def _count(pattern: str) -> int:
    """Return how many modalities a pattern has."""
    return len([name for name in pattern.split("+") if name])
