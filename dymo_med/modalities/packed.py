"""Packed data is read to its end and held to its own checksum and length.

The libraries stop at the bytes that they need. What they return is then as long as it should be
and may be wrong: the checksum, which comes last, was never looked at.
"""

from __future__ import annotations

import bz2
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dymo_med.modalities.scan import ScanError

_PIECE = 2**20
_PNG = b"\x89PNG\r\n\x1a\n"
# Of `zlib.decompressobj`: a zlib stream, and a member of a gzip file.
_BITS = {"zlib": 15, "gzip": 31}
# TIFF tags (TIFF 6.0, section 8 and 15): compression, and where strips or tiles are.
_COMPRESSION, _PLACES = 259, ((273, 279), (324, 325))
_DEFLATE = (8, 32946)


def damaged(got: str) -> ScanError:
    """Return the error of a file whose packed data is not what was written.

    Args:
        got: What is wrong with it.
    """
    return ScanError(
        "the file is damaged, cut short or not what its header says",
        expected="data that fits its own checksum and the length that its header states",
        got=got,
        remedy="Copy it again from where it came from, or export it again",
    )


def unpacked(source: BinaryIO, packing: str, size: int, skip: int = 0) -> NDArray[np.uint8]:
    """Return the bytes that a stream unpacks to.

    Args:
        source: At the first byte of the stream, and with nothing behind its end; behind a gzip
            stream there may be further members, or zeros.
        packing: `zlib`, `gzip`, `bzip2`, or `raw` for data that is not packed.
        size: Bytes that it must unpack to, no more and no fewer; the caller holds them to the
            limits first.
        skip: Bytes to leave out at the beginning, besides these.

    Raises:
        ScanError: If it is damaged, longer or shorter.
    """
    out, count = np.empty(skip + size, np.uint8), 0
    view = memoryview(out.data)
    try:
        for piece in _raw(source) if packing == "raw" else _pieces(source, packing):
            if count + len(piece) > len(out):
                raise damaged(f"more than the {size} bytes that its header states")
            view[count : count + len(piece)] = piece
            count += len(piece)
    except (zlib.error, EOFError, OSError) as error:
        raise damaged(type(error).__name__) from error
    if count < len(out):
        raise damaged(f"{max(0, count - skip)} bytes where its header states {size}")
    return out[skip:]


def _raw(source: BinaryIO) -> Iterator[bytes]:
    while piece := source.read(_PIECE):
        yield piece


def _pieces(source: BinaryIO, packing: str) -> Iterator[bytes]:
    """Yield what a stream unpacks to, to its end, in pieces of bounded size.

    Raises:
        EOFError: If the source ends before the stream does.
        zlib.error: If the stream is damaged or its checksum wrong; of bzip2 OSError.
        ScanError: If something lies behind its end.
    """
    data = source.read(_PIECE)
    while True:
        stream: Any = bz2.BZ2Decompressor() if packing == "bzip2" else None
        stream = stream or zlib.decompressobj(_BITS[packing])
        while not stream.eof:
            data = data or source.read(_PIECE)
            piece = stream.decompress(data, _PIECE)
            if not data and not piece:
                raise EOFError
            # bzip2 keeps what it has not looked at; zlib gives it back.
            data = b"" if packing == "bzip2" else stream.unconsumed_tail
            yield piece
        data = stream.unused_data or source.read(_PIECE)
        while packing == "gzip" and data and not data.strip(b"\0"):
            data = source.read(_PIECE)
        if not data:
            return
        if packing != "gzip":
            raise damaged("bytes behind the end of the packed data")
        data = data.lstrip(b"\0")


def hold_png(path: Path) -> None:
    """See that every chunk of a PNG file fits its checksum, up to the last one.

    Raises:
        ScanError: If one does not, or the file ends before.
    """
    with path.open("rb") as stream:
        if stream.read(8) != _PNG:
            return
        kind = b""
        while kind != b"IEND":
            length, kind = struct.unpack(">I4s", stream.read(8).ljust(8, b"\0"))
            check, left = zlib.crc32(kind), length
            while left and (piece := stream.read(min(left, _PIECE))):
                check, left = zlib.crc32(piece, check), left - len(piece)
            if left or stream.read(4) != struct.pack(">I", check):
                raise damaged("a chunk that does not fit its checksum")


def hold_tiff(path: Path, tags: Any, most: int) -> None:
    """See that every deflated strip or tile of a TIFF file fits its checksum.

    Args:
        path: The file.
        tags: Of its picture, by number (Pillow's `tag_v2`).
        most: Bytes that all may unpack to.

    Raises:
        ScanError: If one does not.
    """
    if tags.get(_COMPRESSION) not in _DEFLATE:
        return
    count = 0
    with path.open("rb") as stream:
        for of_places, of_lengths in _PLACES:
            for place, length in zip(
                tags.get(of_places, ()), tags.get(of_lengths, ()), strict=True
            ):
                stream.seek(place)
                unpacker, data = zlib.decompressobj(), stream.read(length)
                try:
                    while not unpacker.eof:
                        piece = unpacker.decompress(data, _PIECE)
                        count += len(piece)
                        if count > most or not (data or piece):
                            raise damaged("strips that are longer or shorter than the picture")
                        data = unpacker.unconsumed_tail
                except zlib.error as error:
                    raise damaged("a strip that does not fit its checksum") from error
