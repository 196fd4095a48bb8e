"""The page of an evaluated cohort: did selection help, where, by how much."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from dymo_med.files import write_text
from dymo_med.inference.answer import COMPARED
from dymo_med.inference.cohort_plots import (
    plot_admission,
    plot_auroc,
    plot_calibration,
    plot_changes,
    plot_rates,
    rates,
)
from dymo_med.inference.report import environment, guarded, words
from dymo_med.types import Scores

Row = Mapping[str, Any]

_SHOWN = ("auroc", "auprc", "balanced_accuracy", "f1", "brier", "ece")
_CHOICES = ("admitted", "rescued", "harmed", "trusted_right", "rejected_right")
_SETS = ("set_coverage", "set_size")
_NUMBER = re.compile(r"^-?\d+(\.\d+)?(e[+-]?\d+)?(?= (to <|and over))")
_SCALES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0)  # where an axis of differences may end


def write_pages(
    out: Path,
    facts: Row,
    scores: Sequence[Scores],
    metrics: Sequence[Row],
    listed: Sequence[Row],
    failures: Sequence[Row],
    *,
    patterns: Sequence[Row] = (),
    subgroups: Sequence[Row] = (),
    recovery: Row | None = None,
) -> None:
    """Write `index.html` and `plots/`.

    Args:
        out: Folder of the evaluation; reports in it are linked.
        facts: What `run.json` says.
        scores: Every scenario, in order.
        metrics: Rows of `metrics.csv`.
        listed: Rows of `predictions.csv` of the first scenario.
        failures: Rows of `failures.csv`.
        patterns: Rows of `metrics_by_pattern.csv`.
        subgroups: Rows of `metrics_by_subgroup.csv`.
        recovery: What `quality.Collector.write` returned; None = nothing was measured.
    """
    plots = out / "plots"
    plots.mkdir(exist_ok=True)
    some = [s for s in scores if len(s)]
    shown = view(out, facts, scores, metrics, listed, failures, patterns, subgroups)
    drawn = {
        "auroc": bool(metrics),
        "rates": len(rates(facts["scenarios"])) > 1 and bool(metrics),
        "calibration": bool(some),
        "admission": bool(shown["trust"]),
        "changes": bool(shown["changes"]),
    }
    draw: dict[str, Callable[[Path], None]] = {
        "auroc": lambda path: plot_auroc(path, facts, metrics),
        "rates": lambda path: plot_rates(path, facts, metrics),
        "calibration": lambda path: plot_calibration(path, facts, some[0]),
        "admission": lambda path: plot_admission(path, shown["scenarios"], shown["trust"]),
        "changes": lambda path: plot_changes(path, shown["changes"]),
    }
    for name, wanted in drawn.items():
        # An earlier run in this folder may have had other scenarios.
        (plots / f"{name}.png").unlink(missing_ok=True)
        if wanted:
            draw[name](plots / f"{name}.png")
    page = environment().get_template("cohort.html.j2")
    tables = {}
    if recovery is not None:
        for name in (
            "answers",
            "images",
            "sequences",
            "cells",
        ):  # their rows name the scenario first
            tables[name] = _grouped(recovery[name]["rows"], lambda row: str(row["names"][0]))
    html = page.render(shown, drawn=drawn, recovery=recovery, recovery_rows=tables)
    write_text(out / "index.html", guarded(html))


def view(
    out: Path,
    facts: Row,
    scores: Sequence[Scores],
    metrics: Sequence[Row],
    listed: Sequence[Row],
    failures: Sequence[Row],
    patterns: Sequence[Row] = (),
    subgroups: Sequence[Row] = (),
) -> dict[str, Any]:
    """Return what the template needs; arguments as of `write_pages`."""
    found = {(r["scenario"], r["method"], r["metric"]): r for r in metrics}
    own = facts["selector"]
    scenarios = [s for s in facts["scenarios"] if (s, own, "auroc") in found]
    # Where measurements alone are the default, nothing was selected and nothing can have helped.
    against = [other for other in COMPARED if other != own] if own != COMPARED[0] else []
    headlines, reach = _headlines(scenarios, own, against, found)
    some = [s for s in scores if len(s)]
    return {
        "f": facts,
        "scenarios": scenarios,
        "against": against,
        "headlines": headlines,
        "reach": f"{reach:g}",
        "answer": _answer(headlines, bool(against)),
        "methods": facts["methods"],
        "table": [
            {
                "scenario": s,
                "values": [_estimate(found.get((s, m, "auroc"))) for m in facts["methods"]],
                "patients": found[s, own, "auroc"]["patients"],
            }
            for s in scenarios
        ],
        "changes": [_changes(s) for s in some] if against else [],
        "trust": _trust(some) if against else {},
        **_choices(scenarios, own, found, (*(_CHOICES if against else ()), *_SETS)),
        "patterns": _grouped(_parts(patterns, "pattern", own), _scenario),
        "subgroups": _grouped(_ordered(_parts(subgroups, "level", own)), _scenario),
        "metrics": _grouped(
            [
                {
                    "scenario": s,
                    "method": m,
                    "values": [
                        # Resampling inflates the calibration error: its interval would mislead.
                        (_estimate(found[s, m, metric])[0], "")
                        if metric == "ece"
                        else _estimate(found[s, m, metric])
                        for metric in _SHOWN
                    ],
                }
                for s in scenarios
                for m in facts["methods"]
                if (s, m, "auroc") in found
            ],
            _scenario,
        ),
        "use": [_use(row) for row in facts.get("use", ())],
        "shown": _SHOWN,
        "patients": _patients(out, facts, listed),
        "compared": _compared(own),
        "failures": failures,
    }


def _use(row: Row) -> dict[str, Any]:
    """Return a row of the use audit as text."""

    def known(one: Row) -> tuple[str, str]:
        return ("–", "") if one["value"] is None else _estimate(one)

    def number(value: float | None) -> tuple[str, str]:
        return ("–", "") if value is None else (f"{value:.3f}", "")

    return {
        "part": row["part"],
        "verdict": row["verdict"],
        "patients": row["patients"],
        "values": [
            number(row["change"]),
            known(row["auroc_loss"]),
            number(row["p"]),
            known(row["alone"]),
            known(row["reference"]),
        ],
    }


def _scenario(row: Row) -> str:
    return str(row["scenario"])


def _grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> list[tuple[str, list[Row]]]:
    """Return rows that follow each other under what they have in common."""
    return [(name, list(group)) for name, group in groupby(rows, key)]


def _headlines(
    scenarios: Sequence[str],
    own: str,
    against: Sequence[str],
    found: Mapping[tuple[str, str, str], Row],
) -> tuple[list[dict[str, Any]], float]:
    """Return the finding of each scenario, and where the axis of differences ends.

    The verdict is about measurements alone; the other differences stand beside it.
    """
    rows = {(s, o): found.get((s, f"{own} - {o}", "auroc")) for s in scenarios for o in against}
    ends = [abs(row[k]) for row in rows.values() if row for k in ("value", "low", "high")]
    largest = max((e for e in ends if not math.isnan(e)), default=0.0)
    reach = next(scale for scale in _SCALES if scale >= min(largest, 1.0))
    headlines = [
        {
            "scenario": s,
            "verdict": _verdict(rows[s, against[0]]) if against else "",
            "value": _estimate(found[s, own, "auroc"]),
            "differences": [
                {
                    "text": _estimate(rows[s, other], signed=True),
                    "bar": _bar(rows[s, other], reach),
                }
                for other in against
            ],
        }
        for s in scenarios
    ]
    return headlines, reach


def _verdict(row: Row | None) -> str:
    """Return which of the verdicts a difference to measurements alone is."""
    if row is None or math.isnan(row["value"]):
        return "undefined"
    if row["low"] > 0:
        return "helped"
    return "hurt" if row["high"] < 0 else "unclear"


def _bar(row: Row | None, reach: float) -> dict[str, str] | None:
    """Return where a difference and its interval lie on an axis, in percent of its length."""
    if row is None or math.isnan(row["value"]):
        return None

    def place(value: float) -> float:
        return 50 + 50 * min(max(value / reach, -1.0), 1.0)

    low, high = (row["value"] if math.isnan(row[k]) else row[k] for k in ("low", "high"))
    return {
        "left": f"{place(low):.1f}",
        "width": f"{place(high) - place(low):.1f}",
        "at": f"{place(row['value']):.1f}",
    }


def _answer(headlines: Sequence[Row], selected: bool) -> str:
    """Return the answer to the page's question in one sentence."""
    text = words()["cohort"]
    if not headlines:
        return str(text["nothing"])
    if not selected:
        return str(text["alone"])
    counts = Counter(h["verdict"] for h in headlines)
    if len(headlines) == 1:
        return str(text["one"].format(verdict=text["verdicts"][headlines[0]["verdict"]]))
    said = ", ".join(text["tally"][v].format(n=counts[v]) for v in text["tally"] if counts[v])
    return str(text["several_scenarios"].format(tally=said[0].upper() + said[1:], n=len(headlines)))


