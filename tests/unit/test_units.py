import pytest
from hypothesis import given
from hypothesis import strategies as st

from dymo_med.modalities.units import (
    ALTERNATIVES,
    MOLAR_MASS,
    UnitError,
    convert,
    same,
    same_quantity,
)

# 1 of the first is so many of the second; from SI and the definitions of the units.
KNOWN = [
    ("mg/dL", "g/L", 0.01),
    ("g/dL", "g/L", 10),
    ("10^9/L", "/uL", 1000),
    ("x10^9/L", "10*3/uL", 1),
    ("K/µL", "G/l", 1),
    ("M/uL", "10*12/L", 1),
    ("×10⁹/L", "10*9/L", 1),
    ("cells/uL", "/mm3", 1),
    ("10*3/uL{WBCs}", "10^9/L", 1),
    ("mm[Hg]", "kPa", 0.1333224),
    ("cm[H2O]", "mmHg", 0.7355592),
    ("lb", "kg", 0.45359237),
    ("[in_i]", "cm", 2.54),
    ("years", "months", 12),
    ("a", "days", 365.25),
    ("ukat/L", "U/L", 60),
    ("m[iU]/L", "u[iU]/mL", 1),
    ("ng/mL", "mcg/L", 1),
    ("mg/100mL", "mg/dL", 1),
    ("/min{beats}", "bpm", 1),
    ("mL/min/{1.73_m2}", "mL/min/1.73m2", 1),
    ("kg/m2", "kg/m^2", 1),
    ("1", "%", 100),
    ("ug/mL{FEU}", "mg/L FEU", 1),
]
# Factors as printed in laboratory handbooks (AMA Manual of Style, SI conversion).
CLINICAL = [
    ("glucose", "mg/dL", "mmol/L", 0.0555),
    ("creatinine", "mg/dL", "umol/L", 88.4),
    ("cholesterol", "mg/dL", "mmol/L", 0.0259),
    ("triglycerides", "mg/dL", "mmol/L", 0.0113),
    ("bilirubin", "mg/dL", "umol/L", 17.104),
    ("urea nitrogen", "mg/dL", "mmol/L", 0.357),
    ("calcium", "mg/dL", "mmol/L", 0.25),
    ("urate", "mg/dL", "umol/L", 59.48),
    ("iron", "ug/dL", "umol/L", 0.179),
    ("magnesium", "mg/dL", "mmol/L", 0.411),
    ("phosphorus", "mg/dL", "mmol/L", 0.323),
    ("lactate", "mg/dL", "mmol/L", 0.111),
    ("cortisol", "ug/dL", "nmol/L", 27.588),
    ("haemoglobin monomer", "g/dL", "mmol/L", 0.6206),
]


@pytest.mark.parametrize(("unit", "to", "factor"), KNOWN)
def test_known_factors(unit, to, factor):
    assert convert(1.0, unit, to) == pytest.approx(factor, rel=1e-6)
    assert same(unit, to) == (factor == 1)


@pytest.mark.parametrize(("substance", "unit", "to", "factor"), CLINICAL)
def test_factors_of_the_clinic(substance, unit, to, factor):
    assert convert(1.0, unit, to, MOLAR_MASS[substance]) == pytest.approx(factor, rel=5e-3)


def test_temperatures():
    assert convert(98.6, "°F", "°C") == pytest.approx(37)
    assert convert(37, "Cel", "[degF]") == pytest.approx(98.6)
    assert convert(0, "Cel", "K") == pytest.approx(273.15)


@pytest.mark.parametrize(
    ("unit", "to"),
    [
        ("mg/dL", "mmol/L"),  # of what?
        ("mmol/mol", "%"),  # HbA1c: not proportional
        ("U/L", "[iU]/L"),
        ("mL/min", "mL/min/1.73m2"),
        ("mg/L FEU", "mg/L DDU"),
        ("mg/L", "mg/L FEU"),
        ("Cel", "mmHg"),
        ("10e9/L", "10^9/L"),  # read literally, ten times as much
        ("furlong", "m"),
        ("mg//L", "mg/L"),
        ("mg/dL/", "mg/dL"),
    ],
)
def test_what_is_not_the_same_is_not_converted(unit, to):
    assert not same(unit, to) and not same_quantity(unit, to)
    with pytest.raises(UnitError):
        convert(1.0, unit, to)


PAIRS = [(a, b) for a in ALTERNATIVES for b in ALTERNATIVES if same_quantity(a, b)]


@given(st.sampled_from(PAIRS), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_there_and_back_in_order(pair, x, y):
    a, b = pair
    assert convert(convert(x, a, b), b, a) == pytest.approx(x, rel=1e-9, abs=1e-9)
    if x < y:
        assert convert(x, a, b) <= convert(y, a, b)


@given(st.floats(0.01, 1e5), st.floats(1, 1e5))
def test_mass_and_amount_there_and_back(x, mass):
    there = convert(x, "mg/dL", "mmol/L", mass)
    assert convert(there, "mmol/L", "mg/dL", mass) == pytest.approx(x, rel=1e-12)
    assert there == pytest.approx(x * 10 / mass)


@given(st.text(st.sampled_from("mgdLuU/l10*^9x %[]{}FEUCel.µ°-"), max_size=12))
def test_no_spelling_causes_anything_but_our_error(text):
    try:
        convert(1.0, text, "mg/dL", 180.0)
    except UnitError as error:
        assert str(error)
