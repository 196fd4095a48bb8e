"""What libraries warn of and what this package logs: nothing is silenced, most of it is kept apart.

Libraries warn about many things that nobody asked for, so a command shows what they say with
`--verbose` alone; a training keeps it in `OUT/warnings.log` too. What concerns the user is logged
by this package itself, and is shown always.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

LIBRARIES = "py.warnings"  # the standard library's name for the logger of warnings
OURS = "dymo_med"


def be_verbose() -> None:
    """Ask for everything from now on: warnings of libraries, and where errors come from."""
    logging.getLogger(OURS).setLevel(logging.DEBUG)


def is_verbose() -> bool:
    """Return whether `be_verbose` was called."""
    return logging.getLogger(OURS).isEnabledFor(logging.DEBUG)


@contextmanager
def heard(handler: logging.Handler) -> Iterator[None]:
    """Give everything that is logged meanwhile to a handler, warnings of libraries too.

    Whoever chose what Python warns of (`python -W`) is left with that choice.

    Args:
        handler: Shows it, or does not.
    """
    ours, libraries = logging.getLogger(OURS), logging.getLogger(LIBRARIES)
    before = ours.level, libraries.propagate
    libraries.propagate = False
    for logger in (ours, libraries):
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("default")
                warnings.showwarning = _log
            yield
    finally:
        for logger in (ours, libraries):
            logger.removeHandler(handler)
        ours.level, libraries.propagate = before
        ours.setLevel(before[0])  # forgets what was found out about levels


def _log(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Log a warning, as `warnings.showwarning` would show it."""
    text = " ".join(str(message).split())[:500]
    logging.getLogger(LIBRARIES).warning("%s: %s", category.__name__, text)


class _Kept(logging.FileHandler):
    """A file that is made, with its folder, when there is something to write."""

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


@contextmanager
def kept(path: Path) -> Iterator[None]:
    """Write what is logged meanwhile to a file too; without a line there is no file.

    Args:
        path: Is added to, so that a run that goes on loses nothing.
    """
    handler = _Kept(path, encoding="utf-8", delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    loggers = [logging.getLogger(name) for name in (LIBRARIES, OURS)]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
