"""What a page says of a survival time: risks, the curve with its band, and the lower bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dymo_med.inference.prediction_file import SurvivalPart

# Of the drawing, in its own units.
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 320.0, 190.0, 34.0, 26.0, 8.0, 10.0
_TICKS = 4


def survival_view(
    found: SurvivalPart, text: Mapping[str, str], event: str, percent: Any, basis: str
) -> dict[str, Any]:
    """Return what the page says.

    Args:
        found: Of the prediction.
        text: Section `survival` of the words.
        event: What it is the time of.
        percent: Writes a share in per cent.
        basis: How many patients the bound rests on, as a sentence.
    """
    unit = found.unit

    def time(value: float) -> str:
        return f"{value:.3g} {unit}"

    banded = bool(found.risk_low)
    rows = [
        {
            "horizon": text["horizon"].format(horizon=f"{horizon:g}", unit=unit),
            "risk": percent(risk),
            "band": f"{percent(found.risk_low[i])} to {percent(found.risk_high[i])}"
            if banded
            else "",
        }
        for i, (horizon, risk) in enumerate(zip(found.horizons, found.risks, strict=True))
    ]
    first = text["big"].format(
        risk=rows[0]["risk"], event=event, horizon=f"{found.horizons[0]:g}", unit=unit
    )
    bound, below = text["no_bound"], ""
    if found.bound is not None:
        bound = text["bound" if found.bound > 0 else "bound_none"].format(
            coverage=percent(found.coverage), event=event, time=time(found.bound)
        )
        below = basis
    return {
        "big": first,
        "interval": bound,
        "basis": below,
        "title": text["bound_title"],
        "bands": text["bins"],
        "rows": rows,
        "median": text["median_beyond"].format(time=time(found.times[-1]))
        if found.median is None
        else text["median"].format(time=time(found.median)),
        "band": text["band"].format(band=percent(found.band)) if banded else text["no_band"],
        "curve": _curve(found),
    }


def _curve(found: SurvivalPart) -> dict[str, Any]:
    """Return the curve as points of a drawing."""
    last = found.times[-1]

    def x(time: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * time / last

    def y(share: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share)

    def line(shares: Sequence[float], times: Sequence[float] = found.times) -> str:
        return " ".join(f"{x(t):.1f},{y(s):.1f}" for t, s in zip(times, shares, strict=True))

    band = ""
    if found.low:
        band = f"{line(found.high)} {line(found.low[::-1], found.times[::-1])}"
    step = _nice(last / _TICKS)
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "own": line(found.curve),
        "band": band,
        "everybody": line(found.everybody),
        "bound": None if not found.bound else x(found.bound),
        "top": y(1.0),
        "base": y(0.0),
        "left": x(0.0),
        "right": x(last),
        "x": [(x(k * step), f"{k * step:g}") for k in range(int(last / step) + 1)],
        "y": [(y(k / 4), f"{25 * k}") for k in range(5)],
        "unit": found.unit,
        "horizons": [x(h) for h in found.horizons],
    }


def _nice(step: float) -> float:
    """Return the next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** len(str(int(step))) / 10 if step >= 1 else 0.1
    while power > step:
        power /= 10
    return next((m * power for m in (1, 2, 5, 10) if m * power >= step), step)
