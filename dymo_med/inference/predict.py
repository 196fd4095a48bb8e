"""One patient in a straight line: read, recover, encode, select, fuse, explain, write.

Cohort evaluation takes the same steps (`answer`, `explain_record`, `assemble`) on larger batches.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dymo_med import __version__
from dymo_med.backbones import EncodedVersions, encode_versions
from dymo_med.bundle import ModelBundle
from dymo_med.data.batch import collate
from dymo_med.data.patient import read_patient
from dymo_med.files import check_replaceable, complete_folder, write_csv, write_json
from dymo_med.inference.explain import Explanation, Subject, explain
from dymo_med.inference.report import Cell, Exhibits, Scan, State, percentile, words, write_report
from dymo_med.types import (
    Batch,
    Column,
    ModalitySpec,
    PatientRecord,
    Prediction,
    Recovery,
    SelectionStep,
    SelectionTrace,
    WeightedSubset,
)

SCHEMA_VERSION = 2
# Standard deviations from the training mean beyond which a value is called far from what was seen.
_FAR = 4.0

# Always answered side by side: discard, trust everything, the published rule.
COMPARED = ("observed_only", "trust_all", "dymo")
STEP_COLUMNS = tuple(SelectionStep.__dataclass_fields__)
RECOVERED = "recovered"
_WRITTEN = ("prediction.json", "selection.csv", "report.html", RECOVERED)


@dataclass(frozen=True)
class Answers:
    """What every method says of a batch, from one recovery and one encoding.

    Attributes:
        batch: B records, on the bundle's device.
        recovery: What was proposed for what they lack.
        method: The bundle's default selector.
        traces: Selection by method: `COMPARED`, the bundle's default, and what else was asked for.
        probabilities: Calibrated, float64 `(B, K)` on the CPU, by method.
        fuse: Over the B records, for further questions.
    """

    batch: Batch
    recovery: Recovery
    method: str
    traces: Mapping[str, SelectionTrace]
    probabilities: Mapping[str, Tensor]
    fuse: EncodedVersions

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
        fuse = encode_versions(bundle.backbone, batch, recovery)
        traces = {
            name: bundle.selectors[name].select(
                fuse, batch.observed, recovery.candidates, bundle.statistics
            )
            for name in dict.fromkeys((*COMPARED, *methods, bundle.choice.name))
        }
        probabilities = {
            name: calibrated(trace.output.logits, bundle.temperature)
            for name, trace in traces.items()
        }
    return Answers(batch, recovery, bundle.choice.name, traces, probabilities, fuse)


def calibrated(logits: Tensor, temperature: float) -> Tensor:
    """Return softmax(logits / temperature) in float64 on the CPU.

    Args:
        logits: `(B, K)`.
        temperature: Of the probability calibration.

    Returns:
        `(B, K)`.
    """
    return torch.softmax(logits.cpu().double() / temperature, dim=-1)


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
) -> Prediction:
    """Predict one patient from a folder.

    Args:
        patient_dir: The patient directory; its name is the record's id.
        bundle: The model.
        out: Folder for `prediction.json`, `selection.csv`, `report.html` and `recovered/`; it
            appears complete or not at all. None = write nothing.
        explain: Whether to compute attributions.
        seed: Seed of whatever is random.

    Returns:
        The prediction.

    Raises:
        PatientDataError: If the patient's files cannot be used.
        ConfigError: If `out` holds something else.
    """
    if out is not None:
        check_replaceable(out, "prediction.json", _WRITTEN)
    record = read_patient(patient_dir, bundle.specs, missing_values=bundle.missing_values)
    answers = answer(bundle, [record], seed=seed)
    explanation = explain_record(bundle, answers, 0, seed=seed) if explain else None
    prediction = assemble(bundle, record, answers, 0, explanation, seed=seed)
    if out is not None:
        with complete_folder(out, "prediction.json", _WRITTEN) as folder:
            files = write_recovered(bundle, record, answers, 0, folder / RECOVERED)
            write_json(folder / "prediction.json", to_json(prediction, bundle, files))
            write_csv(folder / "selection.csv", STEP_COLUMNS, [asdict(s) for s in prediction.steps])
            exhibits = exhibits_of(bundle, record, answers, 0, explanation)
            write_report(prediction, exhibits, folder / "report.html")
    return prediction


def impute_patient(
    patient_dir: Path, bundle: ModelBundle, out: Path, *, seed: int = 0
) -> list[Path]:
    """Write what the imputer proposes for one patient, and nothing else.

    Args:
        patient_dir: The patient directory.
        bundle: The model.
        out: Folder for `recovered/`; it appears complete or not at all.
        seed: Seed of whatever is random.

    Returns:
        The files, all under `out / "recovered"`.

    Raises:
        PatientDataError: If the patient's files cannot be used.
        ConfigError: If `out` holds something else.
    """
    marker = f"{RECOVERED}/recovered.json"
    check_replaceable(out, marker, (RECOVERED,))
    record = read_patient(patient_dir, bundle.specs, missing_values=bundle.missing_values)
    answers = answer(bundle, [record], seed=seed)
    with complete_folder(out, marker, (RECOVERED,)) as folder:
        files = write_recovered(bundle, record, answers, 0, folder / RECOVERED)
        write_json(
            folder / marker,
            {
                "schema_version": SCHEMA_VERSION,
                "record_id": record.record_id,
                "synthetic": True,
                "files": files,
                "bundle": {"name": bundle.name, "id": bundle.bundle_id},
                "seed": seed,
                "sources": {n: asdict(v.source) for n, v in record.modalities.items()},
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
        temperature=bundle.temperature,
        base_rates=bundle.base_rates,
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
) -> Prediction:
    """Gather one record's prediction.

    Args:
        bundle: The model.
        record: The record in that row.
        answers: Of a batch.
        row: Which record of it.
        explanation: None = no attributions.
        seed: Of the run.
    """
    trace, recovery = answers.own, answers.recovery
    names = trace.names

    def pick(available: Tensor) -> tuple[str, ...]:
        return tuple(n for n, a in zip(names, available[row].tolist(), strict=True) if a)

    steps = selection_steps(trace, row)
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
        warnings=_warnings(bundle, record, own, probabilities, steps),
        sources={name: value.source for name, value in record.modalities.items()},
        bundle_id=bundle.bundle_id,
        bundle_name=bundle.name,
        seed=seed,
        base_rates=bundle.base_rates,
        subsets=weighted_subsets(trace, row),
    )


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
) -> Exhibits:
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
    cells: list[Cell] = []
    for m, spec in enumerate(bundle.specs):
        observed, candidate = bool(trace.observed[row, m]), bool(recovery.candidates[row, m])
        if not observed and not candidate:
            continue
        values = recovery.values[spec.name][row].cpu().numpy()
        if spec.columns:
            filled = batch.observed_fields[spec.name][row].tolist()
            cells += [
                _cell(spec, column, float(value), measured=measured, known=measured or candidate)
                for column, value, measured in zip(spec.columns, values, filled, strict=True)
            ]
        else:
            state: State = (
                "observed" if observed else "trusted" if trace.admitted[row, m] else "rejected"
            )
            shown = saliency.maps.get(spec.name) if saliency is not None else None
            scans.append(
                Scan(
                    modality=spec.name,
                    values=values,
                    spacing_mm=spec.spacing_mm,
                    state=state,
                    zero_is_background=spec.intensity == "zscore",
                    saliency=None if shown is None else shown.cpu().numpy(),
                )
            )
    return Exhibits(
        target=bundle.task.target,
        bundle_version=bundle.version,
        bundle_description=bundle.description,
        versions=versions(),
        device=str(bundle.device),
        selector_why=bundle.choice.why,
        scans=tuple(scans),
        cells=tuple(cells),
        convergence=saliency.convergence if saliency is not None else None,
    )


def to_json(
    prediction: Prediction, bundle: ModelBundle, files: Mapping[str, str]
) -> dict[str, Any]:
    """Return `prediction.json`.

    Args:
        prediction: The answer.
        bundle: The model behind it.
        files: Recovered files by modality, relative to the output folder.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        **asdict(prediction),
        "predicted": prediction.classes[int(np.argmax(prediction.probabilities))],
        "target": bundle.task.target,
        "method_why": bundle.choice.why,
        "recovered_files": dict(files),
        "bundle_version": bundle.version,
        "device": str(bundle.device),
        "versions": versions(),
    }


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
        if same and other.name in record.modalities:
            affine = record.modalities[other.name].source.affine
            if affine is not None:
                return affine
    return None


