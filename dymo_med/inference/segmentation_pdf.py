"""The page of a segmentation as an A4 PDF, made from its `prediction.json` alone.

What is said is what the page says (`segmentation_page.view`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reportlab.platypus import Spacer, Table, TableStyle

from dymo_med.files import write_bytes
from dymo_med.inference.pdf_parts import (
    BOLD,
    BOLD_CAUTION,
    CELL,
    CELL_BOLD,
    CELL_MADE,
    CELL_SOFT,
    GLYPHS,
    MONO,
    NUMBER,
    SMALL,
    TITLE,
    WASH,
    WIDTH,
    Flow,
    Head,
    Words,
    alert_box,
    build_pdf,
    legible,
    maker,
    para,
    rows_table,
    scan_grid,
    section_of,
)
from dymo_med.inference.report import percent, words
from dymo_med.inference.segmentation_file import SegmentationFile
from dymo_med.inference.segmentation_page import content_of, view

_STYLES = {"trusted": CELL_MADE}


def write_segmentation_pdf(file: SegmentationFile, path: Path) -> None:
    """Write the page of a segmentation as PDF; the same file gives the same bytes.

    Args:
        file: All that it shows.
        path: The PDF file.

    Raises:
        PatientDataError: If a picture in the file is none.
    """
    write_bytes(path, render_segmentation_pdf(file))


def render_segmentation_pdf(file: SegmentationFile) -> bytes:
    """Return the page of a segmentation as PDF.

    Args:
        file: All that it shows.

    Raises:
        PatientDataError: If a picture in the file is none.
    """
    printed = SegmentationFile.model_validate(legible(file.model_dump()))
    model, content = printed.bundle, content_of(file)
    head = Head(printed.record_id, model.name, model.version, model.id, content)
    return build_pdf(head, lambda: _story(printed, content))


def audit_segmentation_pdf(file: SegmentationFile, content: bytes) -> bool:
    """Return whether a PDF is that of a segmentation, as `pdf.audit_pdf` does.

    Args:
        file: The segmentation.
        content: Of the PDF.
    """
    if maker().encode() in content:
        return content == render_segmentation_pdf(file)
    return f"/Keywords ({content_of(file)})".encode() in content


def _story(file: SegmentationFile, content: str) -> Flow:
    """Return everything in the order of the page."""
    shown = view(file)
    return [
        *_banner(file, shown),
        *_volumes(file, shown),
        *_scans(file, shown),
        *_where(file),
        *_tested(shown),
        *_steps(file),
        *section_of(
            words()["segmentation"]["limits"], [para(words()["segmentation"]["limits_text"])]
        ),
        *_trace(file, shown, content),
    ]


def _banner(file: SegmentationFile, shown: Words) -> Flow:
    text = words()
    style = BOLD_CAUTION if file.status != "answered" else BOLD
    model = f"{file.bundle.name}, {text['banner']['version']} {file.bundle.version}"
    heads = (text["trace"]["record"], text["banner"]["bundle"], text["banner"]["status"])
    said = ((file.record_id, BOLD), (model, BOLD), (text["status"][file.status], style))
    cells = [[para(head, SMALL) for head in heads], [para(one, how) for one, how in said]]
    table = Table(cells, colWidths=[WIDTH / 3] * 3)
    table.setStyle(
        TableStyle([("BACKGROUND", (0, 0), (-1, -1), WASH), ("VALIGN", (0, 0), (-1, -1), "TOP")])
    )
    notes = [*shown["reasons"], *file.warnings]
    return [table, Spacer(1, 6), *(alert_box(notes) if notes else []), Spacer(1, 8)]


def _volumes(file: SegmentationFile, shown: Words) -> Flow:
    text = words()["segmentation"]

    def ml(value: float) -> str:
        return f"{value:.1f} {text['ml']}"

    heads = [text["region"], text["volume"]]
    if shown["promised"]:
        heads.append(text["interval"].format(coverage=percent(shown["coverage"])))
    if shown["wide"]:
        heads.append(text["wide"])
    heads += [text["alone"], text["labels"]]
    rows: list[list[Any]] = []
    for region in file.regions:
        row = [ml(region.volume_ml)]
        if shown["promised"]:
            found = region.interval
            row.append(
                text["unknown"]
                if found is None
                else text["between"].format(
                    low=f"{found.low_ml:.1f}", high=f"{found.high_ml:.1f}", ml=text["ml"]
                )
            )
        if shown["wide"]:
            row.append(text["unknown"] if region.wide is None else ml(region.wide.volume_ml))
        row += [ml(file.observed_only_ml[region.name]), ", ".join(map(str, region.labels))]
        rows.append([para(region.name, CELL_BOLD), *(para(cell, NUMBER) for cell in row)])
    shares = [0.22, *[0.78 / (len(heads) - 1)] * (len(heads) - 1)]
    flow: Flow = [
        para(text["title"], TITLE),
        para(f"{text['method'].format(method=file.method)} {file.method_why}", SMALL),
        *rows_table(heads, rows, shares, right=range(1, len(heads))),
    ]
    if not file.regions[0].volume_ml:
        flow.append(para(text["none"]))
    return [*flow, *(para(sentence, SMALL) for sentence in shown["basis"])]


def _scans(file: SegmentationFile, shown: Words) -> Flow:
    text = words()["segmentation"]
    rows = [
        [
            para(name, CELL_BOLD),
            para(f"{GLYPHS[state]} {text['states'][state]}", _STYLES.get(state, CELL)),
        ]
        for name, state in shown["states"]
    ]
    return section_of(text["scans"], rows_table([], rows, (0.25, 0.75)))


def _where(file: SegmentationFile) -> Flow:
    text = words()["segmentation"]
    scans = [
        {
            "modality": scan.modality,
            "word": text["states"][scan.state],
            "state": scan.state,
            "slices": scan.cuts,
        }
        for scan in file.scans
    ]
    legend = ", ".join(
        f"{region.name} ({text['lines'][i % 5]})" for i, region in enumerate(file.regions)
    )
    lead = [
        para(text["overlays_lead"], SMALL),
        para(f"{text['legend']}: {legend}", SMALL),
    ]
    return section_of(text["overlays"], [*lead, scan_grid(scans)], 3)


def _tested(shown: Words) -> Flow:
    if not shown["performance"]:
        return []
    text = words()["segmentation"]
    return section_of(text["performance"], [para(sentence) for sentence in shown["performance"]])


def _steps(file: SegmentationFile) -> Flow:
    if not file.steps:
        return []
    text = words()["segmentation"]
    rows = [
        [
            para(str(step.step), CELL),
            para(step.modality, CELL),
            para(f"{step.reward:+.4f}", NUMBER),
            para(step.decision, CELL),
        ]
        for step in file.steps
    ]
    heads = [text["step"], text["scan"], text["reward"], text["decision"]]
    return section_of(text["steps"], rows_table(heads, rows, (0.1, 0.3, 0.2, 0.4), right=(2,)))


def _trace(file: SegmentationFile, shown: Words, content: str) -> Flow:
    text, own = words(), words()["segmentation"]
    grid = own["grid"].format(
        shape=" x ".join(map(str, file.grid.shape)), ml=f"{file.grid.voxel_ml:.4g}"
    )
    facts = [
        (own["file"], f"{file.files['segmentation'].file}, {grid}", CELL),
        (own["flips"], own["yes"] if file.flips else own["no"], CELL),
        (own["seed"], str(file.seed), CELL),
        (own["command"], file.command, MONO),
        (own["versions"], ", ".join(f"{n} {v}" for n, v in file.versions.items()), CELL),
        (text["trace"]["content"], content, MONO),
    ]
    rows = [[para(name, CELL_SOFT), para(said, style)] for name, said, style in facts]
    files = [(n, source.file, source.sha256) for n, source in file.sources.items()]
    files += [(n, part.file, part.sha256) for n, part in shown["written"]]
    hashes = [[para(n, CELL_BOLD), para(f, CELL), para(h, MONO)] for n, f, h in files]
    heads = [own["sources"], text["trace"]["file"], text["trace"]["hash"]]
    return section_of(
        text["trace"]["title"],
        [
            *rows_table([], rows, (0.22, 0.78)),
            Spacer(1, 6),
            *rows_table(heads, hashes, (0.18, 0.22, 0.6)),
        ],
    )
