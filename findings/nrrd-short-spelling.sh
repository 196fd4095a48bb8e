#!/usr/bin/env bash
# MONAI 1.6.1, beside SimpleITK 2.5.7: the space of a NRRD file, spelled in short.
#
# Expected: LPS is left-posterior-superior, as the format defines it. NrrdReader turns a file in
#   either spelling to RAS.
# Found: it turns left-posterior-superior only. A file that says LPS is taken for RAS, so that left
#   and right, front and back are exchanged; left-anterior-superior is not turned either. SimpleITK
#   reads each as it is meant.
# Who meets it: whoever trains on NRRD files of several writers with MONAI's NrrdReader, or compares
#   its outlines with those of another program.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check monai==1.6.1 torch==2.13.0 \
    SimpleITK==2.5.7 pynrrd==1.1.3 numpy==2.4.6
venv/bin/python - <<'PY'
import logging
import sys

import nrrd
import numpy as np
import SimpleITK as sitk
from monai.data import NrrdReader

logging.disable()
values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
seen = {}
for space in ("left-posterior-superior", "LPS", "left-anterior-superior", "RAS"):
    header = {"space": space, "space directions": np.eye(3), "space origin": [10, 20, 30]}
    nrrd.write("scan.nrrd", values, header)
    reader = NrrdReader()
    _, meta = reader.get_data(reader.read("scan.nrrd"))
    one = np.asarray(meta["affine"])[:3, 3].astype(int).tolist()
    x, y, z = sitk.ReadImage("scan.nrrd").GetOrigin()
    other = [round(-x), round(-y), round(z)]
    seen[space] = one == other
    print(f"{space}: first voxel in RAS {one} in MONAI, {other} in SimpleITK")
sys.exit(0 if list(seen.values()) == [True, False, False, True] else "the behaviour has changed")
PY
