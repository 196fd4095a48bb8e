#!/usr/bin/env bash
# dicom2nifti 2.6.2, beside dcm2niix 1.0.20260724: an Enhanced MR file whose frames are stored from
# top to bottom, and whose rescale slope is the same for all of them.
#
# Expected: each frame comes to the height that its own PlanePositionSequence states, in whatever
#   order frames are stored; the slope of the shared functional groups is applied.
# Found: dicom2nifti puts the volume upside down: the frame that was 6 mm up lies at 0 mm. It leaves
#   the slope out too. dcm2niix does both.
# Who meets it: whoever converts Enhanced multi-frame MR or CT before handing scans over.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check dicom2nifti==2.6.2 \
    dcm2niix==1.0.20260724 pydicom==3.0.2 nibabel==5.4.2 numpy==1.26.4
PATH="$work/venv/bin:$PATH" venv/bin/python - <<'PY'
import subprocess
import sys
from pathlib import Path

import dicom2nifti
import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian

HEIGHTS = (6.0, 4.0, 2.0, 0.0)  # mm, in the order of the frames
STORED = {z: 100.0 + i for i, z in enumerate(HEIGHTS)}
SLOPE = 2.0


def item(**fields):
    one = Dataset()
    for keyword, value in fields.items():
        setattr(one, keyword, value)
    return Sequence([one])


scan = Dataset()
scan.file_meta = FileMetaDataset()
scan.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
scan.file_meta.MediaStorageSOPClassUID = scan.SOPClassUID = EnhancedMRImageStorage
scan.file_meta.MediaStorageSOPInstanceUID = scan.SOPInstanceUID = "1.2.3.1"
scan.StudyInstanceUID, scan.SeriesInstanceUID, scan.Modality = "1.2.3.2", "1.2.3.3", "MR"
scan.FrameOfReferenceUID, scan.Manufacturer, scan.SeriesNumber = "1.2.3.4", "none", 1
scan.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE"]
scan.Rows, scan.Columns, scan.SamplesPerPixel, scan.NumberOfFrames = 8, 8, 1, len(HEIGHTS)
scan.BitsAllocated, scan.BitsStored, scan.HighBit, scan.PixelRepresentation = 16, 16, 15, 1
scan.PhotometricInterpretation = "MONOCHROME2"
scan.PixelData = np.stack([np.full((8, 8), STORED[z], np.int16) for z in HEIGHTS]).tobytes()
scan.SharedFunctionalGroupsSequence = item(
    PlaneOrientationSequence=item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
    PixelMeasuresSequence=item(PixelSpacing=[1, 1], SliceThickness=2, SpacingBetweenSlices=2),
    PixelValueTransformationSequence=item(
        RescaleSlope=SLOPE, RescaleIntercept=0, RescaleType="US"
    ),
)
scan.DimensionOrganizationSequence = item(DimensionOrganizationUID="1.2.3.5")
scan.DimensionIndexSequence = item(
    DimensionIndexPointer=0x00209057,  # InStackPositionNumber
    FunctionalGroupPointer=0x00209111,
    DimensionOrganizationUID="1.2.3.5",
)
frames = []
for z in HEIGHTS:
    place = sorted(HEIGHTS).index(z) + 1
    frame = Dataset()
    frame.FrameContentSequence = item(
        StackID="1", InStackPositionNumber=place, DimensionIndexValues=place
    )
    frame.PlanePositionSequence = item(ImagePositionPatient=[0, 0, z])
    frames.append(frame)
scan.PerFrameFunctionalGroupsSequence = Sequence(frames)
Path("scan").mkdir()
scan.save_as("scan/scan.dcm", enforce_file_format=True)


def by_height(path):
    """Return the value of each plane by its height in mm."""
    image = nib.load(path)
    heights = [float((image.affine @ [0, 0, k, 1])[2]) for k in range(image.shape[2])]
    return dict(sorted(zip(heights, image.get_fdata()[3, 3].tolist())))


dicom2nifti.dicom_series_to_nifti("scan", "one.nii", reorient_nifti=True)
subprocess.run(["dcm2niix", "-f", "two", "-o", ".", "scan"], stdout=subprocess.DEVNULL, check=True)
one, two = by_height("one.nii"), by_height("two.nii")
truth = {z: SLOPE * STORED[z] for z in sorted(HEIGHTS)}
print(f"value by height in mm\nas written  {truth}\ndcm2niix    {two}\ndicom2nifti {one}")
wrong = dict(zip(truth, (STORED[z] for z in sorted(HEIGHTS, reverse=True))))
sys.exit(0 if two == truth and one == wrong else "the behaviour has changed")
PY
