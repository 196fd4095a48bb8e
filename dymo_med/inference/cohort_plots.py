"""The plots of an evaluated cohort: methods told apart by shape and place, not by colour alone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dymo_med.inference.answer import COMPARED
from dymo_med.inference.report import words
from dymo_med.inference.scores import ORACLE
from dymo_med.metrics import patient_weights, reliability
from dymo_med.types import Scores

Row = Mapping[str, Any]

_COLOURS = {
    "observed_only": ("#6d7681", "s"),
    "trust_all": ("#a9570c", "^"),
    ORACLE: ("#1b2530", "D"),
}
# The bundle's own selector; others that were compared come in the order of the list after it.
_OWN = ("#1f5a82", "o")
_OTHERS = (("#5b8a3c", "v"), ("#8a4f7d", "P"), ("#b08d1f", "X"), ("#3f8f8a", "d"), ("#9a5b4f", "*"))
_INK, _SOFT, _LINE, _MADE = "#1b2530", "#55616e", "#d9dde2", "#a9570c"
_WIDTH = 9.6  # inches; that of the page, so that text comes out in the size it has there
_SIZE = 9
_ACROSS = 4  # panels side by side


def rates(scenarios: Sequence[str]) -> dict[str, float]:
    """Return what share of the modalities each scenario takes away, of those that say so."""
    shares = {s: float(s.removeprefix("rate:")) for s in scenarios if s.startswith("rate:")}
    return {**({"as-is": 0.0} if "as-is" in scenarios and shares else {}), **shares}


def plot_auroc(path: Path, facts: Row, metrics: Sequence[Row]) -> None:
    """Draw AUROC with its interval: a panel per scenario, methods down, best read across."""
    names = words()["cohort"]["methods"]
    scenarios, methods = _measured(facts["scenarios"], metrics), facts["methods"]
    found = {(r["scenario"], r["method"]): r for r in metrics if r["metric"] == "auroc"}
    figure, panels = _panels(scenarios, [_literal(names.get(m, m)) for m in methods])
    for scenario, axes in zip(scenarios, panels, strict=True):
        floor = found.get((scenario, COMPARED[0]))
        if floor is not None and not math.isnan(floor["value"]):
            axes.axvline(floor["value"], color=_COLOURS[COMPARED[0]][0], lw=0.8, ls=(0, (2, 2)))
        for y, method in enumerate(methods):
            row = found.get((scenario, method))
            if row is None or math.isnan(row["value"]):
                continue
            colour, marker = _look(method, facts)
            axes.plot([row["low"], row["high"]], [y, y], color=colour, lw=2)
            axes.plot(row["value"], y, marker, color=colour, ms=6)
    low, high = panels[0].get_xlim()
    panels[0].set_xlim(low, min(high, 1.02))
    figure.supxlabel(words()["cohort"]["plots"]["auroc_axis"], fontsize=_SIZE, color=_SOFT)
    figure.savefig(path, dpi=200)


def plot_rates(path: Path, facts: Row, metrics: Sequence[Row]) -> None:
    """Draw AUROC against the share of modalities that is hidden.

    Bands only of the bundle's selector and of measurements alone: that is the comparison the page
    is about, and more of them cannot be told apart.
    """
    from matplotlib.figure import Figure

    text = words()["cohort"]
    shares = rates(facts["scenarios"])
    found = {(r["scenario"], r["method"]): r for r in metrics if r["metric"] == "auroc"}
    figure = Figure(figsize=(_WIDTH, 2.7), layout="constrained")
    axes = figure.subplots()
    own = facts["selector"]
    last: dict[str, float] = {}
    for method in facts["methods"]:
        colour, marker = _look(method, facts)
        rows = [
            (share, found[s, method])
            for s, share in sorted(shares.items(), key=lambda item: item[1])
            if (s, method) in found and not math.isnan(found[s, method]["value"])
        ]
        if not rows:
            continue
        x, value = [share for share, _ in rows], [row["value"] for _, row in rows]
        last[method] = value[-1]
        if method in (own, COMPARED[0]):
            low, high = ([row[k] for _, row in rows] for k in ("low", "high"))
            hatch = "////" if method == COMPARED[0] and method != own else None
            axes.fill_between(
                x, low, high, facecolor=(colour, 0.13), edgecolor=(colour, 0.35), hatch=hatch, lw=0
            )
        axes.plot(
            x,
            value,
            marker=marker,
            color=colour,
            lw=2.4 if method == own else 1.2,
            ls=(0, (4, 2)) if method == ORACLE else "-",
            ms=6,
            zorder=4 if method == own else 3,
            label=_literal(text["methods"].get(method, method)),
        )
    # In the order in which the lines end, as the eye meets them.
    drawn = dict(zip(last, axes.get_legend_handles_labels()[0], strict=True))
    figure.legend(
        handles=[drawn[m] for m in sorted(last, key=lambda m: -last[m])],
        loc="outside right center",
        frameon=False,
        fontsize=_SIZE,
    )
    ticks = dict(sorted((share, s) for s, share in shares.items()))
    labels = [s if s == "as-is" else f"{share:g}" for share, s in ticks.items()]
    axes.set_xticks(list(ticks), labels)
    axes.set_ylim(top=min(1.02, axes.get_ylim()[1]))
    axes.set_xlabel(text["plots"]["rate"], fontsize=_SIZE, color=_SOFT)
    axes.set_ylabel("AUROC", fontsize=_SIZE, color=_SOFT)
    _plain(axes)
    figure.savefig(path, dpi=200)


def plot_calibration(path: Path, facts: Row, scores: Scores) -> None:
    """Draw observed against predicted frequency of the last class, a panel per method."""
    from matplotlib.figure import Figure

    text, positive = words()["cohort"], len(scores.classes) - 1
    labels = (scores.labels == positive).astype(np.int64)
    weights = patient_weights(scores.patient_ids)
    shown = [COMPARED[0], facts["selector"], COMPARED[1]]
    shown = [m for m in dict.fromkeys(shown) if m in scores.probabilities]
    figure = Figure(figsize=(3.2 * len(shown), 3.5), layout="constrained")
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for method, axes in zip(shown, panels, strict=True):
        colour, marker = _look(method, facts)
        p = scores.probabilities[method][:, positive]
        bins = [b for b in reliability(labels, np.stack([1 - p, p], 1), weights) if b.records]
        x = [b.probability for b in bins]
        axes.plot([0, 1], [0, 1], color=_LINE, lw=1)
        axes.vlines(x, [b.low for b in bins], [b.high for b in bins], color=colour, alpha=0.5)
        axes.scatter(
            x,
            [b.observed for b in bins],
            s=[20 + 100 * b.records / len(scores) for b in bins],
            color=colour,
            marker=marker,
            clip_on=False,
            zorder=3,
        )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        _title(axes, text["methods"].get(method, method), 30)
        _plain(axes)
    last = _short(scores.classes[-1])
    figure.supxlabel(
        text["plots"]["probability_axis"].format(**{"class": last}), fontsize=_SIZE, color=_SOFT
    )
    panels[0].set_ylabel(
        text["plots"]["share_axis"].format(**{"class": last}), fontsize=_SIZE, color=_SOFT
    )
    figure.savefig(path, dpi=200)


def plot_admission(
    path: Path, scenarios: Sequence[str], counts: Mapping[str, Sequence[tuple[int, int]]]
) -> None:
    """Draw per modality the share of its recoveries that was trusted, a panel per scenario.

    Args:
        path: File to write.
        scenarios: Texts.
        counts: Per modality (trusted, recovered) of each scenario.
    """
    text = words()["cohort"]
    figure, panels = _panels(scenarios, [_short(name) for name in counts])
    for number, axes in enumerate(panels):
        for y, row in enumerate(counts.values()):
            trusted, recovered = row[number]
            if not recovered:
                continue
            share = 100 * trusted / recovered
            axes.barh(y, 100, color="#f5f6f7", height=0.62)
            axes.barh(y, share, color=_MADE, height=0.62, hatch="////", edgecolor="white", lw=0)
            axes.text(
                104,
                y,
                text["trust_cell"].format(trusted=trusted, recovered=recovered),
                va="center",
                fontsize=8,
                color=_SOFT,
            )
    panels[0].set_xlim(0, 155)
    panels[0].set_xticks([0, 50, 100])
    figure.supxlabel(text["plots"]["admission"], fontsize=_SIZE, color=_SOFT)
    figure.savefig(path, dpi=200)


def plot_changes(path: Path, changes: Sequence[Row]) -> None:
    """Draw how many answers selection put right and put wrong, a panel per other method.

    Args:
        path: File to write.
        changes: Per scenario `against`: per other method how many were put `right` and `wrong`.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    text = words()["cohort"]
    others = [a["method"] for a in changes[0]["against"]]
    most = max(1, *(a[k] for c in changes for a in c["against"] for k in ("right", "wrong")))
    names = [_wrapped(c["scenario"], 32) for c in changes]
    height = max(0.3, 0.19 * max(1 + name.count("\n") for name in names))
    figure = Figure(figsize=(_WIDTH, 1.1 + height * len(changes)), layout="constrained")
    panels = figure.subplots(1, len(others), sharex=True, sharey=True, squeeze=False)[0]
    for number, (other, axes) in enumerate(zip(others, panels, strict=True)):
        for y, change in enumerate(changes):
            row = change["against"][number]
            axes.barh(y, row["right"], color=_OWN[0], height=0.6)
            axes.barh(y, -row["wrong"], color=_MADE, height=0.6, hatch="////", edgecolor="white")
            for count, side in ((row["right"], 1), (row["wrong"], -1)):
                axes.annotate(
                    str(count),
                    (side * count, y),
                    xytext=(4 * side, 0),
                    textcoords="offset points",
                    ha="left" if side > 0 else "right",
                    va="center",
                    fontsize=8,
                    color=_INK if count else _SOFT,
                )
        axes.axvline(0, color=_INK, lw=0.8)
        axes.set_yticks(range(len(changes)), names)
        axes.set_ylim(len(changes) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{abs(x):.0f}"))
        name = text["methods"].get(other, other)
        _title(axes, text["changed_against"].format(other=name), 34)
        _plain(axes)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_xlim(-1.25 * most, 1.25 * most)
    handles = [
        Patch(facecolor=_MADE, hatch="////", edgecolor="white", label=text["plots"]["spoilt"]),
        Patch(facecolor=_OWN[0], label=text["plots"]["mended"]),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=_SIZE
    )
    figure.savefig(path, dpi=200)


def _panels(scenarios: Sequence[str], names: Sequence[str]) -> tuple[Any, list[Any]]:
    """Return a figure with a panel per scenario, the same names down the side of each."""
    from matplotlib.figure import Figure

    lines = math.ceil(len(scenarios) / _ACROSS)
    across = math.ceil(len(scenarios) / lines)
    size = (_WIDTH, 0.5 + lines * (0.45 + 0.25 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, across, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(scenarios) :]:
        axes.set_axis_off()
    for number, (scenario, axes) in enumerate(zip(scenarios, grid.flat, strict=False)):
        # Shared axes are labelled in the lowest line only, which may be shorter than the others.
        axes.tick_params(axis="x", labelbottom=number + across >= len(scenarios))
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        _title(axes, scenario, 88 // across)
        _plain(axes)
        axes.tick_params(axis="y", length=0)
    return figure, list(grid.flat[: len(scenarios)])


def _measured(scenarios: Sequence[str], metrics: Sequence[Row]) -> list[str]:
    present = {row["scenario"] for row in metrics}
    return [s for s in scenarios if s in present]


def _look(method: str, facts: Row) -> tuple[str, str]:
    """Return colour and marker of a method."""
    if method == facts["selector"]:
        return _OWN
    if method in _COLOURS:
        return _COLOURS[method]
    others = [m for m in facts["methods"] if m not in _COLOURS and m != facts["selector"]]
    return _OTHERS[others.index(method) % len(_OTHERS)]


def _literal(text: str) -> str:
    """Return text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def _short(text: str) -> str:
    return _literal(textwrap.shorten(text, 28, placeholder="…") if " " in text else text[:28])


def _wrapped(text: str, width: int) -> str:
    """Return a name broken after commas where it is long, in at most three lines."""
    lines = textwrap.wrap(text.replace(",", ", "), width, max_lines=3, placeholder="…")
    return _literal("\n".join(line.replace(", ", ",") for line in lines))


def _title(axes: Any, text: str, width: int) -> None:
    axes.set_title(_wrapped(text, width), fontsize=_SIZE, loc="left", color=_INK, weight="bold")


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_LINE)
    axes.tick_params(labelsize=_SIZE, color=_LINE, labelcolor=_INK)
