"""What is installed with the program: bundles, recipes and cohort descriptions, by name."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# kind: its folder, the file that makes an entry one, and whether that file is the entry itself
_KINDS = {
    "bundle": ("bundles", "configs/metadata.json"),
    "cohort": ("cohorts", "cohort.yaml"),
    "recipe": ("configs", ""),
}


def shipped(kind: str) -> dict[str, Path]:
    """Return what is installed of a kind, by name.

    An installed package holds it all; of a checkout recipes and cohorts lie beside the package.

    Args:
        kind: `bundle`, `cohort` or `recipe`.

    Example:
        >>> "simulated" in shipped("bundle")
        True
    """
    name, marker = _KINDS[kind]
    folder = _PACKAGE / name
    if not folder.is_dir():
        folder = _PACKAGE.parent / name
    if not folder.is_dir():
        return {}
    if not marker:
        return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {path.name: path for path in sorted(folder.iterdir()) if (path / marker).is_file()}


def found(path: Path, kind: str) -> Path:
    """Return a path, or what is installed under that name where there is none.

    A recipe may be named as in a checkout, `configs/NAME.yaml`.

    Args:
        path: As typed.
        kind: `bundle`, `cohort` or `recipe`.
    """
    folder, marker = _KINDS[kind]
    if (path / marker if marker else path).exists() or path.parent not in (Path(), Path(folder)):
        return path
    return shipped(kind).get(path.stem if not marker else path.name, path)
