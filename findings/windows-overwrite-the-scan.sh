#!/usr/bin/env bash
# MONAI 1.6.1: sliding_window_inference with mode="gaussian" and a predictor that hands back (part
# of) what it was given.
#
# Expected: the answer is the scan again, and the scan is left alone, as with mode="constant".
# Found: each answer is multiplied by the window's weights in place. Where it shares memory with the
#   window, it is the scan itself that is changed, before the next window looks at it: after one
#   pass the scan of ones holds numbers near 0, and the answer follows it.
# Who meets it: networks that pass observed channels through as they are (output = input[:, :n]),
#   and whoever tests an inferer with an identity.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check monai==1.6.1 torch==2.13.0 \
    numpy==2.4.6
venv/bin/python - <<'PY'
import logging
import sys

import torch
from monai.inferers import sliding_window_inference

logging.disable()
seen = {}
for mode in ("constant", "gaussian"):
    scan = torch.ones(1, 1, 32, 32, 32)
    answer = sliding_window_inference(scan, (16, 16, 16), 1, lambda window: window, 0.25, mode=mode)
    seen[mode] = round(float(answer.min()), 3), round(float(scan.min()), 3)
    print(f"{mode}: least of the answer {seen[mode][0]}, of the scan afterwards {seen[mode][1]}")
scan = torch.ones(1, 1, 32, 32, 32)
answer = sliding_window_inference(
    scan, (16, 16, 16), 1, lambda window: window.clone(), 0.25, mode="gaussian"
)
print(f"gaussian, a copy: least of the answer {answer.min():.3f}, of the scan {scan.min():.3f}")
same = seen["constant"] == (1.0, 1.0) and seen["gaussian"][1] < 0.01 and seen["gaussian"][0] < 0.9
sys.exit(0 if same and float(answer.min()) > 0.999 else "the behaviour has changed")
PY
