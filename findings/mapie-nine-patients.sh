#!/usr/bin/env bash
# MAPIE 1.6.0, beside crepes 0.9.1: split conformal intervals at 90 % from nine patients.
#
# Expected: nine residuals are enough: the interval reaches to the largest of them, rank ceil(10 x
#   0.9) = 9. MAPIE gives it.
# Found: MAPIE refuses: 1/(1 - level) must be less than the number of samples, though equal would
#   do; likewise 99 at 99 %. crepes answers with an infinite interval, because 1 - 0.9 is a little
#   less than 0.1 in floating point; for the same reason its interval at 90 % reaches one rank
#   further than needed with 19 and 29 patients, where MAPIE's does not.
# Who meets it: whoever calibrates on few patients, or compares widths of the two.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check mapie==1.6.0 crepes==0.9.1 \
    scikit-learn==1.9.1 numpy==2.4.6 pandas==2.3.3
venv/bin/python - <<'PY'
import sys
import warnings

import numpy as np
from crepes import ConformalRegressor
from mapie.regression import SplitConformalRegressor
from sklearn.base import BaseEstimator, RegressorMixin

warnings.simplefilter("ignore")


class Zero(RegressorMixin, BaseEstimator):
    """Predicts 0, so that residuals are the targets."""

    def fit(self, x, y):
        self.is_fitted_ = True
        return self

    def predict(self, x):
        return np.zeros(len(x))


seen = {}
for n, level in ((9, 0.9), (10, 0.9), (19, 0.9), (29, 0.9), (99, 0.99)):
    residuals = np.arange(1.0, n + 1)  # so the end of an interval is a rank
    try:
        model = SplitConformalRegressor(Zero().fit(None, None), confidence_level=level, prefit=True)
        model.conformalize(np.zeros((n, 1)), residuals)
        one = float(model.predict_interval(np.zeros((1, 1)))[1].max())
    except ValueError:
        one = "ValueError"
    other = ConformalRegressor()
    other.fit(residuals=residuals)
    two = float(other.predict_int(y_hat=np.zeros(1), confidence=level).max())
    needed = -(-(n + 1) * round(level * 100) // 100)
    seen[n] = one, two
    print(f"{n} patients at {level:.0%}: rank needed {needed}, MAPIE {one}, crepes {two}")
expected = {
    9: ("ValueError", float("inf")),
    10: (10.0, 10.0),
    19: (18.0, 19.0),
    29: (27.0, 28.0),
    99: ("ValueError", 99.0),
}
sys.exit(0 if seen == expected else "the behaviour has changed")
PY
