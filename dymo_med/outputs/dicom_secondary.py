r"""DICOM: recovered images as secondary captures that nobody can take for acquired ones.

A Multi-frame Grayscale Word Secondary Capture (PS3.3 A.8.4) claims no scanner, no sequence and no
acquisition, and its conversion type has a value for this: SYN, synthetic image. It states its
geometry, so a viewer can lay it beside the patient's scans. SYNTHETIC is burnt into every slice,
the series description begins with it, and the image type is DERIVED\SECONDARY.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import UID
from pydicom.valuerep import DSfloat

from dymo_med.inference.pictures import mark
from dymo_med.modalities.made_up import SYNTHETIC
from dymo_med.outputs.dicom_pdf import reference
from dymo_med.outputs.states import State, states
from dymo_med.outputs.study import Study, code, describe, new_object, save

SERIES = 9300
GREY_WORDS = UID("1.2.840.10008.5.1.4.1.1.7.3")
COLOURS = UID("1.2.840.10008.5.1.4.1.1.7.4")
GREY_BYTES = UID("1.2.840.10008.5.1.4.1.1.7.2")
# Stored numbers of the darkest and the brightest voxel; the mark is brighter than either.
_MOST, _MARK = 3800, 4095
# Slices of fewer pixels are enlarged by a whole number, so that the mark can be read.
_LEAST_PIXELS = 96


def write_secondary(study: Study, folder: Path) -> list[Dataset]:
    """Write each recovered scan and picture as `recovered_NAME.dcm`.

    Args:
        study: The prediction.
        folder: Existing folder.

    Returns:
        The objects. Recovered tables and sequences are no images, and none of them.
    """
    made = []
    known = {state.name: state for state in states(study.file)}
    for number, name in enumerate(study.file.recovered_files):
        path = study.folder / study.file.recovered_files[name].file
        state = known[name]
        if path.name.endswith(".nii.gz"):
            dataset = _volume(study, state, path)
        elif path.suffix == ".png":
            dataset = _picture(study, state, path)
        else:
            continue
        dataset.SeriesNumber = SERIES + number
        save(dataset, folder / f"recovered_{name}.dcm")
        made.append(dataset)
    return made


def _volume(study: Study, state: State, path: Path) -> Dataset:
    """Return a recovered volume, axial slices from feet to head as radiologists look at them."""
    import nibabel

    image = nibabel.load(path)
    ornt = nibabel.orientations.io_orientation(image.affine)
    turn = nibabel.orientations.ornt_transform(
        ornt, nibabel.orientations.axcodes2ornt(("L", "P", "S"))
    )
    values = nibabel.orientations.apply_orientation(np.asarray(image.dataobj, np.float64), turn)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ (
        image.affine @ nibabel.orientations.inv_ornt_aff(turn, image.shape)
    )
    frames = values.transpose(2, 1, 0)  # (slices, rows, columns)
    low, high = float(frames.min()), float(frames.max())
    grey = np.round((frames - low) / (high - low or 1.0) * _MOST).astype(np.uint16)
    factor = max(1, math.ceil(_LEAST_PIXELS / min(grey.shape[1:])))
    grey = grey.repeat(factor, axis=1).repeat(factor, axis=2)
    layer = mark(*grey.shape[1:])
    inked = layer[..., 3] > 127
    grey[:, inked] = np.where(layer[inked][:, 0] > 127, _MARK, 0)
    dataset = _begun(study, state, GREY_WORDS, grey[..., None], path)
    dataset.FrameOfReferenceUID = study.frame_of_reference
    dataset.PositionReferenceIndicator = ""
    _lay(dataset, lps, factor)
    return dataset


def _picture(study: Study, state: State, path: Path) -> Dataset:
    """Return a recovered picture, which is marked already."""
    from PIL import Image

    with Image.open(path) as picture:
        pixels = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    sop_class = COLOURS if pixels.shape[2] == 3 else GREY_BYTES
    dataset = _begun(study, state, sop_class, pixels[None], path)
    groups = [Dataset()], [Dataset()]
    dataset.SharedFunctionalGroupsSequence = pydicom.Sequence(groups[0])
    dataset.PerFrameFunctionalGroupsSequence = pydicom.Sequence(groups[1])
    return dataset


def _begun(study: Study, state: State, sop_class: UID, pixels: np.ndarray, path: Path) -> Dataset:
    """Return an image with its pixels `(frames, rows, columns, samples)` and what it is."""
    dataset = new_object(
        study,
        sop_class,
        f"recovered {state.name}",
        modality="OT",
        series=SERIES,
        description=f"SYNTHETIC {state.name}: not acquired",
    )
    used = "used by the model" if state.synthetic_used else "not used by the model"
    dataset.ImageType = ["DERIVED", "SECONDARY", "OTHER", "SYNTHETIC"]
    dataset.DerivationDescription = (
        f"{SYNTHETIC}. No scanner made it: it was computed from the patient's other data, and is"
        f" {used}. {state.meaning}."
    )
    images = _sources(study)
    if images:
        dataset.SourceImageSequence = pydicom.Sequence([_source(image) for image in images])
    dataset.ConversionType = "SYN"
    dataset.BurnedInAnnotation = "YES"
    dataset.RecognizableVisualFeatures = "NO"
    dataset.LossyImageCompression = "00"
    dataset.PatientOrientation = dataset.Laterality = ""
    dataset.ImageComments = "SYNTHETIC: not for diagnosis"
    if len(pixels) > 1:
        dataset.FrameIncrementPointer = Tag("PerFrameFunctionalGroupsSequence")
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = pixels.shape[:3]
    dataset.SamplesPerPixel = pixels.shape[3]
    colours = pixels.shape[3] == 3
    dataset.PhotometricInterpretation = "RGB" if colours else "MONOCHROME2"
    if colours:
        dataset.PlanarConfiguration = 0
    else:
        dataset.PresentationLUTShape = "IDENTITY"
        dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", "1", "US"
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored = 8 if pixels.dtype.itemsize == 1 else 12
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, 0
    if not colours:
        top = 255 if dataset.BitsStored == 8 else _MARK
        dataset.WindowCenter, dataset.WindowWidth = str((top + 1) // 2), str(top + 1)
    raw = np.ascontiguousarray(pixels).tobytes()
    dataset.PixelData = raw + b"\0" * (len(raw) % 2)
    describe(dataset, study, synthetic=True)
    return dataset


def _lay(dataset: Dataset, lps: np.ndarray, factor: int) -> None:
    """Write where slices lie (PS3.3 C.7.6.16).

    Args:
        dataset: The image.
        lps: `(4, 4)` voxel to world in mm, LPS, before slices were enlarged.
        factor: By how much they were, in both directions.
    """
    step = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = lps[:3, :2] / step[:2]
    first = lps[:3, 3] - lps[:3, :2].sum(1) * (factor - 1) / (2 * factor)
    measures, orientation, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = _numbers((step[1] / factor, step[0] / factor))
    measures.SliceThickness = measures.SpacingBetweenSlices = _numbers(step[2:])[0]
    orientation.ImageOrientationPatient = _numbers([*cosines[:, 0], *cosines[:, 1]])
    shared.PixelMeasuresSequence = pydicom.Sequence([measures])
    shared.PlaneOrientationSequence = pydicom.Sequence([orientation])
    each = []
    for k in range(dataset.NumberOfFrames):
        position, own = Dataset(), Dataset()
        position.ImagePositionPatient = _numbers(first + k * lps[:3, 2])
        own.PlanePositionSequence = pydicom.Sequence([position])
        each.append(own)
    dataset.SharedFunctionalGroupsSequence = pydicom.Sequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = pydicom.Sequence(each)


def _sources(study: Study) -> list[Dataset]:
    """Return the images that recoveries were computed from: those that were measured."""
    return [image for source in study.sources.values() for image in source.images]


def _source(image: Dataset) -> Dataset:
    item = reference(image)
    purpose = code("121322", "DCM", "Source image for image processing operation")
    item.PurposeOfReferenceCodeSequence = pydicom.Sequence([purpose])
    return item


def _numbers(values: Sequence[float] | np.ndarray) -> list[DSfloat]:
    """Return numbers as DICOM writes them: 16 characters at most."""
    return [DSfloat(float(value) + 0.0, auto_format=True) for value in values]
