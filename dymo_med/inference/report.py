"""One patient's page: one HTML file that needs nothing else, made from `prediction.json` alone.

Words are in `templates/strings.json`, layout in `templates/report.html.j2`; this module turns
numbers into what those two need.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from importlib import resources
from math import exp, floor, log10
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dymo_med.files import write_text
from dymo_med.inference.prediction_file import (
    AttributionPart,
    CellPart,
    IntervalPart,
    PicturePart,
    PredictionFile,
    PredictionSetPart,
    QualityPart,
    ReasonPart,
    ScanPart,
    StepPart,
    SurvivalPart,
    ValuePart,
)
from dymo_med.inference.survival_view import survival_view

_TOP_CELLS = 8
_MOST_CLASSES = 6
_UNDECIDED = 0.1  # two classes closer than this are not told apart in words
_LITTLE = 0.01  # bits: a smaller gain of certainty is called none
_RARE = 0.1  # a modality of a smaller share of training records is called rare
# Control characters but white space, and what turns the direction of whatever follows, beyond the
# text that it is in.
_SCRIPT = re.compile(rb"<script\b[^>]*>(.*?)</script", re.IGNORECASE | re.DOTALL)
_ACTING = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


@cache
def words() -> Any:
    """Return every word the pages use, as nested dictionaries (`templates/strings.json`)."""
    text = resources.files("dymo_med.inference").joinpath("templates/strings.json")
    return json.loads(text.read_text(encoding="utf-8"))


@cache
def environment() -> Environment:
    """Return the template environment: everything is escaped, unknown names are errors."""
    result = Environment(
        loader=PackageLoader("dymo_med.inference", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    result.filters.update(percent=percent, points=points)
    result.globals["t"] = words()
    return result


def visible(value: Any) -> Any:
    """Return text whose control characters can be seen and no longer act; anything else as it is.

    A character that turns the writing direction would carry on in the words after a name.

    Example:
        >>> visible("a\u202eb")
        'a<U+202E>b'
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _ACTING.sub(lambda found: f"<U+{ord(found[0]):04X}>", value)


def write_report(file: PredictionFile, path: Path) -> None:
    """Write one patient's page; the same file gives the same bytes.

    Args:
        file: All that the page shows.
        path: The HTML file.
    """
    write_text(path, render(file))


def render(file: PredictionFile) -> str:
    """Return one patient's page.

    Args:
        file: All that the page shows.
    """
    return guarded(environment().get_template("report.html.j2").render(view(file)))


def guarded(page: str) -> str:
    """Return a page that says itself what it may do, since a file has no server to say so.

    Args:
        page: HTML with its scripts in it.
    """
    head = '<meta charset="utf-8">\n'
    own = policy(scripts_of(page.encode("utf-8", "backslashreplace")), "'self' file:")
    meta = f'<meta http-equiv="Content-Security-Policy" content="{own}">\n'
    return page.replace(head, head + meta, 1)


def scripts_of(page: bytes) -> str:
    """Return the hashes of a page's own scripts, as a policy names them."""
    found = (s.replace(b"\r\n", b"\n") for s in _SCRIPT.findall(page))
    hashes = [base64.b64encode(sha256(s).digest()).decode() for s in found]
    return " ".join(f"'sha256-{h}'" for h in dict.fromkeys(hashes)) or "'none'"


def policy(scripts: str, images: str = "'self'") -> str:
    """Return the Content Security Policy of a page: its own scripts and pictures, nothing else.

    Args:
        scripts: What `scripts_of` returned.
        images: Where pictures may come from, besides the page itself.
    """
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; "
        f"img-src {images} data: blob:; connect-src 'self'; form-action 'none'; base-uri 'none'"
    )


def percent(probability: float) -> str:
    """Return a probability for people; nothing is ever certain.

    Example:
        >>> percent(0.234), percent(0.999), percent(0.0)
        ('23 %', 'over 99 %', 'under 1 %')
    """
    whole = round(100 * probability)
    if whole < 1:
        return "under 1 %"
    return "over 99 %" if whole > 99 else f"{whole} %"


