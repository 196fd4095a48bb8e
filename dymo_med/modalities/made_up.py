"""Scans, sequences and tables that this package recovered, told from measured ones.

People copy `recovered/` to fill a gap and predict again. A recovery says in its header what it is;
other programs carry that over into the header of another format (NIfTI's `descrip`, a comment of
NRRD, MetaImage, DICOM, PNG or TIFF), so it is looked for as text, wherever it stands.
"""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

from dymo_med.errors import Problem, RefusedError

SYNTHETIC = "SYNTHETIC: recovered by dymo-med"
SEGMENTED = "dymo-med segmentation"
RECOVERED_COLUMNS = ("column", "value", "unit", "source")
"""Of the table of what was recovered."""
_MARKS = tuple(
    text.encode(code) for text in (SYNTHETIC, SEGMENTED) for code in ("utf-8", "utf-16-le")
)
_NAME = re.compile(r"_synthetic(\.|$)", re.IGNORECASE)
# Headers are at one end of a file.
_LOOKED_AT = 2**18
_MOST_FILES = 500


def refuse_made_up(path: Path, where: str, name: str) -> None:
    """Refuse what this package made up, whatever it is called now.

    Args:
        path: File or folder of a modality.
        where: Who this is, for the message.
        name: Of the modality.

    Raises:
        RefusedError: If it is a recovery, or a segmentation, of this package.
    """
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*"))[:_MOST_FILES] if file.is_file()]
    if _NAME.search(path.name) or any(_is_marked(file) for file in files):
        raise RefusedError(
            Problem(
                f"{where}: {path.name}, {name}",
                "it was not measured: this program made it up, or found it, in an earlier run",
                expected="a measured file",
                got="the mark that it writes into what it makes",
                remedy="Take it out of the patient directory; what is missing is recovered again",
            ),
            checks=("made_up",),
        )


def _is_marked(file: Path) -> bool:
    """Return whether a file says that it was made up; one that cannot be read says nothing."""
    try:
        with file.open("rb") as stream:
            head = stream.read(_LOOKED_AT)
            size = stream.seek(0, 2)
            stream.seek(max(len(head), size - _LOOKED_AT))
            tail = stream.read(_LOOKED_AT)
        if head.startswith(b"\x1f\x8b"):
            with gzip.open(file) as packed:
                head = packed.read(_LOOKED_AT)
    except (OSError, EOFError, zlib.error):
        return False
    return any(mark in part for mark in _MARKS for part in (head, tail)) or _is_table(file, head)


def _is_table(file: Path, head: bytes) -> bool:
    """Return whether it is a table of what was recovered, in any of the formats of tables."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        return _is_parquet_table(file)
    code = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = head.decode(code, errors="replace")
    if kind == ".json":
        first = text.partition("}")[0]
        return sorted(re.findall(r'"([^"]*)"\s*:', first)) == sorted(RECOVERED_COLUMNS)
    if kind not in (".csv", ".tsv"):
        return False
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("sep=")]
    cells = re.split(r"[,;\t|]", lines[0] if lines else "")
    return sorted(cell.strip(' "').lower() for cell in cells) == sorted(RECOVERED_COLUMNS)


def _is_parquet_table(file: Path) -> bool:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        names = parquet.read_schema(file).names
    except (pa.ArrowException, OSError, ValueError):
        return False
    return sorted(names) == sorted(RECOVERED_COLUMNS)
