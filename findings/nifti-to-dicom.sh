#!/usr/bin/env bash
# nii2dcm 0.1.6: a NIfTI scan with an origin and with negative and fractional values, made into a
# DICOM series.
#
# Expected: each voxel keeps its place in the body and its value: RAS coordinates become LPS, and a
#   slope and an intercept hold what 16 bits without a sign cannot.
# Found: the origin's left and back are not turned round, and every slice lies one slice too low.
#   Fractions are cut off, and -3 becomes 65533 (BitsStored says 12). Nothing is said.
# Who meets it: whoever puts a normalised, registered or recovered scan back among DICOM files.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check nii2dcm==0.1.6 numpy==1.23.2 \
    nibabel==5.0.0 pydicom==2.3.0
venv/bin/python - <<'PY'
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom

values = np.zeros((4, 5, 3), np.float32)
values[1, 2, 1], values[0, 0, 0] = 900.7, -3.0
affine = np.array([[2.0, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]])
nib.save(nib.Nifti1Image(values, affine), "scan.nii")
Path("series").mkdir()
subprocess.run(
    ["venv/bin/nii2dcm", "scan.nii", "series", "-d", "MR"],
    check=True,
    stdout=subprocess.DEVNULL,
)
seen = {}
for path in Path("series").glob("*.dcm"):
    plane = pydicom.dcmread(path)
    stored = plane.pixel_array * float(plane.RescaleSlope) + float(plane.RescaleIntercept)
    across, down = np.reshape([float(v) for v in plane.ImageOrientationPatient], (2, 3))
    rows, columns = (float(v) for v in plane.PixelSpacing)
    corner = np.array([float(v) for v in plane.ImagePositionPatient])
    for row, column in np.argwhere(stored):
        x, y, z = corner + across * columns * column + down * rows * row
        seen[float(stored[row, column])] = [float(v) for v in (-x, -y, z)]
for index in ((1, 2, 1), (0, 0, 0)):
    place = (affine @ [*index, 1])[:3].tolist()
    print(f"NIfTI: {values[index]:.1f} at {place} mm (RAS)")
for value, place in seen.items():
    print(f"DICOM: {value:.1f} at {np.round(place, 3).tolist()} mm (RAS)")
expected = {900.0: [-8.0, -14.0, 30.0], 65533.0: [-10.0, -20.0, 26.0]}
sys.exit(0 if seen == expected else "the behaviour has changed")
PY
