#!/usr/bin/env bash
# ucumvert 0.3.2 with Pint 0.25.3: units of UCUM, read into Pint.
#
# Expected: each code is read as UCUM defines it: [Cal], the Calorie of nutrition labels, is 1 kcal
#   = 4184 J; ' is a minute of arc; a code that is an annotation alone, such as {score}, is the
#   number 1; [pH] is known.
# Found: [Cal] is 4.184 J, a thousand times too small. ' is a minute of time. {score} comes as a
#   token of the parser, not as a quantity, so that the next line of code fails. [pH] is an error,
#   because Pint's own name for it is not in this version.
# Who meets it: diet and energy expenditure; scores and pH among laboratory values, which are
#   frequent.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check ucumvert==0.3.2 Pint==0.25.3 \
    lark==1.3.1
venv/bin/python - <<'PY'
import sys

from ucumvert import PintUcumRegistry

units = PintUcumRegistry()
calorie = units.from_ucum("[Cal]").to("joule").magnitude
minute = units.from_ucum("'").to_base_units()
score = units.from_ucum("{score}")
try:
    acid = str(units.from_ucum("[pH]"))
except Exception as error:
    acid = type(error).__name__
print(f"1 [Cal] = {calorie:g} J; 1 kcal = {units.from_ucum('kcal').to('joule').magnitude:g} J")
print(f"1 ' = {minute}")
print(f"{{score}} is a {type(score).__module__}.{type(score).__name__}")
print(f"[pH]: {acid}")
same = round(calorie, 6) == 4.184 and str(minute.units) == "second" and minute.magnitude == 60
same = same and type(score).__name__ == "Token" and acid == "VisitError"
sys.exit(0 if same else "the behaviour has changed")
PY
