#!/usr/bin/env bash
# statsmodels 0.15.0, beside lifelines 0.30.3: the median survival where the curve stands at one
# half.
#
# Expected: the first time at which half of the patients or fewer are alive, as in lifelines; or the
#   middle of the step, as in R.
# Found: statsmodels takes the first time at which fewer than half are alive, one event later. Of
#   four patients who die at 1, 2, 3 and 4 months the median is 3 months, against 2. Its other
#   quantiles are late in the same way.
# Who meets it: small arms, in which the curve often stops at one half exactly.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check statsmodels==0.15.0 lifelines==0.30.3 \
    pandas==2.3.3 numpy==2.4.6 scipy==1.17.1
venv/bin/python - <<'PY'
import sys
import warnings

import numpy as np
from lifelines import KaplanMeierFitter
from statsmodels.duration.survfunc import SurvfuncRight

warnings.simplefilter("ignore")
months, died = np.array([1.0, 2.0, 3.0, 4.0]), np.ones(4, int)
curve = SurvfuncRight(months, died)
print("alive:", dict(zip(curve.surv_times.tolist(), curve.surv_prob.round(6).tolist())))
other = KaplanMeierFitter().fit(months, died)
seen = [
    (float(curve.quantile(0.5)), float(other.median_survival_time_)),
    (float(curve.quantile(0.25)), float(curve.surv_times[curve.surv_prob <= 0.75][0])),
]
print(f"median: statsmodels {seen[0][0]}, lifelines {seen[0][1]}")
print(f"time at which a quarter has died: statsmodels {seen[1][0]}, its curve {seen[1][1]}")
sys.exit(0 if seen == [(3.0, 2.0), (2.0, 1.0)] else "the behaviour has changed")
PY
