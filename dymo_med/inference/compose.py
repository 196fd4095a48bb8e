"""Everything that is written about one prediction, put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import floor, isnan, log10, nan
from typing import Any

import numpy as np
import torch

from dymo_med.bundle import ModelBundle
from dymo_med.conformal import AS_THEY_CAME
from dymo_med.inference.answer import Answers
from dymo_med.inference.draws import draw_answers
from dymo_med.inference.explain import MOST_ERROR, Explanation
from dymo_med.inference.pictures import SIGMA, Scan, draw
from dymo_med.inference.prediction_file import (
    CENTRAL,
    SCHEMA_VERSION,
    CellPart,
    ContrastPart,
    ConvergencePart,
    ExhibitsPart,
    PredictionFile,
    RulePart,
    State,
    frequency,
)
from dymo_med.inference.report import percentile
from dymo_med.inference.software import versions
from dymo_med.inference.standing import bound_of, standing
from dymo_med.references import features_of
from dymo_med.types import Column, ModalitySpec, PatientRecord, Prediction, SelectionTrace


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
    tables = [
        s.name
        for m, s in enumerate(bundle.specs)
        if s.columns and bool(recovery.candidates[row, m])
    ]
    alone = batch.rows(torch.tensor([row], device=trace.observed.device))
    with torch.inference_mode():
        found = bundle.imputer.cell_intervals(alone, tables, CENTRAL) if tables else {}
    intervals = {
        name: list(zip(low[0].tolist(), high[0].tolist(), strict=True))
        for name, (low, high) in found.items()
    }
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
                    ends=ends,
                )
                for column, value, measured, ends in zip(
                    spec.columns,
                    values.tolist(),
                    filled,
                    intervals.get(spec.name, [None] * len(filled)),
                    strict=True,
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
    chosen = int(np.argmax(prediction.probabilities))
    drawn, acquire = draw_answers(bundle, answers, row, draws=draws, seed=prediction.seed)
    stands = standing(bundle, answers, row, prediction, drawn)
    provenance = bundle.provenance
    shares = _subset_answers(bundle, answers, row, prediction)
    return PredictionFile.make(
        {
            "schema_version": SCHEMA_VERSION,
            **{k: v for k, v in asdict(prediction).items() if k != "reasons"},
            "quality": {name: part.model_dump() for name, part in stands.quality.items()},
            "target": bundle.task.target,
            "predicted": prediction.classes[chosen],
            "status": stands.status,
            "status_reasons": [r.model_dump() for r in stands.reasons],
            "frequency": frequency(
                prediction.classes[chosen],
                prediction.probabilities[chosen],
                *bundle.calibration.count(answers.method, prediction.probabilities[chosen]),
            ).model_dump(),
            "prediction_set": stands.prediction_set and stands.prediction_set.model_dump(),
            "method_why": _why(bundle, trace, row),
            "rule": _rule(bundle, trace, row).model_dump(),
            "steps": [s.model_dump() for s in stands.steps],
            "subsets": [
                {**asdict(s), "probabilities": p}
                for s, p in zip(prediction.subsets, shares, strict=True)
            ],
            "draws": drawn and drawn.model_dump(),
            "acquire": acquire and acquire.model_dump(),
            "performance": stands.performance and stands.performance.model_dump(),
            "limits": {
                "task": bundle.task.about,
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
            "novelty": stands.novelty and stands.novelty.model_dump(),
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


def _held_back(bundle: ModelBundle) -> int:
    """Return on how many patients, on whom nothing was fitted, prediction sets rest."""
    if bundle.conformal is None:
        return 0
    bounds = bundle.conformal.scores.get(bundle.choice.name, {})
    return bounds[AS_THEY_CAME].patients if AS_THEY_CAME in bounds else 0


def _rule(bundle: ModelBundle, trace: SelectionTrace, row: int) -> RulePart:
    """Return how the bundle's selector decides."""
    selector = bundle.selector
    return RulePart(
        decides_by=selector.decides_by,
        admits=selector.admits_in(trace, row),
        calibration=selector.similarity_calibration(bundle.statistics.distance),
        threshold=bound_of(trace.threshold),
    )


def _why(bundle: ModelBundle, trace: SelectionTrace, row: int) -> str:
    """Return why the bundle's selector is what it is, and what it can promise here."""
    return f"{bundle.choice.why} {bundle.selector.promise(trace, row)}".rstrip()


def _cell(
    spec: ModalitySpec,
    column: Column,
    value: float,
    *,
    measured: bool,
    known: bool,
    ends: tuple[float, float] | None = None,
) -> CellPart:
    """Return one table cell for the report.

    Args:
        spec: The table.
        column: Its column.
        value: In the column's unit, or the category's index.
        measured: Whether it was.
        known: Whether there is a value at all.
        ends: Between which numbers a recovered one is thought to lie; None = not stated.
    """
    low, high = ends if ends is not None and known and not measured else (nan, nan)
    what: float | str | None = value if known else None
    text, share, rank = "", None, None
    if column.type == "categorical":
        index = round(value)
        inside = known and 0 <= index < len(column.values)
        text = column.values[index] if inside else ""
        what = text if inside else None
        share = column.frequencies[index] if inside and column.frequencies else None
    elif known:
        text = f"{value:.4g}" if isnan(low) else made_up(value, low, high)
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
        low=None if isnan(low) else low,
        high=None if isnan(high) else high,
    )


def made_up(value: float, low: float, high: float) -> str:
    """Return a recovered number for people: as many digits as its interval allows, and that.

    Example:
        >>> made_up(81.6789, 64.4321, 98.9)
        '82 (64 to 99)'
    """
    digits = max(0, 1 - floor(log10(high - low))) if high > low else 3
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