def _cell(spec: ModalitySpec, column: Column, value: float, *, measured: bool, known: bool) -> Cell:
    """Return one table cell for the report; `known` = there is a value at all."""
    if column.type == "categorical":
        index = round(value)
        text = column.values[index] if known and 0 <= index < len(column.values) else ""
        share = column.frequencies[index] if text and column.frequencies else None
        return Cell(spec.name, column.name, text, "", None, share, measured)
    text = f"{value:.4g}" if known else ""
    rank = percentile(value, column.percentiles) if known and column.percentiles else None
    return Cell(spec.name, column.name, text, column.unit, rank, None, measured)


def _warnings(
    bundle: ModelBundle,
    record: PatientRecord,
    own: Sequence[float],
    others: Mapping[str, Sequence[float]],
    steps: Sequence[SelectionStep],
) -> tuple[str, ...]:
    """Return the sentences a reader must not miss."""
    text = words()["warnings"]
    classes = bundle.task.classes
    result = [f"{n}: {w}" for n, value in record.modalities.items() for w in value.warnings]
    predicted = int(np.argmax(own))
    for method, probabilities in others.items():
        other = int(np.argmax(probabilities))
        if other != predicted:
            sentence = text.get(f"flip_{method}", text["flip"])
            result.append(
                sentence.format(method=method, this=classes[predicted], other=classes[other])
            )
    for spec in bundle.specs:
        value = record.modalities.get(spec.name)
        if value is None or value.observed_fields is None:
            continue
        outside = [
            column.name
            for column, x, filled in zip(
                spec.columns, value.values.tolist(), value.observed_fields.tolist(), strict=True
            )
            if filled
            and column.mean is not None
            and column.std is not None
            and abs(x - column.mean) > _FAR * column.std
        ]
        if outside:
            result.append(text["outside"].format(modality=spec.name, columns=", ".join(outside)))
    borrowed = [s.modality for s in steps if s.borrowed and s.decision == "admitted"]
    if borrowed:
        result.append(text["borrowed"].format(modalities=", ".join(borrowed)))
    return tuple(result)
