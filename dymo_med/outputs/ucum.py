"""Units as codes of UCUM, where a unit is surely one of them."""

from __future__ import annotations

import re

from dymo_med.modalities.units import normal

_WORDS = {
    **dict.fromkeys(("y", "yr", "yrs", "year", "years"), "a"),
    **dict.fromkeys(("month", "months"), "mo"),
    **dict.fromkeys(("week", "weeks"), "wk"),
    **dict.fromkeys(("day", "days"), "d"),
    **dict.fromkeys(("hr", "hour", "hours"), "h"),
    **dict.fromkeys(("minute", "minutes"), "min"),
    **dict.fromkeys(("degC", "C", "celsius", "Cel"), "Cel"),
    **dict.fromkeys(("mmHg", "mm[Hg]"), "mm[Hg]"),
    **{u: u for u in ("a", "mo", "wk", "d", "h", "min", "s", "%", "1", "/min", "/uL", "kg/m2")},
}
_SIMPLE = re.compile(r"(10\*\d{1,2}|[kdcmunpf]?(g|mol|L|l|m|U|Pa))(/[kdcmunpf]?(g|mol|L|l|h|d))?")


def ucum(unit: str) -> str:
    """Return the UCUM code of a unit as people write it; empty if there is none for sure.

    Example:
        >>> ucum("years"), ucum("10^9/L"), ucum("points")
        ('a', '10*9/L', '')
    """
    text = normal(unit)
    if text in _WORDS:
        return _WORDS[text]
    text = text.replace("10^", "10*")
    return text if _SIMPLE.fullmatch(text) else ""
