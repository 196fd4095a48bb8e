"""FHIR R4: the answer as a Bundle of resources that a record system can take in.

Plain JSON after the definitions of hl7.org/fhir/R4: a library would bring its own copy of these
definitions to write six resources. Tests validate what comes out.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dymo_med import __version__
from dymo_med.files import write_json
from dymo_med.inference.pdf import render_pdf
from dymo_med.inference.prediction_file import PredictionFile
from dymo_med.inference.report import percent, reason_sentence
from dymo_med.inference.segmentation_file import SegmentationFile
from dymo_med.outputs.states import STATUS, SYSTEM, TERMS, State, states
from dymo_med.outputs.study import NAME, Study
from dymo_med.outputs.ucum import ucum

Resource = dict[str, Any]
FILE = "bundle.json"
_UCUM = "http://unitsofmeasure.org"
_NOTICE = "Made by a model and not verified by a physician. For research use."


def write_fhir(study: Study, folder: Path) -> list[str]:
    """Write the answer as `bundle.json`: a Bundle of type collection.

    Args:
        study: The prediction.
        folder: Existing folder.

    Returns:
        What a user must know of it.
    """
    resources = _resources(study)
    write_json(
        folder / FILE,
        {
            "resourceType": "Bundle",
            "id": str(study.new_uuid("fhir bundle")),
            "type": "collection",
            "timestamp": study.made.isoformat(),
            "entry": [
                {"fullUrl": f"urn:uuid:{resource['id']}", "resource": resource}
                for resource in resources
            ],
        },
    )
    if not study.sources and study.file.sources:
        return ["fhir: there is no ImagingStudy, because no DICOM images are at hand"]
    return []


def _resources(study: Study) -> list[Resource]:
    """Return the resources; every reference is to one that stands before or beside it."""
    images = [_imaging_study(study)] if study.sources else []
    answers = _outlines(study) if isinstance(study.file, SegmentationFile) else []
    risk = []
    if isinstance(study.file, PredictionFile):
        answers = [_answer(study, study.file, images)]
        risk = [_risk(study, study.file, [*answers, *images])]
    modalities = [_modality(study, state) for state in states(study.file)]
    report = _report(study, [*answers, *modalities], images)
    made = [report, *answers, *modalities, *risk]
    return [_patient(study), _device(study), *images, *made, _provenance(study, made, images)]


def _begin(study: Study, kind: str, role: str, **more: Any) -> Resource:
    return {"resourceType": kind, "id": str(study.new_uuid(f"fhir {role}")), **more}


def _to(resource: Resource) -> dict[str, str]:
    return {"reference": f"urn:uuid:{resource['id']}"}


def _at(study: Study, role: str) -> dict[str, str]:
    return {"reference": f"urn:uuid:{study.new_uuid(f'fhir {role}')}"}


def _own(code: str, meaning: str) -> dict[str, Any]:
    """Return a concept of this program's own: no published one has a word for it."""
    return {"coding": [{"system": SYSTEM, "code": code, "display": meaning}], "text": meaning}


def _patient(study: Study) -> Resource:
    kind = "patient" if study.identified else "pseudonym" if study.pseudonymous else "record"
    identifier: Resource = {"system": f"urn:dymo-med:{kind}", "value": study.patient_id}
    if study.patient.get("IssuerOfPatientID"):
        identifier["assigner"] = {"display": study.patient["IssuerOfPatientID"]}
    patient = _begin(study, "Patient", "patient", identifier=[identifier])
    born = study.patient.get("PatientBirthDate", "")
    if len(born) == 8 and born.isdigit():
        patient["birthDate"] = f"{born[:4]}-{born[4:6]}-{born[6:]}"
    sex = {"F": "female", "M": "male", "O": "other"}.get(study.patient.get("PatientSex", ""))
    if sex:
        patient["gender"] = sex
    if study.identified and study.sources:
        patient["name"] = [{"text": study.patient["PatientName"].split("=")[0].replace("^", " ")}]
    return patient


def _device(study: Study) -> Resource:
    return _begin(
        study,
        "Device",
        "device",
        identifier=[{"system": "urn:dymo-med:bundle", "value": study.bundle_id}],
        manufacturer=NAME,
        deviceName=[{"name": f"{NAME}, bundle {study.bundle}", "type": "model-name"}],
        type={"text": "Prediction from incomplete data, by a trained model"},
        version=[{"value": __version__}],
    )


