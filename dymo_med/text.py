"""Text as it is compared: what looks the same is the same."""

from __future__ import annotations

import unicodedata
from functools import lru_cache


def comparable(text: str) -> str:
    r"""Return a name or a category as it is compared with others.

    In Unicode's composed form (NFC, Unicode Standard Annex 15), without characters that nobody sees
    (byte-order marks, zero-width and soft hyphens, marks of direction), and with one space for any
    white space: a name out of a spreadsheet equals the same name that somebody typed.

    Example:
        >>> comparable(" Gro\u0308\u00dfe\u200b \u00a0(cm)") == "Gr\u00f6\u00dfe (cm)"
        True
    """
    return text.strip() if text.isascii() and text.isprintable() else _comparable(text)


@lru_cache(maxsize=4096)
def _comparable(text: str) -> str:
    seen = (
        " " if c.isspace() else "" if unicodedata.category(c) in ("Cc", "Cf") else c for c in text
    )
    return " ".join(unicodedata.normalize("NFC", "".join(seen)).split())
