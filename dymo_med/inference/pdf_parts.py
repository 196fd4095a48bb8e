"""What PDFs are made of: sheets, tables, bars, boxes, pictures, and text that a font can print.

Letters of languages that are written from right to left stand in the order in which they are
stored; characters that the font lacks are written as their code point.
"""

from __future__ import annotations

import base64
import io
import unicodedata
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import reportlab
from reportlab.graphics.shapes import Drawing, Rect
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
from dymo_med.inference.report import words

INK, SOFT, LINE = HexColor("#1b2530"), HexColor("#55616e"), HexColor("#d9dde2")
MEASURED, MADE, CAUTION = HexColor("#1f5a82"), HexColor("#a9570c"), HexColor("#9b1c1c")
OTHER, WASH, ALERT = HexColor("#9aa7b3"), HexColor("#f1f3f5"), HexColor("#fbeeee")
MARGIN = 18 * mm
WIDTH = A4[0] - 2 * MARGIN
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
GLYPHS = {
    "observed": "\u25cf",
    "partly": "\u25d0",
    "trusted": "\u2713",
    "rejected": "\u2715",
    "absent": "\u25cb",
}

Flow = list[Any]
Words = Mapping[str, Any]


@dataclass(frozen=True)
class Head:
    """Whose document it is: on every sheet and in its properties.

    Attributes:
        record_id: The record.
        bundle_name: The model.
        bundle_version: Of the package that made it.
        bundle_id: Its id.
        content_sha256: Of the prediction.
    """

    record_id: str
    bundle_name: str
    bundle_version: str
    bundle_id: str
    content_sha256: str


def build_pdf(head: Head, story: Callable[[], Flow]) -> bytes:
    """Return a document that says on every sheet whose it is and which of how many.

    Args:
        head: Whose.
        story: Makes what it holds, anew each time.
    """
    # Once to learn how many sheets there are, once to say so on each.
    sheets, _ = _build(head, story(), 0)
    return _build(head, story(), sheets)[1]


def maker() -> str:
    """Return what decides, besides the prediction, which bytes a PDF has."""
    return (
        f"dymo-med {__version__}, reportlab {reportlab.Version}, zlib {zlib.ZLIB_RUNTIME_VERSION}"
    )


def _build(head: Head, story: Flow, sheets: int) -> tuple[int, bytes]:
    """Return how many sheets it takes, and the PDF."""
    text = words()
    stream = io.BytesIO()
    document = SimpleDocTemplate(
        stream,
        pagesize=A4,
        # Frames are padded by 6 points.
        leftMargin=MARGIN - 6,
        rightMargin=MARGIN - 6,
        topMargin=16 * mm,
        bottomMargin=16 * mm,
        invariant=1,
        lang=text["language"],
        title=f"{text['banner']['report']}: {head.record_id}",
        author=f"{head.bundle_name} {head.bundle_version}",
        subject=text["banner"]["use"],
        keywords=head.content_sha256,
        creator=maker(),
    )

    def frame(canvas: Any, document: Any) -> None:
        left, right, top = MARGIN, A4[0] - MARGIN, A4[1] - 12 * mm
        canvas.saveState()
        canvas.setStrokeColor(LINE)
        canvas.setLineWidth(0.5)
        canvas.line(left, top - 6, right, top - 6)
        canvas.line(left, 15 * mm, right, 15 * mm)
        canvas.setFillColor(CAUTION)
        canvas.setFont("DejaVuSans-Bold", 8)
        canvas.drawString(left, top, text["banner"]["use"])
        canvas.setFillColor(SOFT)
        canvas.setFont("DejaVuSans", 7)
        who = f"{text['trace']['record']} {head.record_id}"
        what = f"{text['banner']['bundle']} {head.bundle_name}"
        canvas.drawString(left, 11 * mm, _fitted(who, right - left - 60))
        canvas.drawString(left, 8 * mm, _fitted(f"{what}, {head.bundle_id[:12]}", right - left))
        page = text["pdf"]["page"].format(page=document.page, pages=sheets or "?")
        canvas.drawRightString(right, 11 * mm, page)
        canvas.restoreState()

    document.build(story, onFirstPage=frame, onLaterPages=frame)
    return int(document.page), stream.getvalue()


