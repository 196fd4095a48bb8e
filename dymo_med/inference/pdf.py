"""One patient's page as an A4 PDF, made from `prediction.json` alone.

Drawn with reportlab instead of printed by a browser: it needs no browser on the machine, the same
prediction gives the same bytes, and every sheet says whose it is and which of how many. What is
said is what the page says (`report.view`); words are in `templates/strings.json`.

Letters of languages that are written from right to left stand in the order in which they are
stored; characters that the font lacks are written as their code point.
"""

from __future__ import annotations

import base64
import io
import unicodedata
import zlib
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import reportlab
from reportlab.graphics.shapes import Circle, Drawing, Line, Rect
from reportlab.lib.colors import Color, HexColor
from reportlab.lib.enums import TA_RIGHT
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.platypus import (
    Image,
    KeepTogether,
    Paragraph,
    SimpleDocTemplate,
    Spacer,
    Table,
    TableStyle,
)

from dymo_med import __version__
from dymo_med.errors import PatientDataError, Problem
from dymo_med.files import write_bytes
from dymo_med.inference.prediction_file import PredictionFile
from dymo_med.inference.report import percent, points, view, words

_INK, _SOFT, _LINE = HexColor("#1b2530"), HexColor("#55616e"), HexColor("#d9dde2")
_MEASURED, _MADE, _CAUTION = HexColor("#1f5a82"), HexColor("#a9570c"), HexColor("#9b1c1c")
_OTHER, _WASH, _ALERT = HexColor("#9aa7b3"), HexColor("#f1f3f5"), HexColor("#fbeeee")
_MARGIN = 18 * mm
_WIDTH = A4[0] - 2 * _MARGIN
# Characters that a name or a value is cut to, and a sentence or a command.
_MOST, _MOST_PROSE = 100, 600
_PROSE = frozenset({"warnings", "method_why", "bundle_description", "command", "columns", "got"})
# Pictures: not text.
_WHOLE = frozenset({"png", "heat"})
_FONTS = {
    "DejaVuSans": "DejaVuSans.ttf",
    "DejaVuSans-Bold": "DejaVuSans-Bold.ttf",
    "DejaVuSansMono": "DejaVuSansMono.ttf",
}
_GLYPHS = {
    "observed": "\u25cf",
    "partly": "\u25d0",
    "trusted": "\u2713",
    "rejected": "\u2715",
    "absent": "\u25cb",
}

Flow = list[Any]
Words = Mapping[str, Any]


def write_pdf(file: PredictionFile, path: Path) -> None:
    """Write one patient's page as PDF; the same file gives the same bytes.

    Args:
        file: All that it shows.
        path: The PDF file.

    Raises:
        PatientDataError: If a picture in the file is none.
    """
    write_bytes(path, render_pdf(file))


def render_pdf(file: PredictionFile) -> bytes:
    """Return one patient's page as PDF.

    Args:
        file: All that it shows.

    Raises:
        PatientDataError: If a picture in the file is none.
    """
    shown = PredictionFile.model_validate(_legible(file.model_dump()))
    # Once to learn how many sheets there are, once to say so on each.
    sheets, _ = _build(shown, 0)
    return _build(shown, sheets)[1]


def maker() -> str:
    """Return what decides, besides the prediction, which bytes a PDF has."""
    return (
        f"dymo-med {__version__}, reportlab {reportlab.Version}, zlib {zlib.ZLIB_RUNTIME_VERSION}"
    )


def audit_pdf(file: PredictionFile, content: bytes) -> bool:
    """Return whether a PDF is that of a prediction.

    One that the same software made has the same bytes. Of another's, the number of the prediction
    in its properties is compared.

    Args:
        file: The prediction.
        content: Of the PDF.
    """
    if maker().encode() in content:
        return content == render_pdf(file)
    return f"/Keywords ({file.content_sha256})".encode() in content


