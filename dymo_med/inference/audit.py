"""Audit of an earlier prediction: are its files what was written, and does the decision follow?

Nothing is asked of a network: what is checked follows from the numbers in the folder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dymo_med import __version__
from dymo_med.errors import PatientDataError, Problem
from dymo_med.files import csv_text
from dymo_med.inference.prediction_file import (
    AcquirePart,
    PredictionFile,
    StepPart,
    content_sha256,
    decision,
    entropy_bits,
    frequency,
    gain,
    gate_reasons,
    read_prediction,
    rubin,
    status_of,
    summarise,
)
from dymo_med.inference.report import render

# Numbers that were computed in double precision, and those that came out of a network.
_EXACT, _NETWORK = 1e-9, 1e-5
_TINY = 2.2250738585072014e-308  # smallest normal number, as the reward has it

_AGAIN = "Predict again"
# Decisions after which the answer is a mean over draws.
_DRAWN = ("draws", "guard")
Decision = Literal["admitted", "rejected", "not yet", "stopped"]


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        problems: Everything that is wrong.
        admitted: What the replayed decision admits, in canonical order; None if it could not be
            replayed.
        reproduced: Whether that, and the final choice, are what the file says.
    """

    problems: tuple[Problem, ...]
    admitted: tuple[str, ...] | None
    reproduced: bool


def audit(folder: Path) -> Audit:
    """Check the folder of a prediction.

    Args:
        folder: With `prediction.json`, as `predict` or `evaluate` wrote it.

    Returns:
        Every problem at once.
    """
    path = folder / "prediction.json"
    try:
        file = read_prediction(path)
    except PatientDataError as error:
        return Audit(error.problems, None, False)
    problems: list[Problem] = []
    if content_sha256(file) != file.content_sha256:
        problems.append(
            Problem(
                str(path),
                "it was changed after it was written",
                expected="content_sha256 to be that of its content",
                remedy=_AGAIN,
            )
        )
    problems += _files(folder, file)
    problems += [_contradiction(path, *found) for found in _contradictions(file)]
    admitted, wrong = replay(file)
    problems += [_contradiction(path, *found) for found in wrong]
    final = [_contradiction(path, *found) for found in _final(file, admitted)]
    problems += final
    return Audit(tuple(problems), admitted, not wrong and not final)


def _contradiction(path: Path, where: str, what: str) -> Problem:
    """Return the problem of a place in a prediction that contradicts another."""
    expected = "numbers that follow from one another"
    return Problem(f"{path}: {where}", what, expected=expected, remedy=_AGAIN)


def replay(file: PredictionFile) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """Decide again from what `steps` say of the candidates.

    Factors and rewards are computed again from qualities and similarities; then the rule is
    followed step by step.

    Args:
        file: A prediction.

    Returns:
        What is admitted, and every step that does not follow, as (where, what).
    """
    rule = file.rule
    wrong: list[tuple[str, str]] = []
    if rule.decides_by in ("rule", *_DRAWN):
        if file.steps:
            wrong.append(("steps", "a rule that looks at nothing has no steps"))
        return (file.recovered if rule.admits == "everything" else ()), wrong
    wrong += _arithmetic(file)
    wrong += _agreement(file)
    if rule.decides_by == "weights":
        wrong += _weights(file)
    rounds: dict[int, list[StepPart]] = {}
    for step in file.steps:
        rounds.setdefault(step.step, []).append(step)
    open_ = set(file.recovered)
    admitted: list[str] = []
    before: tuple[float, float] | None = None
    number = 0
    while open_:
        number += 1
        steps = rounds.pop(number, [])
        if {s.modality for s in steps} != open_ or len(steps) != len(open_):
            wrong.append((f"steps {number}", f"the candidates should be {_listed(open_)}"))
            break
        states = {(s.quality_before, s.similarity_before) for s in steps}
        if len(states) != 1 or (before is not None and states != {before}):
            wrong.append((f"steps {number}", "it does not go on from where the last one ended"))
        if rule.admits == "all":
            own = [s for s in steps if _above(_score(s), rule.threshold)]
            left: set[str] = set()
        else:
            best = max(steps, key=_score)  # the first one on a tie
            own = [best] if _above(_score(best), rule.threshold) else []
            left = {s.modality for s in steps if own and s not in own and _score(s) >= 0}
        for step in steps:
            expected = _decision(step, step in own, step.modality in left, rule.threshold)
            if step.decision != expected:
                where = f"steps {number}, {step.modality}"
                wrong.append((where, f"the decision should be '{expected}'"))
        admitted += [s.modality for s in own]
        if own:
            before = (own[0].quality_after, own[0].similarity_after)
        open_ = left
    if rounds:
        wrong.append(("steps", f"nothing is left to decide after step {number}"))
    order = [n for n in file.recovered if n in admitted]
    return tuple(order), wrong


