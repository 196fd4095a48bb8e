"""One patient's page: a single HTML file that needs nothing else, and the pictures in it.

Words are in `templates/strings.json`, layout in `templates/report.html.j2`; this module turns
numbers into what those two need.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib import resources
from math import exp, inf
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from dymo_med.files import write_text
from dymo_med.types import Attribution, Prediction, SelectionStep

Array = NDArray[Any]
State = Literal["observed", "trusted", "rejected"]

_PIXELS = 208  # longest side of one slice
_GAP = 8
_SIGMA = 1.0  # smoothing of saliency, in voxels
_TOP_CELLS = 8
_MOST_CLASSES = 6
_UNDECIDED = 0.1  # two classes closer than this are not told apart in words


@dataclass(frozen=True)
class Scan:
    """An image to show.

    Attributes:
        modality: Its name.
        values: `(C, X, Y, Z)` RAS+, or `(C, rows, columns)`.
        spacing_mm: Voxel size; empty = square pixels.
        state: Whether it was measured, or recovered and then trusted or rejected.
        zero_is_background: Whether exact zeros of a measured scan are outside the body.
        saliency: `(*spatial)`, for measured scans; None = not computed.
    """

    modality: str
    values: Array
    spacing_mm: tuple[float, ...]
    state: State
    zero_is_background: bool
    saliency: Array | None = None


@dataclass(frozen=True)
class Cell:
    """A table cell to show.

    Attributes:
        modality: Table it is in.
        column: Header.
        value: As text; empty = unknown.
        unit: Of a number.
        percentile: Among training patients, 0 to 100, for numbers.
        share: Of training patients with this category, for categories.
        measured: False = the value was recovered, or is unknown.
    """

    modality: str
    column: str
    value: str
    unit: str
    percentile: float | None
    share: float | None
    measured: bool


@dataclass(frozen=True)
class Exhibits:
    """What a report shows besides the prediction.

    Attributes:
        target: What is predicted.
        bundle_version: Version of the package that made the bundle.
        bundle_description: One sentence.
        versions: Software versions by name.
        device: Where the networks ran.
        selector_why: Why the bundle's default selector is the default.
        scans: Images, measured and recovered, in canonical order.
        cells: Cells of the tables that were measured or recovered, in canonical order.
        convergence: Of the saliency; None = not computed.
    """

    target: str
    bundle_version: str
    bundle_description: str
    versions: Mapping[str, str]
    device: str
    selector_why: str = ""
    scans: tuple[Scan, ...] = ()
    cells: tuple[Cell, ...] = ()
    convergence: float | None = None


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
    )
    result.filters.update(percent=percent, points=points)
    result.globals["t"] = words()
    return result


def write_report(prediction: Prediction, exhibits: Exhibits, path: Path) -> None:
    """Write one patient's page.

    Args:
        prediction: What to report.
        exhibits: Pictures, cells and facts beside it.
        path: The HTML file.
    """
    created = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    page = environment().get_template("report.html.j2")
    write_text(path, page.render(view(prediction, exhibits), created=created))


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


def view(prediction: Prediction, exhibits: Exhibits) -> dict[str, Any]:
    """Return what the template needs, in the order of its sections.

    Args:
        prediction: What to report.
        exhibits: Pictures, cells and facts beside it.
    """
    chosen = int(np.argmax(prediction.probabilities))
    return {
        "p": prediction,
        "x": exhibits,
        "chosen": prediction.classes[chosen],
        "probability": prediction.probabilities[chosen],
        "answer": _answer(prediction, chosen),
        "had": _had(prediction),
        "change": _change(prediction, chosen),
        "pictures": _pictures(exhibits.scans, bool(prediction.subsets)),
        # Words of the states, as this kind of selector means them.
        "states": _states(bool(prediction.subsets)),
        "recovered_cells": [
            c for c in exhibits.cells if not c.measured and c.modality in prediction.recovered
        ],
        "cell_state": dict.fromkeys(prediction.trusted, "trusted")
        | dict.fromkeys(prediction.rejected, "rejected"),
        "why": _why(prediction),
        "drove": _drove(prediction, exhibits, chosen),
    }


def _count(key: str, number: int) -> str:
    """Return a counted phrase of the answer section, empty for none."""
    if number == 0:
        return ""
    forms = words()["answer"][key]
    return str(forms["one"] if number == 1 else forms["many"].format(n=number))


def _answer(prediction: Prediction, chosen: int) -> dict[str, Any]:
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


def _had(prediction: Prediction) -> list[dict[str, str]]:
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


def _change(prediction: Prediction, chosen: int) -> dict[str, Any]:
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


def _why(prediction: Prediction) -> dict[str, Any]:
    """Return the step table, and one sentence per recovery."""
    last: dict[str, SelectionStep] = {}
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


def _lead(prediction: Prediction) -> str:
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
    margin = max((s.threshold for s in prediction.steps), default=0.0)
    if margin > 0:
        bound = text["margin"].format(margin=f"{margin:.3f}") if margin < inf else text["never"]
        lead = f"{lead} {bound}"
    return lead


def _sentence(step: SelectionStep, averaged: bool) -> str:
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


def _drove(prediction: Prediction, exhibits: Exhibits, chosen: int) -> dict[str, Any]:
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
    known = {(c.modality, c.column): c for c in exhibits.cells}
    cells = sorted((a for a in prediction.attributions if a.name), key=lambda a: -abs(a.value))
    cells = cells[:_TOP_CELLS]
    largest = max((abs(a.value) for a in cells), default=0.0) or 1.0
    return {
        "start": start,
        "end": at,
        "bars": bars,
        "cells": [_top_cell(a, known[a.modality, a.name], largest) for a in cells],
        "maps": _maps(exhibits.scans),
        "sigma": f"{_SIGMA:g}",
        "convergence": None if exhibits.convergence is None else points(exhibits.convergence),
    }


def _top_cell(attribution: Attribution, cell: Cell, largest: float) -> dict[str, Any]:
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


def _pictures(scans: Sequence[Scan], averaged: bool) -> list[dict[str, str | bool]]:
    """Return every scan as a strip of slices, measured ones first."""
    text, states = words(), _states(averaged)
    result = []
    order = sorted(scans, key=lambda s: s.state != "observed")
    for scan in order:
        flat = scan.values.ndim == 3
        alt = text["madeup"]["alt_2d" if flat else "alt"]
        state = states[scan.state]
        at = _centre(scan, scans)
        strip = _strip(scan, scans, at, synthetic=scan.state != "observed")
        result.append(
            {
                "modality": scan.modality,
                "state": scan.state,
                "word": state,
                "flat": flat,
                "alt": alt.format(modality=scan.modality, state=state),
                "png": png(strip),
            }
        )
    return result


def _maps(scans: Sequence[Scan]) -> list[dict[str, str | bool]]:
    """Return the measured scans that have one with their saliency on top, on one scale."""
    from scipy.ndimage import gaussian_filter

    shown = [
        (s, gaussian_filter(np.abs(s.saliency), _SIGMA)) for s in scans if s.saliency is not None
    ]
    top = max((float(np.quantile(m, 0.999)) for _, m in shown), default=0.0)
    if top <= 0:
        return []
    text = words()["drove"]
    alt = {False: text["maps_alt"], True: text["maps_alt_2d"]}
    result = []
    for scan, magnitude in shown:
        # One place for all scans on a grid, so that they can be compared.
        total = sum(m for _, m in shown if m.shape == magnitude.shape)
        at = tuple(int(i) for i in np.unravel_index(int(np.argmax(total)), magnitude.shape))
        strip = _strip(scan, scans, at, synthetic=False, heat=np.clip(magnitude / top, 0, 1))
        result.append(
            {
                "modality": scan.modality,
                "alt": alt[scan.values.ndim == 3].format(modality=scan.modality),
                "flat": scan.values.ndim == 3,
                "png": png(strip),
            }
        )
    return result


def _foreground(scan: Scan, scans: Sequence[Scan]) -> Array | None:
    """Return where there is a body, from measured scans on the same grid; None = everywhere."""
    if not scan.zero_is_background:
        return None
    same = [
        s.values
        for s in scans
        if s.state == "observed" and s.zero_is_background and s.values.shape == scan.values.shape
    ]
    if scan.state == "observed":
        same = [scan.values]
    return np.any([(v != 0).any(0) for v in same], axis=0) if same else None


def _centre(scan: Scan, scans: Sequence[Scan]) -> tuple[int, ...]:
    """Return the middle voxel of the body, the same for all scans on one grid."""
    first = next((s for s in scans if s.values.shape == scan.values.shape), scan)
    inside = _foreground(first, scans)
    if inside is None or not inside.any():
        return tuple(n // 2 for n in scan.values.shape[1:])
    return tuple(int(np.median(axis)) for axis in np.nonzero(inside))


def slices(volume: Array, at: Sequence[int]) -> tuple[Array, Array, Array]:
    """Cut a volume the way radiologists look at it.

    Args:
        volume: `(X, Y, Z)` RAS+.
        at: Voxel to cut through.

    Returns:
        Axial `(Y, X)` with the nose up and coronal `(Z, X)`, both with the patient's right on
        the left; sagittal `(Z, Y)` with the nose on the left.
    """
    x, y, z = at
    return (
        volume[::-1, ::-1, z].T,
        volume[::-1, y, ::-1].T,
        volume[x, ::-1, ::-1].T,
    )


def _strip(
    scan: Scan,
    scans: Sequence[Scan],
    at: Sequence[int],
    *,
    synthetic: bool,
    heat: Array | None = None,
) -> Array:
    """Draw one scan: uint8 `(rows, columns, 3)`, slices side by side on black."""
    inside = _foreground(scan, scans)
    grey = _grey(scan.values, inside)  # (C, *spatial) in 0..1
    if grey.ndim == 3:
        cuts = [grey]
        heats = [heat]
        spacings = [scan.spacing_mm or (1.0, 1.0)]
    else:
        x, y, z = scan.spacing_mm or (1.0, 1.0, 1.0)
        cuts = [np.stack(c) for c in zip(*(slices(g, at) for g in grey), strict=True)]
        heats = list(slices(heat, at)) if heat is not None else [None] * 3
        spacings = [(y, x), (z, x), (z, y)]
    longest = max(
        n * s
        for c, mm in zip(cuts, spacings, strict=True)
        for n, s in zip(c.shape[1:], mm, strict=True)
    )
    drawn = []
    for cut, hot, mm in zip(cuts, heats, spacings, strict=True):
        size = tuple(
            max(1, round(_PIXELS * n * s / longest)) for n, s in zip(cut.shape[1:], mm, strict=True)
        )
        rgb = np.stack(
            [_resize(c, size) for c in (cut if len(cut) == 3 else cut[[0]].repeat(3, 0))], -1
        )
        if hot is not None:
            rgb = _glow(rgb, _resize(hot, size))
        drawn.append((255 * rgb).round().astype(np.uint8))
    if synthetic:
        drawn = [watermark(d) for d in drawn]
    height = max(len(d) for d in drawn)
    width = sum(d.shape[1] for d in drawn) + _GAP * (len(drawn) - 1)
    strip = np.zeros((height, width, 3), np.uint8)
    left = 0
    for d in drawn:
        top = (height - len(d)) // 2
        strip[top : top + len(d), left : left + d.shape[1]] = d
        left += d.shape[1] + _GAP
    return strip


def _grey(values: Array, inside: Array | None) -> Array:
    """Return values stretched to 0..1 between the 1st and 99th percentile of the body."""
    body = values if inside is None or not inside.any() else values[:, inside]
    low, high = np.percentile(body, [1, 99])
    grey = np.clip((values - low) / max(float(high - low), 1e-6), 0, 1)
    return grey if inside is None else np.where(inside, grey, 0.0)


def _resize(image: Array, size: tuple[int, ...]) -> Array:
    """Return a 2D float image in 0..1 resampled to `size` (rows, columns), bicubic."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.float32))
    resized = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float32)
    return resized.clip(0, 1)