def _build(file: PredictionFile, sheets: int) -> tuple[int, bytes]:
    """Return how many sheets it takes, and the PDF."""
    text = words()
    stream = io.BytesIO()
    document = SimpleDocTemplate(
        stream,
        pagesize=A4,
        # Frames are padded by 6 points.
        leftMargin=_MARGIN - 6,
        rightMargin=_MARGIN - 6,
        topMargin=16 * mm,
        bottomMargin=16 * mm,
        invariant=1,
        lang=text["language"],
        title=f"{text['banner']['report']}: {file.record_id}",
        author=f"{file.bundle_name} {file.bundle_version}",
        subject=text["banner"]["use"],
        keywords=file.content_sha256,
        creator=maker(),
    )

    def frame(canvas: Any, document: Any) -> None:
        left, right, top = _MARGIN, A4[0] - _MARGIN, A4[1] - 12 * mm
        canvas.saveState()
        canvas.setStrokeColor(_LINE)
        canvas.setLineWidth(0.5)
        canvas.line(left, top - 6, right, top - 6)
        canvas.line(left, 15 * mm, right, 15 * mm)
        canvas.setFillColor(_CAUTION)
        canvas.setFont("DejaVuSans-Bold", 8)
        canvas.drawString(left, top, text["banner"]["use"])
        canvas.setFillColor(_SOFT)
        canvas.setFont("DejaVuSans", 7)
        who = f"{text['trace']['record']} {file.record_id}"
        what = f"{text['banner']['bundle']} {file.bundle_name}"
        canvas.drawString(left, 11 * mm, _fitted(who, right - left - 60))
        canvas.drawString(left, 8 * mm, _fitted(f"{what}, {file.bundle_id[:12]}", right - left))
        page = text["pdf"]["page"].format(page=document.page, pages=sheets or "?")
        canvas.drawRightString(right, 11 * mm, page)
        canvas.restoreState()

    document.build(_story(file), onFirstPage=frame, onLaterPages=frame)
    return int(document.page), stream.getvalue()


def _story(file: PredictionFile) -> Flow:
    """Return everything in the order of the page."""
    shown = view(file)
    return [
        *_banner(file, shown),
        *_answer(file, shown),
        *_had(shown),
        *_change(file, shown),
        *_made_up(file, shown),
        *_why(file, shown),
        *_drove(shown),
        *_performance(shown),
        *_acquire(shown),
        *_limits(file, shown),
        *_trace(file),
    ]


# --- Sections -------------------------------------------------------------------------------------


def _banner(file: PredictionFile, shown: Words) -> Flow:
    text = words()
    style = _BOLD_CAUTION if file.status != "answered" else _BOLD
    model = f"{file.bundle_name}, {text['banner']['version']} {file.bundle_version}"
    cells = [
        [_p(text["trace"]["record"], _SMALL), _p(text["banner"]["bundle"], _SMALL)],
        [_p(file.record_id, _BOLD), _p(model, _BOLD)],
    ]
    cells[0].append(_p(text["banner"]["status"], _SMALL))
    cells[1].append(_p(text["status"][file.status], style))
    table = Table(cells, colWidths=[_WIDTH / 3] * 3)
    table.setStyle(
        TableStyle([("BACKGROUND", (0, 0), (-1, -1), _WASH), ("VALIGN", (0, 0), (-1, -1), "TOP")])
    )
    # A warning is never left for a later sheet.
    notes = [*shown["reasons"], *shown["warned"]]
    alert = _alert(notes) if notes else []
    return [table, Spacer(1, 6), *alert, Spacer(1, 8)]