def _score(step: StepPart) -> float:
    """Return what decides about a candidate."""
    return step.reward if step.trust is None else step.trust


def _above(score: float, threshold: float | None) -> bool:
    """Return whether a score suffices; nothing does where there is no threshold."""
    return threshold is not None and score > threshold


def _decision(step: StepPart, won: bool, again: bool, threshold: float | None) -> Decision:
    if again:
        return "not yet"
    if won:
        return "admitted"
    refused = step.reward < 0 if step.trust is None else not _above(step.trust, threshold)
    return "rejected" if refused else "stopped"


def _arithmetic(file: PredictionFile) -> Iterator[tuple[str, str]]:
    """Yield factors and rewards that do not follow from qualities and similarities."""
    for step in file.steps:
        where = f"steps {step.step}, {step.modality}"
        before, after = step.similarity_before, step.similarity_after
        factor = 1.0
        if file.rule.calibration != "none" and after < before:
            ratio = file.rule.calibration == "ratio"
            factor = math.exp(after - before) if ratio else before / min(after, -_TINY)
            factor = min(max(factor, 0.0), 1.0)
        if not _near(factor, step.factor, _EXACT):
            yield where, "the factor does not follow from the similarities"
        if not _near(factor * step.quality_after - step.quality_before, step.reward, _EXACT):
            yield where, "the reward does not follow from the qualities and the factor"
        if not (0 <= step.quality_before <= 1 and 0 <= step.quality_after <= 1):
            yield where, "a quality is not between 0 and 1"
        if before > 0 or after > 0:
            yield where, "a similarity, the logarithm of a probability, is above 0"


def _agreement(file: PredictionFile) -> Iterator[tuple[str, str]]:
    """Yield steps that do not go by the rule: another threshold, trust where there is none."""
    fitted = file.rule.decides_by in ("trust", "weights")
    for step in file.steps:
        where = f"steps {step.step}, {step.modality}"
        if step.threshold != file.rule.threshold:
            yield where, "the threshold is not that of the rule"
        if (step.trust is not None) != fitted:
            yield where, f"the selector decides by {file.rule.decides_by}"
        if step.version != ("completed" if step.modality in file.observed else "recovered"):
            yield where, "the version does not fit what was observed"


def _weights(file: PredictionFile) -> Iterator[tuple[str, str]]:
    """Yield what does not add up in an average over subsets."""
    if not file.recovered:
        return
    if not _near(sum(s.weight for s in file.subsets), 1.0, 1e-6):
        yield "subsets", "the weights do not add up to 1"
    if len({s.admitted for s in file.subsets}) != len(file.subsets):
        yield "subsets", "a subset occurs twice"
    shares = file.trust
    for step in file.steps:
        if step.trust is not None and not _near(shares.get(step.modality, 0.0), step.trust, 1e-6):
            where = f"steps {step.step}, {step.modality}"
            yield where, "the trust is not the weight of the subsets with it"
    mean = [
        sum(s.weight * s.probabilities[k] for s in file.subsets if k < len(s.probabilities))
        for k in range(len(file.classes))
    ]
    if not _same(mean, file.probabilities, 10 * _NETWORK):
        yield "probabilities", "they are not the weighted mean of the subsets' own"