# --- Parts ----------------------------------------------------------------------------------------


def section_of(title: str, flow: Sequence[Any], kept: int = 1) -> Flow:
    """Return a section whose title stays on one sheet with so many of the things that follow."""
    return [KeepTogether([para(title, HEADING), *flow[:kept]]), *flow[kept:]]


def rows_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Any]],
    shares: Sequence[float],
    right: Collection[int] = (),
) -> Flow:
    """Return a table, its heads repeated on every sheet."""
    if not rows:
        return []
    top = [[para(h, HEAD_RIGHT if i in right else HEAD) for i, h in enumerate(heads)]]
    table = Table(
        [*(top if heads else []), *rows],
        colWidths=[WIDTH * share for share in shares],
        repeatRows=1 if heads else 0,
        splitInRow=1,
        hAlign="LEFT",
    )
    table.setStyle(
        TableStyle(
            [
                ("VALIGN", (0, 0), (-1, -1), "TOP"),
                ("LINEBELOW", (0, 0), (-1, -1), 0.4, LINE),
                ("LEFTPADDING", (0, 0), (-1, -1), 0),
                ("RIGHTPADDING", (0, 0), (-1, -1), 6),
                ("TOPPADDING", (0, 0), (-1, -1), 2.5),
                ("BOTTOMPADDING", (0, 0), (-1, -1), 2.5),
            ]
        )
    )
    return [table, Spacer(1, 4)]


def track_of(left: float, width: float, colour: Color) -> Any:
    """Return a bar from `left`, `width` wide, in shares of a track."""
    drawing = Drawing(210, 9)
    drawing.add(Rect(0, 0, 210, 9, fillColor=WASH, strokeColor=None))
    start, end = (min(max(x, 0.0), 1.0) for x in (left, left + width))
    drawing.add(Rect(210 * start, 0, 210 * (end - start), 9, fillColor=colour, strokeColor=None))
    return drawing


def bars_of(rows: Sequence[tuple[str, Any, str]], bold: Collection[int] = ()) -> Any:
    """Return labelled bars below each other."""
    cells = [
        [para(a, CELL_BOLD if i in bold else CELL), bar, para(b, CELL_BOLD if i in bold else CELL)]
        for i, (a, bar, b) in enumerate(rows)
    ]
    table = Table(
        cells, colWidths=[150, 222, WIDTH - 372], hAlign="LEFT", splitInRow=1, spaceAfter=5
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


def alert_box(sentences: Sequence[str]) -> Flow:
    """Return sentences in a box that may go on on the next sheet."""
    rows = [[para(f"\u2022 {sentence}", ITEM)] for sentence in sentences]
    table = Table(rows, colWidths=[WIDTH], splitInRow=1)
    table.setStyle(
        TableStyle(
            [
                ("BACKGROUND", (0, 0), (-1, -1), ALERT),
                ("LINEBEFORE", (0, 0), (0, -1), 2.5, CAUTION),
                ("TOPPADDING", (0, 0), (-1, -1), 2),
                ("BOTTOMPADDING", (0, 0), (-1, -1), 2),
                ("LEFTPADDING", (0, 0), (-1, -1), 9),
            ]
        )
    )
    return [table]


def scan_grid(scans: Sequence[Mapping[str, Any]]) -> Any:
    """Return scans two in a row, each with its slices side by side and its name below."""
    half = WIDTH / 2
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
                png_of(picture.png),
                width=picture.width * scale,
                height=picture.height * scale,
                lazy=0,
            )
        )
    table = Table([row], colWidths=[each] * len(row), hAlign="LEFT")
    style: list[Any] = [
        ("VALIGN", (0, 0), (-1, -1), "BOTTOM"),
        ("ALIGN", (0, 0), (-1, -1), "CENTER"),
        ("BACKGROUND", (0, 0), (-1, -1), INK),
        *((f"{side}PADDING", (0, 0), (-1, -1), 1) for side in ("LEFT", "RIGHT", "TOP", "BOTTOM")),
    ]
    if synthetic:
        style.append(("BOX", (0, 0), (-1, -1), 1.2, MADE))
    table.setStyle(TableStyle(style))
    caption = f"<b>{escape(scan['modality'])}</b> {escape(scan['word'])}"
    if synthetic:
        caption = f"{caption} \N{EM DASH} SYNTHETIC"
    return [table, Paragraph(caption, CAPTION_MADE if synthetic else CAPTION)]


