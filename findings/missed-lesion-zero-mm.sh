#!/usr/bin/env bash
# seg-metrics 1.2.8, beside MedPy 0.5.2: distances when a lesion is missed altogether.
#
# Expected: no distance to a surface that is not there: an error (as in MedPy), infinity or NaN.
# Found: seg-metrics says 0 mm for HD95, the Hausdorff distance and the mean surface distance, the
#   best there is, both for a lesion that is missed and for one that is made up; Dice is 0.
# Who meets it: a mean HD95 over patients becomes better with every lesion that is missed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check seg-metrics==1.2.8 medpy==0.5.2 \
    SimpleITK==2.5.7 numpy==1.26.4
venv/bin/python - <<'PY'
import logging
import sys

import numpy as np
from medpy.metric.binary import hd95
from seg_metrics.seg_metrics import write_metrics

logging.disable()
lesion = np.zeros((10, 10, 10), np.uint8)
lesion[3:6, 3:6, 3:6] = 1
nothing = np.zeros_like(lesion)
seen = []
for what, truth, found in (("missed", lesion, nothing), ("made up", nothing, lesion)):
    row = write_metrics(
        labels=[1],
        gdth_img=truth,
        pred_img=found,
        spacing=(1.0, 1.0, 1.0),
        metrics=["dice", "hd95", "hd", "msd"],
    )[0]
    seen.append([float(row[name][0]) for name in ("dice", "hd95", "hd", "msd")])
    print(f"{what}: seg-metrics says dice, hd95, hd, msd = {seen[-1]}", end="; ")
    try:
        print(f"MedPy says hd95 = {hd95(found, truth)}")
        seen.append("a number")
    except RuntimeError:
        print("MedPy raises an error")
sys.exit(0 if seen == [[0.0] * 4] * 2 else "the behaviour has changed")
PY
