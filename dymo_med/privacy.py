"""Pseudonyms: what stands for a patient's identifier wherever somebody could read it.

An identifier that a scan's header or a FHIR file states leaves the memory of this program as a
pseudonym only, unless `--identify` asks for it. A pseudonym is the same on every run of one
installation and says nothing without that installation's key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from dymo_med.errors import ConfigError, Problem

KEY_VARIABLE = "DYMO_MED_KEY_FILE"
_KEY = re.compile(rb"[0-9a-f]{64}\n?")
# 128 bits: no two of all patients there ever were share one by chance.
_DIGITS = 32


def pseudonym(identifier: str) -> str:
    """Return what stands for a patient's identifier on this installation.

    The first 128 bits of HMAC-SHA256 (RFC 2104, FIPS 180-4) of the identifier, in hexadecimal.
    A plain hash would not do: identifiers are short, and all of them can be tried. The key is
    made on first use.

    Args:
        identifier: As a header states it; spaces around it do not count.

    Raises:
        ConfigError: If the key cannot be made or read, or others can read it.
    """
    digest = hmac.new(_key(), identifier.strip().encode(errors="surrogatepass"), hashlib.sha256)
    return digest.hexdigest()[:_DIGITS]


def shown(identifier: str, *, identify: bool) -> str:
    """Return an identifier as a report may show it: `pseudonym …`, or `patient …` if asked for.

    Args:
        identifier: As a header states it.
        identify: Whether the user asked for the identifier itself.

    Raises:
        ConfigError: See `pseudonym`.
    """
    return f"patient {identifier.strip()}" if identify else f"pseudonym {pseudonym(identifier)}"


def key_file() -> Path:
    """Return where the installation's key is: `DYMO_MED_KEY_FILE`, or the user's configuration.

    The folder for configuration follows the XDG Base Directory Specification: `XDG_CONFIG_HOME`
    if it is an absolute path, else `~/.config`.
    """
    if os.environ.get(KEY_VARIABLE):
        return Path(os.environ[KEY_VARIABLE])
    configuration = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if not configuration.is_absolute():
        configuration = Path("~/.config").expanduser()
    return configuration / "dymo-med" / "pseudonym.key"


def _key() -> bytes:
    """Return the installation's key, which is made if there is none."""
    path = key_file()
    try:
        if not path.exists():
            _make(path)
        with path.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            content = stream.read(100)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        raise ConfigError(
            Problem(
                str(path),
                "the key that pseudonyms of patients are made with cannot be made or read",
                got=type(error).__name__,
                remedy=f"Make its folder writable, or name another file in {KEY_VARIABLE}",
            )
        ) from error
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(
            Problem(
                str(path),
                "others can read the key that pseudonyms of patients are made with",
                expected="permissions 600",
                got=f"{mode:o}",
                remedy="Run chmod 600 on it; if somebody may have read it, remove it: a new one"
                " is made, and pseudonyms change",
            )
        )
    if not _KEY.fullmatch(content):
        raise ConfigError(
            Problem(
                str(path),
                "this is not a key that pseudonyms of patients are made with",
                expected="64 hexadecimal digits",
                remedy="Put the key back from a copy, or remove the file: a new one is made, and"
                " pseudonyms change",
            )
        )
    return bytes.fromhex(content.decode())


def _make(path: Path) -> None:
    """Make a key that only the user can read; of processes that do so at once, one wins."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
            f.write(secrets.token_hex(32).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
        # A link is made whole and never replaces a key that another process has made meanwhile.
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