def points(change: float) -> str:
    """Return a change of probability in signed percentage points.

    Example:
        >>> points(0.1234), points(-0.00001)
        ('+12.3', '0.0')
    """
    text = f"{100 * change:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def percentile(value: float, percentiles: Sequence[float]) -> float:
    """Return where a value lies among training patients, 0 to 100.

    Args:
        value: In the column's unit.
        percentiles: The 101 percentiles, ascending; the middle of a run of equals is returned.

    Example:
        >>> percentile(5.0, [float(i) for i in range(101)])
        5.0
    """
    low = float(np.interp(value, percentiles, np.arange(len(percentiles))))
    left = int(np.searchsorted(percentiles, value, side="left"))
    right = int(np.searchsorted(percentiles, value, side="right"))
    return (left + right - 1) / 2 if right - left > 1 else low


def view(file: PredictionFile) -> dict[str, Any]:
    """Return what the template needs, in the order of its sections.

    Args:
        file: All that the page shows.
    """
    chosen = file.chosen
    return {
        "p": file,
        "number": _number(file),
        "x": file.exhibits,
        "chosen": file.classes[chosen],
        "probability": file.probabilities[chosen],
        "reasons": reasons(file),
        "warned": _warned(file),
        "answer": _answer(file, chosen),
        "had": _had(file),
        "change": _change(file, chosen),
        "pictures": _pictures(file.exhibits.scans, bool(file.subsets)),
        "scans_made": any(s.state != "observed" for s in file.exhibits.scans),
        # Words of the states, as this kind of selector means them.
        "states": _states(bool(file.subsets)),
        "recovered_cells": [
            c for c in file.exhibits.cells if not c.measured and c.modality in file.recovered
        ],
        "cell_state": dict.fromkeys(file.trusted, "trusted")
        | dict.fromkeys(file.rejected, "rejected"),
        "why": _why(file),
        "drove": _drove(file, chosen),
        "performance": _performance(file),
        "acquire": _acquire(file, chosen),
        "limits": _limits(file),
    }


