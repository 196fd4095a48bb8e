"""What an evaluation of a segmentation shows: heat maps, Dice by number of scans, its page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dymo_med.files import write_text
from dymo_med.inference.failures import ALL
from dymo_med.inference.report import environment, guarded
from dymo_med.inference.scores import ORACLE, Row
from dymo_med.metrics import bootstrap_means

SUBSETS = "subsets"
MEAN = "mean"  # regions averaged case by case
MISSED, INVENTED = "missed", "invented"
NUMBER_COLUMNS = ("method", "scans", "region", "dice", "low", "high", "patients")


def heat_maps(out: Path, facts: Row, table: Sequence[Row]) -> list[str]:
    """Draw mean Dice by subset and region; return the files, one per method.

    Args:
        out: Folder.
        facts: Of the run.
        table: Rows of `metrics.csv`.
    """
    if SUBSETS not in facts["scenarios"]:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, regions = facts["modalities"], [*facts["regions"], MEAN]
    rows = [r for r in table if r["scenario"] == SUBSETS and r["metric"] == "dice"]
    files = []
    for method in dict.fromkeys(r["method"] for r in rows):
        if method == ORACLE:
            continue
        values = {(r["observed"], r["region"]): r["value"] for r in rows if r["method"] == method}
        subsets = sorted(
            {s for s, _ in values if s != ALL},
            key=lambda s: (s.count("+"), [names.index(n) for n in s.split("+")]),
        )
        grid = np.array([[values[s, region] for region in regions] for s in (*subsets, ALL)])
        figure = Figure(figsize=(1.6 + 0.9 * len(regions), 1.2 + 0.3 * len(grid)), dpi=150)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        picture = axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axes.set_xticks(range(len(regions)), regions)
        axes.set_yticks(range(len(grid)), [*subsets, "all subsets"])
        axes.axhline(len(grid) - 1.5, color="white")
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                colour = "black" if value > 0.6 else "white"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_title(f"Mean Dice, {method}", fontsize=10)
        figure.colorbar(picture, ax=axes, fraction=0.05)
        figure.tight_layout()
        name = f"subsets_{method}.png"
        figure.savefig(out / name, metadata={"Software": None})
        files.append(name)
    return files


def dice_by_number(frame: Sequence[Row], regions: Sequence[str], seed: int) -> list[Row]:
    """Return mean Dice by how many scans were looked at, with 95 % intervals over patients.

    A patient's subsets of one size are averaged first. Only patients who have that many scans
    are in a row, so rows of different sizes may be about different patients.

    Args:
        frame: One row per case and method, with Dice by region.
        regions: Names in canonical order.
        seed: Of the bootstrap.
    """
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in frame:
        if row["method"] != ORACLE:
            number = row["observed"].count("+") + 1
            groups.setdefault((row["method"], number), []).append(row)
    table: list[Row] = []
    for (method, number), rows in sorted(groups.items(), key=lambda one: one[0]):
        dice = np.stack([row["dice"] for row in rows])
        values = np.concatenate([dice, dice.mean(1, keepdims=True)], 1)
        owners = [row["patient_id"] for row in rows]
        estimates = bootstrap_means(values, owners, seed=seed)
        for region, e in zip((*regions, MEAN), estimates, strict=True):
            about = {"method": method, "scans": number, "region": region}
            shown = {"dice": e.value, "low": e.low, "high": e.high}
            table.append(about | shown | {"patients": len(set(owners))})
    return table


def number_plot(out: Path, table: Sequence[Row], regions: Sequence[str]) -> list[str]:
    """Draw mean Dice against the number of scans; return the files, one per method.

    Args:
        out: Folder.
        table: What `dice_by_number` returned.
        regions: Names in canonical order, `mean` last.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    files = []
    for method in dict.fromkeys(row["method"] for row in table):
        figure = Figure(figsize=(5.2, 3.4), dpi=150)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for i, region in enumerate(regions):
            rows = [r for r in table if (r["method"], r["region"]) == (method, region)]
            x = [row["scans"] for row in rows]
            y, low, high = (np.array([row[key] for row in rows]) for key in ("dice", "low", "high"))
            # Marks of several regions lie beside each other, not on top.
            place = np.array(x) + 0.06 * (i - (len(regions) - 1) / 2)
            axes.errorbar(
                place,
                y,
                [y - low, high - y],
                marker="osD^v"[i % 5],
                linestyle="-" if region == MEAN else "--",
                capsize=2,
                markersize=4,
                linewidth=1.6 if region == MEAN else 0.9,
                label=region,
            )
        axes.set_xticks(sorted({row["scans"] for row in table}))
        axes.set_ylim(0, 1)
        axes.set_xlabel("Scans looked at")
        axes.set_ylabel("Mean Dice, 95 % interval")
        axes.set_title(f"Dice against the number of scans, {method}", fontsize=10)
        axes.legend(fontsize=8, frameon=False)
        figure.tight_layout()
        name = f"scans_{method}.png"
        figure.savefig(out / name, metadata={"Software": None})
        files.append(name)
    return files


def write_page(
    out: Path, facts: Row, table: Sequence[Row], failures: Sequence[Row], pictures: Sequence[str]
) -> None:
    """Write `index.html`.

    Args:
        out: Folder.
        facts: Of the run.
        table: Rows of `metrics.csv`.
        failures: Rows of `failures.csv`.
        pictures: Files to show.
    """
    regions = [*facts["regions"], MEAN]
    found = {
        (r["scenario"], r["method"], r["metric"], r["region"]): r
        for r in table
        if r["observed"] == ALL
    }
    scenarios = []
    for scenario in facts["scenarios"]:
        methods = dict.fromkeys(m for s, m, _, _ in found if s == scenario)
        lines = [
            {
                "method": method,
                "dice": [_shown(found.get((scenario, method, "dice", r)), 3) for r in regions],
                "gain": [
                    _shown(found.get((scenario, method, "dice_gain", r)), 3, signed=True)
                    for r in regions
                ],
                "hd95": [_shown(found.get((scenario, method, "hd95_mm", r)), 1) for r in regions],
                **{
                    key: [_shown(found.get((scenario, method, key, r)), 3) for r in regions]
                    for key in ("covered", "missed_share", "wide_missed_share")
                },
                "outcomes": [
                    _outcomes(found.get((scenario, method, "hd95_mm", r))) for r in regions
                ],
                "volume": [
                    _shown(found.get((scenario, method, "volume_error_abs_ml", r)), 1)
                    for r in regions
                ],
            }
            for method in methods
        ]
        if lines:
            counts = found[scenario, next(iter(methods)), "dice", MEAN]
            scenarios.append({"text": scenario, "lines": lines, "records": counts["records"]})
    page = environment().get_template("segmentation_cohort.html.j2")
    write_text(
        out / "index.html",
        guarded(
            page.render(
                f=facts, regions=regions, scenarios=scenarios, failures=failures, pictures=pictures
            )
        ),
    )


def _outcomes(row: Row | None) -> tuple[str, str]:
    """Return how often a region was missed, and how often it was made up, as text."""
    return ("", "") if row is None else (f"{row[MISSED]} / {row[INVENTED]}", "")


def _shown(row: Row | None, digits: int, *, signed: bool = False) -> tuple[str, str]:
    """Return a value and its interval as text."""
    if row is None or math.isnan(row["value"]):
        return "", ""
    sign = "+" if signed else ""

    def text(x: float) -> str:
        return format(x, f"{sign}.{digits}f")

    return text(row["value"]), f"{text(row['low'])} to {text(row['high'])}"
