"""The reader's section, as a file and as `dymo-med review` serves it."""

import hashlib
import json
import shutil
import threading
from types import SimpleNamespace

import pytest

from dymo_med.review import ReviewFile, ReviewServer, read_reviews

COMMENT = "<img src=x onerror=document.title='alert'>\n\"second\" line"


@pytest.fixture
def report(evaluated, tmp_path):
    """Folder of one patient's page, a copy that may be written to."""
    (found,) = (evaluated / "reports").iterdir()
    return shutil.copytree(found, tmp_path / "out" / "reports" / found.name)


@pytest.fixture
def served(report):
    server = ReviewServer(report.parents[1], 0)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def opened(browser):
    """Open an address; complaints and what is asked for are kept."""
    context = browser.new_context(accept_downloads=True)

    def opened(address):
        page, seen = context.new_page(), SimpleNamespace(errors=[], asked=[])
        page.on("console", lambda m: seen.errors.append(m.text) if m.type != "log" else None)
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("request", lambda request: seen.asked.append(request.url))
        page.goto(address)
        return page, seen

    yield opened
    context.close()


def say(page, verdict, comment="", reviewer=""):
    page.get_by_label(verdict, exact=True).check()
    page.get_by_label("Why? (optional)").fill(comment)
    page.get_by_label("Your name or initials (optional)").fill(reviewer)


def test_opened_as_a_file_it_downloads_one_review(report, opened, tmp_path):
    page, seen = opened((report / "report.html").as_uri())
    assert page.get_by_role("button", name="Save review").count() == 0
    assert page.get_by_role("link", name="All patients").count() == 0
    say(page, "I disagree", COMMENT, " AB ")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Download review.json").press("Enter")
    assert waiting.value.suggested_filename == "review.json"
    path = tmp_path / "review.json"
    waiting.value.save_as(path)
    (review,) = ReviewFile.model_validate_json(path.read_bytes()).reviews
    assert (review.verdict, review.comment, review.reviewer) == ("disagree", COMMENT, "AB")
    content = json.loads((report / "prediction.json").read_text(encoding="utf-8"))
    assert review.content_sha256 == content["content_sha256"]
    assert page.locator("#reader-status").inner_text() == "Downloaded as review.json."
    # Put where the page says, the program reads it.
    shutil.copy(path, report)
    assert read_reviews(report) == [review]
    assert seen.errors == []
    assert all(url.startswith(("file:", "blob:", "data:")) for url in seen.asked)


def test_without_a_verdict_nothing_is_downloaded(report, opened):
    page, seen = opened((report / "report.html").as_uri())
    page.get_by_role("button", name="Download review.json").click()
    assert page.locator("#reader-status").inner_text() == ""
    assert page.locator("#reader :invalid").count() > 0 and seen.errors == []


def test_served_it_saves_and_shows(report, served, opened):
    page, seen = opened(served.url)
    assert "0 of 1 reviewed" in page.locator("main").inner_text()
    page.get_by_role("link", name=report.name).click()
    say(page, "I disagree", COMMENT, "AB")
    page.get_by_role("button", name="Save review").click()
    page.get_by_text("Saved.", exact=True).wait_for()
    line = page.locator("#reader li")
    assert line.count() == 1 and line.locator("p").inner_text() == COMMENT
    assert line.inner_text().startswith("Disagrees AB")
    assert page.get_by_label("Why? (optional)").input_value() == ""
    say(page, "I agree")
    page.get_by_role("button", name="Save review").click()
    page.locator("#reader li").nth(1).wait_for()

    first, second = read_reviews(report)
    assert (first.verdict, first.comment, first.reviewer) == ("disagree", COMMENT, "AB")
    assert (second.verdict, second.comment, second.reviewer) == ("agree", "", None)
    digest = hashlib.sha256((report / "report.html").read_bytes()).hexdigest()
    assert first.report_sha256 == digest and first.content_sha256

    page.reload()
    page.locator("#reader li").nth(1).wait_for()
    assert page.locator("#reader li").nth(0).locator("p").inner_text() == COMMENT
    assert page.locator("#reader li img").count() == 0 and page.title() != "alert"
    assert "another version" not in page.locator("#reader").inner_text()
    page.get_by_role("link", name="All patients").click()
    page.get_by_text("1 of 1 reviewed").wait_for()
    assert "Agrees (reviews: 2)" in page.locator("tbody tr").inner_text()
    assert seen.errors == []
    assert all(url.startswith((served.url, "data:")) for url in seen.asked)


def test_what_cannot_be_saved_is_said_and_not_lost(report, served, opened):
    page, _ = opened(f"{served.url}reports/{report.name}/report.html")
    (report / "review.json").write_text("{")
    say(page, "I agree", "Long thoughts.")
    page.get_by_role("button", name="Save review").click()
    page.get_by_text("cannot be read").wait_for()
    assert page.get_by_label("Why? (optional)").input_value() == "Long thoughts."
    with page.expect_download():
        page.get_by_role("button", name="Download review.json").click()
    assert (report / "review.json").read_text() == "{"


def test_a_cohort_page_works_as_before(evaluated, opened):
    server = ReviewServer(evaluated, 0)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        page, seen = opened(server.url)
        page.get_by_role("link", name="The whole cohort").click()
        page.fill("#filter", "no such patient")
        assert page.locator("#count").inner_text().startswith("0 of")
        # The server hands pictures over one by one: a decode waits for its bytes, or rejects.
        decoded = "all => Promise.all(all.map(i => i.decode().then(() => i.naturalWidth)))"
        images = page.locator("img").evaluate_all(decoded)
        assert images and all(images)
        page.fill("#filter", "")
        page.locator("#patient-table tbody a").first.click()
        page.get_by_role("button", name="Save review").wait_for()
        assert seen.errors == []
    finally:
        server.shutdown()
        server.server_close()


def test_other_pages_can_neither_read_nor_write(report, served, opened, tmp_path):
    """As another web page open in the same browser would try."""
    (tmp_path / "evil.html").write_text("<title>evil</title>")
    page, _ = opened((tmp_path / "evil.html").as_uri())
    place = f"{served.url}reports/{report.name}/"
    body = '{"verdict": "agree"}'
    tries = """async ([place, body, token]) => {
        const types = ["text/plain", "application/json"];
        for (const type of types) for (const mode of ["cors", "no-cors"]) {
            const headers = { "Content-Type": type };
            if (mode === "cors") headers["X-Review-Token"] = token;
            await fetch(place + "review", { method: "POST", mode, headers, body }).catch(() => 0);
        }
        return fetch(place + "prediction.json").then((r) => r.text(), () => "nothing");
    }"""
    # Even one who knows the token is stopped by the origin.
    assert page.evaluate(tries, [place, body, served.token]) == "nothing"
    assert not (report / "review.json").exists()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_section_fits_and_every_field_has_a_name(report, served, opened, width):
    page, seen = opened(f"{served.url}reports/{report.name}/report.html")
    page.set_viewport_size({"width": width, "height": 800})
    right = "all => Math.max(...all.map(e => e.getBoundingClientRect().right))"
    assert page.locator("#reader *").evaluate_all(right) <= width
    fields = page.locator("#reader input, #reader textarea")
    assert fields.evaluate_all("all => all.every(e => e.labels.length === 1)")
    assert page.get_by_role("group", name="Is the answer right?").count() == 1
    page.emulate_media(media="print")
    assert not page.locator("#reader").is_visible()
    assert seen.errors == []
