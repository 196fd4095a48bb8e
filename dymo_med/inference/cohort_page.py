"""The page and the plots of an evaluated cohort: did selection help, where, by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from dymo_med.files import write_text
from dymo_med.inference.predict import COMPARED
from dymo_med.inference.report import environment, words
from dymo_med.inference.scores import Scores
from dymo_med.metrics import patient_weights, reliability

Row = Mapping[str, Any]

_SHOWN = ("auroc", "auprc", "balanced_accuracy", "f1", "brier", "ece")
_COLOURS = {
    "observed_only": ("#6d7681", "s"),
    "trust_all": ("#a9570c", "^"),
    "oracle": ("#1b2530", "D"),
}
# The bundle's own selector; others that were compared come in the order of the list after it.
_OWN = ("#1f5a82", "o")
_OTHERS = (("#5b8a3c", "v"), ("#8a4f7d", "P"), ("#b08d1f", "X"), ("#3f8f8a", "d"), ("#9a5b4f", "*"))
# Of choices and prediction sets.
_CHOICES = (
    *("admitted", "rescued", "harmed", "trusted_right", "rejected_right"),
    *("set_coverage", "set_size"),
)


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
    drawn = {
        "auroc": bool(metrics),
        "rates": len(_rates(facts["scenarios"])) > 1 and bool(metrics),
        "calibration": bool(some),
        "admission": any(bool(s.candidates.any()) for s in some),
        "changes": bool(some) and facts["selector"] != COMPARED[0],
    }
    draw: dict[str, Callable[[Path], None]] = {
        "auroc": lambda path: _plot_auroc(path, facts, metrics),
        "rates": lambda path: _plot_rates(path, facts, metrics),
        "calibration": lambda path: _plot_calibration(path, facts, some[0]),
        "admission": lambda path: _plot_admission(path, facts, metrics, some),
        "changes": lambda path: _plot_changes(path, facts, metrics),
    }
    for name, wanted in drawn.items():
        # An earlier run in this folder may have had other scenarios.
        (plots / f"{name}.png").unlink(missing_ok=True)
        if wanted:
            draw[name](plots / f"{name}.png")
    shown = view(out, facts, scores, metrics, listed, failures, patterns, subgroups)
    page = environment().get_template("cohort.html.j2")
    write_text(out / "index.html", page.render(shown, drawn=drawn, recovery=recovery))


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
        "changes": [_changes(s) for s in scores if len(s)],
        "trust": _trust([s for s in scores if len(s)]),
        "choices": _choices(scenarios, own, found),
        "patterns": _groups(patterns, "pattern", own),
        "subgroups": _groups(subgroups, "level", own),
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
        "patients": _patients(out, facts, listed),
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
    scenarios: Sequence[str], own: str, found: Mapping[tuple[str, str, str], Row]
) -> list[dict[str, Any]]:
    """Return how good choices and prediction sets were, per scenario, as text."""
    return [
        {"scenario": s, "values": [_percent(found.get((s, own, m)), m) for m in _CHOICES]}
        for s in scenarios
    ]


def _percent(row: Row | None, metric: str) -> tuple[str, str]:
    """Return a share and its interval in percent (the size of a set as it is), as text."""
    if row is None or math.isnan(row["value"]):
        return "–", ""
    scale, digits = (1, 2) if metric == "set_size" else (100, 0)

    def number(value: float) -> str:
        return f"{scale * value:.{digits}f}"

    interval = "" if math.isnan(row["low"]) else f"{number(row['low'])} to {number(row['high'])}"
    return number(row["value"]), interval


def _groups(rows: Sequence[Row], key: str, own: str) -> list[dict[str, Any]]:
    """Return what the page shows of parts of the cohort: the bundle's selector, as text."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["method"] == own:
            place = (row["scenario"], row.get("subgroup", ""), row[key])
            groups.setdefault(place, {})[row["metric"]] = row
    shown = []
    for (scenario, subgroup, name), metrics in groups.items():
        first = metrics["accuracy"]
        sets = metrics.get("set_coverage")
        shown.append(
            {
                "scenario": scenario,
                "subgroup": subgroup,
                "name": name,
                "records": first["records"],
                "patients": first["patients"],
                "values": [
                    _estimate(metrics["auroc"]),
                    _percent(first, "accuracy"),
                    _estimate(metrics["brier"]),
                    (_estimate(metrics["ece"])[0], ""),
                    _percent(sets, "set_coverage"),
                ],
                "calibrated_on": sets.get("calibrated_on") if sets is not None else None,
            }
        )
    return shown


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


