#!/usr/bin/env bash
# SimpleITK 2.5.7, beside nibabel 5.4.2: a NIfTI file that was registered to a template, with an
# affine registration (sform code 4, qform code 1, each with its own voxel size).
#
# Expected: both read the sform, which is what nibabel and the tools that wrote the file use.
# Found: SimpleITK takes the qform if the sform's voxel size is another one than pixdim's, and says
#   so on stderr only. The two place the same voxel up to centimetres apart, and disagree about its
#   size. So do TorchIO and ANTs, which read through ITK.
# Who meets it: whoever hands scans on after a registration that changed the header and not the
#   voxels, and mixes programs of both families.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check SimpleITK==2.5.7 nibabel==5.4.2 \
    numpy==2.4.6
venv/bin/python - <<'PY'
import sys

import nibabel as nib
import numpy as np
import SimpleITK as sitk

sitk.ProcessObject.GlobalWarningDisplayOff()
scan = nib.Nifti1Image(np.zeros((20, 20, 20), np.int16), None)
scan.set_qform(np.diag([1.0, 1.0, 1.0, 1.0]), code=1)
scan.set_sform(np.diag([1.1, 1.1, 1.1, 1.0]), code=4)
nib.save(scan, "scan.nii")
one = nib.load("scan.nii")
other = sitk.ReadImage("scan.nii")
corner = (19, 19, 19)
x, y, z = other.TransformIndexToPhysicalPoint(corner)
seen = (one.affine @ [*corner, 1])[:3].round(3).tolist(), [round(v, 3) for v in (-x, -y, z)]
print(f"last voxel, mm (RAS): nibabel {seen[0]}, SimpleITK {seen[1]}")
same = seen == ([20.9] * 3, [19.0] * 3)
sys.exit(0 if same else "the behaviour has changed")
PY