def _answer(file: PredictionFile, shown: Words) -> Flow:
    text, answer = words(), shown["answer"]
    number = percent(shown["probability"])
    left = [_p(text["answer"]["question"].format(target=file.target), _TITLE)]
    value = shown["number"]
    if value is not None:
        if answer["abstained"]:
            left.append(_p(answer["statement"], _LEAD))
        left += [_p(value["big"], _BIG), _p(value["interval"], _LEAD)]
    elif answer["abstained"]:
        second = text["answer"]["number_second"]
        left += [
            _p(answer["statement"], _BIG),
            _p(answer["set"][0], _LEAD),
            _p(second.format_map({"class": shown["chosen"], "percent": number}), _LEAD),
        ]
    else:
        left += [_p(number, _BIG), _p(answer["statement"], _LEAD)]
    if value is None:
        left.append(_p(answer["frequency"]))
    left.append(_p(answer["rests"]))
    if answer["shares"]:
        left.append(_p(answer["shares"]))
    counted = value is None and answer["count"] is not None
    dots = Drawing(100, 100)
    for i in range(100):
        full = i < (answer["count"] or 0)
        dots.add(
            Circle(
                5 + 10 * (i % 10),
                95 - 10 * (i // 10),
                3.6,
                fillColor=_MEASURED if full else None,
                strokeColor=_MEASURED if full else _OTHER,
                strokeWidth=0.7,
            )
        )
    side = [dots, Spacer(1, 3), _p(text["answer"]["caption"], _SMALL)] if counted else []
    grid = Table([[left, side]], colWidths=[_WIDTH - 115, 115])
    grid.setStyle(
        TableStyle(
            [
                ("VALIGN", (0, 0), (-1, -1), "TOP"),
                ("LEFTPADDING", (0, 0), (0, 0), 0),
                ("LEFTPADDING", (1, 0), (1, 0), 12),
                ("RIGHTPADDING", (1, 0), (1, 0), 0),
            ]
        )
    )
    rows = []
    for name, share in answer["bars"]:
        said = percent(share)
        if value is None and answer["possible"] is not None and file.prediction_set is not None:
            coverage = percent(file.prediction_set.coverage)
            key = "in_set" if name in answer["possible"] else "out_of_set"
            said += f", {text['answer'][key].format(coverage=coverage)}"
        best = name == shown["chosen"]
        rows.append((name, _track(0, share, _MEASURED if best else _OTHER), said))
    flow: Flow = [grid, _bars(rows)]
    if value is not None:
        flow.insert(1, _p(value["bands"], _SMALL))
        flow.append(_p(f"{text['number']['title']}. {value['basis'] or value['interval']}"))
        return flow
    if answer["base"]:
        flow.append(_p(answer["base"], _SMALL))
    flow.append(_p(f"{text['answer']['set_title']}. {' '.join(answer['set'])}"))
    return flow


def _had(shown: Words) -> Flow:
    text = words()["had"]
    rows = [
        [
            _p(row["name"], _CELL_BOLD),
            [
                _p(f"{_GLYPHS[row['glyph']]} {row['word']}", _CELL),
                *(_p(f"\u25b2 {sentence}", _CELL_CAUTION) for sentence in row["gate"]),
            ],
            _p(row["use"], _CELL),
            _p(row["facts"], _CELL_SOFT),
        ]
        for row in shown["had"]
    ]
    heads = [text["modality"], text["state"], text["use"], text["facts"]]
    return _section(text["title"], _table(heads, rows, (0.2, 0.27, 0.16, 0.37)))


def _change(file: PredictionFile, shown: Words) -> Flow:
    text, change = words(), shown["change"]
    style = _BOLD_CAUTION if change["flip"] else _BODY
    flow: Flow = [
        _p(change["sentence"], style),
        _p(text["change"]["lead"].format_map({"class": shown["chosen"]}), _SMALL),
    ]
    rows = []
    for row in change["rows"]:
        bar = _track(0, row["probability"], _MEASURED if row["own"] else _OTHER)
        if len(file.classes) == 2:
            bar.add(Line(bar.width / 2, 0, bar.width / 2, bar.height, strokeColor=_INK))
        said = f"{percent(row['probability'])}, {row['says']}"
        if row["draws"]:
            said += f"; {row['draws']['text']}"
            low, high = (bar.width * row["draws"][key] for key in ("low", "high"))
            middle = bar.height / 2
            bar.add(Line(low, middle, high, middle, strokeColor=_MADE, strokeWidth=3))
            for tick in row["draws"]["ticks"]:
                x = bar.width * tick
                bar.add(Line(x, 0, x, bar.height, strokeColor=_MADE, strokeWidth=0.6))
        rows.append((row["label"], bar, said))
    flow.append(_bars(rows, bold=[i for i, row in enumerate(change["rows"]) if row["own"]]))
    if change["notes"]:
        flow.append(_p(" ".join(change["notes"]), _SMALL))
    return _section(text["change"]["title"], flow, len(flow))


def _made_up(file: PredictionFile, shown: Words) -> Flow:
    text, scans = words(), shown["pictures"]
    made = shown["scans_made"]
    lead = text["madeup"]["nothing"]
    if file.recovered:
        lead = f"{text['madeup']['lead']} {text['madeup']['lead_scans' if made else 'no_scans']}"
    flow: Flow = [_p(lead)]
    if made:
        flow.append(_scans(scans))
        if any(not s["flat"] for s in scans):
            flow.append(_p(text["madeup"]["planes"], _SMALL))
    if shown["recovered_cells"]:
        rows = [
            [
                _p(c.modality, _CELL),
                _p(c.column, _CELL_BOLD),
                _p(_value(c), _CELL_MADE),
                _p(_position(c), _CELL_SOFT),
                _p(shown["states"][shown["cell_state"][c.modality]], _CELL),
            ]
            for c in shown["recovered_cells"]
        ]
        heads = [
            text["had"]["modality"],
            *(text["madeup"][key] for key in ("column", "value", "percentile", "state")),
        ]
        flow.append(_p(text["madeup"]["cells"], _SUBTITLE))
        flow += _table(heads, rows, (0.18, 0.24, 0.16, 0.2, 0.22))
    return _section(text["madeup"]["title"], flow, 2)


def _why(file: PredictionFile, shown: Words) -> Flow:
    text, why = words()["why"], shown["why"]
    if not file.recovered:
        return _section(text["title"], [_p(text["nothing"])])
    flow: Flow = []
    if not why["rows"]:
        flow.append(_p(f"{text['blind'].format(method=file.method)} {file.method_why}"))
    flow += [
        _p(f"{_GLYPHS[state]} {sentence}", _ITEM)
        for state, sentence in zip(why["states"], why["sentences"], strict=True)
    ]
    if not why["rows"]:
        return _section(text["title"], flow)
    flow.append(_p(why["lead"], _SMALL))
    rows = []
    for row in why["rows"]:
        name = row["candidate"] + (f" ({text['completed']})" if row["completed"] else "")
        cells = [
            _p(str(row["step"]), _NUMBER),
            _p(name + ("\u2020" if row["borrowed"] else ""), _CELL_BOLD),
            _p("{} \u2192 {}".format(*row["quality"]), _NUMBER),
            _p("{} \u2192 {}".format(*row["typical"]), _NUMBER),
            _p(row["factor"], _NUMBER),
            _p(row["reward"], _NUMBER),
        ]
        if why["trust"]:
            cells.append(_p(row["trust"], _NUMBER))
        rows.append([*cells, _p(row["decision_word"], _CELL)])
    keys = ["step", "candidate", "clarity_heading", "typicality_heading", "factor", "reward"]
    heads = [text[k] for k in (*keys, *(["trust"] if why["trust"] else []), "decision")]
    shares: Sequence[float] = (0.07, 0.24, 0.17, 0.18, 0.09, 0.1, 0.15)
    if why["trust"]:
        shares = (0.07, 0.21, 0.17, 0.17, 0.08, 0.09, 0.08, 0.13)
    flow += _table(heads, rows, shares, right=range(2, len(heads) - 1))
    legend = f"{text['clarity']} {text['typicality']} {text['factor_legend']}"
    if any(row["borrowed"] for row in why["rows"]):
        legend += f" \u2020 {text['borrowed']}"
    return _section(text["title"], [*flow, _p(legend, _SMALL)])


def _drove(shown: Words) -> Flow:
    text, drove = words()["drove"], shown["drove"]
    if not drove["bars"]:
        return _section(text["title"], [_p(text["off"])])
    flow: Flow = [_p(text["lead"].format_map({"class": shown["chosen"]}), _SMALL)]
    rows = [(text["start"], _track(0, drove["start"], _OTHER), percent(drove["start"]))]
    for bar in drove["bars"]:
        made = f" ({text['completed' if bar['partly'] else 'recovered']})" if bar["made"] else ""
        colour = _CAUTION if bar["value"] < 0 else _MADE if bar["made"] else _MEASURED
        track = _track(bar["left"] / 100, bar["width"] / 100, colour)
        rows.append((bar["name"] + made, track, points(bar["value"])))
    rows.append((text["end"], _track(0, drove["end"], _MEASURED), percent(drove["end"])))
    flow.append(_bars(rows, bold=[len(rows) - 1]))
    flow.append(_p(f"{drove['sum']} {text['sampled'] if drove['sampled'] else ''}", _SMALL))
    if drove["unused"]:
        flow.append(_p(drove["unused"], _BOLD_CAUTION))
    if drove["cells"]:
        cells = []
        for row in drove["cells"]:
            cell = row["cell"]
            made = "" if cell.measured else f" ({text['recovered']})"
            cells.append(
                [
                    _p(cell.column + made, _CELL_BOLD),
                    _p(cell.modality, _CELL_SOFT),
                    _p(_value(cell), _CELL),
                    _p(_position(cell), _CELL_SOFT),
                    _p(points(row["value"]), _NUMBER),
                ]
            )
        heads = [
            text["column"],
            words()["had"]["modality"],
            *(text[key] for key in ("value", "position", "effect")),
        ]
        flow.append(_p(text["cells"], _SUBTITLE))
        flow.append(_p(text["cells_lead"].format_map({"class": shown["chosen"]}), _NOTE))
        flow += _table(heads, cells, (0.28, 0.2, 0.16, 0.2, 0.16), right=(4,))
    if drove["maps"]:
        lead = text["maps_lead"].format(sigma=drove["sigma"], convergence=drove["convergence"])
        flow.append(_p(text["maps"], _SUBTITLE))
        for key, recovered in (("observed_maps", False), ("recovered_maps", True)):
            maps = [m for m in drove["maps"] if (m["state"] != "observed") == recovered]
            if maps:
                flow += [_p(text[key], _NOTE), _scans(maps)]
        flow.append(_p(lead, _SMALL))
    if drove["contrast"]:
        lead = text["contrast_lead"] + ("" if drove["maps"] else f" {text['no_maps']}")
        flow += [_p(text["contrast_title"], _SUBTITLE), _p(lead, _NOTE)]
        flow += [_p(line, _NOTE) for line in drove["contrast"]]
    return _section(text["title"], flow, 2)


def _performance(shown: Words) -> Flow:
    text, found = words()["performance"], shown["performance"]
    if found is None:
        return _section(text["title"], [_p(text["unknown"])])
    flow: Flow = [_p(text["few"], _BOLD_CAUTION)] if found["few"] else []
    flow.append(_p(found["sentence"]))
    rows = [
        [_p(name, _CELL_BOLD)]
        + [_p(f"{v} ({between})" if between else v, _NUMBER) for v, between in figures]
        for name, figures in found["rows"]
    ]
    heads = [text[key] for key in ("method", "auroc", "brier", "ece")]
    flow += _table(heads, rows, (0.37, 0.21, 0.21, 0.21), right=(1, 2, 3))
    return _section(text["title"], [*flow, _p(text["legend"], _SMALL)], len(flow))


def _acquire(shown: Words) -> Flow:
    text, found = words()["acquire"], shown["acquire"]
    flow: Flow = [_p(found["sentence"])] if found["sentence"] else []
    if found["rows"]:
        flow.append(_p(f"{text['lead']} {found['now']}", _SMALL))
        rows = [
            [
                _p(row["name"] + (f" ({text['blanks']})" if row["blanks"] else ""), _CELL_BOLD),
                _p(row["bits"], _NUMBER),
                _p(f"{percent(row['before'])} \u2192 {percent(row['after'])}", _NUMBER),
                _p(str(row["changes"]), _NUMBER),
            ]
            for row in found["rows"]
        ]
        heads = [text["modality"], text["certainty"], found["heading"], text["changes"]]
        flow += _table(heads, rows, (0.34, 0.22, 0.22, 0.22), right=(1, 2, 3))
    if found.get("unknown"):
        flow.append(_p(found["unknown"]))
    return _section(text["title"], flow, len(flow))


def _limits(file: PredictionFile, shown: Words) -> Flow:
    text = words()["limits"]
    flow: Flow = [_p(text["warnings"], _SUBTITLE)]
    flow += [_p(f"\u25b2 {warning}", _ITEM) for warning in file.warnings] or [_p(text["none"])]
    flow.append(_p(text["known"], _SUBTITLE))
    flow += [_p(f"\u2022 {sentence}", _ITEM) for sentence in shown["limits"]]
    return _section(text["title"], flow, 2)


def _trace(file: PredictionFile) -> Flow:
    text = words()
    bundle = file.bundle_name
    if file.exhibits.bundle_description:
        bundle += f": {file.exhibits.bundle_description}"
    versions = ", ".join(f"{name} {version}" for name, version in file.versions.items())
    facts = [
        (text["trace"]["record"], file.record_id, _CELL),
        (text["trace"]["bundle"], bundle, _CELL),
        ("", file.bundle_id, _MONO),
        (
            text["trace"]["selector"],
            file.method + (f". {file.method_why}" if file.method_why else ""),
            _CELL,
        ),
        (text["trace"]["seed"], str(file.seed), _CELL),
        (text["trace"]["device"], file.device, _CELL),
        (text["trace"]["versions"], versions, _CELL),
        (text["status"]["command"], file.command or "", _MONO),
        (text["trace"]["content"], file.content_sha256, _MONO),
    ]
    rows = [[_p(a, _CELL_SOFT), _p(b, style)] for a, b, style in facts if b]
    flow = _table([], rows, (0.18, 0.82))
    if file.sources or file.recovered_files:
        sources = [
            [_p(name, _CELL_BOLD), _p(source.file, _CELL), _p(source.sha256, _MONO)]
            for name, source in file.sources.items()
        ]
        sources += [
            [
                _p(f"{name} ({text['drove']['recovered']})", _CELL_MADE),
                _p(made.file, _CELL),
                _p(made.sha256, _MONO),
            ]
            for name, made in file.recovered_files.items()
        ]
        heads = [text["had"]["modality"], text["trace"]["file"], text["trace"]["hash"]]
        flow += [Spacer(1, 6), *_table(heads, sources, (0.18, 0.22, 0.6))]
    return _section(text["trace"]["title"], flow)


# --- Parts ----------------------------------------------------------------------------------------


def _section(title: str, flow: Sequence[Any], kept: int = 1) -> Flow:
    """Return a section whose title stays on one sheet with so many of the things that follow."""
    return [KeepTogether([_p(title, _HEADING), *flow[:kept]]), *flow[kept:]]


def _table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Any]],
    shares: Sequence[float],
    right: Collection[int] = (),
) -> Flow:
    """Return a table, its heads repeated on every sheet."""
    if not rows:
        return []
    top = [[_p(h, _HEAD_RIGHT if i in right else _HEAD) for i, h in enumerate(heads)]]
    table = Table(
        [*(top if heads else []), *rows],
        colWidths=[_WIDTH * share for share in shares],
        repeatRows=1 if heads else 0,
        splitInRow=1,
        hAlign="LEFT",
    )
    table.setStyle(
        TableStyle(
            [
                ("VALIGN", (0, 0), (-1, -1), "TOP"),
                ("LINEBELOW", (0, 0), (-1, -1), 0.4, _LINE),
                ("LEFTPADDING", (0, 0), (-1, -1), 0),
                ("RIGHTPADDING", (0, 0), (-1, -1), 6),
                ("TOPPADDING", (0, 0), (-1, -1), 2.5),
                ("BOTTOMPADDING", (0, 0), (-1, -1), 2.5),
            ]
        )
    )
    return [table, Spacer(1, 4)]


