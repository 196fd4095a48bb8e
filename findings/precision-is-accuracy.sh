#!/usr/bin/env bash
# confidenceinterval 1.0.5, beside scikit-learn 1.9.1: precision, recall and F1 of two classes.
#
# Expected: precision_score, recall_score and f1_score, which take scikit-learn's names, give
#   scikit-learn's numbers, with an interval beside them: those of the positive class.
# Found: all three default to the micro average over both classes, which is the accuracy. The three
#   are equal whatever the model does, and their intervals are that of the accuracy. Only
#   average="binary", or ppv_score and tpr_score, give what the names say.
# Who meets it: whoever adds intervals to a table by changing an import: at a rare finding, a recall
#   of one half becomes one of 95 %.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check confidenceinterval==1.0.5 \
    scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1
venv/bin/python - <<'PY'
import sys

import confidenceinterval as ci
import numpy as np
import sklearn.metrics as plain

truth = np.array([1] * 10 + [0] * 190)
answer = np.array([1] * 5 + [0] * 5 + [1] * 5 + [0] * 185)
seen = []
for name in ("precision_score", "recall_score", "f1_score"):
    one = float(getattr(ci, name)(truth, answer)[0])
    other = float(getattr(plain, name)(truth, answer))
    seen.append((round(one, 6), round(other, 6)))
    print(f"{name}: confidenceinterval {one:.3f}, scikit-learn {other:.3f}")
accuracy = float(plain.accuracy_score(truth, answer))
print(f"accuracy: {accuracy:.3f}")
sys.exit(0 if seen == [(0.95, 0.5)] * 3 and accuracy == 0.95 else "the behaviour has changed")
PY
