"""The page of a segmentation, made from its `prediction.json` alone, and its audit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dymo_med import __version__
from dymo_med.errors import Problem
from dymo_med.files import csv_text, write_text
from dymo_med.inference.assemble import STEP_COLUMNS
from dymo_med.inference.overlays import COLOURS
from dymo_med.inference.prediction_file import IntervalPart
from dymo_med.inference.report import environment, guarded, percent, reason_sentence, words
from dymo_med.inference.segmentation_file import SegmentationFile, read_segmentation


def write_segmentation_report(file: SegmentationFile, path: Path) -> None:
    """Write the page of a segmentation; the same file gives the same bytes.

    Args:
        file: All that the page shows.
        path: The HTML file.
    """
    write_text(path, render_segmentation(file))


def render_segmentation(file: SegmentationFile) -> str:
    """Return the page of a segmentation."""
    page = environment().get_template("segmentation.html.j2")
    return guarded(page.render(view(file)))


def view(file: SegmentationFile) -> dict[str, Any]:
    """Return what the page and the PDF show, in the order of their sections.

    Args:
        file: All that is known.
    """
    intervals = [r.interval for r in file.regions if r.interval is not None]
    return {
        "p": {**file.model_dump(), "content_sha256": content_of(file)},
        "colours": ["#{:02x}{:02x}{:02x}".format(*colour) for colour in COLOURS],
        "states": [
            *((name, "observed") for name in file.observed),
            *((name, "trusted") for name in file.trusted),
            *((name, "rejected") for name in file.rejected),
            *((name, "absent") for name in file.absent),
        ],
        "reasons": [reason_sentence(reason) for reason in file.status_reasons],
        "promised": bool(intervals),
        "coverage": intervals[0].coverage if intervals else 0.0,
        "wide": any(r.wide is not None for r in file.regions),
        "basis": _basis(file),
        "performance": _performance(file),
        "written": [*file.files.items(), *file.recovered_files.items()],
    }


def content_of(file: SegmentationFile) -> str:
    """Return the SHA-256 of the file's text."""
    return hashlib.sha256(file.to_text().encode()).hexdigest()


def _basis(file: SegmentationFile) -> list[str]:
    """Return on what the promises rest, as sentences."""
    text = words()["segmentation"]
    groups = {
        (r.interval.calibrated_on, r.interval.compared_with)
        for r in file.regions
        if r.interval is not None
    }
    said = [
        text["interval_basis"].format(n=n, whom=text["whom"][whom]) for n, whom in sorted(groups)
    ]
    wide = [r.wide for r in file.regions if r.wide is not None]
    if wide and "wide" in file.files:
        name = file.files["wide"].file
        said.append(text["wide_basis"].format(file=name, missed=percent(wide[0].missed)))
    return said


def _performance(file: SegmentationFile) -> list[str]:
    """Return how good such outlines are, as sentences."""
    found = file.performance
    if found is None:
        return []
    text = words()["segmentation"]

    def figures(part: IntervalPart) -> dict[str, str]:
        told = {"dice": part.value, "low": part.low, "high": part.high}
        return {k: "" if v is None else f"{v:.2f}" for k, v in told.items()}

    said = [text["overlap"][found.level].format(n=found.patients, **figures(found.dice))]
    if found.observed_only is not None:
        said.append(text["overlap_alone"].format(**figures(found.observed_only)))
    return said


def audit_pages(folder: Path) -> Iterator[Problem]:
    """Yield pages and tables of a segmentation that are not what `prediction.json` says.

    Args:
        folder: Holds `prediction.json`.

    Raises:
        PatientDataError: If `prediction.json` cannot be read.
    """
    file = read_segmentation(folder / "prediction.json")
    expected = {"selection.csv": csv_text(STEP_COLUMNS, [step.model_dump() for step in file.steps])}
    if file.versions.get("dymo_med") == __version__:  # others word and lay out pages differently
        expected["report.html"] = render_segmentation(file)
    pdf = folder / "report.pdf"
    if pdf.is_file():
        from dymo_med.inference.segmentation_pdf import audit_segmentation_pdf

        if not audit_segmentation_pdf(file, pdf.read_bytes()):
            yield Problem(
                str(pdf),
                "the file is not what prediction.json says",
                expected="the same bytes that the command would write",
                remedy="`dymo-med report --pdf` makes it again",
            )
    for name, text in expected.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != text.encode():
            yield Problem(
                str(path),
                "the file is not what prediction.json says" if path.is_file() else "it is absent",
                expected="the same bytes that the command would write",
                remedy="Predict again",
            )
