"""What the pages of cohorts have in common: links to reports, estimates as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

Row = Mapping[str, Any]


def report_link(out: Path, record_id: str) -> str:
    """Return the address of a record's report, from the page; empty if there is none.

    Args:
        out: Folder of the evaluation.
        record_id: Whose.
    """
    report = f"reports/{record_id}/report.html"
    return quote(report) if (out / report).is_file() else ""


def estimate(row: Row | None, scale: float = 1) -> tuple[str, str]:
    """Return an estimate and its interval as text.

    Args:
        row: Of `metrics.csv`; None = there is none.
        scale: 100 = a share, said in per cent.
    """
    if row is None or math.isnan(row["value"]):
        return "–", ""
    sign = " %" if scale == 100 else ""

    def said(value: float) -> str:
        text = f"{scale * value:.{0 if sign else 3}f}"
        return text.replace("-", "\N{MINUS SIGN}")

    between = f"{said(row['low'])} to {said(row['high'])}" if row["low"] < row["high"] else ""
    return said(row["value"]) + sign, between


def estimates(
    found: Mapping[tuple[str, str, str], Row],
    scenarios: Sequence[str],
    methods: Sequence[str],
    metric: str,
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return a metric's rows: a scenario, and an estimate for each method.

    Args:
        found: Rows of `metrics.csv` by scenario, method and metric.
        scenarios: In order.
        methods: In order; a difference is a method of its own.
        metric: Which.
    """
    return [(s, [estimate(found.get((s, m, metric))) for m in methods]) for s in scenarios]
