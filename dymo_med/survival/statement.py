"""What is stated of one patient's survival time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal, cast

from torch import Tensor

from dymo_med.survival.bound import COVERAGE
from dymo_med.survival.follow_up import FollowUp
from dymo_med.survival.guarantee import Guarantee
from dymo_med.survival.recalibration import BAND

# Fewer patients give no bound but 0, however few of them are censored.
LEAST = ceil(round(1 / (1 - COVERAGE), 9)) - 1


@dataclass(frozen=True)
class Statement:
    """What is stated of one patient's survival time; the bins are the classes.

    Attributes:
        unit: Of all times.
        horizons: h times at which risk is stated.
        risks: Probability of an event until each.
        risk_low: Lower ends of the band of each risk; empty where nothing is known of it.
        risk_high: Upper ends likewise.
        times: m times of the curve: 0 and the bins' edges.
        curve: Probability of no event until each.
        low: Lower ends of the band of the curve; empty likewise.
        high: Upper ends.
        band: How surely the curve of patients like this one is within the band, at each time.
        everybody: Kaplan-Meier estimate of training patients at the same times.
        median: Time by which an event is as likely as not; None = after the last of `times`.
        bound: Lower bound on the time of the event; None where the bundle cannot tell.
        coverage: Share of patients whose time such bounds are not later than.
        compared_with: Whose times the bound rests on: `pattern` or `all`.
        calibrated_on: How many patients these are.
        least: Of fewer there is no bound but 0.
        alternatives: Risks at the horizons, by the other methods.
    """

    unit: str
    horizons: tuple[float, ...]
    risks: tuple[float, ...]
    risk_low: tuple[float, ...]
    risk_high: tuple[float, ...]
    times: tuple[float, ...]
    curve: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    band: float
    everybody: tuple[float, ...]
    median: float | None
    bound: float | None
    coverage: float
    compared_with: Literal["pattern", "all"]
    calibrated_on: int
    least: int
    alternatives: Mapping[str, tuple[float, ...]]


def state(
    follow_up: FollowUp,
    guarantee: Guarantee,
    stated: Mapping[str, Tensor],
    method: str,
    pattern: str,
) -> Statement:
    """Return what is stated of one patient.

    Args:
        follow_up: What is predicted.
        guarantee: Of the bundle.
        stated: By method, the distribution that is stated, `(1, K)`.
        method: Whose answer it is.
        pattern: Observed modalities joined by `+`, in canonical order.
    """
    bins, horizons = follow_up.bins, follow_up.horizons
    times = (0.0, *bins.edges)
    own = stated[method]
    band = guarantee.recalibration.band(own, bins, [*times, *horizons])
    low, high = ((), ()) if band is None else (tuple(side[0].tolist()) for side in band)
    m = len(times)
    median = float(bins.quantile(own, 0.5)[0])
    reached = 1 - float(bins.survival(own, [bins.last])[0, 0])
    lower = None
    if method in guarantee.bounds:
        lower = guarantee.lower(method, own, bins, [pattern])

    def risks(p: Tensor) -> tuple[float, ...]:
        return tuple((1 - bins.survival(p, horizons)[0]).clamp(0, 1).tolist())

    return Statement(
        unit=follow_up.unit,
        horizons=horizons,
        risks=risks(own),
        risk_low=tuple(1 - s for s in high[m:]),
        risk_high=tuple(1 - s for s in low[m:]),
        times=times,
        curve=(1.0, *bins.survival(own, bins.edges)[0].clamp(0, 1).tolist()),
        low=low[:m],
        high=high[:m],
        band=BAND,
        everybody=(1.0, *guarantee.everybody),
        median=median if reached >= 0.5 else None,
        bound=None if lower is None else float(lower.times[0]),
        coverage=COVERAGE,
        compared_with=cast(Literal["pattern", "all"], "all" if lower is None else lower.group[0]),
        calibrated_on=0 if lower is None else int(lower.calibrated_on[0]),
        least=LEAST,
        alternatives={name: risks(p) for name, p in stated.items() if name != method},
    )
