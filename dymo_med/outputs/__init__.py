"""What systems of a hospital or an archive read: DICOM, FHIR and BIDS, made from a prediction.

Everything is made from the prediction's folder, so it can be made when the prediction is or any
time after. A new standard is one module and one line of `OUTPUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from dymo_med.files import check_replaceable, complete_folder
from dymo_med.outputs.bids import DESCRIPTION, write_bids
from dymo_med.outputs.dicom import write_dicom
from dymo_med.outputs.fhir import FILE, write_fhir
from dymo_med.outputs.study import Study, read_study


@dataclass(frozen=True)
class Output:
    """One standard.

    Attributes:
        name: Folder that its files are in, and the option that asks for it.
        marker: File that always is among them.
        write: Writes them into a folder and returns what a user must know of them.
        says: What is in it, for help.
    """

    name: str
    marker: str
    write: Callable[[Study, Path], list[str]]
    says: str


OUTPUTS = {
    o.name: o
    for o in (
        Output("dicom", "sr.dcm", write_dicom, "a structured report, its page, images, outlines"),
        Output("bids", DESCRIPTION, write_bids, "recovered scans and outlines, as derivatives"),
        Output("fhir", FILE, write_fhir, "a Bundle of R4: report, risk, device, provenance"),
    )
}


def export(
    folder: Path,
    names: Collection[str],
    patient_dir: Path | None = None,
    *,
    out: Path | None = None,
    identify: bool = False,
    files: Mapping[str, str] | None = None,
) -> tuple[list[Path], list[str]]:
    """Write a prediction in other standards.

    Args:
        folder: Folder of a prediction or a segmentation.
        names: Keys of `OUTPUTS`.
        patient_dir: The patient directory it was made from, for references to DICOM images.
        out: Folder for one folder per standard; each appears complete or not at all. None = the
            prediction's own.
        identify: Show the patient's own identifiers, names and dates instead of a pseudonym.
        files: File of each modality of the model, if the bundle is at hand.

    Returns:
        The folders that were written, and sentences about them.

    Raises:
        PatientDataError: If there is no prediction, or the directory does not hold the files that
            it was made from.
        ConfigError: If a folder holds something else, or identifiers are asked for that are
            nowhere to be found.
    """
    study = read_study(folder, patient_dir, identify=identify, files=files)
    asked = [output for output in OUTPUTS.values() if output.name in names]
    places = {output.name: (out or folder) / output.name for output in asked}
    for output in asked:
        check_replaceable(places[output.name], output.marker, _written(places[output.name]))
    notes: list[str] = []
    for output in asked:
        place = places[output.name]
        with complete_folder(place, output.marker, _written(place)) as made:
            notes += output.write(study, made)
    return list(places.values()), notes


def _written(place: Path) -> Collection[str]:
    """Return what may be replaced in a folder that holds an earlier output: all of it."""
    return [p.name for p in place.iterdir()] if place.is_dir() else ()