def _estimate(row: Row | None, *, signed: bool = False) -> tuple[str, str]:
    """Return an estimate and its interval, as text."""
    if row is None or math.isnan(row["value"]):
        return "–", ""

    def number(value: float) -> str:
        text = f"{value:{'+' if signed else ''}.3f}"
        return text.replace("-", "\N{MINUS SIGN}") if float(text) else "0.000"

    return number(row["value"]), _between(row, number)


def _between(row: Row, number: Callable[[float], str]) -> str:
    """Return an interval as text.

    Where all patients agree, resampling them says nothing of how sure that is: an interval without
    width is left out.
    """
    return f"{number(row['low'])} to {number(row['high'])}" if row["low"] < row["high"] else ""


def _changes(scores: Scores) -> dict[str, Any]:
    """Return how many answers selection put right and wrong, against each other method."""

    def right(method: str) -> NDArray[np.bool_]:
        return np.asarray(scores.probabilities[method].argmax(1) == scores.labels)

    own = right(scores.own)
    return {
        "scenario": scores.scenario,
        "records": len(scores),
        "against": [
            {
                "method": other,
                "right": int((own & ~right(other)).sum()),
                "wrong": int((~own & right(other)).sum()),
            }
            for other in COMPARED
            if other != scores.own
        ],
    }