def _imaging_study(study: Study) -> Resource:
    """Return the images that were looked at, each with its UIDs."""
    series = []
    for name, source in study.sources.items():
        first = source.images[0]
        series.append(
            {
                "uid": str(first.SeriesInstanceUID),
                "modality": {
                    "system": "http://dicom.nema.org/resources/ontology/DCM",
                    "code": str(first.get("Modality") or "OT"),
                },
                "description": name,
                "numberOfInstances": len(source.images),
                "instance": [
                    {
                        "uid": str(image.SOPInstanceUID),
                        "sopClass": {
                            "system": "urn:ietf:rfc:3986",
                            "code": f"urn:oid:{image.SOPClassUID}",
                        },
                    }
                    for image in source.images
                ],
            }
        )
    return _begin(
        study,
        "ImagingStudy",
        "images",
        identifier=[{"system": "urn:dicom:uid", "value": f"urn:oid:{study.uid}"}],
        status="available",
        subject=_at(study, "patient"),
        numberOfSeries=len(series),
        numberOfInstances=sum(s["numberOfInstances"] for s in series),
        series=series,
    )


def _observation(study: Study, role: str, code: Mapping[str, Any], **more: Any) -> Resource:
    return _begin(
        study,
        "Observation",
        role,
        status="preliminary",
        code=dict(code),
        subject=_at(study, "patient"),
        issued=study.made.isoformat(),
        device=_at(study, "device"),
        **more,
    )


def _answer(study: Study, file: PredictionFile, images: Sequence[Resource]) -> Resource:
    """Return the answer: its class or value, its set, its status with the reasons."""
    component = [
        {
            "code": _own("status", TERMS["status"]),
            "valueCodeableConcept": _own(file.status, STATUS[file.status]),
        }
    ]
    said = {"valueCodeableConcept": {"text": file.predicted}}
    if file.value is not None:
        said = {"valueQuantity": _quantity(file.value.value, file.value.unit)}
        if file.value.low is not None and file.value.high is not None:
            component.append(
                {
                    "code": _own("interval", f"{percent(file.value.coverage)} interval"),
                    "valueRange": {
                        "low": _quantity(file.value.low, file.value.unit),
                        "high": _quantity(file.value.high, file.value.unit),
                    },
                }
            )
    if file.prediction_set is not None:
        component += [
            {
                "code": _own("prediction-set-member", TERMS["prediction-set-member"]),
                "valueCodeableConcept": {"text": name},
            }
            for name in file.prediction_set.classes
        ]
        coverage = file.prediction_set.coverage
        component.append(
            {
                "code": _own("coverage", TERMS["coverage"]),
                "valueQuantity": _quantity(coverage, "1"),
            }
        )
    more: dict[str, Any] = {"component": component}
    if file.status_reasons:
        more["note"] = [{"text": reason_sentence(reason)} for reason in file.status_reasons]
    if images:
        more["derivedFrom"] = [_to(image) for image in images]
    return _observation(
        study, "answer", {"text": f"{file.target}, predicted by {study.bundle}"}, **said, **more
    )


def _risk(study: Study, file: PredictionFile, basis: Sequence[Resource]) -> Resource:
    """Return the probability of each class."""
    return _begin(
        study,
        "RiskAssessment",
        "risk",
        status="preliminary",
        method={"text": f"{NAME} {__version__}, bundle {study.bundle}, selector {file.method}"},
        code={"text": file.target},
        subject=_at(study, "patient"),
        occurrenceDateTime=study.made.isoformat(),
        performer=_at(study, "device"),
        basis=[_to(resource) for resource in basis],
        prediction=[
            {"outcome": {"text": name}, "probabilityDecimal": round(probability, 9)}
            for name, probability in zip(file.classes, file.probabilities, strict=True)
        ],
        note=[{"text": _NOTICE}],
    )


def _outlines(study: Study) -> list[Resource]:
    """Return the volume of each region that was outlined."""
    file = study.file
    assert isinstance(file, SegmentationFile)
    return [
        _observation(
            study,
            f"region {region.name}",
            {"text": f"Volume of {region.name}, outlined by {study.bundle}"},
            valueQuantity=_quantity(region.volume_ml, "mL"),
        )
        for region in file.regions
    ]


def _modality(study: Study, state: State) -> Resource:
    """Return what became of one modality: measured, recovered or absent, and used or not."""
    if state.code == "absent":
        value: Resource = {
            "dataAbsentReason": {
                "coding": [
                    {
                        "system": "http://terminology.hl7.org/CodeSystem/data-absent-reason",
                        "code": "unknown",
                    }
                ],
                "text": state.meaning,
            }
        }
    else:
        value = {"valueCodeableConcept": _own(state.code, state.meaning)}
    if state.refused:
        value["note"] = [{"text": TERMS["refused"]}]
    code = {**_own("modality-state", TERMS["modality-state"]), "text": f"State of {state.name}"}
    return _observation(study, f"modality {state.name}", code, **value)


