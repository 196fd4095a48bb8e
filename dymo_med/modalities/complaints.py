"""What the libraries underneath print on stderr, heard instead of shown.

ITK's MetaIO, GDCM and the decoders of JPEG write their complaints there from C++, past Python, and
go on. Nobody can act on such a line, and it may be the only sign that what was read is wrong.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2


@contextmanager
def complaints() -> Iterator[list[str]]:
    """Collect the lines that are written to stderr meanwhile; they are there afterwards.

    For the process as a whole: not for use while other threads write there.
    """
    lines: list[str] = []
    sys.stderr.flush()
    saved = os.dup(_STDERR)
    try:
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), _STDERR)
            try:
                yield lines
            finally:
                os.dup2(saved, _STDERR)
                sink.seek(0)
                lines += sink.read().decode(errors="replace").splitlines()
    finally:
        os.close(saved)
