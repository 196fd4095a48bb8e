"""A headless browser, and a page to open in it; skips where either part is absent."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dymo_med.inference.evaluate import evaluate
from dymo_med.types import Subgroup
from tests.unit.conftest import bundle, bundle_dir

__all__ = ["bundle", "bundle_dir"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, as it is installed on this machine; nothing is downloaded."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser on the PATH: none of {', '.join(BROWSERS)}")
    with api.sync_playwright() as playwright:
        # Containers have no user namespaces for the sandbox; the pages are our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def evaluated(browser, bundle, cohort, tmp_path_factory):
    """Folder of an evaluation with all sections; after `browser`, whose absence skips."""
    out = tmp_path_factory.mktemp("browser") / "out"
    by_sex = replace(cohort, subgroups=(Subgroup("sex", "sex", "demographics", ()),))
    scenarios = ("as-is", "rate:0.5")
    evaluate(
        bundle,
        by_sex,
        out,
        split="train",
        scenarios=scenarios,
        reports=1,
        allow_overlap=True,
    )
    return out


@pytest.fixture(scope="session")
def context(browser):
    """What pages are opened in; without a network."""
    return browser.new_context(offline=True)


@pytest.fixture
def visit(context):
    """Open a file at a width; complaints and requests are kept."""
    pages = []

    def visit(path: Path, width: int = 1280, height: int = 800) -> SimpleNamespace:
        page, seen = context.new_page(), SimpleNamespace(errors=[], requests=[])
        pages.append(page)
        page.set_viewport_size({"width": width, "height": height})
        page.on("console", lambda m: seen.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.goto(path.as_uri())
        return SimpleNamespace(page=page, **vars(seen))

    yield visit
    for page in pages:
        page.close()