def _decimal(value: float, found: ValuePart) -> str:
    """Return a regression's number for people, to a hundredth of the scale or so."""
    size = found.centers[-1] - found.centers[0]
    digits = max(0, 2 - floor(log10(size)))
    text = f"{value:.{digits}f}"
    return (text.removeprefix("-") if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")


def _number(file: PredictionFile) -> dict[str, Any] | None:
    """Return what the page says of a regression's number."""
    found = file.value
    if file.survival is not None:
        basis = _basis(words()["survival"], file.survival)
        return survival_view(file.survival, words()["survival"], file.target, percent, basis)
    if found is None:
        return None
    text, unit = words()["number"], f" {found.unit}" if found.unit else ""
    sentence, basis = text["no_interval"], ""
    if found.low is not None and found.high is not None:
        sentence = text["interval"].format(
            coverage=percent(found.coverage),
            low=_decimal(found.low, found),
            high=_decimal(found.high, found),
            unit=unit,
        )
        basis = _basis(text, found)
    return {
        "big": _decimal(found.value, found) + unit,
        "title": text["title"],
        "interval": sentence,
        "basis": basis,
        "bands": text["bands"],
    }


def reasons(file: PredictionFile) -> list[str]:
    """Return the reasons of the status as sentences (section `status` of the words).

    Args:
        file: The prediction.
    """
    return [reason_sentence(reason) for reason in file.status_reasons]


def reason_sentence(reason: ReasonPart) -> str:
    """Return one reason as a sentence.

    Args:
        reason: Of a status.
    """
    shown = {"coverage", "probability", "share"}
    values = {k: percent(float(v)) if k in shown else v for k, v in reason.values.items()}
    if reason.code in ("refused", "quality"):
        values["what"] = _gate_words(str(reason.values["check"]))
    return str(words()["status"][reason.code].format_map(values))


def _gate_words(check: str) -> str:
    """Return what a check of the quality gate holds against a modality."""
    known: dict[str, str] = words()["gate"]["checks"]
    return known.get(check, check)


def _gate(part: QualityPart | None) -> list[str]:
    """Return what the quality gate found in one modality, in full."""
    text = words()["gate"]
    findings = part.findings if part is not None else ()
    return [
        text[
            "detail" if f.got and f.expected else "detail_got" if f.got else "detail_alone"
        ].format(what=_gate_words(f.check), got=f.got, expected=f.expected)
        for f in findings
    ]


def _warned(file: PredictionFile) -> list[str]:
    """Return the warnings that no reason of the status says already."""
    said = set(reasons(file))
    for reason in file.status_reasons:
        if reason.code == "measurements_differ":
            other, this = reason.values["label"], file.predicted
            said.add(words()["warnings"]["flip_observed_only"].format(other=other, this=this))
    return [w for w in file.warnings if w not in said]


def _count(key: str, number: int) -> str:
    """Return a counted phrase of the answer section, empty for none."""
    if number == 0:
        return ""
    forms = words()["answer"][key]
    return str(forms["one"] if number == 1 else forms["many"].format(n=number))


def _answer(prediction: PredictionFile, chosen: int) -> dict[str, Any]:
    text = words()["answer"]
    name, p = prediction.classes[chosen], prediction.probabilities[chosen]
    counted = prediction.frequency
    key = "uncounted" if counted.count is None else "frequency"
    key = {"under": "frequency_low", "over": "frequency_high", None: key}[counted.bound]
    used = _count("observed", len(prediction.observed))
    # In an average nothing is wholly in or out: the shares are listed instead.
    averaged = bool(prediction.subsets)
    if prediction.trusted and not averaged:
        used = text["and"].format(a=used, b=_count("trusted", len(prediction.trusted)))
    order = sorted(range(len(prediction.classes)), key=lambda k: -prediction.probabilities[k])
    form = "statement" if len(prediction.classes) == 2 else "statement_many"
    if p - prediction.probabilities[order[1]] < _UNDECIDED:
        form = "undecided"
    other = prediction.classes[order[1]]
    possible = prediction.prediction_set
    abstained = prediction.status == "abstained"
    number = prediction.value is not None or prediction.survival is not None
    strange = prediction.novelty is not None and prediction.novelty.state == "strange"
    return {
        "abstained": abstained,
        "statement": text["stranger" if strange else "cannot_tell"]
        if abstained
        else text[form].format_map({"class": name, "other": other}),
        "set": [text["stranger_set"]] if strange else _set(prediction),
        "possible": None if possible is None or strange else possible.classes,
        "frequency": text["stranger_number" if strange else key].format_map(
            {
                "class": name,
                "count": counted.count,
                "rest": 100 - (counted.count or 0),
                "n": counted.patients,
                "right": counted.right,
            }
        ),
        "count": None if strange else counted.count,
        "base": text["base"].format_map(
            {"class": name, "percent": percent(prediction.base_rates[chosen])}
        )
        if prediction.base_rates
        else "",
        "rests": text["rests"]
        .format(
            used=used,
            rejected="" if averaged else _count("rejected", len(prediction.rejected)),
            absent=_count("absent", len(prediction.absent)),
        )
        .strip(),
        "shares": text["shares"].format(
            shares=", ".join(f"{n} {percent(w)}" for n, w in prediction.trust.items())
        )
        if prediction.subsets
        else "",
        "bars": [
            (prediction.classes[k], prediction.probabilities[k])
            # Bands of a number stand in their own order, all of them.
            for k in (sorted(order) if number else order[:_MOST_CLASSES])
        ],
    }


def _set(prediction: PredictionFile) -> list[str]:
    """Return which classes cannot be ruled out, and how that is known."""
    text, found = words()["answer"], prediction.prediction_set
    if found is None:
        return [text["set_none"]]
    every = len(found.classes) == len(prediction.classes)
    key = "cannot_tell_set" if every else "set_one" if len(found.classes) == 1 else "set_some"
    return [text[key].format(classes=", ".join(found.classes)), _basis(text, found)]


def _basis(text: dict[str, str], found: PredictionSetPart | ValuePart | SurvivalPart) -> str:
    """Return how many patients a set or an interval rests on, and what follows if too few."""
    return text["basis" if found.calibrated_on >= found.least else "too_few"].format(
        coverage=percent(found.coverage),
        n=found.calibrated_on,
        least=found.least,
        among=words()["level"][found.compared_with],
    )


def _had(prediction: PredictionFile) -> list[dict[str, Any]]:
    """Return one row per modality, measured ones first."""
    text = words()["had"]
    trust = prediction.trust
    kind = "average_" if prediction.subsets else ""
    rows = []
    names = dict.fromkeys((*prediction.observed, *prediction.recovered, *prediction.absent))
    for name in names:
        trusted, rejected = name in prediction.trusted, name in prediction.rejected
        facts = []
        if name in prediction.sources:
            source = prediction.sources[name]
            facts = [source.file, *source.facts.values()]
        if name in prediction.observed:
            state = "partly" if name in prediction.partly else "observed"
            word = (
                text[f"{kind}partly_{'trusted' if trusted else 'rejected'}"]
                if (trusted or rejected)
                else text[state]
            )
            use = text["used_completed"] if trusted else text["used"]
        else:
            state = "trusted" if trusted else "rejected" if rejected else "absent"
            word = text[f"{kind}{state}" if trusted or rejected else state]
            use = text["used_synthetic"] if trusted else text["unused"]
        if name in trust:
            key = "used_partly_completed" if name in prediction.observed else "used_partly"
            use = text[key].format(percent=percent(trust[name]))
        refused = name in prediction.refused
        rows.append(
            {
                "name": name,
                "glyph": state,
                "word": text["refused"].format(word=word) if refused else word,
                "use": use,
                "facts": ", ".join(facts),
                "gate": _gate(prediction.quality.get(name)),
                "refused": refused,
            }
        )
    return rows


def _says(prediction: PredictionFile, method: str, name: str, flip: bool) -> str:
    """Return what a method says: its class, or its number."""
    found, survival = prediction.value, prediction.survival
    if survival is not None:
        own = method == prediction.method
        risk = (survival.risks if own else survival.alternatives[method])[0]
        return str(words()["survival"]["says"].format(risk=percent(risk)))
    if found is None:
        return str(words()["change"]["flip" if flip else "says"].format_map({"class": name}))
    value = found.value if method == prediction.method else found.alternatives[method]
    return str(words()["number"]["says"].format(value=_decimal(value, found)))


def _change(prediction: PredictionFile, chosen: int) -> dict[str, Any]:
    """Return the methods side by side: the same network, given more and more."""
    text = words()["change"]
    answers = {**prediction.alternatives, prediction.method: prediction.probabilities}
    order = [m for m in ("observed_only", prediction.method, "trust_all", "dymo") if m in answers]
    rows = []
    for method in dict.fromkeys(order):
        p = answers[method]
        says = prediction.classes[int(np.argmax(p))]
        own = method == prediction.method
        label = text["own_average" if prediction.subsets else "own"] if own else text[method]
        if method in ("observed_only", "trust_all"):
            label = text[method]
        rows.append(
            {
                "method": method,
                "label": label,
                "own": own,
                "probability": p[chosen],
                "says": _says(prediction, method, says, says != prediction.classes[chosen]),
                "flip": says != prediction.classes[chosen],
                "draws": _drawn(prediction, method, chosen),
            }
        )
    values = [row["probability"] for row in rows]
    flipped = [str(row["label"]) for row in rows if row["flip"]]
    low, high = percent(min(values)), percent(max(values))
    name = prediction.classes[chosen]
    if not prediction.recovered and not prediction.absent:
        sentence = text["nothing"]
    elif flipped:
        sentence = text["differs"].format(methods=" / ".join(flipped))
    elif low == high:
        sentence = text["same_equal"]
    else:
        sentence = text["same"].format_map({"class": name, "low": low, "high": high})
    unsteady = 0
    if prediction.draws is not None and prediction.trusted:
        unsteady = round(prediction.draws.own.changes * prediction.draws.n)
        told = text["unsteady"].format(changes=unsteady, n=prediction.draws.n)
        # "No" would be too much.
        sentence = sentence if not unsteady else f"{sentence} {told}" if flipped else told
    notes = []
    if any(row["draws"] for row in rows) and prediction.draws is not None:
        notes.append(text["draws"].format(n=prediction.draws.n))
    elif prediction.recovered and prediction.draws is None:
        notes.append(text["none_drawn"])
    notes += _plain(prediction)
    return {
        "rows": rows,
        "sentence": sentence,
        "flip": bool(flipped or unsteady),
        "notes": notes,
    }


def _drawn(prediction: PredictionFile, method: str, chosen: int) -> dict[str, Any] | None:
    """Return how far a method's answer spreads over the draws; None: it does not depend on them."""
    text, draws = words()["change"], prediction.draws
    if draws is None:
        return None
    if method == prediction.method and prediction.trusted:
        part = draws.own
    elif method == "trust_all" and prediction.recovered:
        part = draws.trust_all
    else:
        return None
    low, high = part.low[chosen], part.high[chosen]
    ends = percent(low), percent(high)
    key = "row_near" if ends[0] == ends[1] else "row_draws"
    said = text[key].format(low=ends[0], high=ends[1])
    if part.changes > 0:
        said += "; " + text["row_changes"].format(changes=round(part.changes * draws.n), n=draws.n)
    return {
        "low": low,
        "high": high,
        "ticks": [p[chosen] for p in part.probabilities],
        "text": said,
    }


def _why(prediction: PredictionFile) -> dict[str, Any]:
    """Return one sentence per recovery, and the step table."""
    text = words()["why"]
    last: dict[str, StepPart] = {}
    for step in prediction.steps:
        last[step.modality] = step
    averaged = bool(prediction.subsets)
    return {
        "rows": _step_rows(prediction),
        "trust": any(s.trust is not None for s in prediction.steps),
        "lead": _lead(prediction),
        "plot": _plot_words(prediction.steps),
        "sentences": [
            _sentence(last[name], averaged)
            if name in last
            else text[
                f"sentence_rule_{'everything' if name in prediction.trusted else 'nothing'}"
            ].format(modality=name)
            for name in prediction.recovered
        ],
        "states": [
            "trusted" if name in prediction.trusted else "rejected" for name in prediction.recovered
        ],
    }


def _step_rows(prediction: PredictionFile) -> list[dict[str, Any]]:
    """Return the step table; `at` and `line` are places on its plot, in percent."""
    trust = any(s.trust is not None for s in prediction.steps)
    # Rewards are within -1 and 1; the plot is as wide as they need.
    numbers = [n for s in prediction.steps for n in (s.reward, s.threshold or 0.0)]
    low, high = min([*numbers, 0.0]), max([*numbers, 0.0])
    low, high = (0.0, 1.0) if trust else (low - 0.05 * (high - low), high + 0.05 * (high - low))
    width = (high - low) or 1.0
    rows = []
    for s in prediction.steps:
        shown = s.reward if s.trust is None else s.trust
        rows.append(
            {
                "step": s.step,
                "candidate": s.modality,
                "completed": s.version == "completed",
                "quality": (f"{s.quality_before:.3f}", f"{s.quality_after:.3f}"),
                "typical": (_typical(s.similarity_before), _typical(s.similarity_after)),
                "factor": f"{s.factor:.3f}",
                "reward": _signed(s.reward),
                "trust": "" if s.trust is None else percent(s.trust),
                "at": 100 * (shown - low) / width,
                "line": 100 * ((s.threshold or 0.0) - low) / width,
                "decision": s.decision,
                "decision_word": words()["why"][
                    f"average_{s.decision}" if prediction.subsets else s.decision
                ],
                "borrowed": s.borrowed,
            }
        )
    return rows


def _plot_words(steps: Sequence[StepPart]) -> str:
    """Return what the plot of the steps shows."""
    text = words()["why"]
    if not steps:
        return ""
    threshold = steps[0].threshold
    if threshold is None:
        return str(text["plot_none"])
    if steps[0].trust is not None:
        return str(text["plot_trust"].format(threshold=percent(threshold)))
    return str(text["plot_reward"].format(threshold=f"{threshold:g}"))


def _lead(prediction: PredictionFile) -> str:
    """Return how this selector decides."""
    text = words()["why"]
    if prediction.subsets:
        return str(text["lead_average"])
    if any(s.trust is not None for s in prediction.steps):
        return str(text["lead_gate"])
    if prediction.method == "simultaneous":
        return str(text["lead_simultaneous"])
    if prediction.method == "dymo_uncalibrated":
        return str(text["lead_uncalibrated"])
    lead = str(text["lead"])
    margin = prediction.rule.threshold
    if margin is None:
        return f"{lead} " + str(text["never"])
    if margin > 0:
        return f"{lead} " + str(text["margin"].format(margin=f"{margin:.3f}"))
    return lead


def _sentence(step: StepPart, averaged: bool) -> str:
    """Return what became of one recovery, and why."""
    if step.trust is not None:
        kind = "average" if averaged else "gate"
        key = f"{kind}_{'admitted' if step.decision == 'admitted' else 'rejected'}"
    elif step.decision == "admitted":
        key = "admitted" if step.factor == 1 else "admitted_cost"
    elif step.reward < 0:
        clearer = step.quality_after > step.quality_before - 0.0005  # as far as is shown
        key = "unclear" if step.factor == 1 else "atypical" if clearer else "both"
    else:
        key = "stopped" if step.reward <= 0 else "too_little"
    trust = "" if step.trust is None else percent(step.trust)
    return str(words()["why"][f"sentence_{key}"].format(modality=step.modality, trust=trust))


def _typical(log_tail: float) -> str:
    """Return a log tail probability as a share."""
    share = 100 * exp(log_tail)
    return f"{share:.0f} %" if share >= 9.5 else f"{share:.1f} %" if share >= 0.1 else "< 0.1 %"


def _signed(number: float) -> str:
    """Return a reward; one too small for three decimals keeps its sign."""
    if number != 0 and abs(number) < 0.0005:
        return "< +0.001" if number > 0 else "> \N{MINUS SIGN}0.001"
    return f"{number:+.3f}".replace("-", "\N{MINUS SIGN}")


def _drove(prediction: PredictionFile, chosen: int) -> dict[str, Any]:
    """Return the waterfall of modalities, the top cells and the saliency pictures."""
    whole = [a for a in prediction.attributions if not a.name]
    start = prediction.base_rates[chosen] if prediction.base_rates else 0.0
    bars = []
    at = start
    # Blanks that were filled and rejected had no part in it; in an average everything has.
    made = prediction.recovered if prediction.subsets else prediction.trusted
    for a in sorted(whole, key=lambda a: -abs(a.value)):
        bars.append(
            {
                "name": a.modality,
                "value": a.value,
                "left": 100 * min(at, at + a.value),
                "width": 100 * abs(a.value),
                "made": a.modality in made,
                "partly": a.modality in prediction.partly,
            }
        )
        at += a.value
    exhibits = prediction.exhibits
    known = {(c.modality, c.column): c for c in exhibits.cells}
    cells = sorted((a for a in prediction.attributions if a.name), key=lambda a: -abs(a.value))
    cells = cells[:_TOP_CELLS]
    largest = max((abs(a.value) for a in cells), default=0.0) or 1.0
    text = words()["drove"]
    return {
        "start": start,
        "end": at,
        "bars": bars,
        "sum": text["sum"].format(sum=points(at - start), start=percent(start), end=percent(at)),
        "sampled": any(a.method == "shapley_sampled" for a in whole),
        "viewers": _viewers(exhibits.scans),
        "cells": [_top_cell(a, known[a.modality, a.name], largest) for a in cells],
        "unused": _unused(prediction),
        "maps": _maps(exhibits.scans, bool(prediction.subsets)),
        "sigma": f"{exhibits.smoothed_voxels:g}",
        "convergence": None if exhibits.convergence is None else points(exhibits.convergence.error),
        "contrast": [
            text["contrast_recovered" if c.recovered else "contrast"].format(
                modality=c.modality, points=points(c.value)
            )
            for c in exhibits.contrast
        ],
    }


def _unused(prediction: PredictionFile) -> str:
    """Return which modalities of this patient the model is known not to use."""
    use = {} if prediction.plain is None else prediction.plain.use
    names = [n for n in prediction.observed if use.get(n) == "unused"]
    if not names:
        return ""
    return str(words()["drove"]["unused"].format(modalities=", ".join(names)))


def _share(weight: float) -> str:
    """Return a weight, which may be nothing or all, in percent."""
    return f"{100 * weight:.0f} %"


def _plain(prediction: PredictionFile) -> list[str]:
    """Return what a plain reference says: the one in the answer, or else the last."""
    plain = prediction.plain
    if plain is None or not plain.references:
        return []
    text, name = words()["change"], plain.partner or list(plain.references)[-1]
    p = plain.references[name]
    chosen = int(np.argmax(p))
    says = f"{percent(p[chosen])} {prediction.classes[chosen]}"
    if prediction.survival is not None:
        return []
    if prediction.value is not None:
        number = sum(q * c for q, c in zip(p, prediction.value.centers, strict=True))
        says = f"{_decimal(number, prediction.value)} {prediction.value.unit}".rstrip()
    called = words()["cohort"]["methods"].get(name, name).removeprefix("plain: ")
    found = [text["plain"].format(name=called, says=says)]
    if plain.partner:
        rest = _share(1 - plain.weight)
        found.append(text["plain_share"].format(own=_share(plain.weight), rest=rest))
    return found


def _top_cell(attribution: AttributionPart, cell: CellPart, largest: float) -> dict[str, Any]:
    return {
        "cell": cell,
        "value": attribution.value,
        "width": 50 * abs(attribution.value) / largest,
    }


# --- Evidence -------------------------------------------------------------------------------------


def _performance(prediction: PredictionFile) -> dict[str, Any] | None:
    """Return how good the model was on held-back patients; None: the bundle does not say."""
    part = prediction.performance
    if part is None:
        return None
    text = words()["performance"]
    rows = [("own", part.own)]
    if part.observed_only is not None and part.own.method != "observed_only":
        rows.append(("observed_only", part.observed_only))
    return {
        "sentence": text[f"level_{part.level}"].format(
            patients=part.patients,
            group=part.group,
            pattern=part.pattern_patients,
        ),
        "few": part.tested_fewer_than_30,
        "rows": [
            (text[name], [_interval(f) for f in (figures.auroc, figures.brier, figures.ece)])
            for name, figures in rows
        ],
    }


def _interval(figure: IntervalPart) -> tuple[str, str]:
    """Return a figure and its interval."""
    text = words()["performance"]
    if figure.value is None:
        return text["undefined"], ""
    if figure.low is None or figure.high is None:
        return f"{figure.value:.2f}", ""
    return f"{figure.value:.2f}", text["interval"].format(
        low=f"{figure.low:.2f}", high=f"{figure.high:.2f}"
    )


def _acquire(prediction: PredictionFile, chosen: int) -> dict[str, Any]:
    """Return what measuring would be expected to change, as information."""
    text, part = words()["acquire"], prediction.acquire
    name = prediction.classes[chosen]
    if part is None:
        missing = prediction.recovered or prediction.absent
        return {"rows": (), "sentence": text["undrawn" if missing else "nothing"], "unknown": ""}
    largest = max((abs(g.bits) for g in part.gains), default=0.0) or 1.0
    sentence = text["nothing"]
    if part.gains:
        best = part.gains[0]
        sentence = text["little"]
        if best.bits >= _LITTLE and part.bits > 0:
            sentence = text["most"].format(
                modality=best.modality, percent=percent(best.bits / part.bits)
            )
    return {
        "sentence": sentence if part.gains or not part.unknown else "",
        "now": text["now"].format_map(
            {
                "class": name,
                "percent": percent(part.probability),
                "bits": f"{part.bits:.2f}",
            }
        ),
        "heading": text["probability"].format_map({"class": name}),
        "rows": [
            {
                "name": g.modality,
                "blanks": g.kind == "blanks",
                "state": g.state,
                "bits": text["bits"].format(bits=_change_of(-g.bits)),
                "width": 50 * abs(g.bits) / largest,
                "worse": g.bits < 0,
                "before": part.probability,
                "after": g.probability,
                "changes": text["of"].format(changes=round(g.changes * part.draws), n=part.draws),
            }
            for g in part.gains
        ],
        "unknown": text["unknown"].format(modalities=", ".join(part.unknown))
        if part.unknown
        else "",
    }


def _change_of(bits: float) -> str:
    """Return a change of uncertainty with its sign.

    Example:
        >>> _change_of(0.25), _change_of(-0.001)
        ('+0.25', '0.00')
    """
    text = f"{bits:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "\N{MINUS SIGN}")


def _elsewhere(prediction: PredictionFile) -> str:
    """Return what to say of patients from elsewhere; more where this one was compared."""
    text, novelty = words()["limits"], prediction.novelty
    if novelty is None or novelty.state == "unknown":
        return str(text["elsewhere"])
    return str(
        text["elsewhere_compared"].format(patients=novelty.patients, as_unusual=novelty.as_unusual)
    )


def _limits(prediction: PredictionFile) -> list[str]:
    """Return the known limits that hold for this answer."""
    text, part = words()["limits"], prediction.limits
    result = [
        text["made_from"].format(
            train=part.patients.get("train", 0),
            fitted_on=part.fitted_on,
            held_back=part.held_back,
            cohort=part.cohort,
            task=part.task,
        ),
        _elsewhere(prediction),
    ]
    rare = [
        text["rare_item"].format(modality=name, percent=percent(share))
        for name, share in part.observed_share.items()
        if share < _RARE
    ]
    if rare:
        result.append(text["rare"].format(modalities=", ".join(rare)))
    if prediction.recovered:
        result.append(text["plausible"])
    if prediction.draws is not None:
        result.append(text["draws"])
    if prediction.attributions:
        result.append(text["saliency"])
    return result


# --- Pictures -------------------------------------------------------------------------------------


def _states(averaged: bool) -> dict[str, str]:
    """Return the words of the states; in an average nothing is wholly trusted or rejected."""
    text: dict[str, str] = words()["states"]
    kind = "average_" if averaged else ""
    return {
        "observed": text["observed"],
        "trusted": text[f"{kind}trusted"],
        "rejected": text[f"{kind}rejected"],
    }


def _pictures(scans: Sequence[ScanPart], averaged: bool) -> list[dict[str, Any]]:
    """Return every scan's slices, measured ones first."""
    text, states = words()["madeup"], _states(averaged)
    return [
        _figure(scan, scan.pictures, states[scan.state], text["alt_2d" if scan.flat else "alt"])
        for scan in sorted(scans, key=lambda s: s.state != "observed")
    ]


def _maps(scans: Sequence[ScanPart], averaged: bool) -> list[dict[str, Any]]:
    """Return the scans that have one with their saliency on top, measured ones first."""
    text, states = words()["drove"], _states(averaged)
    return [
        _figure(
            scan,
            scan.overlays,
            states[scan.state],
            text["maps_alt_2d" if scan.flat else "maps_alt"],
        )
        for scan in sorted(scans, key=lambda s: s.state != "observed")
        if scan.overlays
    ]


def _viewers(scans: Sequence[ScanPart]) -> list[dict[str, Any]]:
    """Return the volumes whose saliency can be leafed through: measured ones, then made-up ones.

    The volumes of one group that are cut alike share a slider.
    """
    groups: dict[tuple[bool, tuple[int, ...]], list[ScanPart]] = {}
    for scan in sorted(scans, key=lambda s: s.state != "observed"):
        if scan.slider is not None and scan.slider.heat is not None and scan.overlays:
            key = (scan.state != "observed", scan.slider.slices)
            groups.setdefault(key, []).append(scan)
    return [
        {
            "made": made,
            "number": number,
            "slices": slices,
            "start": _first_slice(group[0], slices),
            "scans": group,
        }
        for number, ((made, slices), group) in enumerate(groups.items(), start=1)
    ]


def _first_slice(scan: ScanPart, slices: Sequence[int]) -> int:
    """Return the frame to begin with: the most influential one, as in the three planes."""
    hottest = next(p.index for p in scan.overlays if p.plane == "axial")
    return int(np.argmin(np.abs(np.asarray(slices) - hottest)))


def _figure(scan: ScanPart, pictures: Sequence[PicturePart], word: str, alt: str) -> dict[str, Any]:
    return {
        "modality": scan.modality,
        "state": scan.state,
        "word": word,
        "flat": scan.flat,
        "alt": alt.format(modality=scan.modality, state=word),
        "slices": pictures,
    }
