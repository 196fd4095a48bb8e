"""One patient in a straight line: read, recover, encode, select, fuse, explain, write.

Cohort evaluation takes the same steps (`answer`, `explain_record`, `assemble`) on larger batches.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from math import isfinite, isnan
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from dymo_med import __version__
from dymo_med.backbones import EncodedVersions, encode_versions
from dymo_med.bundle import ModelBundle
from dymo_med.bundle_segmentation import SegmentationBundle
from dymo_med.conformal import AS_THEY_CAME, COVERAGE, FEWEST
from dymo_med.data.batch import collate
from dymo_med.data.gate import judge
from dymo_med.data.patient import read_patient
from dymo_med.files import check_replaceable, complete_folder, write_csv, write_json, write_text
from dymo_med.inference.explain import MOST_ERROR, Explanation, Subject, explain
from dymo_med.inference.pictures import SIGMA, Scan, draw
from dymo_med.inference.prediction_file import (
    CENTRAL,
    FEW_PATIENTS,
    SCHEMA_VERSION,
    AcquirePart,
    CellPart,
    ContrastPart,
    ConvergencePart,
    DrawsPart,
    ExhibitsPart,
    FiguresPart,
    GainPart,
    IntervalPart,
    PerformancePart,
    PredictionFile,
    PredictionSetPart,
    RulePart,
    State,
    StepPart,
    entropy_bits,
    frequency,
    gain,
    gate_reasons,
    quality_parts,
    status_of,
    summarise,
)
from dymo_med.inference.report import percentile, reason_sentence, words, write_report
from dymo_med.privacy import shown
from dymo_med.references import Mixed, features_of, summary
from dymo_med.selection.average import SubsetAverage
from dymo_med.selection.fixed import TrustAll
from dymo_med.selection.gate import Gate
from dymo_med.selection.greedy import Dymo, Simultaneous, published_calibration
from dymo_med.selection.reward import SimilarityCalibration
from dymo_med.types import (
    Batch,
    Column,
    Fuse,
    GateResult,
    ModalitySpec,
    PatientRecord,
    PerformanceRow,
    Prediction,
    Recovery,
    SelectionStep,
    SelectionTrace,
    Source,
    Value,
    WeightedSubset,
)

_LOG = logging.getLogger(__name__)
DRAWS = 20
RECOVERED_VERSION = 3  # of recovered.json
# Voxels (or cells) that are encoded at once.
_MOST_VOXELS = 8_000_000
_MOST_FILES = 10  # that are named in a sentence

# Always answered side by side: discard, trust everything, the published rule.
COMPARED = ("observed_only", "trust_all", "dymo")
STEP_COLUMNS = tuple(SelectionStep.__dataclass_fields__)
RECOVERED = "recovered"
# What `dymo-med export` puts beside a prediction; a new prediction replaces it too.
EXPORTED = ("dicom", "fhir", "bids")
_WRITTEN = ("prediction.json", "selection.csv", "report.html", "report.pdf", RECOVERED, *EXPORTED)


@dataclass(frozen=True)
class Answers:
    """What every method says of a batch, from one recovery and one encoding.

    Attributes:
        batch: B records, on the bundle's device.
        recovery: What was proposed for what they lack.
        method: The bundle's default selector.
        traces: Selection by method: `COMPARED`, the bundle's default, and what else was asked for.
        probabilities: Calibrated, float64 `(B, K)` on the CPU, by method.
        fuse: Over the B records, for further questions: the network, or the network and the
            reference that has a part in the bundle's answers.
        network: The network alone, over the same records.
    """

    batch: Batch
    recovery: Recovery
    method: str
    traces: Mapping[str, SelectionTrace]
    probabilities: Mapping[str, Tensor]
    fuse: Fuse
    network: EncodedVersions

    @property
    def own(self) -> SelectionTrace:
        """The trace of the bundle's default selector."""
        return self.traces[self.method]


def answer(
    bundle: ModelBundle,
    records: Sequence[PatientRecord],
    *,
    seed: int = 0,
    methods: Sequence[str] = (),
) -> Answers:
    """Answer for several records at once, with every method.

    Args:
        bundle: The model.
        records: B records, each with at least one modality.
        seed: Seed of whatever is random in the imputer.
        methods: Selectors to ask besides `COMPARED` and the bundle's default.

    Returns:
        The answers; a record's own do not depend on its neighbours.

    Raises:
        PatientDataError: If a record has nothing observed.
    """
    with torch.inference_mode():
        batch = collate(records, bundle.specs).to(bundle.device)
        recovery = bundle.imputer.recover(batch, seed=seed)
        network = encode_versions(bundle.backbone, batch, recovery)
        fuse = bundle.answering(network, batch, recovery)
        traces = {
            name: bundle.selectors[name].select(
                fuse, batch.observed, recovery.candidates, bundle.statistics
            )
            for name in dict.fromkeys((*COMPARED, *methods, bundle.choice.name))
        }
        probabilities = {
            name: bundle.calibration.probabilities(trace.output.logits.cpu())
            for name, trace in traces.items()
        }
    return Answers(batch, recovery, bundle.choice.name, traces, probabilities, fuse, network)


