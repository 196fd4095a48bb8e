"""Output that appears complete or not at all, and one way to write JSON and CSV.

What is being written has a hidden name, `.dymo-med.HOST-PROCESS-PLACE.TAG`, that says whose it is.
A run that is killed leaves it behind; the next one that writes there removes it.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from dymo_med.errors import ConfigError, Problem

_LOG = logging.getLogger(__name__)
_PREFIX = ".dymo-med."
_EARLIER = ".earlier"
_TEMPORARY = re.compile(r"\.dymo-med\.([0-9a-f]{8})-([0-9]{1,9})-([0-9a-f]{8})\.[0-9a-f]{8}")
# What this process is writing, and the folders in which it has looked for what others left.
_OWN: set[str] = set()
_SEEN: set[Path] = set()
_DAY = 24 * 60 * 60

# A cell that a spreadsheet would take for a formula or a command (OWASP, CSV Injection): it begins
# with one of these signs, their wide forms or a control character; blanks and characters that
# nobody sees do not count. Where a list is divided by other signs, a cell begins after these too.
_UNSEEN = r"[ \u00a0\u00ad\u200b-\u200f\u2028-\u202f\u2060-\u206f\u3000\ufeff]*"
_SIGNS, _CONTROLS = r"-=+@\uff1d\uff0b\uff0d\uff20", r"\x00-\x1f\x7f-\x9f"
_ACTS = re.compile(
    rf"(^{_UNSEEN}'*(?={_UNSEEN}[{_SIGNS}{_CONTROLS}])"
    rf"|(?<=[;\t\r\n]){_UNSEEN}'*(?={_UNSEEN}[{_SIGNS}]))"
)
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file so that a reader sees the old content or the new, never half of it.

    Args:
        path: Where to; its folder exists.
        content: The whole content. It is on the disk before it takes the name, so that a power
            cut cannot leave an empty file either.

    Returns:
        `path`.
    """
    with _replacing(path) as temporary, temporary.open("wb") as stream:
        _hold(stream.fileno())
        stream.write(content)
        _on_disk(stream)
    return path


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a file to write, which becomes `path` if nothing goes wrong and vanishes otherwise."""
    folder = path.parent.absolute()
    if folder not in _SEEN:
        _SEEN.add(folder)
        remove_abandoned(folder)
    temporary = path.with_name(_temporary(path))
    try:
        with naming(path, temporary):
            yield temporary
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        _OWN.discard(temporary.name)


def _on_disk(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


@contextmanager
def naming(path: Path, *others: Path) -> Iterator[None]:
    """Let an error of the disk say which file it is about: a full one does not say.

    Args:
        path: What was to be written.
        others: Hidden files that stood for it.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, *map(str, others)):
            error.filename, error.filename2 = str(path), None
        raise


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
        ValueError: If it is no regular file, too large, not JSON, too deep, or holds a key twice or
            a number that is not finite; the message says which and repeats nothing of the content.
    """
    if not path.is_file() and path.exists():
        raise ValueError("no regular file")
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


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a table; see `csv_text`."""
    write_text(path, csv_text(header, rows))


def csv_text(header: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Return a table: RFC 4180 quoting, Unix line ends, nine significant digits.

    Text that a spreadsheet would take for a formula is marked as text; see `as_text`.

    Args:
        header: Columns in order.
        rows: One mapping per row with exactly these columns; None, NaN and infinity become blank
            cells.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(_cell, header))
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
    with (
        _replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as stream,
    ):
        _hold(stream.fileno())
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(map(_cell, header))

        def append(rows: Iterable[Mapping[str, object]]) -> None:
            writer.writerows([_cell(row[column]) for column in header] for row in rows)

        yield append
        _on_disk(stream)


def as_text(cell: str) -> str:
    """Return a cell that spreadsheets show as it is: one they would act on gets an apostrophe.

    A number is left alone, so that a negative one stays a number. `as_was` undoes it.

    Args:
        cell: Text of a cell.

    References:
        OWASP, CSV Injection.

    Example:
        >>> as_text("=1+1"), as_text("-2.5"), as_text("a = b")
        ("'=1+1", '-2.5', 'a = b')
    """
    return cell if _NUMBER.fullmatch(cell) else _ACTS.sub(r"\1'", cell)


