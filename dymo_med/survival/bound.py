"""A lower bound on survival time that holds with stated probability under censoring.

The bound of a patient is the time by which his predicted probability of an event is a level a, the
same for all patients of a group. How high a may be is found on held-back patients: of those whose
event was seen, the predicted probability u of an event by that time is below a where the bound
would have been wrong. Each stands for 1 / G(T-) patients, G being the chance not to be censored,
so that the weighted share of wrong bounds is an unbiased estimate of P(T < bound).

a is the largest level at which (sum of weights of wrong bounds + B) / (n + 1) is at most 1/10. B is
the largest weight that an event may have: a new patient could be the worst there is. This is
conformal risk control with a loss of at most B. It makes the bound right with probability 9/10 or
more, over calibration and new patients together, for any model and any n, if

1. calibration patients and the new one are exchangeable,
2. censoring has nothing to do with the time of the event nor with what is predicted from, and
3. G is known.

G is estimated on training patients, so 3 holds up to the error of a Kaplan-Meier curve of theirs.
To keep B small nothing is promised beyond the time up to which at least half of the patients
escape censoring (`latest_bound`): the bound is never later. So B is 2 at most.

Without censoring all weights are 1 and this is split conformal prediction of one side.

References:
    Candes, Lei, Ren: Conformalized survival analysis, JRSS B 85, 2023. Angelopoulos et al.:
    Conformal risk control, ICLR 2024 (theorem 1). Davidov et al.: Conformalized survival analysis
    for general right-censored data, ICLR 2025 (weights where the censoring time of those with an
    event is not seen).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from dymo_med.survival.censoring import Step

COVERAGE = 0.9
_LEAST_ESCAPE = 0.5

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class TimeBound:
    """What a group of held-back patients says of how early an event may come.

    Attributes:
        patients: How many there are, censored ones included.
        level: a; None = too few patients for any bound but 0.
    """

    patients: int
    level: float | None

    def __post_init__(self) -> None:
        if type(self.patients) is not int or self.patients < 0:
            raise ValueError("a number of patients must be a whole one, 0 or more")
        if self.level is not None and not (isfinite(self.level) and 0 <= self.level <= 1):
            raise ValueError("a level must be from 0 to 1")


def latest_bound(not_censored: Step, last: float) -> float:
    """Return the latest time that a bound may be: half of the patients escape censoring until then.

    Args:
        not_censored: G (`censoring`).
        last: The bins' last edge.
    """
    below = not_censored.times[not_censored.values < _LEAST_ESCAPE]
    return float(min(last, below[0])) if len(below) else float(last)


def level_of(cases: Sequence[tuple[float, float, float]]) -> TimeBound:
    """Return the level of a group.

    Args:
        cases: Of n patients: the predicted probability of an event by the patient's own time; the
            weight where a bound could have been wrong, else 0; and B, the same for all.
    """
    n = len(cases)
    if not n:
        return TimeBound(0, None)
    reached, weights, most = (
        np.array(column, dtype=np.float64) for column in zip(*cases, strict=True)
    )
    allowed = (1 - COVERAGE) * (n + 1) - most[0]
    if allowed < -1e-9:
        return TimeBound(n, None)
    u = reached[weights > 0]
    order = np.argsort(u, kind="stable")
    # At level u[m] only smaller ones are wrong; ties of u[m] are not.
    over = np.flatnonzero(np.cumsum(weights[weights > 0][order]) > allowed + 1e-9)
    return TimeBound(n, float(np.clip(u[order][over[0]], 0, 1)) if len(over) else 1.0)


def bound_of(
    reached: Floats, times: Floats, events: Bools, not_censored: Step, latest: float
) -> TimeBound:
    """Return the level of a group.

    Args:
        reached: `(n,)`, each of another patient: the predicted probability of an event by the
            patient's own time.
        times: `(n,)`.
        events: Bool `(n,)`.
        not_censored: G, of other patients.
        latest: `latest_bound`.

    Example:
        >>> without = Step(np.array([]), np.array([]))
        >>> u = np.linspace(0.05, 0.95, 19)
        >>> bound_of(u, u, np.ones(19, dtype=bool), without, 2.0).level  # rank 2 of 19
        0.1
    """
    counted = events & (times < latest)
    weights = np.where(counted, 1 / np.maximum(not_censored.before(times), 1e-12), 0.0)
    most = np.full(len(reached), 1 / float(not_censored.before(latest)))
    return level_of(list(zip(reached.tolist(), weights.tolist(), most.tolist(), strict=True)))
