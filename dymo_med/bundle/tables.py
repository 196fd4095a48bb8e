"""Components by name: recipes and bundles name them, tables hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dymo_med.backbones import BACKBONES, SEGMENTERS
from dymo_med.comparators import COMPARATORS
from dymo_med.config import Recipe
from dymo_med.config import read_recipe as _read_recipe
from dymo_med.errors import ConfigError, Problem
from dymo_med.imputers import IMPUTERS
from dymo_med.registry import Registry
from dymo_med.selection import SELECTORS, Selector

TABLES: dict[str, Registry[Any]] = {
    "imputer": IMPUTERS,
    "backbone": BACKBONES,
    "selector": SELECTORS,
    "comparators": COMPARATORS,
}


def read_recipe(path: Path) -> Recipe:
    """Read a recipe and check it against the tables of this version.

    Raises:
        ConfigError: With every problem at once.
    """
    any_backbone: Registry[Any] = Registry("backbone", {**BACKBONES, **SEGMENTERS})
    recipe = _read_recipe(path, {**TABLES, "backbone": any_backbone})
    if recipe.imputer is None and recipe.backbone.name in BACKBONES:
        raise ConfigError(
            Problem(
                f"{path} imputer",
                "a required key is absent",
                expected="the key imputer",
                remedy="Add it; only a segmentation can do without",
            )
        )
    return recipe


def table_entry(part: str, entry: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a table entry's class and its validated options."""
    options = dict(entry)
    found = TABLES[part][options.pop("name")]
    if "image_encoders" in found.Options.model_fields and "image_encoders" not in options:
        # Bundles from before encoders had names.
        before = {"image_encoders": ["strided"], "table_encoder": "columns", "tails": False}
        options = {k: v for k, v in before.items() if k in found.Options.model_fields} | options
    return found, found.Options.model_validate(options)


def selector_entries(selectors: Mapping[str, Selector]) -> dict[str, Any]:
    """Return selectors, by name, ready for JSON: options and what was fitted."""
    return {
        name: {"options": selector.options.model_dump(), "state": selector.state()}
        for name, selector in selectors.items()
    }


def restored(entries: Mapping[str, Any] | Sequence[str]) -> dict[str, Selector]:
    """Return the selectors that `selector_entries` described.

    Args:
        entries: By name; the names alone in segmentation bundles made before options were stored.

    Raises:
        KeyError: If there is no such selector, or something is absent.
        ValueError: If options or state cannot be right.
    """
    if not isinstance(entries, Mapping):
        entries = {name: {"options": {}, "state": {}} for name in entries}
    selectors: dict[str, Selector] = {}
    for name, entry in entries.items():
        found = SELECTORS[name]
        selectors[name] = found(found.Options.model_validate(entry["options"]))
        selectors[name].load_state(entry["state"])
    return selectors