def png_of(address: str) -> io.BytesIO:
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


# --- Text -----------------------------------------------------------------------------------------


@cache
def glyphs() -> frozenset[int]:
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


def legible(value: Any, key: str = "") -> Any:
    """Return a prediction whose texts are short enough for paper and in characters of the font."""
    if isinstance(value, dict):
        return {legible(k): legible(v, k) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(legible(v, key) for v in value)
    if not isinstance(value, str) or key in _WHOLE:
        return value
    most = _MOST_PROSE if key in _PROSE else _MOST
    known = glyphs()
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


def para(text: str, style: ParagraphStyle | None = None) -> Any:
    """Return a paragraph of plain text."""
    return Paragraph(escape(text), style or BODY)


def _fitted(text: str, width: float) -> str:
    """Return as much of a line of the footer as fits."""
    while text and pdfmetrics.stringWidth(text, "DejaVuSans", 7) > width:
        text = text[:-2] + "\u2026"
    return text


def style_of(size: float, **more: Any) -> ParagraphStyle:
    """Return a style of the house's font; `more` as of `ParagraphStyle`."""
    given = {"fontName": "DejaVuSans", "leading": 1.35 * size, "textColor": INK, **more}
    return ParagraphStyle(f"{size}{sorted(more)}", fontSize=size, **given)


glyphs()  # the styles look their fonts up
BODY = style_of(9, spaceAfter=4)
SMALL = style_of(7.5, textColor=SOFT, spaceAfter=4)
NOTE = style_of(7.5, textColor=SOFT, spaceAfter=4, keepWithNext=1)
BOLD = style_of(9, fontName="DejaVuSans-Bold")
BOLD_CAUTION = style_of(9, fontName="DejaVuSans-Bold", textColor=CAUTION, spaceAfter=4)
TITLE = style_of(10, fontName="DejaVuSans-Bold", spaceAfter=4)
BIG = style_of(26, fontName="DejaVuSans-Bold", textColor=MEASURED, spaceAfter=6, leading=30)
LEAD = style_of(11, fontName="DejaVuSans-Bold", spaceAfter=5)
HEADING = style_of(11, fontName="DejaVuSans-Bold", spaceBefore=12, spaceAfter=5)
SUBTITLE = style_of(9, fontName="DejaVuSans-Bold", spaceBefore=7, spaceAfter=3, keepWithNext=1)
ITEM = style_of(9, leftIndent=9, firstLineIndent=-9, spaceAfter=3)
CELL = style_of(8)
CELL_BOLD = style_of(8, fontName="DejaVuSans-Bold")
CELL_SOFT = style_of(8, textColor=SOFT)
CELL_MADE = style_of(8, textColor=MADE, fontName="DejaVuSans-Bold")
CELL_CAUTION = style_of(7.5, textColor=CAUTION)
NUMBER = style_of(8, alignment=TA_RIGHT)
HEAD = style_of(7.5, textColor=SOFT, fontName="DejaVuSans-Bold")
HEAD_RIGHT = style_of(7.5, textColor=SOFT, fontName="DejaVuSans-Bold", alignment=TA_RIGHT)
MONO = style_of(7, fontName="DejaVuSansMono", wordWrap="CJK")
CAPTION = style_of(8, spaceBefore=2)
CAPTION_MADE = style_of(8, textColor=MADE, spaceBefore=2)
