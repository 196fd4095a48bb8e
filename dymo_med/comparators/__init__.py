"""Trained classifiers without an imputer, which a cohort's evaluation sets beside our answers."""

from __future__ import annotations

from dymo_med.comparators.base import Comparator, FittedComparator
from dymo_med.comparators.concatenation import Concatenation
from dymo_med.comparators.moddrop import ModDrop
from dymo_med.comparators.unimodal import Unimodal
from dymo_med.registry import Registry

COMPARATORS: Registry[Comparator] = Registry(
    "comparator", {"unimodal": Unimodal, "concatenation": Concatenation, "moddrop": ModDrop}
)

__all__ = ["COMPARATORS", "Comparator", "FittedComparator"]
