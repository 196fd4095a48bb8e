#!/usr/bin/env bash
# MLstatkit 0.1.91: DeLong's test of two models that give the same scores.
#
# Expected: no difference, so a p-value of 1, or NaN because the variance of the difference is 0.
# Found: z = 0 and p = 0: the strongest evidence of a difference that can be stated. The variance of
#   0 sends the test to a bootstrap, in which every resample is 0 as well.
# Who meets it: whoever compares a method with itself, or with one that ranks patients alike, in a
#   table of many comparisons. Models that rank alike with other numbers are met likewise.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check MLstatkit==0.1.91 numpy==2.4.6 \
    scipy==1.17.1 scikit-learn==1.9.1
venv/bin/python - <<'PY'
import sys

import numpy as np
from MLstatkit import Delong_test

labels = np.array([0, 0, 0, 1, 0, 1, 1, 1] * 5)
scores = np.linspace(0.0, 1.0, 8).round(3).repeat(5).reshape(8, 5).T.ravel()
seen = []
for what, other in (("the same scores", scores), ("the same ranks", scores**2)):
    z, p = Delong_test(labels, scores, other)[:2]
    seen.append((float(z), float(p)))
    print(f"{what}: z = {z}, p = {p}")
sys.exit(0 if seen == [(0.0, 0.0)] * 2 else "the behaviour has changed")
PY
