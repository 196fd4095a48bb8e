"""When simulated patients die, by a law that is known.

Given the grade, survival is Weibull with one shape and a median for each grade, so that the hazards
of both grades are proportional; nothing else has any part in it. Whatever set of modalities is
looked at, the exact survival curve is the mean of both grades' curves by the exact posterior of the
grade, and the exact risk is ordered as the posterior is. Follow-up ends at a time of its own,
uniform between two ends, whatever the patient is like.

With k the shape and l_a the rate of grade a (S_a(t) = exp(-l_a t^k)), the earlier of two deaths is
before `end`, and is that of the patient of grade a rather than of the one of grade b, with
probability l_a / (l_a + l_b) (1 - exp(-(l_a + l_b) end^k)). The concordance that a score has on
average over all times that these patients may die at follows from this without drawing any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dymo_med.data.dials import SETTINGS, Dials

Floats = NDArray[np.float64]

SURVIVAL = "cohort-survival.yaml"
SURVIVAL_LABELS = "survival.csv"
SURVIVAL_TRUTH = "survival-truth.csv"
SHAPE = 1.2
HORIZONS = (12, 24)

_DEFAULT = SETTINGS["default"]


def survival_description(whole: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `cohort-survival.yaml`.

    Args:
        whole: That of `cohort.yaml`.
    """
    return {
        **whole,
        "name": f"{whole['name']}-survival",
        "task": {
            "type": "survival",
            "time": "months",
            "event": "died",
            "unit": "months",
            "horizons": list(HORIZONS),
        },
        "labels": SURVIVAL_LABELS,
    }


def draw_times(
    generator: np.random.Generator, grade: int, dials: Dials = _DEFAULT
) -> tuple[float, float]:
    """Draw when a patient dies and when follow-up ends, in months.

    Args:
        generator: Source of randomness.
        grade: 0 low, 1 high.
        dials: Medians and follow-up.
    """
    death = (generator.exponential() / _rates(dials)[grade]) ** (1 / SHAPE)
    return float(death), float(generator.uniform(*dials.follow_up_months))


def exact_survival(high: Floats, times: Sequence[float], dials: Dials = _DEFAULT) -> Floats:
    """Return P(T > t) `(n, m)`.

    Args:
        high: `(n,)` exact probabilities that the grade is high.
        times: m times in months.
        dials: Those that patients were drawn with.

    Example:
        >>> exact_survival(np.array([0.0, 1.0]), [15.0]).round(3).tolist()
        [[0.878], [0.5]]
    """
    curves = np.exp(-_rates(dials)[:, None] * np.asarray(times, dtype=np.float64) ** SHAPE)
    found: Floats = (1 - high[:, None]) * curves[0] + high[:, None] * curves[1]
    return found


def expected_concordance(risk: Floats, high: Floats, end: float, dials: Dials = _DEFAULT) -> float:
    """Return the concordance of a score, over all times at which these patients may die.

    Args:
        risk: `(n,)`, higher = earlier. With `high` itself it is the best there is.
        high: `(n,)` exact probabilities that the grade is high, from what the score may know.
        end: The earlier death of a pair is before it.
        dials: Those that patients were drawn with.
    """
    rate = _rates(dials)
    total = rate[:, None] + rate
    first = rate[:, None] / total * (1 - np.exp(-total * end**SHAPE))  # a dies before b, before end
    grades = np.stack([1 - high, high], 1)
    pairs = grades @ first @ grades.T
    np.fill_diagonal(pairs, 0)
    won = (risk[:, None] > risk) + 0.5 * (risk[:, None] == risk)
    return float((pairs * won).sum() / pairs.sum())


def grade_of_label(label: Floats, dials: Dials = _DEFAULT) -> Floats:
    """Return the probability that the grade is high from that of the label, `(n,)`.

    Args:
        label: `(n,)` posteriors of `truth.csv`, which are of the label.
        dials: Their share of wrong labels, below 1/2.
    """
    found: Floats = np.clip((label - dials.label_noise) / (1 - 2 * dials.label_noise), 0, 1)
    return found


def _rates(dials: Dials) -> Floats:
    return math.log(2) / np.array(dials.median_months) ** SHAPE