def predict_batch(
    bundle: ModelBundle, records: Sequence[PatientRecord], *, explain: bool = True, seed: int = 0
) -> list[Prediction]:
    """Predict several records.

    Args:
        bundle: The model.
        records: Any number, each with at least one modality.
        explain: Whether to compute attributions; without, they cost nothing.
        seed: Recorded, and used by whatever is random.

    Returns:
        One prediction per record, in order.

    Raises:
        PatientDataError: If a record has nothing observed.
    """
    if not records:
        return []
    answers = answer(bundle, records, seed=seed)
    return [
        assemble(
            bundle,
            record,
            answers,
            row,
            explain_record(bundle, answers, row, seed=seed) if explain else None,
            seed=seed,
        )
        for row, record in enumerate(records)
    ]


def predict_patient(
    patient_dir: Path,
    bundle: ModelBundle,
    out: Path | None = None,
    *,
    explain: bool = True,
    seed: int = 0,
    draws: int = DRAWS,
    pdf: bool = False,
    identify: bool = False,
    treat_refused_as_missing: bool = False,
) -> Prediction:
    """Predict one patient from a folder.

    Args:
        patient_dir: The patient directory; its name is the record's id.
        bundle: The model.
        out: Folder for `prediction.json`, `selection.csv`, `report.html` and `recovered/`; it
            appears complete or not at all. None = write nothing.
        explain: Whether to compute attributions.
        seed: Seed of whatever is random.
        draws: How many draws of a probabilistic imputer's recoveries to answer from, besides its
            best guess; 0 = none. They are made for the files only.
        pdf: Whether to write the page as `report.pdf` too.
        identify: Whether to show the identifier that headers state, instead of a pseudonym.
        treat_refused_as_missing: Go on without what the quality gate refuses; everything that is
            written says so.

    Returns:
        The prediction.

    Raises:
        PatientDataError: If the patient's files cannot be used.
        RefusedError: If they can be read but the quality gate refuses one.
        ConfigError: If `out` holds something else, or the key of pseudonyms cannot be used.
    """
    if out is not None:
        check_replaceable(out, "prediction.json", _WRITTEN)
    record = read_for(bundle, patient_dir, treat_refused_as_missing)
    answers = answer(bundle, [record], seed=seed)
    explanation = explain_record(bundle, answers, 0, seed=seed) if explain else None
    prediction = assemble(bundle, record, answers, 0, explanation, seed=seed, identify=identify)
    if out is not None:
        with complete_folder(out, "prediction.json", _WRITTEN) as folder:
            files = write_recovered(bundle, record, answers, 0, folder / RECOVERED)
            file = prediction_file(
                bundle,
                record,
                answers,
                0,
                explanation,
                prediction,
                draws=draws,
                files={name: (path, _sha256(folder / path)) for name, path in files.items()},
                command=_command(
                    record.record_id,
                    bundle,
                    seed,
                    draws,
                    {
                        "--no-explain": not explain,
                        "--identify": identify,
                        "--treat-refused-as-missing": treat_refused_as_missing,
                    },
                ),
            )
            write_prediction(file, folder)
            write_csv(folder / "selection.csv", STEP_COLUMNS, step_rows(file))
            if pdf:
                from dymo_med.inference.pdf import write_pdf

                write_pdf(file, folder / "report.pdf")
    return prediction


def read_for(
    bundle: ModelBundle | SegmentationBundle, patient_dir: Path, treat_refused_as_missing: bool
) -> PatientRecord:
    """Read a patient as the bundle needs it."""
    return read_patient(
        patient_dir,
        bundle.specs,
        missing_values=bundle.missing_values,
        norms=bundle.norms,
        treat_refused_as_missing=treat_refused_as_missing,
    )


def write_prediction(file: PredictionFile, folder: Path) -> None:
    """Write `prediction.json`, and `report.html` from what it says.

    Args:
        file: The prediction.
        folder: Existing folder.
    """
    write_text(folder / "prediction.json", file.to_text())
    write_report(file, folder / "report.html")


def step_rows(file: PredictionFile) -> list[dict[str, object]]:
    """Return the rows of `selection.csv`."""
    return [step.model_dump() for step in file.steps]


