"""Predict for patients whose imaging or records are incomplete, and show what was made up.

The names below load on first use, so that importing the package (and `dymo-med --help`) stays
fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load_bundle": "dymo_med.bundle",
    "read_cohort": "dymo_med.data.cohort",
    "simulate": "dymo_med.data.simulate",
    "train": "dymo_med.training.train",
    "predict_patient": "dymo_med.inference.predict",
    "evaluate": "dymo_med.inference.evaluate",
    "impute_patient": "dymo_med.inference.recovered",
    "load_segmentation_bundle": "dymo_med.bundle_segmentation",
    "segment_patient": "dymo_med.inference.segment",
    "evaluate_segmentation": "dymo_med.inference.segment_evaluate",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'dymo_med' has no attribute '{name}'")
