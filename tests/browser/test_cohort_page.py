import csv
import re
from itertools import pairwise

import pytest

# Pages are looked at as people look at them: what is shown, not how it was made.
ROWS = """table => [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => ({
    id: r.cells[0].textContent.trim(),
    keys: [...r.cells].map(c => c.dataset.sort ?? null),
    texts: [...r.cells].map(c => c.textContent.trim()),
}))"""
# What is wider than the page, but for what scrolls by itself or is there for screen readers only.
TOO_WIDE = """() => [...document.querySelectorAll("body *")].filter(e =>
    !e.closest(".scroll, figure.plot, .hidden") && e.getBoundingClientRect().width > 0
    && (e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1)
).map(e => e.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def first(evaluated):
    """Predictions of the first scenario by method and record."""
    with (evaluated / "predictions.csv").open(newline="", encoding="utf-8") as stream:
        rows = [r for r in csv.DictReader(stream) if r["scenario"] == "as-is"]
    return {(r["method"], r["record_id"]): r for r in rows}


@pytest.fixture(scope="module")
def records(first):
    return [record for method, record in first if method == "dymo"]


@pytest.fixture
def opened(evaluated, visit):
    return visit(evaluated / "index.html")


def shown(page):
    return page.locator("#patient-table").evaluate(ROWS)


def test_it_needs_nothing_and_complains_of_nothing(opened):
    page = opened.page
    page.locator("#patient-table th button").first.click()
    page.locator("summary").first.click()
    assert opened.errors == []
    assert opened.requests and all(url.startswith("file:") for url in opened.requests)
    images = page.locator("img").evaluate_all("all => all.map(i => [i.src, i.naturalWidth, i.alt])")
    assert len(images) >= 6
    assert all(width > 0 and alt for _, width, alt in images), images


def test_the_first_screen_answers(opened):
    page, seen = opened.page, {"width": 1280, "height": 800}
    for part in (".answer", ".verdicts", "#finding img"):
        box = page.locator(part).first.bounding_box()
        assert box["y"] + min(box["height"], 100) <= seen["height"], part
    verdicts = page.locator(".verdicts tbody tr").all_inner_texts()
    assert len(verdicts) == 2
    words = re.compile("It helped|It hurt|No clear difference|Not measurable")
    assert all(words.search(row) for row in verdicts)
    assert "of 2 scenarios" in page.locator(".answer").inner_text()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_page(evaluated, visit, width):
    page = visit(evaluated / "index.html", width).page
    page.locator("details").evaluate_all("all => all.forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(TOO_WIDE) == []


def test_what_scrolls_is_reached_by_keyboard(evaluated, visit):
    page = visit(evaluated / "index.html", 390).page
    page.locator("details").evaluate_all("all => all.forEach(d => { d.open = true; })")
    # The page notices by itself, after it was laid out.
    page.wait_for_function("""() => [...document.querySelectorAll(".scroll, figure.plot")].every(
        box => (box.scrollWidth > box.clientWidth) === (box.tabIndex === 0))""")
    assert page.locator(".scroll[tabindex]").count() > 3
    assert page.locator(".scroll:not([aria-label])").count() == 0


def test_headings_are_in_order_and_links_lead_somewhere(opened):
    page = opened.page
    levels = page.locator("h1, h2, h3, h4").evaluate_all("all => all.map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels)), levels
    targets = page.locator("nav a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    assert len(targets) >= 8
    assert all(page.locator(target).count() == 1 for target in targets)
    ids = page.locator("[id]").evaluate_all("all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_every_column_sorts_both_ways(opened):
    page = opened.page
    heads = page.locator("#patient-table thead th")
    before = {row["id"] for row in shown(page)}
    for column in range(heads.count()):
        button = heads.nth(column).locator("button")
        # By keyboard: what a mouse can do, a keyboard can.
        for way in ("ascending", "descending"):
            button.press("Enter")
            assert heads.nth(column).get_attribute("aria-sort") == way
            assert page.locator("#patient-table [aria-sort]").count() == 1
            rows = shown(page)
            assert {row["id"] for row in rows} == before
            keys = [row["keys"][column] for row in rows]
            if keys[0] is None:
                texts = [row["texts"][column].lower() for row in rows]
                assert texts == sorted(texts, reverse=way == "descending")
                continue
            there = [float(key) for key in keys if key]
            assert there == sorted(there, reverse=way == "descending")
            # Nothing there is last, whichever way.
            assert all(keys[: len(there)]) and not any(keys[len(there) :])


def test_numbers_sort_as_numbers_and_nothing_is_last(opened):
    page = opened.page
    page.locator("#patient-table tbody tr").evaluate_all(
        "all => all.forEach((r, i) => { r.cells[3].dataset.sort = ['10', '9', '-1', ''][i % 4]; })"
    )
    page.locator("#patient-table thead button").nth(3).click()
    assert [row["keys"][3] for row in shown(page)] == ["-1"] * 3 + ["9"] * 3 + ["10"] * 3 + [""] * 3
    page.locator("#patient-table thead button").nth(3).click()
    assert [row["keys"][3] for row in shown(page)] == ["10"] * 3 + ["9"] * 3 + ["-1"] * 3 + [""] * 3


def test_filters_show_the_rows_that_they_should(opened, first, records):
    page = opened.page
    wrong = {r for r in records if first["dymo", r]["predicted"] != first["dymo", r]["label"]}
    changed = {
        r
        for r in records
        if first["dymo", r]["predicted"] != first["observed_only", r]["predicted"]
    }
    count = page.locator("#count")
    assert count.get_attribute("role") == "status"
    assert count.inner_text() == f"{len(records)} of {len(records)} shown"

    def now(expected):
        assert {row["id"] for row in shown(page)} == expected
        assert count.inner_text() == f"{len(expected)} of {len(records)} shown"

    page.check("#only-wrong")
    now(wrong)
    page.check("#only-changed")
    now(wrong & changed)
    page.uncheck("#only-wrong")
    now(changed)
    page.uncheck("#only-changed")
    page.fill("#filter", "  P00 ")
    now({r for r in records if "p00" in r})
    page.fill("#filter", "p00 v2")
    now({r for r in records if "p00" in r and "v2" in r})
    page.fill("#filter", "no such patient")
    now(set())
    page.fill("#filter", "")
    now(set(records))


def test_sorting_keeps_what_is_filtered(opened, records):
    page = opened.page
    page.fill("#filter", "v2")
    before = {row["id"] for row in shown(page)}
    assert 0 < len(before) < len(records)
    page.locator("#patient-table thead button").nth(3).click()
    assert {row["id"] for row in shown(page)} == before


def test_a_patient_opens_and_the_way_back_leads_here(opened, records):
    page = opened.page
    links = page.locator("#patient-table tbody a")
    assert links.count() == 1
    record = links.first.inner_text()
    links.first.click()
    page.wait_for_url(f"**/reports/{record}/report.html")
    assert page.locator("h1").count() == 1
    page.go_back()
    assert page.locator("#patient-table").count() == 1
    assert opened.errors == []


def test_on_paper_nothing_is_cut(evaluated, visit):
    # A4 less its margins, at 96 dots per inch.
    page = visit(evaluated / "index.html", 680, 1000).page
    assert page.locator("details:not([open])").count() > 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator("details:not([open])").count() == 0
    wide = """all => all.filter(e => e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.outerHTML.slice(0, 120))"""
    assert page.locator("table, td, th, img, p").evaluate_all(wide) == []
    assert (
        page.locator("nav, .filters").evaluate_all("all => all.some(e => e.clientHeight)") is False
    )
    assert len(page.pdf(prefer_css_page_size=True)) > 10_000
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0


def test_hostile_names_are_text(evaluated, visit, tmp_path):
    """As written by the template; that all of it is escaped, the unit tests see to."""
    hostile = "<img src=x onerror=document.title='alert'>"
    page = (evaluated / "index.html").read_text(encoding="utf-8")
    escaped = hostile.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;")
    (tmp_path / "plots").symlink_to(evaluated / "plots")
    (tmp_path / "index.html").write_text(page.replace("p000", escaped), encoding="utf-8")
    opened = visit(tmp_path / "index.html")
    # Sorting and filtering move and read text; neither makes markup of it.
    opened.page.locator("#patient-table thead button").first.click()
    opened.page.fill("#filter", "onerror")
    assert opened.page.locator("#patient-table img").count() == 0
    assert len(shown(opened.page)) > 0 and opened.page.title() != "alert"
    assert opened.errors == []
