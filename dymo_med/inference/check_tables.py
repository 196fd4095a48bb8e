"""What `dymo-med check` found, as tables for a terminal of 80 columns or a log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from dymo_med.inference.check import STATES, CheckReport, RecordRow, State

# Letters that any log can hold, and colours for those that can show them.
SIGNS: dict[State, tuple[str, str, str]] = {
    "observed": ("x", "green", "observed"),
    "partly": ("~", "green", "blank cells"),
    "warn": ("!", "yellow", "warned of by the quality gate"),
    "refuse": ("R", "red", "refused by the quality gate"),
    "damaged": ("E", "red", "cannot be read"),
    "missing": (".", "dim", "missing"),
}
_WIDTH = 80
_MOST_RECORDS = 20
_MOST_PATTERNS = 12


def tables(report: CheckReport) -> Iterator[Table | str]:
    """Yield the tables of a report, and lines between them.

    Args:
        report: Of `inference.check.check`.
    """
    if report.about:
        facts = Table(box=None, show_header=False, pad_edge=False)
        facts.add_column(style="bold", no_wrap=True)
        facts.add_column(overflow="fold")
        for name, fact in report.about.items():
            facts.add_row(escape(name), escape(fact))
        yield facts
    if not report.rows:
        return
    if report.kind == "patient directory":
        yield _patient(report.rows[0])
        return
    if _fits(report.rows):
        yield _matrix(report.rows)
        yield _legend(report.rows)
    yield _shares(report)
    yield _patterns(report)


def _fits(rows: Sequence[RecordRow]) -> bool:
    """Return whether every record gets a line of its own."""
    widths = [max(len(row.record_id) for row in rows), 11, *(len(n) for n in rows[0].states)]
    return len(rows) <= _MOST_RECORDS and sum(widths) + 2 * len(widths) <= _WIDTH


def _patient(row: RecordRow) -> Table:
    """Return one patient's modalities."""
    table = Table(box=None, pad_edge=False)
    table.add_column("modality", no_wrap=True)
    table.add_column("state")
    for name, state in row.states.items():
        _, colour, words = SIGNS[state]
        table.add_row(escape(name), f"[{colour}]{words}[/]")
    return table


def _matrix(rows: Sequence[RecordRow]) -> Table:
    """Return records by modalities."""
    table = Table(box=None, pad_edge=False)
    table.add_column("record", no_wrap=True)
    table.add_column("split", no_wrap=True)
    for name in rows[0].states:
        table.add_column(escape(name), justify="center", no_wrap=True)
    for row in rows:
        signs = (f"[{SIGNS[s][1]}]{SIGNS[s][0]}[/]" for s in row.states.values())
        table.add_row(escape(row.record_id), row.split or "none", *signs)
    return table


def _legend(rows: Sequence[RecordRow]) -> str:
    """Return what the signs that occur mean."""
    seen = {state for row in rows for state in row.states.values()}
    return ", ".join(f"{SIGNS[s][0]} {SIGNS[s][2]}" for s in STATES if s in seen)


def _shares(report: CheckReport) -> Table:
    """Return how many records have each modality, in all and per split."""
    splits = report.splits
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    groups = {"all": list(report.rows)}
    for split in splits:
        groups[split] = [row for row in report.rows if (row.split or "none") == split]
    for name in groups:
        table.add_column(name, justify="right", no_wrap=True)
    odd: list[State] = [s for s in ("warn", "refuse", "damaged") if _any(report.rows, s)]
    for state in odd:
        table.add_column({"warn": "warned", "refuse": "refused"}.get(state, state), justify="right")
    blank = [""] * len(odd)
    table.add_row("records", *(str(len(rows)) for rows in groups.values()), *blank)
    patients = (len({row.patient_id for row in rows}) for rows in groups.values())
    table.add_row("patients", *map(str, patients), *blank)
    labelled = (sum(row.labelled for row in rows) for rows in groups.values())
    table.add_row("labelled", *map(str, labelled), *blank, end_section=True)
    for name in report.rows[0].states:
        there = (
            _percent(sum(r.states[name] in ("observed", "partly", "warn") for r in rows), len(rows))
            for rows in groups.values()
        )
        counts = (sum(row.states[name] == state for row in report.rows) for state in odd)
        table.add_row(escape(name), *there, *(str(n) if n else "" for n in counts))
    return table


def _any(rows: Sequence[RecordRow], state: State) -> bool:
    return any(state in row.states.values() for row in rows)


def _percent(part: int, whole: int) -> str:
    """Return a share that is 0 or 100 only if it is."""
    share = 100 * part / whole if whole else 0.0
    rounded = min(99, max(1, round(share))) if 0 < share < 100 else round(share)
    return f"{rounded} %"


def _patterns(report: CheckReport) -> Table:
    """Return which modalities occur together, the most frequent first."""
    table = Table(box=None, pad_edge=False)
    table.add_column("records", justify="right", no_wrap=True)
    table.add_column("observed modalities", overflow="fold")
    shown = list(report.patterns.items())
    # One that is left out is as long as the line that says so.
    most = _MOST_PATTERNS if len(shown) > _MOST_PATTERNS + 1 else len(shown)
    for pattern, count in shown[:most]:
        table.add_row(str(count), escape(pattern))
    left = shown[most:]
    if left:
        rest = sum(count for _, count in left)
        table.add_row(str(rest), f"({len(left)} other combinations)")
    return table