def as_was(cell: str) -> str:
    """Return what `as_text` was given.

    Args:
        cell: Text of a cell in a file that this package wrote.

    Example:
        >>> as_was("'=1+1"), as_was("'tis")
        ('=1+1', "'tis")
    """
    return _ACTS.sub(lambda found: found[1].removesuffix("'"), cell)


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
    remove_abandoned(out.parent, out)
    temporary = out.with_name(_temporary(out))
    earlier = out.with_name(f"{temporary.name}{_EARLIER}")
    with ExitStack() as stack:
        stack.callback(_OWN.discard, temporary.name)
        temporary.mkdir()
        stack.enter_context(_held(temporary))
        try:
            with _naming_within(temporary, out):
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


@contextmanager
def _naming_within(temporary: Path, out: Path) -> Iterator[None]:
    """Let an error of the disk name the file in `out` that was to be, not the hidden one."""
    try:
        yield
    except OSError as error:
        name = Path(os.fsdecode(error.filename or temporary))
        if error.errno is not None and name.is_relative_to(temporary):
            error.filename, error.filename2 = str(out / name.relative_to(temporary)), None
        raise


# --- What killed runs leave -----------------------------------------------------------------------


def remove_abandoned(folder: Path, out: Path | None = None) -> None:
    """Remove what runs that were killed were writing in a folder, and log its number.

    Removed is what this package named, the same user owns, and was made on this computer by a
    process that has ended: its number is free and its lock, where files can be locked, too. What a
    run still writes, or another computer may, is never touched. If a run was killed in the moment
    between moving an earlier result away and putting its own in the place, the earlier one is put
    back.

    Args:
        folder: Where to look; not in folders below it.
        out: The result that is about to be written there.
    """
    if os.name != "posix":
        return  # there, asking whether a process runs could end it
    found: dict[str, list[Path]] = {}
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name.removesuffix(_EARLIER)
            if entry.name.startswith(_PREFIX) and _TEMPORARY.fullmatch(name):
                found.setdefault(name, []).append(folder / entry.name)
    gone = 0
    for name, paths in found.items():
        if not all(_abandoned(path, name) for path in paths):
            continue
        if len(paths) > 1:  # a result and the earlier one
            if out is None or _place(out) != name.split("-")[-1].split(".")[0]:
                continue  # for the next run that writes that result
            if not out.exists():
                (folder / f"{name}{_EARLIER}").rename(out)
                _LOG.warning("%s: put back; a run was killed while it replaced it", out)
        for path in paths:
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            gone += not os.path.lexists(path)
    if gone:
        _LOG.warning("%s: removed what killed runs had left (%d)", folder, gone)


def _abandoned(path: Path, name: str) -> bool:
    """Return whether nobody writes there any more, as far as this computer can tell."""
    parts = _TEMPORARY.fullmatch(name)
    try:
        facts = path.lstat()
    except OSError:
        return False
    if parts is None or facts.st_uid != os.getuid() or name in _OWN:
        return False
    if not (stat.S_ISDIR(facts.st_mode) or stat.S_ISREG(facts.st_mode)):
        return False
    if parts[1] != _host():
        if time.time() - facts.st_mtime > _DAY:
            _LOG.warning("%s: left by a run on another computer; remove it if that has ended", path)
        return False
    return not _runs(int(parts[2])) and not _is_held(path)


def _runs(process: int) -> bool:
    """Return whether a process of this number runs, this one excepted."""
    if process == os.getpid():
        return False  # in a container, the next run often has the number of the last
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _host() -> str:
    return sha256(platform.node().encode()).hexdigest()[:8]


def _place(path: Path) -> str:
    return sha256(os.fsencode(path.name)).hexdigest()[:8]


def _temporary(path: Path) -> str:
    """Return a hidden name for what is to become `path`, which says who writes it."""
    name = f"{_PREFIX}{_host()}-{os.getpid()}-{_place(path)}.{secrets.token_hex(4)}"
    _OWN.add(name)
    return name


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep a lock on a folder; the system gives it back however this process ends."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # some systems open no folders
        yield
        return
    try:
        _hold(handle)
        yield
    finally:
        os.close(handle)


def _hold(handle: int) -> None:
    """Lock what is being written, where it can be locked."""
    if sys.platform != "win32":
        import fcntl

        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_held(path: Path) -> bool:
    """Return whether somebody has a lock on it; a disk without locks has none."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


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
    if isinstance(value, float):
        return f"{value:.9g}"
    return as_text(value) if isinstance(value, str) else value