def _final(file: PredictionFile, admitted: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield what the file says of the outcome that the replayed decision does not."""
    kept = set(admitted)
    if kept != set(file.trusted):
        yield "trusted", f"by its own steps the decision admits {_listed(kept)}"
    if set(file.rejected) != set(file.recovered) - kept:
        left = set(file.recovered) - kept
        yield "rejected", f"by its own steps the decision leaves out {_listed(left)}"
    if file.rule.decides_by != "weights":
        for method, same in (
            ("observed_only", not kept),
            (
                "trust_all",
                kept == set(file.recovered) and not (kept and file.rule.decides_by in _DRAWN),
            ),
        ):
            other = file.alternatives.get(method)
            if same and other is not None and not _same(other, file.probabilities, _NETWORK):
                yield "probabilities", f"the same was used as by {method}, whose answer differs"
    known = len(file.probabilities) == len(file.classes)
    if known and file.predicted != file.classes[file.chosen]:
        yield "predicted", "it is not the most probable class"


def _contradictions(file: PredictionFile) -> Iterator[tuple[str, str]]:
    """Yield parts that do not follow from others."""
    k = len(file.classes)
    answers = {"probabilities": file.probabilities, "base_rates": file.base_rates}
    answers |= {f"alternatives.{m}": p for m, p in file.alternatives.items()}
    broken = [n for n, p in answers.items() if len(p) != k or not _near(sum(p), 1.0, _NETWORK)]
    for name in broken:
        yield name, f"{k} probabilities should add up to 1"
    if len(set(file.classes)) != k:
        yield "classes", "a class occurs twice"
    if set(file.trusted) & set(file.rejected):
        yield "trusted", "what is trusted cannot be rejected"
    missing = set(file.recovered) - set(file.observed)
    if set(file.recovered) & set(file.observed) - set(file.partly):
        yield "recovered", "only a table with blank cells can be observed and recovered"
    if (missing | set(file.observed)) & set(file.absent):
        yield "absent", "what is there cannot be absent"
    if set(file.refused) & set(file.observed):
        yield "refused", "what was refused cannot be observed"
    if set(file.quality) != {*file.observed, *file.refused}:
        yield "quality", "it is not about the observed and the refused modalities"
    for name, part in file.quality.items():
        levels = {finding.level for finding in part.findings}
        state = "refuse" if "refuse" in levels else "warn" if levels else "pass"
        if part.state != state:
            yield f"quality, {name}", "the state does not follow from the findings"
        if (state == "refuse") != (name in file.refused):
            yield f"quality, {name}", "what is refused, and only that, counts as missing"
    if set(file.sources) != set(file.observed):
        yield "sources", "they are not those of the observed modalities"
    if broken or len(set(file.classes)) != k:
        return
    chosen = file.chosen
    counted = (file.frequency.patients, file.frequency.right)
    if file.frequency != frequency(file.classes[chosen], file.probabilities[chosen], *counted):
        yield "frequency", "it does not follow from the probability"
    if counted[1] > counted[0]:
        yield "frequency", "more answers were right than were counted"
    if file.prediction_set is not None:
        inside = file.prediction_set.classes
        if file.classes[chosen] not in inside or not set(inside) <= set(file.classes):
            yield "prediction_set", "it does not hold the answer, or holds an unknown class"
        few = file.prediction_set.calibrated_on < file.prediction_set.least
        if few and len(inside) < k:
            yield "prediction_set", "too few patients to rule out what it leaves out"
    yield from _number(file)
    if file.performance is not None:
        few = file.performance.pattern_patients < 30
        if few != file.performance.tested_fewer_than_30:
            yield "performance", "whether few were tested does not follow from their number"
    if file.draws is not None:
        for name, drawn in (("own", file.draws.own), ("trust_all", file.draws.trust_all)):
            shape = {len(p) for p in drawn.probabilities}
            if len(drawn.probabilities) != file.draws.n or shape != {k}:
                yield f"draws.{name}", "there are not as many answers as draws"
            elif drawn != summarise(drawn.probabilities, chosen):
                yield f"draws.{name}", "the summary does not follow from the draws"
        parts, said = file.draws.variance, [p[chosen] for p in file.draws.own.probabilities]
        if parts is not None and said:
            # What single networks say is not in the file; the rest follows from the draws.
            expected = rubin(said, None if parts.model is None else [parts.model])
            if not all(
                _near(getattr(parts, key), getattr(expected, key), _EXACT)
                for key in ("total", "recovery", "absence")
            ):
                yield "draws.variance", "its parts do not follow from the draws"
    if file.acquire is not None:
        yield from _acquire(file, file.acquire)
    alone = file.alternatives.get("observed_only", file.probabilities)
    status = status_of(
        *decision(file.classes, file.probabilities, alone, file.survival),
        file.prediction_set,
        file.draws,
        file.performance,
        file.steps,
        gate_reasons(file.quality),
        file.novelty,
    )
    if status != (file.status, file.status_reasons):
        yield "status", "it does not follow from the rest"
    yield from _attributions(file)


def _number(file: PredictionFile) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the number of a regression."""
    found = file.value
    if found is None:
        return
    if len(found.centers) != len(file.classes):
        yield "value", "there are not as many centres as bands"
        return
    answers = {**file.alternatives, file.method: file.probabilities}
    said = {**found.alternatives, file.method: found.value}
    if set(said) != set(answers):
        yield "value", "its methods are not those of the probabilities"
        return
    for method, p in answers.items():
        mean = sum(c * share for c, share in zip(found.centers, p, strict=True))
        if not _near(mean, said[method], _NETWORK):
            yield "value", f"that of {method} is not the mean of the bands' centres"
    ends = (found.low, found.high)
    if None not in ends and not ends[0] <= found.value <= ends[1]:  # type: ignore[operator]
        yield "value", "it is not within its interval"


def _acquire(file: PredictionFile, acquire: AcquirePart) -> Iterator[tuple[str, str]]:
    """Yield what does not follow from the draws put in as if observed."""
    k, chosen = len(file.classes), file.chosen
    alone = file.alternatives.get("observed_only", file.probabilities)
    if not _near(acquire.bits, entropy_bits(alone), _EXACT):
        yield "acquire", "the entropy is not that of the answer by measurements alone"
    if not _near(acquire.probability, alone[chosen], _EXACT):
        yield "acquire", "the probability is not that by measurements alone"
    for found in acquire.gains:
        rows = found.probabilities
        if len(rows) != acquire.draws or any(len(p) != k for p in rows):
            yield f"acquire, {found.modality}", "there are not as many answers as draws"
        elif found != gain(found.modality, found.kind, found.state, rows, alone, chosen):
            yield f"acquire, {found.modality}", "the figures do not follow from the draws"
    if sorted(acquire.gains, key=lambda g: -g.bits) != list(acquire.gains):
        yield "acquire", "the order is not by the drop of entropy"


def _attributions(file: PredictionFile) -> Iterator[tuple[str, str]]:
    """Yield attributions that do not add up, or are to what was not used."""
    used = {*file.observed, *file.trusted, *(n for s in file.subsets for n in s.admitted)}
    for found in file.attributions:
        if found.modality not in used:
            yield "attributions", f"{found.modality} was not used"
    shares = [a.value for a in file.attributions if a.method.startswith("shapley")]
    change = file.probabilities[file.chosen] - file.base_rates[file.chosen]
    if shares and not _near(sum(shares), change, _NETWORK):
        yield "attributions", "they do not add up to the probability minus the base rate"
    for scan in file.exhibits.scans:
        if scan.overlays and scan.modality not in used:
            yield "exhibits", f"{scan.modality} was not used but has a saliency"


def _files(folder: Path, file: PredictionFile) -> Iterator[Problem]:
    """Yield files that are absent, changed, or do not belong to the prediction."""
    root = folder.resolve()
    whole = file.command is not None  # an evaluation keeps no recovered files and no table
    listed = {f.file for f in file.recovered_files.values()}
    if whole and set(file.recovered_files) != set(file.recovered):
        yield Problem(
            str(folder / "prediction.json"),
            "the recovered files are not those of what was recovered",
            expected=_listed(file.recovered),
            got=_listed(file.recovered_files),
            remedy=_AGAIN,
        )
    for name, made in file.recovered_files.items():
        where, path = f"{folder}: {made.file:.300}", folder / made.file
        if Path(made.file).is_absolute() or not path.resolve().is_relative_to(root):
            what = f"the file of {name} is not in the folder"
            yield Problem(where, what, expected="a file inside it", remedy=_AGAIN)
        elif not path.is_file():
            what = f"the recovered file of {name} is absent"
            yield Problem(where, what, expected="the file as it was written", remedy=_AGAIN)
        elif hashlib.sha256(path.read_bytes()).hexdigest() != made.sha256:
            what = f"the recovered file of {name} was changed or swapped"
            yield Problem(where, what, expected="the file as it was written", remedy=_AGAIN)
    for path in sorted((folder / "recovered").rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if path.is_file() and relative not in listed and not path.name.startswith("."):
            yield Problem(
                f"{folder}: {relative}",
                "the file is not part of the prediction",
                expected="the files that prediction.json lists",
                remedy="Remove it, or predict again",
            )
    expected: Mapping[str, Callable[[], str]] = {
        "report.html": lambda: render(file),
        "selection.csv": lambda: csv_text(
            tuple(StepPart.model_fields), [s.model_dump() for s in file.steps]
        ),
    }
    pdf = folder / "report.pdf"
    if pdf.is_file():
        from dymo_med.inference.pdf import audit_pdf

        if not audit_pdf(file, pdf.read_bytes()):
            yield Problem(
                str(pdf),
                "the file is not what prediction.json says",
                expected="the same bytes that the command would write",
                remedy="`dymo-med report --pdf` makes it again",
            )
    for name, text in expected.items():
        path = folder / name
        if not path.is_file():
            if whole or name == "report.html":
                yield Problem(str(path), "the file is absent", expected="a file", remedy=_AGAIN)
            continue
        if name == "report.html" and file.versions.get("dymo_med") != __version__:
            continue  # another version words and lays out pages differently
        if path.read_bytes() != text().encode():
            yield Problem(
                str(path),
                "the file is not what prediction.json says",
                expected="the same bytes that the command would write",
                remedy="`dymo-med report` makes the page again"
                if name == "report.html"
                else _AGAIN,
            )


def _near(a: float, b: float, within: float) -> bool:
    return abs(a - b) <= within * max(1.0, abs(a), abs(b))


def _same(a: Sequence[float], b: Sequence[float], within: float) -> bool:
    return len(a) == len(b) and all(_near(x, y, within) for x, y in zip(a, b, strict=True))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
