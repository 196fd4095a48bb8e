"""What the libraries underneath print on stderr, heard instead of shown.

ITK's MetaIO, GDCM and the decoders of JPEG write their complaints there from C++, past Python, and
go on. Nobody can act on such a line, and it may be the only sign that what was read is wrong.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2
# How the lines of MetaIO, NrrdIO, ITK, GDCM, libjpeg, CharLS and OpenJPEG begin.
_LIBRARY = re.compile(
    rb"\s*(Meta(Image|Object|IO)|MET_|M_\w+:|Uncompress|\[?nrrd|ITK|itk|WARNING: In|gdcm"
    rb"|Unsupported |Invalid |Corrupt JPEG|Premature end|Marker handler|Error|Warning|Failed|Stream"
    rb"|Tile|\w+ required and not|Not enough|Unknown marker|Expected a )"
)


@contextmanager
def complaints() -> Iterator[list[str]]:
    """Collect the lines that libraries write to stderr meanwhile; they are there afterwards.

    Stderr belongs to the process as a whole, so another thread may write there too: a progress
    bar, with its control characters, and Python's own lines. What is not a library's is passed on.
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
                for line in sink.read().splitlines(keepends=True):
                    if _LIBRARY.match(line):
                        lines.append(line.decode(errors="replace").strip())
                    else:
                        os.write(_STDERR, line)
    finally:
        os.close(saved)
