#!/usr/bin/env bash
# tableone 0.9.6: a categorical column with missing cells, by group.
#
# Expected: percentages are of the patients in whom it was measured, and the test compares those.
# Found: by default (include_null) a missing cell is a category called None: it is in the
#   denominators, in the test and in the standardised difference. Groups that differ only in how
#   often something was not measured come out as different in it; of patients with a value half and
#   half in both groups, p is less than 0.0001.
# Who meets it: Table 1 of any cohort with gaps.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check tableone==0.9.6 pandas==2.3.3 \
    numpy==2.4.6 scipy==1.17.1 statsmodels==0.15.0
venv/bin/python - <<'PY'
import sys
import warnings

import pandas as pd
from tableone import TableOne

warnings.simplefilter("ignore")
smoker = ["yes"] * 20 + ["no"] * 20 + ["yes"] * 10 + ["no"] * 10 + [None] * 20
frame = pd.DataFrame({"group": ["a"] * 40 + ["b"] * 40, "smoker": smoker})
seen = {}
for null in (True, False):
    table = TableOne(
        frame,
        columns=["smoker"],
        categorical=["smoker"],
        groupby="group",
        pval=True,
        include_null=null,
        pval_digits=4,
    ).tableone.droplevel(0, axis=1)
    rows = {level: cells["b"] for (name, level), cells in table.iterrows() if level}
    p = [str(v) for v in table["P-Value"] if str(v)][0]
    seen[null] = rows, p
    print(f"include_null={null}: group b {rows}, p = {p}")
print("as it comes:", TableOne(frame, columns=["smoker"], categorical=["smoker"]).tableone.shape)
same = "25.0" in seen[True][0]["yes"] and "50.0" in seen[False][0]["yes"]
same = same and float(seen[True][1].strip("<")) < 0.001 and float(seen[False][1]) == 1.0
sys.exit(0 if same else "the behaviour has changed")
PY
