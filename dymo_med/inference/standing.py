"""Whether an answer stands: prediction set, performance for such patients, status and reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Literal, cast

from dymo_med.bundle import ModelBundle
from dymo_med.conformal import COVERAGE, FEWEST
from dymo_med.inference.answer import Answers
from dymo_med.inference.assemble import novelty_part
from dymo_med.inference.prediction_file import (
    FEW_PATIENTS,
    DrawsPart,
    FiguresPart,
    IntervalPart,
    NoveltyPart,
    PerformancePart,
    PredictionFile,
    PredictionSetPart,
    QualityPart,
    ReasonPart,
    Status,
    StepPart,
    decision,
    gate_reasons,
    quality_parts,
    status_of,
)
from dymo_med.inference.report import reason_sentence
from dymo_med.types import PerformanceRow, Prediction


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


def bound_of(threshold: float) -> float | None:
    """Return a threshold as JSON knows it: it has no infinity."""
    return threshold if isfinite(threshold) else None


@dataclass(frozen=True)
class Standing:
    """Whether an answer stands, and what that is judged by.

    Attributes:
        status: `answered`, `caution` or `abstained`.
        reasons: Why not `answered`.
        steps: The selection, as it is written.
        prediction_set: None where the bundle cannot tell; likewise the next.
        performance: How good the bundle is for such patients.
        quality: Of each modality, by the quality gate.
        novelty: Whether the patient is like those of training.
    """

    status: Status
    reasons: tuple[ReasonPart, ...]
    steps: tuple[StepPart, ...]
    prediction_set: PredictionSetPart | None
    performance: PerformancePart | None
    quality: Mapping[str, QualityPart]
    novelty: NoveltyPart | None


def standing(
    bundle: ModelBundle,
    answers: Answers,
    row: int,
    prediction: Prediction,
    drawn: DrawsPart | None = None,
) -> Standing:
    """Return whether an answer stands.

    Args:
        bundle: The model.
        answers: Of a batch.
        row: Which record of it.
        prediction: What `assemble` returned for it.
        drawn: What other recoveries would have answered; None = nobody asked.
    """
    pattern = "+".join(answers.batch.observed.of(row))
    steps = tuple(
        StepPart(**(asdict(s) | {"threshold": bound_of(s.threshold)})) for s in prediction.steps
    )
    found = _prediction_set(bundle, answers, row, pattern)
    tested = _performance(bundle, answers.method, pattern)
    quality = quality_parts(prediction.quality)
    novelty = novelty_part(bundle, answers, row)
    alone = answers.probabilities["observed_only"][row].tolist()
    status, why = status_of(
        *decision(prediction.classes, prediction.probabilities, alone, prediction.survival),
        found,
        drawn,
        tested,
        steps,
        gate_reasons(quality),
        novelty,
    )
    return Standing(status, why, steps, found, tested, quality, novelty)


def judged(prediction: Prediction, stands: Standing | PredictionFile) -> Prediction:
    """Return a prediction that says whether it stands.

    Args:
        prediction: What `assemble` returned.
        stands: Of the same record, or the file that says so.
    """
    found = stands.prediction_set
    why = stands.reasons if isinstance(stands, Standing) else stands.status_reasons
    return replace(
        prediction,
        status=stands.status,
        reasons=tuple(map(reason_sentence, why)),
        prediction_set=None if found is None else found.classes,
    )
