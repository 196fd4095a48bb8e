"""The folder of a bundle: checksums, versions, its JSON files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dymo_med import __version__
from dymo_med.bundle.checks import LARGEST_CONFIG_BYTES, check_keys, check_options
from dymo_med.bundle.device import too_large
from dymo_med.errors import BundleError, ConfigError, Problem, out_of_memory
from dymo_med.files import read_json

SCHEMA_VERSION = 2
AGAIN = "Copy the bundle again from where it was made"
# What reading files that do not belong together can end in.
UNREADABLE = (
    *(KeyError, TypeError, ValueError, AttributeError, IndexError),
    *(OverflowError, RuntimeError, OSError, MemoryError, SafetensorError, ConfigError),
)


def misfit(path: Path, error: Exception) -> BundleError | ConfigError:
    """Return what to raise where a bundle's files were read and something went wrong.

    Args:
        path: The bundle.
        error: What went wrong.
    """
    if out_of_memory(error):
        return too_large(path)
    return BundleError(
        Problem(
            str(path),
            "the bundle does not fit this version",
            expected=f"what dymo-med {__version__} writes",
            got=f"{type(error).__name__} while reading it",
            remedy="Train it again, or install the version that made it",
        )
    )


def hashed_id(bundle_name: str, patient_id: str) -> str:
    """Return the form in which a bundle remembers whom it was fitted on.

    Short ids can be found again by trying all of them, so this guards against mixing splits, not
    against an attacker.
    """
    return hashlib.sha256(f"{bundle_name}\n{patient_id}".encode()).hexdigest()[:32]


def task_of(path: Path) -> str:
    """Return the type of task of a bundle, or `classification` of what is not one.

    What is wrong with it is left to those who load it.

    Args:
        path: Bundle folder.
    """
    try:
        return str(read_json(path / "configs" / "metadata.json")["target"]["type"])
    except (OSError, ValueError, KeyError, TypeError):
        return "classification"


def require_task(path: Path, *, segmentation: bool) -> None:
    """Check that a bundle is for a segmentation, or that it is not.

    Raises:
        BundleError: If it is the other way round.
    """
    got = task_of(path)
    if (got == "segmentation") != segmentation:
        loader = "load_bundle" if segmentation else "load_segmentation_bundle"
        raise BundleError(
            Problem(
                str(path),
                "the bundle is for another task",
                expected="a segmentation" if segmentation else "a classification or regression",
                got=f"a {got}",
                remedy=f"Choose another bundle; in Python, load this one by {loader}",
            )
        )


def read_part(path: Path, name: str) -> Any:
    """Return what a JSON file of a bundle holds.

    Raises:
        BundleError: If it cannot be read or could mean two things.
    """
    try:
        data = read_json(path / name, LARGEST_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise BundleError(
            Problem(
                f"{path}: {name}",
                "the file cannot be used",
                expected="JSON that this package wrote",
                got=type(error).__name__ if isinstance(error, OSError) else str(error),
                remedy=AGAIN,
            )
        ) from None
    if name == "configs/metadata.json":
        check_version(path, data)
    check_keys(path, name, data)
    if name == "configs/inference.json":
        check_options(path, [data.get("imputer"), data.get("backbone")])
    return data


def check_version(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse a bundle of another format, or of a version that this one cannot know.

    Raises:
        BundleError: Saying which.
    """
    made_by = str(metadata.get("version", "unknown"))[:40]
    if metadata["schema_version"] != SCHEMA_VERSION:
        raise BundleError(
            Problem(
                str(path),
                "the bundle's format is not known to this version",
                expected=f"schema_version {SCHEMA_VERSION}",
                got=str(metadata["schema_version"])[:40],
                remedy=f"Install the dymo-med version that made it ({made_by})",
            )
        )
    # Numbers alone: 0.2.0rc1 counts as 0.2.0.
    made, here = (tuple(map(int, re.findall(r"\d+", v)[:3])) for v in (made_by, __version__))
    if not made or made > here:
        raise BundleError(
            Problem(
                str(path),
                "the bundle was made by a newer version of this package",
                expected=f"dymo-med {__version__} or earlier",
                got=made_by,
                remedy=f"Install dymo-med {made_by}",
            )
        )


def verified(path: Path) -> dict[str, str]:
    """Return the checksums after comparing them with the files.

    Raises:
        BundleError: Naming every file that differs.
    """
    try:
        sums = read_json(path / "checksums.json")
        if not isinstance(sums, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise BundleError(
            Problem(
                str(path / "checksums.json"),
                "the list of checksums is absent or unreadable",
                expected="a SHA-256 by file name, in JSON",
                got=type(error).__name__ if isinstance(error, OSError) else str(error),
                remedy=AGAIN,
            )
        ) from None
    now = checksums_of(path)
    differing = sorted(n for n in {*sums, *now} if sums.get(n) != now.get(n))
    if differing:
        raise BundleError(
            *(
                Problem(
                    f"{path}: {name}",
                    "the file is absent"
                    if name not in now
                    else "the file is not part of the bundle"
                    if name not in sums
                    else "the file has changed since the bundle was made",
                    expected="the files of checksums.json, unchanged and no others",
                    remedy=AGAIN,
                )
                for name in differing
            )
        )
    return {str(k): str(v) for k, v in sums.items()}


def checksums_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of the bundle but the list itself.

    Raises:
        BundleError: If a file is a link that leads out of the bundle, or cannot be read.
    """
    sums = {}
    inside = folder.resolve()
    for part in ("configs", "docs", "models"):
        for file in sorted((folder / part).rglob("*")):
            name = file.relative_to(folder).as_posix()
            if file.name.startswith("."):  # a file browser's own notes
                continue
            try:
                if not file.resolve().is_relative_to(inside):
                    raise BundleError(
                        Problem(
                            f"{folder}: {name}",
                            "the file is a link that leads out of the bundle",
                            expected="files inside the bundle's own folder",
                            remedy="Copy the bundle with what its links lead to (cp -rL)",
                        )
                    )
                if file.is_file():
                    with file.open("rb") as stream:
                        sums[name] = hashlib.file_digest(stream, "sha256").hexdigest()
            except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
                raise BundleError(
                    Problem(
                        f"{folder}: {name}",
                        "the file cannot be read",
                        expected="a file that you may read",
                        got=type(error).__name__,
                        remedy="Check its permissions, or copy the bundle again",
                    )
                ) from None
    return sums


def identity(sums: Mapping[str, str]) -> str:
    """Return the id of a bundle: a hash over its checksums."""
    return hashlib.sha256(json.dumps(dict(sums), sort_keys=True).encode()).hexdigest()