def impute_patient(
    patient_dir: Path,
    bundle: ModelBundle,
    out: Path,
    *,
    seed: int = 0,
    identify: bool = False,
    treat_refused_as_missing: bool = False,
) -> list[Path]:
    """Write what the imputer proposes for one patient, and nothing else.

    Args:
        patient_dir: The patient directory.
        bundle: The model.
        out: Folder for `recovered/`; it appears complete or not at all.
        seed: Seed of whatever is random.
        identify: Whether to show the identifier that headers state, instead of a pseudonym.
        treat_refused_as_missing: Recover what the quality gate refuses too.

    Returns:
        The files, all under `out / "recovered"`.

    Raises:
        PatientDataError: If the patient's files cannot be used.
        RefusedError: If they can be read but the quality gate refuses one.
        ConfigError: If `out` holds something else, or the key of pseudonyms cannot be used.
    """
    marker = f"{RECOVERED}/recovered.json"
    check_replaceable(out, marker, (RECOVERED,))
    record = read_for(bundle, patient_dir, treat_refused_as_missing)
    for sentence in unused_sentences(record, bundle.specs):
        _LOG.warning("%s", sentence)
    sources = _sources(record, identify)
    answers = answer(bundle, [record], seed=seed)
    with complete_folder(out, marker, (RECOVERED,)) as folder:
        files = write_recovered(bundle, record, answers, 0, folder / RECOVERED)
        write_json(
            folder / marker,
            {
                "schema_version": RECOVERED_VERSION,
                "record_id": record.record_id,
                "synthetic": True,
                "files": files,
                "bundle": {"name": bundle.name, "id": bundle.bundle_id},
                "seed": seed,
                "refused": list(record.refused),
                "unused": list(record.unused),
                "sources": {n: asdict(s) for n, s in sources.items()},
                "versions": versions(),
            },
        )
    return [out / file for file in files.values()]


def explain_record(bundle: ModelBundle, answers: Answers, row: int, *, seed: int) -> Explanation:
    """Explain the answer of the bundle's own selector for one record.

    Args:
        bundle: The model.
        answers: Of a batch.
        row: Which record of it.
        seed: Seed of sampled orders, where there are too many modalities to list all subsets.
    """
    subject = Subject(
        bundle.backbone,
        answers.batch,
        answers.recovery,
        answers.own,
        row,
        calibration=bundle.calibration,
        base_rates=bundle.base_rates,
        mixed=answers.fuse if isinstance(answers.fuse, Mixed) else None,
    )
    fields = answers.batch.observed_fields
    observed = {
        name: fields[name][row].clone() if name in fields else None
        for name in answers.batch.observed.of(row)
    }
    return explain(subject, observed, seed=seed)


def assemble(
    bundle: ModelBundle,
    record: PatientRecord,
    answers: Answers,
    row: int,
    explanation: Explanation | None,
    *,
    seed: int,
    identify: bool = False,
) -> Prediction:
    """Gather one record's prediction.

    Args:
        bundle: The model.
        record: The record in that row.
        answers: Of a batch.
        row: Which record of it.
        explanation: None = no attributions.
        seed: Of the run.
        identify: Whether sources show the identifier that headers state, instead of a pseudonym.
    """
    trace, recovery = answers.own, answers.recovery
    names = trace.names

    def pick(available: Tensor) -> tuple[str, ...]:
        return tuple(n for n, a in zip(names, available[row].tolist(), strict=True) if a)

    steps = selection_steps(trace, row)
    quality = gate_results(bundle, record)
    probabilities = {
        method: tuple(values[row].tolist()) for method, values in answers.probabilities.items()
    }
    own = probabilities.pop(answers.method)
    return Prediction(
        record_id=record.record_id,
        patient_id=record.patient_id,
        classes=bundle.task.classes,
        probabilities=own,
        alternatives=probabilities,
        observed=pick(trace.observed),
        partly=pick(answers.batch.partly_filled()),
        recovered=pick(recovery.candidates),
        trusted=pick(trace.admitted),
        rejected=pick(trace.rejected),
        absent=pick(~trace.observed & ~recovery.recovered),
        method=answers.method,
        steps=steps,
        attributions=explanation.attributions if explanation is not None else (),
        warnings=_warnings(bundle, record, own, probabilities, steps, quality),
        sources=_sources(record, identify),
        bundle_id=bundle.bundle_id,
        bundle_name=bundle.name,
        seed=seed,
        base_rates=bundle.base_rates,
        subsets=weighted_subsets(trace, row),
        value=value_of(bundle, answers, row),
        quality=quality,
        refused=tuple(record.refused),
    )


def value_of(bundle: ModelBundle, answers: Answers, row: int) -> Value | None:
    """Return the number that a regression answers, with its interval; None of other tasks.

    Args:
        bundle: The model.
        answers: Of a batch.
        row: Which record of it.
    """
    scale, conformal = bundle.task.scale, bundle.conformal
    if scale is None:
        return None
    values = {m: float(scale.value(p[row])) for m, p in answers.probabilities.items()}
    own = values.pop(answers.method)
    found = None
    if conformal is not None and answers.method in conformal.errors:
        pattern = "+".join(answers.batch.observed.of(row))
        found = conformal.intervals(answers.method, np.array([own]), [pattern], scale)
    return Value(
        value=own,
        low=None if found is None else float(found.low[0]),
        high=None if found is None else float(found.high[0]),
        coverage=COVERAGE,
        compared_with=cast(Literal["pattern", "all"], "all" if found is None else found.group[0]),
        calibrated_on=0 if found is None else int(found.calibrated_on[0]),
        least=FEWEST,
        unit=scale.unit,
        centers=scale.centers,
        alternatives=values,
    )


