#!/usr/bin/env bash
# SimpleITK 2.5.7, beside pydicom 3.0.2: a radiograph in MONOCHROME1 (small numbers are bright).
#
# Expected: both give the stored numbers, and the photometric interpretation is left to whoever
#   shows the picture.
# Found: SimpleITK turns the numbers round, within the bits stored and before the rescale: 0 of 12
#   bits comes as 4095. The image says nothing of it; its metadata still say MONOCHROME1, so that a
#   program that turns it round by that tag turns it back. pydicom gives what is stored.
# Who meets it: a model trained on radiographs that one of them read, used on those of the other.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check SimpleITK==2.5.7 pydicom==3.0.2 numpy==2.4.6
venv/bin/python - <<'PY'
import sys

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

stored = np.arange(16, dtype=np.uint16).reshape(4, 4)
film = Dataset()
film.file_meta = FileMetaDataset()
film.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
film.file_meta.MediaStorageSOPClassUID = film.SOPClassUID = ComputedRadiographyImageStorage
film.file_meta.MediaStorageSOPInstanceUID = film.SOPInstanceUID = "1.2.3.1"
film.StudyInstanceUID, film.SeriesInstanceUID, film.Modality = "1.2.3.2", "1.2.3.3", "CR"
film.Rows, film.Columns, film.SamplesPerPixel = 4, 4, 1
film.BitsAllocated, film.BitsStored, film.HighBit, film.PixelRepresentation = 16, 12, 11, 0
film.PhotometricInterpretation = "MONOCHROME1"
film.PixelData = stored.tobytes()
film.save_as("film.dcm", enforce_file_format=True)

image = sitk.ReadImage("film.dcm")
one = sitk.GetArrayFromImage(image).ravel()[:4].tolist()
other = pydicom.dcmread("film.dcm").pixel_array.ravel()[:4].tolist()
tag = image.GetMetaData("0028|0004").strip()
print(f"SimpleITK {one}, its metadata say {tag}\npydicom   {other}")
same = one == [4095, 4094, 4093, 4092] and other == [0, 1, 2, 3] and tag == "MONOCHROME1"
sys.exit(0 if same else "the behaviour has changed")
PY
