"""Every error of the package says what to do, and the documentation lists it."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def errors():
    """The program that lists the errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        yield importlib.import_module("errors")


def test_every_error_is_whole(errors):
    """What is wrong, what was expected or found, what to do, and with which exit code it ends."""
    entries = [entry for module in errors.modules() for entry in module.entries()]
    assert len(entries) > 150
    lacking = [
        f"{e.module}:{e.line}"
        for e in entries
        if not (e.parts.get("what") and e.parts.get("remedy"))
        or not (e.parts.get("expected") or e.parts.get("got"))
        or e.code is None
    ]
    assert lacking == []


def test_the_page_lists_every_error(errors):
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    assert page == errors.page(), "run: python docs/errors.py"
