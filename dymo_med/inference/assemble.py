"""From a batch's answers to one record's prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isnan

import numpy as np
from torch import Tensor

from dymo_med.bundle import ModelBundle
from dymo_med.bundle_segmentation import SegmentationBundle
from dymo_med.data.gate import judge
from dymo_med.inference.answer import Answers
from dymo_med.inference.explain import Explanation
from dymo_med.inference.prediction_file import (
    NoveltyPart,
    ReasonPart,
    gate_reasons,
    novelty_reasons,
    quality_parts,
)
from dymo_med.inference.report import reason_sentence, words
from dymo_med.privacy import shown
from dymo_med.survival import Statement
from dymo_med.types import (
    GateResult,
    ModalitySpec,
    PatientRecord,
    Prediction,
    SelectionStep,
    SelectionTrace,
    Source,
    Value,
    WeightedSubset,
)

_MOST_FILES = 10  # that are named in a sentence
STEP_COLUMNS = tuple(SelectionStep.__dataclass_fields__)


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
    said = value_of(bundle, answers, row)
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
        warnings=_warnings(
            *(bundle, record, trace, row, own, probabilities, steps, quality),
            novelty_reasons(novelty_part(bundle, answers, row)),
        ),
        sources=sources_of(record, identify),
        bundle_id=bundle.bundle_id,
        bundle_name=bundle.name,
        seed=seed,
        base_rates=bundle.base_rates,
        subsets=weighted_subsets(trace, row),
        value=said if isinstance(said, Value) else None,
        survival=said if isinstance(said, Statement) else None,
        quality=quality,
        refused=tuple(record.refused),
    )


def value_of(bundle: ModelBundle, answers: Answers, row: int) -> Value | Statement | None:
    """Return what is answered besides probabilities; None of tasks without such a thing.

    Args:
        bundle: The model.
        answers: Of a batch.
        row: Which record of it.
    """
    return bundle.task.value_of(
        {method: p[row] for method, p in answers.probabilities.items()},
        answers.method,
        "+".join(answers.batch.observed.of(row)),
        bundle.conformal,
        bundle.calibration,
    )


def sources_of(record: PatientRecord, identify: bool) -> dict[str, Source]:
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


def novelty_part(bundle: ModelBundle, answers: Answers, row: int) -> NoveltyPart | None:
    """Return whether one record is like those of training; None where the bundle cannot say.

    Args:
        bundle: The model.
        answers: Of a batch.
        row: Which record of it.
    """
    if bundle.novelty is None:
        return None
    found = answers.unusual[row]
    return NoveltyPart(
        state=found.state,
        p=found.p,
        patients=found.patients,
        least=found.least,
        modalities=dict(found.modalities),
        alarm=bundle.novelty.alarm,
        strange=bundle.novelty.strange,
        apart=found.apart,
    )


def _warnings(
    bundle: ModelBundle,
    record: PatientRecord,
    trace: SelectionTrace,
    row: int,
    own: Sequence[float],
    others: Mapping[str, Sequence[float]],
    steps: Sequence[SelectionStep],
    quality: Mapping[str, GateResult],
    unlike: Sequence[ReasonPart] = (),
) -> tuple[str, ...]:
    """Return the sentences a reader must not miss."""
    text = words()["warnings"]
    classes = bundle.task.classes
    result = unused_sentences(record, bundle.specs)
    result += [f"{n}: {w}" for n, value in record.modalities.items() for w in value.warnings]
    predicted = int(np.argmax(own))
    # In which of many bins a time lies is not what is asked.
    methods = {} if bundle.calibration.bins is not None else others
    for method, probabilities in methods.items():
        other = int(np.argmax(probabilities))
        if other != predicted:
            sentence = text.get(f"flip_{method}", text["flip"])
            result.append(
                sentence.format(method=method, this=classes[predicted], other=classes[other])
            )
    result += [reason_sentence(r) for r in gate_reasons(quality_parts(quality))]
    result += [reason_sentence(r) for r in unlike]
    trusted = [n for n, t in zip(trace.names, trace.admitted[row].tolist(), strict=True) if t]
    for found in bundle.draw_check.failing if bundle.draw_check is not None and trusted else ():
        if found.check == "martingale" or found.part in trusted:
            sentence = text[f"draws_{found.check}"]
            share = found.value.value or 0.0
            result.append(
                sentence.format(
                    imputer=bundle.imputer_entry["name"],
                    part=found.part,
                    share=f"{share:.0%}",
                    points=f"{100 * share:+.1f}",
                )
            )
    borrowed = [s.modality for s in steps if s.borrowed and s.decision == "admitted"]
    if borrowed:
        result.append(text["borrowed"].format(modalities=", ".join(borrowed)))
    return tuple(result)
