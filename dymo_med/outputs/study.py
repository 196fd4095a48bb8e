"""What every output of a prediction needs to know: whose it is, when it was made, where it belongs.

All of it comes from the prediction's folder and, where the inputs were DICOM and the patient
directory is at hand, from the headers of those very files: the new objects go into the patient's
own study and refer to the images that were looked at. Everything is the same each time: identifiers
of new objects are hashes of what they hold, and the time is that of the prediction.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta, timezone
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian
from pydicom.valuerep import DA, TM, DSfloat, validate_value

from dymo_med import __version__
from dymo_med.errors import ConfigError, PatientDataError, Problem
from dymo_med.files import write_bytes
from dymo_med.inference.prediction_file import (
    PredictionFile,
    SourcePart,
    content_sha256,
    read_prediction,
)
from dymo_med.inference.segmentation_file import (
    SegmentationFile,
    is_segmentation,
    read_segmentation,
)
from dymo_med.modalities import dicom
from dymo_med.modalities.image import files_sha256
from dymo_med.modalities.scan import ScanError
from dymo_med.privacy import pseudonym, shown

NAME = "dymo-med"
_IDENTIFIED, _PSEUDONYM = "patient ", "pseudonym "
# The patient's and the study's own attributes (PS3.3 C.7.1.1, C.7.2.1), which are not shown
# unless asked for; what is none of these stays in the source.
_PATIENT = ("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex")
_STUDY = (
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
    "TimezoneOffsetFromUTC",
)
# What an object that refers to an image needs of its header.
_IMAGE = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality"),
    *("FrameOfReferenceUID", "PositionReferenceIndicator", "ImageType", "Rows", "Columns"),
    *("NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
    *("SliceThickness", "SpacingBetweenSlices", "InstanceNumber"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("BitsAllocated", "BitsStored", "PixelRepresentation", "SamplesPerPixel"),
    "PhotometricInterpretation",
)
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
# Of functional groups only the geometry: others hold times and texts of the examination.
_GROUPS = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")


@dataclass(frozen=True)
class Source:
    """The DICOM images of one modality.

    Attributes:
        images: One header per file, in the order of its slices, with whose they are as it may be
            shown, and without pixels.
        frames: Per slice, in order: its file's place in `images`, and its frame there.
        affine: `(4, 4)` voxel to world in mm, RAS+, of the volume as stored.
        size: Voxels per axis.
    """

    images: tuple[Dataset, ...]
    frames: tuple[tuple[int, int], ...]
    affine: np.ndarray
    size: tuple[int, int, int]


@dataclass(frozen=True)
class Study:
    """One prediction and the study that its outputs belong to.

    Attributes:
        folder: The prediction's folder.
        file: What `prediction.json` says, as it may be shown.
        identified: Whether the patient's own identifiers are shown.
        patient: Attributes of patient and study, by DICOM keyword.
        uid: StudyInstanceUID.
        sources: DICOM images by modality; empty where the inputs were none.
        made: When the prediction was made.
        files: Files that the modalities of the model are looked for in, by modality; known where
            the bundle is.
        patient_dir: The patient directory, if it is at hand.
    """

    folder: Path
    file: PredictionFile | SegmentationFile
    identified: bool
    patient: Mapping[str, str]
    uid: str
    sources: Mapping[str, Source]
    made: datetime
    files: Mapping[str, str] = field(default_factory=dict)
    patient_dir: Path | None = None

    @cached_property
    def key(self) -> str:
        """What the identity of new objects rests on."""
        said = self.file.to_text(), __version__, self.identified, self.uid, self.made.isoformat()
        return "\n".join(map(str, said))

    def new_uid(self, role: str) -> UID:
        """Return the UID of a new object: the same for the same prediction (PS3.5 B.2)."""
        return UID(f"2.25.{self.new_uuid(role).int}")

    def new_uuid(self, role: str) -> uuid.UUID:
        """Return the UUID of a new object: the same for the same prediction (RFC 9562, 5.5)."""
        return uuid.uuid5(uuid.NAMESPACE_OID, f"{self.key}\n{role}")

    @property
    def frame_of_reference(self) -> str:
        """The frame of reference that recovered volumes lie in: that of the first source."""
        for source in self.sources.values():
            stated = source.images[0].get("FrameOfReferenceUID")
            if stated:
                return str(stated)
        return str(self.new_uid("frame of reference"))

    @property
    def bundle(self) -> str:
        """Name and version of the model."""
        if isinstance(self.file, SegmentationFile):
            return f"{self.file.bundle.name} {self.file.bundle.version}"
        return f"{self.file.bundle_name} {self.file.bundle_version}"

    @property
    def bundle_id(self) -> str:
        """Hash that identifies the model."""
        if isinstance(self.file, SegmentationFile):
            return self.file.bundle.id
        return self.file.bundle_id

    @property
    def synthetic(self) -> bool:
        """Whether something was made up."""
        return bool(self.file.recovered)

    @property
    def pseudonymous(self) -> bool:
        """Whether a pseudonym stands for an identifier that headers state."""
        return self.patient["PatientName"].startswith("Pseudonym^")

    @property
    def patient_id(self) -> str:
        """What stands for the patient."""
        return self.patient["PatientID"]


def read_study(
    folder: Path,
    patient_dir: Path | None = None,
    *,
    identify: bool = False,
    files: Mapping[str, str] | None = None,
) -> Study:
    """Read a prediction and, if it is at hand, where it came from.

    Args:
        folder: Folder of a prediction or a segmentation.
        patient_dir: The patient directory it was made from; without it nothing refers to images.
        identify: Show the patient's own identifiers, names and dates instead of a pseudonym.
        files: File of each modality of the model, if the bundle is at hand.

    Raises:
        PatientDataError: If there is no prediction, or the directory does not hold the files that
            it was made from.
        ConfigError: If identifiers are asked for that are nowhere to be found.
    """
    path = folder / "prediction.json"
    file = read_segmentation(path) if is_segmentation(path) else read_prediction(path)
    _require_whole(folder, file)
    headers = {} if patient_dir is None else _headers(file.sources, patient_dir)
    patient, owner = _patient(file, headers, identify)
    made = datetime.fromtimestamp(int(path.stat().st_mtime), UTC).astimezone(_zone(headers))
    sources = {
        name: Source(tuple(_clean(h, patient, affine) for h in images), frames, affine, size)
        for name, (images, frames, affine, size) in headers.items()
        # Nothing can refer to an image without a name.
        if all(image.get(keyword) for image in images for keyword in _NEEDED)
    }
    study = Study(
        folder=folder,
        file=_as_shown(file, owner, identify),
        identified=identify,
        patient=patient,
        uid="",
        sources=sources,
        made=made,
        files=dict(files or {}),
        patient_dir=patient_dir,
    )
    first = next(iter(sources.values()), None)
    uid = str(first.images[0].StudyInstanceUID) if first is not None else study.new_uid("study")
    return replace(study, uid=uid)


def _require_whole(folder: Path, file: PredictionFile | SegmentationFile) -> None:
    """Refuse a prediction that is not as it was written: others will act on what goes out.

    Raises:
        PatientDataError: If it was edited, or a file that belongs to it is another or gone.
    """
    listed = [(p.file, p.sha256) for p in file.recovered_files.values()]
    if isinstance(file, SegmentationFile):
        listed += [(p.file, p.sha256) for p in file.files.values()]
    wrong = [
        name
        for name, stated in listed
        if ".." in Path(name).parts
        or not (folder / name).is_file()
        or sha256((folder / name).read_bytes()).hexdigest() != stated
    ]
    if isinstance(file, PredictionFile) and content_sha256(file) != file.content_sha256:
        wrong.insert(0, "prediction.json")
    if wrong:
        raise PatientDataError(
            *(
                Problem(
                    str(folder / name),
                    "it is not as it was when it was written",
                    expected="the prediction as `dymo-med predict` wrote it",
                    remedy="Put the original back, or predict again",
                )
                for name in wrong
            )
        )


_Found = tuple[list[Dataset], tuple[tuple[int, int], ...], np.ndarray, tuple[int, int, int]]


def _headers(sources: Mapping[str, SourcePart], patient_dir: Path) -> dict[str, _Found]:
    """Return the headers of each modality that came as DICOM.

    Raises:
        PatientDataError: If the files are not there, or are others than the prediction's.
    """
    found: dict[str, _Found] = {}
    problems = []
    for name, source in sources.items():
        path = patient_dir / source.file
        try:
            stacks = dicom.stacks(path) if path.exists() and dicom.is_dicom(path) else []
        except (ScanError, OSError):
            stacks = []
        else:
            if path.exists() and not dicom.is_dicom(path):
                continue
        same = [
            (stack, affine)
            for stack, affine in stacks
            if files_sha256(tuple(dict.fromkeys(f.file for f in stack))) == source.sha256
        ]
        if not same:
            problems.append(
                Problem(
                    f"{patient_dir}: {source.file}",
                    f"these are not the files that {name} was read from",
                    expected="the patient directory of this prediction, unchanged",
                    got="other files" if path.exists() else "nothing there",
                    remedy="Name the right --patient-dir, or leave it out: then nothing refers to"
                    " images",
                )
            )
            continue
        stack, affine = same[0]
        files = list(dict.fromkeys(frame.file for frame in stack))
        headers = [pydicom.dcmread(f, stop_before_pixels=True, force=True) for f in files]
        first = stack[0]
        found[name] = (
            headers,
            tuple((files.index(frame.file), frame.index) for frame in stack),
            affine,
            (first.columns, first.rows, len(stack)),
        )
    if problems:
        raise PatientDataError(*problems)
    return found


def _patient(
    file: PredictionFile | SegmentationFile, headers: Mapping[str, _Found], identify: bool
) -> tuple[dict[str, str], str]:
    """Return attributes of patient and study as they may be shown, and the identifier itself.

    The identifier is empty where it is not known.
    """
    header = next((found[0][0] for found in headers.values()), None)
    stated = "" if header is None else str(header.get("PatientID") or "").strip()
    facts = [str(s.facts.get("patient", "")) for s in file.sources.values()]
    named = [f.removeprefix(_IDENTIFIED) for f in facts if f.startswith(_IDENTIFIED)]
    alias = [f.removeprefix(_PSEUDONYM) for f in facts if f.startswith(_PSEUDONYM)]
    owner = stated or next(iter(named), "")
    blank = dict.fromkeys((*_PATIENT, *_STUDY), "")
    if not identify:
        # A folder's name is not taken for an identifier: every page shows it.
        name = pseudonym(owner) if owner else next(iter(alias), file.patient_id)
        blank.pop("TimezoneOffsetFromUTC")
        return {**blank, **_named("Pseudonym" if owner or alias else "Record", name)}, owner
    if not owner and alias:
        raise ConfigError(
            Problem(
                "--identify",
                "the prediction holds a pseudonym, and the patient's identifier is nowhere else",
                expected="the patient directory, or a prediction made with --identify",
                remedy="Add --patient-dir, or predict again with --identify",
            )
        )
    if header is None:
        return {**blank, **_named("Record", owner or file.patient_id)}, owner
    known = {k: _valid(k, str(header.get(k) or "")) for k in (*_PATIENT, *_STUDY)}
    known["PatientID"] = known["PatientID"] or file.patient_id[:64]
    return known, owner


def _valid(keyword: str, value: str) -> str:
    """Return what a header states, or nothing where the standard forbids it.

    An identifier stays as it is: cut, it would be somebody else's.
    """
    if keyword == "PatientID":
        return value.strip()
    kind = dictionary_VR(keyword)
    try:
        validate_value(kind, value, pydicom.config.RAISE)
        if kind in ("DA", "TM"):
            (DA if kind == "DA" else TM)(value)
    except (ValueError, OverflowError):
        return ""
    return "" if keyword == "PatientSex" and value not in ("F", "M", "O") else value


def _named(family: str, name: str) -> dict[str, str]:
    """Return a name and an identifier; a name of one part alone is a form that is retired."""
    plain = "".join(" " if c in "\\^=" else c for c in name)[:64].strip()
    return {"PatientName": f"{family}^{plain[:40]}", "PatientID": plain}


def _zone(headers: Mapping[str, _Found]) -> timezone | None:
    """Return the time zone of the study, where it says; None = that of this computer."""
    for found in headers.values():
        text = str(found[0][0].get("TimezoneOffsetFromUTC") or "").strip()
        if len(text) == 5 and text[0] in "+-" and text[1:].isdigit():
            minutes = 60 * int(text[1:3]) + int(text[3:])
            if minutes <= 14 * 60:
                return timezone(timedelta(minutes=-minutes if text[0] == "-" else minutes))
    return None


def _clean(header: Dataset, patient: Mapping[str, str], affine: np.ndarray) -> Dataset:
    """Return what others need of an image's header, with the patient as shown."""
    clean = Dataset()
    for keyword in _IMAGE:
        if keyword in header:
            clean[keyword] = header[keyword]
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        if keyword in header:
            items = []
            for group in header[keyword].value:
                item = Dataset()
                for kept in _GROUPS:
                    if kept in group:
                        item[kept] = group[kept]
                items.append(item)
            setattr(clean, keyword, pydicom.Sequence(items))
    if "NumberOfFrames" not in clean and not clean.get("SliceThickness"):
        # It need not be stated; highdicom asks for it.
        step = float(np.linalg.norm(affine[:3, 2]))
        clean.SliceThickness = DSfloat(step, auto_format=True)
    clean.file_meta = getattr(header, "file_meta", None)
    clean.StudyInstanceUID = header.StudyInstanceUID
    put_patient(clean, patient)
    return clean


