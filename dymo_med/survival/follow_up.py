"""What is predicted of a survival time: its columns, unit, bins and horizons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from dymo_med.survival.bins import TimeBins

# Of a month and a year the mean of the Gregorian calendar.
DAYS = {"days": 1.0, "weeks": 7.0, "months": 30.436875, "years": 365.2425}
# How an event is written, besides what a cohort declares; capitals do not matter.
OCCURRED = (
    "1",
    "1.0",
    "yes",
    "true",
    "dead",
    "deceased",
    "died",
    "event",
    "1:deceased",
    "relapsed",
)
CENSORED = ("0", "0.0", "no", "false", "alive", "living", "censored", "0:living")


@dataclass(frozen=True)
class FollowUp:
    """The survival time that is predicted.

    Attributes:
        time: Column of the labels file: time until the event, or until the patient was last seen
            without one.
        event: Column that says which of both.
        unit: Of all times, a key of `DAYS`.
        horizons: Times at which risk is stated, ascending; none after the bins' last edge.
        bins: What networks think in.
        occurred: How an event is written; empty = any of the usual words.
        censored: How its absence is.
    """

    time: str
    event: str
    unit: str
    horizons: tuple[float, ...]
    bins: TimeBins
    occurred: tuple[str, ...] = ()
    censored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.unit not in DAYS or self.bins.unit != self.unit:
            raise ValueError(f"the unit must be one of {', '.join(DAYS)}")
        rising = all(a < b for a, b in zip(self.horizons, self.horizons[1:], strict=False))
        inside = (
            bool(self.horizons) and self.horizons[0] > 0 and self.horizons[-1] <= self.bins.last
        )
        if not rising or not inside:
            raise ValueError("horizons must rise, from above 0 to the last bin's edge at most")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FollowUp:
        """Return what `dataclasses.asdict` described."""
        bins = TimeBins(tuple(data["bins"]["edges"]), data["bins"]["unit"])
        lists = {k: tuple(data[k]) for k in ("horizons", "occurred", "censored")}
        return cls(data["time"], data["event"], data["unit"], bins=bins, **lists)

    def happened(self, text: str) -> bool | None:
        """Return what a cell of the event column says; None if it is neither word."""
        word = text.strip().casefold()
        yes, no = (
            {w.strip().casefold() for w in own or usual}
            for own, usual in ((self.occurred, OCCURRED), (self.censored, CENSORED))
        )
        return True if word in yes else False if word in no else None


def in_unit(time: float, unit: str, wanted: str) -> float:
    """Return a time in another unit.

    Example:
        >>> in_unit(730.485, "days", "years")
        2.0
    """
    # Without the noise of the division, which would move times across edges.
    return time if unit == wanted else round(time * DAYS[unit] / DAYS[wanted], 9)


def usable(time: float) -> bool:
    """Return whether a time is one: a finite number, 0 or more."""
    return isfinite(time) and time >= 0
