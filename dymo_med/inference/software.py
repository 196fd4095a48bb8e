"""Which software made a result."""

from __future__ import annotations

import platform
from importlib import metadata

from dymo_med import __version__


def versions() -> dict[str, str]:
    """Return the versions of the software behind a result."""
    names = ("torch", "monai", "numpy", "captum")
    return {
        "dymo_med": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }
