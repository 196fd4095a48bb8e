"""How much any input may hold: one place for every bound on memory and time.

A few bytes may claim, or unpack to, far more than a machine has. So every reader compares what a
file claims with these numbers before it asks for memory, and counts what it unpacks as it goes.
Readers look a limit up here when they read (`limits.MAX_TEXT_BYTES`, never a copy of their own),
so that a program that needs another one sets it once.
"""

from __future__ import annotations

import math

from dymo_med.errors import Problem

MAX_UNPACKED_BYTES = 2**30
"""Bytes of one scan, table, array or set of weights as its numbers lie in memory, unpacked: for
example a CT of 512 x 512 x 2000 voxels in 16 bits. A larger input is refused, packed or not."""

MAX_HEADER_BYTES = 2**24
"""Bytes of what describes an input and is read whole: the header of an image with its extensions,
a DICOM file without its pixels, the header of a file of weights. The largest that scanners write,
those of multi-frame DICOM, are a few megabytes."""

MAX_TEXT_BYTES = 2**28
"""Bytes of a text that is parsed row by row: CSV, JSON, FHIR, XML; unpacked, if it is packed."""

MAX_TABLE_BYTES = 2**27
"""Bytes of a table's file, or of one file of a FHIR record."""

MAX_CELLS = 10_000_000
"""Cells of a table that are read: rows times columns; in text all of its columns, in Parquet those
that are declared. A million patients have ten."""

MAX_CELL_CHARACTERS = 131_072
"""Characters of one cell (the bound of Python's reader of CSV)."""

MAX_JSON_PARTS = 5_000_000
"""Values of a JSON file, as many as it has commas and opening brackets: about 120,000 observations
of FHIR."""

MAX_YAML_BYTES = 2**20
"""Bytes of a text that people write by hand: a cohort's description, a recipe."""

MAX_INFLATION = 1032
"""Times that deflate can shrink anything, at most (RFC 1951: 258 bytes in 2 bits)."""

LARGE_BYTES, MAX_THINNESS = 2**28, 200
"""A scan of at least so many bytes is packed to no less than one part in so many: the emptiest of
masks is packed 100 to 1."""


def readable(size: int) -> str:
    """Return a number of bytes for people.

    Example:
        >>> readable(2**30), readable(1_500_000), readable(12)
        ('1 GiB', '1.43 MiB', '12 bytes')
    """
    if size < 1024:
        return f"{size} bytes"
    power = min(3, int(math.log2(size)) // 10)
    return f"{size / 1024**power:.3g} {('KiB', 'MiB', 'GiB')[power - 1]}"


def too_large(where: str, what: str, size: int, limit: int, remedy: str) -> Problem:
    """Return the problem of an input that is, or unpacks to, more than a limit.

    Args:
        where: The file, without the patient's name.
        what: What is too large, as a noun with its article: "the table", "the unpacked scan".
        size: Its bytes, as far as they were counted.
        limit: The bytes that it may have.
        remedy: What the user can do.

    Returns:
        The problem; the caller wraps it in the error of its kind.
    """
    return Problem(
        where,
        f"{what} is larger than what is read",
        expected=f"at most {readable(limit)}",
        got=readable(size) if size > limit else f"more than {readable(limit)}",
        remedy=remedy,
    )
