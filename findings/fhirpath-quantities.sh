#!/usr/bin/env bash
# fhirpathpy 2.2.4: FHIRPath on quantities and whole numbers.
#
# Expected: quantities of one dimension are compared by size (FHIRPath, Quantity): 1 cm is more than
#   1 mm, and 10 mmol/L are 10000 umol/L; an Observation's value equals the same quantity as a
#   literal; a mod b is what is left after a div b.
# Found: any comparison of quantities by size is a TypeError; 10 mmol/L are not 10000 umol/L, though
#   4 g are 4000 mg; the value of an Observation is not equal to itself written as a literal; -7 div
#   2 is -3, and -7 mod 2 is 1, which do not make -7.
# Who meets it: whoever selects patients or cells of a FHIR record by FHIRPath: a rule with = is
#   false for everybody, without an error.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check fhirpathpy==2.2.4
venv/bin/python - <<'PY'
import sys

from fhirpathpy import evaluate
from fhirpathpy.models import models

record = {
    "resourceType": "Observation",
    "valueQuantity": {
        "value": 5.4,
        "unit": "mmol/L",
        "system": "http://unitsofmeasure.org",
        "code": "mmol/L",
    },
}
seen = {}
for rule in (
    "1 'cm' > 1 'mm'",
    "4 'g' = 4000 'mg'",
    "10 'mmol/L' = 10000 'umol/L'",
    "Observation.value = 5.4 'mmol/L'",
    "-7 div 2",
    "-7 mod 2",
):
    try:
        seen[rule] = evaluate(record, rule, {}, models["r4"])
    except TypeError:
        seen[rule] = "TypeError"
    print(f"{rule}: {seen[rule]}")
same = list(seen.values()) == ["TypeError", [True], [False], [False], [-3], [1]]
sys.exit(0 if same else "the behaviour has changed")
PY