def _plot_rates(path: Path, facts: Row, metrics: Sequence[Row]) -> None:
    """Draw AUROC against the share of modalities that is missing, a band per method."""
    from matplotlib.figure import Figure

    text = words()["cohort"]["methods"]
    rates = _rates(facts["scenarios"])
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for method in facts["methods"]:
        colour, marker = _look(method, facts)
        rows = {
            r["scenario"]: r for r in metrics if r["method"] == method and r["metric"] == "auroc"
        }
        points = [
            (share, rows[s]["value"], rows[s]["low"], rows[s]["high"])
            for s, share in rates.items()
            if s in rows and not math.isnan(rows[s]["value"])
        ]
        if not points:
            continue
        x, value, low, high = np.array(sorted(points)).T
        strong = method in (facts["selector"], *COMPARED)
        if strong:
            axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
        axes.plot(
            x,
            value,
            marker=marker,
            color=colour,
            linewidth=2 if method == facts["selector"] else 1,
            markersize=5,
            label=text.get(method, method),
        )
    axes.set_xlabel(words()["cohort"]["plots"]["rate"])
    axes.set_ylabel("AUROC")
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    figure.savefig(path, dpi=200)


def _plot_calibration(path: Path, facts: Row, scores: Scores) -> None:
    """Draw observed against predicted frequency of the positive class, first scenario."""
    from matplotlib.figure import Figure

    text = words()["cohort"]["methods"]
    positive = len(scores.classes) - 1
    labels = (scores.labels == positive).astype(np.int64)
    weights = patient_weights(scores.patient_ids)
    figure = Figure(figsize=(4.2, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#d9dde2", linewidth=1)
    for method, p in scores.probabilities.items():
        colour, marker = _look(method, facts)
        two = np.stack([1 - p[:, positive], p[:, positive]], 1)
        bins = [b for b in reliability(labels, two, weights) if b.records]
        x = [b.probability for b in bins]
        if method == facts["selector"]:
            axes.vlines(x, [b.low for b in bins], [b.high for b in bins], color=colour, alpha=0.4)
        axes.plot(
            x,
            [b.observed for b in bins],
            marker=marker,
            color=colour,
            linewidth=1,
            markersize=5,
            label=text.get(method, method),
        )
    axes.set_xlabel(f"probability of {facts['classes'][-1]}")
    axes.set_ylabel(f"share that is {facts['classes'][-1]}")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    figure.savefig(path, dpi=200)


def _plot_admission(
    path: Path, facts: Row, metrics: Sequence[Row], scenarios: Sequence[Scores]
) -> None:
    """Draw per modality the share of its recoveries that was trusted, scenarios side by side."""
    from matplotlib.figure import Figure

    counts = _trust(scenarios)
    figure = Figure(
        figsize=(6.4, 0.9 + 0.24 * len(counts) * (len(scenarios) + 1)), layout="constrained"
    )
    axes = figure.subplots()
    for i, row in enumerate(counts.values()):
        for j, (trusted, recovered) in enumerate(row):
            if not recovered:
                continue
            y = i * (len(scenarios) + 1) + j
            shade = 0.35 + 0.65 * (j + 1) / len(scenarios)
            axes.barh(y, 100 * trusted / recovered, color=_OWN[0], alpha=shade, height=0.8)
            axes.annotate(
                f"{scenarios[j].scenario}: {trusted} of {recovered}",
                (100 * trusted / recovered, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
    axes.set_yticks(
        [i * (len(scenarios) + 1) + (len(scenarios) - 1) / 2 for i in range(len(counts))],
        list(counts),
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 135)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_xlabel(words()["cohort"]["plots"]["admission"])
    _plain(axes)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=200)


def _plot_changes(path: Path, facts: Row, metrics: Sequence[Row]) -> None:
    """Draw how many right answers selection spoilt and how many wrong ones it put right."""
    from matplotlib.figure import Figure

    text = words()["cohort"]["plots"]
    found = {(r["scenario"], r["method"], r["metric"]): r for r in metrics}
    own, scenarios = facts["selector"], facts["scenarios"]
    figure = Figure(figsize=(6.4, 0.9 + 0.5 * len(scenarios)), layout="constrained")
    axes = figure.subplots()
    for i, scenario in enumerate(scenarios):
        for offset, metric, colour, marker in (
            (-0.15, "rescued", "#5b8a3c", "^"),
            (0.15, "harmed", "#a9570c", "v"),
        ):
            row = found.get((scenario, own, metric))
            if row is None or math.isnan(row["value"]):
                continue
            y = i + offset
            if not math.isnan(row["low"]):
                axes.plot([100 * row["low"], 100 * row["high"]], [y, y], color=colour, linewidth=2)
            axes.plot(
                100 * row["value"],
                y,
                marker,
                color=colour,
                markersize=6,
                label=text[metric] if i == 0 else None,
            )
    axes.set_yticks(range(len(scenarios)), scenarios)
    axes.set_ylim(len(scenarios) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(text["changes"])
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=200)


def _rates(scenarios: Sequence[str]) -> dict[str, float]:
    """Return what share of the modalities each scenario takes away, of those that say so."""
    shares = {s: float(s.removeprefix("rate:")) for s in scenarios if s.startswith("rate:")}
    return {**({"as-is": 0.0} if "as-is" in scenarios and shares else {}), **shares}


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