def _track(left: float, width: float, colour: Color) -> Any:
    """Return a bar from `left`, `width` wide, in shares of a track."""
    drawing = Drawing(210, 9)
    drawing.add(Rect(0, 0, 210, 9, fillColor=_WASH, strokeColor=None))
    start, end = (min(max(x, 0.0), 1.0) for x in (left, left + width))
    drawing.add(Rect(210 * start, 0, 210 * (end - start), 9, fillColor=colour, strokeColor=None))
    return drawing


def _bars(rows: Sequence[tuple[str, Any, str]], bold: Collection[int] = ()) -> Any:
    """Return labelled bars below each other."""
    cells = [
        [_p(a, _CELL_BOLD if i in bold else _CELL), bar, _p(b, _CELL_BOLD if i in bold else _CELL)]
        for i, (a, bar, b) in enumerate(rows)
    ]
    table = Table(
        cells, colWidths=[150, 222, _WIDTH - 372], hAlign="LEFT", splitInRow=1, spaceAfter=5
    )
    table.setStyle(
        TableStyle(
            [
                ("VALIGN", (0, 0), (-1, -1), "MIDDLE"),
                ("LEFTPADDING", (0, 0), (0, -1), 0),
                ("TOPPADDING", (0, 0), (-1, -1), 1.5),
                ("BOTTOMPADDING", (0, 0), (-1, -1), 1.5),
            ]
        )
    )
    return table


