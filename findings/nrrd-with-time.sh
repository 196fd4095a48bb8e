#!/usr/bin/env bash
# SimpleITK 2.5.7, beside pynrrd 1.1.3: the space of a NRRD file with a time axis.
#
# Expected: a NRRD file in right-anterior-superior-time (RAST) lies where the same volume in
#   right-anterior-superior (RAS) lies. NRRD defines both by the same three axes, and SimpleITK
#   turns RAS to the LPS that it works in.
# Found: RAS is turned, RAST is not. Left and right, front and back are exchanged, without a warning.
# Who meets it: whoever saves one point of a time series, or a sequence of 3D Slicer, as NRRD.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check SimpleITK==2.5.7 pynrrd==1.1.3 numpy==2.4.6
venv/bin/python - <<'PY'
import sys

import nrrd
import numpy as np
import SimpleITK as sitk

values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
origins = {}
for space, time in (("right-anterior-superior", False), ("right-anterior-superior-time", True)):
    header = {
        "space": space,
        "space directions": np.diag([2.0, 2.0, 2.0, 1.0][: 3 + time]),
        "space origin": [10.0, 20.0, 30.0, 0.0][: 3 + time],
        "kinds": ["domain", "domain", "domain", "time"][: 3 + time],
    }
    nrrd.write("scan.nrrd", values[..., None] if time else values, header)
    image = sitk.ReadImage("scan.nrrd")
    origins[space] = image.GetOrigin()[:3]
    print(f"{space}: origin {origins[space]}, first axis {image.GetDirection()[0]:+.0f} (LPS)")
seen = list(origins.values())
sys.exit(0 if seen == [(-10.0, -20.0, 30.0), (10.0, 20.0, 30.0)] else "the behaviour has changed")
PY
