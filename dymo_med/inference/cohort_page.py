"""The page and the plots of an evaluated cohort: did selection help, where, by how much."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from dymo_med.files import write_text
from dymo_med.inference.predict import COMPARED
from dymo_med.inference.report import environment, words
from dymo_med.metrics import patient_weights

Row = Mapping[str, Any]

_SHOWN = ("auroc", "balanced_accuracy", "brier", "ece")
_COLOURS = {
    "observed_only": ("#6d7681", "s"),
    "trust_all": ("#a9570c", "^"),
    "oracle": ("#1b2530", "D"),
}
# The bundle's own selector; others that were compared come in the order of the list after it.
_OWN = ("#1f5a82", "o")
_OTHERS = (("#5b8a3c", "v"), ("#8a4f7d", "P"), ("#b08d1f", "X"), ("#3f8f8a", "d"), ("#9a5b4f", "*"))
_BINS = 10


def write_pages(
    out: Path,
    facts: Row,
    predictions: Sequence[Row],
    metrics: Sequence[Row],
    failures: Sequence[Row],
    recovery: Row | None = None,
) -> None:
    """Write `index.html` and `plots/`.

    Args:
        out: Folder of the evaluation; reports in it are linked.
        facts: What `run.json` says.
        predictions: Rows of `predictions.csv`.
        metrics: Rows of `metrics.csv`.
        failures: Rows of `failures.csv`.
        recovery: What `quality.write` returned; None = nothing was measured.
    """
    plots = out / "plots"
    plots.mkdir(exist_ok=True)
    if metrics:
        _plot_auroc(plots / "auroc.png", facts, metrics)
        _plot_calibration(plots / "calibration.png", facts, predictions)
    page = environment().get_template("cohort.html.j2")
    shown = view(out, facts, predictions, metrics, failures)
    write_text(out / "index.html", page.render(shown, recovery=recovery))


def view(
    out: Path,
    facts: Row,
    predictions: Sequence[Row],
    metrics: Sequence[Row],
    failures: Sequence[Row],
) -> dict[str, Any]:
    """Return what the template needs.

    Args:
        out: Folder of the evaluation.
        facts: What `run.json` says.
        predictions: Rows of `predictions.csv`.
        metrics: Rows of `metrics.csv`.
        failures: Rows of `failures.csv`.
    """
    found = {(r["scenario"], r["method"], r["metric"]): r for r in metrics}
    own = facts["selector"]
    scenarios = [s for s in facts["scenarios"] if (s, own, "auroc") in found]
    # Where measurements alone are the default, nothing was selected and nothing can have helped.
    against = [other for other in COMPARED if other != own] if own != COMPARED[0] else []
    differences = [f"{own} - {other}" for other in against]
    return {
        "f": facts,
        "headlines": [_headline(s, own, differences, found) for s in scenarios],
        "methods": facts["methods"],
        "differences": differences[:2],  # more columns than these do not fit a page
        "table": [
            {
                "scenario": s,
                "methods": [_estimate(found.get((s, m, "auroc"))) for m in facts["methods"]],
                "differences": [
                    _estimate(found.get((s, d, "auroc")), signed=True) for d in differences[:2]
                ],
                "records": found[s, own, "auroc"]["records"],
                "patients": found[s, own, "auroc"]["patients"],
            }
            for s in scenarios
        ],
        "scenarios": scenarios,
        "changes": [_changes(s, own, predictions) for s in scenarios],
        "trust": _trust(scenarios, own, predictions),
        "metrics": [
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
        "shown": _SHOWN,
        "patients": _patients(out, facts, predictions),
        "failures": failures,
    }


def _headline(
    scenario: str, own: str, differences: Sequence[str], found: Mapping[tuple[str, str, str], Row]
) -> dict[str, str]:
    """Return the finding of one scenario as a verdict and a sentence."""
    text = words()["cohort"]
    value = _interval(found[scenario, own, "auroc"])
    if not differences:
        return {"scenario": scenario, "verdict": "", "sentence": text["alone"].format(value=value)}
    row = found[scenario, differences[0], "auroc"]
    if math.isnan(row["value"]):
        verdict = "undefined"
    elif row["low"] > 0:
        verdict = "helped"
    else:
        verdict = "hurt" if row["high"] < 0 else "unclear"
    parts = [
        text["against"].format(
            other=text["methods"].get(d.removeprefix(f"{own} - "), d),
            difference=_interval(found[scenario, d, "auroc"], signed=True),
        )
        for d in differences
    ]
    return {
        "scenario": scenario,
        "verdict": text["verdicts"][verdict],
        "sentence": text["sentence"].format(value=value, differences="; ".join(parts)),
    }


def _estimate(row: Row | None, *, signed: bool = False) -> tuple[str, str]:
    """Return an estimate and its interval, as text."""
    if row is None or math.isnan(row["value"]):
        return "–", ""
    sign = "+" if signed else ""

    def number(value: float) -> str:
        return f"{value:{sign}.3f}".replace("-", "\N{MINUS SIGN}")

    interval = "" if math.isnan(row["low"]) else f"{number(row['low'])} to {number(row['high'])}"
    return number(row["value"]), interval


def _interval(row: Row | None, *, signed: bool = False) -> str:
    """Return an estimate with its interval, in one line."""
    value, interval = _estimate(row, signed=signed)
    return f"{value} ({interval})" if interval else value


def _by_method(scenario: str, predictions: Sequence[Row]) -> dict[str, list[Row]]:
    methods: dict[str, list[Row]] = {}
    for row in predictions:
        if row["scenario"] == scenario:
            methods.setdefault(row["method"], []).append(row)
    return methods


def _changes(scenario: str, own: str, predictions: Sequence[Row]) -> dict[str, Any]:
    """Return how many answers selection put right and wrong, against each other method."""
    methods = _by_method(scenario, predictions)
    result: dict[str, Any] = {"scenario": scenario, "records": len(methods[own]), "against": []}
    for other in COMPARED:
        if other == own:
            continue
        pairs = list(zip(methods[own], methods[other], strict=True))
        right = sum(a["predicted"] == a["label"] != b["predicted"] for a, b in pairs)
        wrong = sum(b["predicted"] == b["label"] != a["predicted"] for a, b in pairs)
        result["against"].append({"method": other, "right": right, "wrong": wrong})
    return result


def _trust(
    scenarios: Sequence[str], own: str, predictions: Sequence[Row]
) -> dict[str, list[tuple[int, int]]]:
    """Return per modality and scenario how often it was trusted, and how often recovered."""
    trusted: Counter[tuple[str, str]] = Counter()
    recovered: Counter[tuple[str, str]] = Counter()
    for row in predictions:
        if row["method"] == own:
            names = [name for name in row["trusted"].split("+") if name]
            others = [name for name in row["rejected"].split("+") if name]
            trusted.update((row["scenario"], name) for name in names)
            recovered.update((row["scenario"], name) for name in (*names, *others))
    return {
        name: [(trusted[s, name], recovered[s, name]) for s in scenarios]
        for name in sorted({name for _, name in recovered})
    }


def _patients(out: Path, facts: Row, predictions: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one row per record of the first scenario, with a link where there is a report."""
    methods = _by_method(facts["scenarios"][0], predictions)
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
                    methods[m][i][positive or f"prob_{row['predicted']}"]
                    for m in dict.fromkeys(("observed_only", own, "trust_all"))
                ],
                "flip": methods["observed_only"][i]["predicted"] != row["predicted"],
            }
        )
    return rows