def _glow(rgb: Array, heat: Array) -> Array:
    """Return a picture with heat in 0..1 laid over it, and an outline that prints in grey."""
    from matplotlib import colormaps
    from scipy.ndimage import binary_dilation

    colour = colormaps["inferno"](0.35 + 0.6 * heat)[..., :3]
    opacity = np.clip(1.3 * heat - 0.15, 0, 0.8)[..., None]
    result = (1 - opacity) * rgb * 0.85 + opacity * colour
    inside = heat >= 0.5
    line = binary_dilation(inside) & ~inside
    result[binary_dilation(line) & ~inside] = 0.0
    result[line] = 1.0
    return np.asarray(result)


def watermark(picture: Array) -> Array:
    """Return a picture with SYNTHETIC burnt into its pixels, twice and across.

    Args:
        picture: uint8 `(rows, columns, 3)`.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows, columns = picture.shape[:2]
    mark = Image.new("RGBA", (2 * columns, 2 * rows), (0, 0, 0, 0))
    draw = ImageDraw.Draw(mark)
    font = ImageFont.load_default(size=max(10, min(rows, columns) // 8))
    for place in (0.7, 1.3):
        # White with a dark edge: legible on every grey, in print too.
        draw.text(
            (columns, rows * place),
            "SYNTHETIC",
            fill=(255, 255, 255, 215),
            stroke_fill=(0, 0, 0, 215),
            stroke_width=1,
            font=font,
            anchor="mm",
        )
    turned = mark.rotate(28, resample=Image.Resampling.BICUBIC, center=(columns, rows))
    left, top = columns // 2, rows // 2
    layer = turned.crop((left, top, left + columns, top + rows))
    marked = Image.alpha_composite(Image.fromarray(picture).convert("RGBA"), layer)
    return np.asarray(marked.convert("RGB"))


def png(picture: Array) -> str:
    """Return a uint8 picture as a `data:` address."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