def _report(study: Study, results: Sequence[Resource], images: Sequence[Resource]) -> Resource:
    """Return the report: what was found in words, and the page as PDF."""
    sentence = conclusion(study)
    report = _begin(
        study,
        "DiagnosticReport",
        "report",
        text={
            "status": "generated",
            "div": f'<div xmlns="http://www.w3.org/1999/xhtml"><p>{html.escape(sentence)}</p></div>',
        },
        status="preliminary",
        code={
            "coding": [
                {
                    "system": "http://loinc.org",
                    "code": "18748-4",
                    "display": "Diagnostic imaging study",
                }
            ]
        },
        subject=_at(study, "patient"),
        issued=study.made.isoformat(),
        performer=[],
        result=[_to(result) for result in results],
        imagingStudy=[_to(image) for image in images],
        conclusion=sentence,
    )
    if isinstance(study.file, PredictionFile):
        content = render_pdf(study.file)
        report["presentedForm"] = [
            {
                "contentType": "application/pdf",
                "language": "en",
                "data": base64.b64encode(content).decode(),
                "size": len(content),
                "hash": base64.b64encode(hashlib.sha1(content).digest()).decode(),
                "title": f"Prediction of {study.file.target}",
                "creation": study.made.isoformat(),
            }
        ]
    return {key: value for key, value in report.items() if value != []}


def conclusion(study: Study) -> str:
    """Return in a few sentences what was found, and what it rests on."""
    file = study.file
    if isinstance(file, SegmentationFile):
        found = ", ".join(f"{r.name} {r.volume_ml:.1f} mL" for r in file.regions)
        said = [f"Outlined: {found}."]
    else:
        chosen = percent(file.probabilities[file.chosen])
        said = [f"{file.target}: {file.predicted}, probability {chosen}. {STATUS[file.status]}."]
        if file.value is not None:
            said[0] = f"{file.target}: {file.value.value:.4g} {file.value.unit}".rstrip() + "."
            said.append(f"{STATUS[file.status]}.")
        if file.prediction_set is not None:
            names = ", ".join(file.prediction_set.classes)
            said.append(
                f"Cannot be ruled out (for {percent(file.prediction_set.coverage)} of patients the"
                f" true class is among them): {names}."
            )
    said.append(f"Measured: {', '.join(file.observed)}.")
    if file.trusted:
        said.append(f"SYNTHETIC and used: {', '.join(file.trusted)}.")
    if file.rejected:
        said.append(f"SYNTHETIC and not used: {', '.join(file.rejected)}.")
    return " ".join([*said, _NOTICE])


def _provenance(study: Study, targets: Sequence[Resource], images: Sequence[Resource]) -> Resource:
    """Return what the answer came from, and what of it no one measured."""
    file = study.file
    entities: list[Resource] = [{"role": "source", "what": _to(image)} for image in images]
    entities += [
        {
            "role": "source",
            "what": {
                "identifier": {"system": "urn:dymo-med:sha256", "value": source.sha256},
                "display": f"{name}: measured",
            },
        }
        for name, source in file.sources.items()
    ]
    entities += [
        {
            "role": "derivation",
            "what": {
                "identifier": {
                    "system": "urn:dymo-med:sha256",
                    "value": file.recovered_files[state.name].sha256,
                },
                "display": f"SYNTHETIC {state.name}: {state.meaning[0].lower()}{state.meaning[1:]}",
            },
            "agent": [_agent(study)],
        }
        for state in states(file)
        if state.name in file.recovered_files
    ]
    return _begin(
        study,
        "Provenance",
        "provenance",
        target=[_to(target) for target in targets],
        occurredDateTime=study.made.isoformat(),
        recorded=study.made.isoformat(),
        activity={
            "coding": [
                {
                    "system": "http://terminology.hl7.org/CodeSystem/v3-DataOperation",
                    "code": "CREATE",
                }
            ]
        },
        agent=[_agent(study)],
        entity=entities,
    )


def _agent(study: Study) -> Resource:
    return {
        "type": {
            "coding": [
                {
                    "system": "http://terminology.hl7.org/CodeSystem/provenance-participant-type",
                    "code": "assembler",
                }
            ]
        },
        "who": _at(study, "device"),
    }


def _quantity(value: float, unit: str) -> Resource:
    found = ucum(unit)
    quantity: Resource = {"value": float(f"{value:.9g}")}
    if unit and unit != "1":
        quantity["unit"] = unit
    if found:
        quantity |= {"system": _UCUM, "code": found}
    return quantity
