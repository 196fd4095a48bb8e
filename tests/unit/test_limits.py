"""Every input is held to one set of limits."""

import pytest

from dymo_med import limits
from dymo_med.errors import PatientDataError


@pytest.mark.parametrize(
    ("size", "text"),
    [(1, "1 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (2**30, "1 GiB"), (2**45, "3.28e+04")],
)
def test_a_size_for_people(size, text):
    assert limits.readable(size).startswith(text)


def test_what_is_too_large_says_its_size_and_the_limit():
    told = limits.too_large("a.csv", "the table", 3 * 2**30, 2**30, "Keep fewer rows")
    assert "at most 1 GiB" in str(told) and "3 GiB" in str(told)
    counted = limits.too_large("a.csv", "the table", 2**30, 2**30, "Keep fewer rows")
    assert "more than 1 GiB" in counted.got
    assert "Keep fewer rows" in str(PatientDataError(told))
