"""Deciding per patient which recovered modalities to trust; tensors and protocols only."""

from __future__ import annotations

from dymo_med.registry import Registry
from dymo_med.selection.selector import Dymo, ObservedOnly, Selector, TrustAll
from dymo_med.selection.statistics import fit_statistics

SELECTORS: Registry[Selector] = Registry(
    "selector", {"dymo": Dymo, "observed_only": ObservedOnly, "trust_all": TrustAll}
)

__all__ = ["SELECTORS", "Selector", "fit_statistics"]
