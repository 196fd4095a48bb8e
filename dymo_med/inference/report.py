"""One patient's page: one HTML file that needs nothing else, made from `prediction.json` alone.

Words are in `templates/strings.json`, layout in `templates/report.html.j2`; this module turns
numbers into what those two need.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from functools import cache
from importlib import resources
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dymo_med.files import write_text

# Other pages take these from here.
from dymo_med.inference.pictures import png as png
from dymo_med.inference.pictures import slices as slices
from dymo_med.inference.pictures import watermark as watermark
from dymo_med.inference.prediction_file import (
    AttributionPart,
    CellPart,
    PicturePart,
    PredictionFile,
    ScanPart,
    StepPart,
)

_TOP_CELLS = 8
_MOST_CLASSES = 6
_UNDECIDED = 0.1  # two classes closer than this are not told apart in words
# Reasons that `warnings` has a sentence for too.
_WARNED = ("measurements_differ", "outside_training", "borrowed")
# Control characters but white space, and what turns the direction of whatever follows, beyond the
# text that it is in.
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
    return environment().get_template("report.html.j2").render(view(file))


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
        "x": file.exhibits,
        "chosen": file.classes[chosen],
        "probability": file.probabilities[chosen],
        "reasons": reasons(file, besides=_WARNED),
        "answer": _answer(file, chosen),
        "had": _had(file),
        "change": _change(file, chosen),
        "pictures": _pictures(file.exhibits.scans, bool(file.subsets)),
        # Words of the states, as this kind of selector means them.
        "states": _states(bool(file.subsets)),
        "recovered_cells": [
            c for c in file.exhibits.cells if not c.measured and c.modality in file.recovered
        ],
        "cell_state": dict.fromkeys(file.trusted, "trusted")
        | dict.fromkeys(file.rejected, "rejected"),
        "why": _why(file),
        "drove": _drove(file, chosen),
    }


def reasons(file: PredictionFile, besides: Collection[str] = ()) -> list[str]:
    """Return the reasons of the status as sentences (section `status` of the words).

    Args:
        file: The prediction.
        besides: Codes to leave out.
    """
    text = words()["status"]
    shown = {"coverage", "probability", "share"}
    return [
        text[r.code].format_map(
            {k: percent(float(v)) if k in shown else v for k, v in r.values.items()}
        )
        for r in file.status_reasons
        if r.code not in besides
    ]


def _count(key: str, number: int) -> str:
    """Return a counted phrase of the answer section, empty for none."""
    if number == 0:
        return ""
    forms = words()["answer"][key]
    return str(forms["one"] if number == 1 else forms["many"].format(n=number))


def _answer(prediction: PredictionFile, chosen: int) -> dict[str, Any]:
    text = words()["answer"]
    name, p = prediction.classes[chosen], prediction.probabilities[chosen]
    count = round(100 * p)
    key = "frequency_low" if count < 1 else "frequency_high" if count > 99 else "frequency"
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
    return {
        "statement": text[form].format_map({"class": name, "other": other}),
        "frequency": text[key].format_map({"class": name, "count": count, "rest": 100 - count}),
        "count": count,
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
            (prediction.classes[k], prediction.probabilities[k]) for k in order[:_MOST_CLASSES]
        ],
    }


def _had(prediction: PredictionFile) -> list[dict[str, str]]:
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
        rows.append(
            {"name": name, "glyph": state, "word": word, "use": use, "facts": ", ".join(facts)}
        )
    return rows


def _change(prediction: PredictionFile, chosen: int) -> dict[str, Any]:
    """Return the methods side by side: the same network, given more and more."""
    text = words()["change"]
    answers = {**prediction.alternatives, prediction.method: prediction.probabilities}
    order = [m for m in ("observed_only", "dymo", prediction.method, "trust_all") if m in answers]
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
                "label": label,
                "own": own,
                "probability": p[chosen],
                "says": text["says" if says == prediction.classes[chosen] else "flip"].format_map(
                    {"class": says}
                ),
                "flip": says != prediction.classes[chosen],
            }
        )
    values = [row["probability"] for row in rows]
    flipped = [str(row["label"]) for row in rows if row["flip"]]
    low, high = percent(min(values)), percent(max(values))
    name = prediction.classes[chosen]
    if flipped:
        sentence = text["differs"].format(methods=" / ".join(flipped))
    elif low == high:
        sentence = text["same_equal"]
    else:
        sentence = text["same"].format_map({"class": name, "low": low, "high": high})
    return {"rows": rows, "sentence": sentence, "flip": bool(flipped)}


def _why(prediction: PredictionFile) -> dict[str, Any]:
    """Return the step table, and one sentence per recovery."""
    last: dict[str, StepPart] = {}
    for step in prediction.steps:
        last[step.modality] = step
    return {
        "rows": [
            {
                "step": s.step,
                "candidate": s.modality,
                "completed": s.version == "completed",
                "quality": (f"{s.quality_before:.3f}", f"{s.quality_after:.3f}"),
                "typical": (_typical(s.similarity_before), _typical(s.similarity_after)),
                "factor": f"{s.factor:.3f}",
                "reward": _signed(s.reward),
                "trust": "" if s.trust is None else percent(s.trust),
                "decision": s.decision,
                "decision_word": words()["why"][
                    f"average_{s.decision}" if prediction.subsets else s.decision
                ],
                "borrowed": s.borrowed,
            }
            for s in prediction.steps
        ],
        "trust": any(s.trust is not None for s in prediction.steps),
        "lead": _lead(prediction),
        "sentences": [_sentence(s, bool(prediction.subsets)) for s in last.values()],
    }


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
        key = "admitted"
    elif step.reward < 0:
        clearer = step.quality_after > step.quality_before - 0.0005  # as far as is shown
        key = "unclear" if step.factor == 1 else "atypical" if clearer else "both"
    else:
        key = "stopped" if step.reward <= 0 else "too_little"
    sentence = words()["why"][f"sentence_{key}"].format(
        modality=step.modality,
        quality_before=f"{step.quality_before:.3f}",
        quality_after=f"{step.quality_after:.3f}",
        typical_before=_typical(step.similarity_before),
        typical_after=_typical(step.similarity_after),
        reward=_signed(step.reward),
        trust="" if step.trust is None else percent(step.trust),
    )
    return str(sentence)


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
    for a in sorted(whole, key=lambda a: -abs(a.value)):
        bars.append(
            {
                "name": a.modality,
                "value": a.value,
                "left": 100 * min(at, at + a.value),
                "width": 100 * abs(a.value),
                "made": a.modality in prediction.recovered,
                "partly": a.modality in prediction.partly,
            }
        )
        at += a.value
    exhibits = prediction.exhibits
    known = {(c.modality, c.column): c for c in exhibits.cells}
    cells = sorted((a for a in prediction.attributions if a.name), key=lambda a: -abs(a.value))
    cells = cells[:_TOP_CELLS]
    largest = max((abs(a.value) for a in cells), default=0.0) or 1.0
    return {
        "start": start,
        "end": at,
        "bars": bars,
        "cells": [_top_cell(a, known[a.modality, a.name], largest) for a in cells],
        "maps": _maps(exhibits.scans, bool(prediction.subsets)),
        "sigma": f"{exhibits.smoothed_voxels:g}",
        "convergence": None if exhibits.convergence is None else points(exhibits.convergence.error),
    }


def _top_cell(attribution: AttributionPart, cell: CellPart, largest: float) -> dict[str, Any]:
    return {
        "cell": cell,
        "value": attribution.value,
        "width": 50 * abs(attribution.value) / largest,
    }


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


def _figure(scan: ScanPart, pictures: Sequence[PicturePart], word: str, alt: str) -> dict[str, Any]:
    return {
        "modality": scan.modality,
        "state": scan.state,
        "word": word,
        "flat": scan.flat,
        "alt": alt.format(modality=scan.modality, state=word),
        "slices": pictures,
    }
