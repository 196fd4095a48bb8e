"""Writes DICOM files for tests: classic series and Enhanced multi-frame, of any geometry."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
)

SECRETS = ("Doe^Jane", "MRN-0042", "19700101")


def lps(affine):
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(affine, dtype=float)


def item(**fields):
    """Return a sequence of one item."""
    dataset = Dataset()
    for keyword, value in fields.items():
        setattr(dataset, keyword, value)
    return Sequence([dataset])


def header(sop, stored, series, instance, modality="MR", **fields):
    """Return an image of `stored` `(rows, columns)` or `(frames, rows, columns)`, 16 bit."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop
    uid = f"{series}.{instance}"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3.4", series
    dataset.FrameOfReferenceUID = "1.2.3.4.9"
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = SECRETS
    dataset.Modality = modality
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    if stored.ndim == 3:
        dataset.NumberOfFrames = len(stored)
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.SamplesPerPixel = 15, 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PhotometricInterpretation = "MONOCHROME2"
    for keyword, value in fields.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = np.ascontiguousarray(stored).tobytes()
    return dataset


def numbers(values):
    """Return numbers as DICOM writes them: at most 16 characters each."""
    return [f"{value:.9g}"[:16] for value in values]


def series(
    folder: Path,
    stored,
    affine,
    uid="1.2.3.4.5",
    rescale=None,
    change=None,
    ct=False,
    order=None,
    **fields,
):
    """Write a classic series.

    Args:
        folder: Where to.
        stored: Stored numbers `(X, Y, Z)`, 16 bit.
        affine: Voxel to world `(4, 4)`, RAS+.
        uid: SeriesInstanceUID.
        rescale: `(slope, intercept)`, or one per slice.
        change: Called with each header and its slice number; returns whether it is written.
        ct: CT instead of MR.
        order: Slice numbers in the order of file names.
        fields: More of each header.
    """
    folder.mkdir(parents=True, exist_ok=True)
    matrix = lps(affine)
    across, down = (np.linalg.norm(matrix[:3, a]) for a in (0, 1))
    cosines = [*(matrix[:3, 0] / across), *(matrix[:3, 1] / down)]
    for place, k in enumerate(order if order is not None else range(stored.shape[2])):
        dataset = header(
            CTImageStorage if ct else MRImageStorage,
            stored[:, :, k].T,
            uid,
            k + 1,
            modality="CT" if ct else "MR",
            ImageOrientationPatient=numbers(cosines),
            ImagePositionPatient=numbers(matrix[:3, 3] + k * matrix[:3, 2]),
            PixelSpacing=numbers((down, across)),
            **fields,
        )
        if rescale is not None:
            slope, intercept = rescale[k] if np.ndim(rescale) == 2 else rescale
            dataset.RescaleSlope, dataset.RescaleIntercept = numbers((slope, intercept))
        if change is None or change(dataset, k) is not False:
            dataset.save_as(folder / f"{uid}_{place:03d}.dcm", enforce_file_format=True)
    return folder


def enhanced(path: Path, stored, affine, rescale=None, order=None, change=None, sop=None):
    """Write an Enhanced multi-frame file; the arguments are those of `series`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    matrix = lps(affine)
    across, down = (np.linalg.norm(matrix[:3, a]) for a in (0, 1))
    cosines = [*(matrix[:3, 0] / across), *(matrix[:3, 1] / down)]
    frames = list(order if order is not None else range(stored.shape[2]))
    dataset = header(
        sop or EnhancedMRImageStorage, stored[:, :, frames].transpose(2, 1, 0), "1.2.3.4.6", 1
    )
    shared = Dataset()
    shared.PixelMeasuresSequence = item(PixelSpacing=numbers((down, across)), SliceThickness="1")
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=numbers(cosines))
    each = []
    for k in frames:
        own = Dataset()
        own.PlanePositionSequence = item(
            ImagePositionPatient=numbers(matrix[:3, 3] + k * matrix[:3, 2])
        )
        if rescale is not None and np.ndim(rescale) == 2:
            slope, intercept = numbers(rescale[k])
            own.PixelValueTransformationSequence = item(
                RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="US"
            )
        each.append(own)
    if rescale is not None and np.ndim(rescale) == 1:
        slope, intercept = numbers(rescale)
        shared.PixelValueTransformationSequence = item(
            RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="US"
        )
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = Sequence(each)
    if change is not None:
        change(dataset)
    dataset.save_as(path, enforce_file_format=True)
    return path
