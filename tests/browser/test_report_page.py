"""A patient's page in a real browser: six patients, and answers that are hard to say."""

import shutil
from importlib import resources
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from dymo_med.bundle import load_bundle
from dymo_med.data.simulate import simulate
from dymo_med.inference.predict import predict_patient
from dymo_med.inference.prediction_file import read_prediction
from dymo_med.inference.report import percent, words, write_report
from tests.unit.test_report import exhibits, file_of, prediction, step

SECTIONS = [
    "answer",
    "had",
    "change",
    "madeup",
    "why",
    "drove",
    "performance",
    "acquire",
    "limits",
    "reader",
]
# What is wider than the page, but for what scrolls by itself or is there for screen readers only.
TOO_WIDE = """() => [...document.querySelectorAll("body *")].filter(e =>
    !e.closest(".scroll, .hidden, .viewer") && e.getBoundingClientRect().width > 0
    && (e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1)
).map(e => e.outerHTML.slice(0, 120))"""


def without(patient, target, bundle, scans=(), tables=(), columns=()):
    """Copy a patient without these scans, tables and columns."""
    shutil.copytree(patient, target)
    for spec in bundle.specs:
        if spec.name in scans:
            (target / spec.file).unlink()
        if spec.name in tables:
            columns = (*columns, *(c.name for c in spec.columns))
    lines = (target / "ehr.csv").read_text(encoding="utf-8").splitlines()
    header, cells = (line.split(",") for line in lines)
    cells = ["" if name in columns else c for name, c in zip(header, cells, strict=True)]
    (target / "ehr.csv").write_text(f"{','.join(header)}\n{','.join(cells)}\n", encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def bundle():
    return load_bundle(Path(str(resources.files("dymo_med") / "bundles" / "simulated")), "cpu")


@pytest.fixture(scope="module")
def pages(browser, bundle, tmp_path_factory):
    """Six patients as the shipped bundle answers for them: page and prediction by case."""
    folder = tmp_path_factory.mktemp("pages")
    cohort = simulate(folder / "cohort", patients=1, seed=777, missing=0.0)
    (whole,) = (cohort / "patients").iterdir()
    lacks = {
        "nothing": {},
        "scan": {"scans": ("flair",)},
        # Whatever the default trusts: here the made-up scan is used.
        "used": {"scans": ("flair",)},
        "table": {"tables": ("labs",)},
        "both": {"scans": ("t1",), "tables": ("labs",)},
        "most": {"scans": ("t1", "t1ce", "t2", "flair"), "tables": ("symptoms", "labs")},
        "cells": {"columns": ("ldh", "albumin")},
    }
    result = {}
    for case, missing in lacks.items():
        patient = without(whole, folder / case / "patient", bundle, **missing)
        out = folder / case / "out"
        asked = bundle.with_selector("trust_all") if case == "used" else bundle
        predict_patient(patient, asked, out, draws=3)
        file = read_prediction(out / "prediction.json")
        result[case] = SimpleNamespace(file=file, path=out / "report.html")
    return result


CASES = ("nothing", "scan", "table", "both", "most", "cells")
case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def made(visit, tmp_path):
    """Open the page of a prediction that was made for the test."""

    def made(x=None, width=1280, **changes):
        write_report(file_of(prediction(**changes), x or exhibits()), tmp_path / "report.html")
        return visit(tmp_path / "report.html", width).page

    return made


def said(page, part):
    # What is folded is read too.
    page.locator("details").evaluate_all("all => all.forEach(d => { d.open = true; })")
    return page.locator(part).inner_text()


@case
def test_every_section_is_there_and_needs_nothing(pages, visit, case):
    opened = visit(pages[case].path)
    page = opened.page
    assert page.locator("main > section").evaluate_all("all => all.map(s => s.id)") == SECTIONS
    titles = "all => all.every(s => document.getElementById(s.getAttribute('aria-labelledby')))"
    assert page.locator("main > section").evaluate_all(titles)
    assert page.get_by_role("banner").count() == page.get_by_role("main").count() == 1
    assert page.get_by_role("contentinfo").get_attribute("id") == "trace"
    ids = page.locator("[id]").evaluate_all("all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))
    levels = page.locator("h1, h2, h3, h4").evaluate_all("all => all.map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels)), levels
    images = page.locator("img").evaluate_all("all => all.map(i => i.naturalWidth)")
    assert all(images)
    named = page.locator("[role=img]").evaluate_all("all => all.map(e => e.ariaLabel)")
    assert named and all(named)
    assert opened.errors == []
    assert all(url.startswith(("file:", "data:")) for url in opened.requests)


@case
def test_the_page_says_what_the_prediction_says(pages, visit, case):
    file, page = pages[case].file, visit(pages[case].path).page
    banner, answer = said(page, "#banner"), said(page, "#answer")
    assert "Not a diagnosis" in banner and file.bundle_id[:12] in banner
    assert words()["status"][file.status] in banner
    assert page.locator("#status li").count() >= len(file.status_reasons)
    assert percent(file.probabilities[file.chosen]) in answer
    n = file.prediction_set.calibrated_on
    few = n < file.prediction_set.least
    assert f"{'It rests' if few else 'worked out'} on {n} held-back patients" in answer
    rows = page.locator("#had tbody tr").all_inner_texts()
    names = {*file.observed, *file.recovered, *file.absent}
    assert sorted(row.split()[0] for row in rows) == sorted(names)
    for row in rows:
        name = row.split()[0]
        if name in file.recovered:
            word = "rejected" if name in file.rejected else "trusted"
            assert word in row, row
    sentences = page.locator("#why .say li").all_inner_texts()
    assert [s.split()[0] for s in sentences] == list(file.recovered)
    for name, sentence in zip(file.recovered, sentences, strict=True):
        assert ("rejected" if name in file.rejected else "trusted") in sentence
    assert page.locator("#why tbody tr").count() == len(file.steps)
    flips = {m for m, p in file.alternatives.items() if p.index(max(p)) != file.chosen}
    marked = page.locator("#change [data-flip]").evaluate_all(
        "all => all.map(r => r.dataset.method)"
    )
    assert set(marked) == flips
    assert ("Yes." in said(page, "#change")) == bool(flips)
    good = said(page, "#performance")
    assert f"{file.performance.own.auroc.value:.2f}" in good
    assert ("Fewer than 30" in good) == file.performance.tested_fewer_than_30
    gains = file.acquire.gains if file.acquire else ()
    names = page.locator("#acquire tbody th").all_inner_texts()
    assert [name.split()[0] for name in names] == [g.modality for g in gains]
    trace = said(page, "#trace")
    hashes = [*file.sources.values(), *file.recovered_files.values()]
    for text in (*(s.sha256 for s in hashes), file.bundle_id, file.content_sha256, file.command):
        assert text in trace


def test_nothing_made_up_nothing_shown(pages, visit):
    page = visit(pages["nothing"].path).page
    assert page.locator("#madeup img").count() == 0
    assert "Nothing was made up" in said(page, "#madeup")
    assert "nothing was recovered" in said(page, "#why")
    assert "Nothing is missing" in said(page, "#change")
    assert "Nothing is missing" in said(page, "#acquire")
    assert page.locator("#change .draw").count() == 0
    assert page.locator("#drove .leaf").count() == 1


def test_a_made_up_scan_is_shown_beside_measured_ones(pages, visit):
    page = visit(pages["scan"].path).page
    assert page.locator("#madeup figure").count() == 4
    assert page.locator("#madeup figure.made").inner_text().startswith("flair")
    assert page.locator("#madeup figure.made img").count() == 3
    assert "SYNTHETIC" in said(page, "#madeup")


@pytest.mark.parametrize(("case", "cells"), [("table", 5), ("cells", 2)])
def test_made_up_cells_are_marked(pages, visit, case, cells):
    page = visit(pages[case].path).page
    assert page.locator("#madeup img").count() == 0
    assert "No scan was made up" in said(page, "#madeup")
    assert page.locator("#madeup td.made-text").count() == cells
    assert "partly filled" in said(page, "#had") or case == "table"


def test_the_spread_over_draws_is_drawn(pages, visit):
    page, file = visit(pages["most"].path).page, pages["most"].file
    row = page.locator("#change [data-method=trust_all]")
    assert row.locator(".draw").count() == file.draws.n == 3
    assert "draws" in row.inner_text()
    box, band = row.locator(".range").bounding_box(), row.locator(".band").bounding_box()
    low = file.draws.trust_all.low[file.chosen]
    assert (band["x"] - box["x"]) / box["width"] == pytest.approx(low, abs=0.01)


def test_slices_are_leafed_through_by_keyboard(pages, visit):
    page = visit(pages["used"].path).page
    group = page.locator(".leaf").first
    slider, said_slice = group.locator("input[type=range]"), group.locator(".said")
    viewer = group.locator(".viewer").first
    slider.focus()
    page.keyboard.press("Home")
    first = viewer.screenshot()
    assert said_slice.inner_text().startswith("1 of ")
    assert slider.get_attribute("aria-valuetext") == said_slice.inner_text()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    assert said_slice.inner_text().startswith("7 of ")
    assert viewer.screenshot() != first
    page.keyboard.press("End")
    bottom = viewer.locator("img").first.bounding_box()
    box = viewer.bounding_box()
    assert bottom["y"] + bottom["height"] == pytest.approx(box["y"] + box["height"], abs=3)
    # The slider of the made-up scans is another one.
    before = page.locator(".leaf .said").nth(1).inner_text()
    page.keyboard.press("Home")
    assert page.locator(".leaf .said").nth(1).inner_text() == before
    heat = group.locator(".heat").first
    assert heat.is_visible()
    group.locator("input[type=checkbox]").press("Space")
    assert not heat.is_visible()


@case
def test_nothing_is_wider_than_the_page(pages, visit, case):
    page = visit(pages[case].path).page
    page.locator("details").evaluate_all("all => all.forEach(d => { d.open = true; })")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(TOO_WIDE) == []


def test_what_scrolls_is_reached_by_keyboard(pages, visit):
    page = visit(pages["most"].path, 390).page
    page.locator("details").evaluate_all("all => all.forEach(d => { d.open = true; })")
    page.wait_for_function("""() => [...document.querySelectorAll(".scroll")].every(
        box => (box.scrollWidth > box.clientWidth) === (box.tabIndex === 0))""")
    assert page.locator(".scroll[tabindex]").count() >= 1
    assert page.locator(".scroll:not([aria-label], [aria-labelledby])").count() == 0


@pytest.mark.parametrize("case", ["nothing", "most"])
def test_on_paper_nothing_is_cut(pages, visit, case):
    # A4 less its margins, at 96 dots per inch.
    page = visit(pages[case].path, 680, 1000).page
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator("details:not([open])").count() == 0
    wide = """all => all.filter(e => e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.outerHTML.slice(0, 120))"""
    assert page.locator("table, td, th, p, li > *, .planes").evaluate_all(wide) == []
    unseen = page.locator(".leaf, summary, #reader").evaluate_all(
        "all => all.map(e => e.clientHeight)"
    )
    assert not any(unseen)
    assert len(page.pdf(prefer_css_page_size=True)) > 10_000
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0


def test_who_cannot_tell_says_so_before_any_number(made):
    page = made(
        status="abstained",
        status_reasons=({"code": "no_class_ruled_out", "values": {"coverage": 0.9, "classes": 2}},),
        prediction_set={
            "classes": ("low", "high"),
            "coverage": 0.9,
            "compared_with": "pattern",
            "calibrated_on": 41,
            "least": 9,
        },
    )
    assert "the model cannot tell" in said(page, "#banner")
    assert "must here hold all 2 classes" in said(page, "#banner")
    answer = said(page, "#answer")
    assert answer.index("The model cannot tell") < answer.index("77 %")
    assert "The set holds all of these: low, high." in answer
    assert "41 held-back patients who had these modalities, looked at with no others" in answer
    assert "more likely answer" not in answer
    sizes = [
        page.locator(part).evaluate("e => parseFloat(getComputedStyle(e).fontSize)")
        for part in (".statement", ".big")
    ]
    assert sizes[0] > sizes[1]


def test_a_set_of_one_class_leaves_the_others_outside(made):
    found = {
        "classes": ("high",),
        "coverage": 0.9,
        "compared_with": "all",
        "calibrated_on": 90,
        "least": 9,
    }
    rows = made(prediction_set=found).locator(".classes li").all_inner_texts()
    assert "in the set" in rows[0] and "outside the 90 % set" in rows[1]


def test_caution_and_flips_are_words_and_signs(made):
    page = made(alternatives={"observed_only": (0.6, 0.4), "trust_all": (0.2, 0.8)})
    assert "answered with caution" in said(page, "#status")
    assert page.locator("#status svg").count() == 1
    assert "Hardly tested" in said(page, "#status")
    assert "Trusting every recovery would say low" in said(page, "#status")
    row = page.locator("#change [data-method=observed_only]")
    assert "\u25b2" in row.inner_text() and "changes to low" in row.inner_text()
    assert page.locator("#change [data-flip]").count() == 1


def test_a_rejected_recovery_says_why_in_words_and_numbers(made):
    page = made()
    # Folded, and unfolded by keyboard.
    assert not page.locator("#why table").is_visible()
    page.locator("#why summary").press("Enter")
    assert page.locator("#why table").is_visible()
    assert "t2 was rejected: with it the class would stand out less clearly" in said(page, "#why")
    row = page.locator("#why tbody tr").first
    place = row.locator(".place")
    line, dot = (place.locator(part).bounding_box()["x"] for part in ("b", "i"))
    assert dot < line and "\u22120.640" in row.inner_text()
    admitted = page.locator("#why tr.admitted .place").first
    line, dot = (admitted.locator(part).bounding_box()["x"] for part in ("b", "i"))
    assert dot + 5 > line


def test_a_rule_says_what_became_of_each(made):
    page = made(steps=(), method="observed_only", trusted=(), rejected=("t2", "flair", "labs"))
    assert said(page, "#why").count("was left out, whatever it looks like") == 3
    assert page.locator("#why table").count() == 0


def test_names_are_text(made):
    hostile = "<img src=x onerror=document.title='alert'>"
    page = made(
        record_id=hostile,
        target=hostile,
        classes=("low", hostile),
        warnings=(hostile,),
        recovered=("t2", "flair", hostile),
        rejected=("t2", hostile),
        steps=(step(1, hostile, 0.8, 0.7, -0.1, "rejected"),),
    )
    assert page.locator("img[src=x]").count() == 0
    assert page.title() != "alert" and hostile in said(page, "#why")


def test_without_scripts_a_slice_is_shown(pages, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["nothing"].path.as_uri())
    assert not page.locator(".controls").first.is_visible()
    assert page.locator(".viewer img").first.is_visible()
    context.close()