def _sources(record: PatientRecord, identify: bool) -> dict[str, Source]:
    """Return where each modality came from, and whose it is where its header says so."""
    sources = {name: value.source for name, value in record.modalities.items()}
    if record.identifier is not None:
        whose = {"patient": shown(record.identifier, identify=identify)}
        for name, value in record.modalities.items():
            if value.identifiers:
                facts = {**value.source.facts, **whose}
                sources[name] = replace(value.source, facts=facts)
    return sources


def gate_results(
    bundle: ModelBundle | SegmentationBundle, record: PatientRecord
) -> dict[str, GateResult]:
    """Return what the quality gate says of what a record has, and of what it refused.

    Args:
        bundle: The model.
        record: As it is answered for: what a scenario hid has no result.
    """
    results = {
        spec.name: judge(spec, record.modalities[spec.name], bundle.norms)
        for spec in bundle.specs
        if spec.name in record.modalities
    }
    return {**results, **record.refused}


def selection_steps(trace: SelectionTrace, row: int) -> tuple[SelectionStep, ...]:
    """Return one record's part of a trace: every candidate of every step it took part in.

    Args:
        trace: Of B records.
        row: Which record.

    Returns:
        Steps counted from 1. A candidate that was judged again later is ``not yet``; one that was
        refused (negative reward, or a trust not above the threshold) is ``rejected``; one that
        gained nothing when the selection ended is ``stopped``. Empty for methods that look at
        nothing.
    """
    columns = {
        key: getattr(trace, key)[:, row].tolist()
        for key in (
            "reward",
            "quality_before",
            "quality_after",
            "similarity_before",
            "similarity_after",
            "factor",
            "borrowed",
            "trust",
        )
    }
    admitted = trace.admitted[row].tolist()
    steps = []
    for t, rewards in enumerate(columns["reward"]):
        for m, reward in enumerate(rewards):
            if isnan(reward):  # no candidate
                continue
            again = any(not isnan(later[m]) for later in columns["reward"][t + 1 :])
            trust = columns["trust"][t][m]
            refused = reward < 0 if isnan(trust) else trust <= trace.threshold
            steps.append(
                SelectionStep(
                    step=t + 1,
                    modality=trace.names[m],
                    version="completed" if bool(trace.observed[row, m]) else "recovered",
                    quality_before=columns["quality_before"][t],
                    quality_after=columns["quality_after"][t][m],
                    similarity_before=columns["similarity_before"][t],
                    similarity_after=columns["similarity_after"][t][m],
                    factor=columns["factor"][t][m],
                    reward=reward,
                    decision="not yet"
                    if again
                    else "admitted"
                    if admitted[m]
                    else "rejected"
                    if refused
                    else "stopped",
                    borrowed=bool(columns["borrowed"][t][m]),
                    trust=None if isnan(trust) else trust,
                    threshold=trace.threshold,
                )
            )
    return tuple(steps)


def weighted_subsets(trace: SelectionTrace, row: int) -> tuple[WeightedSubset, ...]:
    """Return what one record's answer was averaged over, heaviest first.

    Empty if it was not an average, or there was nothing to average over.

    Args:
        trace: Of B records.
        row: Which record.
    """
    if trace.mixture is None:
        return ()
    own = (trace.mixture.rows == row).nonzero().squeeze(1)
    found = [
        WeightedSubset(
            tuple(n for n, a in zip(trace.names, admitted, strict=True) if a), float(weight)
        )
        for admitted, weight in zip(
            trace.mixture.admitted[own].tolist(), trace.mixture.weight[own].tolist(), strict=True
        )
    ]
    if all(not s.admitted for s in found):
        return ()
    return tuple(sorted(found, key=lambda s: -s.weight))


def write_recovered(
    bundle: ModelBundle, record: PatientRecord, answers: Answers, row: int, folder: Path
) -> dict[str, str]:
    """Write the recovered and completed modalities of one record.

    Args:
        bundle: The model.
        record: The record in that row.
        answers: Of a batch.
        row: Which record of it.
        folder: Is made; its files are named as synthetic.

    Returns:
        File of each modality, relative to the folder above.
    """
    folder.mkdir()
    files = {}
    recovery = answers.recovery
    for m, spec in enumerate(bundle.specs):
        if not bool(recovery.candidates[row, m]):
            continue
        fields = answers.batch.observed_fields.get(spec.name)
        completed = fields is not None and bool(recovery.completed[row, m])
        path = bundle.modalities[spec.name].write(
            folder,
            recovery.values[spec.name][row].cpu(),
            fields[row].cpu() if completed and fields is not None else None,
            _affine(spec, bundle.specs, record),
        )
        files[spec.name] = f"{folder.name}/{path.name}"
    return files


