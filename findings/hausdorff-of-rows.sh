#!/usr/bin/env bash
# miseval 1.3.0: the Hausdorff distance of two outlines.
#
# Expected: metric="HD" is the distance between the two sets of pixels: 20 for two equal squares 20
#   pixels apart, and no number if one mask is empty. metric="AHD", the average one, is smaller.
# Found: the rows of the picture are taken for the points: two squares 20 pixels apart are 1.7 apart
#   if one lies beside the other, and 0 if it lies below. A lesion that is missed is 1.7 away too.
#   Volumes are refused. AHD is the largest distance between borders, which is what HD should be.
# Who meets it: whoever ranks outlines by miseval's HD: neither place nor size of a lesion can be
#   told from it.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check miseval==1.3.0 hausdorff==0.2.6 \
    numba==0.68.1 numpy==2.4.6 scipy==1.17.1 scikit-image==0.26.0
venv/bin/python - <<'PY'
import sys

import numpy as np
from miseval import evaluate
from scipy.spatial.distance import directed_hausdorff


def square(row, column):
    mask = np.zeros((40, 40), int)
    mask[row : row + 3, column : column + 3] = 1
    return mask


first = square(5, 5)
seen = {}
for what, other in (
    ("20 pixels beside", square(5, 25)),
    ("20 pixels below", square(25, 5)),
    ("missed", np.zeros_like(first)),
):
    hd, ahd = (float(evaluate(first, other, metric=m, multi_class=False)) for m in ("HD", "AHD"))
    a, b = np.argwhere(first), np.argwhere(other)
    true = max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0]) if len(b) else None
    seen[what] = round(hd, 3), true
    print(f"{what}: miseval HD {hd:.3f}, AHD {ahd:.3f}; between the pixels {true}")
expected = {
    "20 pixels beside": (1.732, 20.0),
    "20 pixels below": (0.0, 20.0),
    "missed": (1.732, None),
}
sys.exit(0 if seen == expected else "the behaviour has changed")
PY