def _alert(sentences: Sequence[str]) -> Flow:
    """Return sentences in a box that may go on on the next sheet."""
    rows = [[_p(f"\u2022 {sentence}", _ITEM)] for sentence in sentences]
    table = Table(rows, colWidths=[_WIDTH], splitInRow=1)
    table.setStyle(
        TableStyle(
            [
                ("BACKGROUND", (0, 0), (-1, -1), _ALERT),
                ("LINEBEFORE", (0, 0), (0, -1), 2.5, _CAUTION),
                ("TOPPADDING", (0, 0), (-1, -1), 2),
                ("BOTTOMPADDING", (0, 0), (-1, -1), 2),
                ("LEFTPADDING", (0, 0), (-1, -1), 9),
            ]
        )
    )
    return [table]


def _scans(scans: Sequence[Mapping[str, Any]]) -> Any:
    """Return scans two in a row, each with its slices side by side and its name below."""
    half = _WIDTH / 2
    cells: Flow = [_scan(scan, half - 10) for scan in scans]
    if len(cells) % 2:
        cells.append("")
    rows = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    table = Table(rows, colWidths=[half, half], hAlign="LEFT")
    table.setStyle(
        TableStyle(
            [
                ("VALIGN", (0, 0), (-1, -1), "TOP"),
                ("LEFTPADDING", (0, 0), (-1, -1), 0),
                ("RIGHTPADDING", (0, 0), (-1, -1), 10),
                ("TOPPADDING", (0, 0), (-1, -1), 3),
                ("BOTTOMPADDING", (0, 0), (-1, -1), 3),
            ]
        )
    )
    return table