def describe(dataset: Dataset, study: Study, *, synthetic: bool) -> None:
    """Write what every object says of itself: whose, when and by what it was made, of what kind.

    Args:
        dataset: The object, otherwise complete.
        study: Where it belongs.
        synthetic: Whether something in it was made up.
    """
    put_patient(dataset, study.patient)
    date, time = study.made.strftime("%Y%m%d"), study.made.strftime("%H%M%S")
    zone = study.made.strftime("%z")
    for keyword in ("ContentDate", "InstanceCreationDate", "SeriesDate"):
        setattr(dataset, keyword, date)
    for keyword in ("ContentTime", "InstanceCreationTime", "SeriesTime"):
        setattr(dataset, keyword, time)
    dataset.TimezoneOffsetFromUTC = zone
    dataset.Manufacturer = dataset.ManufacturerModelName = NAME
    dataset.SoftwareVersions = [__version__, f"{study.bundle}"[:64]]
    dataset.DeviceSerialNumber = study.bundle_id[:16]
    dataset.SyntheticData = "YES" if synthetic else "NO"
    dataset.ContentQualification = "RESEARCH"
    if not study.identified and study.pseudonymous:
        dataset.PatientIdentityRemoved = "YES"
        dataset.DeidentificationMethod = "Pseudonym; identifiers of study, series and images kept"
    dataset.ContributingEquipmentSequence = pydicom.Sequence(
        [_equipment(study, dataset.get("ConversionType") == "SYN" and "Rows" in dataset)]
    )


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """Return an item of a sequence of codes (PS3.3 table 8.8-1)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _equipment(study: Study, synthetic_image: bool) -> Dataset:
    """Return what made the object (PS3.3 C.12.1.1.5, CID 7005)."""
    purpose = (
        code("109100", "DCM", "Synthesizing Equipment")
        if synthetic_image
        else code("109102", "DCM", "Processing Equipment")
    )
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = pydicom.Sequence([purpose])
    item.Manufacturer = item.ManufacturerModelName = NAME
    item.SoftwareVersions = __version__
    item.ContributionDateTime = study.made.strftime("%Y%m%d%H%M%S")
    item.ContributionDescription = f"Bundle {study.bundle}, {study.bundle_id}"[:1024]
    return item


def new_object(
    study: Study, sop_class: str, role: str, *, modality: str, series: int, description: str
) -> Dataset:
    """Return the beginning of a DICOM object in a series of its own.

    Args:
        study: Where it belongs.
        sop_class: Its SOP class UID.
        role: What it is: two objects of one prediction have two roles.
        modality: Of its series.
        series: Number of its series.
        description: Of its series, 64 characters at most.
    """
    dataset = Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UID(sop_class)
    instance = study.new_uid(role)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = instance
    dataset.StudyInstanceUID = study.uid
    dataset.SeriesInstanceUID = study.new_uid(f"series of {role}")
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = modality, series, 1
    dataset.SeriesDescription = description[:64]
    return dataset


def save(dataset: Dataset, path: Path) -> Path:
    """Write a DICOM file; it appears whole or not at all.

    Args:
        dataset: The object.
        path: Where to.
    """
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return write_bytes(path, stream.getvalue())


def put_patient(dataset: Dataset, patient: Mapping[str, str]) -> None:
    """Write whose an object is, and which study it is part of, as it may be shown.

    Args:
        dataset: The object.
        patient: Attributes by keyword.
    """
    dataset.SpecificCharacterSet = "ISO_IR 192"
    for keyword, value in patient.items():
        if not value and keyword in ("IssuerOfPatientID", "TimezoneOffsetFromUTC"):
            continue
        setattr(dataset, keyword, value)


def _as_shown(
    file: PredictionFile | SegmentationFile, owner: str, identify: bool
) -> PredictionFile | SegmentationFile:
    """Return the prediction with the patient's identifier in its sources shown, or not, as asked.

    What was predicted with `--identify` is not given away by an output without it.
    """
    sources: dict[str, Any] = {}
    for name, source in file.sources.items():
        said = source.facts.get("patient", "")
        facts = dict(source.facts)
        if said.startswith(_IDENTIFIED) and not identify:
            facts["patient"] = shown(said.removeprefix(_IDENTIFIED), identify=False)
        elif said.startswith(_PSEUDONYM) and identify and owner:
            facts["patient"] = shown(owner, identify=True)
        sources[name] = {**source.model_dump(mode="json"), "facts": facts}
    if all(sources[n]["facts"] == dict(s.facts) for n, s in file.sources.items()):
        return file
    if isinstance(file, PredictionFile):
        content = file.to_dict()
        del content["content_sha256"]
        return PredictionFile.make({**content, "sources": sources})
    content = {**file.model_dump(mode="json"), "sources": sources}
    return SegmentationFile.model_validate_json(json.dumps(content))
