"""How good predicted survival curves are, under censoring.

As in `dymo_med.metrics`, every metric takes rows of weights `(R, n)` and returns R values, so that
one row gives the estimate and a thousand its resamples; the chance of escaping censoring is
estimated anew in each row. torchsurv has the same metrics for one row of equal weights, and the
tests hold these to its numbers; it has no weights of patients, and goes through pairs one by one.

All of them use inverse probability of censoring weights, and so rest on censoring that has nothing
to do with survival times and predictions. A metric that is not defined (no event, nobody left)
is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dymo_med.survival.bins import TimeBins, log_likelihood

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Metric = Callable[[Floats, Floats, Floats], Floats]

# Pairs of patients in one matrix, at most.
_MOST_PAIRS = 4_000_000
# Times at which the Brier score is integrated.
_GRID = 50
# Shares of patients who reach a time of which nothing is said any more.
_NOBODY = 1e-9


def metrics_of(bins: TimeBins, horizons: Sequence[float]) -> dict[str, Metric]:
    """Return metrics by name; each takes what is known, distributions and weights.

    What is known is `(n, 2)`: time, and 1 for an event or 0 for censored. Distributions are
    `(n, K)` over the bins.

    Args:
        bins: Of the K.
        horizons: Times of interest, none after the last edge.
    """

    def curves(p: Floats, times: Sequence[float]) -> Floats:
        found: Floats = bins.survival(torch.from_numpy(np.asarray(p)), times).numpy()
        return found

    def risk(p: Floats) -> Floats:
        found: Floats = -bins.restricted_mean(torch.from_numpy(np.asarray(p))).numpy()
        return found

    def known(y: Floats) -> tuple[Floats, Bools]:
        return y[:, 0], y[:, 1] > 0

    def loss(y: Floats, p: Floats, w: Floats) -> Floats:
        times, events = map(torch.from_numpy, known(y))
        p_log = torch.from_numpy(np.asarray(p)).clamp_min(1e-12).log()
        each = -log_likelihood(p_log, bins.fits(times, events)).numpy()
        return _ratio(w @ each, w.sum(1))

    grid = np.linspace(0, bins.last, _GRID + 1)[1:]
    found: dict[str, Metric] = {
        "concordance": lambda y, p, w: concordance(*known(y), risk(p), w, bins.last),
        "integrated_brier": lambda y, p, w: integrated_brier(
            *known(y), curves(p, grid.tolist()), w, grid
        ),
        "log_loss": loss,
    }

    def at(horizon: float) -> dict[str, Metric]:
        def area(y: Floats, p: Floats, w: Floats) -> Floats:
            return auroc(*known(y), 1 - curves(p, [horizon])[:, 0], w, horizon)

        def square(y: Floats, p: Floats, w: Floats) -> Floats:
            return brier(*known(y), curves(p, [horizon]), w, np.array([horizon]))[:, 0]

        def gap(y: Floats, p: Floats, w: Floats) -> Floats:
            return risk_gap(*known(y), 1 - curves(p, [horizon])[:, 0], w, horizon)

        return {"auroc": area, "brier": square, "risk_gap": gap}

    for horizon in horizons:
        found |= {f"{name}_{horizon:g}": metric for name, metric in at(horizon).items()}
    return found


def concordance(times: Floats, events: Bools, risk: Floats, weights: Floats, end: float) -> Floats:
    """Return Uno's concordance `(R,)`.

    The chance that of two patients the one with the earlier event had the higher risk (equal ones
    count half), over pairs whose first event comes before `end`; each pair counts 1 / G(T-)^2.
    At a tied time the event comes before a censoring.

    Args:
        times: `(n,)`.
        events: Bool `(n,)`.
        risk: `(n,)`, higher = earlier.
        weights: `(R, n)`.
        end: Of what is compared.

    References:
        Uno et al., On the C-statistics for evaluating overall adequacy of risk prediction
        procedures with censored survival data, Statistics in Medicine 30, 2011.
    """
    first = np.flatnonzero(events & (times < end))
    escape = escape_of(times, events, weights, times[first])
    own = _ratio(weights[:, first], escape**2, 0.0)
    above, below = np.zeros(len(weights)), np.zeros(len(weights))
    step = max(1, _MOST_PAIRS // max(1, len(times)))
    for start in range(0, len(first), step):
        i = first[start : start + step, None]
        later = (times > times[i]) | ((times == times[i]) & ~events)
        won = later * ((risk < risk[i]) + 0.5 * (risk == risk[i]))
        part = own[:, start : start + step]
        above += (part * (weights @ won.T)).sum(1)
        below += (part * (weights @ later.T)).sum(1)
    return _ratio(above, below)


def auroc(times: Floats, events: Bools, risk: Floats, weights: Floats, horizon: float) -> Floats:
    """Return the cumulative/dynamic AUROC at a time `(R,)`.

    Of those with an event until then (each counting 1 / G(T-)) against those without.

    Args:
        times: `(n,)`.
        events: Bool `(n,)`.
        risk: `(n,)`, of an event until then.
        weights: `(R, n)`.
        horizon: The time.

    References:
        Uno et al., Evaluating prediction rules for t-year survivors with censored regression
        models, JASA 102, 2007. Heagerty, Lumley, Pepe, Biometrics 56, 2000.
    """
    case, control = np.flatnonzero(events & (times <= horizon)), np.flatnonzero(times > horizon)
    own = _ratio(weights[:, case], escape_of(times, events, weights, times[case]), 0.0)
    other = weights[:, control]
    above = np.zeros(len(weights))
    step = max(1, _MOST_PAIRS // max(1, len(control)))
    for start in range(0, len(case), step):
        i = case[start : start + step, None]
        won = (risk[control] < risk[i]) + 0.5 * (risk[control] == risk[i])
        above += (own[:, start : start + step] * (other @ won.T)).sum(1)
    return _ratio(above, own.sum(1) * other.sum(1))


def brier(times: Floats, events: Bools, survival: Floats, weights: Floats, at: Floats) -> Floats:
    """Return the Brier score at some times `(R, m)`.

    The mean over patients of S(t)^2 / G(T-) where there was an event until t, and
    (1 - S(t))^2 / G(t) where there was none and the patient was followed for longer.

    Args:
        times: `(n,)`.
        events: Bool `(n,)`.
        survival: `(n, m)` predicted P(T > t).
        weights: `(R, n)`.
        at: `(m,)` times t.

    References:
        Graf et al., Assessment and comparison of prognostic classification schemes for survival
        data, Statistics in Medicine 18, 1999.
    """
    died = (times[:, None] <= at) & events[:, None]
    alive = times[:, None] > at
    happened = np.flatnonzero(events)
    escape = escape_of(times, events, weights, times[happened])
    left = escape_of(times, events, weights, at, True)
    cases = _ratio(weights[:, happened], escape, 0.0) @ (died * survival**2)[happened]
    controls = weights @ (alive * (1 - survival) ** 2)
    return _ratio(cases + _ratio(controls, left), weights.sum(1)[:, None])


def integrated_brier(
    times: Floats, events: Bools, survival: Floats, weights: Floats, at: Floats
) -> Floats:
    """Return the Brier score averaged over time from 0 to the last of some times `(R,)`.

    By the trapezoidal rule; at 0 it is 0.

    Args:
        times: `(n,)`.
        events: Bool `(n,)`.
        survival: `(n, m)` predicted P(T > t).
        weights: `(R, n)`.
        at: `(m,)` times t, ascending.

    References:
        Graf et al. 1999.
    """
    scores = brier(times, events, survival, weights, at)
    start = np.zeros((len(scores), 1))
    area = np.trapezoid(np.hstack([start, scores]), np.concatenate([[0.0], at]), axis=1)
    mean: Floats = area / at[-1]
    return mean


def risk_gap(times: Floats, events: Bools, risk: Floats, weights: Floats, horizon: float) -> Floats:
    """Return the mean predicted risk minus the Kaplan-Meier estimate of it `(R,)`.

    Args:
        times: `(n,)`.
        events: Bool `(n,)`.
        risk: `(n,)` predicted P(T <= horizon).
        weights: `(R, n)`.
        horizon: The time.
    """
    without = _remain(times, events, events, weights, np.array([horizon]), True)[:, 0]
    reached = weights @ (times >= horizon)
    predicted = _ratio(weights @ risk, weights.sum(1))
    # Beyond what anybody was followed for there is nothing to compare with.
    return np.where((reached > 0) | (without <= _NOBODY), predicted - (1 - without), np.nan)


def bound_coverage(y: Floats, bound: Floats, weights: Floats) -> Floats:
    """Return the share of patients whose time is not earlier than their lower bound `(R,)`.

    1 minus the share of those with an event before it, each counting 1 / G(T-).

    Args:
        y: `(n, 2)`: time, and 1 for an event or 0 for censored.
        bound: `(n,)`.
        weights: `(R, n)`.
    """
    times, events = y[:, 0], y[:, 1] > 0
    wrong = np.flatnonzero(events & (times < bound))
    own = _ratio(weights[:, wrong], escape_of(times, events, weights, times[wrong]), 0.0)
    return 1 - _ratio(own.sum(1), weights.sum(1))


def mean_bound(y: Floats, bound: Floats, weights: Floats) -> Floats:
    """Return the mean of lower bounds `(R,)`.

    Args:
        y: Of no use here.
        bound: `(n,)`.
        weights: `(R, n)`.
    """
    return _ratio(weights @ np.nan_to_num(bound), weights.sum(1))


def escape_of(
    times: Floats, events: Bools, weights: Floats, at: Floats, including: bool = False
) -> Floats:
    """Return the chance not to be censored before some times, of each row of weights `(R, m)`.

    Args:
        times: `(n,)`.
        events: Bool `(n,)`.
        weights: `(R, n)`.
        at: `(m,)` times.
        including: Nor at those times.
    """
    return _remain(times, events, ~events, weights, at, including)


def _remain(
    times: Floats, events: Bools, leaves: Bools, weights: Floats, at: Floats, including: bool
) -> Floats:
    """Return the product-limit estimate `(R, m)` of who has not left."""
    order = np.lexsort((~events, times))  # at a tied time events come first
    w = weights[:, order]
    at_risk = w[:, ::-1].cumsum(1)[:, ::-1]
    out = leaves[order]
    factor = np.ones_like(w)
    factor[:, out] = 1 - np.clip(_ratio(w[:, out], at_risk[:, out], 0.0), 0, 1)
    curve = np.hstack([np.ones((len(w), 1)), factor.cumprod(1)])
    found: Floats = curve[:, np.searchsorted(times[order], at, "right" if including else "left")]
    return found


def _ratio(above: Floats, below: Floats, other: float = np.nan) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where(below > 0, above / below, other)
    return found
