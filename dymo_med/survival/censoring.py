"""Kaplan-Meier curves with weights, and inverse probabilities of not being censored.

At a tied time events come before censorings, in both curves: somebody censored at t was at risk of
an event at t, and somebody with an event at t was not at risk of being censored there.

References:
    Kaplan and Meier, JASA 53, 1958. Robins and Rotnitzky, in AIDS Epidemiology, 1992 (inverse
    probability of censoring weights).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Step:
    """A curve that starts at 1 and falls in steps.

    Attributes:
        times: Where it falls, ascending.
        values: What it is from there on.
    """

    times: Floats
    values: Floats

    def __call__(self, at: Floats | float) -> Floats:
        """Return the curve at some times, steps at these times included."""
        return self._at(at, "right")

    def before(self, at: Floats | float) -> Floats:
        """Return the curve just before some times."""
        return self._at(at, "left")

    def _at(self, at: Floats | float, side: str) -> Floats:
        found = np.searchsorted(self.times, at, side=side)  # type: ignore[call-overload]
        curve: Floats = np.concatenate([[1.0], self.values])[found]
        return curve


def kaplan_meier(times: Floats, events: Bools, weights: Floats) -> Step:
    """Return the estimated share without an event, P(T > t).

    Args:
        times: `(n,)`.
        events: Bool `(n,)`; False = censored at that time.
        weights: `(n,)`, not negative.
    """
    return _product_limit(times, events, weights, np.zeros_like(events))


def censoring(times: Floats, events: Bools, weights: Floats) -> Step:
    """Return the estimated share not censored, G(t) = P(C > t).

    Args:
        times: `(n,)`.
        events: Bool `(n,)`; False = censored at that time.
        weights: `(n,)`, not negative.
    """
    return _product_limit(times, ~events, weights, events)


def _product_limit(times: Floats, falls: Bools, weights: Floats, first: Bools) -> Step:
    """Return the product-limit estimate; who is `first` has left at a tied time."""
    at = np.unique(times[falls])

    def at_once(who: Bools) -> Floats:
        inside = who & np.isin(times, at)
        place = np.searchsorted(at, times[inside])
        return np.bincount(place, weights[inside], minlength=len(at)).astype(np.float64)

    order = np.argsort(times, kind="stable")
    gone = np.concatenate([[0.0], np.cumsum(weights[order])])
    at_risk = gone[-1] - gone[np.searchsorted(times[order], at, side="left")] - at_once(first)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(at_risk > 0, at_once(falls) / at_risk, 0.0)
    return Step(at, np.cumprod(1 - np.clip(share, 0, 1)))


def known_weights(times: Floats, events: Bools, not_censored: Step, end: float) -> Floats:
    """Return weights by which patients whose time is known up to `end` stand for all.

    1 / G(T-) for an event at or before `end`, 1 / G(end-) for somebody followed to it or longer,
    and 0 for those censored before. If censoring does not depend on survival times and on what is
    predicted from, weighted means over what is known are means over all.

    Args:
        times: `(n,)`.
        events: Bool `(n,)`.
        not_censored: G (`censoring`).
        end: Nothing after it matters.
    """
    known = events | (times >= end)
    chance = not_censored.before(np.minimum(times, end))
    return np.where(known & (chance > 0), 1 / np.maximum(chance, 1e-12), 0.0)