def _scan(scan: Mapping[str, Any], width: float) -> Flow:
    synthetic = scan["state"] != "observed"
    slices = scan["slices"]
    each = width / max(3, len(slices))
    row = []
    for picture in slices:
        scale = min(each - 3, 150) / max(picture.width, picture.height, 1)
        row.append(
            Image(
                _picture(picture.png),
                width=picture.width * scale,
                height=picture.height * scale,
                lazy=0,
            )
        )
    table = Table([row], colWidths=[each] * len(row), hAlign="LEFT")
    style: list[Any] = [
        ("VALIGN", (0, 0), (-1, -1), "BOTTOM"),
        ("ALIGN", (0, 0), (-1, -1), "CENTER"),
        ("BACKGROUND", (0, 0), (-1, -1), _INK),
        *((f"{side}PADDING", (0, 0), (-1, -1), 1) for side in ("LEFT", "RIGHT", "TOP", "BOTTOM")),
    ]
    if synthetic:
        style.append(("BOX", (0, 0), (-1, -1), 1.2, _MADE))
    table.setStyle(TableStyle(style))
    caption = f"<b>{escape(scan['modality'])}</b> {escape(scan['word'])}"
    if synthetic:
        caption = f"{caption} \N{EM DASH} SYNTHETIC"
    return [table, Paragraph(caption, _CAPTION_MADE if synthetic else _CAPTION)]


