#!/usr/bin/env bash
# imageio 2.38.1: a DICOM series with a rescale slope of 1 and an intercept of 0, as much MR has,
# whose first slice is dark.
#
# Expected: the volume has the values of the files, 100, 1000 and 3000, in a type that holds them.
# Found: volread takes the type that the first slice needs, int8, and forces the others into it:
#   1000 becomes -24 and 3000 becomes -72, without a warning. Without slope and intercept the values
#   are right. A slope that differs from slice to slice is cut to whole numbers by the same rule.
# Who meets it: whoever makes arrays or pictures of MR series with imageio: the first slice at the
#   end of a volume is mostly air.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check imageio==2.38.1 pydicom==3.0.2 \
    numpy==2.4.6
venv/bin/python - <<'PY'
import contextlib
import io
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage


def read(folder, rescale):
    """Write a series of three slices; return the type and a value of each as imageio has them."""
    Path(folder).mkdir()
    for k, value in enumerate((100, 1000, 3000)):
        plane = Dataset()
        plane.file_meta = FileMetaDataset()
        plane.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        plane.file_meta.MediaStorageSOPClassUID = plane.SOPClassUID = MRImageStorage
        plane.file_meta.MediaStorageSOPInstanceUID = plane.SOPInstanceUID = f"1.2.3.1.{k + 1}"
        plane.StudyInstanceUID, plane.SeriesInstanceUID = "1.2.3.2", "1.2.3.3"
        plane.Modality, plane.SeriesNumber, plane.InstanceNumber = "MR", 1, k + 1
        plane.ImagePositionPatient = [0, 0, 2 * k]
        plane.ImageOrientationPatient, plane.PixelSpacing = [1, 0, 0, 0, 1, 0], [1, 1]
        plane.SliceThickness = 2
        plane.Rows, plane.Columns, plane.SamplesPerPixel = 4, 4, 1
        plane.BitsAllocated, plane.BitsStored, plane.HighBit = 16, 16, 15
        plane.PixelRepresentation, plane.PhotometricInterpretation = 1, "MONOCHROME2"
        if rescale:
            plane.RescaleSlope, plane.RescaleIntercept = 1, 0
        plane.PixelData = np.full((4, 4), value, np.int16).tobytes()
        plane.save_as(f"{folder}/{k}.dcm", enforce_file_format=True)
    with contextlib.redirect_stdout(io.StringIO()):
        volume = imageio.volread(folder, "DICOM")
    return str(volume.dtype), volume[:, 0, 0].tolist()


seen = read("without", False), read("with", True)
print("stored: [100, 1000, 3000]")
print("without slope and intercept:", *seen[0])
print("with slope 1, intercept 0:  ", *seen[1])
expected = ("int16", [100, 1000, 3000]), ("int8", [100, -24, -72])
sys.exit(0 if seen == expected else "the behaviour has changed")
PY
