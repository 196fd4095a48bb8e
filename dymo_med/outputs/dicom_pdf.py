"""DICOM: the page of a prediction as an Encapsulated PDF (PS3.3 A.45.1)."""

from __future__ import annotations

from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import EncapsulatedPDFStorage

from dymo_med.inference.pdf import render_pdf
from dymo_med.inference.prediction_file import PredictionFile
from dymo_med.outputs.study import Study, code, describe, new_object, save

SERIES = 9100


def write_pdf_object(study: Study, folder: Path) -> Dataset | None:
    """Write the page as `report.dcm`.

    Args:
        study: The prediction; a segmentation has no page on paper.
        folder: Existing folder.

    Returns:
        The object; nothing for a segmentation.
    """
    if not isinstance(study.file, PredictionFile):
        return None
    content = render_pdf(study.file)
    dataset = new_object(
        study,
        EncapsulatedPDFStorage,
        "report",
        modality="DOC",
        series=SERIES,
        description="AI report, research use only",
    )
    describe(dataset, study, synthetic=study.synthetic)
    dataset.ConversionType = "SYN"
    dataset.BurnedInAnnotation = "YES"
    dataset.AcquisitionDateTime = ""
    dataset.DocumentTitle = f"AI report: {study.file.target}"[:1024]
    name = code("18748-4", "LN", "Diagnostic imaging study")
    dataset.ConceptNameCodeSequence = pydicom.Sequence([name])
    images = [image for source in study.sources.values() for image in source.images]
    if images:
        dataset.SourceInstanceSequence = pydicom.Sequence([reference(image) for image in images])
    dataset.MIMETypeOfEncapsulatedDocument = "application/pdf"
    dataset.EncapsulatedDocumentLength = len(content)
    dataset.EncapsulatedDocument = content + b"\0" * (len(content) % 2)
    save(dataset, folder / "report.dcm")
    return dataset


def reference(image: Dataset) -> Dataset:
    """Return a reference to an image (PS3.3 table 10-11)."""
    item = Dataset()
    item.ReferencedSOPClassUID = image.SOPClassUID
    item.ReferencedSOPInstanceUID = image.SOPInstanceUID
    return item