def _picture(address: str) -> io.BytesIO:
    """Return a `data:` picture as a PNG without transparency.

    Raises:
        PatientDataError: If it is none.
    """
    from PIL import Image as Pictures

    try:
        data = base64.b64decode(address.partition(",")[2])
        picture = Pictures.open(io.BytesIO(data), formats=["PNG"]).convert("RGB")
        red, green, blue = picture.split()
        if red.tobytes() == green.tobytes() == blue.tobytes():
            picture = red  # grey: a third of the bytes
    except (OSError, ValueError, SyntaxError, Pictures.DecompressionBombError) as error:
        raise PatientDataError(
            Problem(
                "prediction.json",
                "a picture in it cannot be read",
                expected="PNG",
                got=type(error).__name__,
                remedy="Predict again",
            )
        ) from error
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    stream.seek(0)
    return stream


def _value(cell: Any) -> str:
    unit = "" if cell.unit == "1" else cell.unit
    return f"{cell.text or chr(0x2013)} {unit}".strip()


def _position(cell: Any) -> str:
    """Return where a cell lies among training patients, in words."""
    text = words()["drove"]
    if cell.percentile is not None:
        return str(text["rank"].format(n=round(cell.percentile)))
    return "" if cell.share is None else str(text["share"].format(percent=percent(cell.share)))


