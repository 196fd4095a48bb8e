"""The page of a cohort on which a regression was evaluated: how far are answers from the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dymo_med.conformal import COVERAGE
from dymo_med.files import write_text
from dymo_med.inference.answer import COMPARED
from dymo_med.inference.page_parts import Row, estimate, estimates, report_link
from dymo_med.inference.report import environment, guarded, percent, words
from dymo_med.types import Scores

_COLOURS = ("#1f5a82", "#6d7681", "#a9570c")
_SOFT = "#55616e"


def write_number_page(
    out: Path,
    facts: Row,
    scores: Sequence[Scores],
    metrics: Sequence[Row],
    listed: Sequence[Row],
    failures: Sequence[Row],
    **_: Any,
) -> None:
    """Write `index.html` and `plots/scatter.png` of a regression.

    Args:
        out: Folder of the evaluation; reports in it are linked.
        facts: What `run.json` says.
        scores: Every scenario, in order.
        metrics: Rows of `metrics.csv`.
        listed: Rows of `predictions.csv` of the first scenario.
        failures: Rows of `failures.csv`.
        **_: What the page of a classification shows besides; of a regression it is in tables only.
    """
    (out / "plots").mkdir(exist_ok=True)
    picture = out / "plots" / "scatter.png"
    picture.unlink(missing_ok=True)
    some = [s for s in scores if len(s)]
    if some:
        _plot(picture, facts, some[0])
    page = environment().get_template("numbers.html.j2")
    shown = _view(out, facts, metrics, listed, failures)
    write_text(out / "index.html", guarded(page.render(shown, drawn=bool(some))))


def _view(
    out: Path,
    facts: Row,
    metrics: Sequence[Row],
    listed: Sequence[Row],
    failures: Sequence[Row],
) -> dict[str, Any]:
    """Return what the template needs."""
    text, own, methods = words()["numbers"], facts["selector"], facts["methods"]
    found = {(r["scenario"], r["method"], r["metric"]): r for r in metrics}
    scenarios = [s for s in facts["scenarios"] if (s, own, "mae") in found]
    present = [m for m in text["names"] if any(r["metric"] == m for r in metrics)]
    others = [m for m in methods if f"{own} - {m}" in {r["method"] for r in metrics}]
    unit = facts["scale"]["unit"]
    return {
        "f": facts,
        "unit": f" ({unit})" if unit else "",
        "methods": methods,
        "others": others,
        "coverage": percent(COVERAGE),
        "errors": estimates(found, scenarios, methods, "mae"),
        "differences": estimates(found, scenarios, [f"{own} - {m}" for m in others], "mae"),
        "intervals": [
            (
                s,
                estimate(found[s, own, "interval_coverage"], 100),
                estimate(found[s, own, "interval_width"]),
            )
            for s in scenarios
            if (s, own, "interval_coverage") in found
        ],
        "heads": [text["names"][m] for m in present],
        "metrics": [
            (s, m, [estimate(found.get((s, m, metric))) for metric in present])
            for s in scenarios
            for m in methods
            if (s, m, "mae") in found
        ],
        "records": [
            {
                "id": row["record_id"],
                "link": report_link(out, row["record_id"]),
                "truth": _number(row["value_true"]),
                "value": _number(row["value"]),
                "interval": ""
                if row["value_low"] is None
                else f"{_number(row['value_low'])} to {_number(row['value_high'])}",
                "error": _number(row["value"] - row["value_true"]),
            }
            for row in listed
            if row["method"] == own
        ],
        "use": [_use(row) for row in facts.get("use", ())],
        "failures": failures,
    }


def _use(row: Row) -> dict[str, Any]:
    """Return a row of the use audit as text."""

    def told(value: float | None) -> tuple[str, str]:
        return ("–", "") if value is None else (f"{value:.3f}", "")

    loss = row["loss"]
    return {
        "part": row["part"],
        "verdict": row["verdict"],
        "patients": row["patients"],
        "values": [
            told(row["change"]),
            told(None) if loss["value"] is None else estimate(loss),
            told(row["p"]),
        ],
    }


def _number(value: float) -> str:
    text = f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _plot(path: Path, facts: Row, scores: Scores) -> None:
    """Draw answers against the truth, a panel per method."""
    from matplotlib.figure import Figure

    text, names = words()["numbers"], words()["cohort"]["methods"]
    own, unit = facts["selector"], facts["scale"]["unit"]
    answered = scores.told["value"]
    truth, least, most = (scores.known[c] for c in ("value_true", "value_low", "value_high"))
    shown = [m for m in dict.fromkeys((own, *COMPARED[:2])) if m in answered]
    figure = Figure(figsize=(3.2 * len(shown), 3.8), layout="compressed")
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    low, high = facts["scale"]["low"], facts["scale"]["high"]
    margin = 0.04 * (high - low)
    ends = (low - margin, high + margin)
    for method, colour, axes in zip(shown, _COLOURS, panels, strict=False):
        answers = answered[method]
        axes.plot(ends, ends, color="#b8c0c8", lw=1, zorder=1)
        if method == own and not np.isnan(least).all():
            axes.vlines(truth, least, most, color=colour, lw=0.6, alpha=0.35, zorder=2)
        axes.plot(truth, answers, "o", color=colour, ms=3.5, alpha=0.7, mew=0, zorder=3)
        axes.set_title(names.get(method, method).replace("$", r"\$"), fontsize=9, loc="left")
        axes.set_xlim(ends)
        axes.set_ylim(ends)
        axes.set_aspect("equal")
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    unit = f" ({unit})" if unit else ""
    target = text["truth"].format(target=facts["target"], unit=unit).replace("$", r"\$")
    figure.supxlabel(target, fontsize=9, color=_SOFT)
    panels[0].set_ylabel(
        text["answered"].format(unit=unit).replace("$", r"\$"), fontsize=9, color=_SOFT
    )
    figure.savefig(path, dpi=200)
