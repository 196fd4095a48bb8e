"""The page of many predictions: whose needs a person's attention, first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dymo_med.files import write_text
from dymo_med.inference.report import environment, guarded, percent

Row = Mapping[str, Any]

FAILED = "failed"
ORDER = (FAILED, "abstained", "caution", "answered")
"""Who is looked at first."""


def write_worklist(out: Path, facts: Row, rows: Sequence[Row], failures: Sequence[Row]) -> None:
    """Write `index.html`.

    Args:
        out: Folder of the run; the patients' pages in it are linked.
        facts: What `run.json` says.
        rows: Of `predictions.csv`.
        failures: Of `failures.csv`.
    """
    said: dict[str, list[str]] = {}
    for failure in failures:
        said.setdefault(failure["record_id"], []).append(failure["message"])
    page = environment().get_template("worklist.html.j2")
    shown = [_shown(out, facts, row, said.get(row["record_id"], [])) for row in by_need(rows)]
    counts = [(status, facts["status"].get(status, 0)) for status in ORDER]
    numbers = facts["task"] != "classification"
    write_text(
        out / "index.html",
        guarded(page.render(f=facts, rows=shown, counts=counts, numbers=numbers)),
    )


def by_need(rows: Sequence[Row]) -> list[Row]:
    """Return rows by need of attention: the worst status, then the most reasons and warnings.

    Args:
        rows: Of `predictions.csv`.
    """

    def key(row: Row) -> tuple[int, int, int, str]:
        reasons = len(row["reasons"].split("+")) if row["reasons"] else 0
        return ORDER.index(row["status"]), -reasons, -(row["warnings"] or 0), row["record_id"]

    return sorted(rows, key=key)


def _shown(out: Path, facts: Row, row: Row, messages: Sequence[str]) -> dict[str, Any]:
    """Return a row as the page shows it."""
    parts = {name: _names(row, name) for name in ("observed", "trusted", "rejected", "absent")}
    partly = _names(row, "partly")
    states = []
    for name in facts["modalities"]:
        state = next((s for s in ("trusted", "rejected") if name in parts[s]), "absent")
        if name in parts["observed"]:
            state = "partly" if name in partly else "observed"
        states.append(state if row["status"] != FAILED else "")
    there = (out / "reports" / row["record_id"] / "report.html").is_file()
    reasons = [reason for reason in row["reasons"].split("+") if reason]
    answer, number = _answer(facts, row)
    return {
        "record_id": row["record_id"],
        "link": f"reports/{quote(row['record_id'])}/report.html" if there else "",
        "status": row["status"],
        "rank": ORDER.index(row["status"]),
        "reasons": reasons,
        "messages": list(messages),
        "answer": answer,
        "number": number,
        "states": states,
        "warnings": row["warnings"],
    }


def _answer(facts: Row, row: Row) -> tuple[str, float | None]:
    """Return the answer in words, and a number to sort by."""
    if row["status"] == FAILED:
        return "", None
    if facts["task"] == "segmentation":
        volumes = {name: row[f"volume_ml_{name}"] for name in facts["classes"]}
        return ", ".join(f"{n} {v:.1f} mL" for n, v in volumes.items()), max(volumes.values())
    if facts["task"] == "regression":
        text = f"{row['value']:.4g} {facts['unit']}".rstrip()
        if row["value_low"] is not None and row["value_high"] is not None:
            text += f" ({row['value_low']:.4g} to {row['value_high']:.4g})"
        return text, row["value"]
    probability = row[f"prob_{row['predicted']}"]
    return f"{row['predicted']}, {percent(probability)}", probability


def _names(row: Row, column: str) -> list[str]:
    return (row.get(column) or "").split("+")
