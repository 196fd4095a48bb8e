"""One patient's page as an A4 PDF, made from `prediction.json` alone.

Drawn with reportlab instead of printed by a browser: it needs no browser on the machine, the same
prediction gives the same bytes, and every sheet says whose it is and which of how many. What is
said is what the page says (`report.view`); words are in `templates/strings.json`.

Letters of languages that are written from right to left stand in the order in which they are
stored; characters that the font lacks are written as their code point.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reportlab.graphics.shapes import Circle, Drawing, Line
from reportlab.platypus import (
    Spacer,
    Table,
    TableStyle,
)

from dymo_med.files import write_bytes
from dymo_med.inference.pdf_parts import (
    BIG,
    BODY,
    BOLD,
    BOLD_CAUTION,
    CAUTION,
    CELL,
    CELL_BOLD,
    CELL_CAUTION,
    CELL_MADE,
    CELL_SOFT,
    GLYPHS,
    INK,
    ITEM,
    LEAD,
    MADE,
    MEASURED,
    MONO,
    NOTE,
    NUMBER,
    OTHER,
    SMALL,
    SUBTITLE,
    TITLE,
    WASH,
    WIDTH,
    Flow,
    Head,
    Words,
    alert_box,
    bars_of,
    build_pdf,
    legible,
    maker,
    para,
    rows_table,
    scan_grid,
    section_of,
    track_of,
)
from dymo_med.inference.prediction_file import PredictionFile
from dymo_med.inference.report import percent, points, view, words


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
    shown = PredictionFile.model_validate(legible(file.model_dump()))
    head = Head(
        shown.record_id,
        shown.bundle_name,
        shown.bundle_version,
        shown.bundle_id,
        shown.content_sha256,
    )
    return build_pdf(head, lambda: _story(shown))


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
    style = BOLD_CAUTION if file.status != "answered" else BOLD
    model = f"{file.bundle_name}, {text['banner']['version']} {file.bundle_version}"
    cells = [
        [para(text["trace"]["record"], SMALL), para(text["banner"]["bundle"], SMALL)],
        [para(file.record_id, BOLD), para(model, BOLD)],
    ]
    cells[0].append(para(text["banner"]["status"], SMALL))
    cells[1].append(para(text["status"][file.status], style))
    table = Table(cells, colWidths=[WIDTH / 3] * 3)
    table.setStyle(
        TableStyle([("BACKGROUND", (0, 0), (-1, -1), WASH), ("VALIGN", (0, 0), (-1, -1), "TOP")])
    )
    # A warning is never left for a later sheet.
    notes = [*shown["reasons"], *shown["warned"]]
    alert = alert_box(notes) if notes else []
    return [table, Spacer(1, 6), *alert, Spacer(1, 8)]


def _answer(file: PredictionFile, shown: Words) -> Flow:
    text, answer = words(), shown["answer"]
    number = percent(shown["probability"])
    left = [para(text["answer"]["question"].format(target=file.target), TITLE)]
    value = shown["number"]
    if value is not None:
        if answer["abstained"]:
            left.append(para(answer["statement"], LEAD))
        left += [para(value["big"], BIG), para(value["interval"], LEAD)]
    elif answer["abstained"]:
        second = text["answer"]["number_second"]
        left += [
            para(answer["statement"], BIG),
            para(answer["set"][0], LEAD),
            para(second.format_map({"class": shown["chosen"], "percent": number}), LEAD),
        ]
    else:
        left += [para(number, BIG), para(answer["statement"], LEAD)]
    if value is None:
        left.append(para(answer["frequency"]))
    left.append(para(answer["rests"]))
    if answer["shares"]:
        left.append(para(answer["shares"]))
    counted = value is None and answer["count"] is not None
    dots = Drawing(100, 100)
    for i in range(100):
        full = i < (answer["count"] or 0)
        dots.add(
            Circle(
                5 + 10 * (i % 10),
                95 - 10 * (i // 10),
                3.6,
                fillColor=MEASURED if full else None,
                strokeColor=MEASURED if full else OTHER,
                strokeWidth=0.7,
            )
        )
    side = [dots, Spacer(1, 3), para(text["answer"]["caption"], SMALL)] if counted else []
    grid = Table([[left, side]], colWidths=[WIDTH - 115, 115])
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
        rows.append((name, track_of(0, share, MEASURED if best else OTHER), said))
    flow: Flow = [grid, bars_of(rows)]
    if value is not None:
        flow.insert(1, para(value["bands"], SMALL))
        flow += [
            para(f"{row['horizon']}: {row['risk']}" + f" ({row['band']})" * bool(row["band"]))
            for row in value.get("rows", ())
        ]
        flow.append(para(f"{value['title']}. {value['basis'] or value['interval']}"))
        return flow
    if answer["base"]:
        flow.append(para(answer["base"], SMALL))
    flow.append(para(f"{text['answer']['set_title']}. {' '.join(answer['set'])}"))
    return flow


def _had(shown: Words) -> Flow:
    text = words()["had"]
    rows = [
        [
            para(row["name"], CELL_BOLD),
            [
                para(f"{GLYPHS[row['glyph']]} {row['word']}", CELL),
                *(para(f"\u25b2 {sentence}", CELL_CAUTION) for sentence in row["gate"]),
            ],
            para(row["use"], CELL),
            para(row["facts"], CELL_SOFT),
        ]
        for row in shown["had"]
    ]
    heads = [text["modality"], text["state"], text["use"], text["facts"]]
    return section_of(text["title"], rows_table(heads, rows, (0.2, 0.27, 0.16, 0.37)))


def _change(file: PredictionFile, shown: Words) -> Flow:
    text, change = words(), shown["change"]
    style = BOLD_CAUTION if change["flip"] else BODY
    flow: Flow = [
        para(change["sentence"], style),
        para(text["change"]["lead"].format_map({"class": shown["chosen"]}), SMALL),
    ]
    rows = []
    for row in change["rows"]:
        bar = track_of(0, row["probability"], MEASURED if row["own"] else OTHER)
        if len(file.classes) == 2:
            bar.add(Line(bar.width / 2, 0, bar.width / 2, bar.height, strokeColor=INK))
        said = f"{percent(row['probability'])}, {row['says']}"
        if row["draws"]:
            said += f"; {row['draws']['text']}"
            low, high = (bar.width * row["draws"][key] for key in ("low", "high"))
            middle = bar.height / 2
            bar.add(Line(low, middle, high, middle, strokeColor=MADE, strokeWidth=3))
            for tick in row["draws"]["ticks"]:
                x = bar.width * tick
                bar.add(Line(x, 0, x, bar.height, strokeColor=MADE, strokeWidth=0.6))
        rows.append((row["label"], bar, said))
    flow.append(bars_of(rows, bold=[i for i, row in enumerate(change["rows"]) if row["own"]]))
    if change["notes"]:
        flow.append(para(" ".join(change["notes"]), SMALL))
    return section_of(text["change"]["title"], flow, len(flow))


def _made_up(file: PredictionFile, shown: Words) -> Flow:
    text, scans = words(), shown["pictures"]
    made = shown["scans_made"]
    lead = text["madeup"]["nothing"]
    if file.recovered:
        lead = f"{text['madeup']['lead']} {text['madeup']['lead_scans' if made else 'no_scans']}"
    flow: Flow = [para(lead)]
    if made:
        flow.append(scan_grid(scans))
        if any(not s["flat"] for s in scans):
            flow.append(para(text["madeup"]["planes"], SMALL))
    if shown["recovered_cells"]:
        rows = [
            [
                para(c.modality, CELL),
                para(c.column, CELL_BOLD),
                para(_value(c), CELL_MADE),
                para(_position(c), CELL_SOFT),
                para(shown["states"][shown["cell_state"][c.modality]], CELL),
            ]
            for c in shown["recovered_cells"]
        ]
        heads = [
            text["had"]["modality"],
            *(text["madeup"][key] for key in ("column", "value", "percentile", "state")),
        ]
        flow.append(para(text["madeup"]["cells"], SUBTITLE))
        flow += rows_table(heads, rows, (0.18, 0.24, 0.16, 0.2, 0.22))
    return section_of(text["madeup"]["title"], flow, 2)


def _why(file: PredictionFile, shown: Words) -> Flow:
    text, why = words()["why"], shown["why"]
    if not file.recovered:
        return section_of(text["title"], [para(text["nothing"])])
    flow: Flow = []
    if not why["rows"]:
        flow.append(para(f"{text['blind'].format(method=file.method)} {file.method_why}"))
    flow += [
        para(f"{GLYPHS[state]} {sentence}", ITEM)
        for state, sentence in zip(why["states"], why["sentences"], strict=True)
    ]
    if not why["rows"]:
        return section_of(text["title"], flow)
    flow.append(para(why["lead"], SMALL))
    rows = []
    for row in why["rows"]:
        name = row["candidate"] + (f" ({text['completed']})" if row["completed"] else "")
        cells = [
            para(str(row["step"]), NUMBER),
            para(name + ("\u2020" if row["borrowed"] else ""), CELL_BOLD),
            para("{} \u2192 {}".format(*row["quality"]), NUMBER),
            para("{} \u2192 {}".format(*row["typical"]), NUMBER),
            para(row["factor"], NUMBER),
            para(row["reward"], NUMBER),
        ]
        if why["trust"]:
            cells.append(para(row["trust"], NUMBER))
        rows.append([*cells, para(row["decision_word"], CELL)])
    keys = ["step", "candidate", "clarity_heading", "typicality_heading", "factor", "reward"]
    heads = [text[k] for k in (*keys, *(["trust"] if why["trust"] else []), "decision")]
    shares: Sequence[float] = (0.07, 0.24, 0.17, 0.18, 0.09, 0.1, 0.15)
    if why["trust"]:
        shares = (0.07, 0.21, 0.17, 0.17, 0.08, 0.09, 0.08, 0.13)
    flow += rows_table(heads, rows, shares, right=range(2, len(heads) - 1))
    legend = f"{text['clarity']} {text['typicality']} {text['factor_legend']}"
    if any(row["borrowed"] for row in why["rows"]):
        legend += f" \u2020 {text['borrowed']}"
    return section_of(text["title"], [*flow, para(legend, SMALL)])


def _drove(shown: Words) -> Flow:
    text, drove = words()["drove"], shown["drove"]
    if not drove["bars"]:
        return section_of(text["title"], [para(text["off"])])
    flow: Flow = [para(text["lead"].format_map({"class": shown["chosen"]}), SMALL)]
    rows = [(text["start"], track_of(0, drove["start"], OTHER), percent(drove["start"]))]
    for bar in drove["bars"]:
        made = f" ({text['completed' if bar['partly'] else 'recovered']})" if bar["made"] else ""
        colour = CAUTION if bar["value"] < 0 else MADE if bar["made"] else MEASURED
        track = track_of(bar["left"] / 100, bar["width"] / 100, colour)
        rows.append((bar["name"] + made, track, points(bar["value"])))
    rows.append((text["end"], track_of(0, drove["end"], MEASURED), percent(drove["end"])))
    flow.append(bars_of(rows, bold=[len(rows) - 1]))
    flow.append(para(f"{drove['sum']} {text['sampled'] if drove['sampled'] else ''}", SMALL))
    if drove["unused"]:
        flow.append(para(drove["unused"], BOLD_CAUTION))
    if drove["cells"]:
        cells = []
        for row in drove["cells"]:
            cell = row["cell"]
            made = "" if cell.measured else f" ({text['recovered']})"
            cells.append(
                [
                    para(cell.column + made, CELL_BOLD),
                    para(cell.modality, CELL_SOFT),
                    para(_value(cell), CELL),
                    para(_position(cell), CELL_SOFT),
                    para(points(row["value"]), NUMBER),
                ]
            )
        heads = [
            text["column"],
            words()["had"]["modality"],
            *(text[key] for key in ("value", "position", "effect")),
        ]
        flow.append(para(text["cells"], SUBTITLE))
        flow.append(para(text["cells_lead"].format_map({"class": shown["chosen"]}), NOTE))
        flow += rows_table(heads, cells, (0.28, 0.2, 0.16, 0.2, 0.16), right=(4,))
    if drove["maps"]:
        lead = text["maps_lead"].format(sigma=drove["sigma"], convergence=drove["convergence"])
        flow.append(para(text["maps"], SUBTITLE))
        for key, recovered in (("observed_maps", False), ("recovered_maps", True)):
            maps = [m for m in drove["maps"] if (m["state"] != "observed") == recovered]
            if maps:
                flow += [para(text[key], NOTE), scan_grid(maps)]
        flow.append(para(lead, SMALL))
    if drove["contrast"]:
        lead = text["contrast_lead"] + ("" if drove["maps"] else f" {text['no_maps']}")
        flow += [para(text["contrast_title"], SUBTITLE), para(lead, NOTE)]
        flow += [para(line, NOTE) for line in drove["contrast"]]
    return section_of(text["title"], flow, 2)


def _performance(shown: Words) -> Flow:
    text, found = words()["performance"], shown["performance"]
    if found is None:
        return section_of(text["title"], [para(text["unknown"])])
    flow: Flow = [para(text["few"], BOLD_CAUTION)] if found["few"] else []
    flow.append(para(found["sentence"]))
    rows = [
        [para(name, CELL_BOLD)]
        + [para(f"{v} ({between})" if between else v, NUMBER) for v, between in figures]
        for name, figures in found["rows"]
    ]
    heads = [text[key] for key in ("method", "auroc", "brier", "ece")]
    flow += rows_table(heads, rows, (0.37, 0.21, 0.21, 0.21), right=(1, 2, 3))
    return section_of(text["title"], [*flow, para(text["legend"], SMALL)], len(flow))


def _acquire(shown: Words) -> Flow:
    text, found = words()["acquire"], shown["acquire"]
    flow: Flow = [para(found["sentence"])] if found["sentence"] else []
    if found["rows"]:
        flow.append(para(f"{text['lead']} {found['now']}", SMALL))
        rows = [
            [
                para(row["name"] + (f" ({text['blanks']})" if row["blanks"] else ""), CELL_BOLD),
                para(row["bits"], NUMBER),
                para(f"{percent(row['before'])} \u2192 {percent(row['after'])}", NUMBER),
                para(str(row["changes"]), NUMBER),
            ]
            for row in found["rows"]
        ]
        heads = [text["modality"], text["certainty"], found["heading"], text["changes"]]
        flow += rows_table(heads, rows, (0.34, 0.22, 0.22, 0.22), right=(1, 2, 3))
    if found.get("unknown"):
        flow.append(para(found["unknown"]))
    return section_of(text["title"], flow, len(flow))


def _limits(file: PredictionFile, shown: Words) -> Flow:
    text = words()["limits"]
    flow: Flow = [para(text["warnings"], SUBTITLE)]
    flow += [para(f"\u25b2 {warning}", ITEM) for warning in file.warnings] or [para(text["none"])]
    flow.append(para(text["known"], SUBTITLE))
    flow += [para(f"\u2022 {sentence}", ITEM) for sentence in shown["limits"]]
    return section_of(text["title"], flow, 2)


def _trace(file: PredictionFile) -> Flow:
    text = words()
    bundle = file.bundle_name
    if file.exhibits.bundle_description:
        bundle += f": {file.exhibits.bundle_description}"
    versions = ", ".join(f"{name} {version}" for name, version in file.versions.items())
    facts = [
        (text["trace"]["record"], file.record_id, CELL),
        (text["trace"]["bundle"], bundle, CELL),
        ("", file.bundle_id, MONO),
        (
            text["trace"]["selector"],
            file.method + (f". {file.method_why}" if file.method_why else ""),
            CELL,
        ),
        (text["trace"]["seed"], str(file.seed), CELL),
        (text["trace"]["device"], file.device, CELL),
        (text["trace"]["versions"], versions, CELL),
        (text["status"]["command"], file.command or "", MONO),
        (text["trace"]["content"], file.content_sha256, MONO),
    ]
    rows = [[para(a, CELL_SOFT), para(b, style)] for a, b, style in facts if b]
    flow = rows_table([], rows, (0.18, 0.82))
    if file.sources or file.recovered_files:
        sources = [
            [para(name, CELL_BOLD), para(source.file, CELL), para(source.sha256, MONO)]
            for name, source in file.sources.items()
        ]
        sources += [
            [
                para(f"{name} ({text['drove']['recovered']})", CELL_MADE),
                para(made.file, CELL),
                para(made.sha256, MONO),
            ]
            for name, made in file.recovered_files.items()
        ]
        heads = [text["had"]["modality"], text["trace"]["file"], text["trace"]["hash"]]
        flow += [Spacer(1, 6), *rows_table(heads, sources, (0.18, 0.22, 0.6))]
    return section_of(text["trace"]["title"], flow)


def _value(cell: Any) -> str:
    unit = "" if cell.unit == "1" else cell.unit
    return f"{cell.text or chr(0x2013)} {unit}".strip()


def _position(cell: Any) -> str:
    """Return where a cell lies among training patients, in words."""
    text = words()["drove"]
    if cell.percentile is not None:
        return str(text["rank"].format(n=round(cell.percentile)))
    return "" if cell.share is None else str(text["share"].format(percent=percent(cell.share)))
