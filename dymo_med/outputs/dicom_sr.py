"""DICOM: the answer as a Comprehensive 3D SR, TID 1500 (PS3.16), that systems can search.

One measurement group per class with its probability, one for the answer as a whole, one per
modality with what became of it. A group of a modality that was measured refers to its images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydicom.dataset import Dataset

from dymo_med import __version__
from dymo_med.inference.prediction_file import PredictionFile
from dymo_med.inference.segmentation_file import SegmentationFile
from dymo_med.outputs.states import QUALITY, REASONS, SCHEME, STATUS, TERMS, State, states
from dymo_med.outputs.study import NAME, Study, describe, save

if TYPE_CHECKING:
    from highdicom.sr import CodedConcept

SERIES = 9101
# PS3.6: a long string has 64 characters; digits that a decimal string keeps.
_LONG, _DIGITS = 64, 12


def write_sr(study: Study, folder: Path, evidence: Sequence[Dataset]) -> None:
    """Write the answer as `sr.dcm`.

    Args:
        study: The prediction.
        folder: Existing folder.
        evidence: Objects of this prediction: its page, recovered images, outlines. A structured
            report needs at least one object that it rests on, if not an image of the patient.
    """
    from highdicom.sr import Comprehensive3DSR, MeasurementReport, ObservationContext
    from pydicom.sr.codedict import codes

    images = [image for source in study.sources.values() for image in source.images]
    report = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=_device(study)),
        procedure_reported=codes.SCT.ImagingProcedure,
        title=codes.DCM.ImagingMeasurementReport,
        # No image library: it needs attributes that headers may lack, and groups refer to images.
        imaging_measurements=_groups(study, evidence),
    )
    sr = Comprehensive3DSR(
        evidence=[*images, *evidence],
        content=report,
        series_instance_uid=study.new_uid("series of sr"),
        series_number=SERIES,
        sop_instance_uid=study.new_uid("sr"),
        instance_number=1,
        manufacturer=NAME,
        is_complete=True,
        is_final=False,  # no physician has looked at it
        is_verified=False,
        series_description="AI result, not verified by a physician",
    )
    sr.StudyInstanceUID = study.uid
    describe(sr, study, synthetic=study.synthetic)
    save(sr, folder / "sr.dcm")


def _groups(study: Study, evidence: Sequence[Dataset]) -> list[Any]:
    file = study.file
    found = _outlines(study, evidence) if isinstance(file, SegmentationFile) else []
    if isinstance(file, PredictionFile):
        found = [_answer(study, file), *_classes(study, file)]
    return [*found, *(_modality(study, state) for state in states(file))]


def _answer(study: Study, file: PredictionFile) -> Any:
    """Return the group of the answer as a whole: its class, its set, its status, its number."""
    from highdicom.sr import Measurement

    inside = file.classes if file.prediction_set is None else file.prediction_set.classes
    said = [
        (_own("predicted-class"), _class(file, file.predicted)),
        (_own("status"), _coded(f"status-{file.status}", STATUS[file.status])),
    ]
    said += [
        (_own("reason"), _coded(f"reason-{code}", REASONS[code]))
        for code in dict.fromkeys(reason.code for reason in file.status_reasons)
    ]
    numbers = []
    if file.prediction_set is not None:
        said += [(_own("prediction-set-member"), _class(file, name)) for name in inside]
        numbers.append(_number("coverage", file.prediction_set.coverage))
    if file.value is not None:
        unit = _unit(file.value.unit)
        ends = {
            "value": file.value.value,
            "value-low": file.value.low,
            "value-high": file.value.high,
        }
        numbers += [
            Measurement(name=_own(code), value=_rounded(number), unit=unit)
            for code, number in ends.items()
            if number is not None
        ]
        if file.prediction_set is None:
            numbers.append(_number("coverage", file.value.coverage))
    images = [image for source in study.sources.values() for image in source.images]
    about = _coded("target", file.target)
    return _group(study, f"prediction of {file.target}", about, said, numbers, images)


def _classes(study: Study, file: PredictionFile) -> list[Any]:
    """Return a group per class: its probability, with all that was used and measured alone."""
    from highdicom.sr import Measurement
    from pydicom.sr.codedict import codes

    alone = file.alternatives.get("observed_only")
    if file.method == "observed_only":
        alone = file.probabilities
    groups = []
    for k, name in enumerate(file.classes):
        said = []
        if file.prediction_set is not None:
            within = name in file.prediction_set.classes
            answer = codes.SCT.Yes if within else codes.SCT.No
            said.append((_own("in-prediction-set"), answer))
        numbers = [
            Measurement(
                name=codes.DCM.Probability,
                value=_rounded(file.probabilities[k]),
                unit=codes.UCUM.NoUnits,
                algorithm_id=_algorithm(study),
            )
        ]
        if alone is not None:
            numbers.append(_number("probability-measured", alone[k]))
        groups.append(_group(study, f"class {name}", _class(file, name), said, numbers, ()))
    return groups


def _modality(study: Study, state: State) -> Any:
    """Return the group of a modality: what became of it, and its images."""
    said = [(_own("modality-state"), _coded(state.code, state.meaning))]
    if state.refused:
        said.append((_own("quality"), _own("refused")))
    elif isinstance(study.file, PredictionFile) and state.name in study.file.quality:
        gate = study.file.quality[state.name].state
        said.append((_own("quality"), _coded(f"quality-{gate}", QUALITY[gate])))
    source = study.sources.get(state.name)
    images = () if source is None else source.images
    return _group(study, f"modality {state.name}", _own("modality-state"), said, (), images)


def _outlines(study: Study, evidence: Sequence[Dataset]) -> list[Any]:
    """Return a group per region that was outlined: its volume, and the segment if there is one."""
    from highdicom.sr import (
        Measurement,
        VolumetricROIMeasurementsAndQualitativeEvaluations,
    )
    from pydicom.sr.codedict import codes

    file = study.file
    assert isinstance(file, SegmentationFile)
    segments = {d.SegmentSequence[0].SegmentLabel: d for d in evidence if "SegmentSequence" in d}
    groups = []
    for region in file.regions:
        volumes = [
            Measurement(
                name=name,
                value=_rounded(1000 * ml),
                unit=codes.UCUM.CubicMillimeter,
                algorithm_id=_algorithm(study),
            )
            for name, ml in (
                (codes.SCT.Volume, region.volume_ml),
                (_own("outline-measured"), file.observed_only_ml.get(region.name)),
            )
            if ml is not None
        ]
        name = f"region {region.name}"
        if region.name not in segments:
            groups.append(_group(study, name, _own("region"), [], volumes, ()))
            continue
        groups.append(
            VolumetricROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=_tracking(study, name),
                referenced_segment=_segment(segments[region.name]),
                finding_type=codes.SCT.Lesion,
                algorithm_id=_algorithm(study),
                measurements=volumes,
            )
        )
    return groups


def _segment(seg: Dataset) -> Any:
    """Return a reference to the one segment of an object, and to the series it was drawn on."""
    from highdicom.sr import ReferencedSegment, SourceSeriesForSegmentation

    return ReferencedSegment(
        sop_class_uid=seg.SOPClassUID,
        sop_instance_uid=seg.SOPInstanceUID,
        segment_number=1,
        source_series=SourceSeriesForSegmentation(
            seg.ReferencedSeriesSequence[0].SeriesInstanceUID
        ),
    )


def _group(
    study: Study,
    name: str,
    finding: CodedConcept,
    said: Sequence[tuple[Any, Any]],
    numbers: Sequence[Any],
    images: Sequence[Dataset],
) -> Any:
    from highdicom.sr import (
        MeasurementsAndQualitativeEvaluations,
        QualitativeEvaluation,
        SourceImageForMeasurementGroup,
    )

    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(study, name),
        finding_type=finding,
        algorithm_id=_algorithm(study),
        source_images=[SourceImageForMeasurementGroup.from_source_image(i) for i in images] or None,
        qualitative_evaluations=[QualitativeEvaluation(name=n, value=v) for n, v in said] or None,
        measurements=list(numbers) or None,
    )


def _tracking(study: Study, name: str) -> Any:
    from highdicom.sr import TrackingIdentifier

    return TrackingIdentifier(uid=study.new_uid(f"tracking {name}"), identifier=name)


def _algorithm(study: Study) -> Any:
    """Return which program and model: their names and versions, how it chose, and the seed."""
    from highdicom.sr import AlgorithmIdentification

    return AlgorithmIdentification(
        name=NAME,
        version=__version__,
        parameters=[
            f"bundle {study.bundle}",
            f"bundle id {study.bundle_id}",
            f"selector {study.file.method}",
            f"seed {study.file.seed}",
        ],
    )


def _device(study: Study) -> Any:
    from highdicom.sr import DeviceObserverIdentifyingAttributes, ObserverContext
    from pydicom.sr.codedict import codes

    return ObserverContext(
        codes.DCM.Device,
        DeviceObserverIdentifyingAttributes(
            uid=study.new_uid("device"),
            name=NAME,
            manufacturer_name=NAME,
            model_name=study.bundle[:_LONG],
            serial_number=study.bundle_id[:16],
        ),
    )


def _number(code: str, value: float) -> Any:
    from highdicom.sr import Measurement
    from pydicom.sr.codedict import codes

    return Measurement(name=_own(code), value=_rounded(value), unit=codes.UCUM.NoUnits)


def _rounded(value: float) -> float:
    """Return a number that reads the same as text of 16 characters and as binary."""
    return float(f"{value:.{_DIGITS - 3}g}")


def _own(code: str) -> CodedConcept:
    return _coded(code, TERMS[code])


def _coded(code: str, meaning: str) -> CodedConcept:
    from highdicom.sr import CodedConcept

    text = meaning if len(meaning) <= _LONG else f"{meaning[: _LONG - 1]}…"
    return CodedConcept(code, SCHEME, text)


def _class(file: PredictionFile, name: str) -> CodedConcept:
    """Return a class as a code: its place, and its name."""
    return _coded(f"class-{file.classes.index(name)}", name)


def _unit(unit: str) -> Any:
    """Return a unit as a code: of UCUM where it is one, else of this program's own scheme."""
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    from dymo_med.outputs.ucum import ucum

    if not unit:
        return codes.UCUM.NoUnits
    found = ucum(unit)
    return CodedConcept(found, "UCUM", unit[:_LONG]) if found else _coded("unit", unit)
