"""DICOM: all objects of one prediction, in the patient's own study."""

from __future__ import annotations

from pathlib import Path

from dymo_med.inference.segmentation_file import SegmentationFile
from dymo_med.outputs.dicom_pdf import write_pdf_object
from dymo_med.outputs.dicom_secondary import write_secondary
from dymo_med.outputs.dicom_seg import write_seg
from dymo_med.outputs.dicom_sr import write_sr
from dymo_med.outputs.study import Study


def write_dicom(study: Study, folder: Path) -> list[str]:
    """Write the structured report, the page, recovered images and outlines.

    Args:
        study: The prediction.
        folder: Existing folder.

    Returns:
        What a user must know of them.
    """
    notes = []
    page = write_pdf_object(study, folder)
    outlines = write_seg(study, folder)
    evidence = [*([] if page is None else [page]), *outlines, *write_secondary(study, folder)]
    if evidence or study.sources:
        write_sr(study, folder, evidence)
    else:
        notes.append(
            "dicom: there is no structured report, because nothing that it rests on is DICOM"
        )
    if isinstance(study.file, SegmentationFile) and not outlines:
        notes.append(
            "dicom: there is no segmentation object, because the scan that was outlined is no"
            " DICOM series, or --patient-dir was left out"
        )
    if not study.sources:
        notes.append("dicom: nothing refers to images of the patient, and the study is a new one")
    return notes
