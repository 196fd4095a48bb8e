"""DICOM: outlined regions as Segmentations, voxel for voxel on the source series (PS3.3 A.51).

One region per file, every slice written: regions lie within one another, and that is the form in
which readers that know nothing of segments get size and spacing right.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from dymo_med import __version__
from dymo_med.errors import PatientDataError, Problem
from dymo_med.inference.segmentation_file import SegmentationFile
from dymo_med.modalities.made_up import SEGMENTED
from dymo_med.modalities.scan import apart_mm
from dymo_med.outputs.study import NAME, Source, Study, describe, save

SERIES = 9200
# How far corners of the outline's grid may lie from those of the source's.
_MOST_MM = 0.01


def write_seg(study: Study, folder: Path) -> list[Dataset]:
    """Write each region as `seg_NAME.dcm`.

    Args:
        study: A segmentation; nothing is written for another prediction, nor where the scan that
            was outlined is no DICOM series.
        folder: Existing folder.

    Returns:
        The objects.

    Raises:
        PatientDataError: If `segmentation.nii.gz` is not there or not on the grid that
            `prediction.json` states.
    """
    file = study.file
    if not isinstance(file, SegmentationFile):
        return []
    affine = np.asarray(file.grid.affine)
    source = next((s for s in study.sources.values() if _same(s, affine, file.grid.shape)), None)
    if source is None:
        return []
    labels = _labels(study, file)
    made = []
    for number, region in enumerate(file.regions):
        inside = np.isin(labels, region.labels)
        seg = _segmentation(study, source, inside, region.name, number)
        save(seg, folder / f"seg_{region.name}.dcm")
        made.append(seg)
    return made


def _labels(study: Study, file: SegmentationFile) -> np.ndarray:
    """Return the labels `(X, Y, Z)`.

    Raises:
        PatientDataError: See `write_seg`.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    path = study.folder / file.files["segmentation"].file
    got = ""
    try:
        image = nibabel.load(path)
        if image.shape == file.grid.shape:
            return np.asarray(image.dataobj)
        got = f"{image.shape}"
    except (OSError, EOFError, ValueError, ImageFileError) as error:
        got = type(error).__name__
    raise PatientDataError(
        Problem(
            str(path),
            "the outline is not the one that was predicted",
            expected="labels on the grid that prediction.json states",
            got=got,
            remedy="Predict again",
        )
    )


def _segmentation(
    study: Study, source: Source, inside: np.ndarray, name: str, number: int
) -> Dataset:
    """Return a region `(X, Y, Z)` as an object."""
    import highdicom
    from pydicom.sr.codedict import codes

    pixels = inside.transpose(2, 1, 0)
    if "NumberOfFrames" in source.images[0]:  # a multi-frame file: in the order of its frames
        pixels = pixels[np.argsort([frame for _, frame in source.frames])]
    who = highdicom.AlgorithmIdentificationSequence(
        NAME, family=codes.DCM.ArtificialIntelligence, version=__version__, source=NAME
    )
    part = highdicom.seg.SegmentDescription(
        1,
        name,
        codes.SCT.MorphologicallyAbnormalStructure,
        codes.SCT.Lesion,
        "AUTOMATIC",
        who,
        tracking_uid=study.new_uid(f"tracking region {name}"),
        tracking_id=name,
    )
    label = "".join(c if c.isalnum() and c.isascii() else "_" for c in name.upper())[:16]
    seg = highdicom.seg.Segmentation(
        list(source.images),
        pixels.astype(np.uint8),
        "BINARY",
        [part],
        study.new_uid(f"series of seg {name}"),
        SERIES + number,
        study.new_uid(f"seg {name}"),
        1,
        NAME,
        NAME,
        __version__,
        study.bundle_id[:16],
        content_label=label,
        content_description="Outlined by a model, not verified by a physician",
        series_description=f"{SEGMENTED}: {name}"[:64],
        omit_empty_frames=False,
    )
    # The outline is of measured scans; what it rests on may have been made up.
    describe(seg, study, synthetic=bool(study.file.trusted))
    return seg


def _same(source: Source, affine: np.ndarray, shape: tuple[int, int, int]) -> bool:
    """Return whether a series, all of it, has the grid of the outline."""
    frames = sum(int(image.get("NumberOfFrames") or 1) for image in source.images)
    if frames != len(source.frames):
        return False
    return source.size == tuple(shape) and apart_mm(source.affine, affine, shape) <= _MOST_MM