def _state(row: Row, name: str) -> str:
    """Return what became of one modality of one record, by the words of the reports."""
    if name in row["observed"].split("+"):
        return "partly" if f"{name}~" in row["pattern"].split("+") else "observed"
    states = ("trusted", "rejected")
    return next((s for s in states if name in row[s].split("+")), "absent")


# --- Plots ----------------------------------------------------------------------------------------


def _plot_auroc(path: Path, facts: Row, metrics: Sequence[Row]) -> None:
    """Draw AUROC with its interval, scenarios down, methods side by side."""
    from matplotlib.figure import Figure

    text = words()["cohort"]["methods"]
    scenarios, methods = facts["scenarios"], facts["methods"]
    figure = Figure(figsize=(6.4, 0.9 + 0.34 * len(scenarios) * len(methods)), layout="constrained")
    axes = figure.subplots()
    for j, method in enumerate(methods):
        colour, marker = _look(method, facts)
        rows = {
            r["scenario"]: r for r in metrics if r["method"] == method and r["metric"] == "auroc"
        }
        for i, scenario in enumerate(scenarios):
            row = rows.get(scenario)
            if row is None or math.isnan(row["value"]):
                continue
            y = i * (len(methods) + 1) + j
            axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2)
            axes.plot(row["value"], y, marker, color=colour, markersize=6)
            axes.annotate(
                text.get(method, method),
                (row["high"], y),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=colour,
            )
    axes.set_yticks(
        [i * (len(methods) + 1) + (len(methods) - 1) / 2 for i in range(len(scenarios))], scenarios
    )
    axes.invert_yaxis()
    axes.set_xlabel("AUROC, 95 % interval")
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= 1])
    axes.set_xlim(low, high + 0.3 * (high - low))
    _plain(axes)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=200)


def _plot_calibration(path: Path, facts: Row, predictions: Sequence[Row]) -> None:
    """Draw observed against predicted frequency of the positive class, first scenario."""
    from matplotlib.figure import Figure

    text = words()["cohort"]["methods"]
    positive = facts["classes"][-1]
    figure = Figure(figsize=(4.2, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#d9dde2", linewidth=1)
    for method, rows in _by_method(facts["scenarios"][0], predictions).items():
        colour, marker = _look(method, facts)
        p = np.array([row[f"prob_{positive}"] for row in rows])
        y = np.array([row["label"] == positive for row in rows], dtype=float)
        w = patient_weights([row["patient_id"] for row in rows])
        bins = np.minimum((p * _BINS).astype(int), _BINS - 1)
        weight = np.bincount(bins, w, _BINS)
        some = weight > 0
        axes.plot(
            np.bincount(bins, w * p, _BINS)[some] / weight[some],
            np.bincount(bins, w * y, _BINS)[some] / weight[some],
            marker=marker,
            color=colour,
            linewidth=1,
            markersize=5,
            label=text.get(method, method),
        )
    axes.set_xlabel(f"probability of {positive}")
    axes.set_ylabel(f"share that is {positive}")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    figure.savefig(path, dpi=200)


def _look(method: str, facts: Row) -> tuple[str, str]:
    """Return colour and marker of a method."""
    if method == facts["selector"]:
        return _OWN
    if method in _COLOURS:
        return _COLOURS[method]
    others = [m for m in facts["methods"] if m not in _COLOURS and m != facts["selector"]]
    return _OTHERS[others.index(method) % len(_OTHERS)]


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