def exhibits_of(
    bundle: ModelBundle,
    record: PatientRecord,
    answers: Answers,
    row: int,
    explanation: Explanation | None,
) -> ExhibitsPart:
    """Gather what a report shows besides the prediction: pictures, cells and facts.

    Args:
        bundle: The model.
        record: The record in that row.
        answers: Of a batch.
        row: Which record of it.
        explanation: None = no saliency.
    """
    trace, recovery, batch = answers.own, answers.recovery, answers.batch
    saliency = explanation.saliency if explanation is not None else None
    scans: list[Scan] = []
    cells: list[CellPart] = []
    for m, spec in enumerate(bundle.specs):
        observed, candidate = bool(trace.observed[row, m]), bool(recovery.candidates[row, m])
        if not observed and not candidate:
            continue
        values = recovery.values[spec.name][row].cpu()
        if spec.columns:
            filled = batch.observed_fields[spec.name][row].tolist()
            cells += [
                _cell(
                    spec,
                    column,
                    value,
                    measured=measured,
                    known=measured or (candidate and column.known),
                )
                for column, value, measured in zip(
                    spec.columns, values.tolist(), filled, strict=True
                )
            ]
        picture = bundle.modalities[spec.name].picture(values)
        if picture is not None:
            state: State = (
                "observed" if observed else "trusted" if trace.admitted[row, m] else "rejected"
            )
            maps = {} if saliency is None else saliency.maps if observed else saliency.recovered
            shown = maps.get(spec.name)
            scans.append(
                Scan(
                    modality=spec.name,
                    values=picture.numpy(),
                    spacing_mm=spec.spacing_mm,
                    state=state,
                    zero_is_background=spec.intensity == "zscore",
                    saliency=None if shown is None else shown.cpu().numpy(),
                )
            )
    return ExhibitsPart(
        bundle_description=bundle.description,
        scans=draw(scans),
        cells=tuple(cells),
        smoothed_voxels=SIGMA,
        convergence=None
        if saliency is None
        else ConvergencePart(error=saliency.convergence, bound=MOST_ERROR, points=saliency.points),
        contrast=()
        if saliency is None
        else tuple(
            ContrastPart(modality=name, recovered=made, value=value)
            for (name, made), value in saliency.contrast.items()
        ),
    )


def prediction_file(
    bundle: ModelBundle,
    record: PatientRecord,
    answers: Answers,
    row: int,
    explanation: Explanation | None,
    prediction: Prediction,
    *,
    draws: int = 0,
    files: Mapping[str, tuple[str, str]] | None = None,
    command: str | None = None,
) -> PredictionFile:
    """Return everything about one record's prediction, ready to be written.

    Args:
        bundle: The model behind it.
        record: The record in that row.
        answers: Of a batch.
        row: Which record of it.
        explanation: None = no attributions.
        prediction: What `assemble` returned for it.
        draws: How many draws of the recoveries to answer from.
        files: File of each recovered modality, relative to the output folder, and its SHA-256.
        command: How to get the same again; None = by no single command.
    """
    trace = answers.own
    names = trace.names
    chosen = int(np.argmax(prediction.probabilities))
    observed = trace.observed[row].tolist()
    pattern = "+".join(n for n, seen in zip(names, observed, strict=True) if seen)
    steps = tuple(
        StepPart(**(asdict(s) | {"threshold": _bound(s.threshold)})) for s in prediction.steps
    )
    alone = answers.probabilities["observed_only"][row].tolist()
    drawn, acquire = draw_answers(bundle, answers, row, draws=draws, seed=prediction.seed)
    found = _prediction_set(bundle, answers, row, pattern)
    tested = _performance(bundle, answers.method, pattern)
    quality = quality_parts(prediction.quality)
    status, why = status_of(
        prediction.classes,
        prediction.probabilities,
        alone,
        found,
        drawn,
        tested,
        steps,
        gate_reasons(quality),
    )
    provenance = bundle.provenance
    shares = _subset_answers(bundle, answers, row, prediction)
    return PredictionFile.make(
        {
            "schema_version": SCHEMA_VERSION,
            **asdict(prediction),
            "quality": {name: part.model_dump() for name, part in quality.items()},
            "target": bundle.task.target,
            "predicted": prediction.classes[chosen],
            "status": status,
            "status_reasons": [r.model_dump() for r in why],
            "frequency": frequency(
                prediction.classes[chosen],
                prediction.probabilities[chosen],
                *bundle.calibration.count(answers.method, prediction.probabilities[chosen]),
            ).model_dump(),
            "prediction_set": found and found.model_dump(),
            "method_why": bundle.choice.why,
            "rule": _rule(bundle, trace).model_dump(),
            "steps": [s.model_dump() for s in steps],
            "subsets": [
                {**asdict(s), "probabilities": p}
                for s, p in zip(prediction.subsets, shares, strict=True)
            ],
            "draws": drawn and drawn.model_dump(),
            "acquire": acquire and acquire.model_dump(),
            "performance": tested and tested.model_dump(),
            "limits": {
                "task": f"{bundle.task.type}: {bundle.task.target}",
                "cohort": provenance["cohort"],
                "records": provenance["records"],
                "patients": {s: len(p) for s, p in provenance["patients"].items()},
                "fitted_on": bundle.calibration.fitted_on,
                "held_back": _held_back(bundle),
                "observed_share": provenance["observed_share"],
            },
            "recovered_files": {
                name: {"file": path, "sha256": sha256}
                for name, (path, sha256) in (files or {}).items()
            },
            "bundle_version": bundle.version,
            "device": str(bundle.device),
            "versions": versions(),
            "command": command,
            "exhibits": exhibits_of(bundle, record, answers, row, explanation).model_dump(),
            "plain": _plain(bundle, answers, row),
        }
    )


