"""Output that appears complete or not at all, and one way to write JSON and CSV."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dymo_med.errors import ConfigError, Problem


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file so that a reader sees the old content or the new, never half of it.

    Args:
        path: Where to; its folder exists.
        content: The whole content. It is on the disk before it takes the name, so that a power
            cut cannot leave an empty file either.

    Returns:
        `path`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, its line ends as they are; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """Write JSON with floats that read back to the same bits; NaN and infinity become null.

    Args:
        path: Where to.
        data: Dictionaries keep their order.
    """
    text = json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path, most_bytes: int = 1 << 26) -> Any:
    """Read a JSON file that this package wrote, and nothing that could mean two things.

    Args:
        path: The file.
        most_bytes: A larger one is refused before it is read.

    Returns:
        What it holds.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is too large, not JSON, too deep, or holds a key twice or a number that is
            not finite; the message says which and repeats nothing of the content.
    """
    if path.stat().st_size > most_bytes:
        raise ValueError(f"more than {most_bytes:,} bytes")

    def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key that occurs twice")
        return dict(pairs)

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError("a number that is not finite")
        return float(text)

    try:
        return json.loads(
            path.read_bytes().decode(),
            object_pairs_hook=as_object,
            parse_float=finite,
            parse_constant=finite,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON in line {error.lineno}") from None
    except UnicodeDecodeError:
        raise ValueError("text that is not UTF-8") from None
    except RecursionError:
        raise ValueError("lists or objects too deep in one another") from None


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write a table; see `csv_text`."""
    write_text(path, csv_text(header, rows))


def csv_text(header: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    """Return a table: RFC 4180 quoting, Unix line ends, nine significant digits.

    Args:
        header: Columns in order.
        rows: One mapping per row with exactly these columns; None, NaN and infinity become blank
            cells.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(row[column]) for column in header] for row in rows)
    return buffer.getvalue()


@contextmanager
def csv_stream(
    path: Path, header: Sequence[str]
) -> Iterator[Callable[[Iterable[Mapping[str, object]]], None]]:
    """Write a table as `write_csv` does, without holding all of it.

    Args:
        path: Where to; the file appears when the block ends, and not if it fails.
        header: Columns in order.

    Yields:
        A function that appends rows.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(header)

            def append(rows: Iterable[Mapping[str, object]]) -> None:
                writer.writerows([_cell(row[column]) for column in header] for row in rows)

            yield append
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(out: Path, marker: str, names: Collection[str]) -> None:
    """Check that a folder may be written: new, empty, or this command's own earlier output.

    Args:
        out: The folder.
        marker: File that only this command's output has.
        names: All that this command's output has at its top; hidden files do not matter.

    Raises:
        ConfigError: If there is something else, which replacing would delete.
    """
    if not out.exists():
        return
    if out.resolve() == Path.cwd():
        raise ConfigError(
            Problem(
                str(out),
                "is the folder you are in",
                expected="a folder that can be replaced",
                remedy="Name a folder inside it",
            )
        )
    if not out.is_dir():
        raise ConfigError(
            Problem(str(out), "is a file", expected="a folder", remedy="Name another one")
        )
    if any(out.iterdir()) and not (out / marker).is_file():
        raise ConfigError(
            Problem(
                str(out),
                "is not empty and was not written by this command",
                expected=f"a new or empty folder, or one with {marker}",
                remedy="Name another folder with --out",
            )
        )
    others = sorted(
        p.name for p in out.iterdir() if p.name not in names and not p.name.startswith(".")
    )
    if others:
        raise ConfigError(
            Problem(
                str(out),
                "holds files that this command did not write and would delete",
                expected="nothing else",
                got=", ".join(others[:5]),
                remedy="Move them away, or name another folder with --out",
            )
        )


@contextmanager
def complete_folder(out: Path, marker: str, names: Collection[str]) -> Iterator[Path]:
    """Give a folder to fill, which becomes `out` if nothing goes wrong and vanishes otherwise.

    Args:
        out: The folder that is to appear. An earlier output there is replaced; a link to a folder
            stays a link.
        marker: See `check_replaceable`.
        names: See `check_replaceable`.

    Yields:
        An empty folder beside `out`.

    Raises:
        ConfigError: See `check_replaceable`.
    """
    check_replaceable(out, marker, names)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    tag = secrets.token_hex(4)
    temporary = out.with_name(f".dymo-med.{tag}")
    earlier = out.with_name(f".dymo-med.{tag}.earlier")
    temporary.mkdir()
    try:
        yield temporary
        while True:
            check_replaceable(out, marker, names)
            with suppress(FileNotFoundError):
                out.rename(earlier)
            try:
                temporary.rename(out)
                break
            except OSError as error:
                # Somebody else who writes there was faster; who is last stays.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                shutil.rmtree(earlier, ignore_errors=True)
    finally:
        if earlier.exists() and not out.exists():
            earlier.rename(out)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


def _cell(value: object) -> object:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.9g}" if isinstance(value, float) else value
