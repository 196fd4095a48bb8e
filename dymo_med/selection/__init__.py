"""Deciding per patient which recovered modalities to trust; tensors and protocols only."""

from __future__ import annotations

from dymo_med.registry import Registry
from dymo_med.selection.average import SubsetAverage
from dymo_med.selection.base import Cases, Selector, WithDraws
from dymo_med.selection.draws import Average, Guarded, Integrated, joined, over_draws
from dymo_med.selection.fixed import ObservedOnly, TrustAll
from dymo_med.selection.gate import Gate
from dymo_med.selection.greedy import Dymo, DymoMargin, DymoRatio, DymoUncalibrated, Simultaneous
from dymo_med.selection.statistics import fit_statistics

SELECTORS: Registry[Selector] = Registry(
    "selector",
    {
        "observed_only": ObservedOnly,
        "trust_all": TrustAll,
        "dymo": Dymo,
        "dymo_ratio": DymoRatio,
        "dymo_uncalibrated": DymoUncalibrated,
        "simultaneous": Simultaneous,
        "dymo_margin": DymoMargin,
        "gate": Gate,
        "subset_average": SubsetAverage,
        "average": Average,
        "guarded": Guarded,
    },
)

__all__ = [
    "SELECTORS",
    "Average",
    "Cases",
    "Guarded",
    "Integrated",
    "Selector",
    "WithDraws",
    "fit_statistics",
    "joined",
    "over_draws",
]
