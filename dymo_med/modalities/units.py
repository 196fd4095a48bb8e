"""Units of measurement: what spellings mean, and conversion between two of the same quantity.

Spellings are those of UCUM (The Unified Code for Units of Measure, ucum.org, version 2.1) and
the customary ones of laboratories: `10*9/L` and `10^9/L`, `Cel` and `°C`, `mm[Hg]` and `mmHg`.
A unit that is not known, and a pair that does not measure the same, are errors: nothing is guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

MOLAR_MASS = {
    "bilirubin": 584.66,
    "calcium": 40.078,
    "cholesterol": 386.65,
    "cortisol": 362.46,
    "creatinine": 113.12,
    "glucose": 180.156,
    "haemoglobin monomer": 16114.0,
    "iron": 55.845,
    "lactate": 90.08,
    "magnesium": 24.305,
    "phosphorus": 30.974,
    "triglycerides": 885.4,
    "urate": 168.11,
    "urea": 60.056,
    "urea nitrogen": 28.014,
}
"""Molar mass in g/mol by substance (PubChem; IUPAC atomic weights of 2021).

`lactate` counts as lactic acid, `phosphorus` and `urea nitrogen` as the element (two N per urea),
`triglycerides` as triolein, as laboratories do. `haemoglobin monomer` is one haem with its chain,
the convention behind mmol/L (g/dL x 0.6206).
"""

# Symbol -> (dimension, factor to that dimension's base unit). Base units: g, mol, L, m, s, K, Pa,
# U of catalytic activity in mol/s, international units and equivalents by themselves.
_PREFIXED = {
    "g": ("mass", 1.0),
    "mol": ("amount", 1.0),
    "L": ("volume", 1.0),
    "l": ("volume", 1.0),
    "m": ("length", 1.0),
    "s": ("time", 1.0),
    "Pa": ("pressure", 1.0),
    "bar": ("pressure", 1e5),
    "U": ("catalysis", 1e-6 / 60),
    "kat": ("catalysis", 1.0),
    "[iU]": ("international units", 1.0),
    "[IU]": ("international units", 1.0),
    "IU": ("international units", 1.0),
    "eq": ("charge", 1.0),
    "Eq": ("charge", 1.0),
    "m[Hg]": ("pressure", 133322.387415),
    "mHg": ("pressure", 133322.387415),
    "m[H2O]": ("pressure", 9806.65),
    "mH2O": ("pressure", 9806.65),
    "osm": ("osmoles", 1.0),
    "Osm": ("osmoles", 1.0),
}
_PREFIXES = {
    "k": 1e3,
    "d": 1e-1,
    "c": 1e-2,
    "m": 1e-3,
    "u": 1e-6,
    "mc": 1e-6,
    "n": 1e-9,
    "p": 1e-12,
    "f": 1e-15,
    "h": 1e2,
}
_DAY = 86400.0
_YEAR = 365.25 * _DAY
_PLAIN = {
    **dict.fromkeys(("min", "minute", "minutes"), ("time", 60.0)),
    **dict.fromkeys(("h", "hr", "hour", "hours"), ("time", 3600.0)),
    **dict.fromkeys(("d", "day", "days"), ("time", _DAY)),
    **dict.fromkeys(("wk", "week", "weeks"), ("time", 7 * _DAY)),
    **dict.fromkeys(("mo", "month", "months"), ("time", _YEAR / 12)),
    **dict.fromkeys(("a", "y", "yr", "yrs", "year", "years"), ("time", _YEAR)),
    **dict.fromkeys(("lb", "lbs", "[lb_av]"), ("mass", 453.59237)),
    **dict.fromkeys(("oz", "[oz_av]"), ("mass", 28.349523125)),
    **dict.fromkeys(("in", "inch", "inches", "[in_i]"), ("length", 0.0254)),
    **dict.fromkeys(("ft", "[ft_i]"), ("length", 0.3048)),
    **dict.fromkeys(("m2", "m^2"), ("square length", 1.0)),
    **dict.fromkeys(("cm2", "cm^2"), ("square length", 0.0001)),
    **dict.fromkeys(("m3", "m^3"), ("volume", 1000.0)),
    **dict.fromkeys(("cm3", "cm^3", "cc"), ("volume", 0.001)),
    **dict.fromkeys(("mm3", "mm^3", "cmm"), ("volume", 1e-06)),
    "K": ("temperature", 1.0),
    "%": ("ratio", 1e-2),
    "[ppm]": ("ratio", 1e-6),
    # Normalised to a body: no plain square metre.
    "1.73_m2": ("1.73 m2", 1.0),
    "1.73m2": ("1.73 m2", 1.0),
    "FEU": ("fibrinogen equivalents", 1.0),
    "DDU": ("D-dimer", 1.0),
}
# Offset temperatures: kelvin = (value + shift) * factor.
_SHIFTED = {
    **dict.fromkeys(("Cel", "degC", "C", "celsius"), (273.15, 1.0)),
    **dict.fromkeys(("[degF]", "degF", "F", "fahrenheit"), (459.67, 5 / 9)),
}
_WHOLE = {
    "G/L": "10^9/L",
    "G/l": "10^9/L",
    "T/L": "10^12/L",
    "T/l": "10^12/L",
    "K/uL": "10^3/uL",
    "K/mm3": "10^3/uL",
    "M/uL": "10^6/uL",
    "M/mm3": "10^6/uL",
    "bpm": "/min",
}
_POWER = re.compile(r"[x*]? ?10[*^](-?\d{1,2})")
_ANNOTATION = re.compile(r"\{(?!1\.73)[^{}]*\}")
# The one annotation that changes the number: D-dimer as fibrinogen equivalents or as D-dimer mass.
_TAG = re.compile(r"\{? ?(FEU|DDU)\}?")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


class UnitError(ValueError):
    """A unit that is not known, or two that do not measure the same; says which."""


@dataclass(frozen=True)
class _Unit:
    """Numerator and denominator dimensions (not cancelled), shift and factor to base units.

    Not cancelled, because mmol/mol and % of the same thing need not be proportional: HbA1c.
    """

    above: tuple[str, ...]
    below: tuple[str, ...]
    factor: float
    shift: float = 0.0


def normal(unit: str) -> str:
    """Return a spelling without its varieties of sign: `×10⁹/µL` as `10^9/uL`."""
    text = unit.strip().replace("µ", "u").replace("μ", "u").replace("°", "deg")
    text = text.replace("×", "x").replace("·", ".").replace("**", "^")
    text = re.sub(r"10([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)", r"10^\1", text).translate(_SUPERSCRIPTS)
    tags = _TAG.findall(text)
    text = _ANNOTATION.sub("", _TAG.sub("", text))
    text = text.replace("{1.73_m2}", "1.73_m2").replace("{1.73m2}", "1.73_m2")
    text = _POWER.sub(r"10^\1", text)
    text = re.sub(r"(?<=/)(?:10\^0|1)(?=/|$)|\s*(?=/)|(?<=/)\s*", "", text)
    return " ".join((_WHOLE.get(text, text), *tags))


@lru_cache(maxsize=4096)
def _parse(unit: str) -> _Unit:
    """Return what a spelling means.

    Raises:
        UnitError: If it is not known.
    """
    text = normal(unit)
    if text in _SHIFTED:
        shift, factor = _SHIFTED[text]
        return _Unit(("temperature",), (), factor, shift)
    if text in ("", "1"):
        return _Unit(("ratio",), (), 1.0)
    above: list[str] = []
    below: list[str] = []
    factor = 1.0
    for place, part in enumerate(text.split("/")):
        side = above if place == 0 else below
        if part == "":
            if place == 0:
                continue
            raise UnitError(f"the unit '{unit}' is not known")
        for word in part.split() if " " in part else [part]:
            dimension, size = _atom(word, unit)
            if dimension:
                side.append(dimension)
            factor = factor * size if place == 0 else factor / size
    return _Unit(tuple(sorted(above)), tuple(sorted(below)), factor)


def _atom(word: str, unit: str) -> tuple[str, float]:
    """Return dimension and size of one symbol; numbers have no dimension."""
    power = _POWER.match(word)
    if power is not None:
        rest = word[power.end() :].lstrip(".")
        dimension, size = _atom(rest, unit) if rest else ("", 1.0)
        return dimension, size * 10.0 ** int(power[1])
    if word in ("cells", "beats", "1"):
        return "", 1.0
    if word in ("100mL", "100ml"):
        return "volume", 0.1
    if word in _PLAIN:
        return _PLAIN[word]
    if word in _PREFIXED:
        return _PREFIXED[word]
    for length in (1, 2):
        prefix, symbol = word[:length], word[length:]
        if prefix in _PREFIXES and symbol in _PREFIXED:
            dimension, size = _PREFIXED[symbol]
            return dimension, size * _PREFIXES[prefix]
    raise UnitError(f"the unit '{unit}' is not known")


def same(first: str, second: str) -> bool:
    """Return whether two spellings mean one unit, so that numbers need no conversion."""
    if normal(first) == normal(second):
        return True
    try:
        a, b = _parse(first), _parse(second)
    except UnitError:
        return False
    alike = (a.above, a.below, a.shift) == (b.above, b.below, b.shift)
    return alike and abs(a.factor / b.factor - 1) < 1e-12


def same_quantity(first: str, second: str) -> bool:
    """Return whether two units are known and measure the same, without a molar mass."""
    try:
        convert(1.0, first, second)
    except UnitError:
        return False
    return True


def convert(value: float, unit: str, to: str, molar_mass: float | None = None) -> float:
    """Return a value in another unit of the same quantity.

    Args:
        value: In `unit`.
        unit: What it is in.
        to: What it is wanted in.
        molar_mass: Of the substance in g/mol; needed between a mass and an amount of substance
            (mg/dL and mmol/L): amount = mass / molar mass.

    Raises:
        UnitError: If a unit is not known, the two do not measure the same, or `molar_mass` is
            needed and absent.

    Example:
        >>> round(convert(90, "mg/dL", "mmol/L", MOLAR_MASS["glucose"]), 3)
        4.996
        >>> round(convert(98.6, "[degF]", "Cel"), 6)
        37.0
    """
    if same(unit, to):
        return value
    a, b = _parse(unit), _parse(to)
    base = (value + a.shift) * a.factor
    if (a.above, a.below) != (b.above, b.below):
        base *= _bridge(a, b, molar_mass, f"'{unit}' and '{to}'")
    return base / b.factor - b.shift


def _bridge(a: _Unit, b: _Unit, molar_mass: float | None, pair: str) -> float:
    """Return mol per g, or its inverse, if that is all that lies between two units."""

    def swapped(dimensions: tuple[str, ...], old: str, new: str) -> tuple[str, ...]:
        changed = list(dimensions)
        changed[changed.index(old)] = new
        return tuple(sorted(changed))

    for old, new in (("mass", "amount"), ("amount", "mass")):
        if old in a.above and swapped(a.above, old, new) == b.above and a.below == b.below:
            if molar_mass is None:
                raise UnitError(f"between {pair} a molar mass is needed")
            return 1 / molar_mass if old == "mass" else molar_mass
    raise UnitError(f"{pair} do not measure the same quantity")


ALTERNATIVES = (
    *("mg/dL", "mg/L", "g/L", "g/dL", "ug/L", "ug/dL", "ng/mL", "pg/mL"),
    *("mmol/L", "umol/L", "nmol/L"),
    *("10^9/L", "/uL", "10^3/uL", "10^12/L"),
    *("U/L", "ukat/L", "Cel", "[degF]", "K", "mmHg", "kPa"),
    *("kg", "g", "lb", "cm", "m", "in", "mm", "years", "months", "days", "%", "1"),
)
"""Units that people mix up; used to say which one a number out of range may be in."""


def suspects(
    value: float, unit: str, span: tuple[float, float], molar_mass: float | None
) -> list[str]:
    """Return the units in which a value that is out of range would be within it.

    Args:
        value: As read.
        unit: What it was taken to be in.
        span: Lowest and highest plausible value in `unit`.
        molar_mass: Of the substance in g/mol, if known.
    """
    found = []
    for other in ALTERNATIVES:
        if same(other, unit):
            continue
        try:
            moved = convert(value, other, unit, molar_mass)
        except UnitError:
            continue
        if span[0] <= moved <= span[1]:
            found.append(other)
    return found
