#!/usr/bin/env bash
# ANTsPy (antspyx) 0.6.3, beside nibabel 5.4.2: three letters for the orientation of a scan.
#
# Expected: RAS means that the first axis runs to the right, as in nibabel, NIfTI, MONAI and most
#   papers; reorient_image2(scan, "RAS") gives such a scan.
# Found: the letters say where axes come from. A scan that nibabel calls RAS is LPI, and
#   reorient_image2(scan, "RAS") writes a file that nibabel calls LPI: every axis is turned. The
#   affine is right, so that viewers show nothing amiss.
# Who meets it: whoever reorients with ANTsPy and then takes the voxels without the affine, as most
#   training code does.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check antspyx==0.6.3 nibabel==5.4.2 \
    numpy==2.2.6
venv/bin/python - <<'PY'
import sys

import ants
import nibabel as nib
import numpy as np

nib.save(nib.Nifti1Image(np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.eye(4)), "scan.nii")
scan = ants.image_read("scan.nii")
turned = ants.reorient_image2(scan, "RAS")
ants.image_write(turned, "turned.nii")
rows = [
    ("as made", ants.get_orientation(scan), "".join(nib.aff2axcodes(nib.load("scan.nii").affine))),
    (
        'after reorient_image2(scan, "RAS")',
        ants.get_orientation(turned),
        "".join(nib.aff2axcodes(nib.load("turned.nii").affine)),
    ),
]
for what, one, other in rows:
    print(f"{what}: ANTsPy {one}, nibabel {other}")
seen = [row[1:] for row in rows]
sys.exit(0 if seen == [("LPI", "RAS"), ("RAS", "LPI")] else "the behaviour has changed")
PY