# --- Text -----------------------------------------------------------------------------------------


@cache
def _glyphs() -> frozenset[int]:
    """Register the fonts and return the characters that all of them have.

    DejaVu comes with matplotlib and has Latin, Greek and Cyrillic letters and the signs used here,
    which the fonts built into every PDF reader do not.
    """
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    known = []
    for name, file in _FONTS.items():
        font = TTFont(name, str(folder / file))
        pdfmetrics.registerFont(font)
        known.append(frozenset(font.face.charToGlyph))
    pdfmetrics.registerFontFamily(
        "DejaVuSans",
        normal="DejaVuSans",
        bold="DejaVuSans-Bold",
        italic="DejaVuSans",
        boldItalic="DejaVuSans-Bold",
    )
    return frozenset.intersection(*known)


def _legible(value: Any, key: str = "") -> Any:
    """Return a prediction whose texts are short enough for paper and in characters of the font."""
    if isinstance(value, dict):
        return {_legible(k): _legible(v, k) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_legible(v, key) for v in value)
    if not isinstance(value, str) or key in _WHOLE:
        return value
    most = _MOST_PROSE if key in _PROSE else _MOST
    known = _glyphs()
    # Twice: code points take more room than what they stand for.
    return _cut("".join(_sign(c, known) for c in _cut(value, most)), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def _sign(character: str, known: frozenset[int]) -> str:
    """Return a character as it can be printed: as it is, a blank, or its code point."""
    if character.isspace():
        return " "
    if ord(character) in known and unicodedata.category(character)[0] != "C":
        return character
    return f"<U+{ord(character):04X}>"


def _p(text: str, style: ParagraphStyle | None = None) -> Any:
    return Paragraph(escape(text), style or _BODY)


def _fitted(text: str, width: float) -> str:
    """Return as much of a line of the footer as fits."""
    while text and pdfmetrics.stringWidth(text, "DejaVuSans", 7) > width:
        text = text[:-2] + "\u2026"
    return text


def _style(size: float, **more: Any) -> ParagraphStyle:
    given = {"fontName": "DejaVuSans", "leading": 1.35 * size, "textColor": _INK, **more}
    return ParagraphStyle(f"{size}{sorted(more)}", fontSize=size, **given)


_glyphs()  # the styles look their fonts up
_BODY = _style(9, spaceAfter=4)
_SMALL = _style(7.5, textColor=_SOFT, spaceAfter=4)
_NOTE = _style(7.5, textColor=_SOFT, spaceAfter=4, keepWithNext=1)
_BOLD = _style(9, fontName="DejaVuSans-Bold")
_BOLD_CAUTION = _style(9, fontName="DejaVuSans-Bold", textColor=_CAUTION, spaceAfter=4)
_TITLE = _style(10, fontName="DejaVuSans-Bold", spaceAfter=4)
_BIG = _style(26, fontName="DejaVuSans-Bold", textColor=_MEASURED, spaceAfter=6, leading=30)
_LEAD = _style(11, fontName="DejaVuSans-Bold", spaceAfter=5)
_HEADING = _style(11, fontName="DejaVuSans-Bold", spaceBefore=12, spaceAfter=5)
_SUBTITLE = _style(9, fontName="DejaVuSans-Bold", spaceBefore=7, spaceAfter=3, keepWithNext=1)
_ITEM = _style(9, leftIndent=9, firstLineIndent=-9, spaceAfter=3)
_CELL = _style(8)
_CELL_BOLD = _style(8, fontName="DejaVuSans-Bold")
_CELL_SOFT = _style(8, textColor=_SOFT)
_CELL_MADE = _style(8, textColor=_MADE, fontName="DejaVuSans-Bold")
_CELL_CAUTION = _style(7.5, textColor=_CAUTION)
_NUMBER = _style(8, alignment=TA_RIGHT)
_HEAD = _style(7.5, textColor=_SOFT, fontName="DejaVuSans-Bold")
_HEAD_RIGHT = _style(7.5, textColor=_SOFT, fontName="DejaVuSans-Bold", alignment=TA_RIGHT)
_MONO = _style(7, fontName="DejaVuSansMono", wordWrap="CJK")
_CAPTION = _style(8, spaceBefore=2)
_CAPTION_MADE = _style(8, textColor=_MADE, spaceBefore=2)