def _plain(bundle: ModelBundle, answers: Answers, row: int) -> dict[str, Any] | None:
    """Return what references say of one record, and which modalities the model uses."""
    if bundle.references is None:
        return None
    alone = answers.batch.rows(torch.tensor([row], device=answers.own.observed.device))
    with torch.inference_mode():
        features = features_of(alone, bundle.specs)
        said = {
            n: r.probabilities(features)[0].clamp(0, 1).tolist()
            for n, r in bundle.references.fitted.items()
        }
    rows = () if bundle.use is None else bundle.use.rows
    return {
        "references": said,
        "weight": bundle.references.weight,
        "partner": bundle.references.partner if bundle.references.mixed is not None else "",
        "use": {r.part: r.verdict for r in rows},
        "change": {r.part: r.change for r in rows},
    }


def draw_answers(
    bundle: ModelBundle, answers: Answers, row: int, *, draws: int, seed: int
) -> tuple[DrawsPart | None, AcquirePart | None]:
    """Return what other recoveries, as plausible, would have answered, and what measuring is worth.

    The selection stays as it was made. A draw is encoded once, as if it had been observed, and
    then only fused: with all draws that were admitted, with all draws there are, and alone beside
    what was observed.

    Args:
        bundle: The model.
        answers: Of a batch.
        row: Which record of it; its draws do not depend on the others.
        draws: n.
        seed: Of the draws.

    Returns:
        None and None without draws, of an imputer that cannot draw, and where nothing was
        recovered.
    """
    trace = answers.own
    candidates = answers.recovery.candidates[row]
    if not draws or not bundle.imputer.probabilistic or not bool(candidates.any()):
        return None, None
    names, device = trace.names, candidates.device
    observed = trace.observed[row]
    with torch.inference_mode():
        fuse = _fuse_draws(bundle, answers, row, draws, seed)

        def ask(admitted: Tensor) -> Tensor:
            """Return `(A, n, K)` for `A` subsets of candidates `(A, M)`, beside the observed."""
            count = len(admitted)
            rows = torch.arange(draws, device=device).repeat(count)
            each = admitted.repeat_interleave(draws, 0)
            logits = fuse(rows, observed | each, each).logits
            return bundle.calibration.probabilities(logits.cpu()).view(count, draws, -1)

        admitted, weight = trace.admitted[row : row + 1], None
        if trace.mixture is not None:
            own = trace.mixture.rows == row
            admitted, weight = trace.mixture.admitted[own], trace.mixture.weight[own]
        each = ask(admitted)
        share = torch.ones(1) if weight is None else weight.cpu()
        mean = (share.double()[:, None, None] * each).sum(0).clamp(0, 1)
        everything = ask(candidates[None])[0]
        single = candidates.nonzero().squeeze(1)
        beside = ask(torch.nn.functional.one_hot(single, len(names)).bool())
    chosen = int(answers.probabilities[answers.method][row].argmax())
    alone = answers.probabilities["observed_only"][row].tolist()
    gains: list[GainPart] = [
        gain(
            names[m],
            "blanks" if bool(observed[m]) else "missing",
            "trusted" if bool(trace.admitted[row, m]) else "rejected",
            p,
            alone,
            chosen,
        )
        for m, p in zip(single.tolist(), beside.tolist(), strict=True)
    ]
    unknown = ~observed & ~candidates
    return (
        DrawsPart(
            n=draws,
            seed=seed,
            central=CENTRAL,
            own=summarise(mean.tolist(), chosen),
            trust_all=summarise(everything.tolist(), chosen),
        ),
        AcquirePart(
            draws=draws,
            bits=entropy_bits(alone),
            probability=alone[chosen],
            gains=tuple(sorted(gains, key=lambda g: -g.bits)),
            unknown=tuple(n for n, u in zip(names, unknown.tolist(), strict=True) if u),
        ),
    )