def _trust(scenarios: Sequence[Scores]) -> dict[str, list[tuple[int, int]]]:
    """Return per modality and scenario how often it was trusted, and how often recovered."""
    counts = {
        name: [(int(s.admitted[:, m].sum()), int(s.candidates[:, m].sum())) for s in scenarios]
        for m, name in enumerate(scenarios[0].modalities if scenarios else ())
    }
    return {name: row for name, row in counts.items() if any(of for _, of in row)}


def _choices(
    scenarios: Sequence[str],
    own: str,
    found: Mapping[tuple[str, str, str], Row],
    metrics: Sequence[str],
) -> dict[str, Any]:
    """Return how good choices and prediction sets were, per scenario, as text; known ones only."""
    known = [m for m in metrics if any((s, own, m) in found for s in scenarios)]
    rows = [
        {"scenario": s, "values": [_percent(found.get((s, own, m)), m) for m in known]}
        for s in scenarios
    ]
    return {"choices": rows if known else [], "choice_metrics": known}


def _percent(row: Row | None, metric: str) -> tuple[str, str]:
    """Return a share and its interval in percent (the size of a set as it is), as text."""
    if row is None or math.isnan(row["value"]):
        return "–", ""
    scale, digits = (1, 2) if metric == "set_size" else (100, 0)

    def number(value: float) -> str:
        return f"{scale * value:.{digits}f}"

    return number(row["value"]), _between(row, number)


def _parts(rows: Sequence[Row], key: str, own: str) -> list[Row]:
    """Return what the page shows of parts of the cohort, as text.

    The bundle's selector with its interval, and measurements alone beside it: where selection
    helps may be in one part of the cohort.
    """
    parts: dict[tuple[str, str, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        place = (row["scenario"], row.get("subgroup", ""), row[key])
        parts.setdefault(place, {})[row["method"], row["metric"]] = row
    shown: list[Row] = []
    for (scenario, subgroup, name), metrics in parts.items():
        first = metrics[own, "accuracy"]
        sets = metrics.get((own, "set_coverage"))
        alone = [(COMPARED[0], m) for m in ("auroc", "accuracy")] if own != COMPARED[0] else []
        shown.append(
            {
                "scenario": scenario,
                "subgroup": subgroup,
                "name": name,
                "patients": first["patients"],
                "values": [
                    _estimate(metrics[own, "auroc"]),
                    *((_estimate(metrics[place])[0], "") for place in alone[:1]),
                    _percent(first, "accuracy"),
                    *((_percent(metrics[place], "accuracy")[0], "") for place in alone[1:]),
                    _estimate(metrics[own, "brier"]),
                    (_estimate(metrics[own, "ece"])[0], ""),
                    _percent(sets, "set_coverage"),
                ],
                "calibrated_on": sets.get("calibrated_on") if sets is not None else None,
            }
        )
    return shown


def _ordered(rows: Sequence[Row]) -> list[Row]:
    """Return the parts of each subgroup in the order of their bands, what is not known last."""

    def rank(row: Row) -> tuple[float, float]:
        name, number = row["name"], _NUMBER.search(row["name"])
        if name == "unknown":
            return 2, 0
        # "< 50" comes before "50 to < 65", and names that are no bands stay where they were.
        return (0 if name.startswith("<") else 1), float(number[0]) if number else 0.0

    result: list[Row] = []
    for _, group in groupby(rows, lambda row: (row["scenario"], row["subgroup"])):
        result += sorted(group, key=rank)
    return result


def _patients(out: Path, facts: Row, listed: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one row per record of the first scenario, with a link where there is a report."""
    methods: dict[str, list[Row]] = {}
    for row in listed:
        methods.setdefault(row["method"], []).append(row)
    own = facts["selector"]
    # Two classes: the positive one throughout. More: the class that was predicted.
    positive = f"prob_{facts['classes'][-1]}" if len(facts["classes"]) == 2 else None
    rows = []
    for i, row in enumerate(methods.get(own, [])):
        report = f"reports/{row['record_id']}/report.html"
        rows.append(
            {
                **row,
                "link": quote(report) if (out / report).is_file() else "",
                "right": row["predicted"] == row["label"],
                "states": [_state(row, name) for name in facts["modalities"]],
                "probabilities": [
                    methods[m][i][positive or f"prob_{row['predicted']}"] for m in _compared(own)
                ],
                "flip": methods["observed_only"][i]["predicted"] != row["predicted"],
            }
        )
    return rows


def _compared(own: str) -> list[str]:
    """Return whose probabilities stand beside each other in the table of patients."""
    return list(dict.fromkeys((COMPARED[0], own, COMPARED[1])))


def _state(row: Row, name: str) -> str:
    """Return what became of one modality of one record, by the words of the reports."""
    if name in row["observed"].split("+"):
        return "partly" if f"{name}~" in row["pattern"].split("+") else "observed"
    states = ("trusted", "rejected")
    return next((s for s in states if name in row[s].split("+")), "absent")
