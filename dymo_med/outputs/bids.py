"""BIDS: recovered scans and outlines of patients of a BIDS dataset, as a derivative dataset.

Brain Imaging Data Structure 1.10, derivatives (bids-specification.readthedocs.io).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from dymo_med import __version__
from dymo_med.errors import ConfigError, Problem
from dymo_med.files import csv_text, write_json, write_text
from dymo_med.inference.segmentation_file import SegmentationFile
from dymo_med.outputs.states import State, states
from dymo_med.outputs.study import NAME, Study

DESCRIPTION = "dataset_description.json"
_VERSION = "1.10.0"
_RECORD = re.compile(r"(sub-[A-Za-z0-9]+)(?:_(ses-[A-Za-z0-9]+))?")
_SCAN = re.compile(r"([a-z]+)/(?:[^/]*_)?([A-Za-z0-9]+)\.nii(?:\.gz)?")
_ENTITY = re.compile(r"_((?:task|acq|ce|trc|rec|dir|run|mod|echo|inv|part)-[A-Za-z0-9]+)(?=_)")
# What modalities are usually called, where neither the bundle nor the file says.
_USUAL = {
    "t1": ("anat", "", "T1w"),
    "t1w": ("anat", "", "T1w"),
    "t1ce": ("anat", "_ce-gadolinium", "T1w"),
    "t1c": ("anat", "_ce-gadolinium", "T1w"),
    "t2": ("anat", "", "T2w"),
    "t2w": ("anat", "", "T2w"),
    "flair": ("anat", "", "FLAIR"),
    "pd": ("anat", "", "PDw"),
}
_README = """# Synthetic scans and outlines

Made by {name} {version}, bundle {bundle}. **Scans named `desc-synthetic` were not acquired.** They
were computed from what was measured of the same person, and show what the model guessed, in
normalised intensities. `Sources` in the file beside each says from what. Reports are in `reports/`.
For research use; no physician has verified them.
"""


def write_bids(study: Study, folder: Path) -> list[str]:
    """Write a derivative dataset of one subject or session.

    Args:
        study: The prediction, of a patient of a BIDS dataset.
        folder: Existing folder.

    Returns:
        What a user must know of it.

    Raises:
        ConfigError: If the patient was not one of a BIDS dataset.
    """
    file = study.file
    record = _RECORD.fullmatch(file.record_id)
    if record is None:
        raise ConfigError(
            Problem(
                "--bids",
                "the patient is not one of a BIDS dataset",
                expected="a folder sub-LABEL or sub-LABEL/ses-LABEL below dataset_description.json",
                remedy="Leave --bids out, or use --dicom or --fhir",
            )
        )
    place = PurePosixPath(*(part for part in record.groups() if part))
    _write_dataset(study, folder)
    sources = [
        f"bids:raw:{place / source.file}"
        for source in file.sources.values()
        if _SCAN.search(source.file)
    ]
    notes = []
    for state in states(file):
        if state.name not in file.recovered_files:
            continue
        path = study.folder / file.recovered_files[state.name].file
        if not path.name.endswith(".nii.gz"):
            continue
        name = _name(study, state)
        if name is None:
            notes.append(
                f"bids: {state.name} was left out, because its suffix is not known;"
                " name the --bundle"
            )
            continue
        datatype, entities, suffix = name
        stem = f"{file.record_id}{entities}_desc-synthetic_{suffix}"
        there = folder / place / datatype
        there.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, there / f"{stem}.nii.gz")
        write_json(
            there / f"{stem}.json",
            {
                "Description": f"SYNTHETIC {state.name}: not acquired, recovered by {NAME}"
                " from what was measured",
                "Sources": sources,
                "SpatialReference": "orig",
                "SkullStripped": _stripped(study),
                "SyntheticData": True,
                "UsedByModel": state.synthetic_used,
                "GeneratedBy": NAME,
                "Seed": file.seed,
            },
        )
    if isinstance(file, SegmentationFile):
        _write_outline(study, file, folder / place, sources)
    reports = folder / "reports"
    reports.mkdir()
    for name_, target in (("report.html", ".html"), ("prediction.json", ".json")):
        if target == ".html" and (study.folder / name_).is_file():
            shutil.copyfile(study.folder / name_, reports / f"{file.record_id}{target}")
    write_text(reports / f"{file.record_id}.json", file.to_text())
    return notes


def _write_dataset(study: Study, folder: Path) -> None:
    """Write what every dataset has at its top."""
    write_json(
        folder / DESCRIPTION,
        {
            "Name": f"{NAME}: synthetic scans and outlines",
            "BIDSVersion": _VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [
                {"Name": NAME, "Version": __version__, "Description": f"bundle {study.bundle}"}
            ],
            "DatasetLinks": {"raw": "../.."},
        },
    )
    text = _README.format(name=NAME, version=__version__, bundle=study.bundle)
    write_text(folder / "README.md", text)
    write_text(folder / ".bidsignore", "reports\n")


def _write_outline(study: Study, file: SegmentationFile, place: Path, sources: list[str]) -> None:
    """Write the outline as a discrete segmentation, and what its labels mean."""
    there = place / "anat"
    there.mkdir(parents=True, exist_ok=True)
    stem = f"{file.record_id}_space-orig_desc-dymo_dseg"
    shutil.copyfile(study.folder / file.files["segmentation"].file, there / f"{stem}.nii.gz")
    write_json(
        there / f"{stem}.json",
        {
            "Description": f"Outlined by {NAME}; no physician has verified it",
            "Sources": sources,
            "SpatialReference": {"orig": sources[0]} if sources else "orig",
            "Manual": False,
            "SyntheticSources": list(file.trusted),
        },
    )
    # A voxel has the label of the innermost region: the one with the fewest labels.
    names: dict[int, str] = {}
    for region in sorted(file.regions, key=lambda region: -len(region.labels)):
        names |= dict.fromkeys(region.labels, region.name)
    rows = [{"index": index, "name": names[index]} for index in sorted(names)]
    write_text(there / f"{stem}.tsv", csv_text(("index", "name"), rows).replace(",", "\t"))


def _name(study: Study, state: State) -> tuple[str, str, str] | None:
    """Return datatype, entities and suffix of a modality, as the bundle names its file."""
    pattern = study.files.get(state.name, "")
    found = _SCAN.fullmatch(pattern)
    if found is None:
        return _USUAL.get(state.name.lower())
    entities = "".join(f"_{entity}" for entity in _ENTITY.findall(pattern))
    return found[1], entities, found[2]


def _stripped(study: Study) -> bool:
    """Return whether scans are without skull, as the sidecars of the sources say; else False."""
    if study.patient_dir is None:
        return False
    for source in study.file.sources.values():
        sidecar = study.patient_dir / source.file
        sidecar = sidecar.with_name(sidecar.name.split(".")[0] + ".json")
        try:
            said: Any = json.loads(sidecar.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(said, dict) and said.get("SkullStripped") is True:
            return True
    return False