def _fuse_draws(bundle: ModelBundle, answers: Answers, row: int, draws: int, seed: int) -> Fuse:
    """Return a `Fuse` over n copies of one record, each with another draw of its recoveries."""
    whole, candidates = answers.network, answers.recovery.candidates[row]
    alone = answers.batch.rows(torch.tensor([row], device=candidates.device))
    drawn = bundle.imputer.recover(alone, draws=draws, seed=seed).draws or {}
    observed = whole.observed[row].expand(draws, -1, -1)
    recovered = observed.clone()
    for m, spec in enumerate(bundle.specs):
        if bool(candidates[m]):
            values = drawn[spec.name][:, 0]  # (n, *shape)
            chunk = max(1, _MOST_VOXELS // values[0].numel())
            parts = values.split(chunk)
            tokens = torch.cat([bundle.backbone.encode(spec.name, p).values for p in parts])
            recovered[:, bundle.backbone.token_modality == m] = tokens
    available = whole.observed_available[row].expand(draws, -1)
    network = EncodedVersions(bundle.backbone, observed, available, recovered)
    if not isinstance(answers.fuse, Mixed):
        return network
    features = answers.fuse.observed[row].expand(draws, -1)
    made = features.clone()
    layout = answers.fuse.reference.model.layout
    for m, spec in enumerate(bundle.specs):
        if bool(candidates[m]):
            own = torch.tensor(layout.owner) == m
            made[:, own] = summary(drawn[spec.name][:, 0], spec).double().cpu()
    return replace(answers.fuse, network=network, observed=features, recovered=made)


def _subset_answers(
    bundle: ModelBundle, answers: Answers, row: int, prediction: Prediction
) -> list[list[float]]:
    """Return `(A, K)`: what each subset that was averaged over says by itself."""
    subsets = prediction.subsets
    if not subsets:
        return []
    device = answers.own.observed.device
    admitted = torch.tensor([[n in s.admitted for n in answers.own.names] for s in subsets])
    admitted = admitted.to(device)
    rows = torch.full((len(subsets),), row, device=device)
    with torch.inference_mode():
        used = answers.own.observed[row] | admitted
        logits = answers.fuse(rows, used, admitted).logits
    return bundle.calibration.probabilities(logits.cpu()).tolist()


def _prediction_set(
    bundle: ModelBundle, answers: Answers, row: int, pattern: str
) -> PredictionSetPart | None:
    """Return the classes that cannot be ruled out; None where the bundle cannot tell."""
    conformal, method = bundle.conformal, answers.method
    if conformal is None or method not in conformal.scores:
        return None
    found = conformal.sets(method, answers.probabilities[method][[row]].numpy(), [pattern])
    return PredictionSetPart(
        classes=tuple(
            c for c, inside in zip(bundle.task.classes, found.members[0], strict=True) if inside
        ),
        coverage=COVERAGE,
        compared_with=cast(Literal["pattern", "all"], found.group[0]),
        calibrated_on=int(found.calibrated_on[0]),
        least=FEWEST,
    )


def _held_back(bundle: ModelBundle) -> int:
    """Return on how many patients, on whom nothing was fitted, prediction sets rest."""
    if bundle.conformal is None:
        return 0
    bounds = bundle.conformal.scores.get(bundle.choice.name, {})
    return bounds[AS_THEY_CAME].patients if AS_THEY_CAME in bounds else 0


def _performance(bundle: ModelBundle, method: str, pattern: str) -> PerformancePart | None:
    """Return how good a selector is for such patients; None where the bundle does not say."""
    known = bundle.performance
    own = known.row(method, pattern) if known is not None else None
    if known is None or own is None:
        return None
    alone = next(
        (
            r
            for r in known.rows
            if (r.method, r.level, r.group) == ("observed_only", own.level, own.group)
        ),
        None,
    )

    def figures(row: PerformanceRow) -> FiguresPart:
        auroc, brier, ece = (
            IntervalPart(**asdict(interval)) for interval in (row.auroc, row.brier, row.ece)
        )
        return FiguresPart(method=row.method, auroc=auroc, brier=brier, ece=ece)

    number = known.patients.get(pattern, 0)
    return PerformancePart(
        level=own.level,
        group=own.group,
        patients=own.patients,
        cases=own.cases,
        own=figures(own),
        observed_only=None if alone is None else figures(alone),
        pattern_patients=number,
        tested_fewer_than_30=number < FEW_PATIENTS,
    )


def _rule(bundle: ModelBundle, trace: SelectionTrace) -> RulePart:
    """Return how the bundle's selector decides."""
    selector = bundle.selector
    if isinstance(selector, SubsetAverage):
        return RulePart(
            decides_by="weights", admits="all", calibration=_calibration(bundle), threshold=0.5
        )
    if not isinstance(selector, Dymo):
        everything = isinstance(selector, TrustAll)
        return RulePart(
            decides_by="rule",
            admits="everything" if everything else "nothing",
            calibration=None,
            threshold=0.0,
        )
    return RulePart(
        decides_by="trust" if isinstance(selector, Gate) else "reward",
        admits="all" if isinstance(selector, Simultaneous) else "one",
        calibration=_calibration(bundle),
        threshold=_bound(trace.threshold),
    )


def _calibration(bundle: ModelBundle) -> SimilarityCalibration:
    """Return the similarity calibration of a selector by reward."""
    asked: SimilarityCalibration | None = bundle.selector.options.calibration
    return asked or published_calibration(bundle.statistics.distance)


def _bound(threshold: float) -> float | None:
    """Return a threshold as JSON knows it: it has no infinity."""
    return threshold if isfinite(threshold) else None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _command(
    record_id: str, bundle: ModelBundle, seed: int, draws: int, flags: Mapping[str, bool]
) -> str:
    """Return how to get the same files again, without the paths of this machine."""
    words_ = ["dymo-med", "predict", "--patient-dir", record_id, "--bundle", bundle.name]
    words_ += ["--out", "OUT", "--selector", bundle.choice.name, "--device", str(bundle.device)]
    words_ += ["--seed", str(seed), "--draws", str(draws)]
    return shlex.join([*words_, *(flag for flag, given in flags.items() if given)])


def versions() -> dict[str, str]:
    """Return the versions of the software behind a result."""
    names = ("torch", "monai", "numpy", "captum")
    return {
        "dymo_med": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }


def _affine(
    spec: ModalitySpec, specs: Sequence[ModalitySpec], record: PatientRecord
) -> tuple[tuple[float, ...], ...] | None:
    """Return where a recovered volume lies: as the first observed one on the same kind of grid."""
    for other in specs:
        same = other.shape[1:] == spec.shape[1:] and other.spacing_mm == spec.spacing_mm
        if same and other.grid != "own" and other.name in record.modalities:
            affine = record.modalities[other.name].source.affine
            if affine is not None:
                return affine
    return None


def _cell(
    spec: ModalitySpec, column: Column, value: float, *, measured: bool, known: bool
) -> CellPart:
    """Return one table cell for the report; `known` = there is a value at all."""
    what: float | str | None = value if known else None
    text, share, rank = "", None, None
    if column.type == "categorical":
        index = round(value)
        inside = known and 0 <= index < len(column.values)
        text = column.values[index] if inside else ""
        what = text if inside else None
        share = column.frequencies[index] if inside and column.frequencies else None
    elif known:
        text = f"{value:.4g}"
        rank = percentile(value, column.percentiles) if column.percentiles else None
    return CellPart(
        modality=spec.name,
        column=column.name,
        value=what,
        text=text,
        unit=column.unit if column.type == "continuous" else "",
        percentile=rank,
        share=share,
        measured=measured,
    )


def unused_sentences(record: PatientRecord, specs: Sequence[ModalitySpec]) -> list[str]:
    """Return what a reader must know of files in the patient's folder that nobody looked at.

    Args:
        record: The record.
        specs: The modalities that were looked for.
    """
    if not record.unused:
        return []
    names = ["".join(c if c.isprintable() else "?" for c in f)[:100] for f in record.unused]
    files = ", ".join(names[:_MOST_FILES])
    if len(names) > _MOST_FILES:
        files += f" and {len(names) - _MOST_FILES} more"
    missing = [s.name for s in specs if s.name not in record.modalities]
    text = words()["warnings"]["unused_missing" if missing else "unused"]
    return [text.format(files=files, missing=", ".join(missing))]


def _warnings(
    bundle: ModelBundle,
    record: PatientRecord,
    own: Sequence[float],
    others: Mapping[str, Sequence[float]],
    steps: Sequence[SelectionStep],
    quality: Mapping[str, GateResult],
) -> tuple[str, ...]:
    """Return the sentences a reader must not miss."""
    text = words()["warnings"]
    classes = bundle.task.classes
    result = unused_sentences(record, bundle.specs)
    result += [f"{n}: {w}" for n, value in record.modalities.items() for w in value.warnings]
    predicted = int(np.argmax(own))
    for method, probabilities in others.items():
        other = int(np.argmax(probabilities))
        if other != predicted:
            sentence = text.get(f"flip_{method}", text["flip"])
            result.append(
                sentence.format(method=method, this=classes[predicted], other=classes[other])
            )
    result += [reason_sentence(r) for r in gate_reasons(quality_parts(quality))]
    borrowed = [s.modality for s in steps if s.borrowed and s.decision == "admitted"]
    if borrowed:
        result.append(text["borrowed"].format(modalities=", ".join(borrowed)))
    return tuple(result)
